"""float16: what happens between the two products has the range of the result, not a smaller one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hyperconv_ext import functional, ops
from hyperconv_ext.geometry import Geometry
from hyperconv_ext.ops import Mlp

from .conftest import backend_algorithms
from .oracle import relative_error

every_backend = pytest.mark.parametrize(
    ("backend", "algorithm"), [("reference", "auto"), *backend_algorithms()]
)
# `direct` builds W, and has the other algorithm's gradients.
every_product = pytest.mark.parametrize(
    ("backend", "algorithm"), [pair for pair in backend_algorithms() if pair[1] != "direct"]
)
# The rounding of A, of phi, of z or u and of the result, each to 11 bits.
TOLERANCE = 4 * 2.0**-11


def _gradients(tensors: list[Tensor], grad: Tensor, geometry: Geometry, **choice: str) -> list[Tensor]:
    """y and the gradients of x, A and phi."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    names = (choice["backend"], choice.get("algorithm", "auto"))
    output = ops.basis_conv(leaves[0], leaves[1], leaves[2], None, geometry, *names)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def _check(
    tensors: list[Tensor], grad: Tensor, geometry: Geometry, backend: str, algorithm: str
) -> list[Tensor]:
    """Output and all gradients against float64."""
    wide = [t.double() for t in tensors]
    truth = _gradients(wide, grad.double(), geometry, backend="reference")
    actual = _gradients(tensors, grad, geometry, backend=backend, algorithm=algorithm)
    for name, a, t in zip(("y", "dx", "dA", "dphi"), actual, truth, strict=True):
        largest = torch.finfo(a.dtype).max
        assert t.abs().max() < largest, f"{name}: the truth {t.abs().max()} is out of range"
        least = 2.0**-24 * t.numel() ** 0.5 / t.norm().item() if a.dtype == torch.float16 else 0.0
        assert relative_error(a, t) < TOLERANCE + least, f"{name}: {relative_error(a, t):.2e}"
    return actual


def _same(size: tuple[int, ...], kernel: tuple[int, ...]) -> Geometry:
    ones = (1,) * len(size)
    return Geometry.conv(size, kernel, ones, "same", ones, 1)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["phi half", "phi float"])
def test_large_responses(backend: str, algorithm: str, dtype: torch.dtype, device) -> None:
    """x = 400, phi = 4 over 49 taps: z is 78,400 where y = 612.5 per channel."""
    x = torch.full((1, 4, 7, 7), 400.0, dtype=torch.float16, device=device)
    phi = torch.full((1, 7, 7), 4.0, dtype=dtype, device=device)
    a = torch.full((2, 4, 1), 2.0**-7, dtype=torch.float16, device=device)
    y = functional.basis_conv2d(x, a, phi, backend=backend, algorithm=algorithm)
    assert (y == 4 * 612.5).all()
    grad = (torch.randn(1, 2, 1, 1, device=device) / 8).half()
    _check(
        [x, a, phi], grad, Geometry.conv((7, 7), (7, 7), (1, 1), (0, 0), (1, 1), 1), backend, algorithm
    )


@every_product
def test_the_constant_function_over_many_taps(backend: str, algorithm: str, device) -> None:
    """The mean over 961 taps of inputs near 1000."""
    x = (1000 + 100 * torch.randn(1, 1, 962, device=device)).half()
    phi = torch.ones(1, 961, device=device)
    a = (torch.randn(3, 1, 1, device=device) / 200).half()
    grad = (torch.randn(1, 3, 2, device=device) / 256).half()
    geometry = Geometry.conv((962,), (961,), (1,), (0,), (1,), 1)
    _check([x, a, phi], grad, geometry, backend, algorithm)


@every_backend
@pytest.mark.parametrize("transposed", [False, True])
def test_the_mlp_path(backend: str, algorithm: str, transposed: bool, device) -> None:
    """phi of a hyper-network, constant function included, whose sums are not known before it."""
    x = torch.full((1, 2, 9, 9), 3000.0, dtype=torch.float16, device=device)
    a = torch.full((2, 2, 3), 2.0**-9, dtype=torch.float16, device=device)
    weights, biases = [torch.zeros(2, 2, device=device)], [torch.full((2,), 0.5, device=device)]
    name = "hyper_conv_transpose2d" if transposed else "hyper_conv2d"
    choice = {"backend": backend, "algorithm": algorithm, "activation": "relu"}
    y = getattr(functional, name)(x, a, weights, biases, 7, padding=3, **choice)
    assert y[0, 0, 4, 4] == 2 * 49 * 3000 * 2 * 2.0**-9  # in the middle all taps meet


