"""A layer of another kernel size has the same learned function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from .test_dimensions import every_kind, small_layer


@every_kind
def test_centered_kernel_with_more_taps(dims: int, transposed: bool) -> None:
    """The same function: on the taps that both have the weights agree."""
    conv = small_layer(dims, transposed, coordinates="centered")
    larger = conv.with_kernel_size(9)
    assert type(larger) is type(conv) and larger.kernel_size == (9,) * dims
    common = (..., *(slice(2, 7),) * dims)
    torch.testing.assert_close(larger.weight[common], conv.weight)
    back = larger.with_kernel_size(5)
    torch.testing.assert_close(back.weight, conv.weight)
    assert repr(back) == repr(conv)


@every_kind
def test_centered_kernel_with_dilation(dims: int, transposed: bool) -> None:
    """Taps at the same distances in the input have the same weight."""
    conv = small_layer(dims, transposed, coordinates="centered")
    wide = conv.with_kernel_size(3, dilation=2)
    assert wide.dilation == (2,) * dims and wide.tap_spacing == (2.0,) * dims
    torch.testing.assert_close(wide.weight, conv.weight[(..., *(slice(None, None, 2),) * dims)])
    assert not torch.allclose(conv.with_kernel_size(3).weight, wide.weight)
    dense = wide.with_kernel_size(5, dilation=1)
    torch.testing.assert_close(dense.weight, conv.weight)
    half = small_layer(dims, transposed, dilation=4, coordinates="centered").with_kernel_size(
        9, dilation=2
    )
    assert half.tap_spacing == (0.5,) * dims


@pytest.mark.parametrize("parametrization", ["orthonormal", "published"])
@pytest.mark.parametrize("weight_norm", [None, "batch"])
@every_kind
def test_unit_kernel_is_stretched(
    dims: int, transposed: bool, weight_norm: str | None, parametrization: str
) -> None:
    options = {"weight_norm": weight_norm, "parametrization": parametrization}
    conv = small_layer(dims, transposed, coordinates="unit", **options)
    larger = conv.with_kernel_size(9)
    torch.testing.assert_close(larger.weight[(..., *(slice(None, None, 2),) * dims)], conv.weight)
    other = conv.with_kernel_size(4, dilation=3)
    ends = (..., *(slice(None, None, 3),) * dims)
    torch.testing.assert_close(other.weight[ends], conv.weight[(..., *(slice(None, None, 4),) * dims)])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_padding_of_another_kernel_size(dims: int) -> None:
    input = torch.randn(1, 2, *(12,) * dims, dtype=torch.float64)
    conv = small_layer(dims, False, padding="same")
    assert conv.with_kernel_size(8)(input).shape == conv(input).shape
    assert conv.with_kernel_size(9, dilation=1, padding=1)(input).shape[2:] == (6,) * dims
    fixed = small_layer(dims, False, padding=2)
    assert fixed.with_kernel_size(3).padding == (2,) * dims
    larger = conv.with_kernel_size(9)
    dense = getattr(F, f"conv{dims}d")
    torch.testing.assert_close(larger(input), dense(input, larger.weight, larger.bias, padding="same"))


@every_kind
def test_another_kernel_size_is_a_copy(dims: int, transposed: bool) -> None:
    conv = small_layer(dims, transposed, weight_norm="batch").eval()
    other = conv.with_kernel_size(7)
    assert not other.training and other.weight.shape[2:] == (7,) * dims
    before, after = conv.state_dict(), other.state_dict()
    assert before.keys() == after.keys()
    for key in before:
        if "weight_norm" not in key:  # which is told what the kernel's mean and variance were
            assert torch.equal(before[key], after[key])
        assert before[key].data_ptr() != after[key].data_ptr()
    kept = conv.weight.detach().clone()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert torch.equal(conv.weight, kept)
    conv.load_state_dict(after)
    with pytest.raises(ValueError, match=r"^kernel_size: expected an integer or"):
        conv.with_kernel_size(0)
    with pytest.raises(ValueError, match=r"^dilation: expected an integer or"):
        conv.with_kernel_size(3, dilation=0)
