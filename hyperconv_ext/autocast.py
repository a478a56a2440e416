"""Autocast, asked per device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast, if it is on, runs convolutions on this device."""
    if not torch._C._is_any_autocast_enabled() or device.type == "meta":
        return None
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off, where it is on."""
    if autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def for_autocast(tensor: Tensor) -> Tensor:
    """`tensor` in autocast's dtype where autocast is on, as it does for `F.convNd`."""
    dtype = autocast_dtype(tensor.device)
    return tensor if dtype is None or tensor.dtype == torch.float64 else tensor.to(dtype)
