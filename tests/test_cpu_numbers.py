"""What the CPU engine reads and writes: number formats, memory layouts, and transforms of every size."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hyperconv_ext import functional, ops
from hyperconv_ext.backends import cpu
from hyperconv_ext.backends.cpu import library, tiles
from hyperconv_ext.geometry import Geometry
from hyperconv_ext.problem import Plan

from .engine import ALGORITHMS, Layer, layer
from .oracle import FLOOR, relative_error

pytestmark = [
    pytest.mark.skipif(bool(library.reason()), reason=library.reason()),
    pytest.mark.usefixtures("one_thread"),
]
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALVES)


# Number formats.


def _every_number(dtype: torch.dtype) -> Tensor:
    """All 65,536 of a format of 16 bits."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def _layouts(numbers: Tensor) -> dict[str, Tensor]:
    """`[1, C, H, W]` by each way that the engine reads and writes: rows of channels, or of positions."""
    channels = numbers.view(1, 16, 64, 64)
    return {
        "channels last": channels.contiguous(memory_format=torch.channels_last),
        "an odd number, last": numbers.view(1, 32, 2048)[:, :31]
        .reshape(1, 31, 32, 64)
        .contiguous(memory_format=torch.channels_last),
        "channels first": channels,
        "odd rows": numbers[: 64 * 31 * 33].view(1, 64, 31, 33),
        "one channel": numbers.view(1, 1, 256, 256),
        "strided": torch.stack((numbers, numbers), 1).view(1, 16, 64, 64, 2)[..., 0],
    }


def _identity(input: Tensor) -> Tensor:
    """A 1x1 convolution with the unit matrix: depthwise, that no number meets another."""
    channels = input.shape[1]
    ones = [torch.ones(s, dtype=input.dtype) for s in ((channels, 1, 1), (1, 1, 1))]
    options = {"groups": channels, "backend": "cpu", "algorithm": "basis"}
    return functional.basis_conv2d(input, *ones, **options)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_number_passes_unchanged(dtype: torch.dtype) -> None:
    """Subnormal, infinite, signed zeros but for their sign; NaN stays NaN."""
    for name, input in _layouts(_every_number(dtype)).items():
        output = _identity(input)
        assert output.dtype == dtype
        nan = input.isnan()
        assert torch.equal(output.isnan(), nan), name
        assert torch.equal(output[~nan], input[~nan]), name


def _floats() -> Tensor:
    """Around every number of either format, and half way between neighbours; and at random."""
    found = [torch.randn(4096) * 10.0 ** torch.randint(-8, 6, (4096,))]
    for dtype in HALVES:
        numbers = _every_number(dtype)
        numbers = numbers[numbers.isfinite()].float().sort().values
        middle = (numbers[1:].double() + numbers[:-1].double()).div(2).float()
        infinite = torch.full_like(middle, math.inf)
        found += [middle, torch.nextafter(middle, infinite), torch.nextafter(middle, -infinite)]
    found.append(torch.tensor([65519.0, 65520.0, 65536.0, 1e30, 3.3895e38, 3.4e38, -65520.0]))
    values = torch.cat(found)
    values = values[values.isfinite()]
    return torch.cat([values, values.new_zeros(-len(values) % 1024)])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_is_that_of_pytorch(dtype: torch.dtype) -> None:
    """To the nearest, ties to even, subnormal numbers and overflow too.

    One input of 1 meets every tap at an output of its own: phi, in float32, rounded.
    """
    values = _floats()
    assert (values.to(dtype).isinf() & values.isfinite()).any()
    first = torch.zeros(1, 2, 2, 2, dtype=dtype)
    first[0, 0, 0, 0] = 1
    forms = (torch.contiguous_format, torch.channels_last)
    options = {"padding": 31, "backend": "cpu", "algorithm": "basis"}
    for number, taps in enumerate(values.view(-1, 1, 32, 32)):
        input = first.contiguous(memory_format=forms[number % 2])
        channels = (1, 3, 16, 19)[number % 4]
        a = torch.ones(channels, 2, 1, dtype=dtype)
        output = functional.basis_conv2d(input, a, taps.flip((1, 2)), **options)
        assert output.is_contiguous(memory_format=forms[number % 2])
        assert torch.equal(output[..., :32, :32], taps.to(dtype).expand(1, channels, 32, 32))


def test_gradient_of_phi_is_wide() -> None:
    """In float32 of 16-bit tensors, the truth's to float32's precision."""
    for dtype in HALVES:
        case = layer(2, (9, 11), 3, (12, 13), (3, 3), dtype, padding=1)
        truth = case.to(torch.float64).operator(3, "auto", "composite")
        for algorithm in ALGORITHMS:
            gradient = case.operator(3, algorithm)
            assert gradient.dtype == torch.float32 and relative_error(gradient, truth) < 1e-6


