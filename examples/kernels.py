"""What do learned kernels look like? Those of HyperConv2d beside those of nn.Conv2d, and how smooth.

    python examples/kernels.py --mnist DIR             # DIR holds MNIST's idx .gz files
    python examples/kernels.py --mnist DIR --quick     # a first look
    python examples/kernels.py --report-only           # redraw from the stored runs

One network (that of `digits.py`) is trained with nn.Conv2d and with HyperConv2d of N features, all else
the same. Of its middle layer the kernels are drawn; of every layer the smoothness is measured, at the
start and after training, by two numbers that do not depend on the scale of the kernels:

- variation: the mean absolute difference of neighbouring taps, relative to the root mean square of the
  taps. 0 for constant kernels, 1.13 (2 over the root of pi) for white noise of a normal distribution;
- high frequencies: the share of the kernels' power at more than a quarter of a cycle per tap along
  either axis. Of white noise it is about 0.72.

A killed run goes on where it was. OUT/summary.md has the numbers, the figures lie beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common import Data, positive
from digits import accuracy, build_network
from experiments import (
    HYPER,
    ORDINARY,
    PALETTE,
    STYLE,
    Checkpoint,
    Plan,
    Runs,
    add_experiment_options,
    carry_out,
    interruptible,
    mean_and_deviation,
    parse,
    save_figure,
    table,
    write_summary,
)
from hyperconv_ext import HyperConv2d, plot_kernels
from mnist_subset import add_mnist_options, mnist_subset, setting, train_classifier

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMMAND = "python examples/kernels.py --mnist DIR"
QUICK: dict[str, Any] = {"seeds": 1, "epochs": 1, "train": 2000, "test": 1000, "features": [2, 8]}
PADDED = 32  # side of the discrete Fourier transform
SHOWN = 6  # channels
MIDDLE = 1  # the layer that is drawn: of 16 and 32 channels
LAYERS = 3


def smoothness(weight: Tensor) -> dict[str, Any]:
    """`variation`, `high` and `spectrum` of kernels `[C_out, C_in, k, k]`; see the top of the file.

    `spectrum` is the mean power at frequencies of 0, 1/32, ... 15/32 cycles per tap (rounded, in all
    directions), relative to the mean over all frequencies; 1 everywhere for white noise.
    """
    kernels = weight.detach().double()
    steps = torch.cat([kernels.diff(dim=axis).flatten() for axis in (2, 3)])
    variation = steps.abs().mean() / kernels.square().mean().sqrt()
    power = torch.fft.fft2(kernels, s=(PADDED, PADDED)).abs().square().mean((0, 1))
    power /= power.mean()
    frequency = torch.fft.fftfreq(PADDED, dtype=torch.float64, device=power.device).abs()
    rows, columns = torch.meshgrid(frequency, frequency, indexing="ij")
    high = power[torch.maximum(rows, columns) > 0.25].sum() / power.sum()
    ring = (PADDED * torch.hypot(rows, columns)).round()
    spectrum = [float(power[ring == index].mean()) for index in range(PADDED // 2)]
    return {"variation": float(variation), "high": float(high), "spectrum": spectrum}


def convolution(trial: Mapping[str, Any]) -> Callable[..., nn.Module]:
    """The class of the trial's layers."""
    if trial["features"] is None:
        return nn.Conv2d
    return partial(HyperConv2d, num_features=trial["features"], backend=trial["backend"])


def start(trial: Mapping[str, Any]) -> nn.Sequential:
    """The trial's network, before training."""
    torch.manual_seed(trial["seed"])
    return build_network(convolution(trial), trial["kernel_size"])


def weights(network: nn.Module) -> list[Tensor]:
    """W of each convolution."""
    found = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | HyperConv2d)]
    return [layer.weight for layer in found]


def run_trial(trial: Mapping[str, Any], data: Data, checkpoint: Checkpoint) -> dict[str, Any]:
    """Train the trial's network and measure its kernels."""
    network = start(trial).to(data.train_images.device)
    before = [smoothness(weight) for weight in weights(network)]
    losses, seconds = train_classifier(network, data, trial, checkpoint, name(trial["features"]))
    trained = weights(network)
    shown = trained[MIDDLE][:SHOWN, :SHOWN].detach().double()
    return {
        "accuracy": accuracy(network, data, trial["batch_size"]),
        "before": before,
        "after": [smoothness(weight) for weight in trained],
        "kernels": [
            [[round(w, 4) for w in kernel.flatten().tolist()] for kernel in row] for row in shown
        ],
        "losses": losses,
        "seconds": seconds,
    }


def name(features: int | None) -> str:
    """Of a kind of layer, for people."""
    return "nn.Conv2d" if features is None else f"HyperConv2d, N = {features}"


Kinds = dict[int | None, list[tuple[dict[str, Any], dict[str, Any]]]]


def by_kind(stored: Runs) -> Kinds:
    """The runs of each number of features, the ordinary ones first."""
    found: Kinds = {}
    for trial, result in sorted(stored, key=lambda run: run[0]["features"] or 0):
        found.setdefault(trial["features"], []).append((trial, result))
    return found


