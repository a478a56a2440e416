"""`functional`: what a wrong argument is told, and what a right one computes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hyperconv_ext import HyperConv2d, functional
from hyperconv_ext.backends.reference import materialize_weight
from hyperconv_ext.planner import PlanError

from .conftest import FUSED, ON_GPU, dtypes_of
from .oracle import check

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
T, V = TypeError, ValueError
PER_AXIS = "expected an integer or 2 of them, each at least"
NAMES = ("input", "coefficients", "basis", "bias")
IN_BFLOAT16 = [
    *("auto", "reference", "composite"),
    *(name for name in FUSED if torch.bfloat16 in dtypes_of(name, DEVICE)),
]


def _tensors(device, dtype=torch.float32) -> dict[str, Tensor]:
    """A problem with two groups and an asymmetric kernel."""
    shapes = {"input": (2, 4, 7, 9), "coefficients": (6, 2, 3), "basis": (3, 3, 4), "bias": (6,)}
    drawn = {name: torch.randn(shape, device=device, dtype=dtype) for name, shape in shapes.items()}
    return drawn | {"groups": 2}


def _mlp(device, dtype=torch.float32) -> dict[str, Any]:
    """The same problem with phi from a 2 -> 5 -> 3 MLP."""
    arguments: dict[str, Any] = _tensors(device, dtype)
    arguments["kernel_size"] = arguments.pop("basis").shape[1:]
    sizes = {"weights": [(5, 2), (3, 5)], "biases": [(5,), (3,)]}
    drawn = {n: [torch.randn(s, device=device, dtype=dtype) for s in v] for n, v in sizes.items()}
    return arguments | drawn


def _zeros(*shape: int, **options: Any) -> Callable[[Tensor], Tensor]:
    """Another tensor in the place of an argument."""
    return lambda old: torch.zeros(shape, device=old.device, **options)


def _to(target: Any) -> Callable[[Tensor], Tensor]:
    return lambda old: old.to(target)


# (arguments changed, exception, how the message starts, … for anything between). A callable makes the
# argument from the right one.
SHARED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": [[1.0]]}, T, "input: expected a torch.Tensor, got list; convert"),
    ({"coefficients": None}, T, "coefficients: expected a torch.Tensor, got NoneType; conv"),
    ({"bias": 1.0}, T, "bias: expected a torch.Tensor, got float; convert"),
    ({"input": _to(torch.int64)}, T, "input: expected float32, …got torch.int64; convert"),
    ({"bias": _to(torch.complex64)}, T, "bias: expected float…got torch.complex64; conv"),
    (
        {"coefficients": _to(torch.float64)},
        T,
        "coefficients: …input's dtype…got torch.float64; convert…autocast",
    ),
    (
        {"bias": _to(torch.bfloat16)},
        T,
        "bias: …the input's dtype torch.float32, got torch.bfloat16; conv",
    ),
    ({"coefficients": _to("meta")}, V, "coefficients: …on the input's device …, got meta; move"),
    ({"bias": _to("meta")}, V, "bias: expected it on the input's device …, got meta; move it"),
    ({"input": _zeros(4, 7)}, V, "input: …[B, C_in, H, W] or [C_in, H, W], got [4, 7]; add or remove"),
    ({"input": _zeros(1, 2, 4, 7, 9)}, V, "input: …got [1, 2, 4, 7, 9]; add or remove"),
    ({"input": _zeros(2, 5, 7, 9)}, V, "input: expected 4 channels…, got 5 in [2, 5, 7, 9]; match"),
    ({"groups": 0}, V, "groups: expected a positive integer, got 0; pass 1"),
    ({"groups": 2.0}, V, "groups: expected a positive integer, got 2.0; pass"),
    ({"groups": 4}, V, "coefficients: …divisible by groups=4, got [6, 2, 3]; reshape"),
    ({"groups": 3}, V, "input: expected 6 channels …groups=3), got 4 in …; match"),
    ({"coefficients": _zeros(6, 3)}, V, "coefficients: …[C_out, C_in/groups, R]…got [6, 3]; reshape"),
    ({"bias": _zeros(5)}, V, "bias: expected [6], got [5]; give one value per output channel"),
    ({"bias": _zeros(1, 6)}, V, "bias: expected [6], got [1, 6]; give"),
    *[
        ({name: value}, error, f"{name}: {PER_AXIS} {minimum}, got {text}; pass")
        for name, minimum in (("stride", 1), ("dilation", 1), ("padding", 0))
        for value, error, text in (
            (minimum - 1, V, minimum - 1),
            ((1, -3), V, "(1, -3)"),
            ((1,), V, "(1,)"),
            ((1, 1, 1), V, "(1, 1, 1)"),
            (1.5, T, "1.5"),
            ((1, 1.0), T, "(1, 1.0)"),
            (None, T, "None"),
        )
    ],
    *[
        ({name: "same"}, T, f"{name}: {PER_AXIS} 1, got 'same'; pass integers")
        for name in ("stride", "dilation")
    ],
    ({"padding": "full"}, V, "padding: expected integers, 'same' or 'valid', got 'full'; pass"),
    ({"padding": "same", "stride": (1, 2)}, V, "padding: …got stride (1, 2); pass the padding as"),
    ({"dilation": 4}, V, "input: …got [2, 4, 7, 9] for kernel_size (3, 4)…(4, 4)…[-1, -3]); pad"),
    (
        {"backend": "cudnn"},
        V,
        "backend: expected one of auto, reference, cuda, triton, cpu, composite, got 'cudnn'; pass",
    ),
    ({"algorithm": "winograd"}, V, "algorithm: expected one of auto, …direct…got 'winograd'; pass one"),
    (
        {"backend": "composite", "algorithm": "direct"},
        PlanError,
        "algorithm='direct' is not one of backend='composite'…; name",
    ),
    (
        {"backend": "triton", "algorithm": "composite"},
        PlanError,
        "algorithm='composite' is not one of…, triton: basis/direct,…; name",
    ),
    (
        {"backend": "cuda", "algorithm": "direct"},
        PlanError,
        "algorithm='direct' is not one of backend='cuda' (cuda: basis/wgmma, …; name",
    ),
    ({"backend": "reference", "algorithm": "basis"}, PlanError, "algorithm='basis'…'reference'…;"),
]

BASIS_ONLY: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"basis": "phi"}, T, "basis: expected a torch.Tensor, got str; convert"),
    ({"basis": _to(torch.int32)}, T, "basis: expected float32, …got torch.int32; convert"),
    ({"basis": _to(torch.float16)}, T, "basis: expected torch.float32, got torch.float16; conv"),
    ({"basis": _to("meta")}, V, "basis: …on the input's device …, got meta; move"),
    ({"basis": _zeros(3, 12)}, V, "basis: expected [R, k, k] with R=3 …got [3, 12]; give one"),
    ({"basis": _zeros(4, 3, 4)}, V, "basis: expected [R, k, k] with R=3 …got [4, 3, 4]; give"),
    ({"basis": _zeros(3, 0, 4)}, V, "basis: …no empty axis, got [3, 0, 4]; give"),
    ({"basis": _zeros(3, 8, 4)}, V, "input: expected at least the kernel's extent…[0, 6]…; pad"),
    ({"coefficients": _zeros(6, 2, 2)}, V, "basis: …with R=2 …got [3, 3, 4]; give"),
]

HYPER_ONLY: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"kernel_size": 0}, V, f"kernel_size: {PER_AXIS} 1, got 0; pass"),
    ({"kernel_size": (3, 4, 5)}, V, f"kernel_size: {PER_AXIS} 1, got (3, 4, 5); pass 2"),
    ({"kernel_size": "3"}, T, f"kernel_size: {PER_AXIS} 1, got '3'; pass integers"),
    ({"kernel_size": 3.0}, T, f"kernel_size: {PER_AXIS} 1, got 3.0; pass integers"),
    ({"kernel_size": (8, 1)}, V, "input: …kernel's extent…(8, 1)…; pad"),
    ({"coefficients": _zeros()}, V, "coefficients: expected a last axis R=3 …got []; match"),
    (
        {"coefficients": _zeros(6, 2, 5)},
        V,
        "coefficients: …R=3 (the MLP's features) or 4 …got [6, 2, 5]; match",
    ),
    ({"coefficients": _zeros(6, 2, 2)}, V, "coefficients: expected …R=3 …got [6, 2, 2]; match"),
    ({"weights": [], "biases": []}, V, "weights, biases: …one layer, got 0 and 0; give"),
    ({"biases": lambda old: old[:1]}, V, "weights, biases: expected one of each…got 2 and 1; give"),
    (
        {"weights": lambda old: [old[0].T, old[1]]},
        V,
        "weights[0]: …[features, 2], got [2, 5]; each…the 2 coord",
    ),
    ({"weights": lambda old: [old[0], old[1].T]}, V, "weights[1]: …[features, 5], got [5, 3]; each"),
    (
        {"weights": lambda old: [old[0], old[1][0]]},
        V,
        "weights[1]: expected [features, 5], got [5]; each",
    ),
    (
        {"biases": lambda old: [old[0][:4], old[1]]},
        V,
        "biases[0]: expected [5], got [4]; give one per feature",
    ),
    ({"biases": lambda old: [old[0], old[1][None]]}, V, "biases[1]: expected [3], got [1, 3]; give"),
    ({"weights": lambda old: [old[0], None]}, T, "weights[1]: …Tensor, got NoneType; "),
    ({"biases": lambda old: [None, old[1]]}, T, "biases[0]: expected a torch.Tensor, got NoneType; "),
    ({"weights": lambda old: [w.to("meta") for w in old]}, V, "weights[0]: …device …got meta; "),
    ({"weights": lambda old: [w.long() for w in old]}, T, "weights[0]: …got torch.int64; "),
    ({"activation": "swish"}, V, "activation: expected one of leaky_relu, …got 'swish'; pass"),
    ({"coordinates": "polar"}, V, "coordinates: expected …'unit', got 'polar'; pass"),
    ({"weight_gain": 0}, V, "weight_gain: expected a positive number, got 0; pass a finite one"),
    ({"weight_gain": -0.5}, V, "weight_gain: expected a positive number, got -0.5; pass a finite one"),
    ({"weight_gain": math.inf}, V, "weight_gain: expected a positive number, got inf; pass a finite"),
    ({"weight_gain": math.nan}, V, "weight_gain: expected a positive number, got nan; pass a finite"),
    ({"weight_gain": "2"}, T, "weight_gain: expected a positive number, got '2'; pass a float"),
    ({"weight_gain": True}, T, "weight_gain: expected a positive number, got True; pass a float"),
    (
        {"weight_gain": torch.ones(())},
        T,
        "weight_gain: expected a positive number, got tensor(1.); pass",
    ),
    ({"linear_output": 1}, T, "linear_output: expected a bool, got 1; pass True or False"),
    ({"linear_output": None}, T, "linear_output: expected a bool, got None; pass True or False"),
]


def _refused(function: Callable[..., Tensor], arguments: dict[str, Any], row: tuple[Any, ...]) -> None:
    changes, error, message = row
    for name, value in changes.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    pattern = "^" + ".*".join(map(re.escape, message.split("…")))
    with pytest.raises(error, match=pattern) as caught:
        function(**arguments)
    assert type(caught.value) is error


def _name(row: Any) -> str:
    return ",".join(f"{name}={'...' if callable(v) else v}" for name, v in row[0].items())


@pytest.mark.parametrize("row", SHARED + BASIS_ONLY, ids=_name)
def test_basis_conv2d_refuses(row, device) -> None:
    _refused(functional.basis_conv2d, _tensors(device), row)


@pytest.mark.parametrize("row", SHARED + HYPER_ONLY, ids=_name)
def test_hyper_conv2d_refuses(row, device) -> None:
    _refused(functional.hyper_conv2d, _mlp(device), row)


@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize(
    ("function", "arguments"), [(functional.basis_conv2d, _tensors), (functional.hyper_conv2d, _mlp)]
)
def test_float64_is_refused(function, arguments, backend: str, device) -> None:
    message = rf"basis_conv_fwd cannot run with backend='{backend}'.*not float64.*; use backend='auto'"
    with pytest.raises(PlanError, match=message):
        function(**arguments(device, torch.float64), backend=backend)


def test_a_named_algorithm_is_used_by_auto(device) -> None:
    """Not replaced by the dense convolution, which has none: who builds W on chip refuses float64."""
    with pytest.raises(PlanError, match="not float64"):
        functional.basis_conv2d(**_tensors(device, torch.float64), algorithm="direct")


# (weight_gain, linear_output)
SETTINGS = [(1.0, False), (0.3, False), (1.0, True), (0.3, True)]


def _basis(
    weights: list[Tensor],
    biases: list[Tensor],
    size: tuple[int, int],
    constant: bool,
    weight_gain: float = 1.0,
    linear_output: bool = False,
) -> Tensor:
    """phi of the default MLP, written out."""
    axes = [torch.arange(n, dtype=torch.float64, device=weights[0].device) - (n - 1) / 2 for n in size]
    hidden = torch.cartesian_prod(*axes)
    for number, (weight, offset) in enumerate(zip(weights, biases, strict=True), 1):
        if linear_output and number == len(weights):
            hidden = hidden @ weight.T + offset
        else:
            hidden = F.leaky_relu(hidden @ (weight_gain * weight.T) + weight_gain * offset, 0.1)
    basis = hidden.T.unflatten(1, size)
    return torch.cat([basis, torch.ones_like(basis[:1])]) if constant else basis


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("backend", ["auto", "reference", "composite"])
def test_hyper_conv2d_is_basis_conv2d_of_the_mlp(
    backend: str, settings: tuple[float, bool], constant: bool, device
) -> None:
    arguments = _mlp(device, torch.float64)
    size = tuple(arguments.pop("kernel_size"))
    if constant:
        arguments["coefficients"] = torch.randn(6, 2, 4, device=device, dtype=torch.float64)
    weights, biases = arguments.pop("weights"), arguments.pop("biases")
    leaves = [arguments[n] for n in ("input", "coefficients", "bias")] + weights + biases
    for leaf in leaves:
        leaf.requires_grad_()
    geometry = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "backend": backend}
    chosen = dict(zip(("weight_gain", "linear_output"), settings, strict=True))
    actual = functional.hyper_conv2d(
        weights=weights, biases=biases, kernel_size=size, **arguments, **geometry, **chosen
    )
    basis = _basis(weights, biases, size, constant, *settings)
    expected = functional.basis_conv2d(basis=basis, **arguments, **geometry)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, leaves, cotangent) for y in (actual, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("linear_output", [False, True])
def test_an_mlp_of_one_layer(linear_output: bool, device) -> None:
    """A lone linear layer gives affine functions of the coordinates, to which the gain means nothing."""
    arguments = _mlp(device, torch.float64)
    weights, biases = [torch.randn(3, 2).to(arguments["input"])], [torch.randn(3).to(arguments["input"])]
    size = tuple(arguments["kernel_size"])
    arguments |= {"weights": weights, "biases": biases}
    settings = {"weight_gain": 0.3, "linear_output": linear_output}
    actual = functional.hyper_conv2d(**arguments, **settings)
    tensors = {name: arguments[name] for name in ("input", "coefficients", "bias")}
    tensors["basis"] = _basis(weights, biases, size, False, 0.3, linear_output)
    torch.testing.assert_close(actual, _dense(tensors))


@pytest.mark.parametrize("gain", [np.float32(0.5), np.float64(0.5), Fraction(1, 2)], ids=type)
@pytest.mark.parametrize("backend", ["reference", *FUSED])
def test_every_number_is_a_gain(backend: str, gain: Any, device) -> None:
    arguments = _mlp(device)
    results = [functional.hyper_conv2d(**arguments, weight_gain=g, backend=backend) for g in (gain, 0.5)]
    assert torch.equal(*results)
    assert not torch.equal(results[0], functional.hyper_conv2d(**arguments, backend=backend))


@pytest.mark.parametrize("weight_bias", [False, True])
@pytest.mark.parametrize("coordinates", ["centered", "unit"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_hyper_conv2d_is_the_layer(dtype, coordinates: str, weight_bias: bool, device) -> None:
    options = {"stride": 2, "padding": (3, 0), "groups": 2}
    conv = HyperConv2d(
        4, 6, (7, 4), **options, weight_bias=weight_bias, coordinates=coordinates,
        device=device, dtype=dtype,
    )  # fmt: skip
    layers = [*conv.hypernet.layers, conv.mixing]
    actual = functional.hyper_conv2d(
        input := torch.randn(2, 4, 9, 8, device=device, dtype=dtype),
        conv.coefficients,
        [layer.weight for layer in layers],
        [layer.bias for layer in layers],
        conv.kernel_size,
        conv.bias,
        **options,
        activation="sine",
        weight_gain=conv.hypernet.weight_gain,
        linear_output=True,
        coordinates=coordinates,
    )
    assert torch.equal(actual, conv(input))


def _dense(tensors: dict[str, Any], **options: Any) -> Tensor:
    """`F.conv2d` with W built, as the docstring of `basis_conv2d` says."""
    weight = torch.einsum("oir,rhw->oihw", tensors["coefficients"], tensors["basis"])
    return F.conv2d(tensors["input"], weight, tensors["bias"], groups=2, **options)


@pytest.mark.parametrize("padding", ["same", "valid", [1, 2]], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference", "composite"])
def test_padding_names_and_unbatched_input(backend: str, padding, device) -> None:
    tensors = _tensors(device, torch.float64)
    expected = _dense(tensors, padding=padding)
    actual = functional.basis_conv2d(**tensors, padding=padding, backend=backend)
    torch.testing.assert_close(actual, expected)
    tensors["input"] = tensors["input"][1]
    actual = functional.basis_conv2d(**tensors, padding=padding, backend=backend)
    torch.testing.assert_close(actual, expected[1])


@pytest.mark.parametrize("backend", IN_BFLOAT16)
def test_autocast(backend: str, device) -> None:
    """bfloat16 out, as near to float64 as `F.conv2d` under autocast; gradients in the leaves' dtype."""
    tensors = _tensors(device)
    truth = _dense({n: t.double() if n in NAMES else t for n, t in tensors.items()})
    for name in NAMES:
        tensors[name].requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        actual = functional.basis_conv2d(**tensors, backend=backend)
        own = _dense(tensors)
    assert actual.dtype == torch.bfloat16
    check("output", actual.detach(), truth, own.detach())
    actual.float().square().sum().backward()
    assert all(tensors[name].grad.dtype == torch.float32 for name in NAMES)


