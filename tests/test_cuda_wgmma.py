"""csrc/basis_conv_sm90.cu: against the oracle, what it refuses, and faults put in on purpose.

Where the kernels are executed by the CPU, in both modes of tests/host/asynchronous.h.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hyperconv_ext import functional, ops, planner
from hyperconv_ext.backends import cuda
from hyperconv_ext.backends.cuda import library, wgmma
from hyperconv_ext.geometry import Geometry
from hyperconv_ext.problem import Device, Problem

from .oracle import check, relative_error

SOURCE = Path(__file__).parent.parent / "csrc" / "basis_conv_sm90.cu"


def _why_not() -> str:
    if library.reason() or library.executes_on_cpu():
        return library.reason()
    capability = torch.cuda.get_device_capability()
    here = capability == (9, 0) and "90a" in library.architectures()
    return (
        "" if here else f"needs sm_90a, this is sm_{capability[0]}{capability[1]}, {library.describe()}"
    )


runs = pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "-")
hosted = pytest.mark.skipif(
    not library.executes_on_cpu(), reason="the library does not execute the kernels on the CPU"
)
MODES = ["late", "eager"] if library.executes_on_cpu() else ["GPU"]


@pytest.fixture(params=MODES, autouse=True)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HYPERCONV_HOST_EAGER", str(int(request.param == "eager")))
    return request.param


class Case(NamedTuple):
    kernel: tuple[int, int]
    channels: int
    size: tuple[int, int]
    batch: int = 1
    rank: int = 5
    padding: int = 0
    bias: bool = True

    def __str__(self) -> str:
        kernel, size = ("x".join(map(str, pair)) for pair in (self.kernel, self.size))
        return f"{kernel}-c{self.channels}-{size}-b{self.batch}-r{self.rank}-p{self.padding}"


CASES = [
    *(Case((k, k), c, (17, 11), padding=k // 2) for k in (5, 7, 11) for c in wgmma.CHANNELS),
    Case((7, 7), 64, (8, 8), padding=3),  # one square
    Case((7, 7), 64, (7, 7), bias=False),  # one output
    Case((7, 7), 64, (33, 25), 2, padding=3, bias=False),  # several rounds of a persistent block
    Case((3, 3), 64, (12, 9), 3, rank=1, padding=1),
    Case((1, 6), 128, (9, 20), rank=4, padding=2),  # a kernel smaller than its shape
    Case((11, 2), 64, (18, 11), rank=2, padding=5),
    Case((5, 5), 64, (9, 16), padding=6),  # outputs that read nothing but zeros
]


def draw(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    channels, taps = case.channels, case.kernel[0] * case.kernel[1]
    input = torch.randn(case.batch, channels, *case.size, device=device).to(dtype)
    coefficients = (torch.randn(channels, channels, case.rank, device=device) / channels**0.5).to(dtype)
    basis = torch.randn(case.rank, *case.kernel, device=device) / taps**0.5
    bias = torch.randn(channels, device=device).to(dtype)
    return input.contiguous(memory_format=torch.channels_last), coefficients, basis, bias


@runs
@pytest.mark.parametrize(
    ("dtype", "transposed"), [(torch.bfloat16, False), (torch.float16, True)], ids=str
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(case: Case, dtype, transposed: bool, mode, device, poisoned) -> None:
    """The operator, and the input gradient's, which is that of a transposed convolution."""
    input, coefficients, basis, bias = draw(case, dtype, device)
    convolve = functional.basis_conv_transpose2d if transposed else functional.basis_conv2d

    def result(backend: str, algorithm: str, type: torch.dtype) -> Tensor:
        offset = bias.to(type) if case.bias else None
        phi = basis.double() if type is torch.float64 else basis
        operands = (input.to(type), coefficients.to(type), phi, offset)
        choice: dict[str, Any] = {"backend": backend, "algorithm": algorithm}
        return convolve(*operands, padding=case.padding, **choice)

    actual = result("cuda", "wgmma", dtype)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    truth = result("reference", "auto", torch.float64)
    check(str(case), actual, truth, result("reference", "auto", dtype))


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_basis_of_an_mlp(dtype: torch.dtype, device, poisoned) -> None:
    """phi is evaluated by a launch of its own."""
    case = Case((7, 7), 64, (10, 9), padding=3)
    input, coefficients, _, bias = draw(case, dtype, device)
    weights = [torch.randn(b, a, device=device).to(dtype) for a, b in ((2, 8), (8, 4))]
    biases = [torch.randn(width, device=device).to(dtype) for width in (8, 4)]

    def result(**choice: Any) -> Tensor:
        operands = (input, coefficients, weights, biases, case.kernel, bias)
        return functional.hyper_conv2d(*operands, padding=3, **choice)

    actual = result(backend="cuda", algorithm="wgmma")
    assert relative_error(actual, result(backend="reference").double()) < 2.0**-6


