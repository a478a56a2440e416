"""What the tests of `convert` share: calls of it, and subclasses that only pad."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hyperconv_ext import convert
from hyperconv_ext.conversion import Report

DIMS = (1, 2, 3)


def quietly(model: nn.Module, **options: Any) -> Report:
    return convert(model, progress=False, **options)


def reason(model: nn.Module, name: str = "", **options: Any) -> str:
    """Why the layer was left, which it has to be."""
    report = quietly(model, **options)
    return next(layer.reason for layer in report.layers if name in (layer.name, *layer.aliases))


def conv_class(dims: int, transposed: bool) -> Any:
    return getattr(nn, f"Conv{'Transpose' * transposed}{dims}d")


class SamePad(nn.Conv2d):
    """As TensorFlow pads: by the size of the input."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for axis in (1, 0):
            size, k, s, d = (
                x.shape[2 + axis],
                self.kernel_size[axis],
                self.stride[axis],
                self.dilation[axis],
            )
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(
            F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


class CausalConv1d(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


class FixedPad(nn.Conv2d):
    """By a child, and one axis after the other; symmetric in the end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pad = nn.ZeroPad2d((2, 1, 0, 1))

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padded = F.pad(self.pad(input), (0, 1, 1, 0))
        return F.conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


class OtherConstructor(nn.Conv2d):
    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)

    @staticmethod
    def rule() -> int:
        return 1


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.second = self.first
        self.parts = nn.ModuleList([self.first, nn.Conv2d(16, 16, 3, padding=1)])
        self.named = nn.ModuleDict({"inner": nn.Sequential(self.parts[1])})
        self.plain = [self.first, {"key": self.parts[1]}]
        self.__dict__["hidden"] = self.first

    def forward(self, x: Tensor) -> Tensor:
        held: Any = self.plain
        return self.second(held[0](self.named["inner"](held[1]["key"](x))))
