"""Sizes as they come (from NumPy, for outputs of one position) and dtypes that are not computed in."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hyperconv_ext
from hyperconv_ext import CoordinateMLP, HyperConv2d, HyperConvTranspose2d, functional

from .conftest import FUSED, precision_of_the_framework

# (kernel_size, stride, padding, dilation) of transposed convolutions; of some the least output is empty.
GEOMETRIES = [
    (2, 2, 1, 1),
    (3, 2, 2, 1),
    (1, 3, 1, 1),
    (2, 3, 2, 2),
    (3, 1, 1, 1),
    (2, 4, 3, 1),
    (3, 2, 0, 1),
]
i64, i32 = np.int64, np.int32


def _sizes(size: int, dims: int, input: Tensor) -> list[tuple[int, ...]]:
    """S', and S' after the channels and the batch."""
    spatial = (size,) * dims
    return [spatial, (*input.shape[:-dims], *spatial)]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_output_size_as_in_conv_transpose(geometry: tuple[int, ...], dims: int) -> None:
    """The same sizes are taken, and refused by their name; the result is F.conv_transposeNd's."""
    kernel_size, stride, padding, dilation = geometry
    arguments = {"stride": stride, "padding": padding, "dilation": dilation}
    dense = getattr(nn, f"ConvTranspose{dims}d")(2, 2, kernel_size, **arguments)
    kind = getattr(hyperconv_ext, f"HyperConvTranspose{dims}d")
    layers = [kind(2, 2, kernel_size, **arguments, backend=name) for name in ("reference", "composite")]
    for count, size, batched in itertools.product((1, 2), range(-1, 9), (True, False)):
        input = torch.randn(2, 2, *(count,) * dims) if batched else torch.randn(2, *(count,) * dims)
        for output_size in _sizes(size, dims, input):
            try:
                shape = dense(input, output_size=output_size).shape
                shape = None if 0 in shape else shape  # PyTorch refuses or gives nothing, by the engine
            except (ValueError, RuntimeError):
                shape = None
            for layer in layers:
                if shape is None:
                    with pytest.raises(ValueError, match=r"^output_size: expected .*; choose"):
                        layer(input, output_size=output_size)
                    continue
                dense.weight.data.copy_(layer.weight)
                dense.bias.data.copy_(layer.bias)
                expected = dense(input, output_size=output_size)
                torch.testing.assert_close(layer(input, output_size=output_size), expected)


@pytest.mark.parametrize("backend", ["auto", "reference", "composite", *FUSED])
def test_an_output_that_only_its_size_leaves(backend: str, device) -> None:
    layer = HyperConvTranspose2d(1, 1, 2, 2, 1, backend=backend, device=device)
    input = torch.randn(1, 1, 1, 1, device=device, requires_grad=True)
    with precision_of_the_framework(device):
        output = layer(input, output_size=(1, 1))
        output.backward()
    assert output.shape == (1, 1, 1, 1)
    weight = layer.weight.detach()
    torch.testing.assert_close(output.flatten(), (input * weight[0, 0, 1, 1] + layer.bias).flatten())
    torch.testing.assert_close(input.grad.flatten(), weight[0, 0, 1, 1].flatten())
    with pytest.raises(ValueError, match=r"^padding: expected an output of at least one position"):
        layer(input)


@pytest.mark.parametrize(
    ("output_size", "error", "got"),
    [
        (5, TypeError, "5"),
        ((5.0, 9), TypeError, r"\(5.0, 9\)"),
        ((True, 9), TypeError, r"\(True, 9\)"),
        ("99", TypeError, "'99'"),
        ((9,), ValueError, r"\[9\]"),
        ((1, 4, 4, 9, 9), ValueError, r"\[1, 4, 4, 9, 9\]"),
        ((8, 9), ValueError, r"\[8, 9\]"),
        ((10, 9), ValueError, r"\[10, 9\]"),
    ],
)
def test_output_sizes_that_are_none(output_size: Any, error: type[Exception], got: str) -> None:
    layer = HyperConvTranspose2d(4, 4, 3)
    with pytest.raises(error, match=rf"^output_size: expected 2 sizes from \[9, 9\] .*got {got}; "):
        layer(torch.randn(1, 4, 7, 7), output_size=output_size)


