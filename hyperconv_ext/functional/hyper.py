"""Convolutions whose basis is a coordinate MLP of the taps, in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import general
from .general import Padding


def hyper_conv1d(
    input: Tensor,
    coefficients: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    kernel_size: int | Sequence[int],
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str = "leaky_relu",
    weight_gain: float = 1.0,
    linear_output: bool = False,
    coordinates: str | Tensor = "centered",
    backend: str = "auto",
    algorithm: str = "auto",
) -> Tensor:
    """1-D hyper-convolution: `basis_conv1d` whose basis is a coordinate MLP of the taps.

    Args:
        coefficients: as in `basis_conv1d`: the MLP's last linear layer. R is the number N
            of the MLP's features, or N + 1 when the last column is that layer's bias.
        weights: per layer of the MLP, `[features, previous features]`; the first has 1 column.
        biases: per layer, `[features]`.
        kernel_size: an integer, or (kl).
        activation: after every layer: `'leaky_relu'` (slope 0.1), `'relu'`, `'gelu'`, `'silu'`,
            `'tanh'`, `'sine'`.
        weight_gain: multiplies the weights and biases of the activated layers: for parameters that
            are stored 1/weight_gain times as large (an equalized learning rate).
        linear_output: leave the last layer without activation and weight gain.
        coordinates: `'centered'` or `'unit'`, see `hypernet.tap_coordinates`; or the coordinates
            themselves, `[K, 1]`, K the number of taps, the kernel's last axis fastest.

    All other arguments, the result and the errors are those of `basis_conv1d`.
    """
    return general.hyper_conv(
        1,
        input,
        coefficients,
        weights,
        biases,
        kernel_size,
        bias,
        stride,
        padding,
        dilation,
        groups,
        activation=activation,
        weight_gain=weight_gain,
        linear_output=linear_output,
        coordinates=coordinates,
        backend=backend,
        algorithm=algorithm,
    )


def hyper_conv2d(
    input: Tensor,
    coefficients: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    kernel_size: int | Sequence[int],
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str = "leaky_relu",
    weight_gain: float = 1.0,
    linear_output: bool = False,
    coordinates: str | Tensor = "centered",
    backend: str = "auto",
    algorithm: str = "auto",
) -> Tensor:
    """2-D hyper-convolution: `basis_conv2d` whose basis is a coordinate MLP of the taps.

    Args:
        coefficients: as in `basis_conv2d`: the MLP's last linear layer. R is the number N
            of the MLP's features, or N + 1 when the last column is that layer's bias.
        weights: per layer of the MLP, `[features, previous features]`; the first has 2 columns.
        biases: per layer, `[features]`.
        kernel_size: an integer, or (kh, kw).
        activation: after every layer: `'leaky_relu'` (slope 0.1), `'relu'`, `'gelu'`, `'silu'`,
            `'tanh'`, `'sine'`.
        weight_gain: multiplies the weights and biases of the activated layers: for parameters that
            are stored 1/weight_gain times as large (an equalized learning rate).
        linear_output: leave the last layer without activation and weight gain.
        coordinates: `'centered'` or `'unit'`, see `hypernet.tap_coordinates`; or the coordinates
            themselves, `[K, 2]`, K the number of taps, the kernel's last axis fastest.

    All other arguments, the result and the errors are those of `basis_conv2d`.
    """
    return general.hyper_conv(
        2,
        input,
        coefficients,
        weights,
        biases,
        kernel_size,
        bias,
        stride,
        padding,
        dilation,
        groups,
        activation=activation,
        weight_gain=weight_gain,
        linear_output=linear_output,
        coordinates=coordinates,
        backend=backend,
        algorithm=algorithm,
    )


def hyper_conv3d(
    input: Tensor,
    coefficients: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    kernel_size: int | Sequence[int],
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str = "leaky_relu",
    weight_gain: float = 1.0,
    linear_output: bool = False,
    coordinates: str | Tensor = "centered",
    backend: str = "auto",
    algorithm: str = "auto",
) -> Tensor:
    """3-D hyper-convolution: `basis_conv3d` whose basis is a coordinate MLP of the taps.

    Args:
        coefficients: as in `basis_conv3d`: the MLP's last linear layer. R is the number N
            of the MLP's features, or N + 1 when the last column is that layer's bias.
        weights: per layer of the MLP, `[features, previous features]`; the first has 3 columns.
        biases: per layer, `[features]`.
        kernel_size: an integer, or (kd, kh, kw).
        activation: after every layer: `'leaky_relu'` (slope 0.1), `'relu'`, `'gelu'`, `'silu'`,
            `'tanh'`, `'sine'`.
        weight_gain: multiplies the weights and biases of the activated layers: for parameters that
            are stored 1/weight_gain times as large (an equalized learning rate).
        linear_output: leave the last layer without activation and weight gain.
        coordinates: `'centered'` or `'unit'`, see `hypernet.tap_coordinates`; or the coordinates
            themselves, `[K, 3]`, K the number of taps, the kernel's last axis fastest.

    All other arguments, the result and the errors are those of `basis_conv3d`.
    """
    return general.hyper_conv(
        3,
        input,
        coefficients,
        weights,
        biases,
        kernel_size,
        bias,
        stride,
        padding,
        dilation,
        groups,
        activation=activation,
        weight_gain=weight_gain,
        linear_output=linear_output,
        coordinates=coordinates,
        backend=backend,
        algorithm=algorithm,
    )


def hyper_conv_transpose1d(
    input: Tensor,
    coefficients: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    kernel_size: int | Sequence[int],
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str = "leaky_relu",
    weight_gain: float = 1.0,
    linear_output: bool = False,
    coordinates: str | Tensor = "centered",
    backend: str = "auto",
    algorithm: str = "auto",
) -> Tensor:
    """1-D hyper-convolution: `basis_conv_transpose1d` whose basis is a coordinate MLP of the taps.

    Args:
        coefficients: as in `basis_conv_transpose1d`: the MLP's last linear layer. R is the number N
            of the MLP's features, or N + 1 when the last column is that layer's bias.
        weights: per layer of the MLP, `[features, previous features]`; the first has 1 column.
        biases: per layer, `[features]`.
        kernel_size: an integer, or (kl).
        activation: after every layer: `'leaky_relu'` (slope 0.1), `'relu'`, `'gelu'`, `'silu'`,
            `'tanh'`, `'sine'`.
        weight_gain: multiplies the weights and biases of the activated layers: for parameters that
            are stored 1/weight_gain times as large (an equalized learning rate).
        linear_output: leave the last layer without activation and weight gain.
        coordinates: `'centered'` or `'unit'`, see `hypernet.tap_coordinates`; or the coordinates
            themselves, `[K, 1]`, K the number of taps, the kernel's last axis fastest.

    All other arguments, the result and the errors are those of `basis_conv_transpose1d`.
    """
    return general.hyper_conv_transpose(
        1,
        input,
        coefficients,
        weights,
        biases,
        kernel_size,
        bias,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
        activation=activation,
        weight_gain=weight_gain,
        linear_output=linear_output,
        coordinates=coordinates,
        backend=backend,
        algorithm=algorithm,
    )


def hyper_conv_transpose2d(
    input: Tensor,
    coefficients: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    kernel_size: int | Sequence[int],
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str = "leaky_relu",
    weight_gain: float = 1.0,
    linear_output: bool = False,
    coordinates: str | Tensor = "centered",
    backend: str = "auto",
    algorithm: str = "auto",
) -> Tensor:
    """2-D hyper-convolution: `basis_conv_transpose2d` whose basis is a coordinate MLP of the taps.

    Args:
        coefficients: as in `basis_conv_transpose2d`: the MLP's last linear layer. R is the number N
            of the MLP's features, or N + 1 when the last column is that layer's bias.
        weights: per layer of the MLP, `[features, previous features]`; the first has 2 columns.
        biases: per layer, `[features]`.
        kernel_size: an integer, or (kh, kw).
        activation: after every layer: `'leaky_relu'` (slope 0.1), `'relu'`, `'gelu'`, `'silu'`,
            `'tanh'`, `'sine'`.
        weight_gain: multiplies the weights and biases of the activated layers: for parameters that
            are stored 1/weight_gain times as large (an equalized learning rate).
        linear_output: leave the last layer without activation and weight gain.
        coordinates: `'centered'` or `'unit'`, see `hypernet.tap_coordinates`; or the coordinates
            themselves, `[K, 2]`, K the number of taps, the kernel's last axis fastest.

    All other arguments, the result and the errors are those of `basis_conv_transpose2d`.
    """
    return general.hyper_conv_transpose(
        2,
        input,
        coefficients,
        weights,
        biases,
        kernel_size,
        bias,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
        activation=activation,
        weight_gain=weight_gain,
        linear_output=linear_output,
        coordinates=coordinates,
        backend=backend,
        algorithm=algorithm,
    )


def hyper_conv_transpose3d(
    input: Tensor,
    coefficients: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    kernel_size: int | Sequence[int],
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str = "leaky_relu",
    weight_gain: float = 1.0,
    linear_output: bool = False,
    coordinates: str | Tensor = "centered",
    backend: str = "auto",
    algorithm: str = "auto",
) -> Tensor:
    """3-D hyper-convolution: `basis_conv_transpose3d` whose basis is a coordinate MLP of the taps.

    Args:
        coefficients: as in `basis_conv_transpose3d`: the MLP's last linear layer. R is the number N
            of the MLP's features, or N + 1 when the last column is that layer's bias.
        weights: per layer of the MLP, `[features, previous features]`; the first has 3 columns.
        biases: per layer, `[features]`.
        kernel_size: an integer, or (kd, kh, kw).
        activation: after every layer: `'leaky_relu'` (slope 0.1), `'relu'`, `'gelu'`, `'silu'`,
            `'tanh'`, `'sine'`.
        weight_gain: multiplies the weights and biases of the activated layers: for parameters that
            are stored 1/weight_gain times as large (an equalized learning rate).
        linear_output: leave the last layer without activation and weight gain.
        coordinates: `'centered'` or `'unit'`, see `hypernet.tap_coordinates`; or the coordinates
            themselves, `[K, 3]`, K the number of taps, the kernel's last axis fastest.

    All other arguments, the result and the errors are those of `basis_conv_transpose3d`.
    """
    return general.hyper_conv_transpose(
        3,
        input,
        coefficients,
        weights,
        biases,
        kernel_size,
        bias,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
        activation=activation,
        weight_gain=weight_gain,
        linear_output=linear_output,
        coordinates=coordinates,
        backend=backend,
        algorithm=algorithm,
    )
