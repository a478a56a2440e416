"""Models as people use them: converted, trained for a step, evaluated, and brought back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from hyperconv_ext import convert, materialize
from hyperconv_ext.modules import HyperConvNd

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
monai_nets = pytest.importorskip("monai.networks.nets")
smp = pytest.importorskip("segmentation_models_pytorch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.models


def lenet5() -> nn.Module:
    """LeCun et al. 1998, with ReLU."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def vit_stem() -> nn.Module:
    return timm.layers.PatchEmbed(img_size=64, patch_size=16, embed_dim=192)


def unet(dims: int) -> nn.Module:
    return monai_nets.UNet(
        spatial_dims=dims,
        in_channels=1,
        out_channels=2,
        channels=(16, 32, 64),
        strides=(2, 2),
        num_res_units=1,
    )


def denoiser() -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    converted: int  # layers
    others: tuple[Any, ...] = ()  # further arguments of a call


CASES = {
    "lenet5": Case(lenet5, (1, 28, 28), 1),
    "alexnet": Case(lambda: torchvision.models.alexnet(num_classes=10), (3, 64, 64), 5),
    "vgg11": Case(lambda: torchvision.models.vgg11(num_classes=10), (3, 32, 32), 8),
    "googlenet": Case(
        lambda: torchvision.models.googlenet(num_classes=10, init_weights=False), (3, 64, 64), 20
    ),
    "resnet18": Case(lambda: torchvision.models.resnet18(num_classes=10), (3, 64, 64), 17),
    "resnet34": Case(lambda: torchvision.models.resnet34(num_classes=10), (3, 64, 64), 33),
    "timm resnet18": Case(lambda: timm.create_model("resnet18", num_classes=10), (3, 64, 64), 17),
    "timm convnext_tiny": Case(lambda: timm.create_model("convnext_tiny"), (3, 64, 64), 19),
    "timm efficientnet_b0": Case(lambda: timm.create_model("efficientnet_b0"), (3, 64, 64), 14),
    "timm tf_efficientnet_b0": Case(lambda: timm.create_model("tf_efficientnet_b0"), (3, 64, 64), 14),
    "timm vit stem": Case(vit_stem, (3, 64, 64), 1),
    "monai unet 2d": Case(lambda: unet(2), (1, 32, 32), 5),
    "monai unet 3d": Case(lambda: unet(3), (1, 16, 16, 16), 6),
    "smp unet": Case(lambda: smp.Unet("resnet18", encoder_weights=None), (3, 64, 64), 27),
    "diffusers unet": Case(denoiser, (3, 16, 16), 18, (7,)),
}


def tensor_of(output: Any) -> Tensor:
    """The prediction in what models return."""
    if isinstance(output, Tensor):
        return output
    return output.sample if hasattr(output, "sample") else output.logits


def step(model: nn.Module, predict: Callable[[], Tensor], target: Tensor) -> tuple[float, float]:
    """(loss, by how much a step down its gradient lowered it), a step for a thousandth of it."""

    def loss_of() -> Tensor:
        torch.manual_seed(1)  # of dropout
        return (predict() - target).square().mean()

    loss = loss_of()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    slope = sum(float(gradient.square().sum()) for gradient in gradients)
    torch.optim.SGD(model.parameters(), lr=1e-3 * loss.item() / slope).step()
    with torch.no_grad():
        return loss.item(), loss.item() - loss_of().item()


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_converted_trained_and_brought_back(name: str) -> None:
    torch.manual_seed(0)
    make, shape, expected, others = CASES[name]
    model = make()
    kinds = {path: type(module) for path, module in model.named_modules()}
    x = torch.randn(2, *shape)
    report = convert(model, progress=False)
    assert len(report.converted) == expected, str(report)
    assert report.parameters_after < report.parameters_before
    assert all(layer.parameters_after < layer.parameters_before for layer in report.converted)

    target = torch.randn_like(tensor_of(model.train()(x, *others)))
    loss, gained = step(model, lambda: tensor_of(model(x, *others)), target)
    assert 0.5e-3 < gained / loss < 1.5e-3
    for path, layer in model.named_modules():
        if isinstance(layer, HyperConvNd) and not path.startswith("aux"):  # whose loss is another one
            gradients = [parameter.grad for parameter in layer.parameters()]
            assert all(g is not None and g.isfinite().all() for g in gradients), path

    model.eval()
    with torch.no_grad():
        output = tensor_of(model(x, *others))
        again = tensor_of(materialize(model, inplace=False)(x, *others))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folded = materialize(model, inplace=False, fuse_batch_norm=True)
        fused = tensor_of(folded(x, *others))
    materialize(model)
    assert output.isfinite().all() and output.abs().max() > 0
    scale = output.abs().max()
    for other in (again, fused):
        assert (other - output).abs().max() <= 1e-4 * scale
    for path, module in model.named_modules():
        assert kinds[path] is type(module) or isinstance(module, kinds[path].__base__), path


@pytest.mark.parametrize("name", ["resnet18", "smp unet", "googlenet"])
def test_the_batch_norms_behind_hyper_convolutions_are_folded(name: str) -> None:
    model = CASES[name].make().eval()
    report = convert(model, progress=False)
    count = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        materialize(model, fuse_batch_norm=True)
    stay = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    heads = sum(row.name.startswith("segmentation_head") for row in report.converted)  # without a norm
    assert count - stay == len(report.converted) - heads
