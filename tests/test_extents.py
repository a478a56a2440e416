"""What is computed is bounded by what there is, however large stride, dilation, kernel or padding."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hyperconv_ext import ops, planner
from hyperconv_ext.backends.cuda import tiles as cuda_tiles
from hyperconv_ext.backends.lattice import best_lattice
from hyperconv_ext.backends.triton import tiles as triton_tiles
from hyperconv_ext.geometry import Geometry

from .conftest import FUSED, interpreted, precision_of_the_framework
from .planning import problem


def _conv(size, kernel, stride=1, padding=0, dilation=1) -> Geometry:
    dims = len(size)
    every = [v if isinstance(v, tuple) else (v,) * dims for v in (kernel, stride, padding, dilation)]
    return Geometry.conv(size, *every, 1)


GEOMETRIES = {
    "stride 100": _conv((5, 4), 3, stride=100, padding=1),
    "stride 100, 1-D": _conv((7,), 3, stride=100),
    "stride 100, 3-D": _conv((3, 2, 4), 2, stride=100),
    "stride 20, two outputs": _conv((3, 23), 3, stride=(1, 20)),
    "dilation 40": _conv((12, 12), 3, padding=40, dilation=40),
    "dilation 20, wide padding": _conv((4, 1), (3, 1), padding=(21, 0), dilation=(20, 1)),
    "dilation 50 and stride 60": _conv((5, 6), (3, 2), (60, 1), (50, 30), (50, 60)),
    "61x61": _conv((5, 5), 61, padding=30),
    "201, 1-D": _conv((4,), 201, padding=100),
    "21x21x21": _conv((2, 3, 2), 21, padding=10),
    "nothing meets": _conv((1, 1), 1, stride=3, padding=5),
    "taps far apart": _conv((1,), 11, stride=10, padding=10),
    "every second tap": _conv((1, 2), (7, 3), stride=2, padding=(6, 2)),
}
every_geometry = pytest.mark.parametrize("name", GEOMETRIES)
both_directions = pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])


def _results(geometry: Geometry, transposed: bool, dtype: torch.dtype, backend: str, device) -> list:
    """Output and gradients, all of the same numbers."""
    torch.manual_seed(0)
    sizes = geometry.input_size, geometry.output_size
    shapes = ((1, 2, *sizes[transposed]), (2, 2, 2), (2, *geometry.kernel_size), (2,))
    leaves = [torch.randn(s).to(device, dtype).requires_grad_() for s in shapes]
    grad = torch.randn(1, 2, *sizes[not transposed]).to(device, dtype)
    output = ops.basis_conv(*leaves, geometry, backend, "auto", transposed)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


@interpreted(lambda row: row["transposed"])
@both_directions
@every_geometry
@pytest.mark.parametrize("backend", ["composite", *FUSED])
def test_results(backend: str, name: str, transposed: bool, device) -> None:
    """Forward and all gradients; those of dropped taps are zero."""
    geometry = GEOMETRIES[name]
    truth = _results(geometry, transposed, torch.float64, "reference", device)
    with precision_of_the_framework(device):
        actual = _results(geometry, transposed, torch.float32, backend, device)
    for a, t in zip(actual, truth, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(60))
def test_random_geometries_by_library_calls(seed: int, device) -> None:
    """`composite` in float64, down to crops of the input and single taps."""
    numbers = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=numbers))

    dims = draw(1, 3)
    while True:
        axes = [[draw(1, 6), draw(1, 9), draw(1, 12), draw(0, 20), draw(1, 8)] for _ in range(dims)]
        geometry = _conv(*map(tuple, zip(*axes, strict=True)))
        if min(geometry.output_size) > 0 and geometry.output_positions < 4000:
            break
    for transposed in (False, True):
        truth = _results(geometry, transposed, torch.float64, "reference", device)
        actual = _results(geometry, transposed, torch.float64, "composite", device)
        for a, t in zip(actual, truth, strict=True):
            torch.testing.assert_close(a, t)


@dataclass(frozen=True)
class _Axis:
    size: int
    out: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    def meets(self) -> set[tuple[int, int, int]]:
        """Every (output, tap, input) inside the input."""
        pairs = itertools.product(range(self.out), range(self.kernel))
        places = ((p, k, p * self.stride + k * self.dilation - self.padding) for p, k in pairs)
        return {(p, k, q) for p, k, q in places if 0 <= q < self.size}


def _axis(geometry: Geometry) -> _Axis:
    g = geometry
    lists = (g.input_size, g.output_size, g.kernel_size, g.stride, g.padding, g.dilation)
    return _Axis(*(values[0] for values in lists))


@settings(max_examples=300, deadline=None)
@given(
    size=st.integers(1, 9),
    kernel=st.integers(1, 30),
    stride=st.integers(1, 40),
    dilation=st.integers(1, 40),
    padding=st.integers(0, 60),
    extra=st.integers(0, 3),
)
def test_trimming_keeps_every_meeting(size, kernel, stride, dilation, padding, extra) -> None:
    length = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    assume(length >= 1)
    geometry = Geometry((size,), (length + extra,), (kernel,), (stride,), (padding,), (dilation,), 1)
    before = _axis(geometry).meets()
    trimmed, window = geometry.trimmed or (geometry, None)
    window = window or (slice(0, kernel),)
    first, last = window[0].start, window[0].stop - 1
    assert {(p, k + first, q) for p, k, q in _axis(trimmed).meets()} == before
    taps = {k for _, k, _ in before}
    assert (first, last) == (min(taps), max(taps)) if taps else first == last
    assert trimmed.trimmed is None
    assert trimmed.dilation == (1,) or first < last
    assert trimmed.stride == (1,) or length + extra > 1
    for transposed in (False, True):
        lattice = best_lattice(trimmed, 1, transposed, 16)
        positions = size if transposed else length + extra
        assert lattice.phases <= positions and lattice.bands <= positions


@both_directions
@every_geometry
def test_work_is_bounded(name: str, transposed: bool) -> None:
    """Blocks, phases and banded matrices of a GPU's plan, against the positions that there are."""
    geometry = GEOMETRIES[name].trimmed
    left = geometry[0] if geometry else GEOMETRIES[name]
    positions = left.input_positions if transposed else left.output_positions
    op = "basis_conv_bwd_input" if transposed else "basis_conv_fwd"
    plain = problem(op=op, geometry=left, batch=1, in_channels=16, out_channels=16)
    tile = planner.plan(plain, "triton", "basis").tile
    lattice = triton_tiles.lattice_of(plain, tile)
    assert lattice.phases <= positions and lattice.bands <= positions
    assert lattice.phases * -(-lattice.units // tile.units) <= positions
    choice = cuda_tiles.choose(plain)
    if choice is not None:
        map = cuda_tiles.map_of(plain, choice[0].unit, choice[0].grid)
        assert map.blocks <= positions and map.units.bands <= positions


@pytest.mark.parametrize("backend", ["composite", *FUSED])
def test_a_layer_larger_than_its_input(backend: str, device) -> None:
    """Through the hyper-network: its gradients come from the taps that meet something."""
    mlp = ops.Mlp(
        torch.randn(121, 2, device=device),
        [torch.randn(3, 2, device=device).requires_grad_()],
        [torch.randn(3, device=device).requires_grad_()],
        "tanh",
    )
    input, coefficients = torch.randn(1, 2, 3, 3, device=device), torch.randn(2, 2, 4, device=device)
    geometry = _conv((3, 3), 11, padding=5)
    results = []
    for name in ("reference", backend):
        with precision_of_the_framework(device):
            output = ops.hyper_conv(input, coefficients, mlp, None, geometry, name, "auto")
            parameters = [*mlp.weights, *mlp.biases]
            results.append([output.detach(), *torch.autograd.grad(output.square().sum(), parameters)])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
