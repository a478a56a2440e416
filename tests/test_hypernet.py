"""Tap coordinates; the coordinate MLP in PyTorch against its layers, and fused against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hyperconv_ext import backends, ops, planner
from hyperconv_ext.hypernet import CoordinateMLP, tap_coordinates

from .conftest import FUSED, ON_GPU, dtypes_of, needs
from .oracle import FLOOR, relative_error

ACTIVATIONS: dict[str, nn.Module | Callable[[Tensor], Tensor]] = {
    "leaky_relu": nn.LeakyReLU(0.1),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "tanh": nn.Tanh(),
    "sine": torch.sin,
}
WIDTHS = ((2, 16, 16, 4), (2, 5), (1, 7, 1, 3), (3, 64, 33))
# What the CUDA kernels just take: 64 wide, eight layers.
LARGEST = ((64, 64), (2, *(64,) * 8), (3, 9, 16, 1, 33, 8, 5, 12, 4))
# A few roundings beside twice PyTorch's float32 error: values are O(1) and single sums can be exact.
FEW_EPS = 8 * 2.0**-23
# (weight_gain, linear_output)
SETTINGS = [(0.3, False), (1.0, True), (0.3, True)]
PLAIN = (1.0, False)
every_activation = pytest.mark.parametrize("activation", list(ACTIVATIONS))
every_fused_backend = pytest.mark.parametrize("backend", FUSED)
needs_cuda_library = needs("cuda")


@pytest.mark.parametrize(
    ("kernel_size", "coordinates", "expected"),
    [
        ((3,), "centered", [[-1], [0], [1]]),
        ((4,), "centered", [[-1.5], [-0.5], [0.5], [1.5]]),
        ((5,), "unit", [[-1], [-0.5], [0], [0.5], [1]]),
        ((2, 3), "centered", [[-0.5, -1], [-0.5, 0], [-0.5, 1], [0.5, -1], [0.5, 0], [0.5, 1]]),
        ((2, 3), "unit", [[-1, -1], [-1, 0], [-1, 1], [1, -1], [1, 0], [1, 1]]),
        ((1, 2), "unit", [[0, -1], [0, 1]]),
        ((2, 1, 2), "centered", [[-0.5, 0, -0.5], [-0.5, 0, 0.5], [0.5, 0, -0.5], [0.5, 0, 0.5]]),
    ],
)
def test_tap_coordinates(kernel_size, coordinates, expected, device) -> None:
    taps = tap_coordinates(kernel_size, coordinates, device, torch.float64)
    torch.testing.assert_close(
        taps, torch.tensor(expected, dtype=torch.float64, device=device), rtol=0, atol=0
    )


def test_bad_names_and_widths() -> None:
    with pytest.raises(
        ValueError, match=r"coordinates: expected .*'centered', 'unit', got 'polar'; pass"
    ):
        tap_coordinates((3, 3), "polar")
    with pytest.raises(
        ValueError, match=r"activation: expected one of .*sine, got 'swish'; pass .*hypernet="
    ):
        CoordinateMLP(2, activation="swish")
    for hidden, features in (((16, 0), 4), ((16,), 0), ((-1,), 4)):
        with pytest.raises(
            ValueError, match=r"hidden_features.*num_features: expected positive.*got .*; pass"
        ):
            CoordinateMLP(2, hidden, features)


@every_activation
def test_forward_is_that_of_a_sequential(activation: str, device) -> None:
    mlp = CoordinateMLP(2, (16, 7), 5, activation, device, torch.float64)
    assert mlp.widths == (2, 16, 7, 5)
    coordinates = torch.randn(11, 2, device=device, dtype=torch.float64)
    hidden = coordinates
    for layer in mlp.layers:
        hidden = ACTIVATIONS[activation](nn.functional.linear(hidden, layer.weight, layer.bias))
    torch.testing.assert_close(mlp(coordinates), hidden)
    basis = mlp.basis(coordinates, constant=True)
    torch.testing.assert_close(basis[:-1], hidden.T)
    assert torch.equal(basis[-1], torch.ones_like(basis[-1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_parameters_are_evaluated_in_float32(dtype: torch.dtype, device) -> None:
    mlp = CoordinateMLP(2, device=device).to(dtype)
    coordinates = tap_coordinates((7, 7), "unit", device)
    with torch.autocast(device.type, dtype):
        features = mlp(coordinates)
    assert features.dtype == torch.float32
    assert relative_error(features, mlp.double()(coordinates.double())) < FEW_EPS


def test_reset_parameters_draws_every_layer() -> None:
    mlp = CoordinateMLP(2, (8,), 3)
    before = [p.clone() for p in mlp.parameters()]
    mlp.reset_parameters()
    assert all((old != new).all() for old, new in zip(before, mlp.parameters(), strict=True))


def _mlp(widths: tuple[int, ...], activation: str, device, dtype=torch.float32) -> CoordinateMLP:
    """With biases and weights large enough that every activation bends."""
    mlp = CoordinateMLP(widths[0], widths[1:-1], widths[-1], activation, device)
    with torch.no_grad():
        for layer in mlp.layers:
            for parameter in layer.parameters():
                parameter.uniform_(-1, 1).mul_(1.5 / math.sqrt(layer.in_features))
    return mlp.to(dtype)


def _split(mlp: CoordinateMLP) -> tuple[list[Tensor], list[Tensor]]:
    return [layer.weight for layer in mlp.layers], [layer.bias for layer in mlp.layers]


def _phi(
    activation: str, constant: bool, backend: str, settings: tuple[float, bool] = PLAIN
) -> Callable[..., Tensor]:
    """phi as a function of coordinates and (weights..., biases...)."""

    def function(coordinates: Tensor, *parameters: Tensor) -> Tensor:
        layers = len(parameters) // 2
        weights, biases = parameters[:layers], parameters[layers:]
        return ops.coordinate_mlp(coordinates, weights, biases, activation, *settings, constant, backend)

    return function


def _compare(measure: Callable[..., list[Tensor]], tensors: list[Tensor], backend: str) -> None:
    """`measure(backend, *tensors)` by the fused kernels, against float64 and PyTorch's own error."""
    truth = measure("reference", *(t.double() for t in tensors))
    own = measure("reference", *tensors)
    actual = measure(backend, *tensors)
    assert len(actual) == len(truth)
    for index, (a, t, o) in enumerate(zip(actual, truth, own, strict=True)):
        assert a.shape == t.shape and a.dtype == torch.float32
        error, allowed = relative_error(a, t), 2 * relative_error(o, t) + FEW_EPS
        assert error <= allowed, f"result {index}: relative error {error:.2e} > {allowed:.2e}"


