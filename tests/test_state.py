"""What no state_dict holds and must be right all the same: coordinates, their spacing, statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

from hyperconv_ext import (
    CoordinateMLP,
    HyperConv2d,
    HyperConv3d,
    HyperConvTranspose2d,
    HyperConvTranspose3d,
    LazyHyperConv2d,
    LazyHyperConvTranspose2d,
    convert,
    functional,
)
from hyperconv_ext.modules.base import PARAMETRIZATIONS
from hyperconv_ext.ops import coordinates
from hyperconv_ext.taps import tap_coordinates

from .conftest import FUSED

OPTIONS = [
    {},
    {"weight_norm": "batch"},
    {"coordinates": "unit", "kernel_size": (4, 7)},
    {"activation": "tanh", "weight_bias": False},
    {"parametrization": "published"},
]
every_backend = pytest.mark.parametrize("backend", ["auto", "reference", "composite", *FUSED])


def _make(options: dict, device=None) -> HyperConv2d:
    return HyperConv2d(3, 6, **{"kernel_size": 5, "device": device} | options)


@contextmanager
def init_empty_weights() -> Iterator[None]:
    """Parameters go to the device meta as they are registered, buffers do not: as accelerate does it."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None:
            module._parameters[name] = nn.Parameter(param.to("meta"), param.requires_grad)

    with mock.patch.object(nn.Module, "register_parameter", on_meta):
        yield


def _under_device(options: dict) -> HyperConv2d:
    with torch.device("meta"):
        return _make(options)


def _under_empty_weights(options: dict) -> HyperConv2d:
    with init_empty_weights():
        return _make(options)


@pytest.mark.parametrize(
    "on_meta", [lambda options: _make(options, "meta"), _under_device, _under_empty_weights]
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_layer_made_on_meta_and_assigned_a_state(options: dict, on_meta: Callable, device) -> None:
    layer = _make(options, device)
    input = torch.randn(2, 3, 9, 9, device=device)
    layer(input)
    loaded = on_meta(options)
    assert all(parameter.is_meta for parameter in loaded.parameters())
    loaded.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(loaded.eval()(input), layer.eval()(input))
    assert torch.equal(loaded.weight, layer.weight)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_tensor_outside_the_state_dict(options: dict, device) -> None:
    """So that nothing is left to chance by a loader that fills parameters only."""
    layer = _make(options, device)
    layer(torch.randn(1, 3, 9, 9, device=device))
    known = set(layer.state_dict())
    for name, module in layer.named_modules():
        prefix = f"{name}." if name else ""
        tensors = {**module.__dict__, **module._parameters, **module._buffers}
        held = {prefix + key for key, value in tensors.items() if isinstance(value, Tensor)}
        assert held <= known


def test_statistics_are_real_where_only_parameters_are_on_meta() -> None:
    """As those of nn.BatchNorm2d."""
    layer = _under_empty_weights({"weight_norm": "batch"})
    assert not any(buffer.is_meta for buffer in layer.buffers())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("ours", "theirs"), [(0, 1), (1, 0)])
def test_a_state_of_the_other_parametrization(ours: int, theirs: int, strict: bool, device) -> None:
    """Whose parameters stand for another kernel. A part of a state that holds no kernel is loaded."""
    layer, other = (
        HyperConv2d(3, 4, 3, parametrization=PARAMETRIZATIONS[which], device=device)
        for which in (ours, theirs)
    )
    message = (
        rf"0.mixing: expected a state with(out)? it for parametrization='{PARAMETRIZATIONS[ours]}', got "
        rf"one with(out)?; make the layer with parametrization='{PARAMETRIZATIONS[theirs]}'"
    )
    state = nn.Sequential(other).state_dict()
    with pytest.raises(RuntimeError, match=message):
        nn.Sequential(layer).load_state_dict(state, strict=strict)
    layer.load_state_dict({"bias": other.bias.detach()}, strict=False)
    assert torch.equal(layer.bias, other.bias)


def test_coordinates_follow_the_hypernetwork(device) -> None:
    layer = HyperConv2d(3, 4, (3, 2), coordinates="unit", device=device)
    for dtype in (torch.float16, torch.float64, torch.bfloat16):
        wide = torch.promote_types(dtype, torch.float32)
        expected = tap_coordinates((3, 2), "unit", device, wide)
        assert torch.equal(layer.to(dtype).taps, expected) and layer.taps.dtype == wide
    assert layer.to("meta").taps.is_meta


def test_a_module_gets_coordinates_on_its_own_device(device) -> None:
    class Network(nn.Module):
        def __init__(self, where) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2, device=where))
            self.seen: list[torch.device] = []

        def forward(self, coordinates: Tensor) -> Tensor:
            self.seen.append(coordinates.device)
            return coordinates * self.scale

    for where in ("meta", device):
        network = Network(where)
        HyperConv2d(3, 4, 3, hypernet=network, device=where)
        assert {place.type for place in network.seen} == {torch.device(where).type}


