"""A dense convolution by the framework's FFT: what large kernels are to be compared with, and an oracle.

No tile and no overlap: one transform of each image, in a circle that holds it and its padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Ints = tuple[int, ...]
_RADICES = (2, 3, 5)


def _is_smooth(points: int) -> bool:
    for radix in _RADICES:
        while points % radix == 0:
            points //= radix
    return points == 1


def _circle(least: int) -> int:
    """The next number of points whose transform is fast."""
    while not _is_smooth(least):
        least += 1
    return least


def circles(size: Sequence[int], kernel: Sequence[int], padding: Sequence[int]) -> Ints:
    """Points along each axis: the zeros before an image may be those that follow it."""
    axes = zip(size, kernel, padding, strict=True)
    return tuple(_circle(max(s + pad, s + k - 1 - pad, k)) for s, k, pad in axes)


def _axes(points: Ints) -> Ints:
    return tuple(range(2, 2 + len(points)))


def spectrum(weight: Tensor, points: Ints, groups: int) -> Tensor:
    """Of W `[C_out, C_in/groups, *kernel]`: `[frequencies, groups, C_in/groups, C_out/groups]`."""
    waves = torch.fft.rfftn(weight, s=points, dim=_axes(points)).flatten(2)
    return waves.unflatten(0, (groups, -1)).permute(3, 0, 2, 1)


def _product(waves: Tensor, kernel: Tensor, groups: int) -> Tensor:
    """`[B, C_out, frequencies]` of x's `[B, C_in, frequencies]` and W's `spectrum`."""
    if kernel.shape[2:] == (1, 1):  # depthwise: nothing to sum
        return waves * kernel[:, :, 0, 0].T
    grouped = waves.unflatten(1, (groups, -1)).permute(3, 1, 0, 2)
    return (grouped @ kernel).permute(2, 1, 3, 0).flatten(1, 2)


def convolve(
    input: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    points: Ints,
    taps: Ints,
    stride: int,
    padding: Ints,
    groups: int,
) -> Tensor:
    """`F.convNd(input, W, bias, stride, padding, 1, groups)` by the `spectrum` of W on `points`."""
    axes = _axes(points)
    waves = torch.fft.rfftn(input, s=points, dim=axes)
    # A cross-correlation multiplies x's spectrum by W's conjugated one.
    mixed = _product(waves.flatten(2).conj().resolve_conj(), kernel, groups).conj()
    whole = torch.fft.irfftn(mixed.unflatten(2, waves.shape[2:]), s=points, dim=axes)
    output = whole.roll(padding, axes)  # tap 0 lies `padding` before its output
    for axis, size, k, pad in zip(axes, input.shape[2:], taps, padding, strict=True):
        length = (size + 2 * pad - k) // stride + 1
        output = output.narrow(axis, 0, (length - 1) * stride + 1)
    output = output[(..., *(slice(None, None, stride) for _ in axes))]
    return output if bias is None else output + bias.view(-1, *(1 for _ in axes))


def convolve_dense(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Ints, groups: int
) -> Tensor:
    """`F.convNd(input, weight, bias, stride, padding, 1, groups)`."""
    taps = tuple(weight.shape[2:])
    points = circles(input.shape[2:], taps, padding)
    kernel = spectrum(weight, points, groups)
    return convolve(input, kernel, bias, points, taps, stride, padding, groups)


class FourierConv(nn.Module):
    """An `nn.ConvNd` computed so, with its parameters; W's spectrum is kept where gradients are not.

    Transforms are in float32 where the parameters are shorter.
    """

    def __init__(self, dense: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = dense.weight, dense.bias
        (self._stride,) = set(dense.stride)
        self._padding, self._groups = tuple(map(int, dense.padding)), dense.groups
        self._kept: tuple[Ints, int, Tensor] = ((), -1, self.weight.new_empty(0))

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        taps = tuple(self.weight.shape[2:])
        points = circles(input.shape[2:], taps, self._padding)
        bias = None if self.bias is None else self.bias.to(dtype)
        rest = (points, taps, self._stride, self._padding, self._groups)
        kernel = self._spectrum(points, dtype)
        return convolve(input.to(dtype), kernel, bias, *rest).to(input.dtype)

    def _spectrum(self, points: Ints, dtype: torch.dtype) -> Tensor:
        if torch.is_grad_enabled():
            return spectrum(self.weight.to(dtype), points, self._groups)
        known, version, kernel = self._kept
        if (known, version) != (points, self.weight._version):
            kernel = spectrum(self.weight.to(dtype), points, self._groups).contiguous()
            self._kept = points, self.weight._version, kernel
        return kernel
