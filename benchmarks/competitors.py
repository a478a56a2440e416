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
from hyperconv_ext.modules import HyperConvNd
from hyperconv_ext.problem import OPS, Plan

from . import machine
from .records import CONV, PHASES
from .shapes import Entry, Shape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = ("contiguous", "channels_last")
_HYPER: dict[int, Callable[..., HyperConvNd]] = {1: HyperConv1d, 2: HyperConv2d, 3: HyperConv3d}
_DENSE: dict[int, Callable[..., nn.Conv1d | nn.Conv2d | nn.Conv3d]]
_DENSE = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class Competitor:
    """One way to run a layer. `backend` None is `nn.ConvNd` with a weight of its own.

    The competitors of one `column` differ only in layout; the report takes the fastest.
    """

    column: str
    backend: str | None
    layout: str
    baseline: bool
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"{self.column}/{self.layout}"


def competitors(dims: int, on_gpu: bool) -> tuple[Competitor, ...]:
    """The baselines in both layouts, of which the report takes the better, and every backend.

    PyTorch has no channels_last of one axis. The compiler chooses the layout of its convolutions itself.
    """
    layouts = LAYOUTS if dims > 1 else LAYOUTS[:1]
    baselines = [
        Competitor(column, backend, layout, baseline=True)
        for column, backend in ((CONV, None), ("hypernet+conv", "reference"))
        for layout in layouts
    ]
    fast = layouts[-1] if on_gpu else LAYOUTS[0]
    compiled = Competitor("hypernet+conv compiled", "reference", fast, baseline=True, compiled=True)
    own = LAYOUTS[-1] if on_gpu else LAYOUTS[0]
    return (*baselines, compiled, *(Competitor(name, name, own, baseline=False) for name in BACKENDS))


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
        for competitor in competitors(shape.dims, on_gpu)
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

    @cached_property
    def masked_grad(self) -> Tensor:
        masked = torch.zeros_like(self.grad)
        masked[self.sample] = self.grad[self.sample]
        return masked

    def library(self, hyper: bool) -> nn.Module:
        """A new layer that calls the library, with a weight built by the hyper-network or of its own."""
        return copy.deepcopy(self._hyper if hyper else self._dense)

    def layer(self, competitor: Competitor) -> nn.Module:
        """A new layer with the subject's parameters."""
        if competitor.backend is None:
            dense = copy.deepcopy(self._dense)
            dense.weight.data = arrange(dense.weight.data, competitor.layout)
            return dense
        layer = copy.deepcopy(self._hyper)
        layer.backend = competitor.backend
        if competitor.compiled:
            torch.compiler.reset()  # after a few layers the compiler would give up specialising
            layer.compile(fullgraph=True, dynamic=False)
        return layer


@lru_cache(maxsize=1)
def subject(shape: Shape, dtype: str) -> Subject:
    """The subject of the tests that run one after the other on it."""
    return Subject(shape, DTYPES[dtype], machine.device())


def plans(layer: HyperConvNd, input: Tensor, phase: str) -> tuple[Plan, ...]:
    """How `layer` computes each operator of `phase`.

    Raises:
        PlanError: its backend cannot compute one of them.
    """
    _, geometry = layer.geometry(input)
    basis = layer.coefficients.new_empty((layer.coefficients.shape[2], *layer.kernel_size))
    forward = ops.problem_of(0, (input, layer.coefficients, basis), geometry)
    names = OPS[:1] if phase == "forward" else OPS
    return tuple(planner.plan(replace(forward, op=op), layer.backend) for op in names)


def why_not(chosen: tuple[Plan, ...]) -> str:
    """Why these plans run but are not worth timing, or ''."""
    if any(math.isinf(plan.seconds) for plan in chosen):
        return f"{chosen[0].backend} only emulates its kernels on this device"
    return ""


def executed_flops(chosen: tuple[Plan, ...]) -> float:
    """Operations that the kernels of these plans execute, as their backends count them."""
    return sum(BACKENDS[plan.backend].flops(plan) for plan in chosen)
