"""Problems as numbers, and GPUs that need not be there."""

from __future__ import annotations

import dataclasses

from benchmarks import competitors, shapes
from hyperconv_ext.backends.cuda import tiles as cuda_tiles
from hyperconv_ext.backends.cuda import wgmma
from hyperconv_ext.backends.triton import tiles as triton_tiles
from hyperconv_ext.geometry import Geometry
from hyperconv_ext.problem import Device, Op, Plan, Problem

A100 = Device("cuda", 80, 108)
H200 = Device("cuda", 90, 132)
B200 = Device("cuda", 100, 148)


def problem(
    channels: int = 64,
    size: int = 56,
    kernel: int = 7,
    rank: int = 5,
    op: Op = "basis_conv_fwd",
    **changes: object,
) -> Problem:
    geometry = Geometry.conv((size, size), (kernel, kernel), (1, 1), "same", (1, 1), 1)
    plain = Problem(op, geometry, 32, channels, channels, rank, "bfloat16", H200, aligned=True)
    return dataclasses.replace(plain, **changes)


def shaped(
    shape: shapes.Shape,
    op: Op,
    dtype: str = "bfloat16",
    tf32: bool = False,
    aligned: bool = True,
    device: Device = H200,
) -> Problem:
    """An operator on a benchmark's shape."""
    return competitors.problem(shape, op, dtype, device, tf32, aligned)


def shares_of(plan: Plan) -> tuple[int, bool]:
    """(shares, whether they are summed by atomic additions) of the gradient of A or of phi."""
    if plan.backend == "cuda":
        module = wgmma if plan.algorithm == "wgmma" else cuda_tiles
        return module.shares(plan.problem, plan.tile)
    coefficients = plan.problem.op == "basis_conv_bwd_coeff"
    split = triton_tiles.split_coefficients if coefficients else triton_tiles.split_basis
    return split(plan.problem, plan.tile)


GPU_SHAPES = tuple(dict.fromkeys(shape for shape, _ in shapes.GPU))
