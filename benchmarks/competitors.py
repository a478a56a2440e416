"""What is compared: each competitor is one way to run the same layer on the same input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from hyperconv_ext import HyperConv1d, HyperConv2d, HyperConv3d, ops, planner
from hyperconv_ext.backends import BACKENDS
from hyperconv_ext.geometry import Geometry
from hyperconv_ext.modules import HyperConvNd
from hyperconv_ext.problem import JOINT, OPS, Device, Op, Plan, Problem

from . import machine
from .fourier import FourierConv
from .records import AUTO, CONV, FOURIER, HYPERNET, PHASES, Record, Row
from .shapes import Entry, Shape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = ("contiguous", "channels_last")
_HYPER: dict[int, Callable[..., HyperConvNd]] = {1: HyperConv1d, 2: HyperConv2d, 3: HyperConv3d}
_DENSE: dict[int, Callable[..., nn.Conv1d | nn.Conv2d | nn.Conv3d]]
_DENSE = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
# On a CPU: from which kernel size on a dense convolution by FFT is among the competitors, and the taps
# of the only layers that composite, which is slow, runs.
_FOURIER = 11
_COMPOSITE_TAPS = 49
# From this size on oneDNN takes up to minutes for the gradient of a channels-last layer's weight.
_ENDLESS = 15
# Seconds of a call of nn.ConvNd from which on what builds W before that is left out.
_SLOW = 0.1


@dataclass(frozen=True)
class Competitor:
    """One way to run a layer.

    `backend` None is `nn.ConvNd` with a weight of its own, computed by FFT if `fourier`. The competitors
    of one `column` differ only in layout; the report takes the fastest.
    """

    column: str
    backend: str | None
    layout: str
    baseline: bool
    compiled: bool = False
    fourier: bool = False
    algorithm: str = "auto"

    @property
    def name(self) -> str:
        return f"{self.column}/{self.layout}"


def competitors(shape: Shape, on_gpu: bool) -> tuple[Competitor, ...]:
    """The baselines in both layouts, of which the report takes the better, and every backend.

    PyTorch has no channels_last of one axis. On a GPU also the compiler, which chooses the layout of its
    convolutions itself; on a CPU compiling would take longer than all else.
    """
    layouts = LAYOUTS if shape.dims > 1 else LAYOUTS[:1]
    baselines = [
        Competitor(column, backend, layout, baseline=True)
        for column, backend in ((CONV, None), (HYPERNET, "reference"))
        for layout in layouts
    ]
    if on_gpu:
        compiled = f"{HYPERNET} compiled"
        baselines.append(Competitor(compiled, "reference", layouts[-1], baseline=True, compiled=True))
        engines = [name for name in BACKENDS if name != "cpu"]
        own = [Competitor(name, name, LAYOUTS[-1], baseline=False) for name in engines]
        return (*baselines, *own)
    if max(shape.kernel_size) >= _FOURIER and shape.dilation == 1:
        baselines.append(Competitor(FOURIER, None, LAYOUTS[0], baseline=True, fourier=True))
    own = [
        Competitor(f"cpu/{algorithm}", "cpu", layouts[-1], baseline=False, algorithm=algorithm)
        for algorithm in BACKENDS["cpu"].ALGORITHMS
    ]
    own.append(Competitor(AUTO, "auto", layouts[-1], baseline=False))
    if shape.taps == _COMPOSITE_TAPS:
        own.append(Competitor("composite", "composite", LAYOUTS[0], baseline=False))
    return (*baselines, *own)


def why_left_out(entry: Competitor, row: Row, done: Sequence[Record]) -> str:
    """Why a competitor of a CPU is not measured in a row of which others are `done`, or ''."""
    large = row.shape.dims == 2 and max(row.shape.kernel_size) >= _ENDLESS
    if entry.baseline and entry.layout == LAYOUTS[1] and row.phase == "step" and large:
        return "the library takes seconds to minutes for a call in this layout"
    if entry.column != HYPERNET:
        return ""
    dense = [r for r in done if r.row == row and r.column == CONV and r.seconds is not None]
    best = min(dense, key=lambda record: record.seconds or math.inf, default=None)
    if best is None:
        return ""
    if best.layout != entry.layout:
        return "nn.Conv is faster in the other layout"
    if best.seconds is not None and best.seconds > _SLOW:
        return f"nn.Conv alone takes more than {_SLOW} s a call, and this builds W first"
    return ""


Case = tuple[Shape, str, str, Competitor]


def cases(rows: Sequence[Entry], on_gpu: bool) -> list[Case]:
    """Every (shape, dtype, phase, competitor) in the order they run.

    Tier by tier, and in each the compiled competitors after all others, since compiling is slow.
    """
    tiers = list(dict.fromkeys((dtype, shape.num_features) for shape, dtype in rows))
    listed = [
        (shape, dtype, phase, competitor)
        for shape, dtype in rows
        for phase in PHASES
        for competitor in competitors(shape, on_gpu)
    ]
    return sorted(
        listed, key=lambda case: (tiers.index((case[1], case[0].num_features)), case[3].compiled)
    )


def arrange(tensor: Tensor, layout: str) -> Tensor:
    """`[B, C, *S]` in `layout`, which for channels_last may have any number of axes."""
    if layout == "contiguous":
        return tensor.contiguous()
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


class Subject:
    """The layers and tensors of one (shape, dtype), the same for every competitor.

    `sample` are the first and the last image: the oracle computes these two, and gradients are
    checked for a `masked_grad` that is zero elsewhere, so that the gate runs the very launch that is
    timed and stays cheap.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.device = device
        torch.manual_seed(0)
        batch, size = shape.batch, shape.size
        self.input = torch.randn(batch, shape.in_channels, *size, device=device, dtype=dtype)
        outputs = (batch, shape.out_channels, *shape.output_size)
        self.grad = torch.randn(outputs, device=device, dtype=dtype)
        self.sample = torch.tensor(sorted({0, batch - 1}), device=device)
        arguments = (shape.in_channels, shape.out_channels, shape.kernel_size, shape.stride)
        rest = (shape.padding, shape.dilation, shape.groups)
        self._hyper = _HYPER[shape.dims](
            *arguments,
            *rest,
            num_features=shape.num_features,
            backend="reference",
            device=device,
            dtype=dtype,
        )
        self._dense = _DENSE[shape.dims](*arguments, *rest, device=device, dtype=dtype)
        with torch.no_grad():
            self._dense.weight.copy_(self._hyper.weight)
            self._dense.bias.copy_(self._hyper.bias)  # type: ignore[union-attr]

    @cached_property
    def masked_grad(self) -> Tensor:
        masked = torch.zeros_like(self.grad)
        masked[self.sample] = self.grad[self.sample]
        return masked

    @property
    def hyper(self) -> HyperConvNd:
        """A new layer whose weight, built by the hyper-network, is that of all competitors."""
        return copy.deepcopy(self._hyper)

    def layer(self, competitor: Competitor) -> nn.Module:
        """A new layer with the subject's parameters."""
        if competitor.backend is None:
            dense = copy.deepcopy(self._dense)
            dense.weight.data = arrange(dense.weight.data, competitor.layout)
            return FourierConv(dense) if competitor.fourier else dense
        layer = self.hyper
        layer.backend = competitor.backend
        layer.algorithm = competitor.algorithm
        if competitor.compiled:
            torch.compiler.reset()  # after a few layers the compiler would give up specialising
            layer.compile(fullgraph=True, dynamic=False)
        return layer


