"""`HyperConv2d` on every backend against `nn.Conv2d`, and against building W for `F.conv2d`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from hyperconv_ext import HyperConv2d, PlanError

from . import gate, machine, shapes, timing
from .competitors import PHASES, competitors, plans, subject, why_not
from .report import Record

_COMPETITORS = {competitor.name: competitor for competitor in competitors()}
_ROWS = shapes.GPU if machine.device().type == "cuda" else shapes.CPU
_CASES = [
    (shape.name, dtype, phase, name)
    for shape, dtype in _ROWS
    for phase in PHASES
    for name in _COMPETITORS
]


def _target(layer: nn.Module, input: Tensor, grad: Tensor, phase: str) -> Callable[[], object]:
    """The measured work: inference, or output and every gradient."""
    if phase == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return layer(input)

        return forward
    leaves = (input.requires_grad_(), *layer.parameters())
    # Not `backward()`: adding to the gradients of an earlier round is no part of a step.
    return lambda: torch.autograd.grad(layer(input), leaves, grad)


def _facts(
    shape: shapes.Shape, phase: str, layer: nn.Module, element_size: int, seconds: float
) -> dict[str, Any]:
    """Rates against the least any implementation could do for the memory, and against the dense one."""
    passes = 1 if phase == "forward" else 3
    parameters = sum(p.numel() for p in layer.parameters())
    least = shape.input_numel + shape.output_numel + parameters
    if phase == "step":  # reads x, the parameters and dL/dy, writes their gradients
        least += 2 * shape.input_numel + shape.output_numel + 2 * parameters
    return {
        "direct_flops": passes * shape.flops,
        "effective_tflops": passes * shape.flops / seconds / 1e12,
        "minimal_bytes": least * element_size,
        "effective_gb_per_s": least * element_size / seconds / 1e9,
    }


@contextmanager
def _on_board(board: list[Record], record: Record) -> Iterator[None]:
    """The record stays whatever happens, empty after a failure, unless the whole run is cut here."""
    board.append(record)
    try:
        yield
    except KeyboardInterrupt:
        board.remove(record)
        raise


@pytest.mark.benchmark(timer=timing.clock)
@pytest.mark.parametrize(
    ("shape", "dtype", "phase", "competitor"), _CASES, ids=["-".join(case) for case in _CASES]
)
def test_conv2d(
    benchmark: BenchmarkFixture,
    board: list[Record],
    device: torch.device,
    shape: str,
    dtype: str,
    phase: str,
    competitor: str,
) -> None:
    entry = _COMPETITORS[competitor]
    case = subject(shape, dtype)
    layer = case.layer(entry.backend, entry.format)
    input = case.input.to(memory_format=entry.format).clone()
    grad = case.grad.to(memory_format=entry.format)
    benchmark.group = f"{shape} {dtype} {phase}"
    benchmark.extra_info |= {
        "shape": shape,
        "dtype": dtype,
        "pass": phase,
        "layout": entry.layout,
        "backend": entry.backend,
    }
    if isinstance(layer, HyperConv2d) and not entry.baseline:
        try:
            chosen = plans(layer, input, phase)
        except PlanError as error:
            pytest.skip(str(error))
        if reason := why_not(chosen):
            pytest.skip(reason)
        benchmark.extra_info["plans"] = {
            p.problem.op: {"algorithm": p.algorithm, "tile": p.tile.name if p.tile else None}
            for p in chosen
        }

    target = _target(layer, input, grad, phase)
    record = Record(shape, dtype, phase, entry.column, entry.layout, entry.baseline)
    with _on_board(board if benchmark.enabled else [], record):
        wrong = gate.failures(
            shape, dtype, layer, entry.format, gradients=phase == "step", baseline=entry.baseline
        )
        if wrong:
            pytest.fail("\n".join(wrong), pytrace=False)
        timing.warm_up(target)
        peak = machine.peak_memory(target, device)
        timing.measure(benchmark, target, device)
        if benchmark.stats is None:  # --benchmark-disable: the gate alone
            return
        record.seconds, record.memory = benchmark.stats["median"], peak
    benchmark.extra_info["peak_memory_bytes"] = peak
    benchmark.extra_info |= _facts(
        case.shape, phase, layer, input.element_size(), benchmark.stats["median"]
    )
