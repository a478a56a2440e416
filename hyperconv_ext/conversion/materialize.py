"""Hyper-convolutions become convolutions again."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..checks import check_bool
from ..modules import HyperConvNd
from .fold import fold_batch_norms
from .padding import PaddedConv1d, PaddedConv2d, PaddedConv3d, PadsInput
from .swap import become

_PADDED = (PaddedConv1d, PaddedConv2d, PaddedConv3d)


def materialize(model: nn.Module, *, inplace: bool = True, fuse_batch_norm: bool = False) -> nn.Module:
    """Make an nn.ConvNd of every hyper-convolution of a model, with the same outputs to rounding.

    Quantisation, ONNX, TorchScript and whatever else knows PyTorch's own layers then works as ever. The
    modules stay the same objects, as in `convert`, so that what was shared still is; device, dtype,
    training flag, requires_grad, bias, memory format and hooks of the call are kept, too. The weight is
    an ordinary parameter, which no optimizer knows yet. Parametrizations, weight norm, spectral norm and
    pruning of a layer are in it as they are at the moment, and are gone.

    A hyper-convolution made of a layer that pads its input at run time becomes an nn.ConvNd that does,
    `hyperconv_ext.conversion.padding.PaddedConv2d` for example.

    Args:
        model: any module; it may be a hyper-convolution itself.
        inplace: change `model`; False leaves it as it is and returns a changed copy.
        fuse_batch_norm: fold the batch norm that follows a hyper-convolution into its weight and bias,
            and make an `nn.Identity` of it; in evaluation mode only. It is done where `torch.fx` can
            trace the model, or the module with both, and shows that nothing else uses the convolution's
            output, as the model is called by default; a warning names the layers where it is not.

    Returns:
        The model, or its copy.

    Raises:
        TypeError: `model` is no module, or one of its layers is of a subclass of a hyper-convolution
            that has a forward of its own.
        ValueError: `fuse_batch_norm` is asked of a model in training mode, or a layer is lazy and has no
            parameters yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}; pass the model")
    for argument, value in (("inplace", inplace), ("fuse_batch_norm", fuse_batch_norm)):
        check_bool(argument, value)
    if fuse_batch_norm and model.training:
        raise ValueError(
            "fuse_batch_norm: expected a model in evaluation mode, since a batch norm normalises by the "
            "batch in training, got one in training mode; call model.eval() before"
        )
    with torch.inference_mode(False), torch.no_grad():
        model = model if inplace else copy.deepcopy(model)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, HyperConvNd)}
        made = [(layer, _dense(name, layer)) for name, layer in layers.items()]
        for layer, conv in made:
            _forget_computed(layer)
            become(layer, conv)
        if fuse_batch_norm:
            reasons = fold_batch_norms(model, dict(layers))
            if reasons:
                lines = [f"{name or '(the model)'}: {reason}" for name, reason in reasons.items()]
                warnings.warn("batch norms that stay: " + "; ".join(lines), stacklevel=2)
    return model


def _dense(name: str, layer: Any) -> nn.Module:
    """The nn.ConvNd for `layer`."""
    if any(map(is_lazy, layer.parameters())):
        raise ValueError(
            f"layer {name!r}: expected parameters, got a lazy layer before its first call; call the "
            f"model once before"
        )
    own = type(layer).forward
    known: Any = next(cls for cls in type(layer).__mro__ if cls.__module__.startswith(_PACKAGE))
    if own is not known.forward or "forward" in vars(layer):
        raise TypeError(
            f"layer {name!r}: expected the forward of {known.__name__}, got {type(layer).__name__} with "
            f"one of its own, which no nn.ConvNd has; replace the layer by hand"
        )
    conv: Any = layer.to_conv()
    if isinstance(layer.bias, nn.Parameter):  # else computed, as by a parametrization
        conv.bias = layer.bias
    if isinstance(layer, PadsInput):
        object.__setattr__(conv, "__class__", _PADDED[conv.weight.dim() - 3])
        conv.input_padding = layer.input_padding
    return conv


def _forget_computed(layer: Any) -> None:
    """Take off the hooks by which torch.nn.utils computes parameters, and what they have computed."""
    for name in ("coefficients", "bias"):
        vars(layer).pop(name, None)
    for name, hooks in vars(layer).items():
        if "_hooks" in name and isinstance(hooks, dict):
            for key in [key for key, hook in hooks.items() if type(hook).__module__ in _COMPUTING]:
                del hooks[key]


_COMPUTING = tuple(f"torch.nn.utils.{name}" for name in ("prune", "spectral_norm", "weight_norm"))
_PACKAGE = __name__.partition(".")[0] + "."