@runs
def test_overflow_of_z_in_float16(device, poisoned) -> None:
    """phi is scaled by a power of two, A against it: |z| stays below the largest input."""
    case = Case((7, 7), 64, (9, 9), padding=3, bias=False)
    input, coefficients, basis, _ = draw(case, torch.float16, device)
    basis, coefficients = basis * 2.0**14, coefficients * 2.0**-12
    options = {"padding": 3, "backend": "cuda", "algorithm": "wgmma"}
    actual = functional.basis_conv2d(input, coefficients, basis, **options)
    wide = (input.double(), coefficients.double(), basis.double())
    truth = functional.basis_conv2d(*wide, padding=3, backend="reference")
    assert relative_error(actual, truth) < 2.0**-9


# What it refuses.

H100 = Device("cuda", 90, 132)
PROBLEM = Problem(
    "basis_conv_fwd",
    Geometry.conv((56, 56), (7, 7), (1, 1), (3, 3), (1, 1), 1),
    *(32, 64, 64, 5),
    dtype="bfloat16",
    device=H100,
    aligned=True,
)


def _geometry(kernel=(7, 7), stride=(1, 1), dilation=(1, 1), groups=1) -> Geometry:
    return Geometry.conv((56, 56), kernel, stride, (3, 3), dilation, groups)


REFUSED = [
    ({"op": "basis_conv_bwd_coeff"}, "it computes no basis_conv_bwd_coeff"),
    ({"op": "basis_conv_bwd_basis"}, "it computes no basis_conv_bwd_basis"),
    ({"dtype": "float32"}, "it takes float16 and bfloat16, not float32"),
    ({"geometry": Geometry.conv((9,), (3,), (1,), (1,), (1,), 1)}, "it takes 2 spatial axes, not 1"),
    ({"geometry": _geometry(stride=(1, 2))}, "it takes stride 1, dilation 1 and one group"),
    ({"geometry": _geometry(dilation=(2, 1))}, "it takes stride 1, dilation 1 and one group"),
    ({"geometry": _geometry(groups=2)}, "it takes stride 1, dilation 1 and one group"),
    ({"in_channels": 128}, "it takes 64 or 128 channels in and as many out, not 128 and 64"),
    ({"in_channels": 32, "out_channels": 32}, "it takes 64 or 128 channels in"),
    ({"rank": 6}, "it takes up to 5 basis functions, not 6"),
    ({"geometry": _geometry((7, 13))}, "it takes kernels up to 11 along an axis"),
    ({"aligned": False}, "its activations must be channels last"),
    ({"batch": 2**28}, "squares of outputs are more than"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=str)
def test_refuses(change: dict[str, Any], reason: str) -> None:
    assert wgmma.reason(PROBLEM) == ""
    assert wgmma.reason(dataclasses.replace(PROBLEM, **change)).find(reason) >= 0


def test_needs_hopper_and_its_own_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("reason", ""), ("executes_on_cpu", False), ("supports", True)):
        monkeypatch.setattr(library, name, lambda *_, value=value: value)
    monkeypatch.setattr(library, "_load", lambda: ("80,90,100+PTX", ""))
    assert "rebuild it with TORCH_CUDA_ARCH_LIST=9.0a" in cuda.can_run(PROBLEM, "wgmma")[1]
    monkeypatch.setattr(library, "_load", lambda: ("80,90a,100+PTX", ""))
    assert cuda.can_run(PROBLEM, "wgmma") == (True, "")
    blackwell = dataclasses.replace(PROBLEM, device=Device("cuda", 100, 148))
    assert "it needs compute capability 9.0, this GPU has 10.0" in cuda.can_run(blackwell, "wgmma")[1]
    plan = planner.plan.__wrapped__(PROBLEM, "cuda", "auto")
    assert plan.algorithm == "wgmma" and plan.tile.name.startswith("basis_conv_sm90-half-o64-r5")
    # Of 64 outputs and 16 channels: z of 7 x 16 positions, 5 functions of 16 outputs; then y of all.
    squares = 32 * 7 * 7
    assert cuda.flops(plan) == 2 * squares * 4 * 64 * 16 * (7 * 80 + 5 * 64)
    small = dataclasses.replace(PROBLEM, in_channels=32, out_channels=32)
    assert planner.plan.__wrapped__(small, "cuda", "auto").algorithm == "basis"


