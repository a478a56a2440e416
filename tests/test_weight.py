"""W is for reading: every way to write to it, or past it, says so; every way to read it works."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from hyperconv_ext import HyperConv2d, HyperConvTranspose1d
from hyperconv_ext.modules import HyperConvNd, ReadOnlyWeightError

ONES = torch.ones(4, 3, 3, 3)


def _set_item(w: Tensor) -> None:
    w[0] = 1


def _add_in_place(w: Tensor) -> None:
    w += 1


def _power_in_place(w: Tensor) -> None:
    w **= 2


def _each(w: Tensor) -> None:
    for part in w:
        part.zero_()


def _without_recording(w: Tensor) -> None:
    with torch.no_grad():
        w.uniform_()


def _assign(name: str, value: object) -> Callable[[Tensor], None]:
    return lambda w: setattr(w, name, value)


WRITES: dict[str, Callable[[Tensor], object]] = {
    **{
        f"init.{name}": lambda w, name=name: getattr(nn.init, name)(w)
        for name in (
            *("kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_", "normal_"),
            *("uniform_", "zeros_", "ones_", "dirac_", "orthogonal_", "trunc_normal_"),
        )
    },
    "init, by keyword": lambda w: nn.init.constant_(tensor=w, val=1.0),
    "init of data": lambda w: nn.init.normal_(w.data, 0, 0.02),
    "data.normal_": lambda w: w.data.normal_(),
    "detach().mul_": lambda w: w.detach().mul_(2),
    "mul_": lambda w: w.mul_(2),
    "copy_": lambda w: w.copy_(ONES),
    "data.copy_": lambda w: w.data.copy_(ONES),
    "no_grad": _without_recording,
    "w[0] = 1": _set_item,
    "data[0] = 1": lambda w: _set_item(w.data),
    "w += 1": _add_in_place,
    "data += 1": lambda w: _add_in_place(w.data),
    "w **= 2": _power_in_place,
    "w[0].zero_": lambda w: w[0].zero_(),
    "each part": _each,
    "unbind": lambda w: w.unbind(0)[1].zero_(),
    "split": lambda w: w.data.split(2)[0].zero_(),
    "view": lambda w: w.view(-1)[3].fill_(1),
    "permute": lambda w: w.data.permute(1, 0, 2, 3).mul_(2),
    "as_strided": lambda w: w.data.as_strided((3,), (1,)).zero_(),
    "contiguous": lambda w: w.contiguous().zero_(),
    "out=": lambda w: torch.add(ONES, 1, out=w.data),
    "out= of a factory": lambda w: torch.randn(4, 3, 3, 3, out=w.detach()),
    "_foreach_mul_": lambda w: torch._foreach_mul_([w.data], 2.0),
    "second of _foreach_add_": lambda w: torch._foreach_add_([ONES.clone(), w.data], [ONES, ONES]),
    "relu_": torch.relu_,
    "relu(inplace)": lambda w: F.relu(w, inplace=True),
    "nn.ReLU(inplace)": nn.ReLU(inplace=True),
    "numpy": lambda w: np.copyto(w.detach().numpy(), 0),
    "vector_to_parameters": lambda w: nn.utils.vector_to_parameters(torch.zeros(108), [w]),
    "clip_grad_norm_": lambda w: nn.utils.clip_grad_norm_([w], 1.0),
    "data =": _assign("data", ONES),
    "grad": lambda w: w.grad,
    "grad =": _assign("grad", ONES),
    "requires_grad_": lambda w: w.requires_grad_(False),
    "requires_grad =": _assign("requires_grad", False),
    "register_hook": lambda w: w.register_hook(print),
    "retain_grad": lambda w: w.retain_grad(),
    "register_post_accumulate_grad_hook": lambda w: w.register_post_accumulate_grad_hook(print),
    "share_memory_": lambda w: w.share_memory_(),
}


@pytest.mark.parametrize("name", WRITES)
def test_writing_is_refused(name: str, device) -> None:
    layer = HyperConv2d(3, 4, 3)
    before = layer.weight.clone()
    error, message = ReadOnlyWeightError, r"^weight: expected to be read only.*; draw .*reset_parameters"
    if name == "numpy":
        error, message = ValueError, "read-only"
    with pytest.raises(error, match=message):
        WRITES[name](layer.weight)
    assert torch.equal(layer.weight, before)


REPLACEMENTS: dict[str, Callable[[nn.Module], object]] = {
    "parameter": lambda m: setattr(m, "weight", nn.Parameter(ONES)),
    "tensor": lambda m: setattr(m, "weight", ONES),
    "None": lambda m: setattr(m, "weight", None),
    "del": lambda m: delattr(m, "weight"),
    "register_parameter": lambda m: m.register_parameter("weight", nn.Parameter(ONES)),
    "register_buffer": lambda m: m.register_buffer("weight", ONES),
    "functional_call": lambda m: torch.func.functional_call(m, {"weight": ONES}, (ONES[:, :, :3],)),
}


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_replacing_is_refused(name: str) -> None:
    layer = HyperConv2d(3, 4, 3)
    with pytest.raises(AttributeError, match=r"^weight: expected to be read only.*reset_parameters"):
        REPLACEMENTS[name](layer)
    assert "weight" not in dict(layer.named_parameters())


FIXED = {
    "kernel_size": ((5, 5), "with_kernel_size"),
    "tap_spacing": ((2.0, 2.0), "with_kernel_size"),
    "in_channels": (6, "make a new layer"),
    "out_channels": (6, "make a new layer"),
    "weight_bias": (False, "make a new layer"),
    "transposed": (True, "make a new layer"),
    "dims": (3, "make a new layer"),
}


@pytest.mark.parametrize("name", FIXED)
def test_what_the_parameters_were_made_for_stays(name: str) -> None:
    value, remedy = FIXED[name]
    layer = HyperConv2d(3, 4, 3)
    before = getattr(layer, name)
    with pytest.raises(AttributeError, match=rf"^{name}: expected to stay .*{remedy}"):
        setattr(layer, name, value)
    assert getattr(layer, name) == before


@pytest.mark.parametrize(
    ("changes", "arguments"),
    [
        ({"stride": 2, "padding": [1, 2]}, {}),
        ({"dilation": (2, 1)}, {}),
        ({"padding": "same", "padding_mode": "reflect"}, {}),
        ({"stride": (1, 2)}, {"padding": 1, "padding_mode": "circular"}),
        ({"groups": 1}, {"groups": 1, "bias": False}),
    ],
)
def test_what_convnd_reads_at_every_step_takes_effect(changes: dict, arguments: dict, device) -> None:
    layer = HyperConv2d(4, 4, 3, **arguments, device=device)
    for name, value in changes.items():
        setattr(layer, name, value)
    twin = nn.Conv2d(4, 4, 3, **(arguments | changes), device=device)
    twin.weight = nn.Parameter(layer.weight.detach())
    twin.bias = layer.bias
    input = torch.randn(2, 4, 9, 9, device=device)
    torch.testing.assert_close(layer(input), twin(input))


@pytest.mark.parametrize(
    ("layer", "name", "value"),
    [
        (HyperConv2d(4, 4, 3), "stride", 0),
        (HyperConv2d(4, 4, 3, padding="same"), "stride", 2),
        (HyperConv2d(4, 4, 3, 2), "padding", "same"),
        (HyperConvTranspose1d(4, 4, 3), "padding", "same"),
        (HyperConv2d(4, 4, 3), "padding", -1),
        (HyperConv2d(4, 4, 3), "dilation", (1, 1, 1)),
        (HyperConv2d(4, 4, 3), "output_padding", 1),
        (HyperConv2d(4, 4, 3), "padding_mode", "mirror"),
        (HyperConvTranspose1d(4, 4, 3), "padding_mode", "circular"),
        (HyperConv2d(4, 4, 3), "groups", 0),
        (HyperConv2d(4, 4, 3), "backend", "cudnn"),
        (HyperConv2d(4, 4, 3), "coordinates", "polar"),
        (HyperConv2d(4, 4, 3).hypernet, "activation", "swish"),
    ],
)
def test_an_attribute_out_of_range(layer: nn.Module, name: str, value: object) -> None:
    before = getattr(layer, name)
    with pytest.raises(ValueError, match=rf"^{'padding' if value == 2 else name}: .*; "):
        setattr(layer, name, value)
    assert getattr(layer, name) == before


def test_operations_give_plain_tensors() -> None:
    layer = HyperConv2d(3, 4, 3)
    w = layer.weight
    results = [
        *(w + 1, 2 - w, w * w, w.clone(), w.detach().clone(), w.sum(), w.data.norm(), w.std()),
        *(torch.cat([w, w]), torch.stack([w]), w.flatten(1) @ w.flatten(1).T, w.double(), w > 0),
        *(torch.zeros_like(w), w.new_zeros(3), torch.einsum("oihw->oi", w), torch.where(w > 0, w, 0.0)),
        *(F.conv2d(torch.randn(1, 3, 5, 5), w), *torch.linalg.svd(w.detach().flatten(1)), *w.max(0)),
        *(ONES.clone().add_(w), ONES.clone().copy_(w.detach()), *torch._foreach_add([w, w], 1.0)),
        *torch.autograd.grad(w.sum(), list(layer.parameters())[:1]),
    ]
    assert {type(result) for result in results} == {Tensor}
    results[3].zero_().add_(1)  # a copy is the caller's


def test_what_is_asked_of_it() -> None:
    layer = HyperConv2d(3, 4, 3)
    w = layer.weight
    assert isinstance(w, Tensor) and w.shape == ONES.shape and len(w) == 4 and w.numel() == 108
    assert w.requires_grad and not w.is_leaf and w.grad_fn is not None and w.dtype == torch.float32
    assert not layer.weight.detach().requires_grad
    assert repr(w).startswith("tensor(") and "grad_fn" in str(w)
    assert f"{w.mean():.3f}" == f"{w.mean().item():.3f}"
    assert torch.equal(torch.tensor(w.tolist()), w) and bool((w == w.clone()).all())
    array = np.array(w.detach())
    assert (
        array.shape == ONES.shape and array.flags.writeable and np.array_equal(array, w.detach().numpy())
    )
    with torch.inference_mode():
        assert torch.equal(layer.weight, w)


def test_differentiation_by_it() -> None:
    w = HyperConv2d(3, 4, 3).weight
    input = torch.randn(1, 3, 5, 5)
    gradient = torch.autograd.grad(F.conv2d(input, w).square().sum(), w)[0]
    leaf = w.detach().clone().requires_grad_()
    expected = torch.autograd.grad(F.conv2d(input, leaf).square().sum(), leaf)[0]
    torch.testing.assert_close(gradient, expected)
    by_transform = torch.func.grad(lambda v: F.conv2d(input, v).square().sum())(w.detach())
    torch.testing.assert_close(by_transform, expected)


def _saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda t: pickle.loads(pickle.dumps(t)), _saved]
)
def test_a_copy_is_a_plain_tensor(copied: Callable[[Any], Any]) -> None:
    w = HyperConv2d(3, 4, 3).weight
    for value in (w, w.detach()):
        other = copied({"w": value})["w"] if copied is not copy.copy else copied(value)
        assert type(other) is Tensor and torch.equal(other, w)


def test_a_parameter_of_something_else() -> None:
    """nn.Conv2d with this W, trained on: a parameter like any other."""
    layer, dense = HyperConv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    before = layer.weight.clone()
    for value in (layer.weight, layer.weight.detach(), layer.weight.data):
        dense.weight = nn.Parameter(value)
        assert type(dense.weight) is nn.Parameter and dense.weight.is_leaf and dense.weight.requires_grad
        optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
        dense(torch.randn(1, 3, 5, 5)).sum().backward()
        optimizer.step()
        assert not torch.equal(dense.weight, before)
        assert type(copy.deepcopy(dense).weight) is nn.Parameter
    dense.weight.data = layer.weight.detach()
    dense.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    assert torch.equal(dense.weight, before) and torch.equal(layer.weight, before)
    leaf = layer.weight.detach().requires_grad_()
    leaf.sum().backward()
    assert leaf.grad is not None and leaf.grad.eq(1).all()


def _standardised(layer: HyperConvNd, input: Tensor) -> Tensor:
    w = layer.weight
    mean, deviation = w.mean((1, 2, 3), keepdim=True), w.std((1, 2, 3), keepdim=True)
    return F.conv2d(input, (w - mean) / (deviation + 1e-5), layer.bias)


def test_weight_standardisation_under_every_tool(device) -> None:
    layer = HyperConv2d(3, 4, 3, device=device)
    input = torch.randn(2, 3, 7, 7, device=device)
    expected = _standardised(layer, input)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, input: Tensor) -> Tensor:
            return _standardised(self.layer, input)

    model = Model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input), expected)
    for strict in (False, True):
        exported = torch.export.export(model, (input,), strict=strict).module()
        torch.testing.assert_close(exported(input), expected)
    torch.testing.assert_close(torch.vmap(model)(input[None])[0], expected)
    parameters = dict(model.named_parameters())
    called = torch.func.functional_call(model, parameters, (input,))
    torch.testing.assert_close(called, expected)
    gradient = torch.func.grad(lambda p: torch.func.functional_call(model, p, (input,)).square().sum())
    expected.square().sum().backward()
    torch.testing.assert_close(gradient(parameters)["layer.coefficients"], layer.coefficients.grad)


def test_reparametrisation_of_the_coefficients() -> None:
    layer = HyperConv2d(3, 4, 3)
    input = torch.randn(1, 3, 7, 7)
    parametrizations.weight_norm(layer, "coefficients")
    parametrizations.spectral_norm(layer.hypernet.layers[1])
    layer.eval()
    expected = F.conv2d(input, layer.weight, layer.bias)
    torch.testing.assert_close(layer(input), expected)
    torch.testing.assert_close(copy.deepcopy(layer)(input), expected)
    layer.reset_parameters()
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    torch.testing.assert_close(layer(input), F.conv2d(input, layer.weight, layer.bias))
    parametrize.remove_parametrizations(layer, "coefficients")
    torch.testing.assert_close(layer(input), F.conv2d(input, layer.weight, layer.bias))


def test_pruning_of_the_coefficients() -> None:
    layer = HyperConv2d(3, 4, 3)
    prune.l1_unstructured(layer, "coefficients", 0.5)
    prune.l1_unstructured(layer, "bias", 2)
    assert layer.coefficients.eq(0).sum() == 30 and layer.bias.eq(0).sum() == 2
    input = torch.randn(1, 3, 7, 7)
    torch.testing.assert_close(layer(input), F.conv2d(input, layer.weight, layer.bias))


def test_the_forward_pass_does_not_build_it() -> None:
    layer = HyperConv2d(3, 4, 3)

    class Forbidden(HyperConv2d):
        @property
        def weight(self) -> Tensor:
            raise AssertionError("read")

    object.__setattr__(layer, "__class__", Forbidden)
    assert layer(torch.randn(1, 3, 5, 5)).shape == (1, 4, 3, 3)
