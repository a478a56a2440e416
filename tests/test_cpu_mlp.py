"""The CPU engine's coordinate MLP, at every level of instructions that the processor has."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hyperconv_ext.backends import reference
from hyperconv_ext.backends.cpu import library, mlp
from hyperconv_ext.problem import Device

from .conftest import best_instructions, passes
from .oracle import FLOOR, check

pytestmark = pytest.mark.skipif(bool(library.reason()), reason=library.reason())

HEADER = Path(__file__).resolve().parent.parent / "csrc" / "cpu" / "mlp.h"
ACTIVATIONS = tuple(reference.ACTIVATIONS)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# (D, the layers' widths, taps): around the vectors' and tiles' sizes.
CASES = (
    (1, (1,), 1),
    (2, (16, 16, 4), 49),
    (2, (16, 16, 4), 961),
    (3, (7, 70, 33, 5), 1500),
    (2, (8, 9), 17),
    (3, (5, 12), 343),
    (1, (70, 2), 31),
)
# gain, linear output, constant, window
SETTINGS = ((1.0, True, True, False), (1.3, False, False, True), (0.4, True, False, True))
Parameters = tuple[list[Tensor], list[Tensor]]


def _draw(dims: int, widths: tuple[int, ...], dtype: torch.dtype) -> Parameters:
    weights, biases = [], []
    for rows, columns in zip(widths, (dims, *widths), strict=False):
        weights.append((torch.randn(rows, columns) / columns**0.5).to(dtype))
        biases.append(torch.randn(rows).to(dtype))
    return weights, biases


def _by_autograd(
    taps: Tensor, parameters: Parameters, settings: tuple[str, float, bool], grad: Tensor
) -> list[Tensor]:
    """phi, then the gradients of weights and biases, of the reference."""
    weights, biases = [[t.detach().clone().requires_grad_() for t in tensors] for tensors in parameters]
    constant = grad.shape[0] > weights[-1].shape[0]
    basis = reference.coordinate_mlp(taps, weights, biases, *settings, constant)
    return [basis.detach(), *torch.autograd.grad(basis, [*weights, *biases], grad.to(basis.dtype))]


def _by_engine(
    taps: Tensor, parameters: Parameters, settings: tuple[str, float, bool], grad: Tensor
) -> list[Tensor]:
    constant = grad.shape[0] > parameters[0][-1].shape[0]
    basis = mlp.coordinate_mlp_fwd(taps, *parameters, *settings, constant)
    return [basis, *mlp.coordinate_mlp_bwd(grad, taps, *parameters, *settings)]


@pytest.fixture
def poisoned_gradients(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """What the engine is given to write to holds NaN."""
    allocate = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda tensor: allocate(tensor).fill_(float("nan")))


def _floor(dtype: torch.dtype, activation: str) -> float:
    """Two more roundings than elsewhere: sums in another order go into a curved function."""
    if dtype is torch.float64 and activation == "gelu":
        return 2.0**-40  # 1 + erf(h) cancels in the truth
    return 4 * FLOOR[dtype] if dtype is torch.float32 else FLOOR[dtype]


@pytest.mark.usefixtures("poisoned_gradients")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dims", "widths", "taps"), CASES)
def test_values_and_gradients(
    dims: int, widths: tuple[int, ...], taps: int, activation: str, dtype: torch.dtype
) -> None:
    parameters = _draw(dims, widths, dtype)
    exact = tuple([tensor.double() for tensor in tensors] for tensors in parameters)
    for gain, linear, constant, window in SETTINGS:
        coordinates = torch.randn(taps, dims + window)
        settings = (activation, gain, linear)
        grad = torch.randn(widths[-1] + constant, taps).to(torch.promote_types(dtype, torch.float32))
        actual = _by_engine(coordinates, parameters, settings, grad)
        own = _by_autograd(coordinates, parameters, settings, grad)
        truth = _by_autograd(coordinates.double(), exact, settings, grad)
        for index, (result, target, like) in enumerate(zip(actual, truth, own, strict=True)):
            assert result.dtype is like.dtype
            check(f"{settings} {index}", result, target, like, _floor(like.dtype, activation))


def _pointwise(values: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(the activation, its derivative) at `values`, by the engine: as many features of one tap."""
    weights, zeros = values[:, None], torch.zeros_like(values)
    point = torch.ones(1, 1, dtype=values.dtype)
    operands = (point, [weights], [zeros], activation, 1.0, False)
    basis = mlp.coordinate_mlp_fwd(*operands, False)
    _, slopes = mlp.coordinate_mlp_bwd(torch.ones_like(basis), *operands)
    return basis[:, 0], slopes


