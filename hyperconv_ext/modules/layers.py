"""The six layers: nn.ConvNd's arguments in nn.ConvNd's order, then the hyper-network's.

Annotations are evaluated, as those of torch.nn are: traced graphs take the types of inputs from them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..checks import check_input, conv_geometry, conv_transpose_geometry, meta, output_padding_for
from ..geometry import Geometry
from . import published
from .base import HyperConvNd
from .tracing import call_in_trace


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
        num_features: int | None = None,
        activation: str | None = None,
        weight_bias: bool = True,
        weight_norm: str | None = None,
        coordinates: str | None = None,
        backend: str = "auto",
        algorithm: str = "auto",
        hypernet: nn.Module | None = None,
        parametrization: str = "orthonormal",
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
            algorithm,
            hypernet,
            parametrization,
        )

    def _padded(self, input: Tensor) -> tuple[Tensor, tuple[int, ...] | str]:
        """The input padded by a mode other than zeros, and the padding left for the convolution."""
        if self.padding_mode == "zeros":
            return input, self.padding
        check_input(self.dims, meta("input", input))
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
        if isinstance(input, fx.Proxy):
            return call_in_trace(self, input)
        padded, padding = self._padded(input)
        return self._convolve(padded, (self.stride, padding, self.dilation))

    def geometry(self, input: Tensor) -> tuple[Tensor, Geometry]:
        padded, padding = self._padded(input)
        batched = self._batched(padded)
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
        num_features: int | None = None,
        activation: str | None = None,
        weight_bias: bool = True,
        weight_norm: str | None = None,
        coordinates: str | None = None,
        backend: str = "auto",
        algorithm: str = "auto",
        hypernet: nn.Module | None = None,
        parametrization: str = "orthonormal",
    ) -> None:
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
            algorithm,
            hypernet,
            parametrization,
        )

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """y `[B, C_out, *S']` of x `[B, C_in, *S]`, or both without B.

        Args:
            input: x.
            output_size: S', in the place of `output_padding`; may begin with B and C_out.
        """
        if isinstance(input, fx.Proxy):
            return call_in_trace(self, input, output_size=output_size)
        extra = self.output_padding
        if output_size is not None:
            spaces = (self.stride, self.padding, self.dilation)
            extra = output_padding_for(output_size, meta("input", input), self.kernel_size, *spaces)
        return self._convolve(input, (self.stride, self.padding, extra, self.dilation))

    def geometry(self, input: Tensor) -> tuple[Tensor, Geometry]:
        batched = self._batched(input)
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

    W[o, i, k] = sum_r A[o, i, r] phi_r(p_k), with phi made of the features of the MLP at the coordinates
    p_k of tap k. The parameter count does not depend on the kernel size, and the layer equals
    `F.conv2d(x, conv.weight, conv.bias, ...)`, though W is not formed on a fused backend.
    (Ma, Wang, Dalca, Sabuncu: "Hyper-Convolution Networks for Biomedical Image Segmentation", WACV
    2022, arXiv 2105.10559.)

    By default it learns with the recipe of the convolution it replaces: phi = C f + c, a fixed mixing of
    the features f that makes the functions orthonormal over the taps at the start, the constant function
    among them. A step of gradient descent by A is then nn.Conv2d's own step, projected on them. For
    kernels of 9 taps and more along two axes phi = C (w f) + c with a window w = (1 + (r / 3)^2)^-2 at
    r taps from the centre, about which most is learned of them; unless a `hypernet` is given.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as in `nn.Conv2d`.
        bias, padding_mode, device, dtype: as in `nn.Conv2d`.
        hidden_features: widths of the MLP's hidden layers.
        num_features: N, the number of features the MLP has per tap, and so (with `weight_bias`, plus
            one) the rank R of the kernel over its taps. None is 8 for kernels of 49 taps and more, else
            and in the published form 4.
        activation: after every layer of the MLP: `'sine'` (None means this), `'leaky_relu'` (slope
            0.1), `'relu'`, `'gelu'`, `'silu'`, `'tanh'`.
        weight_bias: give the last linear layer, features -> weights, a bias: one more column of
            `coefficients`, belonging to the constant function.
        weight_norm: None, or `'batch'`: a batch norm over the taps of each W[o, i] as the
            hyper-network's last layer, see `hypernet.TapBatchNorm`.
        coordinates: `'unit'` ([-1, 1]; None means this) or `'centered'` (in taps from the kernel's
            centre).
        backend, algorithm: `'auto'`, or a name to be used or refused, see `functional.basis_conv2d`.
        hypernet: any module from coordinates `[K, 2]` to features `[K, N]`, in the place of the MLP;
            `hidden_features`, `num_features` and `activation` are then not used.
        parametrization: `'orthonormal'`, or `'published'`: phi are the features themselves and the
            constant 1, activation and coordinates are `'leaky_relu'` and `'centered'` unless they are
            given, and the first draw is the published one (see `reset_parameters`).

    Attributes:
        coefficients: Parameter `[C_out, C_in/groups, N + weight_bias]`, A (before `weight_norm`).
        hypernet: `CoordinateMLP`, or the module given.
        mixing: `BasisMixing`, which holds C, c and the scale of a window as buffers, or None in the
            published form.
        bias: Parameter `[C_out]` or None.
        weight: W `[C_out, C_in/groups, kh, kw]`, built on demand, differentiable.
        fit_result: `FitResult` of a layer that `from_conv(init='fit')` made, else None.

    Shape:
        input `[B, C_in, H, W]` or `[C_in, H, W]`; output `[B, C_out, H', W']` or `[C_out, H', W']`,
        H' = (H + 2 padding - dilation (kernel_size - 1) - 1) // stride + 1.

    Raises:
        TypeError, ValueError: an argument is out of range; the message names it and the remedy.
    """

    dims = 2

    @classmethod
    def load_published(
        cls,
        state_dict: Mapping[str, Any],
        prefix: str = "",
        layout: str = "mkarmann",
        *,
        in_channels: int | None = None,
        out_channels: int | None = None,
        kernel_size: int | Sequence[int] | None = None,
        negative_slope: float = 0.1,
        **options: Any,
    ) -> "HyperConv2d":
        """A layer with the kernel of a published hyper-convolution, from that one's checkpoint.

        Both are 1x1 convolutions of the coordinates, each but the last with a LeakyReLU after it:

        - `'mkarmann'` (github.com/mkarmann/hyper-conv, PyTorch): `main.0`, `main.2`, ... and the
          coordinates `pos` `[1, 2, kh, kw]`; outputs in the order (C_out, C_in). A BatchNorm2d after
          the last one becomes `weight_norm='batch'`.
        - `'tym002'` (github.com/tym002/Hyper-Convolution, Keras): `{name}/kernel` `[1, 1, inputs,
          outputs]` and `{name}/bias`, in the order of the numbers in the names; outputs in the order
          (C_in, C_out); coordinates in taps from the centre.

        That BatchNorm2d has one kernel in training, by the statistics of the kernel itself, and another
        one in evaluation, by those it has kept. A layer here has one kernel: that of evaluation. From a
        state without `running_mean` and `running_var` it is that of training.

        Args:
            state_dict: tensors or NumPy arrays by name, of one hyper-network, or of a model.
            prefix: what its names begin with, such as `'conv1.'`.
            layout: `'mkarmann'` or `'tym002'`.
            in_channels, out_channels: at least one of them: a state holds only their product.
            kernel_size: required if there is no `pos` in the state.
            negative_slope: of the LeakyReLU, which no state holds. Both networks have 0.1 as they were
                published; one with `nn.LeakyReLU()` as it is has 0.01. The engines evaluate 0.1 alone:
                another slope makes a `hypernet` that is called as a module.
            options: other arguments of the constructor: `stride`, `padding`, `dilation`, `groups`,
                `padding_mode`, `device`, `dtype` (by default those of the state), `backend`,
                `algorithm`. Keras pads `'same'` with a stride above 1 by less in front than behind,
                which no `padding` here does.

        Raises:
            TypeError, ValueError: an argument is out of range, or the state holds something else.
        """
        arguments = (in_channels, out_channels, kernel_size, negative_slope, options)
        layer = published.load_published(cls, state_dict, prefix, layout, *arguments)
        return layer  # type: ignore[return-value]


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
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups: as in
            `nn.ConvTranspose2d`.
        bias, dilation, padding_mode, device, dtype: as in `nn.ConvTranspose2d`.
        hidden_features, num_features, activation, weight_bias, weight_norm: as in `HyperConv2d`.
        coordinates, backend, algorithm, hypernet, parametrization: as in `HyperConv2d`.

    Attributes:
        coefficients: Parameter `[C_in, C_out/groups, N + weight_bias]`, A (before `weight_norm`).
        hypernet, mixing, bias: as in `HyperConv2d`.
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
