"""Convolutions whose kernel comes from a neural network, fused so that the kernel is never stored."""

from . import functional
from ._version import __version__
from .conversion import convert, materialize
from .fitting import FitResult
from .hypernet import BasisTable, CoordinateMLP
from .modules import (
    HyperConv1d,
    HyperConv2d,
    HyperConv3d,
    HyperConvTranspose1d,
    HyperConvTranspose2d,
    HyperConvTranspose3d,
    LazyHyperConv1d,
    LazyHyperConv2d,
    LazyHyperConv3d,
    LazyHyperConvTranspose1d,
    LazyHyperConvTranspose2d,
    LazyHyperConvTranspose3d,
)
from .ops import keep_operators
from .optim import parameter_groups
from .planner import PlanError
from .plotting import plot_basis, plot_kernels
from .report import explain

__all__ = [
    "BasisTable",
    "CoordinateMLP",
    "FitResult",
    "HyperConv1d",
    "HyperConv2d",
    "HyperConv3d",
    "HyperConvTranspose1d",
    "HyperConvTranspose2d",
    "HyperConvTranspose3d",
    "LazyHyperConv1d",
    "LazyHyperConv2d",
    "LazyHyperConv3d",
    "LazyHyperConvTranspose1d",
    "LazyHyperConvTranspose2d",
    "LazyHyperConvTranspose3d",
    "PlanError",
    "__version__",
    "convert",
    "explain",
    "functional",
    "keep_operators",
    "materialize",
    "parameter_groups",
    "plot_basis",
    "plot_kernels",
]
