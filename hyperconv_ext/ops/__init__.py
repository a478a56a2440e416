"""The operators: schemas, fakes, autograd and autocast. Nothing else in the package registers any."""

from . import flops, sharding
from .convolution import basis_conv, form, resolve
from .coordinates import Windowed, taps_beside
from .execution import problem_of
from .hyper import Mlp, Step, hyper_conv, step, step_key
from .mlp import coordinate_mlp
from .registry import can_skip_dispatch, keep_operators

__all__ = [
    "Mlp",
    "Step",
    "Windowed",
    "basis_conv",
    "can_skip_dispatch",
    "coordinate_mlp",
    "flops",
    "form",
    "hyper_conv",
    "keep_operators",
    "problem_of",
    "resolve",
    "sharding",
    "step",
    "step_key",
    "taps_beside",
]
