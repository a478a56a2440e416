"""Choices on a table of problems: no GPU, no tensors."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from math import inf, prod
from typing import Any

import pytest
import torch

from benchmarks import shapes
from hyperconv_ext import planner
from hyperconv_ext.backends import BACKENDS, cuda, triton
from hyperconv_ext.backends.cpu import library as cpu_library
from hyperconv_ext.backends.cpu import tiles as cpu_tiles
from hyperconv_ext.backends.cuda import library
from hyperconv_ext.backends.cuda import tiles as cuda_tiles
from hyperconv_ext.backends.triton import tiles
from hyperconv_ext.geometry import Geometry
from hyperconv_ext.planner import PlanError
from hyperconv_ext.problem import OPS, Device, Op, Problem, WeightShape

from .planning import GPU_SHAPES, H200, problem, shaped

NOT_BUILT = "the CUDA extension is not built"


@pytest.fixture(autouse=True)
def missing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No CUDA library, whatever there is on this machine."""
    monkeypatch.setattr(library, "reason", lambda: NOT_BUILT)
    planner.plan.cache_clear()
    yield
    planner.plan.cache_clear()


@pytest.fixture
def built(missing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA library for GPUs of 8.x and 9.0."""
    monkeypatch.setattr(library, "reason", lambda: "")
    monkeypatch.setattr(library, "executes_on_cpu", lambda: False)
    monkeypatch.setattr(library, "architectures", lambda: ("80", "90"))


@pytest.fixture
def hosted(missing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA library that executes the kernels on the CPU."""
    monkeypatch.setattr(library, "reason", lambda: "")
    monkeypatch.setattr(library, "executes_on_cpu", lambda: True)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=lambda shape: shape.name)
def test_triton_takes_every_benchmark_shape(shape: shapes.Shape, op: Op) -> None:
    for dtype, tf32 in (("bfloat16", False), ("float32", True), ("float32", False)):
        for aligned in (False, True):
            plan = planner.plan(shaped(shape, op, dtype, tf32, aligned), "triton")
            assert plan.tile in tiles.ALL and tiles.fits(plan.problem, plan.tile)
            assert 0 < plan.seconds < 10


@pytest.mark.parametrize(
    ("kernel", "rank", "algorithm"),
    [
        (1, 5, "direct"),
        (1, 2, "direct"),
        (5, 5, "basis"),
        (7, 5, "basis"),
        (7, 17, "basis"),
        (31, 5, "basis"),
    ],
)
def test_algorithm(kernel: int, rank: int, algorithm: str) -> None:
    assert planner.plan(problem(kernel=kernel, rank=rank)).algorithm == algorithm


def test_wide_tiles_for_wide_layers() -> None:
    assert planner.plan(problem(channels=256), "triton").tile.outputs == 128
    assert planner.plan(problem(channels=8), "triton").tile.outputs == 16
    assert not planner.plan(problem(channels=256, aligned=False), "triton").tile.aligned


