"""One learned function at other kernel sizes: trained with 7x7 taps, scored with others.

    python examples/resize.py --mnist DIR            # DIR holds MNIST's idx .gz files
    python examples/resize.py --mnist DIR --quick    # a first look
    python examples/resize.py --report-only          # redraw from the stored runs

The classifier of `mnist_noise.py` learns digits, and the U-Net of `segmentation.py` lesions, on images
of one size. Nothing is trained again. A hyper-convolution is sampled on other grids of taps by
`with_kernel_size`; an ordinary kernel is interpolated linearly, corners on corners. Each network is
scored with each grid on held-out images as they are and resized 0.5, 1.5 and 2 times: with its batch
norms as they were trained, and again after they have taken their averages with the new kernels, over
training images of the new size.

A kernel of k taps at dilation d reaches (k - 1) d / 6 times as far as the one that was trained. In
coordinates from -1 to 1, the layer's default, the function is stretched over it, as an interpolated
kernel is; in coordinates counted in taps it keeps its scale, and a larger kernel sees more of it.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import (
    HYPER,
    ORDINARY,
    PALETTE,
    STYLE,
    Checkpoint,
    Plan,
    Runs,
    Trial,
    add_experiment_options,
    carry_out,
    interruptible,
    mean_and_deviation,
    parse,
    plot_band,
    retake_averages,
    save_figure,
    table,
    write_summary,
)
from hyperconv_ext import HyperConv2d, __version__
from mnist_noise import accuracy, residual_network
from mnist_subset import add_mnist_options, mnist_subset, train_classifier
from segmentation import CONV, Lesions, describe, dice, load_lesions, make_layer, train_unet

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from common import Data

COMMAND = "python examples/resize.py"
KERNEL = 7
FEATURES = 8
SIDE = 32  # of the images with lesions
BATCH = 64  # images at once, when batch norms take their averages
SCORES = {"digits": "accuracy", "lesions": "Dice"}
Grid = tuple[int, int]  # kernel size and dilation
GRIDS: tuple[Grid, ...] = ((3, 1), (5, 1), (7, 1), (9, 1), (11, 1), (13, 1), (4, 2), (7, 2))
SCALES = (0.5, 1.0, 1.5, 2.0)  # sides of a resized image, by those of the image
QUICK: dict[str, Any] = {"epochs": 1, "seeds": 1, "train": 320, "test": 50}


LAYERS: dict[str, dict[str, Any]] = {
    "nn.Conv2d": {"kind": CONV, "features": None, "coordinates": None},
    "HyperConv2d": {"kind": "hyper", "features": FEATURES, "coordinates": "unit"},
    "HyperConv2d, in taps": {"kind": "hyper", "features": FEATURES, "coordinates": "centered"},
}
COLOURS = dict(zip(LAYERS, (ORDINARY, HYPER, PALETTE[2]), strict=True))


def reach(grid: Grid) -> float:
    """How much further a kernel reaches than the one that was trained."""
    size, dilation = grid
    return (size - 1) * dilation / (KERNEL - 1)


def following(scale: float) -> Grid:
    """The grid without gaps that comes closest to reach as much of a resized image as before."""
    return min(
        (grid for grid in GRIDS if grid[1] == 1), key=lambda grid: abs(math.log(reach(grid) / scale))
    )


@torch.no_grad()
def resized(network: nn.Module, grid: Grid) -> nn.Module:
    """A copy whose kernels of `KERNEL` have other taps; all else is the same, norms' averages, too."""
    copied = copy.deepcopy(network)
    for name, layer in network.named_modules():
        if isinstance(layer, HyperConv2d):
            copied.set_submodule(name, resample(layer, *grid))
        elif isinstance(layer, nn.Conv2d) and layer.kernel_size == (KERNEL, KERNEL):
            copied.set_submodule(name, interpolate(layer, *grid))
    return copied


def resample(layer: HyperConv2d, size: int, dilation: int) -> HyperConv2d:
    """The same function on other taps, times the area that a tap now stands for."""
    other = layer.with_kernel_size(size, padding="same", dilation=dilation)
    area = dilation**2 if layer.coordinates == "centered" else (KERNEL / size) ** 2
    other.coefficients.mul_(area)
    return other


def interpolate(layer: nn.Conv2d, size: int, dilation: int) -> nn.Conv2d:
    """The kernel interpolated linearly to `size` taps an axis, its sum about the same."""
    channels = (layer.in_channels, layer.out_channels)
    other = nn.Conv2d(*channels, size, padding="same", dilation=dilation, bias=False).to(layer.weight)
    stretched = F.interpolate(layer.weight, (size, size), mode="bilinear", align_corners=True)
    other.weight.copy_(stretched * (KERNEL / size) ** 2)
    return other


