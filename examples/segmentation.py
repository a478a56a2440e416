"""Synthetic lesions and the U-Net that finds them, for `lesions.py`, `large_kernels.py`, `resize.py`.

A lesion is a soft ellipse, or ellipsoid, of random place, size and contrast. The background is smooth
waves, tubes as bright and as thick as lesions, which only their shape tells from one, and white noise.

The network is the U-Net of Ma et al. (WACV 2022, arXiv 2105.10559), smaller and without dropout: two
convolutions a level, each with a batch norm and a ReLU behind it, max-pooling, upsampling by repetition;
soft Dice loss and Adam.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import Checkpoint, Trial, train_by_adam
from hyperconv_ext import HyperConv2d, HyperConv3d

CONV = "conv"
KINDS = {
    CONV: "nn.ConvNd",
    "hyper": "HyperConvNd",
    "published": "HyperConvNd, published form",
    "both": "HyperConvNd and nn.ConvNd of 3",
}
WIDTHS = (4, 8, 16)  # channels of the levels; between two of them the image is halved
SHRINKAGE = 2 ** (len(WIDTHS) - 1)  # of the image, from the first level to the last
EVALUATED = 32  # images at once

_LAYERS: dict[int, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    2: (nn.Conv2d, HyperConv2d),
    3: (nn.Conv3d, HyperConv3d),
}
_NORMS = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_POOLINGS = {2: nn.MaxPool2d, 3: nn.MaxPool3d}


@dataclass(frozen=True)
class Lesions:
    """Images and masks `[count, 1, *S]`, float32: of mean 0 and deviation 1 each, and 0 or 1."""

    images: Tensor
    masks: Tensor

    def to(self, device: torch.device | str) -> Lesions:
        """The same there."""
        return Lesions(self.images.to(device), self.masks.to(device))


def make_lesions(count: int, side: int, dims: int, seed: int) -> Lesions:
    """`count` images or volumes, `side` pixels along each of `dims` axes; the seed decides them all."""
    generator = torch.Generator().manual_seed(seed)
    line = torch.arange(side, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(*[line] * dims, indexing="ij"), -1)  # [*S, dims]
    drawn = [_draw_image(grid, side, generator) for _ in range(count)]
    images, masks = (torch.stack(parts)[:, None] for parts in zip(*drawn, strict=True))
    axes = tuple(range(1, dims + 2))
    centred = images - images.mean(axes, keepdim=True)
    return Lesions(centred / centred.std(axes, keepdim=True), masks)


def _draw_image(grid: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One image and its mask, `[*S]` both; `grid` `[*S, D]` holds the coordinates of the pixels."""
    dims = grid.shape[-1]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    def direction() -> Tensor:
        return F.normalize(torch.randn(dims, generator=generator), dim=0)

    def count(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    thickest = side / 6
    image = 0.2 * torch.randn(grid.shape[:-1], generator=generator)
    for _ in range(4):
        wavelength = uniform(side / 4, 2 * side)
        phase = uniform(0, 2 * math.pi)
        image += 0.3 * torch.cos(2 * math.pi / wavelength * (grid @ direction()) + phase)
    for _ in range(count(1, 2)):
        along, across = direction(), direction()
        offsets = grid - uniform(0, side, dims)
        way = offsets @ along
        bend = uniform(0, side / 8) * torch.sin(2 * math.pi / uniform(side / 2, 2 * side) * way)
        distances = (offsets - way[..., None] * along - bend[..., None] * across).norm(dim=-1)
        radius = torch.exp(uniform(math.log(2), math.log(thickest)))
        image += uniform(0.8, 2) * _profile(distances / radius)
    mask = torch.zeros(grid.shape[:-1], dtype=torch.bool)
    for _ in range(count(1, 3)):
        radii = torch.exp(uniform(math.log(2), math.log(thickest))) * uniform(0.75, 1.33, dims)
        distances = ((grid - uniform(0.1 * side, 0.9 * side, dims)) / radii).norm(dim=-1)
        image += uniform(0.8, 2) * _profile(distances)
        mask |= distances < 1
    return image, mask.float()


def _profile(distances: Tensor) -> Tensor:
    """Of a lesion, or across a tube: 1 in the middle, a half at distance 1, which is its edge."""
    return torch.exp(-math.log(2) * distances.square())


class WideAndNarrow(nn.Module):
    """The sum of a hyper-convolution, wide and smooth, and an ordinary one of three taps an axis."""

    def __init__(self, wide: nn.Module, narrow: nn.Module) -> None:
        super().__init__()
        self.wide = wide
        self.narrow = narrow

    def forward(self, input: Tensor) -> Tensor:
        """As both do."""
        return self.wide(input) + self.narrow(input)


def make_layer(trial: Trial, inputs: int, outputs: int) -> nn.Module:
    """A convolution of the trial's kind, which keeps the size of its input and has no bias.

    Where N is large the hyper-network is at least as wide, since N functions of fewer hidden units would
    depend on each other. `coordinates` is the layer's own where the trial does not name it.
    """
    plain, hyper = _LAYERS[trial["dims"]]
    kind, kernel_size, features = trial["kind"], trial["kernel_size"], trial["features"]
    if kind == CONV:
        return plain(inputs, outputs, kernel_size, padding="same", bias=False)
    wide = hyper(
        inputs,
        outputs,
        kernel_size,
        padding="same",
        bias=False,
        num_features=features,
        hidden_features=(max(16, features),) * 2,
        parametrization="published" if kind == "published" else "orthonormal",
        coordinates=trial.get("coordinates"),
        backend=trial["backend"],
    )
    if kind != "both":
        return wide
    return WideAndNarrow(wide, plain(inputs, outputs, 3, padding="same", bias=False))


class UNet(nn.Module):
    """Logits `[B, 1, *S]` of images `[B, 1, *S]`, whose sides are multiples of `SHRINKAGE`."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        dims = trial["dims"]

        def block(inputs: int, outputs: int) -> nn.Sequential:
            modules: list[nn.Module] = []
            for first in (inputs, outputs):
                modules += [make_layer(trial, first, outputs), _NORMS[dims](outputs), nn.ReLU()]
            return nn.Sequential(*modules)

        self.down = nn.ModuleList(block(*pair) for pair in itertools.pairwise((1, *WIDTHS)))
        pairs = itertools.pairwise(reversed(WIDTHS))
        self.up = nn.ModuleList(block(below + here, here) for below, here in pairs)
        self.pool = _POOLINGS[dims](2)
        head: Any = _LAYERS[dims][0](WIDTHS[0], 1, 1)
        # Inputs are not negative: with negative weights alone no logit exceeds the bias, which falls.
        while (head.weight < 0).all():
            head.reset_parameters()
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        skipped: list[Tensor] = []
        x = images
        for block in self.down:
            x = block(self.pool(x) if skipped else x)
            skipped.append(x)
        skipped.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2), skipped.pop()], 1))
        return self.head(x)


def soft_dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - (2 sum p y + 1) / (sum p^2 + sum y^2 + 1) over the batch (Milletari et al., 3DV 2016)."""
    probabilities = logits.sigmoid()
    overlap = 2 * (probabilities * masks).sum() + 1
    return 1 - overlap / (probabilities.square().sum() + masks.square().sum() + 1)


@torch.no_grad()
def dice(network: nn.Module, data: Lesions) -> float:
    """2 |P and Y| / (|P| + |Y|), P the pixels of probability above a half; the mean over images."""
    network.eval()
    found = torch.cat([network(images) > 0 for images in data.images.split(EVALUATED)]).flatten(1)
    masks = data.masks.flatten(1).bool()
    overlaps = 2 * (found & masks).sum(1) / (found.sum(1) + masks.sum(1))
    return float(overlaps.mean())


@lru_cache(maxsize=1)
def load_lesions(train: int, test: int, side: int, dims: int, device: str) -> tuple[Lesions, Lesions]:
    """The images to learn from and those held out: the same for all seeds of a network."""
    parts = (make_lesions(count, side, dims, seed) for seed, count in enumerate((train, test)))
    first, second = (part.to(device) for part in parts)
    return first, second


def train_unet(trial: Trial, checkpoint: Checkpoint) -> tuple[UNet, dict[str, Any]]:
    """The trained network and the run's result."""
    learnt, held_out = load_lesions(
        *(trial[name] for name in ("train", "test", "side", "dims", "device"))
    )
    torch.manual_seed(trial["seed"])
    network = UNet(trial).to(trial["device"])

    def loss(batch: Tensor) -> Tensor:
        return soft_dice_loss(network(learnt.images[batch]), learnt.masks[batch])

    result = learn(trial, network, loss, checkpoint)
    return network, {"dice": dice(network, held_out), **result}


def learn(
    trial: Trial, network: nn.Module, loss: Callable[[Tensor], Tensor], checkpoint: Checkpoint
) -> dict[str, Any]:
    """Minimise `loss`, as `experiments.train` takes it; what every run stores beside its score."""
    losses, seconds = train_by_adam(network, loss, trial, checkpoint, describe(trial))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"losses": losses, "parameters": parameters, "seconds": round(seconds, 1)}


def unet_step(trial: Trial) -> Callable[[], None]:
    """A step of the U-Net's training on random images, for measuring what it costs."""
    torch.manual_seed(trial["seed"])
    network = UNet(trial).to(trial["device"])
    shape = (trial["batch_size"], 1, *[trial["side"]] * trial["dims"])
    images = torch.randn(shape, device=trial["device"])
    return adam_step(trial, network, lambda: soft_dice_loss(network(images), (images > 1).float()))


def adam_step(trial: Trial, network: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """One step that minimises `loss`."""
    optimizer = torch.optim.Adam(network.parameters(), lr=trial["rate"])

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def describe(trial: Trial) -> str:
    """For a progress bar."""
    features = "" if trial["features"] is None else f", N = {trial['features']}"
    shape = f"{trial['dims']}-D, {trial['kind']}, k = {trial['kernel_size']}{features}"
    return f"{shape}, seed {trial['seed']}"
