"""No number without a correct result: every competitor is checked before it is timed.

The error against float64 may be at most twice that of the same layer run by the library in the same
dtype (for a hyper-convolution: build W, call the library), plus a floor: a share of the dtype's epsilon,
for tensors that the library gets almost exactly right, and the rounding of float32 sums, whose order
is nobody's choice.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from math import prod, sqrt

import torch
from torch import Tensor, nn

from hyperconv_ext import backends
from hyperconv_ext.modules import HyperConvNd

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

Errors = dict[str, tuple[float, float]]


def results(layer: nn.Module, input: Tensor, grad: Tensor | None, sample: Tensor) -> dict[str, Tensor]:
    """The output, and with `grad` every gradient, in float64; activations at `sample` only."""
    if grad is None:
        with torch.no_grad():
            return {"output": layer(input)[sample].double()}
    leaf = input.detach().requires_grad_()
    output = layer(leaf)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    by_input, *by_parameter = torch.autograd.grad(output, (leaf, *parameters), grad)
    values = {"output": output.detach()[sample], "grad of input": by_input[sample]}
    # The hyper-network as one vector: one of its smaller tensors may be all rounding error.
    whole: dict[str, list[Tensor]] = {}
    for name, gradient in zip(names, by_parameter, strict=True):
        whole.setdefault(f"grad of {name.split('.')[0]}", []).append(gradient.flatten())
    values |= {name: torch.cat(parts) for name, parts in whole.items()}
    return {name: value.double() for name, value in values.items()}


def errors(actual: dict[str, Tensor], truth: dict[str, Tensor]) -> Errors:
    """(relative L2 error, worst element relative to the largest) of each tensor."""
    table = {}
    for name, expected in truth.items():
        off = actual[name] - expected
        worst = off.abs().max() / expected.abs().max()
        table[name] = ((off.norm() / expected.norm()).item(), worst.item())
    return table


@lru_cache(maxsize=2)
def _standard(shape: Shape, dtype: str, hyper: bool) -> tuple[dict[str, Tensor], Errors]:
    """The truth for `subject(shape, dtype)`, and the library's errors in the subject's dtype."""
    case = subject(shape, dtype)
    layer = case.library(hyper)
    input, grad = case.input[case.sample], case.grad[case.sample]
    everything = torch.arange(len(case.sample), device=case.device)
    exact = copy.deepcopy(layer).double()
    searching = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # a search would take longer than the one run it serves
    try:
        truth = results(exact, input.double(), grad.double(), everything)
        library = results(layer, input, grad, everything)
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
    truth, allowed = _standard(shape, dtype, isinstance(layer, HyperConvNd))
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
