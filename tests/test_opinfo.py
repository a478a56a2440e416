"""PyTorch's own samples of its six convolutions, through the layers and the functions."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hyperconv_ext
from hyperconv_ext import functional
from hyperconv_ext.modules import HyperConvNd

from .conftest import FUSED, interpreted, precision_of_the_framework, sampled
from .oracle import FLOOR, check

OPERATORS = [f"conv{kind}{dims}d" for kind in ("", "_transpose") for dims in (1, 2, 3)]
BACKENDS = ["reference", "composite", *FUSED]
# Importing torch.testing._internal forbids setting the switches of torch.backends and loads a profile of
# hypothesis: a process of its own does it, and hands over nothing but tensors and arguments. There,
# expecttest need not be installed: PyTorch's test class is derived from expecttest's, and none is run.
EXTRACT = """
import sys
import types
import unittest

sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)

import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

found = {}
for op in op_db:
    name = op.name.removeprefix("nn.functional.")
    if not name.startswith("conv") or not op.name.startswith("nn.functional."):
        continue
    errors = []
    if op.error_inputs_func:
        for error in op.error_inputs("cpu"):
            sample = error.sample_input
            errors.append((sample.input, sample.args, sample.kwargs, error.error_regex))
    torch.manual_seed(0)
    samples = [
        (s.input.detach(), s.args, s.kwargs) for s in op.sample_inputs("cpu", torch.float64)
    ]
    found[name] = {"samples": samples, "errors": errors, "modules": []}
for info in module_db:
    name = info.module_cls.__name__.lower().replace("convtranspose", "conv_transpose")
    if info.module_cls.__module__ != "torch.nn.modules.conv" or name not in found:
        continue
    inputs = info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=False, training=True
    )
    found[name]["modules"] += [
        (
            i.constructor_input.args,
            i.constructor_input.kwargs,
            i.forward_input.args,
            i.forward_input.kwargs,
        )
        for i in inputs
    ]
torch.save(found, sys.argv[1])
"""
# Error inputs of PyTorch that are no error of ours: none. (operator, message) -> reason.
NOT_ERRORS: dict[tuple[str, str], str] = {}
# Beside twice the framework's error. Gradients of the hyper-network sum over the taps, channels and
# positions, and may be the difference of far larger terms. phi is a mixing of sines of several radians,
# on one to five taps of features that nearly depend on each other, so all roundings of theirs are seen.
ROUNDINGS = 64
# How many samples of an operator Triton's interpreter runs, the cheapest. HYPERCONV_ALL_SAMPLES=1: all,
# which takes half an hour.
INTERPRETED = 3


@lru_cache(maxsize=1)
def _extract(path: str) -> dict[str, Any]:
    """What PyTorch has, by operator."""
    command = [sys.executable, "-W", "ignore", "-c", EXTRACT, path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=False)


@pytest.fixture(scope="session")
def torch_tests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = _extract(str(tmp_path_factory.mktemp("opinfo") / "samples.pt"))
    assert list(found) and set(found) == set(OPERATORS)
    return found


def _layer_class(name: str) -> type[HyperConvNd]:
    return getattr(hyperconv_ext, "HyperConv" + name[4:].replace("_t", "T"))


def _function(name: str) -> Callable[..., Tensor]:
    return getattr(functional, f"basis_{name}")


def _channels(name: str, weight: Tensor, groups: int) -> tuple[int, int]:
    first, second = weight.shape[0], weight.shape[1] * groups
    return (first, second) if "transpose" in name else (second, first)


def _layer_of(name: str, sample: Any, device: torch.device) -> HyperConvNd:
    """The layer with a sample's sizes, arguments and bias, in float64."""
    _, (weight, bias), kwargs = sample
    channels = _channels(name, weight, kwargs.get("groups", 1))
    layer = _layer_class(name)(
        *channels,
        tuple(weight.shape[2:]),
        bias=bias is not None,
        **kwargs,
        device=device,
        dtype=torch.float64,
        backend="reference",
    )
    if bias is not None:
        layer.bias.detach().copy_(bias)
    return layer


def _results(
    layer: HyperConvNd, forward: Callable[[HyperConvNd, Tensor], Tensor], input: Tensor
) -> dict[str, Tensor]:
    """Output and all gradients, of the hyper-network's as one vector, for a fixed cotangent."""
    leaf = input.detach().clone().requires_grad_()
    output = forward(layer, leaf)
    cotangent = torch.linspace(-1, 2, output.numel(), device=input.device).view(output.shape)
    names, leaves = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(output, (leaf, *leaves), cotangent.to(output.dtype))
    named = dict(zip(("input", *names), gradients, strict=True))
    hypernet = [named.pop(name).ravel() for name in names if name.startswith("hypernet")]
    return {"output": output.detach(), "hypernet": torch.cat(hypernet), **named}


def _compare(
    layer: HyperConvNd,
    forward: Callable[[HyperConvNd, Tensor], Tensor],
    input: Tensor,
    backend: str,
) -> None:
    """`layer(input)` on a backend beside `forward`, PyTorch's convolution with the layer's weight."""
    dtype = torch.float64 if backend in ("reference", "composite") else torch.float32
    layer = layer.to(dtype)  # what float64 then computes starts from the same numbers
    input = input.to(input.device, dtype)
    tested = copy.deepcopy(layer)
    tested.backend = backend
    truth = _results(copy.deepcopy(layer).double(), forward, input.double())
    own = _results(layer, forward, input)
    with precision_of_the_framework(input.device) if backend == "cuda" else nullcontext():
        actual = _results(tested, lambda module, x: module(x), input)
    assert actual.keys() == truth.keys()
    for key in truth:
        check(key, actual[key], truth[key], own[key], floor=ROUNDINGS * FLOOR[dtype])


