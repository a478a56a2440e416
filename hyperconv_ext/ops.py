"""The operators: schemas, fakes, autograd and autocast. Nothing else in the package registers any.

All four convolution operators are derivatives of one form, linear in each of four tensors,

    S(g, x, A, phi) = sum_{o,p} g[o,p] sum_{i,r,k} A[o,i,r] phi_r(k) x[i, p*stride + k*dilation - pad]

`basis_conv_fwd` is dS/dg, `basis_conv_bwd_input` dS/dx, `basis_conv_bwd_coeff` dS/dA and
`basis_conv_bwd_basis` dS/dphi, each a function of the other three tensors. Hence the set is closed
under differentiation: the gradient of <v, dS/da> by another slot b is dS/db with v in slot a. One
autograd rule therefore serves all four, to any order, forward and reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import backends, layout, planner
from .backends import reference
from .backends.cuda import schemas
from .geometry import Geometry
from .layout import new_activation
from .problem import OPS, Problem

_SLOTS = ("grad", "input", "coefficients", "basis")
_GRAD, _INPUT, _COEFFICIENTS, _BASIS = range(4)
_BIASED = (_GRAD, _INPUT)  # the operators whose result is an activation
_OTHERS = tuple(tuple(slot for slot in range(4) if slot != own) for own in range(4))
_GEOMETRY_SCHEMA = (
    "SymInt[] input_size, SymInt[] output_size, SymInt[] kernel_size, "
    "int[] stride, int[] padding, int[] dilation, int groups, str backend, str algorithm"
)

_library = torch.library.Library("hyperconv_ext", "DEF")
_launches = torch.library.Library(schemas.NAMESPACE, "DEF")
for _schema_of_launch in schemas.SCHEMAS:
    _launches.define(_schema_of_launch)


def _schema(slot: int) -> str:
    tensors = ", ".join(f"Tensor {_SLOTS[other]}" for other in _OTHERS[slot])
    bias = ", Tensor? bias" if slot in _BIASED else ""
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


def dtype_name(tensor: Tensor) -> str:
    """The name of a tensor's dtype, as `Problem` has it."""
    return str(tensor.dtype).removeprefix("torch.")


