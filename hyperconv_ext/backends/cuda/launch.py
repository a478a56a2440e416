"""From tensors and a plan to the operators of the shared library; outputs and workspaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...layout import as_channels_last, new_activation
from ...problem import JOINT, Plan, Wanted
from ..reference import ACTIVATIONS, LEAKY_SLOPE
from ..scaling import scale_norms
from ..shares import total
from . import tiles, wgmma
from .tiles import basis_pieces, channels, map_of

_TILE = 256  # elements of a packed 16x16 tile
_ACTIVATIONS = tuple(ACTIVATIONS)  # their numbers are those of `Activation` in csrc/launchers.h


def _launch(name: str, *args: Any) -> None:
    getattr(torch.ops.hyperconv_ext_cuda, name)(*args)


@dataclass(frozen=True)
class _Fixed:
    """What the launches of a plan take that does not depend on its tensors."""

    numbers: Tensor  # int32, what `parse_plan` in csrc/library.cpp reads
    workspace: int  # elements for the bands, the rearranged coefficients, and what float16 is scaled by
    shares: int
    atomic: bool
    pieces: int


@lru_cache(maxsize=4096)
def _fixed_of(plan: Plan) -> _Fixed:
    """Once for a plan, not at every launch."""
    problem, tile = plan.problem, plan.tile
    kernel, map = tile.kernel, map_of(problem, tile.unit, tile.grid)
    size_i, size_o = channels(problem)
    multiple = kernel.outputs
    gathers = problem.op == "basis_conv_bwd_basis"  # u: a product over the outputs, without bands
    if gathers:
        size_i, size_o, multiple = size_o, size_i, 16
    tiles_i, tiles_o = -(-size_i // 16), -(-size_o // multiple) * (multiple // 16)
    bands, packed, pieces = map.units.bands * map.chunks, 0, 1
    if problem.op != "basis_conv_bwd_coeff":
        packed = problem.geometry.groups * tiles_i * tiles_o
    sizes = (kernel.outputs // 16, kernel.ranks, tile.warps, tile.slice, tile.stages)
    choice = (*sizes, tile.shared_bytes, tile.patch_width)
    rank = problem.rank
    if tile.patch_width:  # by `wgmma`: functions in packs, one set of bands
        bands, rank = tile.slice, -(-rank // kernel.ranks) * kernel.ranks
    if gathers:
        bands = 0
        pieces = wgmma.basis_pieces(problem, tile) if tile.patch_width else basis_pieces(map)
    count, atomic = (wgmma if tile.patch_width else tiles).shares(problem, tile)
    sums = problem.wanted or problem.op in ("basis_conv_bwd_coeff", "basis_conv_bwd_basis")
    scales = -(-4 * problem.rank // (2 * _TILE)) * _TILE if sums and problem.dtype == "float16" else 0
    return _Fixed(
        torch.tensor([*map.numbers, *choice], dtype=torch.int32, device="cpu"),
        (bands + packed) * rank * _TILE + scales,
        count,
        atomic,
        pieces,
    )


def _float(tensor: Tensor) -> Tensor:
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.float().contiguous()


def _layers(
    weights: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """An MLP's parameters as the kernels read them: all of `dtype`, or else all in float32."""
    for tensor in (*weights, *biases):
        if tensor.dtype is not dtype:
            return [_float(weight) for weight in weights], [_float(bias) for bias in biases]
    return [weight.contiguous() for weight in weights], [bias.contiguous() for bias in biases]


def _output(plan: Plan, source: Tensor) -> Tensor:
    """Uninitialised result of `basis_conv_fwd` or `basis_conv_bwd_input`."""
    problem, geometry = plan.problem, plan.problem.geometry
    if problem.op == "basis_conv_fwd":
        return new_activation(source, problem.out_channels, geometry.output_size)
    return new_activation(source, problem.in_channels, geometry.input_size)


