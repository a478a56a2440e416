"""What is done to the modules of a model reaches the hyper-network if it is meant to, and only then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize

from hyperconv_ext import (
    CoordinateMLP,
    HyperConv1d,
    HyperConv2d,
    HyperConvTranspose2d,
    explain,
    parameter_groups,
)

from .conftest import FUSED, QUICK, precision_of_the_framework

BACKENDS = ["reference", "composite", *QUICK]  # who evaluates the network is one decision for all
every_backend = pytest.mark.parametrize("backend", BACKENDS)
HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)


def _input(device) -> Tensor:
    return torch.randn(1, 2, 4, 4, device=device)


def _check(layer: HyperConv2d, input: Tensor) -> None:
    """The layer computes with the W it shows."""
    with precision_of_the_framework(input.device):
        torch.testing.assert_close(layer(input), F.conv2d(input, layer.weight, layer.bias))


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("where", ["hypernet", "hypernet.layers.0", "hypernet.layers.2"])
@pytest.mark.parametrize("weight_norm", [None, "batch"])
@every_backend
def test_hooks_fire(backend: str, weight_norm: str | None, where: str, hook: str, device) -> None:
    layer = HyperConv2d(2, 3, 2, backend=backend, weight_norm=weight_norm, device=device)
    input = _input(device)
    expected = layer(input)
    calls: list[nn.Module] = []
    watched = layer.get_submodule(where)
    handle = getattr(watched, hook)(lambda module, *_: calls.append(module))
    output = layer(input)
    output.sum().backward()
    assert calls and all(module is watched for module in calls)
    torch.testing.assert_close(output, expected)
    calls.clear()
    handle.remove()
    layer(input).sum().backward()
    assert not calls


@pytest.mark.parametrize("backend", ["reference", "composite", *FUSED])
def test_what_hooks_return_counts(backend: str, device) -> None:
    layer = HyperConv2d(2, 3, 2, backend=backend, device=device)
    input = _input(device)
    before = layer(input)
    layer.hypernet.register_forward_hook(lambda module, args, output: 2 * output)
    layer.hypernet.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert not torch.allclose(layer(input), before)
    _check(layer, input)


def test_explain_says_who_evaluates_the_network(device) -> None:
    layer = HyperConv2d(2, 3, 2, backend="composite", device=device)
    assert "CoordinateMLP, run by PyTorch" not in explain(layer, _input(device))
    layer.hypernet.layers[0].register_forward_hook(lambda *_: None)
    assert "CoordinateMLP, run by PyTorch as the module it is" in explain(layer, _input(device))


@every_backend
def test_hooks_of_all_modules_fire(backend: str, device) -> None:
    layer = HyperConv2d(2, 3, 2, backend=backend, device=device)
    seen: list[nn.Module] = []
    handle = register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        layer(_input(device))
    finally:
        handle.remove()
    assert set(seen) == {layer, layer.hypernet, *layer.hypernet.layers, layer.mixing}


@pytest.mark.parametrize("where", ["hypernet", "hypernet.layers.1"])
@every_backend
def test_a_forward_of_the_instance(backend: str, where: str, device) -> None:
    """As tools that load parameters just in time patch it."""
    layer = HyperConv2d(2, 3, 2, backend=backend, device=device)
    module = layer.get_submodule(where)
    original = module.forward
    module.forward = lambda *args: 3 * original(*args)
    input = _input(device)
    patched = layer(input)
    _check(layer, input)
    del module.forward
    assert not torch.allclose(layer(input), patched)


class Stretched(CoordinateMLP):
    def forward(self, coordinates: Tensor) -> Tensor:
        return super().forward(2 * coordinates)


class Called(CoordinateMLP):
    def __call__(self, coordinates: Tensor) -> Tensor:
        return -super().__call__(coordinates)


@pytest.mark.parametrize("kind", [Stretched, Called])
@every_backend
def test_a_subclass_of_the_mlp(backend: str, kind: type[CoordinateMLP], device) -> None:
    network = kind(2, (5,), 3, device=device)
    options = {"weight_bias": False, "parametrization": "published", "backend": backend}
    layer = HyperConv2d(2, 3, 2, hypernet=network, **options, device=device)
    torch.testing.assert_close(layer.basis().flatten(1).T, network(layer.taps))
    assert not torch.allclose(
        layer.basis(), CoordinateMLP.basis(network, layer.taps, False).view(3, 2, 2)
    )
    _check(layer, _input(device))


@every_backend
def test_a_replaced_layer(backend: str, device) -> None:
    layer = HyperConv2d(2, 3, 2, backend=backend, device=device)
    layer.hypernet.layers[1] = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)).to(device)
    input = _input(device)
    _check(layer, input)
    layer(input).sum().backward()
    assert layer.hypernet.layers[1][0].weight.grad.any()
    if backend in ("reference", "composite"):
        assert layer.bfloat16()(input.bfloat16()).dtype == torch.bfloat16


class Doubled(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return 2 * tensor

    def right_inverse(self, tensor: Tensor) -> Tensor:
        return tensor / 2


@pytest.mark.parametrize(
    ("where", "name"), [("hypernet.layers.1", "weight"), ("", "coefficients"), ("", "bias")]
)
@every_backend
def test_parametrizations(backend: str, where: str, name: str, device) -> None:
    layer = HyperConv2d(2, 3, 2, backend=backend, device=device)
    module, input = layer.get_submodule(where), _input(device)
    original = getattr(module, name).detach().clone()
    parametrize.register_parametrization(module, name, Doubled())
    with torch.no_grad():
        module.parametrizations[name].original.copy_(original)
    torch.testing.assert_close(getattr(module, name), 2 * original)
    _check(layer, input)
    layer(input).sum().backward()
    assert module.parametrizations[name].original.grad.any()
    layer.reset_parameters()
    assert not torch.equal(getattr(module, name), 2 * original)
    _check(layer, input)


@every_backend
def test_spectral_norm_of_the_hypernetwork(backend: str, device) -> None:
    layer = HyperConv2d(2, 3, 2, backend=backend, device=device)
    for part in layer.hypernet.layers:
        parametrizations.spectral_norm(part)
    layer.eval()
    _check(layer, _input(device))


def _of_linear_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def test_no_part_is_a_linear_layer() -> None:
    """So that the initialisation, the adapters and the quantisation of a model's own pass it by."""
    layers = [
        HyperConv1d(2, 3, 3),
        HyperConv2d(2, 3, 3, weight_norm="batch"),
        HyperConvTranspose2d(2, 3, 3),
    ]
    model = nn.Sequential(*layers, nn.Linear(4, 4))
    before = [layer.weight.clone() for layer in layers]
    assert _of_linear_layers(model) == ["3"]
    for module in model.modules():
        if isinstance(module, nn.Linear) or "Linear" in type(module).__name__:
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    assert all(torch.equal(a, b.weight) for a, b in zip(before, layers, strict=True))
    quantised = quantize_dynamic(nn.Sequential(HyperConv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4)))
    assert type(quantised[0].hypernet.layers[0]) is type(layers[0].hypernet.layers[0])
    assert type(quantised[2]) is not nn.Linear


