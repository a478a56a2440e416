"""What a layer keeps in evaluation: its kernel, until a byte of what that is computed from changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import layout, ops, planner
from ..autocast import autocast_dtype, for_autocast
from ..backends.cpu import library
from ..backends.library import convolver
from ..backends.reference import materialize_weight
from ..functional.general import checked_geometry
from ..hypernet import BasisTable
from ..hypernet.inspection import calls_forward_only, watching_every_module

if TYPE_CHECKING:
    from .base import HyperConvNd

_TENSOR: Any = Tensor  # its properties, as descriptors
_data_ptr, _is_contiguous = Tensor.data_ptr, Tensor.is_contiguous
_is_cpu, _nbytes = _TENSOR.is_cpu.__get__, _TENSOR.nbytes.__get__
_shape, _dtype = _TENSOR.shape.__get__, _TENSOR.dtype.__get__

_Convolver = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_MOST_CONVOLVERS = 256


class KeptKernel(NamedTuple):
    """A kernel, and W by dtype and memory format as far as somebody asked for it."""

    key: tuple[Any, ...]
    coefficients: Tensor
    basis: Tensor
    weights: dict[tuple[torch.dtype, bool], Tensor]

    def weight(self, dtype: torch.dtype, channels_last: bool) -> Tensor:
        """W in `dtype`, channels last as the input: the library would rearrange it at every call."""
        weight = self.weights.get((dtype, channels_last))
        if weight is None:
            with _plain_tensors():
                weight = materialize_weight(self.coefficients.to(dtype), self.basis)
                weight = layout.as_channels_last(weight) if channels_last else weight
            self.weights[dtype, channels_last] = weight
        return weight


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Tensors made in its body can be used in any mode later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class KernelKeeper:
    """Holds a layer's kernel between calls. Copies and pickles of a layer begin without.

    `convolvers` are the library's convolutions by what decides them; None: something else is faster.
    """

    def __init__(self) -> None:
        self.kernel: KeptKernel | None = None
        self.convolvers: dict[tuple[Any, ...], _Convolver | None] = {}

    def __reduce__(self) -> Any:
        """An empty one, when copied or pickled."""
        return KernelKeeper, ()


def keeps_kernel(layer: HyperConvNd) -> bool:
    """Whether the layer may keep its kernel now: nobody records what it does, the engine is there."""
    return (
        not torch.compiler.is_compiling()  # first: what is asked for makes a graph a graph of it alone
        and not layer.training
        and not torch.is_grad_enabled()
        and not torch.jit.is_tracing()
        and not library.reason()
    )


def kept_kernel(layer: HyperConvNd, mlp: ops.Mlp | None) -> KeptKernel | None:
    """The layer's kernel, computed again if it has changed; None if it cannot be known whether it has.

    That is asked of the memory of the tensors that decide it, by a digest, which takes microseconds:
    version counters do not see a write through `.data`, or by somebody else who owns the memory.
    `mlp` is the layer's `_mlp()`.
    """
    sources = _sources(layer, mlp)
    if sources is None:
        return None
    tensors, settings = sources
    if not ops.can_skip_dispatch(tensors):
        return None
    if not (all(map(_is_cpu, tensors)) and all(map(_is_contiguous, tensors))):
        return None
    digest = library.digest(list(map(_data_ptr, tensors)), list(map(_nbytes, tensors)))
    key = (digest, *map(_shape, tensors), *map(_dtype, tensors), *settings)
    keeper = _keeper(layer)
    kernel = keeper.kernel
    if kernel is None or kernel.key != key:
        with _plain_tensors():
            kernel = keeper.kernel = KeptKernel(key, *layer.kernel(), {})
    return kernel


def _keeper(layer: HyperConvNd) -> KernelKeeper:
    if layer._keeper is None:
        layer._keeper = KernelKeeper()
    return layer._keeper


_Sources = tuple[tuple[Tensor, ...], tuple[Any, ...]]  # tensors and settings that decide something


def _sources(layer: HyperConvNd, mlp: ops.Mlp | None) -> _Sources | None:
    """What decides the kernel; None if more than tensors and settings may."""
    norm: Any = layer._modules.get("weight_norm")
    of_basis = _of_table(layer) if mlp is None else _of_mlp(mlp)
    if of_basis is None or not (norm is None or norm.is_ours()):
        return None
    tensors = (layer._parameter("coefficients"), *of_basis[0])
    settings = (layer.kernel_size, *of_basis[1])
    if norm is None:
        return tensors, settings
    return (*tensors, norm.weight, norm.bias), (*settings, norm.eps)


def _of_mlp(mlp: ops.Mlp) -> _Sources:
    coordinates, weights, biases, *settings = mlp
    return (coordinates, *weights, *biases), tuple(settings)


def _of_table(layer: HyperConvNd) -> _Sources | None:
    """Of a free table, which is no MLP but depends on nothing else either."""
    table: Any = layer._modules["hypernet"]
    if not (calls_forward_only(table, BasisTable) and not watching_every_module()):
        return None
    if layer.mixing is None:
        return (table.table,), ()
    mixed, window = layer.mixing.linear(table.table), layer.mixing.window
    scale = () if window is None else (window,)
    return None if mixed is None else ((table.table, *mixed, *scale), ())


def convolve_by_kept(layer: HyperConvNd, input: Tensor, spaces: tuple[Any, ...]) -> Tensor | None:
    """The library's convolution by the kept W; None where something else is to compute the output.

    Arguments as of the layer's `_convolve`.
    """
    bias, coefficients = layer._parameter("bias"), layer._parameter("coefficients")
    given = (input,) if bias is None else (input, bias)
    if not ops.can_skip_dispatch(given) or not input.is_cpu or input.is_nested:
        return None
    cast = autocast_dtype(input.device)
    key = (
        *(input.shape, input.dtype, coefficients.shape, coefficients.dtype),
        *(None if bias is None else (bias.shape, bias.dtype), cast),
        *(spaces, layer.groups, layer.algorithm, planner.requested(layer.backend)),
    )
    convolvers = _keeper(layer).convolvers
    if key not in convolvers:
        if len(convolvers) >= _MOST_CONVOLVERS:
            convolvers.clear()
        convolvers[key] = _convolver(layer, input, spaces)
    convolve = convolvers[key]
    kernel = None if convolve is None else kept_kernel(layer, layer._mlp())
    if convolve is None or kernel is None:
        return None
    if cast is not None:
        input, coefficients = for_autocast(input), for_autocast(coefficients)
        bias = None if bias is None else for_autocast(bias)
    last = 1 < layer.dims == input.dim() - 2 and layout.channels_last(input)
    return convolve(input, kernel.weight(coefficients.dtype, last), bias)


def _convolver(layer: HyperConvNd, input: Tensor, spaces: tuple[Any, ...]) -> _Convolver | None:
    """The library's convolution of inputs like this by W, if the layer would choose it."""
    geometry = checked_geometry(*layer._arguments(input, spaces))
    coefficients = for_autocast(layer._parameter("coefficients"))
    batched = for_autocast(input if input.dim() == layer.dims + 2 else input.unsqueeze(0))
    where = (geometry, layer.backend, layer.algorithm, layer.transposed)
    if ops.resolve(batched, coefficients, *where, kept=True) != "reference":
        return None
    planner.check_reference(layer.algorithm)
    convolve = convolver(geometry, layer.groups, layer.transposed)
    if input.dim() == batched.dim():
        return convolve
    return lambda input, weight, bias: convolve(input.unsqueeze(0), weight, bias).squeeze(0)
