"""Functions of tensors, in one, two and three dimensions: checked, then handed to `ops`.

There is one implementation for any number of axes (`basis_conv`, `basis_conv_transpose`, `hyper_conv`,
`hyper_conv_transpose`); the functions with a dimension in their name differ in nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec

import torch
from torch import Tensor

from . import ops, planner
from .backends import reference
from .checks import (
    Meta,
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
)
from .geometry import Geometry
from .memory import remembered
from .taps import check_coordinate_name, taps_beside

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


@remembered
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
    sizes, columns = meta("input", input), meta("coefficients", coefficients)
    offsets = None if bias is None else meta("bias", bias)
    if isinstance(kernel, ops.Mlp):
        known: Meta | _Network = _Network.of(kernel)
    else:
        known = meta("basis", kernel)
    device = sizes.device.type
    same_dtype = device == "meta" or not torch.is_autocast_enabled(device)
    operands = (dims, sizes, columns, known, kernel_size, offsets, spaces, groups)
    geometry = _checked(*operands, backend, algorithm, transposed, same_dtype)
    batched = input if len(sizes.shape) == dims + 2 else input.unsqueeze(0)
    rest = (bias, geometry, backend, algorithm, transposed)
    if device == "meta":  # nothing is computed, so no backend is asked
        output = _without_numbers(batched, coefficients, kernel, bias, geometry, transposed)
    elif isinstance(kernel, ops.Mlp):
        output = ops.hyper_conv(batched, coefficients, kernel, *rest)
    else:
        output = ops.basis_conv(batched, coefficients, kernel, *rest)
    return output if batched is input else output.squeeze(0)


def _without_numbers(
    input: Tensor,
    coefficients: Tensor,
    kernel: Kernel,
    bias: Tensor | None,
    geometry: Geometry,
    transposed: bool,
) -> Tensor:
    """The output on the device meta: of the right sizes, and recorded for backward."""
    if isinstance(kernel, ops.Mlp):
        constant = coefficients.shape[-1] > kernel.features
        kernel = reference.coordinate_mlp(*kernel, constant).view(-1, *geometry.kernel_size)
    return reference.basis_conv(input, coefficients, kernel, bias, geometry, transposed)


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
    coordinates: str | Tensor,
) -> tuple[ops.Mlp, tuple[int, ...]]:
    """A coordinate MLP, checked, and its kernel size."""
    size = per_axis("kernel_size", kernel_size, dims, 1)
    check_name("activation", activation, tuple(reference.ACTIVATIONS))
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
        coordinates = taps_beside(weights[0], size, coordinates, (1.0,) * dims)
    check_coordinates(meta("coordinates", coordinates), size, like)
    return ops.Mlp(coordinates, weights, biases, activation), size


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
    coordinates: str | Tensor = "centered",
    backend: str = "auto",
    algorithm: str = "auto",
) -> Tensor:
    """`hyper_conv1d`, `hyper_conv2d` or `hyper_conv3d`, by the number `dims` of spatial axes."""
    given = (weights, biases, kernel_size, activation, coordinates)
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
    coordinates: str | Tensor = "centered",
    backend: str = "auto",
    algorithm: str = "auto",
) -> Tensor:
    """`hyper_conv_transpose1d`, `2d` or `3d`, by the number `dims` of spatial axes."""
    given = (weights, biases, kernel_size, activation, coordinates)
    mlp, size = _mlp(dims, input, coefficients, *given)
    spaces = (stride, padding, output_padding, dilation)
    operands = (dims, input, coefficients, mlp, size, bias, spaces, groups)
    return convolve(*operands, backend, algorithm, transposed=True)


_AXES = {1: ("L",), 2: ("H", "W"), 3: ("D", "H", "W")}

_CONV = """{dims}-D convolution whose kernel is a combination of R functions shared by all channels.

    Equals `F.conv{dims}d(input, torch.einsum("oir,r{letters}->oi{letters}", coefficients, basis), bias,
    stride, padding, dilation, groups)`, a cross-correlation, without that weight ever being in memory on
    a fused backend. Differentiable in every tensor, to any order. A true convolution, with the kernel
    flipped, is the same call with `basis.flip({axes})`.

    Args:
        input: x, `[B, C_in, {input}]` or `[C_in, {input}]`; float32, float64, float16 or bfloat16, any
            strides; channels last is the fast layout.
        coefficients: A, `[C_out, C_in/groups, R]`, in the input's dtype.{operands}
        stride, dilation, groups: as in `F.conv{dims}d`.
        padding: integers, `'same'` or `'valid'`, as in `F.conv{dims}d`.{choice}"""

_CONV_TRANSPOSE = """{dims}-D transposed convolution whose kernel is a combination of R shared functions.

    Equals `F.conv_transpose{dims}d(input, torch.einsum("ior,r{letters}->io{letters}", coefficients,
    basis), bias, stride, padding, output_padding, groups, dilation)`, without that weight ever being in
    memory on a fused backend. Differentiable in every tensor, to any order.

    Args:
        input: x, `[B, C_in, {input}]` or `[C_in, {input}]`; float32, float64, float16 or bfloat16, any
            strides; channels last is the fast layout.
        coefficients: A, `[C_in, C_out/groups, R]`, in the input's dtype.{operands}
        stride, padding, output_padding, groups, dilation: as in `F.conv_transpose{dims}d`, integers or
            one per axis.{choice}"""

_HYPER = """{dims}-D hyper-convolution: `{base}` whose basis is a coordinate MLP of the taps.

    Args:
        coefficients: as in `{base}`: the MLP's last linear layer. R is the number N of the MLP's
            features, or N + 1 when the last column is that layer's bias.
        weights: per layer of the MLP, `[features, previous features]`; the first has {dims} column(s).
        biases: per layer, `[features]`.
        kernel_size: an integer, or ({kernel}).
        activation: after every layer: `'leaky_relu'` (slope 0.1), `'relu'`, `'gelu'`, `'silu'`,
            `'tanh'`, `'sine'`.
        coordinates: `'centered'` or `'unit'`, see `hypernet.tap_coordinates`; or the coordinates
            themselves, `[K, {dims}]`, K the number of taps, the kernel's last axis fastest.

    All other arguments, the result and the errors are those of `{base}`.
    """

_OPERANDS = """
        basis: phi, `[R, {kernel}]`, in the input's dtype or float32.
        bias: `[C_out]` or None, in the input's dtype."""

