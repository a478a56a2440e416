"""The hyper-network: coordinates of the taps -> basis functions phi, and its last-layer batch norm."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import ops
from .autocast import without_autocast
from .backends.reference import ACTIVATIONS

COORDINATES = ("centered", "unit")


def tap_coordinates(
    kernel_size: Sequence[int],
    coordinates: str = "centered",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Coordinates `[K, D]` of the taps in row-major order, one column per axis in axis order.

    `'centered'` runs from -(k-1)/2 to (k-1)/2 on each axis, in taps; `'unit'` is the same scaled to
    [-1, 1] (an axis with one tap is at 0).

    Raises:
        ValueError: `coordinates` is neither.
    """
    if coordinates not in COORDINATES:
        raise ValueError(
            f"coordinates: expected one of {', '.join(map(repr, COORDINATES))}, got "
            f"{coordinates!r}; pass one of these"
        )
    axes = []
    for size in kernel_size:
        half = (size - 1) / 2
        axis = torch.arange(size, device=device, dtype=dtype) - half
        axes.append(axis / half if coordinates == "unit" and size > 1 else axis)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(axes))


def _parameter(layer: nn.Module, name: str) -> Tensor:
    """`layer.name`, found at once where it is a parameter of its own and not a parametrization."""
    parameter = layer._parameters.get(name)
    return getattr(layer, name) if parameter is None else parameter


class CoordinateMLP(nn.Module):
    """The MLP from tap coordinates `[K, D]` to features `[K, N]`: linear layers, each activated.

    The last *linear* layer of a hyper-network, features -> weights, is not part of it: those are the
    layer's coefficients. The published networks (Ma et al., WACV 2022) are D -> 16 -> 16 -> 4 with
    LeakyReLU(0.1), the defaults here.

    Args:
        in_features: D, the number of kernel axes.
        hidden_features: widths of the hidden layers.
        num_features: N, the number of features per tap.
        activation: `'leaky_relu'` (slope 0.1), `'relu'`, `'gelu'`, `'silu'`, `'tanh'` or `'sine'`.

    It is evaluated in float32 for parameters of lower precision, since K x N numbers cost nothing
    and every weight of the layer inherits their error.

    Raises:
        ValueError: a width is not positive, or the activation is unknown.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Sequence[int] = (16, 16),
        num_features: int = 4,
        activation: str = "leaky_relu",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        widths = (in_features, *hidden_features, num_features)
        if min(widths) < 1:
            raise ValueError(
                f"hidden_features and num_features: expected positive widths, got "
                f"{tuple(hidden_features)} and {num_features}; pass integers of at least 1"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}; "
                f"pass one of these, or any nn.Module as hypernet="
            )
        self.in_features = in_features
        self.num_features = num_features
        self.activation = activation
        self.layers = nn.ModuleList(
            nn.Linear(a, b, device=device, dtype=dtype) for a, b in pairwise(widths)
        )

    def operator(self, coordinates: Tensor) -> ops.Mlp:
        """The network at `coordinates` `[K, D]`, as the operators take it."""
        layers = self.layers._modules.values()
        weights = [_parameter(layer, "weight") for layer in layers]
        biases = [_parameter(layer, "bias") for layer in layers]
        return ops.Mlp(coordinates, weights, biases, self.activation)

    def _linear(self) -> list[nn.Linear]:
        return cast("list[nn.Linear]", list(self.layers))

    @property
    def widths(self) -> tuple[int, ...]:
        """(D, hidden features..., N)."""
        return (self.in_features, *(layer.out_features for layer in self._linear()))

    def basis(self, coordinates: Tensor, constant: bool, backend: str = "auto") -> Tensor:
        """phi `[R, K]`: the features, and the constant 1 as one more function if `constant`."""
        return ops.coordinate_mlp(*self.operator(coordinates), constant, backend)

    def forward(self, coordinates: Tensor) -> Tensor:
        """Features `[K, N]` at `coordinates` `[K, D]`."""
        return self.basis(coordinates, constant=False).T

    def reset_parameters(self) -> None:
        """Draw every layer anew by nn.Linear's rule."""
        for layer in self._linear():
            layer.reset_parameters()

    def extra_repr(self) -> str:
        """The activation, for `repr`."""
        return f"activation={self.activation}"


class TapBatchNorm(nn.Module):
    """BatchNorm over the K taps of W, per (o, i): the published variant's last layer, in closed form.

    With W = A phi, mean_k W = A mean(phi) and var_k W = A Cov(phi) A^T, so the normalised kernel is
    again of rank R: it rescales A and adds to the coefficient of the constant function. W itself is
    never formed. Parameters, running statistics (unbiased variance, as nn.BatchNorm2d keeps them)
    and eval mode are those of `nn.BatchNorm2d(C_out * C_in/groups)` over the image of taps.

    Args:
        shape: (C_out, C_in/groups).
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(tuple(shape), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(tuple(shape), device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros_like(self.weight.detach()))
        self.register_buffer("running_var", torch.ones_like(self.weight.detach()))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))

    def reset_running_stats(self) -> None:
        """Mean 0 and variance 1, as before the first batch."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, coefficients: Tensor, basis: Tensor, track: bool = True) -> Tensor:
        """Coefficients of the normalised kernel.

        Args:
            coefficients: A, `[C_out, C_in/groups, R']`, R' = R - 1 or R; where R' = R the last
                column already belongs to the constant function.
            basis: phi, `[R, K]`, whose last row is the constant function 1.
            track: update the running statistics (training mode only).

        Returns:
            `[C_out, C_in/groups, R]` in the dtype of `coefficients`.

        Raises:
            ValueError: one tap only, in training mode: it has no variance.
        """
        with without_autocast(basis.device):
            return self._normalised(coefficients, basis, track)

    def _normalised(self, coefficients: Tensor, basis: Tensor, track: bool) -> Tensor:
        rank, taps = basis.shape
        wide = coefficients.to(basis.dtype)
        if coefficients.shape[-1] < rank:
            wide = nn.functional.pad(wide, (0, 1))
        if self.training:
            if taps == 1:
                raise ValueError(
                    "weight_norm: 'batch' normalises over the taps of the kernel and expected more "
                    "than one of them, got kernel_size 1; use weight_norm=None or eval mode"
                )
            mean, variance = self._tap_statistics(wide, basis)
            if track:
                self._track(mean, variance * (taps / (taps - 1)))
        else:
            mean = self.running_mean.to(basis.dtype)
            variance = self.running_var.to(basis.dtype)
        scale = self.weight.to(basis.dtype) * torch.rsqrt(variance + self.eps)
        shift = self.bias.to(basis.dtype) - scale * mean
        scaled = wide * scale.unsqueeze(-1)
        constant = scaled[..., -1:] + shift.unsqueeze(-1)
        return torch.cat([scaled[..., :-1], constant], dim=-1).to(coefficients.dtype)

    @staticmethod
    def _tap_statistics(coefficients: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance over the taps of W = A phi, each `[C_out, C_in/groups]`."""
        average = basis.mean(dim=1)
        centered = basis - average.unsqueeze(1)
        covariance = centered @ centered.T / basis.shape[1]
        variance = ((coefficients @ covariance) * coefficients).sum(-1)
        return coefficients @ average, variance.clamp_min(0)  # rounding may leave it just below

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)

    def extra_repr(self) -> str:
        """Shape and settings, for `repr`."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}, momentum={self.momentum}"
