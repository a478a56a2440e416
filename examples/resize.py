"""One learned function at other kernel sizes: a U-Net trained with 7x7 kernels, scored with others.

    python examples/resize.py                  # minutes on an idle core; nothing to download
    python examples/resize.py --quick          # a minute, for a first look
    python examples/resize.py --report-only    # redraw from the stored runs

The task is that of `lesions.py`. Nothing is trained again: a hyper-convolution is sampled on another
grid of taps (`with_kernel_size`), an ordinary kernel is interpolated linearly, corners on corners. Both
are scaled so that the response to a constant image stays about as it was. The networks are scored with
kernels of 3 to 13 taps, and of 3 and 7 with dilation 2, on images as they were in training and on the
same enlarged 0.5, 1.5 and 2 times.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import prepare
from experiments import (
    PALETTE,
    STYLE,
    Runs,
    add_experiment_options,
    interruptible,
    parse,
    save_figure,
    table,
    write_summary,
)
from hyperconv_ext import HyperConv2d, __version__
from lesions import add_training_options, bars, check_side, spread
from segmentation import CONV, Lesions, Trial, UNet, dice, train_unet, trial_lesions

COMMAND = "python examples/resize.py"
KERNEL = 7
FEATURES = 4
KINDS = {
    CONV: "nn.Conv2d, interpolated",
    "hyper": "HyperConv2d",
    "centered": "HyperConv2d, coordinates in taps",
}
# (kernel size, dilation); enlargements of the image; kernels that cover as much of it as in training.
GRIDS = ((3, 1), (5, 1), (7, 1), (9, 1), (11, 1), (13, 1), (3, 2), (7, 2))
SCALES = (0.5, 1.0, 1.5, 2.0)
FOLLOWING = {0.5: (3, 1), 1.0: (7, 1), 1.5: (11, 1), 2.0: (13, 1)}
QUICK: dict[str, Any] = {"epochs": 1, "seeds": 1, "train": 160, "test": 50}


@torch.no_grad()
def resized(network: UNet, size: int, dilation: int) -> UNet:
    """A copy whose kernels have other taps; all else is the same, the batch norms' averages, too."""
    copied = copy.deepcopy(network)
    for block in (*copied.down, *copied.up):
        for index, layer in enumerate(block):
            if isinstance(layer, HyperConv2d):
                block[index] = resample(layer, size, dilation)
            elif isinstance(layer, nn.Conv2d):
                block[index] = interpolate(layer, size, dilation)
    return copied


def resample(layer: HyperConv2d, size: int, dilation: int) -> HyperConv2d:
    """The same function on other taps, times the area that a tap now stands for."""
    other = layer.with_kernel_size(size, padding="same", dilation=dilation)
    area = dilation**2 if layer.coordinates == "centered" else (layer.kernel_size[0] / size) ** 2
    other.coefficients.mul_(area)
    return other


def interpolate(layer: nn.Conv2d, size: int, dilation: int) -> nn.Conv2d:
    """The kernel interpolated linearly to `size` taps an axis, its sum about the same."""
    channels = (layer.in_channels, layer.out_channels)
    other = nn.Conv2d(*channels, size, padding="same", dilation=dilation, bias=False)
    other.to(layer.weight)
    stretched = F.interpolate(layer.weight, (size, size), mode="bilinear", align_corners=True)
    other.weight.copy_(stretched * (layer.kernel_size[0] / size) ** 2)
    return other


def enlarged(data: Lesions, scale: float) -> Lesions:
    """The images interpolated linearly; masks are 1 where interpolated ones are above a half."""
    if scale == 1:
        return data

    def enlarge(images: Tensor) -> Tensor:
        return F.interpolate(images, scale_factor=scale, mode="bilinear", antialias=scale < 1)

    return Lesions(enlarge(data.images), (enlarge(data.masks) > 0.5).float())


def grid_name(size: int, dilation: int) -> str:
    """For results and tables."""
    return str(size) if dilation == 1 else f"{size}, dilation {dilation}"


def run_trial(trial: Trial, runs: Runs) -> dict[str, Any]:
    """Train a network, then score it with every grid of taps at every enlargement."""
    network, result = train_unet(trial, runs)
    _, held_out = trial_lesions(trial)
    scores: dict[str, dict[str, float]] = {}
    for grid in GRIDS:
        other = network if grid == (KERNEL, 1) else resized(network, *grid)
        row = {str(scale): dice(other, enlarged(held_out, scale)) for scale in SCALES}
        scores[grid_name(*grid)] = row
    return {**result, "scores": scores}


