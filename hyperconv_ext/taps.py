"""Coordinates of a kernel's taps: derived from numbers wherever they are needed, kept by no layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COORDINATES = ("centered", "unit")


def check_coordinate_name(coordinates: str) -> None:
    """Raise ValueError unless `coordinates` names a system of coordinates."""
    if coordinates not in COORDINATES:
        raise ValueError(
            f"coordinates: expected one of {', '.join(map(repr, COORDINATES))}, got "
            f"{coordinates!r}; pass one of these"
        )


def tap_coordinates(
    kernel_size: Sequence[int],
    coordinates: str = "centered",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Coordinates `[K, D]` of the taps in row-major order, one column per axis in axis order.

    `'centered'` runs from -(k-1)/2 to (k-1)/2 on each axis, in taps; `'unit'` is the same scaled to
    [-1, 1] (an axis with one tap is at 0).

    Raises:
        ValueError: `coordinates` is neither.
    """
    check_coordinate_name(coordinates)
    counts = [torch.arange(size, device=device) for size in kernel_size]
    return tap_grid(counts, coordinates, (1.0,) * len(counts), dtype)


def window_of(taps: Tensor, scale: Tensor) -> Tensor:
    """(1 + |x / scale|^2)^-2 `[K, 1]` at the coordinates x `[K, D]`; 1 at the centre, nowhere 0."""
    return (1 + (taps / scale.to(taps.dtype)).square().sum(1, keepdim=True)) ** -2


def tap_grid(
    counts: Sequence[Tensor], coordinates: str, spacing: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """`[K, D]` of 0, 1, 2, ... along each axis."""
    sizes = [count.shape[0] for count in counts]
    columns = []
    for axis, (count, size, step) in enumerate(zip(counts, sizes, spacing, strict=True)):
        half = (size - 1) / 2
        values = count.to(dtype) - half
        if coordinates == "centered":
            values = values * step
        elif size > 1:
            values = values / half
        shape = [size if other == axis else 1 for other in range(len(sizes))]
        columns.append(values.view(shape).expand(sizes).reshape(-1))
    return torch.stack(columns, dim=-1)
