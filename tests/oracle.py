"""The truth (float64, by building W) and how far from it a backend may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperconv_ext import functional

# Allowed beside twice the framework's own error: one rounding of the result. In float64 the oracle is
# compared with another order of its own summations, thousands of terms long.
FLOOR = {
    torch.float64: 2.0**-46,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
NAMES = ("output", "input", "coefficients", "basis", "bias")


@dataclass(frozen=True)
class Case:
    """A 2-D convolution; sizes are small and odd on purpose."""

    name: str
    batch: int
    in_channels: int
    out_channels: int
    rank: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1

    def __str__(self) -> str:
        return self.name

    @property
    def arguments(self) -> tuple[object, ...]:
        return self.stride, self.padding, self.dilation, self.groups


CASES = (
    Case("3x3", 2, 3, 5, 3, (9, 11), (3, 3), padding=1),
    Case("5x5", 1, 4, 6, 5, (11, 13), (5, 5), padding=2),
    Case("7x7", 1, 17, 19, 5, (9, 10), (7, 7), padding=3),
    Case("9x13", 1, 2, 4, 5, (10, 17), (9, 13), padding=(4, 6)),
    Case("31x31", 1, 2, 3, 2, (5, 6), (31, 31), padding=15),
    Case("1x1", 2, 5, 7, 2, (6, 7), (1, 1)),
    Case("1x1, stride 2", 1, 5, 7, 3, (7, 6), (1, 1), stride=2),
    Case("1x9", 1, 3, 4, 4, (5, 19), (1, 9), padding=(0, 4)),
    Case("9x1", 1, 3, 4, 4, (19, 5), (9, 1), padding=(4, 0)),
    Case("even kernel, same", 1, 3, 4, 3, (7, 8), (4, 2), padding="same"),
    Case("stride 2", 1, 3, 4, 3, (12, 11), (3, 3), stride=2, padding=1),
    Case("stride beyond kernel", 1, 3, 4, 3, (14, 11), (2, 2), stride=(5, 3)),
    Case("dilation 3", 1, 3, 4, 3, (13, 12), (3, 3), padding=3, dilation=3),
    Case("stride and dilation", 1, 4, 3, 3, (16, 17), (3, 4), (3, 2), (1, 2), (2, 4)),
    Case("unused trailing rows", 1, 3, 4, 3, (12, 12), (3, 3), stride=4),
    Case("groups", 2, 6, 4, 5, (8, 7), (5, 4), stride=(2, 1), padding=(2, 0), groups=2),
    Case("depthwise", 1, 4, 4, 3, (7, 8), (3, 3), padding=1, groups=4),
    Case("rank 1", 1, 3, 4, 1, (8, 8), (5, 5), padding=2),
    Case("rank 32", 1, 3, 4, 32, (4, 4), (3, 3), padding=1),
    Case("rank beyond taps", 1, 3, 4, 9, (6, 7), (2, 2)),
    Case("kernel beyond input", 1, 3, 4, 3, (3, 4), (7, 7), padding=3),
    Case("one output", 2, 3, 4, 3, (5, 5), (5, 5)),
    Case("aligned", 2, 16, 32, 5, (9, 10), (5, 5), padding=2),
    Case("aligned, large", 1, 32, 16, 5, (7, 6), (11, 11), padding=5),
    Case("aligned, strided", 1, 16, 80, 3, (11, 12), (3, 3), stride=2, padding=1),
    Case("aligned groups", 1, 32, 32, 3, (6, 7), (5, 5), padding=2, groups=2),
)


def draw(case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """(input, coefficients, basis, bias), rounded to `dtype`."""
    shapes = (
        (case.batch, case.in_channels, *case.size),
        (case.out_channels, case.in_channels // case.groups, case.rank),
        (case.rank, *case.kernel),
        (case.out_channels,),
    )
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory layout."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        batch, channels, height, width = tensor.shape
        wide = tensor.new_full((batch, 2 * channels, height + 1, width + 3), float("nan"))
        view = wide[:, ::2, 1:, 2:-1]
        return view.copy_(tensor)
    return tensor.contiguous()


def evaluate(
    case: Case,
    tensors: list[Tensor],
    weight: Tensor | None,
    layout: str,
    gradients: int = 4,
    **choice: str,
) -> list[Tensor]:
    """Output and gradients by the first `gradients` tensors, for the cotangent `weight` (or ones)."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = functional.basis_conv2d(lay_out(leaves[0], layout), *leaves[1:], *case.arguments, **choice)
    cotangent = torch.ones_like(output) if weight is None else lay_out(weight.to(output.dtype), layout)
    return [output.detach(), *torch.autograd.grad(output, leaves[:gradients], cotangent)]


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """|actual - truth| / |truth| in the L2 norm; NaN stays NaN."""
    norm = truth.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return ((actual.double() - truth).norm() / norm).item()


def floor_of_sums(dtype: torch.dtype, terms: int) -> float:
    """Allowed beside twice the framework's error, where one sum of `terms` terms makes up the result.

    Added one after the other, n terms of either sign make partial sums of sqrt(j) times a term, each
    rounded by a fifth of 2**-23 of itself: together sqrt(n) / 7 times 2**-23 of the result. The
    framework's own error may be that of shorter sums of sums.
    """
    return FLOOR[dtype] * (1 + math.sqrt(terms) / 7)


def check(name: str, actual: Tensor, truth: Tensor, own: Tensor, floor: float | None = None) -> None:
    """Fail unless `actual` is within 2x of the framework's error `own` and points the same way.

    `floor`: allowed beside that, FLOOR of the dtype if not given.
    """
    assert actual.shape == truth.shape
    allowed = 2 * relative_error(own, truth) + (FLOOR[own.dtype] if floor is None else floor)
    error = relative_error(actual, truth)
    difference = (actual.double() - truth).abs()
    worst = torch.unravel_index(difference.nan_to_num(torch.inf).argmax(), difference.shape)
    where = tuple(int(index) for index in worst)
    assert error <= allowed, (
        f"{name}: relative error {error:.2e} > {allowed:.2e}; worst at {where}: "
        f"{actual[where].item():.6g} for {truth[where].item():.6g}"
    )
    # An L2 error e allows an angle of at most asin(e); a bias in one direction would show here.
    cosine = torch.nn.functional.cosine_similarity(actual.double().ravel(), truth.ravel(), dim=0)
    assert cosine.item() >= 1 - allowed**2 - 1e-12 or truth.norm() == 0, (
        f"{name}: cosine {cosine.item()}"
    )