@every_product
@pytest.mark.parametrize("channels", [16, 70])
@pytest.mark.parametrize("size", [200.0, 2.0**-16, 2.0**-22], ids=["large A", "small A", "least A"])
def test_gradients_through_u(backend: str, algorithm: str, channels: int, size: float, device) -> None:
    """u, a sum of A g over many outputs, overflows where dphi and dx do not, or is hardly there."""
    large = size > 1
    x = torch.randn(2, 16, 5, 6, device=device)
    grad = (1 + torch.rand(2, channels, 5, 6, device=device)) * (8 if large else 1)
    a = torch.full((channels, 16, 2), size, device=device)
    a[:, :, 1] *= torch.randn(channels, 16, device=device).sign()
    phi = torch.randn(2, 3, 3, device=device) * (2.0**-8 if large else 2.0**8)
    x = x * (2.0**-8 if large else 1)
    operands = [x.half(), a.half(), phi]
    for layout in (torch.contiguous_format, torch.channels_last):
        operands[0] = operands[0].contiguous(memory_format=layout)
        _check(
            operands,
            grad.half().contiguous(memory_format=layout),
            _same((5, 6), (3, 3)),
            backend,
            algorithm,
        )


@every_product
def test_small_and_large_functions(backend: str, algorithm: str, device) -> None:
    """phi far beyond or below float16, A the other way: only their products are in its range."""
    x = torch.randn(2, 3, 5, 6, device=device).half()
    phi = torch.randn(3, 3, 3, device=device) * torch.tensor(
        [2.0**18, 2.0**-18, 1.0], device=device
    ).view(3, 1, 1)
    a = torch.randn(4, 3, 3, device=device) * torch.tensor([2.0**-14, 2.0**12, 0.0], device=device)
    grad = torch.randn(2, 4, 5, 6, device=device).half()
    geometry, names = _same((5, 6), (3, 3)), (backend, algorithm)
    a = a.half()
    wide = [x.double(), a.double(), phi.double(), grad.double()]
    truth = ops.basis_conv(*wide[:3], None, geometry, "reference", "auto")
    assert relative_error(ops.basis_conv(x, a, phi, None, geometry, *names), truth) < TOLERANCE
    truth = ops.form(1, geometry, "composite", "auto", None, wide[3], *wide[1:3])
    assert relative_error(ops.form(1, geometry, *names, None, grad, a, phi), truth) < TOLERANCE


@every_backend
def test_functions_and_coefficients_of_zero(backend: str, algorithm: str, device) -> None:
    """There is nothing to scale by, and nothing becomes NaN."""
    x = torch.randn(1, 3, 4, 4, device=device).half()
    geometry = _same((4, 4), (3, 3))
    grad = torch.randn(1, 2, 4, 4, device=device).half()
    for a, phi in (
        (torch.zeros(2, 3, 2), torch.randn(2, 3, 3)),
        (torch.randn(2, 3, 2), torch.zeros(2, 3, 3)),
    ):
        operands = [x, a.half().to(device), phi.to(device)]
        for value in _gradients(operands, grad, geometry, backend=backend, algorithm=algorithm):
            assert value.isfinite().all()


def test_the_layer_in_every_dimension(device) -> None:
    """All of `composite`'s library calls take float16 tensors on this device."""
    for dims in (1, 2, 3):
        size, kernel = (5,) * dims, (3,) * dims
        x = torch.randn(1, 2, *size, device=device).half()
        mlp = Mlp(
            torch.randn(3**dims, dims, device=device),
            [torch.randn(2, dims, device=device)],
            [torch.zeros(2, device=device)],
            "tanh",
        )
        a = torch.randn(3, 2, 3, device=device).half()
        y = ops.hyper_conv(x, a, mlp, None, _same(size, kernel), "composite", "auto")
        truth = ops.hyper_conv(x.float(), a.float(), mlp, None, _same(size, kernel), "reference", "auto")
        assert y.dtype == torch.float16 and relative_error(y, truth.double()) < TOLERANCE
