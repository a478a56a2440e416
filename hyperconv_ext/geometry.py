"""The one description of where a convolution's taps fall: sizes, stride, padding, dilation, groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

Ints = tuple[int, ...]


def output_length(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Outputs along one axis of a convolution padded by `padding` on both sides."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _meeting_taps(
    size: int, out: int, kernel: int, stride: int, padding: int, dilation: int
) -> tuple[int, int]:
    """(first, last) tap of an axis that meets an input for any output; (0, 0) if none does."""

    def meets(tap: int) -> bool:
        start = padding - tap * dilation  # output p meets input p * stride - start
        return max(0, -(-start // stride)) <= min(out - 1, (start + size - 1) // stride)

    least = max(0, -(-(padding - (out - 1) * stride) // dilation))
    most = min(kernel - 1, (padding + size - 1) // dilation)
    first = next((tap for tap in range(least, most + 1) if meets(tap)), 0)
    last = next((tap for tap in range(most, first, -1) if meets(tap)), first)
    return first, last


@dataclass(frozen=True)
class Geometry:
    """Which input position each (output position, tap) pair reads, in any number of spatial axes.

    Output `p` and tap `k` of an axis meet at input `p * stride + k * dilation - padding`; positions
    outside `[0, input_size)` read zero. `padding` is the zeros *before* the first input; how many
    follow the last one is implied by `output_size`, so asymmetric padding (`'same'` with an even
    kernel) and the output sizes of a transposed convolution need no further field. Negative, it is the
    inputs before the first that is read.
    """

    input_size: Ints
    output_size: Ints
    kernel_size: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int

    @cached_property
    def _hash(self) -> int:
        return hash(
            (*self.input_size, *self.output_size, *self.kernel_size, *self.stride, *self.padding)
        )

    def __hash__(self) -> int:
        """Worked out once: every launch looks its plan up by its geometry."""
        return self._hash

    @classmethod
    def conv(
        cls,
        input_size: Sequence[int],
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int] | str,
        dilation: Sequence[int],
        groups: int,
    ) -> Geometry:
        """Geometry of `torch.nn.functional.convNd` with these arguments.

        `padding` is one integer per axis, `'valid'`, or `'same'`, which pads the odd zero of an
        even-sized kernel at the end of the axis, as PyTorch does.
        """
        if padding == "same":
            lengths = tuple(input_size)
            low = tuple(d * (k - 1) // 2 for k, d in zip(kernel_size, dilation, strict=True))
        else:
            low = (0,) * len(kernel_size) if isinstance(padding, str) else tuple(padding)
            axes = zip(input_size, kernel_size, stride, low, dilation, strict=True)
            lengths = tuple(output_length(*axis) for axis in axes)
        return cls(
            tuple(input_size),
            lengths,
            tuple(kernel_size),
            tuple(stride),
            low,
            tuple(dilation),
            groups,
        )

    @classmethod
    def conv_transpose(
        cls,
        input_size: Sequence[int],
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        output_padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Geometry:
        """The geometry of which `torch.nn.functional.conv_transposeNd` is the input gradient.

        Its `output_size` is therefore the transposed convolution's input, its `input_size` the
        transposed convolution's output.
        """
        axes = zip(input_size, kernel_size, stride, padding, output_padding, dilation, strict=True)
        lengths = ((n - 1) * s - 2 * p + d * (k - 1) + extra + 1 for n, k, s, p, extra, d in axes)
        return cls(
            tuple(lengths),
            tuple(input_size),
            tuple(kernel_size),
            tuple(stride),
            tuple(padding),
            tuple(dilation),
            groups,
        )

    @cached_property
    def trimmed(self) -> tuple[Geometry, tuple[slice, ...] | None] | None:
        """(the same convolution without the taps that meet no input, the taps left or None: all).

        None if it is this one. Taps are dropped at either end of an axis, all but one. A single tap has
        no dilation and a single output no stride. What a backend does is therefore bounded by what there
        is to compute, however large the arguments.
        """
        rows = zip(
            self.input_size,
            self.output_size,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        )
        axes, window = [], []
        for size, out, kernel, stride, padding, dilation in rows:
            first, last = _meeting_taps(size, out, kernel, stride, padding, dilation)
            spread, step = dilation if last > first else 1, stride if out > 1 else 1
            axes.append((last - first + 1, step, padding - first * dilation, spread))
            window.append(slice(first, last + 1))
        kernel_size, strides, paddings, dilations = zip(*axes, strict=True)
        arguments = (kernel_size, strides, paddings, dilations, self.groups)
        geometry = Geometry(self.input_size, self.output_size, *arguments)
        whole = geometry.kernel_size == self.kernel_size
        return None if geometry == self else (geometry, None if whole else tuple(window))

    @property
    def output_padding(self) -> Ints:
        """What `conv_transposeNd` calls so: positions of `input_size` beyond the least that fits."""
        axes = zip(
            self.input_size,
            self.output_size,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        )
        return tuple(size - ((out - 1) * s - 2 * p + d * (k - 1) + 1) for size, out, k, s, p, d in axes)

    @property
    def dims(self) -> int:
        """Number of spatial axes D."""
        return len(self.kernel_size)

    @property
    def taps(self) -> int:
        """Number of taps K of the kernel."""
        return prod(self.kernel_size)

    @property
    def input_positions(self) -> int:
        """Positions of one input channel."""
        return prod(self.input_size)

    @property
    def output_positions(self) -> int:
        """Positions of one output channel."""
        return prod(self.output_size)

    @property
    def high_padding(self) -> Ints:
        """Zeros after the last input of each axis; negative where trailing inputs are never read."""
        pairs = zip(self.padding, self.output_padding, strict=True)
        return tuple(low - extra for low, extra in pairs)

    @property
    def symmetric(self) -> bool:
        """Whether `F.convNd` with `padding` on both sides gives exactly `output_size`."""
        if min(self.padding) < 0:
            return False
        axes = zip(
            self.input_size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True
        )
        return self.output_size == tuple(output_length(*axis) for axis in axes)