_CHOICE = """
        backend: `'auto'`, `'reference'`, `'composite'`, `'triton'` or `'cuda'`. A backend that is named
            is used or refused, never replaced. `'auto'` can be overridden by the environment variable
            HYPERCONV_BACKEND.
        algorithm: `'auto'`, or one of the backend's: `'basis'` (triton, cuda), `'direct'` (triton),
            `'composite'`. The gradients of A and phi have one fused algorithm, which both names of
            triton select.

    Returns:
        `[B, C_out, {output}]` (or unbatched), in the input's dtype, channels last if the input is.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        PlanError: the named backend or algorithm cannot compute this problem.
    """

P = ParamSpec("P")


def _in_dims(
    dims: int, general: Callable[Concatenate[int, P], Tensor], text: str
) -> Callable[P, Tensor]:
    """`general` for `dims` spatial axes, with a name, a signature and a docstring of its own."""

    def function(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        return general(dims, *args, **kwargs)

    axes = _AXES[dims]
    words = {
        "dims": dims,
        "base": f"basis_{general.__name__.removeprefix('hyper_')}{dims}d",
        "letters": "".join(axes).lower(),
        "axes": ", ".join(str(axis) for axis in range(1, dims + 1)),
        "input": ", ".join(axes),
        "output": ", ".join(f"{axis}'" for axis in axes),
        "kernel": ", ".join(f"k{axis.lower()}" for axis in axes),
    }
    words |= {"operands": _OPERANDS.format(**words), "choice": _CHOICE.format(**words)}
    function.__doc__ = text.format(**words)
    function.__name__ = function.__qualname__ = f"{general.__name__}{dims}d"
    signature = inspect.signature(general)
    parameters = list(signature.parameters.values())[1:]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function


basis_conv1d = _in_dims(1, basis_conv, _CONV)
basis_conv2d = _in_dims(2, basis_conv, _CONV)
basis_conv3d = _in_dims(3, basis_conv, _CONV)
basis_conv_transpose1d = _in_dims(1, basis_conv_transpose, _CONV_TRANSPOSE)
basis_conv_transpose2d = _in_dims(2, basis_conv_transpose, _CONV_TRANSPOSE)
basis_conv_transpose3d = _in_dims(3, basis_conv_transpose, _CONV_TRANSPOSE)
hyper_conv1d = _in_dims(1, hyper_conv, _HYPER)
hyper_conv2d = _in_dims(2, hyper_conv, _HYPER)
hyper_conv3d = _in_dims(3, hyper_conv, _HYPER)
hyper_conv_transpose1d = _in_dims(1, hyper_conv_transpose, _HYPER)
hyper_conv_transpose2d = _in_dims(2, hyper_conv_transpose, _HYPER)
hyper_conv_transpose3d = _in_dims(3, hyper_conv_transpose, _HYPER)
