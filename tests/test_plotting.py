"""Pictures of layers show the numbers of the layers, and refuse what has none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import nn

import hyperconv_ext
from hyperconv_ext import (
    HyperConv1d,
    HyperConv2d,
    HyperConv3d,
    LazyHyperConv1d,
    LazyHyperConv2d,
    plot_basis,
    plot_kernels,
)

NAMES = [f"{kind}{dims}d" for kind in ("Conv", "ConvTranspose") for dims in (1, 2, 3)]
KERNELS = {1: (7,), 2: (5, 3), 3: (2, 4, 3)}


@pytest.fixture(autouse=True)
def no_window() -> Iterator[None]:
    """Figures are drawn in memory and freed."""
    before = matplotlib.get_backend()
    matplotlib.use("agg")
    yield
    pyplot.close("all")
    matplotlib.use(before)


def panels(figure: Any) -> list[Any]:
    """The axes of the kernels, without that of the scale."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def shown(axes: Any) -> np.ndarray:
    """The numbers of a panel, on the taps of the kernel."""
    if axes.images:
        return np.ma.filled(axes.images[0].get_array(), np.nan)
    return axes.lines[-1].get_ydata()


def slices(kernel: np.ndarray) -> np.ndarray:
    """What a panel should hold: slices beside each other, between them a column of NaN."""
    if kernel.ndim < 3:
        return kernel
    gap = np.full((kernel.shape[1], 1), np.nan)
    parts = [part for index in range(len(kernel)) for part in (gap, kernel[index])]
    return np.concatenate(parts[1:], axis=1)


@pytest.mark.parametrize("hyper", [True, False], ids=["hyper", "ordinary"])
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_is_shown_in_its_place(name: str, hyper: bool) -> None:
    layer = getattr(hyperconv_ext if hyper else nn, ("Hyper" if hyper else "") + name)(
        4, 6, KERNELS[int(name[-2])], groups=2
    )
    figure = plot_kernels(layer)
    figure.canvas.draw()
    weight = layer.weight.detach().numpy()
    axes = panels(figure)
    assert len(axes) == weight.shape[0] * weight.shape[1]
    for index, panel in enumerate(axes):
        kernel = weight[divmod(index, weight.shape[1])]
        np.testing.assert_array_equal(shown(panel), slices(kernel))
    first, second = ("in", "out") if "Transpose" in name else ("out", "in")
    assert [panel.get_ylabel() for panel in axes[:: weight.shape[1]]] == [
        f"{first} {row}" for row in range(weight.shape[0])
    ]
    assert [panel.get_title() for panel in axes[: weight.shape[1]]] == [
        f"{second} {column} of group" for column in range(weight.shape[1])
    ]
    sides = "x".join(map(str, layer.kernel_size))
    shape = f"{weight.shape[0]}x{weight.shape[1]}"
    assert figure.get_suptitle() == f"{type(layer).__name__}, {shape} kernels of {sides}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parametrization", ["orthonormal", "published"])
def test_every_function_is_shown(name: str, parametrization: str) -> None:
    kernel = KERNELS[int(name[-2])]
    options: dict[str, Any] = {"parametrization": parametrization, "num_features": 9}
    layer = getattr(hyperconv_ext, f"Hyper{name}")(2, 3, kernel, **options)
    figure = plot_basis(layer)
    basis = layer.basis().detach().numpy()
    for panel, function in zip(panels(figure), basis, strict=True):
        np.testing.assert_array_equal(shown(panel), slices(function))


