"""Memory layout of activations `[B, C, *S]`: outputs take the layout of the tensor they answer to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from operator import mul

import torch
from torch import Tensor

from .caching import memoize
from .geometry import Ints

# Elements. Triton knows of an integer argument whether it is a multiple of 16, or nothing: only then
# does it read 16 bytes at a time.
GRANULE = 16


def channels_last(tensor: Tensor) -> bool:
    """Whether an output that answers to `tensor` is channels last: PyTorch's `suggest_memory_format`.

    In any number of axes. It looks at the order of the strides, so a slice of a channels-last tensor is
    one too. Where axes of one element allow both, as in a contiguous `[B, C, 1, 1]`, it is contiguous.
    """
    return _suggests_channels_last(tensor.shape, tensor.stride())


@memoize
def _suggests_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    if strides[1] == 0:
        return False
    least = 0
    for axis in (1, *range(len(shape) - 1, 1, -1), 0):
        size, stride = shape[axis], strides[axis]
        empty = isinstance(size, int) and size == 0  # a symbolic size never is, and may not be asked
        if empty or stride < least or (axis == 0 and least == strides[1]):
            return False
        least = stride * size if size > 1 else stride
    return True


def new_activation(like: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """An uninitialised `[B, channels, *size]` with the batch, dtype and layout of `like`."""
    layout = _layout_like(like.shape, like.stride(), channels, tuple(size))
    if layout is None:
        return like.new_empty((like.shape[0], channels, *size))
    return like.new_empty_strided(*layout)


@memoize
def _layout_like(
    shape: Sequence[int], strides: Sequence[int], channels: int, size: Ints
) -> tuple[Ints, Ints] | None:
    """(shape, strides) of what answers to such an activation, if channels last; None: contiguous."""
    if _suggests_channels_last(shape, strides):
        return _channels_last_layout(shape[0], channels, size)
    return None


@memoize
def _channels_last_layout(batch: int, channels: int, size: Ints) -> tuple[Ints, Ints]:
    """(shape, strides) of a channels-last `[batch, channels, *size]`."""
    pitches = tuple(accumulate((channels, *size[:0:-1]), mul))[::-1]
    return (batch, channels, *size), (channels * prod(size), 1, *pitches)


def conform(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the layout that `new_activation(like, ...)` has; copied only if it differs."""
    if not channels_last(like):
        return tensor.contiguous()
    if channels_last(tensor) and tensor.movedim(1, -1).is_contiguous():
        return tensor
    return new_activation(like, tensor.shape[1], tensor.shape[2:]).copy_(tensor)


_FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


def as_channels_last(tensor: Tensor) -> Tensor:
    """`[B, C, *S]` in two or three dimensions converted to channels last, for `channels_last` too."""
    return tensor.to(memory_format=_FORMATS[tensor.dim() - 2])


def sample(dims: int, last: bool) -> Tensor:
    """`[2, 2, *(2,) * dims]`, whose memory format is beyond doubt: channels last, or contiguous."""
    shape, strides = _channels_last_layout(2, 2, (2,) * dims)
    if last:
        return torch.empty_strided(shape, strides, device="cpu")
    return torch.empty(shape, device="cpu")


@memoize
def remembers_channels_last(shape: Sequence[int]) -> bool:
    """Whether strides can say that a weight of this shape is channels last: not `[C_out, 1, 1, 1]`."""
    return _suggests_channels_last(*_channels_last_layout(shape[0], shape[1], tuple(shape[2:])))


def aligned(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether `[B, C, *S]` is channels last and every position starts at a multiple of `GRANULE`.

    Positions may overlap (`torch.Tensor.unfold`): another axis can have the channels' stride of 1.
    """
    axes = zip(strides, shape, strict=True)
    others = (step for axis, (step, size) in enumerate(axes) if axis != 1 and size > 1)
    return strides[1] == 1 and all(step % GRANULE == 0 for step in others)
