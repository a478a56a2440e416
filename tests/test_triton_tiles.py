"""Every configuration is executed against the oracle, not only those that small shapes select."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hyperconv_ext import ops
from hyperconv_ext.backends.triton import tiles
from hyperconv_ext.geometry import Geometry
from hyperconv_ext.problem import OPS, Op, Plan

from .conftest import needs, sampled
from .oracle import check

pytestmark = needs("triton")

_RUNS: dict[str, Op] = {
    "basis": "basis_conv_fwd",
    "direct": "basis_conv_fwd",
    "coefficients": "basis_conv_bwd_coeff",
    "basis_gradient": "basis_conv_bwd_basis",
}


def _kernel(tile: tiles.Tile) -> tuple[int, int]:
    """A kernel whose patch this tile can hold."""
    if not tile.resident:
        return 3, 6
    return {32: (2, 3), 64: (4, 4), 128: (7, 7)}[tile.patch]


@pytest.mark.parametrize(
    "tile", sampled(tiles.ALL, lambda tile: tile in tiles.ALL[::2]), ids=lambda tile: tile.name
)
def test_configuration(tile: tiles.Tile, device, poisoned) -> None:
    from hyperconv_ext.backends.triton import launch

    half = torch.bfloat16 if device.type == "cuda" else torch.float16
    dtype = half if tile.number == "half" else torch.float32
    kernel = _kernel(tile)
    geometry = Geometry.conv((6, 7), kernel, (1, 1), "same", (1, 1), 1)
    input = torch.randn(2, 32, 6, 7, device=device, dtype=dtype)
    grad = torch.randn(2, 48, 6, 7, device=device, dtype=dtype)
    input, grad = (t.contiguous(memory_format=torch.channels_last) for t in (input, grad))
    coefficients = torch.randn(48, 32, 3, device=device, dtype=dtype)
    basis = torch.randn(3, *kernel, device=device, dtype=dtype)
    op = _RUNS[tile.kernel]
    operands = {
        "basis_conv_fwd": (input, coefficients, basis),
        "basis_conv_bwd_coeff": (grad, input, basis),
        "basis_conv_bwd_basis": (grad, input, coefficients),
    }[op]
    slot = OPS.index(op)
    problem = ops.problem_of(slot, operands, geometry)
    problem = dataclasses.replace(problem, tf32=tile.number == "tf32")
    assert tiles.fits(problem, tile)
    bias = (None,) if op == "basis_conv_fwd" else ()
    actual = getattr(launch, op)(Plan(problem, "triton", "", tile, 0.0), *operands, *bias)

    def composite(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return ops.form(slot, geometry, "composite", "auto", None, *tensors)

    truth = composite(tuple(t.double() for t in operands))
    # z and u are rounded to the operands' type on chip, to which composite would not round float16.
    check(tile.name, actual, truth, truth.to(dtype) if tile.number == "half" else composite(operands))
