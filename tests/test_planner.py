"""Choices on a table of problems: no GPU, no tensors."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import shapes
from hyperconv_ext import planner
from hyperconv_ext.backends.triton import tiles
from hyperconv_ext.geometry import Geometry
from hyperconv_ext.planner import PlanError
from hyperconv_ext.problem import OPS, Device, Op, Problem

H200 = Device("cuda", 90, 132)


def problem(
    channels: int = 64,
    size: int = 56,
    kernel: int = 7,
    rank: int = 5,
    op: Op = "basis_conv_fwd",
    **changes: object,
) -> Problem:
    geometry = Geometry.conv((size, size), (kernel, kernel), (1, 1), "same", (1, 1), 1)
    plain = Problem(op, geometry, 32, channels, channels, rank, "bfloat16", H200, aligned=True)
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [shape for shape, _ in shapes.GPU], ids=lambda shape: shape.name)
def test_every_benchmark_shape_is_fused(shape: shapes.Shape, op: Op) -> None:
    for dtype, tf32 in (("bfloat16", False), ("float32", True), ("float32", False)):
        geometry = Geometry.conv(shape.size, shape.kernel_size, (1, 1), shape.padding, (1, 1), 1)
        channels = shape.in_channels, shape.out_channels
        numbers = (op, geometry, shape.batch, *channels, shape.num_features + 1)
        for aligned in (False, True):
            plan = planner.plan(Problem(*numbers, dtype, H200, aligned, tf32))
            assert plan.backend == "triton"
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
    assert planner.plan(problem(channels=256)).tile.outputs == 128
    assert planner.plan(problem(channels=8)).tile.outputs == 16
    assert not planner.plan(problem(channels=256, aligned=False)).tile.aligned


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
    assert planner.plan(refused).backend == "composite"
    with pytest.raises(PlanError, match=reason):
        planner.plan(refused, "triton")


def test_direct_refuses_a_rank_it_cannot_hold() -> None:
    with pytest.raises(PlanError, match="up to 32 basis functions"):
        planner.plan(problem(rank=33), "triton", "direct")
    assert planner.plan(problem(rank=33), "triton").algorithm == "basis"


@pytest.mark.parametrize(("backend", "algorithm"), [("composite", "basis"), ("triton", "composite")])
def test_an_algorithm_of_another_backend(backend: str, algorithm: str) -> None:
    with pytest.raises(PlanError, match="is not one of backend"):
        planner.plan(problem(), backend, algorithm)


def test_the_interpreter_is_never_chosen_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    interpreted = problem(dtype="float32", device=Device("cpu"), tf32=True)
    assert planner.plan(interpreted).backend == "composite"
    assert planner.plan(dataclasses.replace(interpreted, batch=2), "triton").backend == "triton"


@pytest.mark.parametrize("kernel", [3, 5, 7, 15])
@pytest.mark.parametrize("channels", [8, 64, 512])
def test_workspaces_stay_below_the_weight(kernel: int, channels: int) -> None:
    weight = channels * channels * kernel**2
    coefficient = problem(channels, kernel=kernel, op="basis_conv_bwd_coeff")
    tile = planner.plan(coefficient).tile
    splits, atomic = tiles.split_coefficients(coefficient, tile)
    assert splits >= 1 and (atomic or splits == 1 or splits * channels**2 * 5 < weight)
    demanded = dataclasses.replace(coefficient, deterministic=True)
    splits, atomic = tiles.split_coefficients(demanded, tile)
    assert not atomic and (splits == 1 or splits * channels**2 * 5 < weight)
    basis = problem(channels, kernel=kernel, op="basis_conv_bwd_basis")
    tile = planner.plan(basis).tile
    chunks = tiles.padded_patch(tiles.lattice_of(basis, tile), tile) // tile.patch
    splits = tiles.split_basis(basis, tile)
    assert splits >= 1 and (splits == 1 or splits * chunks * 5 * kernel**2 < weight)


def test_dense_convolution_off_the_gpu_for_small_kernels() -> None:
    assert planner.prefers_dense("cpu", 9, 64, 5)
    assert not planner.prefers_dense("cpu", 31 * 31, 64, 5)
    assert not planner.prefers_dense("cpu", 49, 512, 5)
    assert not planner.prefers_dense("cuda", 9, 64, 5)


@pytest.mark.parametrize(
    ("widths", "dtype", "device", "backend", "reason"),
    [
        ((2, 16, 16, 4), "float32", H200, "auto", ""),
        ((2, 16, 16, 4), "bfloat16", H200, "triton", ""),
        ((2, 128, 4), "float32", H200, "auto", "64 wide"),
        ((2, 16, 4), "float64", H200, "auto", "float64"),
        ((2, 16, 4), "float32", Device("cpu"), "auto", "no fused kernel for cpu"),
        ((2, 16, 4), "float32", H200, "composite", "by PyTorch"),
    ],
)
def test_fused_mlp(widths, dtype, device, backend, reason) -> None:
    fused, why = planner.fused_mlp(widths, dtype, device, backend)
    assert fused == (not reason) and reason in why
