"""Layers before they know their input channels, and layers made again by what they say of themselves."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

import hyperconv_ext
from hyperconv_ext import HyperConv2d, HyperConvTranspose2d, LazyHyperConv2d, LazyHyperConvTranspose2d
from hyperconv_ext.hypernet import CoordinateMLP

from .test_modules import Fourier

NAMES = [f"HyperConv{kind}{dims}d" for kind in ("", "Transpose") for dims in (1, 2, 3)]
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "norm": {"weight_norm": "batch", "groups": 2},
    "published": {"parametrization": "published", "weight_bias": False, "bias": False},
}


def pair(name: str) -> tuple[type[nn.Module], type[nn.Module]]:
    return getattr(hyperconv_ext, name), getattr(hyperconv_ext, f"Lazy{name}")


def an_input(name: str, channels: int = 4) -> Tensor:
    return torch.randn(2, channels, *(7, 6, 5)[: int(name[-2])])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_the_first_call_makes_the_plain_layer(name: str, options: dict[str, Any]) -> None:
    plain, kind = pair(name)
    lazy: Any = kind(6, 3, **options)
    assert isinstance(lazy, plain) and lazy.has_uninitialized_params() and lazy.in_channels == 0
    assert is_lazy(lazy.coefficients) and (lazy.bias is None or is_lazy(lazy.bias))
    assert repr(lazy).startswith(f"{kind.__name__}(\n  0, 6, kernel_size=")
    input = an_input(name)
    output = lazy(input)
    assert type(lazy) is plain and not lazy._forward_pre_hooks
    made: Any = plain(4, 6, 3, **options)
    assert repr(lazy) == repr(made) and lazy.rank == made.rank
    shapes = {key: value.shape for key, value in made.state_dict().items()}
    assert {key: value.shape for key, value in lazy.state_dict().items()} == shapes
    assert set(vars(lazy)) == set(vars(made))
    made.load_state_dict(lazy.state_dict())
    torch.testing.assert_close(made(input), output)
    output.square().mean().backward()
    assert all(p.grad is not None for p in lazy.parameters())


@pytest.mark.parametrize("name", ["HyperConv2d", "HyperConvTranspose2d"])
def test_it_starts_as_the_plain_layer(name: str) -> None:
    """The same deviation, and the same moves of W in a step of gradient descent."""
    plain, kind = pair(name)
    channels = 64
    made = [plain(channels, 32, 5), kind(32, 5)]
    for layer in made:
        layer(torch.randn(1, channels, 8, 8))
    gains = [layer.hypernet.weight_gain for layer in made]
    assert gains[0] == pytest.approx(gains[1])
    bounds = [[(one.weight_bound, one.bias_bound) for one in layer.hypernet.layers] for layer in made]
    for (weight, bias), (other, offset) in zip(*bounds, strict=True):
        assert weight == pytest.approx(other) and bias == pytest.approx(offset)
    deviations = [layer.weight.std().item() for layer in made]
    assert deviations[0] == pytest.approx(deviations[1], rel=0.3)


def test_the_functions_do_not_change_with_the_channels() -> None:
    lazy = LazyHyperConvTranspose2d(4, 5)
    taps = lazy.taps
    before = lazy.hypernet(taps).detach()
    lazy(torch.randn(1, 64, 8, 8))
    torch.testing.assert_close(lazy.hypernet(taps).detach(), before)
    given = CoordinateMLP(2, weight_gain=0.7)
    lazy = LazyHyperConvTranspose2d(4, 5, hypernet=given)
    lazy(torch.randn(1, 64, 8, 8))
    assert lazy.hypernet is given and given.weight_gain == 0.7


def test_a_hypernet_that_was_given_stays() -> None:
    for hypernet in (Fourier(3), CoordinateMLP(2, num_features=3)):
        before = copy.deepcopy(hypernet.state_dict())
        lazy = LazyHyperConv2d(4, 3, hypernet=hypernet)
        lazy(torch.randn(1, 2, 8, 8))
        assert lazy.hypernet is hypernet
        assert all(torch.equal(value, before[key]) for key, value in hypernet.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_loads_a_state(name: str, options: dict[str, Any]) -> None:
    plain, kind = pair(name)
    trained: Any = plain(4, 6, 3, **options)
    lazy: Any = kind(6, 3, **options)
    lazy.load_state_dict(trained.state_dict())
    assert type(lazy) is kind and not lazy.has_uninitialized_params() and lazy.in_channels == 4
    input = an_input(name)
    torch.testing.assert_close(lazy(input), trained(input))
    assert type(lazy) is plain and repr(lazy) == repr(trained)
    assert set(vars(lazy)) == set(vars(trained))


def test_what_a_state_does_not_hold_is_drawn() -> None:
    trained = HyperConv2d(4, 6, 3, weight_norm="batch")
    state = {key: value for key, value in trained.state_dict().items() if "bias" not in key}
    lazy = LazyHyperConv2d(6, 3, weight_norm="batch")
    with pytest.raises(RuntimeError, match="Missing key"):
        lazy.load_state_dict(state)
    lazy = LazyHyperConv2d(6, 3, weight_norm="batch")
    lazy.load_state_dict(state, strict=False)
    assert torch.equal(lazy.coefficients, trained.coefficients)
    bound = 1 / (4 * 9) ** 0.5
    assert 0 < lazy.bias.abs().max() <= bound and lazy.weight_norm.bias.abs().max() <= bound


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_states_before_the_first_call(options: dict[str, Any]) -> None:
    lazy, other = LazyHyperConv2d(6, 3, **options), LazyHyperConv2d(6, 3, **options)
    state = lazy.state_dict()
    assert isinstance(state["coefficients"], UninitializedParameter)
    other.load_state_dict(state)
    assert other.has_uninitialized_params()
    assert torch.equal(other.hypernet.layers[0].weight, lazy.hypernet.layers[0].weight)
    with pytest.raises(RuntimeError, match="shape of an uninitialized parameter"):
        HyperConv2d(4, 6, 3, **options).load_state_dict(state)
    other(torch.randn(1, 4, 8, 8))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(copied: Any) -> None:
    lazy = LazyHyperConv2d(6, 3, weight_norm="batch")
    other = copied(lazy)
    assert type(other) is LazyHyperConv2d and other.has_uninitialized_params()
    other(torch.randn(1, 4, 8, 8))
    assert type(other) is HyperConv2d and lazy.has_uninitialized_params()
    again = copied(other)
    input = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(again(input), other(input))
    lazy(torch.randn(1, 2, 8, 8))
    assert lazy.in_channels == 2 and other.in_channels == 4


def test_moves_before_the_first_call() -> None:
    lazy = LazyHyperConv2d(6, 3, weight_norm="batch").double().to("cpu")
    lazy(torch.randn(1, 4, 8, 8, dtype=torch.float64))
    assert {p.dtype for p in lazy.parameters()} == {torch.float64}
    meta = LazyHyperConv2d(6, 3, device="meta", dtype=torch.bfloat16)
    meta(torch.randn(1, 4, 8, 8, device="meta", dtype=torch.bfloat16))
    assert meta.coefficients.is_meta and meta.coefficients.dtype == torch.bfloat16


def test_without_a_batch_and_by_keyword() -> None:
    lazy = LazyHyperConv2d(6, 3)
    assert lazy(input=torch.randn(5, 8, 8)).shape == (6, 6, 6) and lazy.in_channels == 5
    lazy = LazyHyperConvTranspose2d(6, 3, 2)
    assert lazy(torch.randn(1, 5, 4, 4), output_size=(10, 10)).shape == (1, 6, 10, 10)


def test_a_model_with_lazy_layers_trains() -> None:
    """By an optimizer that was there before the parameters had their shapes, too."""
    norm = LazyHyperConv2d(8, 3, padding=1, weight_norm="batch")
    model = nn.Sequential(norm, nn.ReLU(), LazyHyperConvTranspose2d(4, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(1, 3, 9, 9))  # dry run
    assert [type(layer) for layer in model] == [HyperConv2d, nn.ReLU, HyperConvTranspose2d]
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(2, 3, 9, 9)).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_compiled_lazy_layer() -> None:
    lazy = LazyHyperConv2d(6, 3)
    input = torch.randn(1, 4, 8, 8)
    compiled = torch.compile(lazy, backend="eager")
    torch.testing.assert_close(compiled(input), lazy(input))
    assert type(lazy) is HyperConv2d


def test_initialisation_waits() -> None:
    lazy = LazyHyperConv2d(6, 3)
    lazy.reset_parameters()
    assert lazy.has_uninitialized_params()

    def zero(module: nn.Module) -> None:
        if isinstance(module, HyperConv2d):
            nn.init.zeros_(module.coefficients)

    with pytest.raises(ValueError, match="uninitialized parameter"):
        lazy.apply(zero)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (1, 1, 4, 8, 8), r"input: expected \[B, C_in, H, W\]"),
        ({}, (8, 8), r"input: expected \[B, C_in, H, W\]"),
        ({"groups": 2}, (1, 3, 8, 8), "in_channels: expected a multiple of groups=2, got 3"),
    ],
)
def test_inputs_that_do_not_fit(options: dict[str, Any], shape: tuple[int, ...], message: str) -> None:
    lazy = LazyHyperConv2d(6, 3, **options)
    with pytest.raises(ValueError, match=message):
        lazy(torch.randn(shape))
    assert lazy.has_uninitialized_params()
    lazy(torch.randn(1, 4, 8, 8))


def test_data_parallel_and_weight_before_the_first_call() -> None:
    lazy = LazyHyperConv2d(6, 3)
    with pytest.raises(RuntimeError, match="uninitialized parameters"):
        lazy._replicate_for_data_parallel()
    with pytest.raises((RuntimeError, ValueError), match="uninitialized parameter"):
        _ = lazy.weight


# Layers built again from what they say of themselves


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden_features": (8,), "num_features": 3, "activation": "gelu"},
        {"hidden_features": (), "weight_norm": "batch", "weight_bias": False},
        {"parametrization": "published", "groups": 2, "stride": 2, "padding": 1, "bias": False},
        {"coordinates": "centered", "padding": "same", "padding_mode": "reflect", "algorithm": "basis"},
    ],
)
def test_repr_makes_the_layer_again(options: dict[str, Any]) -> None:
    layer = HyperConv2d(4, 6, 5, **options)
    again = eval(f"HyperConv2d({layer.extra_repr()})")
    again.load_state_dict(layer.state_dict())
    input = torch.randn(1, 4, 9, 9)
    torch.testing.assert_close(again(input), layer(input))
    assert repr(again) == repr(layer)


def test_attributes_make_the_layer_again() -> None:
    layer = HyperConvTranspose2d(4, 6, 5, hidden_features=(8, 9), num_features=3, activation="tanh")
    assert (layer.hidden_features, layer.num_features, layer.activation) == ((8, 9), 3, "tanh")
    assert layer.rank == 4 == len(layer.basis())
    names = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "hidden_features",
        "num_features",
        "activation",
    )
    again = HyperConvTranspose2d(**{name: getattr(layer, name) for name in names})
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.weight, layer.weight)
    other = HyperConv2d(4, 6, 5, hypernet=Fourier(3))
    assert (other.hidden_features, other.num_features, other.activation) == (None, 6, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", 3), ("num_features", 3), ("hidden_features", (8,)), ("activation", "relu")],
)
def test_they_are_fixed(name: str, value: Any) -> None:
    with pytest.raises(AttributeError, match=f"{name}: expected to stay .* once the layer is made"):
        setattr(HyperConv2d(4, 6, 3), name, value)
