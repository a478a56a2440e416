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


def layer(shape: Shape) -> str:
    """For people: the layer without its kernel size, number of features and batch."""
    power = {1: "", 2: "²", 3: "³"}[shape.dims]
    place = f"{_extent(shape.size)}{power if len(set(shape.size)) == 1 else ''}"
    depthwise = shape.groups == shape.in_channels == shape.out_channels
    channels = f"{shape.in_channels} → {shape.out_channels}"
    channels = f"{shape.in_channels} depthwise" if depthwise else channels
    grouped = f", {shape.groups} groups" if shape.groups > 1 and not depthwise else ""
    dilated = f", dilation {shape.dilation}" if shape.dilation > 1 else ""
    strided = f", stride {shape.stride}" if shape.stride > 1 else ""
    return f"{channels} at {place}{grouped}{strided}{dilated}"


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

# On a CPU: batch 2 where not said otherwise, sizes that a run of minutes affords. A slower machine loses
# some of the slowest rows, which come last in each tier.
_CPU_STAGES = ((64, 64), (128, 32), (256, 16))
CPU_STAGES = tuple(
    _cube("resnet" if k < 15 else "large", 2, 2, (c, c), size, k)
    for k in (3, 5, 7, 11, 15, 31)
    for c, size in _CPU_STAGES
)
# The middle one also in another number format and with another number of features.
_MIDDLE = tuple(shape for shape in CPU_STAGES if shape.in_channels == 128)
_CPU_VOLUME = tuple(_cube("volume", 3, 2, (32, 32), 24, k) for k in (3, 5, 7, 11))
# One example of the longest: the dense convolution takes seconds for it.
_CPU_SEQUENCE = tuple(
    _cube("sequence", 1, batch, (128, 128), 4096, k) for k, batch in ((31, 2), (127, 2), (1025, 1))
)
_CPU_UNET = tuple(
    _cube("unet", 2, 2, pair, size, k)
    for pair, size, k in (((1, 8), 256, 3), ((1, 8), 256, 5), ((1, 8), 256, 7), ((8, 16), 128, 3))
)
CPU_TINY = (
    _cube("tiny", 2, 2, (8, 8), 8, 3),
    _cube("tiny", 2, 2, (16, 16), 14, 5),
    _cube("tiny", 2, 1, (64, 64), 14, 3),
)
_CPU_OTHERS = (
    *(replace(_cube("depthwise", 2, 2, (96, 96), 56, k), groups=96) for k in (7, 31)),
    *(replace(_cube("strided", 2, 2, (64, 128), 56, k), stride=2) for k in (3, 5)),
    _cube("pointwise", 2, 2, (128, 128), 32, 1),
)


def _with_kernels(shapes: Iterable[Shape], *kernels: int) -> tuple[Shape, ...]:
    return tuple(shape for shape in shapes if shape.kernel_size[0] in kernels)


CPU: tuple[Entry, ...] = (
    *((shape, "fp32") for shape in _with_kernels(CPU_STAGES, 3, 5, 7, 11)),
    *((shape, "fp32") for shape in (*_CPU_UNET, *CPU_TINY, *_CPU_OTHERS)),
    *((shape, "fp32") for shape in _with_kernels(CPU_STAGES, 31)),
    *((shape, "fp32") for shape in (*_CPU_VOLUME, *_CPU_SEQUENCE)),
    *((shape, "fp32") for shape in _with_kernels(CPU_STAGES, 15)),
    *((shape, "bf16") for shape in _with_kernels(_MIDDLE, 3, 5, 7, 11, 31)),
    *(
        (shape, "fp32")
        for kernels, features in (((7, 11, 31), 8), ((5, 7, 11), 16))
        for shape in _with_features(_with_kernels(_MIDDLE, *kernels), features)
    ),
)
SHAPES: dict[str, Shape] = {shape.name: shape for shape, _ in (*GPU, *CPU)}
