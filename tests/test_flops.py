"""What `FlopCounterMode` counts of a layer: what is executed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hyperconv_ext import HyperConv2d, HyperConvTranspose2d, functional, ops, planner
from hyperconv_ext.backends import BACKENDS

from .conftest import FUSED

every_backend = pytest.mark.parametrize("backend", ["composite", *FUSED])
TAPS, RANK, CHANNELS, POSITIONS = 25, 5, (16, 32), 2 * 9 * 10
MLP = 2 * TAPS * (2 * 16 + 16 * 16 + 16 * 4 + 4 * RANK)


def _counted(
    layer: Callable[[torch.Tensor], torch.Tensor], input: torch.Tensor, backward: bool = False
) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        output = layer(input)
        if backward:
            output.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return {str(operator).split(".")[1]: count for operator, count in counts.items()}


def _layer(backend: str, device) -> tuple[HyperConv2d, torch.Tensor]:
    layer = HyperConv2d(*CHANNELS, 5, padding=2, backend=backend, device=device)
    return layer, torch.randn(2, 16, 9, 10, device=device, requires_grad=True)


def test_composite_is_z_and_the_product_with_a(device) -> None:
    layer, input = _layer("composite", device)
    basis = 2 * POSITIONS * CHANNELS[0] * RANK * TAPS
    mixed = 2 * POSITIONS * CHANNELS[0] * RANK * CHANNELS[1]
    assert _counted(layer, input) == {"mm": MLP, "basis_conv_fwd": basis + mixed}
    step = _counted(layer, input, backward=True)
    for name in ("basis_conv_bwd_input", "basis_conv_bwd_coeff", "basis_conv_bwd_basis"):
        assert step[name] == basis + mixed


@every_backend
def test_what_the_plan_executes(backend: str, device) -> None:
    """Of the function, since the counter watches every module and a watched MLP is not fused."""
    layer, input = _layer(backend, device)
    mlp = layer._mlp()
    weights, biases = ([t.detach().requires_grad_() for t in ts] for ts in (mlp.weights, mlp.biases))
    coefficients = layer.coefficients.detach().requires_grad_()

    def function(x: torch.Tensor) -> torch.Tensor:
        arguments = (x, coefficients, weights, biases, 5)
        network = {"activation": mlp.activation, "weight_gain": mlp.weight_gain, "linear_output": True}
        options = {"coordinates": layer.coordinates, "padding": 2, "backend": backend}
        return functional.hyper_conv2d(*arguments, **network, **options)

    forward, step = _counted(function, input), _counted(function, input, backward=True)
    _, geometry = layer.geometry(input)
    tensors = (function(input).detach(), input.detach(), coefficients.detach(), layer.basis().detach())
    planned = []
    for slot in range(4):
        operands = [tensor for other, tensor in enumerate(tensors) if other != slot]
        plan = planner.plan(ops.problem_of(slot, operands, geometry), backend)
        planned.append(int(BACKENDS[backend].flops(plan)))
    assert min(planned) > 0 and sum(forward.values()) == planned[0] + MLP
    first = 2 * TAPS * 2 * 16  # the gradient of the coordinates, which nobody asks for
    again = MLP if backend in FUSED else 0  # the kernel forms the features once more
    assert sum(step.values()) == sum(planned) + 3 * MLP - first + again


@pytest.mark.parametrize("backend", FUSED)
def test_an_activation_counts_nothing(backend: str, device) -> None:
    """A last layer that is linear is one more product: with it what the same layer with one counts."""
    shapes = ((1, 3, 5, 6), (4, 3, 3), (5, 2), (2, 5), (5,), (2,))
    input, coefficients, *mlp = (torch.randn(s, device=device, requires_grad=True) for s in shapes)
    counted = []
    for options in ({}, {"weight_gain": 0.3, "linear_output": True}):

        def function(x: torch.Tensor) -> torch.Tensor:
            arguments = (x, coefficients, mlp[:2], mlp[2:], 3)
            return functional.hyper_conv2d(*arguments, **options, backend=backend)  # noqa: B023

        counted.append(_counted(function, input, backward=True))
    plain, chosen = counted
    assert plain == chosen and chosen["coordinate_mlp_bwd"] > 0


def test_reference_counts_itself(device) -> None:
    layer, input = _layer("reference", device)
    weight = 2 * CHANNELS[0] * CHANNELS[1] * RANK * TAPS
    dense = 2 * POSITIONS * CHANNELS[0] * CHANNELS[1] * TAPS
    assert _counted(layer, input) == {"mm": MLP + weight, "convolution": dense}


@every_backend
def test_fake_tensors(backend: str, device) -> None:
    """Counted without computing, and of a GPU that need not be here."""
    real = _counted(*_layer(backend, device))
    with FakeTensorMode():
        assert _counted(*_layer(backend, device)) == real
        input = torch.empty(2, 16, 9, 10, device="cuda")
        coefficients = torch.empty(32, 16, RANK, device="cuda")
        basis = torch.empty(RANK, 5, 5, device="cuda")
        counted = _counted(
            lambda x: functional.basis_conv2d(x, coefficients, basis, padding=2, backend=backend), input
        )
    assert counted["basis_conv_fwd"] >= 2 * POSITIONS * CHANNELS[0] * RANK * (TAPS + CHANNELS[1])


@every_backend
def test_nothing_to_compute(backend: str, device) -> None:
    """And a transposed one, whose operator is the input gradient."""
    layer = HyperConvTranspose2d(3, 4, 3, backend=backend, device=device)
    assert sum(_counted(layer, torch.randn(2, 3, 5, 4, device=device)).values()) > 0
    coefficients, basis = torch.randn(4, 3, 2, device=device), torch.randn(2, 3, 3, device=device)

    def function(input: torch.Tensor) -> torch.Tensor:
        return functional.basis_conv2d(input, coefficients, basis, backend=backend)

    with FlopCounterMode(display=False) as counter:
        function(torch.randn(0, 3, 5, 4, device=device))
    assert counter.get_total_flops() == 0
