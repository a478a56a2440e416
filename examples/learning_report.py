"""The report of `learning.py`: runs in, a table of goals met and missed and the figures out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from experiments import PALETTE, STYLE, save_figure, table, write_summary
from learning_trials import CURVE_POINTS, FIXED, KINDS, MOMENTUM, TASKS, TWIN, Result, Trial

TOLERANCE = 0.005  # of the goal, in accuracy
WIDE_KERNEL = 7  # from here on the layer shall be ahead in most cells
# What figures show of errors and losses: those of a run that diverges grow, the twin's fall to rounding.
SHOWN = {"mnist": (1e-3, 5.0), "regression": (1e-4, 2.0)}
COMMAND = "python examples/learning.py --mnist DIR --jobs 2"
MARKERS = "osD^v"
OPTIMIZER_NAMES = {"sgd": "SGD", "adam": "Adam"}
NORM_NAMES = {"none": "no norm", "batch": "batch norm"}
# Scores beyond which a run has trained, and those which it has failed without: accuracy of ten classes,
# error relative to that of a bank of zeros.
TRAINED = {"mnist": 0.5, "regression": 0.5}
FAILED = {"mnist": 0.2, "regression": 1.0}


class Run(NamedTuple):
    """A trial and its result."""

    trial: Trial
    result: Result


class Cell(NamedTuple):
    """What the kinds are compared at; `features` is that of the hyper-convolutions."""

    norm: str
    optimizer: str
    kernel_size: int
    features: int | None

    @property
    def title(self) -> str:
        """For people."""
        parts = [NORM_NAMES[self.norm], OPTIMIZER_NAMES[self.optimizer], f"k = {self.kernel_size}"]
        return ", ".join(parts + ([] if self.features is None else [f"N = {self.features}"]))


@dataclass(frozen=True)
class Point:
    """The runs of one kind in one cell at one learning rate, over seeds."""

    runs: tuple[Run, ...]

    @property
    def task(self) -> str:
        """Of the runs."""
        return self.runs[0].trial.task

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.runs[0].trial.rate

    @property
    def scores(self) -> list[float]:
        """One per seed; the worst there is where it is not finite."""
        worst = 0.0 if self.task == "mnist" else math.inf
        return [worst if run.result.score is None else run.result.score for run in self.runs]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return fmean(self.scores)

    @property
    def rank(self) -> tuple[float, float]:
        """The larger, the better; of equal means the lower rate."""
        return (self.mean if self.task == "mnist" else -self.mean), -self.rate

    @property
    def trains(self) -> bool:
        """Every seed learnt something, by far."""
        good = (self._beyond(score, TRAINED[self.task]) for score in self.scores)
        return all(good) and not self.diverged

    @property
    def fails(self) -> bool:
        """A seed diverged, or ended at chance or worse."""
        good = (self._beyond(score, FAILED[self.task]) for score in self.scores)
        return self.diverged or not all(good)

    @property
    def diverged(self) -> bool:
        """That of a seed did."""
        return any(run.result.diverged for run in self.runs)

    def _beyond(self, score: float, limit: float) -> bool:
        return score > limit if self.task == "mnist" else score < limit

    @property
    def text(self) -> str:
        """Mean and standard deviation."""
        if not math.isfinite(self.mean):
            return "diverged"
        if self.task == "mnist":
            return f"{100 * self.mean:.1f} ± {100 * pstdev(self.scores):.1f}"
        return f"{self.mean:.2g} ± {pstdev(self.scores):.1g}"


Points = dict[float, Point]
Grid = dict[Cell, dict[str, Points]]


def group_by_settings(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that differ in nothing but the axes of the grid are compared; tasks in their own order."""
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(getattr(run.trial, name) for name in FIXED), []).append(run)
    return sorted(groups.values(), key=lambda group: TASKS.index(group[0].trial.task))


