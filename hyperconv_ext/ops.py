"""The operators: schemas, fakes, autograd and autocast. Nothing else in the package registers any.

All four convolution operators are derivatives of one form, linear in each of four tensors,

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

from . import backends, layout, planner
from .backends import reference
from .geometry import Geometry
from .layout import new_activation
from .problem import OPS, Op, Problem

_SLOTS = ("grad", "input", "coefficients", "basis")
_GRAD, _INPUT, _COEFFICIENTS, _BASIS = range(4)
_OTHERS = tuple(tuple(slot for slot in range(4) if slot != own) for own in range(4))
_GEOMETRY_SCHEMA = (
    "SymInt[] input_size, SymInt[] output_size, SymInt[] kernel_size, "
    "int[] stride, int[] padding, int[] dilation, int groups, str backend, str algorithm"
)

_library = torch.library.Library("hyperconv_ext", "DEF")


def _schema(slot: int) -> str:
    tensors = ", ".join(f"Tensor {_SLOTS[other]}" for other in _OTHERS[slot])
    bias = ", Tensor? bias" if slot == _GRAD else ""
    return f"{OPS[slot]}({tensors}{bias}, {_GEOMETRY_SCHEMA}) -> Tensor"


def _flatten(geometry: Geometry) -> tuple[Any, ...]:
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
    if slot == _COEFFICIENTS:
        grad, input, basis = tensors
        return input.shape[1], grad.shape[1], basis.shape[0]
    coefficients = tensors[2] if slot == _BASIS else tensors[1]
    out_channels, group_channels, rank = coefficients.shape
    return group_channels * groups, out_channels, rank


def _new_output(slot: int, tensors: Sequence[Tensor], geometry: Geometry) -> Tensor:
    """Uninitialised result of operator `slot`: its shape, dtype and memory layout."""
    in_channels, out_channels, rank = _channels(slot, tensors, geometry.groups)
    first = tensors[0]
    if slot == _GRAD:
        return new_activation(first, out_channels, geometry.output_size)
    if slot == _INPUT:
        return new_activation(first, in_channels, geometry.input_size)
    if slot == _COEFFICIENTS:
        return first.new_empty((out_channels, in_channels // geometry.groups, rank))
    dtype = torch.promote_types(first.dtype, torch.float32)
    return first.new_empty((rank, *geometry.kernel_size), dtype=dtype)


def _problem(slot: int, tensors: Sequence[Tensor], geometry: Geometry) -> Problem:
    in_channels, out_channels, rank = _channels(slot, tensors, geometry.groups)
    first = tensors[0]
    granule = 16 // first.element_size()
    channels = (in_channels // geometry.groups, out_channels // geometry.groups)
    activations = tensors[:1] if slot in (_GRAD, _INPUT) else tensors[:2]
    return Problem(
        op=OPS[slot],
        geometry=geometry,
        batch=first.shape[0],
        in_channels=in_channels,
        out_channels=out_channels,
        rank=rank,
        dtype=str(first.dtype).removeprefix("torch."),
        device=backends.describe(first.device),
        aligned=all(c % granule == 0 for c in channels) and all(map(layout.aligned, activations)),
        tf32=torch.backends.cudnn.allow_tf32,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _unpack(slot: int, args: Sequence[Any]) -> tuple[Any, ...]:
    """Operator arguments in schema order -> (tensors, bias, geometry, backend, algorithm)."""
    count = 4 if slot == _GRAD else 3
    lists = [tuple(values) for values in args[count : count + 6]]
    geometry = Geometry(*lists, groups=args[count + 6])
    return args[:3], args[3] if slot == _GRAD else None, geometry, *args[count + 7 :]


def _execute(slot: int, *args: Any) -> Tensor:
    """The operators' kernel on every device: plan, then run on the chosen backend."""
    tensors, bias, geometry, backend, algorithm = _unpack(slot, args)
    problem = _problem(slot, tensors, geometry)
    if problem.empty:
        output = _new_output(slot, tensors, geometry).zero_()
        return output if bias is None else output.add_(bias.view(-1, *(1,) * geometry.dims))
    plan = planner.plan(problem, backend, algorithm)
    run = getattr(backends.BACKENDS[plan.backend], problem.op)
    return run(plan, *tensors, bias) if slot == _GRAD else run(plan, *tensors)


