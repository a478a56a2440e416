"""Pictures of a layer: its kernels W, and the basis functions phi that they are made of."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from .checks import check_dtype, integer, positive_number
from .hypernet.inspection import without_numbers
from .modules import HyperConvNd
from .ops.sharding import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_COLOURS = "RdBu"  # told apart by colour-blind readers; 0 is white, positive numbers are blue
_SIDE = 0.8  # inches of a kernel's longest axis
_WIDEST = 12.0  # inches of a figure
_MARGINS = (1.6, 0.9)  # inches beside and above the panels: labels, title, scale
_COLUMNS = 8  # basis functions beside each other
_FONT = 8


def plot_kernels(
    layer: nn.Module,
    figure: Figure | SubFigure | None = None,
    *,
    max_channels: int = 8,
    limit: float | None = None,
) -> Figure | SubFigure:
    """Draw the kernels of a convolution, one for each pair of channels.

    A row of panels for each index of the weight's first axis, a column for each of its second: output
    and input channels, of a transposed layer input and output channels. With groups the columns are
    channels within the row's group. A kernel of one axis is a curve, one of two axes an image, one of
    three its slices along the first, side by side. All panels have one scale, symmetric about 0.

    Args:
        layer: a hyper-convolution, whose W is computed for this, or `nn.ConvNd` or `nn.ConvTransposeNd`.
        figure: what to draw on, without axes of its own; for example, one of `figure.subfigures(1, 2)`
            to see two layers side by side. None makes a figure by `matplotlib.pyplot`, which
            `pyplot.show()` shows and `pyplot.close()` frees.
        max_channels: as many rows and columns are drawn at most, the first ones; the title says so.
        limit: the largest magnitude that the scale shows, for comparisons; None takes the largest of
            all kernels, those not drawn included.

    Returns:
        The figure; `plot_kernels(layer).savefig("kernels.png")` writes it.

    Raises:
        TypeError: `layer` is no convolution, or complex; `figure` is no figure.
        ValueError: the layer is lazy, on the meta device, without kernels or not finite; the figure has
            axes already; a number is out of range.
        ImportError: matplotlib is not installed.
    """
    channels = integer("max_channels", max_channels, 1)
    if not isinstance(layer, (HyperConvNd, _ConvNd)):
        raise TypeError(
            f"layer: expected a hyper-convolution or an nn.ConvNd, got {type(layer).__name__}; pass one "
            f"of the model's convolutions"
        )
    _check_parameters(layer)
    with torch.no_grad():
        weight = _numbers(layer.weight)
    rows, columns = (min(size, channels) for size in weight.shape[:2])
    shown = weight[:rows, :columns]
    sides = "x".join(map(str, weight.shape[2:]))
    title = f"{type(layer).__name__}, {weight.shape[0]}x{weight.shape[1]} kernels of {sides}"
    if shown.shape != weight.shape:
        title += f", the first {rows}x{columns}"
    figure, panels = _draw(figure, shown.flatten(0, 1), columns, _limit(weight, limit), "weight")
    figure.suptitle(title, fontsize=_FONT + 1)
    first, second = ("in", "out") if layer.transposed else ("out", "in")
    within = " of group" if layer.groups > 1 else ""
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        if row == 0:
            panel.set_title(f"{second} {column}{within}", fontsize=_FONT)
        if column == 0:
            panel.set_ylabel(f"{first} {row}", fontsize=_FONT)
    return figure


def plot_basis(
    layer: HyperConvNd,
    figure: Figure | SubFigure | None = None,
    *,
    limit: float | None = None,
) -> Figure | SubFigure:
    """Draw the basis functions phi of a hyper-convolution, of which all its kernels are combinations.

    Args:
        layer: one of the six layers; a lazy one has its functions before it is called.
        figure, limit: as in `plot_kernels`.

    Returns:
        The figure, with a panel for each of the R functions, all of one scale; drawn as kernels are.

    Raises:
        TypeError: `layer` is no hyper-convolution; `figure` is no figure.
        ValueError: the layer is on the meta device or its functions are not finite; the figure has axes
            already; `limit` is not above 0.
        ImportError: matplotlib is not installed.
    """
    if not isinstance(layer, HyperConvNd):
        raise TypeError(
            f"layer: expected a hyper-convolution, got {type(layer).__name__}; pass one, plot_kernels "
            f"also draws nn.ConvNd"
        )
    _check_numbers(layer)
    with torch.no_grad():
        basis = _numbers(layer.basis())
    figure, panels = _draw(figure, basis, min(len(basis), _COLUMNS), _limit(basis, limit), "value")
    sides = "x".join(map(str, layer.kernel_size))
    title = f"{type(layer).__name__}, {len(basis)} basis functions of {sides}"
    figure.suptitle(title, fontsize=_FONT + 1)
    for index, panel in enumerate(panels):
        panel.set_title(f"$\\varphi_{{{index + 1}}}$", fontsize=_FONT + 1)
    return figure


def _check_parameters(layer: nn.Module) -> None:
    if any(map(is_lazy, layer.parameters())):
        raise ValueError(
            f"layer: expected one that has its parameters, got {type(layer).__name__}, which is lazy "
            f"and was not called yet; call it, or the model, once before"
        )
    _check_numbers(layer)


def _check_numbers(layer: nn.Module) -> None:
    if any(without_numbers(p) for p in layer.parameters() if not is_lazy(p)):
        raise ValueError(
            f"layer: expected one with numbers to draw, got {type(layer).__name__} with parameters on "
            f"the meta device, or fake; to_empty() and load a state, or make it on a device"
        )


def _numbers(tensor: Tensor) -> Tensor:
    """float64 on the CPU, all of it.

    Raises:
        TypeError: complex, or of another dtype than the layers have.
        ValueError: no elements, or not finite.
    """
    check_dtype("layer", tensor.dtype)
    values = whole(tensor.detach()).to("cpu", torch.float64)
    if values.numel() == 0:
        raise ValueError(
            f"layer: expected kernels to draw, got a weight of shape {list(values.shape)}; pass a layer "
            f"with channels"
        )
    wrong = int((~values.isfinite()).sum())
    if wrong:
        raise ValueError(
            f"layer: expected finite numbers to draw, got {wrong} of {values.numel()} that are infinite "
            f"or NaN; go back to a state from before training diverged"
        )
    return values


def _limit(values: Tensor, limit: float | None) -> float:
    if limit is not None:
        return positive_number("limit", limit)
    return values.abs().max().item() or 1.0


def _draw(
    figure: Figure | SubFigure | None, kernels: Tensor, columns: int, limit: float, label: str
) -> tuple[Figure | SubFigure, list[Axes]]:
    """(The figure, a panel for each of `kernels` [P, *k]), with `columns` panels in a row."""
    rows = math.ceil(len(kernels) / columns)
    pictures = [_picture(kernel) for kernel in kernels]
    width, height = _panel_size(kernels.shape[1:], pictures[0])
    target = _canvas(figure, (width * columns, height * rows))
    panels = list(target.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for panel in panels[len(pictures) :]:
        panel.remove()
    panels = panels[: len(pictures)]
    image: Any = None
    for panel, picture in zip(panels, pictures, strict=True):
        panel.tick_params(labelsize=_FONT - 2)
        if picture.dim() == 1:
            panel.axhline(0, color="0.8", linewidth=0.8)
            panel.plot(picture.numpy(), color="C0", marker=".", markersize=4, linewidth=1)
            panel.set_ylim(-1.05 * limit, 1.05 * limit)
            continue
        panel.set_xticks([])
        panel.set_yticks([])
        scale: Any = {"cmap": _COLOURS, "vmin": -limit, "vmax": limit, "interpolation": "nearest"}
        image = panel.imshow(picture.numpy(), **scale)
        panel.spines[:].set_color("0.6")
    if image is None:
        target.supxlabel("tap", fontsize=_FONT)
        target.supylabel(label, fontsize=_FONT)
    else:
        bar = target.colorbar(image, ax=panels, fraction=0.03, aspect=30)
        bar.set_label(label, fontsize=_FONT)
        bar.ax.tick_params(labelsize=_FONT - 1)
    return target, panels


def _picture(kernel: Tensor) -> Tensor:
    """A kernel `[*k]` as a curve or an image; of three axes the slices, between them columns of NaN."""
    if kernel.dim() < 3:
        return kernel
    gap = kernel.new_full((*kernel.shape[:2], 1), math.nan)
    slices = torch.cat([kernel, gap], dim=2).transpose(0, 1).flatten(1)
    return slices[:, :-1]


def _panel_size(kernel_size: torch.Size, picture: Tensor) -> tuple[float, float]:
    """Inches."""
    if picture.dim() == 1:
        return 2 * _SIDE, _SIDE
    tap = _SIDE / max(kernel_size[-2:])
    return max(tap * picture.shape[1], 0.4 * _SIDE), max(tap * picture.shape[0], 0.4 * _SIDE)


def _canvas(figure: Any, size: tuple[float, float]) -> Figure | SubFigure:
    """`figure`, if it can be drawn on; None becomes one with room for `size` inches of panels.

    Raises:
        ImportError: there is no matplotlib.
        TypeError, ValueError: it is no figure, or not an empty one.
    """
    try:
        from matplotlib import pyplot
        from matplotlib.figure import Figure, SubFigure
    except ImportError as error:
        raise ImportError(
            "matplotlib: expected it to draw by, which is not installed; pip install matplotlib"
        ) from error
    if figure is None:
        scale = min(1.0, _WIDEST / size[0])
        sides = [scale * side + margin for side, margin in zip(size, _MARGINS, strict=True)]
        return pyplot.figure(figsize=(max(sides[0], 4.0), sides[1]), layout="constrained")
    if not isinstance(figure, (Figure, SubFigure)):
        raise TypeError(
            f"figure: expected a matplotlib Figure or SubFigure, got {type(figure).__name__}; pass one, "
            f"as of figure.subfigures(1, 2), since there is a panel for each kernel"
        )
    if figure.axes:
        raise ValueError(
            f"figure: expected one without axes, got one with {len(figure.axes)}; clear() it, or pass "
            f"a new one or a subfigure"
        )
    return figure
