"""The hyper-network: coordinates of the taps -> basis functions phi, and its last-layer batch norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as module_hooks

from . import ops
from .autocast import without_autocast
from .backends.library import product
from .backends.reference import ACTIVATIONS
from .checks import check_dtype, check_name, integer, integers, positive_number
from .ops.sharding import replicated, whole
from .taps import COORDINATES, tap_coordinates

__all__ = [
    "COORDINATES",
    "BasisMixing",
    "CoordinateMLP",
    "MLPLayer",
    "TapBatchNorm",
    "tap_coordinates",
]

INITIALISATIONS = ("uniform", "he_normal")
DEPENDENT = 0.02  # of the largest singular value of the features: what is below is rounding


def overwrite(module: nn.Module, name: str, value: Tensor) -> None:
    """Write to a parameter, through its parametrization if it has one."""
    parameter = module._parameters.get(name)
    if parameter is None:
        setattr(module, name, value)
    else:
        parameter.copy_(value)


def without_numbers(tensor: Tensor) -> bool:
    """Whether there is nothing to compute with: it is on the meta device, or fake."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


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

    It has nn.Linear's parameters and is none: what is done to all linear layers of a model (another
    initialisation, quantisation, adapters) would flatten or break the kernels.

    It computes in float32 for parameters of lower precision.

    Args:
        in_features, out_features: widths.
        weight_bound: the weights are drawn from the uniform distribution over +- this, one number
            for all inputs or one for each; None draws them as Keras' `he_normal` does, from a normal
            distribution of variance 2 / in_features truncated at two deviations.
        bias_bound: the same of the biases.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight_bound: Sequence[float] | None,
        bias_bound: float,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight_bound = weight_bound
        self.bias_bound = bias_bound
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weight and bias by the layer's rule."""
        weight, bias = torch.empty_like(self.weight), torch.empty_like(self.bias)
        if self.weight_bound is None:
            he_normal_(weight, self.in_features)
        else:
            bounds = torch.tensor(self.weight_bound, device=weight.device, dtype=weight.dtype)
            weight = weight.uniform_(-1, 1) * replicated(bounds, weight)
        overwrite(self, "weight", weight)
        overwrite(self, "bias", bias.uniform_(-self.bias_bound, self.bias_bound))

    def forward(self, input: Tensor) -> Tensor:
        """`[K, out_features]` of `[K, in_features]`."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return product(input.to(wide), self.weight.to(wide).t()) + self.bias.to(wide)

    def extra_repr(self) -> str:
        """The widths, for `repr`."""
        return f"{self.in_features}, {self.out_features}"


def he_normal_(weight: Tensor, inputs: int) -> Tensor:
    """Fill `weight` as Keras' initialiser of that name does (He et al., ICCV 2015)."""
    deviation = math.sqrt(2 / inputs) / 0.87962566103423978  # of the truncated distribution
    bound = math.erf(math.sqrt(2))  # two deviations
    return weight.uniform_(-bound, bound).erfinv_().mul_(math.sqrt(2) * deviation)


