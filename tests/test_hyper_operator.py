"""From the MLP to the output in one operator: the same numbers as its parts, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hyperconv_ext import (
    HyperConv1d,
    HyperConv2d,
    HyperConv3d,
    HyperConvTranspose2d,
    backends,
    functional,
    ops,
    planner,
)
from hyperconv_ext.backends.reference import ACTIVATIONS
from hyperconv_ext.hypernet import tap_coordinates
from hyperconv_ext.problem import JOINT, OPS

from .conftest import FUSED, dtypes_of, interpreted, precision_of_the_framework
from .oracle import CASES, Case, draw, lay_out, relative_error

every_fused_backend = pytest.mark.parametrize("backend", FUSED)
WIDTHS = (7, 5)  # of the hidden layers
# The rows whose tap maps differ: even and odd, strided, dilated, grouped, more functions than features.
TRITON_CASES = ("3x3", "even kernel, same", "dilation 3", "groups", "rank beyond taps")


def _network(features: int, dims: int, dtype: torch.dtype, device) -> tuple[list[Tensor], list[Tensor]]:
    widths = (dims, *WIDTHS, features)
    weights = [torch.randn(b, a, device=device).to(dtype) for a, b in pairwise(widths)]
    return weights, [torch.randn(width, device=device).to(dtype) for width in widths[1:]]


def _cases() -> list[tuple[str, Case, bool]]:
    """(backend, case, transposed); a transposed convolution has no 'same'."""
    rows = [(backend, case, way) for backend in FUSED for case in CASES for way in (False, True)]
    return [
        (backend, case, transposed)
        for backend, case, transposed in rows
        if (backend != "triton" or case.name in TRITON_CASES)
        and not (transposed and case.padding == "same")
    ]


@pytest.mark.parametrize(("backend", "case", "transposed"), _cases(), ids=str)
def test_equals_its_parts(backend: str, case: Case, transposed: bool, device, poisoned) -> None:
    """All geometries and dtypes, with and without the constant function, forward and transposed."""
    constant = case.rank > 1
    taps = tap_coordinates(case.kernel, device=device)
    for dtype in dtypes_of(backend, device):
        input, coefficients, _, _ = draw(case, dtype, device)
        if transposed:  # A is [C_in, C_out/groups, R]
            input = input[:, :1].expand(-1, case.out_channels, -1, -1)
        input = lay_out(input, "channels_last")
        network = _network(case.rank - constant, 2, dtype, device)
        basis = ops.coordinate_mlp(taps, *network, "tanh", 0.3, transposed, constant, backend)
        given = (input, coefficients, basis.view(-1, *case.kernel), None)
        if transposed:
            spaces = (case.stride, case.padding, 0, case.groups, case.dilation)
            expected = functional.basis_conv_transpose2d(*given, *spaces, backend=backend)
        else:
            expected = functional.basis_conv2d(*given, *case.arguments, backend=backend)
        convolution = functional.hyper_conv_transpose2d if transposed else functional.hyper_conv2d
        arguments = spaces if transposed else case.arguments
        actual = convolution(
            input,
            coefficients,
            *network,
            case.kernel,
            None,
            *arguments,
            activation="tanh",
            weight_gain=0.3,
            linear_output=transposed,
            coordinates=taps,
            backend=backend,
        )
        assert torch.equal(actual, expected)


@every_fused_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_phi(backend: str, activation: str, device, poisoned) -> None:
    """The operator's second result, of every activation."""
    layer = HyperConv2d(3, 4, (3, 4), activation=activation, backend=backend, device=device)
    _, basis = _operator(layer, torch.randn(1, 3, 6, 7, device=device))
    expected = layer.basis().flatten(1)
    assert torch.equal(basis, expected) and basis.shape == (5, 12)


# (weight_gain, linear_output)
SETTINGS = [(0.3, False), (1.0, True), (0.3, True)]


