"""Sizes and padding against `F.conv2d`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hyperconv_ext.geometry import Geometry

small = st.integers(1, 6)


@settings(deadline=None)  # the first example may find the machine busy
@given(size=st.integers(1, 20), kernel=small, stride=small, padding=st.integers(0, 5), dilation=small)
def test_output_size_is_that_of_conv1d(size, kernel, stride, padding, dilation) -> None:
    assume(size + 2 * padding >= dilation * (kernel - 1) + 1)
    geometry = Geometry.conv((size,), (kernel,), (stride,), (padding,), (dilation,), 1)
    output = F.conv1d(
        torch.zeros(1, 1, size), torch.zeros(1, 1, kernel), None, stride, padding, dilation
    )
    assert geometry.output_size == output.shape[2:]
    assert geometry.symmetric
    # `padding` before and `high_padding` after are exactly what the last output reads.
    assert (
        size + padding + geometry.high_padding[0]
        == (output.shape[2] - 1) * stride + dilation * (kernel - 1) + 1
    )


@settings(deadline=None)  # the first example may find the machine busy
@given(size=st.integers(6, 20), kernel=st.integers(1, 5), dilation=small)
def test_same_pads_the_odd_zero_at_the_end(size, kernel, dilation) -> None:
    geometry = Geometry.conv((size,), (kernel,), (1,), "same", (dilation,), 1)
    assert geometry.output_size == (size,)
    input, weight = torch.randn(1, 1, size), torch.randn(1, 1, kernel)
    padded = F.pad(input, (geometry.padding[0], geometry.high_padding[0]))
    expected = F.conv1d(input, weight, padding="same", dilation=dilation)
    torch.testing.assert_close(F.conv1d(padded, weight, dilation=dilation), expected)


def test_counts() -> None:
    geometry = Geometry.conv((8, 9), (3, 5), (1, 2), "valid", (1, 1), 2)
    assert (geometry.dims, geometry.taps) == (2, 15)
    assert (geometry.input_positions, geometry.output_positions) == (72, 6 * 3)
