"""From the coordinate MLP to the output in one operator, where a backend has kernels for it.

It returns y and phi. phi is saved for backward, where everything is as for a basis that was given: the
derivative of y by phi, and then that of phi by the MLP's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, planner
from ..autocast import for_autocast
from ..compilation import compiling, untraced
from ..geometry import Geometry
from ..problem import Plan, Wanted
from ..transforms import Function
from . import mlp as mlp_operators
from . import sharding
from .convolution import basis_conv, bias_gradient, call, gradients, may_join, resolve
from .execution import (
    GEOMETRY_SCHEMA,
    flatten,
    geometry_of,
    joint_plan_of,
    new_output,
    plan_of,
    run,
    run_jointly,
    slot_of,
)
from .registry import (
    can_skip_dispatch,
    exporting,
    register,
    transforming,
)

_SCHEMA = (
    "hyper_conv_fwd(Tensor input, Tensor coefficients, Tensor coordinates, Tensor[] weights, "
    "Tensor[] biases, Tensor? bias, str activation, float weight_gain, bool linear_output, "
    f"bool transposed, {GEOMETRY_SCHEMA}) -> (Tensor, Tensor)"
)


class Mlp(NamedTuple):
    """The coordinate MLP of `backends.reference.coordinate_mlp`; the coordinates may have a window."""

    coordinates: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    activation: str
    weight_gain: float = 1.0
    linear_output: bool = False


_Compute = Callable[..., tuple[Tensor, Tensor]]
_Choice = tuple[bool, Geometry, str, str]  # transposed, geometry, backend, algorithm


class HyperConvFunction(Function):
    """(y, phi) of x, A, the coordinates and the parameters of an MLP; differentiable to any order.

    Not under transforms, where its parts are composed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        step: Step,
        settings: mlp_operators.Settings,
        bias: Tensor | None,
        input: Tensor,
        coefficients: Tensor,
        coordinates: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        layers = len(parameters) // 2
        mlp = (coordinates, parameters[:layers], parameters[layers:], *settings)
        output, basis = step.compute(input, coefficients, *mlp, bias)
        ctx.rest = step, settings, None if bias is None else bias.dtype
        ctx.save_for_backward(input, coefficients, coordinates, basis, *parameters)
        ctx.set_materialize_grads(False)
        return output, basis

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        step, settings, bias_dtype = ctx.rest
        transposed, geometry, backend, algorithm = step.choice
        input, coefficients, coordinates, basis, *parameters = ctx.saved_tensors
        needs_bias, needs_input, needs_coefficients, _, *needs_parameters = ctx.needs_input_grad[2:]
        grad, basis_grad = grads
        bias_grad = input_grad = coefficients_grad = None
        if grad is not None:
            if needs_bias:
                bias_grad = bias_gradient(grad, bias_dtype)
            wanted = (needs_input, needs_coefficients, any(needs_parameters))
            choice = (slot_of(transposed), wanted, geometry, backend, algorithm)
            operands = (grad, input, coefficients, basis.view(-1, *geometry.kernel_size))
            plan = step.joint_plan(wanted, *operands)
            if plan is None:
                results = gradients(*choice, *operands)
            else:
                results = run_jointly(plan, wanted, geometry, *operands)
            input_grad, coefficients_grad, through_output = results
            if through_output is not None:
                through_output = through_output.view(basis.shape)
                basis_grad = through_output if basis_grad is None else basis_grad + through_output
        parameter_grads: Sequence[Tensor | None] = (None,) * len(parameters)
        if basis_grad is not None and any(needs_parameters):
            half = len(parameters) // 2
            layers = parameters[:half], parameters[half:]
            rest = (coordinates, *layers, *settings, backend)
            parameter_grads = mlp_operators.backward(basis_grad, *rest)
        return *(None,) * 2, bias_grad, input_grad, coefficients_grad, None, *parameter_grads


def hyper_conv(
    input: Tensor,
    coefficients: Tensor,
    mlp: Mlp,
    bias: Tensor | None,
    geometry: Geometry,
    backend: str,
    algorithm: str,
    transposed: bool = False,
) -> Tensor:
    """`basis_conv` whose phi is that of `mlp`, with the constant function if A has a column for it."""
    coordinates, weights = mlp[:2]
    rank, evaluator = coefficients.shape[2], backend
    backend = resolve(input, coefficients, geometry, backend, algorithm, transposed)
    compute = None
    if backend != "reference" and not coordinates.requires_grad and not exporting():
        if torch._C._is_any_autocast_enabled():
            input, coefficients = for_autocast(input), for_autocast(coefficients)
            bias = None if bias is None else for_autocast(bias)
        choice = (transposed, geometry, backend, algorithm)
        compute = _computation(input, coefficients, mlp, bias, *choice)
    if compute is None:
        constant = rank > weights[-1].shape[0]
        basis = mlp_operators.coordinate_mlp(*mlp, constant, evaluator)
        shaped = basis.view(-1, *geometry.kernel_size)
        where = (geometry, backend, algorithm, transposed)
        return basis_conv(input, coefficients, shaped, bias, *where)
    if compiling():
        return compute(input, coefficients, *mlp, bias)[0]
    return Step(compute, choice)(input, coefficients, mlp, bias)


