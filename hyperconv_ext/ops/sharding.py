"""Sharding strategies of the operators, for `torch.distributed.tensor`.

All four are derivatives of one sum over (batch, output channel, input channel), see `convolution`. It
may be split along any of the three: what has that index is sharded by it, what does not is replicated,
and a result without it is a partial sum. Channels of a grouped convolution are not split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..problem import OPS
from . import convolution  # noqa: F401, whose operators must be there
from .execution import BASIS, BIASED, COEFFICIENTS, GRAD, INPUT, OTHERS, split_arguments
from .registry import when_imported

_dtensor: type | None = None  # DTensor, once somebody has imported it

# Where each tensor of the sum has each index; the bias has that of the channels of what it is added to.
_AXES = {
    GRAD: {"batch": 0, "out": 1},
    INPUT: {"batch": 0, "in": 1},
    COEFFICIENTS: {"out": 0, "in": 1},
    BASIS: {},
}
_BIAS_INDEX = {GRAD: "out", INPUT: "in"}


def in_use() -> bool:
    """Whether there can be a DTensor."""
    return _dtensor is not None


def distributed(tensors: Sequence[Tensor]) -> bool:
    """Whether one of them is a DTensor. Operators that take lists have no sharding strategy."""
    return _dtensor is not None and any(isinstance(tensor, _dtensor) for tensor in tensors)


def whole(tensor: Tensor) -> Tensor:
    """All of it, where it is a DTensor."""
    return tensor.full_tensor() if distributed((tensor,)) else tensor  # type: ignore[attr-defined]


def replicated(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, the same on every rank, as a DTensor where `like` is one."""
    if not distributed((like,)) or distributed((tensor,)):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _strategies(slot: int, has_bias: bool, groups: int) -> list[tuple[list[Any], list[Any]]]:
    """Placements of (results, tensors) that go together."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    def placement(axis: int | None, otherwise: Any) -> Any:
        return otherwise if axis is None else Shard(axis)

    bias = [Replicate()] if has_bias else []
    rows: list[tuple[list[Any], list[Any]]] = [([Replicate()], [Replicate()] * 3 + bias)]
    for index in ("batch", "out", "in") if groups == 1 else ("batch",):
        own = _AXES[slot].get(index)
        if own is None and has_bias:
            continue  # every part of the sum would add it
        others = [placement(_AXES[other].get(index), Replicate()) for other in OTHERS[slot]]
        if has_bias:
            others.append(placement(0 if _BIAS_INDEX[slot] == index else None, Replicate()))
        rows.append(([placement(own, Partial())], others))
    return rows


def _register() -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    global _dtensor  # noqa: PLW0603
    _dtensor = DTensor
    propagator = DTensor._op_dispatcher.sharding_propagator
    for slot, name in enumerate(OPS):
        operator = getattr(torch.ops.hyperconv_ext, name).default

        def strategy(*args: Any, slot: int = slot) -> list[tuple[list[Any], list[Any]]]:
            _, bias, spelled = split_arguments(slot, args)
            return _strategies(slot, bias is not None, spelled[-3])

        register_sharding(operator)(strategy)
        # What a strategy was found for is remembered by the arguments from this number on. By default
        # it is that of the first plain integer, and two strides would share one output's shape.
        first = 3 + (slot in BIASED)
        propagator.op_to_schema_info[operator] = RuntimeSchemaInfo(first, needs_pytree=True)


when_imported("torch.distributed.tensor", _register)
