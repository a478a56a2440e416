"""Functions of tensors: the checks a user's mistake meets, then `ops`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops, planner
from .backends.reference import ACTIVATIONS
from .geometry import Geometry
from .hypernet import tap_coordinates

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_AXES = {1: "L", 2: "H, W", 3: "D, H, W"}


def per_axis(name: str, value: int | Sequence[int], dims: int, minimum: int) -> tuple[int, ...]:
    """`value` as one integer per axis.

    Raises:
        TypeError: not an integer or a sequence of integers.
        ValueError: the wrong number of them, or one below `minimum`.
    """
    expected = f"an integer or {dims} of them, each at least {minimum}"
    values = (value,) * dims if isinstance(value, int) else value
    numbers = isinstance(values, Sequence) and all(isinstance(v, int) for v in values)
    if not numbers or isinstance(values, str):
        raise TypeError(f"{name}: expected {expected}, got {value!r}; pass integers")
    if len(values) != dims or min(values) < minimum:
        raise ValueError(f"{name}: expected {expected}, got {value!r}; pass {dims} in range")
    return tuple(values)


def axis_padding(
    padding: int | Sequence[int] | str, stride: tuple[int, ...], dims: int
) -> tuple[int, ...] | str:
    """`padding` as one integer per axis, or the mode `'same'` or `'valid'`.

    Raises:
        ValueError: another string, or `'same'` with a stride.
    """
    if not isinstance(padding, str):
        return per_axis("padding", padding, dims, 0)
    if padding not in ("same", "valid"):
        raise ValueError(
            f"padding: expected integers, 'same' or 'valid', got {padding!r}; pass one of these"
        )
    if padding == "same" and max(stride) > 1:
        raise ValueError(
            f"padding: 'same' expected stride 1, got stride {stride}; pass the padding as integers"
        )
    return padding


def check_name(argument: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(
            f"{argument}: expected one of {', '.join(known)}, got {value!r}; pass one of these"
        )


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def check_groups(groups: int) -> None:
    """Raise ValueError unless `groups` is a positive integer."""
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups: expected a positive integer, got {groups!r}; pass 1 or more")


def _check_tensor(name: str, tensor: object, device: torch.device | None = None) -> None:
    """Raise unless `tensor` is a floating-point tensor, on `device` if that is given."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name}: expected a torch.Tensor, got {type(tensor).__name__}; convert it first"
        )
    if tensor.dtype not in _DTYPES:
        raise TypeError(
            f"{name}: expected float32, float64, float16 or bfloat16, got {tensor.dtype}; "
            f"convert it with .to()"
        )
    if device is not None and tensor.device != device:
        raise ValueError(
            f"{name}: expected it on the input's device {device}, got {tensor.device}; "
            f"move it with .to()"
        )


def _check_tensors(
    input: Tensor, coefficients: Tensor, basis: Tensor, bias: Tensor | None, groups: int, dims: int
) -> None:
    _check_tensor("input", input)
    named = {"coefficients": coefficients, "basis": basis} | ({} if bias is None else {"bias": bias})
    for name, tensor in named.items():
        _check_tensor(name, tensor, input.device)
    if input.dim() not in (dims + 1, dims + 2):
        raise ValueError(
            f"input: expected [B, C_in, {_AXES[dims]}] or [C_in, {_AXES[dims]}], "
            f"got {_shape(input)}; add or remove axes"
        )
    check_groups(groups)
    if coefficients.dim() != 3 or coefficients.shape[0] % groups:
        raise ValueError(
            f"coefficients: expected [C_out, C_in/groups, R] with C_out divisible by "
            f"groups={groups}, got {_shape(coefficients)}; reshape them or change groups"
        )
    channels = input.shape[-dims - 1]
    if coefficients.shape[1] * groups != channels:
        raise ValueError(
            f"input: expected {coefficients.shape[1] * groups} channels "
            f"(coefficients {_shape(coefficients)}, groups={groups}), got {channels} in "
            f"{_shape(input)}; match the input's channels to the coefficients"
        )
    if basis.dim() != dims + 1 or basis.shape[0] != coefficients.shape[2] or 0 in basis.shape:
        raise ValueError(
            f"basis: expected [R, {', '.join(['k'] * dims)}] with R={coefficients.shape[2]} "
            f"(coefficients {_shape(coefficients)}) and no empty axis, got {_shape(basis)}; "
            f"give one basis function per coefficient column"
        )
    if bias is not None and bias.shape != coefficients.shape[:1]:
        raise ValueError(
            f"bias: expected [{coefficients.shape[0]}], got {_shape(bias)}; "
            f"give one value per output channel"
        )
    if not torch.is_autocast_enabled(input.device.type):
        _check_dtypes(input, coefficients, basis, bias)


