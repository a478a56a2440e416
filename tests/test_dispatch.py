"""What the dispatcher does for a library's operator, where ours is called without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from hyperconv_ext import HyperConv2d, HyperConvTranspose2d, functional, ops
from hyperconv_ext.ops.registry import can_skip_dispatch

from .conftest import FUSED, precision_of_the_framework
from .oracle import relative_error

BACKENDS = ("reference", "composite", *FUSED)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = ((2, 3, 5, 4), (3, 3, 3), (3, 2, 3), (3,))  # input, coefficients, basis, bias
WEIGHTS = ((7, 2), (2, 7))  # of an MLP


def negated(tensor: Tensor) -> Tensor:
    """The same numbers as the imaginary part of a conjugate: their signs are a bit of the tensor."""
    lazy = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert lazy.is_neg() and torch.equal(lazy, tensor)
    return lazy


def _close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.shape == other.shape
        error = relative_error(one.detach(), other.detach().double())
        assert error <= (1e-2 if one.is_cuda else 1e-5), f"tensor {number}: {error}"


def _basis_conv(backend: str, transposed: bool) -> Callable[..., Tensor]:
    function = functional.basis_conv_transpose2d if transposed else functional.basis_conv2d
    return lambda *operands: function(*operands, padding=1, backend=backend)


def _hyper_conv(backend: str) -> Callable[..., Tensor]:
    """Of (input, coefficients, bias, weights..., biases...)."""

    def function(input: Tensor, coefficients: Tensor, bias: Tensor, *mlp: Tensor) -> Tensor:
        options = {"padding": 1, "activation": "tanh", "backend": backend}
        return functional.hyper_conv2d(input, coefficients, mlp[:2], mlp[2:], (2, 3), bias, **options)

    return function


def _functions(backend: str, device) -> list[tuple[Callable[..., Tensor], list[Tensor]]]:
    """Each function with the tensors it takes."""
    input, coefficients, basis, bias = (torch.randn(shape, device=device) for shape in SHAPES)
    mlp = [torch.randn(shape, device=device) for shape in (*WEIGHTS, (7,), (2,))]
    return [
        (_basis_conv(backend, False), [input, coefficients, basis, bias]),
        (_basis_conv(backend, True), [input, coefficients, basis, bias]),
        (_hyper_conv(backend), [input, coefficients, bias, *mlp]),
    ]


def _results(
    function: Callable[..., Tensor], tensors: list[Tensor], change: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Output without and with autograd, and gradients, of operands and a cotangent `change`d."""
    leaves = [change(t).detach().requires_grad_() for t in tensors]
    with torch.no_grad():
        inferred = function(*leaves)
    output = function(*leaves)
    numbers = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)
    return [inferred, output, *torch.autograd.grad(output, leaves, change(numbers))]


@every_backend
def test_negative_bits(backend: str, device) -> None:
    """Of every operand, and of the gradient: a sign that is lost in one of them changes the result."""
    with precision_of_the_framework(device):
        for function, tensors in _functions(backend, device):
            lazy = _results(function, tensors, negated)
            _close(lazy, _results(function, tensors, Tensor.clone))


@every_backend
def test_symbolic_zeros(backend: str, device) -> None:
    """Tensors without memory, as forward-mode differentiation makes them."""
    with precision_of_the_framework(device):
        for function, tensors in _functions(backend, device):
            for index, tensor in enumerate(tensors):
                rest = tensors[:index], tensors[index + 1 :]
                zeros = torch._efficientzerotensor(tensor.shape, device=device)
                with torch.no_grad():
                    truth = function(*rest[0], torch.zeros_like(tensor), *rest[1])
                    _close([function(*rest[0], zeros, *rest[1])], [truth])
            leaves = [t.detach().requires_grad_() for t in tensors]
            output = function(*leaves)
            nothing = torch._efficientzerotensor(output.shape, device=device)
            gradients = torch.autograd.grad(output, leaves, nothing)
            assert not any(gradient.any() for gradient in gradients)


def test_who_needs_the_dispatcher(device) -> None:
    plain = torch.randn(3, device=device)
    assert can_skip_dispatch([plain, torch.nn.Parameter(plain)])
    assert not can_skip_dispatch([plain, negated(plain)])
    assert not can_skip_dispatch([plain, torch._efficientzerotensor((3,), device=device)])
    assert not can_skip_dispatch([plain.to("meta")])
    outside: list[Tensor] = []
    torch.func.grad(lambda x: (outside.append(x), x.sum())[1])(plain)
    assert not can_skip_dispatch(outside)  # the wrapper of a transform that is over


