"""Layers: nn.ConvNd's arguments in nn.ConvNd's order, then the hyper-network's."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional, planner
from .backends.reference import materialize_weight
from .checks import (
    axis_padding,
    check_groups,
    check_name,
    conv_geometry,
    conv_transpose_geometry,
    meta,
    per_axis,
)
from .geometry import Geometry
from .hypernet import CoordinateMLP, TapBatchNorm, tap_coordinates

_Layer = TypeVar("_Layer", bound="HyperConvNd")
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_WEIGHT_NORMS = (None, "batch")
_QUIET = 0.01  # of the mean power of the basis functions
_DRAWS = 100  # of an MLP until one feature lives; one draw in 20 is dead at worst (relu, 1x1)


class HyperConvNd(nn.Module, ABC):
    """What the layers share, for any number of axes, transposed or not."""

    dims: int
    transposed: bool
    padding: Any  # one integer per axis; or, of a convolution, 'same' or 'valid'
    weight_norm: TapBatchNorm | None
    taps: Tensor

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
        num_features: int,
        activation: str,
        weight_bias: bool,
        weight_norm: str | None,
        coordinates: str,
        backend: str,
        hypernet: nn.Module | None,
    ) -> None:
        super().__init__()
        _check_channels(in_channels, out_channels, groups)
        check_name("padding_mode", padding_mode, ("zeros",) if self.transposed else _PADDING_MODES)
        check_name("backend", backend, planner.BACKEND_NAMES)
        if weight_norm not in _WEIGHT_NORMS:
            raise ValueError(
                f"weight_norm: expected None or 'batch', got {weight_norm!r}; pass one of these"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = per_axis("kernel_size", kernel_size, self.dims, 1)
        self.stride = per_axis("stride", stride, self.dims, 1)
        self.padding = axis_padding(padding, self.stride, self.dims)
        self.dilation = per_axis("dilation", dilation, self.dims, 1)
        self.output_padding = per_axis("output_padding", output_padding, self.dims, 0)
        self.groups = groups
        self.padding_mode = padding_mode
        self.coordinates = coordinates
        self.tap_spacing = (1.0,) * self.dims
        self.weight_bias = weight_bias
        self.backend = backend
        factory = {"device": device, "dtype": dtype}
        if hypernet is None:
            hypernet = CoordinateMLP(self.dims, hidden_features, num_features, activation, **factory)
        self.hypernet = hypernet
        self._place_taps(torch.empty(0, **factory))
        features = self._features_shape(num_features)
        first, second = (in_channels, out_channels) if self.transposed else (out_channels, in_channels)
        shape = (first, second // groups)
        self.coefficients = nn.Parameter(torch.empty(*shape, features + weight_bias, **factory))
        self.weight_norm = None if weight_norm is None else TapBatchNorm(shape, **factory)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, **factory))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def _place_taps(self, like: Tensor) -> None:
        """Coordinates of the taps on the parameters' device, never below float32."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        grid = tap_coordinates(self.kernel_size, self.coordinates, like.device, dtype)
        if self.coordinates == "centered":
            grid = grid * grid.new_tensor(self.tap_spacing)
        self.register_buffer("taps", grid, persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> HyperConvNd:
        super()._apply(fn, recurse)
        self._place_taps(self.coefficients)
        return self

    def _features_shape(self, num_features: int) -> int:
        """N, asked of a hyper-network that is not ours by calling it once."""
        if isinstance(self.hypernet, CoordinateMLP):
            return num_features
        with torch.no_grad():
            return self._module_features().shape[1]

    def _module_features(self) -> Tensor:
        tensors = chain(self.hypernet.parameters(), self.hypernet.buffers())
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), self.taps.dtype)
        features = self.hypernet(self.taps.to(dtype))
        taps = self.taps.shape[0]
        if not isinstance(features, Tensor) or features.dim() != 2 or features.shape[0] != taps:
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"hypernet: expected a module from coordinates [{taps}, {self.dims}] to features "
                f"[{taps}, N], got {got}; return one row per tap"
            )
        return features

    def reset_parameters(self) -> None:
        """Draw parameters so that W has mean 0 and the standard deviation nn.ConvNd starts with.

        That is 1/sqrt(3 fan_in), from the uniform distribution of nn.ConvNd's default. The columns of
        the coefficients are scaled so that every basis function adds the same to the variance of W,
        averaged over the taps; one far quieter than the rest adds less, lest its coefficients be
        huge. An MLP whose features
        all vanish on the taps (relu, few taps) is drawn again. With `weight_norm='batch'` the norm's
        scale sets the deviation of W and the coefficients start at unit variance, as its running
        variance does.
        """
        fan_in = self.coefficients.shape[1] * math.prod(self.kernel_size)
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        deviation = bound / math.sqrt(3)
        with torch.no_grad():
            if self.weight_norm is not None:
                self.weight_norm.reset_running_stats()
                self.weight_norm.weight.fill_(deviation)
                self.weight_norm.bias.zero_()
                deviation = 1.0
            power = self._draw_basis()[: self.coefficients.shape[-1]].square().mean(dim=1)
            share = 1 / power.maximum(_QUIET * power.mean())
            scale = deviation * (share / (share * power).sum()).sqrt()
            scale = torch.where(power.sum() > 0, scale, torch.zeros_like(scale))
            self.coefficients.uniform_(-math.sqrt(3), math.sqrt(3))
            self.coefficients.mul_(scale.to(self.coefficients.dtype))
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    def _draw_basis(self) -> Tensor:
        """phi of a fresh MLP, not zero on all taps; of another module as it is."""
        if not isinstance(self.hypernet, CoordinateMLP):
            return self._basis("reference")
        for _ in range(_DRAWS):
            self.hypernet.reset_parameters()
            basis = self._basis("reference")
            if basis.is_meta or basis[: self.coefficients.shape[-1]].any():
                break
        return basis

    def _basis(self, backend: str) -> Tensor:
        """phi `[R, K]`; its last row is the constant function when a bias or a norm needs it."""
        constant = self.weight_bias or self.weight_norm is not None
        if isinstance(self.hypernet, CoordinateMLP):
            return self.hypernet.basis(self.taps, constant, backend)
        features = self._module_features().T
        return torch.cat([features, features.new_ones(1, features.shape[1])]) if constant else features

    def _operands(self) -> tuple[Tensor, functional.Kernel]:
        """(A, phi or the MLP whose output it is) of the next forward pass."""
        hypernet, coefficients = self.hypernet, self.coefficients
        if isinstance(hypernet, CoordinateMLP) and self.weight_norm is None:
            return coefficients, hypernet.operator(self.taps)
        return self.kernel(track=True)

    def kernel(self, track: bool) -> tuple[Tensor, Tensor]:
        """(A `[C_out, C_in/groups, R]`, phi `[R, *kernel]`) of W = A phi; A's axes as W's first two."""
        basis = self._basis(self.backend)
        coefficients = self.coefficients
        if self.weight_norm is not None:
            coefficients = self.weight_norm(coefficients, basis, track)
        return coefficients, basis.view(-1, *self.kernel_size)

    def basis(self) -> Tensor:
        """phi `[R, *kernel_size]`: the functions of the taps that all channels share."""
        return self._basis(self.backend).view(-1, *self.kernel_size)

    @property
    def weight(self) -> Tensor:
        """W as nn.ConvNd or nn.ConvTransposeNd has it, built on demand; differentiable."""
        return materialize_weight(*self.kernel(track=False))

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

        With `'centered'` coordinates the function keeps its scale: more taps see more of it, and a
        kernel with another `dilation` samples it at taps that much further apart, at the same
        distances in the input. With `'unit'` coordinates it is stretched over the new kernel, whose
        ends stay at -1 and 1. Where the old and the new grid have points in common the weights agree.
        The sum over the taps is not normalised to their number.

        Args:
            kernel_size: of the copy.
            padding: of the copy; None keeps this layer's, `'same'` follows the kernel size.
            dilation: of the copy; None keeps this layer's.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        layer = copy.deepcopy(self)
        layer.kernel_size = per_axis("kernel_size", kernel_size, self.dims, 1)
        if padding is not None:
            layer.padding = axis_padding(padding, self.stride, self.dims)
        if dilation is not None:
            layer.dilation = per_axis("dilation", dilation, self.dims, 1)
            pairs = zip(layer.dilation, self.dilation, self.tap_spacing, strict=True)
            layer.tap_spacing = tuple(spacing * new / old for new, old, spacing in pairs)
        layer._place_taps(layer.coefficients)
        return layer

    def extra_repr(self) -> str:
        """The sizes, and whatever else is not at its default."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        defaults: dict[str, Any] = {
            "stride": (1,) * self.dims,
            "padding": (0,) * self.dims,
            "dilation": (1,) * self.dims,
            "output_padding": (0,) * self.dims,
            "groups": 1,
            "padding_mode": "zeros",
            "weight_bias": True,
            "coordinates": "centered",
            "tap_spacing": (1.0,) * self.dims,
            "backend": "auto",
        }
        for name, default in defaults.items():
            if (value := getattr(self, name)) != default:
                text += f", {name}={value!r}"
        return text if self.bias is not None else text + ", bias=False"


def _check_channels(in_channels: int, out_channels: int, groups: int) -> None:
    check_groups(groups)
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels % groups:
            raise ValueError(
                f"{name}: expected a multiple of groups={groups}, got {channels}; change one of them"
            )


class _HyperConv(HyperConvNd):
    """nn.ConvNd's arguments, and a convolution."""

    transposed = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        hidden_features: Sequence[int] = (16, 16),
        num_features: int = 4,
        activation: str = "leaky_relu",
        weight_bias: bool = True,
        weight_norm: str | None = None,
        coordinates: str = "centered",
        backend: str = "auto",
        hypernet: nn.Module | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            0,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
            hidden_features,
            num_features,
            activation,
            weight_bias,
            weight_norm,
            coordinates,
            backend,
            hypernet,
        )

    def _padded(self, input: Tensor) -> tuple[Tensor, tuple[int, ...] | str]:
        """The input padded by a mode other than zeros, and the padding left for the convolution."""
        if self.padding_mode == "zeros":
            return input, self.padding
        geometry = Geometry.conv(
            self.kernel_size,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )
        low = geometry.padding
        high = geometry.high_padding if self.padding == "same" else low
        pads = [p for pair in zip(reversed(low), reversed(high), strict=True) for p in pair]
        return F.pad(input, pads, mode=self.padding_mode), (0,) * self.dims

    def forward(self, input: Tensor) -> Tensor:
        """y `[B, C_out, *S']` of x `[B, C_in, *S]`, or both without B."""
        padded, padding = self._padded(input)
        return functional.convolve(
            self.dims,
            padded,
            *self._operands(),
            self.kernel_size,
            self.bias,
            (self.stride, padding, self.dilation),
            self.groups,
            self.backend,
        )

    def geometry(self, input: Tensor) -> tuple[Tensor, Geometry]:
        padded, padding = self._padded(input)
        batched = padded if padded.dim() == self.dims + 2 else padded.unsqueeze(0)
        arguments = (self.kernel_size, self.stride, padding, self.dilation, self.groups)
        return batched, conv_geometry(meta("input", batched), *arguments)


