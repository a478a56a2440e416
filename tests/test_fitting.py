"""Fits of the hyper-network to given kernels, against the singular value decomposition."""

from __future__ import annotations

import copy
import io
import sys
import time
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

import hyperconv_ext
from hyperconv_ext import BasisTable, HyperConv1d, HyperConv2d
from hyperconv_ext.fitting import Kernels

from .test_modules import Fourier, Siren


def smooth(conv: Any, sigma: float = 1.5) -> Any:
    """`conv` with kernels of noise, blurred along each axis."""
    generator = torch.Generator().manual_seed(0)
    size = conv.weight.shape[2:]
    noise = torch.randn(*conv.weight.shape[:2], *(k + 16 for k in size), generator=generator)
    blur = torch.exp(-torch.arange(-8, 9).square() / (2 * sigma**2))
    kernels = noise.flatten(0, 1).unsqueeze(1)
    convolve = getattr(F, f"conv{len(size)}d")
    for axis in range(len(size)):
        kernels = convolve(kernels, blur.view([-1 if a == axis else 1 for a in range(-2, len(size))]))
    with torch.no_grad():
        conv.weight.copy_(kernels.view(conv.weight.shape))
        conv.weight.mul_(0.1 / conv.weight.square().mean().sqrt())
    return conv


def error_of(layer: Any, conv: Any) -> float:
    return ((layer.weight - conv.weight).norm() / conv.weight.norm()).item()


def best_error(conv: Any, rank: int) -> float:
    rows = conv.weight.detach().double().flatten(2).flatten(0, 1)
    values = torch.linalg.svdvals(rows)
    return (values[rank:].norm() / values.norm()).item()


@pytest.mark.parametrize("hidden", [(16, 16), (64, 64)])
@pytest.mark.parametrize("features", [4, 8, 16])
def test_near_the_best_there_is(features: int, hidden: tuple[int, ...]) -> None:
    """The published way of fitting, projection with Adam, leaves 1.12 times the best error here."""
    conv = smooth(nn.Conv2d(16, 16, 7))
    torch.manual_seed(0)
    layer = HyperConv2d.from_conv(conv, rank=features + 1, hidden_features=hidden)
    result = layer.fit_result
    assert layer.hypernet.num_features == features and result.rank == features + 1
    assert result.best_error == pytest.approx(best_error(conv, features + 1), rel=1e-5)
    assert result.error == pytest.approx(error_of(layer, conv), rel=1e-4)
    assert result.best_error < result.error < 1.05 * result.best_error
    functions = layer.basis().flatten(1)
    torch.testing.assert_close(functions @ functions.T, torch.eye(features + 1), atol=1e-4, rtol=0)


@pytest.mark.alone
def test_seconds() -> None:
    conv, threads = smooth(nn.Conv2d(16, 16, 7)), torch.get_num_threads()
    HyperConv2d.from_conv(conv)  # what is loaded or looked up at the first call
    for features in (4, 8, 16):
        begin = time.process_time()  # a fit is one thread's work
        HyperConv2d.from_conv(conv, num_features=features, hidden_features=(64, 64))
        assert time.process_time() - begin < 2
        assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Conv1d", {"kernel_size": 15, "groups": 2}),
        ("Conv3d", {"kernel_size": 5}),
        ("Conv2d", {"kernel_size": (3, 7), "stride": 2}),
        ("ConvTranspose2d", {"kernel_size": 5, "groups": 4}),
        ("ConvTranspose3d", {"kernel_size": (3, 4, 5)}),
    ],
)
def test_other_kernels(name: str, arguments: dict[str, Any]) -> None:
    conv = smooth(getattr(nn, name)(8, 8, **arguments))
    torch.manual_seed(0)
    layer = getattr(hyperconv_ext, f"Hyper{name}").from_conv(conv, rank=6)
    assert layer.weight.shape == conv.weight.shape
    assert layer.fit_result.error < 1.15 * best_error(conv, 6)


