"""The coordinate MLP: coordinates of the taps -> features."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..autocast import without_autocast
from ..backends.library import product
from ..backends.reference import ACTIVATIONS
from ..checks import check_dtype, check_name, integer, integers, positive_number
from ..ops.sharding import whole
from .inspection import blank, calls_forward_only, floating_dtype, overwrite, watching_every_module

INITIALISATIONS = ("uniform", "he_normal")
DEPENDENT = 0.02  # of the largest singular value of features: what is below is rounding
# Of a principal component before its activation, root mean square: a sine of it is a little bent.
_AMPLITUDE = 0.7


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
        weight, bias = blank(self.weight), blank(self.bias)
        if self.weight_bound is None:
            he_normal_(weight, self.in_features)
        else:
            bounds = torch.tensor(self.weight_bound, device=weight.device, dtype=weight.dtype)
            weight = weight.uniform_(-1, 1) * bounds
        overwrite(self, "weight", weight)
        overwrite(self, "bias", bias.uniform_(-self.bias_bound, self.bias_bound))

    def scale(self, factor: float) -> None:
        """Multiply weight and bias, and the bounds of their draw."""
        if self.weight_bound is not None:
            self.weight_bound = [bound * factor for bound in self.weight_bound]
        self.bias_bound *= factor
        overwrite(self, "weight", self.weight * factor)
        overwrite(self, "bias", self.bias * factor)

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
            "equalized learning rate" of Karras et al., ICLR 2018). `load_state_dict` takes over the
            gain of the network that was saved, which a `state_dict()` has in its metadata. Files of
            tensors alone, as of safetensors, lose it: load them into a network of the same gain.
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

    @torch.no_grad()
    def change_gain(self, weight_gain: float) -> None:
        """Another `weight_gain` for the same function: its parameters are scaled against it."""
        ratio = self.weight_gain / weight_gain
        for layer in self.layers:
            layer.scale(ratio)  # type: ignore[operator]
        self.weight_gain = weight_gain

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
        if not calls_forward_only(self, CoordinateMLP) or not self._layers_are_ours():
            return None
        return self._layer_parameters()

    def _layers_are_ours(self) -> bool:
        for layer in self._own_layers():
            if not calls_forward_only(layer, MLPLayer):
                return False
        return not watching_every_module()

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
            return self._through(self.layers, coordinates)

    def _through(self, layers: Iterable[nn.Module], hidden: Tensor) -> Tensor:
        """What these layers make of `hidden`, by a call of each, whatever it is by now."""
        activate = ACTIVATIONS[self.activation]
        for layer in layers:
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

    @torch.no_grad()
    def align(self, coordinates: Tensor, centered: bool, window: Tensor | None = None) -> None:
        """Set the last layer so that it takes the principal components of its inputs over the taps.

        These are the smoothest functions that the layers before it can express, and as they are
        uncorrelated, so nearly are the features, whatever was drawn: `_AMPLITUDE` times a component
        of variance 1 each, and then the activation. Where the taps allow fewer components than there
        are features, each feature is a random mixture of all of them. The last layer is left as it
        is if it is the only one, has more outputs than inputs, or is no `MLPLayer`; or if its inputs
        are the same at all taps.

        Args:
            coordinates: `[K, D]`.
            centered: whether the mean over the taps is taken off first.
            window: `[K, 1]`, of features that are to be multiplied by it: then the components are those
                of the products, centred by weighted means, and the last feature is constant at first,
                so that the window itself is among the products.
        """
        *others, last = self.layers
        if not others or not isinstance(last, MLPLayer) or last.out_features > last.in_features:
            return
        with without_autocast(coordinates.device):
            inputs = whole(self._through(others, coordinates)).to("cpu", torch.float64)
        mean = inputs.mean(0) if centered else inputs.new_zeros(inputs.shape[1])
        scale, features, total = inputs.new_ones(len(inputs), 1), last.out_features, float(len(inputs))
        if window is not None:
            scale = whole(window).to(inputs)
            total = float(scale.square().sum())
            mean = (scale.square() * inputs).sum(0) / total
            features -= 1
        _, lengths, components = torch.linalg.svd(scale * (inputs - mean), full_matrices=False)
        present = lengths > max(DEPENDENT * lengths[0].item(), 1e-12)
        count = int(present.sum())
        if count == 0:
            return
        mixture = torch.eye(features, count, device="cpu").to(inputs)
        if features > count:
            mixture = nn.functional.normalize(torch.randn(features, count, device="cpu").to(inputs))
        white = components[present] / lengths[present, None] * math.sqrt(total)
        weight = _AMPLITUDE / self.weight_gain * mixture @ white
        bias = -weight @ mean
        if window is not None:
            weight = torch.cat([weight, weight.new_zeros(1, weight.shape[1])])
            bias = torch.cat([bias, bias.new_full((1,), 1 / self.weight_gain)])
        for name, value in (("weight", weight), ("bias", bias)):
            overwrite(last, name, value.to(whole(getattr(last, name))))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Beside nn.Module's version: an entry of the state would be one that loaders stumble over.
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["weight_gain"] = self.weight_gain

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if f"{prefix}layers.0.weight" in state_dict:
            self.weight_gain = local_metadata.get("weight_gain", self.weight_gain)

    def extra_repr(self) -> str:
        """The activation and the gain, for `repr`."""
        return f"activation={self.activation}, weight_gain={self.weight_gain:.3g}"


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
