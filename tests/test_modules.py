"""`HyperConv2d` beside `nn.Conv2d`, its initialisation, its state, and its hyper-networks."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperconv_ext import HyperConv2d, explain
from hyperconv_ext.backends.cpu import library as cpu_library
from hyperconv_ext.backends.reference import materialize_weight
from hyperconv_ext.hypernet import tap_coordinates
from hyperconv_ext.modules.base import PARAMETRIZATIONS
from hyperconv_ext.planner import PlanError

from .conftest import FUSED, QUICK, dtypes_of, precision_of_the_framework
from .oracle import check, relative_error

# Arguments after (in_channels=4, out_channels=8).
GRID: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 3)},
    {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 2)},
    {"kernel_size": [2, 3], "padding": "valid", "groups": 2, "bias": False},
    {"kernel_size": 3, "padding": 1, "groups": 4},
    {"kernel_size": (2, 5), "padding": (1, 2), "padding_mode": "reflect"},
    {"kernel_size": (3, 4), "padding": "same", "dilation": 2, "padding_mode": "reflect"},
    {"kernel_size": (5, 3), "stride": 2, "padding": (2, 1), "padding_mode": "replicate"},
    {"kernel_size": (4, 3), "padding": "same", "padding_mode": "replicate", "bias": False},
    {"kernel_size": (3, 2), "padding": (0, 3), "dilation": (1, 2), "padding_mode": "circular"},
    {"kernel_size": 4, "padding": "same", "padding_mode": "circular", "groups": 2},
    {"kernel_size": 3, "padding": "valid", "padding_mode": "circular"},
]
with_and_without_bias = pytest.mark.parametrize("weight_bias", [False, True])


class Fourier(nn.Module):
    """Random Fourier features: no parameters."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(2, features))

    def forward(self, coordinates: Tensor) -> Tensor:
        phase = coordinates @ self.frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class Siren(nn.Module):
    """Two layers of sines."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 6), nn.Linear(6, 3)

    def forward(self, coordinates: Tensor) -> Tensor:
        return self.second((3 * self.first(coordinates)).sin()).sin()


def mixed(conv: HyperConv2d) -> Tensor:
    """phi `[R, K]` from the features, in plain operations."""
    return conv.mixing.weight @ conv.hypernet(conv.taps).T + conv.mixing.bias[:, None]


def _truth(conv: HyperConv2d) -> Tensor:
    """W in float64 from the layer's own coefficients and basis."""
    coefficients, basis = (t.detach().double() for t in conv.kernel())
    return materialize_weight(coefficients, basis)


def _twin(conv: HyperConv2d, arguments: dict[str, Any], weight: Tensor) -> nn.Conv2d:
    """`nn.Conv2d` of the same arguments, with this weight and the layer's bias."""
    options = {"device": weight.device, "dtype": weight.dtype}
    twin = nn.Conv2d(conv.in_channels, conv.out_channels, **arguments, **options)
    twin.weight = nn.Parameter(weight.detach())
    if conv.bias is not None:
        assert twin.bias is not None
        twin.bias = nn.Parameter(conv.bias.detach().to(weight.dtype))
    assert (twin.bias is None) == (conv.bias is None)
    return twin


def _run(module: nn.Module, input: Tensor) -> list[Tensor]:
    """[output, gradient of the input] for a fixed cotangent."""
    leaf = input.clone().requires_grad_()
    output = module(leaf)
    cotangent = torch.linspace(-1, 1, output.numel(), device=input.device).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, leaf, cotangent.to(output.dtype))]


def _drop_in(arguments: dict[str, Any], backend: str, dtype: torch.dtype, device) -> None:
    conv = HyperConv2d(4, 8, **arguments, device=device, dtype=dtype, backend=backend)
    truth = _twin(conv, arguments, _truth(conv))
    own = _twin(conv, arguments, conv.weight)
    batch = torch.randn(2, 4, 9, 10, device=device).to(dtype)
    for input in (batch, batch[1]):
        results = zip(_run(conv, input), _run(truth, input.double()), _run(own, input), strict=True)
        for name, (actual, *expected) in zip(("output", "input"), results, strict=True):
            assert actual.dtype == dtype
            check(name, actual, *expected)
    assert conv(batch[:0]).shape == own(batch[:0]).shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "composite"])