def make_grid(runs: Sequence[Run]) -> Grid:
    """By cell, kind and rate, in the order of the grid; the twin, which has no N, is in those of all."""
    others = {run.trial.features for run in runs if run.trial.kind != TWIN} or {None}
    found: dict[Cell, dict[str, dict[float, list[Run]]]] = {}
    for run in runs:
        trial = run.trial
        for features in others if trial.kind == TWIN else {trial.features}:
            cell = Cell(trial.norm, trial.optimizer, trial.kernel_size, features)
            found.setdefault(cell, {}).setdefault(trial.kind, {}).setdefault(trial.rate, []).append(run)

    def in_order(cell: Cell) -> tuple[int, int, int, int]:
        places = list(NORM_NAMES).index(cell.norm), list(OPTIMIZER_NAMES).index(cell.optimizer)
        return *places, cell.kernel_size, cell.features or 0

    return {
        cell: {
            kind: {rate: Point(tuple(found[cell][kind][rate])) for rate in sorted(found[cell][kind])}
            for kind in KINDS
            if kind in found[cell]
        }
        for cell in sorted(found, key=in_order)
    }


def best(points: Points) -> Point:
    """That at the best rate."""
    return max(points.values(), key=lambda point: point.rank)


@dataclass(frozen=True)
class Verdict:
    """One kind against the twin in one cell; None where a run is missing that decides it.

    Args:
        at_twins, at_own: the kind at the twin's best rate and at its own.
        failing: rates at which every seed of the twin trains and one of the kind fails.
    """

    cell: Cell
    kind: str
    twin: Point
    at_twins: Point | None
    at_own: Point
    failing: tuple[float, ...]

    @property
    def level_at_twins(self) -> bool | None:
        """Is the mean accuracy at most the tolerance behind at the twin's best rate?"""
        return None if self.at_twins is None else self.at_twins.mean >= self.twin.mean - TOLERANCE

    @property
    def level_at_own(self) -> bool:
        """Is it at the kind's own best rate?"""
        return self.at_own.mean >= self.twin.mean - TOLERANCE

    @property
    def ahead(self) -> bool:
        """Is the best mean the better one?"""
        return self.at_own.rank[0] > self.twin.rank[0]


def judge(grid: Grid) -> list[Verdict]:
    """Every kind in every cell that has a twin."""
    verdicts = []
    for cell, kinds in grid.items():
        twins = kinds.get(TWIN)
        if not twins:
            continue
        twin = best(twins)
        for kind, points in kinds.items():
            if kind != TWIN:
                failing = (
                    rate
                    for rate, point in points.items()
                    if point.fails and rate in twins and twins[rate].trains
                )
                at_twins = points.get(twin.rate)
                verdicts.append(Verdict(cell, kind, twin, at_twins, best(points), tuple(failing)))
    return verdicts


def write_report(runs: Sequence[Run], folder: Path, quick: bool) -> list[Path]:
    """`summary.md` and the figures, PNG and SVG, in `folder`."""
    written = []
    sections = ["# Learning like the convolution it replaces", *([_QUICK] if quick else [])]
    names: dict[str, int] = {}
    for group in group_by_settings(runs):
        task = group[0].trial.task
        names[task] = names.get(task, 0) + 1
        name = task if names[task] == 1 else f"{task}-{names[task]}"
        grid = make_grid(group)
        sections.append(_SECTIONS[task](group, grid, name))
        with matplotlib.rc_context(STYLE):
            for what, draw in (("rates", _draw_rates), ("loss", _draw_losses)):
                figure = draw(grid, task, quick)
                written += save_figure(figure, folder, f"{name}-{what}")
    return [write_summary(folder, "\n\n".join(sections), COMMAND), *written]


_HEADER = [
    "cell",
    "layer",
    "twin's best rate",
    "twin at it",
    "layer at it",
    "layer's best rate",
    "layer at that",
]
_QUICK = "**Quick look: too few images, steps and seeds to conclude anything from.**"


