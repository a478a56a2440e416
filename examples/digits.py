"""Train a small CNN of HyperConv2d beside its nn.Conv2d twin on handwritten digits.

    python examples/digits.py                           # scikit-learn's 1,797 scans, nothing to download
    python examples/digits.py --mnist DIR --epochs 1    # DIR holds MNIST's four idx .gz files

The twins share architecture, data, batch order and optimiser; only the convolution class differs.
On the CPU a run is repeatable for a given seed and number of threads. scikit-learn's digits are split
75/25 by class, always in the same way; MNIST comes with its own held-out set.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import CLASSES, Data, add_run_options, load_mnist, positive, prepare
from hyperconv_ext import HyperConv2d

WIDTHS = (16, 32)
HELD_OUT = 0.25


@dataclass(frozen=True)
class Result:
    """What one twin reached, and at what cost."""

    accuracy: float
    conv_parameters: int
    parameters: int
    seconds: float


def load_digits() -> Data:
    """scikit-learn's 8x8 scans, a quarter of each class held out."""
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    train_images, test_images, train_labels, test_labels = model_selection.train_test_split(
        images,
        digits.target.astype(np.int64),
        test_size=HELD_OUT,
        stratify=digits.target,
        random_state=0,
    )
    arrays = (train_images, train_labels, test_images, test_labels)
    return Data(*map(torch.from_numpy, arrays))


def build_network(convolution: Callable[..., nn.Module], kernel_size: int) -> nn.Sequential:
    """Three convolutions of the given class, each normalised, on images of any size from 2x2."""
    first, second = WIDTHS

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        layer = convolution(inputs, outputs, kernel_size, padding="same", bias=False)
        return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, first),
        *block(first, second),
        nn.MaxPool2d(2),
        *block(second, second),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * second, CLASSES),
    )


def count_parameters(modules: Iterable[nn.Module]) -> int:
    """Numbers to learn in all of them."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def train(network: nn.Module, data: Data, args: argparse.Namespace, name: str) -> None:
    """AdamW with a one-cycle learning rate; the order of the images follows from the seed."""
    order = torch.Generator().manual_seed(args.seed)
    batches = -(-len(data.train_labels) // args.batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.lr, total_steps=args.epochs * batches
    )
    network.train()
    with tqdm(total=args.epochs * batches, desc=name, unit="step") as bar:
        for _ in range(args.epochs):
            shuffled = torch.randperm(len(data.train_labels), generator=order)
            for batch in shuffled.to(data.train_labels.device).split(args.batch_size):
                loss = F.cross_entropy(network(data.train_images[batch]), data.train_labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()


@torch.no_grad()
def accuracy(network: nn.Module, data: Data, batch_size: int) -> float:
    """The share of held-out images whose class is predicted."""
    network.eval()
    batches = zip(data.test_images.split(batch_size), data.test_labels.split(batch_size), strict=True)
    hits = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in batches)
    return hits / len(data.test_labels)


def run_twin(
    convolution: Callable[..., nn.Module], name: str, data: Data, args: argparse.Namespace
) -> Result:
    """Build, train and test one network; the seconds are those of training and testing."""
    torch.manual_seed(args.seed)
    network = build_network(convolution, args.kernel_size).to(args.device)
    start = time.perf_counter()
    train(network, data, args, name)
    reached = accuracy(network, data, args.batch_size)
    seconds = time.perf_counter() - start
    layers = [module for module in network if isinstance(module, nn.Conv2d | HyperConv2d)]
    return Result(reached, count_parameters(layers), count_parameters([network]), seconds)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train a CNN of HyperConv2d beside its nn.Conv2d twin on handwritten digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="folder of MNIST's four idx .gz files")
    parser.add_argument("--epochs", type=positive, default=30, help="passes over the training images")
    parser.add_argument("--batch-size", type=positive, default=32, help="images per step")
    parser.add_argument("--lr", type=float, default=0.02, help="peak learning rate")
    parser.add_argument("--kernel-size", type=positive, default=5, help="of every convolution")
    add_run_options(parser)
    return parser


def print_table(results: dict[str, Result]) -> None:
    """One row per twin."""
    header = ("convolution", "held-out", "conv parameters", "all parameters", "seconds")
    print("{:<12} {:>9} {:>16} {:>15} {:>8}".format(*header))
    for name, result in results.items():
        print("{:<12} {:>9.2%} {:>16,} {:>15,} {:>8.1f}".format(name, *astuple(result)))


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    """Train both twins, print the table and return it by convolution."""
    parser = build_parser()
    args = parser.parse_args(argv)
    prepare(args)
    try:
        data = load_mnist(args.mnist) if args.mnist else load_digits()
    except (OSError, ValueError) as error:
        parser.error(str(error))
    twins: dict[str, Callable[..., nn.Module]] = {
        "HyperConv2d": partial(HyperConv2d, backend=args.backend),
        "nn.Conv2d": nn.Conv2d,
    }
    data = data.to(args.device)
    results = {name: run_twin(convolution, name, data, args) for name, convolution in twins.items()}
    print_table(results)
    return results


if __name__ == "__main__":
    main()
