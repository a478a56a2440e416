"""A model's convolutions become hyper-convolutions."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from .. import modules
from ..checks import check_bool, check_name
from ..fitting import Kernels
from ..modules import HyperConvNd
from ..modules.exchange import NotReached, check_sole, from_conv, kernels_of, least_rank
from .enlarge import enlarged
from .padding import PaddedHyperConv1d, PaddedHyperConv2d, PaddedHyperConv3d
from .report import (
    LayerReport,
    Report,
    dense_multiply_adds,
    describe,
    low_rank_multiply_adds,
    short,
    times,
)
from .sharing import tied
from .source import Left, Source, path_of, plain, source_of
from .swap import become

Size = int | Sequence[int]
_INITS = ("match", "fit")
_PADDED = (PaddedHyperConv1d, PaddedHyperConv2d, PaddedHyperConv3d)
_OPTIONS = tuple(
    name
    for name, parameter in inspect.signature(modules.HyperConv2d).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)


def convert(
    model: nn.Module,
    *,
    inplace: bool = True,
    filter: Callable[[str, nn.Module], Any] | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    kernel_size: Size | Callable[[str, nn.Module], Size | None] | None = None,
    init: str = "match",
    force: bool = False,
    progress: bool = True,
    **hypernet_options: Any,
) -> Report:
    """Make hyper-convolutions of a model's convolutions, where that pays.

    ```python
    model = timm.create_model("resnet18")
    print(convert(model))  # before the optimizer is made: the parameters are others afterwards
    ```

    A layer is converted where the hyper-convolution has fewer parameters than the convolution, and its
    kernel more taps than its rank R. All others stay, and the report says of each why: 1x1 kernels;
    kernels that are parametrised (weight norm, spectral norm, pruning) or share memory with another
    tensor of the model; subclasses with a behaviour of their own; layers that are lazy, quantised,
    sharded or scripted, or whose weight or state has hooks. Subclasses that only pad their input by
    zeros, by constant amounts or as TensorFlow's 'SAME' does, are recognised by watching what they do;
    the padding stays.

    The modules stay the same objects: names, and references from lists or other modules, hold as they
    did, and so a convolution used in several places is still one. Device, dtype, training flag,
    requires_grad, stride, padding and its mode, output padding, the bias (the same parameter), memory
    format, hooks of the call and foreign attributes are kept. What is lost is `isinstance(layer,
    nn.Conv2d)`, the weight's gradient and its state in an optimizer that was made before: make the
    optimizer after this. The model is unchanged where an error is raised. What is already a
    hyper-convolution stays as it is.

    Args:
        model: any module; it may be a convolution itself.
        inplace: change `model`; False changes a deep copy, `report.model`.
        filter: `filter(name, module)` is called for each convolution; one for which it is false stays.
        rank: R of every layer, that is `num_features` = R - 1 (R with `weight_bias=False`).
        max_error: of `init='fit'`, in the place of `rank`: each layer gets the smallest rank at which
            the error of its kernel is not above this. Where none is, or it does not pay at that rank,
            the layer stays.
        kernel_size: enlarge kernels to this on the way, the padding with them, so that output sizes
            stay: one integer, one per axis, or a function of (name, module) that returns this, or None
            for no change. No axis shrinks. The cost of a hyper-convolution hardly depends on it. Where
            the kernel would grow by an odd number of taps, or the layer pads one side only, it stays;
            what a model pads outside its layers is not seen: leave causal convolutions out by the
            function, or by `filter`.
        init: `'match'`: the kernels are drawn anew, as large as they were: to train. `'fit'`: they come
            as near to the old ones as their rank allows, for a trained model; with `kernel_size`, to
            the old kernel with zeros around it.
        force: convert also what does not pay.
        progress: show a bar, if tqdm is installed.
        hypernet_options: the layers' keywords: `hidden_features`, `num_features`, `activation`,
            `weight_bias`, `weight_norm`, `coordinates`, `backend`, `algorithm`, `hypernet`,
            `parametrization`, see `HyperConv2d`. `hypernet` is a module, of which every layer gets a
            copy, or a function of (name, module) that returns one.

    Returns:
        A `Report`, which prints as a table: of each layer the parameters, the multiply-adds, the error
        of the fit and the time; `report.model` is the model.

    Raises:
        TypeError, ValueError: an argument is wrong, or does not fit a layer, which is named.
    """
    check_name("init", init, _INITS)
    for argument, value in (("inplace", inplace), ("force", force), ("progress", progress)):
        check_bool(argument, value)
    _check_model(model)
    _check_options(hypernet_options)
    if max_error is not None:
        check_sole(max_error, rank, init, hypernet_options)
    plan = _Plan(filter, rank, max_error, kernel_size, init, force, hypernet_options)
    with torch.inference_mode(False), torch.no_grad():
        model = model if inplace else copy.deepcopy(model)
        before = _parameters(model)
        names, shared = _names(model), tied(model)
        rows, made = [], []
        for module in _shown(list(names), progress):
            row = LayerReport(names[module][0], describe(module), tuple(names[module][1:]))
            layer = plan.apply(row, module, shared.get((id(module), "weight")))
            rows.append(row)
            if layer is not None:
                made.append((module, layer))
        for module, layer in made:
            become(module, layer)
    return Report(model, rows, before, _parameters(model))


class _Plan(NamedTuple):
    """The arguments of `convert` that each layer asks about."""

    filter: Callable[[str, nn.Module], Any] | None
    rank: int | None
    max_error: float | None
    kernel_size: Any
    init: str
    force: bool
    options: dict[str, Any]

    def apply(self, row: LayerReport, module: nn.Module, tied_to: str | None) -> HyperConvNd | None:
        """The layer for `module`, or None; `row` gets the figures, or the reason."""
        start = time.perf_counter()
        row.parameters_before = row.parameters_after = _parameters(module)
        row.multiply_adds_before = row.multiply_adds_after = _multiply_adds(module)
        try:
            layer = self._layer(row.name, module, tied_to)
        except Left as left:
            row.reason = str(left)
            return None
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {row.name!r}: {error}") from error
        row.after = f"{type(layer).__name__}({times(layer.kernel_size)}, R={layer.rank})"
        row.parameters_after = _parameters(layer)
        row.multiply_adds_after = _multiply_adds(layer)
        row.rank = layer.rank
        fit: Any = layer.fit_result
        if fit is not None:
            row.error, row.best_error = fit.error, fit.best_error
        row.seconds = time.perf_counter() - start
        return layer

    def _layer(self, name: str, module: nn.Module, tied_to: str | None) -> HyperConvNd:
        if isinstance(module, HyperConvNd):
            raise Left("is a hyper-convolution already")
        if self.filter is not None and not self.filter(name, module):
            raise Left("not chosen by the filter")
        if not isinstance(module, _ConvNd):
            raise Left(f"{path_of(module)} is not one of torch.nn's convolutions; convert before")
        if tied_to is not None:
            raise Left(f"its weight shares its memory with {tied_to}")
        source = source_of(module)
        wanted = self.kernel_size
        if wanted is not None and not isinstance(wanted, (int, Sequence)):
            wanted = wanted(name, module)
        if wanted is not None:
            source = enlarged(source, wanted)
        options = self.options
        if isinstance(options.get("hypernet"), nn.Module):
            options = options | {"hypernet": copy.deepcopy(options["hypernet"])}
        elif "hypernet" in options:
            options = options | {"hypernet": options["hypernet"](name, module)}
        return self._fitting(source, module, options)

    def _fitting(self, source: Source, module: Any, options: dict[str, Any]) -> HyperConvNd:
        """The layer; Left where none reaches `max_error`, or where it does not pay."""
        new, limit = source.conv.kernel_size, self.max_error
        if prod(new) == 1 and not self.force:
            raise Left(f"a {times(new)} kernel has one tap, of which nothing can be saved")
        kernels, rank = None, self.rank
        if limit is not None:
            kernels = kernels_of(source.conv.weight)
            rank = least_rank(kernels, limit, options)
        if not self.force:  # before anything is fitted
            meta = plain(source.conv, weight=_without_numbers(source.conv.weight))
            drawn = _made(source._replace(conv=meta), options, rank, None, "match")
            self._check_gain(source, module, drawn)
        if limit is None:
            return _made(source, options, rank, None, self.init)
        try:
            layer = _made(source, options, None, limit, "fit", kernels)
        except NotReached as reached:
            best = reached.best
            raise Left(
                f"its least error, {best.error:.3g} at rank {best.rank}, is above {limit}"
            ) from reached
        if not self.force:
            self._check_gain(source, module, layer)
        return layer

    def _check_gain(self, source: Source, module: Any, layer: HyperConvNd) -> None:
        """Raise Left where `layer` has no fewer parameters, or no more taps than its rank."""
        new = source.conv.kernel_size
        limit = "" if self.max_error is None else f", for an error of at most {self.max_error}"
        if prod(new) <= layer.rank:
            raise Left(f"a kernel of {times(new)} has no more taps than the rank, {layer.rank}{limit}")
        parameters, old = _parameters(module), tuple(module.weight.shape[2:])
        if _parameters(layer) >= parameters:
            kind = "depthwise " if source.conv.groups == source.conv.in_channels > 1 else ""
            raise Left(
                f"its {kind}{times(old)} kernel has {short(parameters)} parameters, and would have "
                f"{short(_parameters(layer))}{'' if old == new else ' at ' + times(new)}{limit}"
            )


def _made(
    source: Source,
    options: dict[str, Any],
    rank: int | None,
    max_error: float | None,
    init: str,
    kernels: Kernels | None = None,
) -> HyperConvNd:
    """The hyper-convolution of these options; the rest as `exchange.from_conv` takes it."""
    conv = source.conv
    kind = _layer_class(conv, source.padded)
    layer: Any = from_conv(kind, conv, rank, max_error, init, False, options, kernels)
    if source.padded:
        layer.input_padding = source.input_padding
    if conv.bias is not None:
        layer.bias = conv.bias
    return layer


def _layer_class(conv: Any, padded: bool) -> Any:
    dims = len(conv.kernel_size)
    if padded:
        return _PADDED[dims - 1]
    return getattr(modules, f"HyperConv{'Transpose' * conv.transposed}{dims}d")


def _without_numbers(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(weight, device="meta"))


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not is_lazy(p))


def _multiply_adds(module: nn.Module) -> int:
    """For one position; 0 where it is not known."""
    if isinstance(module, HyperConvNd):
        # W is built, and convolved with, where that is cheaper.
        return min(low_rank_multiply_adds(module), dense_multiply_adds(module))
    return dense_multiply_adds(module) if isinstance(module, _ConvNd) else 0


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The convolutions of a model, of whatever kind, each with all its names."""
    found: dict[nn.Module, list[str]] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(inside):  # a hyper-network may convolve, too
            continue
        if isinstance(module, HyperConvNd):
            inside += (f"{name}." if name else "",)
        if _is_convolution(module):
            found.setdefault(module, []).append(name)
    return found


def _is_convolution(module: nn.Module) -> bool:
    if isinstance(module, (HyperConvNd, _ConvNd)):
        return True
    sizes = ("in_channels", "out_channels", "kernel_size")
    return all(hasattr(module, name) for name in sizes) and not any(True for _ in module.children())


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}; pass the model")
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "model: expected one that is not wrapped yet, got DistributedDataParallel, which goes on "
            "reducing the gradients of the old parameters; convert before it is wrapped"
        )


def _check_options(options: dict[str, Any]) -> None:
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise TypeError(
            f"{unknown[0]}: expected a keyword of the layers ({', '.join(_OPTIONS)}), got "
            f"{options[unknown[0]]!r}; leave it out"
        )


def _shown(items: list[Any], progress: bool) -> Iterable[Any]:
    """`items`, with a bar while they are gone through if tqdm is installed."""
    if not progress or importlib.util.find_spec("tqdm") is None:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc="convert", unit="layer", leave=False)
