"""The row map enumerates every (output, tap, input) triple exactly once, forward and transposed."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hyperconv_ext.backends.lattice import Axis, best_lattice, lattice
from hyperconv_ext.geometry import Geometry


def _phase(axis: Axis, phase: int) -> tuple[int, int, bool]:
    """(origin, first tap, whether any tap falls on this phase) by the formulas of `Axis`."""
    num = axis.scale * phase + axis.shift
    tap0 = num // axis.divisor * axis.inverse % axis.residues
    origin = (num - tap0 * axis.dilation) // axis.modulus - axis.back
    return origin, tap0 + axis.first, num % axis.divisor == 0


def _mapped(axis: Axis) -> list[tuple[int, int, int]]:
    triples = []
    for phase in range(axis.phases):
        origin, first, live = _phase(axis, phase)
        assert _phase(axis, phase % axis.bands)[1:] == (first, live)  # phases share bands
        for n in range(axis.tiles * axis.tile):
            for j in range(axis.taps):
                place = axis.stride * (n % axis.tile) + j
                assert place < axis.patch
                apart = place // axis.stride * axis.jump + place % axis.stride
                assert apart == axis.jump * (n % axis.tile) + j
                output = phase + axis.phases * n
                input = origin + axis.step * (axis.jump * n + j)
                tap = first + axis.tap_step * j
                inside = output < axis.out_size and 0 <= input < axis.in_size
                if live and 0 <= tap < axis.kernel and inside:
                    triples.append((output, tap, input))
    return triples


@settings(max_examples=400, deadline=None)
@given(
    size=st.integers(1, 24),
    kernel=st.integers(1, 8),
    stride=st.integers(1, 30),
    dilation=st.integers(1, 6),
    padding=st.integers(0, 7),
    extra=st.integers(0, 2),
    tile=st.sampled_from([1, 4, 16]),
    transposed=st.booleans(),
    gaps=st.booleans(),
)
def test_every_triple_once(
    size, kernel, stride, dilation, padding, extra, tile, transposed, gaps
) -> None:
    length = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    assume(length >= 1)
    length += extra  # asymmetric padding
    geometry = Geometry((size,), (length,), (kernel,), (stride,), (padding,), (dilation,), 1)
    axis = lattice(geometry, 1, transposed, (1, 1, tile), gaps).axes[2]
    meets = [
        (output, tap, output * stride + tap * dilation - padding)
        for output in range(length)
        for tap in range(kernel)
    ]
    inside = [triple for triple in meets if 0 <= triple[2] < size]
    expected = [(q, tap, p) for p, tap, q in inside] if transposed else inside
    assert sorted(_mapped(axis)) == sorted(expected)


@pytest.mark.parametrize(("stride", "dilation"), [(100, 1), (37, 1), (1, 100), (90, 40)])
def test_patches_of_a_gather_have_no_gaps(stride: int, dilation: int) -> None:
    """However far apart the outputs of a tile read, at most every (output, tap) is a position."""
    sparse = Geometry.conv((500, 500), (3, 2), (stride,) * 2, (0, 0), (dilation,) * 2, 1)
    assert best_lattice(sparse, 1, False, 16).patch <= 16 * sparse.taps


def test_dilation_and_stride_cost_nothing() -> None:
    """A patch is as large as that of the dense convolution of the same taps."""
    dense = Geometry.conv((64, 64), (7, 7), (1, 1), (3, 3), (1, 1), 1)
    dilated = Geometry.conv((64, 64), (7, 7), (1, 1), (12, 12), (4, 4), 1)
    assert lattice(dilated, 1, False, (1, 4, 4)).patch == lattice(dense, 1, False, (1, 4, 4)).patch
    strided = Geometry.conv((64, 64), (8, 8), (2, 2), (3, 3), (1, 1), 1)
    half = Geometry.conv((64, 64), (4, 4), (1, 1), (1, 1), (1, 1), 1)
    assert lattice(strided, 1, True, (1, 4, 4)).patch == lattice(half, 1, True, (1, 4, 4)).patch


@pytest.mark.parametrize(
    ("size", "kernel", "shape"),
    [
        ((64, 64), (7, 7), (1, 4, 4)),
        ((64, 64), (1, 9), (1, 1, 16)),
        ((64, 64), (9, 1), (1, 16, 1)),
        ((4096,), (31,), (1, 1, 16)),
        ((32, 32, 32), (5, 5, 5), (2, 2, 4)),
    ],
)
def test_tile_shape_follows_the_kernel(size, kernel, shape) -> None:
    ones = (1,) * len(size)
    geometry = Geometry.conv(size, kernel, ones, tuple(k // 2 for k in kernel), ones, 1)
    chosen = best_lattice(geometry, 2, False, 16)
    assert tuple(axis.tile for axis in chosen.axes) == shape
