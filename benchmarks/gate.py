"""No number without a correct result: every competitor is checked before it is timed.

The error against float64 may be at most twice that of the same layer run by the library in the same
dtype (for a hyper-convolution: build W, call the library), plus a floor: a share of the dtype's epsilon,
for tensors that the library gets almost exactly right, and the rounding of float32 sums, whose order
is nobody's choice. On a CPU, where large kernels would take minutes in float64, their exact result is
by FFT, in float64 too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperconv_ext import backends
from hyperconv_ext.backends.reference import materialize_weight
from hyperconv_ext.modules import HyperConvNd

from . import fourier
from .competitors import Subject, arrange, subject
from .shapes import Shape

_FACTOR = 2.0
# The library's own algorithms differ by more among themselves: with Winograd, FFT, another layout.
_LIBRARY_FACTOR = 8.0
# The floor of the relative L2 error, in epsilons of the dtype and in float32 epsilons times the root
# of the longest sum's length; that of the worst element is four times as high.
_DTYPE_SHARE = 0.25
_SUM_SHARE = 1.0
_WORST = 4.0
_TF32_EPSILON = 2.0**-10
# Taps from which on a CPU computes the truth by FFT.
_MANY_TAPS = 100
_LIBRARY: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

Convolve = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of x, W and bias
Errors = dict[str, tuple[float, float]]


def results(layer: nn.Module, input: Tensor, grad: Tensor | None, sample: Tensor) -> dict[str, Tensor]:
    """The output, and with `grad` every gradient, in float64; activations at `sample` only."""
    if grad is None:
        with torch.no_grad():
            return {"output": layer(input)[sample].double()}
    leaf = input.detach().requires_grad_()
    output = layer(leaf)
    return _differentiated(output, leaf, dict(layer.named_parameters()), grad, sample)


def _differentiated(
    output: Tensor, input: Tensor, parameters: dict[str, Tensor], grad: Tensor, sample: Tensor
) -> dict[str, Tensor]:
    by_input, *by_parameter = torch.autograd.grad(output, (input, *parameters.values()), grad)
    values = {"output": output.detach()[sample], "grad of input": by_input[sample]}
    # The hyper-network as one vector: one of its smaller tensors may be all rounding error.
    whole: dict[str, list[Tensor]] = {}
    for name, gradient in zip(parameters, by_parameter, strict=True):
        whole.setdefault(f"grad of {name.split('.')[0]}", []).append(gradient.flatten())
    values |= {name: torch.cat(parts) for name, parts in whole.items()}
    return {name: value.double() for name, value in values.items()}


def _by_weight(
    layer: HyperConvNd, input: Tensor, grad: Tensor, convolve: Convolve, sample: Tensor
) -> dict[str, Tensor]:
    """As `results`, of the layer by its W, whose gradient is among them: that of `nn.ConvNd`'s, too."""
    leaf = input.detach().requires_grad_()
    weight = materialize_weight(*layer.kernel())
    parameters = {"weight": weight, **dict(layer.named_parameters())}
    return _differentiated(convolve(leaf, weight, layer.bias), leaf, parameters, grad, sample)


def errors(actual: dict[str, Tensor], truth: dict[str, Tensor]) -> Errors:
    """(relative L2 error, worst element relative to the largest) of each tensor.

    The absolute errors where the truth is zero, as the gradient of a 1x1 layer's hyper-network is.
    """
    table = {}
    for name, expected in truth.items():
        off = actual[name] - expected
        length, largest = expected.norm().item() or 1.0, expected.abs().max().item() or 1.0
        table[name] = (off.norm().item() / length, off.abs().max().item() / largest)
    return table


@lru_cache(maxsize=1)
def _standard(shape: Shape, dtype: str) -> tuple[dict[str, Tensor], Errors]:
    """The truth for `subject(shape, dtype)`, and the library's errors in the subject's dtype."""
    case = subject(shape, dtype)
    input, grad = case.input[case.sample], case.grad[case.sample]
    everything = torch.arange(len(case.sample), device=case.device)

    def library_call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rest = (shape.stride, shape.padding, shape.dilation, shape.groups)
        return _LIBRARY[shape.dims](x, weight, bias, *rest)

    def by_fft(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return fourier.convolve(x, weight, bias, shape.stride, shape.padding, shape.groups)

    many = case.device.type == "cpu" and shape.taps >= _MANY_TAPS and shape.dilation == 1
    doubles = input.double(), grad.double()
    searching = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # a search would take longer than the one run it serves
    try:
        exact = by_fft if many else library_call
        truth = _by_weight(case.hyper.double(), *doubles, exact, everything)
        library = _by_weight(case.hyper, input, grad, library_call, everything)
    finally:
        torch.backends.cudnn.benchmark = searching
    return truth, errors(library, truth)


def _epsilon(case: Subject) -> float:
    dtype = case.input.dtype
    tf32 = dtype == torch.float32 and case.device.type == "cuda" and backends.tf32_allowed()
    return _TF32_EPSILON if tf32 else torch.finfo(dtype).eps


def _floor(case: Subject) -> float:
    """The error that any correct implementation is allowed, whatever the library's."""
    shape = case.shape
    terms = shape.in_channels // shape.groups * shape.taps
    longest = max(terms, len(case.sample) * prod(shape.output_size))
    return _DTYPE_SHARE * _epsilon(case) + _SUM_SHARE * torch.finfo(torch.float32).eps * sqrt(longest)


def failures(
    shape: Shape,
    dtype: str,
    layer: nn.Module,
    layout: str,
    *,
    gradients: bool,
    baseline: bool,
) -> list[str]:
    """What of `layer`'s result on `subject(shape, dtype)` is wrong, one line each."""
    case = subject(shape, dtype)
    factor = _LIBRARY_FACTOR if baseline else _FACTOR
    floor = _floor(case)
    truth, allowed = _standard(shape, dtype)
    input = arrange(case.input, layout)
    grad = arrange(case.masked_grad, layout) if gradients else None
    actual = results(layer, input, grad, case.sample)
    measured = errors(actual, {name: truth[name] for name in actual})
    lines = []
    for name, pair in measured.items():
        kinds = ("relative L2 error", "worst relative error")
        floors = (floor, _WORST * floor)
        for kind, error, library, least in zip(kinds, pair, allowed[name], floors, strict=True):
            limit = factor * library + least
            if not error <= limit:  # NaN fails too
                lines.append(
                    f"{name}: {kind} {error:.3g}, expected at most {limit:.3g} "
                    f"({factor:g} x the library's {library:.3g} + {least:.3g})"
                )
    return lines
