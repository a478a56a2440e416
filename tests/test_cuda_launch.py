"""How csrc/ launches: whose errors it reports, what it asks of the runtime, blocks without work."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from hyperconv_ext.backends.cuda import launch, library, tiles
from hyperconv_ext.problem import Problem

from .oracle import relative_error
from .test_cuda_tiles import operands_of, problem_for, run_tile, tile_for

pytestmark = pytest.mark.skipif(
    bool(library.reason()) or not library.executes_on_cpu(),
    reason=library.reason() or "the kernels run on a GPU",
)
INVALID_VALUE, INVALID_CONFIGURATION = 1, 9


@pytest.fixture
def runtime() -> ctypes.CDLL:
    """The stand-in of CUDA's runtime in the library under test."""
    loaded = ctypes.CDLL(os.environ["HYPERCONV_CUDA_LIBRARY"])
    loaded.hyperconv_host_attribute_calls.restype = ctypes.c_uint64
    loaded.hyperconv_host_last_error()
    return loaded


def _convolution(channels: int = 16) -> tuple[Problem, tiles.Tile, tuple[Tensor, ...]]:
    """Blocks of more than 48 KiB of shared memory, which must be asked for."""
    operands = operands_of("basis_conv_fwd", torch.bfloat16, torch.device("cpu"), 5, channels)
    problem = problem_for("basis_conv_fwd", operands, "half")
    kernel = next(k for k in tiles.ALL if (k.family, k.outputs) == ("basis_conv", 64))
    tile = tile_for(problem, kernel, 8, 99, 2)
    assert tile.shared_bytes > 48 * 1024
    return problem, tile, operands


def _mlp() -> Tensor:
    weights, biases = [torch.randn(3, 2)], [torch.randn(3)]
    return launch.coordinate_mlp_fwd(torch.randn(9, 2), weights, biases, "tanh", 1.0, False, True)


def test_the_error_of_other_code_is_neither_reported_nor_cleared(runtime: ctypes.CDLL) -> None:
    for work in (_mlp, lambda: run_tile(*_convolution())):
        runtime.hyperconv_host_leave_error(INVALID_CONFIGURATION)
        assert work().isfinite().all()
        assert runtime.hyperconv_host_last_error() == INVALID_CONFIGURATION


@pytest.mark.parametrize("error", [INVALID_VALUE, 2, INVALID_CONFIGURATION])
def test_an_error_of_our_own_is_the_runtimes_and_does_not_stay(
    runtime: ctypes.CDLL, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own text, not the guess that the library is stale; and the next caller finds none."""
    monkeypatch.setenv("HYPERCONV_HOST_REFUSE", str(error))
    for work, name in ((_mlp, "coordinate_mlp"), (lambda: run_tile(*_convolution()), "prepare")):
        with pytest.raises(RuntimeError, match=f"{name}: refused as told") as raised:
            work()
        assert "rebuild" not in str(raised.value)
        assert runtime.hyperconv_host_last_error() == 0


def test_shared_memory_is_allowed_once_for_a_kernel(runtime: ctypes.CDLL) -> None:
    """Not at every launch, whichever threads launch it and however much a launch needs."""
    problem, tile, operands = _convolution()
    run_tile(problem, tile, operands)
    before = runtime.hyperconv_host_attribute_calls()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: run_tile(problem, tile, operands), range(8)))
    assert all(torch.equal(result, results[0]) for result in results)
    larger = _convolution(channels=80)
    run_tile(*larger)
    assert runtime.hyperconv_host_attribute_calls() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", ["basis_conv_bwd_coeff", "basis_conv_bwd_basis"])
def test_blocks_without_work_add_nothing(
    op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More shares than there is work: no copy of theirs is under way over the sums or at the end."""
    operands = operands_of(op, dtype, torch.device("cpu"), 3, 16, batch=1)
    number = "ieee" if dtype == torch.float32 else "half"
    problem = problem_for(op, operands, number)
    family = tiles.family(problem)
    kernel = next(k for k in tiles.ALL if (k.family, k.number, k.outputs // 33) == (family, number, 0))
    tile = tile_for(problem, kernel, 4, 99, 2)
    expected = run_tile(problem, tile, operands)
    work = tiles.map_of(problem, tile.unit, tile.grid).blocks
    work *= 1 if op == "basis_conv_bwd_coeff" else 2
    launch._fixed_of.cache_clear()
    monkeypatch.setattr(tiles, "shares", lambda problem, tile: (work + 5, False))
    fixed = run_tile(problem, tile, operands)
    assert relative_error(fixed, expected.double()) < 1e-2
