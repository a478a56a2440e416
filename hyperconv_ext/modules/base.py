"""What all layers share: parameters, their first draw, W on demand, and what may change afterwards."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from .. import functional, layout, ops, planner
from ..backends.reference import materialize_weight
from ..checks import (
    axis_padding,
    check_dtype,
    check_groups,
    check_input,
    check_name,
    check_tensor,
    integer,
    meta,
    per_axis,
)
from ..fitting import FitResult
from ..geometry import Geometry
from ..hypernet import (
    BasisMixing,
    BasisTable,
    CoordinateMLP,
    TapBatchNorm,
    floating_dtype,
    without_numbers,
)
from ..taps import check_coordinate_name
from . import exchange
from .description import described
from .inference import KernelKeeper, convolve_by_kept, keeps_kernel, kept_kernel
from .start import DEFAULTS, PARAMETRIZATIONS, draw, network, usual_features
from .states import refuse_other_kinds
from .weight import REMEDY, read_only

_Layer = TypeVar("_Layer", bound="HyperConvNd")
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_WEIGHT_NORMS = (None, "batch")
_NEW_LAYER = "make a new layer with it"
# What the parameters' shapes were made for, or nothing reads later; and what to do instead
_FIXED = {
    "kernel_size": "with_kernel_size() makes a layer of another size with the same learned function",
    "tap_spacing": "with_kernel_size(..., dilation=) makes a layer with its taps at other distances",
    "in_channels": _NEW_LAYER,
    "out_channels": _NEW_LAYER,
    "weight_bias": _NEW_LAYER,
    "num_features": _NEW_LAYER,
    "hidden_features": _NEW_LAYER,
    "rank": _NEW_LAYER,
    "activation": "assign it to hypernet",
    "parametrization": _NEW_LAYER,
    "transposed": _NEW_LAYER,
    "dims": _NEW_LAYER,
}


class HyperConvNd(nn.Module, ABC):
    """What the layers share, for any number of axes, transposed or not."""

    dims: int
    transposed: bool
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any  # one integer per axis; or, of a convolution, 'same' or 'valid'
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    tap_spacing: tuple[float, ...]
    parametrization: str
    algorithm: str = "auto"  # of a layer that was pickled when there was none to name
    weight_norm: TapBatchNorm | None
    mixing: BasisMixing | None
    fit_result: FitResult | None = None  # of `from_conv(init='fit')`, which made the layer
    _keeper: KernelKeeper | None = None
    _channels_last = False  # the format `.to(memory_format=...)` has left the layer in

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int] | str,
        dilation: int | Sequence[int],
        output_padding: int | Sequence[int],
        groups: int,
        bias: bool,
        padding_mode: str,
        device: Any,
        dtype: Any,
        hidden_features: Sequence[int],
        num_features: int | None,
        activation: str | None,
        weight_bias: bool,
        weight_norm: str | None,
        coordinates: str | None,
        backend: str,
        algorithm: str,
        hypernet: nn.Module | None,
        parametrization: str,
    ) -> None:
        super().__init__()
        check_dtype("dtype", dtype)
        in_channels, out_channels, groups = checked_channels(in_channels, out_channels, groups)
        if weight_norm not in _WEIGHT_NORMS:
            raise ValueError(
                f"weight_norm: expected None or 'batch', got {weight_norm!r}; pass one of these"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = per_axis("kernel_size", kernel_size, self.dims, 1)
        self.stride = stride  # type: ignore[assignment]  # __setattr__ makes one integer per axis of it
        self.padding = padding
        self.dilation = dilation  # type: ignore[assignment]
        self.output_padding = output_padding  # type: ignore[assignment]
        self.groups = groups
        self.padding_mode = padding_mode
        check_name("parametrization", parametrization, PARAMETRIZATIONS)
        self.parametrization = parametrization
        usual_activation, usual_coordinates = DEFAULTS[parametrization]
        self.coordinates = usual_coordinates if coordinates is None else coordinates
        self.tap_spacing = (1.0,) * self.dims
        self.weight_bias = bool(weight_bias)
        self.backend = backend
        self.algorithm = algorithm
        factory = {"device": device, "dtype": dtype}
        first, second = (in_channels, out_channels) if self.transposed else (out_channels, in_channels)
        shape = (first, second // groups)
        own = hypernet is None
        if hypernet is None:
            chosen = usual_activation if activation is None else activation
            features = usual_features(self) if num_features is None else num_features
            hypernet = network(self, hidden_features, features, chosen, first, factory)
        self.hypernet = hypernet
        # Of no columns until the hyper-network has told how many: it may ask on which device it is.
        self.coefficients = nn.Parameter(torch.empty(*shape, 0, **factory))
        features = self._features()
        self.coefficients = nn.Parameter(torch.empty(*shape, features + self.weight_bias, **factory))
        self.weight_norm = None if weight_norm is None else TapBatchNorm(shape, **factory)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, **factory))
        else:
            self.register_parameter("bias", None)
        # Last, as its `reset_parameters` needs the rest.
        self.mixing = None
        if parametrization == "orthonormal":
            self.mixing = BasisMixing(features, self.weight_bias, self, **factory)
        self.register_load_state_dict_post_hook(_adopt_statistics)
        draw(self, own)

    def __setattr__(self, name: str, value: Any) -> None:
        """As nn.Module; what would be wrong, or change nothing, is refused."""
        if name == "weight":
            _refuse_weight("an assignment")
        if name in _FIXED and (name in self.__dict__ or hasattr(type(self), name)):
            raise AttributeError(
                f"{name}: expected to stay {getattr(self, name)!r} once the layer is made, got an "
                f"assignment of {value!r}; {_FIXED[name]}"
            )
        super().__setattr__(name, self._checked(name, value))

    def _checked(self, name: str, value: Any) -> Any:
        """`value` as the attribute `name` of the forward pass is kept."""
        if name in ("stride", "dilation", "output_padding"):
            value = per_axis(name, value, self.dims, int(name != "output_padding"))
            if name == "stride" and "padding" in self.__dict__:
                axis_padding(self.padding, value, self.dims)
            if name == "output_padding" and not self.transposed and max(value) > 0:
                raise ValueError(
                    f"output_padding: expected 0 of a convolution that is not transposed, got {value}; "
                    f"use the transposed layer"
                )
        elif name == "padding" and self.transposed and isinstance(value, str):
            raise ValueError(
                f"padding: expected integers for a transposed convolution, got {value!r}; pass integers"
            )
        elif name == "padding":
            value = axis_padding(value, self.stride, self.dims)
        elif name == "groups":
            value = check_groups(value)
        elif name == "padding_mode":
            check_name(name, value, ("zeros",) if self.transposed else _PADDING_MODES)
        elif name == "backend":
            check_name(name, value, planner.BACKEND_NAMES)
        elif name == "algorithm":
            check_name(name, value, planner.ALGORITHM_NAMES)
        elif name == "coordinates":
            check_coordinate_name(value)
        return value

    def __delattr__(self, name: str) -> None:
        """As nn.Module, but W cannot be deleted."""
        if name == "weight":
            _refuse_weight("a deletion")
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module, but W cannot become a parameter."""
        if name == "weight":
            _refuse_weight("a parameter of this name")
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As nn.Module, but W cannot become a buffer."""
        if name == "weight":
            _refuse_weight("a buffer of this name")
        super().register_buffer(name, tensor, persistent)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> HyperConvNd:
        super()._apply(fn, recurse)
        # nn.ConvNd's weight has `dims + 2` axes and so remembers the memory format it was converted to,
        # which no parameter here can. Other functions than nn.Module.to's see parameters only.
        if getattr(fn, "__qualname__", "") == "Module.to.<locals>.convert":
            probe = layout.sample(self.dims, self._channels_last)
            self._channels_last = layout.channels_last(fn(probe)) and self.dims > 1
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if any(spacing != 1 for spacing in self.tap_spacing):
            key = f"{prefix}tap_spacing"
            destination[key] = torch.tensor(self.tap_spacing, dtype=torch.float64, device="cpu")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        spacing = state_dict.pop(f"{prefix}tap_spacing", None)
        if spacing is not None and not spacing.is_meta:
            self.__dict__["tap_spacing"] = tuple(spacing.tolist())
        refuse_other_kinds(self, state_dict, prefix, args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse `torch.jit.script`, which does not understand custom operators of this kind."""
        raise NotImplementedError(
            f"torch.jit.script: {type(self).__name__} cannot be scripted; use torch.export.export, or "
            f"torch.jit.trace"
        )

    def _like(self) -> Tensor:
        """A tensor of the hyper-network, or beside it: where the coordinates of the taps must be."""
        tensors = (*self.hypernet.parameters(), *self.hypernet.buffers())
        return next((t for t in tensors if t.is_floating_point()), self.coefficients)

    @property
    def taps(self) -> Tensor:
        """Coordinates `[K, D]` of the taps beside the hyper-network's parameters, float32 at least."""
        return self._taps(self._like()).clone()

    def _taps(self, like: Tensor) -> Tensor:
        """Shared with other layers: for reading only."""
        return ops.taps_beside(like, self.kernel_size, self.coordinates, self.tap_spacing)

    def _mlp(self) -> ops.Mlp | None:
        """The hyper-network as the operators take it; None where it must be called as a module."""
        modules = self._modules
        hypernet = modules["hypernet"]
        mixing: Any = modules.get("mixing")
        if not isinstance(hypernet, CoordinateMLP):
            return None
        layers = hypernet.fusible_parameters()
        if layers is None:
            return None
        weights, biases = layers
        points = self._taps(weights[0])
        settings = hypernet.activation, hypernet.weight_gain
        if mixing is None:
            return ops.Mlp(points, weights, biases, *settings)
        last = mixing.linear(weights[0])
        if last is None:
            return None
        weights.append(last[0])
        biases.append(last[1])
        return ops.Mlp(mixing.points(points), weights, biases, *settings, True)

    def _features(self) -> int:
        """N, asked of a hyper-network that is not ours by calling it once; before there is a mixing."""
        mlp = self._mlp()
        if mlp is not None:
            return mlp.weights[-1].shape[0]
        with torch.no_grad():
            return self._module_features().shape[1]

    def _module_features(self) -> Tensor:
        taps = self.taps
        count = taps.shape[0]
        if not isinstance(self.hypernet, CoordinateMLP):  # which takes exact ones
            taps = taps.to(floating_dtype(self.hypernet, taps.dtype))
        features = self.hypernet(taps)
        if not isinstance(features, Tensor) or features.dim() != 2 or features.shape[0] != count:
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"hypernet: expected a module from coordinates [{count}, {self.dims}] to features "
                f"[{count}, N], got {got}; return one row per tap"
            )
        mixing = self._modules.get("mixing")
        window = None if mixing is None else mixing.window_at(self._taps(features))  # type: ignore[operator]
        return features if window is None else features * window.to(features.dtype)

    def reset_parameters(self) -> None:
        """Draw parameters so that the layer starts, and learns, as nn.ConvNd does.

        In the `'orthonormal'` parametrization W = A phi has functions phi that are orthonormal over the
        taps, so that a step of gradient descent by A is nn.ConvNd's own step projected on them. A is
        drawn such that the response to constant inputs has nn.ConvNd's variance, 1 / 3 of the input's
        mean square, and that to white noise a little less (see `modules/start.py`). The features are
        the principal components of the last hidden layer, the smoothest functions that it can
        express, under a window where the kernel has 9 taps or more along two axes. A hyper-network
        that is no `CoordinateMLP` stays as it is, and phi is made orthonormal for its present
        features. With
        `weight_norm='batch'` the norm's scale and shift set the deviation of W and of its mean.

        In the `'published'` one all linear layers are drawn by `he_normal`, biases 0, and a norm starts
        with scale 1 and shift 0 (Ma et al., WACV 2022, and their code).
        """
        draw(self, isinstance(self.hypernet, CoordinateMLP))
        self.fit_result = None

    def _basis(self, backend: str) -> Tensor:
        """phi `[R, K]`; its last row is a constant function when a bias or a norm needs it."""
        mixing, normed = self.mixing, self.weight_norm is not None
        # Mixed features have it among them already.
        constant = (
            (normed and not self.weight_bias) if mixing is not None else normed or self.weight_bias
        )
        mlp = self._mlp()
        if mlp is not None:
            return ops.coordinate_mlp(*mlp, constant, backend)
        features = self._module_features()
        basis = features.T if mixing is None else mixing(features)
        return torch.cat([basis, basis.new_ones(1, basis.shape[1])]) if constant else basis

    def _operands(self) -> tuple[Tensor, functional.Kernel]:
        """(A, phi or the MLP whose output it is) of the next forward pass."""
        mlp = self._mlp()
        if mlp is not None and self._modules.get("weight_norm") is None:
            return self._parameter("coefficients"), mlp
        kept = kept_kernel(self, mlp) if self.keeps_kernel() else None
        return self.kernel() if kept is None else (kept.coefficients, kept.basis)

    def keeps_kernel(self) -> bool:
        """Whether phi and W may be kept between calls now: in evaluation, without gradients, on a CPU.

        Not by a subclass that computes its kernel in its own way. See `modules.inference`.
        """
        return keeps_kernel(self) and type(self).kernel is HyperConvNd.kernel

    def train(self: _Layer, mode: bool = True) -> _Layer:
        """As nn.Module; the kernel that is kept in evaluation is forgotten."""
        self._keeper = None
        return super().train(mode)

    def _parameter(self, name: str) -> Any:
        """As an attribute, found at once where no parametrization has taken its place."""
        parameter = self._parameters.get(name)
        return getattr(self, name) if parameter is None else parameter

    def _convolve(self, input: Tensor, spaces: tuple[Any, ...]) -> Tensor:
        """The layer's output for the padded `input`; `spaces` as `functional.convolve` takes them."""
        last = self._channels_last and self._weight_would_be_channels_last()
        given = self._batched(input) if last else input
        output = convolve_by_kept(self, given, spaces) if self.keeps_kernel() else None
        if output is None:
            output = functional.convolve(*self._arguments(given, spaces))
        if last:
            output = layout.as_channels_last(output)
            return output if input.dim() == output.dim() else output.squeeze(0)
        return output

    def _arguments(self, input: Tensor, spaces: tuple[Any, ...]) -> tuple[Any, ...]:
        """What `functional.convolve` takes."""
        return (
            self.dims,
            input,
            *self._operands(),
            self.kernel_size,
            self._parameter("bias"),
            spaces,
            self.groups,
            self.backend,
            self.algorithm,
            self.transposed,
        )

    def _batched(self, input: Tensor) -> Tensor:
        """`input` with a batch axis, and channels last if the layer is."""
        check_input(self.dims, meta("input", input))
        batched = input if input.dim() == self.dims + 2 else input.unsqueeze(0)
        if self._channels_last and self._weight_would_be_channels_last():
            return layout.as_channels_last(batched)
        return batched

    def _weight_would_be_channels_last(self) -> bool:
        """Whether nn.ConvNd's weight, once converted, would make the output channels last."""
        return layout.remembers_channels_last((*self.coefficients.shape[:2], *self.kernel_size))

    def kernel(self) -> tuple[Tensor, Tensor]:
        """(A `[C_out, C_in/groups, R]`, phi `[R, *kernel]`) of W = A phi; A's axes as W's first two."""
        return self._kernel(self.backend)

    def _kernel(self, backend: str) -> tuple[Tensor, Tensor]:
        """`kernel()`, by this backend for the MLP."""
        coefficients = self.coefficients
        check_tensor("coefficients", meta("coefficients", coefficients))
        basis = self._basis(backend)
        if self.weight_norm is not None:
            coefficients = self.weight_norm(coefficients, basis)
        return coefficients, basis.view(-1, *self.kernel_size)

    def basis(self) -> Tensor:
        """phi `[R, *kernel_size]`: the functions of the taps that all channels share."""
        return self._basis(self.backend).view(-1, *self.kernel_size)

    @property
    def weight(self) -> Tensor:
        """W as nn.ConvNd or nn.ConvTransposeNd has it, built on demand; differentiable, to be read only.

        Writing to it raises `ReadOnlyWeightError`, an assignment AttributeError.
        """
        return read_only(materialize_weight(*self.kernel()))

    @abstractmethod
    def geometry(self, input: Tensor) -> tuple[Tensor, Geometry]:
        """(what is convolved: `input` batched and padded by its mode, the geometry it meets)."""

    def with_kernel_size(
        self: _Layer,
        kernel_size: int | Sequence[int],
        padding: int | Sequence[int] | str | None = None,
        dilation: int | Sequence[int] | None = None,
    ) -> _Layer:
        """A copy of this layer whose kernel is the same learned function on another grid of taps.

        With `'unit'` coordinates, the default, it is stretched over the new kernel, whose ends stay at
        -1 and 1. With `'centered'` coordinates it keeps its scale: more taps see more of it, and a
        kernel with another `dilation` samples it at taps that much further apart, at the same
        distances in the input. Where the old and the new grid have points in common the weights agree.
        The sum over the taps is not normalised to their number; for a fresh start at the new size, with
        the response of nn.ConvNd, call `reset_parameters` of the copy.

        Args:
            kernel_size: of the copy.
            padding: of the copy; None keeps this layer's, `'same'` follows the kernel size.
            dilation: of the copy; None keeps this layer's.

        A `BasisTable` is interpolated linearly, if no tap of the copy lies outside of its own.

        Raises:
            TypeError, ValueError: as the constructor; or a table does not reach so far.
        """
        layer = copy.deepcopy(self)
        layer.fit_result = None
        layer.__dict__["kernel_size"] = per_axis("kernel_size", kernel_size, self.dims, 1)
        if padding is not None:
            layer.padding = padding
        if dilation is not None:
            layer.dilation = dilation  # type: ignore[assignment]
            pairs = zip(layer.dilation, self.dilation, self.tap_spacing, strict=True)
            spacings = tuple(spacing * new / old for new, old, spacing in pairs)
            layer.__dict__["tap_spacing"] = spacings
        if isinstance(layer.hypernet, BasisTable):
            ratios = [new / old for new, old in zip(layer.tap_spacing, self.tap_spacing, strict=True)]
            layer.hypernet.resample(layer.kernel_size, layer.coordinates, ratios)
        if layer.weight_norm is not None and not without_numbers(self.coefficients):
            statistics = layer.weight_norm.statistics(self.coefficients, self._basis("reference"))
            layer.weight_norm.adopt(layer.coefficients, layer._basis("reference"), *statistics)
        return layer

    @classmethod
    def from_conv(
        cls: type[_Layer],
        conv: nn.Module,
        *,
        rank: int | None = None,
        max_error: float | None = None,
        init: str = "fit",
        progress: bool = False,
        **hypernet_options: Any,
    ) -> _Layer:
        """A hyper-convolution in the place of `conv`, a layer of the class this one replaces.

        It takes over the sizes, bias, device, dtype, memory format, `requires_grad` and whether it
        trains; hooks it does not. With `init='fit'` W comes near `conv.weight`, and `fit_result` says
        how near, beside the least error that any kernels of that rank have. The smoother the kernels
        are, the smaller are both; those of an untrained convolution are noise, of which only as many
        functions as taps hold all.

        Args:
            conv: `nn.ConvNd`, or a subclass that adds nothing to its forward pass. Of a parametrised
                one the weight of the moment is taken.
            rank: R of the kernel over its taps, the constant function included: the MLP has
                `num_features = R - 1`, without `weight_bias` R. None leaves it to the other arguments.
            max_error: fit at the smallest rank whose error is not above this, relative to the norm of
                `conv.weight`; in the place of `rank`. It fits at each rank from the first for which
                that is possible.
            init: `'fit'` finds the basis functions by variable projection (see `fitting`), from several
                starts, and the coefficients for them by least squares. A `hypernet` that was given is
                fitted from how it is, or as it is if nothing in it requires gradients; a `BasisTable`
                becomes the best there is. A norm over the taps is set such that it changes nothing.
                `'match'` draws the layer as `reset_parameters` does, and scales W as the deviation of
                `conv.weight` differs from that of nn.ConvNd's own draw.
            progress: show a bar while fitting; needs tqdm.
            hypernet_options: the constructor's keywords, from `hidden_features` on.

        Raises:
            TypeError, ValueError: `conv` is of another class or computes something else, or an argument
                is out of range; or `max_error` is not reached at any rank.
            ImportError: `progress` without tqdm.
        """
        return exchange.from_conv(cls, conv, rank, max_error, init, progress, hypernet_options)  # type: ignore[return-value]

    def to_conv(self) -> nn.Module:
        """`nn.ConvNd` that computes the same, with the W of this moment as a parameter of its own.

        W is formed in float32 at least and rounded once to the dtype of the coefficients. Sizes, bias,
        device, memory format, `requires_grad` (W's is that of the coefficients) and whether it trains
        are this layer's; hooks, `backend` and `algorithm` are not.
        """
        return exchange.to_conv(self)

    @property
    def num_features(self) -> int:
        """N, the number of features that the hyper-network has per tap."""
        return self.coefficients.shape[2] - self.weight_bias

    @property
    def hidden_features(self) -> tuple[int, ...] | None:
        """The widths of the MLP's hidden layers; None of another hyper-network."""
        hypernet = self.hypernet
        return hypernet.widths[1:-1] if isinstance(hypernet, CoordinateMLP) else None

    @property
    def activation(self) -> str | None:
        """The MLP's; None of another hyper-network."""
        hypernet = self.hypernet
        return hypernet.activation if isinstance(hypernet, CoordinateMLP) else None

    @property
    def rank(self) -> int:
        """R, the number of basis functions phi, of which W is made over its taps."""
        return self.num_features + (self.weight_bias or self.weight_norm is not None)

    def extra_repr(self) -> str:
        """Arguments that make such a layer: the sizes, and whatever else is not at its default."""
        return described(self)


def _adopt_statistics(layer: Any, _: Any) -> None:
    """Where a checkpoint holds statistics of BatchNorm, use the kernel that they give in evaluation."""
    norm = layer.weight_norm
    if norm is not None and norm.loaded_statistics is not None:
        statistics, norm.loaded_statistics = norm.loaded_statistics, None
        if not without_numbers(layer.coefficients):
            norm.adopt(layer.coefficients, layer._basis("reference"), *statistics)


def checked_channels(in_channels: int, out_channels: int, groups: int) -> tuple[int, int, int]:
    """The three as Python's integers, if the groups divide the channels."""
    groups = check_groups(groups)
    counts = []
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        count = integer(name, channels, 0)
        if count % groups:
            raise ValueError(
                f"{name}: expected a multiple of groups={groups}, got {channels}; change one of them"
            )
        counts.append(count)
    return counts[0], counts[1], groups


def _refuse_weight(what: str) -> NoReturn:
    raise AttributeError(
        f"weight: expected to be read only, since W is computed from the layer's parameters at every "
        f"access, got {what}; {REMEDY}"
    )