def _computation(
    input: Tensor,
    coefficients: Tensor,
    mlp: Mlp,
    bias: Tensor | None,
    transposed: bool,
    geometry: Geometry,
    backend: str,
    algorithm: str,
) -> _Compute | None:
    """(x, A, *MLP, bias) -> (y, phi): the operator, or what is behind it; None: compose the parts."""
    if sharding.in_use() and sharding.distributed((input, *mlp.weights)):
        return None
    if compiling():
        # It has rules for the transforms under compilation. Where gradients are recorded, AOTAutograd
        # takes one of two outputs for an operation that fuses with what follows, and so saves other
        # tensors for backward, and makes more kernels, than behind a convolution.
        operator = partial(_call, transposed, geometry, backend, algorithm)
        return None if torch.is_grad_enabled() else operator
    if transforming():
        return None
    tensors = (input, coefficients)
    offset = () if bias is None else (bias,)
    if not can_skip_dispatch((*tensors, *offset, mlp.coordinates, *mlp.weights, *mlp.biases)):
        engine = mlp_operators.engine_of(mlp.coordinates, mlp.weights, backend)
        dispatched = partial(_call_below_autograd, transposed, geometry, backend, algorithm)
        return None if engine is None else dispatched
    plan = plan_of(slot_of(transposed), tensors, geometry, backend, algorithm)
    if plan is None:
        return None
    shapes = tuple([weight.shape for weight in mlp.weights])
    return _fused(plan, shapes, mlp.weights[0].dtype)


@lru_cache(maxsize=4096)
def _fused(plan: Plan, shapes: tuple[torch.Size, ...], dtype: torch.dtype) -> _Compute | None:
    """The planned backend's function, if it evaluates an MLP whose weights have these shapes.

    Not where some taps meet no input: phi is that of them all.
    """
    if plan.window is not None:
        return None
    widths = (shapes[0][1], *(shape[0] for shape in shapes))
    engine = mlp_operators.engine(widths, dtype, plan.problem.device, plan.backend)
    return None if engine is None else partial(untraced(engine.hyper_conv_fwd), plan)


class Step:
    """`hyper_conv` of operands like those of an earlier call, by what that call worked out.

    A layer would otherwise check, look up and plan the same at every step, which takes longer than the
    kernels of a small one; a large one leaves Python nothing in the caches, so that it takes several
    times as long.
    """

    def __init__(self, compute: _Compute, choice: _Choice) -> None:
        self.compute, self.choice = compute, choice
        self._joint_plans: dict[tuple[Any, ...], Plan | None] = {}

    def __call__(self, input: Tensor, coefficients: Tensor, mlp: Mlp, bias: Tensor | None) -> Tensor:
        """The output for operands with the `step_key` that this is kept by."""
        if not torch.is_grad_enabled():
            return self.compute(input, coefficients, *mlp, bias)[0]
        coordinates, weights, biases, *settings = mlp
        operands = (bias, input, coefficients, coordinates, *weights, *biases)
        return HyperConvFunction.apply(self, settings, *operands)[0]

    def joint_plan(self, wanted: Wanted, *operands: Tensor) -> Plan | None:
        """That of `wanted` gradients where nothing but its kernels is to run; None: `gradients` decides.

        `operands` as `joint_plan_of` takes them; all but the first, the output's gradient, are those of
        the forward pass.
        """
        if torch.is_grad_enabled() or not _in_plain_eager_mode() or not can_skip_dispatch(operands):
            return None
        grad = operands[0]
        flags = torch.are_deterministic_algorithms_enabled(), backends.tf32_allowed()
        key = (wanted, grad.stride(), grad.dtype, grad.data_ptr() % 16, *flags)
        if key not in self._joint_plans:
            transposed, geometry, backend, algorithm = self.choice
            choice = (slot_of(transposed), wanted, geometry, backend, algorithm)
            joins = may_join(choice[0], wanted, backend, grad)
            self._joint_plans[key] = joint_plan_of(*choice, *operands) if joins else None
        return self._joint_plans[key]


def _in_plain_eager_mode() -> bool:
    """Whether nobody traces, exports, transforms or casts what is called now."""
    return not (
        torch.compiler.is_compiling()
        or exporting()
        or transforming()
        or torch._C._is_any_autocast_enabled()
    )


