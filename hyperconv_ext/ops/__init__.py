"""The operators: schemas, fakes, autograd and autocast. Nothing else in the package registers any."""

from .convolution import basis_conv, form, problem_of
from .hyper import Mlp, hyper_conv
from .mlp import coordinate_mlp

__all__ = ["Mlp", "basis_conv", "coordinate_mlp", "form", "hyper_conv", "problem_of"]
