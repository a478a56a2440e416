"""A convolution to be planned, as numbers: what backends decide on, with no tensor in sight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .geometry import Geometry

Op = Literal["basis_conv_fwd", "basis_conv_bwd_input", "basis_conv_bwd_coeff", "basis_conv_bwd_basis"]
OPS: tuple[Op, ...] = (
    "basis_conv_fwd",
    "basis_conv_bwd_input",
    "basis_conv_bwd_coeff",
    "basis_conv_bwd_basis",
)


@dataclass(frozen=True)
class Device:
    """The machine as far as planning needs it.

    `capability` is the CUDA compute capability as one number (sm_90 is 90), 0 off the GPU; `processors`
    counts its multiprocessors.
    """

    kind: str
    capability: int = 0
    processors: int = 1


@dataclass(frozen=True)
class Problem:
    """One of the four operators on one shape.

    `aligned` says that every activation is channels last with channels (per group too) in multiples
    of `layout.GRANULE`, so that kernels read them 16 bytes at a time. `dtype` is the name of the compute
    type (`'bfloat16'`), `tf32` whether the framework's switches allow it for float32 convolutions,
    `deterministic` the state of `torch.use_deterministic_algorithms`.
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