@pytest.mark.parametrize(
    "options",
    [
        {"parametrization": "published"},
        {"weight_bias": False},
        {"weight_norm": "batch"},
        {"weight_norm": "batch", "weight_bias": False},
        {"weight_norm": "batch", "parametrization": "published"},
        {"weight_norm": "batch", "weight_bias": False, "parametrization": "published"},
        {"coordinates": "centered", "activation": "gelu"},
    ],
)
def test_every_form_of_the_layer(options: dict[str, Any]) -> None:
    conv = smooth(nn.Conv2d(8, 8, 7)).eval()
    torch.manual_seed(0)
    layer = HyperConv2d.from_conv(conv, rank=9, **options)
    assert layer.rank == layer.fit_result.rank == 9 and not layer.training
    assert layer.fit_result.error == pytest.approx(error_of(layer, conv), rel=1e-3)
    assert layer.fit_result.error < 1.2 * best_error(conv, 9)
    if layer.weight_norm is not None:
        _, variance = layer.weight_norm.statistics(layer.coefficients, layer._basis("reference"))
        assert variance.median() > 100 * layer.weight_norm.eps  # or the norm would normalise nothing


@pytest.mark.parametrize("features", [8, 12])
@pytest.mark.parametrize("options", [{}, {"weight_norm": "batch"}, {"parametrization": "published"}])
def test_as_many_functions_as_taps_hold_noise(features: int, options: dict[str, Any]) -> None:
    conv = nn.Conv2d(8, 8, 3)
    torch.manual_seed(0)
    layer = HyperConv2d.from_conv(conv, num_features=features, **options)
    assert layer.fit_result.best_error == 0 and layer.fit_result.error < 1e-5
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(layer(x), conv(x), atol=1e-4, rtol=1e-4)


