"""The fused CUDA C++ backend: the kernels of csrc/, in a shared library loaded when first asked for.

Algorithm `basis`: z is formed on the tensor cores by banded (block Toeplitz) products and passes, in
registers, to the product with the coefficients. `wgmma`: the same for compute capability 9.0 alone, by
its own products and copy engine.
"""

from __future__ import annotations

import math
from typing import Any

from ...problem import Device, Plan, Problem
from .. import cost
from . import launch, library, tiles, wgmma

ALGORITHMS = ("basis", "wgmma")
# Limits of the coordinate MLP kernels: kMaxWidth and kMaxLayers in csrc/launchers.h.
MLP_WIDTH = 64
MLP_LAYERS = 8
_DTYPES = ("float32", "float16", "bfloat16")


def _device_reason(device: Device, dtype: str) -> str:
    """Why no kernel runs on this device in this dtype, or ''."""
    if library.reason():
        return library.reason()
    if dtype not in _DTYPES:
        return f"its kernels take {', '.join(_DTYPES)}, not {dtype}"
    expected = "cpu" if library.executes_on_cpu() else "cuda"
    if device.kind != expected:
        return f"the tensors are on {device.kind}; move them to a {expected.upper()} device"
    if expected == "cuda" and device.capability < 80:
        return f"it needs compute capability 8.0, this GPU has {device.capability / 10}"
    if expected == "cuda" and not library.supports(device.capability):
        return (
            f"the extension is {library.describe()}, this GPU is sm_{device.capability}; "
            f"rebuild it with TORCH_CUDA_ARCH_LIST={device.capability / 10}"
        )
    return ""


def _wgmma_reason(device: Device) -> str:
    """Why `wgmma` does not run on a device on which the others run, or ''."""
    if library.executes_on_cpu():
        return ""
    if device.capability != wgmma.CAPABILITY:
        return f"it needs compute capability 9.0, this GPU has {device.capability / 10}"
    if "90a" not in library.architectures():
        return f"the extension is {library.describe()}; rebuild it with TORCH_CUDA_ARCH_LIST=9.0a"
    return ""


def can_run(problem: Problem, algorithm: str) -> tuple[bool, str]:
    """Whether this backend takes `problem`, and why not."""
    reason = _device_reason(problem.device, problem.dtype)
    if algorithm == "wgmma":
        reason = reason or _wgmma_reason(problem.device) or wgmma.reason(problem)
        return not reason, reason
    if not reason and problem.wanted:
        reason = "its kernels compute each gradient by itself"
    if not reason and problem.rank > tiles.MAX_RANK:
        reason = f"its kernels take up to {tiles.MAX_RANK} basis functions, not {problem.rank}"
    if reason:
        return False, reason
    choice = tiles.choose(problem)
    if choice is None:
        size = tiles.shared_memory(problem) // 1024
        return False, f"no block of inputs that 16 outputs read fits in {size} KiB of shared memory"
    reason = tiles.index_limit(problem, choice[0])
    return not reason, reason


def joins_on(device: Device) -> bool:
    """Whether several gradients of a layer can be computed together there."""
    return not (_device_reason(device, "bfloat16") or _wgmma_reason(device))


def can_evaluate(widths: tuple[int, ...], dtype: str, device: Device) -> tuple[bool, str]:
    """Whether the MLP kernels take layers of these widths, and why not."""
    reason = _device_reason(device, dtype)
    if not reason and max(widths) > MLP_WIDTH:
        reason = f"its MLP kernels take layers up to {MLP_WIDTH} wide, not {max(widths)}"
    if not reason and len(widths) > MLP_LAYERS + 1:
        reason = f"its MLP kernels take up to {MLP_LAYERS} layers, not {len(widths) - 1}"
    return not reason, reason


def configure(problem: Problem, algorithm: str) -> tuple[Any, float]:
    """The tile and its estimated seconds; infinite where the CPU executes the kernels, for tests."""
    choice = wgmma.choose(problem) if algorithm == "wgmma" else tiles.choose(problem)
    if choice is None:
        raise ValueError(f"no tile fits {problem}; ask can_run first")
    tile, seconds = choice
    return tile, math.inf if problem.device.kind == "cpu" else seconds


def flops(plan: Plan) -> float:
    """Operations that the planned launches execute."""
    works = wgmma.works if plan.algorithm == "wgmma" else tiles.works
    return cost.flops(works(plan.problem, plan.tile))


basis_conv_fwd = launch.basis_conv_fwd
basis_conv_bwd_input = launch.basis_conv_bwd_input
basis_conv_bwd_coeff = launch.basis_conv_bwd_coeff
basis_conv_bwd_basis = launch.basis_conv_bwd_basis
basis_conv_bwd = launch.basis_conv_bwd
hyper_conv_fwd = launch.hyper_conv_fwd
coordinate_mlp_fwd = launch.coordinate_mlp_fwd
coordinate_mlp_bwd = launch.coordinate_mlp_bwd
