"""The kernels by wgmma, csrc/*_sm90.cu: against the oracle, what they refuse, faults put in on purpose.

Where the kernels are executed by the CPU, in both modes of tests/host/asynchronous.h.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hyperconv_ext import functional, ops, planner
from hyperconv_ext.backends import cuda
from hyperconv_ext.backends.cuda import launch, library, wgmma
from hyperconv_ext.geometry import Geometry
from hyperconv_ext.problem import OPS, Device, Op, Problem

from .oracle import check, relative_error

SOURCES = Path(__file__).parent.parent / "csrc"


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
    """`outputs`: channels out, where they are not `channels`, those in."""

    kernel: tuple[int, int]
    channels: int
    size: tuple[int, int]
    batch: int = 1
    rank: int = 5
    padding: int = 0
    bias: bool = True
    outputs: int = 0

    def __str__(self) -> str:
        kernel, size = ("x".join(map(str, pair)) for pair in (self.kernel, self.size))
        channels = f"{self.channels}-{self.outputs}" if self.outputs else self.channels
        return f"{kernel}-c{channels}-{size}-b{self.batch}-r{self.rank}-p{self.padding}"


CASES = [
    *(Case((k, k), c, (17, 11), padding=k // 2) for k in (5, 7, 11) for c in wgmma.CHANNELS),
    Case((7, 7), 64, (8, 8), padding=3),  # one square
    Case((7, 7), 64, (7, 7), bias=False),  # one output
    Case((7, 7), 64, (33, 25), 2, padding=3, bias=False),  # several rounds of a persistent block
    Case((3, 3), 64, (12, 9), 3, rank=1, padding=1),
    Case((1, 6), 128, (9, 20), rank=4, padding=2),  # a kernel smaller than its shape
    Case((11, 2), 64, (18, 11), rank=2, padding=5),
    Case((5, 5), 64, (9, 16), padding=6),  # outputs that read nothing but zeros
    # Two packs of functions: all of A in shared memory at 5x5 and 64 channels alone, y staged in the
    # halos at 11x11 and 128 alone.
    *(
        Case((k, k), c, (17, 11), rank=rank, padding=k // 2)
        for k, c, rank in ((5, 64, 6), (5, 128, 8), (7, 64, 9), (7, 128, 10), (11, 64, 8), (11, 128, 9))
    ),
    Case((7, 7), 64, (7, 7), rank=9, bias=False),
    Case((7, 7), 64, (33, 25), 2, rank=10, padding=3),
    Case((1, 11), 128, (19, 25), 3, rank=6, padding=5),
    # Channels out apart from those in: one piece and several of these, one block and several of those.
    Case((7, 7), 64, (17, 11), padding=3, outputs=128),
    Case((7, 7), 128, (9, 20), 2, padding=3, outputs=64),
    Case((5, 5), 256, (9, 9), padding=2, outputs=256),
    Case((5, 5), 192, (10, 9), rank=8, padding=2, outputs=384),
    Case((11, 11), 192, (9, 17), 2, rank=9, padding=5, outputs=128),
    Case((11, 11), 64, (12, 9), rank=5, padding=5, outputs=192),
    Case((7, 7), 320, (9, 9), rank=10, padding=3, outputs=128, bias=False),
]


def draw(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    channels, outputs = case.channels, case.outputs or case.channels
    input = torch.randn(case.batch, channels, *case.size, device=device).to(dtype)
    coefficients = (torch.randn(outputs, channels, case.rank, device=device) / channels**0.5).to(dtype)
    basis = torch.randn(case.rank, *case.kernel, device=device) / math.prod(case.kernel) ** 0.5
    bias = torch.randn(outputs, device=device).to(dtype)
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
        a = coefficients.transpose(0, 1) if transposed else coefficients
        operands = (input.to(type), a.to(type), phi, offset)
        choice: dict[str, Any] = {"backend": backend, "algorithm": algorithm}
        return convolve(*operands, padding=case.padding, **choice)

    actual = result("cuda", "wgmma", dtype)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    truth = result("reference", "auto", torch.float64)
    check(str(case), actual, truth, result("reference", "auto", dtype))


@runs
@pytest.mark.parametrize("transposed", [False, True])
def test_an_output_that_answers_to_one_position(transposed: bool, device, poisoned) -> None:
    """Which is contiguous and channels last, so that the output is contiguous."""
    case = Case((5, 5), 64, (1, 1), 1 if transposed else 2, padding=0 if transposed else 4)
    input, coefficients, basis, _ = draw(case, torch.bfloat16, device)
    convolve = functional.basis_conv_transpose2d if transposed else functional.basis_conv2d

    def result(**choice: Any) -> Tensor:
        return convolve(input, coefficients, basis, padding=case.padding, **choice)

    actual, expected = result(backend="cuda", algorithm="wgmma"), result(backend="reference")
    assert actual.shape[2:] == (5, 5) and actual.stride() == expected.stride()
    assert relative_error(actual, expected.double()) < 2.0**-6


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
@pytest.mark.parametrize("rank", [5, 9])
def test_overflow_of_z_in_float16(rank: int, device, poisoned) -> None:
    """phi is scaled by a power of two, A against it: |z| stays below the largest input."""
    case = Case((7, 7), 64, (9, 9), rank=rank, padding=3, bias=False)
    input, coefficients, basis, _ = draw(case, torch.float16, device)
    basis, coefficients = basis * 2.0**14, coefficients * 2.0**-12
    options = {"padding": 3, "backend": "cuda", "algorithm": "wgmma"}
    actual = functional.basis_conv2d(input, coefficients, basis, **options)
    wide = (input.double(), coefficients.double(), basis.double())
    truth = functional.basis_conv2d(*wide, padding=3, backend="reference")
    assert relative_error(actual, truth) < 2.0**-9


# The gradients of A and phi.


class Gradient(NamedTuple):
    """Of which of them; `processors`: among how many the sum is dealt out."""

    op: Op
    kernel: tuple[int, int]
    channels: tuple[int, int] = (64, 64)
    size: tuple[int, int] = (17, 11)
    batch: int = 1
    rank: int = 5
    padding: int = 3
    processors: int = 1

    def __str__(self) -> str:
        kernel, size, channels = (
            "x".join(map(str, pair)) for pair in (self.kernel, self.size, self.channels)
        )
        of = self.op.rpartition("_")[2]
        shape = f"{kernel}-c{channels}-{size}-b{self.batch}-r{self.rank}-p{self.padding}"
        return f"{of}-{shape}-{self.processors}"

    @property
    def geometry(self) -> Geometry:
        return Geometry.conv(self.size, self.kernel, (1, 1), (self.padding,) * 2, (1, 1), 1)


COEFF: Op = "basis_conv_bwd_coeff"
BASIS: Op = "basis_conv_bwd_basis"
GRADIENTS = [
    *(Gradient(op, (k, k), padding=k // 2) for op in (COEFF, BASIS) for k in (5, 7, 11)),
    *(Gradient(op, (7, 7), size=(8, 8)) for op in (COEFF, BASIS)),  # one square
    *(Gradient(op, (7, 7), size=(7, 7), padding=0) for op in (COEFF, BASIS)),  # one output
    *(Gradient(op, (11, 2), size=(18, 11), batch=2, rank=2, padding=5) for op in (COEFF, BASIS)),
    *(Gradient(op, (3, 3), (128, 64), (12, 9), 3, 1, 1, 5) for op in (COEFF, BASIS)),
    # Each of the stages several times.
    *(Gradient(op, (7, 7), (64, 128), (19, 25), 2, 4) for op in (COEFF, BASIS)),
    Gradient(COEFF, (1, 6), (192, 64), (9, 20), 1, 3, 2, 20),
    Gradient(BASIS, (1, 5), (192, 128), (9, 20), 1, 3, 2, 20),
    # Several packs of functions, the last one full and not.
    *(
        Gradient(op, (k, k), rank=rank, padding=k // 2)
        for op in (COEFF, BASIS)
        for k, rank in ((5, 6), (7, 9), (11, 10))
    ),
    *(Gradient(op, (7, 7), (64, 128), (9, 14), 2, 17, 3, 9) for op in (COEFF, BASIS)),
    Gradient(COEFF, (3, 3), (128, 128), (9, 20), 1, 8, 1, 40),
    Gradient(BASIS, (3, 3), (192, 128), (9, 20), 1, 33, 1, 60),
    # Blocks of output channels, of 64 and of 128.
    Gradient(BASIS, (7, 7), (64, 192), (9, 14), 2, processors=5),
    Gradient(BASIS, (7, 7), (128, 256), (10, 9), 1, 9, processors=20),
    Gradient(BASIS, (11, 11), (64, 128), (9, 14), 2, 6, 5, 9),
    Gradient(COEFF, (5, 5), (256, 320), (9, 9), padding=2, processors=40),
]


def draw_gradient(case: Gradient, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """(grad, input, and phi or A)."""
    size_i, size_o = case.channels
    sizes = ((size_o, case.geometry.output_size), (size_i, case.size))
    activations = [
        torch.randn(case.batch, channels, *size, device=device)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for channels, size in sizes
    ]
    if case.op == BASIS:
        return *activations, (torch.randn(size_o, size_i, case.rank, device=device) / 8).to(dtype)
    return *activations, torch.randn(case.rank, *case.kernel, device=device) / case.geometry.taps**0.5


def gradient(case: Gradient, operands: tuple[Tensor, ...], deterministic: bool = False) -> Tensor:
    """By `wgmma`."""
    problem = ops.problem_of(OPS.index(case.op), operands, case.geometry)
    device = dataclasses.replace(problem.device, processors=case.processors)
    problem = dataclasses.replace(problem, device=device, deterministic=deterministic)
    return getattr(cuda, case.op)(planner.plan(problem, "cuda", "wgmma"), *operands)


def true_gradient(case: Gradient, grad: Tensor, input: Tensor, factor: Tensor) -> Tensor:
    """By the reference, in the dtype of its operands."""
    shape = (*case.channels[::-1], case.rank) if case.op == COEFF else (case.rank, *case.kernel)
    other = torch.zeros(shape, dtype=input.dtype, device=input.device, requires_grad=True)
    factors = (other, factor) if case.op == COEFF else (factor, other)
    y = functional.basis_conv2d(input, *factors, padding=case.padding, backend="reference")
    return torch.autograd.grad(y, other, grad)[0]


@runs
@pytest.mark.parametrize(
    ("dtype", "deterministic"), [(torch.bfloat16, True), (torch.float16, False)], ids=str
)
@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_a_gradient_equals_the_oracle(case, dtype, deterministic: bool, device, poisoned) -> None:
    operands = draw_gradient(case, dtype, device)
    actual = gradient(case, operands, deterministic)
    assert actual.is_contiguous()
    truth = true_gradient(case, *(operand.double() for operand in operands))
    check(str(case), actual, truth, true_gradient(case, *operands))


@runs
@pytest.mark.parametrize("op", [COEFF, BASIS])
def test_by_atomic_additions(op: Op, device, poisoned, monkeypatch) -> None:
    """Two shares of a sum, in one slice, whatever the memory contract leaves room for."""
    case = Gradient(op, (7, 7), (128, 64), rank=9, processors=36)
    operands = draw_gradient(case, torch.float16, device)
    apart = gradient(case, operands, deterministic=True)
    monkeypatch.setattr(wgmma, "shares", lambda problem, tile: (2, True))
    launch._fixed_of.cache_clear()
    try:
        together = gradient(case, operands)
    finally:
        launch._fixed_of.cache_clear()
    assert relative_error(together, apart.double()) < 2.0**-9


@runs
@pytest.mark.parametrize("rank", [5, 9])
def test_overflow_of_u_in_float16(rank: int, device, poisoned) -> None:
    """A is scaled by a power of two: |u| stays below the largest gradient."""
    case = Gradient(BASIS, (7, 7), size=(9, 9), rank=rank)
    grad, input, coefficients = draw_gradient(case, torch.float16, device)
    operands = (grad, input * 2.0**-4, coefficients * 2.0**13)
    truth = true_gradient(case, *(operand.double() for operand in operands))
    assert relative_error(gradient(case, operands), truth) < 2.0**-9


@runs
@pytest.mark.parametrize("rank", [5, 9])
def test_the_gradients_of_a_layer(rank: int, device, poisoned) -> None:
    """The algorithm that is named computes the backward pass, too."""
    case = Case((7, 7), 64, (10, 9), rank=rank, padding=3)
    input, coefficients, basis, bias = draw(case, torch.bfloat16, device)
    operands = tuple(operand.requires_grad_() for operand in (input, coefficients, basis, bias))

    def gradients(**choice: Any) -> tuple[Tensor, ...]:
        y = functional.basis_conv2d(*operands, padding=3, **choice)
        return torch.autograd.grad(y.square().sum(), operands)

    actual = gradients(backend="cuda", algorithm="wgmma")
    for one, other in zip(actual, gradients(backend="reference"), strict=True):
        assert relative_error(one, other.double()) < 2.0**-5


# What they refuse.

H100 = Device("cuda", 90, 132)
PROBLEM = Problem(
    "basis_conv_fwd",
    Geometry.conv((56, 56), (7, 7), (1, 1), (3, 3), (1, 1), 1),
    *(32, 64, 64, 5),
    dtype="bfloat16",
    device=H100,
    aligned=True,
)
SQUARES = 32 * 7 * 7


def _geometry(kernel=(7, 7), stride=(1, 1), dilation=(1, 1), groups=1) -> Geometry:
    return Geometry.conv((56, 56), kernel, stride, (3, 3), dilation, groups)


REFUSED = [
    ({"rank": 11}, "it takes up to 10 basis functions, not 11"),
    ({"op": "basis_conv_bwd_input", "rank": 11}, "it takes up to 10 basis functions, not 11"),
    (
        {"op": "basis_conv_bwd_coeff", "out_channels": 96},
        "it takes multiples of 64 channels in and out, not 64 and 96",
    ),
    (
        {"op": "basis_conv_bwd_basis", "out_channels": 96},
        "it takes multiples of 64 channels in and out, not 64 and 96",
    ),
    ({"dtype": "float32"}, "it takes float16 and bfloat16, not float32"),
    ({"geometry": Geometry.conv((9,), (3,), (1,), (1,), (1,), 1)}, "it takes 2 spatial axes, not 1"),
    ({"geometry": _geometry(stride=(1, 2))}, "it takes stride 1, dilation 1 and one group"),
    ({"geometry": _geometry(dilation=(2, 1))}, "it takes stride 1, dilation 1 and one group"),
    ({"geometry": _geometry(groups=2)}, "it takes stride 1, dilation 1 and one group"),
    ({"in_channels": 96}, "it takes multiples of 64 channels in and out, not 96 and 64"),
    (
        {"in_channels": 32, "out_channels": 32},
        "it takes multiples of 64 channels in and out, not 32 and 32",
    ),
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
    small = dataclasses.replace(PROBLEM, in_channels=32, out_channels=32)
    assert planner.plan.__wrapped__(small, "cuda", "auto").algorithm == "basis"
    # R of a layer's default at 7x7, and one of more packs than a convolution takes.
    for rank, packs in ((5, 1), (9, 2), (11, 3)):
        problem = dataclasses.replace(PROBLEM, rank=rank)
        for op in OPS[:2]:
            plan = planner.plan.__wrapped__(dataclasses.replace(problem, op=op), "cuda", "auto")
            assert plan.algorithm == ("basis" if packs > 2 else "wgmma")
            # Of 64 outputs and 16 channels and a function: z of 7 x 16 positions and 16 outputs; then y.
            if packs <= 2:
                assert cuda.flops(plan) == 2 * SQUARES * 4 * 64 * 16 * rank * (7 * 16 + 64)
        for op, family, executed in (
            (COEFF, "coefficient_gradient_sm90", 4 * 64 * 16 * (7 * 80 + 5 * 64) * 2),
            (BASIS, "basis_gradient_sm90", 64 * 64 * 5 * 128 + 4 * 128 * 64 * 80),
        ):
            gradient = dataclasses.replace(problem, op=op, out_channels=128)
            plan = planner.plan.__wrapped__(gradient, "cuda", "auto")
            assert plan.algorithm == "wgmma" and plan.tile.kernel.family == family
            assert cuda.flops(plan) == 2 * SQUARES * packs * executed


@pytest.mark.parametrize(
    ("channels", "rank", "shares"),
    [
        ((64, 64), 5, 131),
        ((64, 64), 9, 66),
        ((64, 128), 5, 66),
        ((64, 128), 9, 33),
        ((256, 256), 5, 8),
        ((256, 256), 9, 4),
        ((1024, 1024), 5, 1),
    ],
)
def test_no_multiprocessor_has_two_blocks_of_a_gradient(
    channels: tuple[int, int], rank: int, shares: int
) -> None:
    """They run alone: more of them than multiprocessors would be a second wave."""
    size_i, size_o = channels
    sizes = {"in_channels": size_i, "out_channels": size_o, "rank": rank}
    problem = dataclasses.replace(PROBLEM, op=COEFF, **sizes)
    tile, _ = wgmma.choose(problem)
    slices = 48 // rank  # less than W in all
    assert wgmma.shares(problem, tile) == (shares, shares > slices)
    repeatable = dataclasses.replace(problem, deterministic=True)
    assert wgmma.shares(repeatable, tile) == (min(slices, shares), False)


@runs
def test_a_tile_that_is_none_of_the_librarys(device) -> None:
    """The planner's arithmetic and the kernels' own: a difference is refused, not overrun."""
    case = Case((7, 7), 64, (8, 8))
    convolution = draw(case, torch.bfloat16, device)
    geometry = Geometry.conv(case.size, case.kernel, (1, 1), (0, 0), (1, 1), 1)
    rows = [("basis_conv_fwd", convolution)]
    for op in (COEFF, BASIS):
        gradient = Gradient(op, case.kernel, size=case.size, padding=0)
        rows.append((op, draw_gradient(gradient, torch.bfloat16, device)))
    for op, operands in rows:
        plan = planner.plan(ops.problem_of(OPS.index(op), operands[:3], geometry), "cuda", "wgmma")
        kernel = plan.tile.kernel.family
        changes = (
            {"shared_bytes": plan.tile.shared_bytes - 8},
            {"slice": 5},
            {"patch_width": 16},
            {"kernel": dataclasses.replace(plan.tile.kernel, ranks=4)},
        )
        for change in changes:
            wrong = dataclasses.replace(plan, tile=dataclasses.replace(plan.tile, **change))
            with pytest.raises(RuntimeError, match=f"{kernel}: the planned tile is not one"):
                getattr(cuda, op)(wrong, *operands)


@runs
@pytest.mark.parametrize("rank", [9, 11])
def test_a_tile_for_fewer_functions(rank: int, device) -> None:
    """Of as many packs as the kernel has, and of more than any has."""
    case = Case((7, 7), 64, (8, 8))
    geometry = Geometry.conv(case.size, case.kernel, (1, 1), (0, 0), (1, 1), 1)
    operands = draw(case._replace(rank=rank), torch.bfloat16, device)
    planned = ops.problem_of(0, draw(case, torch.bfloat16, device)[:3], geometry)
    plan = planner.plan(planned, "cuda", "wgmma")
    wrong = dataclasses.replace(plan, problem=dataclasses.replace(planned, rank=rank))
    with pytest.raises(RuntimeError, match="basis_conv_sm90: the planned tile is not one"):
        cuda.basis_conv_fwd(wrong, *operands)


# Faults put in on purpose: every wait, arrival, fence, barrier, commit and copy taken out in turn.

_CALL = re.compile(
    r"ptx::(?:mbarrier_\w+|named_barrier|fence_\w+|bulk_load|tensor_\w+|store_\w+|wgmma_\w+)[(<]|__sync\w+\("
)
LIMIT = 2.0**-7


# Of one and of two packs of functions: blocks with several rounds of work, A resident and streamed;
# pieces of the input channels; and y staged in the halos.
CONVOLVED = {
    5: (
        Case((7, 7), 64, (19, 13), 5, padding=3),
        Case((7, 7), 128, (19, 13), 3, padding=3),
        Case((5, 5), 192, (19, 13), 3, padding=2, outputs=128),
    ),
    9: (
        Case((5, 5), 64, (19, 13), 5, 9, padding=2),
        Case((7, 7), 128, (19, 13), 3, 9, padding=3),
        Case((11, 11), 128, (19, 13), 3, 9, padding=5),
        Case((11, 11), 192, (19, 13), 3, 9, padding=5, outputs=128),
    ),
}


def _convolution_error(rank: int) -> float:
    """The largest relative error."""
    errors = []
    for case in CONVOLVED[rank]:
        operands = draw(case, torch.bfloat16, torch.device("cpu"))
        options = {"padding": case.padding, "backend": "cuda", "algorithm": "wgmma"}
        actual = functional.basis_conv2d(*operands, **options)
        wide = (operand.double() for operand in operands)
        truth = functional.basis_conv2d(*wide, padding=case.padding, backend="reference")
        errors.append(relative_error(actual, truth))
    return max(torch.inf if math.isnan(error) else error for error in errors)


def _gradient_error(op: Op, rank: int) -> float:
    """The same with each of the stages several times."""
    case = Gradient(op, (7, 7), size=(19, 13), batch=2, rank=rank)
    operands = draw_gradient(case, torch.bfloat16, torch.device("cpu"))
    truth = true_gradient(case, *(operand.double() for operand in operands))
    error = relative_error(gradient(case, operands), truth)
    return torch.inf if math.isnan(error) else error


ERRORS = {
    "basis_conv_sm90.cu": _convolution_error,
    "coefficient_gradient_sm90.cu": partial(_gradient_error, COEFF),
    "basis_gradient_sm90.cu": partial(_gradient_error, BASIS),
    "squares.cuh": _convolution_error,
}


def sites_of(name: str) -> list[str]:
    """What can be taken out of a source."""
    lines = (SOURCES / name).read_text().splitlines()
    return [f"{name}:{n}" for n, line in enumerate(lines, 1) if _CALL.search(line)]


def _sites() -> Iterator[tuple[str, int]]:
    """(file:line, rank): all of them with two packs; with one, those that are reached."""
    for name in ERRORS:
        one = True
        for n, line in enumerate((SOURCES / name).read_text().splitlines(), 1):
            # No kernel of one pack stages y in the halos.
            one = line.strip() == "}" if not one else "constexpr (L::kInHalo)" not in line
            if _CALL.search(line):
                yield from ((f"{name}:{n}", rank) for rank in ((5, 9) if one else (9,)))


@hosted
@pytest.mark.parametrize("rank", CONVOLVED)
def test_without_a_fault(rank: int) -> None:
    assert all(error(rank=rank) < LIMIT for error in ERRORS.values())


@hosted
@pytest.mark.parametrize("mode", ["late"], indirect=True)
@pytest.mark.parametrize(("site", "rank"), list(_sites()))
def test_what_is_taken_out_is_noticed(
    site: str, rank: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken_out(site, partial(ERRORS[site.partition(":")[0]], rank), monkeypatch)


def taken_out(site: str, measure: Callable[[], float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if neither an error message nor a number says that the call at `site` is not made."""
    monkeypatch.setenv("HYPERCONV_HOST_SKIP", site)
    for seed in range(24):  # of orders of the warps, of which every third notices what is noticed least
        monkeypatch.setenv("HYPERCONV_HOST_SEED", str(seed))
        try:
            error = measure()
        except RuntimeError:
            return
        if not error < LIMIT:
            return
    pytest.fail(f"taking out {site} changed nothing")
