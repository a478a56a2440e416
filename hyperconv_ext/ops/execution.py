"""What the convolution operators are below autograd: their tensors by slot, schemas, plans and kernels.

The slots are the four tensors of the form S(g, x, A, phi) that `convolution` differentiates. An operator
has the number of the slot by which it is the derivative, and takes the other three in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import backends, layout, planner
from ..autocast import without_autocast
from ..compilation import untraced
from ..geometry import Geometry
from ..layout import new_activation
from ..problem import JOINT, OPS, Plan, Problem, Wanted

_SLOTS = ("grad", "input", "coefficients", "basis")
GRAD, INPUT, COEFFICIENTS, BASIS = range(4)
BIASED = (GRAD, INPUT)  # the operators whose result is an activation
OTHERS = tuple(tuple(slot for slot in range(4) if slot != own) for own in range(4))
GEOMETRY_SCHEMA = (
    "SymInt[] input_size, SymInt[] output_size, SymInt[] kernel_size, "
    "int[] stride, int[] padding, int[] dilation, int groups, str backend, str algorithm"
)
JOINT_SCHEMA = (
    f"{JOINT}(Tensor grad, Tensor input, Tensor coefficients, Tensor basis, bool[3] wanted, "
    f"bool transposed, {GEOMETRY_SCHEMA}) -> (Tensor, Tensor, Tensor)"
)


def slot_of(transposed: bool) -> int:
    """The convolution that takes x and A: the forward operator, or the input gradient."""
    return INPUT if transposed else GRAD


def schema(slot: int) -> str:
    """Of the operator `OPS[slot]`."""
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


@lru_cache(maxsize=4096)
def _joint_plan(
    slot: int, wanted: Wanted, described: _Described, geometry: Geometry, backend: str, algorithm: str
) -> Plan | None:
    left, window = geometry.trimmed or (geometry, None)
    op = OPS[OTHERS[slot][0]]
    problem = replace(_problem(BASIS, described, left), op=op, wanted=wanted)
    if problem.empty:
        return None
    plan = planner.joint(problem, backend, algorithm)
    return plan if plan is None or window is None else replace(plan, window=window)


def joint_plan_of(
    slot: int,
    wanted: Wanted,
    geometry: Geometry,
    backend: str,
    algorithm: str,
    *operands: Tensor,
) -> Plan | None:
    """The plan of the `wanted` gradients of layer `OPS[slot]` together; None: each by its own operator.

    `operands`: the gradient of the layer's output, and its input, A and phi.
    """
    full = by_slot(slot, operands)
    described = _described(BASIS, [full[other] for other in OTHERS[BASIS]])
    return _joint_plan(slot, wanted, described, geometry, backend, algorithm)


def by_slot(slot: int, operands: Sequence[Tensor]) -> dict[int, Tensor]:
    """All four tensors of S by their slots, of that in `slot` and then what `OPS[slot]` takes."""
    return dict(zip((slot, *OTHERS[slot]), operands, strict=True))


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
            if slot == BASIS:
                return _all_taps(operator(plan, *tensors), plan.window, geometry)
            tensors = (*tensors[:2], tensors[2][(slice(None), *plan.window)])
        return operator(plan, *tensors, bias) if slot in BIASED else operator(plan, *tensors)


def _all_taps(gradient: Tensor, window: tuple[slice, ...], geometry: Geometry) -> Tensor:
    """The gradient of phi from that of the taps in `window`: those that meet no input have none."""
    whole = gradient.new_zeros((gradient.shape[0], *geometry.kernel_size))
    whole[(slice(None), *window)] = gradient
    return whole


@untraced
def run_jointly(
    plan: Plan, wanted: Wanted, geometry: Geometry, *operands: Tensor
) -> Sequence[Tensor | None]:
    """As `run`, the `wanted` gradients of a layer by their joint plan."""
    operator = getattr(backends.BACKENDS[plan.backend], JOINT)
    grad, input, coefficients, basis = operands
    with without_autocast(grad.device):
        if plan.window is None:
            return operator(plan, grad, input, coefficients, basis, wanted)
        basis = basis[(slice(None), *plan.window)]
        *others, gradient = operator(plan, grad, input, coefficients, basis, wanted)
        return *others, None if gradient is None else _all_taps(gradient, plan.window, geometry)


@untraced
def execute(
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


@untraced
def execute_jointly(
    slot: int,
    wanted: Wanted,
    geometry: Geometry,
    backend: str,
    algorithm: str,
    *operands: Tensor,
) -> Sequence[Tensor | None]:
    """The joint operator's kernel on every device: on one backend, or gradient by gradient."""
    plan = joint_plan_of(slot, wanted, geometry, backend, algorithm, *operands)
    if plan is not None:
        return run_jointly(plan, wanted, geometry, *operands)
    return one_by_one(
        slot,
        wanted,
        operands,
        lambda other, *tensors: execute(other, geometry, backend, algorithm, None, *tensors),
    )


def one_by_one(
    slot: int, wanted: Sequence[bool], operands: Sequence[Tensor], compute: Callable[..., Tensor]
) -> list[Tensor | None]:
    """`compute(other, *tensors)` of the `wanted` among what operator `OPS[slot]` takes, else None."""
    full = by_slot(slot, operands)
    return [
        compute(other, *[full[index] for index in OTHERS[other]]) if want else None
        for want, other in zip(wanted, OTHERS[slot], strict=True)
    ]


def split_joint_arguments(args: Sequence[Any]) -> tuple[Any, ...]:
    """Joint operator's arguments -> (slot, wanted, geometry, backend, algorithm, *operands)."""
    *operands, wanted, transposed = args[:6]
    spelled = args[6:]
    return slot_of(transposed), tuple(wanted), geometry_of(spelled), *spelled[-2:], *operands
