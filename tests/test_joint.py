"""Several gradients of a layer together, on a backend of the tests' own that counts what it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from hyperconv_ext import (
    HyperConv1d,
    HyperConv2d,
    HyperConv3d,
    HyperConvTranspose2d,
    explain,
    functional,
    planner,
)
from hyperconv_ext.backends import BACKENDS, composite, reference
from hyperconv_ext.geometry import Geometry
from hyperconv_ext.ops import execution
from hyperconv_ext.problem import JOINT, OPS, Device, Plan, Problem, Wanted, WeightShape

from .oracle import FLOOR, relative_error
from .planning import H200, problem
from .test_dispatch import negated

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


def _forget() -> None:
    """What was planned with other backends or estimates."""
    CALLS.clear()
    MLPS.clear()
    for cached in (planner.plan, planner.joint, execution._plan, execution._joint_plan):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(BACKENDS, NAME, ENGINE)
    monkeypatch.setattr(planner, "BACKEND_NAMES", (*planner.BACKEND_NAMES, NAME))
    _forget()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many tiny convolutions
    yield
    torch.set_num_threads(threads)
    _forget()


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together costs more than three of their own."""
    monkeypatch.setitem(ESTIMATE, "together", 4.0)


def _shapes(dims: int, groups: int, transposed: bool) -> list[tuple[int, ...]]:
    """Of (input, coefficients, basis, bias), with 4 channels of the input and 6 of the output."""
    coefficients = (4, 6 // groups, 3) if transposed else (6, 4 // groups, 3)
    return [(2, 4, *(5, 6, 4)[:dims]), coefficients, (3, *(3, 2, 3)[:dims]), (6,)]


def _convolution(dims: int, groups: int, transposed: bool, backend: str) -> Callable[..., Tensor]:
    name = f"basis_conv_transpose{dims}d" if transposed else f"basis_conv{dims}d"
    function, options = getattr(functional, name), {"stride": 2, "padding": 1, "groups": groups}
    return lambda *operands: function(*operands, **options, backend=backend)


def _leaves(tensors: Sequence[Tensor], wanted: Sequence[bool] = (True,) * 4) -> list[Tensor]:
    return [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]


def _cotangent(output: Tensor) -> Tensor:
    numbers = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    return torch.empty_like(output).copy_(numbers.view(output.shape))


def _gradients(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], **options: bool
) -> list[Tensor]:
    output = function(*leaves)
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    return list(torch.autograd.grad(output, asked, _cotangent(output), **options))