INPUT, A, PHI = torch.randn(1, 4, 7, 7), torch.randn(6, 2, 5), torch.randn(5, 3, 3)
TRANSPOSED = torch.randn(4, 3, 5)
WEIGHTS, BIASES = [torch.randn(8, 2), torch.randn(5, 8)], [torch.randn(8), torch.randn(5)]


def _layer(number: Callable[[int], Any]) -> Tensor:
    torch.manual_seed(0)
    layer = HyperConv2d(
        *(number(4), number(6), (number(3), number(5)), number(2), number(1), number(2), number(2)),
        hidden_features=(number(8),),
        num_features=number(3),
    )
    assert all(
        type(v) is int for v in (*layer.kernel_size, *layer.stride, layer.groups, layer.in_channels)
    )
    assert layer.hypernet.widths == (2, 8, 3)
    return layer(INPUT)


def _transposed_layer(number: Callable[[int], Any]) -> Tensor:
    torch.manual_seed(0)
    layer = HyperConvTranspose2d(
        *(number(4), number(6), number(3), number(2), number(1), number(1), number(2)),
        dilation=number(2),
    )
    return layer(INPUT) + layer(INPUT, output_size=[number(16), number(16)])


def _scaled(number: Callable[[int], Any]) -> Tensor:
    torch.manual_seed(0)
    return HyperConv2d(4, 6, 3).with_kernel_size(number(5), number(2), number(1))(INPUT)


USES: dict[str, Callable[[Callable[[int], Any]], Tensor]] = {
    "layer": _layer,
    "transposed layer": _transposed_layer,
    "with_kernel_size": _scaled,
    "basis_conv2d": lambda n: functional.basis_conv2d(INPUT, A, PHI, None, n(2), n(1), n(1), n(2)),
    "basis_conv_transpose2d": lambda n: functional.basis_conv_transpose2d(
        INPUT, TRANSPOSED, PHI, None, n(2), n(1), n(1), n(2), n(1)
    ),
    "hyper_conv2d": lambda n: functional.hyper_conv2d(
        INPUT, A, WEIGHTS, BIASES, n(3), None, n(2), n(1), n(1), n(2)
    ),
    "hyper_conv_transpose2d": lambda n: functional.hyper_conv_transpose2d(
        INPUT, TRANSPOSED, WEIGHTS, BIASES, n(3), None, n(2), n(1), n(1), n(2), n(1)
    ),
}


@pytest.mark.parametrize("number", [i64, i32, np.uint8, torch.tensor], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("use", USES)
def test_integers_of_other_kinds(use: str, number: Callable[[int], Any]) -> None:
    assert torch.equal(USES[use](number), USES[use](int))


def test_collections_of_integers_of_other_kinds() -> None:
    torch.manual_seed(0)
    expected = HyperConv2d(4, 6, (3, 5), (1, 2))(INPUT)
    for make in (np.array, torch.tensor, lambda v: [i32(x) for x in v], torch.Size, iter):
        torch.manual_seed(0)
        assert torch.equal(HyperConv2d(4, 6, make([3, 5]), make([1, 2]))(INPUT), expected)


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), torch.tensor(True), 2.0, np.float32(2), "2", None]
)
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("kernel_size", lambda v: HyperConv2d(4, 4, v)),
        ("stride", lambda v: HyperConv2d(4, 4, 3, v)),
        ("dilation", lambda v: HyperConv2d(4, 4, 3, dilation=(v, 1))),
        ("output_padding", lambda v: HyperConvTranspose2d(4, 4, 3, output_padding=v)),
        ("groups", lambda v: HyperConv2d(4, 4, 3, groups=v)),
        ("in_channels", lambda v: HyperConv2d(v, 4, 3)),
        ("num_features", lambda v: CoordinateMLP(2, num_features=v)),
        ("hidden_features", lambda v: HyperConv2d(4, 4, 3, hidden_features=(v,))),
        ("stride", lambda v: functional.basis_conv2d(INPUT, A, PHI, None, v, groups=2)),
        ("groups", lambda v: functional.basis_conv2d(INPUT, A, PHI, groups=v)),
        ("kernel_size", lambda v: functional.hyper_conv2d(INPUT, A, WEIGHTS, BIASES, v, groups=2)),
    ],
)
def test_what_is_no_integer(name: str, make: Callable[[Any], object], value: object) -> None:
    error = ValueError if name == "groups" else TypeError
    with pytest.raises(error, match=rf"^{name}: expected .*integer.*; pass "):
        make(value)


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn, "float32"]
)
@pytest.mark.parametrize(
    "kind", [HyperConv2d, HyperConvTranspose2d, lambda *_, **o: CoordinateMLP(2, **o)]
)
def test_a_dtype_is_refused_at_construction(kind, dtype: Any) -> None:
    with pytest.raises(TypeError, match=rf"^dtype: expected float32, float64.*got {dtype}; pass one of"):
        kind(4, 4, 3, dtype=dtype)


