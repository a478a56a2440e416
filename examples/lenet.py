"""LeNet-5 on MNIST, with nn.Conv2d and with HyperConv2d.

    python examples/lenet.py --mnist DIR             # DIR holds MNIST's idx .gz files
    python examples/lenet.py --mnist DIR --quick     # a first look
    python examples/lenet.py --report-only           # redraw from the stored runs

Three 5x5 convolutions of 6, 16 and 120 channels, means of 2x2 behind the first two, tanh, two linear
layers (LeCun, Bottou, Bengio, Haffner: "Gradient-based learning applied to document recognition",
Proceedings of the IEEE 86, 1998). As is usual today the second convolution sees all channels, and the
classes are told by a softmax. A killed run goes on where it was. OUT/summary.md has the numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from common import CLASSES, Data
from digits import accuracy, count_parameters
from experiments import (
    HYPER,
    ORDINARY,
    STYLE,
    Checkpoint,
    Runs,
    add_experiment_options,
    carry_out,
    interruptible,
    mean_and_deviation,
    parse,
    plot_band,
    save_figure,
    table,
    write_summary,
)
from hyperconv_ext import HyperConv2d
from mnist_subset import add_mnist_options, by_kind, plan_twins, setting, train_classifier

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMMAND = "python examples/lenet.py --mnist DIR"
QUICK: dict[str, Any] = {"seeds": 1, "epochs": 1, "train": 3000, "test": 1000}
COLOURS = {"nn.Conv2d": ORDINARY, "HyperConv2d": HYPER}
KERNEL = 5
FEATURES = 4


def build_network(convolution: Callable[..., nn.Module]) -> nn.Sequential:
    """LeNet-5 of the given class of convolution, for images of 28x28."""
    return nn.Sequential(
        convolution(1, 6, KERNEL, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2),  # 14x14
        convolution(6, 16, KERNEL),  # 10x10
        nn.Tanh(),
        nn.AvgPool2d(2),  # 5x5
        convolution(16, 120, KERNEL),  # 1x1
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(120, 84),
        nn.Tanh(),
        nn.Linear(84, CLASSES),
    )


def run_trial(trial: Mapping[str, Any], data: Data, checkpoint: Checkpoint) -> dict[str, Any]:
    """Train and test one network."""
    ordinary = trial["kind"] == "nn.Conv2d"
    hyper = partial(HyperConv2d, num_features=FEATURES, backend=trial["backend"])
    convolution = nn.Conv2d if ordinary else hyper
    torch.manual_seed(trial["seed"])
    network = build_network(convolution).to(data.train_images.device)
    losses, seconds = train_classifier(network, data, trial, checkpoint, trial["kind"])
    layers = [layer for layer in network if isinstance(layer, nn.Conv2d | HyperConv2d)]
    return {
        "accuracy": accuracy(network, data, trial["batch_size"]),
        "conv_parameters": [count_parameters([layer]) for layer in layers],
        "parameters": count_parameters([network]),
        "losses": losses,
        "seconds": seconds,
    }


def write_report(stored: Runs, folder: Path) -> list[Path]:
    """The summary and the figure."""
    import matplotlib

    kinds = by_kind(stored, COLOURS)
    with matplotlib.rc_context(STYLE):
        files = save_figure(draw(kinds), folder, "lenet")
    rows = []
    for kind, results in kinds.items():
        layers = [f"{count:,}" for count in results[0]["conv_parameters"]]
        reached = mean_and_deviation([100 * result["accuracy"] for result in results], 2)
        loss = mean_and_deviation([result["losses"][-1] for result in results], 4)
        rows.append([kind, reached, loss, *layers, f"{results[0]['parameters']:,}"])
    header = ["convolution", "accuracy [%]", "last training loss"]
    header += [f"parameters, {layer}" for layer in ("1 → 6", "6 → 16", "16 → 120", "network")]
    trial, _ = next(iter(stored))
    seeds = len(next(iter(kinds.values())))
    text = f"# LeNet-5\n\n{setting(trial, seeds)}\n\n{table(header, rows)}\n\n"
    text += "![Loss in training, with a band over the seeds; held-out error of each seed.](lenet.png)"
    return [write_summary(folder, text, COMMAND), *files]


def draw(kinds: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """The loss of each epoch, with a band over the seeds; the error of each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (kind, results) in enumerate(kinds.items()):
        curves = [result["losses"] for result in results]
        epochs = range(1, len(curves[0]) + 1)
        plot_band(left, epochs, curves, marker="o", color=COLOURS[kind], label=kind)
        errors = [100 * (1 - result["accuracy"]) for result in results]
        right.plot([index] * len(errors), errors, "o", color=COLOURS[kind], fillstyle="none")
        right.plot(index, fmean(errors), "_", color=COLOURS[kind], markersize=24)
    left.set_yscale("log")
    left.set_xticks(epochs)
    left.set_xlabel("epoch")
    left.set_ylabel("cross-entropy in training")
    left.legend()
    right.set_xticks(range(len(kinds)), list(kinds))
    right.set_xlim(-0.6, len(kinds) - 0.4)
    right.set_ylim(0, 1.1 * right.get_ylim()[1])
    right.set_ylabel("held-out error [%]")
    return figure


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train LeNet-5 on MNIST with nn.Conv2d and with HyperConv2d.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_mnist_options(parser, train=20_000, test=10_000)
    add_experiment_options(parser, "lenet", epochs=5, seeds=3)
    return parser


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run what is missing, write the report and return its files."""
    parser = build_parser()
    args = parse(parser, argv, QUICK)
    return carry_out(parser, args, lambda _: plan_twins(args, COLOURS, run_trial), write_report)


if __name__ == "__main__":
    raise SystemExit(interruptible(main))
