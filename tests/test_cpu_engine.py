"""The CPU engine as part of a program: threads, processes, memory, and what is out of the ordinary."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hyperconv_ext import HyperConv2d, functional, ops
from hyperconv_ext.backends import cpu
from hyperconv_ext.backends.cpu import library, tiles
from hyperconv_ext.backends.lattice import lattice
from hyperconv_ext.geometry import Geometry
from hyperconv_ext.planner import PlanError

from .engine import ALGORITHMS, Layer, layer, threads
from .oracle import CASES, relative_error

pytestmark = [
    pytest.mark.skipif(bool(library.reason()), reason=library.reason()),
    pytest.mark.usefixtures("one_thread"),
]
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)

LAYERS: dict[str, Callable[..., Layer]] = {
    "many tiles": lambda **o: layer(2, (19, 21), 5, (37, 41), (3, 3), padding=1, **o),
    "one tile": lambda **o: layer(1, (3, 40), 3, (5, 6), (3, 3), padding=1, **o),
    "one tile, many columns": lambda **o: layer(1, (40, 300), 5, (4, 4), (3, 3), padding=1, **o),
    "more blocks than tiles": lambda **o: layer(1, (150, 7), 4, (6, 6), (5, 5), padding=2, **o),
    "depthwise": lambda **o: layer(2, (50, 50), 3, (20, 21), (7, 7), padding=3, groups=50, **o),
    "groups": lambda **o: layer(1, (36, 54), 3, (12, 9), (3, 5), padding=2, groups=2, **o),
    "strided": lambda **o: layer(2, (20, 17), 3, (24, 23), (3, 3), padding=1, stride=2, **o),
    "dilated": lambda **o: layer(2, (20, 17), 3, (24, 23), (3, 3), padding=2, dilation=2, **o),
    "1-D": lambda **o: layer(2, (20, 33), 5, (900,), (65,), padding=32, **o),
    "3-D": lambda **o: layer(1, (9, 18), 4, (9, 8, 11), (3, 5, 3), padding=1, **o),
    "rank 17": lambda **o: layer(1, (32, 16), 17, (15, 14), (5, 5), padding=2, **o),
}


def _identical(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@every_algorithm
@pytest.mark.parametrize("name", LAYERS)
def test_threads_change_no_bit(name: str, algorithm: str) -> None:
    """One, two, and more than there are tiles or slices, twice: who computes what is left to chance."""
    for dtype in (torch.float32, torch.bfloat16):
        case = LAYERS[name](dtype=dtype)
        with threads(1):
            expected = case.results(algorithm)
        assert not any(result.isnan().any() for result in expected)
        for count in (2, 7, 7):
            with threads(count):
                assert _identical(case.results(algorithm), expected), f"{dtype}, {count} threads"


@every_algorithm
@pytest.mark.parametrize("name", LAYERS)
def test_together_as_one_by_one(name: str, algorithm: str) -> None:
    """Every subset of the gradients, from one call."""
    case = LAYERS[name](dtype=torch.float64)
    full = [case.operator(slot, "auto", "composite") for slot in (1, 2, 3)]
    for number in range(1, 8):
        wanted = tuple(bool(number >> bit & 1) for bit in range(3))
        for result, want, truth in zip(case.joint(algorithm, wanted), wanted, full, strict=True):
            assert (result is not None) == want
            assert result is None or relative_error(result, truth) < 1e-14


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_transforms_refuse(case) -> None:
    """Outputs that read inputs a stride apart, whatever else; and the reason says what to do."""
    stride = (case.stride,) * 2 if isinstance(case.stride, int) else case.stride
    dilation = (case.dilation,) * 2 if isinstance(case.dilation, int) else case.dilation
    apart = [
        s // math.gcd(s, s if k == 1 else d)
        for s, d, k in zip(stride, dilation, case.kernel, strict=True)
    ]
    input = torch.randn(case.batch, case.in_channels, *case.size)
    coefficients = torch.randn(case.out_channels, case.in_channels // case.groups, case.rank)
    basis = torch.randn(case.rank, *case.kernel)
    # Of a single output along an axis the stride means nothing, but the engine need not know.
    reference = functional.basis_conv2d(input, coefficients, basis, None, *case.arguments)
    options = {"backend": "cpu", "algorithm": "fft"}
    if max(apart) == 1:
        output = functional.basis_conv2d(input, coefficients, basis, None, *case.arguments, **options)
        assert relative_error(output, reference.double()) < 1e-5
    else:
        with pytest.raises(RuntimeError, match=r"cpu/fft: outputs that read .*; use algorithm='basis'"):
            functional.basis_conv2d(input, coefficients, basis, None, *case.arguments, **options)


def test_gradients_of_a_strided_layer_by_transforms() -> None:
    """Its sums may be formed where the output is the source: by phases, as the input gradient."""
    case = LAYERS["strided"]()
    for slot in (1, 2, 3):
        truth = case.to(torch.float64).operator(slot, "auto", "composite")
        assert relative_error(case.operator(slot, "fft"), truth) < 1e-6


# Contents that are no ordinary numbers.


def _spread(case: Layer, slot: int, where: tuple[int, ...], value: float, algorithm: str) -> Tensor:
    """Where the result of an operator differs in kind: [B, *S'], true where not finite."""
    full = [case.grad, case.input, case.coefficients, case.basis]
    source = 1 - slot
    full[source] = full[source].clone()
    full[source][where] = value
    result = Layer(case.geometry, *full).operator(slot, algorithm)
    return (~result.isfinite()).any(dim=1)


@every_algorithm
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("slot", [0, 1])
def test_a_nan_stays_in_its_example(slot: int, value: float, algorithm: str) -> None:
    """By taps it reaches the outputs that read it, by FFT those of the tiles that read it."""
    case = layer(3, (5, 6), 3, (70, 75), (5, 3), padding=1)
    source = (case.input, case.grad)[slot]
    place = tuple(n // 2 for n in source.shape[2:])
    spread = _spread(case, slot, (1, 2, *place), value, algorithm)
    assert not spread[0].any() and not spread[2].any()
    ones = torch.zeros_like(source)
    ones[(1, slice(None), *place)] = 1
    operands = [torch.ones_like(t) for t in (case.grad, case.input, case.coefficients, case.basis)]
    operands[1 - slot] = ones
    reads = Layer(case.geometry, *operands).operator(slot, "auto", "composite")[1, 0] != 0
    assert spread[1][reads].all()
    if algorithm == "basis":
        assert torch.equal(spread[1], reads)
        return
    plan = case.plan(slot, "fft")
    shape, sizes = plan.tile.shape[1:], spread.shape[1:]
    assert any(n < size for n, size in zip(shape, sizes, strict=True)), "several tiles"
    rows, columns = spread[1].any(1).nonzero()[:, 0], spread[1].any(0).nonzero()[:, 0]
    for found, tile, place_, circle in zip(
        (rows, columns), shape, place, plan.tile.circles[1:], strict=True
    ):
        # Whole tiles, those whose circle holds the place.
        assert (found[0] % tile == 0 and (found[-1] + 1) % tile == 0) or found[-1] + 1 in sizes
        assert place_ - circle - tile < found[0] and found[-1] <= place_ + circle + tile


@pytest.mark.parametrize("slot", [0, 1])
def test_channels_that_share_a_transform(slot: int) -> None:
    """Depthwise, a NaN reaches by FFT the one channel whose numbers are the imaginary parts."""
    case = layer(1, (70, 70), 3, (9, 9), (3, 3), padding=1, groups=70)
    full = [case.grad, case.input, case.coefficients, case.basis]
    full[1 - slot][0, 40] = math.nan
    for algorithm, most in (("basis", 1), ("fft", 2)):
        result = Layer(case.geometry, *full).operator(slot, algorithm)
        channels = result.isnan().any(dim=3).any(dim=2)[0]
        assert channels[40] and int(channels.sum()) <= most


@every_algorithm
@pytest.mark.parametrize("flush", [False, True])
def test_subnormal_numbers(flush: bool, algorithm: str) -> None:
    """Are computed with unless PyTorch is told to flush them, and no slower path gives other numbers."""
    case = layer(1, (17, 20), 3, (12, 13), (3, 3), padding=1)
    tiny = Layer(case.geometry, case.grad, case.input * 1e-39, case.coefficients, case.basis)
    with threads(1):
        supported = torch.set_flush_denormal(flush)
        try:
            output = tiny.operator(0, algorithm)
        finally:
            torch.set_flush_denormal(False)
    assert supported or not flush
    truth = tiny.to(torch.float64).operator(0, "auto", "composite")
    least = 2.0**-149
    error = (output.double() - truth).abs().max().item()
    assert not output.isnan().any()
    if flush:
        assert output.abs().max() < 2.0**-120
    else:
        assert output.any() and error < 400 * least


@every_algorithm
def test_a_wide_range_of_numbers(algorithm: str) -> None:
    """One pixel of 1e6 among 1e-3: by FFT errors are relative to the tile, by taps to the output.

    A transform of n points rounds by a few eps log2 n of its root mean square; so does its inverse.
    """
    case = layer(1, (4, 6), 3, (40, 44), (7, 7), padding=3)
    input = case.input * 1e-3
    input[0, 1, 20, 22] = 1e6
    wide = Layer(case.geometry, case.grad, input, case.coefficients, case.basis)
    truth = wide.to(torch.float64).operator(0, "auto", "composite")
    error = (wide.operator(0, algorithm).double() - truth).abs()
    terms = Layer(case.geometry, case.grad, input.abs(), case.coefficients.abs(), case.basis.abs())
    eps = torch.finfo(torch.float32).eps
    if algorithm == "basis":
        most = terms.to(torch.float64).operator(0, "auto", "composite")
        assert (error <= 8 * eps * most).all()
        return
    points = math.prod(wide.plan(0, "fft").tile.circles)
    gain = case.coefficients.norm(dim=1).max() * case.basis.flatten(1).norm(dim=1).max()
    bound = 4 * eps * math.log2(points) * (gain * input.norm()).item()
    assert error.max() <= bound
    far = error[:, :, :4].max()  # where all inputs are 1e-3, a tile's error may exceed the output
    assert far > 0


# Processes.


class _Convolved(Dataset):
    """Examples that are made by a layer, in whatever process asks for them."""

    def __init__(self, conv: nn.Module) -> None:
        self.conv = conv

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        input = torch.arange(3 * 12 * 12.0).view(1, 3, 12, 12).sin() * (index + 1)
        with torch.no_grad():
            return self.conv(input)[0]


def test_in_workers_of_a_data_loader() -> None:
    """Which are forks of a process that has used its threads."""
    conv = HyperConv2d(3, 8, 5, padding=2, backend="cpu")
    examples = _Convolved(conv)
    with threads(4):
        expected = torch.stack([examples[index] for index in range(len(examples))])
        loader = DataLoader(examples, batch_size=2, num_workers=2, multiprocessing_context="fork")
        assert torch.equal(torch.cat(list(loader)), expected)


FORK = """
import os
import torch
from hyperconv_ext import HyperConv2d

torch.manual_seed(0)
torch.set_num_threads(4)
conv = HyperConv2d(40, 40, 5, padding=2, backend="cpu")
input = torch.randn(2, 40, 30, 30)

def step():
    output = conv(input)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), list(conv.parameters()))]

expected = step()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    with torch.no_grad():
        same = torch.equal(conv(input), expected[0])
    os._exit(0 if same else 1)
_, status = os.waitpid(child, 0)
again = step()
same = all(torch.equal(a, b) for a, b in zip(again, expected))
raise SystemExit(os.waitstatus_to_exitcode(status) or (not same))
"""


def _python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    environment = os.environ | variables
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_after_a_fork() -> None:
    """The child on one thread, since PyTorch's others do not survive it; the parent goes on with all."""
    result = _python(FORK)
    assert result.returncode == 0, result.stderr


# Memory.

NO_MEMORY = """
import resource
import torch
from hyperconv_ext import functional

torch.set_num_threads(1)
algorithm, kernel = "{algorithm}", {kernel}
x, a, phi = torch.randn(1, 1024, 8, 8), torch.randn(2048, 1024, 16), torch.randn(16, kernel, kernel)

def convolve(x, a):
    return functional.basis_conv2d(x, a, phi, padding=kernel // 2, backend="cpu", algorithm=algorithm)

small = convolve(x[:, :64], a[:, :64])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))
try:
    convolve(x, a)
except MemoryError as error:
    print(error)
assert torch.equal(convolve(x[:, :64], a[:, :64]), small)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space by Linux's")
@pytest.mark.parametrize(("algorithm", "kernel"), [("basis", 3), ("fft", 7)])
def test_too_little_memory_is_a_memory_error(algorithm: str, kernel: int) -> None:
    """A packed is 128 MB here; the layer works again with what fits."""
    result = _python(NO_MEMORY.format(algorithm=algorithm, kernel=kernel))
    assert result.returncode == 0, result.stderr
    assert re.search(r"no memory for the workspace of a convolution \(.*rank=16.*; free", result.stdout)


PEAK = """
import sys
import torch
from torch import nn
from hyperconv_ext import HyperConv2d

torch.set_num_threads(2)
kernel = int(sys.argv[2])
kind = nn.Conv2d if sys.argv[1] == "dense" else HyperConv2d
options = {} if sys.argv[1] == "dense" else {"backend": sys.argv[1]}

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1])