def _work(sample: Any) -> float:
    """What an interpreted kernel's time grows with: taps and phases times positions.

    Infinite for the unbatched twin of a batch, which differs in one `unsqueeze`.
    """
    input, (weight, _), kwargs = sample
    work = weight[0, 0].numel() * input.numel()
    for name in ("stride", "dilation"):
        value = kwargs.get(name, 1)
        values = (value,) if isinstance(value, int) else tuple(value)
        work *= math.prod(values * (weight.dim() - 2) if len(values) == 1 else values)
    return work if input.dim() == weight.dim() else math.inf


# Where the host executes the kernels, these take longer than all others together.
LONGEST = [("conv3d", "cuda"), ("conv_transpose3d", "cuda")]
LONGEST += [(name, "triton") for name in OPERATORS if name != "conv2d"]


@pytest.mark.parametrize(
    ("name", "backend"), sampled(itertools.product(OPERATORS, BACKENDS), lambda row: row not in LONGEST)
)
def test_samples(name: str, backend: str, torch_tests, device, poisoned) -> None:
    """Forward and every gradient of the layer, with its own materialised weight as the truth."""
    samples = torch_tests[name]["samples"]
    if backend == "triton" and device.type == "cpu" and not os.environ.get("HYPERCONV_ALL_SAMPLES"):
        samples = sorted(samples, key=_work)[:INTERPRETED]
        assert math.isfinite(_work(samples[-1]))
    assert samples
    for sample in samples:
        input, _, kwargs = sample

        def forward(layer: HyperConvNd, x: Tensor) -> Tensor:
            return getattr(F, name)(x, layer.weight, layer.bias, **kwargs)  # noqa: B023

        _compare(_layer_of(name, sample, device), forward, input.to(device), backend)


@pytest.mark.parametrize("backend", ["reference", "composite"])
@pytest.mark.parametrize("name", OPERATORS)
def test_samples_with_their_own_weight(name: str, backend: str, torch_tests, device) -> None:
    """The sample's weight, as the combination of one function per tap."""
    for input, (weight, bias), kwargs in torch_tests[name]["samples"]:
        operands = [input, weight, *([] if bias is None else [bias])]
        leaves = [t.detach().to(device).requires_grad_() for t in operands]
        x, w, *b = leaves
        truth = getattr(F, name)(x, w, *b, **kwargs)
        taps = weight[0, 0].numel()
        basis = torch.eye(taps, dtype=w.dtype, device=device).view(taps, *weight.shape[2:])
        actual = _function(name)(x, w.flatten(2), basis, *b, **kwargs, backend=backend)
        cotangent = torch.linspace(-1, 2, truth.numel(), dtype=w.dtype, device=device).view(truth.shape)
        expected = [truth, *torch.autograd.grad(truth, leaves, cotangent)]
        got = [actual, *torch.autograd.grad(actual, leaves, cotangent)]
        for a, e in zip(got, expected, strict=True):
            check(name, a.detach(), e.detach(), e.detach())


@pytest.mark.parametrize("name", OPERATORS)
def test_error_inputs(name: str, torch_tests) -> None:
    """What PyTorch refuses is refused, and the message begins with an argument's name."""
    errors = torch_tests[name]["errors"]
    assert bool(errors) == ("transpose" not in name)  # PyTorch has none for those
    arguments = "|".join(inspect.signature(_function(name)).parameters)
    for input, (weight, *bias), kwargs, message in errors:
        if (name, message) in NOT_ERRORS:
            continue
        with pytest.raises(Exception, match=message):
            getattr(F, name)(input, weight, *bias, **kwargs)
        coefficients = weight.new_ones(*weight.shape[:2], 1)
        basis = weight.new_ones(1, *weight.shape[2:])
        with pytest.raises((TypeError, ValueError), match=rf"^({arguments}): .*; "):
            _function(name)(input, coefficients, basis, *bias, **kwargs)


@interpreted(lambda row: "3d" in row["name"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_module_inputs(name: str, backend: str, torch_tests, device, poisoned) -> None:
    """The constructor's and forward's arguments of nn.ConvNd's own tests, to our class."""
    modules = torch_tests[name]["modules"]
    assert modules
    for args, kwargs, inputs, options in modules:
        theirs = getattr(torch.nn, _layer_class(name).__name__.removeprefix("Hyper"))(
            *args, **kwargs, device=device, dtype=torch.float64
        )
        layer = _layer_class(name)(
            *args, **kwargs, device=device, dtype=torch.float64, backend="reference"
        )
        assert layer.weight.shape == theirs.weight.shape

        def forward(layer: HyperConvNd, x: Tensor) -> Tensor:
            """Their module, with our weight and bias."""
            parameters = {"weight": layer.weight, "bias": layer.bias}
            return torch.func.functional_call(theirs, parameters, (x,))  # noqa: B023

        assert not options and len(inputs) == 1
        _compare(layer, forward, inputs[0].to(device), backend)