def plan_trials(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Everything that decides a run; all layers with a seed before the next seed."""
    fixed = {
        "dims": 2,
        "side": args.side,
        "kernel_size": KERNEL,
        "train": args.train,
        "epochs": args.epochs,
        "test": args.test,
        "batch_size": args.batch_size,
        "rate": args.rate,
        "device": str(args.device),
        "backend": args.backend,
        "version": __version__,
    }
    return [
        {"kind": kind, "features": None if kind == CONV else FEATURES, "seed": seed, **fixed}
        for seed in range(args.seed, args.seed + args.seeds)
        for kind in KINDS
    ]


Cells = dict[tuple[str, str, str], list[float]]


def collect(runs: Runs) -> Cells:
    """Dice of each seed by kind, grid of taps and enlargement."""
    cells: Cells = {}
    for trial, result in runs:
        for grid, row in result["scores"].items():
            for scale, score in row.items():
                cells.setdefault((trial["kind"], grid, scale), []).append(score)
    return cells


def draw(cells: Cells, folder: Path) -> list[Path]:
    """Dice against the kernel size, and against the enlargement, which kernels follow or do not."""
    import matplotlib
    from matplotlib.figure import Figure

    sizes = [size for size, dilation in GRIDS if dilation == 1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for (kind, label), colour in zip(KINDS.items(), PALETTE, strict=False):
            style: Any = {"color": colour, "marker": "o", "markersize": 4, "capsize": 2}
            curves = [cells[kind, grid_name(size, 1), "1.0"] for size in sizes]
            left.errorbar(sizes, *bars(curves), label=label, **style)
            if kind == "centered":
                continue
            followed = [cells[kind, grid_name(*FOLLOWING[scale]), str(scale)] for scale in SCALES]
            same = [cells[kind, grid_name(KERNEL, 1), str(scale)] for scale in SCALES]
            right.errorbar(SCALES, *bars(followed), label=f"{label}, kernel enlarged, too", **style)
            right.errorbar(SCALES, *bars(same), label=f"{label}, kernel of 7", linestyle=":", **style)
        left.set(
            xticks=sizes, xlabel="kernel size (taps an axis), trained at 7", ylabel="Dice, held-out"
        )
        right.set(xticks=SCALES, xlabel="enlargement of the image")
        for panel in (left, right):
            panel.legend(fontsize=7)
        return save_figure(figure, folder, "resize")


def write_report(runs: Runs, folder: Path, quick: bool) -> list[Path]:
    """The summary and the figure; the paths of all."""
    cells = collect(runs)
    trial, _ = next(iter(runs))
    rows = [
        [
            label,
            grid_name(*grid),
            *(spread(cells[kind, grid_name(*grid), str(scale)]) for scale in SCALES),
        ]
        for kind, label in KINDS.items()
        for grid in GRIDS
    ]
    parts = [
        "# One learned function at other kernel sizes",
        "Quick look: too little training to compare anything." if quick else "",
        f"U-Net trained with kernels of {KERNEL}, N = {FEATURES}, for {trial['epochs']} epochs of "
        f"{trial['train']} images of {trial['side']} pixels a side; not trained again. Dice of "
        f"{trial['test']} held-out images by their enlargement: mean ± standard deviation (seeds).",
        table(["layer", "kernel", *(f"{scale:g} times" for scale in SCALES)], rows),
        "![Dice against the kernel size, and against the enlargement of the image.](resize.png)",
    ]
    summary = write_summary(folder, "\n\n".join(filter(None, parts)), COMMAND + " --quick" * quick)
    return [summary, *draw(cells, folder)]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Dice of a U-Net trained with 7x7 kernels, evaluated with kernels of other sizes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_training_options(parser)
    add_experiment_options(parser, "resize", epochs=4)
    return parser


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run what is missing, write the report and return its files."""
    parser = build_parser()
    args = parse(parser, argv, QUICK)
    prepare(args)
    try:
        check_side("--side", args.side, KERNEL)
        runs = Runs(args.out)
    except ValueError as error:
        parser.error(str(error))
    for trial in [] if args.report_only else plan_trials(args):
        if runs.get(trial) is None:
            runs.add(trial, run_trial(trial, runs))
    if not len(runs):
        parser.error(f"--report-only: expected runs in {runs.path}, found none; run without it first")
    files = write_report(runs, args.out, args.quick)
    print(*files, sep="\n")
    return files


if __name__ == "__main__":
    raise SystemExit(interruptible(main))
