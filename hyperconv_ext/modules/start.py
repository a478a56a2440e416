"""The start of training: the MLP a layer makes for itself, and the first draw of its parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends.library import product
from ..checks import integer
from ..hypernet import CoordinateMLP, blank, he_normal_, overwrite, without_numbers
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
# weight_gain^2 C_out: in a step of gradient descent the hyper-network then moves W by at most about what
# the coefficients do. Its part is coherent over all kernels, so that it would grow with C_out. Files of
# tensors do not hold the gain, so it may depend on channels, as shapes do, but not on the kernel size.
_SHARE = 0.25
# The answer to white noise is (functions / taps)^0.25 times nn.ConvNd's, but no less than the second
# number: kernels that are smooth amplify what is smooth, and the signal would grow from layer to layer.
_TEMPER, _LEAST = 0.25, 0.52


def usual_features(layer: HyperConvNd) -> int:
    """N where `num_features` is left out."""
    few = layer.parametrization == "published" or math.prod(layer.kernel_size) < _MANY_TAPS
    return _FEATURES if few else _MORE_FEATURES


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
            drawn = _shaped(layer, drawn)
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
    wanted = _PER_FUNCTION * max(features - 1, 0) ** (1.5 / axes)
    frequency = []
    for size in layer.kernel_size:
        half = max((size - 1) / 2, 0.5)
        unit = half if layer.coordinates == "centered" else 1.0
        frequency.append(max(wanted, _PER_TAP * half) / unit)
    return frequency


def draw_hypernet(layer: HyperConvNd) -> None:
    """A fresh MLP; in the orthonormal parametrization its features start almost independent."""
    hypernet: Any = layer.hypernet
    hypernet.reset_parameters()
    if layer.mixing is not None and not without_numbers(layer._like()):
        hypernet.align(layer._taps(layer._like()), layer.weight_bias)


def _shaped(layer: HyperConvNd, unit: Tensor) -> Tensor:
    """A of the right variance along each direction, from one of nn.ConvNd's along all.

    Along the functions' sums over the taps, the response to a constant, it is nn.ConvNd's; along
    what is orthogonal to that, larger by the taps for which there is no function.
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
    shape = (
        others * (torch.eye(len(direction), dtype=projector.dtype, device=projector.device) - projector)
        + along * projector
    )
    return product(unit.flatten(0, 1), shape).view(unit.shape)
