"""From tensors and a plan to launches. The only file that knows the kernels' argument order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from ...layout import new_activation
from ...problem import Plan
from ..lattice import Lattice
from ..reference import has_window
from ..scaling import scale_norms
from ..shares import total
from .kernels.conv import basis_kernel, direct_kernel
from .kernels.gradients import basis_gradient_kernel, coefficients_kernel
from .kernels.mlp import mlp_backward_kernel, mlp_kernel
from .kernels.prepare import prepare_kernel
from .kernels.rows import HEADER
from .tiles import (
    PATCH_GRANULE,
    Tile,
    lattice_of,
    padded_patch,
    round_up,
    split_basis,
    split_coefficients,
)

_PACK = 32  # channels per side of the blocks in which coefficients are rearranged
_BAND = 64  # patch positions per program that writes bands
_SUM = 256  # numbers per step of the sums by which float16 is scaled

# Registers per thread, stated because ptxas otherwise spills a few to reach a rounder number of blocks
# per multiprocessor.
_REGISTERS = 255


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Every launch of this backend, in one place to be watched or compiled instead.

    On the device of its tensors, whatever the current device, and on that device's current stream.
    """
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*args, **options)


def _strides(tensor: Tensor) -> tuple[tuple[int, int, int, int], int]:
    """((batch, depth, height, width), channel) strides of `[B, C, *S]`, in elements."""
    batch, channel, *spatial = tensor.stride()
    depth, height, width = (*(0,) * (3 - len(spatial)), *spatial)
    return (batch, depth, height, width), channel


_TAPS = 16  # per program and step of an MLP: the smallest side of a product


