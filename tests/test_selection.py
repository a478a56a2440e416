"""What `'auto'` picks against what was measured: the committed results of the benchmarks.

A choice is named as its column there: `'reference'`, a backend, or on the CPU engine also the algorithm.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import benchmarks
from benchmarks import competitors, records
from benchmarks import tiles as measured_tiles
from benchmarks.records import Record, Row
from benchmarks.shapes import Shape
from hyperconv_ext import planner
from hyperconv_ext.backends import BACKENDS
from hyperconv_ext.backends.cpu import library as cpu_library
from hyperconv_ext.backends.cpu import tiles as cpu_tiles
from hyperconv_ext.backends.cuda import library
from hyperconv_ext.layout import GRANULE
from hyperconv_ext.problem import OPS, Device, Plan, WeightShape

from .planning import H200, shaped

RESULTS = sorted(Path(benchmarks.__file__).parent.glob("results/*/results.json"))
TILES = sorted(Path(benchmarks.__file__).parent.glob("results/*/tiles.json"))
SLACK = 1.1  # times the fastest choice's
SHARE = 0.9  # of the rows
_ALGORITHMS = [f"cpu/{algorithm}" for algorithm in BACKENDS["cpu"].ALGORITHMS]
_COLUMNS = {"hypernet+conv": "reference", **{name: name for name in (*BACKENDS, *_ALGORITHMS)}}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
Pick = Callable[[Row], set[str]]


def measured(entries: Iterable[Record]) -> dict[Row, dict[str, float]]:
    """Seconds of each choice that passed its gate, in every row.

    Where building W was left out, because nn.ConvNd alone takes long, it counts as that.
    """
    found = {}
    for row, cells in records.compared(entries).items():
        seconds = {
            _COLUMNS[name]: record.seconds
            for name, record in cells.items()
            if name in _COLUMNS and record.seconds is not None
        }
        dense = cells.get(records.CONV)
        if "reference" not in seconds and dense is not None and dense.seconds is not None and seconds:
            seconds["reference"] = dense.seconds
        found[row] = seconds
    return found


def share_of_good_picks(rows: Mapping[Row, Mapping[str, float]], pick: Pick) -> tuple[float, list[str]]:
    """The share of `rows` in which the pick takes at most `SLACK` times the least; the others.

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


def name_of(plan: Plan) -> str:
    return f"cpu/{plan.algorithm}" if plan.backend == "cpu" else plan.backend