def step(layer, size):
    input = torch.randn(2, size[0], size[1], size[1]).contiguous(memory_format=torch.channels_last)
    input.requires_grad_()
    output = layer(input)
    output.backward(torch.ones_like(output))

step(kind(4, 4, kernel, padding=kernel // 2, **options), (4, 8))
layer = kind(32, 32, kernel, padding=kernel // 2, **options)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
step(layer, (32, 96))
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the peak")
@pytest.mark.parametrize("kernel", [3, 11])
def test_peak_memory_of_a_step(kernel: int) -> None:
    """At most nn.Conv2d's and a tile a thread, for which the allocator may take pages of its own."""
    kilobytes = []
    for name in ("cpu", "dense"):
        result = _python(PEAK, name, str(kernel))
        assert result.returncode == 0, result.stderr
        kilobytes.append(int(result.stdout))
    case = layer(2, (32, 32), 5, (96, 96), (kernel, kernel), padding=kernel // 2)
    tile = case.joint_plan("auto").tile
    # The patch and its transform, 32 channels at a time; the outputs and the gradients of theirs.
    points = math.prod(tile.circles or [n + kernel - 1 for n in tile.shape])
    workspace = 4 * 32 * (2 * points + (2 + case.basis.shape[0]) * math.prod(tile.shape))
    assert kilobytes[0] <= kilobytes[1] + (2 * workspace >> 10) + 2048, kilobytes


# Sizes out of the ordinary.


@every_algorithm
@pytest.mark.parametrize(
    ("size", "kernel", "arguments"),
    [
        ((40, 41), (3, 3), {"padding": 300, "dilation": 290}),
        ((9, 8), (2, 3), {"padding": 2000, "dilation": 1999}),
        ((5000,), (3,), {"padding": 1200, "dilation": 1201}),
        ((30, 31), (3, 3), {"padding": 40}),
        ((6, 7), (13, 11), {"padding": 12}),
        ((50, 50), (3, 3), {"stride": 49}),
        ((3, 4, 5), (3, 3, 3), {"padding": 50, "dilation": 25}),
        ((300,), (1025,), {"padding": 700}),
        ((1,), (1,), {"padding": 1000}),
    ],
    ids=str,
)
def test_sizes_out_of_the_ordinary(size, kernel, arguments, algorithm: str) -> None:
    """Huge dilations, strides and paddings; taps that meet no input, outputs that meet no tap."""
    case = layer(1, (3, 5), 2, size, kernel, **arguments)
    wide = case.to(torch.float64)
    for slot in range(4):
        problem = ops.problem_of(slot, case.operands(slot), case.geometry)
        if cpu.can_run(problem, algorithm)[0]:
            truth = wide.operator(slot, "auto", "composite")
            assert relative_error(case.operator(slot, algorithm), truth) < 2e-6
        else:
            assert algorithm == "fft" and arguments.get("stride", 1) > 1


@every_algorithm
@pytest.mark.parametrize(("batch", "channels"), [(0, (3, 4)), (2, (0, 4)), (2, (3, 0))])
def test_empty_tensors(batch: int, channels: tuple[int, int], algorithm: str) -> None:
    case = layer(batch, channels, 2, (6, 5), (3, 3), padding=1)
    for slot in range(4):
        result = case.operator(slot, algorithm)
        assert result.shape == (case.grad, case.input, case.coefficients, case.basis)[slot].shape
        assert not result.any()


def _needed_points(axis, count_of_phase: Callable[[int], int]) -> int:
    """Points that no two inputs or positions of a phase's tile share."""
    needed = 1
    for phase in range(axis.phases):
        num = axis.scale * phase + axis.shift
        if num % axis.divisor:
            continue
        tap0 = (num // axis.divisor * axis.inverse) % axis.residues
        origin = (num - tap0 * axis.dilation) // axis.modulus - axis.back
        patch = count_of_phase(phase) - 1 + axis.taps
        inside = [l for l in range(patch) if 0 <= origin + axis.step * l < axis.in_size]
        if inside:
            needed = max(needed, inside[-1] + 1, patch - inside[0])
    return needed


@pytest.mark.parametrize("padding", [0, 1, 2, 9, 20, 40, "same"])
def test_circles_hold_what_a_tile_reads(padding: int | str) -> None:
    """All positions, and all inputs and the zeros that they are read with, of every phase."""
    checked = 0
    for kernel in (1, 2, 3, 4, 7):
        for dilation, stride in ((1, 1), (1, 2), (2, 1), (9, 1), (9, 2), (17, 3), (21, 1)):
            for size in (1, 2, 7, 40, 74):
                if padding == "same" and stride > 1:
                    continue
                pad = padding if padding == "same" else (padding,)
                geometry = Geometry.conv((size,), (kernel,), (stride,), pad, (dilation,), 1)
                if geometry.output_size[0] < 1:
                    continue
                for transposed in (False, True):
                    axis = lattice(geometry, 1, transposed, (1, 1, 1), gaps=False).axes[2]
                    if axis.jump > 1:
                        continue
                    whole = -(-axis.out_size // axis.phases)
                    points = tiles._circle(axis, whole)
                    size_of = lambda phase: -(-(axis.out_size - phase) // axis.phases)  # noqa: B023, E731
                    assert points >= max(whole, _needed_points(axis, size_of)), (geometry, transposed)
                    checked += 1
    assert checked > 50


def test_long_sequences_and_kernels_beyond_a_circle() -> None:
    """Circles end at 4096 points: longer inputs go in tiles, longer kernels by taps."""
    assert tiles.circle_sizes(4096) == (4096,) and tiles.circle_sizes(4097) == ()
    input, coefficients = torch.randn(1, 3, 9000), torch.randn(4, 3, 2)
    for taps, algorithm in ((31, "fft"), (4001, "basis")):
        basis = torch.randn(2, taps) / taps
        choice = {"padding": taps // 2, "backend": "cpu"}
        output = functional.basis_conv1d(input, coefficients, basis, algorithm=algorithm, **choice)
        wide = (tensor.double() for tensor in (input, coefficients, basis))
        truth = functional.basis_conv1d(*wide, padding=taps // 2, backend="reference")
        assert (output - truth).norm() < 1e-5 * truth.norm()
    with pytest.raises(PlanError, match="up to 4096 points, too few for this kernel"):
        functional.basis_conv1d(
            input, coefficients, torch.randn(2, 4999), algorithm="fft", backend="cpu"
        )
