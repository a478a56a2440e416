"""Configurations compile for three GPU generations: unspilled, on tensor cores.

Nor is a bound worse than those of `tests/bounds/`, as far as that compiler's are committed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from . import bounds_file
from .conftest import sampled

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("capability", "every"), sampled([(90, 10), (80, 1), (90, 1), (100, 1)], lambda row: row == (90, 10))
)
def test_configurations_compile_clean(capability: int, every: int) -> None:
    """All, or those of one tile in so many. In a process of its own: interpreter and compiler exclude
    each other.

    The table is left in build/aot/.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.aot", str(capability), "--every", str(every)]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    table = ROOT / "build" / "aot" / f"sm_{capability}.txt"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(result.stdout)
    marked = "\n".join(row for row in result.stdout.splitlines() if "<-" in row)
    assert result.returncode == 0, marked or result.stderr
    *rows, last = result.stdout.splitlines()
    assert len(rows) > 100 // every
    if last.startswith(bounds_file.NOT_COMPARED):
        pytest.skip(f"{last}; everything else passed")
