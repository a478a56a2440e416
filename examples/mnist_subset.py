"""What experiments on part of MNIST share: options, the images of a trial, and training."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from common import Data, load_images, positive
from experiments import Checkpoint, Plan, Runs, Trial, train_by_adam


def add_mnist_options(parser: argparse.ArgumentParser, train: int, test: int) -> None:
    """`--mnist`, `--train`, `--test`, `--batch-size` and `--rate`.

    Args:
        train, test: how many images, unless the command line says.
    """
    option = parser.add_argument
    option("--mnist", type=Path, metavar="DIR", help="folder of MNIST's idx .gz files")
    option("--train", type=positive, default=train, help="training images")
    option("--test", type=positive, default=test, help="held-out images")
    option("--batch-size", type=positive, default=64, help="images per step")
    option("--rate", type=float, default=1e-3, help="learning rate of Adam")


def mnist_subset(args: argparse.Namespace) -> tuple[Data, dict[str, Any]]:
    """(The images where they are computed with, the settings of a trial that the options decide).

    The held-out images are the last ones of the training file.

    Raises:
        FileNotFoundError, ValueError: there is no folder, or it has not the images.
    """
    if args.mnist is None:
        raise ValueError("--mnist: expected the folder of MNIST's files, got none; pass it")
    images = load_images(args.mnist, args.train, args.test, str(args.device))
    names = ("train", "test", "batch_size", "rate", "epochs", "backend")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"device": str(args.device), "data": images.checksum}
    return Data(images.train, images.train_labels, images.test, images.test_labels), settings


def plan_twins(
    args: argparse.Namespace,
    kinds: Iterable[str],
    run: Callable[[Trial, Data, Checkpoint], Mapping[str, Any]],
) -> Plan:
    """For `carry_out`: one trial for each seed and kind, of which `run` also gets the images."""
    data, settings = mnist_subset(args)
    trials = [
        settings | {"kind": kind, "seed": seed}
        for seed in range(args.seed, args.seed + args.seeds)
        for kind in kinds
    ]
    return trials, lambda trial, checkpoint: run(trial, data, checkpoint)


def by_kind(stored: Runs, kinds: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """The results of each kind, the first seed in front."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for trial, result in sorted(stored, key=lambda run: run[0]["seed"]):
        found[trial["kind"]].append(result)
    return found


def train_classifier(
    network: nn.Module, data: Data, trial: Mapping[str, Any], checkpoint: Checkpoint, label: str
) -> tuple[list[float], float]:
    """Train on the classes, by Adam; the mean loss of each epoch, and the seconds they took."""

    def loss(batch: Tensor) -> Tensor:
        return F.cross_entropy(network(data.train_images[batch]), data.train_labels[batch])

    return train_by_adam(network, loss, trial, checkpoint, label)


def setting(trial: Mapping[str, Any], seeds: int) -> str:
    """What was trained, in a sentence for the summary."""
    epochs = f"{trial['epochs']} epoch{'s' * (trial['epochs'] > 1)}"
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    return (
        f"{trial['train']:,} images of MNIST, {epochs} of Adam at {trial['rate']:g}, batches of "
        f"{trial['batch_size']}; {trial['test']:,} held-out images; {spread}."
    )
