"""The coordinate MLP: all layers in one launch forward, and one launch backward."""

from __future__ import annotations

import triton
import triton.language as tl

from ...reference import LEAKY_SLOPE

_SLOPE: tl.constexpr = tl.constexpr(LEAKY_SLOPE)
_RSQRT_2: tl.constexpr = tl.constexpr(0.7071067811865476)
_RSQRT_2PI: tl.constexpr = tl.constexpr(0.3989422804014327)


@triton.jit
def _tanh(h):
    return 2 * tl.sigmoid(2 * h) - 1


@triton.jit
def _activate(h, activation: tl.constexpr):
    if activation == "leaky_relu":
        h = tl.where(h > 0, h, _SLOPE * h)
    elif activation == "relu":
        h = tl.maximum(h, 0.0)
    elif activation == "gelu":
        h = 0.5 * h * (1 + tl.erf(h * _RSQRT_2))
    elif activation == "silu":
        h = h * tl.sigmoid(h)
    elif activation == "tanh":
        h = _tanh(h)
    else:
        tl.static_assert(activation == "sine")
        h = tl.sin(h)
    return h


@triton.jit
def _slope(h, activation: tl.constexpr):
    """Derivative of the activation at the preactivation `h`."""
    if activation == "leaky_relu":
        d = tl.where(h > 0, 1.0, _SLOPE)
    elif activation == "relu":
        d = tl.where(h > 0, 1.0, 0.0)
    elif activation == "gelu":
        d = 0.5 * (1 + tl.erf(h * _RSQRT_2)) + h * _RSQRT_2PI * tl.exp(-0.5 * h * h)
    elif activation == "silu":
        s = tl.sigmoid(h)
        d = s * (1 + h * (1 - s))
    elif activation == "tanh":
        t = _tanh(h)
        d = 1 - t * t
    else:
        tl.static_assert(activation == "sine")
        d = tl.cos(h)
    return d


