"""What `repr` says of a layer: arguments that make such a one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .start import DEFAULTS, usual_features

if TYPE_CHECKING:
    from .base import HyperConvNd


def described(layer: HyperConvNd) -> str:
    """Arguments of the constructor; and `tap_spacing`, if `with_kernel_size` has changed it."""
    text = f"{layer.in_channels}, {layer.out_channels}, kernel_size={layer.kernel_size}"
    activation, coordinates = DEFAULTS[layer.parametrization]
    defaults: dict[str, Any] = {
        "stride": (1,) * layer.dims,
        "padding": (0,) * layer.dims,
        "dilation": (1,) * layer.dims,
        "output_padding": (0,) * layer.dims,
        "groups": 1,
        "padding_mode": "zeros",
        "weight_bias": True,
        "parametrization": "orthonormal",
        "coordinates": coordinates,
        "tap_spacing": (1.0,) * layer.dims,
        "backend": "auto",
        "algorithm": "auto",
    }
    if layer.hidden_features is not None:  # of a module that was given they are its own
        defaults |= {"hidden_features": (16, 16), "activation": activation}
        defaults["num_features"] = usual_features(layer)
    for name, default in defaults.items():
        if (value := getattr(layer, name)) != default:
            text += f", {name}={value!r}"
    if layer.weight_norm is not None:
        text += ", weight_norm='batch'"
    return text if layer.bias is not None else text + ", bias=False"
