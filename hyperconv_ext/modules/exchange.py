"""From nn.ConvNd to a hyper-convolution and back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import layout
from ..autocast import without_autocast
from ..backends.reference import materialize_weight
from ..checks import check_name, integer
from ..hypernet import overwrite, without_numbers
from ..ops.sharding import whole

if TYPE_CHECKING:
    from .base import HyperConvNd

INITS = ("match",)
_SHARED = ("stride", "padding", "dilation", "groups", "padding_mode")


def dense_class(layer: type[HyperConvNd] | HyperConvNd) -> type[nn.Module]:
    """The class of `torch.nn` whose place the layer takes."""
    return getattr(nn, f"Conv{'Transpose' * layer.transposed}{layer.dims}d")


def _settings(conv: Any) -> dict[str, Any]:
    """What nn.ConvNd and its hyper-convolution have in common, as keywords of either constructor."""
    names = (*_SHARED, *("output_padding",) * conv.transposed)
    common = {name: getattr(conv, name) for name in names}
    return {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": conv.kernel_size,
        "bias": conv.bias is not None,
        **common,
    }


def to_conv(layer: HyperConvNd) -> nn.Module:
    """See `HyperConvNd.to_conv`."""
    device = layer.coefficients.device
    with torch.inference_mode(False), torch.no_grad(), without_autocast(device):
        coefficients, basis = layer.kernel()
        # Rounded once: phi is computed in float32 at least.
        wide = torch.promote_types(coefficients.dtype, basis.dtype)
        weight = materialize_weight(coefficients.to(wide), basis).to(coefficients.dtype)
        if layer._channels_last and layout.remembers_channels_last(weight.shape):
            weight = layout.as_channels_last(weight)
        conv: Any = dense_class(layer)(**_settings(layer), device="meta")
        conv.weight = nn.Parameter(weight, requires_grad=layer.coefficients.requires_grad)
        if layer.bias is not None:
            conv.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
    return conv.train(layer.training)


@torch.no_grad()
def from_conv(
    cls: type[HyperConvNd],
    conv: nn.Module,
    rank: int | None,
    max_error: float | None,
    init: str,
    progress: bool,
    options: dict[str, Any],
) -> HyperConvNd:
    """See `HyperConvNd.from_conv`."""
    check_name("init", init, INITS)
    weight, bias = _checked(cls, conv)
    layer = cls(
        **_settings(conv),
        device=weight.device,
        dtype=weight.dtype,
        **_with_rank(cls, rank, options),
    )
    if rank is not None and layer.rank != rank:
        raise ValueError(
            f"rank: expected {layer.rank}, which the hypernet given has, got {rank}; leave out rank"
        )
    if not without_numbers(weight):
        _match(layer, weight)
    if bias is not None:
        overwrite(layer, "bias", bias)
    if not weight.requires_grad:
        layer.requires_grad_(False)
    if bias is not None:
        layer.bias.requires_grad_(bias.requires_grad)
    layer._channels_last = (
        layer.dims > 1 and layout.channels_last(weight) and layout.remembers_channels_last(weight.shape)
    )
    return layer.train(conv.training)


def _with_rank(cls: type[HyperConvNd], rank: int | None, options: dict[str, Any]) -> dict[str, Any]:
    """The keywords of the constructor, with the number of features that gives a kernel of `rank`."""
    if rank is None:
        return options
    if "num_features" in options:
        raise TypeError(
            f"num_features: expected not to be given beside rank={rank}, got {options['num_features']}; "
            f"leave one of them out"
        )
    constant = bool(options.get("weight_bias", True)) or options.get("weight_norm") is not None
    return {**options, "num_features": integer("rank", rank, 1 + constant) - constant}


def _match(layer: HyperConvNd, weight: Tensor) -> None:
    """Scale the first draw of W as `weight` differs in deviation from nn.ConvNd's own."""
    if not weight.numel():
        return
    deviation = _root_mean_square(weight)
    if layer.mixing is None:  # drawn as published, without regard to nn.ConvNd
        usual = _root_mean_square(materialize_weight(*layer.kernel()))
    else:
        usual = 1 / math.sqrt(3 * weight[0].numel())
    norm = layer.weight_norm
    scaled = [(layer, "coefficients")] if norm is None else [(norm, "weight"), (norm, "bias")]
    for module, name in scaled:
        overwrite(module, name, getattr(module, name) * (deviation / usual))


def _root_mean_square(weight: Tensor) -> float:
    return float(whole(weight).detach().to("cpu", torch.float64).square().mean().sqrt())


def _checked(cls: type[HyperConvNd], conv: Any) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of `conv`, if a call of it is the convolution that they and its settings say."""
    dense: Any = dense_class(cls)
    name = type(conv).__name__
    if not isinstance(conv, dense):
        raise TypeError(
            f"conv: expected nn.{dense.__name__} for {cls.__name__}, got {name}; call from_conv of the "
            f"class with its number of axes"
        )
    if isinstance(conv.weight, nn.UninitializedParameter):
        raise ValueError(
            f"conv: expected a layer that has its parameters, got {name} before its first call; call it "
            f"once, or make a layer of the class Lazy{cls.__name__}"
        )
    theirs = type(conv)
    changed = [n for n in ("forward", "_conv_forward") if getattr(theirs, n, 0) != getattr(dense, n, 0)]
    if changed or "forward" in conv.__dict__:
        raise TypeError(
            f"conv: expected the forward of nn.{dense.__name__}, got {name}, which has one of its "
            f"own that {cls.__name__} would not have; pass an nn.{dense.__name__} with its weight"
        )
    return conv.weight, conv.bias
