"""From tensors and a plan to the operators of the shared library; outputs and workspaces."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...layout import new_activation
from ...problem import Plan, Problem
from ..reference import ACTIVATIONS, LEAKY_SLOPE
from ..shares import total
from .tiles import Map, Tile, basis_pieces, channels, map_of, shares

_TILE = 256  # elements of a packed 16x16 tile
_ACTIVATIONS = tuple(ACTIVATIONS)  # their numbers are those of `Activation` in csrc/launchers.h


def _launch(name: str, *args: Any) -> None:
    getattr(torch.ops.hyperconv_ext_cuda, name)(*args)


@lru_cache(maxsize=4096)
def _dealt(problem: Problem, tile: Tile) -> tuple[Map, int, bool]:
    """(row map, shares of the sum over outputs, whether atomic): once, not at every launch."""
    return map_of(problem, tile.unit, tile.grid), *shares(problem, tile)


def _choice(tile: Tile) -> list[int]:
    """The numbers in the order of `parse_choice` in csrc/library.cpp."""
    kernel = tile.kernel
    return [
        kernel.outputs // 16,
        kernel.ranks,
        tile.warps,
        tile.slice,
        tile.stages,
        tile.shared_bytes,
    ]


def _new_bands(plan: Plan, map: Map, like: Tensor) -> Tensor:
    return like.new_empty((map.units.bands, plan.problem.rank, map.chunks, _TILE))


def _new_packed(plan: Plan, like: Tensor, size_i: int, size_o: int, multiple: int) -> Tensor:
    """Room for the coefficients as tiles: channels rounded up to 16 (in) and `multiple` (out)."""
    tiles_i, tiles_o = -(-size_i // 16), -(-size_o // multiple) * (multiple // 16)
    problem = plan.problem
    return like.new_empty((problem.geometry.groups, tiles_i, problem.rank, tiles_o, _TILE))


def _convolve(
    plan: Plan,
    source: Tensor,
    coefficients: Tensor,
    basis: Tensor,
    bias: Tensor | None,
    output: Tensor,
) -> Tensor:
    """`basis_conv_fwd` and `basis_conv_bwd_input`."""
    problem, tile = plan.problem, plan.tile
    map, _, _ = _dealt(problem, tile)
    packed = _new_packed(plan, source, *channels(problem), tile.kernel.outputs)
    _launch(
        problem.op,
        source,
        coefficients,
        basis.float().contiguous(),
        None if bias is None else bias.to(source.dtype).contiguous(),
        output,
        _new_bands(plan, map, source),
        packed,
        map.numbers,
        _choice(tile),
        problem.geometry.groups,
        problem.tf32,
        problem.aligned,
    )
    return output


def basis_conv_fwd(
    plan: Plan, input: Tensor, coefficients: Tensor, basis: Tensor, bias: Tensor | None
) -> Tensor:
    """y `[B, C_out, *S']`."""
    problem = plan.problem
    output = new_activation(input, problem.out_channels, problem.geometry.output_size)
    return _convolve(plan, input, coefficients, basis, bias, output)


def basis_conv_bwd_input(
    plan: Plan, grad: Tensor, coefficients: Tensor, basis: Tensor, bias: Tensor | None
) -> Tensor:
    """The gradient of x, `[B, C_in, *S]`, plus a bias `[C_in]`."""
    problem = plan.problem
    output = new_activation(grad, problem.in_channels, problem.geometry.input_size)
    return _convolve(plan, grad, coefficients, basis, bias, output)


def basis_conv_bwd_coeff(plan: Plan, grad: Tensor, input: Tensor, basis: Tensor) -> Tensor:
    """The gradient of A, `[C_out, C_in/groups, R]`.

    Bitwise repeatable where the shares of the work fit in a workspace smaller than W, and always
    under `torch.use_deterministic_algorithms`; otherwise summed by atomic additions.
    """
    problem, tile = plan.problem, plan.tile
    map, splits, atomic = _dealt(problem, tile)
    shape = (problem.out_channels, channels(problem)[0], problem.rank)
    if atomic:
        partial = input.new_zeros(shape, dtype=torch.float32)
    else:
        partial = input.new_empty((splits, *shape), dtype=torch.float32)
    _launch(
        "basis_conv_bwd_coeff",
        grad,
        input,
        basis.float().contiguous(),
        partial,
        _new_bands(plan, map, input),
        map.numbers,
        _choice(tile),
        problem.geometry.groups,
        splits,
        atomic,
        problem.tf32,
        problem.aligned,
    )
    return (partial if atomic else total(partial)).to(input.dtype)


def basis_conv_bwd_basis(plan: Plan, grad: Tensor, input: Tensor, coefficients: Tensor) -> Tensor:
    """The gradient of phi, `[R, *kernel_size]`, in float32. Bitwise repeatable."""
    problem, tile = plan.problem, plan.tile
    geometry, rank = problem.geometry, problem.rank
    map, splits, _ = _dealt(problem, tile)
    pieces = basis_pieces(map)
    size_i, size_o = channels(problem)
    partial = input.new_empty((splits * pieces, rank, geometry.taps), dtype=torch.float32)
    _launch(
        "basis_conv_bwd_basis",
        grad,
        input,
        coefficients,
        partial,
        _new_packed(plan, input, size_o, size_i, 16),
        map.numbers,
        _choice(tile),
        geometry.groups,
        splits,
        pieces,
        problem.tf32,
        problem.aligned,
    )
    return total(partial).view(rank, *geometry.kernel_size)


def _contiguous(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def coordinate_mlp_fwd(
    coordinates: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    activation: str,
    constant: bool,
) -> Tensor:
    """phi, float32 `[R, K]`, in one launch."""
    shape = (weights[-1].shape[0] + constant, coordinates.shape[0])
    basis = coordinates.new_empty(shape, dtype=torch.float32)
    _launch(
        "coordinate_mlp_fwd",
        coordinates.float().contiguous(),
        _contiguous(weights),
        _contiguous(biases),
        basis,
        _ACTIVATIONS.index(activation),
        LEAKY_SLOPE,
        constant,
    )
    return basis


def coordinate_mlp_bwd(
    grad: Tensor,
    coordinates: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    activation: str,
) -> list[Tensor]:
    """Gradients of (weights..., biases...) from that of phi, in one launch."""
    weight_gradients = [weight.new_empty(weight.shape) for weight in weights]
    bias_gradients = [bias.new_empty(bias.shape) for bias in biases]
    _launch(
        "coordinate_mlp_bwd",
        grad.float().contiguous(),
        coordinates.float().contiguous(),
        _contiguous(weights),
        _contiguous(biases),
        weight_gradients,
        bias_gradients,
        _ACTIVATIONS.index(activation),
        LEAKY_SLOPE,
    )
    return [*weight_gradients, *bias_gradients]