def _hyper_convolution(
    transposed: bool, constant: bool, settings: tuple[float, bool], device
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A convolution of (backend, input, A, weights..., biases...), and such operands."""
    function = functional.hyper_conv_transpose2d if transposed else functional.hyper_conv2d
    options = dict(zip(("weight_gain", "linear_output"), settings, strict=True))
    weights, biases = _network(4, 2, torch.float32, device)
    input, coefficients = torch.randn(1, 3, 6, 7, device=device), torch.randn(5, 3, 4 + constant)
    if transposed:
        coefficients = coefficients.transpose(0, 1).contiguous()

    def run(backend: str, input: Tensor, coefficients: Tensor, *mlp: Tensor) -> Tensor:
        operands = (input, coefficients, mlp[:3], mlp[3:], (3, 2))
        return function(*operands, activation="sine", backend=backend, **options)

    return run, [input, coefficients.to(device), *weights, *biases]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("constant", [False, True])
@every_fused_backend
def test_weight_gain_and_linear_output(
    backend: str, constant: bool, transposed: bool, settings: tuple[float, bool], device, poisoned
) -> None:
    """The output and every gradient, within a few times the error of building W in float32."""
    run, tensors = _hyper_convolution(transposed, constant, settings, device)

    def results(name: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        output = run(name, *leaves)
        if name == backend:
            assert type(output.grad_fn).__name__ == "HyperConvFunctionBackward"
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    with precision_of_the_framework(device):
        actual, own = results(backend, torch.float32), results("reference", torch.float32)
    truth = results("reference", torch.float64)
    for number, (ours, theirs, exact) in enumerate(zip(actual, own, truth, strict=True)):
        allowed = 4 * relative_error(theirs, exact) + 2.0**-21
        assert relative_error(ours, exact) <= allowed, f"tensor {number}"


@pytest.mark.parametrize("backend", ["reference", "composite", *FUSED])
def test_weight_gain_and_linear_output_compiled(backend: str, device) -> None:
    run, tensors = _hyper_convolution(False, True, (0.3, True), device)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    with precision_of_the_framework(device):
        for function in (compiled, run):
            leaves = [t.clone().requires_grad_() for t in tensors]
            output = function(backend, *leaves)
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    torch.testing.assert_close(*results)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["reference", "composite", *FUSED])
def test_weight_gain_and_linear_output_transformed(backend: str, device) -> None:
    """Forward mode, and a second derivative: those of the reference."""
    run, tensors = _hyper_convolution(False, True, (0.3, True), device)
    directions = [torch.randn_like(t) for t in tensors]

    def results(name: str, dtype: torch.dtype) -> list[Tensor]:
        points, tangents = (tuple(t.to(dtype) for t in many) for many in (tensors, directions))
        _, along = torch.func.jvp(lambda *t: run(name, *t), points, tangents)
        leaves = [t.clone().requires_grad_() for t in points]
        loss = run(name, *leaves).square().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        total = sum((g * d).sum() for g, d in zip(first, tangents, strict=True))
        return [along, *torch.autograd.grad(total, leaves)]

    with precision_of_the_framework(device):
        actual = results(backend, torch.float32)
    for number, pair in enumerate(zip(actual, results("reference", torch.float64), strict=True)):
        assert relative_error(*pair) < 2.0**-16, f"tensor {number}"


def _operator(layer: HyperConv2d, input: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.hyperconv_ext.hyper_conv_fwd(*_operands(layer, input))


def _operands(layer: HyperConv2d, input: Tensor) -> tuple[object, ...]:
    _, g = layer.geometry(input)
    coordinates, weights, biases, *settings = layer._mlp()
    lists = (g.input_size, g.output_size, g.kernel_size, g.stride, g.padding, g.dilation, g.groups)
    tensors = (input, layer.coefficients, coordinates, weights, biases, layer.bias)
    return (*tensors, *settings, layer.transposed, *lists, layer.backend, "auto")


def _gradients(layer, input: Tensor, second: bool) -> list[Tensor]:
    leaves = (input, *layer.parameters())
    output = layer(input)
    first = torch.autograd.grad(output.square().sum(), leaves, create_graph=second)
    if not second:
        return [output, *first]
    total = sum((gradient.square().sum() for gradient in first), torch.zeros((), device=input.device))
    return list(torch.autograd.grad(total, leaves))


def _layers() -> list[tuple[str, type, bool]]:
    """Second derivatives in Triton's interpreter of the one-dimensional layer alone."""
    kinds = (HyperConv1d, HyperConv2d, HyperConv3d, HyperConvTranspose2d)
    rows = [(backend, kind, second) for backend in FUSED for kind in kinds for second in (False, True)]
    return [row for row in rows if row[0] != "triton" or row[1] is HyperConv1d or not row[2]]


@interpreted(lambda row: row["kind"] is HyperConv3d)
@pytest.mark.parametrize(("backend", "kind", "second"), _layers())
def test_gradients(backend: str, kind, second: bool, device) -> None:
    """Within a few times the error of building W in float32."""
    layer = kind(3, 4, 3, stride=2, activation="tanh", backend=backend, device=device)
    input = torch.randn(2, 3, *(5, 4, 6)[: layer.dims], device=device, requires_grad=True)
    assert type(layer(input).grad_fn).__name__ == "HyperConvFunctionBackward"
    twin = kind(3, 4, 3, stride=2, activation="tanh", backend="reference", device=device)
    twin.load_state_dict(layer.state_dict())
    with precision_of_the_framework(device):
        actual, own = _gradients(layer, input, second), _gradients(twin, input, second)
    truth = _gradients(twin.double(), input.detach().double().requires_grad_(), second)
    for number, (ours, theirs, exact) in enumerate(zip(actual, own, truth, strict=True)):
        allowed = 4 * relative_error(theirs, exact) + 2.0**-21
        assert relative_error(ours, exact) <= allowed, f"tensor {number}"


@every_fused_backend
def test_opcheck(backend: str, device) -> None:
    layer = HyperConv2d(3, 4, (3, 2), activation="tanh", backend=backend, device=device)
    input = torch.randn(1, 3, 5, 6, device=device, requires_grad=True)
    *operands, _, _, transposed = (given := _operands(layer, input))[:10]
    torch.library.opcheck(
        torch.ops.hyperconv_ext.hyper_conv_fwd.default,
        (*operands, 0.3, True, transposed, *given[10:]),
        atol=1e-2,
        rtol=1e-2,
    )


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@every_fused_backend
def test_whoever_watches_sees_the_operator(backend: str, device) -> None:
    """Plain tensors bypass the dispatcher, but not while a mode is active; the results are the same."""
    layer = HyperConv2d(3, 4, 3, backend=backend, device=device)
    input = torch.randn(1, 3, 6, 7, device=device, requires_grad=True)
    expected = _gradients(layer, input, False)
    with _Log() as log:
        actual = _gradients(layer, input, False)
    seen = [name.split(".")[1] for name in log.names if name.startswith("hyperconv_ext.")]
    joins = planner.joins_on(backends.describe(input.device), backend)
    gradients = [JOINT] if joins else list(OPS[1:])
    assert seen == ["hyper_conv_fwd", *gradients, "coordinate_mlp_bwd"]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@every_fused_backend
def test_under_inference_mode(backend: str, device) -> None:
    layer = HyperConv2d(3, 4, 3, backend=backend, device=device)
    input = torch.randn(1, 3, 6, 7, device=device)
    with torch.inference_mode():
        inferred = layer(input)
    assert torch.equal(inferred, layer(input).detach())


@every_fused_backend
def test_parameters_of_another_dtype(backend: str, device) -> None:
    """The MLP in float32, all else in half precision."""
    dtype = torch.float16
    layer = HyperConv2d(3, 4, 3, backend=backend, device=device, dtype=dtype)
    input = torch.randn(1, 3, 6, 7, device=device, dtype=dtype)
    same = layer(input)
    layer.hypernet.float()
    assert torch.equal(layer(input), same)  # the same numbers, held in float32
    assert layer.hypernet.layers[0].weight.dtype == torch.float32


def test_coordinates_of_ones_own(device) -> None:
    weights, biases = _network(4, 2, torch.float32, device)
    input, coefficients = torch.randn(1, 3, 6, 7, device=device), torch.randn(5, 3, 5, device=device)
    arguments = (input, coefficients, weights, biases, (3, 2))
    taps = tap_coordinates((3, 2), "unit", device)
    named = functional.hyper_conv2d(*arguments, coordinates="unit")
    assert torch.equal(functional.hyper_conv2d(*arguments, coordinates=taps), named)
    assert not torch.equal(functional.hyper_conv2d(*arguments, coordinates=2 * taps), named)
    with pytest.raises(ValueError, match=r"coordinates: expected \[6, 2\].*got \[5, 2\]"):
        functional.hyper_conv2d(*arguments, coordinates=taps[1:])
    with pytest.raises(TypeError, match=r"coordinates: expected float32.*got torch.int64"):
        functional.hyper_conv2d(*arguments, coordinates=taps.long())


@pytest.mark.parametrize("backend", FUSED)
def test_gradient_of_the_coordinates(backend: str, device) -> None:
    """No kernel has it: the parts are composed, and PyTorch gives it."""
    weights, biases = _network(4, 2, torch.float32, device)
    input, coefficients = torch.randn(1, 3, 6, 7, device=device), torch.randn(5, 3, 5, device=device)

    def gradient(name: str) -> Tensor:
        taps = tap_coordinates((3, 2), "unit", device).requires_grad_()
        arguments = (input, coefficients, weights, biases, (3, 2))
        output = functional.hyper_conv2d(*arguments, activation="tanh", coordinates=taps, backend=name)
        return torch.autograd.grad(output.square().sum(), taps)[0]

    truth = gradient("reference").double()
    assert truth.any()
    assert relative_error(gradient(backend), truth) < 2.0**-7
