"""One to three dimensions, transposed or not: random geometry, large sizes, other grids of taps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hyperconv_ext
from hyperconv_ext import HyperConv1d, HyperConv2d, HyperConvTranspose2d, functional, ops
from hyperconv_ext.backends.reference import materialize_weight
from hyperconv_ext.geometry import Geometry
from hyperconv_ext.modules import HyperConvNd
from hyperconv_ext.planner import PlanError

from .conftest import (
    FUSED,
    ON_GPU,
    QUICK,
    WHY_NOT,
    backend_algorithms,
    device_of,
    dtypes_of,
    precision_of_the_framework,
)
from .oracle import NAMES, check, floor_of_sums

AXES = {1: ("L",), 2: ("H", "W"), 3: ("D", "H", "W")}
KINDS = [(dims, transposed) for transposed in (False, True) for dims in (1, 2, 3)]
LAST = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d}
every_kind = pytest.mark.parametrize(("dims", "transposed"), KINDS)
every_backend = pytest.mark.parametrize("backend", ["composite", *FUSED])
GIB = 2**30


def name_of(dims: int, transposed: bool) -> str:
    return f"conv_transpose{dims}d" if transposed else f"conv{dims}d"


def function_of(dims: int, transposed: bool) -> Callable[..., Tensor]:
    return getattr(functional, f"basis_{name_of(dims, transposed)}")


def layer_class(dims: int, transposed: bool) -> type[HyperConvNd]:
    return getattr(hyperconv_ext, f"HyperConv{'Transpose' if transposed else ''}{dims}d")


def precision(backend: str, device: torch.device):
    return precision_of_the_framework(device) if backend == "cuda" else nullcontext()


@dataclass(frozen=True)
class Case:
    """A convolution of any number of axes; `channels` are (in, out)."""

    dims: int
    transposed: bool
    batch: int
    channels: tuple[int, int]
    rank: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    arguments: dict[str, Any]
    layout: str = "contiguous"

    def draw(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """(input, coefficients, basis, bias), rounded to `dtype`."""
        groups, channels = self.arguments.get("groups", 1), self.channels
        first, second = channels if self.transposed else channels[::-1]
        shapes = (
            (self.batch, channels[0], *self.size),
            (first, second // groups, self.rank),
            (self.rank, *self.kernel),
            (channels[1],),
        )
        return [torch.randn(shape, device=device).to(dtype) for shape in shapes]

    def run(
        self,
        tensors: Sequence[Tensor],
        cotangent: Tensor | None,
        backend: str,
        algorithm: str = "auto",
    ) -> list[Tensor]:
        """Output, and for a cotangent the four gradients; `'torch'` is the framework with W."""
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        input, coefficients, basis, bias = leaves
        if self.layout == "channels_last":
            input = input.movedim(1, -1).contiguous().movedim(-1, 1)
        if backend == "torch":
            convolve = getattr(F, name_of(self.dims, self.transposed))
            output = convolve(input, materialize_weight(coefficients, basis), bias, **self.arguments)
        else:
            convolve = function_of(self.dims, self.transposed)
            choice = {"backend": backend, "algorithm": algorithm}
            output = convolve(input, coefficients, basis, bias, **self.arguments, **choice)
        if cotangent is None:
            return [output.detach()]
        return [output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(output.dtype))]


def compare(
    case: Case, backend: str, dtype: torch.dtype, device: torch.device, algorithm: str = "auto"
) -> None:
    """Forward and all gradients within twice the framework's own error."""
    tensors = case.draw(dtype, device)
    wide = [t.double() for t in tensors]
    cotangent = torch.randn_like(case.run(wide, None, "torch")[0]).to(dtype)
    truth = case.run(wide, cotangent, "torch")
    own = case.run(tensors, cotangent, "torch")
    with precision(backend, device):
        actual = case.run(tensors, cotangent, backend, algorithm)
    terms = prod(case.kernel) if backend == "cpu" else 0  # added one after the other
    for name, *values in zip(NAMES, actual, truth, own, strict=True):
        check(name, *values, floor=floor_of_sums(dtype, terms))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small ones; kernels may exceed the input, outputs may be single, groups depthwise."""
    dims, transposed = draw(st.sampled_from(KINDS))
    few = st.integers(1, 3)
    groups = draw(few)
    channels = [groups * (1 if draw(st.booleans()) else draw(few)) for _ in range(2)]
    kernel, stride, dilation, padding, extra, size = ([] for _ in range(6))
    for _ in range(dims):
        k, s, d = draw(st.integers(1, {1: 9, 2: 5, 3: 3}[dims])), draw(few), draw(few)
        extent, p = d * (k - 1) + 1, draw(st.integers(0, 4))
        e = draw(st.integers(0, max(s, d) - 1)) if transposed else 0
        # A transposed convolution of n inputs has (n - 1) s - 2 p + extent + e outputs.
        steps = max(0, -(-(2 * p + 1 - extent - e) // s))
        least = 1 + steps if transposed else max(1, extent - 2 * p)
        n = least + draw(st.integers(0, {1: 8, 2: 4, 3: 2}[dims]))
        for values, value in zip(
            (kernel, stride, dilation, padding, extra, size), (k, s, d, p, e, n), strict=True
        ):
            values.append(value)
    arguments = {
        "stride": tuple(stride),
        "padding": tuple(padding),
        "dilation": tuple(dilation),
        "groups": groups,
    }
    if transposed:
        arguments["output_padding"] = tuple(extra)
    assume(prod(size) * prod(kernel) * prod(stride) * prod(dilation) <= 4000)  # seconds otherwise
    batch, rank = draw(st.integers(1, 2)), draw(st.integers(1, 5))
    layout = draw(st.sampled_from(("contiguous", "channels_last")))
    sizes = (tuple(channels), rank, tuple(size), tuple(kernel))
    return Case(dims, transposed, batch, *sizes, arguments, layout)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    case=cases(), seed=st.integers(0, 2**31), dtype=st.sampled_from(("float32", "float16", "bfloat16"))
)
def test_random_geometry(case: Case, seed: int, dtype: str) -> None:
    """Each element within a few roundings of the sum of its terms' absolute values.

    Transforms mix all of a tile: of the largest such sum.
    """
    runs = [("composite", "auto", torch.float64)]
    pairs = [pair for pair in backend_algorithms() if pair[0] in QUICK and not WHY_NOT[pair[0]]]
    runs += [(*pair, getattr(torch, dtype)) for pair in pairs]
    for backend, algorithm, kind in runs:
        device = device_of(backend)
        torch.manual_seed(seed)
        tensors = case.draw(kind, device)
        wide = [t.double() for t in tensors]
        cotangent = torch.randn_like(case.run(wide, None, "torch")[0]).to(kind).double()
        truth = case.run(wide, cotangent, "torch")
        terms = case.run([t.abs() for t in wide], cotangent.abs(), "torch")
        try:
            with precision(backend, device):
                actual = case.run(tensors, cotangent, backend, algorithm)
        except PlanError:
            assert algorithm == "fft" and max(case.arguments["stride"]) > 1
            continue
        for name, value, expected, most in zip(NAMES, actual, truth, terms, strict=False):
            assert value.shape == expected.shape and value.dtype == kind
            # The subnormals of float16 end at 2**-24.
            scale = most.max() if algorithm == "fft" and most.numel() else most
            allowed = 8 * torch.finfo(kind).eps * scale + 2.0**-24 * (kind == torch.float16)
            worst = ((value.double() - expected).abs() - allowed).max()
            assert worst <= 0, f"{backend} {algorithm} {kind} {name}: {worst.item():.2e} too much"


@every_backend
@every_kind
@pytest.mark.parametrize(("batch", "channels"), [(0, (2, 3)), (2, (0, 3)), (0, (0, 3)), (2, (2, 0))])
def test_nothing_to_compute(
    batch: int, channels: tuple[int, int], dims: int, transposed: bool, backend: str, device
) -> None:
    """The bias, in the shape PyTorch gives an empty batch; zero channels it refuses."""
    case = Case(dims, transposed, batch, channels, 2, (4,) * dims, (3,) * dims, {"padding": 1})
    tensors = [t.requires_grad_() for t in case.draw(torch.float32, device)]
    input, coefficients, basis, bias = tensors
    dense = getattr(F, name_of(dims, transposed))
    output = function_of(dims, transposed)(*tensors, padding=1, backend=backend)
    expected = bias.view(-1, *(1,) * dims).expand(output.shape)
    assert torch.equal(output, expected)
    if 0 not in channels:
        theirs = dense(input, materialize_weight(coefficients, basis), bias, padding=1)
        assert output.shape == theirs.shape and torch.equal(output, theirs)
    output.sum().backward()
    for tensor in (input, coefficients, basis):
        assert tensor.grad is not None and tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()
    assert bias.grad is not None and (bias.grad == batch * prod(output.shape[2:])).all()


LARGE = {
    "1025 taps": Case(1, False, 1, (2, 3), 4, (300,), (1025,), {"padding": 512}),
    "1025 taps, transposed": Case(1, True, 1, (2, 3), 4, (300,), (1025,), {"padding": 512}),
    "1025 taps, strided, dilated": Case(
        1, False, 1, (2, 2), 3, (1100,), (1025,), {"padding": 1024, "stride": 2, "dilation": 2}
    ),
    "9x9x9": Case(3, False, 1, (2, 3), 4, (5, 6, 7), (9, 9, 9), {"padding": 4}),
    "9x9x9, transposed": Case(3, True, 1, (2, 3), 4, (3, 3, 2), (9, 9, 9), {"padding": 3}),
    "9x9x9, one output": Case(3, False, 1, (2, 3), 4, (9, 9, 9), (9, 9, 9), {}),
    "9x9x9, strided, dilated": Case(
        3, False, 1, (1, 2), 3, (7, 8, 9), (9, 9, 9), {"padding": 8, "stride": (2, 1, 3), "dilation": 2}
    ),
    "7x7x7, channels last": Case(
        3, False, 1, (16, 16), 4, (4, 5, 6), (7, 7, 7), {"padding": 3}, "channels_last"
    ),
    "7x5x3, depthwise": Case(
        3, False, 2, (6, 6), 4, (5, 6, 7), (7, 5, 3), {"padding": (3, 2, 1), "groups": 6}
    ),
    "5x5x5, depthwise, channels last": Case(
        3, False, 1, (16, 32), 3, (4, 5, 6), (5, 5, 5), {"padding": 2, "groups": 16}, "channels_last"
    ),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize(("backend", "algorithm"), [p for p in backend_algorithms() if p[0] in QUICK])
def test_large_kernels(name: str, backend: str, algorithm: str, device, poisoned) -> None:
    for dtype in (torch.float16, torch.float32) if backend == "cpu" else (torch.float16,):
        compare(LARGE[name], backend, dtype, device, algorithm)


@every_backend
def test_channels_last_3d_out_of_channels_last_3d(backend: str, device) -> None:
    input, *rest = Case(3, False, 2, (3, 4), 2, (3, 4, 2), (2, 2, 2), {}).draw(torch.float32, device)
    input = input.contiguous(memory_format=torch.channels_last_3d)
    output = functional.basis_conv3d(input, *rest, backend=backend)
    assert output.is_contiguous(memory_format=torch.channels_last_3d)


def _far_apart(tensor: Tensor, axis: int) -> Tensor:
    """The same numbers, those along `axis` more than 2**31 elements apart in all; few pages in use."""
    strides = list(tensor.stride())
    strides[axis] = 2**31 // (tensor.shape[axis] - 1) + 16
    last = sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
    assert last > 2**31
    far = torch.empty(last + 1, dtype=tensor.dtype).as_strided(tensor.shape, strides)
    return far.copy_(tensor)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's memory is mapped when it is used")
@pytest.mark.parametrize("axis", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("backend", FUSED)
def test_addresses_beyond_32_bits(backend: str, axis: int, device) -> None:
    """Strided inputs and cotangents that span 4 GiB, in all four operators."""
    case = Case(3, False, 3, (2, 2), 2, (3, 3, 3), (1, 2, 2), {"stride": (1, 1, 2)})
    geometry = Geometry.conv(case.size, case.kernel, (1, 1, 1), (0, 0, 0), (1, 1, 1), 1)
    input, coefficients, basis, _ = case.draw(torch.float16, device)
    grad = torch.randn(3, 2, *geometry.output_size).half()
    tensors = {0: (input, coefficients, basis), 1: (grad, coefficients, basis)}
    if backend != "triton":
        tensors |= {2: (grad, input, basis), 3: (grad, input, coefficients)}
    for slot, operands in tensors.items():
        arguments = (slot, geometry, backend, "basis", None)
        near = ops.form(*arguments, *operands)
        far = [_far_apart(t, axis) if t.dim() == 5 else t for t in operands]
        assert torch.equal(ops.form(*arguments, *far), near)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 40 * GIB,
    reason="needs a GPU with 40 GB",
)
@pytest.mark.parametrize("backend", ON_GPU)
def test_tensors_beyond_32_bits(backend: str) -> None:
    """3.2e9 elements in, as many out; their end, where it alone has a cotangent, is that of a slice."""
    length, end = 2**26, 4096
    conv = HyperConv1d(16, 16, 9, padding=4, device="cuda", dtype=torch.float16, backend=backend)
    names, parameters = zip(*conv.named_parameters(), strict=True)
    input = torch.randn(3, 16, length, device="cuda", dtype=torch.float16).requires_grad_()
    output = conv(input)
    assert output.numel() > 2**31
    tail = input.detach()[2:, :, -end:].clone().requires_grad_()
    expected = conv(tail)
    half = slice(end // 2, None)
    torch.testing.assert_close(output[2:, :, -end // 2 :], expected[:, :, half])
    cotangent = torch.zeros_like(output)
    cotangent[2:, :, -end // 2 :] = expected.detach()[:, :, half]
    short = torch.zeros_like(expected)
    short[:, :, half] = expected.detach()[:, :, half]
    del output
    far = torch.autograd.grad(conv(input), (input, *parameters), cotangent)
    near = torch.autograd.grad(expected, (tail, *parameters), short)
    torch.testing.assert_close(far[0][2:, :, -end:], near[0])
    for name, a, b in zip(names, far[1:], near[1:], strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm(), name


def small_layer(dims: int, transposed: bool, kernel_size: int = 5, **options: Any) -> HyperConvNd:
    options = {"dtype": torch.float64, "activation": "tanh", **options}
    return layer_class(dims, transposed)(2, 3, kernel_size, **options)


@every_kind
def test_state_dict_keys(dims: int, transposed: bool) -> None:
    """Documented, and the same for every class: a release must not change them."""
    layers = [f"hypernet.layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
    norm, mixing = ([f"{name}.weight", f"{name}.bias"] for name in ("weight_norm", "mixing"))
    for options, keys in (
        ({}, ["coefficients", "bias", *layers, *mixing]),
        ({"bias": False}, ["coefficients", *layers, *mixing]),
        ({"weight_norm": "batch"}, ["coefficients", "bias", *layers, *norm, *mixing]),
        ({"parametrization": "published"}, ["coefficients", "bias", *layers]),
    ):
        state = small_layer(dims, transposed, **options).state_dict()
        assert sorted(state) == sorted(keys)
        rank = 5 if dims < 3 or "parametrization" in options else 9  # of 5 or 25 taps, or of 125
        assert state["coefficients"].shape == ((2, 3, rank) if transposed else (3, 2, rank))
        assert state["hypernet.layers.0.weight"].shape == (16, dims)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("backend", ["reference", "composite", *QUICK])
def test_output_size(backend: str, dims: int, device) -> None:
    """As nn.ConvTransposeNd: every size a stride reaches, with or without batch and channels."""
    dtype = torch.float32 if backend in FUSED else torch.float64
    arguments = {"stride": 3, "padding": 1, "dilation": 2, "output_padding": 2}
    factory = {"device": device, "dtype": dtype}
    conv = layer_class(dims, True)(4, 2, 3, **arguments, **factory, backend=backend)
    theirs = getattr(nn, f"ConvTranspose{dims}d")(4, 2, 3, **arguments, **factory)
    theirs.load_state_dict({"weight": conv.weight.detach(), "bias": conv.bias.detach()})
    input = torch.randn(2, 4, *(3,) * dims, **factory)
    with precision(backend, device):
        for size in (None, *([n] * dims for n in (9, 10, 11)), (2, 2, *(10,) * dims)):
            torch.testing.assert_close(conv(input, size), theirs(input, size))
        unbatched = conv(input[0], output_size=(10,) * dims)
    torch.testing.assert_close(unbatched, theirs(input[0], [10] * dims))
    for wrong in ([8] * dims, [12] * dims, [10] * (dims + 1)):
        with pytest.raises(ValueError, match=r"output.size"):
            theirs(input, wrong)
        low, high = [9] * dims, [11] * dims
        with pytest.raises(ValueError) as caught:
            conv(input, wrong)
        assert str(caught.value) == (
            f"output_size: expected {dims} sizes from {low} to {high} for input {list(input.shape)}, "
            f"got {wrong}; choose within them"
        )


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_output_padding(dims: int) -> None:
    """Below the stride or the dilation, as PyTorch wants it."""
    input = torch.randn(1, 2, *(3,) * dims, dtype=torch.float64)
    for stride, dilation in ((2, 1), (1, 3)):
        most = max(stride, dilation) - 1
        arguments = {"stride": stride, "dilation": dilation}
        conv = small_layer(dims, True, 3, output_padding=most, **arguments)
        dense = getattr(F, f"conv_transpose{dims}d")
        expected = dense(input, conv.weight, conv.bias, output_padding=most, **arguments)
        torch.testing.assert_close(conv(input), expected)
        conv = small_layer(dims, True, 3, output_padding=most + 1, **arguments)
        with pytest.raises(RuntimeError, match="output padding must be smaller"):
            dense(input, conv.weight, conv.bias, output_padding=most + 1, **arguments)
        with pytest.raises(ValueError, match=r"^output_padding: expected less than the stride .*; use"):
            conv(input)
    with pytest.raises(ValueError, match=r"^output_padding: expected an integer or"):
        small_layer(dims, True, output_padding=-1)
    with pytest.raises(ValueError, match=r"^padding: expected an output of at least one position"):
        small_layer(dims, True, 3, padding=4)(input)
    with pytest.raises(ValueError, match=r"^padding: expected integers for a transposed"):
        small_layer(dims, True, padding="same")


@every_backend
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_is_the_adjoint(dims: int, backend: str, device) -> None:
    """<conv(x), y> = <x, conv_transpose(y)> for one A and one phi."""
    arguments = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}
    case = Case(dims, False, 1, (4, 6), 3, (5, 4, 4)[:dims], (3, 2, 2)[:dims], arguments)
    x, coefficients, basis, _ = case.draw(dtypes_of(backend, device)[0], device)
    kernel = (coefficients, basis)
    with precision(backend, device):
        there = function_of(dims, False)(x, *kernel, **arguments, backend=backend)
        y = torch.randn_like(there)
        least = function_of(dims, True)(y, *kernel, **arguments, backend="reference").shape[2:]
        extra = tuple(n - m for n, m in zip(x.shape[2:], least, strict=True))
        arguments["output_padding"] = extra
        back = function_of(dims, True)(y, *kernel, **arguments, backend=backend)
    torch.testing.assert_close(
        (there * y).double().sum(), (x * back).double().sum(), rtol=1e-4, atol=1e-3
    )


OPERANDS = ("input", "coefficients", "basis", "bias")
SPACES = {
    False: ("stride", "padding", "dilation", "groups"),
    True: ("stride", "padding", "output_padding", "groups", "dilation"),
}


@every_kind
def test_signatures_and_docstrings(dims: int, transposed: bool) -> None:
    name = name_of(dims, transposed)
    basis_conv, hyper_conv = (getattr(functional, f"{kind}_{name}") for kind in ("basis", "hyper"))
    spaces, choice = SPACES[transposed], ("backend", "algorithm")
    assert tuple(inspect.signature(basis_conv).parameters) == (*OPERANDS, *spaces, *choice)
    mlp, constants = ("weights", "biases", "kernel_size", "bias"), ("weight_gain", "linear_output")
    assert tuple(inspect.signature(hyper_conv).parameters) == (
        *("input", "coefficients", *mlp, *spaces),
        *("activation", *constants, "coordinates", *choice),
    )
    for function in (basis_conv, hyper_conv):
        for parameter in inspect.signature(function).parameters.values():
            keyword = parameter.name in (*choice, "activation", *constants, "coordinates")
            assert parameter.kind is (
                parameter.KEYWORD_ONLY if keyword else parameter.POSITIONAL_OR_KEYWORD
            )
    axes = ", ".join(AXES[dims])
    primed = ", ".join(f"{axis}'" for axis in AXES[dims])
    kernel = ", ".join(f"k{axis.lower()}" for axis in AXES[dims])
    channels = "[C_in, C_out/groups, R]" if transposed else "[C_out, C_in/groups, R]"
    assert basis_conv.__doc__ is not None and hyper_conv.__doc__ is not None
    for shape in (f"[B, C_in, {axes}]", f"[B, C_out, {primed}]", f"[R, {kernel}]", channels):
        assert f"`{shape}`" in basis_conv.__doc__
    assert f"({kernel})" in hyper_conv.__doc__ and f"`basis_{name}`" in hyper_conv.__doc__
    assert basis_conv.__name__ == f"basis_{name}" and hyper_conv.__name__ == f"hyper_{name}"


@pytest.mark.parametrize("backend", ["reference", "composite"])
def test_true_convolution(backend: str) -> None:
    """The documented one-liner, beside the definition y[p] = sum_q W[q] x[p - q]."""
    case = Case(2, False, 1, (2, 3), 2, (4, 5), (2, 3), {})
    x, coefficients, phi, _ = case.draw(torch.float64, torch.device("cpu"))
    actual = functional.basis_conv2d(x, coefficients, phi.flip(1, 2), backend=backend)
    weight = materialize_weight(coefficients, phi)
    torch.testing.assert_close(actual, F.conv2d(x, weight.flip(2, 3)))
    expected = torch.zeros_like(actual)
    for row in range(actual.shape[2]):
        for column in range(actual.shape[3]):
            for i in range(2):
                for j in range(3):
                    pixel = x[0, :, row + 1 - i, column + 2 - j]
                    expected[0, :, row, column] += weight[:, :, i, j] @ pixel
    torch.testing.assert_close(actual, expected)


def test_repr() -> None:
    assert HyperConvTranspose2d(2, 3, 3).extra_repr() == "2, 3, kernel_size=(3, 3)"
    conv = HyperConvTranspose2d(2, 3, 3, stride=2, output_padding=(1, 0), bias=False)
    text = "2, 3, kernel_size=(3, 3), stride=(2, 2), output_padding=(1, 0), bias=False"
    assert conv.extra_repr() == text
    wide = HyperConv2d(2, 3, 3).with_kernel_size(5, dilation=(1, 2))
    text = "2, 3, kernel_size=(5, 5), dilation=(1, 2), tap_spacing=(1.0, 2.0)"
    assert wide.extra_repr() == text


@every_kind
def test_compile_is_one_graph(dims: int, transposed: bool) -> None:
    torch._dynamo.reset()
    conv = layer_class(dims, transposed)(2, 4, 3, 2, 1, backend="composite")
    input = torch.randn(1, 2, *(5,) * dims, requires_grad=True)
    leaves = [input, *conv.parameters()]
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    for function in (compiled, conv):
        output = function(input)
        results = [output, *torch.autograd.grad(output.square().sum(), leaves)]
        if function is compiled:
            first = results
    for a, b in zip(first, results, strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_opcheck_of_the_transposed_operator(dims: int) -> None:
    """`basis_conv_bwd_input` with a bias, which only a transposed convolution gives it."""
    geometry = Geometry.conv_transpose(
        (3, 4, 2)[:dims], (2, 3, 2)[:dims], (2,) * dims, (1,) * dims, (1,) * dims, (1,) * dims, 2
    )
    shapes = ((2, 4, *geometry.output_size), (4, 3, 2), (2, *geometry.kernel_size), (6,))
    operands = [torch.randn(shape, requires_grad=True) for shape in shapes]
    sizes = (geometry.input_size, geometry.output_size, geometry.kernel_size)
    steps = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    operator = torch.ops.hyperconv_ext.basis_conv_bwd_input.default
    torch.library.opcheck(operator, (*operands, *sizes, *steps, "composite", "auto"))


@pytest.mark.parametrize(
    "case",
    [
        Case(2, True, 1, (1, 2), 2, (2, 2), (2, 3), {"stride": (2, 1), "padding": (0, 1)}),
        Case(2, True, 1, (2, 2), 1, (1, 2), (2, 1), {"stride": 2, "groups": 2, "output_padding": 1}),
        Case(3, False, 1, (1, 2), 2, (1, 3, 2), (2, 2, 2), {"padding": (1, 0, 1), "stride": (2, 1, 2)}),
        Case(3, False, 1, (2, 2), 1, (1, 2, 2), (1, 2, 3), {"padding": "same", "groups": 2}),
    ],
    ids=str,
)
def test_gradcheck(case: Case, device) -> None:
    """Reverse and forward mode, and second derivatives in one direction, in float64."""
    tensors = [t.requires_grad_() for t in case.draw(torch.float64, device)]

    def run(*operands: Tensor) -> Tensor:
        convolve = function_of(case.dims, case.transposed)
        return convolve(*operands, **case.arguments, backend="composite")

    assert torch.autograd.gradcheck(run, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, tensors, check_fwd_over_rev=True, fast_mode=True)