def test_a_fit_trains() -> None:
    """From a fit on, gradient descent by all parameters goes downhill to other kernels."""
    conv = smooth(nn.Conv2d(8, 8, 7))
    torch.manual_seed(0)
    layer = HyperConv2d.from_conv(conv, rank=9)
    target = smooth(nn.Conv2d(8, 8, 7), sigma=2.0).weight.detach()
    losses = []
    for _ in range(20):
        losses.append((layer.weight - target).square().sum())
        gradients = torch.autograd.grad(losses[-1], list(layer.parameters()), materialize_grads=True)
        with torch.no_grad():
            for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
                parameter.sub_(gradient, alpha=0.05)
    assert all(after < before for before, after in pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("dtype", "floor"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_low_precision(dtype: torch.dtype, floor: float) -> None:
    conv = smooth(nn.Conv2d(8, 8, 7)).to(dtype)
    torch.manual_seed(0)
    layer = HyperConv2d.from_conv(conv, rank=9)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    best = best_error(conv, 9)
    assert layer.fit_result.error < (1.05 * best) + floor
    error = (layer.weight.double() - conv.weight.double()).norm() / conv.weight.double().norm()
    assert layer.fit_result.error == pytest.approx(error.item(), rel=1e-3, abs=floor / 10)


@pytest.mark.parametrize("options", [{}, {"parametrization": "published"}, {"weight_norm": "batch"}])
def test_zero_kernels(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(4, 4, 5)
    nn.init.zeros_(conv.weight)
    for hypernet in (None, BasisTable((5, 5))):
        layer = HyperConv2d.from_conv(conv, hypernet=hypernet, **options)
        assert layer.fit_result[:2] == (0, 0) and not layer.weight.any()


def test_no_channels_and_one_tap() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        conv = nn.Conv2d(0, 4, 3)
    assert HyperConv2d.from_conv(conv).fit_result.error == 0
    conv = nn.Conv2d(4, 4, 1)
    for options in ({"rank": 2}, {"weight_bias": False, "num_features": 1}):
        layer = HyperConv2d.from_conv(conv, **options)
        assert layer.fit_result.error < 1e-6
        torch.testing.assert_close(layer.weight.detach().clone(), conv.weight.detach())
    with pytest.raises(ValueError, match="weight_norm: 'batch' normalises over the taps"):
        HyperConv2d.from_conv(conv, weight_norm="batch")


def test_not_finite() -> None:
    conv = nn.Conv2d(4, 4, 3)
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="conv: expected a weight of finite numbers to fit to"):
        HyperConv2d.from_conv(conv)


def test_without_numbers() -> None:
    with pytest.raises(
        ValueError, match="conv: expected a weight to fit to, got one without numbers on m"
    ):
        HyperConv2d.from_conv(nn.Conv2d(4, 4, 3, device="meta"))


def test_where_and_how_it_is_called_does_not_matter() -> None:
    conv = smooth(nn.Conv2d(4, 8, 5))
    torch.manual_seed(0)
    expected = HyperConv2d.from_conv(conv, rank=4)
    for context in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        torch.manual_seed(0)
        with context:
            layer = HyperConv2d.from_conv(conv, rank=4)
        assert layer.fit_result.error == pytest.approx(expected.fit_result.error, rel=1e-3)
        layer(torch.randn(1, 4, 8, 8)).sum().backward()
        assert all(p.grad is not None for p in layer.parameters())
    frozen = smooth(nn.Conv2d(4, 8, 5)).requires_grad_(False)
    torch.manual_seed(0)
    layer = HyperConv2d.from_conv(frozen, rank=4)
    assert layer.fit_result.error == pytest.approx(expected.fit_result.error, rel=1e-3)
    assert not any(p.requires_grad for p in layer.parameters())
    with torch.device("meta"):
        assert HyperConv2d.from_conv(conv, rank=4).fit_result.error < 1


def test_a_hypernet_of_the_callers() -> None:
    """It is fitted from where it is; without parameters, or frozen, only A is."""
    conv = smooth(nn.Conv2d(8, 8, 7))
    torch.manual_seed(0)
    siren = Siren()
    before = copy.deepcopy(siren.state_dict())
    layer = HyperConv2d.from_conv(conv, hypernet=siren)
    assert layer.hypernet is siren
    assert all(not torch.equal(p, before[name]) for name, p in siren.named_parameters())
    moved = layer.fit_result.error
    siren.load_state_dict(before)
    siren.requires_grad_(False)
    frozen = HyperConv2d.from_conv(conv, hypernet=siren)
    assert all(torch.equal(p, before[name]) for name, p in siren.named_parameters())
    assert moved < 0.9 * frozen.fit_result.error < 0.9
    assert HyperConv2d.from_conv(conv, hypernet=Fourier(4)).fit_result.error < 1


class Strided(nn.Module):
    """Parameters and gradients whose rows do not follow each other in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 2).T)
        self.second = nn.Parameter(torch.randn(4, 8).T)

    def forward(self, coordinates: Tensor) -> Tensor:
        return F.linear((coordinates @ self.first).sin(), self.second.T)


def test_strides_of_parameters() -> None:
    conv = smooth(nn.Conv2d(8, 8, 7))
    start = HyperConv2d.from_conv(conv, hypernet=Strided().requires_grad_(False)).fit_result.error
    torch.manual_seed(0)
    assert HyperConv2d.from_conv(conv, hypernet=Strided()).fit_result.error < 0.99 * start


@pytest.mark.parametrize("constant", [False, True])
def test_gradient_of_what_is_left(constant: bool) -> None:
    kernels = Kernels(torch.randn(3, 4, 3, 5))
    features = torch.randn(15, 4, dtype=torch.float64)
    _, gradient = kernels.remainder(features, constant)
    step = 1e-5
    for index in ((0, 0), (7, 2), (14, 3)):
        moved = [features.clone(), features.clone()]
        moved[0][index] += step
        moved[1][index] -= step
        high, low = (kernels.remainder(one, constant)[0] for one in moved)
        assert (high - low) / (2 * step) == pytest.approx(gradient[index].item(), rel=1e-5, abs=1e-9)


def test_many_kernels_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Conv2d(8, 8, 5)
    whole = Kernels(conv.weight)
    monkeypatch.setattr("hyperconv_ext.fitting._CHUNK", 25 * 10)
    parts = Kernels(conv.weight)
    torch.testing.assert_close(parts.root @ parts.root.T, whole.root @ whole.root.T)
    assert parts.best_error(5) == pytest.approx(best_error(conv, 5), rel=1e-5)
    assert parts.error(0 * conv.weight) == pytest.approx(1) and parts.error(conv.weight) == 0


# max_error


@pytest.mark.parametrize("options", [{}, {"weight_bias": False}])
@pytest.mark.parametrize("limit", [0.5, 0.3, 0.01])
def test_the_smallest_rank(limit: float, options: dict[str, Any]) -> None:
    conv = smooth(nn.Conv2d(8, 8, 5))
    torch.manual_seed(0)
    layer = HyperConv2d.from_conv(conv, max_error=limit, **options)
    assert layer.fit_result.error <= limit
    possible = next(r for r in range(26) if best_error(conv, r) <= limit)
    assert possible <= layer.rank <= possible + 1


def test_no_rank_is_enough() -> None:
    conv = nn.Conv2d(8, 8, 5)
    with pytest.raises(
        ValueError, match=r"max_error: .*, got 1e-12; the least that it came to is .* at r"
    ):
        HyperConv2d.from_conv(conv, max_error=1e-12)
    with pytest.raises(
        ValueError, match=r"max_error: .*, got 0.1; .* at rank 5, where the best kernels"
    ):
        HyperConv2d.from_conv(conv, max_error=0.1, hypernet=BasisTable((5, 5)))
    assert HyperConv2d.from_conv(conv, max_error=0.1, hypernet=BasisTable((5, 5), 24)).rank == 25


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_error": 0.1, "rank": 3}, TypeError, "max_error: expected to decide .* beside rank=3"),
        ({"max_error": 0.1, "num_features": 3}, TypeError, "max_error: .* beside num_features=3"),
        ({"max_error": 0.1, "init": "match"}, TypeError, "max_error: .* init='fit', got init='match'"),
        ({"max_error": 0.0}, ValueError, "max_error: expected a positive number, got 0.0"),
        ({"max_error": "low"}, TypeError, "max_error: expected a positive number, got 'low'"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HyperConv2d.from_conv(nn.Conv2d(4, 4, 3), **options)


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Conv2d(4, 4, 3)
    HyperConv2d.from_conv(conv, rank=3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("tqdm.auto.tqdm", partial(tqdm, mininterval=0))  # shows each step, however quick
    HyperConv2d.from_conv(conv, rank=3, progress=True)
    shown = capsys.readouterr().err
    assert "fit:" in shown and "error 0." in shown
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"progress: expected tqdm .* pip install tqdm"):
        HyperConv2d.from_conv(conv, rank=3, progress=True)


def test_the_result_stays_with_the_layer() -> None:
    layer = HyperConv2d.from_conv(nn.Conv2d(4, 4, 3), rank=3)
    assert HyperConv2d(4, 4, 3).fit_result is None
    assert HyperConv2d.from_conv(nn.Conv2d(4, 4, 3), rank=3, init="match").fit_result is None
    assert copy.deepcopy(layer).fit_result == layer.fit_result
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).fit_result == layer.fit_result
    assert not any("fit" in name for name in layer.state_dict())
    layer.reset_parameters()
    assert layer.fit_result is None


# BasisTable


@pytest.mark.parametrize("rank", [3, 8, 25])
def test_a_table_holds_the_best_kernels(rank: int) -> None:
    conv = nn.Conv2d(8, 8, 5)
    layer = HyperConv2d.from_conv(conv, hypernet=BasisTable((5, 5), rank), weight_bias=False)
    rows = conv.weight.detach().double().flatten(2).flatten(0, 1)
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    torch.testing.assert_close(
        layer.weight.double().flatten(2).flatten(0, 1), best, atol=1e-6, rtol=1e-5
    )
    assert layer.fit_result.error == pytest.approx(layer.fit_result.best_error, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"weight_norm": "batch"}, {"parametrization": "published"}, {"weight_bias": False}]
)
@pytest.mark.parametrize("features", [25, 24, 30])
def test_a_full_table_holds_a_convolution(features: int, options: dict[str, Any]) -> None:
    if options == {"weight_bias": False} and features == 24:
        features = 26
    conv = nn.Conv2d(4, 6, 5, padding=2, groups=2)
    layer = HyperConv2d.from_conv(conv, hypernet=BasisTable((5, 5), features), **options)
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(layer(x), conv(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.to_conv().weight, conv.weight, atol=1e-6, rtol=1e-5)


def test_few_kernels() -> None:
    """Fewer kernels than functions: the others are still functions to train."""
    conv = nn.Conv2d(1, 2, 5)
    layer = HyperConv2d.from_conv(conv, hypernet=BasisTable((5, 5), 6))
    assert layer.fit_result.error < 1e-6
    functions = layer.basis().flatten(1)
    torch.testing.assert_close(functions @ functions.T, torch.eye(7), atol=1e-5, rtol=0)


def test_a_table_as_a_module(tmp_path) -> None:
    torch.manual_seed(0)
    table = BasisTable((3, 5), 6, dtype=torch.bfloat16)
    assert repr(table) == "BasisTable((3, 5), num_features=6)"
    assert table.table.shape == (15, 6) and table.num_features == 6
    layer = HyperConv2d(4, 6, (3, 5), hypernet=table, dtype=torch.bfloat16)
    assert layer.rank == 7 and layer.num_features == 6
    functions = layer.basis().flatten(1).float()
    torch.testing.assert_close(functions @ functions.T, torch.eye(7), atol=0.05, rtol=0)
    layer = layer.float()
    x = torch.randn(2, 4, 8, 8)
    layer(x).square().sum().backward()
    assert layer.hypernet.table.grad.abs().sum() > 0
    other = HyperConv2d(4, 6, (3, 5), hypernet=BasisTable((3, 5), 6))
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), layer(x))
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))
    before = layer.hypernet.table.detach().clone()
    layer.reset_parameters()  # one that was given stays
    assert torch.equal(before, layer.hypernet.table)
    table = BasisTable((3, 5), 6, device="meta")
    assert table.table.is_meta and table(torch.empty(15, 2)).is_meta


def test_a_table_compiles() -> None:
    layer = HyperConv2d(4, 6, 3, hypernet=BasisTable((3, 3), 4))
    x = torch.randn(2, 4, 8, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("features", [1, 8, 9, 20])
def test_a_drawn_table_is_orthogonal(features: int) -> None:
    table = BasisTable((3, 3), features).table
    gram = table.T @ table if features <= 9 else table @ table.T
    torch.testing.assert_close(gram, max(9, features) * torch.eye(len(gram)), atol=1e-4, rtol=0)


def test_a_table_is_of_one_size() -> None:
    with pytest.raises(ValueError, match=r"hypernet: expected coordinates \[9, 2\] .*, got \[25, 2\]"):
        HyperConv2d(4, 4, 5, hypernet=BasisTable((3, 3)))
    with pytest.raises(ValueError, match=r"hypernet: expected coordinates \[9, 1\] .*, got \[9, 2\]"):
        HyperConv2d(4, 4, 3, hypernet=BasisTable((9,)))
    with pytest.raises(TypeError, match="kernel_size: expected one integer per axis, got 3"):
        BasisTable(3)
    with pytest.raises(ValueError, match="num_features: expected an integer of at least 1, got 0"):
        BasisTable((3, 3), 0)


def linear(table: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(table, size=size, mode="bilinear", align_corners=True)


def test_a_table_is_stretched() -> None:
    layer = HyperConv2d(4, 4, (3, 5), hypernet=BasisTable((3, 5), 6))
    other = layer.with_kernel_size((5, 4))
    assert other.hypernet.kernel_size == (5, 4) and layer.hypernet.kernel_size == (3, 5)
    functions = layer.hypernet.table.T.reshape(1, 6, 3, 5)
    expected = linear(functions, (5, 4))[0].flatten(1).T
    torch.testing.assert_close(other.hypernet.table.detach(), expected.detach())
    assert other(torch.randn(1, 4, 8, 8)).shape == (1, 4, 4, 5)
    single = layer.with_kernel_size(1)
    torch.testing.assert_close(single.hypernet.table[0], layer.hypernet.table[7])
    wide = single.with_kernel_size(3)
    torch.testing.assert_close(wide.hypernet.table, single.hypernet.table.expand(9, 6))


def test_a_table_in_taps_ends() -> None:
    layer = HyperConv1d(4, 4, 7, hypernet=BasisTable((7,), 3), coordinates="centered")
    torch.testing.assert_close(layer.with_kernel_size(3).hypernet.table, layer.hypernet.table[2:5])
    apart = layer.with_kernel_size(4, dilation=2)
    torch.testing.assert_close(apart.hypernet.table, layer.hypernet.table[::2])
    near = apart.with_kernel_size(3, dilation=1)
    between = (apart.hypernet.table[:-1] + apart.hypernet.table[1:]) / 2
    torch.testing.assert_close(near.hypernet.table[1], between[1])
    with pytest.raises(
        ValueError, match=r"kernel_size: expected taps inside those of BasisTable\(\(7,\)\)"
    ):
        layer.with_kernel_size(9)
    with pytest.raises(ValueError, match="got 4 on axis 0, 3 taps apart"):
        layer.with_kernel_size(4, dilation=3)
