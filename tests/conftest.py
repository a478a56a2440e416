"""Where the tests run, and that no kernel gets away with an element it never wrote."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import host_build, interpreter

# Before triton is imported and the CUDA library loaded: without a GPU, Triton's kernels are executed by
# its interpreter and those of csrc/ by the host, built by its own compiler.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if shutil.which("g++") and "HYPERCONV_CUDA_LIBRARY" not in os.environ:
        os.environ["HYPERCONV_CUDA_LIBRARY"] = str(host_build.build())
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
if "TRITON_INTERPRET" in os.environ and importlib.util.find_spec("triton"):
    interpreter.quicken()

# Workers beside each other would fight for the cores that their threads wait on.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

import pytest

from hyperconv_ext import backends, planner
from hyperconv_ext.backends.cpu import library as cpu_library
from hyperconv_ext.backends.cuda import library

ON_GPU = ["cuda", "triton"]  # fused backends whose kernels a GPU runs
FUSED = [*ON_GPU, "cpu"]
QUICK = ["cuda", "cpu"]  # fused backends without an interpreter that takes seconds
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Why a fused backend cannot be tested here, or ''. A test of it, that is one with a parameter `backend`
# and the fixture `device`, is skipped with this reason.
WHY_NOT = {
    "cuda": library.reason(),
    "triton": backends.BACKENDS["triton"].can_evaluate((1,), "float32", backends.describe(DEVICE))[1],
    "cpu": cpu_library.reason(),
}


def pytest_report_header() -> list[str]:
    places = {
        "cuda": "executed by the host" if library.executes_on_cpu() else "on the GPU",
        "triton": "in its interpreter" if DEVICE.type == "cpu" else "on the GPU",
        "cpu": cpu_library.describe(),
    }
    return [
        f"backend {name} is NOT tested: {reason}" if reason else f"backend {name}: {places[name]}"
        for name, reason in WHY_NOT.items()
    ]


@pytest.hookimpl(tryfirst=True)  # before the rows are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if any(mark.kwargs["rows"](parameters) for mark in item.iter_markers("sweep_rows")):
            item.add_marker(pytest.mark.sweep)
        reason = WHY_NOT.get(parameters.get("backend"))
        if reason and "device" in set(item.fixturenames) - set(parameters):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skips a row of the CPU engine's transforms that the engine refuses, with its own reason.

    `tests/test_cpu_engine.py` says which they are.
    """
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    try:
        return (yield)
    except planner.PlanError as error:
        if (parameters.get("backend"), parameters.get("algorithm")) != ("cpu", "fft"):
            raise
        pytest.skip(str(error))


def sampled(rows: Iterable[Any], kept: Callable[[Any], bool]) -> list[Any]:
    """`rows` of parametrize: `make test` runs those that are kept, `make sweep` the others.

    For rows that take long and differ in what hardly ever fails by itself.
    """

    def other(row: Any) -> Any:
        return pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=pytest.mark.sweep)

    return [row if kept(row) else other(row) for row in rows]


def swept(rows: Callable[[dict[str, Any]], bool]) -> pytest.MarkDecorator:
    """As `sampled`, of a test with several lists of parameters: `make sweep` runs these of its rows."""
    return pytest.mark.sweep_rows(rows=rows)


def interpreted(rows: Callable[[dict[str, Any]], bool] = lambda _: True) -> pytest.MarkDecorator:
    """`swept`, of rows whose Triton kernels the interpreter executes, at seconds to minutes a row."""
    return swept(lambda row: DEVICE.type == "cpu" and row["backend"] == "triton" and rows(row))


def passes(*arguments: str, least: int, environment: Mapping[str, str]) -> None:
    """What pytest chooses by `arguments`, in a process of its own: `least` tests or more, which pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    root, env = Path(__file__).parents[1], dict(environment)
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-3000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) >= least, result.stdout[-3000:]


def needs(backend: str) -> pytest.MarkDecorator:
    """Skips a test of a fused backend where that cannot be tested, with the reason."""
    return pytest.mark.skipif(bool(WHY_NOT[backend]), reason=WHY_NOT[backend])


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU where there is one, but for tests of the CPU engine."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    return device_of(parameters.get("backend", "auto"))


def device_of(backend: str) -> torch.device:
    """Where a backend is tested."""
    return torch.device("cpu") if backend == "cpu" else DEVICE


@pytest.fixture
def compiler() -> Iterator[None]:
    """Without what earlier tests compiled, which counts towards the limit of recompilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def best_instructions() -> str:
    """Of the CPU engine's levels the best that this processor runs, as PyTorch finds it."""
    names = {"AVX512": "avx512", "AVX2": "avx2"}
    name = names.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    return "avx512_bf16" if name == "avx512" and torch.cpu._is_avx512_bf16_supported() else name


def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many tiny convolutions: with threads beside other test workers, ten times as long."""
    yield from _threads(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """With one, PyTorch takes other libraries for its convolutions."""
    yield from _threads(2)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN (floats) or a huge number (integers)."""

    def poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def poison(*args: object, **options: object) -> torch.Tensor:
            fresh = allocate(*args, **options)
            return fresh.fill_(float("nan") if fresh.is_floating_point() else 1 << 29)

        return poison

    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoning(getattr(torch.Tensor, name)))


def backend_algorithms() -> list[tuple[str, str]]:
    """Every (backend, algorithm) that computes all operators; for `wgmma` see test_cuda_wgmma.py."""
    return [
        (name, algorithm)
        for name, module in backends.BACKENDS.items()
        if name == "composite" or name in FUSED
        for algorithm in module.ALGORITHMS
        if algorithm != "wgmma"
    ]


def dtypes_of(backend: str, device: torch.device) -> list[torch.dtype]:
    """The dtypes a backend can be tested in on this machine."""
    if backend == "composite":
        return [torch.float64, torch.float32, torch.bfloat16]
    if backend == "cpu":
        return [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    if backend == "triton" and device.type == "cpu":
        return [torch.float32, torch.float16]  # the interpreter multiplies bfloat16 wrongly
    return [torch.float32, torch.float16, torch.bfloat16]


@contextmanager
def precision_of_the_framework(device: torch.device) -> Iterator[None]:
    """Float32 products as the framework's own convolutions form them on this device: on the CPU in IEEE.

    The switch that allows TF32 is about the GPU; csrc/ executed by the host would follow it.
    """
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    if device.type == "cpu":
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before
