"""`aten::convolution` and its gradients for a `Geometry`, asymmetric padding included; products.

The library-backed backends (`reference`, `composite`) are written with these calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import without_autocast
from ..geometry import Geometry
from ..transforms import Function, in_rule


class _Product(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with without_autocast(a.device):
            return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad
        a_grad = product(grads[0], b.T) if needs_a else None
        return a_grad, product(a.T, grads[0]) if needs_b else None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        a, b = ctx.saved_tensors
        a_tangent, b_tangent = tangents
        terms = [] if a_tangent is None else [product(a_tangent, b)]
        terms += [] if b_tangent is None else [product(a, b_tangent)]
        return sum(terms[1:], terms[0])


def product(a: Tensor, b: Tensor) -> Tensor:
    """a `[M, K]` @ b `[K, N]` and its derivatives of every order, in their dtype whatever autocast asks.

    PyTorch's own would form its gradients in autocast's dtype in a backward pass inside autocast, also
    where the forward pass was outside. Convolutions, in the place of one of which it stands, do not.
    """
    # Compiled backward passes are free of autocast.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or a.is_meta:
        return a @ b
    if in_rule():  # where the function below cannot be called
        with without_autocast(a.device):
            return a @ b
    return _Product.apply(a, b)


def _explicit_padding(geometry: Geometry) -> list[int]:
    """`F.pad` argument (last axis first) after which the convolution needs no padding of its own."""
    pairs = zip(geometry.padding, geometry.high_padding, strict=True)
    return [p for pair in reversed(list(pairs)) for p in pair]


def _pad(tensor: Tensor, padding: list[int]) -> Tensor:
    """`F.pad` where what is cropped at one end may have been padded at the other."""
    if min(padding) < 0 < max(padding):
        tensor = F.pad(tensor, [max(p, 0) for p in padding])
        padding = [min(p, 0) for p in padding]
    return F.pad(tensor, padding)


def _arguments(geometry: Geometry, groups: int) -> tuple[Any, ...]:
    """What `aten::convolution` and its backward take after `bias`."""
    padding = geometry.padding if geometry.symmetric else (0,) * geometry.dims
    no_output_padding = [0] * geometry.dims
    return geometry.stride, padding, geometry.dilation, False, no_output_padding, groups


def _transposed_arguments(geometry: Geometry, groups: int) -> tuple[Any, ...]:
    """The same of a transposed convolution."""
    return geometry.stride, geometry.padding, geometry.dilation, True, geometry.output_padding, groups


def convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int
) -> Tensor:
    """Cross-correlation `[B, C_in, *S]`, `[C_out, C_in/groups, *kernel]` -> `[B, C_out, *S']`."""
    if not geometry.symmetric:
        input = _pad(input, _explicit_padding(geometry))
    return torch.convolution(input, weight, bias, *_arguments(geometry, groups))


def transposed_convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int
) -> Tensor:
    """`F.conv_transposeNd`, `[B, C_out, *S']`, `[C_out, C_in/groups, *kernel]` -> `[B, C_in, *S]`.

    `geometry` is that of the convolution whose input gradient this is.
    """
    return torch.convolution(input, weight, bias, *_transposed_arguments(geometry, groups))


def convolver(
    geometry: Geometry, groups: int, transposed: bool
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """`convolution`, or `transposed_convolution`, of this geometry, for many calls."""
    if not transposed and not geometry.symmetric:
        return lambda input, weight, bias: convolution(input, weight, bias, geometry, groups)
    arguments = (_transposed_arguments if transposed else _arguments)(geometry, groups)
    return lambda input, weight, bias: torch.convolution(input, weight, bias, *arguments)


def convolution_input_gradient(grad: Tensor, weight: Tensor, geometry: Geometry, groups: int) -> Tensor:
    """Gradient of `convolution` by its input: `[B, C_out, *S']` -> `[B, C_in, *S]`."""
    size = geometry.input_size
    if not geometry.symmetric:
        pads = zip(size, geometry.padding, geometry.high_padding, strict=True)
        size = tuple(n + low + high for n, low, high in pads)
    input = grad.new_empty(1).expand(grad.shape[0], weight.shape[1] * groups, *size)
    gradient = _backward(grad, input, weight, geometry, groups, [True, False, False])[0]
    if not geometry.symmetric:
        gradient = _pad(gradient, [-p for p in _explicit_padding(geometry)])
    return gradient


def convolution_weight_gradient(
    grad: Tensor, input: Tensor, weight_shape: tuple[int, ...], geometry: Geometry, groups: int
) -> Tensor:
    """Gradient of `convolution` by its weight, of shape `weight_shape`."""
    if not geometry.symmetric:
        input = _pad(input, _explicit_padding(geometry))
    weight = grad.new_empty(1).expand(weight_shape)
    return _backward(grad, input, weight, geometry, groups, [False, True, False])[1]


def _backward(
    grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, groups: int, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.convolution_backward(
        grad, input, weight, None, *_arguments(geometry, groups), mask
    )
