"""Coordinates of a kernel's taps beside the parameters that need them; their operator in a graph; and a
window beside the coordinates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..compilation import compiling, in_graph
from ..taps import tap_grid, window_of
from .registry import can_skip_dispatch, exporting, register
from .sharding import distributed, replicated

_SCHEMA = (
    "tap_coordinates(Tensor like, int[] kernel_size, str coordinates, float[] spacing, "
    "ScalarType dtype) -> Tensor"
)

_Grid = tuple[tuple[int, ...], str, tuple[float, ...], torch.dtype]  # kernel size, name, spacing, dtype
_known: dict[tuple[_Grid, torch.device], Tensor] = {}
_PLAIN = (Tensor, torch.nn.Parameter)


@in_graph
def taps_beside(
    like: Tensor, kernel_size: tuple[int, ...], coordinates: str, spacing: tuple[float, ...]
) -> Tensor:
    """Coordinates `[K, D]` on the device of `like`, a parameter of the network that takes them.

    Their dtype is float64 beside float64, else float32. They are replicated on the mesh of a DTensor,
    fake or meta beside fake or meta. Beside a plain tensor in eager mode they are made once and shared
    by all layers, so that a step launches nothing for them; whoever may write to them takes a copy. A
    compiled graph has one operator for them, which copies these: what derives them are ten operations.

    Args:
        like: the parameter.
        kernel_size: taps per axis.
        coordinates: a name in `COORDINATES`.
        spacing: factor of each column of `'centered'` coordinates.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    grid = (kernel_size, coordinates, spacing, dtype)
    transformed = torch._C._are_functorch_transforms_active()  # which wrap it in what looks plain
    if type(like) in _PLAIN and not torch._C._get_tracing_state() and not (transformed and compiling()):
        return _beside_plain(like, grid)
    if compiling() and not exporting() and not distributed((like,)):
        return torch.ops.hyperconv_ext.tap_coordinates(like, *grid)
    return _derived(like, grid)


def _beside_plain(like: Tensor, grid: _Grid) -> Tensor:
    """Made once, where that can be."""
    key = (grid, like.device)
    taps = _known.get(key)
    if taps is None:
        if torch._C._are_functorch_transforms_active() or _capturing(like):
            return _derived(like, grid)
        taps = _known[key] = _shared(*key)
    return taps


def _capturing(like: Tensor) -> bool:
    """Whether what is launched now is recorded in a CUDA graph instead of run."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def _shared(grid: _Grid, device: torch.device) -> Tensor:
    """For every later call, so independent of the modes of this one.

    An inference tensor could not be saved for a later backward pass. A copy from the host is complete
    when it returns, so that no other stream reads it half written.
    """
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.inference_mode(False):
        counts = [torch.arange(size, device="cpu") for size in grid[0]]
        return tap_grid(counts, *grid[1:]).to(device)


def _derived(like: Tensor, grid: _Grid) -> Tensor:
    """For this call, by operations that a trace records and a DTensor follows."""
    if hasattr(like, "device_mesh") or torch.jit.is_tracing():  # no device written into the trace
        ones = [like.detach().new_ones((size,), dtype=torch.int64) for size in grid[0]]
        counts = [one.cumsum(0) - 1 for one in ones]
    else:
        counts = [torch.arange(size, device=like.device) for size in grid[0]]
    return tap_grid(counts, *grid[1:])


def with_window(taps: Tensor, scale: Tensor) -> Tensor:
    """`[K, D + 1]`: the coordinates `[K, D]` and `window_of` them."""
    return torch.cat([taps, window_of(taps, replicated(scale, taps))], 1)


class Windowed:
    """`with_window` of the operands of the last calls, so that a step launches nothing for it.

    Copies and pickles begin without.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor, Any, Tensor | None] | None = None

    def __reduce__(self) -> Any:
        """A new one, when copied or pickled."""
        return Windowed, ()

    def of(self, taps: Tensor, scale: Tensor) -> Tensor:
        """For reading only."""
        plain = not (compiling() or torch._C._get_tracing_state()) and can_skip_dispatch((taps, scale))
        if not plain or scale.is_inference() or _capturing(taps):
            return with_window(taps, scale)
        # On another device the numbers cannot be had without waiting for it. What changes at each call,
        # as buffers do that are broadcast at each step, is not waited for.
        stamp = tuple(scale.tolist()) if scale.is_cpu else scale._version
        known, points = False, None
        if self._kept is not None:
            old_taps, old_scale, old_stamp, points = self._kept
            known = old_taps is taps and old_scale is scale and old_stamp == stamp
        if not known:
            points = None
        if points is None and (known or taps.is_cpu):
            with torch.inference_mode(False), torch.no_grad():
                points = with_window(taps.cpu(), scale.detach().cpu()).to(taps.device)
        self._kept = taps, scale, stamp, points
        return with_window(taps, scale) if points is None else points


def _register() -> None:
    def kernel(like: Tensor, kernel_size: Any, coordinates: str, spacing: Any, dtype: Any) -> Tensor:
        taps = _beside_plain(like, (tuple(kernel_size), coordinates, tuple(spacing), dtype))
        return taps.clone()  # a graph may write into the memory of its nodes

    def fake(like: Tensor, kernel_size: Any, coordinates: str, spacing: Any, dtype: Any) -> Tensor:
        return like.new_empty((math.prod(kernel_size), len(kernel_size)), dtype=dtype)

    def autograd(*args: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.hyperconv_ext.tap_coordinates(*args)

    register(_SCHEMA, kernel, fake, autograd)


_register()