@pytest.mark.parametrize("arguments", GRID, ids=str)
def test_drop_in(arguments: dict[str, Any], backend: str, dtype: torch.dtype, device) -> None:
    _drop_in(arguments, backend, dtype, device)


def _fused_grid() -> list[tuple[str, dict[str, Any]]]:
    """All arguments, but three for triton, whose interpreter takes its time."""
    few = (GRID[2], GRID[3], GRID[11])
    return [(name, arguments) for name in FUSED for arguments in (few if name == "triton" else GRID)]


@pytest.mark.parametrize(("backend", "arguments"), _fused_grid(), ids=str)
def test_drop_in_fused(backend: str, arguments: dict[str, Any], device, poisoned) -> None:
    dtypes = dtypes_of(backend, device)
    for dtype in dtypes[:1] if backend == "triton" else dtypes:
        with precision_of_the_framework(device) if backend == "cuda" else nullcontext():
            _drop_in(arguments, backend, dtype, device)


def test_arguments_in_the_order_of_conv2d() -> None:
    ours = list(inspect.signature(HyperConv2d).parameters.values())
    theirs = list(inspect.signature(nn.Conv2d).parameters.values())
    assert [(p.name, p.default, p.kind) for p in theirs] == [
        (p.name, p.default, p.kind) for p in ours[: len(theirs)]
    ]
    rest = ours[len(theirs) :]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in rest)
    assert {p.name: p.default for p in rest} == {
        "hidden_features": (16, 16),
        "num_features": None,
        "activation": None,
        "weight_bias": True,
        "weight_norm": None,
        "coordinates": None,
        "backend": "auto",
        "algorithm": "auto",
        "hypernet": None,
        "parametrization": "orthonormal",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 4, 3, 1, 0, 1, 2), r"^in_channels: expected a multiple of groups=2, got 3; change"),
        ((4, 3, 3, 1, 0, 1, 2), r"^out_channels: expected a multiple of groups=2, got 3; change"),
        ((4, 4, 3, 1, 0, 1, 0), r"^groups: expected a positive integer, got 0; pass"),
        ((4, 4, 3, 1, 0, 1, -1), r"^groups: expected a positive integer, got -1; pass"),
        ((4, 4, 3, 1, "full"), r"^padding: expected integers, 'same' or 'valid', got 'full'; pass"),
        ((4, 4, 3, 2, "same"), r"^padding: 'same' expected stride 1, got stride \(2, 2\); pass"),
        ((4, 4, 3, 1, 0, 1, 1, True, "mirror"), r"^padding_mode: .*circular, got 'mirror'; pass"),
    ],
)
def test_refused_as_conv2d_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError):
        nn.Conv2d(*arguments)
    with pytest.raises(ValueError, match=message):
        HyperConv2d(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kernel_size": 0}, ValueError, r"^kernel_size: .*at least 1, got 0; pass"),
        ({"kernel_size": (3, 3, 3)}, ValueError, r"^kernel_size: .*2 of them.*got \(3, 3, 3\); pass"),
        ({"kernel_size": 3.0}, TypeError, r"^kernel_size: expected an integer.*got 3\.0; pass"),
        ({"stride": 0}, ValueError, r"^stride: .*at least 1, got 0; pass"),
        ({"dilation": (1, 0)}, ValueError, r"^dilation: .*got \(1, 0\); pass"),
        ({"padding": -1}, ValueError, r"^padding: .*at least 0, got -1; pass"),
        ({"weight_norm": "layer"}, ValueError, r"^weight_norm: expected None or 'batch', got 'layer'; "),
        ({"backend": "cudnn"}, ValueError, r"^backend: expected one of auto.*got 'cudnn'; pass"),
        ({"activation": "swish"}, ValueError, r"^activation: expected one of .*got 'swish'; pass"),
        ({"coordinates": "polar"}, ValueError, r"^coordinates: expected one of .*got 'polar'; pass"),
        ({"num_features": 0}, ValueError, r"^hidden_features and num_features: .*got .* 0; pass"),
    ],
    ids=str,
)
def test_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HyperConv2d(4, 4, **{"kernel_size": 3} | options)


