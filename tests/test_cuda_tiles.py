"""Every instantiation of csrc/ in every mode of its pipeline, and TF32."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from hyperconv_ext import ops
from hyperconv_ext.backends.cuda import launch, library, tiles
from hyperconv_ext.backends.library import (
    convolution,
    convolution_input_gradient,
    convolution_weight_gradient,
)
from hyperconv_ext.backends.reference import materialize_weight
from hyperconv_ext.geometry import Geometry
from hyperconv_ext.problem import OPS, Op, Plan, Problem

from .conftest import sampled
from .oracle import CASES, NAMES, Case, check, draw, evaluate, relative_error

pytestmark = pytest.mark.skipif(bool(library.reason()), reason=library.reason())
hosted = pytest.mark.skipif(
    not library.reason() and not library.executes_on_cpu(), reason="the kernels run on a GPU"
)
RUNS: dict[str, Op] = {
    "basis_conv": "basis_conv_fwd",
    "coefficient_gradient": "basis_conv_bwd_coeff",
    "basis_gradient": "basis_conv_bwd_basis",
}
# Units of a block over (images, depth, height, width).
_GRIDS = {1: (1, 1, 1, 2), 2: (2, 1, 2, 1), 4: (2, 1, 2, 2), 8: (1, 1, 4, 4)}


def operands_of(
    op: Op,
    dtype: torch.dtype,
    device: torch.device,
    rank: int,
    channels: int = 80,
    batch: int = 3,
) -> tuple[Tensor, ...]:
    input = torch.randn(batch, 32, 9, 10, device=device, dtype=dtype)
    grad = torch.randn(batch, channels, 9, 10, device=device, dtype=dtype)
    input, grad = (t.contiguous(memory_format=torch.channels_last) for t in (input, grad))
    coefficients = torch.randn(channels, 32, rank, device=device, dtype=dtype)
    basis = torch.randn(rank, 5, 6, device=device)
    return {
        "basis_conv_fwd": (input, coefficients, basis),
        "basis_conv_bwd_input": (grad, coefficients, basis),
        "basis_conv_bwd_coeff": (grad, input, basis),
        "basis_conv_bwd_basis": (grad, input, coefficients),
    }[op]


GEOMETRY = Geometry.conv((9, 10), (5, 6), (1, 1), "same", (1, 1), 1)


def problem_for(op: Op, operands: tuple[Tensor, ...], number: str) -> Problem:
    problem = ops.problem_of(OPS.index(op), operands, GEOMETRY)
    return dataclasses.replace(problem, tf32=number == "tf32")


def tile_for(problem: Problem, kernel: tiles.Kernel, warps: int, slice: int, stages: int) -> tiles.Tile:
    unit, grid = (1, 4, 4), _GRIDS[warps]
    map = tiles.map_of(problem, unit, grid)
    slice = min(slice, map.chunks)
    size = tiles.shared_bytes(problem, kernel, map, slice, stages)
    return tiles.Tile(kernel, unit, grid, slice, stages, size)


def run_tile(problem: Problem, tile: tiles.Tile, operands: tuple[Tensor, ...]) -> Tensor:
    bias = (None,) if problem.op in ("basis_conv_fwd", "basis_conv_bwd_input") else ()
    return getattr(launch, problem.op)(Plan(problem, "cuda", "basis", tile, 0.0), *operands, *bias)


def _modes() -> list[tuple[tiles.Kernel, int, int, int]]:
    """Instantiations x (warps, slice, halos in shared memory)."""
    modes = []
    for kernel in tiles.ALL:
        modes += [(kernel, 4, 99, 2), (kernel, 2, 99, 1), (kernel, 8, 99, 2)]
        if kernel.family != "basis_gradient":
            modes += [(kernel, 4, 3, 2), (kernel, 1, 2, 1)]
    return modes


@pytest.mark.parametrize(
    ("kernel", "warps", "slice", "stages"),
    sampled(_modes(), lambda row: row[1:3] == (4, 99) or row[0].number == "half"),
    ids=str,
)
def test_instantiation(kernel, warps: int, slice: int, stages: int, device, poisoned) -> None:
    dtype = torch.bfloat16 if kernel.number == "half" else torch.float32
    op = RUNS[kernel.family]
    operands = operands_of(op, dtype, device, 7)
    problem = problem_for(op, operands, kernel.number)
    actual = run_tile(problem, tile_for(problem, kernel, warps, slice, stages), operands)

    def composite(tensors: tuple[Tensor, ...]) -> Tensor:
        return ops.form(OPS.index(op), GEOMETRY, "composite", "auto", None, *tensors)

    truth = composite(tuple(t.double() for t in operands))
    if kernel.number == "tf32":
        assert relative_error(actual, truth) < 2.0**-10  # operands of 11 bits
    else:
        check(str(kernel), actual, truth, composite(operands).to(actual.dtype))


@pytest.mark.parametrize("op", ["basis_conv_bwd_coeff", "basis_conv_bwd_basis"])
def test_more_items_than_are_located_ahead(op: Op, device, poisoned) -> None:
    """Blocks that each work through three batches of items and a bit of a fourth."""
    operands = operands_of(op, torch.float16, device, 2, channels=16, batch=37)
    problem = problem_for(op, operands, "half")
    kernel = next(k for k in tiles.ALL if (k.family, k.number) == (tiles.family(problem), "half"))
    tile = tile_for(problem, kernel, 1, 99, 2)
    blocks = tiles.map_of(problem, tile.unit, tile.grid).blocks
    items = blocks * (2 if op == "basis_conv_bwd_basis" else 1) // tiles.shares(problem, tile)[0]
    assert items > 96
    actual = run_tile(problem, tile, operands)
    wide = tuple(t.double() for t in operands)
    truth = ops.form(OPS.index(op), GEOMETRY, "composite", "auto", None, *wide)
    assert relative_error(actual, truth) < 2.0**-10


def test_all_instantiations_have_a_test() -> None:
    """`tiles.ALL` is what csrc/ instantiates: any other choice is refused."""
    operands = operands_of("basis_conv_fwd", torch.float32, torch.device("cpu"), 3)
    problem = problem_for("basis_conv_fwd", operands, "ieee")
    kernel = tiles.Kernel("basis_conv", "ieee", 32, 1)
    tile = tile_for(problem, kernel, 4, 99, 2)
    operands = tuple(t.to("cuda" if not library.executes_on_cpu() else "cpu") for t in operands)
    with pytest.raises(RuntimeError, match="basis_conv: the planned tile is not one of this library"):
        run_tile(problem, tile, operands)


def test_shared_memory_of_the_plan_is_that_of_the_kernel(device) -> None:
    """The planner's arithmetic and the kernels' own; a difference is refused, not overrun."""
    for kernel in tiles.ALL:
        op = RUNS[kernel.family]
        dtype = torch.bfloat16 if kernel.number == "half" else torch.float32
        operands = operands_of(op, dtype, device, 5)
        problem = problem_for(op, operands, kernel.number)
        tile = tile_for(problem, kernel, 4, 99, 2)
        wrong = dataclasses.replace(tile, shared_bytes=tile.shared_bytes - 128)
        with pytest.raises(RuntimeError, match="the planned tile is not one"):
            run_tile(problem, wrong, operands)


def to_tf32(tensor: Tensor) -> Tensor:
    """float32 rounded to the 10 explicit bits of TF32, ties away from zero."""
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


class _Tf32Convolution(torch.autograd.Function):
    """The framework's TF32 convolution: operands rounded, products summed in float32."""

    @staticmethod
    def forward(ctx, input, weight, geometry):
        ctx.save_for_backward(input, weight)
        ctx.geometry = geometry
        return convolution(to_tf32(input), to_tf32(weight), None, geometry, geometry.groups)

    @staticmethod
    def backward(ctx, grad):
        input, weight = map(to_tf32, ctx.saved_tensors)
        grad, geometry = to_tf32(grad), ctx.geometry
        return (
            convolution_input_gradient(grad, weight, geometry, geometry.groups),
            convolution_weight_gradient(grad, input, weight.shape, geometry, geometry.groups),
            None,
        )


