"""Converted models in the hands of the tools that train, save and load them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hyperconv_ext import HyperConv2d, convert, parameter_groups

pytestmark = pytest.mark.models


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 7, padding=3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 5, padding=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )
    report = convert(model, force=True, progress=False)
    assert [type(layer) for layer in (model[0], model[3])] == [HyperConv2d] * 2 and not report.left
    return model


def batches() -> DataLoader[Any]:
    """Four, always the same."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, (images.mean((1, 2, 3)) > 0).long()), batch_size=4)


def by_hand() -> nn.Module:
    """One epoch of plain PyTorch, which the tools must equal."""
    model = network()
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2)
    for images, labels in batches():
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


def assert_same(model: nn.Module, other: nn.Module) -> None:
    state = other.state_dict()
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], msg=name)


def test_lightning(tmp_path: Path) -> None:
    """It trains as by hand, and goes on from its checkpoint."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self.model(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameter_groups(self.model), lr=1e-2)

    def trainer(epochs: int) -> Any:
        return lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    module, file = Module(), tmp_path / "last.ckpt"
    first = trainer(1)
    first.fit(module, batches())
    assert_same(module.model, by_hand())
    first.save_checkpoint(file)
    trainer(2).fit(other := Module(), batches(), ckpt_path=file)
    trainer(2).fit(again := Module(), batches())
    assert_same(other.model, again.model)
    loaded = Module.load_from_checkpoint(file)
    assert_same(loaded.model, module.model)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str, tmp_path: Path) -> None:
    """It trains as by hand, in bfloat16 nearly, and restores what it saved."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    model = network()
    before = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches())
    for images, labels in loader:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(images), labels))
        optimizer.step()
    plain = accelerator.unwrap_model(model)
    if precision == "no":
        assert_same(plain, by_hand())
    assert not torch.equal(plain[0].coefficients, before[0].coefficients)
    assert plain[0].coefficients.dtype == torch.float32
    accelerator.save_state(tmp_path)
    trained = copy.deepcopy(plain)
    plain.load_state_dict(before.state_dict())
    accelerator.load_state(tmp_path)
    assert_same(plain, trained)


def test_transformers(tmp_path: Path) -> None:
    """A model of the user's own is saved and loaded; what is loaded is not drawn anew."""
    transformers = pytest.importorskip("transformers")

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = network()
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.zeros_(module.weight)

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images)

    model = Model(transformers.PretrainedConfig()).eval()
    model.model.load_state_dict(by_hand().state_dict())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = Model.from_pretrained(tmp_path).eval()
    assert_same(loaded, model)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(loaded(x), model(x))


def test_safetensors(tmp_path: Path) -> None:
    torch_files = pytest.importorskip("safetensors.torch")
    model, file = by_hand(), tmp_path / "model.safetensors"
    torch_files.save_model(model, str(file))
    fresh = network()
    torch_files.load_model(fresh, str(file))
    assert_same(fresh, model)
