"""Which layers `convert` leaves as they are, and the reason that it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from .converting import quietly, reason


def computed(wrap: Callable[[nn.Module], Any]) -> nn.Module:
    conv = nn.Conv2d(16, 16, 3)
    wrap(conv)
    return conv


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        torch.nn.utils.spectral_norm,
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    ],
)
def test_computed_weights_are_left(wrap: Callable[[nn.Module], Any]) -> None:
    assert "its weight is computed" in reason(computed(wrap))


def test_a_computed_bias_is_named() -> None:
    conv = nn.Conv2d(16, 16, 3)
    nn.utils.parametrize.register_parametrization(conv, "bias", nn.Identity())
    assert "its bias is computed" in reason(conv)


def test_tied_weights_are_left_and_named() -> None:
    model = nn.ModuleDict(
        {"a": nn.Conv2d(16, 16, 3), "b": nn.Conv2d(16, 16, 3), "c": nn.Conv2d(16, 16, 3)}
    )
    model["b"].weight = model["a"].weight
    model["c"].bias = model["a"].bias
    report = quietly(model)
    assert [layer.reason for layer in report.layers] == [
        "its weight shares its memory with b.weight",
        "its weight shares its memory with a.weight",
        "",
    ]
    assert model["c"].bias is model["a"].bias and model["b"].weight is model["a"].weight


def test_overlapping_memory_is_tied_and_neighbours_are_not() -> None:
    first, second = nn.Conv1d(4, 8, 31), nn.Conv1d(4, 4, 31)
    second.weight = nn.Parameter(first.weight.data[:4])
    assert "shares its memory with 1.weight" in reason(nn.Sequential(first, second), "0")
    model = nn.Sequential(nn.Conv1d(4, 8, 31), nn.Conv1d(8, 4, 31))
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())
    assert not quietly(model).left
    meta = nn.Sequential(nn.Conv1d(4, 8, 31, device="meta"), nn.Conv1d(4, 8, 31, device="meta"))
    assert not quietly(meta).left


def with_weight_hook() -> nn.Module:
    conv = nn.Conv2d(16, 16, 3)
    conv.weight.register_hook(lambda grad: grad)
    return conv


def with_accumulation_hook() -> nn.Module:
    conv = nn.Conv2d(16, 16, 3)
    conv.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return conv


def with_state_hook() -> nn.Module:
    conv = nn.Conv2d(16, 16, 3)
    conv.register_state_dict_post_hook(lambda *args: None)
    return conv


def with_own_forward() -> nn.Module:
    conv = nn.Conv2d(16, 16, 3)
    conv.forward = lambda x: x  # type: ignore[method-assign]
    return conv


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Cached(nn.Conv1d):
    """Pads by what it remembers of the first input."""

    pad: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.pad is None:
            self.pad = (x.shape[-1] % 2, 0)
        return super().forward(F.pad(x, self.pad))


class WithArgument(nn.Conv2d):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x)


class OnlyInTraining(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


class WithDropout(nn.Conv2d):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.drop = nn.Dropout(0.5).eval()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.drop(x))


class ByParts(nn.Conv3d):
    """The same for small inputs only."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() < 2**30:
            return super().forward(x)
        return torch.cat([super(ByParts, self).forward(part) for part in x.split(1)])


class OddlyPadded(nn.Conv1d):
    """By the size, and not as 'same' does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (x.shape[-1] % 3, 0)))


class OnesPadded(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (3, 3), value=1.0))


class ChannelPadded(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x[:, :-1], (0, 0, 0, 1)))


class OtherWeight(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.flip(0), self.bias)


class OwnApply(nn.Conv2d):
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return self


class WithBuffer(nn.Conv2d):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("mask", torch.ones(1))


class TransposedScaled(nn.ConvTranspose2d):
    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        return 2 * super().forward(input, output_size)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.LazyConv2d(16, 3), "lazy and not initialised"),
        (with_weight_hook, "its weight has hooks"),
        (with_accumulation_hook, "its weight has hooks"),
        (with_state_hook, "hooks on its state"),
        (with_own_forward, "its forward was replaced on the instance"),
        (lambda: OwnApply(16, 16, 3), "it defines _apply"),
        (lambda: WithBuffer(16, 16, 3), "tensors that a convolution has not: mask"),
        (lambda: nn.Conv2d(16, 16, 3, dtype=torch.complex64), "torch.complex64"),
        (lambda: nn.Conv2d(16, 0, 3), "no elements"),
        (lambda: Standardised(16, 16, 3), "test_convert_left.Standardised has a forward of its own"),
        (lambda: Scaled(16, 16, 3), "forward of its own"),
        (lambda: Cached(16, 16, 9), "forward of its own"),
        (lambda: WithArgument(16, 16, 3), "forward of its own"),
        (lambda: OnlyInTraining(16, 16, 3), "forward of its own"),
        (lambda: WithDropout(16, 16, 3), "forward of its own"),
        (lambda: ByParts(16, 16, 3), "forward of its own"),
        (lambda: OddlyPadded(16, 16, 9), "forward of its own"),
        (lambda: OnesPadded(16, 16, 9), "forward of its own"),
        (lambda: ChannelPadded(16, 16, 9), "forward of its own"),
        (lambda: OtherWeight(16, 16, 3), "forward of its own"),
        (lambda: TransposedScaled(16, 16, 3), "forward of its own"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")
def test_what_cannot_be_kept_is_left_and_named(make: Callable[[], nn.Module], why: str) -> None:
    conv = make()
    kind, keys = type(conv), list(vars(conv))
    assert why in reason(nn.Sequential(conv), "0")
    assert type(conv) is kind and list(vars(conv)) == keys


def test_other_kinds_of_convolutions_are_named() -> None:
    class Mixture(nn.Module):
        in_channels, out_channels, kernel_size = 3, 3, 3

    assert "Mixture is not one of torch.nn's" in reason(nn.Sequential(Mixture()), "0")
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(16, 16, 3)))
    assert "is not one of torch.nn's" in reason(scripted, "0")  # type: ignore[arg-type]


def test_changed_padding_that_the_module_does_not_follow() -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
    conv.padding = (2, 2)
    assert "padding was changed to (2, 2)" in reason(conv)


def test_sizes_and_settings_are_those_of_the_moment() -> None:
    conv = nn.Conv2d(3, 16, 7, stride=2)
    conv.weight = nn.Parameter(torch.randn(16, 8, 5, 5))  # in_channels and kernel_size still 3 and 7
    conv.stride, conv.padding = 1, 2  # type: ignore[assignment]
    x = torch.randn(1, 8, 9, 9)
    shape = conv(x).shape
    quietly(conv)
    assert conv(x).shape == shape