def _pointwise_truth(values: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    exact = values.double().requires_grad_()
    result = reference.ACTIVATIONS[activation](exact)
    return result.detach(), torch.autograd.grad(result.sum(), exact)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_exact_to_the_last_places(activation: str, dtype: torch.dtype) -> None:
    spread = torch.cat([torch.linspace(-80, 80, 4001), torch.randn(4000), 1e-3 * torch.randn(500)])
    values = torch.cat([spread, torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e-30, 9.0, -9.0])]).to(dtype)
    eps = torch.finfo(dtype).eps
    for which, (actual, truth) in enumerate(
        zip(_pointwise(values, activation), _pointwise_truth(values, activation), strict=True)
    ):
        # A derivative, and GELU, are sums or have a factor h, whose terms may cancel.
        terms = 1 + values.double().abs() if which or activation == "gelu" else truth.abs()
        # In float64 the truth is rounded too.
        units = 3 if dtype is torch.float32 else 6
        excess = (actual.double() - truth).abs() / (eps * terms + 1e-44)
        worst = int(excess.argmax())
        assert excess[worst] <= units, f"{which}: {excess[worst]:.1f} units at {values[worst]}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sine_of_large_arguments(dtype: torch.dtype) -> None:
    sizes = [1e3 * torch.randn(500), torch.linspace(-10001, 10001, 5001), 1e6 * torch.randn(50)]
    odd = torch.tensor([1e4, -1e4, 10000.001, 1e20, -1e30, torch.finfo(torch.float32).max])
    # Next to multiples of pi, where few digits are left.
    multiples = torch.arange(1, 3183) * torch.pi
    values = torch.cat([*sizes, odd, multiples]).to(dtype)
    tolerance = 2e-7 if dtype is torch.float32 else 4e-16
    for actual, truth in zip(_pointwise(values, "sine"), _pointwise_truth(values, "sine"), strict=True):
        torch.testing.assert_close(actual.double(), truth, rtol=0, atol=tolerance)
    small = values[values.abs() <= 1e4]
    actual, truth = _pointwise(small, "sine")[0].double(), _pointwise_truth(small, "sine")[0]
    torch.testing.assert_close(actual, truth, rtol=3 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinite_and_nan(activation: str) -> None:
    """As the reference in float64, also in the derivative; a coordinate's reach only its tap."""
    values = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan, -2.0, 3e38, -3e38, 100.0, -100.0])
    truth = _pointwise_truth(values, activation)
    for actual, expected in zip(_pointwise(values, activation), truth, strict=True):
        torch.testing.assert_close(actual, expected.float(), equal_nan=True)

    parameters, coordinates = _draw(2, (6, 5), torch.float32), torch.randn(37, 2)
    settings = (activation, 1.0, False)
    clean = mlp.coordinate_mlp_fwd(coordinates, *parameters, *settings, True)
    coordinates[13, 1] = torch.nan
    basis = mlp.coordinate_mlp_fwd(coordinates, *parameters, *settings, True)
    others = torch.arange(37) != 13
    assert basis[:-1, 13].isnan().all()
    assert basis[:, others].equal(clean[:, others])
    assert basis[-1].eq(1).all()


def test_weights_that_overflow_leave_no_trace_at_no_tap() -> None:
    """Lanes beyond the last tap hold 0 * inf; tanh(inf) has derivative 0 at the tap itself."""
    weights, biases = [torch.full((3, 2), torch.inf)], [torch.zeros(3)]
    coordinates, grad = torch.ones(5, 2), torch.randn(3, 5)
    operands = (coordinates, weights, biases, "tanh", 1.0, False)
    assert mlp.coordinate_mlp_fwd(*operands, False).eq(1).all()
    for gradient in mlp.coordinate_mlp_bwd(grad, *operands):
        assert gradient.eq(0).all()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("taps", [961, 6859])
def test_any_number_of_threads_gives_the_same_bits(taps: int, dtype: torch.dtype) -> None:
    parameters = _draw(3, (16, 16, 4), dtype)
    coordinates, grad = torch.randn(taps, 3), torch.randn(5, taps)
    results = []
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        results.append(_by_engine(coordinates, parameters, ("sine", 1.0, True), grad))
    for others in results[1:]:
        for first, other in zip(results[0], others, strict=True):
            assert first.equal(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_taps_do_not_depend_on_their_number(dtype: torch.dtype) -> None:
    parameters, settings = _draw(2, (9, 5), dtype), ("gelu", 1.0, False)
    coordinates, grad = torch.randn(600, 2), torch.randn(5, 600, dtype=dtype)
    whole = mlp.coordinate_mlp_fwd(coordinates, *parameters, *settings, False)
    for taps in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 513):
        basis, *gradients = _by_engine(coordinates[:taps], parameters, settings, grad[:, :taps])
        assert basis.equal(whole[:, :taps])
        masked = torch.where(torch.arange(600) < taps, grad, 0)
        expected = mlp.coordinate_mlp_bwd(masked, coordinates, *parameters, *settings)
        for gradient, like in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, like)


