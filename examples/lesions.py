"""Do larger kernels, or more functions, find lesions better? The paper's grid, on made-up images.

    python examples/lesions.py                  # an hour; nothing to download
    python examples/lesions.py --quick          # two minutes, for a first look
    python examples/lesions.py --report-only    # redraw from the stored runs

A U-Net learns to segment synthetic lesions (`segmentation.py`), with kernels of 3, 5 and 7 taps an axis:
of ordinary convolutions, and of hyper-convolutions with N = 2, 4 and 8 functions, in this package's
default form and in the published one (Ma et al., WACV 2022, arXiv 2105.10559); and a small 3-D one. The
score is the mean Dice coefficient of held-out images after the last epoch.

Every run is appended to OUT/runs.jsonl once it is finished, and one that is there is not repeated; all
of a seed come before the next seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common import positive
from experiments import (
    PALETTE,
    STYLE,
    Plan,
    Runs,
    add_experiment_options,
    carry_out,
    interruptible,
    parse,
    save_figure,
    table,
    write_summary,
)
from hyperconv_ext import __version__
from segmentation import CONV, KINDS, SHRINKAGE, make_lesions, train_unet

COMMAND = "python examples/lesions.py"
KERNELS = (3, 5, 7)
FEATURES = (2, 4, 8)
VOLUME_FEATURES = 4  # of the network on volumes
QUICK: dict[str, Any] = {"epochs": 1, "seeds": 1, "train": 160, "volumes": 32, "test": 50}
Cells = dict[tuple[str, int | None], dict[int, list[dict[str, Any]]]]


def plan_trials(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Everything that decides a run; the whole grid with a seed before the next seed."""
    fixed = {
        "epochs": args.epochs,
        "test": args.test,
        "batch_size": args.batch_size,
        "rate": args.rate,
        "device": str(args.device),
        "backend": args.backend,
        "version": __version__,
    }
    images = {"dims": 2, "side": args.side, "train": args.train}
    volumes = {"dims": 3, "side": args.volume_side, "train": args.volumes}
    grid: list[tuple[str, int | None, dict[str, int]]] = [(CONV, None, images)]
    grid += [(kind, features, images) for kind in ("hyper", "published") for features in FEATURES]
    grid += [(CONV, None, volumes), ("hyper", VOLUME_FEATURES, volumes)]
    return [
        {"kind": kind, "kernel_size": size, "features": features, "seed": seed, **data, **fixed}
        for seed in range(args.seed, args.seed + args.seeds)
        for kind, features, data in grid
        for size in KERNELS
    ]


def collect(runs: Iterable[tuple[Mapping[str, Any], dict[str, Any]]], dims: int) -> Cells:
    """The results by (kind, N), kernel size and seed."""
    cells: Cells = {}
    for trial, result in runs:
        if trial["dims"] == dims:
            row = cells.setdefault((trial["kind"], trial["features"]), {})
            row.setdefault(trial["kernel_size"], []).append(result)
    return cells


