"""The CPU engine under the sanitizers, with faults that they must find; and with other instructions."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import setup
from hyperconv_ext.backends.cpu import library

from . import host_build
from .conftest import passes, sampled

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc" / "cpu"
LEVELS = {"avx512_bf16": "kAvx512Bf16", "avx512": "kAvx512", "avx2": "kAvx2", "baseline": "kBaseline"}
FLAGS = [flag for flag in setup.CPU_FLAGS if not flag.startswith("-O")]
SANITIZED = [
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]
# In place of the levels that are not compiled, each of which takes a minute.
LEFT_OUT = '#include "engine.h"\nnamespace hyperconv {{\n{engines}\n}}\n'
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(library.reason()), reason=library.reason()),
    pytest.mark.skipif(not shutil.which(host_build.COMPILER), reason="needs g++ and its sanitizers"),
]


def _build(folder: Path, capability: str, optimization: str, sources: Path = SOURCES) -> Path:
    """The engine with one level of instructions, under the sanitizers."""
    levels = setup.LEVELS | (setup.X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else {})
    level = LEVELS[capability]
    folder.mkdir(exist_ok=True)
    others = "\n".join(f"const Engine {name} = {{}};" for name in levels if name != level)
    (folder / "left_out.cpp").write_text(LEFT_OUT.format(engines=others))
    common = [host_build.COMPILER, *FLAGS, *SANITIZED, optimization, f"-I{sources}", "-c"]
    own = [*levels[level], f"-DHYPERCONV_LEVEL={level}"]
    work = [
        (sources / "level.cpp", own),
        (sources / "library.cpp", [setup.HAS_NEWEST]),
        (folder / "left_out.cpp", []),
    ]

    def compiled(item: tuple[Path, list[str]]) -> str:
        source, flags = item
        made = str(folder / f"{source.stem}.o")
        subprocess.run([*common, *flags, str(source), "-o", made], capture_output=True, check=True)
        return made

    with ThreadPoolExecutor(host_build.JOBS) as pool:
        objects = list(pool.map(compiled, work))
    path = folder / "libhyperconv_cpu.so"
    subprocess.run([host_build.COMPILER, "-shared", *SANITIZED, *objects, "-o", str(path)], check=True)
    return path


def _environment(path: Path, capability: str) -> dict[str, str]:
    """Of a process with that engine."""
    variables = {"HYPERCONV_CPU_LIBRARY": str(path), "HYPERCONV_CPU_CAPABILITY": capability}
    environment = os.environ | host_build.preload("sanitized") | variables
    # Memory that was never written is NaN.
    environment["ASAN_OPTIONS"] += ":max_malloc_fill_size=1073741824:malloc_fill_byte=255"
    return environment


def _python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


# What is to be seen: every geometry in every format with all gradients, in each layout, in one, two and
# three dimensions, with transforms of many sizes; and the coordinate MLP. First a sample.
CHOSEN = (
    (
        "(test_operators and cpu and (stride or groups or even or beyond or large)) or threads_change "
        "or (test_values_and_gradients and sine and float32)",
        30,
    ),
    (
        "(test_operators and cpu) or threads_change or transforms_over or out_of_the_ordinary "
        "or odd_rows or every_layout or every_number or test_cpu_mlp",
        301,
    ),
)


@pytest.mark.parametrize(
    ("expression", "least"),
    sampled(CHOSEN, lambda row: row is CHOSEN[0]),
    ids=["a sample", "all"],
)
def test_operators_under_the_sanitizers(expression: str, least: int, tmp_path: Path) -> None:
    capability = library.capability()
    path = _build(tmp_path / "engine", capability, "-O1")
    files = [f"tests/test_{name}.py" for name in ("operators", "cpu_engine", "cpu_numbers", "cpu_mlp")]
    chosen = ("-m", "not slow", "-k", expression)
    passes(*chosen, *files, least=least, environment=_environment(path, capability))


# (file, a check, what takes its place): beyond an input, an output, a tile; in what was never written.
FAULTS = (
    (
        "access.h",
        "store(to + c, read_part<D>(x + c, channels - c));",
        "store(to + c, Stored<D>::read(x + c));",
    ),
    ("access.h", "write_part<D>(y, v[l], positions);", "Stored<D>::write(y, v[l]);"),
    ("convolve.h", "q >= 0 && q < a.in_size", "q >= 0"),
    ("fft.h", "n >= first && n < last ?", "n >= first ?"),
    ("taps.h", "if (i >= kept) break;", ""),
    ("worker.h", "std::memset(output_, 0, positions_ * width * sizeof(T));", ""),
)
CASE = """
import torch
from tests.oracle import CASES, draw, evaluate, relative_error

torch.manual_seed(0)
errors = []
for case in CASES:
    if case.name in ("7x7", "stride and dilation", "aligned groups", "aligned, large"):
        tensors = draw(case, torch.float32, torch.device("cpu"))
        truth = evaluate(case, [t.double() for t in tensors], None, "contiguous", backend="reference")
        for layout in ("contiguous", "channels_last"):
            for algorithm in ("basis", "fft") if case.stride == 1 else ("basis",):
                choice = {"backend": "cpu", "algorithm": algorithm}
                actual = evaluate(case, tensors, None, layout, **choice)
                errors += [relative_error(a, t) for a, t in zip(actual, truth)]
raise SystemExit(0 if all(error < 1e-5 for error in errors) else f"errors {errors}")
"""


def test_the_case_without_a_fault(tmp_path: Path) -> None:
    path = _build(tmp_path / "engine", "baseline", "-O0")
    result = _python(CASE, _environment(path, "baseline"))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("file", "check", "instead"),
    sampled(FAULTS, lambda row: row is FAULTS[0]),
    ids=[f"{f}: {c}" for f, c, _ in FAULTS],
)
def test_a_missing_check_is_found(file: str, check: str, instead: str, tmp_path: Path) -> None:
    sources = tmp_path / "cpu"
    shutil.copytree(SOURCES, sources)
    text = (sources / file).read_text()
    assert text.count(check) == 1, f"{file} no longer has exactly one {check!r}"
    (sources / file).write_text(text.replace(check, instead))
    path = _build(tmp_path / "engine", "baseline", "-O0", sources)
    result = _python(CASE, _environment(path, "baseline"))
    assert result.returncode != 0
    assert "AddressSanitizer: " in result.stderr or "errors [" in result.stderr, result.stderr


# Files, and how many of their tests there are at least.
PARTS = ((("operators",), 60), (("opinfo", "cpu_engine", "cpu_numbers"), 440))


@pytest.mark.skipif("HYPERCONV_CPU_CAPABILITY" in os.environ, reason="one level was asked for")
@pytest.mark.parametrize("capability", library.CAPABILITIES)
@pytest.mark.parametrize(
    ("names", "least"),
    sampled(PARTS, lambda part: part is PARTS[0]),
    ids=["-".join(names) for names, _ in PARTS],
)
def test_with_other_instructions(names: tuple[str, ...], least: int, capability: str) -> None:
    """Every test of the engine's convolutions again, at each level but the one they have had."""
    if capability == library.capability():
        pytest.skip(f"{capability} is the level of the other tests")
    environment = os.environ | {"HYPERCONV_CPU_CAPABILITY": capability}
    code = "from hyperconv_ext.backends.cpu import library as l; print(l.reason())"
    if reason := _python(code, environment).stdout.strip():
        pytest.skip(reason)
    files = [f"tests/test_{name}.py" for name in names]
    passes("-k", "cpu", *files, least=least, environment=environment)
