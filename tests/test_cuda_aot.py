"""The kernels of csrc/ compile for three GPU generations: no warning, no spill, on tensor cores.

Nor is a bound worse than those of `tests/bounds/`, as far as that compiler's are committed.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the disassembler is in Triton's wheel")

from setup import find_nvcc

from . import bounds_file, cubin
from .conftest import sampled

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc; put it on PATH or set CUDA_HOME")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "sources"),
    sampled(
        [
            ("90a", "coefficient_gradient_sm90.cu"),
            *((name, cubin.EVERY) for name in cubin.ARCHITECTURES),
        ],
        lambda row: row[1] != cubin.EVERY,
    ),
)
def test_kernels_compile_clean(architecture: str, sources: str) -> None:
    """By the command that prints the table, which is left in build/aot/."""
    command = [sys.executable, "-m", "tests.cubin", architecture, "--sources", sources]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cubin.ROOT, check=False)
    marked = "\n".join(row for row in result.stdout.splitlines() if "<-" in row)
    assert result.returncode == 0, marked or result.stderr
    *rows, last = result.stdout.splitlines()
    assert len(rows) >= (len(cubin.MULTIPLY) if sources == cubin.EVERY else 1)
    if last.startswith(bounds_file.NOT_COMPARED):
        pytest.skip(f"{last}; everything else passed")
