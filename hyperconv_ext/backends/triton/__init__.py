"""The fused Triton backend. Importing it needs no triton: `can_run` says what is missing.

Algorithms: `basis` forms z on chip by banded (block Toeplitz) products and feeds it to the product
with the coefficients; `direct` is an implicit GEMM whose weight tile is built on chip. The
coefficient and basis gradients have one algorithm each, which either name selects.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from ...problem import Plan, Problem
from . import tiles

ALGORITHMS = ("basis", "direct")
_DTYPES = ("float32", "float16", "bfloat16")


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, which takes CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")


@lru_cache
def installed() -> str:
    """The version of the triton package, or '' if there is none."""
    try:
        return version("triton") if find_spec("triton") else ""
    except PackageNotFoundError:
        return "unknown"


def can_run(problem: Problem, algorithm: str) -> tuple[bool, str]:
    """Whether this backend takes `problem` by `algorithm`, and why not."""
    if not installed():
        return False, "triton is not installed; pip install triton (Linux, NVIDIA GPU)"
    if problem.dtype not in _DTYPES:
        return False, f"its kernels take float32, float16 and bfloat16, not {problem.dtype}"
    if problem.device.kind == "cpu" and not interpreted():
        return False, "the tensors are on the CPU; move them to a CUDA device"
    if problem.device.kind == "cpu" and problem.dtype == "bfloat16":
        return False, "Triton's interpreter computes bfloat16 products wrongly; use float32 there"
    if problem.device.kind not in ("cpu", "cuda"):
        return False, f"it needs a CUDA device, not {problem.device.kind}"
    if problem.device.kind == "cuda" and problem.device.capability < 80:
        return False, f"it needs compute capability 8.0, this GPU has {problem.device.capability / 10}"
    if problem.geometry.dims > 3:
        return False, f"it takes up to 3 spatial axes, not {problem.geometry.dims}"
    if tiles.kernel_of(problem, algorithm) == "direct" and problem.rank > tiles.DIRECT_RANK:
        return False, f"direct takes up to {tiles.DIRECT_RANK} basis functions, not {problem.rank}"
    limit = tiles.index_limit(problem, algorithm)
    return (True, "") if not limit else (False, limit)


def configure(problem: Problem, algorithm: str) -> tuple[tiles.Tile, float]:
    """The tile and its estimated seconds; infinite in the interpreter, which is for tests."""
    tile, seconds = tiles.choose(problem, algorithm)
    return tile, math.inf if problem.device.kind == "cpu" else seconds


def _run(name: str) -> Any:
    def run(plan: Plan, *tensors: Any) -> Any:
        return getattr(import_module(".launch", __name__), name)(plan, *tensors)

    run.__name__ = name
    return run


basis_conv_fwd = _run("basis_conv_fwd")
basis_conv_bwd_input = _run("basis_conv_bwd_input")
basis_conv_bwd_coeff = _run("basis_conv_bwd_coeff")
basis_conv_bwd_basis = _run("basis_conv_bwd_basis")
