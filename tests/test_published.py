"""Checkpoints of published hyper-convolutions, whose networks are built here from torch.nn's layers."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperconv_ext import HyperConv2d, materialize


class InTorch(nn.Module):
    """The first layout: an image of coordinates, mapped by 1x1 convolutions to one of kernels."""

    def __init__(
        self,
        channels: tuple[int, int],
        kernel_size: tuple[int, int],
        norm: bool = True,
        bias: bool = False,
        widths: tuple[int, ...] = (2, 16, 16, 4),
        slope: float = 0.1,
    ) -> None:
        super().__init__()
        self.channels = channels
        rows, columns = (torch.arange(size) - (size - 1) / 2 for size in kernel_size)
        self.register_buffer("pos", torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None])
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 1), nn.LeakyReLU(slope)]
        kernels = channels[0] * channels[1]
        layers.append(nn.Conv2d(widths[-1], kernels, 1, bias=bias))
        if norm:
            layers.append(nn.BatchNorm2d(kernels))
            nn.init.uniform_(layers[-1].weight, 0.5, 2)  # type: ignore[arg-type]
            nn.init.normal_(layers[-1].bias)  # type: ignore[arg-type]
        self.main = nn.Sequential(*layers)

    @property
    def weight(self) -> Tensor:
        return self.main(self.pos).view(*self.channels, *self.pos.shape[2:])

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, padding=1)


def trained(net: InTorch) -> InTorch:
    """After steps in which the norm's statistics did not keep up with the kernel."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.randn(2, net.channels[1], 8, 8)).square().mean().backward()
        optimizer.step()
    return net


def check(layer: HyperConv2d, net: nn.Module) -> None:
    input = torch.randn(2, layer.in_channels, 8, 9)
    for training in (True, False):
        layer.train(training)
        torch.testing.assert_close(layer.weight.detach().clone(), net.weight.detach())
        torch.testing.assert_close(layer(input), net(input))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(3, 3), (4, 5)])
def test_in_torch_without_a_norm(size: tuple[int, int], bias: bool) -> None:
    net = trained(InTorch((6, 4), size, norm=False, bias=bias))
    layer = HyperConv2d.load_published(net.state_dict(), in_channels=4, padding=1)
    assert (layer.in_channels, layer.out_channels, layer.kernel_size) == (4, 6, size)
    assert layer.num_features == 4 and layer.weight_bias == bias and layer.bias is None
    check(layer, net)


@pytest.mark.parametrize("size", [(3, 3), (4, 5)])
def test_in_torch_with_a_norm(size: tuple[int, int]) -> None:
    """The kernel of evaluation; that of training where the statistics are left out."""
    net = trained(InTorch((6, 4), size))
    state = copy.deepcopy(net.state_dict())
    fresh = {name: value for name, value in state.items() if "running" not in name}
    kept = HyperConv2d.load_published(state, out_channels=6, padding=1)
    own = HyperConv2d.load_published(fresh, out_channels=6, padding=1)
    check(own, net.train())
    net.load_state_dict(state)  # a call in training has changed the statistics
    check(kept, net.eval())
    assert not torch.allclose(own.weight, kept.weight, rtol=0.1)
    assert not any("running" in name for name in kept.state_dict())


