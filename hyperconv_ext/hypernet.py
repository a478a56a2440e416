"""The hyper-network: coordinates of the taps -> basis functions phi, and its last-layer batch norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from . import ops
from .autocast import without_autocast
from .backends.library import product
from .backends.reference import ACTIVATIONS
from .checks import check_dtype, integer, integers
from .taps import COORDINATES, tap_coordinates

__all__ = ["COORDINATES", "CoordinateMLP", "MLPLayer", "TapBatchNorm", "tap_coordinates"]


def overwrite(module: nn.Module, name: str, value: Tensor) -> None:
    """Write to a parameter, through its parametrization if it has one."""
    parameter = module._parameters.get(name)
    if parameter is None:
        setattr(module, name, value)
    else:
        parameter.copy_(value)


def floating_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """That of the module's first floating-point parameter, else buffer, else `default`."""
    tensors: Iterable[Tensor] = (*module.parameters(), *module.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), default)


def _calls_forward_only(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a call of `module` is the forward of `cls` and nothing else: no hooks either."""
    kept = module.__dict__
    if (
        kept["_forward_hooks"]
        or kept["_forward_pre_hooks"]
        or kept["_backward_hooks"]
        or kept["_backward_pre_hooks"]
        or "forward" in kept
    ):
        return False
    kind = type(module)
    return kind is cls or (kind.forward is cls.forward and kind.__call__ is cls.__call__)


def _watching_every_module() -> bool:
    """Whether there are hooks on all modules."""
    return bool(
        module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    )


class MLPLayer(nn.Module):
    """One layer of the MLP, without its activation: x W^T + b.

    It has nn.Linear's parameters and first draw, and is none: what is done to all linear layers of a
    model (another initialisation, quantisation, adapters) would flatten or break the kernels.

    It computes in float32 for parameters of lower precision.

    Args:
        in_features, out_features: widths.
    """

    def __init__(
        self, in_features: int, out_features: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weight and bias by nn.Linear's rule."""
        bound = 1 / math.sqrt(self.in_features)
        weight, bias = torch.empty_like(self.weight), torch.empty_like(self.bias)
        overwrite(self, "weight", nn.init.kaiming_uniform_(weight, a=math.sqrt(5)))
        overwrite(self, "bias", nn.init.uniform_(bias, -bound, bound))

    def forward(self, input: Tensor) -> Tensor:
        """`[K, out_features]` of `[K, in_features]`."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return product(input.to(wide), self.weight.to(wide).t()) + self.bias.to(wide)

    def extra_repr(self) -> str:
        """The widths, for `repr`."""
        return f"{self.in_features}, {self.out_features}"


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
    and every weight of the layer inherits their error. A fused kernel evaluates it where nobody could
    tell: not if it or one of its layers has hooks, a forward of its own, or is of another class.

    Weight decay should leave its parameters alone: see `parameter_groups`.

    Raises:
        TypeError, ValueError: a width is not a positive integer, or the activation is unknown.
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
        check_dtype("dtype", dtype)
        widths = _widths(in_features, hidden_features, num_features)
        self.in_features = widths[0]
        self.num_features = widths[-1]
        self.activation = activation
        self.layers = nn.ModuleList(MLPLayer(a, b, device, dtype) for a, b in pairwise(widths))

    def __setattr__(self, name: str, value: Any) -> None:
        """As nn.Module, but an unknown activation is refused."""
        if name == "activation" and value not in ACTIVATIONS:
            raise ValueError(
                f"activation: expected one of {', '.join(ACTIVATIONS)}, got {value!r}; "
                f"pass one of these, or any nn.Module as hypernet="
            )
        super().__setattr__(name, value)

    def operator(self, coordinates: Tensor) -> ops.Mlp:
        """The network at `coordinates` `[K, D]`, as the operators take it."""
        return ops.Mlp(coordinates, *self._layer_parameters(), self.activation)

    def _own_layers(self) -> Any:
        """The layers, from where nn.Module keeps them."""
        return self._modules["layers"]._modules.values()  # type: ignore[union-attr]

    def _layer_parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """(weights, biases), one of each per layer."""
        weights, biases = [], []
        for layer in self._own_layers():
            own = layer._parameters
            # Found at once where it is a parameter of its own and not a parametrization.
            weight, bias = own.get("weight"), own.get("bias")
            weights.append(layer.weight if weight is None else weight)
            biases.append(layer.bias if bias is None else bias)
        return weights, biases

    def fusible_parameters(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """(weights, biases) for the operators; None if they are not all there is to a call of this.

        It is asked at every step of every layer, and so reads what nn.Module keeps directly.
        """
        if not _calls_forward_only(self, CoordinateMLP) or not self._layers_are_ours():
            return None
        return self._layer_parameters()

    def _layers_are_ours(self) -> bool:
        for layer in self._own_layers():
            if not _calls_forward_only(layer, MLPLayer):
                return False
        return not _watching_every_module()

    @property
    def widths(self) -> tuple[int, ...]:
        """(D, hidden features..., N)."""
        weights, _ = self._layer_parameters()
        return (self.in_features, *(weight.shape[0] for weight in weights))

    def basis(self, coordinates: Tensor, constant: bool, backend: str = "auto") -> Tensor:
        """phi `[R, K]`: the features, and the constant 1 as one more function if `constant`."""
        return ops.coordinate_mlp(*self.operator(coordinates), constant, backend)

    def forward(self, coordinates: Tensor) -> Tensor:
        """Features `[K, N]` at `coordinates` `[K, D]`."""
        if self._layers_are_ours():
            return self.basis(coordinates, constant=False).T
        with without_autocast(coordinates.device):
            return self._by_layers(coordinates)

    def _by_layers(self, coordinates: Tensor) -> Tensor:
        """The features by a call of each layer, whatever it is by now."""
        activate = ACTIVATIONS[self.activation]
        hidden = coordinates
        for layer in self.layers:
            if not isinstance(layer, MLPLayer):
                hidden = hidden.to(floating_dtype(layer, hidden.dtype))
            output = layer(hidden)
            hidden = activate(output.to(torch.promote_types(output.dtype, torch.float32)))
        return hidden

    def reset_parameters(self) -> None:
        """Draw every layer anew by nn.Linear's rule."""
        for layer in self.layers:
            layer.reset_parameters()  # type: ignore[operator]

    def extra_repr(self) -> str:
        """The activation, for `repr`."""
        return f"activation={self.activation}"


def _widths(in_features: int, hidden_features: Sequence[int], num_features: int) -> tuple[int, ...]:
    hidden = integers(hidden_features)
    if hidden is None:
        raise TypeError(
            f"hidden_features: expected integers, got {hidden_features!r}; pass one per hidden layer"
        )
    last = integer("num_features", num_features)
    widths = (integer("in_features", in_features), *hidden, last)
    if min(widths) < 1:
        raise ValueError(
            f"hidden_features and num_features: expected positive widths, got "
            f"{tuple(hidden_features)} and {num_features}; pass integers of at least 1"
        )
    return widths


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
        self.register_buffer("running_mean", torch.zeros(tuple(shape), device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(tuple(shape), device=device, dtype=dtype))
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
            wide = F.pad(wide, (0, 1))
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
        covariance = product(centered, centered.t()) / basis.shape[1]
        rows = coefficients.reshape(-1, basis.shape[0])
        variance = (product(rows, covariance) * rows).sum(-1).clamp_min(0)  # rounding may leave it below
        mean = product(rows, average.unsqueeze(1))
        return mean.view(coefficients.shape[:2]), variance.view(coefficients.shape[:2])

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)

    def extra_repr(self) -> str:
        """Shape and settings, for `repr`."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}, momentum={self.momentum}"
