"""The layers in what PyTorch has around training: checkpointing, averages of models, files, programs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from hyperconv_ext import HyperConv2d, HyperConvTranspose2d

every_backend = pytest.mark.parametrize("backend", ["auto", "composite", "cuda", "cpu"])


def _network(backend: str, device: torch.device) -> nn.Sequential:
    options = {"backend": backend, "device": device}
    return nn.Sequential(
        HyperConv2d(3, 8, 3, padding=1, **options),
        nn.SiLU(),
        HyperConv2d(8, 8, 3, padding=1, weight_norm="batch", **options),
        nn.SiLU(),
        HyperConvTranspose2d(8, 4, 3, stride=2, parametrization="published", **options),
    )


def _gradients(call: Callable[[Tensor], Tensor], network: nn.Module, input: Tensor) -> list[Tensor]:
    """Of the parameters and the input, after the output."""
    network.zero_grad()
    leaf = input.clone().requires_grad_()
    output = call(leaf)
    output.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    return [output.detach(), leaf.grad, *gradients]


@every_backend
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing(autocast: bool, use_reentrant: bool, backend: str, device) -> None:
    """What is computed again is computed the same, to the bit."""
    network = _network(backend, device)
    input = torch.randn(2, 3, 7, 6, device=device)

    def as_one(x: Tensor) -> Tensor:
        return checkpoint(network, x, use_reentrant=use_reentrant)

    def in_parts(x: Tensor) -> Tensor:
        return checkpoint_sequential(network, 2, x, use_reentrant=use_reentrant)

    with torch.autocast(device.type, torch.float16, enabled=autocast):
        expected = _gradients(network, network, input)
        for call in (as_one, in_parts):
            for actual, value in zip(_gradients(call, network, input), expected, strict=True):
                assert torch.equal(actual, value) and value.isfinite().all()


@pytest.mark.parametrize("use_buffers", [False, True])
def test_a_moving_average(use_buffers: bool, device) -> None:
    """Of parameters; the mixing, in which the average must not move, stays what it is."""
    network = _network("auto", device)
    average = AveragedModel(
        network, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers, device=device
    )
    expected = {name: p.detach().clone() for name, p in network.named_parameters()}
    input = torch.randn(2, 3, 7, 6, device=device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        network(input).square().mean().backward()
        optimizer.step()
        average.update_parameters(network)
        for name, p in network.named_parameters():
            expected[name] = expected[name].lerp(p.detach(), 0.5) if step else p.detach().clone()
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name])
    for name, buffer in average.module.named_buffers():
        torch.testing.assert_close(buffer, network.get_buffer(name))
    twin = _network("auto", device)
    twin.load_state_dict(average.module.state_dict())
    torch.testing.assert_close(average(input), twin(input))


def test_mapped_from_a_file(tmp_path: Path, device) -> None:
    """By parameters alone, assigned to a network without numbers; a step of it is the same."""
    network, input = _network("auto", device), torch.randn(2, 3, 7, 6, device=device)
    torch.save(network.state_dict(), tmp_path / "network.pt")
    state = torch.load(tmp_path / "network.pt", weights_only=True, mmap=True)
    loaded = _network("auto", torch.device("meta"))
    loaded.load_state_dict(state, assign=True)
    pairs = zip(_gradients(loaded, loaded, input), _gradients(network, network, input), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected)


@pytest.mark.slow
@pytest.mark.sweep
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a compiler: no g++")
def test_aot_inductor(tmp_path: Path) -> None:
    """A package that is compiled ahead, for batches of any size, and run without the layer."""
    network = HyperConv2d(3, 4, 3, weight_norm="batch").eval()
    input = torch.randn(2, 3, 7, 6)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(network, (input,), dynamic_shapes=({0: batch},))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "network.pt2")
        )
        packaged = torch._inductor.aoti_load_package(path)
        for size in (2, 5):
            input = torch.randn(size, 3, 7, 6)
            torch.testing.assert_close(packaged(input), network(input), rtol=1e-4, atol=1e-5)
