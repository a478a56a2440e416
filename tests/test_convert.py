"""A model's convolutions become hyper-convolutions, and nothing else about it changes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperconv_ext import BasisTable, HyperConv2d, convert, materialize
from hyperconv_ext.conversion.enlarge import enlarged
from hyperconv_ext.conversion.padding import PaddedHyperConv2d, PadsInput, pad_input
from hyperconv_ext.conversion.source import Source, source_of
from hyperconv_ext.fitting import Kernels
from hyperconv_ext.modules import HyperConvNd

from .converting import (
    DIMS,
    CausalConv1d,
    FixedPad,
    OtherConstructor,
    SamePad,
    Shared,
    conv_class,
    quietly,
    reason,
)
from .test_fitting import best_error, smooth


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", DIMS)
def test_settings_are_kept(dims: int, transposed: bool) -> None:
    more: dict[str, Any] = {"output_padding": 1} if transposed else {"padding_mode": "circular"}
    conv = conv_class(dims, transposed)(
        16, 24, 9 - 2 * dims, stride=2, padding=3, dilation=2, groups=2, dtype=torch.float64, **more
    )
    model = nn.Sequential(nn.Identity(), conv).eval()
    name, bias, x = (
        type(conv).__name__,
        conv.bias,
        torch.randn(2, 16, *(15,) * dims, dtype=torch.float64),
    )
    size = model(x).shape
    row = quietly(model).converted[0]
    layer: Any = model[1]
    assert row.name == "1" and row.rank == 5 and row.before.startswith(name)
    assert type(layer).__name__ == f"HyperConv{'Transpose' * transposed}{dims}d"
    assert not layer.training and layer.bias is bias and layer.coefficients.dtype == torch.float64
    assert layer.groups == 2 and layer.dilation == (2,) * dims and layer.stride == (2,) * dims
    assert model(x).shape == size
    assert row.parameters_after == sum(p.numel() for p in layer.parameters()) < row.parameters_before


def test_memory_format_and_requires_grad_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3)).to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)  # type: ignore[union-attr]
    quietly(model)
    assert model(torch.randn(2, 8, 9, 9)).is_contiguous(memory_format=torch.channels_last)
    assert not any(p.requires_grad for name, p in model[0].named_parameters() if name != "bias")
    assert model[0].bias.requires_grad and not model[1].bias.requires_grad  # type: ignore[union-attr]
    assert all(p.requires_grad for name, p in model[1].named_parameters() if name != "bias")


def test_by_default_nothing_grows() -> None:
    model = nn.Sequential(
        nn.Conv2d(32, 32, 1),  # no kernel
        nn.Conv2d(32, 32, 2),  # K < R
        nn.Conv2d(8, 8, 3, groups=8),  # the MLP is more than it saves
        nn.Conv2d(2, 2, 3),
        nn.Conv2d(32, 32, 3),
    )
    report = quietly(model)
    assert [layer.reason.split(",")[0] for layer in report.layers] == [
        "a 1x1 kernel has one tap",
        "a kernel of 2x2 has no more taps than the rank",
        "its depthwise 3x3 kernel has 80 parameters",
        "its 3x3 kernel has 38 parameters",
        "",
    ]
    assert [isinstance(layer, HyperConvNd) for layer in model] == [False] * 4 + [True]
    assert report.parameters_after < report.parameters_before
    assert "rank, 9" in reason(nn.Conv2d(64, 64, 3), rank=9)
    assert not quietly(nn.Conv2d(64, 64, 3), rank=8).left


def test_force_and_filter() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3), nn.Linear(3, 3))
    asked = []

    def chosen(name: str, module: nn.Module) -> bool:
        asked.append((name, type(module)))
        return name == "0"

    report = quietly(model, filter=chosen, force=True)
    assert asked == [("0", nn.Conv2d), ("1", nn.Conv2d)]
    assert [layer.reason for layer in report.layers] == ["", "not chosen by the filter"]
    assert report.converted[0].parameters_after > report.converted[0].parameters_before


def test_options_reach_the_layers() -> None:
    model = nn.Conv2d(16, 16, 5)
    quietly(model, rank=3, activation="tanh", hidden_features=(7,), backend="reference")
    layer: Any = model
    assert layer.coefficients.shape[2] == 3 and layer.hypernet.activation == "tanh"
    assert layer.hypernet.widths == (2, 7, 2) and layer.backend == "reference"


def test_a_hypernet_of_each_layers_own() -> None:
    hypernet = nn.Linear(2, 3)
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 5))
    quietly(model, hypernet=hypernet)
    networks: list[Any] = [layer.hypernet for layer in model]
    assert networks[0] is not networks[1] and hypernet not in networks
    assert torch.equal(networks[0].weight, hypernet.weight)
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 5))
    quietly(model, hypernet=lambda name, conv: nn.Linear(2, 2 + int(name)))
    assert [layer.coefficients.shape[2] for layer in model] == [3, 4]  # type: ignore[union-attr]


def test_twice_is_once() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(4, 4, 1))
    quietly(
        model,
        hypernet=lambda name, conv: nn.Sequential(
            nn.Unflatten(1, (2, 1)), nn.Conv1d(2, 4, 1), nn.Flatten()
        ),
    )
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = quietly(model, force=True, filter=lambda name, _: name != "1")
    assert [layer.name for layer in report.layers] == ["0", "1"]  # and not what the hyper-network has
    assert report.layers[0].reason == "is a hyper-convolution already"
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_model_may_be_a_convolution() -> None:
    conv = nn.Conv2d(16, 16, 3)
    report = quietly(conv)
    assert report.model is conv and type(conv) is HyperConv2d
    assert "(the model)" in str(report)


def test_a_copy() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3))
    report = quietly(model, inplace=False)
    assert type(model[0]) is nn.Conv2d and type(report.model[0]) is HyperConv2d  # type: ignore[index]
    assert report.model[0].bias is not model[0].bias  # type: ignore[index]


def test_shared_modules_stay_shared_wherever_they_are_held() -> None:
    model = Shared()
    report = quietly(model)
    assert [(layer.name, layer.aliases) for layer in report.layers] == [
        ("first", ("second", "parts.0")),
        ("parts.1", ("named.inner.0",)),
    ]
    assert model.first is model.second is model.parts[0] is model.hidden  # type: ignore[comparison-overlap]
    assert all(isinstance(m, HyperConv2d) for m in (model.first, model.plain[0], model.plain[1]["key"]))  # type: ignore[index]
    model(torch.randn(1, 16, 5, 5)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_layer_knows_itself() -> None:
    conv = nn.Conv2d(16, 16, 3)
    quietly(conv)
    layer: Any = conv
    before = layer.coefficients.clone()
    for module in layer.modules():  # the mixing draws its layer anew
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not torch.equal(before, layer.coefficients)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    x = torch.randn(1, 16, 5, 5)
    assert torch.equal(twin(x), layer(x))


def test_hooks_and_attributes_are_kept() -> None:
    conv, calls = nn.Conv2d(8, 8, 3), []
    conv.lr_scale = 0.5  # type: ignore[assignment]
    handles = [
        conv.register_forward_pre_hook(lambda m, args, kwargs: calls.append("pre"), with_kwargs=True),
        conv.register_forward_hook(lambda m, args, output: output * 0, always_call=True),
        conv.register_full_backward_hook(lambda m, gi, go: calls.append("backward")),
        conv.register_full_backward_pre_hook(lambda m, go: calls.append("backward pre")),
    ]
    quietly(conv)
    assert conv.lr_scale == 0.5
    x = torch.randn(1, 8, 5, 5, requires_grad=True)
    y = conv(x)
    y.sum().backward()
    assert not y.any() and calls == ["pre", "backward pre", "backward"]
    for handle in handles:
        handle.remove()
    assert conv(x).any() and len(calls) == 3


def test_a_compiled_layer_runs_what_it_has_become() -> None:
    conv = nn.Conv2d(8, 8, 3)
    conv.compile(backend="eager")
    x = torch.randn(1, 8, 5, 5)
    conv(x)
    quietly(conv)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias))


def test_an_optimizer_made_before_goes_on_with_the_bias() -> None:
    conv = nn.Conv2d(8, 8, 3)
    optimizer = torch.optim.SGD(conv.parameters(), lr=1.0)
    quietly(conv)
    before = conv.bias.detach().clone()  # type: ignore[union-attr]
    conv(torch.randn(1, 8, 5, 5)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, conv.bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [3, 4, (5, 2)])
def test_tensorflows_same_padding_is_kept(stride: int, kernel: Any) -> None:
    conv = SamePad(16, 16, kernel, stride=stride, dilation=(1, 2))
    quietly(conv)
    layer: Any = conv
    assert isinstance(layer, PadsInput) == (stride > 1)
    for size in ((9, 10), (10, 9), (12, 11)):
        x = torch.randn(1, 16, *size)
        dense = SamePad(16, 16, kernel, stride=stride, dilation=(1, 2))
        dense.load_state_dict({"weight": layer.weight, "bias": layer.bias})
        torch.testing.assert_close(layer(x), dense(x))


def test_constant_padding_is_kept() -> None:
    causal: Any = CausalConv1d(16, 16, 9, dilation=2)
    x, twin = torch.randn(1, 16, 30), CausalConv1d(16, 16, 9, dilation=2)
    quietly(causal)
    twin.load_state_dict({"weight": causal.weight, "bias": causal.bias})
    torch.testing.assert_close(causal(x), twin(x))
    assert causal.input_padding == [16, 0] and "input_padding=[16, 0]" in repr(causal)
    fixed: Any = FixedPad(16, 16, 3)
    shape = fixed(torch.randn(1, 16, 7, 7)).shape
    quietly(fixed)
    assert type(fixed) is HyperConv2d and fixed.padding == (1, 2)
    assert fixed(torch.randn(1, 16, 7, 7)).shape == shape


def test_a_subclass_with_another_constructor_is_a_convolution() -> None:
    conv = OtherConstructor(16)
    quietly(conv)
    assert type(conv) is HyperConv2d


def test_padded_layers_are_copied_saved_compiled_and_traced() -> None:
    layer: Any = SamePad(16, 16, 3, stride=2)
    quietly(layer)
    x = torch.randn(1, 16, 8, 8)
    expected = layer(x)
    assert type(layer) is PaddedHyperConv2d
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(layer),
        torch.load(file, weights_only=False),
        torch.compile(layer, backend="eager", fullgraph=True),
        torch.export.export(layer, (x,)).module(),
        torch.fx.symbolic_trace(nn.Sequential(layer)),
    ):
        torch.testing.assert_close(twin(x), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", DIMS)
def test_larger_kernels_with_the_old_one_in_the_middle(dims: int, transposed: bool) -> None:
    more: dict[str, Any] = {"output_padding": 1} if transposed else {"padding_mode": "reflect"}
    settings: dict[str, Any] = {"stride": 2, "padding": 2, "dilation": 2, **more}
    conv = conv_class(dims, transposed)(2, 3, 3, **settings)
    source = enlarged(Source(conv), 5).conv
    assert source.kernel_size == (5,) * dims and source.padding == (4,) * dims
    x = torch.randn(2, 2, *(11,) * dims)
    torch.testing.assert_close(source(x), conv(x))


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("old", "new"), [(3, 7), (4, 6), ((3, 1), (5, 5)), ((2, 9), (4, 5))])
def test_larger_kernels_by_the_modes_of_padding(padding: str, old: Any, new: Any) -> None:
    conv = nn.Conv2d(2, 3, old, padding=padding, dilation=(1, 2))
    source = enlarged(Source(conv), new).conv
    assert source.kernel_size == tuple(map(max, conv.kernel_size, source.kernel_size))
    x = torch.randn(2, 2, 23, 23)
    torch.testing.assert_close(source(x), conv(x))


@pytest.mark.parametrize(
    "make", [lambda: SamePad(2, 2, 3, stride=2), lambda: SamePad(2, 2, 3, stride=2, dilation=2)]
)
def test_larger_kernels_of_padded_layers(make: Callable[[], Any]) -> None:
    conv = make()
    source = enlarged(source_of(conv), 7)
    assert source.padded and source.input_padding is None
    for size in (9, 10):
        x = torch.randn(1, 2, size, size)
        pads = [source.conv.kernel_size, source.conv.stride, source.conv.dilation]
        torch.testing.assert_close(source.conv(pad_input(x, None, *map(list, pads))), conv(x))


def test_causal_layers_stay_causal() -> None:
    assert "pads one side more than the other" in reason(CausalConv1d(16, 16, 9), kernel_size=11)


def test_kernel_size_of_a_model() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 4), nn.Conv2d(16, 16, 1))
    model.append(nn.Conv2d(16, 16, 9))
    report = quietly(model, kernel_size=7, rank=5)
    assert [layer.reason.split(";")[0] for layer in report.layers] == [
        "",
        "its kernel of 4x4 cannot become 7x7 with the output sizes as they are",
        "its 1x1 kernel has 272 parameters, and would have 1.68k at 7x7",
        "",
    ]
    assert model[0].kernel_size == (7, 7) and model[0].padding == (3, 3)
    assert model[3].kernel_size == (9, 9) and model[3].padding == (0, 0)
    assert "HyperConv2d(7x7, R=5)" in str(report)


def test_kernel_size_by_a_function() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv1d(16, 16, 7))
    sizes = {"0": (5, 3), "1": None, "2": [9]}
    quietly(model, kernel_size=lambda name, conv: sizes[name])
    assert [layer.kernel_size for layer in model] == [(5, 3), (3, 3), (9,)]
    assert [layer.padding for layer in model] == [(1, 0), (0, 0), (1,)]


def test_a_strided_layer_without_overlap_cannot_follow() -> None:
    assert "smaller than its stride" in reason(SamePad(16, 16, 2, stride=4), kernel_size=4)


def of_rank(weight: Tensor, rank: int) -> Tensor:
    """The nearest kernel of this rank over the taps."""
    left, values, right = torch.linalg.svd(weight.flatten(2).flatten(0, 1), full_matrices=False)
    return (left[:, :rank] * values[:rank] @ right[:rank]).view_as(weight)


def test_fit_keeps_the_function_and_reports_its_error() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 5, padding=2), nn.ReLU(), nn.ConvTranspose2d(16, 16, 3))
    with torch.no_grad():
        for conv in (model[0], model[2]):
            conv.weight.copy_(of_rank(conv.weight, 4))  # type: ignore[operator,union-attr]
    x = torch.randn(2, 8, 9, 9)
    expected, weights = model(x), [model[0].weight.detach(), model[2].weight.detach()]  # type: ignore[union-attr,operator]
    report = quietly(model, init="fit", rank=6)
    for row, layer, weight in zip(report.layers, (model[0], model[2]), weights, strict=True):
        error = (layer.weight - weight).norm() / weight.norm()  # type: ignore[operator]
        assert row.error == pytest.approx(float(error), abs=1e-5) and row.error < 0.3
        assert row.best_error == pytest.approx(0, abs=1e-5) and f"{row.error:.3f}" in str(report)
    assert (model(x) - expected).norm() < 0.4 * (expected - expected.mean()).norm()
    materialize(model)
    assert "fit_result" not in vars(model[0])


def test_kernels_are_decomposed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decomposed = []
    usual = Kernels.__init__

    def init(self: Kernels, weight: Tensor) -> None:
        decomposed.append(weight)
        usual(self, weight)

    monkeypatch.setattr(Kernels, "__init__", init)
    model = nn.Sequential(smooth(nn.Conv2d(12, 12, 5), 2.5))
    assert quietly(model, init="fit", max_error=0.3).converted
    assert len(decomposed) == 1


def test_each_layer_gets_the_smallest_rank_for_an_error() -> None:
    convs = [smooth(nn.Conv2d(12, 12, 5), sigma) for sigma in (1.0, 2.5)]
    possible = [next(r for r in range(26) if best_error(conv, r) <= 0.3) for conv in convs]
    others = [nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1), smooth(nn.Conv2d(2, 1, 5))]
    model = nn.Sequential(*convs, *others)
    torch.manual_seed(0)
    report = quietly(model, init="fit", max_error=0.3)
    for row, layer, least in zip(report.converted, convs, possible, strict=True):
        assert least <= row.rank == layer.rank <= least + 1 and f"R={row.rank})" in str(report)  # type: ignore[operator]
        assert row.error is not None and row.error <= 0.3
    assert possible[0] > possible[1] + 1
    assert [row.reason for row in report.left] == [
        "its 3x3 kernel has 2.32k parameters, and would have 2.5k, for an error of at most 0.3",
        "a 1x1 kernel has one tap, of which nothing can be saved",
        "its 5x5 kernel has 51 parameters, and would have 342, for an error of at most 0.3",
    ]


def test_an_error_that_is_not_reached_is_told() -> None:
    conv = nn.Conv2d(16, 16, 5)
    with torch.no_grad():
        conv.weight.copy_(of_rank(conv.weight, 4))
    few = BasisTable((5, 5), 2)
    text = reason(conv, init="fit", max_error=0.01, hypernet=few)
    assert text.startswith("its least error, 0.") and text.endswith(" at rank 3, is above 0.01")
    assert type(conv) is nn.Conv2d
    quietly(conv, init="fit", max_error=0.01, hypernet=BasisTable((5, 5), 4))
    assert conv.rank == 5  # of the function that was given, whatever others would need


def test_an_error_decides_where_it_is_forced_to() -> None:
    """With as many functions as taps, which saves nothing."""
    conv = nn.Conv2d(8, 8, 3)
    report = quietly(conv, init="fit", max_error=0.01, force=True)
    assert report.converted[0].rank == 9 and report.converted[0].error <= 0.01  # type: ignore[operator]


def test_match_keeps_the_size_of_the_kernels() -> None:
    conv = nn.Conv2d(32, 64, 3)
    with torch.no_grad():
        conv.weight.mul_(10)
    size = conv.weight.std()
    report = quietly(conv, kernel_size=7, rank=5)
    fresh = HyperConv2d(32, 64, 7, num_features=4).weight.std()
    usual = nn.Conv2d(32, 64, 3).weight.std()
    assert torch.isclose(conv.weight.std() / fresh, size / usual, rtol=0.2)
    assert report.layers[0].error is None


@pytest.mark.parametrize("init", ["match", "fit"])
def test_kernels_of_zeros_stay_zero(init: str) -> None:
    conv = nn.Conv2d(16, 16, 3)
    nn.init.zeros_(conv.weight)
    quietly(conv, init=init)
    assert not conv.weight.any()
    conv(torch.randn(1, 16, 5, 5)).sum().backward()
    assert conv.coefficients.grad.any()  # type: ignore[union-attr]


def test_fit_into_a_larger_kernel() -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1)
    old = conv.weight.detach()
    x = torch.randn(2, 16, 9, 9)
    expected = conv(x)
    table = lambda name, module: BasisTable((5, 5), 10)  # noqa: E731
    report = quietly(conv, init="fit", kernel_size=5, hypernet=table, weight_bias=False, force=True)
    assert report.layers[0].error < 1e-5  # type: ignore[operator]
    torch.testing.assert_close(conv.weight[..., 1:4, 1:4], old, rtol=0, atol=1e-5)
    torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-4)


def test_fit_needs_numbers() -> None:
    with pytest.raises(ValueError, match="layer '0': conv: expected a weight to fit to"):
        quietly(nn.Sequential(nn.Conv2d(16, 16, 3, device="meta")), init="fit")
    with pytest.raises(ValueError, match="layer '0': conv: expected a weight to fit to"):
        quietly(nn.Sequential(nn.Conv2d(16, 16, 3, device="meta")), init="fit", max_error=0.1)


def test_the_report() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=2, bias=False), nn.Dropout(), nn.ConvTranspose2d(16, 4, 6)
    )
    model.append(nn.Conv2d(4, 4, 1))
    report = quietly(model, rank=5)
    assert [layer.multiply_adds_before for layer in report.layers] == [1200, 2304, 16]
    assert [layer.multiply_adds_after for layer in report.layers] == [
        5 * (3 * 25 + 48),
        5 * (4 * 36 + 64),
        16,
    ]
    text = str(report)
    assert "2 of 3 convolutions converted; parameters of the model 3.53k -> " in text
    assert "left: 3: a 1x1 kernel" in text and "per position" in text
    assert report.count(torch.randn(2, 3, 11, 11)) is report
    assert model.training and not model[0]._forward_hooks
    assert [layer.positions for layer in report.layers] == [2 * 16, 2 * 16, 2 * 81]
    assert "multiply-adds of all convolutions 115k -> 55.6k" in str(report)
    assert "38.4k -> 19.7k" in str(report)
    numbers = report.to_dict()
    assert numbers["layers"][2]["reason"] == report.left[0].reason
    assert numbers["parameters_after"] == sum(p.numel() for p in model.parameters())
    assert "model" not in numbers


def test_a_report_of_nothing() -> None:
    report = quietly(nn.Linear(3, 3))
    assert str(report) == "0 of 0 convolutions converted; parameters of the model 12 -> 12"


def test_the_report_counts_every_call_and_restores_the_model() -> None:
    model = Shared()
    report = quietly(model, filter=lambda name, _: name == "first")
    model.first.eval()
    report.count(torch.randn(1, 16, 5, 5))
    assert [layer.positions for layer in report.layers] == [50, 50]
    assert model.training and not model.first.training
    with pytest.raises(RuntimeError):
        report.count(torch.randn(1, 7, 5, 5))
    assert model.training and not model.first._forward_hooks


def test_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    rich = pytest.importorskip("rich.console")
    report = quietly(nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(4, 4, 1)))
    console = rich.Console(width=200, file=io.StringIO())
    console.print(report)
    text = console.file.getvalue()
    assert "Conv2d(16, 16, 3x3)" in text and "left: 1: a 1x1 kernel" in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"init": "random"}, ValueError, "init: expected one of match, fit"),
        ({"inplace": 1}, TypeError, "inplace: expected a bool"),
        ({"widths": 3}, TypeError, "widths: expected a keyword of the layers"),
        ({"in_channels": 3}, TypeError, "in_channels: expected a keyword of the layers"),
        ({"rank": 0}, ValueError, "layer '1': rank: expected"),
        ({"rank": 3, "num_features": 2}, TypeError, "layer '1': num_features"),
        ({"max_error": 0.1}, TypeError, "max_error: expected it beside init='fit', got init='match'"),
        ({"max_error": 0.1, "rank": 3, "init": "fit"}, TypeError, "max_error: .* beside rank=3"),
        ({"max_error": -1.0, "init": "fit"}, ValueError, "max_error: expected a positive number"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "layer '1': kernel_size: expected an integer or 2"),
        ({"kernel_size": lambda name, conv: "7"}, TypeError, "layer '1': kernel_size"),
        ({"activation": "none"}, ValueError, "layer '1': activation"),
    ],
)
def test_wrong_arguments_change_nothing(options: Any, error: type[Exception], message: str) -> None:
    model = nn.Sequential(nn.Identity(), nn.Conv2d(16, 16, 5))
    with pytest.raises(error, match=message):
        quietly(model, **options)
    assert type(model[1]) is nn.Conv2d


def test_an_error_half_way_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 5), nn.Conv2d(16, 16, 5))
    given = model.state_dict()
    with pytest.raises(ValueError, match="layer '1': hypernet"):
        quietly(model, hypernet=lambda name, conv: nn.Linear(2, 3) if name == "0" else nn.Flatten(0))
    assert [type(layer) for layer in model] == [nn.Conv2d] * 2
    assert all(
        given[name] is tensor or torch.equal(given[name], tensor)
        for name, tensor in model.state_dict().items()
    )


def test_models_that_are_none_or_wrapped() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        quietly("resnet18")  # type: ignore[arg-type]

    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    with pytest.raises(ValueError, match="convert before it is wrapped"):
        quietly(Wrapped(nn.Conv2d(16, 16, 3)))


def test_under_inference_mode_and_other_default_devices() -> None:
    with torch.inference_mode():
        model = quietly(nn.Sequential(nn.Conv2d(16, 16, 3)), inplace=False).model
    model(torch.randn(1, 16, 5, 5)).sum().backward()
    conv = nn.Conv2d(16, 16, 3)
    with torch.device("meta"):
        quietly(conv)
    assert conv(torch.randn(1, 16, 5, 5)).device.type == "cpu"


def test_a_model_without_numbers() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(16, 16, 3))
    quietly(model)
    model.to_empty(device="cpu")
    model[0].reset_parameters()  # type: ignore[operator]
    assert model(torch.randn(1, 16, 5, 5)).isfinite().all()


def test_the_bar_is_shown_where_there_is_tqdm(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    convert(nn.Conv2d(16, 16, 3))
    assert "convert" in capsys.readouterr().err
    quietly(nn.Conv2d(16, 16, 3))
    assert capsys.readouterr().err == ""
