"""The report's plots, as SVG that is the same whenever the numbers are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter
except ImportError as error:
    raise ImportError(
        f"the plots need matplotlib ({error}); python -m pip install matplotlib"
    ) from error

from .records import (
    AUTO,
    CONV,
    FOURIER,
    HYPERNET,
    PHASE_NAMES,
    PHASES,
    Cells,
    Record,
    Row,
    columns,
    compared,
    geometric_mean,
    memory_saving,
    speedup,
)
from .shapes import layer

_STYLE: Any = {
    "svg.hashsalt": "hyperconv_ext",
    "svg.fonttype": "none",
    "axes.grid": True,
    "grid.alpha": 0.3,
}
Ratio = Callable[[Cells, str, str], float | None]


def draw(name: str, records: Sequence[Record], ceilings: Mapping[str, Any], path: Path) -> None:
    """The plot `name` of `report.PLOTS` as `path`.

    All but `features` show the tier that ran first, one dtype and one number of features; `kernel` and
    `memory` only layers of two axes, whose kernel sizes compare.
    """
    tier = records[0].row.tier
    first = [record for record in records if record.row.tier == tier]
    with matplotlib.rc_context(_STYLE):
        if name == "roofline":
            figure = _roofline(first, ceilings)
        elif name == "time":
            figure = _times(first)
        elif name == "features":
            figure = _ratios(_both_features(records), speedup, "N", lambda row: row.shape.num_features)
        else:
            ratio = memory_saving if name == "memory" else speedup
            label, value = _AXES[name]
            flat = [record for record in first if name == "channels" or record.shape.dims == 2]
            figure = _ratios(flat, ratio, label, value)
        figure.savefig(path, format="svg", metadata={"Date": None})


_AXES: dict[str, tuple[str, Callable[[Row], int]]] = {
    "kernel": ("kernel size", lambda row: max(row.shape.kernel_size)),
    "memory": ("kernel size", lambda row: max(row.shape.kernel_size)),
    "channels": ("input channels", lambda row: row.shape.in_channels),
}


def _both_features(records: Sequence[Record]) -> list[Record]:
    """The records of rows that were measured with every N, so that means compare like with like."""
    kinds: dict[str, set[int]] = {}
    for record in records:
        kinds.setdefault(_apart_from_features(record), set()).add(record.shape.num_features)
    most = max(map(len, kinds.values()))
    return [record for record in records if len(kinds[_apart_from_features(record)]) == most]


def _apart_from_features(record: Record) -> str:
    return record.row.name.replace(f"-n{record.shape.num_features}-", "-")


def _ratios(records: Sequence[Record], ratio: Ratio, label: str, value: Callable[[Row], int]) -> Figure:
    """One panel a phase: each row a dot, the geometric mean of a competitor's rows a line."""
    figure, panels = _panels("nn.Conv / competitor")
    rows = compared(records)
    names = [name for baseline in (True, False) for name in columns(records, baseline) if name != CONV]
    ticks = sorted({value(row) for row in rows})
    for axes, phase in zip(panels, PHASES, strict=True):
        for index, name in enumerate(names):
            points: dict[int, list[float]] = {}
            for row, cells in rows.items():
                if row.phase == phase and (measured := ratio(cells, name, CONV)):
                    points.setdefault(value(row), []).append(measured)
            _line(axes, points, name, f"C{index}")
        axes.axhline(1, color="black", linewidth=1)
        axes.set_xlabel(label)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}x"))
        axes.minorticks_off()
    return _with_legend(figure)


