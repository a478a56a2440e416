"""Several gradients of a layer together, under what PyTorch does to operators, and in the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

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

from hyperconv_ext import HyperConv2d, explain, functional, planner
from hyperconv_ext.backends import BACKENDS
from hyperconv_ext.problem import JOINT, OPS, Device, Wanted, WeightShape

from ..planning import H200, problem
from ..test_dispatch import negated
from . import backend as joint


def _step(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, joint.cotangent(output))]


@joint.both_ways
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_is_one_graph(dynamic: bool, transposed: bool, device, compiler) -> None:
    """Which plans when it is run, in whatever sizes."""
    shapes = joint.shapes(2, 2, transposed)
    function = joint.convolution(2, 2, transposed, joint.NAME)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in ((5, 6), (8, 7)):
        tensors = [torch.randn(shape, device=device) for shape in ((2, 4, *size), *shapes[1:])]
        expected = _step(function, joint.leaves(tensors))
        joint.CALLS.clear()
        joint.close(_step(compiled, joint.leaves(tensors)), expected)
        assert joint.CALLS[1:] == [JOINT]


def test_inductor(device, compiler) -> None:
    tensors = [torch.randn(shape, device=device) for shape in joint.shapes(2, 1, False)]
    function = joint.convolution(2, 1, False, joint.NAME)
    for wanted in ((True, True, True, True), (False, True, True, True)):
        leaves = joint.leaves(tensors, wanted)
        compiled = torch.compile(function, fullgraph=True)
        joint.CALLS.clear()
        actual = joint.gradients(compiled, leaves)
        assert joint.CALLS[1:] == [JOINT]
        joint.close(actual, joint.gradients(function, leaves))


@pytest.mark.parametrize("together", [True, False])
def test_compiled_layer(together: bool, device, compiler, request) -> None:
    """The graph has the joint operator, whose kernel calls that of each where that is planned."""
    if not together:
        request.getfixturevalue("dear")
    layer = HyperConv2d(4, 6, 3, padding=1, backend=joint.NAME, device=device)
    input = torch.randn(2, 4, 7, 6, device=device, requires_grad=True)
    leaves = [input, *layer.parameters()]
    expected = _layer_step(layer, leaves)
    graphs = _record(layer, leaves, expected)
    assert [name for name in graphs if "basis_conv" in name] == [JOINT]
    own = [JOINT] if together else joint.of_their_own((True, True, True), False)
    assert ["basis_conv_fwd", *own] == joint.CALLS


@pytest.mark.parametrize("backend", [joint.NAME, "composite"])
def test_graphs_without_a_joint_backend(backend: str, device, compiler, monkeypatch) -> None:
    """Hold the operators that they held before there was one."""
    monkeypatch.setattr(joint.ENGINE, "joins_on", lambda device: False)
    layer = HyperConv2d(4, 6, 3, padding=1, backend=backend, device=device)
    leaves = [torch.randn(2, 4, 7, 6, device=device, requires_grad=True), *layer.parameters()]
    graphs = _record(layer, leaves, _layer_step(layer, leaves))
    own = joint.of_their_own((True, True, True), False)
    assert sorted(name for name in graphs if "basis_conv_bwd" in name) == sorted(own)


def _layer_step(layer: torch.nn.Module, leaves: Sequence[Tensor]) -> list[Tensor]:
    output = layer(leaves[0])
    return [output.detach(), *torch.autograd.grad(output, leaves, joint.cotangent(output))]


def _record(layer: HyperConv2d, leaves: list[Tensor], expected: list[Tensor]) -> list[str]:
    """The operators of the compiled backward pass, whose results are compared."""
    names: list[str] = []

    def backward(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        names.extend(target.split(".")[1] for target in targets if "hyperconv_ext" in target)
        return graph

    recording = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=backward)
    compiled = torch.compile(layer, fullgraph=True, backend=recording)
    joint.CALLS.clear()
    joint.close(_layer_step(compiled, leaves), expected)
    return names


def test_compiled_autograd(device, compiler) -> None:
    """The backward pass of an eager forward pass, compiled."""
    tensors = [torch.randn(shape, device=device) for shape in joint.shapes(2, 1, False)]
    function = joint.convolution(2, 1, False, joint.NAME)
    expected = _step(function, joint.leaves(tensors))
    leaves = joint.leaves(tensors)
    output = function(*leaves)
    joint.CALLS.clear()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        output.backward(joint.cotangent(output))
    joint.close([leaf.grad for leaf in leaves], expected[1:])
    assert joint.CALLS == [JOINT]


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_autocast(kind: str, device) -> None:
    """Of the forward pass: float32's gradients in bfloat16. Of the backward pass alone: of no effect."""
    tensors = [torch.randn(shape, device=device) for shape in joint.shapes(2, 1, False)]
    results = []
    for backend in ("composite", joint.NAME):
        leaves = joint.leaves(tensors)
        joint.CALLS.clear()
        with torch.autocast(device.type, torch.bfloat16, enabled=kind == "forward"):
            output = joint.convolution(2, 1, False, backend)(*leaves)
        cotangent = joint.cotangent(output)
        with torch.autocast(device.type, torch.bfloat16, enabled=kind == "backward"):
            results.append([output, *torch.autograd.grad(output, leaves, cotangent)])
    assert results[0][0].dtype == (torch.bfloat16 if kind == "forward" else torch.float32)
    assert joint.CALLS[1:] == [JOINT]
    joint.identical(results[1], results[0])


