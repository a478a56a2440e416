"""The memory contract: on a fused path nothing as large as W, and nothing R times the input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hyperconv_ext import HyperConv2d

from .conftest import FUSED, QUICK, interpreted

every_fused_backend = pytest.mark.parametrize("backend", FUSED)


def largest_allocation(work: Callable[[], object], device: torch.device) -> int:
    """Bytes of the largest single allocation that `work` makes, freed or not."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        try:
            work()
            torch.cuda.synchronize()
            traces = torch.cuda.memory._snapshot()["device_traces"]
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
        return max(entry["size"] for trace in traces for entry in trace if entry["action"] == "alloc")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


Call = Callable[[Tensor], Tensor]
Tool = Callable[[HyperConv2d], Call]


def _alone(conv: HyperConv2d) -> Call:
    return conv


def _compiled(conv: HyperConv2d) -> Call:
    return torch.compile(conv, backend="aot_eager", fullgraph=True)


def _under_autocast(conv: HyperConv2d) -> Call:
    """In float16, in which every backend can be tested."""

    def call(input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, torch.float16):
            return conv(input)

    return call


def _checkpointed(conv: HyperConv2d) -> Call:
    return partial(checkpoint, conv, use_reentrant=False)


def _checkpointed_by_reentry(conv: HyperConv2d) -> Call:
    return partial(checkpoint, conv, use_reentrant=True)


TOOLS = [_compiled, _under_autocast, _checkpointed, _checkpointed_by_reentry]


def _step(
    backend: str, channels: int, size: int, kernel: int, device: torch.device, tool: Tool = _alone
) -> int:
    """Largest allocation of a training step after the first (compilation, caches)."""
    conv = HyperConv2d(channels, channels, kernel, padding=kernel // 2, backend=backend, device=device)
    input = torch.randn(1, channels, size, size, device=device)
    input = input.contiguous(memory_format=torch.channels_last).requires_grad_()
    call = tool(conv)
    cotangent = torch.randn_like(call(input))

    def work() -> None:
        call(input).backward(cotangent)

    work()
    return largest_allocation(work, device)


def test_the_watch_sees_freed_memory(device) -> None:
    assert largest_allocation(lambda: torch.empty(1000, device=device) + 1, device) >= 4000


@interpreted()
@every_fused_backend
def test_no_weight(backend: str, device) -> None:
    """C_out * C_in * K is 60 times the activations here: only W (or its gradient) is that large."""
    channels, size, kernel = 32, 8, 11
    weight = channels * channels * kernel**2 * 4
    assert _step(backend, channels, size, kernel, device) < weight
    assert _step("reference", channels, size, kernel, device) >= weight


@interpreted()
@every_fused_backend
def test_no_responses(backend: str, device) -> None:
    """z is R = 5 times the input; the composite backend forms it."""
    channels, size, kernel = 8, 40, 5
    responses = 5 * channels * size**2 * 4
    assert _step(backend, channels, size, kernel, device) < responses
    assert _step("composite", channels, size, kernel, device) >= responses


@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("tool", TOOLS)
def test_tools_keep_the_contract(tool: Tool, backend: str, device, compiler) -> None:
    """The same two shapes; of W, and of z, in the type in which they would be computed."""
    bytes_each = 2 if tool is _under_autocast else 4
    weight = 32 * 32 * 11**2 * bytes_each
    assert _step(backend, 32, 8, 11, device, tool) < weight
    assert _step("reference", 32, 8, 11, device, tool) >= weight
    responses = 5 * 8 * 40**2 * bytes_each
    assert _step(backend, 8, 40, 5, device, tool) < responses
    assert _step("composite", 8, 40, 5, device, tool) >= responses


@every_fused_backend
@pytest.mark.parametrize("kernel", [3, 7])
def test_saved_for_backward(kernel: int, backend: str, device) -> None:
    """x, A, phi, the MLP's parameters and the mixing of its features, whatever the kernel size."""
    conv = HyperConv2d(16, 16, kernel, padding=kernel // 2, backend=backend, device=device)
    input = torch.randn(1, 16, 9, 9, device=device, requires_grad=True)
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        conv(input)
    basis = conv.rank * kernel**2
    state = (*conv.parameters(), *conv.buffers())
    parameters = sum(tensor.numel() for tensor in state if tensor is not conv.bias)
    assert sum(saved) <= input.numel() + basis + parameters + conv.taps.numel()
