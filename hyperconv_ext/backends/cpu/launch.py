"""From tensors and a plan to the engine's one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ...layout import new_activation
from ...problem import Plan, Problem, Wanted
from . import library, tiles
from .library import Convolution
from .mlp import coordinate_mlp_fwd


@lru_cache(maxsize=4096)
def _roots(circles: tiles.Triple, double: bool) -> Tensor:
    """Roots of unity for three circles, one after the other."""
    numbers = [number for size in circles for number in tiles.roots(size)]
    dtype = torch.float64 if double else torch.float32
    return torch.tensor(numbers or [0.0], dtype=dtype, device="cpu")


def _set_strides(strides: library.Strides, of: tuple[int, ...]) -> None:
    strides.batch, strides.channel, *axes = of
    for index, stride in enumerate(reversed(axes)):
        strides.axis[2 - index] = stride


# What a call is made of beside its tensors' addresses: worked out once.
@lru_cache(maxsize=4096)
def _header(
    plan: Plan,
    threads: int,
    source: tuple[int, ...],
    target: tuple[int, ...] | None,
    output: tuple[int, ...] | None,
    coefficients: tuple[int, ...] | None,
) -> tuple[bytes, Tensor | None]:
    """(a `Convolution` with tensors of these strides, the roots that it points to)."""
    problem, tile = plan.problem, plan.tile
    call, size = Convolution(), tiles.channels(problem, tile.transposed)
    call.dtype = library.DTYPES[problem.dtype]
    call.algorithm = library.PLANES if tile.planes else library.ALGORITHMS[plan.algorithm]
    call.wanted = tiles.wanted_of(problem)
    call.batch, call.groups, call.rank = problem.batch, problem.geometry.groups, problem.rank
    call.source_channels, call.target_channels = size.source, size.target
    call.slices, call.parts, call.threads = tile.slices, tile.parts, threads
    for index, axis in enumerate(tiles.map_of(problem, tile).axes):
        call.axis[index] = library.Axis(*axis)
        points = 1 if tile.circles is None else tile.circles[index]
        call.circle[index].size = points
        for stage, radix in enumerate(tiles.radices(points) or ()):
            call.circle[index].radices[stage] = radix
    _set_strides(call.source_strides, source)
    if target is not None:
        _set_strides(call.target_strides, target)
    if output is not None:
        _set_strides(call.output_strides, output)
    if coefficients is not None:
        out, into, rank = coefficients
        call.coefficient_group = problem.out_channels // problem.geometry.groups * out
        call.coefficient_rank = rank
        pair = (into, out) if tile.transposed else (out, into)
        call.coefficient_target, call.coefficient_source = pair
    if tile.circles is None:
        return bytes(call), None
    held = _roots(tile.circles, problem.dtype == "float64")
    call.roots = held.data_ptr()
    return bytes(call), held


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Of that dtype, contiguous."""
    if tensor.dtype is dtype and tensor.is_contiguous():
        return tensor
    return tensor.to(dtype).contiguous()


def _run(
    plan: Plan,
    source: Tensor,
    target: Tensor | None,
    coefficients: Tensor | None,
    basis: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    coefficients_gradient: Tensor | None,
    basis_gradient: Tensor | None,
) -> None:
    weights = coefficients
    if coefficients_gradient is not None:  # the strides are those of both
        weights = coefficients_gradient
        coefficients = None if coefficients is None else coefficients.contiguous()
    strides = [
        None if tensor is None else tensor.stride() for tensor in (source, target, output, weights)
    ]
    header, _ = _header(plan, torch.get_num_threads(), *strides)
    call = Convolution.from_buffer_copy(header)
    call.source = source.data_ptr()
    if target is not None:
        call.target = target.data_ptr()
    if output is not None:
        call.output = output.data_ptr()
    if coefficients is not None:
        call.coefficients = coefficients.data_ptr()
    if basis is not None:
        double = plan.problem.dtype == "float64"
        phi = _as(basis, torch.float64 if double else torch.float32)
        call.basis = phi.data_ptr()
    if bias is not None:
        offset = _as(bias, source.dtype)
        call.bias = offset.data_ptr()
    if coefficients_gradient is not None:
        call.coefficients_gradient = coefficients_gradient.data_ptr()
    if basis_gradient is not None:
        call.basis_gradient = basis_gradient.data_ptr()
    library.convolve(call)