def test_a_module_that_writes_to_its_coordinates(device) -> None:
    """They are its own: other layers, and its next step, have the right ones."""

    class Careless(nn.Module):
        def forward(self, coordinates: Tensor) -> Tensor:
            return coordinates.mul_(2)

    layer = HyperConv2d(3, 4, 3, hypernet=Careless(), device=device)
    before = layer.weight.clone()
    layer.taps.zero_()
    assert torch.equal(layer.weight, before)
    assert torch.equal(HyperConv2d(3, 4, 3, device=device).taps, tap_coordinates((3, 3), device=device))


def test_a_second_step_makes_no_coordinates(device) -> None:
    layer, other = (HyperConv2d(3, 4, (3, 6), device=device) for _ in range(2))
    input = torch.randn(1, 3, 9, 9, device=device)
    layer(input)
    with mock.patch.object(coordinates, "tap_grid", side_effect=AssertionError("made again")):
        layer(input)
        other(input)


def _first_under_inference_mode(layer: HyperConv2d, input: Tensor) -> None:
    with torch.inference_mode():
        layer(input)


def _first_under_a_transform(layer: HyperConv2d, input: Tensor) -> None:
    parameters = dict(layer.named_parameters())
    torch.func.grad(lambda p: torch.func.functional_call(layer, p, (input,)).sum())(parameters)
    torch.func.vmap(layer)(input[None])


def _first_under_fake_mode(layer: HyperConv2d, input: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(layer(input), FakeTensor)


def _first_under_a_device(layer: HyperConv2d, input: Tensor) -> None:
    with torch.device("meta"):
        assert not layer(input).is_meta


def _first_compiled(layer: HyperConv2d, input: Tensor) -> None:
    torch.compile(layer, backend="aot_eager", fullgraph=True)(input)


@pytest.mark.parametrize("backend", ["reference", "composite"])
@pytest.mark.parametrize(
    "first",
    [
        _first_under_inference_mode,
        _first_under_a_transform,
        _first_under_fake_mode,
        _first_under_a_device,
        _first_compiled,
    ],
)
def test_the_first_call_leaves_nothing_wrong_behind(first: Callable, backend: str, device) -> None:
    layer = HyperConv2d(3, 4, 3, backend=backend, device=device)
    expected = layer.weight.clone()
    input = torch.randn(1, 3, 9, 9, device=device)
    with mock.patch.object(coordinates, "_known", {}):
        first(layer, input)
        known = coordinates._known.values()
        assert all(type(kept) is Tensor and not kept.is_inference() for kept in known)
        output = layer(input)
        output.sum().backward()
        torch.testing.assert_close(layer.weight, expected)
    dense = nn.functional.conv2d(input, expected, layer.bias)
    torch.testing.assert_close(output, dense)
    assert layer.hypernet.layers[0].weight.grad.any()


@every_backend
@pytest.mark.parametrize("weight_norm", [None, "batch"])
def test_forward_on_meta(weight_norm: str | None, backend: str) -> None:
    """Sizes and gradients' sizes, whatever the backend."""
    options = {"stride": 2, "weight_norm": weight_norm, "backend": backend, "device": "meta"}
    layer = HyperConv2d(3, 4, 3, **options)
    input = torch.randn(2, 3, 9, 8, device="meta", requires_grad=True)
    output = layer(input)
    assert output.is_meta and output.shape == (2, 4, 4, 3)
    output.sum().backward()
    assert input.grad is not None and input.grad.shape == input.shape
    assert all(p.grad is not None and p.grad.shape == p.shape for p in layer.parameters())
    assert layer(input[0]).shape == (4, 4, 3) and layer.weight.shape == (4, 3, 3, 3)
    volume = HyperConvTranspose3d(3, 4, 2, 2, backend=backend, device="meta")
    sizes = torch.empty(1, 3, 4, 3, 2, device="meta")
    assert volume(sizes).shape == (1, 4, 8, 6, 4)
    assert volume(sizes, output_size=(9, 6, 5)).shape == (1, 4, 9, 6, 5)


def test_functions_on_meta() -> None:
    shapes = ((1, 4, 9, 9), (6, 4, 4), (4, 3, 3), (6,))
    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    for backend in ("auto", "reference", "composite", *FUSED):
        assert functional.basis_conv2d(*tensors, backend=backend).shape == (1, 6, 7, 7)
    with pytest.raises(ValueError, match=r"^coefficients: expected it on the input's device cpu"):
        functional.basis_conv2d(torch.empty(1, 4, 9, 9), *tensors[1:])


@every_backend
@pytest.mark.parametrize("weight_norm", [None, "batch"])
def test_construction_and_forward_under_fake_mode(weight_norm: str | None, backend: str, device) -> None:
    with FakeTensorMode():
        layer = HyperConv2d(3, 4, 3, weight_norm=weight_norm, backend=backend, device=device)
        assert all(isinstance(parameter, FakeTensor) for parameter in layer.parameters())
        output = layer(torch.randn(2, 3, 9, 9, device=device))
        assert isinstance(output, FakeTensor) and output.shape == (2, 4, 7, 7)
        assert output.device.type == device.type and layer.weight.shape == (4, 3, 3, 3)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "composite"])
