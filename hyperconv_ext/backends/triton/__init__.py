"""The fused Triton backend. Importing it needs no triton: `can_run` says what is missing.

Algorithms: `basis` forms z on chip by banded (block Toeplitz) products and feeds it to the product
with the coefficients; `direct` is an implicit GEMM whose weight tile is built on chip. The
coefficient and basis gradients have one algorithm each, which either name selects.
"""

from __future__ import annotations

import math
import os
import re
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from ...problem import Device, Plan, Problem
from .. import cost
from . import tiles

ALGORITHMS = ("basis", "direct")
# Widest layer of a coordinate MLP whose weights fit one block's registers, padded to a power of two.
MLP_WIDTH = 64
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


@lru_cache
def _interpreter_reason() -> str:
    """Why Triton's interpreter cannot run a kernel here, or ''."""
    try:
        numpy = version("numpy")
    except PackageNotFoundError:
        return "Triton's interpreter needs NumPy; pip install numpy"
    if _release(numpy) >= (2, 4) and () < _release(installed()) < (3, 7):
        what = f"the interpreter of Triton {installed()} does not work with NumPy {numpy}"
        return f'{what}; pip install "numpy<2.4", or Triton 3.7 or later'
    return ""


def _release(version: str) -> tuple[int, ...]:
    """(major, minor) of a version, () if it has none."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _device_reason(device: Device, dtype: str) -> str:
    """Why no kernel runs on this device in this dtype, or ''."""
    if not installed():
        return "triton is not installed; pip install triton (Linux, NVIDIA GPU)"
    if dtype not in _DTYPES:
        return f"its kernels take {', '.join(_DTYPES)}, not {dtype}"
    if device.kind == "cpu" and interpreted():
        wrong = "Triton's interpreter computes bfloat16 products wrongly; use float32 there"
        return wrong if dtype == "bfloat16" else _interpreter_reason()
    if device.kind != "cuda":
        return f"the tensors are on {device.kind}; move them to a CUDA device"
    if device.capability < 80:
        return f"it needs compute capability 8.0, this GPU has {device.capability / 10}"
    return ""


def can_run(problem: Problem, algorithm: str) -> tuple[bool, str]:
    """Whether this backend takes `problem` by `algorithm`, and why not."""
    reason = _device_reason(problem.device, problem.dtype)
    direct = tiles.kernel_of(problem, algorithm) == "direct"
    if not reason and direct and problem.rank > tiles.DIRECT_RANK:
        reason = f"direct takes up to {tiles.DIRECT_RANK} basis functions, not {problem.rank}"
    reason = reason or tiles.index_limit(problem, algorithm)
    return not reason, reason


def can_evaluate(widths: tuple[int, ...], dtype: str, device: Device) -> tuple[bool, str]:
    """Whether the MLP kernels take layers of these widths, and why not."""
    reason = _device_reason(device, dtype)
    if not reason and max(widths) > MLP_WIDTH:
        reason = f"its MLP kernels take layers up to {MLP_WIDTH} wide, not {max(widths)}"
    return not reason, reason


def configure(problem: Problem, algorithm: str) -> tuple[tiles.Tile, float]:
    """The tile and its estimated seconds; infinite in the interpreter, which is for tests."""
    tile, seconds = tiles.choose(problem, algorithm)
    return tile, math.inf if problem.device.kind == "cpu" else seconds


def flops(plan: Plan) -> float:
    """Operations that the planned launches execute."""
    return cost.flops(tiles.works(plan.problem, plan.tile))


def _deferred(name: str) -> Any:
    """A function of `launch`, which is imported (and with it triton) when it is first called."""

    def run(*args: Any) -> Any:
        return getattr(import_module(".launch", __name__), name)(*args)

    run.__name__ = name
    return run


basis_conv_fwd = _deferred("basis_conv_fwd")
basis_conv_bwd_input = _deferred("basis_conv_bwd_input")
basis_conv_bwd_coeff = _deferred("basis_conv_bwd_coeff")
basis_conv_bwd_basis = _deferred("basis_conv_bwd_basis")
hyper_conv_fwd = _deferred("hyper_conv_fwd")
coordinate_mlp_fwd = _deferred("coordinate_mlp_fwd")
coordinate_mlp_bwd = _deferred("coordinate_mlp_bwd")
