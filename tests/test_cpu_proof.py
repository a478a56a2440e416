"""The CPU engine under the sanitizers."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import setup
from hyperconv_ext.backends.cpu import library

from . import host_build

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc" / "cpu"
LEVELS = {"avx512": "kAvx512", "avx2": "kAvx2", "baseline": "kBaseline"}
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
    work = [(sources / "level.cpp", own), (sources / "library.cpp", []), (folder / "left_out.cpp", [])]

    def compiled(item: tuple[Path, list[str]]) -> str:
        source, flags = item
        made = str(folder / f"{source.stem}.o")
        subprocess.run([*common, *flags, str(source), "-o", made], check=True)
        return made

    with ThreadPoolExecutor(host_build.JOBS) as pool:
        objects = list(pool.map(compiled, work))
    path = folder / "libhyperconv_cpu.so"
    subprocess.run([host_build.COMPILER, "-shared", *SANITIZED, *objects, "-o", str(path)], check=True)
    return path


def _run(path: Path, capability: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with that engine."""
    variables = {"HYPERCONV_CPU_LIBRARY": str(path), "HYPERCONV_CPU_CAPABILITY": capability}
    environment = os.environ | host_build.preload("sanitized") | variables
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


# What is to be seen: every geometry in every format with all gradients, in each layout, in one, two and
# three dimensions, with transforms of many sizes; and the coordinate MLP.
CHOSEN = (
    "(test_operators and cpu) or threads_change or transforms_over or out_of_the_ordinary or odd_rows "
    "or every_layout or every_number or test_cpu_mlp"
)


def test_operators_under_the_sanitizers(tmp_path: Path) -> None:
    capability = library.capability()
    path = _build(tmp_path / "engine", capability, "-O1")
    files = [f"tests/test_{name}.py" for name in ("operators", "cpu_engine", "cpu_numbers", "cpu_mlp")]
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "-k", CHOSEN]
    result = _run(path, capability, *command, *files)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) > 300, result.stdout[-3000:]
