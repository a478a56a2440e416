"""Hyper-convolutions become convolutions again: the same outputs, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from hyperconv_ext import HyperConv1d, HyperConv2d, LazyHyperConv2d, convert, materialize
from hyperconv_ext.conversion.padding import PaddedConv1d, PaddedConv2d, PaddedHyperConv2d

from .converting import DIMS, CausalConv1d, SamePad, Shared, conv_class


def converted(model: nn.Module, **options: Any) -> Any:
    return convert(model, progress=False, force=True, **options).model


def assert_same(got: Tensor, expected: Tensor) -> None:
    """To the rounding of products whose terms come in another order."""
    scale = expected.abs().max()
    eps = torch.finfo(expected.dtype).eps
    assert (got - expected).abs().max() <= 32 * eps * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", DIMS)
def test_there_and_back(dims: int, transposed: bool, dtype: torch.dtype) -> None:
    more: dict[str, Any] = {"output_padding": 1} if transposed else {"padding_mode": "circular"}
    settings: dict[str, Any] = {"stride": 2, "padding": 2, "dilation": 2, "groups": 2} | more
    conv = conv_class(dims, transposed)(8, 12, 3, **settings, dtype=dtype)
    conv.weight.requires_grad_(False)
    model = converted(nn.Sequential(conv, nn.ReLU()).eval())
    x, bias = torch.randn(2, 8, *(11,) * dims, dtype=dtype), conv.bias
    expected = model(x)
    assert materialize(model) is model
    back = model[0]
    assert back is conv and type(back) is conv_class(dims, transposed) and not back.training
    assert type(back.weight) is nn.Parameter and not back.weight.requires_grad
    assert back.bias is bias and bias.requires_grad
    assert_same(model(x), expected)
    assert set(vars(back)) == set(vars(conv_class(dims, transposed)(1, 1, 1)))


@pytest.mark.parametrize("options", [{"weight_norm": "batch"}, {"parametrization": "published"}])
def test_of_every_form(options: dict[str, Any]) -> None:
    model = converted(nn.Sequential(nn.Conv2d(4, 6, 5)), **options)
    x = torch.randn(2, 4, 9, 9)
    expected = model(x)
    assert_same(materialize(model)(x), expected)


def test_a_copy_and_the_root() -> None:
    layer = HyperConv2d(4, 6, 5)
    x = torch.randn(2, 4, 9, 9)
    conv = materialize(layer, inplace=False)
    assert type(conv) is nn.Conv2d and type(layer) is HyperConv2d
    assert_same(conv(x), layer(x))
    assert materialize(layer) is layer and type(layer) is nn.Conv2d  # type: ignore[comparison-overlap]


def test_shared_modules_stay_shared() -> None:
    model = Shared()
    converted(model)
    x = torch.randn(1, 16, 5, 5)
    expected = model(x)
    materialize(model)
    assert type(model.first) is nn.Conv2d and model.first is model.second is model.parts[0]
    assert_same(model(x), expected)
    assert len(list(model.parameters())) == 4


def test_hooks_and_attributes_are_kept() -> None:
    conv: Any = nn.Conv2d(4, 6, 5)
    converted(conv)
    conv.lr_scale = 0.5
    handle = conv.register_forward_hook(lambda m, args, output: output * 0)
    materialize(conv)
    x = torch.randn(2, 4, 9, 9)
    assert conv.lr_scale == 0.5 and not conv(x).any()
    handle.remove()
    assert conv(x).any()
    fresh = nn.Conv2d(4, 6, 5)
    assert conv.load_state_dict(fresh.state_dict()) and not conv._load_state_dict_post_hooks
    assert torch.equal(conv(x), fresh(x))


def test_there_and_back_again() -> None:
    model = nn.Sequential(SamePad(4, 6, 5, stride=2), CausalConv1d(4, 4, 3))
    converted(model)
    for _ in range(2):
        materialize(model)
        assert [type(layer) for layer in model] == [PaddedConv2d, PaddedConv1d]
        converted(model)
        assert type(model[0]) is PaddedHyperConv2d


@pytest.mark.parametrize("size", [8, 9])
def test_padded_layers_are_exported_scripted_and_traced(size: int) -> None:
    layer: Any = converted(SamePad(4, 6, 5, stride=2))
    x = torch.randn(2, 4, size, size + 1)
    expected = layer(x)
    materialize(layer)
    for twin in (
        layer,
        pickle.loads(pickle.dumps(layer)),
        torch.jit.script(layer),
        torch.export.export(layer, (x,)).module(),
        torch.fx.symbolic_trace(nn.Sequential(layer)),
        torch.compile(layer, backend="eager", fullgraph=True),
    ):
        assert_same(twin(x), expected)
    fixed = materialize(converted(CausalConv1d(4, 4, 3)))
    x = torch.randn(1, 4, 9)
    assert_same(torch.jit.script(fixed)(x), fixed(x))


def test_what_pytorch_offers_for_its_own_layers_works() -> None:
    model = converted(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).eval()
    x = torch.randn(2, 4, 9, 9)
    expected = materialize(model)(x)
    assert_same(torch.jit.script(model)(x), expected)
    fused = torch.ao.quantization.fuse_modules(model, ["0", "1", "2"])
    assert type(fused[0]).__name__ == "ConvReLU2d"
    assert_same(fused(x), expected)


def test_parametrized_coefficients_are_what_they_are() -> None:
    layer: Any = HyperConv2d(4, 6, 5)
    parametrizations.weight_norm(layer, "coefficients")
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        layer.parametrizations.coefficients.original0.mul_(3)
    expected = layer(x)
    materialize(layer)
    assert list(layer.state_dict()) == ["weight", "bias"] and type(layer) is nn.Conv2d
    assert_same(layer(x), expected)


def test_a_layer_with_a_forward_of_its_own_is_refused() -> None:
    class Doubled(HyperConv1d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Renamed(HyperConv1d):
        pass

    model = nn.Sequential(HyperConv1d(2, 2, 3), Doubled(2, 2, 3))
    with pytest.raises(TypeError, match="layer '1': expected the forward of HyperConv1d, got Doubled"):
        materialize(model)
    assert type(model[0]) is HyperConv1d
    assert type(materialize(Renamed(2, 2, 3))) is nn.Conv1d


def test_lazy_layers_are_called_first() -> None:
    model = nn.Sequential(LazyHyperConv2d(6, 3))
    assert "already" in convert(model, progress=False).left[0].reason
    with pytest.raises(ValueError, match="layer '0': expected parameters, got a lazy layer"):
        materialize(model)
    x = torch.randn(2, 4, 9, 9)
    expected = model(x)
    assert_same(materialize(model)(x), expected)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module"):
        materialize(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fuse_batch_norm: expected a bool"):
        materialize(nn.Identity(), fuse_batch_norm=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in evaluation mode"):
        materialize(nn.Identity(), fuse_batch_norm=True)


# ---- batch norms


def trained(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """With statistics and scales that are not those of the start, in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    nn.init.uniform_(tensor, 0.5, 2)
    return model.eval()