def test_fully_shard_from_meta(options: dict, backend: str, mesh: DeviceMesh) -> None:
    with torch.device("meta"):
        model = nn.Sequential(_make(options | {"backend": backend}), nn.ReLU(), nn.Conv2d(6, 2, 1))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    layer = model[0]
    assert isinstance(layer.coefficients, DTensor)
    weight = layer.weight
    assert isinstance(weight, DTensor)
    start = _make(options).weight.std().item()
    assert 0.2 < weight.full_tensor().std().item() / start < 5
    twin = _make(options | {"backend": backend})
    twin.load_state_dict({name: value.full_tensor() if isinstance(value, DTensor) else value
                          for name, value in layer.state_dict().items()})  # fmt: skip
    input = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(weight.full_tensor(), twin.weight.clone())
    torch.testing.assert_close(model(input), model[2](model[1](twin(input))))
    model(input).sum().backward()
    assert isinstance(layer.coefficients.grad, DTensor)


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_weight_and_reset_of_sharded_parameters(options: dict, placement, mesh: DeviceMesh) -> None:
    layer = _make(options)
    before = layer.weight.clone()

    def shard(_: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(
                name, nn.Parameter(distribute_tensor(parameter, mesh, [placement]))
            )

    distribute_module(layer, mesh, shard)
    grid = layer.taps
    assert isinstance(grid, DTensor) and grid.placements == (Replicate(),)
    assert torch.equal(
        grid.full_tensor(), tap_coordinates(layer.kernel_size, layer.coordinates, dtype=torch.float32)
    )
    torch.testing.assert_close(layer.weight.full_tensor(), before)
    layer.reset_parameters()
    after = layer.weight.full_tensor()
    assert not torch.equal(after, before) and after.std() > 0.5 * before.std()


def test_a_sharded_convolution_is_converted_before(mesh: DeviceMesh) -> None:
    conv = distribute_module(nn.Conv2d(3, 4, 3), mesh)
    with pytest.raises(TypeError, match="conv: expected a plain weight, got a DTensor; make the layer"):
        HyperConv2d.from_conv(conv)
    (row,) = convert(conv, progress=False, force=True).layers
    assert row.reason == "its weight is a DTensor; convert before it is sharded or quantised"


def test_traced_coordinates_follow_the_module(device) -> None:
    """No device is written into the trace."""
    layer = HyperConv2d(3, 4, 3, backend="reference", device=device).eval()
    input = torch.randn(1, 3, 9, 9, device=device)
    graph = str(torch.jit.trace(layer, (input,)).inlined_graph)
    assert "aten::cumsum" in graph and "aten::arange" not in graph


@pytest.mark.parametrize("strict", [False, True])
def test_exported_coordinates_are_computed(strict: bool, device) -> None:
    layer = HyperConv2d(3, 4, 3, device=device).eval()
    input = torch.randn(1, 3, 9, 9, device=device)
    program = torch.export.export(layer, (input,), strict=strict)
    assert set(program.state_dict) == set(layer.state_dict()) and not program.constants
    torch.testing.assert_close(program.module()(input), layer(input))


def test_spacing_of_the_taps_is_saved() -> None:
    """A kernel sampled at other distances is another function of its parameters."""
    wide = HyperConv2d(3, 4, 5, num_features=4).with_kernel_size(3, dilation=2)
    state = wide.state_dict()
    assert state["tap_spacing"].tolist() == [2, 2]
    assert "tap_spacing" not in HyperConv2d(3, 4, 3, dilation=2).state_dict()
    loaded = nn.Sequential(HyperConv2d(3, 4, 3, dilation=2))
    loaded.load_state_dict({f"0.{name}": value for name, value in state.items()})
    assert loaded[0].tap_spacing == (2, 2)
    assert torch.equal(loaded[0].weight, wide.weight)
    for other in (copy.deepcopy(wide), wide.with_kernel_size(3)):
        assert torch.equal(other.weight, wide.weight)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("features", [1, 4])
def test_a_state_means_the_same_function_at_every_kernel_size(
    features: int, parametrization: str, device
) -> None:
    """All that makes phi is in the state, or follows from its shapes."""
    options = {"num_features": features, "parametrization": parametrization, "device": device}
    layer = HyperConv2d(3, 4, (1, 5), **options)
    for size in ((3, 3), (11, 7), (31, 1)):
        other = HyperConv2d(3, 4, size, **options)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other.weight, layer.with_kernel_size(size).weight)


