"""One run of `learning.py`: a task, a layer and a recipe in, the score and the loss curve out."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import CLASSES, Images, load_images
from hyperconv_ext import HyperConv2d, __version__

PROTOCOL = 3  # of this file: counts up when the same settings would give other results
TWIN = "conv"
MOMENTUM = 0.9
WIDTHS = (1, 16, 32, 32, 32)
POOLED = 2  # convolutions that a pooling follows
# The bank to recover, and the images of noise that a step sees.
BANK_CHANNELS = 8
BANK_KERNEL = 7
BANK_SIDE = 20
CURVE_POINTS = 32
EVALUATED = 500  # images at once


@dataclass(frozen=True)
class Kind:
    """A class of layer and what it gets besides the arguments of `nn.Conv2d`."""

    label: str
    layer: Callable[..., nn.Module]
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


KINDS = {
    TWIN: Kind("nn.Conv2d", nn.Conv2d),
    "default": Kind("HyperConv2d, defaults", HyperConv2d),
    "narrow": Kind("HyperConv2d, N = 4", HyperConv2d, MappingProxyType({"num_features": 4})),
    "wide": Kind("HyperConv2d, N = 8", HyperConv2d, MappingProxyType({"num_features": 8})),
    "published": Kind(
        "HyperConv2d, published", HyperConv2d, MappingProxyType({"parametrization": "published"})
    ),
    "published-norm": Kind(
        "HyperConv2d, published, weight norm",
        HyperConv2d,
        MappingProxyType({"parametrization": "published", "weight_norm": "batch"}),
    ),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=MOMENTUM),
    "adam": torch.optim.Adam,
}
NORMS = ("none", "batch")
TASKS = ("regression", "mnist")


@dataclass(frozen=True)
class Trial:
    """Everything that decides a run, and so the key under which its result is kept.

    The first fields are the axes of the grid, the others are the same for all trials of a task.

    Args:
        features: N of the hyper-network; None is the layer's default, or a layer that has none.
        train, test: numbers of images, 0 in the regression, whose images are noise drawn anew each step.
        data: checksum of these images, empty in the regression.
    """

    task: str
    kind: str
    norm: str
    optimizer: str
    kernel_size: int
    features: int | None
    rate: float
    seed: int
    steps: int
    batch_size: int
    train: int
    test: int
    data: str
    device: str
    backend: str
    version: str = __version__
    protocol: int = PROTOCOL


AXES = ("kind", "norm", "optimizer", "kernel_size", "features", "rate", "seed")
FIXED = tuple(entry.name for entry in fields(Trial) if entry.name not in AXES)


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Args:
        score: accuracy on held-out images, or squared error of the bank relative to its own square; None
            where it is not finite.
        bound: the least error at the layer's rank, 0 where it is full; None for MNIST.
        diverged: a loss was not finite, where the run ended, or a parameter is not in the end.
        steps, losses: the mean loss of the steps up to each of these, since the one before.
        seconds: of training and scoring.
    """

    score: float | None
    bound: float | None
    diverged: bool
    steps: list[int]
    losses: list[float]
    seconds: float


def widest_kernel(side: int) -> int:
    """The largest kernel with 'same' padding each of whose taps meets an image of this side."""
    return 2 * side - 1


def make_layer(trial: Trial, inputs: int, outputs: int, kernel_size: int, **arguments: Any) -> nn.Module:
    """A layer of the trial's kind.

    Where N is given the hyper-network is at least as wide, since N functions of fewer hidden units
    would depend on each other.
    """
    kind = KINDS[trial.kind]
    own: dict[str, Any] = dict(kind.arguments)
    if kind.layer is HyperConv2d:
        own["backend"] = trial.backend
        if trial.features is not None:
            own |= {"num_features": trial.features, "hidden_features": (max(16, trial.features),) * 2}
    return kind.layer(inputs, outputs, kernel_size, **arguments, **own)


def build_network(trial: Trial, side: int) -> nn.Sequential:
    """Four convolutions, each on an image half as large as long as there is a pooling before it.

    A kernel wider than its image can meet is cut to `widest_kernel`.
    """
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(WIDTHS)):
        kernel_size = min(trial.kernel_size, widest_kernel(side))
        layers.append(make_layer(trial, inputs, outputs, kernel_size, padding="same"))
        if trial.norm == "batch":
            layers.append(nn.BatchNorm2d(outputs))
        layers.append(nn.ReLU())
        if index < POOLED:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], CLASSES))
    return nn.Sequential(*layers, *head)


