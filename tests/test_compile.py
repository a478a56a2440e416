"""What `torch.compile` makes of the layers: no more graphs than of nn.ConvNd, and small ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor import config, metrics
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.decomposition import select_decomp_table

from hyperconv_ext import HyperConv2d, HyperConvTranspose2d
from hyperconv_ext.taps import tap_coordinates

Call = Callable[[Tensor], Tensor]
every_backend = pytest.mark.parametrize("backend", ["auto", "cpu"])


def _network(conv: Any, transposed: Any, device: torch.device) -> nn.Sequential:
    layers = (
        conv(3, 8, 3, padding=1, device=device),
        nn.ReLU(),
        conv(8, 8, 5, padding="same", groups=2, device=device),
        transposed(8, 4, 2, stride=2, device=device),
    )
    return nn.Sequential(*layers)


def _agree(network: nn.Module, compiled: Call, input: Tensor) -> None:
    torch.testing.assert_close(compiled(input), network(input), rtol=2e-2, atol=2e-2)


def _sizes(network: nn.Module, compiled: Call, device: torch.device) -> None:
    """A batch of one more, other batches, other images, a batch of one."""
    for batch, size in ((2, 8), (3, 8), (4, 10), (5, 12), (1, 12), (7, 17)):
        _agree(network, compiled, torch.randn(batch, 3, size, size, device=device))


def _training_and_evaluation(network: nn.Module, compiled: Call, device: torch.device) -> None:
    input = torch.randn(2, 3, 8, 8, device=device)
    for training in (True, False, True, False):
        network.train(training)
        with torch.set_grad_enabled(training):
            _agree(network, compiled, input)
    network.train()
    with torch.no_grad():
        _agree(network, compiled, input)


def _autocast(network: nn.Module, compiled: Call, device: torch.device) -> None:
    input = torch.randn(2, 3, 8, 8, device=device)
    for enabled in (True, False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            _agree(network, compiled, input)


def _formats_and_gradients(network: nn.Module, compiled: Call, device: torch.device) -> None:
    input = torch.randn(2, 3, 8, 8, device=device)
    for memory_format in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        _agree(network, compiled, input.contiguous(memory_format=memory_format))
    _agree(network, compiled, input.requires_grad_())


def _steps(network: nn.Module, compiled: Call, device: torch.device) -> None:
    """Parameters that change, and then are fixed."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    input = torch.randn(2, 3, 8, 8, device=device)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(input).square().mean().backward()
        optimizer.step()
        _agree(network, compiled, input)
    network.requires_grad_(False)
    _agree(network, compiled, input)


def _graphs(network: nn.Module, scenario: Callable[..., None], device: torch.device) -> int:
    """How many were made."""
    torch._dynamo.reset()
    counters.clear()
    scenario(network, torch.compile(network, backend="aot_eager", fullgraph=True), device)
    return counters["stats"]["unique_graphs"]


@every_backend
@pytest.mark.parametrize(
    "scenario", [_sizes, _training_and_evaluation, _autocast, _formats_and_gradients, _steps]
)
def test_no_more_graphs_than_of_conv2d(scenario: Callable, backend: str, device, compiler) -> None:
    expected = _graphs(_network(nn.Conv2d, nn.ConvTranspose2d, device), scenario, device)
    kinds = (partial(kind, backend=backend) for kind in (HyperConv2d, HyperConvTranspose2d))
    assert 0 < _graphs(_network(*kinds, device), scenario, device) <= expected


class Residual(nn.Module):
    def __init__(self, conv: Any, device: torch.device) -> None:
        super().__init__()
        self.convs = nn.ModuleList([conv(16, 16, 3, padding=1, device=device) for _ in range(4)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(16, device=device) for _ in range(4)])

    def forward(self, input: Tensor) -> Tensor:
        hidden = input
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            hidden = torch.relu(norm(conv(hidden)) + (hidden if index % 2 else 0))
        return hidden


def _kernels(conv: Any, training: bool, device: torch.device) -> int:
    """How many Inductor generates around the convolutions, which it spends most of its time on."""
    torch._dynamo.reset()
    metrics.reset()
    network = Residual(conv, device).train(training)
    with torch.set_grad_enabled(training):
        output = torch.compile(network, fullgraph=True)(torch.randn(2, 16, 8, 8, device=device))
    if training:
        output.sum().backward()
    return metrics.generated_kernel_count


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_about_as_many_kernels_as_of_conv2d(
    training: bool, device, compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those for a CPU are counted and not compiled, which would take a minute."""
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda self, *_: lambda *_: None)
    with config.patch(force_disable_caches=True):
        expected = _kernels(nn.Conv2d, training, device)
        assert 0 < _kernels(HyperConv2d, training, device) <= 1.1 * expected


def _saved(conv: Any, device: torch.device) -> list[str]:
    """What the forward graph of a layer with a batch norm returns of the size of the layer's output."""
    saved: list[str] = []

    def forward(graph: torch.fx.GraphModule, _: Any) -> Any:
        *_, output = graph.graph.nodes
        saved.extend(
            node.target.__name__
            for node in output.args[0]
            if node.op == "call_function" and node.meta["val"].numel() == 2 * 16 * 8 * 8
        )
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    layers = conv(16, 16, 3, padding=1, device=device), nn.BatchNorm2d(16, device=device), nn.ReLU()
    network = torch.compile(nn.Sequential(*layers), backend=backend, fullgraph=True)
    network(torch.randn(2, 16, 8, 8, device=device)).sum().backward()
    return saved


@every_backend
def test_a_step_keeps_what_it_keeps_of_conv2d(backend: str, device, compiler) -> None:
    """The output itself and nothing computed from it, which would be more kernels and more memory."""
    expected = _saved(nn.Conv2d, device)
    assert "convolution.default" in expected
    saved = _saved(partial(HyperConv2d, backend=backend), device)  # of W, where that is faster
    assert [name.replace("basis_conv_fwd", "convolution") for name in saved] == expected


@every_backend
def test_a_layer_is_two_calls(backend: str, device, compiler) -> None:
    """Of which the second checks and plans; Dynamo would take longer for that than for all the rest."""
    layer = HyperConv2d(3, 8, 3, padding=1, backend=backend, device=device)
    called: list[Any] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        called.extend(node for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    input = torch.randn(2, 3, 8, 8, device=device)
    compiled = torch.compile(layer, backend=record, fullgraph=True)
    torch.testing.assert_close(compiled(input), layer(input), rtol=1e-3, atol=1e-4)
    names = [getattr(node.target, "__name__", str(node.target)) for node in called]
    assert [name for name in names if name != "Mlp"] == [
        "taps_beside",
        "convolve",
    ]  # that packs arguments


@pytest.mark.parametrize("kernel_size", [(3, 4), (5,)])
def test_coordinates_as_an_operator(kernel_size: tuple[int, ...], device) -> None:
    """A copy of those that layers share, which whoever compiles may write into."""
    operator = torch.ops.hyperconv_ext.tap_coordinates.default
    like = torch.randn(2, device=device, requires_grad=True)
    spacing = [2.0] * len(kernel_size)
    operands = (like, list(kernel_size), "centered", spacing, torch.float64)
    torch.library.opcheck(operator, operands)
    expected = 2 * tap_coordinates(kernel_size, device=device, dtype=torch.float64)
    operator(*operands).zero_()
    assert torch.equal(operator(*operands), expected)
