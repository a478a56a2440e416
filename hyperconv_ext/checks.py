"""Checks that a user's mistake meets: each names the argument, the expected, the given, the remedy."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .geometry import Geometry

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DENSE = torch.strided
_AXES = {1: "L", 2: "H, W", 3: "D, H, W"}


class Meta(NamedTuple):
    """What is checked of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def meta(name: str, tensor: object) -> Meta:
    """The `Meta` of what must be a dense tensor.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name}: expected a torch.Tensor, got {type(tensor).__name__}; convert it first"
        )
    if tensor.layout is not _DENSE or tensor.is_nested:
        if tensor.is_nested:
            got, how = "a nested one", ".to_padded_tensor()"
        else:
            got, how = f"layout {tensor.layout}", ".to_dense()"
        raise TypeError(f"{name}: expected a dense tensor, got {got}; convert it with {how}")
    return Meta(tensor.shape, tensor.dtype, tensor.device)


def metas(name: str, tensors: Sequence[object]) -> list[Meta]:
    """The `Meta` of each; see `meta`."""
    return [meta(f"{name}[{index}]", tensor) for index, tensor in enumerate(tensors)]


def check_dtype(name: str, dtype: object) -> None:
    """Raise TypeError unless `dtype` is one of those computed in, or None."""
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(
            f"{name}: expected float32, float64, float16 or bfloat16, got {dtype}; pass one of these"
        )


def _index(value: Any) -> int | None:
    """`value` as Python's or a symbolic integer; None if it is no integer. A bool is none."""
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value  # type: ignore[return-value]
    if not hasattr(value, "__index__"):  # asked first, since no trace survives the error of index()
        return None
    if isinstance(value, Tensor) and (value.dtype == torch.bool or value.dim() > 0):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def integer(name: str, value: Any, minimum: int | None = None) -> int:
    """`value`, an integer of Python, NumPy or a tensor without axes.

    Raises:
        TypeError: it is none.
        ValueError: it is below `minimum`.
    """
    expected = "an integer" if minimum is None else f"an integer of at least {minimum}"
    number = _index(value)
    if number is None:
        raise TypeError(f"{name}: expected {expected}, got {value!r}; pass an integer")
    if minimum is not None and number < minimum:
        raise ValueError(f"{name}: expected {expected}, got {value!r}; pass {minimum} or more")
    return number


def positive_number(name: str, value: Any) -> float:
    """`value`, a finite number above 0 of Python or NumPy, as a float.

    Raises:
        TypeError: it is no number. A tensor is none: nothing would differentiate by it.
        ValueError: it is not above 0, or not finite.
    """
    is_number = isinstance(value, (Real, torch.SymFloat, torch.SymInt))
    if not is_number or isinstance(value, bool):
        raise TypeError(f"{name}: expected a positive number, got {value!r}; pass a float")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value!r}; pass a finite one above 0")
    return float(value)


def check_bool(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}; pass True or False")


def integers(value: Any) -> tuple[int, ...] | None:
    """The integers that `value` consists of, as Python's; None if it is no collection of integers."""
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        return None
    if isinstance(value, Tensor) and value.dim() != 1:
        return None
    numbers = [_index(v) for v in value]
    return None if None in numbers else tuple(numbers)  # type: ignore[arg-type]


def per_axis(name: str, value: int | Sequence[int], dims: int, minimum: int) -> tuple[int, ...]:
    """`value` as one integer per axis.

    Raises:
        TypeError: not an integer or a collection of integers.
        ValueError: the wrong number of them, or one below `minimum`.
    """
    expected = f"an integer or {dims} of them, each at least {minimum}"
    number = _index(value)
    values = (number,) * dims if number is not None else integers(value)
    if values is None:
        raise TypeError(f"{name}: expected {expected}, got {value!r}; pass integers")
    if len(values) != dims or min(values) < minimum:
        raise ValueError(f"{name}: expected {expected}, got {value!r}; pass {dims} in range")
    return values


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


def _shape(tensor: Meta) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def check_groups(groups: Any) -> int:
    """`groups`, if it is a positive integer.

    Raises:
        ValueError: it is none.
    """
    number = _index(groups)
    if number is None or number < 1:
        raise ValueError(f"groups: expected a positive integer, got {groups!r}; pass 1 or more")
    return number