@pytest.mark.parametrize("norm", [False, True])
def test_another_slope(norm: bool) -> None:
    """That of `nn.LeakyReLU` as it is, which no state holds."""
    net = trained(InTorch((6, 4), (3, 3), norm=norm, slope=0.01)).eval()
    options: dict[str, Any] = {"in_channels": 4, "padding": 1}
    layer = HyperConv2d.load_published(net.state_dict(), negative_slope=0.01, **options)
    check(layer, net)
    steep = HyperConv2d.load_published(net.state_dict(), **options)
    assert not torch.allclose(steep.weight, layer.weight, rtol=1e-2)
    layer(torch.randn(1, 4, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert "negative_slope=0.01" in repr(layer)
    wide = layer.with_kernel_size(5)
    torch.testing.assert_close(
        layer.hypernet(layer.taps), wide.hypernet(wide.taps)[[6, 7, 8, 11, 12, 13, 16, 17, 18]]
    )
    twin = HyperConv2d.load_published(net.double().state_dict(), negative_slope=0.01, **options)
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.float64}
    torch.testing.assert_close(twin.weight.float(), layer.weight.detach().clone())


class Classifier(nn.Module):
    """Images `[B, 1, 28, 28]` -> 10 scores; `make(inputs, outputs, kernel size)` makes a convolution."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.conv1, self.conv2 = make(1, 8, 5), make(8, 16, 3)
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(16)
        self.last = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.max_pool2d(F.relu(self.norm1(self.conv1(images))), 4)
        return self.last(F.relu(self.norm2(self.conv2(hidden))).mean((2, 3)))


@pytest.mark.parametrize("keeps", [True, False])
def test_a_trained_classifier(keeps: bool) -> None:
    """The same scores from its checkpoint, layer by layer, and from convolutions made of those.

    With the norms' statistics the kernels are those of evaluation, without them those of training.
    """
    torch.manual_seed(0)
    net = Classifier(lambda inputs, outputs, size: InTorch((outputs, inputs), (size, size)))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-2)
    labels = torch.arange(40) % 10
    images = torch.randn(10, 1, 28, 28)[labels] + 0.5 * torch.randn(40, 1, 28, 28)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(net(images), labels))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    state = {n: v for n, v in net.state_dict().items() if keeps or "main.7.running" not in n}
    loaded = Classifier(lambda inputs, outputs, size: nn.Identity())
    rest = {name: value for name, value in state.items() if not name.startswith("conv")}
    loaded.load_state_dict(rest)
    for name, inputs in (("conv1", 1), ("conv2", 8)):
        layer = HyperConv2d.load_published(state, f"{name}.", in_channels=inputs, padding=1)
        setattr(loaded, name, layer)
    for training in (True, False):
        for model in (net, loaded):
            model.train(training)
        for conv in (net.conv1, net.conv2):
            conv.train(not keeps)  # its norm: by the statistics of the state, or of the kernel
        expected = copy.deepcopy(net)(images)
        torch.testing.assert_close(copy.deepcopy(loaded)(images), expected, rtol=1e-4, atol=1e-4)
        plain = materialize(copy.deepcopy(loaded))
        assert type(plain.conv1) is type(plain.conv2) is nn.Conv2d
        torch.testing.assert_close(plain(images), expected, rtol=1e-4, atol=1e-4)


def test_it_goes_on_training_as_it_would_have() -> None:
    net = trained(InTorch((6, 4), (3, 3))).train()
    fresh = {name: value for name, value in net.state_dict().items() if "running" not in name}
    layer = HyperConv2d.load_published(fresh, out_channels=6, padding=1)
    losses: list[list[float]] = [[], []]
    for module, seen in zip((net, layer), losses, strict=True):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        torch.manual_seed(0)
        for _ in range(5):
            optimizer.zero_grad()
            loss = (module(torch.randn(2, 4, 8, 8)) - 1).square().mean()
            loss.backward()
            seen.append(loss.item())
            optimizer.step()
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[0][-1] < losses[0][0]


def test_a_layer_of_a_model() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), InTorch((6, 4), (3, 3), widths=(2, 8, 3)))
    layer = HyperConv2d.load_published(model.eval().state_dict(), "1.", in_channels=4, padding=1)
    assert layer.num_features == 3 and layer.hypernet.widths == (2, 8, 3)
    check(layer, model[1])


def test_groups() -> None:
    net = InTorch((6, 2), (3, 3), norm=False)
    layer = HyperConv2d.load_published(net.state_dict(), in_channels=4, groups=2)
    assert layer.out_channels == 6
    torch.testing.assert_close(layer.weight.detach().clone(), net.weight.detach())


@pytest.mark.parametrize(
    "change", [lambda p: p / p.abs().max(), lambda p: p + 1, lambda p: 0.3 * p.flip(1)]
)
def test_other_coordinates(change: Any) -> None:
    """Stretched to [-1, 1], counted from 0, columns before rows: as regular as ours."""
    net = InTorch((6, 4), (5, 3), norm=False)
    net.pos = change(net.pos)
    layer = HyperConv2d.load_published(net.state_dict(), in_channels=4, padding=1)
    check(layer, net)


def test_unit_coordinates_stay_unit() -> None:
    net = InTorch((6, 4), (5, 5), norm=False)
    net.pos = net.pos / 2
    layer = HyperConv2d.load_published(net.state_dict(), in_channels=4)
    assert layer.coordinates == "unit"
    assert torch.equal(layer.hypernet.layers[0].weight, net.main[0].weight.flatten(1))


def test_without_coordinates() -> None:
    net = InTorch((6, 4), (3, 5), norm=False)
    state = net.state_dict()
    del state["pos"]
    with pytest.raises(
        ValueError, match="kernel_size: expected it beside a state that does not hold it"
    ):
        HyperConv2d.load_published(state, in_channels=4)
    check(HyperConv2d.load_published(state, in_channels=4, kernel_size=(3, 5), padding=1), net)


def test_the_layer_is_the_states() -> None:
    net = InTorch((6, 4), (3, 3)).double()
    layer = HyperConv2d.load_published(net.state_dict(), in_channels=4)
    assert {p.dtype for p in layer.parameters()} == {torch.float64} and layer.training
    layer = HyperConv2d.load_published(net.state_dict(), in_channels=4, dtype=torch.float32, stride=2)
    assert layer.coefficients.dtype == torch.float32 and layer.stride == (2, 2)
    before = net.main[0].weight.detach().clone()
    nn.init.zeros_(layer.hypernet.layers[0].weight)
    assert torch.equal(before, net.main[0].weight)

    class Own(HyperConv2d):
        pass

    assert type(Own.load_published(net.state_dict(), in_channels=4)) is Own


class InKeras(nn.Module):
    """The second layout: a grid of integers `[kh, kw, 2]`, products with kernels `[1, 1, in, out]`."""

    def __init__(self, channels: tuple[int, int], size: tuple[int, int]) -> None:
        super().__init__()
        self.channels, self.size = channels, size
        widths = (2, 16, 16, 4, channels[0] * channels[1])
        self.kernels = [torch.randn(1, 1, *pair) / 2 for pair in pairwise(widths)]
        self.biases = [torch.randn(width) for width in widths[1:]]

    def variables(self, name: str = "hyper/conv2d") -> dict[str, np.ndarray]:
        """Sorted by their names, as HDF5 lists them."""
        variables = {}
        for index, pair in enumerate(zip(self.kernels, self.biases, strict=True), start=8):
            for kind, value in zip(("kernel:0", "bias:0"), pair, strict=True):
                variables[f"{name}_{index}/{kind}"] = value.numpy()
        return dict(sorted(variables.items()))

    @property
    def weight(self) -> Tensor:
        rows, columns = (torch.arange(-(size - 1) / 2, (size + 1) / 2) for size in self.size)
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
        for index, (kernel, bias) in enumerate(zip(self.kernels, self.biases, strict=True)):
            grid = grid @ kernel[0, 0] + bias
            grid = F.leaky_relu(grid, 0.1) if index < 3 else grid
        outputs, inputs = self.channels
        return grid.view(*self.size, inputs, outputs).permute(3, 2, 0, 1)

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, padding=1)


@pytest.mark.parametrize("size", [(3, 3), (5, 4)])
def test_in_keras(size: tuple[int, int]) -> None:
    net = InKeras((6, 4), size)
    arguments: dict[str, Any] = {"layout": "tym002", "kernel_size": size, "padding": 1}
    layer = HyperConv2d.load_published(net.variables(), in_channels=4, **arguments)
    assert layer.out_channels == 6 and layer.weight_bias
    check(layer, net)
    tensors = {name: torch.from_numpy(value) for name, value in net.variables("a/b").items()}
    check(HyperConv2d.load_published(tensors, "a/", out_channels=6, **arguments), net)


MARKS = InTorch((6, 4), (3, 3)).state_dict()
UNEVEN = MARKS | {"pos": MARKS["pos"] ** 3 + MARKS["pos"].roll(1, 3)}
SHORT = {name: value for name, value in MARKS.items() if "main.4" not in name}


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        (MARKS, {"layout": "keras"}, "layout: expected one of mkarmann, tym002, got 'keras'"),
        (MARKS, {}, "in_channels, out_channels: expected one of them, .* 24 kernels, got neither"),
        (
            MARKS,
            {"in_channels": 5},
            "in_channels, out_channels: expected C_out .* 24 kernels .*in_channels=5",
        ),
        (
            MARKS,
            {"in_channels": 4, "out_channels": 5},
            "in_channels, out_channels: expected .*_channels=5",
        ),
        (
            MARKS,
            {"in_channels": 4, "out_channels": 12},
            "in_channels, out_channels: expected .*channels=12",
        ),
        (MARKS, {"in_channels": 4, "negative_slope": 0.0}, "negative_slope: expected a positive number"),
        (MARKS, {"in_channels": 0}, "in_channels: expected an integer of at least 1, got 0"),
        (
            MARKS,
            {"in_channels": 4, "kernel_size": 5},
            r"kernel_size: expected \(3, 3\), .* got \(5, 5\)",
        ),
        (
            MARKS,
            {"in_channels": 4, "prefix": "net."},
            r"state_dict: expected under the prefix 'net.'.* \[\]",
        ),
        (MARKS, {"in_channels": 4, "layout": "tym002"}, "state_dict: expected .*, got also"),
        (UNEVEN, {"in_channels": 4}, "state_dict: expected taps at equal distances"),
        (
            SHORT,
            {"in_channels": 4},
            r"state_dict: .* got \[2, 16, 4\] inputs where there are \[2, 16, 16\]",
        ),
        (MARKS | {"fc.weight": torch.ones(2)}, {"in_channels": 4}, "got also 'fc.weight'"),
        (MARKS | {"main.2.weight": torch.ones(16, 16, 3, 3)}, {"in_channels": 4}, "got a module with"),
    ],
)
def test_errors(state: dict[str, Tensor], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HyperConv2d.load_published(state, **options)
