"""The layers before they know their input channels, as `torch.nn` has its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter, is_lazy

from ..checks import check_input, meta
from .base import checked_channels
from .layers import (
    HyperConv1d,
    HyperConv2d,
    HyperConv3d,
    HyperConvTranspose1d,
    HyperConvTranspose2d,
    HyperConvTranspose3d,
)
from .start import draw, weight_gain


class _LazyHyperConv(LazyModuleMixin):
    """What the lazy layers share: `coefficients` and `bias` come with the first input, or with a state.

    The hyper-network does not depend on the input channels and is there from the start; only, in a
    transposed layer its `weight_gain` follows them, and its functions stay.
    """

    def __init__(
        self, out_channels: int, kernel_size: int | Sequence[int], *args: Any, **options: Any
    ) -> None:
        layer: Any = self
        super().__init__(0, out_channels, kernel_size, *args, **options)  # type: ignore[misc]
        self._count = layer.coefficients.shape[2] - layer.weight_bias
        self._gain_follows = layer.transposed and options.get("hypernet") is None
        like = {"device": layer.coefficients.device, "dtype": layer.coefficients.dtype}
        layer.coefficients = UninitializedParameter(**like)
        if layer.bias is not None:
            layer.bias = UninitializedParameter(**like)

    @property
    def num_features(self) -> int:
        """N, the number of features that the hyper-network has per tap."""
        return self._count

    def initialize_parameters(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> None:
        """Make and draw, for as many channels as `input` has, what is not there yet.

        Raises:
            ValueError: it is no input of the layer, or the groups do not divide its channels.
        """
        if self.has_uninitialized_params():
            check_input(self.dims, meta("input", input))
            self._materialize(input.shape[-self.dims - 1])
        del self._count, self._gain_follows

    def _materialize(self: Any, in_channels: int) -> None:
        channels, out_channels, groups = checked_channels(in_channels, self.out_channels, self.groups)
        self.__dict__["in_channels"] = channels
        first, second = (channels, out_channels) if self.transposed else (out_channels, channels)
        shape = (first, second // groups)
        self.coefficients.materialize((*shape, self.num_features + self.weight_bias))
        if self.bias is not None:
            self.bias.materialize((out_channels,))
        if self.weight_norm is not None:
            for parameter in self.weight_norm.parameters():
                parameter.data = parameter.new_empty(shape)  # an optimizer may have it already
        if self._gain_follows and self.mixing is not None:
            self.hypernet.change_gain(weight_gain(channels))
        draw(self, hypernet=False)

    def reset_parameters(self: Any) -> None:
        """Draw parameters, if they are there; see `HyperConvNd.reset_parameters`."""
        if not self.has_uninitialized_params():
            super().reset_parameters()  # type: ignore[misc]

    def _save_to_state_dict(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.has_uninitialized_params():  # which nothing else than the class of torch.nn can save
            LazyModuleMixin._save_to_state_dict(self, destination, prefix, keep_vars)
        else:
            super(LazyModuleMixin, self)._save_to_state_dict(  # type: ignore[misc]
                destination, prefix, keep_vars
            )

    def _lazy_load_hook(self: Any, state_dict: Any, prefix: str, *args: Any) -> None:
        """Before a state is loaded: make what it holds. What it does not hold is drawn."""
        loaded = state_dict.get(f"{prefix}coefficients")
        if loaded is not None and not is_lazy(loaded) and self.has_uninitialized_params():
            channels = loaded.shape[0] if self.transposed else loaded.shape[1] * self.groups
            self._materialize(channels)


class LazyHyperConv1d(_LazyHyperConv, HyperConv1d):
    """`HyperConv1d` without `in_channels`; see `LazyHyperConv2d`."""

    cls_to_become = HyperConv1d


class LazyHyperConv2d(_LazyHyperConv, HyperConv2d):
    """`HyperConv2d` without `in_channels`, which the first input has, as `nn.LazyConv2d` is `nn.Conv2d`.

    Until then `coefficients` and `bias` are uninitialised parameters, and those of a norm have no
    elements. At the first call, or when a state is loaded, they are made
    and drawn; at the first call the layer becomes a `HyperConv2d`.

    Args:
        out_channels, kernel_size, stride, padding, dilation, groups, bias: as in `nn.LazyConv2d`.
        padding_mode, device, dtype: as in `nn.LazyConv2d`.
        hidden_features, num_features, activation, weight_bias, weight_norm: as in `HyperConv2d`.
        coordinates, backend, algorithm, hypernet, parametrization: as in `HyperConv2d`.

    Raises:
        TypeError, ValueError: as `HyperConv2d`; at the first call, if the groups do not divide the
            channels of the input.
    """

    cls_to_become = HyperConv2d


class LazyHyperConv3d(_LazyHyperConv, HyperConv3d):
    """`HyperConv3d` without `in_channels`; see `LazyHyperConv2d`."""

    cls_to_become = HyperConv3d


class LazyHyperConvTranspose1d(_LazyHyperConv, HyperConvTranspose1d):
    """`HyperConvTranspose1d` without `in_channels`; see `LazyHyperConv2d`."""

    cls_to_become = HyperConvTranspose1d


class LazyHyperConvTranspose2d(_LazyHyperConv, HyperConvTranspose2d):
    """`HyperConvTranspose2d` without `in_channels`; see `LazyHyperConv2d`.

    Args:
        out_channels, kernel_size, stride, padding, output_padding, groups: as in
            `nn.LazyConvTranspose2d`.
        bias, dilation, padding_mode, device, dtype: as in `nn.LazyConvTranspose2d`; and the keywords of
            `HyperConv2d`.
    """

    cls_to_become = HyperConvTranspose2d


class LazyHyperConvTranspose3d(_LazyHyperConv, HyperConvTranspose3d):
    """`HyperConvTranspose3d` without `in_channels`; see `LazyHyperConv2d`."""

    cls_to_become = HyperConvTranspose3d
