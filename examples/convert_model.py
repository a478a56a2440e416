"""A model of timm from nn.Conv2d to hyper-convolutions, through training, and into ONNX.

    pip install timm huggingface_hub safetensors onnx onnxscript onnxruntime
    python examples/convert_model.py --model resnet18 --folder trained

Its convolutions are converted, it is compiled and trained on gratings that are made up here, saved and
loaded as Hugging Face does, and brought back to nn.Conv2d for onnxruntime.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import onnxruntime
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from common import positive
from hyperconv_ext import convert, materialize, parameter_groups

CLASSES, SIDE = 4, 64


class Classifier(nn.Module, PyTorchModelHubMixin):
    """A model of timm whose convolutions are hyper-convolutions.

    The mixin keeps the arguments beside the weights, so that `from_pretrained` builds the same model.

    Args:
        name: of the model, as `timm.create_model` takes it.
        rank: R of each kernel.
    """

    def __init__(self, name: str, rank: int) -> None:
        super().__init__()
        self.body = timm.create_model(name, num_classes=CLASSES)
        self.report = convert(self.body, rank=rank, progress=False)

    def forward(self, images: Tensor) -> Tensor:
        """Scores `[B, CLASSES]` of images `[B, 3, H, W]`."""
        return self.body(images)


def gratings(count: int) -> tuple[Tensor, Tensor]:
    """Noisy stripes `[count, 3, SIDE, SIDE]`, and in which of `CLASSES` directions they run."""
    labels = torch.arange(count) % CLASSES
    angle = (torch.pi * labels / CLASSES).view(-1, 1, 1)
    across = torch.linspace(0, 24, SIDE)
    phase = 6 * torch.rand(count, 1, 1)
    waves = torch.sin(angle.cos() * across + angle.sin() * across.unsqueeze(1) + phase)
    return waves.unsqueeze(1) + torch.randn(count, 3, SIDE, SIDE), labels


def train(model: nn.Module, steps: int) -> None:
    """Some steps of AdamW, each on a new batch."""
    compiled = torch.compile(model.train())
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=2e-3)
    for step in range(1, steps + 1):
        images, labels = gratings(32)
        loss = F.cross_entropy(compiled(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == 1:
            print(f"step {step}: loss {loss.item():.3f}")


def run_onnx(model: nn.Module, file: Path, images: Tensor) -> Tensor:
    """The scores of onnxruntime, for a model that has only PyTorch's own layers."""
    torch.onnx.export(model, (images,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file)
    (scores,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(scores)


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert, train, save, load, deploy; raise if a model does not return what the one before did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a name that timm knows")
    parser.add_argument("--rank", type=positive, default=5, help="of each kernel")
    parser.add_argument("--steps", type=positive, default=40, help="of training")
    parser.add_argument("--folder", type=Path, default=Path("trained"), help="for what is saved")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    model = Classifier(options.model, options.rank)
    print(model.report)
    train(model, options.steps)

    model.save_pretrained(options.folder)  # type: ignore[operator]
    loaded = Classifier.from_pretrained(options.folder).eval()
    images, labels = gratings(128)
    with torch.inference_mode():
        scores: Tensor = model.eval()(images)
        torch.testing.assert_close(loaded(images), scores, rtol=1e-3, atol=1e-3)
    print(f"right: {(scores.argmax(1) == labels).float().mean():.1%} of new images")

    deployed = materialize(loaded, fuse_batch_norm=True)
    difference = run_onnx(deployed, options.folder / "model.onnx", images) - scores
    print(f"onnxruntime: scores differ by at most {difference.abs().max():.1e}")
    torch.testing.assert_close(difference, torch.zeros_like(scores), rtol=0, atol=1e-3)


if __name__ == "__main__":
    main()