def _panels(label: str) -> tuple[Figure, Sequence[Axes]]:
    """One panel a phase, both axes logarithmic."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = figure.subplots(1, len(PHASES), sharey=True)
    for axes, phase in zip(panels, PHASES, strict=True):
        axes.set(title=PHASE_NAMES[phase], xscale="log", yscale="log")
    panels[0].set_ylabel(label)
    return figure, panels


# Colour and line of what the figure of times is about; other columns are thin and dashed.
_LINES: dict[str, dict[str, Any]] = {
    CONV: {"color": "black", "linewidth": 2.5, "linestyle": "-", "label": "nn.Conv"},
    FOURIER: {"color": "C7", "linestyle": "-", "label": "FFT convolution, dense weight"},
    AUTO: {"color": "C3", "linewidth": 2.5, "linestyle": "-", "label": "HyperConv, auto"},
}
_OTHER_COLORS = ("C0", "C2", "C4", "C5")


def _times(records: Sequence[Record]) -> Figure:
    """Of the layer of two axes with most kernel sizes, of several the middle one: a line each."""
    rows = {row: cells for row, cells in compared(records).items() if row.shape.dims == 2}
    kernels: dict[str, set[int]] = {}
    for row in rows:
        kernels.setdefault(layer(row.shape), set()).add(max(row.shape.kernel_size))
    most = max(map(len, kernels.values()), default=0)
    names = [name for name, sizes in kernels.items() if len(sizes) == most]
    figure, panels = _panels("ms")
    if not names:
        return figure
    shown = names[len(names) // 2]
    baselines = [name for name in columns(records, baseline=True) if not name.startswith(HYPERNET)]
    drawn = (*baselines, *columns(records, baseline=False))
    others = dict(
        zip((name for name in drawn if name not in _LINES), cycle(_OTHER_COLORS), strict=False)
    )
    for axes, phase in zip(panels, PHASES, strict=True):
        for name in drawn:
            points = {
                max(row.shape.kernel_size): 1e3 * cells[name].seconds  # type: ignore[operator]
                for row, cells in rows.items()
                if row.phase == phase and layer(row.shape) == shown and name in cells
                if cells[name].seconds
            }
            if len(points) < 2 < most:  # no line
                continue
            style: Any = {"color": others.get(name), "linewidth": 1, "linestyle": "--", "label": name}
            ordered = sorted(points.items())
            axes.plot(
                *zip(*ordered, strict=True) if ordered else ([], []),
                marker="o",
                **style | _LINES.get(name, {}),
            )
        ticks = sorted(kernels[shown])
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set(xlabel="kernel size", title=f"{shown}, {PHASE_NAMES[phase]}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.minorticks_off()
    return _with_legend(figure)


def _with_legend(figure: Figure) -> Figure:
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    return figure


def _line(axes: Axes, points: Mapping[int, Sequence[float]], name: str, color: str) -> None:
    for x, values in points.items():
        axes.plot([x] * len(values), values, ".", color=color, alpha=0.4)
    means = {x: geometric_mean(values) for x, values in sorted(points.items())}
    axes.plot(list(means), list(means.values()), "-o", color=color, label=name)


def _roofline(records: Sequence[Record], ceilings: Mapping[str, Any]) -> Figure:
    """Every row's effective TFLOP/s; above the matrix rate lies what executes fewer operations."""
    figure, panels = _panels("effective TFLOP/s")
    rows = compared(records)
    peak = ceilings["flops_per_second"][records[0].dtype] / 1e12
    bandwidth = ceilings["bytes_per_second"] / 1e12
    names = (*columns(records, baseline=True), *columns(records, baseline=False))
    for axes, phase in zip(panels, PHASES, strict=True):
        intensities = [peak / bandwidth]
        for name in names:
            measured = [
                (record.intensity, rate)
                for row, cells in rows.items()
                if row.phase == phase
                and (record := cells.get(name))
                and (rate := record.tflops(record.direct_flops))
            ]
            intensities += [intensity for intensity, _ in measured]
            axes.plot(*zip(*measured, strict=True) if measured else ([], []), ".", label=name)
        ends = sorted({min(intensities) / 2, peak / bandwidth, max(intensities) * 2})
        axes.plot(ends, [min(peak, bandwidth * x) for x in ends], "k-", linewidth=1)
        axes.set_xlabel("FLOP / byte")
    return _with_legend(figure)