def enlarge(images: Tensor, scale: float) -> Tensor:
    """Images `[B, 1, H, W]` interpolated linearly, without aliases where they shrink."""
    if scale == 1:
        return images
    return F.interpolate(images, scale_factor=scale, mode="bilinear", antialias=scale < 1)


class Trained(NamedTuple):
    """A network, images `[B, 1, H, W]` it learnt from, and what scores one on images of some scale."""

    network: nn.Module
    images: Tensor
    score: Callable[[nn.Module, float], float]
    result: dict[str, Any]


def trained_classifier(trial: Trial, data: Data, checkpoint: Checkpoint) -> Trained:
    """On digits."""
    torch.manual_seed(trial["seed"])
    network = residual_network(lambda width: make_layer(trial, width, width))
    network = network.to(data.train_images.device)
    losses, seconds = train_classifier(network, data, trial, checkpoint, describe(trial))
    result = {"losses": losses, "seconds": seconds}

    def score(other: nn.Module, scale: float) -> float:
        return accuracy(other, enlarge(data.test_images, scale), data.test_labels)

    return Trained(network, data.train_images, score, result)


def trained_unet(trial: Trial, checkpoint: Checkpoint) -> Trained:
    """On lesions, whose edge in a resized image is where the resized mask is a half."""
    network, result = train_unet(trial, checkpoint)
    names = ("train", "test", "side", "dims", "device")
    learnt, held_out = load_lesions(*(trial[name] for name in names))

    def score(other: nn.Module, scale: float) -> float:
        masks = (enlarge(held_out.masks, scale) > 0.5).float()
        return dice(other, Lesions(enlarge(held_out.images, scale), masks))

    return Trained(network, learnt.images, score, result)


def run_trial(trial: Trial, data: Data, checkpoint: Checkpoint) -> dict[str, Any]:
    """Train a network, then score it with each grid of taps on images of each scale; `data` is MNIST."""
    if trial["task"] == "digits":
        trained = trained_classifier(trial, data, checkpoint)
    else:
        trained = trained_unet(trial, checkpoint)
    start = time.perf_counter()
    scores: dict[str, dict[str, list[float]]] = {}
    for grid in GRIDS:
        other = resized(trained.network, grid)
        row = scores[grid_name(grid)] = {}
        for scale in SCALES:
            images = enlarge(trained.images[: trial["test"]], scale)
            tuned = retake_averages(copy.deepcopy(other), images.split(BATCH))
            row[str(scale)] = [trained.score(network, scale) for network in (other, tuned)]
    seconds = trained.result["seconds"] + time.perf_counter() - start
    return {"scores": scores, "losses": trained.result["losses"], "seconds": round(seconds, 1)}


def grid_name(grid: Grid) -> str:
    """For results and tables."""
    size, dilation = grid
    return str(size) if dilation == 1 else f"{size}, dilation {dilation}"


def plan(args: argparse.Namespace) -> Plan:
    """All tasks and layers with a seed before the next seed.

    Raises:
        FileNotFoundError, ValueError: from `mnist_subset`.
    """
    data, settings = mnist_subset(args)
    own: dict[str, dict[str, Any]] = {
        "digits": {"data": settings.pop("data")},
        "lesions": {"side": SIDE},
    }
    settings |= {"dims": 2, "kernel_size": KERNEL, "version": __version__}
    trials = [
        {**settings, "task": task, **own[task], "layer": name, **LAYERS[name], "seed": seed}
        for seed in range(args.seed, args.seed + args.seeds)
        for task in SCORES
        for name in LAYERS
    ]
    return trials, lambda trial, checkpoint: run_trial(trial, data, checkpoint)


# [with norms as they were trained, with averages taken again] of each seed, by layer, grid and scale
Cells = dict[tuple[str, str, str], list[list[float]]]


def collect(runs: Iterable[tuple[Trial, Mapping[str, Any]]], task: str) -> Cells:
    """The scores of a task."""
    cells: Cells = {}
    for trial, result in runs:
        if trial["task"] == task:
            for grid, row in result["scores"].items():
                for scale, scores in row.items():
                    cells.setdefault((trial["layer"], grid, scale), []).append(scores)
    return cells


def layers_of(cells: Cells) -> list[str]:
    """Those that were run."""
    found = {name for name, _, _ in cells}
    return [name for name in LAYERS if name in found]