@every_backend
@pytest.mark.parametrize("kind", [HyperConv2d, HyperConvTranspose2d])
def test_meta_tensors(backend: str, kind: type[HyperConv2d], device) -> None:
    """Shapes, strides and dtypes alone, from a backend that computes nothing there."""
    layer = kind(4, 6, 3, stride=2, backend=backend, device=device)
    input = torch.randn(2, 4, 7, 6, device=device).contiguous(memory_format=torch.channels_last)
    expected = layer(input)
    output = layer.to("meta")(input.to("meta"))
    assert output.is_meta and output.shape == expected.shape and output.dtype == expected.dtype
    if backend != "reference":  # whose layout is PyTorch's own choice for the device
        assert output.stride() == expected.stride()
    output.sum().backward()
    assert layer.coefficients.grad.is_meta


@every_backend
def test_backward_inside_autocast_of_a_forward_outside(backend: str, device) -> None:
    """As of nn.Conv2d: gradients of float32 in float32."""
    for norm in (None, "batch"):
        layer = HyperConv2d(4, 6, 3, padding=1, weight_norm=norm, backend=backend, device=device)
        input = torch.randn(2, 4, 7, 6, device=device, requires_grad=True)
        leaves = [input, *layer.parameters()]

        def gradients(again: bool) -> list[Tensor]:
            output = layer(input)  # noqa: B023
            cotangent = torch.linspace(-1, 1, output.numel(), device=device).view(output.shape)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=again):
                first = torch.autograd.grad(output, leaves, cotangent, create_graph=True)  # noqa: B023
            total = sum(g.square().sum() for g in first)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=again):
                second = torch.autograd.grad(total, leaves[-2:])  # noqa: B023
            return [*first, *second]

        outside, inside = gradients(False), gradients(True)
        for one, other in zip(inside, outside, strict=True):
            assert one.dtype == torch.float32
            assert relative_error(one.detach(), other.detach().double()) <= 1e-5


@every_backend
def test_saved_tensors_are_unpacked_once(backend: str, device) -> None:
    """Checkpointing allows no more, and offloading copies each time."""
    for function, tensors in _functions(backend, device):
        packed: dict[int, int] = {}

        def pack(tensor: Tensor) -> tuple[int, Tensor]:
            packed[len(packed)] = 0  # noqa: B023
            return len(packed) - 1, tensor  # noqa: B023

        def unpack(pair: tuple[int, Tensor]) -> Tensor:
            packed[pair[0]] += 1  # noqa: B023
            return pair[1]

        leaves = [t.detach().requires_grad_() for t in tensors]
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            output = function(*leaves)
        output.sum().backward()
        assert packed and max(packed.values()) == 1


def _keeps_operators(context: object, operator: object, *args: object, **options: object) -> object:
    kept = "hyperconv_ext" in str(operator)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@every_backend
@pytest.mark.parametrize("selective", [False, True])
def test_checkpointing(backend: str, selective: bool, device) -> None:
    options = {}
    if selective:
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(_keeps_operators)
    for function, tensors in _functions(backend, device):
        leaves = [t.detach().requires_grad_() for t in tensors]
        expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
        output = checkpoint(function, *leaves, use_reentrant=False, **options)
        _close(list(torch.autograd.grad(output.square().sum(), leaves)), list(expected))
        with torch.autograd.graph.save_on_cpu():
            output = function(*leaves)
        _close(list(torch.autograd.grad(output.square().sum(), leaves)), list(expected))


def test_operators_without_dispatch_are_those_with_it(device) -> None:
    """The functions behind `ops` are what the operators call."""
    input, coefficients, basis, _ = (torch.randn(shape, device=device) for shape in SHAPES)
    layer = HyperConv2d(3, 3, (2, 3), backend="composite", device=device)
    _, geometry = layer.geometry(input)
    direct = ops.form(0, geometry, "composite", "auto", None, input, coefficients, basis)
    sizes = (geometry.input_size, geometry.output_size, geometry.kernel_size)
    steps = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    operator = torch.ops.hyperconv_ext.basis_conv_fwd
    called = operator(input, coefficients, basis, None, *sizes, *steps, "composite", "auto")
    assert torch.equal(direct, called)
