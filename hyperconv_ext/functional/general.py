"""The functions for any number of spatial axes: checked, then handed to `ops`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops, planner
from ..autocast import autocast_dtype
from ..backends.reference import ACTIVATIONS
from ..caching import memoize
from ..checks import (
    Meta,
    check_bool,
    check_coordinates,
    check_mlp,
    check_name,
    check_tensor,
    check_tensors,
    conv_geometry,
    conv_transpose_geometry,
    meta,
    metas,
    per_axis,
    positive_number,
)
from ..compilation import in_graph
from ..geometry import Geometry
from ..taps import check_coordinate_name

Padding = int | Sequence[int] | str


Kernel = Tensor | ops.Mlp  # phi `[R, *kernel_size]`, or the MLP whose output it is


class _Network(NamedTuple):
    """What is checked of an MLP whose layers are known to fit each other."""

    features: int
    dtype: torch.dtype  # of phi
    device: torch.device

    @classmethod
    def of(cls, mlp: ops.Mlp) -> _Network:
        last = mlp.weights[-1]
        wide = torch.float64 if last.dtype == torch.float64 else torch.float32
        return cls(last.shape[0], wide, last.device)


@memoize
def _checked(
    dims: int,
    input: Meta,
    coefficients: Meta,
    kernel: Meta | _Network,
    kernel_size: Sequence[int],
    bias: Meta | None,
    spaces: tuple[int | Sequence[int] | str, ...],
    groups: int,
    backend: str,
    algorithm: str,
    transposed: bool,
    same_dtype: bool,
) -> Geometry:
    """The geometry, if the operands and then the geometry are sound; arguments as for `convolve`."""
    check_name("backend", backend, planner.BACKEND_NAMES)
    check_name("algorithm", algorithm, planner.ALGORITHM_NAMES)
    if isinstance(kernel, _Network):  # with the constant function if A has its column
        rank = kernel.features + (coefficients.shape[-1:] == (kernel.features + 1,))
        kernel = Meta(torch.Size((rank, *kernel_size)), kernel.dtype, kernel.device)
    check_tensors(dims, input, coefficients, kernel, bias, groups, transposed, same_dtype)
    geometry: Any = conv_transpose_geometry if transposed else conv_geometry
    return geometry(input, kernel.shape[1:], *spaces, groups)


def checked_geometry(
    dims: int,
    input: Tensor,
    coefficients: Tensor,
    kernel: Kernel,
    kernel_size: Sequence[int],
    bias: Tensor | None,
    spaces: tuple[int | Sequence[int] | str, ...],
    groups: int,
    backend: str,
    algorithm: str,
    transposed: bool,
) -> Geometry:
    """The geometry of what `convolve` is called with, if that is sound.

    Raises:
        TypeError, ValueError: it is not.
    """
    sizes, columns = meta("input", input), meta("coefficients", coefficients)
    offsets = None if bias is None else meta("bias", bias)
    if isinstance(kernel, ops.Mlp):
        known: Meta | _Network = _Network.of(kernel)
    else:
        known = meta("basis", kernel)
    same_dtype = autocast_dtype(sizes.device) is None
    operands = (dims, sizes, columns, known, kernel_size, offsets, spaces, groups)
    return _checked(*operands, backend, algorithm, transposed, same_dtype)


_steps: dict[Hashable, ops.Step | None] = {}  # of operands that are known to be sound
_MOST_STEPS = 4096


def _keep(key: Hashable, step: ops.Step | None) -> None:
    if len(_steps) >= _MOST_STEPS:
        _steps.clear()
    _steps[key] = step


@in_graph
def convolve(
    dims: int,
    input: Tensor,
    coefficients: Tensor,
    kernel: Kernel,
    kernel_size: Sequence[int],
    bias: Tensor | None,
    spaces: tuple[int | Sequence[int] | str, ...],
    groups: int,
    backend: str,
    algorithm: str = "auto",
    transposed: bool = False,
) -> Tensor:
    """What every function and layer comes to.

    `kernel_size` says where an MLP's taps lie; `spaces` are (stride, padding, dilation), or of a
    transposed convolution (stride, padding, output_padding, dilation).
    """
    place = (dims, kernel_size, spaces, groups, backend, algorithm, transposed)
    key = step = None
    if isinstance(kernel, ops.Mlp):
        state = ops.step_key(input, coefficients, kernel, bias, backend)
        if state is not None:
            key = (state, place)
            try:
                step = _steps.get(key)
            except TypeError:  # it holds lists
                key = None
        if step is not None:
            return step(input, coefficients, kernel, bias)
    operands = (dims, input, coefficients, kernel, kernel_size, bias, spaces, groups)
    geometry = checked_geometry(*operands, backend, algorithm, transposed)
    batched = input if input.dim() == dims + 2 else input.unsqueeze(0)
    rest = (bias, geometry, backend, algorithm, transposed)
    if isinstance(kernel, ops.Mlp):
        if key is not None and key not in _steps and batched is input:
            _keep(key, ops.step(input, coefficients, kernel, *rest))
        output = ops.hyper_conv(batched, coefficients, kernel, *rest)
    else:
        output = ops.basis_conv(batched, coefficients, kernel, *rest)
    return output if batched is input else output.squeeze(0)


def basis_conv(
    dims: int,
    input: Tensor,
    coefficients: Tensor,
    basis: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
    algorithm: str = "auto",
) -> Tensor:
    """`basis_conv1d`, `basis_conv2d` or `basis_conv3d`, by the number `dims` of spatial axes."""
    spaces = (stride, padding, dilation)
    return convolve(dims, input, coefficients, basis, (), bias, spaces, groups, backend, algorithm)


def basis_conv_transpose(
    dims: int,
    input: Tensor,
    coefficients: Tensor,
    basis: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    backend: str = "auto",
    algorithm: str = "auto",
) -> Tensor:
    """`basis_conv_transpose1d`, `2d` or `3d`, by the number `dims` of spatial axes."""
    spaces = (stride, padding, output_padding, dilation)
    operands = (dims, input, coefficients, basis, (), bias, spaces, groups)
    return convolve(*operands, backend, algorithm, transposed=True)


def _mlp(
    dims: int,
    input: Tensor,
    coefficients: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    kernel_size: int | Sequence[int],
    activation: str,
    weight_gain: float,
    linear_output: bool,
    coordinates: str | Tensor,
) -> tuple[ops.Mlp, tuple[int, ...]]:
    """A coordinate MLP, checked, and its kernel size."""
    size = per_axis("kernel_size", kernel_size, dims, 1)
    check_name("activation", activation, tuple(ACTIVATIONS))
    gain = positive_number("weight_gain", weight_gain)
    check_bool("linear_output", linear_output)
    like, columns = meta("input", input), meta("coefficients", coefficients)
    check_tensor("input", like)
    check_tensor("coefficients", columns, like.device)
    check_mlp(metas("weights", weights), metas("biases", biases), dims, like)
    features = weights[-1].shape[0]
    if columns.shape[-1:] not in ((features,), (features + 1,)):
        raise ValueError(
            f"coefficients: expected a last axis R={features} (the MLP's features) or {features + 1} "
            f"(and a bias), got {list(columns.shape)}; match them"
        )
    if isinstance(coordinates, str):
        check_coordinate_name(coordinates)
        coordinates = ops.taps_beside(weights[0], size, coordinates, (1.0,) * dims)
    check_coordinates(meta("coordinates", coordinates), size, like)
    return ops.Mlp(coordinates, weights, biases, activation, gain, linear_output), size


def hyper_conv(
    dims: int,
    input: Tensor,
    coefficients: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    kernel_size: int | Sequence[int],
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str = "leaky_relu",
    weight_gain: float = 1.0,
    linear_output: bool = False,
    coordinates: str | Tensor = "centered",
    backend: str = "auto",
    algorithm: str = "auto",
) -> Tensor:
    """`hyper_conv1d`, `hyper_conv2d` or `hyper_conv3d`, by the number `dims` of spatial axes."""
    settings = (activation, weight_gain, linear_output)
    given = (weights, biases, kernel_size, *settings, coordinates)
    mlp, size = _mlp(dims, input, coefficients, *given)
    operands = (dims, input, coefficients, mlp, size, bias, (stride, padding, dilation), groups)
    return convolve(*operands, backend, algorithm)


def hyper_conv_transpose(
    dims: int,
    input: Tensor,
    coefficients: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    kernel_size: int | Sequence[int],
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str = "leaky_relu",
    weight_gain: float = 1.0,
    linear_output: bool = False,
    coordinates: str | Tensor = "centered",
    backend: str = "auto",
    algorithm: str = "auto",
) -> Tensor:
    """`hyper_conv_transpose1d`, `2d` or `3d`, by the number `dims` of spatial axes."""
    settings = (activation, weight_gain, linear_output)
    given = (weights, biases, kernel_size, *settings, coordinates)
    mlp, size = _mlp(dims, input, coefficients, *given)
    spaces = (stride, padding, output_padding, dilation)
    operands = (dims, input, coefficients, mlp, size, bias, spaces, groups)
    return convolve(*operands, backend, algorithm, transposed=True)