def _keep(context: object, operator: object, *args: object, **options: object) -> object:
    kept = "hyperconv_ext" in str(operator)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@joint.both_ways
def test_checkpointing_and_saved_tensors(transposed: bool, device) -> None:
    """Which are unpacked once."""
    leaves = joint.leaves(
        [torch.randn(shape, device=device) for shape in joint.shapes(2, 1, transposed)]
    )
    function = joint.convolution(2, 1, transposed, joint.NAME)
    expected = joint.gradients(function, leaves)
    for options in ({}, {"context_fn": lambda: create_selective_checkpoint_contexts(_keep)}):

        def again(*operands: Tensor, options: dict = options) -> Tensor:
            return checkpoint(function, *operands, use_reentrant=False, **options)

        joint.CALLS.clear()
        joint.identical(joint.gradients(again, leaves), expected)
        assert joint.CALLS.count(JOINT) == 1
    with torch.autograd.graph.save_on_cpu():
        joint.identical(joint.gradients(function, leaves), expected)
    unpacked: list[int] = []

    def unpack(pair: tuple[int, Tensor]) -> Tensor:
        unpacked.append(pair[0])
        return pair[1]

    with torch.autograd.graph.saved_tensors_hooks(lambda t: (id(t), t), unpack):
        joint.identical(joint.gradients(function, leaves), expected)
    assert len(unpacked) == len(set(unpacked)) == 3


def test_what_the_dispatcher_is_for(device) -> None:
    """Negative bits, symbolic zeros, and a mode that watches."""
    tensors = [torch.randn(shape, device=device) for shape in joint.shapes(2, 1, False)]
    results = []
    for backend in ("composite", joint.NAME):
        function = joint.convolution(2, 1, False, backend)
        leaves = [negated(t).detach().requires_grad_() for t in tensors]
        output = function(*leaves)
        lazy = torch.autograd.grad(output, leaves, negated(joint.cotangent(output)), retain_graph=True)
        nothing = torch._efficientzerotensor(output.shape, device=device)
        zeros = torch.autograd.grad(output, leaves, nothing)
        assert not any(zero.any() for zero in zeros)
        results.append([output, *lazy, *zeros])
    joint.close(results[1], results[0])
    assert joint.CALLS.count(JOINT) == 2


def test_meta_tensors(device) -> None:
    layer = HyperConv2d(4, 6, 3, backend=joint.NAME, device="meta")
    layer(torch.empty(2, 4, 7, 6, device="meta")).sum().backward()
    assert layer.coefficients.grad.is_meta and not joint.CALLS


def _flop_counts(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        function(*leaves).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return {str(operator).split(".")[1]: count for operator, count in counts.items()}


@joint.both_ways
@pytest.mark.parametrize("together", [True, False])
def test_flops(together: bool, transposed: bool, device, request) -> None:
    """Of the plan that is executed; of fake tensors too."""
    if not together:
        request.getfixturevalue("dear")
    forward = OPS[int(transposed)]
    expected = {forward: 11, JOINT: 7 if together else 33}
    for mode in (None, FakeTensorMode(allow_non_fake_inputs=True)):
        leaves = joint.leaves(
            [torch.randn(shape, device=device) for shape in joint.shapes(2, 1, transposed)]
        )
        if mode is not None:
            leaves = [mode.from_tensor(leaf) for leaf in leaves]
        assert _flop_counts(joint.convolution(2, 1, transposed, joint.NAME), leaves) == expected


def test_nothing_to_compute(device) -> None:
    shapes = [(0, 4, 5, 6), *joint.shapes(2, 1, False)[1:]]
    leaves = joint.leaves([torch.randn(shape, device=device) for shape in shapes])
    gradients = joint.gradients(joint.convolution(2, 1, False, joint.NAME), leaves)
    assert not joint.CALLS and not any(gradient.any() for gradient in gradients)
    assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]


