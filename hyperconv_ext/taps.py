"""Coordinates of a kernel's taps: derived from numbers wherever they are needed, kept by no layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

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
    return _grid(counts, coordinates, (1.0,) * len(counts), dtype)


def _grid(
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


_Key = tuple[tuple[int, ...], str, tuple[float, ...], torch.device, torch.dtype]
_known: dict[_Key, Tensor] = {}
_PLAIN = (Tensor, torch.nn.Parameter)


def taps_beside(
    like: Tensor, kernel_size: tuple[int, ...], coordinates: str, spacing: tuple[float, ...]
) -> Tensor:
    """Coordinates `[K, D]` on the device of `like`, a parameter of the network that takes them.

    Their dtype is float64 beside float64, else float32. They are replicated on the mesh of a DTensor,
    fake or meta beside fake or meta. Beside a plain tensor in eager mode they are made once and shared
    by all layers, so that a step launches nothing for them; whoever may write to them takes a copy.

    Args:
        like: the parameter.
        kernel_size: taps per axis.
        coordinates: a name in `COORDINATES`.
        spacing: factor of each column of `'centered'` coordinates.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if torch.compiler.is_compiling() or type(like) not in _PLAIN or torch._C._get_tracing_state():
        return _derived(like, kernel_size, coordinates, spacing, dtype)
    key = (kernel_size, coordinates, spacing, like.device, dtype)
    taps = _known.get(key)
    if taps is None:
        if torch._C._are_functorch_transforms_active() or _capturing(like):
            return _derived(like, kernel_size, coordinates, spacing, dtype)
        taps = _known[key] = _shared(*key)
    return taps


def _capturing(like: Tensor) -> bool:
    """Whether what is launched now is recorded in a CUDA graph instead of run."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def _shared(
    kernel_size: tuple[int, ...],
    coordinates: str,
    spacing: tuple[float, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """For every later call, so independent of the modes of this one.

    An inference tensor could not be saved for a later backward pass. A copy from the host is complete
    when it returns, so that no other stream reads it half written.
    """
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.inference_mode(False):
        counts = [torch.arange(size, device="cpu") for size in kernel_size]
        return _grid(counts, coordinates, spacing, dtype).to(device)


def _derived(
    like: Tensor,
    kernel_size: tuple[int, ...],
    coordinates: str,
    spacing: tuple[float, ...],
    dtype: torch.dtype,
) -> Tensor:
    """For this call, by operations that a trace records and a DTensor follows."""
    if hasattr(like, "device_mesh") or torch.jit.is_tracing():  # no device written into the trace
        ones = [like.detach().new_ones((size,), dtype=torch.int64) for size in kernel_size]
        counts = [one.cumsum(0) - 1 for one in ones]
    else:
        counts = [torch.arange(size, device=like.device) for size in kernel_size]
    return _grid(counts, coordinates, spacing, dtype)
