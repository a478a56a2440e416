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
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import backends, layout, planner
from ..autocast import for_autocast, without_autocast
from ..backends import reference
from ..geometry import Geometry
from ..layout import new_activation
from ..problem import OPS, Plan, Problem
from .registry import (
    Function,
    can_skip_dispatch,
    exporting,
    register,
    transforming,
    untraced,
    vmap_by_loop,
)

_SLOTS = ("grad", "input", "coefficients", "basis")
GRAD, INPUT, COEFFICIENTS, BASIS = range(4)
BIASED = (GRAD, INPUT)  # the operators whose result is an activation
OTHERS = tuple(tuple(slot for slot in range(4) if slot != own) for own in range(4))
GEOMETRY_SCHEMA = (
    "SymInt[] input_size, SymInt[] output_size, SymInt[] kernel_size, "
    "int[] stride, int[] padding, int[] dilation, int groups, str backend, str algorithm"
)


def _schema(slot: int) -> str:
    tensors = ", ".join(f"Tensor {_SLOTS[other]}" for other in OTHERS[slot])
    bias = ", Tensor? bias" if slot in BIASED else ""
    return f"{OPS[slot]}({tensors}{bias}, {GEOMETRY_SCHEMA}) -> Tensor"


def flatten(geometry: Geometry) -> tuple[Any, ...]:
    """The operator arguments that carry `geometry`, in schema order."""
    return (
        geometry.input_size,
        geometry.output_size,
        geometry.kernel_size,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
    )


def _channels(slot: int, tensors: Sequence[Tensor], groups: int) -> tuple[int, int, int]:
    """(C_in, C_out, R) of the problem whose operator `slot` takes `tensors`."""
    if slot == COEFFICIENTS:
        grad, input, basis = tensors
        return input.shape[1], grad.shape[1], basis.shape[0]
    coefficients = tensors[2] if slot == BASIS else tensors[1]
    out_channels, group_channels, rank = coefficients.shape
    return group_channels * groups, out_channels, rank


