"""From nn.ConvNd to a hyper-convolution and back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import fitting, layout
from ..autocast import without_autocast
from ..backends.reference import materialize_weight
from ..checks import check_name, integer, positive_number
from ..hypernet import overwrite, without_numbers
from ..ops.sharding import distributed
from .start import draw_hypernet

if TYPE_CHECKING:
    from .base import HyperConvNd

INITS = ("fit", "match")


class NotReached(ValueError):  # noqa: N818  # of `max_error`
    """No hyper-convolution that was fitted has an error as small as was asked for.

    Attributes:
        best: the least that there was.
    """

    def __init__(self, message: str, best: fitting.FitResult) -> None:
        super().__init__(message)
        self.best = best


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
        conv.weight = nn.Parameter(weight, requires_grad=_trains(layer, "coefficients"))
        if layer.bias is not None:
            conv.bias = nn.Parameter(layer.bias.detach().clone(), _trains(layer, "bias"))
    return conv.train(layer.training)


def _trains(layer: Any, name: str) -> bool:
    """Whether the parameter, or one from which torch.nn.utils computes it, requires gradients."""
    own = layer._parameters.get(name)
    if own is not None:
        return own.requires_grad
    sources = [value for key, value in layer._parameters.items() if key.startswith(f"{name}_")]
    if name in getattr(layer, "parametrizations", {}):
        sources += layer.parametrizations[name].parameters()
    return any(source.requires_grad for source in sources)


def from_conv(
    cls: type[HyperConvNd],
    conv: nn.Module,
    rank: int | None,
    max_error: float | None,
    init: str,
    progress: bool,
    options: dict[str, Any],
    kernels: fitting.Kernels | None = None,
) -> HyperConvNd:
    """See `HyperConvNd.from_conv`; `kernels`: those of `conv`, if they have been decomposed already."""
    check_name("init", init, INITS)
    weight, bias = _checked(cls, conv)
    if max_error is not None:
        check_sole(max_error, rank, init, options)
    with torch.inference_mode(False), torch.no_grad(), without_autocast(weight.device):
        make = partial(_drawn, cls, conv, weight, options)
        if init == "match":
            layer = make(rank)
            if not without_numbers(weight):
                _match(layer, weight)
        else:
            kernels = kernels_of(weight) if kernels is None else kernels
            attempt = partial(_fitted, make, kernels, options.get("hypernet") is None, progress)
            if max_error is None:
                layer = attempt(rank)
            else:
                ranks = _ranks(kernels, max_error, options)
                layer = _smallest(attempt, ranks, max_error)
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


def least_rank(kernels: fitting.Kernels, max_error: float, options: dict[str, Any]) -> int | None:
    """The first rank that `from_conv` tries for this error; None where a hypernet decides on it."""
    return _ranks(kernels, max_error, options)[0]


def kernels_of(weight: Tensor) -> fitting.Kernels:
    """`weight` decomposed, to be fitted to."""
    if without_numbers(weight):
        raise ValueError(
            f"conv: expected a weight to fit to, got one without numbers on {weight.device}; "
            f"materialise it first, or draw the layer with init='match'"
        )
    return fitting.Kernels(weight)


def _drawn(
    cls: type[HyperConvNd], conv: Any, weight: Tensor, options: dict[str, Any], rank: int | None
) -> HyperConvNd:
    """A fresh layer of the sizes of `conv`."""
    where: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    layer = cls(**_settings(conv), **where, **_with_rank(rank, options))
    if rank is not None and layer.rank != rank:
        raise ValueError(
            f"rank: expected {layer.rank}, which the hypernet given has, got {rank}; leave out rank"
        )
    return layer


def _constant(options: dict[str, Any]) -> bool:
    """Whether a layer made with these keywords has the constant function beside its features."""
    return bool(options.get("weight_bias", True)) or options.get("weight_norm") is not None


def _with_rank(rank: int | None, options: dict[str, Any]) -> dict[str, Any]:
    """The keywords of the constructor, with the number of features that gives a kernel of `rank`."""
    if rank is None:
        return options
    if "num_features" in options:
        raise TypeError(
            f"num_features: expected not to be given beside rank={rank}, got {options['num_features']}; "
            f"leave one of them out"
        )
    constant = _constant(options)
    return {**options, "num_features": integer("rank", rank, 1 + constant) - constant}


def _match(layer: HyperConvNd, weight: Tensor) -> None:
    """Scale the first draw of W as `weight` differs in deviation from nn.ConvNd's own."""
    if not weight.numel():
        return
    deviation = _root_mean_square(weight)
    if layer.mixing is None:  # drawn as published, without regard to nn.ConvNd
        usual = _root_mean_square(materialize_weight(*layer._kernel("reference")))
    else:
        usual = 1 / math.sqrt(3 * weight[0].numel())
    norm = layer.weight_norm
    scaled = [(layer, "coefficients")] if norm is None else [(norm, "weight"), (norm, "bias")]
    for module, name in scaled:
        overwrite(module, name, getattr(module, name) * (deviation / usual))


