"""The hyper-network's last-layer batch norm over the taps, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autocast import without_autocast
from ..backends.library import product
from .inspection import calls_forward_only, overwrite, watching_every_module


class TapBatchNorm(nn.Module):
    """BatchNorm over the K taps of W, per (o, i): the published variant's last layer, in closed form.

    With W = A phi, mean_k W = A mean(phi) and var_k W = A Cov(phi) A^T, so the normalised kernel is
    again of rank R: it rescales A and adds to the coefficient of the constant function. W itself is
    never formed.

    The statistics are those of the kernel as it is, in training and in evaluation. Unlike those of
    activations they depend on no batch, only on parameters, so there is nothing to average over
    steps, and nothing that goes stale when parameters are averaged, loaded or changed by hand. In
    training this is `nn.BatchNorm2d(C_out * C_in/groups)` over the image of taps; `adopt` takes over
    what that has kept for evaluation.

    Args:
        shape: (C_out, C_in/groups).
        eps: added to the variance.
    """

    def __init__(
        self, shape: Sequence[int], eps: float = 1e-5, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(tuple(shape), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(tuple(shape), device=device, dtype=dtype))
        # From a checkpoint of BatchNorm's, until the layer, which knows A and phi, adopts them.
        self.loaded_statistics: tuple[Tensor, Tensor] | None = None

    def is_ours(self) -> bool:
        """Whether a call of this is its forward and nothing else."""
        return calls_forward_only(self, TapBatchNorm) and not watching_every_module()

    def forward(self, coefficients: Tensor, basis: Tensor) -> Tensor:
        """Coefficients of the normalised kernel.

        Args:
            coefficients: A, `[C_out, C_in/groups, R']`, R' = R - 1 or R; where R' = R the last
                column already belongs to the constant function.
            basis: phi, `[R, K]`, whose last row is a constant function, not 0.

        Returns:
            `[C_out, C_in/groups, R]` in the dtype of `coefficients`.

        Raises:
            ValueError: one tap only: it has no variance.
        """
        if basis.shape[1] == 1:
            raise ValueError(
                "weight_norm: 'batch' normalises over the taps of the kernel and expected more than "
                "one of them, got kernel_size 1; use weight_norm=None"
            )
        with without_autocast(basis.device):
            return self._normalised(coefficients, basis)

    def _normalised(self, coefficients: Tensor, basis: Tensor) -> Tensor:
        wide = self._widened(coefficients, basis)
        mean, variance = self._statistics(wide, basis)
        scale = self.weight.to(basis.dtype) * torch.rsqrt(variance + self.eps)
        shift = self.bias.to(basis.dtype) - scale * mean
        scaled = wide * scale.unsqueeze(-1)
        constant = scaled[..., -1:] + (shift / basis[-1, 0]).unsqueeze(-1)
        return torch.cat([scaled[..., :-1], constant], dim=-1).to(coefficients.dtype)

    @staticmethod
    def _widened(coefficients: Tensor, basis: Tensor) -> Tensor:
        """A in the dtype of phi, with a column for the constant function."""
        wide = coefficients.to(basis.dtype)
        return F.pad(wide, (0, 1)) if coefficients.shape[-1] < basis.shape[0] else wide

    @staticmethod
    def _statistics(coefficients: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance over the taps of W = A phi, each `[C_out, C_in/groups]`."""
        average = basis.mean(dim=1)
        centered = basis - average.unsqueeze(1)
        covariance = product(centered, centered.t()) / basis.shape[1]
        rows = coefficients.reshape(-1, basis.shape[0])
        variance = (product(rows, covariance) * rows).sum(-1).clamp_min(0)  # rounding may leave it below
        mean = product(rows, average.unsqueeze(1))
        return mean.view(coefficients.shape[:2]), variance.view(coefficients.shape[:2])

    @torch.no_grad()
    def adopt(self, coefficients: Tensor, basis: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Change weight and bias so that the kernel becomes what other statistics make of it.

        Args:
            coefficients, basis: as `forward` takes them.
            mean, variance: `[C_out, C_in/groups]` or flat, to be used in place of the kernel's own:
                those that nn.BatchNorm has kept for evaluation, say, or of another grid of taps.
        """
        own_mean, own_variance = self.statistics(coefficients, basis)
        mean, variance = (t.to(own_mean).view_as(own_mean) for t in (mean, variance))
        scale = self.weight.to(own_mean) * torch.rsqrt(variance + self.eps)
        overwrite(self, "bias", self.bias.to(own_mean) + scale * (own_mean - mean))
        overwrite(self, "weight", scale * torch.sqrt(own_variance + self.eps))

    @torch.no_grad()
    def statistics(self, coefficients: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, biased variance) of the kernel over its taps, each `[C_out, C_in/groups]`."""
        return self._statistics(self._widened(coefficients, basis), basis)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        mean, variance = (state_dict.pop(f"{prefix}running_{of}", None) for of in ("mean", "var"))
        found = mean is not None and variance is not None and not mean.is_meta
        self.loaded_statistics = (mean, variance) if found else None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Shape and settings, for `repr`."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"