def _identical(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride()
        assert torch.equal(one, other)


def _close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert relative_error(one.detach(), other.detach().double()) <= tolerance, f"tensor {number}"


def _of_their_own(wanted: Sequence[bool], transposed: bool) -> list[str]:
    """The operators of each gradient."""
    through_input = OPS[int(not transposed)]
    return [op for op, want in zip((through_input, *OPS[2:]), wanted, strict=True) if want]


CONVOLUTIONS = [(1, 1), (2, 1), (2, 2), (3, 2)]  # (dims, groups)
both_ways = pytest.mark.parametrize("transposed", [False, True])


@both_ways
@pytest.mark.parametrize(("dims", "groups"), CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_subset(dtype: torch.dtype, dims: int, groups: int, transposed: bool, device) -> None:
    """To the bit, dtype and strides what the operators of each give; one call from two gradients on."""
    tensors = [torch.randn(s, device=device).to(dtype) for s in _shapes(dims, groups, transposed)]
    tensors[0] = tensors[0].movedim(1, -1).contiguous().movedim(-1, 1)
    tensors[2] = tensors[2].float() if dtype == torch.bfloat16 else tensors[2]
    for wanted, has_bias in product(SUBSETS[1:], (False, True)):
        leaves = _leaves(tensors, (*wanted, True))[: 3 + has_bias]
        separate = _convolution(dims, groups, transposed, "composite")
        expected = _gradients(separate, leaves)
        CALLS.clear()
        actual = _gradients(_convolution(dims, groups, transposed, NAME), leaves)
        _identical(actual, expected)
        own = [JOINT] if sum(wanted) > 1 else _of_their_own(wanted, transposed)
        assert CALLS[1:] == own


@both_ways
@pytest.mark.parametrize(("dims", "groups"), CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ["cpu"])
def test_every_subset_by_an_engine(
    backend: str, dtype: torch.dtype, dims: int, groups: int, transposed: bool, device, monkeypatch
) -> None:
    """Against float64; one call of the engine from two gradients on."""
    tensors = [torch.randn(s, device=device).to(dtype) for s in _shapes(dims, groups, transposed)]
    tensors[0] = tensors[0].movedim(1, -1).contiguous().movedim(-1, 1)
    wide = [t.double() for t in tensors]
    monkeypatch.setattr(planner, "_cheapest", _together_if_possible)
    engine = BACKENDS[backend]
    with mock.patch.object(engine, JOINT, wraps=getattr(engine, JOINT)) as called:
        for wanted in SUBSETS[1:]:
            called.reset_mock()
            leaves, exact = _leaves(tensors, (*wanted, True)), _leaves(wide, (*wanted, True))
            actual = _gradients(_convolution(dims, groups, transposed, backend), leaves)
            expected = _gradients(_convolution(dims, groups, transposed, "composite"), exact)
            assert called.call_count == (sum(wanted) > 1)
            for one, other, leaf in zip(actual, expected, leaves, strict=False):
                assert one.dtype == leaf.dtype or dtype == torch.bfloat16
                assert relative_error(one, other) <= 4 * FLOOR[dtype]


def _together_if_possible(problem: Problem, rows: list[tuple[str, str, str]]) -> Plan | None:
    """What takes no time is cheaper than anything of its own."""
    plan = CHEAPEST(problem, rows)
    return plan if plan is None or not problem.wanted else replace(plan, seconds=0.0)


@both_ways
def test_taps_that_meet_no_input(transposed: bool, device) -> None:
    """Are not there for the backend, and have the gradient zero."""
    shapes = [(1, 3, 3, 4), (3, 3, 2), (2, 15, 13), (3,)]
    leaves = _leaves([torch.randn(shape, device=device) for shape in shapes])
    function = functional.basis_conv_transpose2d if transposed else functional.basis_conv2d

    def convolution(backend: str) -> Callable[..., Tensor]:
        padding = (8, 6) if transposed else (7, 6)
        return lambda *operands: function(*operands, padding=padding, backend=backend)

    expected = _gradients(convolution("composite"), leaves)
    CALLS.clear()
    _identical(_gradients(convolution(NAME), leaves), expected)
    assert CALLS[1:] == [JOINT]
    assert expected[2].any() and not expected[2][:, 0].any()


@pytest.mark.parametrize("kind", [HyperConv1d, HyperConv2d, HyperConv3d, HyperConvTranspose2d])
def test_of_a_layer(kind, device) -> None:
    """Whose forward pass is one operator from the MLP on."""
    layer = kind(4, 6, 3, padding=1, activation="tanh", backend=NAME, device=device)
    twin = kind(4, 6, 3, padding=1, activation="tanh", backend="composite", device=device)
    twin.load_state_dict(layer.state_dict())
    input = torch.randn(2, 4, *(5, 4, 6)[: layer.dims], device=device)
    assert type(layer(input).grad_fn).__name__ == "HyperConvFunctionBackward"
    for needs_input, frozen in product((False, True), repeat=2):
        results = []
        for one in (twin, layer):
            CALLS.clear()
            MLPS.clear()
            one.hypernet.requires_grad_(not frozen)
            x = input.detach().requires_grad_(needs_input)
            asked = [t for t in (x, *one.parameters()) if t.requires_grad]
            output = one(x)
            results.append(torch.autograd.grad(output, asked, _cotangent(output)))
        wanted = (needs_input, True, not frozen)
        own = [JOINT] if sum(wanted) > 1 else _of_their_own(wanted, layer.transposed)
        assert own == CALLS and len(MLPS) == 2 - frozen
        _close(results[1], results[0])


def test_a_gradient_of_phi_beside_that_of_the_output(device) -> None:
    """The operator has two results; through phi alone there is nothing to do together."""
    layer = HyperConv2d(4, 6, 3, backend=NAME, device=device)
    input = torch.randn(2, 4, 5, 6, device=device)
    _, geometry = layer.geometry(input)
    coordinates, weights, biases, *settings = layer._mlp()
    tensors = (input, layer.coefficients, coordinates, list(weights), list(biases), layer.bias)
    choice = (False, *execution.flatten(geometry), NAME, "auto")

    asked = [*layer.hypernet.parameters()]

    def gradients(*chosen: bool) -> tuple[Tensor, ...]:
        CALLS.clear()
        output, basis = torch.ops.hyperconv_ext.hyper_conv_fwd(*tensors, *settings, *choice)
        terms = [output.square().sum(), basis.pow(3).sum()]
        value = sum(term for term, wanted in zip(terms, chosen, strict=True) if wanted)
        return torch.autograd.grad(value, asked)

    parts = gradients(True, False), gradients(False, True)
    assert not CALLS
    together = gradients(True, True)
    assert CALLS == [JOINT]
    _close(together, [a + b for a, b in zip(*parts, strict=True)])


@both_ways
@pytest.mark.parametrize("backend", [NAME, "cpu"])
def test_gradgradcheck(backend: str, transposed: bool, device) -> None:
    shapes = [(1, 2, 3, 4), (2, 2, 2), (2, 2, 3), (2,)]
    leaves = _leaves([torch.randn(s, dtype=torch.float64, device=device) for s in shapes])
    function = functional.basis_conv_transpose2d if transposed else functional.basis_conv2d

    def convolution(*operands: Tensor) -> Tensor:
        return function(*operands, padding=1, backend=backend)

    assert torch.autograd.gradcheck(convolution, leaves)
    assert JOINT in CALLS or backend != NAME
    assert torch.autograd.gradgradcheck(convolution, leaves)


@both_ways
def test_derivatives_of_higher_order(transposed: bool, device) -> None:
    """The first of two backward passes is recorded, operator by operator; the second is joint again."""
    tensors = [torch.randn(shape, device=device) for shape in _shapes(2, 1, transposed)]
    results = []
    for backend in ("composite", NAME):
        leaves, function = _leaves(tensors), _convolution(2, 1, transposed, backend)
        value = function(*leaves).pow(3).sum()
        for _ in range(2):
            first = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum(gradient.square().sum() for gradient in first)
            assert JOINT not in CALLS
        results.append(torch.autograd.grad(value, leaves))
    _identical(results[1], results[0])
    assert JOINT in CALLS


@both_ways
@pytest.mark.parametrize("wanted", SUBSETS)
@pytest.mark.parametrize("backend", [NAME, "composite", "cpu"])
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


@both_ways
@pytest.mark.parametrize("backend", [NAME, "composite", "cpu"])
def test_the_operator_itself(backend: str, transposed: bool, device) -> None:
    """Its results and their derivatives are those of the operators it stands for; vmap, forward mode."""
    operands, rest = _operands(transposed, device)
    slot = execution.slot_of(transposed)

    def joint(*tensors: Tensor, wanted: Wanted = (True, True, True)) -> tuple[Tensor, ...]:
        operator = getattr(torch.ops.hyperconv_ext, JOINT)
        return operator(*tensors, wanted, transposed, *rest, backend, "auto")

    def each(*tensors: Tensor) -> tuple[Tensor, ...]:
        def operator(other: int, *others: Tensor) -> Tensor:
            bias = (None,) if other in execution.BIASED else ()
            called = getattr(torch.ops.hyperconv_ext, OPS[other])
            return called(*others, *bias, *rest, "composite", "auto")

        return tuple(execution.one_by_one(slot, (True,) * 3, tensors, operator))

    same = _close if backend == "cpu" else _identical
    expected = each(*operands)
    same(joint(*operands), expected)
    assert CALLS.count(JOINT) == len(CALLS) == (backend == NAME)
    for wanted in SUBSETS:
        for result, want, full in zip(joint(*operands, wanted=wanted), wanted, expected, strict=True):
            if want:
                same([result], [full])
            else:
                assert result.shape == (0,)
    leaves = [t.detach().requires_grad_() for t in operands]
    losses = [sum(r.square().sum() for r in function(*leaves)) for function in (joint, each)]
    same(*(torch.autograd.grad(loss, leaves) for loss in losses))
    examples = torch.stack([operands[0], -operands[0]])
    mapped = [torch.func.vmap(f, (0, None, None, None))(examples, *operands[1:]) for f in (joint, each)]
    same(*mapped)
    directions = tuple(torch.randn_like(t) for t in operands)
    _close(*(torch.func.jvp(f, tuple(operands), directions)[1] for f in (joint, each)))


@both_ways
def test_function_transforms(transposed: bool, device) -> None:
    tensors = [torch.randn(shape, device=device) for shape in _shapes(2, 2, transposed)]
    examples = torch.stack([tensors[0], 2 * tensors[0]])
    results = []
    for backend in ("composite", NAME):
        function = _convolution(2, 2, transposed, backend)

        def loss(*operands: Tensor, function: Callable[..., Tensor] = function) -> Tensor:
            return function(*operands).square().sum()

        output, pullback = torch.func.vjp(function, *tensors)
        gradients = pullback(_cotangent(output))
        per_example = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (0, None, None, None))
        jacobians = torch.func.jacrev(function, (1, 2))(*tensors)
        hessian = torch.func.hessian(loss, 2)(*tensors)
        results.append([*gradients, *per_example(examples, *tensors[1:]), *jacobians, hessian])
    _close(results[1], results[0])


def test_batched_gradients(device) -> None:
    """`is_grads_batched`, whose batches are not those of torch.func: the operator, in a loop."""
    leaves = _leaves([torch.randn(shape, device=device) for shape in _shapes(2, 1, False)])
    results = []
    for backend in ("composite", NAME):
        output = _convolution(2, 1, False, backend)(*leaves)
        CALLS.clear()
        cotangents = torch.stack([_cotangent(output), torch.ones_like(output)])
        results.append(torch.autograd.grad(output, leaves, cotangents, is_grads_batched=True))
    assert CALLS == [JOINT, JOINT]
    _close(results[1], results[0])


def test_backward_in_forward_mode(device) -> None:
    """A cotangent with a tangent of its own, while nobody records."""
    leaves = _leaves([torch.randn(shape, device=device) for shape in _shapes(2, 1, False)])
    results = []
    for backend in ("composite", NAME):
        output = _convolution(2, 1, False, backend)(*leaves)
        with torch.autograd.forward_ad.dual_level():
            tangent = torch.ones_like(output)
            cotangent = torch.autograd.forward_ad.make_dual(_cotangent(output), tangent)
            gradients = torch.autograd.grad(output, leaves, cotangent)
            pairs = [torch.autograd.forward_ad.unpack_dual(gradient) for gradient in gradients]
            results.append([part for pair in pairs for part in pair])
    _close(results[1], results[0])


def _step(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, _cotangent(output))]


