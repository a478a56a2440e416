"""What the machine can do at most, measured in the same run: bytes and matrix operations a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperconv_ext import backends

from . import timing
from .competitors import DTYPES

_ROUNDS = 10
# Elements: of the copied buffer, far beyond any cache; and of a side of the multiplied squares.
_BYTES = {"cuda": 2**30, "cpu": 2**27}
_SIDE = {"cuda": 8192, "cpu": 1024}


@contextmanager
def _matmul_as_convolution() -> Iterator[None]:
    """TF32 for float32 products exactly where convolutions may use it."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32" if backends.tf32_allowed() else "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before


def _products(left: Tensor, right: Tensor) -> Iterator[Callable[[], Tensor]]:
    """`left @ right`, and on a CPU the same, but for a transposition, by the library of convolutions.

    PyTorch multiplies float32 matrices by another one, on some CPUs at half the speed.
    """
    yield lambda: left @ right
    on_cpu = left.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if on_cpu and left.dtype == torch.float32:
        blocked = left.to_mkldnn(), right.to_mkldnn()
        yield lambda: F.linear(*blocked)


class Ceilings:
    """The two sides of the roofline of `device`, each measured when first asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rates: dict[str, float] = {}

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second, read and written, of a copy within the device's memory."""
        source = torch.ones(_BYTES[self._device.type], dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        return 2 * source.numel() / _fastest(lambda: target.copy_(source))

    def rate(self, dtype: str) -> float:
        """Operations a second of a product of large square matrices, by the fastest library."""
        if dtype not in self._rates:
            side = _SIDE[self._device.type]
            left, right = (
                torch.randn(side, side, dtype=DTYPES[dtype], device=self._device) for _ in "ab"
            )
            with _matmul_as_convolution():
                fastest = min(map(_fastest, _products(left, right)))
            self._rates[dtype] = 2 * side**3 / fastest
        return self._rates[dtype]

    def to_json(self) -> dict[str, Any]:
        """What has been measured so far; the bandwidth is None before."""
        return {"bytes_per_second": vars(self).get("bandwidth"), "flops_per_second": dict(self._rates)}


def _fastest(target: Callable[[], object]) -> float:
    timing.warm_up(target)
    return min(timing.durations(target, lambda: None, _ROUNDS))
