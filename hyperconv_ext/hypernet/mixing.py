"""The map by which the basis functions start orthonormal over the taps, and their window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..backends.library import product
from ..ops.sharding import replicated, whole
from .inspection import calls_forward_only
from .mlp import DEPENDENT


class BasisMixing(nn.Module):
    """phi = C (w f) + c: the fixed map by which the basis functions start orthonormal.

    w is 1, or a window over the taps, (1 + |x / s|^2)^-2 at the coordinates x. C, c and the scale s are
    buffers: a state that training does not touch, and that loading restores, even whether there is a
    window. The engines take C and c as one more, linear, layer of the MLP, and w as one more column of
    its coordinates.

    Args:
        num_features: N, the number of features f.
        constant: the last function is constant, and the others have a mean of 0.
        layer: whose start depends on C; resetting this resets that, since whoever resets the modules
            of a model one by one has just drawn other features.
    """

    weight: Tensor
    bias: Tensor
    window: Tensor | None  # s [D]

    def __init__(
        self, num_features: int, constant: bool, layer: nn.Module, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        rank = num_features + constant
        self.constant = constant
        self.__dict__["_layer"] = layer  # no child of this
        self.register_buffer("weight", torch.eye(rank, num_features, device=device, dtype=dtype))
        self.register_buffer("bias", torch.zeros(rank, device=device, dtype=dtype))
        self.register_buffer("window", None)
        self.__dict__["_windowed"] = ops.Windowed()

    def place(self, scale: Sequence[float] | None) -> None:
        """A window of this scale, in units of the coordinates by axis; or none."""
        self.window = None if scale is None else self.weight.new_tensor(scale)

    def points(self, taps: Tensor) -> Tensor:
        """The coordinates `[K, D]`, with a window `[K, D + 1]`, as the operators take them."""
        scale = self._buffers["window"]
        return taps if scale is None else self._windowed.of(taps, scale)  # type: ignore[operator, union-attr]

    def window_at(self, taps: Tensor) -> Tensor | None:
        """w `[K, 1]` at the coordinates; None: 1 everywhere."""
        points = self.points(taps)
        return None if points is taps else points[:, -1:]

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Make the rows of phi orthonormal over the taps for these features `[K, N]`, windowed.

        Symmetrically (Lowdin 1950): of all orthonormal sets the nearest to the features, once those are
        freed of their mean and scaled to a length of 1. It is unique, and where the features depend
        on each other, as on fewer taps than functions, all functions share what they span:
        phi^T phi is the projection on it.
        """
        values = whole(features).detach().to("cpu", torch.float64).T
        count = values.shape[1]
        mean = values.mean(1, keepdim=True) if self.constant else values.new_zeros(len(values), 1)
        centered = values - mean
        length = centered.norm(dim=1, keepdim=True)
        inverse = torch.where(length > 1e-6 * values.abs().max(), 1 / length, 0.0)
        scaled = inverse * centered
        power, directions = torch.linalg.eigh(scaled @ scaled.T)
        present = power > DEPENDENT**2 * power.max()
        root = torch.where(present, power.clamp_min(1e-300).rsqrt(), 0.0)
        mixing = (directions * root) @ directions.T * inverse.T
        weight, bias = values.new_zeros(self.weight.shape), values.new_zeros(self.bias.shape)
        weight[: len(mixing)] = mixing
        bias[: len(mixing)] = -(mixing @ mean).squeeze(1)
        if self.constant:
            bias[-1] = 1 / math.sqrt(count)
        for name, value in (("weight", weight), ("bias", bias)):
            target = getattr(self, name)
            target.copy_(replicated(value.to(whole(target)), target))

    def forward(self, features: Tensor) -> Tensor:
        """phi `[R, K]` of features `[K, N]`, windowed, in float32 at least."""
        wide = torch.promote_types(features.dtype, torch.float32)
        weight, bias = (replicated(t.to(wide), features) for t in (self.weight, self.bias))
        return product(weight, features.to(wide).T) + bias.unsqueeze(1)

    def linear(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """(weight, bias) beside `like`, a parameter of the MLP; None if a call of this is more."""
        if not calls_forward_only(self, BasisMixing):
            return None
        buffers = self._buffers
        weight, bias = buffers["weight"], buffers["bias"]
        if type(like) is nn.Parameter:
            return weight, bias  # type: ignore[return-value]
        return replicated(weight, like), replicated(bias, like)  # type: ignore[arg-type]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}weight" in state_dict:
            scale = state_dict.get(f"{prefix}window")
            if (scale is None) != (self.window is None):
                self.window = None if scale is None else self.weight.new_empty(scale.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As nn.Module, of older pickles too."""
        super().__setstate__(state)
        self._buffers.setdefault("window", None)
        self.__dict__.setdefault("_windowed", ops.Windowed())

    def reset_parameters(self) -> None:
        """Draw the layer anew, and fit this to it."""
        self._layer.reset_parameters()  # type: ignore[operator, union-attr]

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        rank, features = self.weight.shape
        return f"{features}, {rank}"