@both_ways
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_is_one_graph(dynamic: bool, transposed: bool, device, compiler) -> None:
    """Which plans when it is run, in whatever sizes."""
    shapes = _shapes(2, 2, transposed)
    function = _convolution(2, 2, transposed, NAME)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in ((5, 6), (8, 7)):
        tensors = [torch.randn(shape, device=device) for shape in ((2, 4, *size), *shapes[1:])]
        expected = _step(function, _leaves(tensors))
        CALLS.clear()
        _close(_step(compiled, _leaves(tensors)), expected)
        assert CALLS[1:] == [JOINT]


def test_inductor(device, compiler) -> None:
    tensors = [torch.randn(shape, device=device) for shape in _shapes(2, 1, False)]
    function = _convolution(2, 1, False, NAME)
    for wanted in ((True, True, True, True), (False, True, True, True)):
        leaves = _leaves(tensors, wanted)
        compiled = torch.compile(function, fullgraph=True)
        CALLS.clear()
        actual = _gradients(compiled, leaves)
        assert CALLS[1:] == [JOINT]
        _close(actual, _gradients(function, leaves))


@pytest.mark.parametrize("together", [True, False])
def test_compiled_layer(together: bool, device, compiler, request) -> None:
    """The graph has the joint operator, whose kernel calls that of each where that is planned."""
    if not together:
        request.getfixturevalue("dear")
    layer = HyperConv2d(4, 6, 3, padding=1, backend=NAME, device=device)
    input = torch.randn(2, 4, 7, 6, device=device, requires_grad=True)
    leaves = [input, *layer.parameters()]
    expected = _layer_step(layer, leaves)
    graphs = _record(layer, leaves, expected)
    assert [name for name in graphs if "basis_conv" in name] == [JOINT]
    own = [JOINT] if together else _of_their_own((True, True, True), False)
    assert own == CALLS