def run_trial(trial: Trial, folder: Path | None) -> Result:
    """The result of `trial`; `folder` holds MNIST's files where that is the task."""
    if trial.task == "regression":
        return _recover_bank(trial)
    if folder is None:
        raise ValueError(f"folder: expected that of MNIST's files for task {trial.task!r}, got None")
    return _learn_digits(trial, load_images(folder, trial.train, trial.test, trial.device))


def _learn_digits(trial: Trial, images: Images) -> Result:
    start = time.perf_counter()
    torch.manual_seed(trial.seed)
    network = build_network(trial, images.train.shape[-1]).to(trial.device)
    order = torch.Generator().manual_seed(trial.seed)

    def batches() -> Iterator[Tensor]:
        while True:
            shuffled = torch.randperm(trial.train, generator=order).to(trial.device)
            yield from shuffled.split(trial.batch_size)

    def loss(batch: Tensor) -> Tensor:
        return F.cross_entropy(network(images.train[batch]), images.train_labels[batch])

    curve = _train(trial, network, map(loss, batches()))
    network.eval()
    with torch.no_grad():
        parts = zip(images.test.split(EVALUATED), images.test_labels.split(EVALUATED), strict=True)
        hits = sum(int((network(part).argmax(1) == labels).sum()) for part, labels in parts)
    return _result(hits / trial.test, None, curve, trial, start)


def _recover_bank(trial: Trial) -> Result:
    """Learn a filter bank of white kernels from its answers to white noise.

    An output's expected square is 1, so that the expected loss is the squared error of the weights
    relative to the bank's square; the score is taken from the weights.
    """
    start = time.perf_counter()
    torch.manual_seed(trial.seed)
    shape = (BANK_CHANNELS, BANK_CHANNELS, trial.kernel_size, trial.kernel_size)
    bank = torch.randn(shape)
    bank = (bank * math.sqrt(BANK_CHANNELS) / bank.norm()).to(trial.device)
    sizes = (BANK_CHANNELS, BANK_CHANNELS, trial.kernel_size)
    layer = make_layer(trial, *sizes, bias=False).to(trial.device)
    noise = torch.Generator(trial.device).manual_seed(trial.seed)
    size = (trial.batch_size, BANK_CHANNELS, BANK_SIDE, BANK_SIDE)

    def losses() -> Iterator[Tensor]:
        while True:
            input = torch.randn(size, generator=noise, device=trial.device)
            yield F.mse_loss(layer(input), F.conv2d(input, bank))

    curve = _train(trial, layer, losses())
    layer.eval()
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a tensor, got {type(weight).__name__}")
    error = float((weight.detach() - bank).square().sum() / bank.square().sum())
    rank = layer.basis().shape[0] if isinstance(layer, HyperConv2d) else None
    return _result(error, least_error(bank, rank), curve, trial, start)


def least_error(bank: Tensor, rank: int | None) -> float:
    """The least squared error, relative to `bank`'s square, of a bank `[o, i, k, k]` of this rank.

    The rank is that of the matrix of all kernels over all taps, `[o * i, k * k]`; None is any.
    """
    energies = torch.linalg.svdvals(bank.flatten(2).flatten(0, 1).double()).square()
    return 0.0 if rank is None else float(energies[rank:].sum() / energies.sum())


Curve = tuple[list[int], list[float], bool]


def _train(trial: Trial, network: nn.Module, losses: Iterator[Tensor]) -> Curve:
    """(steps, mean losses up to each, whether it diverged); the loss is read at these steps alone.

    The rate falls to 0 along a cosine (Loshchilov and Hutter, ICLR 2017): what is compared in the end
    is what was learned, not the noise of the last step, nor how far batch norm's averages lag behind.
    """
    optimizer = OPTIMIZERS[trial.optimizer](network.parameters(), lr=trial.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, trial.steps)
    points = min(CURVE_POINTS, trial.steps)
    ends = [-(-trial.steps * point // points) for point in range(1, points + 1)]
    means: list[float] = []
    network.train()
    for length in (end - begin for begin, end in itertools.pairwise((0, *ends))):
        total = torch.zeros((), device=trial.device)
        for loss in itertools.islice(losses, length):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        mean = float(total) / length
        if not math.isfinite(mean):
            return ends[: len(means)], means, True
        means.append(mean)
    return ends, means, not all(bool(parameter.isfinite().all()) for parameter in network.parameters())


def _result(score: float, bound: float | None, curve: Curve, trial: Trial, start: float) -> Result:
    steps, losses, diverged = curve
    seconds = round(time.perf_counter() - start, 2)
    rounded = [float(f"{loss:.5g}") for loss in losses]
    return Result(score if math.isfinite(score) else None, bound, diverged, steps, rounded, seconds)
