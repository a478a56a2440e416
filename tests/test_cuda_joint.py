"""csrc/joint_gradient_sm90.cu, a layer's gradients of x and A in one kernel: as test_cuda_wgmma.py."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from hyperconv_ext import HyperConv2d, explain, functional, ops, planner
from hyperconv_ext.backends import cuda
from hyperconv_ext.backends.cuda import library, wgmma
from hyperconv_ext.geometry import Geometry
from hyperconv_ext.layout import new_activation
from hyperconv_ext.ops import execution
from hyperconv_ext.problem import JOINT, OPS, Plan, Problem, Wanted

from .conftest import swept
from .oracle import check, relative_error
from .test_cuda_wgmma import (
    ERRORS,
    H100,
    LIMIT,
    SOURCES,
    hosted,
    mode,  # noqa: F401, a fixture of every test
    runs,
    sites_of,
    taken_out,
)
from .test_launches import launches
from .test_memory import largest_allocation

FILE = "joint_gradient_sm90.cu"
CHANNELS = 64
BOTH: Wanted = (True, True, False)
ALL: Wanted = (True, True, True)


class Case(NamedTuple):
    """Of which layer; `processors`: among how many the squares are dealt out."""

    kernel: tuple[int, int]
    size: tuple[int, int] = (17, 11)
    batch: int = 1
    rank: int = 5
    padding: int = 0
    processors: int = 1
    transposed: bool = False

    def __str__(self) -> str:
        kernel, size = ("x".join(map(str, pair)) for pair in (self.kernel, self.size))
        layer = "transposed-" if self.transposed else ""
        shape = f"{kernel}-{size}-b{self.batch}-r{self.rank}-p{self.padding}"
        return f"{layer}{shape}-{self.processors}"

    @property
    def geometry(self) -> Geometry:
        return Geometry.conv(self.size, self.kernel, (1, 1), (self.padding,) * 2, (1, 1), 1)


CASES = [
    *(Case((k, k), padding=k // 2) for k in (3, 5, 7, 11)),
    *(Case((k, k), (12, 17), padding=k // 2, transposed=True) for k in (5, 7, 11)),
    Case((7, 7), (8, 8), padding=3),  # one square
    Case((7, 7), (7, 7)),  # one output, of which all inputs' gradients are
    Case((1, 1), (1, 1)),
    Case((7, 7), (33, 25), 2, 4, 3),  # both stages and all slots many times
    Case((11, 11), (21, 25), 2, 3, 5),
    Case((3, 5), (12, 9), 3, 1, 1, 5),  # shares of several images
    Case((1, 6), (9, 20), 2, 2, 2, 20),  # more of them than squares; a kernel smaller than its shape
    Case((11, 2), (18, 11), 2, 2, 5, 3),
    Case((5, 5), (9, 16), padding=6),  # outputs that read nothing but zeros
    Case((7, 4), (10, 13), 2, 5, 2, 3, transposed=True),
]


def draw(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """(grad, input, A, phi) of a layer."""
    sizes = [case.geometry.output_size, case.size]
    activations = [
        torch.randn(case.batch, CHANNELS, *size, device=device)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for size in (reversed(sizes) if case.transposed else sizes)
    ]
    coefficients = (torch.randn(CHANNELS, CHANNELS, case.rank, device=device) / 8).to(dtype)
    basis = torch.randn(case.rank, *case.kernel, device=device) / case.geometry.taps**0.5
    return *activations, coefficients, basis


def plan_of(case: Case, operands: tuple[Tensor, ...], wanted: Wanted, deterministic: bool) -> Plan:
    grad, input, coefficients, _ = operands
    sides = (input, grad) if case.transposed else (grad, input)
    described = ops.problem_of(execution.BASIS, (*sides, coefficients), case.geometry)
    device = dataclasses.replace(described.device, processors=case.processors)
    problem = dataclasses.replace(
        described,
        op=OPS[int(not case.transposed)],
        device=device,
        deterministic=deterministic,
        wanted=wanted,
    )
    assert cuda.can_run(problem, "wgmma") == (True, "")
    return Plan(problem, "cuda", "wgmma", *cuda.configure(problem, "wgmma"))


def gradients(
    case: Case, operands: tuple[Tensor, ...], wanted: Wanted = BOTH, deterministic: bool = True
) -> list[Tensor]:
    results = cuda.basis_conv_bwd(
        plan_of(case, operands, wanted, deterministic), *operands, wanted=wanted
    )
    assert [result is not None for result in results] == list(wanted)
    return [result for result in results if result is not None]


def true_gradients(case: Case, grad: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
    """By the reference, in the dtype of the operands."""
    leaves = [operand.detach().requires_grad_() for operand in operands]
    convolve = functional.basis_conv_transpose2d if case.transposed else functional.basis_conv2d
    y = convolve(*leaves, padding=case.padding, backend="reference")
    return torch.autograd.grad(y, leaves, grad)


@swept(lambda row: row["case"].batch > 1 and (row["mode"] == "late") == row["deterministic"])
@runs
@pytest.mark.parametrize(
    ("dtype", "deterministic"), [(torch.bfloat16, True), (torch.float16, False)], ids=str
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(case: Case, dtype, deterministic: bool, device, poisoned) -> None:
    operands = draw(case, dtype, device)
    wanted = ALL if deterministic else BOTH
    actual = gradients(case, operands, wanted, deterministic)
    assert actual[0].stride() == new_activation(operands[0], CHANNELS, actual[0].shape[2:]).stride()
    assert actual[1].is_contiguous()
    truth = true_gradients(case, *(operand.double() for operand in operands))
    own = true_gradients(case, *operands)
    for number, one in enumerate(actual):
        check(f"{case}, gradient {number}", one, truth[number], own[number])


@runs
def test_overflow_of_z_in_float16(device, poisoned) -> None:
    """phi is scaled by a power of two, A against it, dA back: |z| stays below the largest of grad."""
    case = Case((7, 7), (9, 9), padding=3)
    grad, input, coefficients, basis = draw(case, torch.float16, device)
    operands = (grad, input * 2.0**-6, coefficients * 2.0**-12, basis * 2.0**14)
    truth = true_gradients(case, *(operand.double() for operand in operands))
    for one, other in zip(gradients(case, operands), truth, strict=False):
        assert relative_error(one, other) < 2.0**-9


@runs
def test_shares_are_added_in_their_order(device) -> None:
    """Bitwise the same every time; and what atomic additions give is close to it."""
    case = Case((7, 7), (19, 25), 2, padding=3, processors=4)
    operands = draw(case, torch.bfloat16, device)
    assert wgmma.shares(*_chosen(case, operands, True)) == (4, False)
    first, again = gradients(case, operands), gradients(case, operands)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    many = case._replace(processors=20)
    assert wgmma.shares(*_chosen(many, operands, False)) == (12, True)
    added = gradients(many, operands, deterministic=False)
    assert torch.equal(first[0], added[0]) and relative_error(added[1], first[1].double()) < 2.0**-8


def _chosen(case: Case, operands: tuple[Tensor, ...], deterministic: bool) -> tuple[Problem, Any]:
    plan = plan_of(case, operands, BOTH, deterministic)
    return plan.problem, plan.tile


# From a layer down.


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several gradients by one plan where there is one, though on the CPU nothing here has a price."""
    cheapest = planner._cheapest

    def for_nothing(problem: Problem, rows: list[tuple[str, str, str]]) -> Plan | None:
        found = cheapest(problem, rows)
        return dataclasses.replace(found, seconds=0.0) if found and problem.wanted else found

    caches = (planner.plan, planner.joint, execution._plan, execution._joint_plan)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(planner, "_cheapest", for_nothing)
    yield
    for cache in caches:
        cache.cache_clear()


