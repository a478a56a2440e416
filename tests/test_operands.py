"""Operands laid out in every way PyTorch allows: each in turn, in every operator, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import pytest
import torch
from torch import Tensor

from hyperconv_ext import backends, functional, ops
from hyperconv_ext.geometry import Geometry

from .conftest import FUSED, backend_algorithms, interpreted, precision_of_the_framework

NAN = float("nan")


def _apart(tensor: Tensor) -> Tensor:
    """Every second element of memory whose others are NaN."""
    wide = tensor.new_full((*tensor.shape, 2), NAN)
    wide[..., 0] = tensor
    return wide[..., 0]


def _offset(tensor: Tensor) -> Tensor:
    """As it was, but one element further on, and NaN around it."""
    span = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    memory = tensor.new_full((span + 2,), NAN)
    return memory.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


def _sliced(tensor: Tensor) -> Tensor:
    """The inner part of a larger tensor of NaN along every axis."""
    wide = tensor.new_full([size + 3 for size in tensor.shape], NAN)
    return wide[(slice(2, -1),) * tensor.dim()].copy_(tensor)


def _reversed(tensor: Tensor) -> Tensor:
    """The first axis the fastest."""
    backwards = tuple(range(tensor.dim()))[::-1]
    return tensor.permute(backwards).contiguous().permute(backwards)


def _expanded(axis: int) -> Callable[[Tensor], Tensor]:
    """One slice along an axis, repeated with stride 0."""

    def expanded(tensor: Tensor) -> Tensor:
        where = axis % tensor.dim()
        return tensor.narrow(where, 0, 1).clone().expand(tensor.shape)

    return expanded


def _constant(tensor: Tensor) -> Tensor:
    """One number, all strides 0."""
    return tensor.flatten()[:1].clone().view((1,) * tensor.dim()).expand(tensor.shape)


def _overlapping(tensor: Tensor) -> Tensor:
    """Neighbours along every axis are neighbours in memory, as `unfold` with a step of 1 leaves them."""
    memory = torch.randn(sum(tensor.shape), dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, (1,) * tensor.dim())


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "apart": _apart,
    "offset": _offset,
    "sliced": _sliced,
    "reversed": _reversed,
    "expanded first": _expanded(0),
    "expanded second": _expanded(1),
    "expanded last": _expanded(-1),
    "constant": _constant,
    "overlapping": _overlapping,
}


def _with_gradients(function: Callable[..., Tensor], operands: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and the gradients of every operand, `grad` being the output's own."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in operands.items()}
    grad = leaves.pop("grad").detach()
    output = function(**leaves)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad)
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def _compare(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    operands: dict[str, Tensor],
    turn: int,
) -> None:
    """Every operand in another layout; over all turns each operand is in each."""
    makers = list(LAYOUTS.values())
    odd = {
        name: makers[(turn + 2 * place) % len(makers)](tensor)
        for place, (name, tensor) in enumerate(operands.items())
    }
    plain = {name: torch.empty_like(operands[name]).copy_(tensor) for name, tensor in odd.items()}
    actual, expected = _with_gradients(function, odd), _with_gradients(reference, plain)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-4)


def _channels_last(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)


every_turn = pytest.mark.parametrize("turn", range(len(LAYOUTS)))


@interpreted(lambda row: row["transposed"] != row["turn"] % 2)
@every_turn
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize(("backend", "algorithm"), [("reference", "auto"), *backend_algorithms()])
def test_convolution(backend: str, algorithm: str, transposed: bool, turn: int, device) -> None:
    """Of 16 channels, so that vector accesses are possible where the operand's layout allows them."""
    operands = {
        "input": _channels_last(2, 16, 3, 4, device=device),
        "coefficients": torch.randn(16, 16, 3, device=device),
        "basis": torch.randn(3, 3, 2, device=device),
        "bias": torch.randn(16, device=device),
        "grad": _channels_last(2, 16, *((5, 5) if transposed else (1, 3)), device=device),
    }
    convolve = functional.basis_conv_transpose2d if transposed else functional.basis_conv2d

    function = partial(convolve, backend=backend, algorithm=algorithm)
    with precision_of_the_framework(device):
        _compare(function, partial(convolve, backend="reference"), operands, turn)