def test_estimate_grows_with_the_work() -> None:
    times = [planner.plan(problem(size=size)).seconds for size in (28, 56, 112)]
    assert times == sorted(times) and times[2] > 3 * times[1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": Device("cpu")}, "move them to a CUDA device"),
        ({"device": Device("mps")}, "move them to a CUDA device"),
        ({"device": Device("cuda", 75, 40)}, "compute capability 8.0"),
        ({"dtype": "float64"}, "float64"),
        ({"batch": 2**20}, "split the batch"),
        ({"in_channels": 2**15, "out_channels": 2**15}, "use more groups"),
    ],
)
def test_what_triton_refuses(changes: dict, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused = problem(**changes)
    assert planner.plan(refused).backend in ("composite", "cpu")
    with pytest.raises(PlanError, match=reason):
        planner.plan(refused, "triton")


def test_direct_refuses_a_rank_it_cannot_hold() -> None:
    with pytest.raises(PlanError, match="up to 32 basis functions"):
        planner.plan(problem(rank=33), "triton", "direct")
    assert planner.plan(problem(rank=33), "triton").algorithm == "basis"


def test_names_in_order_of_preference() -> None:
    assert planner.BACKEND_NAMES == ("auto", "reference", "cuda", "triton", "cpu", "composite")
    assert planner.ALGORITHM_NAMES == ("auto", "basis", "wgmma", "direct", "fft", "composite")


@pytest.mark.parametrize(
    ("backend", "algorithm"), [("composite", "basis"), ("triton", "composite"), ("cuda", "direct")]
)
def test_an_algorithm_of_another_backend(backend: str, algorithm: str) -> None:
    known = r"\(cuda: basis/wgmma, triton: basis/direct, cpu: basis/fft, composite: composite\)"
    with pytest.raises(PlanError, match=f"is not one of backend='{backend}' {known}"):
        planner.plan(problem(), backend, algorithm)


def test_what_the_cpu_executes_for_tests_is_never_chosen_unasked(
    hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "_interpreter_reason", lambda: "")  # whatever NumPy is here
    on_cpu = problem(dtype="float32", device=Device("cpu"), tf32=True)
    engine = "composite" if cpu_library.reason() else "cpu"
    assert planner.plan(on_cpu).backend == engine
    for backend in ("cuda", "triton"):
        plan = planner.plan(dataclasses.replace(on_cpu, batch=2), backend)
        assert plan.backend == backend and plan.seconds == inf


@pytest.mark.parametrize("kernel", [3, 5, 7, 15])
@pytest.mark.parametrize("channels", [8, 64, 512])
def test_workspaces_stay_below_the_weight(kernel: int, channels: int) -> None:
    weight = channels * channels * kernel**2
    coefficient = problem(channels, kernel=kernel, op="basis_conv_bwd_coeff")
    tile = planner.plan(coefficient, "triton").tile
    splits, atomic = tiles.split_coefficients(coefficient, tile)
    assert splits >= 1 and (atomic or splits == 1 or splits * channels**2 * 5 < weight)
    demanded = dataclasses.replace(coefficient, deterministic=True)
    splits, atomic = tiles.split_coefficients(demanded, tile)
    assert not atomic and (splits == 1 or splits * channels**2 * 5 < weight)
    basis = problem(channels, kernel=kernel, op="basis_conv_bwd_basis")
    tile = planner.plan(basis, "triton").tile
    chunks = tiles.padded_patch(tiles.lattice_of(basis, tile), tile) // tile.patch
    for deterministic in (False, True):
        demanded = dataclasses.replace(basis, deterministic=deterministic)
        splits, atomic = tiles.split_basis(demanded, tile)
        assert splits >= 1 and not (atomic and deterministic)
        assert atomic or splits == 1 or splits * chunks * 5 * kernel**2 < weight


def test_what_the_cpu_engine_outruns(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(taps: int, inputs: int, outputs: int, **rest: Any) -> bool:
        return cpu_tiles.outruns_dense(WeightShape(taps, inputs, outputs, 5, **{"width": 4} | rest))

    assert taken(9, 64, 64, work=10**9) and not taken(9, 8, 8, work=10**9) and not taken(1, 64, 64)
    assert taken(9, 8, 8, work=10**6) and taken(1, 64, 64, work=10**6)  # which W would not be worth
    assert taken(25, 1, 8, work=10**9) and not taken(9, 1, 8, work=10**9)
    assert taken(9, 1, 8, work=10**9, trained=True) and not taken(9, 8, 16, work=10**9, trained=True)
    assert taken(9, 64, 128, strides=4) and not taken(9, 64, 128, strides=4, trained=True)
    assert taken(9, 64, 64, work=2 * 10**7, kept=True) and not taken(1, 64, 64, work=10**7, kept=True)
    assert taken(25, 1, 8, work=10**7) and not taken(25, 1, 8, work=10**7, kept=True)
    assert taken(49, 1, 1, work=10**6, kept=True) and not taken(49, 1, 1, work=2 * 10**6, kept=True)
    for taps in (25, 49, 121):
        assert taken(taps, 1, 1, work=10**9, groups=96, trained=True)
        assert not taken(taps, 1, 1, work=10**9, groups=96)
    assert not taken(9, 4, 4, work=10**6, groups=32) and taken(9, 4, 4, work=10**6)
    amx = False
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    for instructions, expected in (("avx512_bf16", True), ("avx512", False)):
        monkeypatch.setattr(cpu_library, "capability", lambda name=instructions: name)
        assert taken(9, 128, 128, width=2) is expected
        assert taken(121, 128, 128, width=2)
    amx = True
    assert not taken(25, 128, 128, width=2) and taken(25, 128, 128)


def _prefers_dense(taps: int, channels: int, rank: int = 5, kind: str = "cpu") -> bool:
    return planner.prefers_dense(kind, WeightShape(taps, channels, channels, rank, 4))


def test_dense_convolution_without_an_engine_for_small_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["cpu"], "joins_on", lambda device: False)
    assert _prefers_dense(9, 64)
    assert not _prefers_dense(31 * 31, 64)
    assert not _prefers_dense(49, 512)
    assert not _prefers_dense(9, 64, kind="cuda")


def test_dense_convolution_where_the_cpu_engine_is_slower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BACKENDS["cpu"], "joins_on", lambda device: True)
    for channels in (16, 64, 256):
        assert _prefers_dense(1, channels)
        assert not _prefers_dense(25, channels)
        assert not _prefers_dense(31 * 31, channels, rank=17)
        assert _prefers_dense(9, channels, rank=17)
    assert not _prefers_dense(9, 64)
    assert _prefers_dense(49, 1)  # depthwise
    assert not _prefers_dense(31 * 31, 1)
    assert _prefers_dense(9, 3)