@pytest.mark.parametrize("backend", IN_BFLOAT16)
def test_float32_basis_with_bfloat16_input(backend: str, device) -> None:
    tensors = _tensors(device, torch.bfloat16)
    tensors["basis"] = torch.randn(3, 3, 4, device=device, requires_grad=True)
    wide = {n: t.detach().double() if n in NAMES else t for n, t in tensors.items()}
    wide["basis"].requires_grad_()
    with torch.no_grad():
        weight = materialize_weight(tensors["coefficients"], tensors["basis"])
        own = F.conv2d(tensors["input"], weight, tensors["bias"], groups=2)
    actual, truth = functional.basis_conv2d(**tensors, backend=backend), _dense(wide)
    assert actual.dtype == torch.bfloat16
    check("output", actual.detach(), truth.detach(), own)
    (gradient,) = torch.autograd.grad(actual.sum(), tensors["basis"])
    (expected,) = torch.autograd.grad(truth.sum(), wide["basis"])
    assert gradient.dtype == torch.float32
    check("basis", gradient, expected, expected.bfloat16())


@pytest.mark.parametrize("backend", ON_GPU)
def test_environment_overrides_auto(backend: str, device, monkeypatch) -> None:
    """Seen by what these backends refuse: float64."""
    tensors = _tensors(device, torch.float64)
    expected = _dense(tensors)
    monkeypatch.setenv("HYPERCONV_BACKEND", backend)
    for call in (
        lambda: functional.basis_conv2d(**tensors),
        lambda: HyperConv2d(4, 6, 3, device=device, dtype=torch.float64)(tensors["input"]),
    ):
        with pytest.raises(PlanError, match=rf"backend='{backend}'.*not float64"):
            call()
    for name in ("reference", "composite"):
        torch.testing.assert_close(functional.basis_conv2d(**tensors, backend=name), expected)
    for name in ("auto", "reference", "composite"):
        monkeypatch.setenv("HYPERCONV_BACKEND", name)
        torch.testing.assert_close(functional.basis_conv2d(**tensors), expected)


def test_environment_names_no_backend(device, monkeypatch) -> None:
    tensors = _tensors(device)
    monkeypatch.setenv("HYPERCONV_BACKEND", "cudnn")
    message = r"^HYPERCONV_BACKEND: expected one of auto, reference, cuda, .*got 'cudnn'; set it .*unset"
    for function, arguments in (
        (functional.basis_conv2d, tensors),
        (functional.hyper_conv2d, _mlp(device)),
    ):
        with pytest.raises(ValueError, match=message):
            function(**arguments)
    functional.basis_conv2d(**tensors, backend="composite")
