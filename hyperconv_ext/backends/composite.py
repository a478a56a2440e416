"""z = R shared depthwise convolutions, then one GEMM, by library calls: any device, any dtype, no W.

z is R times the input and does travel through memory here; the fused backends exist to avoid that.

In float16, whose range z, its gradient u and the sums of the gradients can exceed where the result does
not, everything is computed in float32 and the result rounded.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..geometry import Geometry
from ..layout import conform
from ..problem import Plan, Problem
from . import cost
from .cost import Work
from .figures import number
from .library import convolution, convolution_input_gradient, convolution_weight_gradient

ALGORITHMS = ("composite",)
# Seconds off the GPU, where there is no estimate: fewer than those of emulated kernels, the infinite.
LAST_RESORT = 1e9
_DEPTHWISE_TAPS = 225
_SIDE, _DEEP = 128, 64  # of a block's share of a library's matrix product, and of its steps


def can_run(problem: Problem, algorithm: str) -> tuple[bool, str]:
    """Whether this backend takes `problem`, and why not. Library calls take everything."""
    return True, ""


def configure(problem: Problem, algorithm: str) -> tuple[None, float]:
    """No tile to choose, and the estimated seconds on a GPU."""
    if problem.device.kind != "cuda":
        return None, LAST_RESORT
    return None, cost.seconds(works(problem), problem.device)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def flops(plan: Plan) -> float:
    """Those asked of the library; what its kernels pad is not known."""
    return cost.flops(works(plan.problem))


def works(problem: Problem) -> list[Work]:
    """The library calls of an operator: z or its gradient u meets memory between the two products.

    Also the copies of channels-last activations to planes and back, and of z or u to the channels-last
    layout of the library's tensor-core kernels or from it.
    """
    if problem.dtype == "float16":
        wide = works(replace(problem, dtype="float32"))
        return [*wide, Work(dram=cost.input_bytes(problem) * 3 + cost.output_bytes(problem) * 3)]
    x, y = cost.input_bytes(problem), cost.output_bytes(problem)
    positions = problem.batch * problem.geometry.output_positions
    z = cost.width(problem) * positions * problem.in_channels * problem.rank
    gathered = problem.op == "basis_conv_bwd_input" and _gathers_apart(problem.geometry)
    planes = x * problem.rank if gathered else x
    moved = [2 * x, 2 * y] if problem.aligned else []
    if number(problem) != "ieee":
        moved.append(2 * z)
    if gathered:
        moved.append(planes + x)
    coefficients = cost.width(problem) * cost.coefficients(problem)
    products = [_depthwise(problem, gathered, planes + z), _mixed(problem, z + y + coefficients)]
    return [*products, *(Work(dram=size) for size in moved)]


def _depthwise(problem: Problem, gathered: bool, dram: float) -> Work:
    """R one-channel convolutions in ordinary units: one channel would leave tensor cores idle.

    A lane fetches an input for every multiply-add, as PyTorch's depthwise kernels do; the library's
    matrix products would pad R instead.
    """
    geometry = problem.geometry
    positions = geometry.input_positions if gathered else geometry.output_positions
    outputs = problem.batch * problem.in_channels * problem.rank * positions
    blocks = max(1, -(-outputs // _SIDE**2))
    products = geometry.taps * outputs / blocks
    return Work(
        library=True,
        multiply_adds=geometry.taps * outputs,
        dram=dram,
        blocks=blocks,
        products=products,
        shared=4 * products,
    )


def _mixed(problem: Problem, dram: float) -> Work:
    """The matrix product of A with z, with g, or of z with g, per group."""
    groups, width = problem.geometry.groups, cost.width(problem)
    positions = problem.batch * problem.geometry.output_positions
    out, inner = problem.out_channels // groups, problem.in_channels // groups * problem.rank
    if problem.op == "basis_conv_fwd":
        rows, columns, depth = positions, out, inner
    elif problem.op == "basis_conv_bwd_coeff":
        rows, columns, depth = inner, out, positions
    else:
        rows, columns, depth = positions, inner, out
    blocks = max(1, -(-rows // _SIDE) * -(-columns // _SIDE) * groups)
    # A long sum of few numbers is dealt to as many blocks as there are multiprocessors.
    shares = max(1, min(depth // _DEEP, problem.device.processors // blocks))
    steps = -(-depth // (_DEEP * shares))
    return Work(
        number=number(problem),
        library=True,
        multiply_adds=rows * columns * depth * groups,
        dram=dram,
        blocks=blocks * shares,
        products=steps * _DEEP * _SIDE**2,
        shared=2 * 2 * width * steps * _DEEP * _SIDE,
        cache=2 * width * steps * _DEEP * _SIDE + width * _SIDE**2,
        steps=steps,
    )


def _pointwise(geometry: Geometry) -> Geometry:
    """The 1x1 convolution over the output grid that multiplies z by the coefficients."""
    ones = (1,) * geometry.dims
    zeros = (0,) * geometry.dims
    grid = geometry.output_size
    return Geometry(grid, grid, ones, ones, zeros, ones, geometry.groups)


def _planes(input: Tensor, geometry: Geometry) -> Tensor:
    """`[B, C_in, *S]` -> `[B * C_in, 1, *S]`: every channel meets the same R kernels."""
    return input.reshape(-1, 1, *geometry.input_size)


def _filters(basis: Tensor, like: Tensor) -> Tensor:
    """phi as R one-channel filters `[R, 1, *kernel]` in the dtype of `like`."""
    return basis.unsqueeze(1).to(like.dtype)


def _responses(input: Tensor, basis: Tensor, geometry: Geometry) -> Tensor:
    """z: `[B, C_in * R, *S']`, channel-major."""
    batch, channels = input.shape[:2]
    z = convolution(_planes(input, geometry), _filters(basis, input), None, geometry, 1)
    return z.reshape(batch, channels * basis.shape[0], *geometry.output_size)


def _mixer(coefficients: Tensor, geometry: Geometry) -> Tensor:
    """A as the weight of the 1x1 convolution: `[C_out, C_in/groups * R, 1, ...]`."""
    return coefficients.reshape(coefficients.shape[0], -1, *(1,) * geometry.dims)


def _responses_gradient(grad: Tensor, coefficients: Tensor, geometry: Geometry) -> Tensor:
    """u: the gradient of z, as `[B * C_in, R, *S']`."""
    mixer = _mixer(coefficients, geometry)
    u = convolution_input_gradient(grad, mixer, _pointwise(geometry), geometry.groups)
    return u.reshape(-1, coefficients.shape[2], *geometry.output_size)


def _flipped_padding(geometry: Geometry) -> tuple[int, ...]:
    axes = zip(geometry.kernel_size, geometry.dilation, geometry.padding, strict=True)
    return tuple(d * (k - 1) - p for k, d, p in axes)


def _gathers_apart(geometry: Geometry) -> bool:
    """Whether the gradient of the planes is gathered by R depthwise convolutions and a sum."""
    small = geometry.taps <= _DEPTHWISE_TAPS
    return max(geometry.stride) == 1 and min(_flipped_padding(geometry)) >= 0 and small


def _gather(u: Tensor, filters: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of the planes, `[B * C_in, 1, *S]`, from that of z.

    Without stride it is a convolution with the flipped filters. As R depthwise ones and a sum that
    took a fifth of the library's transposed convolution on a CPU (oneDNN, 3x3 to 7x7), at 31x31 four
    times as long; hence the limit.
    """
    if not _gathers_apart(geometry):
        return convolution_input_gradient(u, filters, geometry, 1)
    rank = filters.shape[0]
    flipped = replace(
        geometry,
        input_size=geometry.output_size,
        output_size=geometry.input_size,
        padding=_flipped_padding(geometry),
        groups=rank,
    )
    axes_of_space = tuple(range(2, 2 + geometry.dims))
    parts = convolution(u, filters.flip(axes_of_space), None, flipped, rank)
    return parts.sum(1, keepdim=True)


