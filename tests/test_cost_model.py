"""Estimates against what must bound them, what they count against formulas: no GPU, no tensors."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from math import inf, prod

import pytest

from benchmarks import predictions, shapes
from hyperconv_ext import planner
from hyperconv_ext.backends import BACKENDS, composite, cost
from hyperconv_ext.backends.cost import Work
from hyperconv_ext.backends.cuda import library
from hyperconv_ext.backends.cuda import tiles as cuda_tiles
from hyperconv_ext.backends.figures import figures, number
from hyperconv_ext.backends.triton import tiles as triton_tiles
from hyperconv_ext.geometry import Geometry
from hyperconv_ext.problem import OPS, Device, Op, Plan, Problem

from .conftest import swept
from .planning import A100, B200, GPU_SHAPES, H200, problem, shaped

GPUS = {"A100": A100, "H200": H200, "B200": B200}
FORMATS = {"half": ("bfloat16", False), "tf32": ("float32", True), "ieee": ("float32", False)}
ENGINES = ("cuda", "triton", "composite")
# Those that take every problem; for `wgmma` see test_cuda_wgmma.py.
ALGORITHMS = [
    (name, algorithm)
    for name in ENGINES
    for algorithm in BACKENDS[name].ALGORITHMS
    if algorithm != "wgmma"
]


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CUDA library for every GPU, whatever there is on this machine."""
    monkeypatch.setattr(library, "reason", lambda: "")
    monkeypatch.setattr(library, "executes_on_cpu", lambda: False)
    monkeypatch.setattr(library, "architectures", lambda: ("80", "90", "100", "120"))
    planner.plan.cache_clear()
    yield
    planner.plan.cache_clear()


def _element(problem: Problem) -> int:
    return 2 if number(problem) == "half" else 4


# Machine figures.


@pytest.mark.parametrize("capability", [80, 86, 87, 89, 90, 100, 103, 120, 121])
def test_figures_have_sane_units(capability: int) -> None:
    machine = figures(Device("cuda", capability, 100))
    assert 1e9 < machine.clock < 3e9
    assert 1e11 < machine.dram_bandwidth < 1e13
    assert machine.products.half > machine.products.tf32 > machine.products.ieee >= 64
    assert all(own <= peak for own, peak in zip(machine.products, machine.library, strict=True))
    assert machine.cache_bandwidth < machine.shared_bandwidth
    assert 99 * 1024 <= machine.block_memory < machine.shared_memory <= 256 * 1024
    assert 1e-7 < machine.launch < 1e-5


@pytest.mark.parametrize(
    ("capability", "peak"), [(80, 312e12), (90, 989e12), (100, 2.25e15)], ids=["A100", "H200", "B200"]
)
def test_peak_is_that_of_the_data_sheet(capability: int, peak: float) -> None:
    device = next(gpu for gpu in GPUS.values() if gpu.capability == capability)
    machine = figures(device)
    assert 2 * device.processors * machine.library.half * machine.clock == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize(
    ("capability", "known"), [(88, 87), (99, 90), (103, 100), (110, 100), (130, 121), (75, 90), (0, 90)]
)
def test_unlisted_capability(capability: int, known: int) -> None:
    assert figures(Device("cuda", capability)) == figures(Device("cuda", known))


# The time of a launch.


def _seconds(work: Work, device: Device = H200) -> float:
    return cost.seconds([work], device)


def test_a_stream_takes_its_bytes() -> None:
    machine = figures(H200)
    idle = _seconds(Work())
    assert machine.launch < idle < 5e-6
    assert _seconds(Work(dram=machine.dram_bandwidth)) == pytest.approx(1, abs=1e-5)
    assert cost.seconds([Work(), Work()], H200) == pytest.approx(2 * idle)


def test_every_launch_waits_for_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cost.seconds([Work(), Work()], H200)
    slow = dataclasses.replace(figures(H200), launch=1 + figures(H200).launch)
    monkeypatch.setattr(cost, "figures", lambda device: slow)
    assert cost.seconds([Work(), Work()], H200) == pytest.approx(2 + before)