def new_output(slot: int, tensors: Sequence[Tensor], geometry: Geometry) -> Tensor:
    """Uninitialised result of operator `slot`: its shape, dtype and memory layout."""
    in_channels, out_channels, rank = _channels(slot, tensors, geometry.groups)
    first = tensors[0]
    if slot == GRAD:
        return new_activation(first, out_channels, geometry.output_size)
    if slot == INPUT:
        return new_activation(first, in_channels, geometry.input_size)
    if slot == COEFFICIENTS:
        return first.new_empty((out_channels, in_channels // geometry.groups, rank))
    dtype = torch.promote_types(first.dtype, torch.float32)
    return first.new_empty((rank, *geometry.kernel_size), dtype=dtype)


# What planning needs to know of an activation: shape, strides, dtype, device, whether it begins at a
# multiple of 16 bytes.
_Activation = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device, bool]
# Activations, shape of A (or, last, of phi), whether TF32, whether deterministic.
_Described = tuple[tuple[_Activation, ...], torch.Size, bool, bool]


def _at_16_bytes(tensor: Tensor) -> bool:
    """Whether its memory begins at a multiple of 16 bytes, as that of a fake tensor would."""
    return isinstance(tensor, FakeTensor) or tensor.data_ptr() % 16 == 0


def _described(slot: int, tensors: Sequence[Tensor]) -> _Described:
    """All that the plan of operator `OPS[slot]` on `tensors` depends on, beside the geometry."""
    split = 1 if slot in BIASED else 2
    activations = tuple(
        [(t.shape, t.stride(), t.dtype, t.device, _at_16_bytes(t)) for t in tensors[:split]]
    )
    tf32 = tensors[0].dtype == torch.float32 and backends.tf32_allowed()
    return activations, tensors[split].shape, tf32, torch.are_deterministic_algorithms_enabled()


def _problem(slot: int, described: _Described, geometry: Geometry) -> Problem:
    activations, weights, tf32, deterministic = described
    shape, _, dtype, device, _ = activations[0]
    if slot == COEFFICIENTS:
        channels, rank = (activations[1][0][1], shape[1]), weights[0]
    else:
        channels, rank = (weights[1] * geometry.groups, weights[0]), weights[2]
    aligned = all(count // geometry.groups % layout.GRANULE == 0 for count in channels) and all(
        at_16_bytes and layout.aligned(shape, strides)
        for shape, strides, _, _, at_16_bytes in activations
    )
    return Problem(
        OPS[slot],
        geometry,
        shape[0],
        *channels,
        rank,
        backends.dtype_name(dtype),
        backends.describe(device),
        aligned,
        tf32,
        deterministic,
    )


def problem_of(slot: int, tensors: Sequence[Tensor], geometry: Geometry) -> Problem:
    """The numbers of operator `OPS[slot]`, for the planner: of the taps that meet an input."""
    trimmed = geometry.trimmed
    return _problem(slot, _described(slot, tensors), trimmed[0] if trimmed else geometry)


@lru_cache(maxsize=4096)
def _plan(
    slot: int, described: _Described, geometry: Geometry, backend: str, algorithm: str
) -> Plan | None:
    left, window = geometry.trimmed or (geometry, None)
    problem = _problem(slot, described, left)
    if problem.empty:
        return None
    plan = planner.plan(problem, backend, algorithm)
    return plan if window is None else replace(plan, window=window)


def plan_of(
    slot: int, tensors: Sequence[Tensor], geometry: Geometry, backend: str, algorithm: str
) -> Plan | None:
    """The plan of operator `OPS[slot]` on `tensors`; None if there is nothing to compute.

    It depends on their sizes, not their contents, so that a layer's second step looks it up.
    """
    return _plan(slot, _described(slot, tensors), geometry, backend, algorithm)


def geometry_of(spelled: Sequence[Any]) -> Geometry:
    """The geometry that `GEOMETRY_SCHEMA`'s arguments spell."""
    *lists, groups, _, _ = spelled
    input, output, kernel, stride, padding, dilation = map(tuple, lists)
    return Geometry(input, output, kernel, stride, padding, dilation, groups)


def split_arguments(slot: int, args: Sequence[Any]) -> tuple[Any, ...]:
    """Operator arguments in schema order -> (tensors, bias, `GEOMETRY_SCHEMA`'s arguments)."""
    biased = slot in BIASED
    return args[:3], args[3] if biased else None, args[3 + biased :]


def run(
    slot: int, plan: Plan | None, tensors: Sequence[Tensor], bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """Operator `OPS[slot]` by `plan`, whatever autocast asks of the library calls behind it."""
    if plan is None:
        output = new_output(slot, tensors, geometry).zero_()
        return output if bias is None else output.add_(bias.view(-1, *(1,) * geometry.dims))
    operator = getattr(backends.BACKENDS[plan.backend], OPS[slot])
    with without_autocast(tensors[0].device):
        if plan.window is not None:
            taps = (slice(None), *plan.window)
            if slot == BASIS:  # the taps that meet no input have no gradient
                gradient = new_output(slot, tensors, geometry).zero_()
                gradient[taps] = operator(plan, *tensors)
                return gradient
            tensors = (*tensors[:2], tensors[2][taps])
        return operator(plan, *tensors, bias) if slot in BIASED else operator(plan, *tensors)


@untraced
def _execute(
    slot: int,
    geometry: Geometry,
    backend: str,
    algorithm: str,
    bias: Tensor | None,
    *tensors: Tensor,
) -> Tensor:
    """The operators' kernel on every device: plan, then run on the chosen backend."""
    plan = plan_of(slot, tensors, geometry, backend, algorithm)
    return run(slot, plan, tensors, bias, geometry)


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
        return _execute(slot, geometry, backend, algorithm, bias, *tensors)
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
            return _execute(slot, geometry_of(spelled), *spelled[-2:], bias, *tensors)

        def fake(*args: Any, slot: int = slot) -> Tensor:
            tensors, _, spelled = split_arguments(slot, args)
            return new_output(slot, tensors, geometry_of(spelled))

        def autograd(*args: Any, slot: int = slot) -> Tensor:
            tensors, bias, spelled = split_arguments(slot, args)
            geometry = geometry_of(spelled)
            return BasisConvFunction.apply(slot, geometry, *spelled[-2:], bias, *tensors)

        register(_schema(slot), kernel, fake, autograd)


_register()