class BasisConvFunction(torch.autograd.Function):
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
        operator = getattr(torch.ops.hyperconv_ext, OPS[slot])
        operands = (*tensors, bias) if slot == _GRAD else tensors
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*operands, *_flatten(geometry), backend, algorithm)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.slot, ctx.geometry, ctx.backend, ctx.algorithm, bias, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.output_shape = output.shape

    @staticmethod
    def _substitute(ctx: Any, wanted: int, value: Tensor, slot: int) -> Tensor:
        """dS/d(wanted) with `value` in `slot` and the saved tensors elsewhere."""
        full = dict(zip(_OTHERS[ctx.slot], ctx.saved_tensors, strict=True)) | {slot: value}
        operands = [full[other] for other in _OTHERS[wanted]]
        return _form(wanted, ctx.geometry, ctx.backend, ctx.algorithm, None, *operands)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (value,) = grads
        needs_bias, *needs = ctx.needs_input_grad[4:]
        bias = None
        if needs_bias:
            bias = value.sum([0, *range(2, value.dim())]).to(ctx.bias_dtype)
        results = [
            BasisConvFunction._substitute(ctx, other, value, ctx.slot).to(saved.dtype)
            if need
            else None
            for need, other, saved in zip(needs, _OTHERS[ctx.slot], ctx.saved_tensors, strict=True)
        ]
        return None, None, None, None, bias, *results

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        bias, *others = tangents[4:]
        terms = [
            BasisConvFunction._substitute(ctx, ctx.slot, tangent, other)
            for tangent, other in zip(others, _OTHERS[ctx.slot], strict=True)
            if tangent is not None
        ]
        if bias is not None:
            terms.append(bias.view(-1, *(1,) * ctx.geometry.dims).expand(ctx.output_shape))
        return sum(terms[1:], terms[0]) if terms else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        """One call per example: correct for every transform; batching belongs in the batch axis."""

        def example(index: int) -> list[Any]:
            return [
                arg if dim is None else arg.select(dim, index)
                for arg, dim in zip(args, in_dims, strict=True)
            ]

        outputs = [BasisConvFunction.apply(*example(i)) for i in range(info.batch_size)]
        return torch.stack(outputs), 0


def _form(
    slot: int,
    geometry: Geometry,
    backend: str,
    algorithm: str,
    bias: Tensor | None,
    *tensors: Tensor,
) -> Tensor:
    """dS/d(slot). Traced by `torch.compile` as the operator, run in eager mode as the Function."""
    if torch.compiler.is_compiling():
        operator = getattr(torch.ops.hyperconv_ext, OPS[slot])
        operands = (*tensors, bias) if slot == _GRAD else tensors
        return operator(*operands, *_flatten(geometry), backend, algorithm)
    return BasisConvFunction.apply(slot, geometry, backend, algorithm, bias, *tensors)


def _for_autocast(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where autocast is on, as it does for `F.convNd`."""
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def basis_conv(
    input: Tensor,
    coefficients: Tensor,
    basis: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    backend: str,
    algorithm: str,
) -> Tensor:
    """y `[B, C_out, *S']` of x `[B, C_in, *S]`, A `[C_out, C_in/groups, R]`, phi `[R, *kernel]`.

    Under autocast x, A and the bias are cast as for a convolution; phi is left as it is, because
    the kernels round it to the compute type themselves.
    """
    input, coefficients, bias = _for_autocast(input.device.type, input, coefficients, bias)
    backend = planner.requested(backend)
    if backend == "reference":
        return reference.basis_conv(input, coefficients, basis, bias, geometry)
    return _form(_GRAD, geometry, backend, algorithm, bias, input, coefficients, basis)


def coordinate_mlp(
    coordinates: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    constant: bool,
    backend: str,
) -> Tensor:
    """phi `[R, K]` of the coordinate MLP; see `backends.reference.coordinate_mlp`."""
    with torch.autocast(coordinates.device.type, enabled=False):
        return reference.coordinate_mlp(coordinates, weights, biases, activation, constant)


def _register() -> None:
    for slot, name in enumerate(OPS):

        def kernel(*args: Any, slot: int = slot) -> Tensor:
            return _execute(slot, *args)

        def fake(*args: Any, slot: int = slot) -> Tensor:
            tensors, _, geometry, *_ = _unpack(slot, args)
            return _new_output(slot, tensors, geometry)

        def autograd(*args: Any, slot: int = slot) -> Tensor:
            tensors, bias, geometry, backend, algorithm = _unpack(slot, args)
            return BasisConvFunction.apply(slot, geometry, backend, algorithm, bias, *tensors)

        _library.define(_schema(slot))
        _library.impl(name, kernel, "CompositeExplicitAutograd")
        _library.impl(name, autograd, "Autograd")
        torch.library.register_fake(f"hyperconv_ext::{name}", fake, lib=_library)


_register()