@pytest.mark.parametrize("backend", [NAME, "composite"])
def test_graphs_without_a_joint_backend(backend: str, device, compiler, monkeypatch) -> None:
    """Hold the operators that they held before there was one."""
    monkeypatch.setattr(ENGINE, "joins_on", lambda device: False)
    layer = HyperConv2d(4, 6, 3, padding=1, backend=backend, device=device)
    leaves = [torch.randn(2, 4, 7, 6, device=device, requires_grad=True), *layer.parameters()]
    graphs = _record(layer, leaves, _layer_step(layer, leaves))
    own = _of_their_own((True, True, True), False)
    assert sorted(name for name in graphs if "basis_conv_bwd" in name) == sorted(own)


def _layer_step(layer: torch.nn.Module, leaves: Sequence[Tensor]) -> list[Tensor]:
    output = layer(leaves[0])
    return [output.detach(), *torch.autograd.grad(output, leaves, _cotangent(output))]


def _record(layer: HyperConv2d, leaves: list[Tensor], expected: list[Tensor]) -> list[str]:
    """The operators of the compiled backward pass, whose results are compared."""
    names: list[str] = []

    def backward(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        names.extend(target.split(".")[1] for target in targets if "hyperconv_ext" in target)
        return graph

    recording = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=backward)
    compiled = torch.compile(layer, fullgraph=True, backend=recording)
    CALLS.clear()
    _close(_layer_step(compiled, leaves), expected)
    return names


