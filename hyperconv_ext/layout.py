"""Memory layout of activations `[B, C, *S]`: outputs take the layout of the tensor they answer to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from operator import mul

from torch import Tensor

from .geometry import Ints
from .memory import remembered

# Elements. Triton knows of an integer argument whether it is a multiple of 16, or nothing: only then
# does it read 16 bytes at a time.
GRANULE = 16


def channels_last(tensor: Tensor) -> bool:
    """Whether neighbouring channels of `tensor` are neighbours in memory, in any number of axes."""
    return tensor.stride(1) == 1


def new_activation(like: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """An uninitialised `[B, channels, *size]` with the batch, dtype and layout of `like`."""
    batch = like.shape[0]
    if channels_last(like):
        return like.new_empty_strided(*_channels_last_layout(batch, channels, tuple(size)))
    return like.new_empty((batch, channels, *size))


@remembered
def _channels_last_layout(batch: int, channels: int, size: Ints) -> tuple[Ints, Ints]:
    """(shape, strides) of a channels-last `[batch, channels, *size]`."""
    pitches = tuple(accumulate((channels, *size[:0:-1]), mul))[::-1]
    return (batch, channels, *size), (channels * prod(size), 1, *pitches)


def conform(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the layout that `new_activation(like, ...)` has; copied only if it differs."""
    if channels_last(like):
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    return tensor.contiguous()


def aligned(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether `[B, C, *S]` is channels last and every position starts at a multiple of `GRANULE`.

    Positions may overlap (`torch.Tensor.unfold`): another axis can have the channels' stride of 1.
    """
    axes = zip(strides, shape, strict=True)
    others = (step for axis, (step, size) in enumerate(axes) if axis != 1 and size > 1)
    return strides[1] == 1 and all(step % GRANULE == 0 for step in others)