def _quantised(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8)


def _nested(tensor: Tensor) -> Tensor:
    return torch.nested.nested_tensor([tensor[0], tensor[0]])


UNUSABLE = {
    "complex": (lambda t: t.to(torch.complex64), "float32, .*got torch.complex64; convert"),
    "integer": (Tensor.long, "float32, .*got torch.int64; convert"),
    "bool": (Tensor.bool, "float32, .*got torch.bool; convert"),
    "quantised": (_quantised, "float32, .*got torch.quint8; convert"),
    "sparse": (
        Tensor.to_sparse,
        "a dense tensor, got layout torch.sparse_coo; convert it with .to_dense",
    ),
    "mkldnn": (Tensor.to_mkldnn, "a dense tensor, got layout torch._mkldnn; convert"),
    "nested": (_nested, "a dense tensor, got a nested one; convert it with .to_padded_tensor"),
    "list": (Tensor.tolist, "a torch.Tensor, got list; convert"),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference", "composite", *FUSED])
@pytest.mark.parametrize("name", UNUSABLE)
@pytest.mark.filterwarnings("ignore")
def test_an_input_that_is_not_computed_with(name: str, backend: str, autocast: bool) -> None:
    convert, message = UNUSABLE[name]
    input = convert(INPUT)
    layers = [
        HyperConv2d(4, 4, 3, backend=backend),
        HyperConv2d(4, 4, 3, backend=backend, weight_norm="batch"),
        HyperConv2d(4, 4, 3, padding=1, padding_mode="circular", backend=backend),
        HyperConv2d(4, 4, 3, backend=backend).to(memory_format=torch.channels_last),
        HyperConvTranspose2d(4, 4, 3, backend=backend),
        lambda x: HyperConvTranspose2d(4, 4, 3, backend=backend)(x, output_size=(9, 9)),
        lambda x: functional.basis_conv2d(x, A, PHI, groups=2, backend=backend),
    ]
    for layer in layers:
        with (
            torch.autocast("cpu", torch.bfloat16, autocast),
            pytest.raises(TypeError, match=f"^input: expected {message}"),
        ):
            layer(input)


@pytest.mark.parametrize("weight_norm", [None, "batch"])
@pytest.mark.filterwarnings("ignore:Complex modules")
def test_a_layer_converted_to_complex_numbers(weight_norm: str | None) -> None:
    layer = HyperConv2d(4, 4, 3, weight_norm=weight_norm).to(torch.complex64)
    with pytest.raises(TypeError, match=r"^(input|coefficients): expected float32.*got torch.complex64"):
        layer(INPUT.to(torch.complex64))
    with pytest.raises(TypeError, match=r"^coefficients: expected float32.*got torch.complex64"):
        _ = layer.weight
