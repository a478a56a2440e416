"""The window that kernels of many taps along two axes have: phi = C (w f) + c."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperconv_ext import (
    BasisTable,
    HyperConv1d,
    HyperConv2d,
    HyperConv3d,
    HyperConvTranspose2d,
    LazyHyperConv2d,
    functional,
)
from hyperconv_ext.modules import HyperConvNd

from .conftest import FUSED
from .oracle import relative_error

SIZE = 9
BACKENDS, GPU = ("reference", "composite", *FUSED), ("triton", "cuda")


def _layer(**options: Any) -> HyperConv2d:
    return HyperConv2d(3, 4, SIZE, **{"padding": SIZE // 2} | options)


def _window(layer: HyperConvNd) -> Tensor:
    """w [K], by its formula at the distances of the taps from the centre."""
    axes = [torch.arange(size) - (size - 1) / 2 for size in layer.kernel_size]
    distances = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1).square().sum(0)
    return (1 + distances / 3.0**2) ** -2


@pytest.mark.parametrize(
    ("make", "windowed"),
    [
        (lambda: HyperConv2d(2, 2, 9), True),
        (lambda: HyperConv2d(2, 2, (9, 8)), False),
        (lambda: HyperConv2d(2, 2, (1, 31)), False),
        (lambda: HyperConv1d(2, 2, 31), False),
        (lambda: HyperConv3d(2, 2, (3, 9, 11)), True),
        (lambda: HyperConv3d(2, 2, (3, 3, 11)), False),
        (lambda: HyperConvTranspose2d(2, 2, 11), True),
        (lambda: HyperConv2d(2, 2, 11, coordinates="centered", weight_norm="batch"), True),
        (lambda: HyperConv2d(2, 2, 11, parametrization="published"), False),
        (lambda: HyperConv2d(2, 2, 11, hypernet=BasisTable((11, 11))), False),
        (lambda: HyperConv2d.from_conv(nn.Conv2d(1, 2, 11), rank=3), False),
        (lambda: HyperConv2d.from_conv(nn.Conv2d(1, 2, 11), rank=3, init="match"), True),
    ],
)
def test_who_has_one(make: Callable[[], HyperConvNd], windowed: bool) -> None:
    layer = make()
    has = layer.mixing is not None and layer.mixing.window is not None
    assert has == windowed
    assert any("window" in key for key in layer.state_dict()) == windowed
    if layer.mixing is not None and windowed:
        actual = layer.mixing.window_at(layer.taps)
        assert actual is not None
        torch.testing.assert_close(actual.squeeze(1), _window(layer))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"weight_bias": False, "num_features": 3}], ids=str)
def test_values_and_gradients(backend: str, options: dict[str, Any], device) -> None:
    layer = _layer(backend=backend, device=device, **options)
    exact = copy.deepcopy(layer).double()
    exact.backend = "reference"
    hypernet: Any = exact.hypernet
    features = hypernet(exact.taps)
    assert exact.mixing is not None
    basis = exact.mixing.weight @ (features.T * _window(exact).to(features)) + exact.mixing.bias[:, None]
    shaped = basis.view(-1, SIZE, SIZE)
    input = torch.randn(2, 3, 10, 8, device=device)
    wide = input.double()
    expected = functional.basis_conv2d(
        wide, exact.coefficients, shaped, exact.bias, padding=SIZE // 2, backend="reference"
    )
    actual = layer(input)
    tolerance = 2.0**-8 if backend in GPU else 2.0**-15  # of the tensor cores' tf32
    assert relative_error(actual.detach(), expected.detach()) < tolerance
    weights = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, list(exact.parameters()), weights)
    ours = torch.autograd.grad(actual, list(layer.parameters()), weights.to(actual))
    for (name, _), one, other in zip(layer.named_parameters(), ours, theirs, strict=True):
        assert relative_error(one, other) < 4 * tolerance, name


def test_derivatives_of_the_second_order() -> None:
    layer = _layer(num_features=2, hidden_features=(3,)).double()
    names = [name for name, _ in layer.named_parameters()]
    input = torch.randn(1, 3, 3, 2, dtype=torch.float64)

    def output(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (input,))

    parameters = tuple(p.detach().requires_grad_() for p in layer.parameters())
    torch.autograd.gradcheck(output, parameters, fast_mode=True)
    torch.autograd.gradgradcheck(output, parameters, fast_mode=True)


@torch.no_grad()
def test_it_concentrates_on_the_centre() -> None:
    """Of what is not constant, where without a window there is as much everywhere: 9 taps of 81."""
    shares = []
    for windowed in (True, False):
        layer = _layer()
        assert layer.mixing is not None
        if not windowed:
            layer.mixing.place(None)
            layer.mixing.fit(layer._module_features())
        functions = layer.basis()[:-1].square()
        shares.append(float(functions[:, 3:6, 3:6].sum() / functions.sum()))
    assert shares[0] > 0.3 and shares[1] < 0.25


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda scale: scale.mul_(2),
    "through data": lambda scale: scale.data.mul_(2),
}


@torch.no_grad()
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_scale_counts(change: str, train: bool) -> None:
    layer, input = _layer().train(train), torch.randn(1, 3, 9, 9)
    for _ in range(3):
        before = layer(input)
    assert layer.mixing is not None
    CHANGES[change](layer.mixing.window)  # type: ignore[arg-type]
    other = copy.deepcopy(layer)
    other.backend = "reference"
    assert relative_error(layer(input), other(input)) < 1e-5 < relative_error(before, other(input))


def test_states_say_whether_there_is_one() -> None:
    input = torch.randn(1, 3, 9, 9)
    one, other = _layer(), _layer()
    assert other.mixing is not None
    other.mixing.place(None)  # as versions without windows had it
    for source in (one, other):
        for make in (
            _layer,
            lambda: _layer().requires_grad_(False),
            lambda: LazyHyperConv2d(4, SIZE, padding=4),
        ):
            target = make()
            target.load_state_dict(source.state_dict())
            assert relative_error(target(input).detach(), source(input).detach()) < 1e-6
        with torch.device("meta"):
            target = _layer()
        target.load_state_dict(source.state_dict(), assign=True)
        assert relative_error(target(input).detach(), source(input).detach()) < 1e-6
    scale = other.state_dict() | {"mixing.window": torch.ones(3)}
    with pytest.raises(RuntimeError, match=r"mixing\.window"):
        _layer().load_state_dict(scale)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(copied: Callable[[HyperConv2d], HyperConv2d]) -> None:
    layer, input = _layer(), torch.randn(1, 3, 9, 9)
    expected = layer(input)
    assert torch.equal(copied(layer)(input), expected)


def test_what_was_pickled_before_there_were_windows() -> None:
    layer, input = HyperConv2d(3, 4, 5, padding=2), torch.randn(1, 3, 9, 9)
    expected = layer(input)
    assert layer.mixing is not None
    state = layer.mixing.__dict__
    del state["_buffers"]["window"], state["_windowed"]
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(input), expected)
    again.reset_parameters()
    assert again.with_kernel_size(11).mixing.window is None


@torch.no_grad()
@pytest.mark.parametrize("coordinates", ["unit", "centered"])
def test_another_kernel_size(coordinates: str) -> None:
    """The same function: where the grids have taps in common, they agree."""
    layer = _layer(coordinates=coordinates)
    more = layer.with_kernel_size(2 * SIZE - 1)
    start, step = (0, 2) if coordinates == "unit" else (SIZE // 2, 1)
    part = slice(start, start + step * SIZE, step)
    torch.testing.assert_close(more.basis()[:, part, part], layer.basis())
    sparse = layer.with_kernel_size(5, dilation=2)
    if coordinates == "centered":
        torch.testing.assert_close(sparse.basis(), layer.basis()[:, ::2, ::2])
    fresh = layer.with_kernel_size(5)
    fresh.reset_parameters()
    assert fresh.mixing is not None and fresh.mixing.window is None


def test_compiled_and_exported() -> None:
    layer, input = _layer(), torch.randn(1, 3, 9, 9)
    expected = layer(input)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(input).detach(), expected.detach()) < 1e-6
    program = torch.export.export(layer.eval(), (input,)).module()
    assert relative_error(program(input).detach(), expected.detach()) < 1e-6


def test_an_ensemble_with_scales_of_its_own() -> None:
    layers, input = [_layer(backend="reference") for _ in range(3)], torch.randn(1, 3, 9, 9)
    for factor, layer in enumerate(layers, 1):
        assert layer.mixing is not None and layer.mixing.window is not None
        layer.mixing.window.mul_(factor)
    state = torch.func.stack_module_state(layers)
    base = copy.deepcopy(layers[0])
    outputs = torch.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (input,)))(*state)
    for output, layer in zip(outputs, layers, strict=True):
        assert relative_error(output.detach(), layer(input).detach()) < 1e-5
