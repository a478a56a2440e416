"""Tools of other packages that take a model of these layers for any other, however it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperconv_ext import HyperConv1d, HyperConv2d, HyperConv3d, HyperConvTranspose2d

accelerate = pytest.importorskip("accelerate")
hub = pytest.importorskip("huggingface_hub")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.models

CLASSES = 4


def network() -> nn.Sequential:
    """Every kind of state, on images `[B, 3, H, W]`."""
    return nn.Sequential(
        HyperConv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        HyperConv2d(8, 8, 5, padding=2, weight_norm="batch", padding_mode="circular"),
        nn.SiLU(),
        HyperConvTranspose2d(8, 8, 3, stride=2, output_padding=1, parametrization="published"),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


def same(one: nn.Module, other: nn.Module) -> None:
    """To the bit, and with the same keys."""
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


class Hosted(nn.Module, hub.PyTorchModelHubMixin):
    """With a configuration that `from_pretrained` reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = HyperConv2d(3, width, 3)

    def forward(self, input: Tensor) -> Tensor:
        return self.conv(input)


def test_hub_mixin(tmp_path: Path) -> None:
    model = Hosted(width=6)
    model.save_pretrained(tmp_path)
    same(Hosted.from_pretrained(tmp_path), model)


def test_accelerate_starts_without_numbers(tmp_path: Path) -> None:
    """A model made empty, whose file is put onto a device."""
    model = network()
    accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path))
    with accelerate.init_empty_weights(include_buffers=True):
        empty = network()
    loaded = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path), device_map={"": "cpu"})
    same(loaded, model)


LAYERS: list[tuple[Any, tuple[int, ...]]] = [
    (lambda: HyperConv1d(3, 4, 5, padding="same", padding_mode="reflect"), (3, 9)),
    (lambda: HyperConv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9, 8)),
    (lambda: HyperConv2d(3, 4, 3, dilation=2, weight_norm="batch"), (3, 9, 8)),
    (lambda: HyperConvTranspose2d(3, 4, 3, stride=2, output_padding=1), (3, 5, 4)),
    (lambda: HyperConv3d(2, 3, 3, parametrization="published"), (2, 5, 6, 4)),
    (network, (3, 8, 8)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_onnx(make: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    """For a batch of any size."""
    model, path = make().eval(), str(tmp_path / "model.onnx")
    batch = torch.export.Dim("batch", min=1, max=64)
    input = torch.randn(2, *shape)
    torch.onnx.export(model, (input,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    for size in (2, 5):
        input = torch.randn(size, *shape)
        (output,) = session.run(None, {name: input.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(output), model(input), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "jvp"])
def test_transforms_that_are_compiled(transform: str) -> None:
    """By the PyTorch of this environment, which is newer than the one of the other tests."""
    layer, input = HyperConv2d(4, 8, 5, padding=2), torch.randn(2, 4, 9, 9)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], input: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (input,)).square().sum()

    def transformed(parameters: dict[str, Tensor], input: Tensor) -> Any:
        if transform == "jvp":
            return torch.func.jvp(lambda x: loss(parameters, x), (input,), (input,))[1]
        gradient = torch.func.grad(loss)
        return (gradient if transform == "grad" else torch.func.vmap(gradient, (None, 0)))(
            parameters, input
        )

    compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
    expected = transformed(parameters, input)
    torch.testing.assert_close(compiled(parameters, input), expected, rtol=1e-3, atol=1e-3)
