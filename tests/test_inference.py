"""What a layer keeps in evaluation is dropped when anything that decides it changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hyperconv_ext import (
    BasisTable,
    HyperConv1d,
    HyperConv2d,
    HyperConv3d,
    HyperConvTranspose2d,
    explain,
)
from hyperconv_ext.backends.cpu import library
from hyperconv_ext.modules import HyperConvNd, inference

from .oracle import relative_error

pytestmark = pytest.mark.skipif(bool(library.reason()), reason=library.reason())


class Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


def _layer(**options: Any) -> HyperConv2d:
    """One that builds W, and so keeps it in evaluation."""
    return HyperConv2d(8, 12, 5, padding=2, **{"backend": "reference"} | options).eval()


def _input(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 8, 9, 7)))


@torch.no_grad()
def _truth(layer: HyperConvNd, input: Tensor, *rest: Any) -> Tensor:
    """By a copy that keeps nothing."""
    return copy.deepcopy(layer).train()(input, *rest)


@torch.no_grad()
def _agrees(layer: HyperConvNd, input: Tensor, *rest: Any) -> None:
    for _ in range(2):
        assert relative_error(layer(input, *rest), _truth(layer, input, *rest)) < 1e-6


def _weights(layer: HyperConvNd) -> list[Tensor]:
    keeper = layer._keeper
    return [] if keeper is None or keeper.kernel is None else list(keeper.kernel.weights.values())


def _scale(name: str, factor: float = -1.0) -> Callable[[HyperConvNd], object]:
    """By a write that changes no version counter."""
    return lambda layer: layer.get_parameter(name).data.mul_(factor)


def _write_to_shared_memory(layer: HyperConvNd) -> None:
    layer.coefficients.detach().numpy()[0, 0, 0] += 1


def _step(layer: HyperConvNd) -> None:
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(layer.parameters(), 0.1).step()


def _load(layer: HyperConvNd) -> None:
    other = copy.deepcopy(layer)
    other.reset_parameters()
    layer.load_state_dict(other.state_dict())


def _replace(layer: HyperConvNd) -> None:
    layer.coefficients = nn.Parameter(torch.randn_like(layer.coefficients))


def _permute(layer: HyperConvNd) -> None:
    """The same numbers elsewhere."""
    layer.coefficients.data = layer.coefficients.data.flip(0).contiguous()


def _of_strides(layer: HyperConvNd) -> None:
    layer.coefficients.data = layer.coefficients.data.transpose(0, 1).contiguous().transpose(0, 1)


CHANGES: dict[str, Callable[[Any], object]] = {
    "A": _scale("coefficients"),
    "a weight of the MLP": _scale("hypernet.layers.1.weight", 1.5),
    "a bias of the MLP": _scale("hypernet.layers.0.bias", 1.5),
    "a bias": _scale("bias"),
    "the mixing": lambda layer: layer.mixing.weight.mul_(2),
    "shared memory": _write_to_shared_memory,
    "a step": _step,
    "a state": _load,
    "another parameter": _replace,
    "an order": _permute,
    "strides": _of_strides,
    "a draw": lambda layer: layer.reset_parameters(),
    "the activation": lambda layer: setattr(layer.hypernet, "activation", "tanh"),
    "the gain": lambda layer: setattr(layer.hypernet, "weight_gain", 0.5),
    "the coordinates": lambda layer: setattr(layer, "coordinates", "centered"),
    "a hook": lambda layer: layer.hypernet.register_forward_hook(lambda *args: 2 * args[2]),
    "a parametrization": lambda layer: parametrize.register_parametrization(
        layer, "coefficients", Doubled()
    ),
    "the stride": lambda layer: setattr(layer, "stride", 2),
    "the padding": lambda layer: setattr(layer, "padding", 0),
    "the padding mode": lambda layer: setattr(layer, "padding_mode", "circular"),
    "no bias": lambda layer: setattr(layer, "bias", None),
    "the format": lambda layer: layer.to(memory_format=torch.channels_last),
}
SAME = {"the format", "strides"}  # which change nothing but how it is stored


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_kernel_drops_it(change: str) -> None:
    layer, input = _layer(), _input()
    _agrees(layer, input)
    assert len(_weights(layer)) == 1
    before = _truth(layer, input)
    with torch.no_grad():
        CHANGES[change](layer)
    _agrees(layer, input)
    after = _truth(layer, input)
    same = after.shape == before.shape and relative_error(after, before) < 1e-6
    assert same == (change in SAME)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("parametrization", ["orthonormal", "published"])
def test_a_norm(parametrization: str, name: str) -> None:
    layer = _layer(weight_norm="batch", parametrization=parametrization)
    input = _input()
    _agrees(layer, input)
    assert len(_weights(layer)) == 1
    layer.get_parameter(f"weight_norm.{name}").data.add_(1)
    _agrees(layer, input)
    assert layer.weight_norm is not None
    layer.weight_norm.eps = 0.1
    _agrees(layer, input)
    layer.weight_norm.register_forward_hook(lambda *args: 2 * args[2])
    _agrees(layer, input)


def test_a_norm_is_computed_once_where_w_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, input = _layer(weight_norm="batch", backend="cpu"), _input()
    calls = []
    kernel = HyperConvNd.kernel
    monkeypatch.setattr(HyperConvNd, "kernel", lambda self: calls.append(self) or kernel(self))
    with torch.no_grad():
        outputs = [layer(input) for _ in range(3)]
    assert len(calls) == 1 and not _weights(layer)
    assert relative_error(outputs[-1], _truth(layer, input)) < 1e-5


CASES: dict[str, tuple[Callable[[], HyperConvNd], tuple[int, ...]]] = {
    "1d": (lambda: HyperConv1d(4, 6, 5, padding="same", backend="reference"), (2, 4, 11)),
    "3d": (lambda: HyperConv3d(2, 3, 3, stride=2, backend="reference"), (2, 2, 7, 8, 9)),
    "groups": (lambda: HyperConv2d(8, 12, 3, groups=4, backend="reference"), (2, 8, 9, 7)),
    "same, even": (lambda: HyperConv2d(3, 4, 4, padding="same", backend="reference"), (2, 3, 9, 7)),
    "one tap": (lambda: HyperConv2d(3, 4, 1, backend="reference"), (2, 3, 9, 7)),
    "reflected": (
        lambda: HyperConv2d(3, 4, 3, padding=1, padding_mode="reflect", backend="reference"),
        (2, 3, 9, 7),
    ),
    "transposed": (
        lambda: HyperConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2, backend="reference"),
        (2, 4, 5, 6),
    ),
    "no batch": (lambda: HyperConv2d(3, 4, 3, backend="reference"), (3, 9, 7)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_geometry(case: str) -> None:
    make, shape = CASES[case]
    layer = make().eval()
    for dtype in (torch.float32, torch.float64):
        layer.to(dtype)
        _agrees(layer, torch.randn(shape, dtype=dtype))
    assert _weights(layer)


@torch.no_grad()
def test_no_example() -> None:
    assert _layer()(_input(0, 8, 9, 7)).shape == (0, 12, 9, 7)


def test_an_output_size() -> None:
    layer = HyperConvTranspose2d(4, 6, 3, stride=2, backend="reference").eval()
    input = torch.randn(2, 4, 5, 6)
    for size in ((11, 13), (12, 14)):
        _agrees(layer, input, size)
        with torch.no_grad():
            assert layer(input, size).shape[2:] == size


def test_the_format_is_that_of_the_input() -> None:
    layer, input = _layer(), _input()
    with torch.no_grad():
        for _ in range(2):
            assert layer(input).is_contiguous()
            last = layer(input.to(memory_format=torch.channels_last))
            assert last.is_contiguous(memory_format=torch.channels_last)
    assert len(_weights(layer)) == 2


def test_casts() -> None:
    layer, input = _layer(), _input()
    with torch.no_grad():
        wide = layer(input)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                narrow = layer(input)
                assert narrow.dtype == torch.bfloat16
        assert torch.equal(layer(input), wide)
        assert relative_error(narrow, wide) < 0.02
        assert {weight.dtype for weight in _weights(layer)} == {torch.float32, torch.bfloat16}
        layer.bfloat16()
        assert layer(input.bfloat16()).dtype == torch.bfloat16
        with pytest.raises(TypeError, match="input"):
            layer(input)


def test_training_gives_the_memory_back_and_gradients_see_the_parameters() -> None:
    layer, input = _layer(), _input()
    with torch.no_grad():
        layer(input)
    layer(input).sum().backward()
    assert layer.coefficients.grad is not None
    layer.train()
    assert layer._keeper is None
    with torch.no_grad():
        layer(input)
    assert not _weights(layer)


def test_inference_mode_and_no_grad_take_the_same() -> None:
    layer, input = _layer(), _input()
    with torch.inference_mode():
        first = layer(input)
    (weight,) = _weights(layer)
    assert not weight.is_inference()
    with torch.no_grad():
        second = layer(input)
    assert _weights(layer)[0] is weight
    assert torch.equal(first, second) and not second.is_inference()


def test_copies_begin_without() -> None:
    layer, input = _layer(), _input()
    with torch.no_grad():
        expected = layer(input)
        for copied in (
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            layer.with_kernel_size(5),
        ):
            assert not _weights(copied)
            assert relative_error(copied(input), expected) < 1e-6
    assert not any("keep" in name for name in layer.state_dict())


def test_transforms_and_subclasses_compute() -> None:
    layer = _layer()
    inputs = torch.stack([_input(), _input()])
    with torch.no_grad():
        layer(inputs[0])
        expected = torch.stack([layer(one) for one in inputs])
        assert relative_error(torch.vmap(layer)(inputs), expected) < 1e-6

    class Own(HyperConv2d):
        factor = 1.0

        def kernel(self) -> tuple[Tensor, Tensor]:
            coefficients, basis = super().kernel()
            return self.factor * coefficients, basis

    own = Own(8, 12, 3, weight_norm="batch", backend="reference").eval()
    with torch.no_grad():
        before = own(inputs[0])
        own.factor = 2.0
        assert not torch.equal(own(inputs[0]), before)


def test_a_layer_whose_own_network_is_unknown_keeps_nothing() -> None:
    network = nn.Sequential(nn.Linear(2, 4), nn.Tanh())
    layer = _layer(hypernet=network)
    _agrees(layer, _input())
    assert not _weights(layer)


@pytest.mark.parametrize("parametrization", ["orthonormal", "published"])
def test_a_table(parametrization: str) -> None:
    layer = _layer(hypernet=BasisTable((5, 5)), parametrization=parametrization)
    input = _input()
    _agrees(layer, input)
    assert len(_weights(layer)) == 1
    layer.hypernet.table.data.mul_(2)
    _agrees(layer, input)
    if layer.mixing is not None:
        layer.mixing.bias.add_(1)
        _agrees(layer, input)
    layer.hypernet.register_forward_hook(lambda *args: 2 * args[2])
    _agrees(layer, input)


def test_auto_builds_w_where_it_need_not_build_it_again() -> None:
    layer = HyperConv2d(128, 128, 1, backend="auto").eval()
    input = torch.randn(2, 128, 32, 32)
    _agrees(layer, input)
    assert _weights(layer)
    assert "keeps the weight between calls" in explain(layer, input)
    assert "builds the weight" in explain(layer.train(), input)
    large = HyperConv2d(16, 16, 11, padding=5).eval()
    with torch.no_grad():
        large(input[:, :16])
    assert not _weights(large)
    assert "keeps" not in explain(large, input[:, :16])


def test_many_sizes_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_MOST_CONVOLVERS", 3)
    layer = _layer()
    for size in range(4, 10):
        _agrees(layer, _input(1, 8, size, size))
        assert len(layer._keeper.convolvers) <= 3


def test_errors_stay_ours() -> None:
    layer = _layer()
    with torch.no_grad():
        layer(_input())
        with pytest.raises(ValueError, match="input: expected 8 channels"):
            layer(_input(2, 7, 9, 7))
        layer.algorithm = "fft"
        with pytest.raises(RuntimeError, match="algorithm='fft' is not one of backend='reference'"):
            layer(_input())


@pytest.mark.parametrize("level", library.CAPABILITIES)
def test_a_digest_sees_every_bit(level: str) -> None:
    engine = library._engine()
    if engine.hyperconv_cpu_start(level.encode(), None) is None:
        pytest.skip(f"this processor does not run {level}")
    try:
        _see_every_bit()
    finally:
        library._load.cache_clear()
        library._engine.cache_clear()


def _see_every_bit() -> None:
    for size in (1, 7, 8, 255, 256, 257, 1000):
        block = torch.randint(0, 256, (size,), dtype=torch.uint8)

        def digest(block: Tensor = block) -> int:
            return library.digest([block.data_ptr()], [block.numel()])

        seen = {digest()}
        for byte in {0, size // 2, size - 1}:
            for bit in range(8):
                block[byte] ^= 1 << bit
                seen.add(digest())
                block[byte] ^= 1 << bit
        assert len(seen) == 1 + 8 * len({0, size // 2, size - 1})
        longer = torch.cat([block, block.new_zeros(1)])
        assert digest(longer) not in seen
    values = torch.randn(64)
    seen = set()
    for changed in (values, -values, values.flip(0), values.roll(1), values.roll(32), 2 * values):
        kept = changed.contiguous()
        seen.add(library.digest([kept.data_ptr()], [kept.nbytes]))
    assert len(seen) == 6
    halves = values[:32], values[32:]
    apart = library.digest([half.data_ptr() for half in halves], [half.nbytes for half in halves])
    assert apart not in seen
