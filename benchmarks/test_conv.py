"""The layers on every backend against `nn.ConvNd`, and against building W for the library."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from hyperconv_ext import PlanError
from hyperconv_ext.modules import HyperConvNd

from . import gate, machine, records, shapes, timing
from .ceilings import Ceilings
from .competitors import (
    Competitor,
    Subject,
    arrange,
    cases,
    described,
    executed_flops,
    plans,
    subject,
    why_left_out,
    why_not,
)
from .conftest import Run
from .records import Record
from .shapes import Shape

_ON_GPU = machine.device().type == "cuda"
_CASES = cases(shapes.GPU if _ON_GPU else shapes.CPU, _ON_GPU)
_NAMES = ["-".join((shape.name, dtype, phase, c.name)) for shape, dtype, phase, c in _CASES]


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


def _work(case: Subject, layer: nn.Module, phase: str, hyper: bool) -> dict[str, Any]:
    """The fields of `Record` that say what has to be done at least."""
    shape, passes = case.shape, records.passes(phase)
    parameters = sum(p.numel() for p in layer.parameters())
    direct = passes * shape.flops
    return {
        "minimal_bytes": records.minimal_bytes(shape, phase, parameters, case.input.element_size()),
        "direct_flops": direct,
        "least_flops": passes * shape.least_flops(hyper),
        "executed_flops": direct,
    }


def _prepared(
    target: Callable[[], object], device: torch.device, phase: str
) -> tuple[int | None, float]:
    """Memory at its peak, and the seconds of a call on a CPU, whose target is then warm.

    There a forward pass is left out, since the profiler takes longer than it; and a call that takes long
    is not made again for nothing.
    """
    if device.type == "cuda":
        timing.warm_up(target)
        return machine.peak_memory(target, device), 0.0
    peak, seconds = None, 0.0
    if phase == "step":
        start = time.perf_counter()
        peak = machine.peak_memory(target, device)
        seconds = time.perf_counter() - start
    if seconds < timing.LONG:
        seconds = timing.warm_up(target, timing.LONG)
    return peak, seconds


def _measured(
    benchmark: BenchmarkFixture,
    case: Subject,
    labels: Record,
    entry: Competitor,
    ceilings: Ceilings,
    done: Sequence[Record],
) -> Record | None:
    """The completed record; None if only the gate is to run.

    Raises:
        Failed: the gate found a wrong result.
        Skipped: the backend cannot compute this, or not worth timing.
    """
    on_cpu = case.device.type == "cpu"
    if on_cpu and (reason := why_left_out(entry, labels.row, done)):
        pytest.skip(reason)
    if entry.compiled and (reason := machine.why_no_compiler(case.device)):
        pytest.skip(reason)
    phase = labels.phase
    layer = case.layer(entry)
    layer.train(phase != "forward" or entry.baseline)  # the baselines build W at every call
    input = arrange(case.input, entry.layout).clone()
    grad = arrange(case.grad, entry.layout)
    work = _work(case, layer, phase, hyper=entry.backend is not None)
    if isinstance(layer, HyperConvNd) and not entry.baseline:
        try:
            chosen = plans(layer, input, phase, entry.algorithm)
        except PlanError as error:
            pytest.skip(str(error))
        if reason := why_not(chosen):
            pytest.skip(reason)
        if chosen:
            work["executed_flops"] = executed_flops(chosen)
        benchmark.extra_info["plans"] = described(chosen)
    wrong = gate.failures(
        case.shape,
        labels.dtype,
        layer,
        entry.layout,
        gradients=phase == "step",
        baseline=entry.baseline,
    )
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)
    target = _target(layer, input, grad, phase)
    peak, estimate = _prepared(target, case.device, phase)
    launches = timing.measure(benchmark, target, case.device, estimate)
    if benchmark.stats is None:  # --benchmark-disable
        return None
    floor = records.floor_seconds(
        work["minimal_bytes"], work["least_flops"], ceilings.bandwidth, ceilings.rate(labels.dtype)
    )
    stats = benchmark.stats
    measured = {"seconds": stats["median"], "spread": stats["iqr"], "rounds": stats["rounds"]}
    measured |= {"memory": peak, "floor_seconds": floor}
    return replace(labels, **work, **launches, **measured)


@pytest.mark.benchmark(timer=timing.clock)
@pytest.mark.parametrize(("shape", "dtype", "phase", "entry"), _CASES, ids=_NAMES)
def test_conv(
    benchmark: BenchmarkFixture, run: Run, shape: Shape, dtype: str, phase: str, entry: Competitor
) -> None:
    benchmark.group = f"{shape.name} {dtype} {phase}"
    labels = Record(shape, dtype, phase, entry.column, entry.layout, entry.baseline)
    try:
        case = subject(shape, dtype)
        record = _measured(benchmark, case, labels, entry, run.ceilings, run.records)
    except pytest.skip.Exception as skipped:
        if benchmark.enabled:
            run.left_out.append(replace(labels, failure=str(skipped)))
        raise
    except (Exception, pytest.fail.Exception) as error:
        if benchmark.enabled:
            message = str(error).strip().splitlines() or [type(error).__name__]
            run.records.append(replace(labels, failure=message[0]))
        try:
            machine.synchronize(machine.device())
        except RuntimeError as lost:
            # Every later benchmark would fail as well, through no fault of its own.
            pytest.exit(f"the device no longer answers after {benchmark.group}, {entry.name}: {lost}")
        raise
    if record is not None:
        run.records.append(record)
        benchmark.extra_info |= record.to_info()