@runs
def test_a_tile_that_is_none_of_the_librarys(device) -> None:
    """The planner's arithmetic and the kernel's own: a difference is refused, not overrun."""
    case = Case((7, 7), 64, (8, 8))
    operands = draw(case, torch.bfloat16, device)
    geometry = Geometry.conv(case.size, case.kernel, (1, 1), (0, 0), (1, 1), 1)
    problem = ops.problem_of(0, operands[:3], geometry)
    plan = planner.plan(problem, "cuda", "wgmma")
    for change in ({"shared_bytes": plan.tile.shared_bytes - 8}, {"slice": 5}, {"patch_width": 16}):
        wrong = dataclasses.replace(plan, tile=dataclasses.replace(plan.tile, **change))
        with pytest.raises(RuntimeError, match="basis_conv_sm90: the planned tile is not one"):
            cuda.basis_conv_fwd(wrong, *operands)


# Faults put in on purpose: every wait, arrival, fence, barrier, commit and copy taken out in turn.

_CALL = re.compile(
    r"ptx::(?:mbarrier_\w+|fence_\w+|bulk_load|tensor_\w+|store_\w+|wgmma_\w+)[(<]|__sync\w+\("
)
SITES = [n for n, line in enumerate(SOURCE.read_text().splitlines(), 1) if _CALL.search(line)]


def _errors() -> float:
    """The largest relative error with A resident and streamed, of blocks with several rounds of work."""
    errors = []
    for case in (Case((7, 7), 64, (19, 13), 5, padding=3), Case((7, 7), 128, (19, 13), 3, padding=3)):
        operands = draw(case, torch.bfloat16, torch.device("cpu"))
        options = {"padding": case.padding, "backend": "cuda", "algorithm": "wgmma"}
        actual = functional.basis_conv2d(*operands, **options)
        wide = (operand.double() for operand in operands)
        truth = functional.basis_conv2d(*wide, padding=case.padding, backend="reference")
        errors.append(relative_error(actual, truth))
    return max(torch.inf if math.isnan(error) else error for error in errors)


@hosted
def test_without_a_fault() -> None:
    assert _errors() < 2.0**-7


@hosted
@pytest.mark.parametrize("mode", ["late"], indirect=True)
@pytest.mark.parametrize("line", SITES)
def test_what_is_taken_out_is_noticed(line: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERCONV_HOST_SKIP", f"{SOURCE.name}:{line}")
    for seed in range(4):
        monkeypatch.setenv("HYPERCONV_HOST_SEED", str(seed))
        try:
            error = _errors()
        except RuntimeError:
            return
        if not error < 2.0**-7:
            return
    pytest.fail(f"taking out line {line} of {SOURCE.name} changed nothing")