def _check_dtypes(input: Tensor, coefficients: Tensor, basis: Tensor, bias: Tensor | None) -> None:
    named = {"coefficients": coefficients} | ({} if bias is None else {"bias": bias})
    for name, tensor in named.items():
        if tensor.dtype != input.dtype:
            raise TypeError(
                f"{name}: expected the input's dtype {input.dtype}, got {tensor.dtype}; "
                f"convert one of them, or use torch.autocast"
            )
    wide = torch.promote_types(input.dtype, torch.float32)
    if basis.dtype not in (input.dtype, wide):
        raise TypeError(
            f"basis: expected {' or '.join(sorted({str(input.dtype), str(wide)}))}, "
            f"got {basis.dtype}; convert it with .to()"
        )


def conv_geometry(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> Geometry:
    """The geometry of `F.convNd` on `input` with these arguments.

    Raises:
        TypeError, ValueError: an argument is out of range, or the output would have no positions.
    """
    dims = len(kernel_size)
    steps = per_axis("stride", stride, dims, 1)
    geometry = Geometry.conv(
        input.shape[-dims:],
        kernel_size,
        steps,
        axis_padding(padding, steps, dims),
        per_axis("dilation", dilation, dims, 1),
        groups,
    )
    if min(geometry.output_size) < 1:
        raise ValueError(
            f"input: expected at least the kernel's extent on each axis, got {_shape(input)} for "
            f"kernel_size {geometry.kernel_size}, padding {geometry.padding}, dilation "
            f"{geometry.dilation} (output {list(geometry.output_size)}); pad the input or use a "
            f"smaller kernel"
        )
    return geometry


def basis_conv(
    dims: int,
    input: Tensor,
    coefficients: Tensor,
    basis: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    backend: str,
    algorithm: str,
) -> Tensor:
    """`basis_conv2d` for any number `dims` of spatial axes: the one implementation under them all."""
    check_name("backend", backend, planner.BACKEND_NAMES)
    check_name("algorithm", algorithm, planner.ALGORITHM_NAMES)
    _check_tensors(input, coefficients, basis, bias, groups, dims)
    geometry = conv_geometry(input, basis.shape[1:], stride, padding, dilation, groups)
    batched = input if input.dim() == dims + 2 else input.unsqueeze(0)
    output = ops.basis_conv(batched, coefficients, basis, bias, geometry, backend, algorithm)
    return output if batched is input else output.squeeze(0)


def basis_conv2d(
    input: Tensor,
    coefficients: Tensor,
    basis: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
    algorithm: str = "auto",
) -> Tensor:
    """2-D convolution whose kernel is a combination of R functions shared by all channels.

    Equals `F.conv2d(input, torch.einsum("oir,rhw->oihw", coefficients, basis), bias, stride,
    padding, dilation, groups)`, without that weight ever being in memory on a fused backend.
    Differentiable in every tensor, to any order.

    Args:
        input: x, `[B, C_in, H, W]` or `[C_in, H, W]`; float32, float64, float16 or bfloat16, any
            strides; channels_last is the fast layout.
        coefficients: A, `[C_out, C_in/groups, R]`, in the input's dtype.
        basis: phi, `[R, kh, kw]`, in the input's dtype or float32.
        bias: `[C_out]` or None, in the input's dtype.
        stride, dilation, groups: as in `F.conv2d`.
        padding: integers, `'same'` or `'valid'`, as in `F.conv2d`.
        backend: `'auto'`, `'reference'`, `'composite'`, `'triton'` or `'cuda'`. A backend that is named
            is used or refused, never replaced. `'auto'` can be overridden by the environment variable
            HYPERCONV_BACKEND.
        algorithm: `'auto'`, or one of the backend's: `'basis'` (triton, cuda), `'direct'` (triton),
            `'composite'`. The gradients of A and phi have one fused algorithm, which both names of
            triton select.

    Returns:
        `[B, C_out, H', W']` (or unbatched), in the input's dtype, channels_last if the input is.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        PlanError: the named backend or algorithm cannot compute this problem.
    """
    return basis_conv(
        2, input, coefficients, basis, bias, stride, padding, dilation, groups, backend, algorithm
    )


def hyper_conv2d(
    input: Tensor,
    coefficients: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    kernel_size: int | Sequence[int],
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str = "leaky_relu",
    coordinates: str = "centered",
    backend: str = "auto",
    algorithm: str = "auto",
) -> Tensor:
    """2-D hyper-convolution: `basis_conv2d` whose basis is a coordinate MLP of the taps.

    Args:
        coefficients: A, `[C_out, C_in/groups, R]`: the MLP's last linear layer. R is the number N
            of the MLP's features, or N + 1 when the last column is that layer's bias.
        weights: per layer of the MLP, `[features, previous features]`; the first has 2 columns.
        biases: per layer, `[features]`.
        kernel_size: (kh, kw).
        activation: after every layer: `'leaky_relu'` (slope 0.1), `'relu'`, `'gelu'`, `'silu'`,
            `'tanh'`, `'sine'`.
        coordinates: `'centered'` or `'unit'`, see `hypernet.tap_coordinates`.
        input, bias, stride, padding, dilation, groups, backend, algorithm: as in `basis_conv2d`.

    Returns, raises: as `basis_conv2d`.
    """
    size = per_axis("kernel_size", kernel_size, 2, 1)
    check_name("activation", activation, tuple(ACTIVATIONS))
    _check_tensor("input", input)
    _check_tensor("coefficients", coefficients, input.device)
    _check_mlp(weights, biases, len(size), input)
    features = weights[-1].shape[0]
    rank = coefficients.shape[-1] if coefficients.dim() else 0
    if rank not in (features, features + 1):
        raise ValueError(
            f"coefficients: expected [C_out, C_in/groups, R] with R={features} (the MLP's "
            f"features) or {features + 1} (and a bias), got {_shape(coefficients)}; match them"
        )
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    taps = tap_coordinates(size, coordinates, input.device, dtype)
    basis = ops.coordinate_mlp(taps, weights, biases, activation, rank > features, backend)
    return basis_conv2d(
        input,
        coefficients,
        basis.view(rank, *size),
        bias,
        stride,
        padding,
        dilation,
        groups,
        backend=backend,
        algorithm=algorithm,
    )


def _check_mlp(weights: Sequence[Tensor], biases: Sequence[Tensor], dims: int, input: Tensor) -> None:
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"weights, biases: expected one of each per layer and at least one layer, got "
            f"{len(weights)} and {len(biases)}; give every layer both"
        )
    width = dims
    for index, (weight, offset) in enumerate(zip(weights, biases, strict=True)):
        _check_tensor(f"weights[{index}]", weight, input.device)
        _check_tensor(f"biases[{index}]", offset, input.device)
        if (weight.dtype == torch.float64) != (input.dtype == torch.float64):
            raise TypeError(
                f"weights[{index}]: expected float64 if and only if the input is, got "
                f"{weight.dtype} with input {input.dtype}; convert one of them"
            )
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ValueError(
                f"weights[{index}]: expected [features, {width}], got {_shape(weight)}; each layer "
                f"takes the previous one's features, the first one the {dims} coordinates"
            )
        width = weight.shape[0]
        if offset.shape != (width,):
            raise ValueError(
                f"biases[{index}]: expected [{width}], got {_shape(offset)}; give one per feature"
            )
