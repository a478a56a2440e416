"""Free basis functions: a table in the place of the MLP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_dtype, integer, per_axis
from ..taps import tap_coordinates
from .inspection import overwrite


class BasisTable(nn.Module):
    """Features `[K, N]` that are parameters themselves: one number for each tap of one kernel size.

    As a layer's `hypernet=` it lets W be any kernel of rank R over its taps, without a prior of
    smoothness (Qiu et al., "DCFNet: Deep Neural Network with Decomposed Convolutional Filters", ICML
    2018). `from_conv(conv, hypernet=BasisTable(...))` holds the best kernels of that rank, by
    the singular value decomposition; with as many functions as taps it holds any.

    Args:
        kernel_size: of the layer, one integer per axis.
        num_features: N. The constant function of a layer with `weight_bias` is not among them.

    Attributes:
        table: Parameter `[K, N]`, rows in the order of the taps (row-major).

    Raises:
        TypeError, ValueError: a size is not a positive integer.
    """

    def __init__(
        self,
        kernel_size: Sequence[int],
        num_features: int = 4,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_dtype("dtype", dtype)
        if not isinstance(kernel_size, Sequence):
            raise TypeError(
                f"kernel_size: expected one integer per axis, got {kernel_size!r}; pass a tuple, as "
                f"(7, 7) for kernel_size=7 in two dimensions"
            )
        self.kernel_size = per_axis("kernel_size", kernel_size, len(kernel_size), 1)
        shape = (math.prod(self.kernel_size), integer("num_features", num_features, 1))
        self.table = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def num_features(self) -> int:
        """N, the number of functions."""
        return self.table.shape[1]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw functions that are orthogonal, as far as there are taps, with a mean square of 1."""
        drawn = torch.empty_like(self.table, dtype=torch.float32)
        nn.init.orthogonal_(drawn, gain=math.sqrt(max(drawn.shape)))
        overwrite(self, "table", drawn.to(self.table.dtype))

    @torch.no_grad()
    def hold(self, functions: Tensor) -> None:
        """Become these functions `[K, N]`, orthonormal over the taps, with a mean square of 1."""
        scaled = functions * math.sqrt(functions.shape[0])
        overwrite(self, "table", scaled.to(self.table))

    def forward(self, coordinates: Tensor) -> Tensor:
        """The table, in float32 at least, for the coordinates `[K, D]` of its taps.

        Raises:
            ValueError: they are of other taps than the table has.
        """
        expected = (self.table.shape[0], len(self.kernel_size))
        if coordinates.shape != expected:
            raise ValueError(
                f"hypernet: expected coordinates {list(expected)} of the taps of BasisTable("
                f"{self.kernel_size}), got {list(coordinates.shape)}; make one for the kernel size of "
                f"the layer"
            )
        return self.table.to(torch.promote_types(self.table.dtype, torch.float32))

    @torch.no_grad()
    def resample(self, kernel_size: Sequence[int], coordinates: str, spacing: Sequence[float]) -> None:
        """Become the same functions on another grid of taps, linear between those of the present one.

        Args:
            kernel_size: of the new grid.
            coordinates: of the layer: by `'unit'` ones the functions are stretched over the new grid,
                by `'centered'` ones they keep their scale.
            spacing: of the new taps along each axis, in present ones; for `'centered'`.

        Raises:
            ValueError: a new tap lies outside the present grid.
        """
        matrix = torch.ones((1, 1), dtype=torch.float64, device="cpu")
        for axis, (old, new, step) in enumerate(
            zip(self.kernel_size, kernel_size, spacing, strict=True)
        ):
            place = tap_coordinates((new,), coordinates, "cpu", torch.float64)
            half = (old - 1) / 2
            place = half + place * (half if coordinates == "unit" else step)
            if float((place - half).abs().max()) > half + 1e-6:
                raise ValueError(
                    f"kernel_size: expected taps inside those of BasisTable({self.kernel_size}), got "
                    f"{new} on axis {axis}, {step:g} taps apart; pass a smaller size or dilation, or "
                    f"make the layer with coordinates='unit', by which the table is stretched"
                )
            hats = 1 - (place - torch.arange(old, device="cpu")).abs()
            matrix = torch.kron(matrix, hats.clamp_min(0))
        wide = torch.promote_types(self.table.dtype, torch.float32)
        table = matrix.to(self.table.device, wide) @ self.table.to(wide)
        self.table = nn.Parameter(table.to(self.table.dtype), self.table.requires_grad)
        self.kernel_size = tuple(kernel_size)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{self.kernel_size}, num_features={self.num_features}"