def _heading(group: Sequence[Run], grid: Grid, title: str) -> str:
    trial = group[0].trial
    seeds = len({run.trial.seed for run in group})
    diverged = sum(run.result.diverged for run in group)
    hours = sum(run.result.seconds for run in group) / 3600
    points = [point for kinds in grid.values() for own in kinds.values() for point in own.values()]
    short = sum(len(point.runs) < seeds for point in points)
    lacking = f" **Not finished: {short} of {len(points)} points lack seeds.**" if short else ""
    images = f"{trial.train:,} training and {trial.test:,} held-out images, " if trial.train else ""
    return (
        f"## {title}\n\n{images}{trial.steps:,} steps of {trial.batch_size}, seeds: {seeds}, "
        f"device {trial.device}, backend {trial.backend}, hyperconv_ext {trial.version}: "
        f"{len(group):,} runs ({diverged} diverged), {hours:.1f} hours of computing. "
        f"SGD has momentum {MOMENTUM:g}.{lacking}"
    )


def _pictures(name: str) -> str:
    return f"![against learning rate]({name}-rates.png)\n\n![against steps]({name}-loss.png)"


def _mnist_section(group: Sequence[Run], grid: Grid, name: str) -> str:
    verdicts = judge(grid)
    key = (
        "Accuracy in %, mean ± standard deviation over seeds; 'fails' are the learning rates at which "
        f"every seed of the twin trains (above {TRAINED['mnist']:.0%}) and one of the layer diverges or "
        f"ends near chance (below {FAILED['mnist']:.0%})."
    )
    parts = [
        _heading(group, grid, "MNIST"),
        _goals(verdicts),
        key,
        _mnist_table(verdicts),
        _pictures(name),
    ]
    return "\n\n".join(parts)


def _met(answers: Sequence[bool | None]) -> str:
    """`met` if all are, `missed` if one is, else that runs are still missing."""
    if not answers:
        return "no runs"
    if False in answers:
        return f"missed ({answers.count(True)} of {len(answers)} cells)"
    if None in answers:
        return f"open ({answers.count(None)} of {len(answers)} cells without the run)"
    return f"met ({len(answers)} cells)"


def _goals(verdicts: Sequence[Verdict]) -> str:
    """One row per goal, one column per kind."""
    kinds = [kind for kind in KINDS if any(verdict.kind == kind for verdict in verdicts)]
    behind = f"mean accuracy ≥ the twin's less {100 * TOLERANCE:g} points"
    rows: list[tuple[str, Callable[[list[Verdict]], str]]] = [
        (
            f"at the twin's best rate, {behind}",
            lambda own: _met([verdict.level_at_twins for verdict in own]),
        ),
        (f"at its own best rate, {behind}", lambda own: _met([verdict.level_at_own for verdict in own])),
        (
            f"ahead of the twin in most cells with k ≥ {WIDE_KERNEL}",
            lambda own: _most([v.ahead for v in own if v.cell.kernel_size >= WIDE_KERNEL]),
        ),
        (
            "no rate at which the twin trains and the layer diverges",
            lambda own: _met([not verdict.failing for verdict in own]),
        ),
    ]
    return table(
        ["goal", *(KINDS[kind].label for kind in kinds)],
        [
            [goal, *(answer([v for v in verdicts if v.kind == kind]) for kind in kinds)]
            for goal, answer in rows
        ],
    )


def _most(answers: Sequence[bool]) -> str:
    if not answers:
        return "no runs"
    count = f"{sum(answers)} of {len(answers)} cells"
    return f"met ({count})" if 2 * sum(answers) > len(answers) else f"missed ({count})"


def _mnist_table(verdicts: Sequence[Verdict]) -> str:
    rows = [
        [
            verdict.cell.title,
            KINDS[verdict.kind].label,
            f"{verdict.twin.rate:g}",
            verdict.twin.text,
            "no run" if verdict.at_twins is None else _marked(verdict.at_twins, verdict.level_at_twins),
            f"{verdict.at_own.rate:g}",
            _marked(verdict.at_own, verdict.level_at_own),
            _rates(verdict.failing),
        ]
        for verdict in verdicts
    ]
    return table([*_HEADER, "fails"], rows)


