"""Which parameters and buffers of a model share their memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def tied(model: nn.Module) -> dict[tuple[int, str], str]:
    """Tensors that are, or overlap, another one of the model.

    Returns:
        For each such tensor, as (id of the module that holds it, its name there), the full name of one
        that it shares memory with.
    """
    spans: dict[str, list[tuple[int, int, int, str, str]]] = {}
    for path, module in model.named_modules():
        for name, tensor in _held(module):
            where, start, end = _span(tensor)
            full = f"{path}.{name}" if path else name
            spans.setdefault(where, []).append((start, end, id(module), name, full))
    found: dict[tuple[int, str], str] = {}
    for held in spans.values():
        held.sort()
        reaching = held[0]
        for span in held[1:]:
            if span[0] < reaching[1]:
                found.setdefault(reaching[2:4], span[4])
                found[span[2:4]] = reaching[4]
            reaching = max(reaching, span, key=lambda one: one[1])
    return found


def _held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and not is_lazy(tensor) and (tensor.is_meta or tensor.numel()):
                yield name, tensor


def _span(tensor: Tensor) -> tuple[str, int, int]:
    """(where, first byte, byte after the last); without memory to point at, the object itself."""
    if (
        tensor.is_meta
        or type(tensor) not in (Tensor, nn.Parameter)
        or tensor.layout is not torch.strided
    ):
        return "objects", id(tensor), id(tensor) + 1
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    elements = 1 + sum((size - 1) * stride for size, stride in pairs)
    start = tensor.data_ptr()
    return str(tensor.device), start, start + elements * tensor.element_size()