def _tf32_reference(case: Case, tensors: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """Output and four gradients of building W and convolving in TF32."""
    from hyperconv_ext.checks import conv_geometry, meta

    leaves = [t.clone().requires_grad_() for t in tensors]
    input, coefficients, basis, bias = leaves
    pairs = [(v, v) if isinstance(v, int) else v for v in (case.stride, case.dilation)]
    padding = case.padding
    if isinstance(padding, int):
        padding = (padding, padding)
    geometry = conv_geometry(meta("input", input), case.kernel, pairs[0], padding, pairs[1], case.groups)
    weight = materialize_weight(coefficients, basis)
    output = _Tf32Convolution.apply(input, weight, geometry) + bias.view(1, -1, 1, 1)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(output.dtype))]


@hosted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tf32(case: Case, device, poisoned) -> None:
    """As test_operators does, against what TF32 costs the framework."""
    tensors = draw(case, torch.float32, device)
    wide = [t.double() for t in tensors]
    output = evaluate(case, wide, None, "contiguous", backend="reference")[0]
    cotangent = torch.randn(output.shape).double()
    truth = evaluate(case, wide, cotangent, "contiguous", backend="reference")
    own = _tf32_reference(case, tensors, cotangent)
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    switch.fp32_precision = "tf32"
    try:
        actual = evaluate(case, tensors, cotangent, "channels_last", backend="cuda")
    finally:
        switch.fp32_precision = before
    for name, *values in zip(NAMES, actual, truth, own, strict=True):
        check(name, *values, floor=2.0**-11)  # one rounding to TF32