def test_compiled_autograd(device, compiler) -> None:
    """The backward pass of an eager forward pass, compiled."""
    tensors = [torch.randn(shape, device=device) for shape in _shapes(2, 1, False)]
    function = _convolution(2, 1, False, NAME)
    expected = _step(function, _leaves(tensors))
    leaves = _leaves(tensors)
    output = function(*leaves)
    CALLS.clear()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        output.backward(_cotangent(output))
    _close([leaf.grad for leaf in leaves], expected[1:])
    assert CALLS == [JOINT]


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_autocast(kind: str, device) -> None:
    """Of the forward pass: float32's gradients in bfloat16. Of the backward pass alone: of no effect."""
    tensors = [torch.randn(shape, device=device) for shape in _shapes(2, 1, False)]
    results = []
    for backend in ("composite", NAME):
        leaves = _leaves(tensors)
        CALLS.clear()
        with torch.autocast(device.type, torch.bfloat16, enabled=kind == "forward"):
            output = _convolution(2, 1, False, backend)(*leaves)
        cotangent = _cotangent(output)
        with torch.autocast(device.type, torch.bfloat16, enabled=kind == "backward"):
            results.append([output, *torch.autograd.grad(output, leaves, cotangent)])
    assert results[0][0].dtype == (torch.bfloat16 if kind == "forward" else torch.float32)
    assert CALLS[1:] == [JOINT]
    _identical(results[1], results[0])


def _keep(context: object, operator: object, *args: object, **options: object) -> object:
    kept = "hyperconv_ext" in str(operator)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@both_ways
