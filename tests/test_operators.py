"""Every backend, algorithm, geometry and layout against the float64 oracle, with all gradients."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

from hyperconv_ext import functional, ops, planner
from hyperconv_ext.geometry import Geometry

from .conftest import (
    FUSED,
    ON_GPU,
    backend_algorithms,
    dtypes_of,
    interpreted,
    precision_of_the_framework,
)
from .oracle import CASES, NAMES, Case, check, draw, evaluate, floor_of_sums, lay_out
from .planning import shares_of

LAYOUT_CASES = [case for case in CASES if case.name in ("3x3", "stride and dilation", "aligned")]


def _compare(case: Case, backend: str, algorithm: str, dtype: torch.dtype, layout: str, device) -> None:
    # Both names of triton's algorithms share the coefficient and basis gradients: once is enough.
    gradients = 1 if algorithm == "direct" else 4
    tensors = draw(case, dtype, device)
    wide = [t.double() for t in tensors]
    with torch.no_grad():
        shape = functional.basis_conv2d(*wide, *case.arguments, backend="reference").shape
    cotangent = torch.randn(shape, device=device).to(dtype).double()
    truth = evaluate(case, wide, cotangent, "contiguous", gradients, backend="reference")
    own = evaluate(case, tensors, cotangent, "contiguous", gradients, backend="reference")
    choice = {"backend": backend, "algorithm": algorithm}
    with precision_of_the_framework(device) if backend == "cuda" else nullcontext():
        actual = evaluate(case, tensors, cotangent, layout, gradients, **choice)
    for name, *values in zip(NAMES, actual, truth, own, strict=False):
        # The library sums this gradient over images, channels and positions at once: oneDNN, on one
        # thread, in their order. In the other dtypes the floor is far above that.
        in_order = (backend, name, dtype) == ("composite", "basis", torch.float32)
        terms = case.batch * case.in_channels * shape[2:].numel() if in_order else 0
        check(name, *values, floor=floor_of_sums(dtype, terms))


def _grid() -> list[tuple[str, str, Case]]:
    """All cases; `direct` only up to 7x7, where it is meant to be used."""
    return [
        (backend, algorithm, case)
        for backend, algorithm in backend_algorithms()
        for case in CASES
        if algorithm != "direct" or math.prod(case.kernel) <= 49
    ]


# Of each in the interpreter there is a smaller one of its kind.
LARGE = ("7x7", "9x13", "dilation 3", "unused trailing rows", "rank 32", "aligned, large")
LARGE += ("aligned, strided", "stride beyond kernel", "5x5", "1x9", "9x1", "stride 2", "depthwise")


@interpreted(lambda row: row["case"].name in LARGE)
@pytest.mark.parametrize(("backend", "algorithm", "case"), _grid(), ids=str)
def test_all_geometries(backend: str, algorithm: str, case: Case, device, poisoned) -> None:
    dtypes = dtypes_of(backend, device)
    for dtype in dtypes[1:] if algorithm == "direct" else dtypes:
        _compare(case, backend, algorithm, dtype, "channels_last", device)


@interpreted(lambda row: row["layout"] == "contiguous" or row["case"].name == "aligned")
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("backend", "algorithm"), backend_algorithms())
def test_any_strides(case: Case, backend: str, algorithm: str, layout: str, device, poisoned) -> None:
    for dtype in dtypes_of(backend, device)[:2]:
        _compare(case, backend, algorithm, dtype, layout, device)


@pytest.mark.parametrize(("backend", "algorithm"), backend_algorithms())
def test_output_follows_the_inputs_layout(backend: str, algorithm: str, device) -> None:
    tensors = draw(CASES[0], torch.float32, device)
    choice = {"backend": backend, "algorithm": algorithm}
    contiguous = functional.basis_conv2d(*tensors, **choice)
    assert contiguous.is_contiguous()
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    assert functional.basis_conv2d(*tensors, **choice).is_contiguous(memory_format=torch.channels_last)


def _atomic_gradients(case: Case, backend: str, device) -> list[bool]:
    """Whether the gradients of A and of phi are summed by atomic additions."""
    input, coefficients, basis, _ = draw(case, torch.float32, device)
    output = functional.basis_conv2d(input, coefficients, basis, None, *case.arguments)
    padding = (case.padding,) * 2
    geometry = Geometry.conv(case.size, case.kernel, (1, 1), padding, (1, 1), 1)
    plans = [
        planner.plan(ops.problem_of(slot, (output, input, last), geometry), backend)
        for slot, last in ((2, basis), (3, coefficients))
    ]
    return [shares_of(plan)[1] for plan in plans]


@interpreted(lambda row: row["case"].name == "in a workspace")
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case("in a workspace", 3, 4, 4, 3, (24, 20), (3, 3), padding=1),
        Case("by atomic additions", 1, 1, 2, 1, (17, 20), (1, 1)),
    ],
    ids=str,
)
def test_gradients_sum_in_shares(
    case: Case, deterministic: bool, backend: str, device, poisoned
) -> None:
    """Enough outputs for several shares, in a workspace or by atomic additions."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        _compare(case, backend, "basis", torch.float32, "channels_last", device)
        atomic = _atomic_gradients(case, backend, device)
        assert atomic == [case.name == "by atomic additions" and not deterministic] * 2
        runs = []
        for _ in range(2):
            torch.manual_seed(1)
            tensors = draw(case, torch.float32, device)
            runs.append(evaluate(case, tensors, None, "channels_last", backend=backend))
    finally:
        torch.use_deterministic_algorithms(False)
    if deterministic:
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", ["reference", "composite", *FUSED])
@pytest.mark.parametrize("empty", ["batch", "in_channels"])
def test_nothing_to_compute(backend: str, empty: str, device) -> None:
    batch, channels = (0, 3) if empty == "batch" else (2, 0)
    input = torch.randn(batch, channels, 6, 6, device=device, requires_grad=True)
    coefficients = torch.randn(4, channels, 2, device=device, requires_grad=True)
    basis = torch.randn(2, 3, 3, device=device, requires_grad=True)
    bias = torch.randn(4, device=device, requires_grad=True)
    output = functional.basis_conv2d(input, coefficients, basis, bias, backend=backend)
    assert torch.equal(output, bias.view(1, 4, 1, 1).expand(batch, 4, 4, 4))
    output.sum().backward()
    assert basis.grad is not None and not basis.grad.any()
    assert coefficients.grad is not None and coefficients.grad.shape == coefficients.shape