def step_key(
    input: Tensor, coefficients: Tensor, mlp: Mlp, bias: Tensor | None, backend: str
) -> tuple[Any, ...] | None:
    """All that a `Step` on these operands depends on; None: not to be kept, they are not plain."""
    coordinates, weights, biases, activation, weight_gain, linear_output = mlp
    if not _in_plain_eager_mode() or coordinates.requires_grad:
        return None
    given = (input, coefficients) if bias is None else (input, coefficients, bias)
    if not can_skip_dispatch((*given, coordinates, *weights, *biases)):
        return None
    if any(tensor.is_nested for tensor in given):  # which have no shape
        return None
    last = weights[-1]
    return (
        *(input.shape, input.stride(), input.dtype, input.device, input.data_ptr() % 16),
        *(coefficients.shape, coefficients.dtype, coefficients.device),
        None if bias is None else (bias.shape, bias.dtype, bias.device),
        coordinates.shape,
        *[weight.shape for weight in weights],
        *[vector.shape for vector in biases],
        *(weights[0].dtype, last.dtype, last.device, activation, weight_gain, linear_output),
        *(planner.requested(backend), torch.are_deterministic_algorithms_enabled()),
        *(backends.tf32_allowed(), torch.is_grad_enabled()),
    )


def step(
    input: Tensor,
    coefficients: Tensor,
    mlp: Mlp,
    bias: Tensor | None,
    geometry: Geometry,
    backend: str,
    algorithm: str,
    transposed: bool = False,
) -> Step | None:
    """What does `hyper_conv` of such operands, which have a `step_key`; None: only that does."""
    backend = resolve(input, coefficients, geometry, backend, algorithm, transposed)
    if backend == "reference":
        return None
    choice = (transposed, geometry, backend, algorithm)
    compute = _computation(input, coefficients, mlp, bias, *choice)
    return None if compute is None else Step(compute, choice)


def _call(
    transposed: bool,
    geometry: Geometry,
    backend: str,
    algorithm: str,
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
    """The registered operator."""
    tensors = (input, coefficients, coordinates, weights, biases, bias)
    settings = (activation, weight_gain, linear_output)
    choice = (transposed, *flatten(geometry), backend, algorithm)
    return torch.ops.hyperconv_ext.hyper_conv_fwd(*tensors, *settings, *choice)


def _call_below_autograd(*args: Any) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return _call(*args)


def _kernel(
    input: Tensor,
    coefficients: Tensor,
    coordinates: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    bias: Tensor | None,
    activation: str,
    weight_gain: float,
    linear_output: bool,
    transposed: bool,
    *spelled: Any,
) -> tuple[Tensor, Tensor]:
    """In one go where the planned backend evaluates MLPs, else one after the other."""
    slot, tensors, geometry = slot_of(transposed), (input, coefficients), geometry_of(spelled)
    plan = plan_of(slot, tensors, geometry, *spelled[-2:])
    mlp = (coordinates, weights, biases, activation, weight_gain, linear_output)
    whole = plan if plan is not None and plan.window is None else None
    if whole and mlp_operators.engine_of(coordinates, weights, whole.backend) is not None:
        return backends.BACKENDS[whole.backend].hyper_conv_fwd(whole, *tensors, *mlp, bias)
    constant = coefficients.shape[2] > weights[-1].shape[0]
    basis = torch.ops.hyperconv_ext.coordinate_mlp_fwd(*mlp, constant, spelled[-2])
    shaped = basis.view(-1, *geometry.kernel_size)
    return run(slot, plan, (*tensors, shaped), bias, geometry), basis


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    input, coefficients, coordinates, weights, _, _, _, _, _, transposed, *spelled = args
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    basis = coordinates.new_empty((coefficients.shape[2], coordinates.shape[0]), dtype=dtype)
    return new_output(slot_of(transposed), (input, coefficients), geometry_of(spelled)), basis


def _autograd(*args: Any) -> tuple[Tensor, Tensor]:
    input, coefficients, coordinates, weights, biases, bias, *rest = args
    activation, weight_gain, linear_output, transposed, *spelled = rest
    settings = (activation, weight_gain, linear_output)
    choice = (transposed, geometry_of(spelled), *spelled[-2:])
    if transforming():  # each of two operators has the rules of every transform
        constant = coefficients.shape[2] > weights[-1].shape[0]
        mlp = (coordinates, weights, biases, *settings, constant, spelled[-2])
        basis = torch.ops.hyperconv_ext.coordinate_mlp_fwd(*mlp)
        _, geometry, *names = choice
        shaped = basis.view(-1, *geometry.kernel_size)
        convolved = call(slot_of(transposed), geometry, *names, bias, input, coefficients, shaped)
        return convolved, basis
    operands = (bias, input, coefficients, coordinates, *weights, *biases)
    step = Step(partial(_call_below_autograd, *choice), choice)
    return HyperConvFunction.apply(step, settings, *operands)


register(_SCHEMA, _kernel, _fake, _autograd)