def test_checkpointing_and_saved_tensors(transposed: bool, device) -> None:
    """Which are unpacked once."""
    leaves = _leaves([torch.randn(shape, device=device) for shape in _shapes(2, 1, transposed)])
    function = _convolution(2, 1, transposed, NAME)
    expected = _gradients(function, leaves)
    for options in ({}, {"context_fn": lambda: create_selective_checkpoint_contexts(_keep)}):

        def again(*operands: Tensor, options: dict = options) -> Tensor:
            return checkpoint(function, *operands, use_reentrant=False, **options)

        CALLS.clear()
        _identical(_gradients(again, leaves), expected)
        assert CALLS.count(JOINT) == 1
    with torch.autograd.graph.save_on_cpu():
        _identical(_gradients(function, leaves), expected)
    unpacked: list[int] = []

    def unpack(pair: tuple[int, Tensor]) -> Tensor:
        unpacked.append(pair[0])
        return pair[1]

    with torch.autograd.graph.saved_tensors_hooks(lambda t: (id(t), t), unpack):
        _identical(_gradients(function, leaves), expected)
    assert len(unpacked) == len(set(unpacked)) == 3


def test_what_the_dispatcher_is_for(device) -> None:
    """Negative bits, symbolic zeros, and a mode that watches."""
    tensors = [torch.randn(shape, device=device) for shape in _shapes(2, 1, False)]
    results = []
    for backend in ("composite", NAME):
        function = _convolution(2, 1, False, backend)
        leaves = [negated(t).detach().requires_grad_() for t in tensors]
        output = function(*leaves)
        lazy = torch.autograd.grad(output, leaves, negated(_cotangent(output)), retain_graph=True)
        nothing = torch._efficientzerotensor(output.shape, device=device)
        zeros = torch.autograd.grad(output, leaves, nothing)
        assert not any(zero.any() for zero in zeros)
        results.append([output, *lazy, *zeros])
    _close(results[1], results[0])
    assert CALLS.count(JOINT) == 2


def test_meta_tensors(device) -> None:
    layer = HyperConv2d(4, 6, 3, backend=NAME, device="meta")
    layer(torch.empty(2, 4, 7, 6, device="meta")).sum().backward()
    assert layer.coefficients.grad.is_meta and not CALLS


def _flop_counts(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        function(*leaves).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return {str(operator).split(".")[1]: count for operator, count in counts.items()}


@both_ways
@pytest.mark.parametrize("together", [True, False])
def test_flops(together: bool, transposed: bool, device, request) -> None:
    """Of the plan that is executed; of fake tensors too."""
    if not together:
        request.getfixturevalue("dear")
    forward = OPS[int(transposed)]
    expected = {forward: 11, JOINT: 7 if together else 33}
    for mode in (None, FakeTensorMode(allow_non_fake_inputs=True)):
        leaves = _leaves([torch.randn(shape, device=device) for shape in _shapes(2, 1, transposed)])
        if mode is not None:
            leaves = [mode.from_tensor(leaf) for leaf in leaves]
        assert _flop_counts(_convolution(2, 1, transposed, NAME), leaves) == expected


def test_nothing_to_compute(device) -> None:
    shapes = [(0, 4, 5, 6), *_shapes(2, 1, False)[1:]]
    leaves = _leaves([torch.randn(shape, device=device) for shape in shapes])
    gradients = _gradients(_convolution(2, 1, False, NAME), leaves)
    assert not CALLS and not any(gradient.any() for gradient in gradients)
    assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]


def test_dearer_together(dear, device) -> None:
    """Three of their own for 3 seconds against 4; two for 2."""
    leaves = _leaves([torch.randn(shape, device=device) for shape in _shapes(2, 1, False)])
    _gradients(_convolution(2, 1, False, NAME), leaves)
    assert CALLS[1:] == _of_their_own((True, True, True), False)