def test_initial_bias_is_that_of_conv2d() -> None:
    bias = HyperConv2d(16, 4000, 3, groups=4).bias.detach()
    bound = 1 / math.sqrt(4 * 9)
    assert bias.abs().max().item() <= bound
    assert bias.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


@with_and_without_bias
def test_shapes_and_parameter_count(weight_bias: bool) -> None:
    counts = set()
    for size in ((1, 1), (3, 5), (31, 31)):
        conv = HyperConv2d(6, 4, size, groups=2, num_features=5, weight_bias=weight_bias)
        rank = 5 + weight_bias
        assert conv.coefficients.shape == (4, 3, rank)
        assert conv.basis().shape == (rank, *size)
        assert conv.weight.shape == (4, 3, *size)
        assert conv.taps.shape == (math.prod(size), 2)
        counts.add(sum(p.numel() for p in conv.parameters()))
    mlp = (2 + 1) * 16 + (16 + 1) * 16 + (16 + 1) * 5
    assert counts == {mlp + 4 * 3 * (5 + weight_bias) + 4}


@pytest.mark.parametrize("weight_norm", [None, "batch"])
def test_state(weight_norm: str | None, device) -> None:
    """Exact keys; the same layer after a state_dict, a deep copy, pickle and torch.save."""

    def make() -> HyperConv2d:
        conv = HyperConv2d(4, 6, (3, 4), weight_norm=weight_norm, coordinates="unit", device=device)
        conv(torch.randn(1, 4, 9, 9, device=device))
        return conv

    conv = make()
    keys = {"coefficients", "bias", "mixing.weight", "mixing.bias"}
    keys |= {f"hypernet.layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")}
    if weight_norm:
        keys |= {"weight_norm.weight", "weight_norm.bias"}
    assert set(conv.state_dict()) == keys

    loaded = make()
    loaded.load_state_dict(conv.state_dict())
    file = io.BytesIO()
    torch.save(conv, file)
    file.seek(0)
    others = [
        copy.deepcopy(conv),
        pickle.loads(pickle.dumps(conv)),
        torch.load(file, weights_only=False),
    ]
    input = torch.randn(1, 4, 9, 9, device=device)
    expected = conv.eval()(input)
    for other in (loaded, *others):
        assert torch.equal(other.eval()(input), expected)
        assert torch.equal(other.taps, conv.taps)


def test_taps_are_exact_in_every_dtype(device) -> None:
    """Unit coordinates such as 1/3 would not survive a cast through half precision."""
    conv = HyperConv2d(4, 6, (7, 4), coordinates="unit", device=device)
    for dtype in (torch.float16, torch.float64, torch.bfloat16, torch.float32):
        conv.to(dtype)
        assert conv.coefficients.dtype == dtype
        wide = torch.promote_types(dtype, torch.float32)
        assert torch.equal(conv.taps, tap_coordinates((7, 4), "unit", device, wide))
        assert conv.taps.dtype == wide
        assert conv(torch.randn(1, 4, 9, 9, device=device).to(dtype)).dtype == dtype


@pytest.mark.parametrize("weight_norm", [None, "batch"])
def test_meta_device(weight_norm: str | None, device) -> None:
    conv = HyperConv2d(16, 16, 5, weight_norm=weight_norm, device="meta")
    assert all(t.is_meta for t in (*conv.parameters(), *conv.buffers()))
    conv.to_empty(device=device)
    conv.reset_parameters()
    torch.testing.assert_close(conv.taps, tap_coordinates((5, 5), "unit", device=device), rtol=0, atol=0)
    twin = HyperConv2d(16, 16, 5, weight_norm=weight_norm, device=device)
    assert conv.weight.std().item() == pytest.approx(twin.weight.std().item(), rel=0.1)
    assert torch.equal(conv.mixing.bias[-1], twin.mixing.bias[-1])