def test_dearer_together(dear, device) -> None:
    """Three of their own for 3 seconds against 4; two for 2."""
    leaves = joint.leaves([torch.randn(shape, device=device) for shape in joint.shapes(2, 1, False)])
    joint.gradients(joint.convolution(2, 1, False, joint.NAME), leaves)
    assert joint.CALLS[1:] == joint.of_their_own((True, True, True), False)


def test_auto_takes_the_cheapest(device, monkeypatch) -> None:
    """A kernel for which W is not built."""
    for name, seconds in (("each", 1e-12), ("together", 1.5e-12)):
        monkeypatch.setitem(joint.ESTIMATE, name, seconds)
    assert not planner.prefers_dense(device.type, WeightShape(15 * 17, 2, 64, 2, 4))
    shapes = [(1, 2, 16, 18), (64, 2, 2), (2, 15, 17), (64,)]
    leaves = joint.leaves([torch.randn(shape, device=device) for shape in shapes])
    joint.gradients(functional.basis_conv2d, leaves)
    assert joint.CALLS[1:] == [JOINT]


@pytest.mark.parametrize("wanted", joint.SUBSETS)
def test_the_plan_is_a_function_of_numbers(wanted: Wanted) -> None:
    some = replace(problem(op="basis_conv_bwd_input", device=Device("cpu")), wanted=wanted)
    assert list(some.ops) == joint.of_their_own(wanted, False)
    assert list(replace(some, op="basis_conv_fwd").ops) == joint.of_their_own(wanted, True)
    plan = planner.joint(some, joint.NAME)
    if sum(wanted) > 1:
        assert plan == planner.joint(some, joint.NAME) and plan.problem is some
        assert (plan.backend, plan.algorithm, plan.seconds) == (joint.NAME, "composite", 1.5)
    else:
        assert plan is None
    assert planner.joint(some, "composite") is None


def test_what_is_named_is_refused() -> None:
    """Together as each of them: the message gives the backend's reason."""
    some = replace(problem(op="basis_conv_bwd_input", device=Device("meta")), wanted=(True, True, False))
    assert planner.joint(some, joint.NAME) is None
    with pytest.raises(planner.PlanError, match="joint/composite: computes nothing there"):
        planner.plan(replace(some, wanted=None), joint.NAME)


def test_where_gradients_can_be_together(device) -> None:
    assert planner.joins_on(Device("cpu"), joint.NAME) and planner.joins_on(H200, "auto")
    assert not planner.joins_on(Device("meta"), joint.NAME)
    assert not any(planner.joins_on(H200, name) for name in ("triton", "composite"))


def test_explain(device, monkeypatch) -> None:
    layer = HyperConv2d(4, 6, 3, backend=joint.NAME, device=device)
    input = torch.randn(2, 4, 7, 6, device=device)
    expected = f"{JOINT}, all gradients together: {joint.NAME}/composite"
    assert explain(layer, input).splitlines()[-1] == expected
    layer.backend = "composite"
    assert JOINT + "," not in explain(layer, input)


WORLD = 2


def _sharded_steps(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    BACKENDS[joint.NAME] = joint.ENGINE  # type: ignore[assignment]
    planner.BACKEND_NAMES = (*planner.BACKEND_NAMES, joint.NAME)  # type: ignore[misc]
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(0)
    every, batch = [Replicate()] * 4, [Shard(0), *[Replicate()] * 3]
    for transposed, groups in product((False, True), (1, 2)):
        full = [torch.randn(shape) for shape in joint.shapes(2, groups, transposed)]
        out = [Replicate(), Shard(1 if transposed else 0), Replicate(), Shard(0)]
        function = joint.convolution(2, groups, transposed, joint.NAME)
        for placements in (every, batch, out) if groups == 1 else (every, batch):
            for wanted in ((True, True, True, True), (False, True, True, True)):
                expected = joint.gradients(function, joint.leaves(full, wanted))
                pairs = zip(full, placements, strict=True)
                shards = joint.leaves(
                    [distribute_tensor(t.clone(), mesh, [p]) for t, p in pairs], wanted
                )
                output = function(*shards)
                cotangent = distribute_tensor(joint.cotangent(function(*full)), mesh, output.placements)
                asked = [shard for shard in shards if shard.requires_grad]
                joint.CALLS.clear()
                results = torch.autograd.grad(output, asked, cotangent)
                assert joint.CALLS == [JOINT]
                joint.close([result.full_tensor() for result in results], expected)
    dist.destroy_process_group()
    Path(f"{path}.{rank}").touch()


def test_distributed_tensors(tmp_path: Path) -> None:
    multiprocessing.spawn(_sharded_steps, (str(tmp_path / "store"),), WORLD)
    # A failure of either is raised above, so this says that both have been there.
    assert all((tmp_path / f"store.{rank}").exists() for rank in range(WORLD))