def scores_table(cells: Cells) -> str:
    """A row for each scale and grid; for each layer, both ways to keep the norms."""
    header = ["images", "kernel", "reach"]
    header += [f"{name}{what}" for name in layers_of(cells) for what in ("", ", tuned")]
    rows = []
    for scale in SCALES:
        for grid in GRIDS:
            row = [f"{scale:g} times", grid_name(grid), f"{reach(grid):.2f}"]
            for name in layers_of(cells):
                both = zip(*cells[name, grid_name(grid), str(scale)], strict=True)
                row += [mean_and_deviation(seeds, 3) for seeds in both]
            rows.append(row)
    return table(header, rows)


def draw_task(task: str, cells: Cells, panels: Sequence[Axes]) -> None:
    """The score against the kernel size, and against the scale, which kernels follow or do not."""
    left, right = panels
    sizes = [size for size, dilation in GRIDS if dilation == 1]

    def curves(name: str, places: Sequence[tuple[Grid, float]], tuned: bool) -> list[tuple[float, ...]]:
        """Of each seed."""
        columns = [[both[tuned] for both in cells[name, grid_name(g), str(s)]] for g, s in places]
        return list(zip(*columns, strict=True))

    by_size = [((size, 1), 1.0) for size in sizes]
    still = [((KERNEL, 1), scale) for scale in SCALES]
    follow = [(following(scale), scale) for scale in SCALES]
    for name in layers_of(cells):
        style: Any = {"color": COLOURS[name], "marker": "o", "markersize": 4}
        plot_band(left, sizes, curves(name, by_size, True), label=name, **style)
        plot_band(right, SCALES, curves(name, still, True), linestyle=":", **style)
        if LAYERS[name]["coordinates"] != "centered":  # whose larger kernels are not enlarged ones
            plot_band(right, SCALES, curves(name, follow, True), **style)
            plot_band(right, SCALES, curves(name, follow, False), linestyle="--", **style)
    left.set(xticks=sizes, xlabel=f"kernel size [taps an axis], trained at {KERNEL}")
    right.set(xticks=SCALES, xlabel="side of the images, by that in training")
    left.set_title(f"{task}, images as in training")
    right.set_title(f"{task}, images resized")
    left.set_ylabel(f"{SCORES[task]}, held-out")


def draw(tasks: Mapping[str, Cells]) -> Figure:
    """A row of two panels for each task."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(9, 3.4 * len(tasks)), layout="constrained")
    places = figure.subplots(len(tasks), 2, sharey="row", squeeze=False)
    for (task, cells), panels in zip(tasks.items(), places, strict=True):
        draw_task(task, cells, panels)
    places[0, 0].legend(fontsize=7)
    kinds: dict[Any, str] = {":": f"kernel of {KERNEL}, norms tuned", "-": "kernel follows, norms tuned"}
    kinds["--"] = "kernel follows, norms as trained"
    lines = [Line2D([], [], color="0.3", linestyle=style) for style in kinds]
    places[0, 1].legend(lines, kinds.values(), fontsize=7)
    return figure


def write_report(runs: Runs, folder: Path, quick: bool) -> list[Path]:
    """The summary and the figure; the paths of all."""
    import matplotlib

    tasks = {task: cells for task in SCORES if (cells := collect(runs, task))}
    trial, _ = next(iter(runs))
    seeds = len({trial["seed"] for trial, _ in runs})
    parts = ["# One learned function at other kernel sizes"]
    if quick:
        parts.append("Quick look: too little training to compare anything.")
    parts.append(
        f"Trained with kernels of {KERNEL}x{KERNEL} taps, N = {FEATURES}: {trial['epochs']} epochs of "
        f"{trial['train']:,} images, batches of {trial['batch_size']}, Adam at {trial['rate']:g}. Not "
        f"trained again; tuned: the batch norms have taken their averages again, over {trial['test']} "
        f"training images of the new size. {trial['test']:,} held-out images; mean ± standard deviation "
        f"over {seeds} seeds."
    )
    parts.append("![Scores against the kernel size, and against the size of the images.](resize.png)")
    for task, cells in tasks.items():
        parts += [f"## {task.capitalize()}: {SCORES[task]}", scores_table(cells)]
    command = f"{COMMAND} --mnist DIR" + " --quick" * quick
    summary = write_summary(folder, "\n\n".join(parts), command)
    with matplotlib.rc_context(STYLE):
        return [summary, *save_figure(draw(tasks), folder, "resize")]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Networks trained with 7x7 kernels, evaluated with kernels of other sizes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_mnist_options(parser, train=2_000, test=250)
    parser.set_defaults(batch_size=16, rate=3e-3)
    add_experiment_options(parser, "resize", epochs=4, seeds=3)
    return parser


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run what is missing, write the report and return its files."""
    parser = build_parser()
    args = parse(parser, argv, QUICK)
    return carry_out(parser, args, plan, lambda runs, folder: write_report(runs, folder, args.quick))


if __name__ == "__main__":
    raise SystemExit(interruptible(main))