@lru_cache(maxsize=1)
def subject(shape: Shape, dtype: str) -> Subject:
    """The subject of the tests that run one after the other on it."""
    return Subject(shape, DTYPES[dtype], machine.device())


def plans(layer: HyperConvNd, input: Tensor, phase: str, algorithm: str = "auto") -> tuple[Plan, ...]:
    """How `layer` computes the operators of `phase`; none where `'auto'` builds W for the library.

    Raises:
        PlanError: its backend cannot compute one of them.
    """
    _, geometry = layer.geometry(input)
    coefficients = layer.coefficients
    choice = (input, coefficients, geometry, layer.backend, algorithm)
    with torch.set_grad_enabled(phase != "forward"):
        if ops.resolve(*choice, kept=layer.keeps_kernel()) == "reference":
            return ()
    basis = coefficients.new_empty((coefficients.shape[2], *layer.kernel_size))
    forward = ops.problem_of(0, (input, coefficients, basis), geometry)
    return planned(forward, phase, layer.backend, algorithm)


def problem(
    shape: Shape,
    op: Op,
    dtype: str,
    device: Device,
    tf32: bool = False,
    aligned: bool = False,
) -> Problem:
    """An operator on a shape, as numbers."""
    stride, dilation = (shape.stride,) * shape.dims, (shape.dilation,) * shape.dims
    sizes = (shape.size, shape.kernel_size, stride, shape.padding, dilation)
    geometry = Geometry.conv(*sizes, shape.groups)
    channels = shape.in_channels, shape.out_channels
    return Problem(op, geometry, shape.batch, *channels, shape.rank, dtype, device, aligned, tf32)


def planned(forward: Problem, phase: str, backend: str, algorithm: str) -> tuple[Plan, ...]:
    """The plans of the forward operator and, of a step, of the gradients, together or one by one."""
    first = planner.plan(forward, backend, algorithm)
    if phase == "forward":
        return (first,)
    gradients = replace(forward, op=OPS[1], wanted=(True, True, True))
    together = planner.joint(gradients, backend, algorithm)
    if together is not None:
        return first, together
    return first, *(planner.plan(replace(forward, op=op), backend, algorithm) for op in OPS[1:])


def described(chosen: tuple[Plan, ...]) -> dict[str, dict[str, str | None]]:
    """Backend, algorithm and tile by operator, for the record."""
    return {
        JOINT if plan.problem.wanted else plan.problem.op: {
            "backend": plan.backend,
            "algorithm": plan.algorithm,
            "tile": plan.tile.name if plan.tile else None,
        }
        for plan in chosen
    }


def why_not(chosen: tuple[Plan, ...]) -> str:
    """Why these plans run but are not worth timing, or ''."""
    if any(math.isinf(plan.seconds) for plan in chosen):
        return f"{chosen[0].backend} only emulates its kernels on this device"
    return ""


def executed_flops(chosen: tuple[Plan, ...]) -> float:
    """Operations that the kernels of these plans execute, as their backends count them."""
    return sum(BACKENDS[plan.backend].flops(plan) for plan in chosen)
