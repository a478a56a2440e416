"""How many parameters has a hyper-convolution beside a convolution, and from which kernel size on fewer?

    python examples/parameters.py        # seconds; nothing is trained

With P = C_out C_in / groups pairs of channels and K = k^D taps, nn.ConvNd has P K weights. HyperConvNd
has P (N + 1) coefficients, and the M parameters of its hyper-network D -> 16 -> 16 -> N; both have C_out
biases. So it has fewer where K > N + 1 + M / P. The counts of this formula are compared with those of
the modules; where they differ the script stops. OUT/counts.csv has all of them, OUT/summary.md the
crossover.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

import hyperconv_ext
from digits import count_parameters
from experiments import HYPER, ORDINARY, PALETTE, RESULTS, STYLE, save_figure, table, write_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMMAND = "python examples/parameters.py"
HIDDEN = (16, 16)  # the layers' default
CHANNELS = (1, 4, 16, 64, 256)
FEATURES = (2, 4, 8, 16)
KERNELS = {1: (1, 3, 5, 7, 11, 15, 31, 127, 1025), 2: (1, 3, 5, 7, 11, 15, 31), 3: (1, 3, 5, 7, 11)}
DRAWN = (4, 16, 64, 256)
USUAL = 4  # features, where one number is shown


@dataclass(frozen=True)
class Size:
    """Of a layer with as many input as output channels."""

    dims: int
    kernel_size: int
    channels: int
    depthwise: bool
    features: int

    @property
    def groups(self) -> int:
        """Of the channels."""
        return self.channels if self.depthwise else 1

    @property
    def pairs(self) -> int:
        """P, of an output and an input channel that meet."""
        return self.channels * self.channels // self.groups


def ordinary_count(size: Size) -> int:
    """By the formula, with biases."""
    return size.pairs * size.kernel_size**size.dims + size.channels


def network_count(size: Size) -> int:
    """M, of the hyper-network."""
    widths = (size.dims, *HIDDEN, size.features)
    return sum((inputs + 1) * outputs for inputs, outputs in itertools.pairwise(widths))


def hyper_count(size: Size) -> int:
    """By the formula, with biases."""
    return size.pairs * (size.features + 1) + network_count(size) + size.channels


def measured(size: Size) -> tuple[int, int]:
    """(Of nn.ConvNd, of HyperConvNd): the numbers in the parameters of the modules."""
    arguments: Any = (size.channels, size.channels, size.kernel_size)
    options: Any = {"groups": size.groups, "device": "meta"}
    ordinary = getattr(nn, f"Conv{size.dims}d")(*arguments, **options)
    hyper_class = getattr(hyperconv_ext, f"HyperConv{size.dims}d")
    hyper = hyper_class(*arguments, **options, num_features=size.features)
    return count_parameters([ordinary]), count_parameters([hyper])


def counts() -> list[tuple[Size, int, int]]:
    """(Size, parameters of nn.ConvNd, of HyperConvNd), measured and found to be as by the formula.

    Raises:
        RuntimeError: they are not.
    """
    rows = []
    for dims, kernels in KERNELS.items():
        for values in itertools.product(kernels, CHANNELS, (False, True), FEATURES):
            size = Size(dims, *values)
            found, expected = measured(size), (ordinary_count(size), hyper_count(size))
            if found != expected:
                raise RuntimeError(
                    f"{size}: expected {expected} parameters by the formula, got {found} in the "
                    f"modules; mend the formula"
                )
            rows.append((size, *found))
    return rows


def crossover(dims: int, channels: int, depthwise: bool, features: int) -> int:
    """The smallest kernel size at which HyperConvNd has fewer parameters than nn.ConvNd."""
    sizes = (Size(dims, k, channels, depthwise, features) for k in itertools.count(1))
    return next(size.kernel_size for size in sizes if hyper_count(size) < ordinary_count(size))


def write_counts(rows: Sequence[tuple[Size, int, int]], path: Path) -> None:
    """A line for each layer."""
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow([*(field.name for field in fields(Size)), "ordinary", "hyper"])
        lines.writerows([*asdict(size).values(), ordinary, hyper] for size, ordinary, hyper in rows)


def count_table(rows: Sequence[tuple[Size, int, int]]) -> str:
    """Two dimensions and the usual N: a row for each number of channels."""
    found = {
        (size.channels, size.kernel_size): (ordinary, hyper)
        for size, ordinary, hyper in rows
        if (size.dims, size.depthwise, size.features) == (2, False, USUAL)
    }
    lines = []
    for channels in CHANNELS:
        ordinary = [f"{found[channels, k][0]:,}" for k in KERNELS[2]]
        (hyper,) = {found[channels, k][1] for k in KERNELS[2]}  # of every size the same
        lines.append([f"{channels} → {channels}", f"{hyper:,}", *ordinary])
    return table(["channels", "HyperConv2d", *(f"nn.Conv2d, k = {k}" for k in KERNELS[2])], lines)


def crossover_table() -> str:
    """Kernel sizes from which on there are fewer parameters."""
    lines = []
    for dims in KERNELS:
        for features in FEATURES:
            cells = [str(crossover(dims, channels, False, features)) for channels in CHANNELS]
            depthwise = [str(crossover(dims, channels, True, features)) for channels in CHANNELS[1:]]
            lines.append([f"{dims}-D", str(features), *cells, *depthwise])
    header = ["", "N", *(f"{c} → {c}" for c in CHANNELS), *(f"{c} depthwise" for c in CHANNELS[1:])]
    return table(header, lines)


def draw(rows: Sequence[tuple[Size, int, int]]) -> Figure:
    """Parameters against the kernel size; the crossover against the channels."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for channels, marker in zip(DRAWN, "osD^", strict=True):
        own = [
            (size.kernel_size, ordinary, hyper)
            for size, ordinary, hyper in rows
            if (size.dims, size.channels, size.depthwise, size.features) == (2, channels, False, USUAL)
        ]
        kernels, ordinary_counts, hyper_counts = zip(*own, strict=True)
        look: Any = {"marker": marker, "markersize": 4}
        left.plot(kernels, ordinary_counts, color=ORDINARY, linestyle="--", **look)
        left.plot(kernels, hyper_counts, color=HYPER, **look)
        left.annotate(
            f"{channels} → {channels}",
            (kernels[-1], hyper_counts[-1]),
            xytext=(-2, 4),
            textcoords="offset points",
            ha="right",
            fontsize=7,
        )
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xticks(KERNELS[2], [str(k) for k in KERNELS[2]])
    left.minorticks_off()
    left.set_xlabel("kernel size k [taps], two dimensions")
    left.set_ylabel("parameters")
    left.set_title(f"parameters, N = {USUAL}")
    left.legend(
        handles=[
            Line2D([], [], color=ORDINARY, linestyle="--", label="nn.Conv2d"),
            Line2D([], [], color=HYPER, label="HyperConv2d"),
        ],
        loc="upper left",
    )
    channels_axis = [2**power for power in range(10)]
    for dims, colour, marker in zip(KERNELS, PALETTE[2:], "osD", strict=False):
        for depthwise, line in ((False, "-"), (True, ":")):
            sizes = [crossover(dims, channels, depthwise, USUAL) for channels in channels_axis]
            label = f"{dims}-D" + (", depthwise" if depthwise else "")
            style: Any = {"color": colour, "marker": marker, "markersize": 4, "linestyle": line}
            right.plot(channels_axis, sizes, label=label, **style)
    right.set_xscale("log", base=2)
    right.set_yscale("log", base=2)
    right.set_xticks(channels_axis, [str(channels) for channels in channels_axis])
    right.set_yticks([2**power for power in range(1, 10)], [str(2**power) for power in range(1, 10)])
    right.set_xlabel("input and output channels")
    right.set_ylabel("kernel size [taps]")
    right.set_title(f"from here on HyperConvNd has fewer, N = {USUAL}")
    right.legend(fontsize=7)
    return figure


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Count parameters of HyperConvNd beside nn.ConvNd.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    out = RESULTS / "parameters"
    parser.add_argument("--out", type=Path, default=out, help="folder of the counts and of the report")
    return parser


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Count, write the report and return its files."""
    import matplotlib

    args = build_parser().parse_args(argv)
    rows = counts()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "counts.csv"
    write_counts(rows, path)
    with matplotlib.rc_context(STYLE):
        files = save_figure(draw(rows), args.out, "parameters")
    text = (
        f"# Parameters against kernel size and channels\n\nCounts of {len(rows)} layers, the same in "
        f"the modules as by the formula. In two dimensions, with N = {USUAL} and biases:\n\n"
        f"{count_table(rows)}\n\nThe smallest kernel size at which the hyper-convolution has fewer "
        f"parameters:\n\n{crossover_table()}\n\n"
        f"![Parameters against the kernel size, those of HyperConv2d level; the kernel size from which "
        f"on it has fewer.](parameters.png)"
    )
    files = [write_summary(args.out, text, COMMAND), path, *files]
    print(*files, sep="\n")
    return files


if __name__ == "__main__":
    main()