def test_repr_shows_what_is_not_default() -> None:
    assert HyperConv2d(4, 6, 3).extra_repr() == "4, 6, kernel_size=(3, 3)"
    conv = HyperConv2d(
        4, 6, (3, 5), 2, 1, 3, 2, False, "circular", weight_bias=False, coordinates="centered",
        backend="composite", weight_norm="batch", activation="gelu",
    )  # fmt: skip
    text = repr(conv)
    assert text.startswith("HyperConv2d(\n  4, 6, kernel_size=(3, 5), ")
    for part in (
        "stride=(2, 2)", "padding=(1, 1)", "dilation=(3, 3)", "groups=2", "padding_mode='circular'",
        "bias=False", "weight_bias=False", "coordinates='centered'", "backend='composite'",
        "activation=gelu", "TapBatchNorm((6, 2)",
    ):  # fmt: skip
        assert part in text


@with_and_without_bias
def test_weight_is_differentiable(weight_bias: bool, device) -> None:
    conv = HyperConv2d(
        4, 6, (3, 4), groups=2, weight_bias=weight_bias, device=device, dtype=torch.float64
    )
    basis = mixed(conv)
    expected = torch.einsum("oir,rk->oik", conv.coefficients, basis).view(6, 2, 3, 4)
    torch.testing.assert_close(conv.weight, expected)
    leaves = [conv.coefficients, *conv.hypernet.parameters()]
    cotangent = torch.randn_like(expected)
    gradients = [torch.autograd.grad(w, leaves, cotangent) for w in (conv.weight, expected)]
    torch.testing.assert_close(*gradients)
    assert all(g.any() for g in gradients[0])


@pytest.mark.parametrize("backend", ["reference", "composite"])
@pytest.mark.parametrize(
    "make", [lambda: Fourier(4), Siren, nn.Sequential], ids=["fourier", "siren", "identity"]
)
@with_and_without_bias
def test_any_module_as_hypernet(make, backend: str, weight_bias: bool, device) -> None:
    hypernet = make().to(device)
    conv = HyperConv2d(4, 6, (3, 5), padding=1, weight_bias=weight_bias, backend=backend,
                       hypernet=hypernet, device=device)  # fmt: skip
    assert conv.hypernet is hypernet
    conv.double()
    assert conv.coefficients.shape == (6, 4, hypernet(conv.taps).shape[1] + weight_bias)
    weight = torch.einsum("oir,rk->oik", conv.coefficients, mixed(conv)).view(6, 4, 3, 5)
    input = torch.randn(2, 4, 7, 8, device=device, dtype=torch.float64)
    outputs = conv(input), nn.functional.conv2d(input, weight, conv.bias, padding=1)
    torch.testing.assert_close(*outputs)
    cotangent = torch.randn_like(outputs[0])
    torch.testing.assert_close(
        *(torch.autograd.grad(y, list(conv.parameters()), cotangent) for y in outputs)
    )


@pytest.mark.parametrize("make", [lambda: Fourier(4), Siren], ids=["fourier", "siren"])
def test_hypernet_in_low_precision(make, device) -> None:
    """Whether its numbers are parameters or buffers."""
    conv = HyperConv2d(4, 6, 3, hypernet=make().to(device), device=device).bfloat16()
    assert conv(torch.randn(1, 4, 5, 5, device=device).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda p: p.T, r"\[2, 9\]"),
        (lambda p: p[:, 0], r"\[9\]"),
        (lambda p: p[:-1], r"\[8, 2\]"),
        (lambda p: (p, p), "tuple"),
    ],
)
def test_hypernet_of_the_wrong_shape(function, got: str) -> None:
    class Wrong(nn.Module):
        def forward(self, coordinates: Tensor) -> Any:
            return function(coordinates)

    message = (
        rf"^hypernet: expected .*coordinates \[9, 2\] to features \[9, N\], got {got}; return one row"
    )
    with pytest.raises(ValueError, match=message):
        HyperConv2d(2, 2, 3, hypernet=Wrong())