def test_a_lazy_layer_has_its_functions() -> None:
    layer = LazyHyperConv2d(4, 5)
    before = [shown(panel) for panel in panels(plot_basis(layer))]
    layer(torch.randn(1, 3, 8, 8))
    np.testing.assert_array_equal(before, layer.basis().detach().numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_shown_exactly(dtype: torch.dtype) -> None:
    for layer in (HyperConv2d(2, 2, 3, dtype=dtype), nn.Conv2d(2, 2, 3, dtype=dtype)):
        expected = layer.weight.detach().double().flatten(0, 1).numpy()
        actual = [shown(panel) for panel in panels(plot_kernels(layer))]
        np.testing.assert_array_equal(actual, expected)
    layer = HyperConv1d(2, 2, 5, dtype=dtype)
    expected = layer.basis().detach().double().numpy()
    np.testing.assert_array_equal([shown(p) for p in panels(plot_basis(layer))], expected)


def test_the_first_channels_of_many() -> None:
    layer = HyperConv2d(16, 3, 5)
    figure = plot_kernels(layer, max_channels=4)
    expected = layer.weight.detach()[:, :4].flatten(0, 1).numpy()
    np.testing.assert_array_equal([shown(panel) for panel in panels(figure)], expected)
    assert figure.get_suptitle() == "HyperConv2d, 3x16 kernels of 5x5, the first 3x4"


def test_the_scale_is_that_of_all_kernels_or_as_asked() -> None:
    layer = nn.Conv2d(8, 8, 3)
    with torch.no_grad():
        layer.weight[7, 7, 1, 1] = -3.0
    for limit, expected in ((None, 3.0), (0.25, 0.25)):
        figure = plot_kernels(layer, max_channels=2, limit=limit)
        assert {panel.images[0].get_clim() for panel in panels(figure)} == {(-expected, expected)}
    curve = panels(plot_kernels(nn.Conv1d(1, 1, 3), limit=2.0))[0]
    assert curve.get_ylim() == pytest.approx((-2.1, 2.1))


def test_kernels_of_zeros() -> None:
    for layer in (nn.Conv1d(1, 1, 3), nn.Conv2d(1, 1, 3)):
        nn.init.zeros_(layer.weight)
        plot_kernels(layer).canvas.draw()


def test_two_layers_on_one_figure() -> None:
    figure = Figure(layout="constrained")
    left, right = figure.subfigures(1, 2)
    layer, twin = HyperConv2d(2, 2, 5), nn.Conv2d(2, 2, 5)
    assert plot_kernels(layer, left) is left
    assert plot_kernels(twin, right) is right
    figure.canvas.draw()
    for part, drawn in ((left, layer), (right, twin)):
        actual = [shown(panel) for panel in panels(part)]
        np.testing.assert_array_equal(actual, drawn.weight.detach().flatten(0, 1).numpy())
    assert pyplot.get_fignums() == []  # nothing that nobody would free


def test_a_figure_made_here_is_shown_and_closed_by_pyplot() -> None:
    figure = plot_basis(HyperConv3d(1, 1, 3))
    assert pyplot.get_fignums() == [figure.number]


@pytest.mark.parametrize("training", [True, False])
def test_drawing_leaves_the_layer_as_it_is(training: bool) -> None:
    layer = HyperConv2d(2, 2, 3, weight_norm="batch").train(training)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    plot_kernels(layer)
    plot_basis(layer)
    assert layer.training == training
    assert all(parameter.grad is None for parameter in layer.parameters())
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def spoilt(layer: nn.Module, value: float, part: str = "") -> nn.Module:
    with torch.no_grad():
        next(layer.get_submodule(part).parameters()).fill_(value)
    return layer


@pytest.mark.parametrize("draw", [plot_kernels, plot_basis])
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), TypeError, "layer: expected a hyper-convolution.*, got Linear; pass"),
        (lambda: torch.randn(2, 2, 3, 3), TypeError, "layer: expected a hyper-conv.*, got Tensor; pass"),
        (
            lambda: HyperConv2d(2, 2, 3, device="meta"),
            ValueError,
            "layer: expected one with numbers to draw, got HyperConv2d with parameters on the meta dev",
        ),
        (
            lambda: spoilt(HyperConv2d(2, 2, 3), float("nan"), "hypernet"),
            ValueError,
            "layer: expected finite numbers to draw, got .* of .* that are infinite or NaN; go back",
        ),
    ],
)
def test_what_cannot_be_drawn_is_named(
    draw: Callable[..., Any], make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        draw(make())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: LazyHyperConv1d(2, 3),
            ValueError,
            "layer: expected one that has its parameters, got LazyHyperConv1d, which is lazy",
        ),
        (
            lambda: nn.LazyConv2d(2, 3),
            ValueError,
            "got LazyConv2d, which is lazy and was not called yet",
        ),
        (
            lambda: nn.Conv2d(2, 2, 3, device="meta"),
            ValueError,
            "got Conv2d with parameters on the meta",
        ),
        (lambda: HyperConv2d(0, 2, 3), ValueError, r"expected kernels to draw, got .* \[2, 0, 3, 3\]"),
        (lambda: nn.Conv2d(1, 1, 3, dtype=torch.complex64), TypeError, "layer: .*, got torch.complex64"),
        (
            lambda: spoilt(nn.Conv2d(1, 2, 3), float("inf")),
            ValueError,
            "layer: expected finite numbers to draw, got 18 of 18",
        ),
    ],
)
def test_kernels_that_cannot_be_drawn_are_named(
    make: Callable[[], nn.Module], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plot_kernels(make())


def test_basis_functions_are_those_of_hyper_convolutions() -> None:
    layer: Any = nn.Conv2d(1, 1, 3)
    with pytest.raises(
        TypeError, match="layer: expected a hyper-convolution, got Conv2d; pass one, plo"
    ):
        plot_basis(layer)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_channels": 0}, ValueError, "max_channels: expected an integer of at least 1, got 0"),
        ({"max_channels": 2.5}, TypeError, "max_channels: expected an integer of at least 1, got 2.5"),
        ({"limit": 0}, ValueError, "limit: expected a positive number, got 0"),
        ({"limit": float("nan")}, ValueError, "limit: expected a positive number, got nan"),
        ({"figure": 3}, TypeError, "figure: expected a matplotlib Figure or SubFigure, got int; pass"),
    ],
)
def test_arguments_out_of_range(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plot_kernels(nn.Conv2d(1, 1, 3), **options)


def test_a_figure_that_is_taken() -> None:
    figure: Any = Figure()
    axes = figure.subplots()
    with pytest.raises(TypeError, match="figure: expected a matplotlib Figure or SubFigure, got Axes"):
        plot_kernels(nn.Conv2d(1, 1, 3), axes)
    with pytest.raises(ValueError, match="figure: expected one without axes, got one with 1; clear"):
        plot_basis(HyperConv2d(1, 1, 3), figure)
    figure.clear()
    assert plot_basis(HyperConv2d(1, 1, 3), figure) is figure


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="not installed; pip install matplotlib"):
        plot_kernels(nn.Conv2d(1, 1, 3))