def test_products_take_their_rate() -> None:
    machine = figures(H200)
    products = machine.products.half * machine.clock
    whole = Work(number="half", products=products, blocks=H200.processors)
    assert _seconds(whole) == pytest.approx(1, abs=1e-5)
    assert _seconds(whole._replace(library=True)) == pytest.approx(0.62, abs=1e-5)
    assert _seconds(whole._replace(blocks=H200.processors + 1)) == pytest.approx(2, abs=1e-5)


def test_few_warps_leave_a_multiprocessor_idle_until_more_blocks_come() -> None:
    base = Work(number="half", products=1e9, warps=2, resident=4)
    one, four = (_seconds(base._replace(blocks=n * H200.processors)) for n in (1, 4))
    assert four == pytest.approx(one, rel=1e-3)
    full = _seconds(base._replace(blocks=H200.processors, warps=8))
    assert one == pytest.approx(4 * full, rel=1e-2)


def test_more_of_anything_is_never_faster() -> None:
    draw = random.Random(0)
    sizes = ("dram", "blocks", "products", "scalars", "shared", "cache", "steps")
    for _ in range(500):
        fields = {name: int(10 ** draw.uniform(0, 8)) for name in sizes}
        fields |= {"warps": draw.choice((1, 2, 4, 8)), "resident": draw.choice((1, 2, 4, 8))}
        work = Work(number="tf32", **fields)
        more = work._replace(**{name: 2 * fields[name] for name in draw.sample(sizes, 3)})
        assert _seconds(more) >= _seconds(work)
        assert _seconds(work, dataclasses.replace(H200, processors=264)) <= _seconds(work)


# Estimates of plans.


def _floors(plan: Plan) -> tuple[float, float]:
    """Seconds for the bytes of x, y and A or the gradients in their places; for the products."""
    p, machine = plan.problem, figures(plan.problem.device)
    g = p.geometry
    activations = p.in_channels * g.input_positions + p.out_channels * g.output_positions
    numbers = p.batch * activations + p.out_channels * p.in_channels // g.groups * p.rank
    rates = machine.library if plan.backend == "composite" else machine.products
    rate = 2 * getattr(rates, number(p)) * machine.clock * p.device.processors
    return _element(p) * numbers / machine.dram_bandwidth, BACKENDS[plan.backend].flops(plan) / rate


@swept(lambda row: row["backend"] == "cuda" and row["gpu"] != "H200")
@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("gpu", GPUS)
def test_estimates_are_above_both_rooflines(gpu: str, backend: str) -> None:
    for shape, op, (dtype, tf32) in itertools.product(GPU_SHAPES, OPS, FORMATS.values()):
        plan = planner.plan(shaped(shape, op, dtype, tf32, device=GPUS[gpu]), backend)
        memory, arithmetic = _floors(plan)
        assert max(memory, arithmetic) < plan.seconds < 1, (shape.name, op, dtype, tf32)
        assert plan.seconds > figures(GPUS[gpu]).launch


