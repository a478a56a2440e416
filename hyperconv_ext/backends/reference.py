"""Build W, call the library convolution: the oracle, differentiable to any order by plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Geometry
from .library import convolution, product, transposed_convolution

# The slope of the published hyper-networks' LeakyReLU (Ma et al., WACV 2022).
LEAKY_SLOPE = 0.1


def materialize_weight(coefficients: Tensor, basis: Tensor) -> Tensor:
    """W[o, i, k] = sum_r A[o, i, r] phi_r(k).

    Args:
        coefficients: A, `[C_out, C_in/groups, R]`.
        basis: phi, `[R, *kernel_size]`; converted to the dtype of `coefficients`.

    Returns:
        `[C_out, C_in/groups, *kernel_size]` in the dtype of `coefficients`.
    """
    rank, *kernel_size = basis.shape
    rows, columns = coefficients.reshape(-1, rank), basis.reshape(rank, -1)
    weight = product(rows, columns.to(coefficients.dtype))
    return weight.reshape(*coefficients.shape[:2], *kernel_size)


def basis_conv(
    input: Tensor,
    coefficients: Tensor,
    basis: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    transposed: bool = False,
) -> Tensor:
    """`F.convNd` or `F.conv_transposeNd` with W built in memory; arguments as in `ops.basis_conv`."""
    return convolve(input, materialize_weight(coefficients, basis), bias, geometry, transposed)


def convolve(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, transposed: bool
) -> Tensor:
    """`F.convNd` or `F.conv_transposeNd` by W as `materialize_weight` gives it."""
    if weight.numel() == 0:  # no channels in or out, which the library refuses
        channels = weight.shape[1] * geometry.groups if transposed else weight.shape[0]
        size = geometry.input_size if transposed else geometry.output_size
        nothing = 0 * (input.sum() + weight.sum())
        output = nothing.expand(input.shape[0], channels, *size)
        return output if bias is None else output + bias.view(-1, *(1,) * geometry.dims)
    if transposed:
        return transposed_convolution(input, weight, bias, geometry, geometry.groups)
    return convolution(input, weight, bias, geometry, geometry.groups)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # F.leaky_relu does not take DTensors in torch 2.10.
    "leaky_relu": lambda h: torch.where(h > 0, h, LEAKY_SLOPE * h),
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sine": torch.sin,
}


def has_window(coordinates: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether there is a window beside the coordinates that the first layer takes."""
    return coordinates.shape[1] > weights[0].shape[1]


def coordinate_mlp(
    coordinates: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    weight_gain: float,
    linear_output: bool,
    constant: bool,
) -> Tensor:
    """phi of the coordinate MLP: linear layers, each followed by the activation.

    A layer with weight W and bias b computes act(weight_gain * (W h + b)): the gain at run time of an
    equalized learning rate (Karras et al., ICLR 2018). Parameters stored 1/weight_gain times as large
    give the same function, which a step of gradient descent on them moves weight_gain**2 times as far.

    Args:
        coordinates: `[K, D]`; or `[K, D + 1]`, whose last column is a window: the features that the
            last layer takes are multiplied by it.
        weights: per layer `[features, previous features]`.
        biases: per layer `[features]`.
        activation: a key of `ACTIVATIONS`.
        weight_gain: what the weights and biases of the activated layers are multiplied by.
        linear_output: the last layer computes W h + b, without activation and gain.
        constant: append the constant function 1, the basis of the last layer's bias.

    Returns:
        `[R, K]`, R = N or N + 1, in float64 if the weights are, else in float32.
    """
    dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    points, last = coordinates.to(dtype), len(weights) - 1
    hidden = points[:, : weights[0].shape[1]]
    for index, (weight, offset) in enumerate(zip(weights, biases, strict=True)):
        if index == last and has_window(coordinates, weights):
            hidden = hidden * points[:, -1:]
        hidden = product(hidden, weight.to(dtype).t()) + offset.to(dtype)
        if index < last or not linear_output:
            hidden = ACTIVATIONS[activation](hidden if weight_gain == 1 else weight_gain * hidden)
    basis = hidden.T
    return torch.cat([basis, basis.new_ones(1, basis.shape[1])]) if constant else basis.contiguous()