def _written(plan: Plan, output: Tensor) -> Tensor:
    """What the kernel writes: `output`, or in its place what is channels last, as `wgmma` wants it.

    An output that answers to one position may be contiguous though that position is both.
    """
    return as_channels_last(output) if plan.tile.patch_width else output


def _bias(bias: Tensor | None, source: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(source.dtype).contiguous()


def _convolve(
    plan: Plan, source: Tensor, coefficients: Tensor, basis: Tensor, bias: Tensor | None
) -> Tensor:
    """`basis_conv_fwd` and `basis_conv_bwd_input`: two launches."""
    problem, fixed = plan.problem, _fixed_of(plan)
    output = _output(plan, source)
    written = _written(plan, output)
    _launch(
        problem.op,
        source,
        coefficients,
        _float(basis),
        _bias(bias, source),
        written,
        source.new_empty(fixed.workspace),
        fixed.numbers,
        problem.geometry.groups,
        problem.tf32,
        problem.aligned,
    )
    return output if written is output else output.copy_(written)


def basis_conv_fwd(
    plan: Plan, input: Tensor, coefficients: Tensor, basis: Tensor, bias: Tensor | None
) -> Tensor:
    """y `[B, C_out, *S']`."""
    return _convolve(plan, input, coefficients, basis, bias)


def basis_conv_bwd_input(
    plan: Plan, grad: Tensor, coefficients: Tensor, basis: Tensor, bias: Tensor | None
) -> Tensor:
    """The gradient of x, `[B, C_in, *S]`, plus a bias `[C_in]`."""
    return _convolve(plan, grad, coefficients, basis, bias)


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
    """(the result of the plan's operator, phi `[R, K]` in float32): two launches, or three."""
    problem, fixed = plan.problem, _fixed_of(plan)
    # In float16 phi is scaled by sums over all taps, which must be there first; `wgmma` reads phi.
    if problem.dtype == "float16" or plan.tile.patch_width:
        constant = problem.rank > weights[-1].shape[0]
        settings = (activation, weight_gain, linear_output)
        basis = coordinate_mlp_fwd(coordinates, weights, biases, *settings, constant)
        return _convolve(plan, input, coefficients, basis, bias), basis
    output = _output(plan, input)
    basis = coordinates.new_empty((problem.rank, problem.geometry.taps), dtype=torch.float32)
    _launch(
        "hyper_conv_fwd",
        input,
        coefficients,
        _float(coordinates),
        *_layers(weights, biases, input.dtype),
        _bias(bias, input),
        output,
        basis,
        input.new_empty(fixed.workspace),
        _ACTIVATIONS.index(activation),
        LEAKY_SLOPE,
        weight_gain,
        linear_output,
        fixed.numbers,
        problem.geometry.groups,
        problem.op == "basis_conv_bwd_input",
        problem.tf32,
        problem.aligned,
    )
    return output, basis


def _partial(fixed: _Fixed, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Where sums over all outputs go: slices of this shape or, for atomic additions, one of zeros."""
    if fixed.atomic:
        return like.new_zeros(shape, dtype=torch.float32)
    return like.new_empty((fixed.shares * fixed.pieces, *shape), dtype=torch.float32)


def _summed(fixed: _Fixed, partial: Tensor) -> Tensor:
    return partial if fixed.atomic else total(partial)


def basis_conv_bwd_coeff(plan: Plan, grad: Tensor, input: Tensor, basis: Tensor) -> Tensor:
    """The gradient of A, `[C_out, C_in/groups, R]`.

    Bitwise repeatable where the shares of the work fit in a workspace smaller than W, and always
    under `torch.use_deterministic_algorithms`; otherwise summed by atomic additions.
    """
    problem, fixed = plan.problem, _fixed_of(plan)
    shape = (problem.out_channels, channels(problem)[0], problem.rank)
    by_function = plan.tile.patch_width > 0  # as `wgmma` leaves the sums
    partial = _partial(fixed, input, (shape[2], *shape[:2]) if by_function else shape)
    _launch(
        "basis_conv_bwd_coeff",
        grad,
        input,
        _float(basis),
        partial,
        input.new_empty(fixed.workspace),
        fixed.numbers,
        problem.geometry.groups,
        fixed.shares,
        fixed.atomic,
        problem.tf32,
        problem.aligned,
    )
    sums = _summed(fixed, partial)
    if by_function:
        sums = sums.permute(1, 2, 0)
    return sums.to(input.dtype, memory_format=torch.contiguous_format)


def basis_conv_bwd_basis(plan: Plan, grad: Tensor, input: Tensor, coefficients: Tensor) -> Tensor:
    """The gradient of phi, `[R, *kernel_size]`, in float32; repeatable as `basis_conv_bwd_coeff` is."""
    problem, fixed = plan.problem, _fixed_of(plan)
    geometry, rank = problem.geometry, problem.rank
    partial = _partial(fixed, input, (rank, geometry.taps))
    _launch(
        "basis_conv_bwd_basis",
        grad,
        input,
        coefficients,
        scale_norms(coefficients, geometry.groups) if problem.dtype == "float16" else None,
        partial,
        input.new_empty(fixed.workspace),
        fixed.numbers,
        geometry.groups,
        fixed.shares,
        fixed.pieces,
        fixed.atomic,
        problem.tf32,
        problem.aligned,
    )
    return _summed(fixed, partial).view(rank, *geometry.kernel_size)


@lru_cache(maxsize=4096)
def _rest(plan: Plan) -> Plan:
    """Of a joint plan that of the gradient of phi, which is computed by itself."""
    problem = wgmma.of_basis(plan.problem)
    tile, seconds = wgmma.choose(problem)
    return replace(plan, problem=problem, tile=tile, seconds=seconds)


def basis_conv_bwd(
    plan: Plan, grad: Tensor, input: Tensor, coefficients: Tensor, basis: Tensor, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The `wanted` gradients of a layer's input, A and phi: the first two by one z of `grad`."""
    problem, fixed = plan.problem, _fixed_of(plan)
    backward = problem.op == "basis_conv_bwd_input"
    output = _output(plan, grad)
    written = _written(plan, output)
    partial = _partial(fixed, input, (problem.rank, *channels(problem)))
    _launch(
        JOINT,
        grad,
        input,
        coefficients,
        _float(basis),
        written,
        partial,
        input.new_empty(fixed.workspace),
        fixed.numbers,
        problem.geometry.groups,
        fixed.shares,
        backward,
        fixed.atomic,
        problem.tf32,
        problem.aligned,
    )
    if written is not output:
        output.copy_(written)
    sums = _summed(fixed, partial).permute((1, 2, 0) if backward else (2, 1, 0))
    gradient = sums.to(input.dtype, memory_format=torch.contiguous_format)
    if not wanted[2]:
        return output, gradient, None
    sides = (grad, input) if backward else (input, grad)
    return output, gradient, basis_conv_bwd_basis(_rest(plan), *sides, coefficients)


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
    shape = (weights[-1].shape[0] + constant, coordinates.shape[0])
    basis = coordinates.new_empty(shape, dtype=torch.float32)
    _launch(
        "coordinate_mlp_fwd",
        _float(coordinates),
        *_layers(weights, biases, weights[0].dtype),
        basis,
        _ACTIVATIONS.index(activation),
        LEAKY_SLOPE,
        weight_gain,
        linear_output,
        constant,
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
    kernels, offsets = _layers(weights, biases, weights[0].dtype)
    gradients = [[tensor.new_empty(tensor.shape) for tensor in layer] for layer in (kernels, offsets)]
    _launch(
        "coordinate_mlp_bwd",
        _float(grad),
        _float(coordinates),
        kernels,
        offsets,
        *gradients,
        _ACTIVATIONS.index(activation),
        LEAKY_SLOPE,
        weight_gain,
        linear_output,
    )
    pairs = zip((*gradients[0], *gradients[1]), (*weights, *biases), strict=True)
    return [gradient.to(parameter.dtype) for gradient, parameter in pairs]
