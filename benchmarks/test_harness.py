"""The suite's own arithmetic, on numbers instead of a GPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from . import gate, machine, report, shapes, timing
from .competitors import subject
from .report import Record

_SMALL = shapes.SMALL[1].name


class FakeEvent:
    """An event of a device whose clock is set by hand, in milliseconds."""

    now = 0.0

    def __init__(self) -> None:
        self.at = float("nan")
        self.awaited = False

    def record(self) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        self.awaited = True

    def elapsed_time(self, end_event: FakeEvent, /) -> float:
        if not end_event.awaited:
            raise RuntimeError("elapsed_time() before the end event was reached")
        return end_event.at - self.at


def test_difference_of_stamps_waits_and_is_in_seconds() -> None:
    FakeEvent.now = 250.0
    start = timing.Stamp(FakeEvent())
    FakeEvent.now = 251.5
    end = timing.Stamp(FakeEvent())
    assert end - start == pytest.approx(1.5e-3)


def test_rounds_stay_within_bounds() -> None:
    effort = timing.Effort(seconds=1.0, least=5, most=20)
    assert [effort.rounds(t) for t in (0.0, 0.1, 10.0)] == [20, 10, 5]


def test_shape_names_are_unique() -> None:
    for rows in (shapes.GPU, shapes.CPU):
        assert max(Counter((shape.name, dtype) for shape, dtype in rows).values()) == 1
    assert all(shapes.SHAPES[shape.name] == shape for shape, _ in (*shapes.GPU, *shapes.CPU))


def test_shape_arithmetic() -> None:
    shape = shapes.Shape("any", 2, 4, 6, (9, 8), (5, 3), stride=2, groups=2)
    layer = torch.nn.Conv2d(4, 6, shape.kernel_size, 2, shape.padding, groups=2)
    output = layer(torch.zeros(2, 4, 9, 8))
    assert (2, 6, *shape.output_size) == output.shape
    assert shape.flops == 2 * output.numel() * layer.weight[0].numel()


def _records() -> list[Record]:
    rows = (
        ("conv2d", "nchw", True, 3e-3),
        ("conv2d", "nhwc", True, 2e-3),
        ("hypernet+conv2d", "nchw", True, 4e-3),
        ("fast", "nchw", False, 1e-3),
        ("slow", "nchw", False, 8e-3),
        ("wrong", "nchw", False, None),
    )
    return [
        Record("a", "fp32", "forward", column, layout, baseline, seconds, 2**20)
        for column, layout, baseline, seconds in rows
    ]


def test_table_takes_the_better_layout_and_shows_losses_and_failures() -> None:
    header, row = report.table(_records())
    assert header.startswith("shape") and "vs hypernet+conv2d" in header
    cells = row.split()
    assert cells[3:6] == ["2000", "1.0", "nhwc"]
    assert cells[9:13] == ["1000", "1.0", "2.00x", "4.00x"]
    assert cells[13:17] == ["8000", "1.0", "0.25x", "0.50x"]
    assert cells[17:] == ["FAILED", "-", "-", "-"]


def test_a_baseline_that_failed_in_one_layout_gives_no_ratio() -> None:
    records = _records()
    records[0].seconds = None
    assert "2.00x" not in report.table(records)[1]
    assert not any("against conv2d" in line for line in report.summary(records))


def test_summary_counts_wins_and_names_the_worst() -> None:
    records = _records()
    lines = report.summary(records + [Record(**vars(r) | {"shape": "b"}) for r in records])
    assert lines[0].startswith("fast against conv2d, forward: faster in 2 of 2 rows")
    assert any(line.startswith("slow") and "0 of 2" in line and "(a, fp32)" in line for line in lines)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_gate_passes_the_library_and_catches_a_wrong_parameter(backend: str | None) -> None:
    layer = subject(_SMALL, "fp32").layer(backend)
    arguments = (_SMALL, "fp32", layer, torch.channels_last)
    assert not gate.failures(*arguments, gradients=True, baseline=True)
    with torch.no_grad():
        next(layer.parameters()).mul_(1.01)
    assert any("output" in line for line in gate.failures(*arguments, gradients=False, baseline=True))


def test_gate_catches_nan() -> None:
    layer = subject(_SMALL, "fp32").layer("reference")
    with torch.no_grad():
        next(layer.parameters()).fill_(float("nan"))
    lines = gate.failures(_SMALL, "fp32", layer, torch.contiguous_format, gradients=True, baseline=False)
    assert any("grad of input" in line for line in lines)


def test_peak_memory_counts_what_is_freed_again() -> None:
    device = machine.device()

    def work() -> torch.Tensor:
        large = torch.ones(2**20, dtype=torch.uint8, device=device)
        return large[:1].clone()

    assert 2**20 < machine.peak_memory(work, device) < 2**20 + 2**12
