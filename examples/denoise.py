"""A convolutional autoencoder that takes the noise out of MNIST, with ordinary and hyper-convolutions.

    python examples/denoise.py --mnist DIR             # DIR holds MNIST's idx .gz files
    python examples/denoise.py --mnist DIR --quick     # a first look
    python examples/denoise.py --report-only           # redraw from the stored runs

Two convolutions of stride 2 halve the image twice, two transposed ones double it again. The network sees
an image with Gaussian noise, new at every step, and learns the image without (Vincent, Larochelle,
Bengio, Manzagol: "Extracting and composing robust features with denoising autoencoders", ICML 2008). It
is trained at one deviation of the noise and tested at several, by the peak signal-to-noise ratio of the
held-out images, -10 log10 of the mean squared error. A killed run goes on where it was. OUT/summary.md
has the numbers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import Data
from digits import count_parameters
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
    train_by_adam,
    write_summary,
)
from hyperconv_ext import HyperConv2d, HyperConvTranspose2d
from mnist_subset import add_mnist_options, by_kind, plan_twins, setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMMAND = "python examples/denoise.py --mnist DIR"
QUICK: dict[str, Any] = {"seeds": 1, "epochs": 1, "train": 2000, "test": 500}
TRAINED = 0.5  # deviation of the noise in training; images are in [0, 1]
TESTED = (0.25, 0.5, 0.75, 1.0)
WIDTHS = (1, 16, 32)
FEATURES = 4
NOISE_SEED = 2008  # of the noise that all are tested with
SHOWN = 6  # held-out images


class Kind(NamedTuple):
    """Classes of layers, and their colour."""

    convolution: Callable[..., nn.Module]
    transposed: Callable[..., nn.Module]
    colour: str


KINDS = {
    "nn.Conv2d": Kind(nn.Conv2d, nn.ConvTranspose2d, ORDINARY),
    "HyperConv2d": Kind(HyperConv2d, HyperConvTranspose2d, HYPER),
}


def build_network(
    convolution: Callable[..., nn.Module], transposed: Callable[..., nn.Module]
) -> nn.Module:
    """The autoencoder, for images whose sides are multiples of 4.

    Without batch norms and with a sigmoid at the end, it may get stuck at an image that is all black.
    """
    one, few, many = WIDTHS
    return nn.Sequential(
        convolution(one, few, 5, stride=2, padding=2),
        nn.BatchNorm2d(few),
        nn.ReLU(),
        convolution(few, many, 5, stride=2, padding=2),
        nn.BatchNorm2d(many),
        nn.ReLU(),
        transposed(many, few, 6, stride=2, padding=2),
        nn.BatchNorm2d(few),
        nn.ReLU(),
        transposed(few, one, 6, stride=2, padding=2),
    )


def add_noise(images: Tensor, deviation: float, generator: torch.Generator | None = None) -> Tensor:
    """Images with white Gaussian noise, not clipped; drawn on the CPU, so on every device the same."""
    return images + deviation * torch.randn(images.shape, generator=generator).to(images.device)


def decibels(images: Tensor, clean: Tensor) -> float:
    """The peak signal-to-noise ratio of images `[N, 1, H, W]`, whose peak is 1."""
    return -10 * math.log10(F.mse_loss(images, clean).item())


@torch.no_grad()
def denoise(network: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """What the network makes of noisy images `[N, 1, H, W]`."""
    network.eval()
    return torch.cat([network(part) for part in images.split(batch_size)])


def run_trial(trial: Mapping[str, Any], data: Data, checkpoint: Checkpoint) -> dict[str, Any]:
    """Train the trial's autoencoder and test it at every deviation."""
    kind = KINDS[trial["kind"]]
    layers: Any = kind.convolution, kind.transposed
    if trial["kind"] == "HyperConv2d":
        options = {"num_features": FEATURES, "backend": trial["backend"]}
        layers = [partial(layer, **options) for layer in layers]
    torch.manual_seed(trial["seed"])
    network = build_network(*layers).to(data.train_images.device)

    def loss(batch: Tensor) -> Tensor:
        images = data.train_images[batch]
        return F.mse_loss(network(add_noise(images, TRAINED)), images)

    losses, seconds = train_by_adam(network, loss, trial, checkpoint, trial["kind"])
    clean = data.test_images
    noisy_ones = {deviation: add_noise(clean, deviation, _test_noise()) for deviation in TESTED}
    reached = {d: denoise(network, noisy, trial["batch_size"]) for d, noisy in noisy_ones.items()}
    return {
        "decibels": [decibels(reached[deviation], clean) for deviation in TESTED],
        "noisy": [decibels(noisy_ones[deviation], clean) for deviation in TESTED],
        "parameters": count_parameters([network]),
        "losses": losses,
        "seconds": seconds,
        "images": {
            "clean": _as_hex(clean),
            "noisy": _as_hex(noisy_ones[TRAINED]),
            "denoised": _as_hex(reached[TRAINED]),
        },
    }