def _draw(
    widths: tuple[int, ...], activation: str, taps: int, device, gain: float = 1.0
) -> list[Tensor]:
    """[coordinates, weights..., biases...]; the latter as they are stored for a weight gain."""
    weights, biases = _split(_mlp(widths, activation, device))
    coordinates = torch.randn(taps, widths[0], device=device)
    return [coordinates, *(p.detach() / gain for p in (*weights, *biases))]


def _check_value_and_gradients(
    activation: str,
    widths: tuple[int, ...],
    backend: str,
    device,
    settings: tuple[float, bool] = PLAIN,
) -> None:
    assert planner.mlp_backend(widths, "float32", backends.describe(device), backend) == (backend, "")
    for taps, constant in ((1, True), (7, False), (49, True)):
        cotangent = torch.randn(widths[-1] + constant, taps, device=device)

        def measure(name: str, coordinates: Tensor, *parameters: Tensor) -> list[Tensor]:
            leaves = [p.clone().requires_grad_() for p in parameters]
            basis = _phi(activation, constant, name, settings)(coordinates, *leaves)  # noqa: B023
            gradients = torch.autograd.grad(basis, leaves, cotangent.to(basis.dtype))  # noqa: B023
            # A layer's two as one: a lone bias may be the difference of far larger terms.
            pairs = zip(gradients[: len(leaves) // 2], gradients[len(leaves) // 2 :], strict=True)
            return [basis.detach(), *(torch.cat([w, b.unsqueeze(1)], 1) for w, b in pairs)]

        _compare(measure, _draw(widths, activation, taps, device, settings[0]), backend)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@every_activation
@every_fused_backend
def test_fused_value_and_gradients(
    backend: str, activation: str, widths: tuple[int, ...], device, poisoned
) -> None:
    _check_value_and_gradients(activation, widths, backend, device)


@pytest.mark.parametrize("settings", SETTINGS)
@every_activation
@every_fused_backend
def test_fused_weight_gain_and_linear_output(
    backend: str, activation: str, settings: tuple[float, bool], device, poisoned
) -> None:
    for widths in ((2, 6, 5, 4), (2, 5)):
        _check_value_and_gradients(activation, widths, backend, device, settings)


def _written_out(
    coordinates: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    activation: str,
    settings: tuple[float, bool],
    constant: bool,
) -> Tensor:
    """phi of an MLP whose weights and biases are multiplied by the gain before they are used."""
    gain, linear_output = settings
    hidden = coordinates
    for number, (weight, offset) in enumerate(zip(weights, biases, strict=True), 1):
        if linear_output and number == len(weights):
            hidden = nn.functional.linear(hidden, weight, offset)
        else:
            hidden = ACTIVATIONS[activation](nn.functional.linear(hidden, gain * weight, gain * offset))
    return torch.cat([hidden.T, torch.ones_like(hidden.T[:1])]) if constant else hidden.T


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("settings", [PLAIN, *SETTINGS])
@every_activation
@pytest.mark.parametrize("backend", ["reference", "composite"])
def test_weight_gain_and_linear_output_written_out(
    backend: str, activation: str, settings: tuple[float, bool], constant: bool, device
) -> None:
    tensors = [t.double() for t in _draw((2, 6, 5, 4), activation, 9, device)]
    results = []
    for written in (True, False):
        coordinates, *leaves = [t.clone().requires_grad_() for t in tensors]
        if written:
            basis = _written_out(coordinates, leaves[:3], leaves[3:], activation, settings, constant)
        else:
            basis = _phi(activation, constant, backend, settings)(coordinates, *leaves)
        gradients = torch.autograd.grad(basis.square().sum(), [coordinates, *leaves])
        results.append([basis, *gradients])
    torch.testing.assert_close(*results)


@every_fused_backend
def test_the_gain_is_one_of_the_parameters(backend: str, device) -> None:
    """Stored 1/gain times as large they give the same function, with a gradient gain times as large."""
    coordinates, *parameters = _draw((2, 6, 4), "tanh", 9, device)
    gain, results = 4.0, []
    for factor in (1.0, gain):
        leaves = [(p / factor).requires_grad_() for p in parameters]
        basis = _phi("tanh", True, backend, (factor, False))(coordinates, *leaves)
        results.append([basis, *torch.autograd.grad(basis.square().sum(), leaves)])
    (basis, *gradients), (same, *larger) = results
    torch.testing.assert_close(same, basis)
    torch.testing.assert_close(larger, [gain * gradient for gradient in gradients])


@needs_cuda_library
@pytest.mark.parametrize("widths", LARGEST, ids=str)
@every_activation
def test_as_large_as_cuda_takes(activation: str, widths: tuple[int, ...], device, poisoned) -> None:
    _check_value_and_gradients(activation, widths, "cuda", device)


@pytest.mark.parametrize("settings", [PLAIN, (0.3, True)])
@every_activation
@every_fused_backend
def test_fused_second_derivatives(
    backend: str, activation: str, settings: tuple[float, bool], device
) -> None:
    tensors = _draw((2, 6, 4), activation, 9, device, settings[0])
    cotangent, *directions = (
        torch.randn(shape, device=device) for shape in [(5, 9), *(t.shape for t in tensors[1:])]
    )

    def measure(name: str, coordinates: Tensor, *parameters: Tensor) -> list[Tensor]:
        leaves = [p.clone().requires_grad_() for p in parameters]
        v = cotangent.to(leaves[0].dtype).requires_grad_()
        basis = _phi(activation, True, name, settings)(coordinates, *leaves)
        first = torch.autograd.grad(basis, leaves, v, create_graph=True)
        along = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
        return list(torch.autograd.grad(along, [v, *leaves], materialize_grads=True))

    _compare(measure, tensors, backend)


@pytest.mark.parametrize("settings", [PLAIN, (0.3, True)])
@every_activation
@every_fused_backend
def test_fused_forward_mode(backend: str, activation: str, settings: tuple[float, bool], device) -> None:
    tensors = _draw((2, 6, 4), activation, 9, device, settings[0])
    directions = [torch.randn_like(t) for t in tensors[1:]]

    def measure(name: str, coordinates: Tensor, *parameters: Tensor) -> list[Tensor]:
        tangents = tuple(d.to(coordinates.dtype) for d in directions)

        def phi(*p: Tensor) -> Tensor:
            return _phi(activation, True, name, settings)(coordinates, *p)

        # Of all parameters, and of the last weight alone: the other tangents are then None.
        last = len(parameters) // 2 - 1
        every = torch.func.jvp(phi, parameters, tangents)
        one = torch.func.jvp(
            lambda w: phi(*parameters[:last], w, *parameters[last + 1 :]),
            (parameters[last],),
            (tangents[last],),
        )
        return [*every, one[1]]

    _compare(measure, tensors, backend)


@pytest.mark.parametrize("settings", [PLAIN, (0.3, True)])
@every_fused_backend
def test_fused_gradients_per_example(backend: str, settings: tuple[float, bool], device) -> None:
    tensors = _draw((2, 6, 4), "silu", 9, device, settings[0])
    count = 3
    stacks = [torch.randn(count, *t.shape, device=device) for t in tensors[1:]]
    cotangent = torch.randn(5, 9, device=device)

    def measure(name: str, coordinates: Tensor, *parameters: Tensor) -> list[Tensor]:
        def loss(*p: Tensor) -> Tensor:
            return (_phi("silu", True, name, settings)(coordinates, *p) * cotangent).sum()

        gradient = torch.func.grad(loss, argnums=tuple(range(len(parameters))))
        return list(torch.func.vmap(gradient)(*parameters))

    _compare(measure, [tensors[0], *stacks], backend)


@every_fused_backend
def test_fused_takes_half_parameters(backend: str, device, poisoned) -> None:
    """Computed in float32 from them, gradients rounded to their dtype."""
    coordinates = tap_coordinates((5, 5), "unit", device)
    for dtype in dtypes_of(backend, device)[1:]:
        mlp = _mlp((2, 16, 4), "gelu", device, dtype)
        basis = mlp.basis(coordinates, True, backend)
        cotangent = torch.randn_like(basis)
        gradients = torch.autograd.grad(basis, list(mlp.parameters()), cotangent)
        assert all(g.dtype == dtype for g in gradients)
        wide = _mlp((2, 16, 4), "gelu", device, torch.float64)
        wide.load_state_dict(mlp.state_dict())
        truth = wide.basis(coordinates.double(), True, "reference")
        assert relative_error(basis, truth) < FEW_EPS
        expected = torch.autograd.grad(truth, list(wide.parameters()), cotangent.double())
        for actual, exact in zip(gradients, expected, strict=True):
            assert relative_error(actual, exact) < FLOOR[dtype]


@pytest.mark.parametrize("backend", ON_GPU)
def test_who_evaluates_the_mlp(backend: str, device) -> None:
    """The kernels up to 64 wide; PyTorch beyond, in float64, on another backend: with the reason."""
    machine = backends.describe(device)
    assert planner.mlp_backend((2, 64, 4), "float32", machine, backend) == (backend, "")
    for widths, dtype, name, reason in (
        ((2, 65, 4), "float32", backend, "up to 64 wide, not 65"),
        ((2, 16, 4), "float64", backend, "not float64"),
        ((2, 16, 4), "float32", "composite", "'composite' evaluates it by PyTorch"),
    ):
        engine, why = planner.mlp_backend(widths, dtype, machine, name)
        assert not engine and reason in why
    meta = backends.describe(torch.device("meta"))
    engine, why = planner.mlp_backend((2, 16, 4), "float32", meta, "auto")
    assert not engine and why.startswith("cpu: ")
    wide = _mlp((2, 65, 4), "sine", device)
    coordinates = tap_coordinates((5, 5), "unit", device)
    outputs = [wide.basis(coordinates, True, name) for name in (backend, "reference")]
    assert torch.equal(*outputs)


@needs_cuda_library
def test_cuda_leaves_a_ninth_layer_to_pytorch(device) -> None:
    """Its gradient too."""
    widths = (2, *(8,) * 8, 4)
    machine = backends.describe(device)
    engine, why = planner.mlp_backend(widths, "float32", machine, "cuda")
    assert (engine, why) == ("", "cuda: its MLP kernels take up to 8 layers, not 9")
    mlp = _mlp(widths, "sine", device)
    coordinates = tap_coordinates((5, 5), "unit", device)
    results = []
    for name in ("cuda", "reference"):
        basis = mlp.basis(coordinates, True, name)
        results.append([basis, *torch.autograd.grad(basis.sum(), list(mlp.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("settings", [PLAIN, (0.3, True)])
@pytest.mark.parametrize("constant", [False, True])
@every_fused_backend
def test_opcheck(backend: str, constant: bool, settings: tuple[float, bool], device) -> None:
    weights, biases = _split(_mlp((2, 6, 4), "tanh", device))
    coordinates = tap_coordinates((3, 4), "centered", device)
    grad = torch.randn(4 + constant, 12, device=device, requires_grad=True)
    operators = torch.ops.hyperconv_ext
    parameters = (weights, biases, "tanh", *settings)
    torch.library.opcheck(
        operators.coordinate_mlp_fwd.default, (coordinates, *parameters, constant, backend)
    )
    torch.library.opcheck(
        operators.coordinate_mlp_bwd.default, (grad, coordinates, *parameters, backend)
    )


@every_fused_backend
def test_gradient_of_the_coordinates(backend: str, device) -> None:
    """The fused kernels do not have it, so it must come from PyTorch and not be lost."""
    mlp = CoordinateMLP(2, device=device)

    def gradient(name: str) -> torch.Tensor:
        points = tap_coordinates((3, 5), device=device).requires_grad_()
        return torch.autograd.grad(mlp.basis(points, True, name).square().sum(), points)[0]

    assert gradient(backend).any()
    torch.testing.assert_close(gradient(backend), gradient("reference"))


@every_fused_backend
def test_forward_mode_by_the_coordinates(backend: str, device) -> None:
    mlp = CoordinateMLP(2, activation="tanh", device=device)
    points = tap_coordinates((3, 5), device=device)
    direction = torch.randn_like(points)

    def derivative(name: str) -> torch.Tensor:
        return torch.func.jvp(lambda p: mlp.basis(p, True, name), (points,), (direction,))[1]

    assert derivative(backend).any()
    torch.testing.assert_close(derivative(backend), derivative("reference"))
