"""The report of `mnist_noise.py`: where noise halves the accuracy, as a table and as curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import (
    HYPER,
    ORDINARY,
    PALETTE,
    STYLE,
    mean_and_deviation,
    plot_band,
    save_figure,
    table,
    write_summary,
)

COMMAND = "python examples/mnist_noise.py --mnist DIR"
OPTIONS = ("epochs", "train", "test", "noisy", "batch_size", "rate")  # of SETTINGS, those of the command
HALF = 0.5
AXES = {
    "salt-and-pepper": "share of pixels replaced by salt or pepper",
    "gaussian": "standard deviation of Gaussian noise",
}


class Look(NamedTuple):
    """How a network is called and drawn."""

    label: str
    color: str
    line: str


LOOKS: Mapping[str, Look] = {
    "conv": Look("nn.Conv2d", ORDINARY, "-"),
    "hyper": Look("HyperConv2d, weight norm", HYPER, "-"),
    "hyper-no-norm": Look("HyperConv2d, no weight norm", HYPER, "--"),
    "hyper-default": Look("HyperConv2d, defaults, no bias", HYPER, ":"),
    "conv-no-bias": Look("nn.Conv2d, no bias", ORDINARY, "--"),
    "conv-norm": Look("nn.Conv2d, weight norm", ORDINARY, ":"),
    "smooth-0.5": Look("nn.Conv2d, smoothed by 0.5 taps", PALETTE[2], "-"),
    "smooth-1": Look("nn.Conv2d, smoothed by 1 tap", PALETTE[2], "--"),
}
CONTRASTS = (
    ("all of it, as published", "hyper", "conv"),
    ("the hyper-convolution, as published", "hyper-no-norm", "conv-no-bias"),
    ("the hyper-convolution, by default", "hyper-default", "conv-no-bias"),
    ("the hyper-convolution, both with the weight norm", "hyper", "conv-norm"),
    ("the weight norm, of hyper-convolutions", "hyper", "hyper-no-norm"),
    ("the weight norm, of ordinary ones", "conv-norm", "conv-no-bias"),
    ("the bias", "conv", "conv-no-bias"),
    ("smoothing, a little", "smooth-0.5", "conv"),
    ("smoothing, much", "smooth-1", "conv"),
)
# Of one seed each, at github.com/mkarmann/hyper-conv: clean accuracy, and where noise has halved it.
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "conv": {"clean": 0.991, "salt-and-pepper": 0.302, "gaussian": 0.480},
    "hyper": {"clean": 0.984, "salt-and-pepper": 0.426, "gaussian": 0.679},
}
SETTINGS = (*OPTIONS, "decay", "data", "device", "backend")

Stored = tuple[Mapping[str, Any], Mapping[str, Any]]
Curves = dict[
    str, dict[int, dict[str, Any]]
]  # by network and seed: clean accuracy, a curve for each noise


def crossing(levels: Sequence[float], accuracies: Sequence[float], share: float = HALF) -> float | None:
    """The level at which the accuracy first falls to `share`, on straight lines between the levels.

    None if it never does; the first level if it is never above.
    """
    if accuracies[0] <= share:
        return levels[0]
    for index in range(1, len(levels)):
        high, low = accuracies[index - 1 : index + 1]
        if low <= share:
            part = (high - share) / (high - low)
            return levels[index - 1] + part * (levels[index] - levels[index - 1])
    return None


def collect(runs: Iterable[Stored]) -> dict[tuple[Any, ...], Curves]:
    """The curves by network, of runs with the same settings together."""
    groups: dict[tuple[Any, ...], Curves] = {}
    for trial, result in runs:
        curves = groups.setdefault(tuple(trial[name] for name in SETTINGS), {})
        for network, measured in result["curves"].items():
            curves.setdefault(network, {})[trial["seed"]] = measured
    return groups


def crossings(
    measured: Mapping[int, Mapping[str, Any]], noise: str, levels: Sequence[float]
) -> dict[int, float]:
    """By seed; a network that noise never brings down to a half counts with the last level."""
    found = {seed: crossing(levels, curves[noise]) for seed, curves in measured.items()}
    return {seed: levels[-1] if level is None else level for seed, level in found.items()}


def results_table(curves: Curves, levels: Sequence[float]) -> str:
    """A row a network: clean accuracy, where each noise leaves half of them right, what is published."""
    rows = []
    for network, look in LOOKS.items():
        if network not in curves:
            continue
        measured = curves[network]
        published = PUBLISHED.get(network, {})
        row = [
            look.label,
            str(len(measured)),
            mean_and_deviation([one["clean"] for one in measured.values()], 3),
        ]
        row += [
            mean_and_deviation(list(crossings(measured, noise, levels).values()), 3) for noise in AXES
        ]
        rows.append(
            [*row, *(f"{published[name]:.3f}" if published else "" for name in ("clean", *AXES))]
        )
    header = ["convolution of the blocks", "seeds", "clean", "salt-and-pepper", "Gaussian"]
    return table([*header, *(f"published: {name}" for name in header[2:])], rows)


def contrasts_table(curves: Curves, levels: Sequence[float]) -> str:
    """How much more noise one network bears than another, of those seeds that both have."""
    rows = []
    for what, network, other in CONTRASTS:
        row = [what, LOOKS[network].label, LOOKS[other].label]
        for noise in AXES:
            more, less = (crossings(curves.get(name, {}), noise, levels) for name in (network, other))
            paired = [more[seed] - less[seed] for seed in more if seed in less]
            row.append(mean_and_deviation(paired, 3) if paired else "no run")
        rows.append(row)
    return table(["what differs", "network", "less that of", "salt-and-pepper", "Gaussian"], rows)


def draw(curves: Curves, levels: Sequence[float], quick: bool) -> Figure:
    """A panel a noise: the mean accuracy of the seeds, and a band from the worst to the best of them."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(AXES), sharey=True)
    for panel, (noise, axis) in zip(panels, AXES.items(), strict=True):
        for network, look in LOOKS.items():
            if network not in curves:
                continue
            seeds = [[100 * value for value in one[noise]] for one in curves[network].values()]
            plot_band(panel, levels, seeds, color=look.color, linestyle=look.line, label=look.label)
            if network in PUBLISHED:
                mark: Any = {"marker": "o", "markerfacecolor": "white", "linestyle": "none"}
                mark |= {"color": look.color, "label": f"{look.label}: published"}
                panel.plot([PUBLISHED[network][noise]], [100 * HALF], zorder=3, **mark)
        panel.axhline(100 * HALF, color="black", linewidth=0.8, linestyle=":")
        panel.set_xlabel(axis)
        panel.set_xlim(0, 1)
        panel.set_ylim(0, 100)
    panels[0].set_ylabel("accuracy [%]")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    if quick:
        figure.suptitle("quick look, not a result")
    return figure