# Memory layouts.


def _agree(case: Layer, algorithm: str) -> None:
    """Every operator, and all gradients together, on these very strides."""
    wide = case.to(torch.float64)
    dtype = case.input.dtype
    truth = [wide.operator(slot, "auto", "composite") for slot in (0, 1, 2, 3)]
    results = [case.operator(slot, algorithm) for slot in range(4)]
    pairs = [*zip(results, truth, strict=True), *zip(case.joint(algorithm), truth[1:], strict=True)]
    for actual, expected in pairs:
        assert relative_error(actual, expected) < max(8 * FLOOR[dtype], 1e-14)


@every_algorithm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("count", range(1, 41))
def test_odd_rows_and_channels(count: int, dtype: torch.dtype, algorithm: str) -> None:
    """Channels first, rows of every length; either way, every number of channels."""
    _agree(layer(1, (3, 2), 2, (2, count), (1, 2), dtype, padding=1), algorithm)
    for form in (torch.contiguous_format, torch.channels_last):
        case = layer(1, (count, 41 - count), 2, (2, 5), (1, 3), dtype, padding=1)
        given = [t.contiguous(memory_format=form) for t in (case.grad, case.input)]
        _agree(Layer(case.geometry, *given, case.coefficients, case.basis), algorithm)


def _expanded(tensor: Tensor, axis: int) -> Tensor:
    return tensor.narrow(axis, 0, 1).expand_as(tensor)


def _overlapping(tensor: Tensor) -> Tensor:
    """Windows of one row, as `unfold` gives them."""
    width = tensor.shape[-1]
    rows = tensor.flatten()[: tensor[..., 0].numel() + width - 1]
    return rows.unfold(0, width, 1).view(*tensor.shape[:-1], width)


def _misaligned(tensor: Tensor, offset: int) -> Tensor:
    """Channels last, from the `offset`-th number of its memory on."""
    last = tensor.movedim(1, -1).contiguous()
    room = tensor.new_empty(last.numel() + offset)[offset:]
    return room.view(last.shape).copy_(last).movedim(-1, 1)


LAYOUTS = {
    **{f"order {order}": order for order in itertools.permutations(range(4))},
    **{f"expanded {axis}": axis for axis in range(4)},
    "overlapping": _overlapping,
    **{f"misaligned {n}": n for n in (1, 3)},
    "every third": lambda t: t.repeat_interleave(3, 1)[:, ::3],
}


def _lay_out(tensor: Tensor, name: str) -> Tensor:
    how = LAYOUTS[name]
    if isinstance(how, tuple):
        inverse = [how.index(axis) for axis in range(4)]
        return tensor.permute(how).contiguous().permute(inverse)
    if isinstance(how, int):
        return _expanded(tensor, how) if "expanded" in name else _misaligned(tensor, how)
    return how(tensor)


@every_algorithm
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name: str, algorithm: str) -> None:
    for dtype in DTYPES:
        case = layer(2, (18, 19), 3, (7, 9), (3, 3), dtype, padding=1)
        laid = [_lay_out(t, name) for t in (case.grad, case.input)]
        _agree(replace(case, grad=laid[0], input=laid[1]), algorithm)


@every_algorithm
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_every_layout_of_the_coefficients(order: tuple[int, ...], algorithm: str) -> None:
    """Permuted, of every second number, from an odd number of memory on; phi too."""
    case = layer(1, (18, 35), 3, (7, 6), (3, 3), padding=1)
    inverse = [order.index(axis) for axis in range(3)]
    permuted = case.coefficients.permute(order).contiguous().permute(inverse)
    apart = case.coefficients.repeat_interleave(2, order[0]).narrow(order[0], 1, 1)
    index = [slice(None)] * 3
    index[order[0]] = slice(1, None, 2)
    apart = case.coefficients.repeat_interleave(2, order[0])[tuple(index)]
    basis = case.basis.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for coefficients in (permuted, apart):
        given = replace(case, coefficients=coefficients, basis=basis)
        assert torch.equal(given.coefficients, case.coefficients)
        for ours, theirs in zip(given.results(algorithm), case.results(algorithm), strict=True):
            assert torch.equal(ours, theirs)


# Transforms.


def _by_circle(case: Layer, shape: tiles.Triple, circles: tiles.Triple) -> Tensor:
    """y by transforms of this very size."""
    problem = ops.problem_of(0, case.operands(0), case.geometry)
    chosen, seconds = cpu.configure(problem, "fft")
    tile = replace(chosen, shape=shape, circles=circles)
    plan = Plan(problem, "cpu", "fft", tile, seconds)
    return cpu.basis_conv_fwd(plan, case.input, case.coefficients, case.basis, None)