@runs
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("wanted", [ALL, BOTH, (True, False, True), (False, True, True)], ids=str)
def test_the_gradients_of_a_layer(wanted: Wanted, transposed: bool, together, device, poisoned) -> None:
    """One call where those of the input and of A are asked for, which gives phi's too; else none."""
    case = Case((7, 5), (10, 9), 2, padding=2, transposed=transposed)
    _, *tensors = draw(case, torch.bfloat16, device)
    bias = torch.randn(CHANNELS, device=device).bfloat16().requires_grad_()
    leaves = [tensor.requires_grad_(want) for tensor, want in zip(tensors, wanted, strict=True)]
    convolve = functional.basis_conv_transpose2d if transposed else functional.basis_conv2d
    asked = [leaf for leaf in (*leaves, bias) if leaf.requires_grad]

    def results(**choice: Any) -> tuple[Tensor, ...]:
        y = convolve(*leaves, bias, padding=case.padding, **choice)
        return torch.autograd.grad(y.square().sum(), asked)

    with mock.patch.object(cuda, JOINT, wraps=cuda.basis_conv_bwd) as called:
        actual = results(backend="cuda", algorithm="wgmma")
    assert called.call_count == (wanted[:2] == (True, True))
    for one, other in zip(actual, results(backend="reference"), strict=True):
        assert one.dtype == other.dtype and relative_error(one, other.double()) < 2.0**-5


