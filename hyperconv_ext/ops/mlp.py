"""The coordinate MLP as an operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import backends, planner
from ..autocast import without_autocast
from ..backends import reference
from ..caching import memoize
from ..compilation import untraced
from ..problem import Device
from ..transforms import Function
from .registry import (
    can_skip_dispatch,
    exporting,
    register,
    vmap_by_loop,
)
from .sharding import distributed

_SCHEMAS = (
    "coordinate_mlp_fwd(Tensor coordinates, Tensor[] weights, Tensor[] biases, str activation, "
    "float weight_gain, bool linear_output, bool constant, str backend) -> Tensor",
    "coordinate_mlp_bwd(Tensor grad, Tensor coordinates, Tensor[] weights, Tensor[] biases, "
    "str activation, float weight_gain, bool linear_output, str backend) -> Tensor[]",
)

Settings = tuple[str, float, bool]  # activation, weight_gain, linear_output


class CoordinateMLPFunction(Function):
    """phi of the coordinate MLP in one launch, its gradient in another.

    Derivatives of higher order, forward mode and `vmap` go through the PyTorch expression of the
    same function: K rows of a tiny network, outside any hot path.
    """

    @staticmethod
    def forward(
        settings: Settings,
        constant: bool,
        backend: str,
        layers: int,
        coordinates: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        operator = torch.ops.hyperconv_ext.coordinate_mlp_fwd
        weights, biases = parameters[:layers], parameters[layers:]
        if can_skip_dispatch((coordinates, *parameters)):
            found = engine_of(coordinates, weights, backend)
            if found is not None:
                return _run(found.coordinate_mlp_fwd, coordinates, weights, biases, *settings, constant)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(coordinates, weights, biases, *settings, constant, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.settings, ctx.constant, ctx.backend, ctx.layers, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        coordinates, *parameters = ctx.saved_tensors
        weights, biases = parameters[: ctx.layers], parameters[ctx.layers :]
        operands = (grads[0], coordinates, weights, biases, *ctx.settings, ctx.backend)
        return None, None, None, None, None, *backward(*operands)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        saved = ctx.saved_tensors
        pairs = zip(saved, tangents[4:], strict=True)
        directions = tuple(torch.zeros_like(p) if t is None else t for p, t in pairs)

        def function(coordinates: Tensor, *parameters: Tensor) -> Tensor:
            basis = _function(coordinates, ctx.settings, ctx.constant, ctx.layers)
            return basis(*parameters)

        # The derivative of the vjp by its own (linear) argument is the jvp: no nested forward mode.
        output, pullback, *_ = torch.func.vjp(function, *saved)
        _, double, *_ = torch.func.vjp(pullback, torch.zeros_like(output))
        return double(directions)[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return vmap_by_loop(CoordinateMLPFunction.apply, info, in_dims, *args)


def _function(
    coordinates: Tensor, settings: Settings, constant: bool, layers: int
) -> Callable[..., Tensor]:
    """The PyTorch expression of phi as a function of (weights..., biases...)."""

    def function(*parameters: Tensor) -> Tensor:
        weights, biases = parameters[:layers], parameters[layers:]
        with without_autocast(coordinates.device):
            return reference.coordinate_mlp(coordinates, weights, biases, *settings, constant)

    return function


def widths_of(weights: Sequence[Tensor]) -> tuple[int, ...]:
    """(D, outputs of every layer)."""
    return (weights[0].shape[1], *[weight.shape[0] for weight in weights])


def engine_of(coordinates: Tensor, weights: Sequence[Tensor], backend: str) -> ModuleType | None:
    """The backend that evaluates the MLP in one kernel; None for PyTorch."""
    # The kernels differentiate by the parameters alone.
    if coordinates.requires_grad or distributed((coordinates, *weights)):
        return None
    return engine(widths_of(weights), weights[0].dtype, backends.describe(coordinates.device), backend)


@memoize
def engine(
    widths: tuple[int, ...], dtype: torch.dtype, device: Device, backend: str
) -> ModuleType | None:
    """The backend that evaluates an MLP of these layer widths in one kernel; None for PyTorch."""
    name, _ = planner.mlp_backend(widths, backends.dtype_name(dtype), device, backend)
    return backends.BACKENDS[name] if name else None


def backward(
    grad: Tensor,
    coordinates: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    weight_gain: float,
    linear_output: bool,
    backend: str,
) -> list[Tensor]:
    """Gradients of (weights..., biases...); differentiable where someone is recording."""
    settings = (activation, weight_gain, linear_output)
    found = engine_of(coordinates, weights, backend)
    # The batched tensors of `is_grads_batched` cannot be looped over where an operator takes lists.
    batched = torch._C._functorch.is_legacy_batchedtensor(grad)
    if torch.is_grad_enabled() or found is None or batched:
        constant = grad.shape[0] > weights[-1].shape[0]
        function = _function(coordinates, settings, constant, len(weights))
        return list(torch.func.vjp(function, *weights, *biases)[1](grad))
    operands = (grad, coordinates, weights, biases, *settings)
    if can_skip_dispatch((grad, coordinates, *weights, *biases)):
        return _run(found.coordinate_mlp_bwd, *operands)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.hyperconv_ext.coordinate_mlp_bwd(*operands, backend)


@untraced
def _run(kernel: Callable[..., Any], *operands: Any) -> Any:
    return kernel(*operands)


def coordinate_mlp(
    coordinates: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    weight_gain: float,
    linear_output: bool,
    constant: bool,
    backend: str,
) -> Tensor:
    """phi `[R, K]` of the coordinate MLP; see `backends.reference.coordinate_mlp`.

    Evaluated by the fused kernel where `planner.mlp_backend` says so and nobody asks for the gradient of
    the coordinates, else by PyTorch.
    """
    backend = planner.requested(backend)
    settings = (activation, weight_gain, linear_output)
    if exporting() or distributed(weights):
        return _function(coordinates, settings, constant, len(weights))(*weights, *biases)
    if torch.compiler.is_compiling():
        operator = torch.ops.hyperconv_ext.coordinate_mlp_fwd
        return operator(coordinates, list(weights), list(biases), *settings, constant, backend)
    return _forward(coordinates, weights, biases, *settings, constant, backend)


def _forward(
    coordinates: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    weight_gain: float,
    linear_output: bool,
    constant: bool,
    backend: str,
) -> Tensor:
    settings, layers = (activation, weight_gain, linear_output), len(weights)
    if engine_of(coordinates, weights, backend) is None:
        function = _function(coordinates, settings, constant, layers)
        return function(*weights, *biases)
    operands = (coordinates, *weights, *biases)
    return CoordinateMLPFunction.apply(settings, constant, backend, layers, *operands)


def _register() -> None:
    def forward_kernel(*args: Any) -> Tensor:
        *operands, backend = args
        engine = engine_of(operands[0], operands[1], backend)
        evaluate = reference.coordinate_mlp if engine is None else engine.coordinate_mlp_fwd
        return evaluate(*operands)

    def backward_kernel(*args: Any) -> list[Tensor]:
        grad, *operands, backend = args
        engine = engine_of(operands[0], operands[1], backend)
        if engine is None:
            raise planner.PlanError(
                f"coordinate_mlp_bwd: expected an MLP that a kernel of backend={backend!r} evaluates; "
                f"differentiate coordinate_mlp_fwd instead"
            )
        return _run(engine.coordinate_mlp_bwd, grad, *operands)

    def forward_fake(*args: Any) -> Tensor:
        coordinates, weights, *_, constant, _ = args
        shape = (weights[-1].shape[0] + int(constant), coordinates.shape[0])
        dtype = torch.promote_types(weights[0].dtype, torch.float32)
        return coordinates.new_empty(shape, dtype=dtype)

    def backward_fake(*args: Any) -> list[Tensor]:
        _, _, weights, biases, *_ = args
        return [torch.empty_like(tensor) for tensor in (*weights, *biases)]

    register(_SCHEMAS[0], forward_kernel, forward_fake, _forward)
    register(_SCHEMAS[1], backward_kernel, backward_fake, backward)


_register()