def _geometry(size: int, kernel: int, dims: int, stride: int = 1) -> Geometry:
    arguments = (size, kernel, stride, kernel // 2, 1)
    return Geometry.conv(*((n,) * dims for n in arguments), 1)


# Steps of two or so: between them the rounding to blocks, waves and shares can turn. Below 64 channels
# the basis gradient gains shares with every weight, and is rightly cheaper for more of them.
GROWTH = {
    "batch": [{"batch": n} for n in (8, 16, 32, 64)],
    "outputs": [{"geometry": _geometry(n, 5, 2)} for n in (16, 32, 64, 128)],
    "taps": [{"geometry": _geometry(32, n, 2)} for n in (3, 5, 7, 11, 15)],
    "volume": [{"geometry": _geometry(n, 3, 3)} for n in (8, 16, 32)],
    "length": [{"geometry": _geometry(n, 9, 1)} for n in (256, 1024, 4096)],
    "input channels": [{"in_channels": n} for n in (64, 128, 256, 512)],
    "output channels": [{"out_channels": n} for n in (64, 128, 256, 512)],
    "rank": [{"rank": n} for n in (2, 5, 9, 17, 32)],
}


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("op", OPS)
def test_more_work_is_never_cheaper(op: Op, growth: str, backend: str) -> None:
    for dtype, tf32 in FORMATS.values():
        plain = problem(op=op, size=28, kernel=5, dtype=dtype, tf32=tf32)
        plans = [planner.plan(dataclasses.replace(plain, **c), backend) for c in GROWTH[growth]]
        times = [plan.seconds for plan in plans]
        assert times == sorted(times), (dtype, tf32)


def test_estimate_counts_every_launch() -> None:
    """Bands and coefficients before; zeros before or sums after a gradient; and the cast of A's."""
    launches = {}
    for op, deterministic in itertools.product(OPS, (False, True)):
        for dtype in ("bfloat16", "float32"):
            plain = problem(op=op, dtype=dtype, deterministic=deterministic, kernel=15)
            plan = planner.plan(plain, "cuda")
            works = cuda_tiles.works(plain, plan.tile)
            assert plan.seconds == cost.seconds(works, H200)
            launches[op, dtype, deterministic] = len(works)
    for dtype, deterministic in itertools.product(("bfloat16", "float32"), (False, True)):
        assert launches["basis_conv_fwd", dtype, deterministic] == 2
        assert launches["basis_conv_bwd_basis", dtype, deterministic] == 3
    assert launches["basis_conv_bwd_coeff", "bfloat16", True] == 4
    assert launches["basis_conv_bwd_coeff", "float32", True] == 3


# Operations.


def _exact(kernel: int, op: Op, dtype: str, tf32: bool) -> Problem:
    """Sizes that every tile divides: nothing is padded but rows of the bands."""
    geometry = Geometry.conv((64, 64), (kernel, kernel), (1, 1), "same", (1, 1), 1)
    return Problem(op, geometry, 32, 128, 128, 8, dtype, H200, aligned=True, tf32=tf32)


def _multiply_adds(plan: Plan) -> int:
    """By hand, per position and input channel of the kernel and for each basis function.

    A row of its band for each block of outputs, and each output; of the basis gradient the row, and each
    output for each piece of it.
    """
    tile, rank, taps = plan.tile, plan.problem.rank, plan.problem.geometry.taps
    reach = plan.problem.geometry.kernel_size[0] - 1
    places = 32 * 64 * 64 * 128
    if plan.backend == "composite":
        return places * rank * (taps + 128)
    if plan.algorithm == "direct" and tile.kernel == "direct":
        blocks = 32 * 64 * 64 // tile.units
        return places * taps * 128 + blocks * taps * 128 * 128 * tile.rank
    if plan.backend == "cuda":
        shape = [unit + reach for unit in tile.unit[1:]]
        row, piece = -(-prod(shape) // 16) * 16, 128
        outputs = tile.kernel.outputs
    else:
        lattice = triton_tiles.lattice_of(plan.problem, tile)
        row = -(-prod(axis.tile + reach for axis in lattice.axes[1:]) // tile.patch) * tile.patch
        piece, outputs = tile.patch, tile.outputs
    if plan.problem.op == "basis_conv_bwd_basis":
        return places * rank * (row + 128 * -(-row // piece))
    return places * rank * (row * (128 // outputs) + 128)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kernel", [7, 11])  # with 11 the patch has two pieces
@pytest.mark.parametrize(("backend", "algorithm"), ALGORITHMS)
def test_operations_of_sizes_that_tiles_divide(
    backend: str, algorithm: str, kernel: int, op: Op, format: str
) -> None:
    plan = planner.plan(_exact(kernel, op, *FORMATS[format]), backend, algorithm)
    assert BACKENDS[backend].flops(plan) == 2 * _multiply_adds(plan)


def _random_problems(count: int) -> Iterator[Problem]:
    draw = random.Random(1)
    for _ in range(count):
        dims, groups = draw.choice((1, 2, 2, 3)), draw.choice((1, 1, 2, 3))
        axes = range(dims)
        size = [draw.randint(9, 24) for _ in axes]
        kernel, stride, dilation = ([draw.randint(1, 3) for _ in axes] for _ in range(3))
        padding = [draw.randint(0, 2) for _ in axes]
        geometry = Geometry.conv(size, kernel, stride, padding, dilation, groups)
        channels = [groups * draw.randint(1, 70) for _ in range(2)]
        dtype, tf32 = draw.choice(list(FORMATS.values()))
        for op in OPS:
            numbers = (op, geometry, draw.randint(1, 5), *channels, draw.randint(1, 20))
            yield Problem(*numbers, dtype, draw.choice(list(GPUS.values())), tf32=tf32)


@pytest.mark.parametrize("backend", ENGINES)
def test_operations_are_never_fewer_than_those_of_rank_r(backend: str) -> None:
    """2 B P C_in/groups C_out R at P outputs of the kernel; `direct` has a phase's taps in R's place."""
    for case in _random_problems(150):
        g = case.geometry
        for algorithm in (algorithm for name, algorithm in ALGORITHMS if name == backend):
            plan = planner.plan(case, backend, algorithm)
            fused = backend != "composite"
            gathers = case.op == "basis_conv_bwd_input" and fused
            positions = g.input_positions if gathers else g.output_positions
            factor = case.rank
            if plan.tile and plan.tile.kernel == "direct":
                factor = triton_tiles.lattice_of(case, plan.tile).patch
            weights = case.in_channels // g.groups * case.out_channels
            assert BACKENDS[backend].flops(plan) >= 2 * case.batch * positions * weights * factor


# Choices.


_FUSED: list[dict] = [
    *({"kernel": k, "channels": c} for k in (3, 5, 7, 31) for c in (8, 64, 256)),
    {"kernel": 11, "channels": 1024},
    {"kernel": 15, "rank": 17},
    {"kernel": 3, "rank": 32},
    {"kernel": 1},
    {"geometry": _geometry(4096, 31, 1)},
    {"geometry": _geometry(32, 5, 3)},
    {"geometry": _geometry(56, 5, 2, stride=2)},
    {"channels": 63, "aligned": False},
    {"dtype": "float32", "tf32": True},
]


@pytest.mark.parametrize("op", OPS[:2])
@pytest.mark.parametrize("changes", _FUSED, ids=str)
@pytest.mark.parametrize("device", GPUS.values(), ids=GPUS)
def test_basis_for_kernels_beyond_one_by_one(device: Device, changes: dict, op: Op) -> None:
    plan = planner.plan(problem(**changes, op=op, device=device))
    assert (plan.backend, plan.algorithm) == ("cuda", "basis")


@pytest.mark.parametrize("rank", [5, 17, 32])
@pytest.mark.parametrize("device", GPUS.values(), ids=GPUS)
def test_direct_for_wide_layers_of_one_tap(device: Device, rank: int) -> None:
    """R products for the basis functions, each of which is one number, against one with W."""
    plan = planner.plan(problem(256, kernel=1, rank=rank, device=device))
    assert (plan.backend, plan.algorithm) == ("triton", "direct")


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 512, "size": 7, "batch": 1},  # fewer units of outputs than multiprocessors
        {  # no shares: W is tiny, and atomic additions are forbidden
            "in_channels": 1,
            "out_channels": 8,
            "op": "basis_conv_bwd_basis",
            "deterministic": True,
        },
        {"kernel": 5, "dtype": "float32"},  # IEEE: zeros of the bands in ordinary units
        {"dtype": "float64"},
        {"device": Device("cuda", 75, 40)},
    ],
    ids=str,
)
def test_composite_where_nothing_fused_is_cheaper_or_runs(changes: dict) -> None:
    plan = planner.plan(problem(**changes))
    assert plan.backend == "composite" and 1e-6 < plan.seconds < 1


def test_no_estimate_off_the_gpu() -> None:
    """More than any estimate, and less than what is only emulated."""
    for kind, name in (("cpu", "composite"), ("mps", "auto")):
        plan = planner.plan(problem(device=Device(kind)), name)
        assert plan.backend == "composite" and plan.seconds == composite.LAST_RESORT < inf


def test_predictions_on_file_are_the_models() -> None:
    """`python benchmarks/predictions.py` writes them again."""
    assert predictions.FILE.read_text() == predictions.text()


def test_dense_convolutions_are_predicted_by_their_operations() -> None:
    """2 B C^2 times the taps that meet each position, at 60% of 990 TFLOP/s."""
    shape = next(
        shape for shape in shapes.RESNET if shape.kernel_size == (7, 7) and shape.size == (56, 56)
    )
    meetings = sum(min(56, at + 4) - max(0, at - 3) for at in range(56)) ** 2
    flops = 2 * 32 * 64 * 64 * meetings
    peak = 2 * 2048 * 1.83e9 * 132
    assert predictions.dense_seconds(shape, 0.6) == pytest.approx(flops / (0.6 * peak))