def test_auto_takes_the_cheapest(device, monkeypatch) -> None:
    """A kernel for which W is not built."""
    for name, seconds in (("each", 1e-12), ("together", 1.5e-12)):
        monkeypatch.setitem(ESTIMATE, name, seconds)
    assert not planner.prefers_dense(device.type, WeightShape(15 * 17, 2, 64, 2, 4))
    shapes = [(1, 2, 16, 18), (64, 2, 2), (2, 15, 17), (64,)]
    leaves = _leaves([torch.randn(shape, device=device) for shape in shapes])
    _gradients(functional.basis_conv2d, leaves)
    assert CALLS[1:] == [JOINT]


@pytest.mark.parametrize("wanted", SUBSETS)
def test_the_plan_is_a_function_of_numbers(wanted: Wanted) -> None:
    some = replace(problem(op="basis_conv_bwd_input", device=Device("cpu")), wanted=wanted)
    assert list(some.ops) == _of_their_own(wanted, False)
    assert list(replace(some, op="basis_conv_fwd").ops) == _of_their_own(wanted, True)
    plan = planner.joint(some, NAME)
    if sum(wanted) > 1:
        assert plan == planner.joint(some, NAME) and plan.problem is some
        assert (plan.backend, plan.algorithm, plan.seconds) == (NAME, "composite", 1.5)
    else:
        assert plan is None
    assert planner.joint(some, "composite") is None


def test_what_is_named_is_refused() -> None:
    """Together as each of them: the message gives the backend's reason."""
    some = replace(problem(op="basis_conv_bwd_input", device=Device("meta")), wanted=(True, True, False))
    assert planner.joint(some, NAME) is None
    with pytest.raises(planner.PlanError, match="joint/composite: computes nothing there"):
        planner.plan(replace(some, wanted=None), NAME)


def test_where_gradients_can_be_together(device) -> None:
    assert planner.joins_on(Device("cpu"), NAME) and planner.joins_on(H200, "auto")
    assert not planner.joins_on(Device("meta"), NAME)
    assert not any(planner.joins_on(H200, name) for name in ("cuda", "triton", "composite"))


def test_explain(device, monkeypatch) -> None:
    layer = HyperConv2d(4, 6, 3, backend=NAME, device=device)
    input = torch.randn(2, 4, 7, 6, device=device)
    expected = f"{JOINT}, all gradients together: {NAME}/composite"
    assert explain(layer, input).splitlines()[-1] == expected
    layer.backend = "composite"
    assert JOINT + "," not in explain(layer, input)


WORLD = 2


def _sharded_steps(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    BACKENDS[NAME] = ENGINE  # type: ignore[assignment]
    planner.BACKEND_NAMES = (*planner.BACKEND_NAMES, NAME)  # type: ignore[misc]
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(0)
    every, batch = [Replicate()] * 4, [Shard(0), *[Replicate()] * 3]
    for transposed, groups in product((False, True), (1, 2)):
        full = [torch.randn(shape) for shape in _shapes(2, groups, transposed)]
        out = [Replicate(), Shard(1 if transposed else 0), Replicate(), Shard(0)]
        function = _convolution(2, groups, transposed, NAME)
        for placements in (every, batch, out) if groups == 1 else (every, batch):
            for wanted in ((True, True, True, True), (False, True, True, True)):
                expected = _gradients(function, _leaves(full, wanted))
                pairs = zip(full, placements, strict=True)
                shards = _leaves([distribute_tensor(t.clone(), mesh, [p]) for t, p in pairs], wanted)
                output = function(*shards)
                cotangent = distribute_tensor(_cotangent(function(*full)), mesh, output.placements)
                asked = [shard for shard in shards if shard.requires_grad]
                CALLS.clear()
                results = torch.autograd.grad(output, asked, cotangent)
                assert CALLS == [JOINT]
                _close([result.full_tensor() for result in results], expected)
    dist.destroy_process_group()
    Path(f"{path}.{rank}").touch()


def test_distributed_tensors(tmp_path: Path) -> None:
    multiprocessing.spawn(_sharded_steps, (str(tmp_path / "store"),), WORLD)
    # A failure of either is raised above, so this says that both have been there.
    assert all((tmp_path / f"store.{rank}").exists() for rank in range(WORLD))
