"""What the convolution operators are below autograd: their tensors by slot, schemas, plans and kernels.

The slots are the four tensors of the form S(g, x, A, phi) that `convolution` differentiates. An operator
has the number of the slot by which it is the derivative, and takes the other three in their order.
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
from ..autocast import without_autocast
from ..geometry import Geometry
from ..layout import new_activation
from ..problem import OPS, Plan, Problem
from .registry import untraced

_SLOTS = ("grad", "input", "coefficients", "basis")
GRAD, INPUT, COEFFICIENTS, BASIS = range(4)
BIASED = (GRAD, INPUT)  # the operators whose result is an activation
OTHERS = tuple(tuple(slot for slot in range(4) if slot != own) for own in range(4))
GEOMETRY_SCHEMA = (
    "SymInt[] input_size, SymInt[] output_size, SymInt[] kernel_size, "
    "int[] stride, int[] padding, int[] dilation, int groups, str backend, str algorithm"
)


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