def problem_of(slot: int, tensors: Sequence[Tensor], geometry: Geometry) -> Problem:
    """The numbers of operator `OPS[slot]` on `tensors`, for the planner."""
    in_channels, out_channels, rank = _channels(slot, tensors, geometry.groups)
    first = tensors[0]
    activations = tensors[:1] if slot in (_GRAD, _INPUT) else tensors[:2]
    return Problem(
        op=OPS[slot],
        geometry=geometry,
        batch=first.shape[0],
        in_channels=in_channels,
        out_channels=out_channels,
        rank=rank,
        dtype=dtype_name(first),
        device=backends.describe(first.device),
        aligned=all(map(layout.aligned, activations))
        and all(c // geometry.groups % layout.GRANULE == 0 for c in (in_channels, out_channels)),
        tf32=backends.tf32_allowed(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _unpack(slot: int, args: Sequence[Any]) -> tuple[Any, ...]:
    """Operator arguments in schema order -> (tensors, bias, geometry, backend, algorithm)."""
    count = 4 if slot in _BIASED else 3
    fields: list[Any] = [tuple(values) for values in args[count : count + 6]]
    geometry = Geometry(*fields, groups=args[count + 6])  # type: ignore[misc]
    return args[:3], args[3] if slot in _BIASED else None, geometry, *args[count + 7 :]


def _execute(slot: int, *args: Any) -> Tensor:
    """The operators' kernel on every device: plan, then run on the chosen backend."""
    tensors, bias, geometry, backend, algorithm = _unpack(slot, args)
    problem = problem_of(slot, tensors, geometry)
    if problem.empty:
        output = _new_output(slot, tensors, geometry).zero_()
        return output if bias is None else output.add_(bias.view(-1, *(1,) * geometry.dims))
    plan = planner.plan(problem, backend, algorithm)
    run = getattr(backends.BACKENDS[plan.backend], problem.op)
    return run(plan, *tensors, bias) if slot in _BIASED else run(plan, *tensors)


def _call(
    slot: int,
    geometry: Geometry,
    backend: str,
    algorithm: str,
    bias: Tensor | None,
    *tensors: Tensor,
) -> Tensor:
    """The registered operator `OPS[slot]`."""
    operator = getattr(torch.ops.hyperconv_ext, OPS[slot])
    operands = (*tensors, bias) if slot in _BIASED else tensors
    return operator(*operands, *_flatten(geometry), backend, algorithm)


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
        with torch._C._AutoDispatchBelowAutograd():
            return _call(slot, geometry, backend, algorithm, bias, *tensors)

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
        return form(wanted, ctx.geometry, ctx.backend, ctx.algorithm, None, *operands)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (value,) = grads
        needs_bias, *needs = ctx.needs_input_grad[4:]
        bias = None
        if needs_bias:
            bias = value.sum([0, *range(2, value.dim())]).to(ctx.bias_dtype)
        results = [
            BasisConvFunction._substitute(ctx, other, value, ctx.slot).to(saved.dtype) if need else None
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
        return _one_by_one(BasisConvFunction, info, in_dims, args)


def _one_by_one(
    function: type[torch.autograd.Function],
    info: Any,
    in_dims: tuple[Any, ...],
    args: Sequence[Any],
) -> tuple[Tensor, int]:
    """`vmap` as one call per example: right for every transform, no faster than a loop."""

    def example(index: int) -> list[Any]:
        pairs = zip(args, in_dims, strict=True)
        return [arg if dim is None else arg.select(dim, index) for arg, dim in pairs]

    return torch.stack([function.apply(*example(i)) for i in range(info.batch_size)]), 0


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
        return _call(slot, geometry, backend, algorithm, bias, *tensors)
    return BasisConvFunction.apply(slot, geometry, backend, algorithm, bias, *tensors)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off, on devices that have it."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _for_autocast(tensor: Tensor) -> Tensor:
    """`tensor` in autocast's dtype where autocast is on, as it does for `F.convNd`."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


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
    input, coefficients = _for_autocast(input), _for_autocast(coefficients)
    bias = None if bias is None else _for_autocast(bias)
    out_channels, _, rank = coefficients.shape
    backend = planner.resolve(backend, algorithm, input.device.type, geometry.taps, out_channels, rank)
    if backend == "reference":
        planner.check_reference(algorithm)
        return reference.basis_conv(input, coefficients, basis, bias, geometry, transposed)
    slot = _INPUT if transposed else _GRAD
    return form(slot, geometry, backend, algorithm, bias, input, coefficients, basis)


_MLP_SCHEMAS = (
    "coordinate_mlp_fwd(Tensor coordinates, Tensor[] weights, Tensor[] biases, str activation, "
    "bool constant, str backend) -> Tensor",
    "coordinate_mlp_bwd(Tensor grad, Tensor coordinates, Tensor[] weights, Tensor[] biases, "
    "str activation, str backend) -> Tensor[]",
)


class CoordinateMLPFunction(torch.autograd.Function):
    """phi of the coordinate MLP in one launch, its gradient in another.

    Derivatives of higher order, forward mode and `vmap` go through the PyTorch expression of the
    same function: K rows of a tiny network, outside any hot path.
    """

    @staticmethod
    def forward(
        activation: str,
        constant: bool,
        backend: str,
        layers: int,
        coordinates: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        operator = torch.ops.hyperconv_ext.coordinate_mlp_fwd
        weights, biases = parameters[:layers], parameters[layers:]
        with torch._C._AutoDispatchBelowAutograd():
            return operator(coordinates, weights, biases, activation, constant, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.activation, ctx.constant, ctx.backend, ctx.layers, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        coordinates, *parameters = ctx.saved_tensors
        weights, biases = parameters[: ctx.layers], parameters[ctx.layers :]
        operands = (grads[0], coordinates, weights, biases, ctx.activation, ctx.backend)
        return None, None, None, None, None, *_mlp_backward(*operands)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        pairs = zip(ctx.saved_tensors, tangents[4:], strict=True)
        directions = tuple(torch.zeros_like(p) if t is None else t for p, t in pairs)

        def function(coordinates: Tensor, *parameters: Tensor) -> Tensor:
            basis = _mlp_function(coordinates, ctx.activation, ctx.constant, ctx.layers)
            return basis(*parameters)

        # The derivative of the vjp by its own (linear) argument is the jvp: no nested forward mode.
        output, pullback, *_ = torch.func.vjp(function, *ctx.saved_tensors)
        _, double, *_ = torch.func.vjp(pullback, torch.zeros_like(output))
        return double(directions)[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return _one_by_one(CoordinateMLPFunction, info, in_dims, args)


def _mlp_function(
    coordinates: Tensor, activation: str, constant: bool, layers: int
) -> Callable[..., Tensor]:
    """The PyTorch expression of phi as a function of (weights..., biases...)."""

    def function(*parameters: Tensor) -> Tensor:
        weights, biases = parameters[:layers], parameters[layers:]
        with without_autocast(coordinates.device):
            return reference.coordinate_mlp(coordinates, weights, biases, activation, constant)

    return function


def _mlp_engine(coordinates: Tensor, weights: Sequence[Tensor], backend: str) -> ModuleType | None:
    """The backend that evaluates the MLP in one kernel; None for PyTorch."""
    if coordinates.requires_grad:  # the kernels differentiate by the parameters alone
        return None
    widths = (coordinates.shape[1], *(weight.shape[0] for weight in weights))
    device = backends.describe(coordinates.device)
    name, _ = planner.mlp_backend(widths, dtype_name(weights[0]), device, backend)
    return backends.BACKENDS[name] if name else None


def _mlp_backward(
    grad: Tensor,
    coordinates: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    backend: str,
) -> list[Tensor]:
    """Gradients of (weights..., biases...); differentiable where someone is recording."""
    if torch.is_grad_enabled() or _mlp_engine(coordinates, weights, backend) is None:
        constant = grad.shape[0] > weights[-1].shape[0]
        function = _mlp_function(coordinates, activation, constant, len(weights))
        return list(torch.func.vjp(function, *weights, *biases)[1](grad))
    operator = torch.ops.hyperconv_ext.coordinate_mlp_bwd
    with torch._C._AutoDispatchBelowAutograd():
        return operator(grad, coordinates, weights, biases, activation, backend)


def coordinate_mlp(
    coordinates: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    constant: bool,
    backend: str,
) -> Tensor:
    """phi `[R, K]` of the coordinate MLP; see `backends.reference.coordinate_mlp`.

    Evaluated by the fused kernel where `planner.mlp_backend` says so and nobody asks for the gradient of
    the coordinates, else by PyTorch.
    """
    backend = planner.requested(backend)
    if torch.compiler.is_compiling():
        operator = torch.ops.hyperconv_ext.coordinate_mlp_fwd
        return operator(coordinates, list(weights), list(biases), activation, constant, backend)
    return _mlp_forward(coordinates, weights, biases, activation, constant, backend)


def _mlp_forward(
    coordinates: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    constant: bool,
    backend: str,
) -> Tensor:
    layers = len(weights)
    if _mlp_engine(coordinates, weights, backend) is None:
        function = _mlp_function(coordinates, activation, constant, layers)
        return function(*weights, *biases)
    return CoordinateMLPFunction.apply(
        activation, constant, backend, layers, coordinates, *weights, *biases
    )


def _register_mlp() -> None:
    def forward_kernel(*args: Any) -> Tensor:
        *operands, backend = args
        engine = _mlp_engine(operands[0], operands[1], backend)
        evaluate = reference.coordinate_mlp if engine is None else engine.coordinate_mlp_fwd
        return evaluate(*operands)

    def backward_kernel(*args: Any) -> list[Tensor]:
        grad, *operands, backend = args
        engine = _mlp_engine(operands[0], operands[1], backend)
        if engine is None:
            raise planner.PlanError(
                f"coordinate_mlp_bwd: expected an MLP that a kernel of backend={backend!r} evaluates; "
                f"differentiate coordinate_mlp_fwd instead"
            )
        return engine.coordinate_mlp_bwd(grad, *operands)

    def forward_fake(*args: Any) -> Tensor:
        coordinates, weights, _, _, constant, _ = args
        shape = (weights[-1].shape[0] + constant, coordinates.shape[0])
        dtype = torch.promote_types(weights[0].dtype, torch.float32)
        return coordinates.new_empty(shape, dtype=dtype)

    def backward_fake(*args: Any) -> list[Tensor]:
        _, _, weights, biases, _, _ = args
        return [torch.empty_like(tensor) for tensor in (*weights, *biases)]

    rows = (
        (_MLP_SCHEMAS[0], forward_kernel, forward_fake, _mlp_forward),
        (_MLP_SCHEMAS[1], backward_kernel, backward_fake, _mlp_backward),
    )
    for schema, kernel, fake, autograd in rows:
        name = schema.split("(")[0]
        _library.define(schema)
        _library.impl(name, kernel, "CompositeExplicitAutograd")
        _library.impl(name, autograd, "Autograd")
        torch.library.register_fake(f"hyperconv_ext::{name}", fake, lib=_library)


def _register_convolution() -> None:
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


_register_convolution()
_register_mlp()
