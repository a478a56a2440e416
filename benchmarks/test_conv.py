"""The layers on every backend against `nn.ConvNd`, and against building W for the library."""

from __future__ import annotations

from collections.abc import Callable
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
from .competitors import Competitor, Subject, arrange, cases, executed_flops, plans, subject, why_not
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


def _measured(
    benchmark: BenchmarkFixture, case: Subject, labels: Record, entry: Competitor, ceilings: Ceilings
) -> Record | None:
    """The completed record; None if only the gate is to run.

    Raises:
        Failed: the gate found a wrong result.
        Skipped: the backend cannot compute this, or not worth timing.
    """
    if entry.compiled and (reason := machine.why_no_compiler(case.device)):
        pytest.skip(reason)
    phase = labels.phase
    layer = case.layer(entry)
    input = arrange(case.input, entry.layout).clone()
    grad = arrange(case.grad, entry.layout)
    work = _work(case, layer, phase, hyper=entry.backend is not None)
    if isinstance(layer, HyperConvNd) and not entry.baseline:
        try:
            chosen = plans(layer, input, phase)
        except PlanError as error:
            pytest.skip(str(error))
        if reason := why_not(chosen):
            pytest.skip(reason)
        work["executed_flops"] = executed_flops(chosen)
        benchmark.extra_info["plans"] = {
            p.problem.op: {"algorithm": p.algorithm, "tile": p.tile.name if p.tile else None}
            for p in chosen
        }
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
    timing.warm_up(target)
    peak = machine.peak_memory(target, case.device)
    launches = timing.measure(benchmark, target, case.device)
    if benchmark.stats is None:  # --benchmark-disable
        return None
    floor = records.floor_seconds(
        work["minimal_bytes"], work["least_flops"], ceilings.bandwidth, ceilings.rate(labels.dtype)
    )
    seconds, spread = benchmark.stats["median"], benchmark.stats["iqr"]
    measured = {"seconds": seconds, "spread": spread, "memory": peak, "floor_seconds": floor}
    return replace(labels, **work, **launches, **measured)


@pytest.mark.benchmark(timer=timing.clock)
@pytest.mark.parametrize(("shape", "dtype", "phase", "entry"), _CASES, ids=_NAMES)
def test_conv(
    benchmark: BenchmarkFixture, run: Run, shape: Shape, dtype: str, phase: str, entry: Competitor
) -> None:
    benchmark.group = f"{shape.name} {dtype} {phase}"
    labels = Record(shape, dtype, phase, entry.column, entry.layout, entry.baseline)
    try:
        record = _measured(benchmark, subject(shape, dtype), labels, entry, run.ceilings)
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
