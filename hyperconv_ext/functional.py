"""Functions of tensors, in one, two and three dimensions: checked, then handed to `ops`.

There is one implementation for any number of axes (`basis_conv`, `basis_conv_transpose`, `hyper_conv`,
`hyper_conv_transpose`); the functions with a dimension in their name differ in nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

from . import ops, planner
from .backends.reference import ACTIVATIONS
from .checks import (
    check_mlp,
    check_name,
    check_tensor,
    check_tensors,
    conv_geometry,
    conv_transpose_geometry,
    per_axis,
)
from .geometry import Geometry
from .hypernet import tap_coordinates

Padding = int | Sequence[int] | str


def _convolve(
    dims: int,
    input: Tensor,
    coefficients: Tensor,
    basis: Tensor,
    bias: Tensor | None,
    geometry: Callable[[], Geometry],
    groups: int,
    backend: str,
    algorithm: str,
    transposed: bool,
) -> Tensor:
    """Check the operands, then the geometry; batched or not."""
    check_name("backend", backend, planner.BACKEND_NAMES)
    check_name("algorithm", algorithm, planner.ALGORITHM_NAMES)
    check_tensors(dims, input, coefficients, basis, bias, groups, transposed)
    where = geometry()
    batched = input if input.dim() == dims + 2 else input.unsqueeze(0)
    operands = (batched, coefficients, basis, bias, where, backend, algorithm, transposed)
    output = ops.basis_conv(*operands)
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

    def geometry() -> Geometry:
        return conv_geometry(input, basis.shape[1:], stride, padding, dilation, groups)

    operands = (dims, input, coefficients, basis, bias, geometry, groups, backend, algorithm)
    return _convolve(*operands, transposed=False)


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

    def geometry() -> Geometry:
        size = basis.shape[1:]
        return conv_transpose_geometry(input, size, stride, padding, output_padding, dilation, groups)

    operands = (dims, input, coefficients, basis, bias, geometry, groups, backend, algorithm)
    return _convolve(*operands, transposed=True)


def _basis(
    dims: int,
    input: Tensor,
    coefficients: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    kernel_size: int | Sequence[int],
    activation: str,
    coordinates: str,
    backend: str,
) -> Tensor:
    """phi `[R, *kernel_size]` of a coordinate MLP, checked."""
    size = per_axis("kernel_size", kernel_size, dims, 1)
    check_name("activation", activation, tuple(ACTIVATIONS))
    check_name("backend", backend, planner.BACKEND_NAMES)
    check_tensor("input", input)
    check_tensor("coefficients", coefficients, input.device)
    check_mlp(weights, biases, dims, input)
    features = weights[-1].shape[0]
    rank = coefficients.shape[-1] if coefficients.dim() else 0
    if rank not in (features, features + 1):
        raise ValueError(
            f"coefficients: expected a last axis R={features} (the MLP's features) or {features + 1} "
            f"(and a bias), got {list(coefficients.shape)}; match them"
        )
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    taps = tap_coordinates(size, coordinates, input.device, dtype)
    basis = ops.coordinate_mlp(taps, weights, biases, activation, rank > features, backend)
    return basis.view(rank, *size)


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
    coordinates: str = "centered",
    backend: str = "auto",
    algorithm: str = "auto",
) -> Tensor:
    """`hyper_conv1d`, `hyper_conv2d` or `hyper_conv3d`, by the number `dims` of spatial axes."""
    mlp = (weights, biases, kernel_size, activation, coordinates, backend)
    basis = _basis(dims, input, coefficients, *mlp)
    operands = (dims, input, coefficients, basis, bias, stride, padding, dilation, groups)
    return basis_conv(*operands, backend=backend, algorithm=algorithm)


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
    coordinates: str = "centered",
    backend: str = "auto",
    algorithm: str = "auto",
) -> Tensor:
    """`hyper_conv_transpose1d`, `2d` or `3d`, by the number `dims` of spatial axes."""
    mlp = (weights, biases, kernel_size, activation, coordinates, backend)
    basis = _basis(dims, input, coefficients, *mlp)
    spaces = (stride, padding, output_padding, groups, dilation)
    operands = (dims, input, coefficients, basis, bias)
    return basis_conv_transpose(*operands, *spaces, backend=backend, algorithm=algorithm)


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
        coordinates: `'centered'` or `'unit'`, see `hypernet.tap_coordinates`.

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