@every_turn
@pytest.mark.parametrize("backend", ["reference", "composite", *FUSED])
def test_hyper_convolution(backend: str, turn: int, device) -> None:
    """Coordinates and the parameters of an MLP; the gradients of the latter in one kernel."""
    operands = {
        "input": _channels_last(1, 16, 3, 4, device=device),
        "coefficients": torch.randn(16, 16, 4, device=device),
        "coordinates": torch.randn(6, 2, device=device),
        "weight_0": torch.randn(4, 2, device=device),
        "weight_1": torch.randn(3, 4, device=device),
        "bias_0": torch.randn(4, device=device),
        "bias_1": torch.randn(3, device=device),
        "bias": torch.randn(16, device=device),
        "grad": _channels_last(1, 16, 1, 3, device=device),
    }
    fixed = ("input", "coefficients", "coordinates", "bias")  # tested above; coordinates have no kernel

    def function(backend: str, **given: Tensor) -> Tensor:
        constants = {name: given[name].detach() for name in fixed}
        weights, biases = [given["weight_0"], given["weight_1"]], [given["bias_0"], given["bias_1"]]
        output = functional.hyper_conv2d(
            constants["input"],
            constants["coefficients"],
            weights,
            biases,
            (3, 2),
            constants["bias"],
            activation="tanh",
            coordinates=constants["coordinates"],
            backend=backend,
        )
        return output + 0 * sum(given[name].sum() for name in fixed)

    with precision_of_the_framework(device):
        _compare(partial(function, backend), partial(function, "reference"), operands, turn)


@pytest.mark.parametrize("backend", ["reference", "composite", *FUSED])
@pytest.mark.parametrize(
    "narrow", ["weight_0", "weight_1", "bias_0", "bias_1", "weights", "coordinates"]
)
def test_parameters_of_different_dtypes(backend: str, narrow: str, device) -> None:
    """Each rounded to float16 is read as what it is, and gets its gradient in its own dtype."""
    names = ("coordinates", "weight_0", "weight_1", "bias_0", "bias_1")
    shapes = ((6, 2), (4, 2), (3, 4), (4,), (3,))
    wide = {n: torch.randn(s, device=device).half().float() for n, s in zip(names, shapes, strict=True)}
    chosen = {n: t.half() if n.startswith(narrow.removesuffix("s")) else t for n, t in wide.items()}
    input, coefficients = torch.randn(1, 2, 4, 4, device=device), torch.randn(3, 2, 4, device=device)

    def run(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        leaves = {n: t.clone().requires_grad_(n != "coordinates") for n, t in given.items()}
        weights, biases = [leaves["weight_0"], leaves["weight_1"]], [leaves["bias_0"], leaves["bias_1"]]
        options = {"activation": "tanh", "coordinates": leaves["coordinates"], "backend": backend}
        output = functional.hyper_conv2d(input, coefficients, weights, biases, (3, 2), **options)
        basis = ops.coordinate_mlp(
            leaves["coordinates"], weights, biases, "tanh", 1.0, False, True, backend
        )
        parameters = [*weights, *biases]
        gradients = torch.autograd.grad(output.sum() + basis.square().sum(), parameters)
        assert [g.dtype for g in gradients] == [p.dtype for p in parameters]
        return output, basis, *gradients

    with precision_of_the_framework(device):
        for actual, expected in zip(run(chosen), run(wide), strict=True):
            torch.testing.assert_close(actual.float(), expected, rtol=2e-3, atol=2e-3)


def test_overlapping_positions_are_not_read_16_bytes_at_a_time() -> None:
    """Channels and positions both with stride 1: a position does not begin where 16 channels do."""
    geometry = Geometry.conv((8,), (3,), (1,), (0,), (1,), 1)
    input = torch.randn(32).unfold(0, 16, 1)[:8].T[None]
    assert input.stride()[1:] == (1, 1)
    assert (
        prod(input.shape) == 128
        and not ops.problem_of(0, (input, torch.randn(16, 16, 2), torch.randn(2, 3)), geometry).aligned
    )


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("layout", ["apart", "expanded last", "offset"])
def test_the_mlp_alone(backend: str, layout: str, device) -> None:
    """Its two kernels called by themselves: coordinates, parameters and the gradient of phi."""
    engine = backends.BACKENDS[backend]
    weights, biases = [torch.randn(4, 2), torch.randn(3, 4)], [torch.randn(4), torch.randn(3)]
    tensors = [t.to(device) for t in (torch.randn(4, 6), torch.randn(6, 2), *weights, *biases)]

    def run(grad: Tensor, coordinates: Tensor, *parameters: Tensor) -> list[Tensor]:
        mlp = (coordinates, list(parameters[:2]), list(parameters[2:]), "sine", 0.5, False)
        return [engine.coordinate_mlp_fwd(*mlp, True), *engine.coordinate_mlp_bwd(grad, *mlp)]

    for index in range(len(tensors)):
        odd = [LAYOUTS[layout](t) if i == index else t for i, t in enumerate(tensors)]
        for actual, expected in zip(run(*odd), run(*[t.contiguous() for t in odd]), strict=True):
            torch.testing.assert_close(actual, expected)
