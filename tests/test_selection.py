"""What `'auto'` picks against what was measured: the committed results of the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

import benchmarks
from benchmarks import records
from benchmarks.records import Record, Row
from benchmarks.shapes import Shape
from hyperconv_ext import planner
from hyperconv_ext.backends import BACKENDS
from hyperconv_ext.backends.cuda import library
from hyperconv_ext.layout import GRANULE
from hyperconv_ext.problem import OPS, Device, WeightShape

from .planning import H200, shaped

RESULTS = sorted(Path(benchmarks.__file__).parent.glob("results/*/results.json"))
SLACK = 1.1  # times the fastest backend's
SHARE = 0.9  # of the rows
_COLUMNS = {"hypernet+conv": "reference", **{name: name for name in BACKENDS}}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
Pick = Callable[[Row], set[str]]


def measured(entries: Iterable[Record]) -> dict[Row, dict[str, float]]:
    """Seconds of each backend that passed its gate, in every row."""
    return {
        row: {
            _COLUMNS[name]: record.seconds
            for name, record in cells.items()
            if name in _COLUMNS and record.seconds is not None
        }
        for row, cells in records.compared(entries).items()
    }


def share_of_good_picks(rows: Mapping[Row, Mapping[str, float]], pick: Pick) -> tuple[float, list[str]]:
    """The share of `rows` in which the picked backend takes at most `SLACK` times the least; the others.

    Where the operators of a step get different ones, the slowest of these stands for all.
    """
    misses = []
    for row, seconds in rows.items():
        picked = pick(row)
        took = max(seconds.get(name, float("inf")) for name in picked)
        best = min(seconds, key=seconds.__getitem__, default="")
        if not seconds or took > SLACK * seconds[best]:
            misses.append(f"{row.name}: {'+'.join(sorted(picked))}, not {best or 'measured'}")
    return (1 - len(misses) / len(rows) if rows else 0.0), misses


def device_of(machine: Mapping[str, str]) -> Device:
    """The planner's view of the machine that a result describes."""
    if machine["device"] == "cpu":
        return Device("cpu")
    major, minor = machine["capability"].split(".")
    return Device("cuda", 10 * int(major) + int(minor), int(machine["multiprocessors"]))


def auto(row: Row, device: Device, tf32: bool) -> set[str]:
    """The backends that `'auto'` uses for the operators of a row's phase, in the layout measured."""
    shape = row.shape
    pair = shape.in_channels // shape.groups, shape.out_channels // shape.groups
    weight = WeightShape(shape.taps, *pair, shape.rank, 4 if row.dtype == "fp32" else 2)
    if planner.resolve("auto", "auto", device.kind, weight) == "reference":
        return {"reference"}
    aligned = device.kind == "cuda" and not any(channels % GRANULE for channels in pair)
    options = (_DTYPES[row.dtype], tf32, aligned, device)
    ops = OPS[:1] if row.phase == "forward" else OPS
    return {planner.plan(shaped(shape, op, *options)).backend for op in ops}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYPERCONV_BACKEND", raising=False)
    planner.plan.cache_clear()


def test_there_are_results() -> None:
    assert RESULTS, "no benchmarks/results/*/results.json"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_auto_is_close_to_the_fastest_backend(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = json.loads(path.read_text())
    machine = document["machine_info"]
    device, tf32 = device_of(machine), machine.get("fp32") == "TF32"
    entries = records.load(document)
    built = device.kind == "cuda" and any(record.column == "cuda" for record in entries)
    monkeypatch.setattr(library, "reason", lambda: "" if built else "not measured")
    monkeypatch.setattr(library, "executes_on_cpu", lambda: False)
    monkeypatch.setattr(library, "architectures", lambda: (str(device.capability),))
    share, misses = share_of_good_picks(measured(entries), lambda row: auto(row, device, tf32))
    assert share >= SHARE, "\n".join(misses)


# The arithmetic, on records made by hand.


def _records(column: str, seconds: float | None, layout: str = "contiguous", batch: int = 1) -> Record:
    shape = Shape("any", batch, 8, 8, (9, 9), (5, 5))
    return Record(shape, "fp32", "forward", column, layout, baseline=False, seconds=seconds)


def test_measured_takes_the_faster_layout_and_eager_backends_only() -> None:
    rows = measured(
        [
            _records("conv", 0.1),
            _records("hypernet+conv", 2.0),
            _records("hypernet+conv", 1.5, "channels_last"),
            _records("hypernet+conv compiled", 0.2),
            _records("composite", 3.0),
            _records("triton", None),
        ]
    )
    assert list(rows.values()) == [{"reference": 1.5, "composite": 3.0}]


def test_share_counts_rows() -> None:
    seconds = [{"reference": 1.0, "composite": best} for best in (0.8, 0.95, 2.0)]
    rows = {_records("any", None, batch=n).row: row for n, row in enumerate(seconds, 1)}
    share, misses = share_of_good_picks(rows, lambda row: {"reference"})
    assert share == pytest.approx(2 / 3) and len(misses) == 1
    assert misses[0].startswith("any-8to8-9px-k5-n4-b1 fp32") and misses[0].endswith(
        "reference, not composite"
    )
    share, misses = share_of_good_picks(rows, lambda row: {"composite"})
    assert share == pytest.approx(2 / 3) and misses[0].endswith("composite, not reference")


def test_an_unmeasured_pick_and_an_empty_row_are_misses() -> None:
    row = _records("any", None).row
    assert share_of_good_picks({row: {"triton": 1.0}}, lambda row: {"cuda"})[0] == 0
    assert (
        share_of_good_picks({row: {"triton": 1.0, "cuda": 2.0}}, lambda row: {"cuda", "triton"})[0] == 0
    )
    assert share_of_good_picks({row: {}}, lambda row: {"cuda"})[0] == 0
    assert share_of_good_picks({}, lambda row: {"cuda"})[0] == 0


def test_auto_is_the_planner_s_choice() -> None:
    shape = Shape("any", 4, 16, 16, (28, 28), (31, 31))
    small = Shape("any", 4, 16, 16, (28, 28), (3, 3))
    assert auto(Row(shape, "fp32", "step"), Device("cpu"), False) == {"composite"}
    assert auto(Row(small, "bf16", "forward"), Device("cpu"), False) == {"reference"}
    assert auto(Row(shape, "bf16", "forward"), H200, True) == {"triton"}


def test_device_of_a_result() -> None:
    facts = {"device": "NVIDIA H200", "capability": "9.0", "multiprocessors": "132"}
    assert device_of(facts) == H200
    assert device_of({"device": "cpu"}) == Device("cpu")
