"""Do hyper-convolutions make a classifier robust against noise, or is it their weight normalisation?

    python examples/mnist_noise.py --mnist DIR            # hours; DIR holds MNIST's idx .gz files
    python examples/mnist_noise.py --mnist DIR --quick    # a minute or two, for a first look
    python examples/mnist_noise.py --report-only          # redraw from the stored runs

A residual network learns clean digits; its accuracy is then measured on held-out digits with more and
more salt-and-pepper or Gaussian noise. Network, optimiser and noise are those of M. Karmann's comparison
(github.com/mkarmann/hyper-conv), in which hyper-convolutions alone have a batch norm over the taps of
their kernels, and ordinary convolutions alone a bias. So there are controls:

- ordinary convolutions without the bias, and with the weight norm in its place;
- hyper-convolutions without the weight norm, as published otherwise and as this package makes them;
- ordinary convolutions whose kernels are smoothed after training, in case smooth kernels are enough.

Every run is appended to OUT/runs.jsonl once it is finished, and one that is there is not repeated; one
that was killed goes on behind its last finished epoch. All kinds come with the first seed, then with the
second, and so on.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from common import CLASSES, Images, load_images, positive
from experiments import (
    Checkpoint,
    Plan,
    add_experiment_options,
    carry_out,
    interruptible,
    parse,
    retake_averages,
    train_by_adam,
)
from hyperconv_ext import HyperConv2d, __version__
from mnist_noise_report import write_report

WIDTHS = (8, 16, 32, 64)
KERNEL = 5
FEATURES = 16
LEVELS = tuple(step / 19 for step in range(20))
SMOOTHED = {"smooth-0.5": 0.5, "smooth-1": 1.0}  # deviation of the Gaussian, in taps
EVALUATED = 500  # images at once
# What `--quick` sets unless the command line does.
QUICK: dict[str, Any] = {
    "seeds": 1,
    "train": 2000,
    "test": 500,
    "noisy": 100,
    "batch_size": 16,
}


def hyper(
    width: int, backend: str, weight_norm: str | None, parametrization: str = "published"
) -> HyperConv2d:
    """The published layer: features of a leaky ReLU, a norm over the taps in the place of a bias."""
    return HyperConv2d(
        width,
        width,
        KERNEL,
        padding="same",
        bias=False,
        num_features=FEATURES,
        weight_norm=weight_norm,
        backend=backend,
        parametrization=parametrization,
    )


class TapNorm(nn.Module):
    """A hyper-convolution's weight norm for nn.Conv2d's kernels: a batch norm over the taps of each."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(*shape[:2], 1, 1))
        self.shift = nn.Parameter(torch.zeros(*shape[:2], 1, 1))

    def forward(self, kernels: Tensor) -> Tensor:
        """`[out, in, height, width]` of the same."""
        return self.scale * F.layer_norm(kernels, kernels.shape[2:]) + self.shift


def ordinary(width: int, bias: bool, weight_norm: bool = False) -> nn.Conv2d:
    """Its twin."""
    layer = nn.Conv2d(width, width, KERNEL, padding="same", bias=bias)
    if weight_norm:
        parametrize.register_parametrization(layer, "weight", TapNorm(layer.weight.shape))
    return layer


# A convolution of a residual block, given its channels and a backend.
KINDS: Mapping[str, Callable[[int, str], nn.Module]] = {
    "conv": lambda width, backend: ordinary(width, bias=True),
    "hyper": lambda width, backend: hyper(width, backend, "batch"),
    "hyper-no-norm": lambda width, backend: hyper(width, backend, None),
    "hyper-default": lambda width, backend: hyper(width, backend, None, "orthonormal"),
    "conv-no-bias": lambda width, backend: ordinary(width, bias=False),
    "conv-norm": lambda width, backend: ordinary(width, bias=False, weight_norm=True),
}


class Block(nn.Module):
    """x + two convolutions of x, each behind a batch norm and a ReLU (He et al., ECCV 2016)."""

    def __init__(self, width: int, convolution: Callable[[int], nn.Module]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.BatchNorm2d(width), nn.ReLU(), convolution(width)]
        self.main = nn.Sequential(*layers)

    def forward(self, input: Tensor) -> Tensor:
        """`[B, width, H, W]` of the same."""
        return input + self.main(input)


def build_network(kind: str, backend: str) -> nn.Sequential:
    """The network of a kind."""
    return residual_network(lambda width: KINDS[kind](width, backend))


def residual_network(convolution: Callable[[int], nn.Module]) -> nn.Sequential:
    """Four stages of two blocks, each of half the side and twice as wide, for images `[B, 1, H, W]`.

    As in the published one, the third stage alone ends without a norm and a ReLU. The last pooling
    leaves one pixel, of MNIST's 28 by 28 as of any size from 8 on.

    Args:
        convolution: one from so many channels to as many, which keeps the size of its input.
    """
    layers: list[nn.Module] = [nn.Conv2d(1, WIDTHS[0], 1)]
    for width in WIDTHS:
        layers += [Block(width, convolution), Block(width, convolution)]
        if width != WIDTHS[2]:
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
        if width != WIDTHS[-1]:
            layers += [nn.Conv2d(width, 2 * width, 1, bias=False), nn.MaxPool2d(2)]
    pool = nn.AdaptiveMaxPool2d(1)
    return nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(WIDTHS[-1], CLASSES))


def salt_and_pepper(images: Tensor, amount: float, random: torch.Generator) -> Tensor:
    """This share of the pixels is replaced, by black or white alike."""
    replaced = torch.rand(images.shape, generator=random) < amount
    white = torch.rand(images.shape, generator=random) < 0.5
    return torch.where(replaced.to(images.device), white.to(images), images)