@dataclass(frozen=True)
class _Network:
    """A coordinate MLP as the kernels take it."""

    operands: tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], float]  # the last: the gain
    activation: str
    linear_output: bool
    windowed: bool  # the coordinates have one column more

    @classmethod
    def of(
        cls,
        coordinates: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        activation: str,
        weight_gain: float,
        linear_output: bool,
    ) -> _Network:
        kernels = tuple([weight.contiguous() for weight in weights])
        offsets = tuple([bias.contiguous() for bias in biases])
        # A float whatever the caller's number: an integer would be compiled in.
        operands = (coordinates.contiguous(), kernels, offsets, float(weight_gain))
        return cls(operands, activation, linear_output, has_window(coordinates, weights))

    @property
    def widths(self) -> tuple[int, ...]:
        """(D, features of every layer)."""
        weights = self.operands[1]
        return (weights[0].shape[1], *[weight.shape[0] for weight in weights])

    @property
    def block(self) -> int:
        """The widest layer as a power of two that the kernels can multiply."""
        return max(16, 1 << (max(self.widths) - 1).bit_length())

    @property
    def warps(self) -> int:
        """At 64 wide, 4 warps have too few registers for the products."""
        return max(4, self.block // 8)

    @property
    def programs(self) -> int:
        """Programs that evaluate all taps once."""
        return -(-self.operands[0].shape[0] // _TAPS)


@dataclass(frozen=True)
class _Workspace:
    """What one `prepare` launch wrote: the row map, and what the kernel at hand needs beside it."""

    rows: Tensor  # int32 [HEADER + 4 * phases]
    table: Tensor  # int32 [3, patch_size]
    patch_size: int
    bands: Tensor | None  # [bands, R, positions, patch_size]
    packed: Tensor | None  # [groups, R, in, out]; direct: [groups, in, out, padded R]
    basis: Tensor | None  # float32 [R, K], if an MLP computed it
    scales: Tensor | None  # float32 [R], by which a gradient's sums are multiplied


def _codes(numbers: Iterable[int]) -> tuple[int, ...]:
    """Integers as `prepare_kernel` takes them: never 1, nor a multiple of 16."""
    return tuple([4 * number + 3 for number in numbers])


@lru_cache(maxsize=4096)
def _axis_codes(lattice: Lattice) -> tuple[tuple[int, ...], ...]:
    return tuple(_codes(axis) for axis in lattice.axes)


def _prepare(
    plan: Plan,
    lattice: Lattice,
    basis: Tensor | _Network | None,
    coefficients: Tensor | None,
    transposed: bool,
    like: Tensor,
) -> _Workspace:
    """Launch `prepare_kernel`. Without a basis it writes no bands.

    `transposed` swaps the coefficients' (in, out) channels; `like` gives dtype and device.
    """
    problem, tile = plan.problem, plan.tile
    direct = tile.kernel == "direct"
    rank, groups = problem.rank, problem.geometry.groups
    patch_size = padded_patch(lattice, tile)
    band_block = _BAND if patch_size % _BAND == 0 else PATCH_GRANULE
    rows = like.new_empty(HEADER.value + 4 * lattice.phases, dtype=torch.int32)
    table = like.new_empty((3, patch_size), dtype=torch.int32)
    bands = packed = given = network = computed = norms = scales = None
    band_programs = pack_programs = norm_rows = 0
    scaled = problem.dtype == "float16" and not direct
    if scaled and (basis is None or coefficients is None):
        scales = like.new_empty(rank, dtype=torch.float32)
    if basis is not None:
        shape = (lattice.bands, rank, tile.positions, patch_size)
        bands = like.new_empty(shape, dtype=torch.float32 if direct else like.dtype)
        band_programs = lattice.bands * rank * (patch_size // band_block)
    if isinstance(basis, _Network):
        network = basis
        computed = like.new_empty((rank, problem.geometry.taps), dtype=torch.float32)
    elif basis is not None:
        given = basis.contiguous()
    sizes = (0, 0, 0)
    source = (0, 0, 0, 0)
    if coefficients is not None:
        out_channels, group_in, _ = coefficients.shape
        stride_o, stride_i, stride_r = coefficients.stride()
        size_i, size_o = group_in, out_channels // groups
        stride_g = size_o * stride_o
        if transposed:
            size_i, size_o, stride_i, stride_o = size_o, size_i, stride_o, stride_i
        packed_rank = tile.rank if direct else rank
        packed = like.new_empty(groups * packed_rank * size_i * size_o)
        sizes = (size_i, size_o, packed_rank)
        source = (stride_g, stride_r, stride_i, stride_o)
        if scaled and basis is None:
            norms = scale_norms(coefficients, groups)
            norm_rows = groups * group_in
        pack_programs = groups * packed_rank * -(-size_i // _PACK) * -(-size_o // _PACK)
    row_programs = round_up(max(lattice.phases, patch_size), _BAND) // _BAND
    tap_programs = network.programs if network else 0
    launch(
        prepare_kernel,
        tap_programs + band_programs + row_programs + pack_programs,
        given,
        network.operands if network else None,
        computed,
        norms,
        scales,
        bands,
        rows,
        table,
        coefficients,
        packed,
        _axis_codes(lattice),
        tap_programs,
        band_programs,
        row_programs,
        norm_rows,
        rank,
        patch_size,
        _codes(source),
        _codes(sizes),
        widths=network.widths if network else (),
        activation=network.activation if network else "",
        linear_output=network.linear_output if network else False,
        windowed=network.windowed if network else False,
        TP=tile.positions,
        BB=band_block,
        BL=_BAND,
        BP=_PACK,
        BW=network.block if network else 0,
        BK=_TAPS,
        BS=_SUM,
        SCALED=scaled,
        DIRECT=direct,
        num_warps=network.warps if network else 4,
    )
    return _Workspace(rows, table, patch_size, bands, packed, computed, scales)


def _precision(tile: Tile) -> str:
    return "ieee" if tile.number == "ieee" else "tf32"


def _options(tile: Tile) -> dict[str, Any]:
    """Compile-time arguments of the kernels that work on banded matrices."""
    return {
        "TP": tile.positions,
        "U": tile.units,
        "BC": tile.channels,
        "BP": tile.patch,
        "STAGES": tile.stages,
        "PRECISION": _precision(tile),
        "num_warps": tile.warps,
        "maxnreg": _REGISTERS,
    }


def _convolve(
    plan: Plan,
    source: Tensor,
    coefficients: Tensor,
    basis: Tensor | _Network,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """(`basis_conv_fwd` or `basis_conv_bwd_input` by the planned algorithm, phi if computed)."""
    problem, tile = plan.problem, plan.tile
    geometry, groups = problem.geometry, problem.geometry.groups
    transposed = problem.op == "basis_conv_bwd_input"
    if transposed:
        output = new_activation(source, problem.in_channels, geometry.input_size)
    else:
        output = new_activation(source, problem.out_channels, geometry.output_size)
    lattice = lattice_of(problem, tile)
    workspace = _prepare(plan, lattice, basis, coefficients, transposed, source)
    size_i, size_o = source.shape[1] // groups, output.shape[1] // groups
    out_blocks = -(-size_o // tile.outputs)
    unit_blocks = -(-lattice.units // tile.units)
    strides_x, stride_xc = _strides(source)
    strides_y, stride_yc = _strides(output)
    arguments = (
        source,
        workspace.bands,
        workspace.packed,
        None if bias is None else bias.contiguous(),
        output,
        workspace.rows,
        workspace.table,
        strides_x,
        stride_xc,
        strides_y,
        stride_yc,
        lattice.phases,
        lattice.units,
        unit_blocks,
        out_blocks,
        problem.rank,
        size_i,
        size_o,
        workspace.patch_size,
    )
    programs = lattice.phases * unit_blocks * out_blocks * groups
    if tile.kernel == "direct":
        launch(
            direct_kernel,
            programs,
            *arguments,
            lattice.patch,
            BM=tile.units,
            BC=tile.channels,
            BO=tile.outputs,
            BR=tile.rank,
            STAGES=tile.stages,
            PRECISION=_precision(tile),
            num_warps=tile.warps,
            maxnreg=_REGISTERS,
        )
    else:
        launch(
            basis_kernel,
            programs,
            *arguments,
            BO=tile.outputs,
            RESIDENT=tile.resident,
            **_options(tile),
        )
    return output, workspace.basis


def basis_conv_fwd(
    plan: Plan, input: Tensor, coefficients: Tensor, basis: Tensor, bias: Tensor | None
) -> Tensor:
    """y `[B, C_out, *S']`."""
    return _convolve(plan, input, coefficients, basis, bias)[0]


def basis_conv_bwd_input(
    plan: Plan, grad: Tensor, coefficients: Tensor, basis: Tensor, bias: Tensor | None
) -> Tensor:
    """The gradient of x, `[B, C_in, *S]`, plus a bias `[C_in]`."""
    return _convolve(plan, grad, coefficients, basis, bias)[0]


def hyper_conv_fwd(
    plan: Plan,
    input: Tensor,
    coefficients: Tensor,
    coordinates: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    weight_gain: float,
    linear_output: bool,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(the result of the plan's operator, phi `[R, K]` in float32): two launches, in float16 three."""
    mlp = (coordinates, weights, biases, activation, weight_gain, linear_output)
    if plan.problem.dtype == "float16" and plan.tile.kernel != "direct":
        # phi is scaled by sums over all taps, which must be there first.
        constant = plan.problem.rank > weights[-1].shape[0]
        given = coordinate_mlp_fwd(*mlp, constant)
        return _convolve(plan, input, coefficients, given, bias)[0], given
    network = _Network.of(*mlp)
    output, basis = _convolve(plan, input, coefficients, network, bias)
    return output, cast("Tensor", basis)


def basis_conv_bwd_coeff(plan: Plan, grad: Tensor, input: Tensor, basis: Tensor) -> Tensor:
    """The gradient of A, `[C_out, C_in/groups, R]`.

    Bitwise repeatable where the shares of the work fit in a workspace smaller than W, and always
    under `torch.use_deterministic_algorithms`; otherwise summed by atomic additions.
    """
    problem, tile = plan.problem, plan.tile
    groups, rank = problem.geometry.groups, problem.rank
    lattice = lattice_of(problem, tile)
    workspace = _prepare(plan, lattice, basis, None, False, input)
    size_i, size_o = problem.in_channels // groups, problem.out_channels // groups
    in_blocks, out_blocks = -(-size_i // tile.channels), -(-size_o // tile.outputs)
    splits, atomic = split_coefficients(problem, tile)
    shape = (problem.out_channels, size_i, rank)
    if atomic:
        partial = input.new_zeros(shape, dtype=torch.float32)
    else:
        partial = input.new_empty((splits, *shape), dtype=torch.float32)
    launch(
        coefficients_kernel,
        rank * in_blocks * out_blocks * splits * groups,
        grad,
        input,
        workspace.bands,
        workspace.scales,
        partial,
        workspace.rows,
        workspace.table,
        *_strides(grad),
        *_strides(input),
        lattice.phases,
        lattice.units,
        -(-lattice.units // tile.units),
        in_blocks,
        out_blocks,
        rank,
        splits,
        size_i,
        size_o,
        workspace.patch_size,
        BO=tile.outputs,
        ATOMIC=atomic,
        **_options(tile),
    )
    return (partial if atomic else total(partial)).to(input.dtype)


def basis_conv_bwd_basis(plan: Plan, grad: Tensor, input: Tensor, coefficients: Tensor) -> Tensor:
    """The gradient of phi, `[R, *kernel_size]`, in float32; repeatable as `basis_conv_bwd_coeff` is."""
    problem, tile = plan.problem, plan.tile
    geometry, rank = problem.geometry, problem.rank
    groups = geometry.groups
    lattice = lattice_of(problem, tile)
    workspace = _prepare(plan, lattice, None, coefficients, True, input)
    size_i, size_o = problem.in_channels // groups, problem.out_channels // groups
    chunks = workspace.patch_size // tile.patch
    splits, atomic = split_basis(problem, tile)
    shape = (rank, geometry.taps)
    if atomic:
        partial = input.new_zeros(shape, dtype=torch.float32)
    else:
        partial = input.new_empty((splits * chunks, *shape), dtype=torch.float32)
    launch(
        basis_gradient_kernel,
        chunks * rank * splits,
        grad,
        input,
        workspace.packed,
        workspace.scales,
        partial,
        workspace.rows,
        workspace.table,
        *_strides(grad),
        *_strides(input),
        lattice.phases,
        lattice.units,
        -(-lattice.units // tile.units),
        -(-size_i // tile.channels),
        rank,
        splits,
        size_i,
        size_o,
        workspace.patch_size,
        groups,
        BO=tile.outputs,
        ATOMIC=atomic,
        **_options(tile),
    )
    return (partial if atomic else total(partial)).view(rank, *geometry.kernel_size)


def coordinate_mlp_fwd(
    coordinates: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    weight_gain: float,
    linear_output: bool,
    constant: bool,
) -> Tensor:
    """phi, float32 `[R, K]`, in one launch."""
    network = _Network.of(coordinates, weights, biases, activation, weight_gain, linear_output)
    taps = coordinates.shape[0]
    basis = coordinates.new_empty((network.widths[-1] + constant, taps), dtype=torch.float32)
    launch(
        mlp_kernel,
        network.programs,
        network.operands,
        basis,
        taps,
        network.widths,
        activation,
        linear_output,
        network.windowed,
        CONSTANT=constant,
        BW=network.block,
        BK=_TAPS,
        num_warps=network.warps,
    )
    return basis


def coordinate_mlp_bwd(
    grad: Tensor,
    coordinates: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    activation: str,
    weight_gain: float,
    linear_output: bool,
) -> list[Tensor]:
    """Gradients of (weights..., biases...) from that of phi, in one launch."""
    network = _Network.of(coordinates, weights, biases, activation, weight_gain, linear_output)
    gradients = [tensor.new_empty(tensor.shape) for tensor in (*weights, *biases)]
    launch(
        mlp_backward_kernel,
        len(weights),
        grad.contiguous(),
        *network.operands,
        tuple(gradients[: len(weights)]),
        tuple(gradients[len(weights) :]),
        coordinates.shape[0],
        network.widths,
        activation,
        linear_output,
        network.windowed,
        BW=network.block,
        BK=_TAPS,
        num_warps=network.warps,
    )
    return gradients
