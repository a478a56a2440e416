"""The convolution operators of a basis that is given.

All four are derivatives of one form, linear in each of four tensors,

    S(g, x, A, phi) = sum_{o,p} g[o,p] sum_{i,r,k} A[o,i,r] phi_r(k) x[i, p*stride + k*dilation - pad]

`basis_conv_fwd` is dS/dg, `basis_conv_bwd_input` dS/dx, `basis_conv_bwd_coeff` dS/dA and
`basis_conv_bwd_basis` dS/dphi, each a function of the other three tensors. Hence the set is closed
under differentiation: the gradient of <v, dS/da> by another slot b is dS/db with v in slot a. One
autograd rule therefore serves all four, to any order, forward and reverse.

A layer is dS/dg, or transposed dS/dx. A fifth operator, `basis_conv_bwd`, computes several gradients of
a layer together, where the planner finds a backend for which that is cheaper. It is a shorthand of the
other three and differentiated as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, planner
from ..autocast import for_autocast
from ..backends import reference
from ..compilation import compiling
from ..geometry import Geometry
from ..problem import JOINT, OPS, Wanted, weight_shape
from ..transforms import Function
from .execution import (
    BIASED,
    INPUT,
    JOINT_SCHEMA,
    OTHERS,
    execute,
    execute_jointly,
    flatten,
    geometry_of,
    new_output,
    one_by_one,
    schema,
    slot_of,
    split_arguments,
    split_joint_arguments,
)
from .registry import (
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


def call_jointly(
    slot: int,
    wanted: Wanted,
    geometry: Geometry,
    backend: str,
    algorithm: str,
    *operands: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered joint operator: what is not wanted is an empty tensor `[0]`."""
    operator = getattr(torch.ops.hyperconv_ext, JOINT)
    choice = (wanted, slot == INPUT, *flatten(geometry), backend, algorithm)
    return operator(*operands, *choice)


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
        choice = (ctx.geometry, ctx.backend, ctx.algorithm)
        results = gradients(ctx.slot, tuple(needs), *choice, value, *saved)
        pairs = zip(results, saved, strict=True)
        rounded = [None if result is None else result.to(t.dtype) for result, t in pairs]
        return None, None, None, None, bias, *rounded

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


def gradients(
    slot: int,
    wanted: Wanted,
    geometry: Geometry,
    backend: str,
    algorithm: str,
    value: Tensor,
    *saved: Tensor,
) -> Sequence[Tensor | None]:
    """The `wanted` gradients of what `OPS[slot]` took, `saved`, from that of its result, `value`.

    Of a layer together, where a backend does that and nobody differentiates further.
    """
    choice = (geometry, backend, algorithm)
    operands = (value, *saved)
    if not may_join(slot, wanted, backend, value):
        return one_by_one(
            slot, wanted, operands, lambda other, *tensors: form(other, *choice, None, *tensors)
        )
    if not torch.compiler.is_compiling() and not transforming() and can_skip_dispatch(operands):
        return execute_jointly(slot, wanted, *choice, *operands)
    results = call_jointly(slot, wanted, *choice, *operands)
    return [result if want else None for result, want in zip(results, wanted, strict=True)]


def may_join(slot: int, wanted: Wanted, backend: str, value: Tensor) -> bool:
    """Whether the joint operator may be called. A graph may meet other sizes, so they do not count."""
    if slot not in BIASED or sum(wanted) < 2 or torch.is_grad_enabled():
        return False
    return planner.joins_on(backends.describe(value.device), backend)


def bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient `[C]` of a bias from that of the activation `[B, C, *S]` it was added to."""
    return grad.sum([0, *range(2, grad.dim())]).to(dtype)


def resolve(
    input: Tensor,
    coefficients: Tensor,
    geometry: Geometry,
    backend: str,
    algorithm: str,
    transposed: bool = False,
    kept: bool = False,
) -> str:
    """As `planner.resolve`, for W as it would be built for this input, or is `kept`."""
    batch = 0 if compiling() else input.shape[0]  # a graph may meet others
    choice = (input.dtype.itemsize, batch, torch.is_grad_enabled(), kept)
    weight = weight_shape(coefficients.shape, geometry, transposed, *choice)
    return planner.resolve(backend, algorithm, input.device.type, weight)


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
    backend = resolve(input, coefficients, geometry, backend, algorithm, transposed)
    if exporting():
        return reference.basis_conv(input, coefficients, basis, bias, geometry, transposed)
    if backend == "reference":
        planner.check_reference(algorithm)
        return reference.basis_conv(input, coefficients, basis, bias, geometry, transposed)
    return form(slot_of(transposed), geometry, backend, algorithm, bias, input, coefficients, basis)


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
    _register_joint()


def _register_joint() -> None:
    def no_nones(results: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
        return tuple(like.new_empty(0) if result is None else result for result in results)

    def kernel(*args: Any) -> tuple[Tensor, ...]:
        return no_nones(execute_jointly(*split_joint_arguments(args)), args[0])

    def fake(*args: Any) -> tuple[Tensor, ...]:
        slot, wanted, geometry, _, _, *operands = split_joint_arguments(args)

        def output(other: int, *tensors: Tensor) -> Tensor:
            return new_output(other, tensors, geometry)

        return no_nones(one_by_one(slot, wanted, operands, output), args[0])

    def autograd(*args: Any) -> tuple[Tensor, ...]:
        slot, wanted, geometry, backend, algorithm, *operands = split_joint_arguments(args)
        recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands)
        if recorded or transforming():  # the operator of each gradient has the rules of all of these

            def differentiable(other: int, *tensors: Tensor) -> Tensor:
                return call(other, geometry, backend, algorithm, None, *tensors)

            return no_nones(one_by_one(slot, wanted, operands, differentiable), args[0])
        with torch._C._AutoDispatchBelowAutograd():
            return call_jointly(slot, wanted, geometry, backend, algorithm, *operands)

    register(JOINT_SCHEMA, kernel, fake, autograd)


_register()
