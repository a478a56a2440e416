"""A convolution to be planned, as numbers: what backends decide on, with no tensor in sight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

from .geometry import Geometry

Op = Literal["basis_conv_fwd", "basis_conv_bwd_input", "basis_conv_bwd_coeff", "basis_conv_bwd_basis"]
OPS: tuple[Op, ...] = (
    "basis_conv_fwd",
    "basis_conv_bwd_input",
    "basis_conv_bwd_coeff",
    "basis_conv_bwd_basis",
)
JOINT = "basis_conv_bwd"  # several gradients of one layer together
Wanted = tuple[bool, bool, bool]  # which of the gradients of (the layer's input, A, phi)


@dataclass(frozen=True)
class Device:
    """The machine as far as planning needs it.

    `capability` is the CUDA compute capability as one number (sm_90 is 90), 0 off the GPU; `processors`
    counts its multiprocessors.
    """

    kind: str
    capability: int = 0
    processors: int = 1


class WeightShape(NamedTuple):
    """W as it is built: K taps of `inputs` by `outputs` a group, of rank R, `width` bytes a number.

    `strides`: the product of the convolution's. `work`: multiply-adds of that with W, 0 if unknown.
    `trained`: whether gradients may be asked for. `kept`: whether W is there from an earlier call.
    `groups`: how many.
    """

    taps: int
    inputs: int
    outputs: int
    rank: int
    width: int
    strides: int = 1
    work: int = 0
    trained: bool = False
    kept: bool = False
    groups: int = 1


def weight_shape(
    coefficients: Sequence[int],
    geometry: Geometry,
    transposed: bool,
    width: int,
    batch: int,
    trained: bool,
    kept: bool = False,
) -> WeightShape:
    """Of the convolution by coefficients of a shape `[C_out, C_in/groups, R]`, or of its transposed.

    Without a batch (0) the work is unknown.
    """
    outputs, inputs, rank = coefficients
    taps, pair = geometry.taps, (inputs, outputs // geometry.groups)
    pair = pair[::-1] if transposed else pair
    work = batch * geometry.output_positions * outputs * inputs * taps if batch else 0
    return WeightShape(
        taps, *pair, rank, width, prod(geometry.stride), work, trained, kept, geometry.groups
    )


@dataclass(frozen=True)
class Problem:
    """One of the four operators on one shape, or several gradients of a layer together.

    `aligned` says that every activation is channels last with channels (per group too) in multiples
    of `layout.GRANULE`, so that kernels read them 16 bytes at a time. `dtype` is the name of the compute
    type (`'bfloat16'`), `tf32` whether the framework's switches allow it for float32 convolutions,
    `deterministic` the state of `torch.use_deterministic_algorithms`.

    `wanted`, if not None, makes it a joint problem: those gradients of one layer. `op` is then the
    operator that gives the gradient of the layer's input (even if that is not wanted):
    `basis_conv_bwd_input` of a convolution, `basis_conv_fwd` of a transposed one. The other gradients
    are `basis_conv_bwd_coeff` and `basis_conv_bwd_basis` in either case.
    """

    op: Op
    geometry: Geometry
    batch: int
    in_channels: int
    out_channels: int
    rank: int
    dtype: str
    device: Device
    aligned: bool = False
    tf32: bool = False
    deterministic: bool = False
    wanted: Wanted | None = None

    @property
    def ops(self) -> tuple[Op, ...]:
        """The operators whose results are asked for: of a joint problem, one for each gradient."""
        if self.wanted is None:
            return (self.op,)
        return tuple(op for op, want in zip((self.op, *OPS[2:]), self.wanted, strict=True) if want)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute: no element in the input or in the output."""
        g = self.geometry
        return 0 in (
            self.batch,
            self.in_channels,
            self.out_channels,
            g.input_positions,
            g.output_positions,
        )


# The planner makes one of each, so what hangs on a plan is found by its identity.
@dataclass(frozen=True, eq=False)
class Plan:
    """How a problem will be computed.

    `tile` is the backend's own frozen choice of block sizes (None for library calls), `seconds` the
    cost model's estimate that decided. `window`: the taps of the caller's kernel that the problem has,
    None if it has them all (`Geometry.trimmed`).
    """

    problem: Problem
    backend: str
    algorithm: str
    tile: Any
    seconds: float
    window: tuple[slice, ...] | None = None