class _HyperConvTranspose(HyperConvNd):
    """nn.ConvTransposeNd's arguments, and a transposed convolution."""

    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        hidden_features: Sequence[int] = (16, 16),
        num_features: int = 4,
        activation: str = "leaky_relu",
        weight_bias: bool = True,
        weight_norm: str | None = None,
        coordinates: str = "centered",
        backend: str = "auto",
        hypernet: nn.Module | None = None,
    ) -> None:
        if isinstance(padding, str):
            raise ValueError(
                f"padding: expected integers for a transposed convolution, got {padding!r}; "
                f"pass integers"
            )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            output_padding,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
            hidden_features,
            num_features,
            activation,
            weight_bias,
            weight_norm,
            coordinates,
            backend,
            hypernet,
        )

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """y `[B, C_out, *S']` of x `[B, C_in, *S]`, or both without B.

        Args:
            input: x.
            output_size: S', in the place of `output_padding`; may begin with B and C_out.
        """
        extra = self._extra(input, output_size)
        return functional.convolve(
            self.dims,
            input,
            *self._operands(),
            self.kernel_size,
            self.bias,
            (self.stride, self.padding, extra, self.dilation),
            self.groups,
            self.backend,
            transposed=True,
        )

    def _extra(self, input: Tensor, output_size: Sequence[int] | None) -> tuple[int, ...]:
        """The output padding that leads to `output_size`; this layer's if that is None."""
        if output_size is None:
            return self.output_padding
        wanted = tuple(output_size)
        if len(wanted) == input.dim():
            wanted = wanted[-self.dims :]
        none = (0,) * self.dims
        geometry = conv_transpose_geometry(
            meta("input", input),
            self.kernel_size,
            self.stride,
            self.padding,
            none,
            self.dilation,
            self.groups,
        )
        least, step = geometry.input_size, self.stride
        if len(wanted) != self.dims or any(
            not low <= size < low + s for low, size, s in zip(least, wanted, step, strict=False)
        ):
            most = [low + s - 1 for low, s in zip(least, step, strict=True)]
            raise ValueError(
                f"output_size: expected {self.dims} sizes from {list(least)} to {most} for input "
                f"{list(input.shape)}, got {list(output_size)}; choose within them"
            )
        return tuple(size - low for size, low in zip(wanted, least, strict=True))

    def geometry(self, input: Tensor) -> tuple[Tensor, Geometry]:
        batched = input if input.dim() == self.dims + 2 else input.unsqueeze(0)
        return batched, conv_transpose_geometry(
            meta("input", batched),
            self.kernel_size,
            self.stride,
            self.padding,
            self.output_padding,
            self.dilation,
            self.groups,
        )


