"""The layers in traces: leaves of a torch.fx graph; a clear word from torch.jit.script."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx.experimental.optimization import fuse
from torch.fx.passes.shape_prop import ShapeProp

from hyperconv_ext import HyperConv1d, HyperConv2d, HyperConv3d, HyperConvTranspose2d

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")


class Block(nn.Module):
    """Down, batch norm, and up again to the sizes it came from."""

    def __init__(self) -> None:
        super().__init__()
        self.down = HyperConv2d(3, 4, 3, stride=2, weight_norm="batch")
        self.norm = nn.BatchNorm2d(4)
        self.up = HyperConvTranspose2d(4, 3, 3, 2)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.norm(self.down(input)).relu()
        up = self.up(hidden, output_size=input.shape[-2:])
        return up + self.up(input=hidden, output_size=input.shape)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first = HyperConv2d(3, 3, 3, padding="same", padding_mode="circular")
        self.stem = nn.Sequential(first, nn.BatchNorm2d(3), nn.ReLU())
        self.block = Block()
        self.layer = nn.Conv2d(3, 2, 1)  # the name that a layer traced alone gets

    def forward(self, input: Tensor) -> Tensor:
        return self.layer(self.block(self.stem(input)))


class EveryBlockALeaf(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Block) or super().is_leaf_module(m, module_qualified_name)


class EveryLayerByName(fx.Tracer):
    """As feature extractors record where each node comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def call_module(self, m: nn.Module, forward, args, kwargs):
        self.names.append(self.path_of_module(m))
        return super().call_module(m, forward, args, kwargs)


def _model() -> tuple[nn.Module, Tensor]:
    return Model().eval(), torch.randn(2, 3, 9, 8)


def _calls(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


def test_symbolic_trace() -> None:
    model, input = _model()
    traced = fx.symbolic_trace(model)
    calls = _calls(traced.graph)
    assert [name for name in calls if name.startswith("block")] == [
        "block.down", "block.norm", "block.up", "block.up"
    ]  # fmt: skip
    assert "stem.0" in calls and not any("hypernet" in name for name in calls)
    expected = model(input)
    traced.recompile()
    copies = [copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), fx.symbolic_trace(traced)]
    for other in (traced, *copies):
        assert torch.equal(other(input), expected)
        assert torch.equal(other(input[:1, :, :7, :7]), model(input[:1, :, :7, :7]))
        assert set(other.state_dict()) == set(model.state_dict())
    traced.graph.lint()
    traced(input).sum().backward()
    assert model.block.down.coefficients.grad.any()


@pytest.mark.parametrize("tracer", [EveryBlockALeaf, EveryLayerByName])
def test_other_tracers(tracer: type[fx.Tracer]) -> None:
    model, input = _model()
    used = tracer()
    traced = fx.GraphModule(model, used.trace(model))
    assert torch.equal(traced(input), model(input))
    if isinstance(used, EveryLayerByName):
        assert {"block.down", "block.up"} <= set(used.names)


def test_features_of_an_inner_node() -> None:
    model, input = _model()
    traced = fx.symbolic_trace(model)
    (node,) = (node for node in traced.graph.nodes if node.target == "block.down")
    for output in [n for n in traced.graph.nodes if n.op == "output"]:
        traced.graph.erase_node(output)
    traced.graph.inserting_after(list(traced.graph.nodes)[-1])
    traced.graph.output(node)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    assert torch.equal(traced(input), model.block.down(model.stem(input)))


@pytest.mark.parametrize("kind", [HyperConv1d, HyperConv2d, HyperConv3d, HyperConvTranspose2d])
def test_a_layer_alone(kind) -> None:
    layer = kind(3, 4, 3)
    keys = set(layer.state_dict())
    input = torch.randn(2, 3, *(5,) * layer.dims)
    traced = fx.symbolic_trace(layer)
    for module in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert torch.equal(module(input), layer(input))
    assert set(layer.state_dict()) == keys


def test_shapes_and_fusion() -> None:
    model, input = _model()
    traced = fx.symbolic_trace(model)
    ShapeProp(traced).propagate(input)
    shapes = {
        str(n.target): n.meta["tensor_meta"].shape for n in traced.graph.nodes if n.op == "call_module"
    }
    assert shapes["block.down"] == (2, 4, 4, 3)
    torch.testing.assert_close(fuse(model)(input), model(input))


def test_quantisation_of_the_rest() -> None:
    model, input = _model()
    expected = model(input)
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(), (input,))
    torch.testing.assert_close(prepared(input), expected)
    assert "block.down" in _calls(prepared.graph)
    converted = convert_fx(prepared)
    assert type(converted.block.down) is HyperConv2d and type(converted.layer) is not nn.Conv2d
    assert (converted(input) - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("model", [HyperConv2d(3, 4, 3), Model()], ids=["layer", "model"])
def test_jit_script_says_what_to_use(model: nn.Module) -> None:
    message = r"^torch.jit.script: HyperConv2d cannot be scripted; use torch.export.export, or torch.jit"
    with pytest.raises(NotImplementedError, match=message):
        torch.jit.script(model)