def folded(model: nn.Module, *inputs: Tensor) -> tuple[nn.Module, list[str]]:
    """The model materialized with batch norms fused, the same outputs, and which the warning names."""
    trained(converted(model))
    expected = model(*inputs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        materialize(model, fuse_batch_norm=True)
    assert_same(model(*inputs), expected)
    return model, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", DIMS)
def test_batch_norms_are_folded(dims: int, transposed: bool, bias: bool, affine: bool) -> None:
    conv = conv_class(dims, transposed)(4, 6, 3, groups=2, bias=bias)
    norm = getattr(nn, f"BatchNorm{dims}d")(6, affine=affine)
    model, warned = folded(nn.Sequential(conv, norm, nn.ReLU()), torch.randn(2, 4, *(5,) * dims))
    assert not warned and type(model[1]) is nn.Identity  # type: ignore[index]
    assert "running_mean" not in vars(model[1]) and not model[1].state_dict()  # type: ignore[index]
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True]


class Block(nn.Module):
    """The convolution's output goes through the norm, and where `tapped` elsewhere, too."""

    def __init__(self, tapped: bool = False, dynamic: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.tapped, self.dynamic, self.twice = tapped, dynamic, twice

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        if self.dynamic and x.sum() > 1e9:
            return x
        y = self.conv(x)
        z = F.relu(self.norm(y))
        if self.twice:
            z = self.norm(z)
        if scale is not None:
            z = z * scale
        return z + y if self.tapped else z + x


class Outer(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if x.sum() < 1e9 else x


@pytest.mark.parametrize("outer", [False, True])
def test_batch_norms_are_folded_inside_what_can_be_traced(outer: bool) -> None:
    model = Outer(Block()) if outer else nn.Sequential(Block(), Block())
    model, warned = folded(model, torch.randn(2, 4, 5, 5))
    assert not warned
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def hooked(of: str) -> nn.Module:
    block: Any = Block()
    getattr(block, of).register_forward_hook(lambda *args: None)
    return block


class Standardising(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def with_norm(norm: nn.Module) -> nn.Module:
    block: Any = Block()
    block.norm = norm
    return block


class ReadsWeight(Block):
    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        return super().forward(x, scale) + self.conv.bias.sum()  # type: ignore[union-attr]


class CalledTwice(Block):
    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        return self.norm(self.conv(x)) + F.relu(self.conv(x))


def shared_conv() -> nn.Module:
    """In two blocks, of which each alone could be folded."""
    model: Any = nn.Sequential(Outer(Block()), Outer(Block()))
    model[1].block.conv = model[0].block.conv
    return Outer(model)


def shared_norm() -> nn.Module:
    model: Any = nn.Sequential(Outer(Block()), Outer(Block()))
    model[1].block.norm = model[0].block.norm
    return Outer(model)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Block(tapped=True), "its output or its weight is used elsewhere, too"),
        (lambda: Block(dynamic=True), "torch.fx cannot trace the module that it is in"),
        (lambda: Block(twice=True), "its batch norm is used elsewhere, too"),
        (ReadsWeight, "its output or its weight is used elsewhere, too"),
        (CalledTwice, "its output or its weight is used elsewhere, too"),
        (lambda: hooked("conv"), "it has hooks, which would see other values"),
        (lambda: hooked("norm"), "its batch norm has hooks"),
        (lambda: with_norm(Standardising(4)), "Standardising does more than a batch norm"),
        (lambda: with_norm(nn.BatchNorm2d(4, track_running_stats=False)), "no statistics of its own"),
        (shared_conv, "it is shared"),
        (shared_norm, "its batch norm is shared"),
    ],
)
def test_batch_norms_that_stay_are_named(make: Any, why: str) -> None:
    model = make()
    counts = [type(module).__name__ for module in model.modules()].count("Identity")
    model, (warned,) = folded(model, torch.randn(2, 4, 5, 5))
    assert warned.startswith("batch norms that stay: ") and "conv: " in warned and why in warned
    assert [type(module).__name__ for module in model.modules()].count("Identity") == counts