def gaussian(images: Tensor, deviation: float, random: torch.Generator) -> Tensor:
    """Added, and cut to [0, 1]."""
    noise = torch.randn(images.shape, generator=random).to(images)
    return (images + deviation * noise).clamp(0, 1)


NOISES = {"salt-and-pepper": salt_and_pepper, "gaussian": gaussian}


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of the images whose class is predicted."""
    network.eval()
    parts = zip(images.split(EVALUATED), labels.split(EVALUATED), strict=True)
    hits = sum(int((network(part).argmax(1) == right).sum()) for part, right in parts)
    return hits / len(labels)


def robustness(network: nn.Module, images: Images, noisy: int, label: str) -> dict[str, Any]:
    """The accuracy on all held-out images, and on the first `noisy` of them at each level of each noise.

    All networks see the same noise.
    """
    curves: dict[str, Any] = {"clean": accuracy(network, images.test, images.test_labels)}
    some, labels = images.test[:noisy], images.test_labels[:noisy]
    with tqdm(desc=label, total=len(NOISES) * len(LEVELS), unit="level") as bar:
        for seed, (name, add) in enumerate(NOISES.items()):
            random = torch.Generator().manual_seed(seed)
            curves[name] = []
            for level in LEVELS:
                curves[name].append(accuracy(network, add(some, level, random), labels))
                bar.update()
    return curves


@torch.no_grad()
def smooth(network: nn.Module, deviation: float, images: Tensor) -> nn.Module:
    """A copy whose wide kernels are blurred by a Gaussian over their taps, as if the outermost went on.

    The batch norms' averages are taken again from `images`.
    """
    smoothed = copy.deepcopy(network)
    reach = torch.arange(-2, 3, device=images.device)
    profile = torch.exp(-0.5 * (reach / deviation) ** 2)
    profile = profile / profile.sum()
    blur = torch.outer(profile, profile)[None, None]
    for layer in smoothed.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            kernels = layer.weight.flatten(0, 1)[:, None]
            blurred = F.conv2d(F.pad(kernels, (2, 2, 2, 2), mode="replicate"), blur)
            layer.weight.copy_(blurred.view_as(layer.weight))
    return retake_averages(smoothed, images.split(EVALUATED))


def run_trial(trial: Mapping[str, Any], images: Images, checkpoint: Checkpoint) -> dict[str, Any]:
    """Train a network and measure it, and if it is the ordinary one, what smoothing makes of it."""
    torch.manual_seed(trial["seed"])
    network = build_network(trial["kind"], trial["backend"]).to(images.train.device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(batch: Tensor) -> Tensor:
        return F.cross_entropy(network(images.train[batch]), images.train_labels[batch])

    label = f"{trial['kind']}, seed {trial['seed']}"
    losses, seconds = train_by_adam(network, loss, trial, checkpoint, label)
    start = time.perf_counter()
    curves = {trial["kind"]: robustness(network, images, trial["noisy"], label)}
    if trial["kind"] == "conv":
        for name, deviation in SMOOTHED.items():
            smoothed = smooth(network, deviation, images.train[:2000])
            curves[name] = robustness(smoothed, images, trial["noisy"], f"{name}, seed {trial['seed']}")
    seconds += time.perf_counter() - start
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"curves": curves, "losses": losses, "parameters": parameters, "seconds": round(seconds, 1)}


def plan(args: argparse.Namespace) -> Plan:
    """Everything that decides a run; all kinds with a seed before the next seed.

    Raises:
        FileNotFoundError, ValueError: from `load_images`.
    """
    images = load_images(args.mnist, args.train, args.test, str(args.device))
    fixed = {
        "epochs": args.epochs,
        "train": args.train,
        "test": args.test,
        "noisy": args.noisy,
        "batch_size": args.batch_size,
        "rate": args.rate,
        "decay": 1e-6,
        "falling": True,
        "data": images.checksum,
        "device": str(args.device),
        "backend": args.backend,
        "version": __version__,
    }
    seeds = range(args.seed, args.seed + args.seeds)
    trials = [{"kind": kind, "seed": seed, **fixed} for seed in seeds for kind in args.kinds]
    return trials, lambda trial, checkpoint: run_trial(trial, images, checkpoint)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Accuracy under noise of hyper-convolutions, ordinary ones, and their controls.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--mnist", type=Path, metavar="DIR", help="folder of MNIST's four idx .gz files")
    option("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS), help="networks to train")
    option("--train", type=positive, default=55_000, help="training images")
    option("--test", type=positive, default=5_000, help="held-out images")
    option("--noisy", type=positive, default=1_000, help="of these, at every level of noise")
    option("--batch-size", type=positive, default=64, help="images per step")
    option("--rate", type=float, default=1e-3, help="learning rate of Adam, falls to 0")
    add_experiment_options(parser, "noise", epochs=1)
    return parser


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run what is missing, write the report and return its files."""
    parser = build_parser()
    args = parse(parser, argv, QUICK)
    if not args.report_only and args.mnist is None:
        parser.error("--mnist: expected the folder of MNIST's files, got none; or --report-only")
    if args.noisy > args.test:
        parser.error(f"--noisy: expected at most the {args.test} held-out images, got {args.noisy}")
    return carry_out(
        parser,
        args,
        plan,
        lambda runs, folder: write_report(list(runs), LEVELS, folder, args.quick),
    )


if __name__ == "__main__":
    raise SystemExit(interruptible(main))
