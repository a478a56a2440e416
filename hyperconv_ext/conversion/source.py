"""What a convolution of a model computes, as a plain nn.ConvNd; or why it is not taken for one."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from ..checks import DTYPES
from .padding import flat, observe, same_pads
from .swap import has_state_dict_hooks

_PLAIN: tuple[Any, ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
# What a subclass may define and compute the same; `forward` and what it calls are looked at.
_HARMLESS = {
    "__init__",
    "__init_subclass__",
    "__new__",
    "__repr__",
    "_conv_forward",
    "_get_name",
    "extra_repr",
    "forward",
    "reset_parameters",
}


class Left(Exception):  # noqa: N818  # an answer, no error
    """A layer is left as it is; the text says why."""


class Source(NamedTuple):
    """A convolution of a model.

    Attributes:
        conv: a plain nn.ConvNd, with the layer's own parameters, that computes what the layer does.
        padded: whether it does that of its padded input.
        input_padding: how that is padded, see `padding.PadsInput`.
    """

    conv: Any
    padded: bool = False
    input_padding: list[int] | None = None


def source_of(layer: _ConvNd) -> Source:
    """The plain convolution that `layer` is.

    Its settings are those of the moment, and its sizes those of its weight, as PyTorch's own are: models
    change both after they are made.

    Raises:
        Left: it is none, or has what a layer with other parameters could not keep.
    """
    _check_parameters(layer)
    _check_hooks(layer)
    base = next((cls for cls in _PLAIN if isinstance(layer, cls)), None)
    if base is None or layer.weight.dim() - 2 != len(base(1, 1, 1, device="meta").kernel_size):
        raise Left(f"{path_of(layer)} is no nn.Conv1d, 2d or 3d, nor a transposed one")
    if _computes_as(layer, base):
        return Source(plain(layer, base))
    observed = None if base in _PLAIN[3:] else observe(layer)
    if observed is None:
        raise Left(
            f"{path_of(layer)} has a forward of its own, which does more than to pad by zeros and "
            f"to convolve"
        )
    spaces = {name: getattr(observed, name) for name in ("stride", "dilation", "groups")}
    if observed.pads is None:
        return Source(plain(layer, base, padding=0, padding_mode="zeros", **spaces), True)
    padding: Any = tuple(low for low, _ in observed.pads)
    if any(low != high for low, high in observed.pads):
        kernel_size, fixed = list(layer.weight.shape[2:]), flat(observed.pads)
        stride, dilation = list(observed.stride), list(observed.dilation)
        if max(stride) > 1 or fixed != same_pads([1] * len(stride), kernel_size, stride, dilation):
            return Source(plain(layer, base, padding=0, padding_mode="zeros", **spaces), True, fixed)
        padding = "same"
    return Source(plain(layer, base, padding=padding, padding_mode="zeros", **spaces))


def plain(layer: _ConvNd, base: Any = None, **settings: Any) -> Any:
    """A convolution of the class `base`, by default the layer's own, with the parameters of `layer`.

    Args:
        settings: of nn.ConvNd's constructor, where they are not the layer's; also `weight`.
    """
    weight: Tensor = settings.pop("weight", layer.weight)
    base = base or type(layer)
    transposed = base in _PLAIN[3:]
    names = ["stride", "padding", "dilation", "groups", "padding_mode"]
    given = {name: getattr(layer, name) for name in names + ["output_padding"] * transposed} | settings
    channels = [weight.shape[0], weight.shape[1] * given["groups"]]
    made: Any = base(
        *(channels if transposed else channels[::-1]),
        tuple(weight.shape[2:]),
        bias=layer.bias is not None,
        device="meta",
        dtype=weight.dtype,
        **given,
    )
    made.weight, made.bias = weight, layer.bias
    return made.train(layer.training)


def path_of(layer: nn.Module) -> str:
    """The full name of its class: many are called Conv2d."""
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _check_parameters(layer: _ConvNd) -> None:
    names, weight = set(layer._parameters), layer._parameters.get("weight")
    if weight is not None and is_lazy(weight):
        raise Left("lazy and not initialised; call the model once before")
    parametrized = getattr(layer, "parametrizations", {})
    if parametrized or weight is None or not isinstance(weight, nn.Parameter):
        computed = " and ".join(parametrized) or "weight"
        raise Left(
            f"its {computed} is computed ({', '.join(sorted(names - {'bias'})) or 'by its class'}); "
            f"remove the parametrization, weight norm, spectral norm or pruning before"
        )
    others = sorted(name for name, _ in layer.named_parameters() if name not in ("weight", "bias"))
    others += sorted(name for name, _ in layer.named_buffers())
    if others:
        raise Left(f"{path_of(layer)} has tensors that a convolution has not: {', '.join(others[:3])}")
    if type(weight) is not nn.Parameter:
        raise Left(f"its weight is a {type(weight).__name__}; convert before it is sharded or quantised")
    if weight.dtype not in DTYPES:
        raise Left(f"its weight is of {weight.dtype}, which no hyper-convolution has")
    if weight.numel() == 0:
        raise Left("its weight has no elements")


def _check_hooks(layer: _ConvNd) -> None:
    weight: Any = layer.weight
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        raise Left("its weight has hooks, and a hyper-convolution has no such parameter")
    if has_state_dict_hooks(layer):
        raise Left("it has hooks on its state, which will be another one")
    replaced = {"forward", "_conv_forward", "__call__"} & set(vars(layer))
    if replaced:
        raise Left(f"its {replaced.pop()} was replaced on the instance; undo that before")


def _computes_as(layer: _ConvNd, base: type[nn.Module]) -> bool:
    """Whether the layer's class computes what `base` does, by its own methods."""
    for cls in type(layer).__mro__[: type(layer).__mro__.index(base)]:
        for name, value in vars(cls).items():
            known = name in ("weight", "bias") or hasattr(base, name)
            if known and name not in _HARMLESS and (callable(value) or hasattr(value, "__get__")):
                raise Left(f"{path_of(layer)} has a behaviour of its own: it defines {name}")
    named = ("forward", "_conv_forward")
    same = all(getattr(type(layer), name, None) is getattr(base, name, None) for name in named)
    if same and layer.padding_mode != "zeros" and base not in _PLAIN[3:]:
        _check_kept_padding(layer)
    return same


def _check_kept_padding(layer: Any) -> None:
    """nn.ConvNd with another mode than zeros pads as when it was made, whatever `padding` is now."""
    fresh = plain(layer, next(cls for cls in _PLAIN if isinstance(layer, cls)))
    if fresh._reversed_padding_repeated_twice != layer._reversed_padding_repeated_twice:
        raise Left(
            f"its padding was changed to {layer.padding!r}, which nn.ConvNd with padding_mode="
            f"{layer.padding_mode!r} does not follow; make it anew"
        )
