"""The start of training: what a fresh layer answers, and how a step moves it, beside nn.ConvNd."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hyperconv_ext
from hyperconv_ext import HyperConv2d
from hyperconv_ext.backends.reference import ACTIVATIONS
from hyperconv_ext.hypernet import BasisMixing, CoordinateMLP
from hyperconv_ext.modules import HyperConvNd

from .test_modules import Fourier, Siren

CHANNELS = 32


def gains(weight: Tensor, channels: int) -> tuple[float, float]:
    """Mean square answers to white noise and to a constant, of a mean square of 1 in each channel."""
    kernels = weight.detach().double().flatten(2)
    white = kernels.square().sum((0, 1, 2)) / channels
    constant = kernels.sum(2).square().sum((0, 1)) / channels
    return white.item(), constant.item()


def twin_of(layer: HyperConvNd) -> nn.Module:
    kind = getattr(nn, type(layer).__name__.removeprefix("Hyper"))
    return kind(layer.in_channels, layer.out_channels, layer.kernel_size, groups=layer.groups)


def check_gains(layer: HyperConvNd) -> None:
    """Both within a factor of 2 of those of the convolution it replaces, as deviations."""
    ours, theirs = (gains(m.weight, layer.out_channels) for m in (layer, twin_of(layer)))
    for actual, expected in zip(ours, theirs, strict=True):
        assert 0.5 <= math.sqrt(actual / expected) <= 2, (layer, ours, theirs)


def layers(device) -> dict[str, Callable[[], HyperConvNd]]:
    def make(name: str, kernel_size: Any, groups: int = 1, **options: Any) -> Callable[[], HyperConvNd]:
        kind = getattr(hyperconv_ext, f"HyperConv{name}")
        return lambda: kind(CHANNELS, CHANNELS, kernel_size, groups=groups, **options, device=device)

    sizes = {str(size): make("2d", size) for size in (1, 2, 3, 5, 11, 31, (1, 9), (3, 7))}
    features = {f"N = {n}": make("2d", 5, num_features=n) for n in (1, 2, 8, 16, 40)}
    activations = {name: make("2d", 7, activation=name) for name in ACTIVATIONS}
    return {
        **sizes,
        **features,
        **activations,
        "K < R": make("1d", 3),
        "two taps": make("1d", 2),
        "1d": make("1d", 31),
        "3d": make("3d", 5),
        "transposed": make("Transpose2d", 4, stride=2),
        "transposed 1d": make("Transpose1d", 9),
        "transposed 3d": make("Transpose3d", 3),
        "groups": make("2d", 7, 4),
        "depthwise": make("2d", 7, CHANNELS),
        "transposed depthwise": make("Transpose2d", 7, CHANNELS),
        "centered": make("2d", 9, coordinates="centered"),
        "no constant": make("2d", 5, weight_bias=False),
        "weight norm": make("2d", 5, weight_norm="batch"),
        "fourier": make("2d", 5, hypernet=Fourier(4).to(device)),
        "siren": make("2d", 5, hypernet=Siren().to(device)),
        "half precision": make("2d", 5, dtype=torch.bfloat16),
        "with_kernel_size": lambda: reset(make("2d", 3)().with_kernel_size(9)),
    }


def reset(layer: HyperConvNd) -> HyperConvNd:
    layer.reset_parameters()
    return layer


@pytest.mark.parametrize("name", layers(None))
def test_gains_are_those_of_the_convolution_it_replaces(name: str, device) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        check_gains(layers(device)[name]())


@pytest.mark.parametrize("name", [n for n in layers(None) if n not in ("half precision", "weight norm")])
def test_the_basis_is_a_projection(name: str, device) -> None:
    """phi^T phi projects on as many dimensions as there are functions, or taps if fewer."""
    layer = layers(device)[name]()
    basis = layer.basis().detach().double().flatten(1)
    assert basis.shape[0] == layer.coefficients.shape[2]
    projection = basis.T @ basis
    torch.testing.assert_close(projection @ projection, projection, rtol=0, atol=2e-4)
    rank = min(basis.shape)
    assert basis.square().sum().item() == pytest.approx(rank, rel=1e-3)
    if layer.weight_bias:
        torch.testing.assert_close(
            basis[-1], torch.full_like(basis[-1], basis.shape[1] ** -0.5), rtol=1e-5, atol=1e-6
        )
        assert basis[:-1].sum(1).abs().max().item() < 1e-3


@pytest.mark.parametrize("kernel_size", [3, 5, 11, 31])
def test_twenty_layers_deep(kernel_size: int, device) -> None:
    """White noise through a stack of plain layers neither grows nor vanishes beside nn.Conv2d's."""
    deviations = []
    for kind in (nn.Conv2d, HyperConv2d):
        torch.manual_seed(0)
        hidden = torch.randn(2, 16, 24, 24, device=device)
        for _ in range(20):
            layer = kind(16, 16, kernel_size, padding=kernel_size // 2, device=device)
            with torch.no_grad():
                hidden = 2.45 * layer(hidden).relu()
        deviations.append(hidden.std().item())
    assert 0.01 < deviations[1] / deviations[0] < 100


def share_of_the_hypernet(layer: HyperConvNd) -> float:
    """The largest factor by which a step of the hyper-network moves W along a direction of its gradient.

    That is the largest eigenvalue of A J J^T A^T, J the Jacobian of phi by the stored parameters; the
    coefficients' part of a step has the eigenvalues of phi^T phi.
    """
    names = [name for name, _ in layer.hypernet.named_parameters()]

    def basis(*parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        features = torch.func.functional_call(layer.hypernet, given, (layer.taps,))
        window = layer.mixing.window_at(layer.taps)
        return layer.mixing(features if window is None else window * features)

    parameters = tuple(layer.hypernet.parameters())
    jacobian = torch.func.jacrev(basis, tuple(range(len(parameters))), chunk_size=256)(*parameters)
    rows = torch.cat([part.flatten(2) for part in jacobian], 2)  # [R, K, parameters]
    a = layer.coefficients.detach().flatten(0, 1)
    values, vectors = torch.linalg.eigh(a.T @ a)
    root = vectors * values.clamp_min(0).sqrt()
    moved = torch.einsum("rs,rkp->skp", root, rows).flatten(0, 1)
    return torch.linalg.matrix_norm(moved, 2).square().item()


@pytest.mark.parametrize(
    ("kernel_size", "channels", "features"),
    [(3, 8, 4), (3, 64, 4), (5, 256, 4), (5, 64, 1), (5, 64, 16), (7, 64, 4), (11, 64, 4), (31, 64, 4)],
)
def test_a_step_moves_every_direction_as_far_as_that_of_conv2d(
    kernel_size: int, channels: int, features: int, device
) -> None:
    """Within 2 of one learning rate: the coefficients' part is 1 (see the projection above)."""
    shares = []
    for seed in range(3):
        torch.manual_seed(seed)
        layer = HyperConv2d(8, channels, kernel_size, num_features=features, device=device)
        shares.append(share_of_the_hypernet(layer))
    assert all(0.04 < share < 1.2 for share in shares) and sorted(shares)[1] <= 1, shares


def test_modules_reset_one_by_one_start_as_well(device) -> None:
    """Parents first, as `for module in model.modules()` has it."""
    layer = HyperConv2d(16, 16, 5, device=device)
    before = layer.weight.clone()
    for module in nn.Sequential(layer).modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not torch.allclose(layer.weight, before)
    check_gains(layer)
    basis = layer.basis().flatten(1)
    torch.testing.assert_close(basis @ basis.T, torch.eye(5, device=device), rtol=0, atol=1e-4)


def test_resetting_a_copy_leaves_the_original_alone(device) -> None:
    layer = HyperConv2d(4, 4, 3, device=device)
    before = layer.weight.clone()
    twin = copy.deepcopy(layer)
    twin.mixing.reset_parameters()
    assert torch.equal(layer.weight, before) and not torch.equal(twin.weight, before)


def test_a_given_network_is_not_drawn_again(device) -> None:
    network = CoordinateMLP(2, activation="tanh", device=device)
    before = copy.deepcopy(network.state_dict())
    layer = HyperConv2d(4, 4, 5, hypernet=network, device=device)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    check_gains(HyperConv2d(CHANNELS, CHANNELS, 5, hypernet=network, device=device))
    assert layer.mixing.weight.any()


def independence(layer: HyperConvNd) -> float:
    """How far the features are from linear dependence: 0 if they depend, 1 if they are orthogonal.

    The smallest singular value over the largest, of the features freed of their mean and scaled to a
    length of 1; of as many as there can be over K taps.
    """
    values = layer.hypernet(layer.taps).detach().double()
    values = values - values.mean(0)
    rank = min(values.shape[1], values.shape[0] - 1)
    singular = torch.linalg.svdvals(values / values.norm(dim=0))
    return (singular[rank - 1] / singular[0]).item()


@pytest.mark.parametrize(
    ("dims", "kernel_size", "features"),
    [(1, 2, 4), (1, 3, 4), (1, 9, 4), (2, 2, 4), (2, 3, 4), (2, 7, 4), (2, 3, 8), (2, 5, 16), (3, 3, 4)],
)
def test_the_features_are_independent_enough(dims: int, kernel_size: int, features: int, device) -> None:
    """So that what rounding a network to a lower precision does to phi stays small."""
    kind = getattr(hyperconv_ext, f"HyperConv{dims}d")
    for seed in range(5):
        torch.manual_seed(seed)
        layer = kind(8, 8, kernel_size, num_features=features, device=device)
        enough = 0.1 if features >= kernel_size**dims else 0.5
        assert independence(layer) > enough, seed
        weight = layer.weight.detach()
        rounded = copy.deepcopy(layer).bfloat16().float().weight.detach()
        assert (rounded - weight).norm() < 0.06 * weight.norm()


@pytest.mark.parametrize(("kernel_size", "bound"), [(3, 1.8), (5, 1.8), (7, 2.2)])
def test_the_functions_are_the_smooth_ones(kernel_size: int, bound: float, device) -> None:
    """Of low frequencies, of which learned kernels mostly are, and unlike those of a random network."""
    axis = torch.arange(kernel_size, dtype=torch.float64)
    waves = torch.cos(math.pi * torch.outer(axis, axis + 0.5) / kernel_size)
    waves /= waves.norm(dim=1, keepdim=True)
    frequencies = torch.cartesian_prod(axis, axis).norm(dim=1)
    means = []
    for seed in range(5):
        torch.manual_seed(seed)
        layer = HyperConv2d(8, 8, kernel_size, num_features=4, device=device)
        functions = layer.basis()[:-1].detach().double().cpu()
        powers = (waves @ functions @ waves.T).square().sum(0).flatten() / 4
        assert powers.sum().item() == pytest.approx(1, rel=1e-4)
        means.append((powers @ frequencies).item())
    # The least of any four: 1 + 1 + 2 ** 0.5 + 2 half waves per kernel.
    assert 1.35 < sum(means) / 5 < bound, means


def test_a_last_layer_that_cannot_hold_components_is_left_as_it_was_drawn(device) -> None:
    for hidden, features in (((), 2), ((4,), 6)):
        network = CoordinateMLP(2, hidden, features, device=device)
        before = network.layers[-1].weight.clone()
        network.align(torch.rand(9, 2, device=device), True)
        assert torch.equal(network.layers[-1].weight, before)
    network = CoordinateMLP(2, device=device)
    before = network.layers[-1].weight.clone()
    network.align(torch.zeros(1, 2, device=device), True)
    assert torch.equal(network.layers[-1].weight, before)


def test_dependent_features_share_what_they_span() -> None:
    mixing = BasisMixing(3, True, nn.Identity())
    line = torch.linspace(-1, 1, 7)
    mixing.fit(torch.stack([line, -2 * line, torch.ones(7)], 1))
    basis = mixing(torch.stack([line, -2 * line, torch.ones(7)], 1))
    assert basis.shape == (4, 7) and basis[2].abs().max() < 1e-6
    expected = torch.outer(line, line) / line.square().sum() + 1 / 7
    torch.testing.assert_close(basis.T @ basis, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight_norm", [None, "batch"])
def test_published(weight_norm: str | None, device) -> None:
    """Leaky ReLU, centred coordinates, no mixing; he_normal, no biases, a norm of scale 1."""
    layer = HyperConv2d(64, 64, 5, parametrization="published", weight_norm=weight_norm, device=device)
    assert layer.mixing is None and layer.coordinates == "centered"
    assert layer.hypernet.activation == "leaky_relu" and layer.hypernet.weight_gain == 1
    features = layer.coefficients[..., :-1]
    assert features.std().item() == pytest.approx(math.sqrt(2 / 4), rel=0.02)
    limit = 2 * math.sqrt(2 / 4) / 0.8796
    assert 0.99 * limit < features.abs().max().item() <= limit * (1 + 1e-4)
    assert not layer.coefficients[..., -1].any()
    assert not any(part.bias.any() for part in layer.hypernet.layers)
    second = layer.hypernet.layers[1].weight
    assert second.std().item() == pytest.approx(math.sqrt(2 / 16), rel=0.25)
    if layer.weight_norm is not None:
        assert (layer.weight_norm.weight == 1).all() and not layer.weight_norm.bias.any()
    phi = layer.basis().flatten(1)
    torch.testing.assert_close(phi[:-1].T, layer.hypernet(layer.taps))
    assert (phi[-1] == 1).all()


def test_parametrization_is_named() -> None:
    message = r"^parametrization: expected one of orthonormal, published, got 'free'"
    with pytest.raises(ValueError, match=message):
        HyperConv2d(4, 4, 3, parametrization="free")
    with pytest.raises(AttributeError, match=r"^parametrization: .*make a new layer"):
        HyperConv2d(4, 4, 3).parametrization = "published"
