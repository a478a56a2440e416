"""The hyper-network: coordinates of the taps -> basis functions phi, and its last-layer batch norm."""

from ..taps import COORDINATES, tap_coordinates
from .inspection import blank, floating_dtype, overwrite, without_numbers
from .mixing import BasisMixing
from .mlp import DEPENDENT, CoordinateMLP, MLPLayer, he_normal_
from .norm import TapBatchNorm
from .table import BasisTable

__all__ = [
    "COORDINATES",
    "DEPENDENT",
    "BasisMixing",
    "BasisTable",
    "CoordinateMLP",
    "MLPLayer",
    "TapBatchNorm",
    "blank",
    "floating_dtype",
    "he_normal_",
    "overwrite",
    "tap_coordinates",
    "without_numbers",
]