def _spectral_product(case: Layer, points: int) -> np.ndarray:
    """Correlation round a circle of `points` in float64, `[C_out, points]`."""
    x = np.fft.fft(case.input[0].double().numpy(), points)
    phi = np.fft.fft(case.basis.double().numpy(), points)
    z = np.fft.ifft(x[:, None] * phi.conj()).real  # [C_in, R, points]
    return np.einsum("oir,irp->op", case.coefficients.double().numpy(), z)


SIZES = sorted({size for least in range(3, 301) for size in tiles.circle_sizes(least)})


def test_which_sizes_there_are() -> None:
    """Products of at most four of the radices, none more than a third beyond what is needed."""
    assert SIZES[:8] == [3, 4, 5, 6, 8, 9, 12, 15] and SIZES[-1] >= 300
    for size in SIZES:
        radices = tiles.radices(size)
        assert math.prod(radices) == size and len(radices) <= 4 and {*radices} <= {3, 4, 5, 6, 8}
    assert all(tiles.circle_sizes(least)[0] <= 4 / 3 * least for least in range(3, 301))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("points", SIZES)
def test_transforms_of_every_size(points: int, dtype: torch.dtype) -> None:
    """Round the whole circle, against numpy's."""
    taps = max(1, points // 3)
    count = points - taps + 1
    case = layer(1, (17, 2), 3, (points,), (taps,), dtype)
    expected = torch.from_numpy(_spectral_product(case, points))[None, :, :count]
    output = _by_circle(case, (1, 1, count), (1, 1, points))
    assert relative_error(output, expected) < 3 * torch.finfo(dtype).eps * math.log2(points)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("size", "kernel", "shape", "circles"),
    [
        ((16, 20), (5, 5), (1, 12, 16), (1, 16, 20)),
        ((40, 40), (5, 3), (1, 8, 10), (1, 12, 12)),
        ((40, 40), (5, 3), (1, 8, 10), (1, 15, 24)),
        ((9, 120), (9, 1), (1, 1, 60), (1, 9, 60)),
        ((13, 14), (3, 3), (1, 11, 12), (1, 25, 32)),
        ((7, 8, 9), (3, 3, 3), (5, 6, 7), (8, 8, 9)),
        ((12, 11, 10), (3, 2, 3), (4, 5, 4), (6, 6, 6)),
        ((6, 9, 30), (6, 1, 5), (1, 3, 13), (6, 3, 18)),
    ],
    ids=str,
)
def test_transforms_over_several_axes(size, kernel, shape, circles, dtype: torch.dtype) -> None:
    """One tile and several, circles that just hold a tile and larger ones."""
    case = layer(2, (19, 5), 3, size, kernel, dtype)
    truth = case.to(torch.float64).operator(0, "auto", "composite")
    error = relative_error(_by_circle(case, shape, circles), truth)
    assert error < 3 * torch.finfo(dtype).eps * math.log2(math.prod(circles))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("extent", [1, 2, 3, 5, 8])
def test_tiles_that_share_the_circle_with_zeros(extent: int, dims: int) -> None:
    """An image in one tile needs no halo: its padding is the circle's own zeros; gradients too."""
    size = (extent, extent + 1, extent + 3)[:dims]
    for kernel, padding in ((3, 1), (5, 2), (5, 4), (2, 1), (3, 7)):
        case = layer(1, (17, 4), 2, size, (kernel,) * dims, torch.float64, padding=padding)
        if min(case.geometry.output_size) < 1:
            continue
        problem = ops.problem_of(0, case.operands(0), case.geometry)
        chosen, _ = cpu.configure(problem, "fft")
        whole = tuple(c for c in (*(1,) * (3 - dims), *case.geometry.output_size))
        if chosen.shape == whole and padding == kernel - 1:
            assert max(chosen.circles) < max(case.geometry.output_size) + kernel - 1 + 2
        truth = [case.operator(slot, "auto", "composite") for slot in range(4)]
        for slot in range(4):
            assert relative_error(case.operator(slot, "fft"), truth[slot]) < 1e-14


def test_a_circle_is_smaller_than_patch_and_tile() -> None:
    """31 points of an image of 31 and 15 taps, whose patch has 45."""
    geometry = Geometry.conv((31, 31), (15, 15), (1, 1), (7, 7), (1, 1), 1)
    case = layer(1, (16, 16), 3, (31, 31), (15, 15), padding=7)
    problem = replace(ops.problem_of(0, case.operands(0), case.geometry), geometry=geometry)
    tile, _ = cpu.configure(problem, "fft")
    if tile.shape == (1, 31, 31):
        assert max(tile.circles) < 31 + 14
