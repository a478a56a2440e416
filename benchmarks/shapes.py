"""The named shapes that benchmarks and tests share, as numbers: importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod


@dataclass(frozen=True)
class Shape:
    """One 2-D layer and its input `[batch, in_channels, *size]`, padded to keep the size at stride 1."""

    family: str
    batch: int
    in_channels: int
    out_channels: int
    size: tuple[int, int]
    kernel_size: tuple[int, int]
    num_features: int = 4
    stride: int = 1
    dilation: int = 1
    groups: int = 1

    @property
    def name(self) -> str:
        size, kernel = (f"{a}" if a == b else f"{a}x{b}" for a, b in (self.size, self.kernel_size))
        text = f"{self.family}-{self.in_channels}to{self.out_channels}-{size}px-k{kernel}"
        text += f"-n{self.num_features}-b{self.batch}"
        extras = (("s", self.stride), ("d", self.dilation), ("g", self.groups))
        return text + "".join(f"-{letter}{value}" for letter, value in extras if value != 1)

    @property
    def padding(self) -> tuple[int, int]:
        height, width = self.kernel_size
        return self.dilation * (height - 1) // 2, self.dilation * (width - 1) // 2

    @property
    def output_size(self) -> tuple[int, int]:
        axes = zip(self.size, self.kernel_size, self.padding, strict=True)
        height, width = (
            (size + 2 * pad - self.dilation * (kernel - 1) - 1) // self.stride + 1
            for size, kernel, pad in axes
        )
        return height, width

    @property
    def flops(self) -> int:
        """Operations of the direct convolution, forward: the yardstick of every competitor."""
        taps = self.in_channels // self.groups * prod(self.kernel_size)
        return 2 * self.batch * prod(self.output_size) * self.out_channels * taps

    @property
    def input_numel(self) -> int:
        return self.batch * self.in_channels * prod(self.size)

    @property
    def output_numel(self) -> int:
        return self.batch * self.out_channels * prod(self.output_size)


def _square(
    family: str,
    batch: int,
    in_channels: int,
    out_channels: int,
    size: int,
    kernel: int,
    num_features: int = 4,
) -> Shape:
    return Shape(family, batch, in_channels, out_channels, (size, size), (kernel, kernel), num_features)


_STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))
_UNET = (1, 8, 16, 32, 64, 128, 256)


def resnet(kernel: int, num_features: int = 4) -> tuple[Shape, ...]:
    """The 3x3 layers of ResNet's four stages, with another kernel."""
    return tuple(_square("resnet", 32, c, c, size, kernel, num_features) for c, size in _STAGES)


def unet(kernel: int) -> tuple[Shape, ...]:
    """An encoder as in the hyper-convolution papers: 1 channel at 256 x 256, halved each level."""
    return tuple(_square("unet", 8, i, o, 256 >> n, kernel) for n, (i, o) in enumerate(pairwise(_UNET)))


# Batch 8: the dense convolution's time, and the search for its algorithm, grow with the 961 taps.
LARGE = tuple(_square("large", 8, c, c, 56, k) for k in (15, 31) for c in (64, 128))
TINY = (_square("tiny", 64, 8, 8, 28, 5),)
SMALL = (
    *(_square("small", 4, 16, 16, 28, k) for k in (3, 5, 7, 11)),
    _square("small", 4, 32, 32, 14, 7),
    _square("small", 4, 32, 32, 14, 7, num_features=16),
    _square("small", 2, 1, 8, 64, 5),
    _square("small", 1, 16, 16, 28, 31),
)

# (shape, dtype) in the order they run: the rows that decide come first, since a run may be cut.
Row = tuple[Shape, str]
_EVERYWHERE = (
    *resnet(7),
    *resnet(5),
    *unet(5),
    *LARGE,
    *TINY,
    *resnet(11),
    *resnet(3),
    *unet(7),
    *(resnet(k, num_features=16)[stage] for k in (7, 5) for stage in (0, 2)),
)
_OTHER_TYPES = (resnet(7)[0], resnet(7)[2], resnet(5)[1])
GPU: tuple[Row, ...] = (
    *((shape, "bf16") for shape in _EVERYWHERE),
    *((shape, dtype) for dtype in ("fp16", "fp32") for shape in _OTHER_TYPES),
)
CPU: tuple[Row, ...] = tuple((shape, "fp32") for shape in SMALL)
SHAPES: dict[str, Shape] = {shape.name: shape for shape, _ in (*GPU, *CPU)}
