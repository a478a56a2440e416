"""The start of training: the MLP a layer makes for itself, and the first draw of its parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends.library import product
from ..checks import integer
from ..hypernet import (
    DEPENDENT,
    BasisMixing,
    CoordinateMLP,
    blank,
    he_normal_,
    overwrite,
    without_numbers,
)
from ..ops.sharding import whole

if TYPE_CHECKING:
    from .base import HyperConvNd

PARAMETRIZATIONS = ("orthonormal", "published")
# What `parametrization` decides where an argument is left out: (activation, coordinates).
DEFAULTS = {"orthonormal": ("sine", "unit"), "published": ("leaky_relu", "centered")}
# N where it is left out: from so many taps on more, since there 5 functions learn less than nn.ConvNd.
_FEATURES, _MANY_TAPS, _MORE_FEATURES = 4, 49, 8
# Of the first layer's weights: in radians per half kernel by the number of functions (see `_frequency`),
# but at least so many radians per tap. Learned kernels are mostly of low frequencies; functions that are
# smooth over all of a large kernel, though, see no detail.
_PER_FUNCTION, _PER_TAP = 0.65, 1.0
# Kernels of so many taps along two axes or more have a window, for what nn.ConvNd learns of them is
# mostly about their centre, and functions that are as large everywhere would need very many for it: of
# this scale, in taps. Along one axis they have none: long sequences need what is far.
_LONG, _WINDOW = 9, 3.0
# Under a window the first layer's weights are as large in radians per tap, or more for many functions.
_WINDOWED_PER_TAP, _WINDOWED_PER_FUNCTION = 0.7, 0.16
# weight_gain^2 C_out: in a step of gradient descent the hyper-network then moves W by at most about what
# the coefficients do. Its part is coherent over all kernels, so that it would grow with C_out. Files of
# tensors do not hold the gain, so it may depend on channels, as shapes do, but not on the kernel size.
_SHARE = 0.25
# The answer to white noise is (functions / taps)^0.25 times nn.ConvNd's, but no less than the second
# number: kernels that are smooth amplify what is smooth, and the signal would grow from layer to layer.
_TEMPER, _LEAST = 0.25, 0.52
# Under a window, where functions are small at most taps and smooth at the others, it still would: there
# the coefficients are the smaller the more a direction answers to what is smooth over so many taps.
_SMOOTH = 2.0


def usual_features(layer: HyperConvNd) -> int:
    """N where `num_features` is left out."""
    few = layer.parametrization == "published" or math.prod(layer.kernel_size) < _MANY_TAPS
    return _FEATURES if few else _MORE_FEATURES


def window_scale(layer: HyperConvNd) -> list[float] | None:
    """Of the window over the taps, in units of the coordinates by axis; None: no window."""
    if sum(size >= _LONG for size in layer.kernel_size) < 2:
        return None
    axes = zip(layer.kernel_size, layer.tap_spacing, strict=True)
    return [_WINDOW * _unit(layer.coordinates, size, spacing) for size, spacing in axes]


def _unit(coordinates: str, size: int, spacing: float) -> float:
    """The distance of two taps in the coordinates."""
    return spacing if coordinates == "centered" else 1 / max((size - 1) / 2, 0.5)


def network(
    layer: HyperConvNd,
    hidden_features: Sequence[int],
    num_features: int,
    activation: str,
    outputs: int,
    factory: dict[str, Any],
) -> CoordinateMLP:
    """A hyper-network for kernels of `outputs` channels, as the parametrization wants it."""
    arguments = (layer.dims, hidden_features, num_features, activation)
    if layer.parametrization == "published":
        return CoordinateMLP(*arguments, init="he_normal", **factory)
    frequency = _frequency(layer, integer("num_features", num_features))
    gain = weight_gain(outputs)
    return CoordinateMLP(*arguments, frequency=frequency, weight_gain=gain, **factory)


def weight_gain(outputs: int) -> float:
    """Of the MLP of kernels of so many channels, in the orthonormal parametrization."""
    return min(1.0, math.sqrt(_SHARE / max(outputs, 1)))


@torch.no_grad()
def draw(layer: HyperConvNd, hypernet: bool) -> None:
    """Draw all parameters, those of the hyper-network only if `hypernet`."""
    group_channels, taps = layer.coefficients.shape[1], math.prod(layer.kernel_size)
    bound = 1 / math.sqrt(group_channels * taps) if group_channels else 0.0
    if hypernet:
        if layer.mixing is not None:
            layer.mixing.place(window_scale(layer))
        draw_hypernet(layer)
    norm = layer.weight_norm
    if norm is not None:
        mixed = layer.mixing is not None
        scale = bound / math.sqrt(3) if mixed else 1.0
        overwrite(norm, "weight", blank(norm.weight).fill_(scale))
        offset = bound / math.sqrt(taps) if mixed else 0.0
        overwrite(norm, "bias", blank(norm.bias).uniform_(-offset, offset))
    drawn = blank(layer.coefficients)
    if layer.mixing is None:
        columns = drawn.shape[2] - layer.weight_bias
        trained = torch.tensor([1.0] * columns + [0.0] * layer.weight_bias, device=drawn.device)
        drawn = he_normal_(drawn, columns) * trained.to(drawn.dtype)
    else:
        deviation = 1.0 if norm is not None else bound / math.sqrt(3)
        drawn = drawn.uniform_(-math.sqrt(3), math.sqrt(3)) * deviation
        if not any(map(without_numbers, (layer._like(), layer.mixing.weight, drawn))):
            layer.mixing.fit(layer._module_features())
            drawn = _shaped(layer, layer.mixing, drawn)
    overwrite(layer, "coefficients", drawn)
    if layer.bias is not None:
        overwrite(layer, "bias", blank(layer.bias).uniform_(-bound, bound))


def _frequency(layer: HyperConvNd, features: int) -> list[float]:
    """Of the first layer's weights, by axis, in radians per unit of the coordinates.

    The bound grows with the number of functions, faster than the D-th root by which frequencies up to
    it span that many dimensions on D axes: the last principal component must not be so small that a
    step of the layers before it moves its function far.
    """
    axes = max(sum(size > 1 for size in layer.kernel_size), 1)
    growth = max(features - 1, 0) ** (1.5 / axes)
    windowed = window_scale(layer) is not None
    frequency = []
    for size in layer.kernel_size:
        if windowed:
            per_tap = max(_WINDOWED_PER_FUNCTION * growth, _WINDOWED_PER_TAP)
        else:
            per_tap = max(_PER_FUNCTION * growth * _unit("unit", size, 1.0), _PER_TAP)
        frequency.append(per_tap / _unit(layer.coordinates, size, 1.0))
    return frequency


def draw_hypernet(layer: HyperConvNd) -> None:
    """A fresh MLP; in the orthonormal parametrization its features start almost independent."""
    hypernet: Any = layer.hypernet
    hypernet.reset_parameters()
    if layer.mixing is not None and not without_numbers(layer._like()):
        taps = layer._taps(layer._like())
        hypernet.align(taps, layer.weight_bias, layer.mixing.window_at(taps))


def _shaped(layer: HyperConvNd, mixing: BasisMixing, unit: Tensor) -> Tensor:
    """A of the right variance along each direction, from one of nn.ConvNd's along all.

    Along the functions' sums over the taps, the response to a constant, it is nn.ConvNd's; along
    what is orthogonal to that, larger by the taps for which there is no function; under a window more or
    less so, by `_evened`.
    """
    basis = whole(layer._basis("reference"))[: unit.shape[-1]]
    count = basis.shape[1]
    functions = round(float(basis.square().sum()))
    sums = basis.sum(1)
    power = float(sums.square().sum())
    missing = max(count - 1, 1) / max(functions - 1, 1)
    others = math.sqrt(missing) * max(missing**-_TEMPER, _LEAST)
    if power < 1e-6 * count:
        return unit * others
    along = min(math.sqrt(count / power), others)
    direction = (sums / math.sqrt(power)).to(unit.dtype)
    projector = torch.outer(direction, direction)
    rest = torch.eye(len(direction), dtype=projector.dtype, device=projector.device) - projector
    if mixing.window is not None:
        rest = _evened(basis.view(-1, *layer.kernel_size), rest)
    return product(unit.flatten(0, 1), others * rest + along * projector).view(unit.shape)


def _evened(basis: Tensor, rest: Tensor) -> Tensor:
    """The projector `rest` `[R, R]` on directions among phi `[R, *kernel]`, scaled along each of them.

    By the inverse fourth root of the power of the answer to noise that is smooth over `_SMOOTH` taps,
    such that the answer to white noise stays.
    """
    phi = basis.to("cpu", torch.float64)
    smooth = phi
    for axis, size in enumerate(phi.shape[1:], 1):
        taps = torch.arange(size, dtype=phi.dtype, device="cpu")
        likeness = torch.exp(-((taps[:, None] - taps) ** 2) / (2 * _SMOOTH**2))
        smooth = torch.tensordot(smooth, likeness, ([axis], [0])).movedim(-1, axis)
    projector = rest.to(phi)
    among = projector @ phi.flatten(1)
    power, directions = torch.linalg.eigh(among @ (projector @ smooth.flatten(1)).T)
    weight = power.clamp_min(DEPENDENT * float(power[-1])) ** -0.5
    present = (directions.T @ among).square().sum(1)
    weight = weight * present.sum() / (weight * present).sum()
    return (projector @ (directions * weight.sqrt()) @ directions.T).to(rest)
