"""FLOP formulas of the operators, for `torch.utils.flop_counter.FlopCounterMode`.

What is counted is what the planned backend executes, two for each multiply-add: not the convolution that
the layer stands for, and with the zeros that a fused backend's banded products multiply. `'reference'`
runs PyTorch's own operators, which count themselves.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import backends, planner
from ..compilation import when_imported
from ..problem import JOINT, OPS
from . import convolution, hyper, mlp  # noqa: F401, whose operators must be there
from .execution import (
    OTHERS,
    by_slot,
    geometry_of,
    joint_plan_of,
    plan_of,
    slot_of,
    split_arguments,
    split_joint_arguments,
)


def _convolution(slot: int, tensors: Any, spelled: Any) -> int:
    geometry, choice = geometry_of(spelled), spelled[-2:]
    try:
        plan = plan_of(slot, tensors, geometry, *choice)
    except planner.PlanError:  # on fake tensors of a device that is not here
        plan = plan_of(slot, tensors, geometry, "composite", "auto")
    return int(backends.BACKENDS[plan.backend].flops(plan)) if plan else 0


def _joint(*args: Any) -> int:
    slot, wanted, *choice, grad, input, coefficients, basis = split_joint_arguments(args)
    operands = (grad, input, coefficients, basis)
    try:
        plan = joint_plan_of(slot, wanted, *choice, *operands)
    except planner.PlanError:
        plan = None
    if plan is not None:
        return int(backends.BACKENDS[plan.backend].flops(plan))
    full = by_slot(slot, operands)
    asked = [other for other, want in zip(OTHERS[slot], wanted, strict=True) if want]
    return sum(_convolution(other, [full[i] for i in OTHERS[other]], args[6:]) for other in asked)


def _mlp(coordinates: Tensor, weights: list[Tensor], first: int) -> int:
    """One product of every layer from number `first` on, at all taps."""
    widths = (weights[0].shape[1], *[weight.shape[0] for weight in weights])
    return 2 * coordinates.shape[0] * sum(a * b for a, b in list(pairwise(widths))[first:])


def _hyper_conv(*args: Any) -> int:
    input, coefficients, coordinates, weights, _, _, _, _, _, transposed, *spelled = args
    convolved = _convolution(slot_of(transposed), (input, coefficients), spelled)
    return convolved + _mlp(coordinates, weights, 0)


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    namespace = torch.ops.hyperconv_ext

    def formula(count: Any) -> Any:
        def without_result(*args: Any, out_val: Any = None) -> int:
            return count(*args)

        return without_result

    def one(slot: int) -> Any:
        def count(*args: Any) -> int:
            tensors, _, spelled = split_arguments(slot, args)
            return _convolution(slot, tensors, spelled)

        return count

    for slot, name in enumerate(OPS):
        register_flop_formula(getattr(namespace, name), get_raw=True)(formula(one(slot)))
    register_flop_formula(getattr(namespace, JOINT), get_raw=True)(formula(_joint))
    register_flop_formula(namespace.hyper_conv_fwd, get_raw=True)(formula(_hyper_conv))

    def forward(coordinates: Tensor, weights: list[Tensor], *rest: Any) -> int:
        return _mlp(coordinates, weights, 0)

    def backward(grad: Tensor, coordinates: Tensor, weights: list[Tensor], *rest: Any) -> int:
        """The features again, the weights' gradients, those of the features but the coordinates."""
        return 2 * _mlp(coordinates, weights, 0) + _mlp(coordinates, weights, 1)

    register_flop_formula(namespace.coordinate_mlp_fwd, get_raw=True)(formula(forward))
    register_flop_formula(namespace.coordinate_mlp_bwd, get_raw=True)(formula(backward))


when_imported("torch.utils.flop_counter", _register)