@runs
def test_a_step_of_a_layer(together, device) -> None:
    """From its hyper-network on, also by what `auto` plans where there is only this kernel to join."""
    layer = HyperConv2d(CHANNELS, CHANNELS, 5, padding=2, backend="cuda", device=device).bfloat16()
    twin = HyperConv2d(CHANNELS, CHANNELS, 5, padding=2, backend="reference", device=device).bfloat16()
    twin.load_state_dict(layer.state_dict())
    input = torch.randn(2, CHANNELS, 11, 9, device=device).bfloat16()
    input = input.contiguous(memory_format=torch.channels_last).requires_grad_()

    def step(layer: torch.nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(input).square().sum(), (input, *layer.parameters()))

    expected = step(twin)
    for algorithm in ("wgmma", "auto"):
        layer.algorithm = algorithm
        assert f"{JOINT}, all gradients together: cuda/wgmma, tile joint_" in explain(layer, input)
        with mock.patch.object(cuda, JOINT, wraps=cuda.basis_conv_bwd) as called:
            actual = step(layer)
        assert called.call_count == 1
        for one, other in zip(actual, expected, strict=True):
            assert relative_error(one, other.double()) < 2.0**-5


@runs
@pytest.mark.parametrize("wanted", [BOTH, ALL], ids=str)
def test_launches(wanted: Wanted, device) -> None:
    """Two, two more for phi, and what PyTorch launches to add the shares up and to round A's sums."""
    case = Case((5, 5), (9, 16), padding=2, processors=2)
    operands = draw(case, torch.bfloat16, device)
    own, names = launches("cuda", lambda: gradients(case, operands, wanted))
    if torch.cuda.is_available():
        own = len([name for name in names if "hyperconv" in name])
    else:
        assert names == ["sum", "_to_copy"] + wanted[2] * ["sum"]
    assert own == 2 + 2 * wanted[2]


@runs
def test_neither_w_nor_z_is_allocated(device) -> None:
    """However many shares there are: of W the numbers, of z the bytes that it would have."""
    for case, numbers in (
        (Case((11, 11), (24, 24), 3, padding=5, processors=64), CHANNELS**2 * 11**2 * 4),
        (Case((3, 3), (24, 24), padding=1, processors=64), 5 * CHANNELS * 24**2 * 2),
    ):
        operands = draw(case, torch.bfloat16, device)
        assert largest_allocation(partial(gradients, case, operands), device) < numbers


# What it refuses, and what it is planned for.

PROBLEM = Problem(
    "basis_conv_bwd_input",
    Geometry.conv((56, 56), (7, 7), (1, 1), (3, 3), (1, 1), 1),
    *(32, CHANNELS, CHANNELS, 5),
    dtype="bfloat16",
    device=H100,
    aligned=True,
    wanted=BOTH,
)
APART = "only the gradients of the input and of A share their work, of which not both are wanted"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"out_channels": 128}, "it takes 64 channels in and out together, not 128 and 64"),
    ({"in_channels": 128, "out_channels": 128}, "it takes 64 channels in and out together"),
    ({"rank": 6}, "it takes up to 5 basis functions, not 6"),
    ({"dtype": "float32"}, "it takes float16 and bfloat16, not float32"),
    ({"aligned": False}, "its activations must be channels last"),
    ({"wanted": (True, False, True)}, APART),
    ({"wanted": (False, True, True)}, APART),
    (
        {"geometry": Geometry.conv((56, 56), (13, 7), (1, 1), (3, 3), (1, 1), 1)},
        "it takes kernels up to 11 along an axis",
    ),
    (
        {"geometry": Geometry.conv((56, 56), (7, 7), (2, 2), (3, 3), (1, 1), 1)},
        "it takes stride 1, dilation 1 and one group",
    ),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=str)