def flags(settings: Mapping[str, Any]) -> str:
    """The options that repeat a run with these settings."""
    return " ".join(f"--{name.replace('_', '-')} {settings[name]:g}" for name in OPTIONS)


def write_report(
    runs: Sequence[Stored], levels: Sequence[float], folder: Path, quick: bool
) -> list[Path]:
    """`summary.md` and the figures, PNG and SVG, in `folder`."""
    sections = ["# MNIST and noise"]
    if quick:
        sections.append("**Quick look: too few images and seeds to conclude anything from.**")
    files: list[Path] = []
    for number, (settings, curves) in enumerate(collect(runs).items(), 1):
        name = "noise" if number == 1 else f"noise-{number}"
        with matplotlib.rc_context(STYLE):
            files += save_figure(draw(curves, levels, quick), folder, name)
        told = dict(zip(SETTINGS, settings, strict=True))
        sections += [
            f"With `{flags(told)}`, by Adam, whose rate falls to 0 on a straight line, with weight "
            f"decay {told['decay']:g}; device {told['device']}, backend {told['backend']}. Clean: "
            f"accuracy on {told['test']:,} held-out images. Salt-and-pepper, Gaussian: the share of "
            f"pixels, and the deviation, at which {HALF:.0%} of the first {told['noisy']:,} of these "
            f"are right. Mean ± standard deviation over seeds; the published are of one seed.",
            results_table(curves, levels),
            "How much more noise that is, between networks of the same seed:",
            contrasts_table(curves, levels),
            f"![accuracy against noise]({name}.png)",
        ]
    return [write_summary(folder, "\n\n".join(sections), COMMAND), *files]