@triton.jit
def _weight(weight, rows: tl.constexpr, columns: tl.constexpr, BW: tl.constexpr):
    """A layer's weight `[rows, columns]` in float32, zero-padded to [BW, BW]."""
    i = tl.arange(0, BW)
    valid = (i < rows)[:, None] & (i < columns)[None, :]
    return tl.load(weight + i[:, None] * columns + i[None, :], mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _window(coordinates, k, taps, widths: tl.constexpr):
    """What the inputs of the last layer are multiplied by at taps `k` [BK], [BK, 1]."""
    window = coordinates + k * (widths[0] + 1) + widths[0]
    return tl.load(window, mask=k < taps, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _layer(
    coordinates,
    weights,
    biases,
    gain,
    k,
    taps,
    widths: tl.constexpr,
    depth: tl.constexpr,
    activation: tl.constexpr,
    windowed: tl.constexpr,
    BW: tl.constexpr,
):
    """(input, preactivation), each [BK, BW], of layer `depth` at taps `k` [BK]."""
    i = tl.arange(0, BW)
    valid = (k < taps)[:, None] & (i < widths[0])[None, :]
    points = coordinates + k[:, None] * (widths[0] + windowed)
    hidden = tl.load(points + i[None, :], mask=valid, other=0.0)
    hidden = hidden.to(tl.float32)
    h = hidden
    for n in tl.static_range(depth + 1):
        if n > 0:
            hidden = _activate(gain * h, activation)
        if windowed and n == len(widths) - 2:
            hidden = hidden * _window(coordinates, k, taps, widths)
        weight = _weight(weights[n], widths[n + 1], widths[n], BW)
        bias = tl.load(biases[n] + i, mask=i < widths[n + 1], other=0.0).to(tl.float32)
        h = tl.dot(hidden, tl.trans(weight), input_precision="ieee") + bias[None, :]
    return hidden, h


@triton.jit
def evaluate(
    mlp,
    k,
    taps,
    widths: tl.constexpr,
    activation: tl.constexpr,
    linear_output: tl.constexpr,
    windowed: tl.constexpr,
    BW: tl.constexpr,
):
    """Features [BK, BW] at taps `k` of an MLP (coordinates, weights, biases, weight gain)."""
    depth: tl.constexpr = len(widths) - 2
    _, h = _layer(mlp[0], mlp[1], mlp[2], mlp[3], k, taps, widths, depth, activation, windowed, BW)
    if not linear_output:
        h = _activate(mlp[3] * h, activation)
    return h


@triton.jit(do_not_specialize=["taps"])
def mlp_kernel(
    # coordinates [K, D], and if `windowed` one column more, per layer weights [features, previous
    # features] and biases [features], the gain of the activated layers
    mlp,
    basis,  # float32 [R, K]
    taps,
    widths: tl.constexpr,
    activation: tl.constexpr,
    linear_output: tl.constexpr,
    windowed: tl.constexpr,
    CONSTANT: tl.constexpr,
    BW: tl.constexpr,
    BK: tl.constexpr,
):
    """basis[n, k] = feature n at tap k; one more row of ones if CONSTANT."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    features: tl.constexpr = widths[len(widths) - 1]
    phi = evaluate(mlp, k, taps, widths, activation, linear_output, windowed, BW)
    n = tl.arange(0, BW)
    valid = (k < taps)[:, None] & (n < features)[None, :]
    tl.store(basis + n[None, :] * taps + k[:, None], phi, mask=valid)
    if CONSTANT:
        ones = tl.full((BK,), 1.0, dtype=tl.float32)
        tl.store(basis + features * taps + k, ones, mask=k < taps)


@triton.jit(do_not_specialize=["taps"])
def mlp_backward_kernel(
    gradient,  # float32 [R, K], of the basis
    coordinates,
    weights,
    biases,
    gain,
    weight_gradients,  # per layer, contiguous
    bias_gradients,
    taps,
    widths: tl.constexpr,
    activation: tl.constexpr,
    linear_output: tl.constexpr,
    windowed: tl.constexpr,
    BW: tl.constexpr,
    BK: tl.constexpr,
):
    """One program per layer, which makes the layers above it again: K rows cost nothing."""
    layers: tl.constexpr = len(widths) - 1
    features: tl.constexpr = widths[layers]
    i = tl.arange(0, BW)
    for target in tl.static_range(layers):
        if tl.program_id(0) == target:
            weight_gradient = tl.zeros((BW, BW), dtype=tl.float32)
            bias_gradient = tl.zeros((BW,), dtype=tl.float32)
            for start in range(0, taps, BK):
                k = start + tl.arange(0, BK)
                valid = (k < taps)[:, None] & (i < features)[None, :]
                delta = tl.load(gradient + i[None, :] * taps + k[:, None], mask=valid, other=0.0).to(
                    tl.float32
                )  # [BK, BW]
                for above in tl.static_range(layers - target):
                    hidden, h = _layer(
                        coordinates,
                        weights,
                        biases,
                        gain,
                        k,
                        taps,
                        widths,
                        layers - 1 - above,
                        activation,
                        windowed,
                        BW,
                    )
                    if windowed and above == 1:
                        delta = delta * _window(coordinates, k, taps, widths)
                    if above > 0 or not linear_output:
                        delta = delta * (gain * _slope(gain * h, activation))
                    if layers - 1 - above == target:
                        weight_gradient += tl.dot(tl.trans(delta), hidden, input_precision="ieee")
                        bias_gradient += tl.sum(delta, axis=0)
                    else:
                        weight = _weight(
                            weights[layers - 1 - above],
                            widths[layers - above],
                            widths[layers - 1 - above],
                            BW,
                        )
                        delta = tl.dot(delta, weight, input_precision="ieee")
            valid = (i < widths[target + 1])[:, None] & (i < widths[target])[None, :]
            pointers = weight_gradients[target] + i[:, None] * widths[target] + i[None, :]
            dtype = weight_gradients[target].dtype.element_ty
            tl.store(pointers, weight_gradient.to(dtype), mask=valid)
            tl.store(bias_gradients[target] + i, bias_gradient.to(dtype), mask=i < widths[target + 1])