def auto(row: Row, device: Device, tf32: bool) -> set[str]:
    """What `'auto'` uses for the operators of a row's phase, in the layout measured."""
    shape = row.shape
    pair = shape.in_channels // shape.groups, shape.out_channels // shape.groups
    width, strides = 4 if row.dtype == "fp32" else 2, shape.stride**shape.dims
    choice = (width, strides, shape.flops // 2, row.phase != "forward")
    weight = WeightShape(shape.taps, *pair, shape.rank, *choice, groups=shape.groups)
    if planner.resolve("auto", "auto", device.kind, weight) == "reference":
        return {"reference"}
    aligned = device.kind == "cuda" and not any(channels % GRANULE for channels in pair)
    options = (_DTYPES[row.dtype], tf32, aligned, device)
    plans = competitors.planned(shaped(shape, OPS[0], *options), row.phase, "auto", "auto")
    return {name_of(plan) for plan in plans}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("HYPERCONV_BACKEND", raising=False)
    _forget()
    yield
    _forget()  # what was planned for another machine


def _forget() -> None:
    for cached in (planner.plan, planner.joint, cpu_tiles.choose):
        cached.cache_clear()


def as_measured(monkeypatch: pytest.MonkeyPatch, document: Mapping[str, Any]) -> None:
    """The engines are there, or not, as they were where `document` was measured."""
    machine, found = document["machine_info"], records.load(document)
    columns = {record.column for record in found}
    gpu = machine["device"] != "cpu" and "cuda" in columns
    cpu = machine["device"] == "cpu" and not columns.isdisjoint(_ALGORITHMS)
    monkeypatch.setattr(library, "reason", lambda: "" if gpu else "not measured")
    monkeypatch.setattr(library, "executes_on_cpu", lambda: False)
    monkeypatch.setattr(library, "architectures", lambda: (str(device_of(machine).capability),))
    monkeypatch.setattr(cpu_library, "reason", lambda: "" if cpu else "not measured")
    monkeypatch.setattr(cpu_library, "capability", lambda: machine["instructions"] if cpu else "")


def test_there_are_results() -> None:
    assert RESULTS, "no benchmarks/results/*/results.json"
    assert TILES, "no benchmarks/results/*/tiles.json"


@pytest.mark.parametrize("fitted", [True, False], ids=["like those priced", "unlike them"])
@pytest.mark.parametrize("path", TILES, ids=lambda path: path.parent.name)
def test_the_estimates_find_a_fast_tile(
    path: Path, fitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both algorithms' tiles, forward and all gradients."""
    document = json.loads(path.read_text())
    instructions = document["machine_info"]["instructions"]
    monkeypatch.setattr(cpu_library, "capability", lambda: instructions)
    rows = [row for row in document["rows"] if row["fitted"] is fitted]
    misses = []
    for row in rows:
        layer = measured_tiles.shape_of(row)
        subject = measured_tiles.problem(layer, row["dtype"], row["gradients"])
        estimates = [cpu_tiles.seconds(subject, measured_tiles.tile_of(cell)) for cell in row["tiles"]]
        picked = row["tiles"][estimates.index(min(estimates))]
        best = min(row["tiles"], key=lambda cell: cell["seconds"])
        if picked["seconds"] > SLACK * best["seconds"]:
            misses.append(f"{layer.name} {row['dtype']}: {picked}, not {best}")
    assert rows and 1 - len(misses) / len(rows) >= SHARE, "\n".join(misses)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_auto_is_close_to_the_fastest_backend(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = json.loads(path.read_text())
    machine = document["machine_info"]
    device, tf32 = device_of(machine), machine.get("fp32") == "TF32"
    as_measured(monkeypatch, document)
    rows = measured(records.load(document))
    share, misses = share_of_good_picks(rows, lambda row: auto(row, device, tf32))
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


def test_building_w_takes_at_least_what_the_dense_convolution_takes() -> None:
    named = (
        _records("conv", 0.5),
        _records("cpu/basis", 0.2),
        _records("cpu/fft", 0.1),
        _records("auto", 0.1),
    )
    assert list(measured(named).values()) == [{"reference": 0.5, "cpu/basis": 0.2, "cpu/fft": 0.1}]
    assert list(measured([_records("conv", 0.5)]).values()) == [{}]


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


def _document(*columns: str) -> dict[str, Any]:
    """Of a CPU on which these columns were measured."""
    entries = [{"extra_info": _records(column, None).to_info()} for column in columns]
    machine = {"device": "cpu", "instructions": "avx512"}
    return {"machine_info": machine, "benchmarks": [], "failures": entries}


def test_auto_is_the_planner_s_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    large = Shape("any", 4, 16, 16, (28, 28), (31, 31))
    small = Shape("any", 4, 16, 16, (28, 28), (3, 3))
    assert auto(Row(large, "bf16", "forward"), H200, True) == {"triton"}
    as_measured(monkeypatch, _document("conv", "composite"))
    assert auto(Row(large, "fp32", "step"), Device("cpu"), False) == {"composite"}
    assert auto(Row(small, "bf16", "forward"), Device("cpu"), False) == {"reference"}


def test_auto_is_the_choice_on_the_machine_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    as_measured(monkeypatch, _document("conv", "cpu/fft"))
    large, small = (Shape("any", 2, 64, 64, (64, 64), (k, k)) for k in (31, 1))
    for phase in records.PHASES:
        assert auto(Row(large, "fp32", phase), Device("cpu"), False) == {"cpu/fft"}
        assert auto(Row(small, "fp32", phase), Device("cpu"), False) == {"reference"}


def test_device_of_a_result() -> None:
    facts = {"device": "NVIDIA H200", "capability": "9.0", "multiprocessors": "132"}
    assert device_of(facts) == H200
    assert device_of({"device": "cpu"}) == Device("cpu")