def test_spacing_survives_a_state_without_numbers() -> None:
    wide = HyperConv2d(3, 4, 5, num_features=4).with_kernel_size(3, dilation=2)
    state = {name: value.to("meta") for name, value in wide.state_dict().items()}
    wide.load_state_dict(state, assign=True)
    assert wide.tap_spacing == (2, 2)


def _with_gain(gain: float, **options) -> HyperConv2d:
    return HyperConv2d(3, 4, 3, hypernet=CoordinateMLP(2, weight_gain=gain), **options)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_the_gain_of_the_hypernetwork_is_loaded(parametrization: str, tmp_path: Path) -> None:
    """Without an entry, by which loaders that look for parameters would stumble."""
    options = {"parametrization": parametrization}
    usual = HyperConv2d(3, 4, 3, **options, activation="sine")
    layer, other = _with_gain(0.3, **options), _with_gain(0.7, **options)
    assert layer.state_dict().keys() == usual.state_dict().keys()
    usual_gain = usual.hypernet.weight_gain
    for source, target, gain in ((layer, other, 0.3), (usual, layer, usual_gain), (other, usual, 0.3)):
        torch.save(nn.Sequential(source).state_dict(), tmp_path / "state.pt")
        nn.Sequential(target).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert target.hypernet.weight_gain == gain
        assert torch.equal(target.weight, source.weight)


def test_a_lazy_layer_takes_the_gain_of_a_state() -> None:
    layer = HyperConvTranspose2d(3, 4, 3, hypernet=CoordinateMLP(2, weight_gain=0.3))
    lazy = LazyHyperConvTranspose2d(4, 3)
    lazy.load_state_dict(layer.state_dict())
    assert torch.equal(lazy.weight, layer.weight)


def test_states_that_do_not_tell_of_a_gain() -> None:
    """Of earlier versions, and of tensors alone; or of another part of the layer."""
    layer, target = _with_gain(0.3), _with_gain(0.3)
    target.load_state_dict(dict(layer.state_dict()))
    assert torch.equal(target.weight, layer.weight)
    earlier = layer.state_dict()
    del earlier._metadata["hypernet"]["weight_gain"]  # type: ignore[attr-defined]
    target.load_state_dict(earlier)
    assert torch.equal(target.weight, layer.weight)
    part = HyperConv2d(3, 4, 3).state_dict()
    for name in list(part):
        if name.startswith("hypernet"):
            del part[name]
    target.load_state_dict(part, strict=False)
    assert target.hypernet.weight_gain == 0.3


def test_a_given_mlp_keeps_its_parameters() -> None:
    """It may be trained; an explicit reset draws it."""
    network = HyperConv2d(3, 4, 3).hypernet
    before = copy.deepcopy(network.state_dict())
    layer = HyperConv2d(3, 4, 3, num_features=9, hypernet=network)
    assert layer.coefficients.shape[-1] == network.num_features + 1
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    layer.reset_parameters()
    assert not torch.equal(before["layers.0.weight"], network.layers[0].weight)


def test_more_features_for_many_taps() -> None:
    """The default of 49 taps and more; a state of another N says what to do."""
    sizes = {(7, 7): 8, (4, 12): 4, (5, 5): 4, (1, 49): 8}
    assert {size: HyperConv2d(2, 3, size).num_features for size in sizes} == sizes
    assert HyperConv3d(2, 3, 4).num_features == LazyHyperConv2d(3, 7).num_features == 8
    assert HyperConv2d(2, 3, 7, parametrization="published").num_features == 4
    for features, text in ((None, ""), (8, ""), (4, ", num_features=4")):
        layer = HyperConv2d(2, 3, 7, num_features=features)
        assert layer.extra_repr() == f"2, 3, kernel_size=(7, 7){text}"
    for parametrization in PARAMETRIZATIONS:
        options: dict[str, Any] = {"parametrization": parametrization, "num_features": 3}
        state = HyperConv2d(2, 3, 5, **options).state_dict()
        for layer in (
            HyperConv2d(2, 3, 5, parametrization=parametrization),
            LazyHyperConv2d(3, 5, parametrization=parametrization),
        ):
            expected = (
                f"expected a state of num_features={layer.num_features}, got one of 3; make the layer"
            )
            with pytest.raises(RuntimeError, match=expected):
                layer.load_state_dict(state, strict=False)