def write_report(stored: Runs, folder: Path) -> list[Path]:
    """The summary and the figures."""
    import matplotlib

    kinds = by_kind(stored)
    with matplotlib.rc_context(STYLE):
        files = save_figure(draw_kernels(kinds), folder, "kernels")
        files += save_figure(draw_smoothness(kinds), folder, "smoothness")
    runs = next(iter(kinds.values()))
    size = runs[0][0]["kernel_size"]
    text = f"# Kernels, seen\n\n{setting(runs[0][0], len(runs))} Kernels of {size}x{size}. "
    text += "Variation and high frequencies: at the start → after training, for the three layers (16x1, "
    text += f"32x16 and 32x32 kernels).\n\n{smoothness_table(kinds)}\n\n"
    text += "![Kernels of the middle layer, and those of nn.Conv2d before training.](kernels.png)\n\n"
    text += "![The power of the kernels against frequency; their variation by layer.](smoothness.png)"
    return [write_summary(folder, text, COMMAND), *files]


def smoothness_table(kinds: Kinds) -> str:
    """A row for each kind and layer."""
    rows = []
    for features, runs in kinds.items():
        reached = [100 * result["accuracy"] for _, result in runs]
        for layer in range(LAYERS):
            cells = [mean_and_deviation(reached) if layer == 0 else ""]
            for measure in ("variation", "high"):
                before, after = (
                    [result[when][layer][measure] for _, result in runs] for when in ("before", "after")
                )
                cells.append(f"{fmean(before):.2f} → {mean_and_deviation(after, 2)}")
            rows.append([name(features) if layer == 0 else "", str(layer + 1), *cells])
    return table(["convolution", "layer", "accuracy [%]", "variation", "high frequencies"], rows)


def draw_kernels(kinds: Kinds) -> Figure:
    """The middle layer of each kind's first seed; the ordinary one also before training."""
    from matplotlib.figure import Figure

    pictures = []
    for features, runs in kinds.items():
        trial, result = min(runs, key=lambda run: run[0]["seed"])
        if features is None:
            untrained = weights(start(trial))[MIDDLE][:SHOWN, :SHOWN].detach()
            pictures.append((f"{name(None)}, before training", untrained))
        sides = (trial["kernel_size"],) * 2
        kernels = torch.tensor(result["kernels"]).unflatten(2, sides)
        pictures.append((name(features), kernels))
    columns = 3
    rows = -(-len(pictures) // columns)
    # Not by a constrained layout, whose subfigures differ from run to run in their last digits.
    figure = Figure(figsize=(4.2 * columns, 4 * rows))
    places = figure.subfigures(rows, columns, squeeze=False).flat
    for place, (title, kernels) in zip(places, pictures, strict=False):
        layer = nn.Conv2d(kernels.shape[1], kernels.shape[0], kernels.shape[2])
        layer.weight = nn.Parameter(kernels)
        place.subplots_adjust(left=0.08, right=0.82)
        plot_kernels(layer, place).suptitle(title, fontsize=10)
    return figure


def draw_smoothness(kinds: Kinds) -> Figure:
    """The spectrum of the middle layer's kernels; the variation of every layer's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    frequencies = [index / PADDED for index in range(PADDED // 2)]

    def spectrum(runs: Sequence[tuple[Any, Any]], when: str) -> list[float]:
        curves = [result[when][MIDDLE]["spectrum"] for _, result in runs]
        return [fmean(values) for values in zip(*curves, strict=True)]

    hyper = iter((HYPER, *PALETTE[2:]))
    for features, runs in kinds.items():
        if features is None:
            before = spectrum(runs, "before")
            left.plot(frequencies, before, color="0.4", linestyle="--", label="nn.Conv2d, at the start")
        colour = ORDINARY if features is None else next(hyper)
        left.plot(frequencies, spectrum(runs, "after"), color=colour, label=name(features))
    left.set_yscale("log")
    left.set_xlabel("frequency [cycles per tap]")
    left.set_ylabel("power, relative to white noise")
    left.set_title("layer 2, after training")
    left.legend(fontsize=7)
    ticks = range(len(kinds))
    for layer in range(LAYERS):
        for when, look in (("before", {"fillstyle": "none", "linestyle": ":"}), ("after", {})):
            means = [
                fmean(result[when][layer]["variation"] for _, result in runs) for runs in kinds.values()
            ]
            style: Any = {"color": PALETTE[layer + 2], "marker": "osD"[layer], "markersize": 5, **look}
            label = f"layer {layer + 1}" + (", at the start" if when == "before" else "")
            right.plot(ticks, means, label=label, **style)
    right.set_xticks(ticks, ["nn.Conv2d", *(f"N = {n}" for n in kinds if n is not None)])
    right.set_ylim(bottom=0)
    right.set_ylabel("difference of neighbours / rms")
    right.set_title("variation")
    right.legend(fontsize=7, ncols=2)
    return figure


def plan(args: argparse.Namespace) -> Plan:
    """One run for each kind and seed."""
    data, settings = mnist_subset(args)
    settings["kernel_size"] = args.kernel_size
    trials = [
        settings | {"features": features, "seed": seed}
        for seed in range(args.seed, args.seed + args.seeds)
        for features in (None, *args.features)
    ]
    return trials, lambda trial, checkpoint: run_trial(trial, data, checkpoint)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Draw learned kernels of HyperConv2d beside nn.Conv2d's; measure their smoothness.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--features", nargs="+", type=positive, default=[2, 4, 8, 16], help="N of HyperConv2d")
    option("--kernel-size", type=positive, default=7, help="of every convolution")
    add_mnist_options(parser, train=10_000, test=5_000)
    add_experiment_options(parser, "kernels", epochs=3, seeds=1)
    return parser


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run what is missing, write the report and return its files."""
    parser = build_parser()
    return carry_out(parser, parse(parser, argv, QUICK), plan, write_report)


if __name__ == "__main__":
    raise SystemExit(interruptible(main))
