"""What executing csrc/ on the host can find: sanitizers run clean, and faults put in on purpose show."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hyperconv_ext import ops
from hyperconv_ext.backends.cuda import launch, library, tiles
from hyperconv_ext.ops import mlp
from hyperconv_ext.problem import OPS

from . import host_build
from .conftest import passes, sampled
from .oracle import relative_error
from .test_cuda_tiles import GEOMETRY, RUNS, operands_of, problem_for, run_tile, tile_for
from .test_cuda_wgmma import ERRORS as BY_WGMMA

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    bool(library.reason()) or not library.executes_on_cpu(),
    reason=library.reason() or "the kernels run on a GPU",
)
# A float16 result may differ from float64 by this much, no more.
TOLERANCE = 2.0**-9


def _worst(errors: list[float]) -> float:
    return max(torch.inf if math.isnan(error) else error for error in errors)


def convolution_error() -> float:
    """The largest relative error over a selection of modes that together pass every barrier."""
    device = torch.device("cpu")
    errors = []
    for kernel in tiles.ALL:
        if kernel.number != "half" or kernel.outputs == 16:
            continue
        for slice, stages in ((99, 2), (2, 1)):
            op = RUNS[kernel.family]
            # With one pass over the output channels, nothing but the barrier at hand guards the halo.
            channels = 32 if kernel.family == "basis_gradient" else 80
            operands = operands_of(op, torch.float16, device, 5, channels)
            problem = problem_for(op, operands, kernel.number)
            tiles_at_once = 99 if kernel.family == "basis_gradient" else slice
            tile = tile_for(problem, kernel, 4, tiles_at_once, stages)
            actual = run_tile(problem, tile, operands)
            wide = tuple(t.double() for t in operands)
            truth = ops.form(OPS_INDEX[op], GEOMETRY, "composite", "auto", None, *wide)
            errors.append(relative_error(actual, truth))
    return _worst(errors)


OPS_INDEX = {op: OPS.index(op) for op in RUNS.values()}


def mlp_error() -> float:
    """Relative error of the fused MLP's gradients."""
    weights, biases = [torch.randn(16, 2), torch.randn(4, 16)], [torch.randn(16), torch.randn(4)]
    operands = (torch.randn(5, 25), torch.randn(25, 2), weights, biases, "tanh", 1.0, False)
    actual = launch.coordinate_mlp_bwd(*operands)
    truth = mlp.backward(*operands, "reference")
    return _worst([relative_error(a, t.double()) for a, t in zip(actual, truth, strict=True)])


def _barriers() -> list[str]:
    """file:line of every block barrier in csrc/ but those that test_cuda_wgmma.py takes out."""
    return [
        f"{file.name}:{number}"
        for file in sorted((ROOT / "csrc").glob("*.cu*"))
        if file.name not in BY_WGMMA
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if line.lstrip().startswith("__syncthreads();")
    ]


def test_without_a_fault() -> None:
    assert convolution_error() < TOLERANCE and mlp_error() < 2.0**-20


@pytest.mark.parametrize("barrier", _barriers())
def test_a_missing_barrier_is_found(barrier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any one __syncthreads() taken out shows in the numbers, or stops the launch."""
    monkeypatch.setenv("HYPERCONV_HOST_SKIP", barrier)
    measure: Callable[[], float] = (
        mlp_error if barrier.startswith("coordinate_mlp") else convolution_error
    )
    for seed in range(4):
        monkeypatch.setenv("HYPERCONV_HOST_SEED", str(seed))
        try:
            error = measure()
        except RuntimeError:
            return
        if not error < TOLERANCE:
            return
    pytest.fail(f"taking out {barrier} changed nothing")


def _environment(variant: str, sources: Path) -> dict[str, str]:
    path = host_build.build(variant, sources)
    return {**os.environ, **host_build.preload(variant), "HYPERCONV_CUDA_LIBRARY": str(path)}


# (which tests, how many there are at least): a sample of both files, then all of them in two parts;
# float32 on CUDA cores takes longest, seconds a tile.
_SANITIZED = (
    (
        "(test_operators and cuda and (stride or groups or even or beyond))"
        " or (test_cuda_tiles and (half and 4-99-2 or basis_gradient))",
        30,
    ),
    ("cuda and (not ieee or 1-2-1 or basis_gradient)", 120),
    ("cuda and ieee and not (1-2-1 or basis_gradient)", 16),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "least"),
    sampled(_SANITIZED, lambda row: row is _SANITIZED[0]),
    ids=["a sample", "every instantiation", "the other tiles"],
)
def test_operators_under_the_sanitizers(chosen: str, least: int) -> None:
    """Operator tests and instantiations again, in a process with both sanitizers."""
    files = ("tests/test_operators.py", "tests/test_cuda_tiles.py")
    environment = _environment("sanitized", ROOT / "csrc")
    passes("-k", chosen, *files, least=least, environment=environment)


# (file, a check, the check taken out): elements outside an input, an output, a channel block. Without
# its check, lattice.cuh compiles every file again.
_BOUNDS = (
    ("basis_conv.cu", "if (channel >= p_.y_channels) return;", ""),
    ("basis_conv.cu", "if (!is_output(p_.map, block_, at)) continue;", ""),
    ("lattice.cuh", "coordinate < static_cast<unsigned>(map.axis[d].in_size)", "coordinate + 1 > 0"),
    ("coefficient_gradient.cu", "in_ + channel >= p_.x.channels ||", ""),
    ("prepare.cu", "i < p.in_channels && o < p.out_channels", "true"),
)
_CASE = """
from tests.oracle import CASES, draw, evaluate, relative_error
import torch
case = next(case for case in CASES if case.name == "3x3")
torch.manual_seed(0)
tensors = draw(case, torch.float16, torch.device("cpu"))
truth = evaluate(case, [t.double() for t in tensors], None, "contiguous", backend="reference")
actual = evaluate(case, tensors, None, "channels_last", backend="cuda")
errors = [relative_error(a, t) for a, t in zip(actual, truth)]
raise SystemExit(0 if all(error < 2.0**-8 for error in errors) else f"errors {errors}")
"""


def _run_case(sources: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _CASE],
        cwd=ROOT,
        env=_environment("sanitized", sources),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_case_without_a_fault() -> None:
    result = _run_case(ROOT / "csrc")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "check", "without"),
    sampled(_BOUNDS, lambda row: row is _BOUNDS[-1]),
    ids=[f"{f}-{c}" for f, c, _ in _BOUNDS],
)
def test_a_missing_bounds_check_is_found(file: str, check: str, without: str, tmp_path: Path) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    text = (sources / file).read_text()
    assert text.count(check) == 1, f"{file} no longer has exactly one {check!r}"
    (sources / file).write_text(text.replace(check, without))
    result = _run_case(sources)
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr or "errors [" in result.stderr
