"""What a state must be for a layer to load it, besides the sizes that nn.Module compares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.nn.parameter import is_lazy

from ..hypernet import CoordinateMLP
from .start import PARAMETRIZATIONS

if TYPE_CHECKING:
    from .base import HyperConvNd


def refuse_other_kinds(
    layer: HyperConvNd, state_dict: Mapping[str, Any], prefix: str, errors: list[str]
) -> None:
    """Add to `errors` what makes the state that of another kind of layer, and the remedy."""
    coefficients, mixing = (state_dict.get(prefix + name) for name in ("coefficients", "mixing.weight"))
    if coefficients is None:
        return
    # The same parameters mean another kernel: refused where missing keys are not, too.
    mixed = mixing is not None or f"{prefix}mixing.bias" in state_dict
    if mixed != (layer.mixing is not None):
        expected, got = ("with", "without")[mixed], ("without", "with")[mixed]
        errors.append(
            f"{prefix}mixing: expected a state {expected} it for parametrization="
            f"{layer.parametrization!r}, got one {got}; make the layer with "
            f"parametrization={PARAMETRIZATIONS[not mixed]!r}"
            + ("" if mixed else " (versions before it was introduced had that form)")
        )
    if mixing is not None:
        features = mixing.shape[1]
    elif is_lazy(coefficients):
        return
    else:
        features = coefficients.shape[2] - layer.weight_bias
    if features != layer.num_features and isinstance(layer.hypernet, CoordinateMLP):
        errors.append(
            f"{prefix}coefficients: expected a state of num_features={layer.num_features}, "
            f"got one of {features}; make the layer with num_features={features}"
        )