def _marked(point: Point, met: bool | None) -> str:
    return f"{point.text}, {'met' if met else 'missed'}"


def _rates(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates) or "never"


def _regression_section(group: Sequence[Run], grid: Grid, name: str) -> str:
    verdicts = judge(grid)
    rows = [
        [
            verdict.cell.title,
            KINDS[verdict.kind].label,
            f"{verdict.twin.rate:g}",
            verdict.twin.text,
            "no run" if verdict.at_twins is None else verdict.at_twins.text,
            f"{verdict.at_own.rate:g}",
            verdict.at_own.text,
            f"{_bound(verdict.at_own):.2g}",
            _rates(verdict.failing),
        ]
        for verdict in verdicts
    ]
    key = (
        "A bank of random dense filters, all frequencies alike, from its answers to white noise. "
        "Squared error of the weights relative to the bank's square (1: learnt nothing), mean ± "
        "standard deviation over seeds. A hyper-convolution has rank N + 1 over the taps: 'least' is "
        "the error of the best bank of this rank (singular value decomposition), which no training can "
        "pass. 'Fails' are the learning rates at which every seed of the twin trains (error below "
        f"{TRAINED['regression']:g}) and one of the layer diverges or ends above "
        f"{FAILED['regression']:g}."
    )
    goals = table(
        ["goal", *(KINDS[kind].label for kind in KINDS if any(v.kind == kind for v in verdicts))],
        [
            [
                "no rate at which the twin trains and the layer diverges",
                *(
                    _met([not v.failing for v in verdicts if v.kind == kind])
                    for kind in KINDS
                    if any(v.kind == kind for v in verdicts)
                ),
            ]
        ],
    )
    scores = table([*_HEADER, "least", "fails"], rows)
    parts = [_heading(group, grid, "Regression"), goals, key, scores, _pictures(name)]
    return "\n\n".join(parts)


def _bound(point: Point) -> float:
    return fmean(run.result.bound or 0.0 for run in point.runs)


_SECTIONS: Mapping[str, Callable[[Sequence[Run], Grid, str], str]] = {
    "mnist": _mnist_section,
    "regression": _regression_section,
}


def _panels(grid: Grid, draw: Callable[[Axes, Cell, bool], None], task: str) -> Figure:
    """One panel a cell: norm and optimizer downwards, kernel size and N across; one legend."""
    rows = list(dict.fromkeys((cell.norm, cell.optimizer) for cell in grid))
    columns = sorted({(cell.kernel_size, cell.features or 0) for cell in grid})
    figure = Figure(figsize=(max(2.6 * len(columns), 6.5), 2.1 * len(rows) + 1.1), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharey=True, sharex="row")
    for panel in axes.flat:
        panel.set_visible(False)
    for cell in grid:
        row = rows.index((cell.norm, cell.optimizer))
        column = columns.index((cell.kernel_size, cell.features or 0))
        panel = axes[row][column]
        panel.set_visible(True)
        title = OPTIMIZER_NAMES[cell.optimizer]
        title += f", {NORM_NAMES[cell.norm]}, k = {cell.kernel_size}" if task == "mnist" else ""
        title += "" if cell.features is None else f", N = {cell.features}"
        panel.set_title(title)
        draw(panel, cell, column == 0)
        panel.tick_params(labelbottom=True)
    return figure


def _legend(figure: Figure, grid: Grid, extra: Sequence[Line2D], quick: bool) -> Figure:
    shown = [kind for kind in KINDS if any(kind in kinds for kinds in grid.values())]
    columns = 2 if figure.get_figwidth() < 7 else 3
    lines = [Line2D([], [], **_look(kind), label=KINDS[kind].label) for kind in shown]
    figure.legend(handles=[*lines, *extra], loc="outside lower center", ncols=columns)
    if quick:
        figure.suptitle("quick look, not a result")
    return figure


