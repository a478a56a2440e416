"""The convolution operators of a basis that is given.

All four are derivatives of one form, linear in each of four tensors,

    S(g, x, A, phi) = sum_{o,p} g[o,p] sum_{i,r,k} A[o,i,r] phi_r(k) x[i, p*stride + k*dilation - pad]

`basis_conv_fwd` is dS/dg, `basis_conv_bwd_input` dS/dx, `basis_conv_bwd_coeff` dS/dA and
`basis_conv_bwd_basis` dS/dphi, each a function of the other three tensors. Hence the set is closed
under differentiation: the gradient of <v, dS/da> by another slot b is dS/db with v in slot a. One
autograd rule therefore serves all four, to any order, forward and reverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import planner
from ..autocast import for_autocast
from ..backends import reference
from ..geometry import Geometry
from ..problem import OPS
from .execution import (
    BIASED,
    GRAD,
    INPUT,
    OTHERS,
    execute,
    flatten,
    geometry_of,
    new_output,
    schema,
    split_arguments,
)
from .registry import (
    Function,
    can_skip_dispatch,
    exporting,
    register,
    transforming,
    vmap_by_loop,
)


def call(
    slot: int,
    geometry: Geometry,
    backend: str,
    algorithm: str,
    bias: Tensor | None,
    *tensors: Tensor,
) -> Tensor:
    """The registered operator `OPS[slot]`."""
    operator = getattr(torch.ops.hyperconv_ext, OPS[slot])
    operands = (*tensors, bias) if slot in BIASED else tensors
    return operator(*operands, *flatten(geometry), backend, algorithm)


def _substitute(ctx: Any, saved: Sequence[Tensor], wanted: int, value: Tensor, slot: int) -> Tensor:
    """dS/d(wanted) with `value` in `slot` and the saved tensors elsewhere."""
    full = dict(zip(OTHERS[ctx.slot], saved, strict=True)) | {slot: value}
    return derivative(wanted, full, ctx.geometry, ctx.backend, ctx.algorithm)


class BasisConvFunction(Function):
    """dS/d(slot) of the module docstring, differentiable to any order, and under `torch.func`."""

    @staticmethod
    def forward(
        slot: int,
        geometry: Geometry,
        backend: str,
        algorithm: str,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        return _below_autograd(slot, geometry, backend, algorithm, bias, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.slot, ctx.geometry, ctx.backend, ctx.algorithm, bias, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.output_shape = output.shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (value,) = grads
        needs_bias, *needs = ctx.needs_input_grad[4:]
        bias = bias_gradient(value, ctx.bias_dtype) if needs_bias else None
        saved = ctx.saved_tensors  # unpacked once: checkpointing and offloading allow no more
        results = [
            _substitute(ctx, saved, other, value, ctx.slot).to(tensor.dtype) if need else None
            for need, other, tensor in zip(needs, OTHERS[ctx.slot], saved, strict=True)
        ]
        return None, None, None, None, bias, *results

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        bias, *others = tangents[4:]
        saved = ctx.saved_tensors
        terms = [
            _substitute(ctx, saved, ctx.slot, tangent, other)
            for tangent, other in zip(others, OTHERS[ctx.slot], strict=True)
            if tangent is not None
        ]
        if bias is not None:
            terms.append(bias.view(-1, *(1,) * ctx.geometry.dims).expand(ctx.output_shape))
        return sum(terms[1:], terms[0]) if terms else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return vmap_by_loop(BasisConvFunction.apply, info, in_dims, *args)


def _below_autograd(
    slot: int,
    geometry: Geometry,
    backend: str,
    algorithm: str,
    bias: Tensor | None,
    *tensors: Tensor,
) -> Tensor:
    if can_skip_dispatch(tensors if bias is None else (bias, *tensors)):
        return execute(slot, geometry, backend, algorithm, bias, *tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return call(slot, geometry, backend, algorithm, bias, *tensors)


def form(
    slot: int,
    geometry: Geometry,
    backend: str,
    algorithm: str,
    bias: Tensor | None,
    *tensors: Tensor,
) -> Tensor:
    """dS/d(slot). Traced by `torch.compile` as the operator, run in eager mode as the Function."""
    if torch.compiler.is_compiling():
        return call(slot, geometry, backend, algorithm, bias, *tensors)
    if torch.is_grad_enabled() or transforming():
        return BasisConvFunction.apply(slot, geometry, backend, algorithm, bias, *tensors)
    return _below_autograd(slot, geometry, backend, algorithm, bias, *tensors)


def derivative(
    wanted: int, full: dict[int, Tensor], geometry: Geometry, backend: str, algorithm: str
) -> Tensor:
    """dS/d(wanted) of the tensors in the other slots."""
    operands = [full[other] for other in OTHERS[wanted]]
    return form(wanted, geometry, backend, algorithm, None, *operands)


def bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient `[C]` of a bias from that of the activation `[B, C, *S]` it was added to."""
    return grad.sum([0, *range(2, grad.dim())]).to(dtype)


def basis_conv(
    input: Tensor,
    coefficients: Tensor,
    basis: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    backend: str,
    algorithm: str,
    transposed: bool = False,
) -> Tensor:
    """y `[B, C_out, *S']` of x `[B, C_in, *S]`, A `[C_out, C_in/groups, R]`, phi `[R, *kernel]`.

    If `transposed`, x `[B, C_in, *S]` of y: the geometry and A's first two axes are read the other way
    round, as `F.conv_transposeNd` reads its weight.

    Under autocast x, A and the bias are cast as for a convolution; phi is left as it is, because
    the kernels round it to the compute type themselves.
    """
    input, coefficients = for_autocast(input), for_autocast(coefficients)
    bias = None if bias is None else for_autocast(bias)
    out_channels, _, rank = coefficients.shape
    backend = planner.resolve(backend, algorithm, input.device.type, geometry.taps, out_channels, rank)
    if exporting():
        return reference.basis_conv(input, coefficients, basis, bias, geometry, transposed)
    if backend == "reference":
        planner.check_reference(algorithm)
        return reference.basis_conv(input, coefficients, basis, bias, geometry, transposed)
    slot = INPUT if transposed else GRAD
    return form(slot, geometry, backend, algorithm, bias, input, coefficients, basis)


def _register() -> None:
    for slot in range(len(OPS)):

        def kernel(*args: Any, slot: int = slot) -> Tensor:
            tensors, bias, spelled = split_arguments(slot, args)
            return execute(slot, geometry_of(spelled), *spelled[-2:], bias, *tensors)

        def fake(*args: Any, slot: int = slot) -> Tensor:
            tensors, _, spelled = split_arguments(slot, args)
            return new_output(slot, tensors, geometry_of(spelled))

        def autograd(*args: Any, slot: int = slot) -> Tensor:
            tensors, bias, spelled = split_arguments(slot, args)
            geometry = geometry_of(spelled)
            return BasisConvFunction.apply(slot, geometry, *spelled[-2:], bias, *tensors)

        register(schema(slot), kernel, fake, autograd)


_register()
