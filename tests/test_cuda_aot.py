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
@pytest.mark.parametrize("architecture", sampled(cubin.ARCHITECTURES, lambda name: name == "90a"))
def test_every_kernel_compiles_clean(architecture: str) -> None:
    """By the command that prints the table, which is left in build/aot/."""
    command = [sys.executable, "-m", "tests.cubin", architecture]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cubin.ROOT, check=False)
    marked = "\n".join(row for row in result.stdout.splitlines() if "<-" in row)
    assert result.returncode == 0, marked or result.stderr
    *rows, last = result.stdout.splitlines()
    assert len(rows) >= len(cubin.MULTIPLY)
    if last.startswith(bounds_file.NOT_COMPARED):
        pytest.skip(f"{last}; everything else passed")
