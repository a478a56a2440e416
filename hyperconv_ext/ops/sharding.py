"""Sharding strategies of the operators, for `torch.distributed.tensor`.

All of a convolution are derivatives of one sum over (batch, output channel, input channel), see
`convolution`. It may be split along any of the three: what has that index is sharded by it, what does
not is replicated, and a result without it is a partial sum. Channels of a grouped convolution are not
split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..compilation import when_imported
from ..problem import JOINT, OPS, Wanted
from . import convolution  # noqa: F401, whose operators must be there
from .execution import (
    BASIS,
    BIASED,
    COEFFICIENTS,
    GRAD,
    INPUT,
    OTHERS,
    split_arguments,
    split_joint_arguments,
)

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


def agreed(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` as `replicated`, but it is another on every rank, and that of the mesh's first counts."""
    if not distributed((like,)) or distributed((tensor,)):
        return tensor
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = like.device_mesh  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, [Replicate()] * mesh.ndim)


_Rows = list[tuple[list[Any], list[Any]]]  # placements of (results, tensors) that go together


def _indices(groups: int) -> tuple[str, ...]:
    """What the sum may be split along."""
    return ("batch", "out", "in") if groups == 1 else ("batch",)


def _placement(slot: int, index: str, otherwise: Any) -> Any:
    """Of the tensor in `slot` where the sum is split along `index`, which it may not have."""
    from torch.distributed.tensor import Shard

    axis = _AXES[slot].get(index)
    return otherwise if axis is None else Shard(axis)


def _strategies(slot: int, has_bias: bool, groups: int) -> _Rows:
    from torch.distributed.tensor import Partial, Replicate, Shard

    bias = [Replicate()] if has_bias else []
    rows: _Rows = [([Replicate()], [Replicate()] * 3 + bias)]
    for index in _indices(groups):
        if index not in _AXES[slot] and has_bias:
            continue  # every part of the sum would add it
        others = [_placement(other, index, Replicate()) for other in OTHERS[slot]]
        if has_bias:
            others.append(Shard(0) if _BIAS_INDEX[slot] == index else Replicate())
        rows.append(([_placement(slot, index, Partial())], others))
    return rows


def _joint_strategies(slot: int, wanted: Wanted, groups: int) -> _Rows:
    """Of the gradients of a layer together: each result is placed as that of its own operator."""
    from torch.distributed.tensor import Partial, Replicate

    rows: _Rows = [([Replicate()] * 3, [Replicate()] * 4)]
    for index in _indices(groups):
        operands = [_placement(other, index, Replicate()) for other in (slot, *OTHERS[slot])]
        pairs = zip(OTHERS[slot], wanted, strict=True)
        results = [_placement(o, index, Partial()) if want else Replicate() for o, want in pairs]
        rows.append((results, operands))
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

        def strategy(*args: Any, slot: int = slot) -> _Rows:
            _, bias, spelled = split_arguments(slot, args)
            return _strategies(slot, bias is not None, spelled[-3])

        register_sharding(operator)(strategy)
        # What a strategy was found for is remembered by the arguments from this number on. By default
        # it is that of the first plain integer, and two strides would share one output's shape.
        first = 3 + (slot in BIASED)
        propagator.op_to_schema_info[operator] = RuntimeSchemaInfo(first, needs_pytree=True)
    joint = getattr(torch.ops.hyperconv_ext, JOINT).default

    def joint_strategy(*args: Any) -> _Rows:
        slot, wanted, geometry, *_ = split_joint_arguments(args)
        return _joint_strategies(slot, wanted, geometry.groups)

    register_sharding(joint)(joint_strategy)
    propagator.op_to_schema_info[joint] = RuntimeSchemaInfo(4, needs_pytree=True)


when_imported("torch.distributed.tensor", _register)