def test_nothing_is_said_of_layers_without_a_batch_norm() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    model, warned = folded(model, torch.randn(2, 4, 9, 9))
    assert not warned and type(model[2]) is nn.BatchNorm2d  # type: ignore[index]


def test_a_norm_left_in_training_stays() -> None:
    model: Any = trained(converted(Block()))
    model.norm.train()
    with pytest.warns(UserWarning, match="no statistics of its own"):
        materialize(model, fuse_batch_norm=True)


def test_a_copy_is_folded_and_the_model_is_not() -> None:
    model: Any = trained(converted(Block()))
    twin = copy.deepcopy(model.state_dict())
    other: Any = materialize(model, inplace=False, fuse_batch_norm=True)
    assert type(other.norm) is nn.Identity and type(model.conv) is HyperConv2d
    assert all(torch.equal(tensor, twin[name]) for name, tensor in model.state_dict().items())


class Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


@pytest.mark.parametrize(
    "compute",
    [
        lambda layer: prune.l1_unstructured(layer, "coefficients", amount=0.5),
        lambda layer: prune.l1_unstructured(layer, "bias", amount=0.5),
        lambda layer: nn.utils.weight_norm(layer, "coefficients"),
        lambda layer: nn.utils.spectral_norm(layer, "coefficients"),
        lambda layer: parametrizations.weight_norm(layer, "coefficients"),
        lambda layer: parametrize.register_parametrization(layer, "bias", Doubled()),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_what_computes_a_parameter_is_in_the_weight(compute: Any) -> None:
    """And computes nothing any more; other hooks stay."""
    layer = HyperConv2d(4, 8, 5).eval()
    compute(layer)
    seen: list[Any] = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    input = torch.randn(2, 4, 9, 9)
    expected = layer(input).detach()
    materialize(layer)
    assert type(layer) is nn.Conv2d and list(layer.state_dict()) == ["weight", "bias"]
    assert_same(layer(input), expected)
    layer(input).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters()) and len(seen) == 3
