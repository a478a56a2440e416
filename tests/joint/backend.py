"""A backend of the tests' own that computes several gradients together, and counts what it is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hyperconv_ext import functional, planner
from hyperconv_ext.backends import composite, reference
from hyperconv_ext.problem import JOINT, OPS, Plan, Problem, Wanted

from ..oracle import relative_error

NAME = "joint"
CHEAPEST = planner._cheapest
SUBSETS = tuple(product((False, True), repeat=3))  # of (input, coefficients, basis)
CALLS: list[str] = []  # what the backend was asked for, but the forward operators
MLPS: list[str] = []  # and of the coordinate MLP
ESTIMATE = {"each": 1.0, "together": 1.5}  # seconds


def _can_run(problem: Problem, algorithm: str) -> tuple[bool, str]:
    return problem.device.kind != "meta", "computes nothing there"


def _configure(problem: Problem, algorithm: str) -> tuple[None, float]:
    return None, ESTIMATE["together" if problem.wanted else "each"]


def _flops(plan: Plan) -> int:
    return 7 if plan.problem.wanted else 11


def _counted(name: str) -> Callable[..., Tensor]:
    operator = getattr(composite, name)

    def call(plan: Plan, *operands: Tensor | None) -> Tensor:
        CALLS.append(name)
        return operator(plan, *operands)

    return call


def _together(
    plan: Plan, grad: Tensor, input: Tensor, coefficients: Tensor, basis: Tensor, wanted: Wanted
) -> tuple[Tensor | None, ...]:
    """By what `composite` does for each; in place of what is not wanted nothing."""
    assert plan.problem.wanted == wanted and sum(wanted) > 1
    assert basis.shape[1:] == plan.problem.geometry.kernel_size
    CALLS.append(JOINT)
    transposed = plan.problem.op == "basis_conv_fwd"
    outer, inner = (input, grad) if transposed else (grad, input)
    through = getattr(composite, plan.problem.op)
    return (
        through(plan, grad, coefficients, basis, None) if wanted[0] else None,
        composite.basis_conv_bwd_coeff(plan, outer, inner, basis) if wanted[1] else None,
        composite.basis_conv_bwd_basis(plan, outer, inner, coefficients) if wanted[2] else None,
    )


def _mlp_forward(*arguments: object) -> Tensor:
    MLPS.append("forward")
    return reference.coordinate_mlp(*arguments)


def _mlp_backward(
    grad: Tensor, coordinates: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *settings
) -> list[Tensor]:
    MLPS.append("backward")

    def basis(*parameters: Tensor) -> Tensor:
        half = len(parameters) // 2
        constant = grad.shape[0] > weights[-1].shape[0]
        layers = parameters[:half], parameters[half:]
        return reference.coordinate_mlp(coordinates, *layers, *settings, constant)

    return list(torch.func.vjp(basis, *weights, *biases)[1](grad))


def _hyper_conv(
    plan: Plan, input: Tensor, coefficients: Tensor, coordinates: Tensor, *rest: object
) -> tuple[Tensor, Tensor]:
    *mlp, bias = rest
    constant = coefficients.shape[2] > mlp[0][-1].shape[0]
    basis = _mlp_forward(coordinates, *mlp, constant)
    shaped = basis.view(-1, *plan.problem.geometry.kernel_size)
    return getattr(composite, plan.problem.op)(plan, input, coefficients, shaped, bias), basis


ENGINE = SimpleNamespace(
    ALGORITHMS=composite.ALGORITHMS,
    can_run=_can_run,
    configure=_configure,
    flops=_flops,
    joins_on=lambda device: device.kind != "meta",
    **{name: _counted(name) for name in OPS},
    **{JOINT: _together},
    can_evaluate=lambda widths, dtype, device: (True, ""),
    coordinate_mlp_fwd=_mlp_forward,
    coordinate_mlp_bwd=_mlp_backward,
    hyper_conv_fwd=_hyper_conv,
)


def shapes(dims: int, groups: int, transposed: bool) -> list[tuple[int, ...]]:
    """Of (input, coefficients, basis, bias), with 4 channels of the input and 6 of the output."""
    coefficients = (4, 6 // groups, 3) if transposed else (6, 4 // groups, 3)
    return [(2, 4, *(5, 6, 4)[:dims]), coefficients, (3, *(3, 2, 3)[:dims]), (6,)]


def convolution(dims: int, groups: int, transposed: bool, backend: str) -> Callable[..., Tensor]:
    name = f"basis_conv_transpose{dims}d" if transposed else f"basis_conv{dims}d"
    function, options = getattr(functional, name), {"stride": 2, "padding": 1, "groups": groups}
    return lambda *operands: function(*operands, **options, backend=backend)


def leaves(tensors: Sequence[Tensor], wanted: Sequence[bool] = (True,) * 4) -> list[Tensor]:
    return [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]


def cotangent(output: Tensor) -> Tensor:
    numbers = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    return torch.empty_like(output).copy_(numbers.view(output.shape))


def gradients(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], **options: bool
) -> list[Tensor]:
    output = function(*leaves)
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    return list(torch.autograd.grad(output, asked, cotangent(output), **options))


def identical(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride()
        assert torch.equal(one, other)


def close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert relative_error(one.detach(), other.detach().double()) <= tolerance, f"tensor {number}"


def of_their_own(wanted: Sequence[bool], transposed: bool) -> list[str]:
    """The operators of each gradient."""
    through_input = OPS[int(not transposed)]
    return [op for op, want in zip((through_input, *OPS[2:]), wanted, strict=True) if want]


both_ways = pytest.mark.parametrize("transposed", [False, True])
