"""Memory layout of activations `[B, C, *S]`: outputs take the layout of the tensor they answer to."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

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
        axes = range(1, len(size) + 1)
        return like.new_empty((batch, *size, channels)).permute(0, len(size) + 1, *axes)
    return like.new_empty((batch, channels, *size))


def conform(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the layout that `new_activation(like, ...)` has; copied only if it differs."""
    if channels_last(like):
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    return tensor.contiguous()


def aligned(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether `[B, C, *S]` is channels last and every position starts at a multiple of `GRANULE`."""
    steps = (step for step, size in zip(strides, shape, strict=True) if step != 1 and size > 1)
    return strides[1] == 1 and all(step % GRANULE == 0 for step in steps)