def dices(results: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of the seeds."""
    return [result["dice"] for result in results]


def spread(scores: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds, and how many there are."""
    (mean,), (deviation,) = bars([scores])
    shown = f" ± {deviation:.3f}" if len(scores) > 1 else ""
    return f"{mean:.3f}{shown} ({len(scores)})"


def bars(scores: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Means and standard deviations, of one seed 0."""
    return [fmean(each) for each in scores], [stdev(each) if len(each) > 1 else 0.0 for each in scores]


def grid_table(cells: Cells) -> str:
    """Dice by layer and kernel size, and how many parameters the networks have."""
    sizes = sorted({size for row in cells.values() for size in row})
    header = ["layer", "N", *(f"k = {size}" for size in sizes), "parameters"]
    rows = []
    for (kind, features), row in cells.items():
        counts = [f"{row[size][0]['parameters']:,}" for size in sizes if size in row]
        scores = [spread(dices(row[size])) if size in row else "" for size in sizes]
        shown = counts if len(set(counts)) > 1 else counts[:1]
        rows.append([KINDS[kind], "" if features is None else str(features), *scores, " / ".join(shown)])
    return table(header, rows)


def look(kind: str, features: int | None) -> dict[str, Any]:
    """Colour by N, line by kind; nn.ConvNd's colour is its own."""
    colour = PALETTE[0 if features is None else 1 + FEATURES.index(features)]
    label = KINDS[kind] + ("" if features is None else f", N = {features}")
    return {"color": colour, "linestyle": "--" if kind == "published" else "-", "label": label}


def draw_scores(grids: Mapping[int, Cells], folder: Path) -> list[Path]:
    """Dice against the kernel size, a panel for images and one for volumes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        panels = figure.subplots(1, len(grids), squeeze=False)[0]
        for panel, (dims, cells) in zip(panels, grids.items(), strict=True):
            for (kind, features), row in cells.items():
                sizes = sorted(row)
                scores = [dices(row[size]) for size in sizes]
                style: Any = look(kind, features)
                panel.errorbar(sizes, *bars(scores), marker="o", markersize=4, capsize=2, **style)
            panel.set(
                xticks=KERNELS,
                xlabel="kernel size (taps an axis)",
                ylabel="Dice, held-out",
                title="images" if dims == 2 else "volumes",
            )
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=8)
        return save_figure(figure, folder, "scores")


def draw_task(side: int, folder: Path) -> list[Path]:
    """Some of the images to learn from, and the edges of the lesions in them."""
    import matplotlib
    from matplotlib.figure import Figure

    examples = make_lesions(12, side, 2, 0)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(8, 2.8), layout="constrained")
        panels = figure.subplots(2, 6).flat
        for panel, image, mask in zip(panels, examples.images, examples.masks, strict=True):
            panel.imshow(image[0].numpy(), cmap="gray")
            panel.contour(mask[0].numpy(), [0.5], colors=PALETTE[4], linewidths=1.2)
            panel.set_axis_off()
        return save_figure(figure, folder, "task")


def write_report(runs: Runs, folder: Path, quick: bool) -> list[Path]:
    """The summary and the figures; the paths of all."""
    trials = [trial for trial, _ in runs]
    grids = {dims: collect(runs, dims) for dims in (2, 3)}
    grids = {dims: cells for dims, cells in grids.items() if cells}
    parts = ["# Kernel size and number of functions: lesions"]
    if quick:
        parts.append("Quick look: too little training to compare anything.")
    for dims, cells in grids.items():
        trial = next(trial for trial in trials if trial["dims"] == dims)
        what = "images" if dims == 2 else "volumes"
        parts.append(f"## {what.capitalize()}")
        parts.append(
            f"{trial['epochs']} epochs of {trial['train']} {what} of {trial['side']} pixels a side, "
            f"batches of {trial['batch_size']}, Adam at {trial['rate']:g}. Dice of {trial['test']} "
            f"held-out ones: mean ± standard deviation (seeds)."
        )
        parts.append(grid_table(cells))
    parts.append("![Dice against the kernel size, by layer and number of functions.](scores.png)")
    side = next(trial["side"] for trial in trials if trial["dims"] == 2)
    summary = write_summary(folder, "\n\n".join(parts), COMMAND + " --quick" * quick)
    return [summary, *draw_scores(grids, folder), *draw_task(side, folder)]


def check_side(option: str, side: int, widest: int) -> None:
    """Refuse sides that the poolings cannot halve, or that leave less than the kernels in the end.

    Raises:
        ValueError: with the side that would do.
    """
    if side % SHRINKAGE or widest > 2 * side // SHRINKAGE - 1:
        least = -(-(widest + 1) // 2) * SHRINKAGE
        raise ValueError(
            f"{option}: expected a multiple of {SHRINKAGE}, for kernels of {widest} at least {least}, "
            f"got {side}"
        )


def plan(args: argparse.Namespace) -> Plan:
    """All trials.

    Raises:
        ValueError: from `check_side`.
    """
    check_side("--side", args.side, max(KERNELS))
    check_side("--volume-side", args.volume_side, max(KERNELS))
    return plan_trials(args), lambda trial, checkpoint: train_unet(trial, checkpoint)[1]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Dice of a U-Net on synthetic lesions, by kernel size and number of functions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--train", type=positive, default=1000, help="training images")
    option("--test", type=positive, default=200, help="held-out images, or volumes")
    option("--side", type=positive, default=32, help="of an image, in pixels")
    option("--batch-size", type=positive, default=16, help="images per step")
    option("--rate", type=float, default=3e-3, help="learning rate of Adam")
    option("--volumes", type=positive, default=400, help="training volumes")
    option("--volume-side", type=positive, default=16, help="of a volume, in voxels")
    add_experiment_options(parser, "lesions", epochs=4)
    return parser


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run what is missing, write the report and return its files."""
    parser = build_parser()
    args = parse(parser, argv, QUICK)
    return carry_out(parser, args, plan, lambda runs, folder: write_report(runs, folder, args.quick))


if __name__ == "__main__":
    raise SystemExit(interruptible(main))
