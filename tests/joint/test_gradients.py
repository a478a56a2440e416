"""Several gradients of a layer together: their values and derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from unittest import mock

import pytest
import torch
from torch import Tensor

from hyperconv_ext import (
    HyperConv1d,
    HyperConv2d,
    HyperConv3d,
    HyperConvTranspose2d,
    functional,
    planner,
)
from hyperconv_ext.backends import BACKENDS
from hyperconv_ext.geometry import Geometry
from hyperconv_ext.ops import execution
from hyperconv_ext.problem import JOINT, OPS, Plan, Problem, Wanted

from ..conftest import swept
from ..oracle import FLOOR, relative_error
from . import backend as joint

CONVOLUTIONS = [(1, 1), (2, 1), (2, 2), (3, 2)]  # (dims, groups)


@joint.both_ways
@pytest.mark.parametrize(("dims", "groups"), CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_subset(dtype: torch.dtype, dims: int, groups: int, transposed: bool, device) -> None:
    """To the bit, dtype and strides what the operators of each give; one call from two gradients on."""
    tensors = [torch.randn(s, device=device).to(dtype) for s in joint.shapes(dims, groups, transposed)]
    tensors[0] = tensors[0].movedim(1, -1).contiguous().movedim(-1, 1)
    tensors[2] = tensors[2].float() if dtype == torch.bfloat16 else tensors[2]
    for wanted, has_bias in product(joint.SUBSETS[1:], (False, True)):
        leaves = joint.leaves(tensors, (*wanted, True))[: 3 + has_bias]
        separate = joint.convolution(dims, groups, transposed, "composite")
        expected = joint.gradients(separate, leaves)
        joint.CALLS.clear()
        actual = joint.gradients(joint.convolution(dims, groups, transposed, joint.NAME), leaves)
        joint.identical(actual, expected)
        own = [JOINT] if sum(wanted) > 1 else joint.of_their_own(wanted, transposed)
        assert joint.CALLS[1:] == own


@joint.both_ways
@pytest.mark.parametrize(("dims", "groups"), CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ["cpu"])
def test_every_subset_by_an_engine(
    backend: str, dtype: torch.dtype, dims: int, groups: int, transposed: bool, device, monkeypatch
) -> None:
    """Against float64; one call of the engine from two gradients on."""
    tensors = [torch.randn(s, device=device).to(dtype) for s in joint.shapes(dims, groups, transposed)]
    tensors[0] = tensors[0].movedim(1, -1).contiguous().movedim(-1, 1)
    wide = [t.double() for t in tensors]
    monkeypatch.setattr(planner, "_cheapest", _together_if_possible)
    engine = BACKENDS[backend]
    with mock.patch.object(engine, JOINT, wraps=getattr(engine, JOINT)) as called:
        for wanted in joint.SUBSETS[1:]:
            called.reset_mock()
            leaves, exact = joint.leaves(tensors, (*wanted, True)), joint.leaves(wide, (*wanted, True))
            actual = joint.gradients(joint.convolution(dims, groups, transposed, backend), leaves)
            expected = joint.gradients(joint.convolution(dims, groups, transposed, "composite"), exact)
            assert called.call_count == (sum(wanted) > 1)
            for one, other, leaf in zip(actual, expected, leaves, strict=False):
                assert one.dtype == leaf.dtype or dtype == torch.bfloat16
                assert relative_error(one, other) <= 4 * FLOOR[dtype]


def _together_if_possible(problem: Problem, rows: list[tuple[str, str, str]]) -> Plan | None:
    """What takes no time is cheaper than anything of its own."""
    plan = joint.CHEAPEST(problem, rows)
    return plan if plan is None or not problem.wanted else replace(plan, seconds=0.0)


@joint.both_ways
def test_taps_that_meet_no_input(transposed: bool, device) -> None:
    """Are not there for the backend, and have the gradient zero."""
    shapes = [(1, 3, 3, 4), (3, 3, 2), (2, 15, 13), (3,)]
    leaves = joint.leaves([torch.randn(shape, device=device) for shape in shapes])
    function = functional.basis_conv_transpose2d if transposed else functional.basis_conv2d

    def convolution(backend: str) -> Callable[..., Tensor]:
        padding = (8, 6) if transposed else (7, 6)
        return lambda *operands: function(*operands, padding=padding, backend=backend)

    expected = joint.gradients(convolution("composite"), leaves)
    joint.CALLS.clear()
    joint.identical(joint.gradients(convolution(joint.NAME), leaves), expected)
    assert joint.CALLS[1:] == [JOINT]
    assert expected[2].any() and not expected[2][:, 0].any()


@pytest.mark.parametrize("kind", [HyperConv1d, HyperConv2d, HyperConv3d, HyperConvTranspose2d])
def test_of_a_layer(kind, device) -> None:
    """Whose forward pass is one operator from the MLP on."""
    layer = kind(4, 6, 3, padding=1, activation="tanh", backend=joint.NAME, device=device)
    twin = kind(4, 6, 3, padding=1, activation="tanh", backend="composite", device=device)
    twin.load_state_dict(layer.state_dict())
    input = torch.randn(2, 4, *(5, 4, 6)[: layer.dims], device=device)
    assert type(layer(input).grad_fn).__name__ == "HyperConvFunctionBackward"
    for needs_input, frozen in product((False, True), repeat=2):
        results = []
        for one in (twin, layer):
            joint.CALLS.clear()
            joint.MLPS.clear()
            one.hypernet.requires_grad_(not frozen)
            x = input.detach().requires_grad_(needs_input)
            asked = [t for t in (x, *one.parameters()) if t.requires_grad]
            output = one(x)
            results.append(torch.autograd.grad(output, asked, joint.cotangent(output)))
        wanted = (needs_input, True, not frozen)
        own = [JOINT] if sum(wanted) > 1 else joint.of_their_own(wanted, layer.transposed)
        assert own == joint.CALLS and len(joint.MLPS) == 2 - frozen
        joint.close(results[1], results[0])


def test_a_gradient_of_phi_beside_that_of_the_output(device) -> None:
    """The operator has two results; through phi alone there is nothing to do together."""
    layer = HyperConv2d(4, 6, 3, backend=joint.NAME, device=device)
    input = torch.randn(2, 4, 5, 6, device=device)
    _, geometry = layer.geometry(input)
    coordinates, weights, biases, *settings = layer._mlp()
    tensors = (input, layer.coefficients, coordinates, list(weights), list(biases), layer.bias)
    choice = (False, *execution.flatten(geometry), joint.NAME, "auto")

    asked = [*layer.hypernet.parameters()]

    def gradients(*chosen: bool) -> tuple[Tensor, ...]:
        joint.CALLS.clear()
        output, basis = torch.ops.hyperconv_ext.hyper_conv_fwd(*tensors, *settings, *choice)
        terms = [output.square().sum(), basis.pow(3).sum()]
        value = sum(term for term, wanted in zip(terms, chosen, strict=True) if wanted)
        return torch.autograd.grad(value, asked)

    parts = gradients(True, False), gradients(False, True)
    assert not joint.CALLS
    together = gradients(True, True)
    assert joint.CALLS == [JOINT]
    joint.close(together, [a + b for a, b in zip(*parts, strict=True)])


@joint.both_ways
@pytest.mark.parametrize("backend", [joint.NAME, "cpu"])
def test_gradgradcheck(backend: str, transposed: bool, device) -> None:
    shapes = [(1, 2, 3, 4), (2, 2, 2), (2, 2, 3), (2,)]
    leaves = joint.leaves([torch.randn(s, dtype=torch.float64, device=device) for s in shapes])
    function = functional.basis_conv_transpose2d if transposed else functional.basis_conv2d

    def convolution(*operands: Tensor) -> Tensor:
        return function(*operands, padding=1, backend=backend)

    assert torch.autograd.gradcheck(convolution, leaves)
    assert JOINT in joint.CALLS or backend != joint.NAME
    assert torch.autograd.gradgradcheck(convolution, leaves)


@joint.both_ways
def test_derivatives_of_higher_order(transposed: bool, device) -> None:
    """The first of two backward passes is recorded, operator by operator; the second is joint again."""
    tensors = [torch.randn(shape, device=device) for shape in joint.shapes(2, 1, transposed)]
    results = []
    for backend in ("composite", joint.NAME):
        leaves, function = joint.leaves(tensors), joint.convolution(2, 1, transposed, backend)
        value = function(*leaves).pow(3).sum()
        for _ in range(2):
            first = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum(gradient.square().sum() for gradient in first)
            assert JOINT not in joint.CALLS
        results.append(torch.autograd.grad(value, leaves))
    joint.identical(results[1], results[0])
    assert JOINT in joint.CALLS


@swept(lambda row: not all(row["wanted"]) and row["wanted"] != (True, False, True))
@joint.both_ways
@pytest.mark.parametrize("wanted", joint.SUBSETS)
@pytest.mark.parametrize("backend", [joint.NAME, "composite", "cpu"])
def test_opcheck(backend: str, wanted: Wanted, transposed: bool, device) -> None:
    operands, rest = _operands(transposed, device)
    arguments = (wanted, transposed, *rest, backend, "auto")
    operator = getattr(torch.ops.hyperconv_ext, JOINT).default
    for recorded in (False, True):
        leaves = [t.detach().requires_grad_(recorded) for t in operands]
        if any(wanted) or not recorded:
            torch.library.opcheck(operator, (*leaves, *arguments))


def _operands(transposed: bool, device) -> tuple[list[Tensor], tuple[object, ...]]:
    """(grad, input, coefficients, basis) of a layer in two groups, and its geometry spelled out."""
    geometry = Geometry.conv((5, 4), (2, 3), (1, 1), "same", (1, 1), 2)
    grad, input = torch.randn(2, 6, 5, 4, device=device), torch.randn(2, 4, 5, 4, device=device)
    pair = [input, grad] if transposed else [grad, input]
    coefficients, basis = torch.randn(6, 2, 3, device=device), torch.randn(3, 2, 3, device=device)
    return [*pair, coefficients, basis], execution.flatten(geometry)


@joint.both_ways
@pytest.mark.parametrize("backend", [joint.NAME, "composite", "cpu"])
def test_the_operator_itself(backend: str, transposed: bool, device) -> None:
    """Its results and their derivatives are those of the operators it stands for; vmap, forward mode."""
    operands, rest = _operands(transposed, device)
    slot = execution.slot_of(transposed)

    def together(*tensors: Tensor, wanted: Wanted = (True, True, True)) -> tuple[Tensor, ...]:
        operator = getattr(torch.ops.hyperconv_ext, JOINT)
        return operator(*tensors, wanted, transposed, *rest, backend, "auto")

    def each(*tensors: Tensor) -> tuple[Tensor, ...]:
        def operator(other: int, *others: Tensor) -> Tensor:
            bias = (None,) if other in execution.BIASED else ()
            called = getattr(torch.ops.hyperconv_ext, OPS[other])
            return called(*others, *bias, *rest, "composite", "auto")

        return tuple(execution.one_by_one(slot, (True,) * 3, tensors, operator))

    same = joint.close if backend == "cpu" else joint.identical
    expected = each(*operands)
    same(together(*operands), expected)
    assert joint.CALLS.count(JOINT) == len(joint.CALLS) == (backend == joint.NAME)
    for wanted in joint.SUBSETS:
        for result, want, full in zip(together(*operands, wanted=wanted), wanted, expected, strict=True):
            if want:
                same([result], [full])
            else:
                assert result.shape == (0,)
    leaves = [t.detach().requires_grad_() for t in operands]
    losses = [sum(r.square().sum() for r in function(*leaves)) for function in (together, each)]
    same(*(torch.autograd.grad(loss, leaves) for loss in losses))
    examples = torch.stack([operands[0], -operands[0]])
    mapped = [
        torch.func.vmap(f, (0, None, None, None))(examples, *operands[1:]) for f in (together, each)
    ]
    same(*mapped)
    directions = tuple(torch.randn_like(t) for t in operands)
    joint.close(*(torch.func.jvp(f, tuple(operands), directions)[1] for f in (together, each)))


@joint.both_ways
def test_function_transforms(transposed: bool, device) -> None:
    tensors = [torch.randn(shape, device=device) for shape in joint.shapes(2, 2, transposed)]
    examples = torch.stack([tensors[0], 2 * tensors[0]])
    results = []
    for backend in ("composite", joint.NAME):
        function = joint.convolution(2, 2, transposed, backend)

        def loss(*operands: Tensor, function: Callable[..., Tensor] = function) -> Tensor:
            return function(*operands).square().sum()

        output, pullback = torch.func.vjp(function, *tensors)
        gradients = pullback(joint.cotangent(output))
        per_example = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (0, None, None, None))
        jacobians = torch.func.jacrev(function, (1, 2))(*tensors)
        hessian = torch.func.hessian(loss, 2)(*tensors)
        results.append([*gradients, *per_example(examples, *tensors[1:]), *jacobians, hessian])
    joint.close(results[1], results[0])


def test_batched_gradients(device) -> None:
    """`is_grads_batched`, whose batches are not those of torch.func: the operator, in a loop."""
    leaves = joint.leaves([torch.randn(shape, device=device) for shape in joint.shapes(2, 1, False)])
    results = []
    for backend in ("composite", joint.NAME):
        output = joint.convolution(2, 1, False, backend)(*leaves)
        joint.CALLS.clear()
        cotangents = torch.stack([joint.cotangent(output), torch.ones_like(output)])
        results.append(torch.autograd.grad(output, leaves, cotangents, is_grads_batched=True))
    assert joint.CALLS == [JOINT, JOINT]
    joint.close(results[1], results[0])


def test_backward_in_forward_mode(device) -> None:
    """A cotangent with a tangent of its own, while nobody records."""
    leaves = joint.leaves([torch.randn(shape, device=device) for shape in joint.shapes(2, 1, False)])
    results = []
    for backend in ("composite", joint.NAME):
        output = joint.convolution(2, 1, False, backend)(*leaves)
        with torch.autograd.forward_ad.dual_level():
            tangent = torch.ones_like(output)
            cotangent = torch.autograd.forward_ad.make_dual(joint.cotangent(output), tangent)
            gradients = torch.autograd.grad(output, leaves, cotangent)
            pairs = [torch.autograd.forward_ad.unpack_dual(gradient) for gradient in gradients]
            results.append([part for pair in pairs for part in pair])
    joint.close(results[1], results[0])