def _test_noise() -> torch.Generator:
    return torch.Generator().manual_seed(NOISE_SEED)


def _as_hex(images: Tensor) -> list[str]:
    """The first images, to be drawn: a byte for each pixel."""
    pixels = (255 * images[:SHOWN, 0].clamp(0, 1)).round().to("cpu", torch.uint8)
    return [image.numpy().tobytes().hex() for image in pixels]


def _from_hex(image: str) -> np.ndarray:
    pixels = np.frombuffer(bytes.fromhex(image), np.uint8)
    return pixels.reshape(math.isqrt(len(pixels)), -1)


def write_report(stored: Runs, folder: Path) -> list[Path]:
    """The summary and the figures."""
    import matplotlib

    kinds = by_kind(stored, KINDS)
    with matplotlib.rc_context(STYLE):
        files = save_figure(draw_images(kinds), folder, "images")
        files += save_figure(draw_ratios(kinds), folder, "ratios")
    noisy = next(iter(kinds.values()))[0]["noisy"]
    rows = [["noisy images", "", *(f"{ratio:.2f}" for ratio in noisy)]]
    for kind, results in kinds.items():
        columns = zip(*(result["decibels"] for result in results), strict=True)
        cells = [mean_and_deviation(column, 2) for column in columns]
        rows.append([kind, f"{results[0]['parameters']:,}", *cells])
    header = ["layers", "parameters", *(f"deviation {deviation:g} [dB]" for deviation in TESTED)]
    trial, _ = next(iter(stored))
    seeds = len(next(iter(kinds.values())))
    text = (
        f"# An autoencoder against noise\n\n{setting(trial, seeds)} Trained at a deviation of the noise "
        f"of {TRAINED:g}; peak signal-to-noise ratio, more is better.\n\n{table(header, rows)}\n\n"
        f"![Held-out images, clean, noisy and denoised.](images.png)\n\n"
        f"![The signal-to-noise ratio against the noise.](ratios.png)"
    )
    return [write_summary(folder, text, COMMAND), *files]


def draw_images(kinds: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Held-out images, clean and noisy, and what each class's first seed makes of them."""
    from matplotlib.figure import Figure

    given = next(iter(kinds.values()))[0]["images"]
    rows = {"clean": given["clean"], f"noisy, {TRAINED:g}": given["noisy"]}
    rows |= {kind: results[0]["images"]["denoised"] for kind, results in kinds.items()}
    figure = Figure(figsize=(1.1 * SHOWN + 0.6, 1.1 * len(rows)), layout="constrained")
    for axes, (title, images) in zip(figure.subplots(len(rows), SHOWN), rows.items(), strict=True):
        axes[0].set_ylabel(title)
        for panel, image in zip(axes, images, strict=True):
            panel.imshow(_from_hex(image), cmap="gray", vmin=0, vmax=255)
            panel.set_xticks([])
            panel.set_yticks([])
    return figure


def draw_ratios(kinds: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """The ratio against the deviation of the noise, with a band over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    noisy = next(iter(kinds.values()))[0]["noisy"]
    axes.plot(TESTED, noisy, "s:", color="0.4", label="noisy images")
    for kind, results in kinds.items():
        curves = [result["decibels"] for result in results]
        plot_band(axes, TESTED, curves, marker="o", color=KINDS[kind].colour, label=kind)
    axes.axvline(TRAINED, color="0.7", linewidth=1, zorder=0)
    axes.annotate(
        "trained here",
        (TRAINED, axes.get_ylim()[0]),
        fontsize=7,
        xytext=(3, 3),
        textcoords="offset points",
    )
    axes.set_xticks(TESTED)
    axes.set_xlabel("standard deviation of the noise, of images in [0, 1]")
    axes.set_ylabel("peak signal-to-noise ratio [dB]")
    axes.legend()
    return figure


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Denoise MNIST by an autoencoder of ordinary and of hyper-convolutions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_mnist_options(parser, train=6_000, test=2_000)
    add_experiment_options(parser, "denoise", epochs=5, seeds=2)
    return parser


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run what is missing, write the report and return its files."""
    parser = build_parser()
    args = parse(parser, argv, QUICK)
    return carry_out(parser, args, lambda _: plan_twins(args, KINDS, run_trial), write_report)


if __name__ == "__main__":
    raise SystemExit(interruptible(main))
