"""Larger kernels on the way: the old taps in the middle, the output sizes as they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import nn

from ..checks import per_axis
from .report import times
from .source import Left, Source, plain


def enlarged(source: Source, kernel_size: int | Sequence[int]) -> Source:
    """`source` with a kernel of at least this size, zeros around the old one; the same function.

    Args:
        source: a convolution.
        kernel_size: one integer, or one for each axis; an axis whose kernel is larger stays as it is.

    Raises:
        Left: the kernel would grow by an odd number of taps, of which none is in the middle; or the
            layer pads its input in a way that does not grow with the kernel.
        TypeError, ValueError: `kernel_size` is no size.
    """
    conv = source.conv
    old = conv.kernel_size
    wanted = per_axis("kernel_size", kernel_size, len(old), 1)
    new = tuple(map(max, old, wanted))
    if new == old:
        return source
    if any((large - small) % 2 for large, small in zip(new, old, strict=True)):
        raise Left(
            f"its kernel of {times(old)} cannot become {times(new)} with the output sizes as they are; "
            f"pass sizes that differ from it by even numbers"
        )
    around = [(large - small) // 2 for large, small in zip(new, old, strict=True)]
    both = [count for count in reversed(around) for _ in range(2)]
    weight = nn.Parameter(F.pad(conv.weight.detach(), both), conv.weight.requires_grad)
    more = [count * d for count, d in zip(around, conv.dilation, strict=True)]
    if not source.padded:
        return Source(plain(conv, weight=weight, padding=_wider(conv.padding, more)))
    if source.input_padding is not None:
        raise Left(
            "it pads one side more than the other, and a kernel that grows on both would look to "
            "where it did not"
        )
    spaces = zip(old, conv.stride, conv.dilation, strict=True)
    if any(d * (k - 1) + 1 < s for k, s, d in spaces):
        raise Left(
            f"its kernel of {times(old)} is smaller than its stride, so that its padding to size / "
            f"stride outputs does not follow a larger one"
        )
    return source._replace(conv=plain(conv, weight=weight))


def _wider(padding: Any, more: Sequence[int]) -> Any:
    if padding == "same":
        return padding
    given = (0,) * len(more) if padding == "valid" else per_axis("padding", padding, len(more), 0)
    return tuple(p + extra for p, extra in zip(given, more, strict=True))