DEEP = (2, *(16,) * 8, 4)


@pytest.mark.parametrize(
    ("widths", "dtype", "device", "backend", "reason"),
    [
        ((2, 16, 16, 4), "float32", H200, "auto", ""),
        ((2, 16, 16, 4), "bfloat16", H200, "triton", ""),
        (DEEP, "float32", H200, "auto", ""),
        ((2, 128, 4), "float32", H200, "auto", "64 wide"),
        ((2, 16, 4), "float64", H200, "auto", "float64"),
        ((2, 16, 4), "float32", Device("mps"), "auto", "on mps; move them to the CPU"),
        ((2, 16, 4), "float32", H200, "composite", "by PyTorch"),
        ((2, 16, 4), "float32", H200, "cuda", NOT_BUILT),
    ],
)
def test_mlp_backend(widths, dtype, device, backend, reason) -> None:
    engine, why = planner.mlp_backend(widths, dtype, device, backend)
    assert engine == ("" if reason else "triton") and reason in why and bool(why) == bool(reason)


@pytest.mark.parametrize(
    ("widths", "backend", "engine", "reason"),
    [
        ((2, 64, 4), "auto", "cuda", ""),
        ((2, 64, 4), "cuda", "cuda", ""),
        ((2, 64, 4), "triton", "triton", ""),
        (DEEP, "auto", "triton", ""),
        (DEEP, "cuda", "", "cuda: its MLP kernels take up to 8 layers, not 9"),
        (DEEP[1:], "cuda", "cuda", ""),
        (
            (2, 65, 4),
            "auto",
            "",
            "cuda: its MLP kernels take layers up to 64 wide, not 65; "
            "triton: its MLP kernels take layers up to 64 wide, not 65",
        ),
    ],
    ids=str,
)
def test_mlp_backend_with_a_cuda_library(widths, backend, engine, reason, built) -> None:
    assert planner.mlp_backend(widths, "bfloat16", H200, backend) == (engine, reason)