class CoordinateMLP(nn.Module):
    """The MLP from tap coordinates `[K, D]` to features `[K, N]`: linear layers, each activated.

    Layer by layer h <- activation(weight_gain (W h + b)). The last *linear* layer of a hyper-network,
    features -> weights, is not part of it: those are the layer's coefficients.

    Args:
        in_features: D, the number of kernel axes.
        hidden_features: widths of the hidden layers.
        num_features: N, the number of features per tap.
        activation: `'sine'`, `'leaky_relu'` (slope 0.1), `'relu'`, `'gelu'`, `'silu'` or `'tanh'`.
        frequency: bound of the first layer's weights at the start, times `weight_gain`; for `'sine'` in
            radians per unit of the coordinates; one number, or one per axis.
        weight_gain: a constant factor on all weights and biases. They are drawn 1 / weight_gain times as
            large, so that the features start as they would without it, and a step of gradient descent
            moves the function weight_gain^2 times as far, one of Adam weight_gain times (the
            "equalized learning rate" of Karras et al., ICLR 2018).
        init: `'uniform'`, as Sitzmann et al. (NeurIPS 2020) draw networks of sines: first layer by
            `frequency`, then +- sqrt(6 / inputs), with phases all around the circle (for other
            activations, with bends all over the kernel); or `'he_normal'`, biases zero, as the
            published networks (Ma et al., WACV 2022), which are D -> 16 -> 16 -> 4 with LeakyReLU(0.1).

    It is evaluated in float32 for parameters of lower precision, since K x N numbers cost nothing
    and every weight of the layer inherits their error. A fused kernel evaluates it where nobody could
    tell: not if it or one of its layers has hooks, a forward of its own, or is of another class.

    Weight decay should leave its parameters alone: see `parameter_groups`.

    Raises:
        TypeError, ValueError: a width is not a positive integer, a factor not a positive number, or the
            activation or the rule of initialisation is unknown.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Sequence[int] = (16, 16),
        num_features: int = 4,
        activation: str = "sine",
        device: Any = None,
        dtype: Any = None,
        *,
        frequency: float | Sequence[float] = 4.0,
        weight_gain: float = 1.0,
        init: str = "uniform",
    ) -> None:
        super().__init__()
        check_dtype("dtype", dtype)
        widths = _widths(in_features, hidden_features, num_features)
        self.in_features = widths[0]
        self.num_features = widths[-1]
        self.activation = activation
        self.weight_gain = weight_gain
        check_name("init", init, INITIALISATIONS)
        given = frequency if isinstance(frequency, Sequence) else (frequency,)
        scales = [positive_number("frequency", one) / self.weight_gain for one in given]
        if len(scales) not in (1, widths[0]):
            raise ValueError(
                f"frequency: expected one number, or one for each of {widths[0]} axes, got "
                f"{frequency!r}; pass so many"
            )
        self.layers = nn.ModuleList()
        for index, (inputs, outputs) in enumerate(pairwise(widths)):
            bounds, phase = None, 0.0
            if init == "uniform":
                bounds = scales if index == 0 else [math.sqrt(6 / inputs) / self.weight_gain]
                phase = math.pi / self.weight_gain if activation == "sine" else max(bounds)
            self.layers.append(MLPLayer(inputs, outputs, bounds, phase, device, dtype))

    def __setattr__(self, name: str, value: Any) -> None:
        """As nn.Module, but an unknown activation is refused, and so is a gain that is no factor."""
        if name == "activation" and value not in ACTIVATIONS:
            raise ValueError(
                f"activation: expected one of {', '.join(ACTIVATIONS)}, got {value!r}; "
                f"pass one of these, or any nn.Module as hypernet="
            )
        if name == "weight_gain":
            value = positive_number(name, value)
        super().__setattr__(name, value)

    def operator(self, coordinates: Tensor) -> ops.Mlp:
        """The network at `coordinates` `[K, D]`, as the operators take it."""
        return ops.Mlp(coordinates, *self._layer_parameters(), self.activation, self.weight_gain)

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
        """The features `[N, K]`, or `[N + 1, K]` with the constant 1 as one more function."""
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
            wide = output.to(torch.promote_types(output.dtype, torch.float32))
            hidden = activate(self.weight_gain * wide)
        return hidden

    def reset_parameters(self) -> None:
        """Draw every layer anew by its rule."""
        for layer in self.layers:
            layer.reset_parameters()  # type: ignore[operator]

    def extra_repr(self) -> str:
        """The activation and the gain, for `repr`."""
        return f"activation={self.activation}, weight_gain={self.weight_gain:.3g}"


class BasisMixing(nn.Module):
    """phi = C f + c: the fixed linear map by which the basis functions start orthonormal.

    C and c are buffers: a state that training does not touch, and that loading restores. The engines
    take them as one more, linear, layer of the MLP.

    Args:
        num_features: N, the number of features f.
        constant: the last function is constant, and the others have a mean of 0.
        layer: whose start depends on C; resetting this resets that, since whoever resets the modules
            of a model one by one has just drawn other features.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, num_features: int, constant: bool, layer: nn.Module, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        rank = num_features + constant
        self.constant = constant
        self.__dict__["_layer"] = layer  # no child of this
        self.register_buffer("weight", torch.eye(rank, num_features, device=device, dtype=dtype))
        self.register_buffer("bias", torch.zeros(rank, device=device, dtype=dtype))

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Make the rows of phi orthonormal over the taps for these features `[K, N]`.

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
        """phi `[R, K]` of features `[K, N]`, in float32 at least."""
        wide = torch.promote_types(features.dtype, torch.float32)
        weight, bias = (replicated(t.to(wide), features) for t in (self.weight, self.bias))
        return product(weight, features.to(wide).T) + bias.unsqueeze(1)

    def linear(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """(weight, bias) beside `like`, a parameter of the MLP; None if a call of this is more."""
        if not _calls_forward_only(self, BasisMixing):
            return None
        buffers = self._buffers
        weight, bias = buffers["weight"], buffers["bias"]
        if type(like) is nn.Parameter:
            return weight, bias  # type: ignore[return-value]
        return replicated(weight, like), replicated(bias, like)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Draw the layer anew, and fit this to it."""
        self._layer.reset_parameters()  # type: ignore[operator, union-attr]

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        rank, features = self.weight.shape
        return f"{features}, {rank}"


def independence(features: Tensor, constant: bool) -> float:
    """How far features `[K, N]` are from linear dependence: 0 if they depend, 1 if they are orthogonal.

    The smallest singular value over the largest, of the features freed of their mean if `constant` and
    scaled to a length of 1; of as many as there can be over K taps.
    """
    values = whole(features).detach().to("cpu", torch.float64)
    if constant:
        values = values - values.mean(0)
    length = values.norm(dim=0)
    rank = min(values.shape[1], values.shape[0] - constant)
    if rank == 0 or not bool((length > 0).all()):
        return 0.0
    singular = torch.linalg.svdvals(values / length)
    return float(singular[rank - 1] / singular[0])


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
