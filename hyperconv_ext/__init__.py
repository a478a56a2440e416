"""Convolutions whose kernel comes from a neural network, fused so that the kernel is never stored."""

from . import functional
from .hypernet import CoordinateMLP
from .modules import HyperConv2d

__version__ = "0.1.0"

__all__ = ["CoordinateMLP", "HyperConv2d", "functional"]
