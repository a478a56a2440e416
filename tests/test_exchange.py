"""From nn.ConvNd to a hyper-convolution, and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import hyperconv_ext
from hyperconv_ext import HyperConv1d, HyperConv2d, HyperConvTranspose2d
from hyperconv_ext.modules import HyperConvNd

from .test_modules import Fourier

# Of each class: arguments of nn.ConvNd, and an input
LAYERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "Conv1d": ({"kernel_size": 9, "padding": "same", "padding_mode": "circular"}, (2, 4, 20)),
    "Conv2d": ({"kernel_size": (5, 3), "stride": 2, "padding": (2, 1), "groups": 2}, (2, 4, 9, 8)),
    "Conv3d": ({"kernel_size": 3, "dilation": 2, "bias": False}, (1, 4, 7, 6, 5)),
    "ConvTranspose1d": ({"kernel_size": 7, "stride": 3, "output_padding": 2}, (2, 4, 9)),
    "ConvTranspose2d": (
        {"kernel_size": 4, "stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
        (2, 4, 5, 6),
    ),
    "ConvTranspose3d": ({"kernel_size": 3, "dilation": 2, "bias": False}, (1, 4, 4, 4, 4)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "published": {"parametrization": "published"},
    "no constant": {"weight_bias": False},
    "norm": {"weight_norm": "batch"},
    "norm, no constant": {"weight_norm": "batch", "weight_bias": False},
    "published norm": {"weight_norm": "batch", "parametrization": "published"},
}


def dense(name: str, **options: Any) -> Any:
    return getattr(nn, name)(4, 6, **LAYERS[name][0], **options)


def hyper(name: str) -> type[HyperConvNd]:
    return getattr(hyperconv_ext, f"Hyper{name}")


def deviation(weight: Tensor) -> float:
    return weight.detach().double().square().mean().sqrt().item()


SETTINGS = ("stride", "padding", "dilation", "output_padding", "groups", "padding_mode", "kernel_size")


def check_same_settings(one: Any, other: Any) -> None:
    for name in (*SETTINGS, "in_channels", "out_channels", "training"):
        assert getattr(one, name) == getattr(other, name), name
    assert (one.bias is None) == (other.bias is None)
    for tensor in ("weight", "bias"):
        left, right = getattr(one, tensor), getattr(other, tensor)
        if left is not None:
            assert (left.dtype, left.device, left.shape) == (right.dtype, right.device, right.shape)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_to_conv_computes_the_same(name: str, options: dict[str, Any]) -> None:
    layer = hyper(name)(4, 6, **LAYERS[name][0], **options).eval()
    state = torch.random.get_rng_state()
    conv = layer.to_conv()
    assert torch.equal(state, torch.random.get_rng_state())
    assert type(conv) is getattr(nn, name)
    check_same_settings(layer, conv)
    assert [n for n, _ in conv.named_parameters()] == ["weight"] + ["bias"] * (layer.bias is not None)
    torch.testing.assert_close(conv.weight.detach(), layer.weight.detach().clone(), rtol=0, atol=0)
    input = torch.randn(LAYERS[name][1])
    torch.testing.assert_close(conv(input), layer(input))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_match_has_the_deviation_of_the_convolution(name: str, options: dict[str, Any]) -> None:
    """Against a draw of the class itself, so that the ratio is exact whatever the draw."""
    conv = dense(name).eval()
    with torch.no_grad():
        conv.weight.mul_(10)
    torch.manual_seed(0)
    layer = hyper(name).from_conv(conv, init="match", **options)
    torch.manual_seed(0)
    usual = hyper(name)(4, 6, **LAYERS[name][0], **options)
    check_same_settings(conv, layer)
    if conv.bias is not None:
        assert torch.equal(layer.bias, conv.bias)
    expected = deviation(conv.weight)
    if "parametrization" not in options:
        expected *= deviation(usual.weight) * (3 * conv.weight[0].numel()) ** 0.5
    assert deviation(layer.weight) == pytest.approx(expected, rel=1e-5)


def test_match_of_an_ordinary_convolution_is_an_ordinary_layer() -> None:
    deviations = []
    for seed in range(3):
        torch.manual_seed(seed)
        layer = HyperConv2d.from_conv(nn.Conv2d(32, 32, 5), init="match")
        deviations.append(deviation(layer.weight) / deviation(HyperConv2d(32, 32, 5).weight))
    assert max(deviations) < 1.3 and min(deviations) > 0.75


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    layer = HyperConv2d.from_conv(nn.Conv2d(4, 6, 5, dtype=dtype), init="match")
    assert {p.dtype for p in layer.parameters()} == {dtype}
    conv = layer.to_conv()
    assert conv.weight.dtype == dtype
    exact = torch.einsum("oir,rhw->oihw", layer.coefficients.double(), layer.basis().double())
    error = (conv.weight.double() - exact).abs().max() / exact.abs().max()
    assert error <= torch.finfo(dtype).eps / 2 + 1e-6 * (dtype != torch.float64)


def test_requires_grad_follows() -> None:
    conv = nn.Conv2d(4, 6, 3)
    conv.weight.requires_grad_(False)
    layer = HyperConv2d.from_conv(conv, init="match")
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    back = layer.to_conv()
    assert not back.weight.requires_grad and back.bias.requires_grad
    conv = nn.Conv2d(4, 6, 3)
    conv.bias.requires_grad_(False)
    layer = HyperConv2d.from_conv(conv, init="match")
    assert [n for n, p in layer.named_parameters() if not p.requires_grad] == ["bias"]
    assert not layer.to_conv().bias.requires_grad


def test_memory_format_follows() -> None:
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    layer = HyperConv2d.from_conv(conv, init="match")
    input = torch.randn(2, 4, 8, 8)
    assert layer(input).is_contiguous(memory_format=torch.channels_last)
    assert layer.to_conv().weight.is_contiguous(memory_format=torch.channels_last)
    assert HyperConv2d.from_conv(nn.Conv2d(4, 6, 3), init="match")(input).is_contiguous()


def test_the_convolution_is_its_own() -> None:
    layer = HyperConv2d(4, 6, 3)
    conv = layer.to_conv()
    assert type(conv.weight) is nn.Parameter and conv.weight.is_leaf and conv.weight.requires_grad
    with torch.inference_mode():
        inside = layer.to_conv()
    for back in (conv, inside, copy.deepcopy(conv)):
        before = layer.weight.detach().clone()
        nn.init.zeros_(back.weight)
        nn.init.zeros_(back.bias)
        back(torch.randn(1, 4, 5, 5)).sum().backward()
        assert torch.equal(before, layer.weight) and layer.bias.abs().sum() > 0


def test_autocast_rounds_nothing() -> None:
    layer = HyperConv2d(4, 6, 3)
    with torch.autocast("cpu", torch.bfloat16):
        conv = layer.to_conv()
    assert torch.equal(conv.weight, layer.weight)


def test_rank_counts_the_constant() -> None:
    conv = nn.Conv2d(4, 6, 5)
    for options, features in (
        ({}, 5),
        ({"weight_bias": False}, 6),
        ({"weight_norm": "batch"}, 5),
        ({"weight_norm": "batch", "weight_bias": False}, 5),
    ):
        layer = HyperConv2d.from_conv(conv, rank=6, init="match", **options)
        assert layer.rank == len(layer.basis()) == 6 and layer.hypernet.num_features == features
    assert HyperConv2d.from_conv(conv, init="match", num_features=2).rank == 3
    assert HyperConv2d.from_conv(conv, rank=9, init="match", hypernet=Fourier(4)).rank == 9


def test_a_zero_convolution_gives_a_zero_layer() -> None:
    conv = nn.Conv2d(4, 6, 3)
    nn.init.zeros_(conv.weight)
    assert not HyperConv2d.from_conv(conv, init="match").weight.any()


def test_a_parametrised_convolution_is_read() -> None:
    conv = nn.Conv2d(4, 6, 3)
    plain = deviation(conv.weight)

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(conv, "weight", Double())
    torch.manual_seed(0)
    doubled = HyperConv2d.from_conv(conv, init="match")
    torch.manual_seed(0)
    fresh = HyperConv2d(4, 6, 3)
    ratio = deviation(doubled.weight) / deviation(fresh.weight)
    assert ratio == pytest.approx(2 * plain * (3 * 36) ** 0.5, rel=1e-5)


def test_meta() -> None:
    layer = HyperConv2d.from_conv(nn.Conv2d(4, 6, 3, device="meta"), init="match")
    assert all(p.is_meta for p in layer.parameters())
    assert layer.to_conv().weight.is_meta


class Padded(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(input, (1, 1, 1, 1)))


class Named(nn.Conv2d):
    """Of another name only."""


def test_subclasses() -> None:
    assert type(HyperConv2d.from_conv(Named(4, 6, 3), init="match")) is HyperConv2d
    with pytest.raises(TypeError, match=r"conv: expected the forward of nn\.Conv2d, got Padded"):
        HyperConv2d.from_conv(Padded(4, 6, 3), init="match")

    class Own(HyperConv2d):
        pass

    assert type(Own.from_conv(nn.Conv2d(4, 6, 3), init="match")) is Own


@pytest.mark.parametrize(
    ("kind", "conv", "options", "error", "message"),
    [
        (
            HyperConv1d,
            nn.Conv2d(4, 6, 3),
            {},
            TypeError,
            "conv: expected nn.Conv1d for HyperConv1d, got C",
        ),
        (HyperConvTranspose2d, nn.Conv2d(4, 6, 3), {}, TypeError, "conv: expected nn.ConvTranspose2d"),
        (
            HyperConv2d,
            HyperConv2d(4, 6, 3),
            {},
            TypeError,
            "conv: expected nn.Conv2d .*, got HyperConv2d",
        ),
        (
            HyperConv2d,
            nn.LazyConv2d(6, 3),
            {},
            ValueError,
            "conv: .* got LazyConv2d before its first call",
        ),
        (HyperConv2d, nn.Conv2d(4, 6, 3), {"init": "svd"}, ValueError, "init: expected one of"),
        (
            HyperConv2d,
            nn.Conv2d(4, 6, 3),
            {"rank": 1},
            ValueError,
            "rank: expected an integer of at least 2",
        ),
        (HyperConv2d, nn.Conv2d(4, 6, 3), {"rank": 2.5}, TypeError, "rank: expected an integer"),
        (
            HyperConv2d,
            nn.Conv2d(4, 6, 3),
            {"rank": 3, "num_features": 2},
            TypeError,
            "num_features: exp",
        ),
        (
            HyperConv2d,
            nn.Conv2d(4, 6, 3),
            {"rank": 3, "hypernet": Fourier(2)},
            ValueError,
            "rank: expected 5",
        ),
    ],
)
def test_errors(kind: Any, conv: nn.Module, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        kind.from_conv(conv, **{"init": "match", **options})
