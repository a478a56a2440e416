"""What is compared: each competitor is one way to run the same layer on the same input."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from hyperconv_ext import HyperConv2d, ops, planner
from hyperconv_ext.backends import BACKENDS
from hyperconv_ext.problem import OPS, Plan

from . import machine
from .shapes import SHAPES, Shape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PHASES = ("forward", "step")
_LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@dataclass(frozen=True)
class Competitor:
    """One way to run a layer. `backend` None is `nn.Conv2d` with a weight of its own.

    The competitors of one `column` differ only in layout; the report takes the fastest.
    """

    column: str
    backend: str | None
    layout: str
    baseline: bool

    @property
    def name(self) -> str:
        return f"{self.column}/{self.layout}"

    @property
    def format(self) -> torch.memory_format:
        return _LAYOUTS[self.layout]


def competitors() -> tuple[Competitor, ...]:
    """The baselines in both layouts, of which the report takes the better, and every backend."""
    baselines = tuple(
        Competitor(column, backend, layout, baseline=True)
        for column, backend in (("conv2d", None), ("hypernet+conv2d", "reference"))
        for layout in _LAYOUTS
    )
    layout = "nhwc" if machine.device().type == "cuda" else "nchw"
    return (*baselines, *(Competitor(name, name, layout, baseline=False) for name in BACKENDS))


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
        self._hyper = HyperConv2d(
            *arguments,
            *rest,
            num_features=shape.num_features,
            backend="reference",
            device=device,
            dtype=dtype,
        )
        self._dense = nn.Conv2d(*arguments, *rest, device=device, dtype=dtype)
        with torch.no_grad():
            self._dense.weight.copy_(self._hyper.weight)

    @cached_property
    def masked_grad(self) -> Tensor:
        masked = torch.zeros_like(self.grad)
        masked[self.sample] = self.grad[self.sample]
        return masked

    def layer(
        self, backend: str | None, format: torch.memory_format = torch.contiguous_format
    ) -> nn.Conv2d | HyperConv2d:
        """A new layer with the subject's parameters, the dense weight in `format`."""
        if backend is None:
            dense = copy.deepcopy(self._dense)
            return nn.utils.convert_conv2d_weight_memory_format(dense, format)
        layer = copy.deepcopy(self._hyper)
        layer.backend = backend
        return layer


@lru_cache(maxsize=1)
def subject(shape: str, dtype: str) -> Subject:
    """The subject of the tests that run one after the other on it."""
    return Subject(SHAPES[shape], DTYPES[dtype], machine.device())


def plans(layer: HyperConv2d, input: Tensor, phase: str) -> tuple[Plan, ...]:
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