def test_why_no_kernel_evaluates_the_mlp() -> None:
    """Every engine's reason."""
    _, why = planner.mlp_backend((2, 65, 4), "float32", H200, "auto")
    assert why == f"cuda: {NOT_BUILT}; triton: its MLP kernels take layers up to 64 wide, not 65"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": 33}, "up to 32 basis functions, not 33"),
        ({"dtype": "float64"}, "float32, float16, bfloat16, not float64"),
        ({"kernel": 101}, "no block of inputs that 16 outputs read fits in 227 KiB of shared memory"),
        (
            {"kernel": 101, "device": Device("cuda", 86, 84)},
            "no block of inputs that 16 outputs read fits in 99 KiB of shared memory",
        ),
        ({"batch": 2**26}, "blocks of work are more than .*; split the batch"),
        ({"device": Device("cpu")}, "on cpu; move them to a CUDA device"),
        ({"device": Device("mps")}, "on mps; move them to a CUDA device"),
        (
            {"device": Device("cuda", 100, 148)},
            "built for sm_80, sm_90, this GPU is sm_100; rebuild it with TORCH_CUDA_ARCH_LIST=10.0",
        ),
    ],
    ids=str,
)
def test_what_cuda_refuses(changes: dict, reason: str, built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused = problem(**changes)
    assert planner.plan(refused).backend != "cuda"
    with pytest.raises(PlanError, match=f"cuda/basis: .*{reason}"):
        planner.plan(refused, "cuda")


def test_cuda_without_its_library() -> None:
    assert planner.plan(problem()).backend == "triton"
    with pytest.raises(PlanError, match=rf"\(cuda/basis: {NOT_BUILT}; cuda/wgmma: {NOT_BUILT}\); use"):
        planner.plan(problem(), "cuda")


def test_a_library_for_the_cpu_takes_no_gpu(hosted) -> None:
    assert planner.plan(problem()).backend == "triton"
    with pytest.raises(PlanError, match="on cuda; move them to a CPU device"):
        planner.plan(problem(), "cuda")


@pytest.mark.parametrize(
    ("architectures", "served"),
    [
        (("80",), {80, 86, 89}),
        (("86", "90"), {86, 89, 90}),
        (("90a",), {90}),
        (("80", "90", "100+PTX"), {80, 86, 89, 90, 100, 103, 120}),
        ((), set()),
    ],
)
def test_which_gpus_a_library_serves(architectures, served, built, monkeypatch) -> None:
    monkeypatch.setattr(library, "architectures", lambda: architectures)
    known = (75, 80, 86, 89, 90, 100, 103, 120)
    assert {capability for capability in known if library.supports(capability)} == served


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_the_lower_estimate(op: Op, built, monkeypatch: pytest.MonkeyPatch) -> None:
    """And cuda between equal ones."""
    best = planner.plan(problem(op=op), "triton").seconds
    for seconds, backend in ((0.9 * best, "cuda"), (best, "cuda"), (1.1 * best, "triton")):
        monkeypatch.setattr(cuda, "configure", lambda *_, seconds=seconds: ("a tile", seconds))
        planner.plan.cache_clear()
        plan = planner.plan(problem(op=op))
        assert (plan.backend, plan.seconds) == (backend, min(best, seconds))


@pytest.mark.parametrize("shape", GPU_SHAPES, ids=lambda shape: shape.name)
def test_auto_on_every_benchmark_shape(shape: shapes.Shape, built) -> None:
    for op in OPS:
        numbers = shaped(shape, op)
        own = planner.plan(numbers, "cuda")
        check_tile(own.problem, own.tile)
        assert 0 < own.seconds < 10
        plans = [planner.plan(numbers, backend) for backend in ("cuda", "triton", "composite")]
        chosen, best = planner.plan(numbers), min(plans, key=lambda plan: plan.seconds)
        assert (chosen.backend, chosen.tile, chosen.seconds) == (best.backend, best.tile, best.seconds)


@pytest.mark.parametrize("kernel", [3, 5, 7, 15])
@pytest.mark.parametrize("channels", [8, 64, 512])
def test_cuda_workspaces_stay_below_the_weight(kernel: int, channels: int) -> None:
    """The slices of the gradients; from 64 channels on the bands and the packed coefficients too."""
    weight = channels * channels * kernel**2
    for deterministic in (False, True):
        changes = {"kernel": kernel, "op": "basis_conv_bwd_coeff", "deterministic": deterministic}
        coefficient = problem(channels, **changes)
        splits, atomic = cuda_tiles.shares(coefficient, _tile(coefficient))
        assert splits >= 1 and not (atomic and deterministic)
        assert atomic or splits == 1 or splits * channels**2 * 5 < weight
        basis = problem(channels, **(changes | {"op": "basis_conv_bwd_basis"}))
        splits, atomic = cuda_tiles.shares(basis, _tile(basis))
        pieces = cuda_tiles.basis_pieces(_map(basis, _tile(basis)))
        assert splits >= 1 and not (atomic and deterministic)
        assert atomic or splits == pieces == 1 or splits * pieces * 5 * kernel**2 < weight
    for op in OPS if channels >= 64 else ():
        whole = problem(channels, kernel=kernel, op=op)
        map = _map(whole, _tile(whole))
        outputs = -(-channels // _tile(whole).kernel.outputs) * _tile(whole).kernel.outputs
        assert map.units.bands * 5 * map.chunks * 256 < weight
        assert channels * 5 * outputs < weight


def _tile(problem: Problem) -> cuda_tiles.Tile:
    choice = cuda_tiles.choose(problem)
    assert choice is not None
    return choice[0]


def _map(problem: Problem, tile: cuda_tiles.Tile) -> cuda_tiles.Map:
    return cuda_tiles.map_of(problem, tile.unit, tile.grid)


def check_tile(problem: Problem, tile: cuda_tiles.Tile) -> None:
    """What the kernels of csrc/ rely on."""
    map = _map(problem, tile)
    assert tile.kernel in cuda_tiles.ALL
    assert (tile.kernel.family, tile.kernel.number) == (
        cuda_tiles.family(problem),
        cuda_tiles.number(problem),
    )
    assert prod(tile.unit) == 16 and map.units.positions == 16
    assert prod(tile.grid) == 2 * tile.warps and tile.warps in (1, 2, 4, 8)
    assert 1 <= tile.slice <= map.chunks and tile.stages in (1, 2)
    size = cuda_tiles.shared_bytes(problem, tile.kernel, map, tile.slice, tile.stages)
    assert tile.shared_bytes == size <= cuda_tiles.shared_memory(problem)


def _conv(size: int, kernel: int, stride: int = 1, dilation: int = 1, dims: int = 2) -> Geometry:
    padding = dilation * (kernel - 1) // 2
    return Geometry.conv(*(((n,) * dims) for n in (size, kernel, stride, padding, dilation)), 1)


GEOMETRIES = {
    **{
        f"k={k}": [
            *(_conv(56, k, stride) for stride in (1, 2, 3, 4)),
            *(_conv(56, k, 1, dilation) for dilation in (2, 3)),
            _conv(56, k, 3, 2),
        ]
        for k in (1, 2, 3, 7, 11, 15, 21, 31)
    },
    "1-D": [_conv(4096, 1025, *steps, dims=1) for steps in ((1, 1), (4, 1), (1, 3))],
    **{f"3-D k={k}": [_conv(24, k, stride, dims=3) for stride in (1, 2)] for k in (3, 7, 9)},
    "one output": [_conv(1, k, stride) for k in (3, 15, 31) for stride in (1, 4)],
}


def _problems(group: str, capability: int, rank: int) -> Iterator[Problem]:
    device = Device("cuda", capability, 132)
    for geometry, op in itertools.product(GEOMETRIES[group], OPS):
        for dtype, tf32 in (("float16", False), ("float32", True), ("float32", False)):
            yield Problem(op, geometry, 2, 64, 48, rank, dtype, device, True, tf32)


def _least_shared_bytes(problem: Problem) -> int:
    """Of the smallest block there could be: two units, one halo, bands of 16 rows at a time."""
    dims = problem.geometry.dims
    kinds = cuda_tiles.family(problem), cuda_tiles.number(problem)
    kernels = [kernel for kernel in cuda_tiles.ALL if (kernel.family, kernel.number) == kinds]
    powers = [1, 2, 4, 8, 16]
    units = [u for u in itertools.product(*([powers] * dims)) if prod(u) == 16]
    grids = [tuple(1 + (axis == i) for i in range(4)) for axis in (0, *range(4 - dims, 4))]
    return min(
        cuda_tiles.shared_bytes(problem, kernel, map, 1, 1)
        for kernel, unit, grid in itertools.product(kernels, units, grids)
        for map in [cuda_tiles.map_of(problem, ((1,) * (3 - dims)) + unit, grid)]
    )


every_capability = pytest.mark.parametrize("capability", [80, 90])


@every_capability
@pytest.mark.parametrize("group", GEOMETRIES)
def test_cuda_tiles_are_what_the_kernels_rely_on(group: str, capability: int) -> None:
    for tiled in _problems(group, capability, 5):
        choice = cuda_tiles.choose(tiled)
        if choice is not None:
            check_tile(tiled, choice[0])
            assert 0 < choice[1] < 10


@pytest.mark.parametrize(
    ("group", "capability", "rank"),
    [
        *itertools.product(GEOMETRIES, (80, 90), (5,)),
        *itertools.product(("k=2", "k=3", "k=11"), (80, 90), (32,)),
    ],
)
def test_cuda_finds_a_tile_wherever_one_fits(group: str, capability: int, rank: int) -> None:
    """It refuses only where the smallest block there could be has no room."""
    wrong = []
    for tiled in _problems(group, capability, rank):
        room = cuda_tiles.shared_memory(tiled) - _least_shared_bytes(tiled)
        if (cuda_tiles.choose(tiled) is None) != (room < 0):
            wrong.append((tiled.op, cuda_tiles.number(tiled), tiled.geometry, room))
    assert not wrong


@pytest.mark.parametrize("number", ["half", "tf32", "ieee"])
@pytest.mark.parametrize("op", OPS)
def test_large_kernels_on_an_h200(op: Op, number: str) -> None:
    """All but 101 x 101, in every number format."""
    dtype = "float16" if number == "half" else "float32"
    plain = problem(op=op, dtype=dtype, tf32=number == "tf32")
    for geometry in (
        _conv(56, 31),
        _conv(56, 31, 2),
        _conv(24, 9, dims=3),
        _conv(4096, 1025, 4, dims=1),
    ):
        assert cuda_tiles.choose(dataclasses.replace(plain, geometry=geometry)) is not None
    assert cuda_tiles.choose(dataclasses.replace(plain, geometry=_conv(56, 101))) is None