def test_problem_follows_either_tf32_switch(device) -> None:
    """The per-operator precision and the older boolean."""
    tensors = draw(CASES[0], torch.float32, device)[:3]
    geometry = Geometry.conv(CASES[0].size, CASES[0].kernel, (1, 1), (1, 1), (1, 1), 1)
    conv, before = torch.backends.cudnn.conv, torch.backends.cudnn.conv.fp32_precision
    seen = []
    try:
        for precision in ("ieee", "tf32"):
            conv.fp32_precision = precision
            seen.append(ops.problem_of(0, tensors, geometry).tf32)
        for allow in (False, True):
            torch.backends.cudnn.allow_tf32 = allow
            seen.append(ops.problem_of(0, tensors, geometry).tf32)
    finally:
        conv.fp32_precision = before
    assert seen == [False, True, False, True]


@pytest.mark.parametrize(
    ("channels", "groups", "layout", "aligned"),
    [
        (32, 1, "channels_last", True),
        (32, 2, "channels_last", True),
        (32, 4, "channels_last", False),
        (24, 1, "channels_last", False),
        (32, 1, "contiguous", False),
        (32, 1, "sliced", False),
    ],
)
def test_which_problems_are_aligned(channels: int, groups: int, layout: str, aligned: bool) -> None:
    case = Case("", 1, channels, 32, 3, (6, 7), (3, 3), groups=groups)
    input, coefficients, basis, _ = draw(case, torch.float32, torch.device("cpu"))
    geometry = Geometry.conv(case.size, case.kernel, (1, 1), (0, 0), (1, 1), groups)
    assert ops.problem_of(0, (lay_out(input, layout), coefficients, basis), geometry).aligned == aligned