def check_tensor(name: str, tensor: Meta, device: torch.device | None = None) -> None:
    """Raise unless `tensor` is of floating-point numbers, on `device` if that is given."""
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{name}: expected float32, float64, float16 or bfloat16, got {tensor.dtype}; "
            f"convert it with .to()"
        )
    if device is not None and tensor.device != device:
        raise ValueError(
            f"{name}: expected it on the input's device {device}, got {tensor.device}; "
            f"move it with .to()"
        )


def check_input(dims: int, input: Meta) -> None:
    """Raise unless `input` is one of a convolution with `dims` spatial axes."""
    check_tensor("input", input)
    if len(input.shape) not in (dims + 1, dims + 2):
        raise ValueError(
            f"input: expected [B, C_in, {_AXES[dims]}] or [C_in, {_AXES[dims]}], "
            f"got {_shape(input)}; add or remove axes"
        )


def check_tensors(
    dims: int,
    input: Meta,
    coefficients: Meta,
    basis: Meta,
    bias: Meta | None,
    groups: int,
    transposed: bool,
    same_dtype: bool,
) -> None:
    """Raise unless the operands of a convolution with `dims` spatial axes fit each other."""
    check_input(dims, input)
    named = {"coefficients": coefficients, "basis": basis} | ({} if bias is None else {"bias": bias})
    for name, tensor in named.items():
        check_tensor(name, tensor, input.device)
    groups = check_groups(groups)
    first, second = ("C_in", "C_out") if transposed else ("C_out", "C_in")
    if len(coefficients.shape) != 3 or coefficients.shape[0] % groups:
        raise ValueError(
            f"coefficients: expected [{first}, {second}/groups, R] with {first} divisible by "
            f"groups={groups}, got {_shape(coefficients)}; reshape them or change groups"
        )
    sizes = coefficients.shape[0], coefficients.shape[1] * groups
    in_channels, out_channels = sizes if transposed else sizes[::-1]
    if in_channels != input.shape[-dims - 1]:
        raise ValueError(
            f"input: expected {in_channels} channels "
            f"(coefficients {_shape(coefficients)}, groups={groups}), got {input.shape[-dims - 1]} in "
            f"{_shape(input)}; match the input's channels to the coefficients"
        )
    if len(basis.shape) != dims + 1 or basis.shape[0] != coefficients.shape[2] or 0 in basis.shape:
        raise ValueError(
            f"basis: expected [R, {', '.join(['k'] * dims)}] with R={coefficients.shape[2]} "
            f"(coefficients {_shape(coefficients)}) and no empty axis, got {_shape(basis)}; "
            f"give one basis function per coefficient column"
        )
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(
            f"bias: expected [{out_channels}], got {_shape(bias)}; give one value per output channel"
        )
    if same_dtype:
        _check_dtypes(input, coefficients, basis, bias)


def _check_dtypes(input: Meta, coefficients: Meta, basis: Meta, bias: Meta | None) -> None:
    named = {"coefficients": coefficients} | ({} if bias is None else {"bias": bias})
    for name, tensor in named.items():
        if tensor.dtype != input.dtype:
            raise TypeError(
                f"{name}: expected the input's dtype {input.dtype}, got {tensor.dtype}; "
                f"convert one of them, or use torch.autocast"
            )
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    if basis.dtype not in (input.dtype, wide):
        raise TypeError(
            f"basis: expected {' or '.join(sorted({str(input.dtype), str(wide)}))}, "
            f"got {basis.dtype}; convert it with .to()"
        )


def conv_geometry(
    input: Meta,
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
        check_groups(groups),
    )
    if min(geometry.output_size) < 1:
        raise ValueError(
            f"input: expected at least the kernel's extent on each axis, got {_shape(input)} for "
            f"kernel_size {geometry.kernel_size}, padding {geometry.padding}, dilation "
            f"{geometry.dilation} (output {list(geometry.output_size)}); pad the input or use a "
            f"smaller kernel"
        )
    return geometry