def _output(problem: Problem, transposed: bool, source: Tensor) -> Tensor:
    geometry = problem.geometry
    if transposed:
        return new_activation(source, problem.in_channels, geometry.input_size)
    return new_activation(source, problem.out_channels, geometry.output_size)


def _convolve(
    plan: Plan, source: Tensor, coefficients: Tensor, basis: Tensor, bias: Tensor | None
) -> Tensor:
    output = _output(plan.problem, plan.tile.transposed, source)
    tensors = (source, None, coefficients, basis, bias, output, None, None)
    _run(plan, *tensors)
    return output


basis_conv_fwd = _convolve  # y `[B, C_out, *S']` of x
basis_conv_bwd_input = _convolve  # x's gradient `[B, C_in, *S]` of y's, plus a bias `[C_in]`


def _sides(plan: Plan, grad: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    """(source, target)."""
    return (grad, input) if plan.tile.transposed else (input, grad)


def _coefficients_gradient(problem: Problem, like: Tensor) -> Tensor:
    groups = problem.geometry.groups
    return like.new_empty((problem.out_channels, problem.in_channels // groups, problem.rank))


def _basis_gradient(problem: Problem, like: Tensor) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    return like.new_empty((problem.rank, *problem.geometry.kernel_size), dtype=dtype)


def basis_conv_bwd_coeff(plan: Plan, grad: Tensor, input: Tensor, basis: Tensor) -> Tensor:
    """The gradient of A, `[C_out, C_in/groups, R]`."""
    gradient = _coefficients_gradient(plan.problem, grad)
    tensors = (*_sides(plan, grad, input), None, basis, None, None, gradient, None)
    _run(plan, *tensors)
    return gradient


def basis_conv_bwd_basis(plan: Plan, grad: Tensor, input: Tensor, coefficients: Tensor) -> Tensor:
    """The gradient of phi, `[R, *kernel_size]`, in float32 at least."""
    gradient = _basis_gradient(plan.problem, grad)
    tensors = (*_sides(plan, grad, input), coefficients, None, None, None, None, gradient)
    _run(plan, *tensors)
    return gradient


@lru_cache(maxsize=4096)
def _halves(plan: Plan) -> tuple[Plan, Plan]:
    """The plans of a joint one whose sums are not computed with the output."""
    pair = tiles.halves(plan.problem)
    assert pair is not None
    first = replace(plan, problem=pair[0], tile=replace(plan.tile, rest=None))
    return first, replace(plan, problem=pair[1], tile=plan.tile.rest)


def basis_conv_bwd(
    plan: Plan, grad: Tensor, input: Tensor, coefficients: Tensor, basis: Tensor, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The `wanted` gradients of a layer's input, A and phi, by one z of the gradient of its output."""
    problem, backward = plan.problem, plan.problem.op == "basis_conv_bwd_input"
    if plan.tile.rest is not None:
        first, rest = _halves(plan)
        gradient = _convolve(first, grad, coefficients, basis, None)
        if wanted[1] and wanted[2]:
            others = basis_conv_bwd(rest, grad, input, coefficients, basis, (False, True, True))
            return gradient, *others[1:]
        sides = (grad, input) if backward else (input, grad)
        if wanted[1]:
            return gradient, basis_conv_bwd_coeff(rest, *sides, basis), None
        return gradient, None, basis_conv_bwd_basis(rest, *sides, coefficients)
    output = _output(problem, backward, grad) if wanted[0] else None
    pair = (grad, input) if plan.tile.transposed == backward else (input, grad)
    coefficients_gradient = basis_gradient = None
    if wanted[1]:
        coefficients_gradient = _coefficients_gradient(problem, grad if backward else input)
    if wanted[2]:
        basis_gradient = _basis_gradient(problem, grad)
    parameters = (coefficients if wanted[0] or wanted[2] else None, basis)
    _run(plan, *pair, *parameters, None, output, coefficients_gradient, basis_gradient)
    return output, coefficients_gradient, basis_gradient


def hyper_conv_fwd(
    plan: Plan,
    source: Tensor,
    coefficients: Tensor,
    coordinates: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    weight_gain: float,
    linear_output: bool,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y or x's gradient, phi `[R, K]`), phi by the coordinate MLP."""
    constant = coefficients.shape[2] > weights[-1].shape[0]
    settings = (activation, weight_gain, linear_output, constant)
    basis = coordinate_mlp_fwd(coordinates, weights, biases, *settings)
    return _convolve(plan, source, coefficients, basis, bias), basis