def test_refuses(change: dict[str, Any], reason: str) -> None:
    assert wgmma.reason(PROBLEM) == ""
    assert wgmma.reason(dataclasses.replace(PROBLEM, wanted=ALL)) == ""
    assert reason in wgmma.reason(dataclasses.replace(PROBLEM, **change))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library with machine code for it, to plan with."""
    for name, value in (("reason", ""), ("executes_on_cpu", False), ("supports", True)):
        monkeypatch.setattr(library, name, lambda *_, value=value: value)
    monkeypatch.setattr(library, "_load", lambda: ("80,90a,100+PTX", ""))
    planner.plan.cache_clear()
    yield
    planner.plan.cache_clear()


def _joint(problem: Problem, *choice: str) -> Plan | None:
    return planner.joint.__wrapped__(problem, *choice)


@pytest.mark.parametrize("kernel", [3, 5, 7, 11])
@pytest.mark.parametrize("op", OPS[:2])
def test_auto_takes_it_where_it_is_cheaper(op: str, kernel: int, hopper) -> None:
    geometry = Geometry.conv((56, 56), (kernel,) * 2, (1, 1), (kernel // 2,) * 2, (1, 1), 1)
    problem = dataclasses.replace(PROBLEM, op=op, geometry=geometry)
    plan = _joint(problem)
    assert plan is not None and (plan.backend, plan.algorithm) == ("cuda", "wgmma")
    assert plan.tile.kernel.family == "joint_gradient_sm90"
    apart = [planner.plan(dataclasses.replace(problem, op=o, wanted=None)) for o in problem.ops]
    assert plan.seconds < sum(each.seconds for each in apart)
    every = _joint(dataclasses.replace(problem, wanted=ALL))
    phi = dataclasses.replace(problem, op="basis_conv_bwd_basis", wanted=None)
    third = planner.plan(phi, "cuda", "wgmma")
    assert every is not None and every.seconds == pytest.approx(plan.seconds + third.seconds)
    squares, steps = 32 * 49, next(s.steps for s in wgmma.SHAPES if kernel <= s.largest)
    assert cuda.flops(plan) == 2 * squares * 64 * 64 * (steps * 80 + 2 * 5 * 64)
    assert cuda.flops(every) == cuda.flops(plan) + cuda.flops(third)


@pytest.mark.parametrize(
    ("kernel", "tensor", "shared", "apart"),
    [(5, 1920, 1984, 2688), (7, 2400, 2448, 3824), (11, 3520, 3664, 6624)],
)
def test_clocks_of_a_square(kernel: int, tensor: int, shared: int, apart: int) -> None:
    """The figures in the kernel's source are the cost model's."""
    geometry = Geometry.conv((8, 8), (kernel,) * 2, (1, 1), (kernel // 2,) * 2, (1, 1), 1)
    problem = dataclasses.replace(PROBLEM, geometry=geometry, batch=H100.processors)

    def clocks(problem: Problem, squares: int) -> tuple[float, float]:
        main = wgmma.works(problem, wgmma.choose(problem)[0])[1]
        return main.products / squares / 2048, main.shared / squares / 128

    assert clocks(problem, 1) == (tensor, shared)
    alone = [dataclasses.replace(problem, op=op, wanted=None) for op in problem.ops]
    assert max(clocks(alone[0], 2)) + max(clocks(alone[1], 1)) == apart
    text = (SOURCES / FILE).read_text()
    assert re.search(rf"{kernel} x {kernel} +{tensor:,} +{shared:,} +{apart:,}\n", text)


def test_where_it_is_not_cheaper(hopper) -> None:
    """The few shares of a sum in a fixed order leave multiprocessors idle, now for the input's too."""
    problem = dataclasses.replace(PROBLEM, deterministic=True)
    tile, seconds = wgmma.choose(problem)
    assert wgmma.shares(problem, tile) == (9, False) and seconds < math.inf
    assert _joint(problem) is None


def test_where_gradients_can_be_together(hopper, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda.joins_on(H100) and planner.joins_on(H100, "cuda")
    assert not cuda.joins_on(dataclasses.replace(H100, capability=100))
    assert not cuda.can_run(PROBLEM, "basis")[0]
    monkeypatch.setattr(library, "_load", lambda: ("80,90,100+PTX", ""))
    assert not cuda.joins_on(H100)
    reason = cuda.can_run(PROBLEM, "wgmma")[1]
    assert "rebuild it with TORCH_CUDA_ARCH_LIST=9.0a" in reason


@runs
def test_a_tile_that_is_none_of_the_librarys(device) -> None:
    case = Case((7, 7), (8, 8), padding=3)
    operands = draw(case, torch.bfloat16, device)
    plan = plan_of(case, operands, BOTH, True)
    for change in ({"shared_bytes": plan.tile.shared_bytes - 8}, {"slice": 5}, {"patch_width": 16}):
        wrong = dataclasses.replace(plan, tile=dataclasses.replace(plan.tile, **change))
        with pytest.raises(RuntimeError, match="joint_gradient_sm90: the planned tile is not one"):
            cuda.basis_conv_bwd(wrong, *operands, wanted=BOTH)


# Faults put in on purpose.


def _error() -> float:
    """The largest with each of the stages and slots several times, by whole patches and by halves."""
    errors = []
    for case in (Case((7, 7), (19, 13), 2, padding=3), Case((11, 11), (9, 17), padding=5)):
        operands = draw(case, torch.bfloat16, torch.device("cpu"))
        truth = true_gradients(case, *(operand.double() for operand in operands))
        errors += map(relative_error, gradients(case, operands), truth)
    return max(torch.inf if math.isnan(error) else error for error in errors)


@hosted
def test_without_a_fault() -> None:
    assert _error() < LIMIT


@hosted
@pytest.mark.parametrize("mode", ["late"], indirect=True)
@pytest.mark.parametrize("site", sites_of(FILE))
def test_what_is_taken_out_is_noticed(site: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    taken_out(site, _error, monkeypatch)


def test_faults_are_put_into_every_kernel() -> None:
    assert {path.name for path in SOURCES.glob("*_sm90.cu")} == {*ERRORS, FILE} - {"squares.cuh"}
