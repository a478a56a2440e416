"""Functions of tensors, in one, two and three dimensions: checked, then handed to `ops`.

There is one implementation for any number of axes (`basis_conv`, `basis_conv_transpose`, `hyper_conv`,
`hyper_conv_transpose`); the functions with a dimension in their name differ in nothing else.
"""

from .basis import (
    basis_conv1d,
    basis_conv2d,
    basis_conv3d,
    basis_conv_transpose1d,
    basis_conv_transpose2d,
    basis_conv_transpose3d,
)
from .general import Kernel, basis_conv, basis_conv_transpose, convolve, hyper_conv, hyper_conv_transpose
from .hyper import (
    hyper_conv1d,
    hyper_conv2d,
    hyper_conv3d,
    hyper_conv_transpose1d,
    hyper_conv_transpose2d,
    hyper_conv_transpose3d,
)

__all__ = [
    "Kernel",
    "basis_conv",
    "basis_conv1d",
    "basis_conv2d",
    "basis_conv3d",
    "basis_conv_transpose",
    "basis_conv_transpose1d",
    "basis_conv_transpose2d",
    "basis_conv_transpose3d",
    "convolve",
    "hyper_conv",
    "hyper_conv1d",
    "hyper_conv2d",
    "hyper_conv3d",
    "hyper_conv_transpose",
    "hyper_conv_transpose1d",
    "hyper_conv_transpose2d",
    "hyper_conv_transpose3d",
]
