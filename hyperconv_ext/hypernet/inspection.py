"""What is asked of modules and parameters, whoever made them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as module_hooks

from ..ops.sharding import agreed


def blank(parameter: Tensor) -> Tensor:
    """Memory for a draw of `parameter`: for all of it on every rank, where it is a DTensor.

    Each rank has random numbers of its own: drawn shard by shard, equal seeds would give equal shards,
    and each feature twice.
    """
    return torch.empty(parameter.shape, device=parameter.device, dtype=parameter.dtype)


def overwrite(module: nn.Module, name: str, value: Tensor) -> None:
    """Write to a parameter, through its parametrization if it has one; the first rank's value counts."""
    parameter = module._parameters.get(name)
    value = agreed(value, getattr(module, name) if parameter is None else parameter)
    if parameter is None:
        setattr(module, name, value)
    else:
        parameter.copy_(value)


def without_numbers(tensor: Tensor) -> bool:
    """Whether there is nothing to compute with: it is on the meta device, or fake."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def floating_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """That of the module's first floating-point parameter, else buffer, else `default`."""
    tensors: Iterable[Tensor] = (*module.parameters(), *module.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), default)


def calls_forward_only(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a call of `module` is the forward of `cls` and nothing else: no hooks either."""
    kept = module.__dict__
    if (
        kept["_forward_hooks"]
        or kept["_forward_pre_hooks"]
        or kept["_backward_hooks"]
        or kept["_backward_pre_hooks"]
        or "forward" in kept
    ):
        return False
    kind = type(module)
    return kind is cls or (kind.forward is cls.forward and kind.__call__ is cls.__call__)


def watching_every_module() -> bool:
    """Whether there are hooks on all modules."""
    return bool(
        module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    )
