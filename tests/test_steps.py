"""What a layer keeps from a step serves only those that are like it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hyperconv_ext import HyperConv2d, planner
from hyperconv_ext.functional import general

from .conftest import QUICK, precision_of_the_framework
from .oracle import relative_error

BACKENDS = ["composite", *QUICK]


@pytest.fixture(autouse=True)
def exact(device) -> Iterator[None]:
    with precision_of_the_framework(device):
        yield


def _layer(backend: str, device) -> HyperConv2d:
    return HyperConv2d(32, 16, 3, padding=1, backend=backend, device=device)


def _input(device, *shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 32, 6, 5)), device=device)


def _results(layer: HyperConv2d, input: Tensor) -> list[Tensor]:
    """The output without gradients, that with them, and all gradients, those of parameters by name."""
    with torch.no_grad():
        results = [layer(input)]
    leaf = input.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = layer(leaf)
    wanted = [leaf, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator).to(output)
    return [*results, output, *torch.autograd.grad(output, wanted, grad)]


def _agree(layer: HyperConv2d, input: Tensor, error: float = 1e-5) -> None:
    """With the reference, twice: where a step is made, and where it is taken up."""
    reference = copy.deepcopy(layer)
    reference.backend = "reference"
    expected = _results(reference, input)
    for _ in range(2):
        for result, truth in zip(_results(layer, input), expected, strict=True):
            assert result.dtype == truth.dtype and result.shape == truth.shape
            assert relative_error(result, truth) < error


class _Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


def _hooked(layer: HyperConv2d) -> None:
    layer.hypernet.layers[1].register_forward_hook(lambda module, args, output: 0.5 * output)


def _replaced(layer: HyperConv2d) -> None:
    layer.coefficients = nn.Parameter(torch.randn_like(layer.coefficients))


def _written(layer: HyperConv2d) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)


CHANGES: dict[str, Callable[[HyperConv2d], object]] = {
    "values": _written,
    "another parameter": _replaced,
    "a parametrization": lambda layer: parametrize.register_parametrization(
        layer, "coefficients", _Doubled()
    ),
    "a hook": _hooked,
    "a frozen parameter": lambda layer: layer.coefficients.requires_grad_(False),
    "a frozen network": lambda layer: layer.hypernet.requires_grad_(False),
    "no bias": lambda layer: setattr(layer, "bias", None),
    "padding": lambda layer: setattr(layer, "padding", (2, 0)),
    "dilation": lambda layer: setattr(layer, "dilation", (1, 2)),
    "activation": lambda layer: setattr(layer.hypernet, "activation", "tanh"),
    "channels last": lambda layer: layer.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_of_the_layer(change: str, backend: str, device) -> None:
    layer, input = _layer(backend, device), _input(device)
    _agree(layer, input)
    CHANGES[change](layer)
    _agree(layer, input)


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_other_inputs(backend: str, device) -> None:
    layer = _layer(backend, device)
    for input in (
        _input(device),
        _input(device, 3, 32, 6, 5),
        _input(device, 2, 32, 9, 5),
        _input(device, 2, 32, 6, 5).to(memory_format=torch.channels_last),
        _input(device, 2, 64, 6, 5)[:, ::2],
        _input(device, 2, 32, 6, 6)[..., 1:],
        _input(device, 1, 32, 6, 5).expand(2, -1, -1, -1),
        _input(device, 32, 6, 5),
    ):
        _agree(layer, input)
    if backend != "cuda":  # whose kernels take no float64
        _agree(layer.double(), _input(device).double(), 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mistakes_are_still_found(backend: str, device) -> None:
    layer, input = _layer(backend, device), _input(device)
    for _ in range(2):
        layer(input)
    with pytest.raises(ValueError, match="input: expected 32 channels"):
        layer(_input(device, 2, 31, 6, 5))
    with pytest.raises((TypeError, RuntimeError), match="dtype"):
        layer(input.double())
    with pytest.raises(TypeError, match="input: expected a dense tensor, got a nested one"):
        layer(torch.nested.nested_tensor([input[0], input[1]]))
    with pytest.raises(TypeError, match="input: expected a dense tensor, got layout"):
        layer(input.to_sparse())
    with pytest.raises(ValueError, match="backend: expected"):
        layer.backend = "none"


@pytest.mark.parametrize("backend", BACKENDS)
def test_casts_and_transforms_come_later(backend: str, device) -> None:
    """Autocast, `torch.func`, and second derivatives, once a plain step is known."""
    layer, input = _layer(backend, device), _input(device)
    reference = copy.deepcopy(layer)
    reference.backend = "reference"
    for _ in range(2):
        _results(layer, input)
    with torch.autocast(device.type, torch.bfloat16):
        assert layer(input).dtype == torch.bfloat16
    assert layer(input).dtype == torch.float32
    examples = torch.stack([input, -input])
    expected = torch.stack([reference(example) for example in examples])
    assert relative_error(torch.vmap(layer)(examples), expected) < 1e-5
    _, tangent = torch.func.jvp(layer, (input,), (examples[1],))
    _, truth = torch.func.jvp(reference, (input,), (examples[1],))
    assert relative_error(tangent, truth) < 1e-5

    def penalty(module: HyperConv2d) -> Tensor:
        leaf = input.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(module(leaf).square().sum(), leaf, create_graph=True)
        (result,) = torch.autograd.grad(grad.square().sum(), module.coefficients)
        return result

    assert relative_error(penalty(layer), penalty(reference)) < 1e-4


def test_the_variable_is_read_at_every_step(monkeypatch: pytest.MonkeyPatch, device) -> None:
    layer, input = _layer("auto", device), _input(device)
    asked = []
    resolve = planner.resolve
    monkeypatch.setattr(planner, "resolve", lambda *args: asked.append(resolve(*args)) or asked[-1])
    for name in ("composite", "reference", "composite"):
        monkeypatch.setenv("HYPERCONV_BACKEND", name)
        layer(input)
    assert asked[0] == "composite" and asked[-1] in ("composite", "reference")
    assert "reference" in asked
    monkeypatch.setenv("HYPERCONV_BACKEND", "none")
    with pytest.raises(ValueError, match="HYPERCONV_BACKEND: expected one of"):
        layer(input)


@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("recorded", [False, True])
def test_nothing_is_worked_out_twice(
    backend: str, recorded: bool, monkeypatch: pytest.MonkeyPatch, device
) -> None:
    layer, input = _layer(backend, device), _input(device)
    monkeypatch.setattr(general, "_steps", {})
    with torch.set_grad_enabled(recorded):
        expected = layer(input)
        assert len(general._steps) == 1
        monkeypatch.setattr(general, "_checked", None)
        assert torch.equal(layer(input), expected)
        monkeypatch.undo()


def test_steps_are_forgotten_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer("cpu", torch.device("cpu"))
    monkeypatch.setattr(general, "_steps", {})
    monkeypatch.setattr(general, "_MOST_STEPS", 3)
    sizes = []
    for batch in range(1, 6):
        layer(_input("cpu", batch, 32, 4, 4))
        sizes.append(len(general._steps))
    assert sizes == [1, 2, 3, 1, 2]