def basis_conv_fwd(
    plan: Plan, input: Tensor, coefficients: Tensor, basis: Tensor, bias: Tensor | None
) -> Tensor:
    """y `[B, C_out, *S']`."""
    geometry = plan.problem.geometry
    z = _responses(_wide(input), basis, geometry)
    mixer = _mixer(_wide(coefficients), geometry)
    offset = None if bias is None else _wide(bias)
    output = convolution(z, mixer, offset, _pointwise(geometry), geometry.groups)
    return conform(output.to(input.dtype), input)


def basis_conv_bwd_input(
    plan: Plan, grad: Tensor, coefficients: Tensor, basis: Tensor, bias: Tensor | None
) -> Tensor:
    """The gradient of x, `[B, C_in, *S]`, plus a bias `[C_in]`."""
    geometry = plan.problem.geometry
    u = _responses_gradient(_wide(grad), _wide(coefficients), geometry)
    gradient = _gather(u, _filters(basis, u), geometry)
    gradient = gradient.reshape(grad.shape[0], -1, *geometry.input_size)
    if bias is not None:
        gradient = gradient + bias.view(-1, *(1,) * geometry.dims)
    return conform(gradient.to(grad.dtype), grad)


def basis_conv_bwd_coeff(plan: Plan, grad: Tensor, input: Tensor, basis: Tensor) -> Tensor:
    """The gradient of A, `[C_out, C_in/groups, R]`."""
    geometry = plan.problem.geometry
    z = _responses(_wide(input), basis, geometry)
    shape = (grad.shape[1], z.shape[1] // geometry.groups, *(1,) * geometry.dims)
    grid = _pointwise(geometry)
    gradient = convolution_weight_gradient(_wide(grad), z, shape, grid, geometry.groups)
    return gradient.reshape(grad.shape[1], -1, basis.shape[0]).to(grad.dtype)


def basis_conv_bwd_basis(plan: Plan, grad: Tensor, input: Tensor, coefficients: Tensor) -> Tensor:
    """The gradient of phi, `[R, *kernel_size]`, in float32 at least."""
    geometry = plan.problem.geometry
    u = _responses_gradient(_wide(grad), _wide(coefficients), geometry)
    shape = (coefficients.shape[2], 1, *geometry.kernel_size)
    gradient = convolution_weight_gradient(u, _planes(_wide(input), geometry), shape, geometry, 1)
    return gradient.squeeze(1).to(torch.promote_types(gradient.dtype, torch.float32))