def _fitted(
    make: Callable[[int | None], HyperConvNd],
    kernels: fitting.Kernels,
    own: bool,
    progress: bool,
    rank: int | None,
) -> HyperConvNd:
    """A layer of this rank whose W comes near the kernels; its MLP is its `own`, or was given."""
    begin = time.perf_counter()
    layer = make(rank)
    mixing = layer.mixing
    if mixing is not None:
        mixing.place(None)  # the given kernels say where they are large
    fitting.fit(
        layer.hypernet,
        layer.taps,
        kernels,
        constant=layer.rank > layer.num_features,
        redraw=partial(draw_hypernet, layer) if own else None,
        progress=progress,
    )
    if mixing is not None:
        mixing.fit(layer._module_features())
    _solve(layer, kernels)
    error = kernels.error(materialize_weight(*layer._kernel("reference")))
    seconds = time.perf_counter() - begin
    layer.fit_result = fitting.FitResult(error, kernels.best_error(layer.rank), layer.rank, seconds)
    return layer


def _solve(layer: HyperConvNd, kernels: fitting.Kernels) -> None:
    """Set the coefficients to the least-squares solution, and a norm so that W is what they give."""
    basis = layer._basis("reference")
    solution = kernels.coefficients(basis)
    shape = layer.coefficients.shape
    columns = solution[:, : shape[2]].reshape(shape)  # a norm may have the constant function to itself
    norm = layer.weight_norm
    if norm is None:
        overwrite(layer, "coefficients", columns.to(layer.coefficients))
        return
    size = float(columns.square().mean().sqrt()) or 1.0
    overwrite(layer, "coefficients", (columns / size).to(layer.coefficients))
    _, variance = norm.statistics(layer.coefficients, basis)
    means = (solution @ basis.mean(1).to(solution)).view(shape[:2])
    overwrite(norm, "weight", (size * torch.sqrt(variance + norm.eps)).to(norm.weight))
    overwrite(norm, "bias", means.to(norm.bias))


def check_sole(max_error: float, rank: int | None, init: str, options: dict[str, Any]) -> None:
    """Raise unless `max_error` is what decides on the rank."""
    positive_number("max_error", max_error)
    others = {"rank": rank, "num_features": options.get("num_features")}
    given = [f"{name}={value}" for name, value in others.items() if value is not None]
    if given:
        raise TypeError(
            f"max_error: expected to decide on the rank of a fit, got it beside {', '.join(given)}; "
            f"leave one of them out"
        )
    if init != "fit":
        raise TypeError(f"max_error: expected it beside init='fit', got init={init!r}; pass init='fit'")


def _ranks(kernels: fitting.Kernels, max_error: float, options: dict[str, Any]) -> Sequence[int | None]:
    """Ranks at which kernels, if not the hyper-network's, come as near as `max_error`."""
    if options.get("hypernet") is not None:
        return [None]
    least, taps = 1 + _constant(options), kernels.rows.shape[1]
    possible = [rank for rank in range(least, taps) if kernels.best_error(rank) <= max_error]
    return [*possible, max(least, taps)]


def _smallest(
    attempt: Callable[[int | None], HyperConvNd], ranks: Sequence[int | None], max_error: float
) -> HyperConvNd:
    """The first layer whose error is at most `max_error`, of ascending ranks: errors descend."""
    fits: dict[int, Any] = {}

    def good(index: int) -> bool:
        fits[index] = attempt(ranks[index])
        return fits[index].fit_result.error <= max_error

    low, high, stride = -1, 0, 1
    while not good(high):
        if high == len(ranks) - 1:
            best = min((layer.fit_result for layer in fits.values()), key=lambda result: result.error)
            raise NotReached(
                f"max_error: expected an error that this hyper-network reaches, got {max_error}; the "
                f"least that it came to is {best.error:.3g} at rank {best.rank}, where the best kernels "
                f"have {best.best_error:.3g}; allow more, widen hidden_features, or pass a BasisTable",
                best,
            )
        low, high, stride = high, min(high + stride, len(ranks) - 1), 2 * stride
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return fits[high]


def _root_mean_square(weight: Tensor) -> float:
    return float(weight.detach().to("cpu", torch.float64).square().mean().sqrt())


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
    if distributed((conv.weight,)):
        raise TypeError(
            "conv: expected a plain weight, got a DTensor; make the layer first, then distribute it"
        )
    theirs = type(conv)
    changed = [n for n in ("forward", "_conv_forward") if getattr(theirs, n, 0) != getattr(dense, n, 0)]
    if changed or "forward" in conv.__dict__:
        raise TypeError(
            f"conv: expected the forward of nn.{dense.__name__}, got {name}, which has one of its "
            f"own that {cls.__name__} would not have; pass an nn.{dense.__name__} with its weight"
        )
    return conv.weight, conv.bias
