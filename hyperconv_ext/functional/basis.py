"""Convolutions of a basis that is given, in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import general
from .general import Padding


def basis_conv1d(
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
    """1-D convolution whose kernel is a combination of R functions shared by all channels.

    Equals `F.conv1d(input, torch.einsum("oir,rl->oil", coefficients, basis), bias,
    stride, padding, dilation, groups)`, a cross-correlation, without that weight ever being in memory on
    a fused backend. Differentiable in every tensor, to any order. A true convolution, with the kernel
    flipped, is the same call with `basis.flip(1)`.

    Args:
        input: x, `[B, C_in, L]` or `[C_in, L]`; float32, float64, float16 or bfloat16, any
            strides; channels last is the fast layout.
        coefficients: A, `[C_out, C_in/groups, R]`, in the input's dtype.
        basis: phi, `[R, kl]`, in the input's dtype or float32.
        bias: `[C_out]` or None, in the input's dtype.
        stride, dilation, groups: as in `F.conv1d`.
        padding: integers, `'same'` or `'valid'`, as in `F.conv1d`.
        backend, algorithm: as in `basis_conv2d`.

    Returns:
        `[B, C_out, L']` (or unbatched), in the input's dtype, channels last if the input is.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        PlanError: the named backend or algorithm cannot compute this problem.
    """
    return general.basis_conv(
        1,
        input,
        coefficients,
        basis,
        bias,
        stride,
        padding,
        dilation,
        groups,
        backend=backend,
        algorithm=algorithm,
    )


def basis_conv2d(
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
    """2-D convolution whose kernel is a combination of R functions shared by all channels.

    Equals `F.conv2d(input, torch.einsum("oir,rhw->oihw", coefficients, basis), bias,
    stride, padding, dilation, groups)`, a cross-correlation, without that weight ever being in memory on
    a fused backend. Differentiable in every tensor, to any order. A true convolution, with the kernel
    flipped, is the same call with `basis.flip(1, 2)`.

    Args:
        input: x, `[B, C_in, H, W]` or `[C_in, H, W]`; float32, float64, float16 or bfloat16, any
            strides; channels last is the fast layout.
        coefficients: A, `[C_out, C_in/groups, R]`, in the input's dtype.
        basis: phi, `[R, kh, kw]`, in the input's dtype or float32.
        bias: `[C_out]` or None, in the input's dtype.
        stride, dilation, groups: as in `F.conv2d`.
        padding: integers, `'same'` or `'valid'`, as in `F.conv2d`.
        backend: `'auto'`, `'reference'`, `'composite'`, `'cpu'`, `'triton'` or `'cuda'`. A backend that
            is named is used or refused, never replaced. `'auto'` can be overridden by the environment
            variable HYPERCONV_BACKEND.
        algorithm: `'auto'`, or one of the backend's: `'basis'` (cpu, triton, cuda), `'fft'` (cpu),
            `'direct'` (triton), `'composite'`. The gradients of A and phi have one fused algorithm,
            which both names of triton select.

    Returns:
        `[B, C_out, H', W']` (or unbatched), in the input's dtype, channels last if the input is.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        PlanError: the named backend or algorithm cannot compute this problem.
    """
    return general.basis_conv(
        2,
        input,
        coefficients,
        basis,
        bias,
        stride,
        padding,
        dilation,
        groups,
        backend=backend,
        algorithm=algorithm,
    )


def basis_conv3d(
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
    """3-D convolution whose kernel is a combination of R functions shared by all channels.

    Equals `F.conv3d(input, torch.einsum("oir,rdhw->oidhw", coefficients, basis), bias,
    stride, padding, dilation, groups)`, a cross-correlation, without that weight ever being in memory on
    a fused backend. Differentiable in every tensor, to any order. A true convolution, with the kernel
    flipped, is the same call with `basis.flip(1, 2, 3)`.

    Args:
        input: x, `[B, C_in, D, H, W]` or `[C_in, D, H, W]`; float32, float64, float16 or bfloat16, any
            strides; channels last is the fast layout.
        coefficients: A, `[C_out, C_in/groups, R]`, in the input's dtype.
        basis: phi, `[R, kd, kh, kw]`, in the input's dtype or float32.
        bias: `[C_out]` or None, in the input's dtype.
        stride, dilation, groups: as in `F.conv3d`.
        padding: integers, `'same'` or `'valid'`, as in `F.conv3d`.
        backend, algorithm: as in `basis_conv2d`.

    Returns:
        `[B, C_out, D', H', W']` (or unbatched), in the input's dtype, channels last if the input is.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        PlanError: the named backend or algorithm cannot compute this problem.
    """
    return general.basis_conv(
        3,
        input,
        coefficients,
        basis,
        bias,
        stride,
        padding,
        dilation,
        groups,
        backend=backend,
        algorithm=algorithm,
    )


def basis_conv_transpose1d(
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
    """1-D transposed convolution whose kernel is a combination of R shared functions.

    Equals `F.conv_transpose1d(input, torch.einsum("ior,rl->iol", coefficients,
    basis), bias, stride, padding, output_padding, groups, dilation)`, without that weight ever being in
    memory on a fused backend. Differentiable in every tensor, to any order.

    Args:
        input: x, `[B, C_in, L]` or `[C_in, L]`; float32, float64, float16 or bfloat16, any
            strides; channels last is the fast layout.
        coefficients: A, `[C_in, C_out/groups, R]`, in the input's dtype.
        basis: phi, `[R, kl]`, in the input's dtype or float32.
        bias: `[C_out]` or None, in the input's dtype.
        stride, padding, output_padding, groups, dilation: as in `F.conv_transpose1d`, integers or
            one per axis.
        backend, algorithm: as in `basis_conv2d`.

    Returns:
        `[B, C_out, L']` (or unbatched), in the input's dtype, channels last if the input is.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        PlanError: the named backend or algorithm cannot compute this problem.
    """
    return general.basis_conv_transpose(
        1,
        input,
        coefficients,
        basis,
        bias,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
        backend=backend,
        algorithm=algorithm,
    )


def basis_conv_transpose2d(
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
    """2-D transposed convolution whose kernel is a combination of R shared functions.

    Equals `F.conv_transpose2d(input, torch.einsum("ior,rhw->iohw", coefficients,
    basis), bias, stride, padding, output_padding, groups, dilation)`, without that weight ever being in
    memory on a fused backend. Differentiable in every tensor, to any order.

    Args:
        input: x, `[B, C_in, H, W]` or `[C_in, H, W]`; float32, float64, float16 or bfloat16, any
            strides; channels last is the fast layout.
        coefficients: A, `[C_in, C_out/groups, R]`, in the input's dtype.
        basis: phi, `[R, kh, kw]`, in the input's dtype or float32.
        bias: `[C_out]` or None, in the input's dtype.
        stride, padding, output_padding, groups, dilation: as in `F.conv_transpose2d`, integers or
            one per axis.
        backend, algorithm: as in `basis_conv2d`.

    Returns:
        `[B, C_out, H', W']` (or unbatched), in the input's dtype, channels last if the input is.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        PlanError: the named backend or algorithm cannot compute this problem.
    """
    return general.basis_conv_transpose(
        2,
        input,
        coefficients,
        basis,
        bias,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
        backend=backend,
        algorithm=algorithm,
    )


def basis_conv_transpose3d(
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
    """3-D transposed convolution whose kernel is a combination of R shared functions.

    Equals `F.conv_transpose3d(input, torch.einsum("ior,rdhw->iodhw", coefficients,
    basis), bias, stride, padding, output_padding, groups, dilation)`, without that weight ever being in
    memory on a fused backend. Differentiable in every tensor, to any order.

    Args:
        input: x, `[B, C_in, D, H, W]` or `[C_in, D, H, W]`; float32, float64, float16 or bfloat16, any
            strides; channels last is the fast layout.
        coefficients: A, `[C_in, C_out/groups, R]`, in the input's dtype.
        basis: phi, `[R, kd, kh, kw]`, in the input's dtype or float32.
        bias: `[C_out]` or None, in the input's dtype.
        stride, padding, output_padding, groups, dilation: as in `F.conv_transpose3d`, integers or
            one per axis.
        backend, algorithm: as in `basis_conv2d`.

    Returns:
        `[B, C_out, D', H', W']` (or unbatched), in the input's dtype, channels last if the input is.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        PlanError: the named backend or algorithm cannot compute this problem.
    """
    return general.basis_conv_transpose(
        3,
        input,
        coefficients,
        basis,
        bias,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
        backend=backend,
        algorithm=algorithm,
    )