def test_keys_are_those_of_linear_layers() -> None:
    keys = {f"layers.{index}.{name}" for index in range(3) for name in ("weight", "bias")}
    assert set(CoordinateMLP(2).state_dict()) == keys


@pytest.mark.parametrize("backend", ["reference", "composite"])
def test_hooks_under_compile(backend: str, device) -> None:
    layer = HyperConv2d(2, 3, 2, backend=backend, device=device)
    layer.hypernet.register_forward_hook(lambda module, args, output: 2 * output)
    input = _input(device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input), layer(input))


def _names(model: nn.Module, groups: list[dict], decay: float) -> set[str]:
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    (group,) = [group for group in groups if group["weight_decay"] == decay]
    names = [name_of[id(parameter)] for parameter in group["params"]]
    assert len(names) == len(set(names))
    return set(names)


class Network(nn.Module):
    """Shared layers, frozen ones, and hyper-networks of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = HyperConv2d(2, 4, 3, weight_norm="batch")
        self.mixed = HyperConv2d(4, 4, 3, hypernet=nn.Linear(2, 3))
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.head.weight
        self.frozen = nn.Conv2d(4, 4, 1)
        self.frozen.requires_grad_(False)


def test_parameter_groups() -> None:
    model = Network()
    groups = parameter_groups(model, 0.05)
    decayed = {"conv.coefficients", "mixed.coefficients", "head.weight"}
    assert _names(model, groups, 0.05) == decayed
    rest = {n for n, p in model.named_parameters() if p.requires_grad} - decayed
    assert _names(model, groups, 0.0) == rest
    assert {"conv.hypernet.layers.0.weight", "mixed.hypernet.weight", "conv.weight_norm.weight"} <= rest


def test_parameter_groups_of_special_models() -> None:
    assert parameter_groups(nn.ReLU()) == []
    (only,) = parameter_groups(nn.BatchNorm2d(3))
    assert only["weight_decay"] == 0 and len(only["params"]) == 2
    layer = HyperConv2d(2, 3, 3)
    tied = nn.Linear(2, 16)
    tied.weight = layer.hypernet.layers[0].weight
    model = nn.ModuleList([tied, layer])
    assert _names(model, parameter_groups(model, 0.1), 0.1) == {"1.coefficients"}


def _step(make: Callable[[nn.Module], torch.optim.Optimizer]) -> HyperConv2d:
    torch.manual_seed(0)
    layer = HyperConv2d(2, 3, 3)
    optimizer = make(layer)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return layer


def test_decay_shrinks_the_kernel_and_leaves_its_shape() -> None:
    fresh = _step(lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0))
    decayed = _step(lambda model: torch.optim.AdamW(parameter_groups(model, 1.0), lr=0.1))
    torch.testing.assert_close(decayed.weight.clone(), 0.9 * fresh.weight)
    assert torch.equal(decayed.basis(), fresh.basis())