class HyperConv1d(_HyperConv):
    """`nn.Conv1d` whose kernel is computed by a small MLP of the tap coordinates; see `HyperConv2d`.

    Shape:
        input `[B, C_in, L]` or `[C_in, L]`; output `[B, C_out, L']` or `[C_out, L']`. The coordinates
        have one column.
    """

    dims = 1


class HyperConv2d(_HyperConv):
    """`nn.Conv2d` whose kernel is computed by a small MLP of the tap coordinates.

    W[o, i, k] = sum_r A[o, i, r] phi_r(p_k), with phi the features of the MLP at the coordinates
    p_k of tap k. The parameter count does not depend on the kernel size, and the layer equals
    `F.conv2d(x, conv.weight, conv.bias, ...)`, though W is not formed on a fused backend.
    (Ma, Wang, Dalca, Sabuncu: "Hyper-Convolution Networks for Biomedical Image Segmentation", WACV
    2022, arXiv 2105.10559.)

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as in `nn.Conv2d`.
        hidden_features: widths of the MLP's hidden layers.
        num_features: N, the number of features the MLP has per tap, and so (with `weight_bias`, plus
            one) the rank R of the kernel over its taps.
        activation: after every layer of the MLP: `'leaky_relu'` (slope 0.1), `'relu'`, `'gelu'`,
            `'silu'`, `'tanh'`, `'sine'`.
        weight_bias: give the last linear layer, features -> weights, a bias: one more column of
            `coefficients`, belonging to the constant function.
        weight_norm: None, or `'batch'`: a batch norm over the taps of each W[o, i] as the
            hyper-network's last layer, see `hypernet.TapBatchNorm`.
        coordinates: `'centered'` (in taps from the kernel's centre) or `'unit'` ([-1, 1]).
        backend: `'auto'`, `'reference'`, `'composite'`, `'triton'` or `'cuda'`, see
            `functional.basis_conv2d`.
        hypernet: any module from coordinates `[K, 2]` to features `[K, N]`, in the place of the MLP;
            `hidden_features`, `num_features` and `activation` are then not used.

    Attributes:
        coefficients: Parameter `[C_out, C_in/groups, N + weight_bias]`, A (before `weight_norm`).
        hypernet: `CoordinateMLP`, or the module given.
        bias: Parameter `[C_out]` or None.
        weight: W `[C_out, C_in/groups, kh, kw]`, built on demand, differentiable.

    Shape:
        input `[B, C_in, H, W]` or `[C_in, H, W]`; output `[B, C_out, H', W']` or `[C_out, H', W']`,
        H' = (H + 2 padding - dilation (kernel_size - 1) - 1) // stride + 1.

    Raises:
        TypeError, ValueError: an argument is out of range; the message names it and the remedy.
    """

    dims = 2


