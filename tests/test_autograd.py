"""Derivatives of every order, function transforms, torch.compile, and what only a GPU can show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from hyperconv_ext import HyperConv2d, functional
from hyperconv_ext.geometry import Geometry
from hyperconv_ext.problem import OPS

from .conftest import FUSED, interpreted, precision_of_the_framework

BACKENDS = ("composite", *FUSED)
pytestmark = pytest.mark.usefixtures("one_thread")
GEOMETRIES = {
    "plain": ((1, 1), (1, 1), (1, 1), 1),
    "strided, dilated": ((2, 1), (1, 2), (1, 2), 1),
    "same, groups": ((1, 1), "same", (1, 1), 2),
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
every_fused_backend = pytest.mark.parametrize("backend", FUSED)


def _tensors(dtype: torch.dtype, groups: int = 1, device: str | torch.device = "cpu") -> list[Tensor]:
    shapes = ((2, 4, 5, 4), (4, 4 // groups, 3), (3, 2, 3), (4,))
    return [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in shapes]


def _precision(backend: str, device: torch.device) -> AbstractContextManager[None]:
    return precision_of_the_framework(device) if backend == "cuda" else nullcontext()


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_gradcheck_and_gradgradcheck(geometry) -> None:
    tensors = _tensors(torch.float64, geometry[-1])

    def function(*operands: Tensor) -> Tensor:
        return functional.basis_conv2d(*operands, *geometry, backend="composite")

    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_third_derivatives(backend: str, device) -> None:
    """The rule is closed: differentiate three times and compare with plain autograd."""

    def third(name: str) -> list[Tensor]:
        torch.manual_seed(0)
        tensors = _tensors(torch.float32, device=device)
        value = functional.basis_conv2d(*tensors, padding=1, backend=name).pow(3).sum()
        for _ in range(2):
            grads = torch.autograd.grad(value, tensors, create_graph=True)
            value = sum(grad.pow(2).sum() for grad in grads)
        return list(torch.autograd.grad(value, tensors))

    with _precision(backend, device):
        results = third(backend), third("reference")
    for actual, expected in zip(*results, strict=True):
        # TF32 (on a GPU) enters at every order; elsewhere this is float32 rounding.
        tolerance = 5e-2 if device.type == "cuda" else 1e-4
        assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, backend: str, device) -> None:
    input, coefficients, basis, bias = _tensors(torch.float32, groups=2, device=device)
    geometry = Geometry.conv((5, 4), (2, 3), (1, 1), "same", (1, 1), 2)
    grad = torch.randn(2, 4, 5, 4, device=device, requires_grad=True)
    named = {"grad": grad, "input": input, "coefficients": coefficients, "basis": basis, "bias": bias}
    operator = getattr(torch.ops.hyperconv_ext, op).default
    operands = [named[a.name] for a in operator._schema.arguments if a.name in named]
    sizes = (geometry.input_size, geometry.output_size, geometry.kernel_size)
    steps = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    torch.library.opcheck(operator, (*operands, *sizes, *steps, backend, "auto"))


@pytest.mark.parametrize("backend", ["auto", "reference", *BACKENDS])
@pytest.mark.parametrize("weight_norm", [None, "batch"])
def test_compile_is_one_graph(backend: str, weight_norm: str | None, device, compiler) -> None:
    conv = HyperConv2d(4, 6, 3, padding=1, backend=backend, weight_norm=weight_norm, device=device)
    input = torch.randn(2, 4, 7, 6, device=device, requires_grad=True)
    leaves = [input, *conv.parameters()]
    expected = conv(input)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, leaves, cotangent)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    output = compiled(input)
    torch.testing.assert_close(output, expected)
    actual = torch.autograd.grad(output, leaves, cotangent)
    for one, other in zip(actual, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_graph_holds_the_operator(backend: str, device, compiler) -> None:
    """Not the convolution of W, to which exported programs are reduced."""
    conv = HyperConv2d(4, 6, 3, backend=backend, device=device)
    targets: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compile(conv, fullgraph=True, backend=record)(torch.randn(1, 4, 7, 6, device=device))
    assert any("hyperconv_ext" in target for target in targets)
    assert not any("conv2d" in target or "convolution" in target for target in targets)


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(dynamic: bool, device, compiler) -> None:
    options = {"parametrization": "published", "weight_bias": False} if dynamic else {}
    conv = HyperConv2d(4, 6, 3, padding=1, **options, backend="composite", device=device)
    compiled = torch.compile(conv, fullgraph=True, dynamic=dynamic)
    for size in (6, 9):
        input = torch.randn(2, 4, size, size, device=device)
        torch.testing.assert_close(compiled(input), conv(input), rtol=1e-3, atol=1e-4)


@interpreted()
@pytest.mark.parametrize("backend", BACKENDS)
def test_function_transforms(backend: str, device) -> None:
    """vmap of grad, jvp and jacfwd of grad agree with plain autograd on the reference."""
    tensors = [t.detach() for t in _tensors(torch.float32, device=device)]
    batch = torch.randn(3, *tensors[0].shape, device=device)
    directions = tuple(torch.randn_like(t) for t in tensors)

    def loss(name: str):
        return lambda *operands: functional.basis_conv2d(*operands, padding=1, backend=name).pow(2).sum()

    def transforms(name: str) -> list[Tensor]:
        per_example = torch.func.vmap(
            torch.func.grad(loss(name), argnums=(1, 2)), (0, None, None, None)
        )(batch, *tensors[1:])
        value, tangent = torch.func.jvp(loss(name), tuple(tensors), directions)
        hessian = torch.func.hessian(loss(name), argnums=2)(*tensors)
        return [*per_example, value, tangent, hessian]

    with _precision(backend, device):
        results = transforms(backend), transforms("reference")
    for actual, expected in zip(*results, strict=True):
        tolerance = 2e-2 if device.type == "cuda" else 1e-5
        assert (actual - expected).norm() <= tolerance * expected.norm()


def _layer_and_twin(backend: str, device) -> tuple[HyperConv2d, HyperConv2d, Tensor]:
    """A layer, the same on the reference, and an input of theirs."""
    layers = [HyperConv2d(2, 3, 2, backend=name, device=device) for name in (backend, "reference")]
    layers[1].load_state_dict(layers[0].state_dict())
    return *layers, torch.randn(1, 2, 3, 4, device=device)


def _same(actual: Sequence[Tensor], expected: Sequence[Tensor], device) -> None:
    tolerance = 2e-2 if device.type == "cuda" else 1e-5
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= tolerance * other.norm()


@interpreted()
@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_gradients(backend: str, device) -> None:
    """`is_grads_batched` and `vectorize`, whose batches are not those of torch.func."""
    with _precision(backend, device):
        *layers, input = _layer_and_twin(backend, device)
        input.requires_grad_()
        cotangents = torch.randn(3, 1, 3, 2, 3, device=device)
        results = []
        for layer in layers:
            leaves = (input, *layer.parameters())
            gradients = torch.autograd.grad(layer(input), leaves, cotangents, is_grads_batched=True)
            jacobian = torch.autograd.functional.jacobian(layer, input.detach(), vectorize=True)
            results.append([*gradients, jacobian])
        _same(*results, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pullback_outlives_its_transform(backend: str, device) -> None:
    with _precision(backend, device):
        *layers, input = _layer_and_twin(backend, device)
        cotangent = torch.randn(1, 3, 2, 3, device=device)
        results = []
        for layer in layers:

            def call(parameters: dict[str, Tensor], x: Tensor, layer: HyperConv2d = layer) -> Tensor:
                return torch.func.functional_call(layer, parameters, (x,))

            _, pullback = torch.func.vjp(call, dict(layer.named_parameters()), input)
            gradients, input_gradient = pullback(cotangent)
            results.append([*gradients.values(), input_gradient])
        _same(*results, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_over_no_examples(backend: str, device) -> None:
    layer, _, input = _layer_and_twin(backend, device)
    nothing = input.expand(0, *input.shape)
    assert torch.func.vmap(layer)(nothing).shape == (0, 1, 3, 2, 3)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, nothing)
    for name, parameter in parameters.items():
        assert gradients[name].shape == (0, *parameter.shape)


@interpreted()
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_compiled_transforms(backend: str, device, compiler) -> None:
    """torch.compile of grad, of vmap and of jvp, in one graph each."""
    layer, _, input = _layer_and_twin(backend, device)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    coefficients, basis = (t.detach() for t in layer.kernel())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    def of_functions(x: Tensor) -> Tensor:
        return functional.basis_conv2d(x, coefficients, basis, backend=backend)

    examples = torch.stack([input, 2 * input])
    transforms = (
        lambda x: tuple(torch.func.grad(loss)(parameters, x[0]).values()),
        lambda x: tuple(torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x).values()),
        lambda x: torch.func.jvp(of_functions, (x[0],), (x[1],)),
    )
    with _precision(backend, device):
        for transform in transforms:
            compiled = torch.compile(transform, backend="aot_eager", fullgraph=True)
            _same(compiled(examples), transform(examples), device)


@needs_gpu
@every_fused_backend
@pytest.mark.parametrize("training", [False, True])
def test_cuda_graph(training: bool, backend: str) -> None:
    """Capturable: no synchronisation, no allocation outside the caching allocator."""
    conv = HyperConv2d(16, 32, 5, padding=2, device="cuda", dtype=torch.bfloat16, backend=backend)
    input = torch.randn(4, 16, 20, 20, device="cuda", dtype=torch.bfloat16)
    leaves = (input.requires_grad_(), *conv.parameters())
    cotangent = torch.randn_like(conv(input))

    def step() -> list[Tensor]:
        output = conv(input)
        return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]

    def inference() -> list[Tensor]:
        with torch.no_grad():
            return [conv(input)]

    # On another stream, as PyTorch asks: what is made once is made by the very work that is captured.
    work, side = (step if training else inference), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            expected = work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    assert torch.equal(captured[0], expected[0])
    for one, other in zip(captured, expected, strict=True):  # atomic additions come in any order
        torch.testing.assert_close(one, other)


@needs_gpu
@every_fused_backend
def test_current_stream(backend: str) -> None:
    """Work queued behind a slow kernel on a side stream must see that kernel's result."""
    conv = HyperConv2d(16, 16, 5, padding=2, device="cuda", backend=backend)
    input = torch.randn(4, 16, 20, 20, device="cuda")
    expected = conv(input)
    late = torch.full_like(input, float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(input)
        output = conv(late)
    stream.synchronize()
    assert torch.equal(output, expected)


@needs_gpu
@every_fused_backend
@pytest.mark.parametrize("allow", [False, True])
def test_tf32_follows_the_frameworks_switch(allow: bool, backend: str) -> None:
    """Without TF32 the error is that of float32, with it that of an 11-bit significand."""
    tensors = [t.detach() for t in _tensors(torch.float32, device="cuda")]
    truth = functional.basis_conv2d(*(t.double() for t in tensors), backend="reference")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allow
    try:
        output = functional.basis_conv2d(*tensors, backend=backend)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    error = ((output.double() - truth).norm() / truth.norm()).item()
    assert (1e-5 < error < 2e-3) if allow else error < 1e-6