class Published(nn.Module):
    """The published variant as it is written there: W is the BatchNorm2d of an image of taps."""

    def __init__(self, conv: HyperConv2d) -> None:
        super().__init__()
        self.conv = copy.deepcopy(conv)
        out_channels, group_channels, _ = conv.coefficients.shape
        factory = {"device": conv.taps.device, "dtype": torch.float64}
        self.norm = nn.BatchNorm2d(out_channels * group_channels, **factory)
        with torch.no_grad():
            self.norm.weight.copy_(conv.weight_norm.weight.flatten())
            self.norm.bias.copy_(conv.weight_norm.bias.flatten())

    def parameters_in_order(self) -> list[Tensor]:
        conv, norm = self.conv, self.norm
        return [conv.coefficients, norm.weight, norm.bias, conv.bias, *conv.hypernet.parameters()]

    def forward(self, input: Tensor) -> Tensor:
        conv = self.conv
        if conv.mixing is None:
            features = conv.hypernet(conv.taps)
            ones = [torch.ones_like(features[:, :1])] if conv.weight_bias else []
            basis = torch.cat([features, *ones], 1).T
        else:
            basis = mixed(conv)
        out_channels, group_channels, _ = conv.coefficients.shape
        image = (conv.coefficients @ basis).view(1, -1, *conv.kernel_size)
        weight = self.norm(image).view(out_channels, group_channels, *conv.kernel_size)
        return nn.functional.conv2d(
            input, weight, conv.bias, conv.stride, conv.padding, groups=conv.groups
        )