class HyperConv3d(_HyperConv):
    """`nn.Conv3d` whose kernel is computed by a small MLP of the tap coordinates; see `HyperConv2d`.

    Shape:
        input `[B, C_in, D, H, W]` or `[C_in, D, H, W]`; output `[B, C_out, D', H', W']` or without B.
        The coordinates have three columns, in axis order.
    """

    dims = 3


class HyperConvTranspose1d(_HyperConvTranspose):
    """`nn.ConvTranspose1d` whose kernel is computed by an MLP; see `HyperConvTranspose2d`.

    Shape:
        input `[B, C_in, L]` or `[C_in, L]`; output `[B, C_out, L']` or `[C_out, L']`.
    """

    dims = 1


class HyperConvTranspose2d(_HyperConvTranspose):
    """`nn.ConvTranspose2d` whose kernel is computed by a small MLP of the tap coordinates.

    W[i, o, k] = sum_r A[i, o, r] phi_r(p_k): the layer equals
    `F.conv_transpose2d(x, conv.weight, conv.bias, ...)`, though W is not formed on a fused backend.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode, device, dtype: as in `nn.ConvTranspose2d`.
        hidden_features, num_features, activation, weight_bias, weight_norm, coordinates, backend,
            hypernet: as in `HyperConv2d`.

    Attributes:
        coefficients: Parameter `[C_in, C_out/groups, N + weight_bias]`, A (before `weight_norm`).
        hypernet, bias: as in `HyperConv2d`.
        weight: W `[C_in, C_out/groups, kh, kw]`, built on demand, differentiable.

    Shape:
        input `[B, C_in, H, W]` or `[C_in, H, W]`; output `[B, C_out, H', W']` or `[C_out, H', W']`,
        H' = (H - 1) stride - 2 padding + dilation (kernel_size - 1) + output_padding + 1.

    Raises:
        TypeError, ValueError: an argument is out of range; the message names it and the remedy.
    """

    dims = 2


class HyperConvTranspose3d(_HyperConvTranspose):
    """`nn.ConvTranspose3d` whose kernel is computed by an MLP; see `HyperConvTranspose2d`.

    Shape:
        input `[B, C_in, D, H, W]` or `[C_in, D, H, W]`; output `[B, C_out, D', H', W']` or without B.
    """

    dims = 3
