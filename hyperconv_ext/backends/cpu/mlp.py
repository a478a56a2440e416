"""The coordinate MLP by the engine of csrc/cpu/mlp.h, forward and backward in one call each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ...problem import Device
from ..reference import ACTIVATIONS, LEAKY_SLOPE
from . import library

_DTYPES = ("float32", "float64", "bfloat16", "float16")
_ACTIVATIONS = tuple(ACTIVATIONS)  # their numbers are those of `Activation` in csrc/cpu/mlp.h

Shapes = tuple[tuple[int, ...], ...]


def can_evaluate(widths: tuple[int, ...], dtype: str, device: Device) -> tuple[bool, str]:
    """Whether the engine evaluates layers of these widths, and why not."""
    reason = library.reason()
    if not reason and dtype not in _DTYPES:
        reason = f"it takes {', '.join(_DTYPES)}, not {dtype}"
    if not reason and device.kind != "cpu":
        reason = f"the tensors are on {device.kind}; move them to the CPU"
    if not reason and len(widths) > library.MAX_LAYERS + 1:
        reason = f"it takes an MLP of up to {library.MAX_LAYERS} layers, not {len(widths) - 1}"
    return not reason, reason


def _convert(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers as the engine reads them."""
    if not tensor.is_cpu:
        raise ValueError(
            f"coordinate MLP: expected all tensors on the CPU, got one on {tensor.device}; move it there"
        )
    return tensor.to(dtype).contiguous()


@lru_cache(maxsize=4096)
def _header(
    coordinates: tuple[int, ...],
    weights: Shapes,
    biases: Shapes,
    activation: str,
    weight_gain: float,
    linear_output: bool,
    constant: bool,
    double: bool,
    threads: int,
) -> bytes:
    """A `library.Mlp` without its tensors, whose shapes these are."""
    windowed = bool(weights) and coordinates[-1] == weights[0][-1] + 1
    widths = (coordinates[-1] - windowed, *[bias[0] for bias in biases])
    expected = tuple((rows, columns) for columns, rows in pairwise(widths))
    if weights != expected or not 0 < len(weights) <= library.MAX_LAYERS:
        raise ValueError(
            f"weights: expected [features, previous features] of 1 to {library.MAX_LAYERS} layers, for "
            f"these coordinates and biases {list(expected)}, got {list(map(tuple, weights))}; "
            f"pass a weight and a bias for every layer"
        )
    if activation not in _ACTIVATIONS:
        known = ", ".join(map(repr, _ACTIVATIONS))
        raise ValueError(f"activation: expected one of {known}, got {activation!r}; name one of them")
    call = library.Mlp(
        dtype=library.DTYPES["float64" if double else "float32"],
        taps=coordinates[0],
        layers=len(weights),
        activation=_ACTIVATIONS.index(activation),
        linear_output=linear_output,
        constant=constant,
        threads=threads,
        windowed=windowed,
        slope=LEAKY_SLOPE,
        gain=weight_gain,
    )
    call.widths[: len(widths)] = widths
    return bytes(call)


def _prepare(
    coordinates: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    settings: tuple[str, float, bool, bool],
) -> tuple[library.Mlp, list[Tensor]]:
    """(the call, its operands: weights, biases, coordinates), which must outlive the call."""
    double = weights[0].dtype is torch.float64
    dtype = torch.float64 if double else torch.float32
    header = _header(
        coordinates.shape,
        tuple([weight.shape for weight in weights]),
        tuple([bias.shape for bias in biases]),
        *settings,
        double,
        torch.get_num_threads(),
    )
    operands = [
        tensor
        if tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous()
        else _convert(tensor, dtype)
        for tensor in (*weights, *biases, coordinates)
    ]
    *addresses, points = [tensor.data_ptr() for tensor in operands]
    call, layers = library.Mlp.from_buffer_copy(header), len(weights)
    call.coordinates = points
    call.weight[:layers] = addresses[:layers]
    call.bias[:layers] = addresses[layers:]
    return call, operands


def coordinate_mlp_fwd(
    coordinates: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    weight_gain: float,
    linear_output: bool,
    constant: bool,
) -> Tensor:
    """phi `[R, K]`, in float64 if the weights are, else in float32."""
    settings = (activation, weight_gain, linear_output, constant)
    call, operands = _prepare(coordinates, weights, biases, settings)
    basis = operands[-1].new_empty((weights[-1].shape[0] + constant, coordinates.shape[0]))
    call.basis = basis.data_ptr()
    library.mlp_forward(call)
    return basis


def coordinate_mlp_bwd(
    grad: Tensor,
    coordinates: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    weight_gain: float,
    linear_output: bool,
) -> list[Tensor]:
    """Gradients of (weights..., biases...) from that of phi, `[at least N, K]`."""
    settings = (activation, weight_gain, linear_output, False)
    call, (*parameters, points) = _prepare(coordinates, weights, biases, settings)
    shape, layers = (call.widths[call.layers], call.taps), call.layers
    if grad.dim() != 2 or grad.shape[0] < shape[0] or grad.shape[1] != shape[1]:
        raise ValueError(
            f"grad: expected phi's, [at least {shape[0]}, {shape[1]}], got {list(grad.shape)}; pass the "
            f"gradient of what coordinate_mlp_fwd returns"
        )
    if grad.dtype is not points.dtype or not grad.is_cpu or not grad.is_contiguous():
        grad = _convert(grad, points.dtype)
    call.gradient = grad.data_ptr()
    gradients = [torch.empty_like(tensor) for tensor in parameters]
    addresses = [tensor.data_ptr() for tensor in gradients]
    call.weight_gradient[:layers] = addresses[:layers]
    call.bias_gradient[:layers] = addresses[layers:]
    library.mlp_backward(call)
    return [
        gradient if gradient.dtype is parameter.dtype else gradient.to(parameter.dtype)
        for gradient, parameter in zip(gradients, (*weights, *biases), strict=True)
    ]
