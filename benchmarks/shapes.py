"""The named shapes that benchmarks and tests share, as numbers: importing this imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

Ints = tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """One layer and its input `[batch, in_channels, *size]`, padded to keep the size at stride 1.

    `size` and `kernel_size` have an entry per axis; `stride` and `dilation` are those of every axis.
    """

    family: str
    batch: int
    in_channels: int
    out_channels: int
    size: Ints
    kernel_size: Ints
    num_features: int = 4
    stride: int = 1
    dilation: int = 1
    groups: int = 1

    @property
    def dims(self) -> int:
        """Number of spatial axes D."""
        return len(self.kernel_size)

    @property
    def name(self) -> str:
        text = f"{self.family}-{self.in_channels}to{self.out_channels}-{_extent(self.size)}px"
        text += f"-k{_extent(self.kernel_size)}-n{self.num_features}-b{self.batch}"
        extras = (("s", self.stride), ("d", self.dilation), ("g", self.groups))
        return text + "".join(f"-{letter}{value}" for letter, value in extras if value != 1)

    @property
    def padding(self) -> Ints:
        return tuple(self.dilation * (kernel - 1) // 2 for kernel in self.kernel_size)

    @property
    def output_size(self) -> Ints:
        axes = zip(self.size, self.kernel_size, self.padding, strict=True)
        return tuple(
            (size + 2 * pad - self.dilation * (kernel - 1) - 1) // self.stride + 1
            for size, kernel, pad in axes
        )

    @property
    def taps(self) -> int:
        """K, the number of taps of the kernel."""
        return prod(self.kernel_size)

    @property
    def rank(self) -> int:
        """R: the features and, from the bias of the last layer, the constant function."""
        return self.num_features + 1

    @property
    def input_numel(self) -> int:
        return self.batch * self.in_channels * prod(self.size)

    @property
    def output_numel(self) -> int:
        return self.batch * self.out_channels * prod(self.output_size)

    @property
    def flops(self) -> int:
        """Operations of the direct convolution, forward: the yardstick of every competitor."""
        return 2 * self.output_numel * self.in_channels // self.groups * self.taps

    @property
    def meetings(self) -> int:
        """Pairs of an output position and a tap that meet an input, and not a zero of the padding."""

        def along(size: int, kernel: int, pad: int, length: int) -> int:
            offsets = (k * self.dilation - pad for k in range(kernel))
            spans = (
                (-(offset // self.stride), (size - 1 - offset) // self.stride) for offset in offsets
            )
            return sum(max(0, min(length - 1, last) - max(0, first) + 1) for first, last in spans)

        axes = zip(self.size, self.kernel_size, self.padding, self.output_size, strict=True)
        return prod(along(*axis) for axis in axes)

    def least_flops(self, hyper: bool) -> int:
        """The fewest operations known for the forward pass, without the padding's.

        Of a dense kernel the direct convolution; of one of rank R over its taps also R depthwise
        convolutions and the product with the coefficients.
        """
        channels = self.out_channels // self.groups
        direct = channels * self.meetings
        ranked = self.rank * (self.meetings + channels * prod(self.output_size))
        return 2 * self.batch * self.in_channels * (min(direct, ranked) if hyper else direct)


def _extent(lengths: Ints) -> str:
    """`7` for a square or cube, `5x3` for a rectangle."""
    return str(lengths[0]) if len(set(lengths)) == 1 else "x".join(map(str, lengths))


def _cube(
    family: str, dims: int, batch: int, channels: tuple[int, int], size: int, kernel: int
) -> Shape:
    return Shape(family, batch, *channels, (size,) * dims, (kernel,) * dims)


_STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))
_UNET = (1, 8, 16, 32, 64, 128, 256)

# The 3x3 layers of ResNet's four stages, with other kernels.
RESNET = tuple(_cube("resnet", 2, 32, (c, c), size, k) for k in (7, 5, 11, 3) for c, size in _STAGES)
# An encoder as in the hyper-convolution papers.
UNET = tuple(
    _cube("unet", 2, 8, pair, 256 >> level, k)
    for k in (5, 7, 3)
    for level, pair in enumerate(pairwise(_UNET))
)
# Batch 8: the dense convolution's time, and the search for its algorithm, grow with the 961 taps.
LARGE = tuple(_cube("large", 2, 8, (c, c), 56, k) for k in (15, 31) for c in (64, 128))
# Batch 2, as volumes are trained: one image of 64^3 has the positions of 84 of 56^2, and the dense
# convolution 343 taps for each.
VOLUME = tuple(
    _cube("volume", 3, 2, (c, c), size, k) for k in (5, 7, 3) for c, size in ((64, 32), (32, 64))
)
SEQUENCE = tuple(_cube("sequence", 1, 8, (128, 128), 16384, k) for k in (31, 127))
TINY = (_cube("tiny", 2, 64, (8, 8), 28, 5),)  # launches take longer than the work

# (shape, dtype) in the order they run; a tier is all rows of one dtype and number of features.
Entry = tuple[Shape, str]


def _with_features(shapes: Iterable[Shape], num_features: int) -> tuple[Shape, ...]:
    return tuple(replace(shape, num_features=num_features) for shape in shapes)


def decisive(shape: Shape) -> bool:
    """Whether a hyper-convolution is expected to save much: large kernel, enough channels."""
    return max(shape.kernel_size) >= 5 and min(shape.in_channels, shape.out_channels) >= 64


# Since a run may be cut, decisive rows come first; `sorted` is stable.
ALL = tuple(sorted((*RESNET, *VOLUME, *LARGE, *UNET, *SEQUENCE, *TINY), key=lambda s: not decisive(s)))
_TIERS = (("bf16", 4), ("bf16", 16), ("fp16", 4), ("fp16", 16), ("fp32", 4), ("fp32", 16))
GPU: tuple[Entry, ...] = tuple(
    (shape, dtype) for dtype, features in _TIERS for shape in _with_features(ALL, features)
)

# For one core: every family, the first of them over kernels and features.
SMALL = (
    *(_cube("resnet", 2, 4, (16, 16), 28, k) for k in (3, 7)),
    _cube("unet", 2, 2, (1, 8), 64, 5),
    _cube("large", 2, 1, (16, 16), 28, 31),
    _cube("volume", 3, 1, (8, 8), 16, 5),
    _cube("sequence", 1, 2, (16, 16), 1024, 31),
    _cube("tiny", 2, 8, (8, 8), 14, 5),
)
CPU: tuple[Entry, ...] = (
    *((shape, "fp32") for shape in SMALL),
    *((shape, "fp32") for shape in _with_features(SMALL[1:2], 16)),
    (SMALL[1], "bf16"),
)
SHAPES: dict[str, Shape] = {shape.name: shape for shape, _ in (*GPU, *CPU)}
