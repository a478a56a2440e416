"""Layers: nn.ConvNd's arguments in nn.ConvNd's order, then the hyper-network's."""

from .base import HyperConvNd
from .layers import (
    HyperConv1d,
    HyperConv2d,
    HyperConv3d,
    HyperConvTranspose1d,
    HyperConvTranspose2d,
    HyperConvTranspose3d,
)
from .lazy import (
    LazyHyperConv1d,
    LazyHyperConv2d,
    LazyHyperConv3d,
    LazyHyperConvTranspose1d,
    LazyHyperConvTranspose2d,
    LazyHyperConvTranspose3d,
)
from .weight import ComputedWeight, ReadOnlyWeightError

__all__ = [
    "ComputedWeight",
    "HyperConv1d",
    "HyperConv2d",
    "HyperConv3d",
    "HyperConvNd",
    "HyperConvTranspose1d",
    "HyperConvTranspose2d",
    "HyperConvTranspose3d",
    "LazyHyperConv1d",
    "LazyHyperConv2d",
    "LazyHyperConv3d",
    "LazyHyperConvTranspose1d",
    "LazyHyperConvTranspose2d",
    "LazyHyperConvTranspose3d",
    "ReadOnlyWeightError",
]
