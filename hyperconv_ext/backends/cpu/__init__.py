"""The C++ engine for CPUs: csrc/cpu/, in a shared library loaded when first asked for.

Two algorithms: `basis` forms z tap by tap, `fft` by transforms of tiles, whose cost hardly depends on
the kernel size. Either multiplies a tile's z at once and keeps nothing of it.
"""

from __future__ import annotations

from typing import Any

from ...problem import Device, Plan, Problem
from . import launch, library, mlp, tiles

ALGORITHMS = ("basis", "fft")


def _device_reason(device: Device, dtype: str) -> str:
    """Why the engine does not run on this device in this dtype, or ''."""
    if library.reason():
        return library.reason()
    if device.kind != "cpu":
        return f"the tensors are on {device.kind}; move them to a CPU"
    if dtype not in library.DTYPES:
        return f"it takes {', '.join(library.DTYPES)}, not {dtype}"
    return ""


def can_run(problem: Problem, algorithm: str) -> tuple[bool, str]:
    """Whether this backend takes `problem`, and why not."""
    reason = _device_reason(problem.device, problem.dtype)
    if not reason and tiles.choose(problem, algorithm) is None:
        reason = tiles.why_no_transform(problem)
    return not reason, reason


def configure(problem: Problem, algorithm: str) -> tuple[Any, float]:
    """The tile and its estimated seconds."""
    choice = tiles.choose(problem, algorithm)
    if choice is None:
        raise ValueError(f"no tile computes {problem}; ask can_run first")
    return choice


def joins_on(device: Device) -> bool:
    """Whether several gradients of a layer can be computed together there."""
    return device.kind == "cpu" and not library.reason()


def flops(plan: Plan) -> float:
    """Operations that the engine executes."""
    return tiles.flops(plan.problem, plan.tile)


basis_conv_fwd = launch.basis_conv_fwd
basis_conv_bwd_input = launch.basis_conv_bwd_input
basis_conv_bwd_coeff = launch.basis_conv_bwd_coeff
basis_conv_bwd_basis = launch.basis_conv_bwd_basis
basis_conv_bwd = launch.basis_conv_bwd
hyper_conv_fwd = launch.hyper_conv_fwd
can_evaluate = mlp.can_evaluate
coordinate_mlp_fwd = mlp.coordinate_mlp_fwd
coordinate_mlp_bwd = mlp.coordinate_mlp_bwd
outruns_dense = tiles.outruns_dense