def test_operands_of_any_layout_and_dtype() -> None:
    """The first weight's dtype is computed with; the constant row's gradient counts for nothing."""
    weights, biases = _draw(2, (6, 4), torch.float32)
    coordinates, grad = torch.randn(11, 2), torch.randn(5, 11)
    expected = _by_engine(coordinates, (weights, biases), ("silu", 1.0, True), grad)
    sliced = torch.full((12, 5), torch.nan, dtype=torch.float64)
    sliced[:-1, 1::2] = coordinates.double()
    lent = [torch.stack([weight, weight], 2)[:, :, 1] for weight in weights]
    wide = [bias.double() for bias in biases]
    grad = torch.cat([grad[:4], torch.full((1, 11), torch.nan)]).T.contiguous().T
    actual = _by_engine(sliced[:-1, 1::2], (lent, wide), ("silu", 1.0, True), grad)
    assert [tensor.dtype for tensor in actual] == [torch.float32] * 3 + [torch.float64] * 2
    for result, like in zip(actual, expected, strict=True):
        assert result.float().equal(like)


def test_as_many_layers_as_there_may_be() -> None:
    parameters = _draw(2, (3,) * library.MAX_LAYERS, torch.float64)
    coordinates, grad = torch.randn(20, 2).double(), torch.randn(3, 20).double()
    settings = ("tanh", 1.0, True)
    actual = _by_engine(coordinates, parameters, settings, grad)
    for result, truth in zip(actual, _by_autograd(coordinates, parameters, settings, grad), strict=True):
        torch.testing.assert_close(result, truth)


def test_what_it_takes() -> None:
    cpu, gpu = Device("cpu"), Device("cuda", 90, 132)
    assert mlp.can_evaluate((2, 16, 1000), "bfloat16", cpu) == (True, "")
    ok, reason = mlp.can_evaluate((2,) * (library.MAX_LAYERS + 2), "float32", cpu)
    assert not ok and reason == "it takes an MLP of up to 16 layers, not 17"
    ok, reason = mlp.can_evaluate((2, 4), "float32", gpu)
    assert not ok and reason == "the tensors are on cuda; move them to the CPU"
    ok, reason = mlp.can_evaluate((2, 4), "int64", cpu)
    assert not ok and reason.endswith("not int64")


def test_errors_say_what_was_expected() -> None:
    weights, biases = _draw(2, (6, 4), torch.float32)
    coordinates = torch.randn(11, 2)
    rest = ("silu", 1.0, True)
    with pytest.raises(
        ValueError, match=r"weights: expected .*\[\(6, 2\), \(4, 6\)\], got \[\(6, 2\), \(4, 5"
    ):
        mlp.coordinate_mlp_fwd(coordinates, [weights[0], weights[1][:, :5]], biases, *rest, True)
    with pytest.raises(ValueError, match=r"weights: expected .*a weight and a bias for every layer"):
        mlp.coordinate_mlp_fwd(coordinates, weights[:1], biases, *rest, True)
    with pytest.raises(
        ValueError, match=r"activation: expected one of 'leaky_relu', .*, got 'swish'; name"
    ):
        mlp.coordinate_mlp_fwd(coordinates, weights, biases, "swish", 1.0, True, True)
    with pytest.raises(
        ValueError, match=r"grad: expected phi's, \[at least 4, 11\], got \[4, 12\]; pass"
    ):
        mlp.coordinate_mlp_bwd(torch.randn(4, 12), coordinates, weights, biases, *rest)
    with pytest.raises(ValueError, match="expected all tensors on the CPU, got one on meta; move"):
        mlp.coordinate_mlp_fwd(coordinates.to("meta"), weights, biases, *rest, True)


def test_activations_have_the_numbers_of_the_header() -> None:
    (body,) = re.findall(r"enum Activation : int32_t \{(.*?)\};", HEADER.read_text())
    assert [f"k{name.title().replace('_', '')}" for name in ACTIVATIONS] == body.replace(" ", "").split(
        ","
    )


# Without numbers in pairs, of which the MLP has none.
_OTHERS = [
    name
    for name in library.CAPABILITIES[library.CAPABILITIES.index(best_instructions()) + 1 :]
    if name != "avx512"
]


@pytest.mark.slow
@pytest.mark.skipif("HYPERCONV_CPU_CAPABILITY" in os.environ, reason="one level was asked for")
@pytest.mark.parametrize("capability", _OTHERS)
def test_with_fewer_instructions(capability: str) -> None:
    """All of the above."""
    environment = os.environ | {"HYPERCONV_CPU_CAPABILITY": capability}
    passes("-p", "no:xdist", __file__, least=10, environment=environment)