def _look(kind: str) -> dict[str, Any]:
    index = list(KINDS).index(kind)
    return {
        "color": PALETTE[index],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4,
        "linestyle": "--" if kind == TWIN else "-",
    }


_BOUND_LOOK: Any = {"color": "black", "linestyle": ":", "linewidth": 1.2}
_CROSS_LOOK: Any = {"color": "black", "linestyle": "none", "marker": "x", "markersize": 7}
_RATES = Line2D([], [], linestyle="none", label="numbers: learning rates")
_CROSS = Line2D([], [], **_CROSS_LOOK, label="a seed diverged")
_BOUND = Line2D([], [], **_BOUND_LOOK, label="least error at rank N + 1")


def _power(rate: float) -> str:
    """`1e-4`, shorter than `0.0001`."""
    digits, exponent = f"{rate:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _clip(value: float, task: str) -> float:
    low, high = SHOWN[task]
    return min(max(value, low), high)


def _draw_rates(grid: Grid, task: str, quick: bool) -> Figure:
    """The score against the learning rate: the mean, and a band from the worst to the best seed."""
    accuracy = task == "mnist"

    def shown(score: float) -> float:
        return 100 * score if accuracy else _clip(score, task)

    def draw(panel: Axes, cell: Cell, first: bool) -> None:
        for kind, points in grid[cell].items():
            rates = list(points)
            means = [shown(point.mean) for point in points.values()]
            panel.plot(rates, means, **_look(kind))
            lows, highs = (
                [shown(pick(point.scores)) for point in points.values()] for pick in (min, max)
            )
            panel.fill_between(rates, lows, highs, color=_look(kind)["color"], alpha=0.15, linewidth=0)
            crosses = [(point.rate, shown(point.mean)) for point in points.values() if point.diverged]
            panel.plot(*(zip(*crosses, strict=True) if crosses else ([], [])), **_CROSS_LOOK)
        _bound_line(panel, grid[cell])
        panel.set_xscale("log")
        ticks = sorted({rate for points in grid[cell].values() for rate in points})
        panel.set_xticks(ticks, [f"{rate:g}" if rate >= 1e-3 else _power(rate) for rate in ticks])
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel("learning rate")
        if not accuracy:
            panel.set_yscale("log")
        if first:
            panel.set_ylabel("accuracy [%]" if accuracy else "relative squared error")

    figure = _panels(grid, draw, task)
    return _legend(figure, grid, [_CROSS] if accuracy else [_CROSS, _BOUND], quick)


def _bound_line(panel: Axes, kinds: Mapping[str, Points]) -> None:
    for kind, points in kinds.items():
        if kind != TWIN and (least := _bound(best(points))) > 1e-6:
            panel.axhline(least, **_BOUND_LOOK)
            return


def _draw_losses(grid: Grid, task: str, quick: bool) -> Figure:
    """The mean loss of the seeds against steps, each kind at its best rate."""

    def draw(panel: Axes, cell: Cell, first: bool) -> None:
        for kind, points in grid[cell].items():
            chosen = best(points)
            longest = max((run.result for run in chosen.runs), key=lambda result: len(result.steps))
            curves = [run.result.losses for run in chosen.runs]
            means = [
                fmean(curve[index] for curve in curves if index < len(curve))
                for index in range(len(longest.steps))
            ]
            look = _look(kind) | {"markevery": CURVE_POINTS // 4}
            panel.plot(longest.steps, [_clip(mean, task) for mean in means], **look)
            place = (0.03, 0.04 + 0.1 * list(reversed(KINDS)).index(kind))
            text: Any = {"fontsize": 7, "color": look["color"]}
            panel.text(*place, f"{chosen.rate:g}", transform=panel.transAxes, **text)
        _bound_line(panel, grid[cell])
        panel.set_yscale("log")
        panel.set_xlabel("steps")
        if first:
            panel.set_ylabel("cross-entropy" if task == "mnist" else "mean squared error")

    extra = [_RATES] if task == "mnist" else [_RATES, _BOUND]
    return _legend(_panels(grid, draw, task), grid, extra, quick)
