"""A dense convolution by the framework's FFT: what large kernels are to be compared with, and an oracle.

No tile and no overlap: one transform of each image, in a circle that holds it and its padding. Products
over channels are one batched product of all frequencies, whose operands lie as the library wants them:
of strided or conjugated views PyTorch makes a call a frequency. Gradients are by the same transforms;
autograd's of a real transform is a complex one of twice the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Plan:
    """Sizes of one convolution: of the input, of the kernel, and of the transforms."""

    size: Ints
    taps: Ints
    points: Ints
    stride: int
    padding: Ints
    groups: int

    @classmethod
    def of(cls, input: Tensor, weight: Tensor, stride: int, padding: Ints, groups: int) -> Plan:
        size, taps = tuple(input.shape[2:]), tuple(weight.shape[2:])
        return cls(size, taps, circles(size, taps, padding), stride, padding, groups)

    @property
    def axes(self) -> Ints:
        return tuple(range(2, 2 + len(self.points)))

    @property
    def outputs(self) -> tuple[Any, ...]:
        """Where the outputs are among the positions of a circle from the first one on."""
        axes = zip(self.size, self.padding, self.taps, strict=True)
        return tuple(slice(0, size + 2 * pad - k + 1, self.stride) for size, pad, k in axes)

    def waves(self, values: Tensor) -> Tensor:
        """`[B, C, *size]` -> `[frequencies * groups, B, C / groups]`."""
        waves = torch.fft.rfftn(values, s=self.points, dim=self.axes).flatten(2)
        return waves.unflatten(1, (self.groups, -1)).permute(3, 1, 0, 2).flatten(0, 1)

    def values(self, waves: Tensor) -> Tensor:
        """The inverse of `waves`, `[B, C, *points]`."""
        halved = (*self.points[:-1], self.points[-1] // 2 + 1)
        apart = waves.unflatten(0, (-1, self.groups)).permute(2, 1, 3, 0).flatten(1, 2)
        return torch.fft.irfftn(apart.unflatten(2, halved), s=self.points, dim=self.axes)

    def spectrum(self, weight: Tensor) -> Tensor:
        """Of W `[C_out, C_in/groups, *taps]`: `[frequencies * groups, C_in/groups, C_out/groups]`."""
        waves = torch.fft.rfftn(weight, s=self.points, dim=self.axes).flatten(2)
        apart = waves.unflatten(0, (self.groups, -1)).permute(3, 0, 2, 1)
        return apart.flatten(0, 1).contiguous()

    def weight(self, spectrum: Tensor) -> Tensor:
        """The inverse of `spectrum`."""
        halved = (*self.points[:-1], self.points[-1] // 2 + 1)
        apart = spectrum.unflatten(0, (-1, self.groups)).permute(1, 3, 2, 0).flatten(0, 1)
        whole = torch.fft.irfftn(apart.unflatten(2, halved), s=self.points, dim=self.axes)
        return _first(whole, self.taps)


def _first(values: Tensor, lengths: Ints) -> Tensor:
    parts: list[Any] = [slice(length) for length in lengths]
    return values[(..., *parts)]


def _conjugated(waves: Tensor) -> Tensor:
    return waves.conj().resolve_conj()


def correlate(plan: Plan, waves: Tensor, spectrum: Tensor) -> Tensor:
    """y `[B, C_out, *S']` of x's `waves` conjugated and W's `spectrum`."""
    # A cross-correlation multiplies x's spectrum by W's conjugated one; this is the smaller.
    whole = plan.values(_conjugated(_product(waves, spectrum)))
    return whole.roll(plan.padding, plan.axes)[(..., *plan.outputs)]  # tap 0 lies `padding` before


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, without the library where there is nothing to sum."""
    return torch.bmm(left, right) if left.shape[2] > 1 or right.shape[2] > 1 else left * right


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, plan: Plan) -> Tensor:
        waves, spectrum = _conjugated(plan.waves(input)).contiguous(), plan.spectrum(weight)
        ctx.save_for_backward(waves, spectrum)
        ctx.plan = plan
        return correlate(plan, waves, spectrum)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        plan: Plan = ctx.plan
        waves, spectrum = ctx.saved_tensors
        whole = grad.new_zeros((*grad.shape[:2], *plan.points))
        whole[(..., *plan.outputs)] = grad
        shifted = whole.roll(tuple(-pad for pad in plan.padding), plan.axes)
        grads = plan.waves(shifted).contiguous()
        by_input = _first(plan.values(_product(grads, spectrum.mT)), plan.size)
        by_weight = plan.weight(_conjugated(torch.bmm(waves.mT, grads)))
        return by_input, by_weight, None


def convolve(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Ints, groups: int
) -> Tensor:
    """`F.convNd(input, weight, bias, stride, padding, 1, groups)`, differentiable once."""
    plan = Plan.of(input, weight, stride, padding, groups)
    return _with_bias(_Convolution.apply(input, weight, plan), bias)


def _with_bias(output: Tensor, bias: Tensor | None) -> Tensor:
    return output if bias is None else output + bias.view(-1, *(1,) * (output.dim() - 2))


class FourierConv(nn.Module):
    """An `nn.ConvNd` computed so, with its parameters; W's spectrum is kept where gradients are not.

    Transforms are in float32 where the parameters are shorter.
    """

    def __init__(self, dense: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = dense.weight, dense.bias
        (self._stride,) = set(dense.stride)
        self._padding, self._groups = tuple(map(int, dense.padding)), dense.groups
        self._kept: tuple[Plan, int, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        wide = input.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        geometry = (self._stride, self._padding, self._groups)
        if torch.is_grad_enabled():
            output = convolve(wide, self.weight.to(dtype), bias, *geometry)
        else:
            plan = Plan.of(wide, self.weight, *geometry)
            waves = _conjugated(plan.waves(wide)).contiguous()
            output = _with_bias(correlate(plan, waves, self._spectrum(plan, dtype)), bias)
        return output.to(input.dtype)

    def _spectrum(self, plan: Plan, dtype: torch.dtype) -> Tensor:
        if self._kept is None or self._kept[:2] != (plan, self.weight._version):
            self._kept = plan, self.weight._version, plan.spectrum(self.weight.to(dtype))
        return self._kept[2]