@pytest.mark.parametrize("backend", ["reference", "composite"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@with_and_without_bias
def test_weight_norm_is_a_batch_norm_of_the_taps(
    weight_bias: bool, parametrization: str, groups: int, backend: str, device
) -> None:
    """That of training, in evaluation too."""
    conv = HyperConv2d(
        4, 6, (3, 4), 2, 1, groups=groups, weight_bias=weight_bias, weight_norm="batch", backend=backend,
        parametrization=parametrization, device=device, dtype=torch.float64,
    )  # fmt: skip
    norm = conv.weight_norm
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    published = Published(conv)
    ours = [conv.coefficients, norm.weight, norm.bias, conv.bias, *conv.hypernet.parameters()]
    theirs = published.parameters_in_order()
    for step in range(4):
        input = torch.randn(2, 4, 8, 9, device=device, dtype=torch.float64)
        outputs = conv.train(step % 2 == 0)(input), published(input)
        torch.testing.assert_close(*outputs)
        cotangent = torch.randn_like(outputs[0])
        for output, parameters in zip(outputs, (ours, theirs), strict=True):
            gradients = torch.autograd.grad(output, parameters, cotangent)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad.flatten(), b.grad.flatten())
        with torch.no_grad():
            for parameter in (*ours, *theirs):
                parameter.sub_(parameter.grad, alpha=0.01)
    torch.testing.assert_close(
        nn.functional.conv2d(input, conv.weight, conv.bias, 2, 1, groups=groups), conv(input)
    )
    # What that keeps for evaluation is taken over from its state_dict, to the same kernel.
    statistics = {f"weight_norm.{name}": value for name, value in published.norm.state_dict().items()}
    kept = {name: value for name, value in statistics.items() if "running" in name or "num" in name}
    loaded = copy.deepcopy(conv)
    loaded.load_state_dict(conv.state_dict() | kept)
    assert set(loaded.state_dict()) == set(conv.state_dict())
    torch.testing.assert_close(loaded(input), published.eval()(input))
    assert not torch.allclose(loaded(input), conv(input))


def test_averaged_weights_need_no_update_of_the_norm(device) -> None:
    """`update_bn` has nothing to do: evaluation after averaging is what training would be."""
    conv = HyperConv2d(4, 6, 3, weight_norm="batch", device=device)
    averaged = torch.optim.swa_utils.AveragedModel(conv)
    for _ in range(3):
        with torch.no_grad():
            for parameter in conv.parameters():
                parameter.mul_(1.5)
        averaged.update_parameters(conv)
    input = torch.randn(2, 4, 5, 5, device=device)
    evaluated = averaged.eval()(input)
    torch.testing.assert_close(averaged.train()(input), evaluated)
    torch.optim.swa_utils.update_bn([input], averaged)
    torch.testing.assert_close(averaged.eval()(input), evaluated)


@pytest.mark.parametrize("training", [True, False])
def test_weight_norm_of_one_tap(training: bool, device) -> None:
    conv = HyperConv2d(4, 6, 1, weight_norm="batch", device=device).train(training)
    message = r"^weight_norm: .*expected more than one.*got kernel_size 1; use weight_norm=None$"
    with pytest.raises(ValueError, match=message):
        conv(torch.randn(1, 4, 5, 5, device=device))


def test_weight_norm_of_a_constant_kernel(device) -> None:
    """W = 0 up to rounding, by coefficients that cancel: its variance may not come out negative."""

    class Dependent(nn.Module):
        def forward(self, coordinates: Tensor) -> Tensor:
            f = 100 * coordinates.prod(1, keepdim=True).cos() + coordinates[:, :1]
            return torch.cat([f, f / 3, f * 0.7], dim=1)

    conv = HyperConv2d(
        16, 64, 7, weight_norm="batch", weight_bias=False, hypernet=Dependent(), device=device
    )
    with torch.no_grad():
        a = torch.randn_like(conv.coefficients[..., 0])
        b = torch.randn_like(a)
        conv.coefficients.copy_(torch.stack([-(a / 3 + 0.7 * b), a, b], dim=-1))
    assert conv.weight.isfinite().all()


def test_weight_norm_under_autocast(device) -> None:
    """Statistics are computed as precisely as without it, as those of nn.BatchNorm2d are."""
    conv = HyperConv2d(4, 6, 7, weight_norm="batch", device=device)
    twin = copy.deepcopy(conv)
    with torch.autocast(device.type, torch.bfloat16):
        assert twin(torch.randn(1, 4, 9, 9, device=device)).dtype == torch.bfloat16
        kernel = twin.kernel()
    for actual, expected in zip(kernel, conv.kernel(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", *QUICK])
@pytest.mark.parametrize("weight_norm", [None, "batch"])
def test_training_reduces_the_loss(weight_norm: str | None, backend: str, device) -> None:
    """Learning a Gaussian blur; Triton's interpreter would take minutes."""
    axis = torch.arange(-2.0, 3.0, device=device)
    blur = torch.exp(-(axis[:, None] ** 2 + axis**2) / 3)[None, None] / 9
    conv = HyperConv2d(1, 1, 5, padding=2, weight_norm=weight_norm, backend=backend, device=device)
    optimizer = torch.optim.Adam(conv.parameters(), lr=0.02)
    input = torch.randn(4, 1, 12, 12, device=device)
    target = nn.functional.conv2d(input, blur, padding=2)
    losses = []
    for _ in range(60):
        loss = (conv(input) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_an_algorithm_that_is_named_is_used_or_refused() -> None:
    layer = HyperConv2d(32, 32, 5, padding=2, algorithm="fft")
    assert "algorithm='fft'" in repr(layer)
    assert "algorithm" not in repr(HyperConv2d(32, 32, 5))
    input = torch.randn(1, 32, 8, 8)
    if not cpu_library.reason():
        assert "cpu/fft" in explain(layer, input) and "cpu/basis" not in explain(layer, input)
        exact = copy.deepcopy(layer)
        exact.algorithm = "basis"
        assert "cpu/basis" in explain(exact, input) and "cpu/fft" not in explain(exact, input)
        assert relative_error(layer(input), exact(input)) < 1e-5
        assert not torch.equal(layer(input), exact(input))
    layer.stride = 2
    with pytest.raises(PlanError, match="algorithm='fft'"):
        layer(input)
    layer.backend = "reference"
    with pytest.raises(PlanError, match="is not one of backend='reference'"):
        layer(input)
    with pytest.raises(ValueError, match=r"algorithm: expected one of auto, .*, got 'winograd'"):
        layer.algorithm = "winograd"
    with pytest.raises(ValueError, match="algorithm: expected one of"):
        HyperConv2d(4, 4, 3, algorithm="winograd")


def test_a_layer_from_before_algorithms_were_named() -> None:
    layer = HyperConv2d(4, 4, 3)
    del layer.__dict__["algorithm"]
    assert layer.algorithm == "auto"
    assert layer(torch.randn(1, 4, 5, 5)).shape == (1, 4, 3, 3)