def conv_transpose_geometry(
    input: Meta,
    kernel_size: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> Geometry:
    """The geometry of which `F.conv_transposeNd` on `input` with these arguments is the input gradient.

    Raises:
        TypeError, ValueError: an argument is out of range, or the output would have no positions.
    """
    dims = len(kernel_size)
    steps, spread = per_axis("stride", stride, dims, 1), per_axis("dilation", dilation, dims, 1)
    extra = per_axis("output_padding", output_padding, dims, 0)
    if any(e >= max(s, d) for e, s, d in zip(extra, steps, spread, strict=True)):
        raise ValueError(
            f"output_padding: expected less than the stride {steps} or the dilation {spread} on each "
            f"axis, got {extra}; use a smaller one, or pad the output"
        )
    geometry = Geometry.conv_transpose(
        input.shape[-dims:],
        kernel_size,
        steps,
        per_axis("padding", padding, dims, 0),
        extra,
        spread,
        check_groups(groups),
    )
    if min(geometry.input_size) < 1:
        raise ValueError(
            f"padding: expected an output of at least one position on each axis, got "
            f"{list(geometry.input_size)} for input {_shape(input)}, kernel_size "
            f"{geometry.kernel_size}, padding {geometry.padding}; use less padding"
        )
    return geometry


def output_padding_for(
    output_size: Any,
    input: Meta,
    kernel_size: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[int, ...]:
    """The output padding with which `F.conv_transposeNd` on `input` gives `output_size`.

    Args:
        output_size: one size per axis; those of the batch and the channels may precede them.

    Raises:
        TypeError, ValueError: it is no such collection, or the stride cannot lead to it.
    """
    dims = len(kernel_size)
    steps = per_axis("stride", stride, dims, 1)
    spread, low = per_axis("dilation", dilation, dims, 1), per_axis("padding", padding, dims, 0)
    none = (0,) * dims
    least = Geometry.conv_transpose(
        input.shape[-dims:], kernel_size, steps, low, none, spread, 1
    ).input_size
    most = [size + step - 1 for size, step in zip(least, steps, strict=True)]
    lowest = [max(size, 1) for size in least]  # padding may leave nothing of the least output
    expected = f"expected {dims} sizes from {lowest} to {most} for input {_shape(input)}"
    sizes = integers(output_size)
    if sizes is None:
        raise TypeError(f"output_size: {expected}, got {output_size!r}; pass integers")
    wanted = sizes[-dims:] if len(sizes) == len(input.shape) else sizes
    if len(wanted) != dims or any(
        not first <= size <= last for first, size, last in zip(lowest, wanted, most, strict=False)
    ):
        raise ValueError(f"output_size: {expected}, got {list(sizes)}; choose within them")
    return tuple(size - first for size, first in zip(wanted, least, strict=True))


def check_mlp(weights: Sequence[Meta], biases: Sequence[Meta], dims: int, input: Meta) -> None:
    """Raise unless the layers of a coordinate MLP fit each other, `dims` coordinates and the input."""
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"weights, biases: expected one of each per layer and at least one layer, got "
            f"{len(weights)} and {len(biases)}; give every layer both"
        )
    width = dims
    for index, (weight, offset) in enumerate(zip(weights, biases, strict=True)):
        check_tensor(f"weights[{index}]", weight, input.device)
        check_tensor(f"biases[{index}]", offset, input.device)
        if (weight.dtype == torch.float64) != (input.dtype == torch.float64):
            raise TypeError(
                f"weights[{index}]: expected float64 if and only if the input is, got "
                f"{weight.dtype} with input {input.dtype}; convert one of them"
            )
        if len(weight.shape) != 2 or weight.shape[1] != width:
            raise ValueError(
                f"weights[{index}]: expected [features, {width}], got {_shape(weight)}; each layer "
                f"takes the previous one's features, the first one the {dims} coordinates"
            )
        width = weight.shape[0]
        if offset.shape != (width,):
            raise ValueError(
                f"biases[{index}]: expected [{width}], got {_shape(offset)}; give one per feature"
            )


def check_coordinates(coordinates: Meta, kernel_size: tuple[int, ...], input: Meta) -> None:
    """Raise unless `coordinates` are those of every tap of the kernel."""
    check_tensor("coordinates", coordinates, input.device)
    expected = (math.prod(kernel_size), len(kernel_size))
    if coordinates.shape != expected:
        raise ValueError(
            f"coordinates: expected {list(expected)}, a row for each tap of kernel_size {kernel_size}, "
            f"got {_shape(coordinates)}; give one row per tap"
        )
