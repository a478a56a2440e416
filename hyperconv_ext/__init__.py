"""Convolutions whose kernel comes from a neural network, fused so that the kernel is never stored."""

from . import functional
from ._version import __version__
from .hypernet import CoordinateMLP
from .modules import HyperConv2d
from .planner import PlanError
from .report import explain

__all__ = [
    "CoordinateMLP",
    "HyperConv2d",
    "PlanError",
    "__version__",
    "explain",
    "functional",
]
