"""The data model of the suite: one record a benchmark, kept in pytest-benchmark's JSON. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import exp, log
from typing import Any

from .shapes import Shape

PHASES = ("forward", "step")
PHASE_NAMES = {"forward": "forward", "step": "forward + backward"}
CONV = "conv"  # the column of nn.ConvNd
HYPERNET = "hypernet+conv"
FOURIER = "fft conv"
AUTO = "auto"
_STATISTICS = ("min", "max", "median", "iqr", "stddev", "rounds")
_MACHINE = ("system", "machine", "python_version")
_COMMIT = ("id", "time", "dirty")


@dataclass(frozen=True)
class Record:
    """One way to run one layer.

    `seconds` is the median and `spread` the interquartile range of its time over `rounds`: of the
    device, cold L2 cache, on a GPU; of the wall clock, warm, on a CPU. `seconds` None: it failed, as
    `failure` says. `memory` is the allocator's peak above inputs and parameters, in bytes, None where
    it was not measured. On a GPU `eager_seconds` is
    the wall time of one of many calls in a row, `graph_seconds` the device time of the same work as
    a replayed CUDA graph, None where capture raised `graph_error`. The floor is that of
    `least_flops` and `minimal_bytes` by the ceilings of the run.
    """

    shape: Shape
    dtype: str
    phase: str
    column: str
    layout: str
    baseline: bool
    seconds: float | None = None
    spread: float | None = None
    rounds: int = 0
    memory: int | None = None
    eager_seconds: float | None = None
    graph_seconds: float | None = None
    graph_error: str = ""
    minimal_bytes: int = 0
    direct_flops: int = 0
    least_flops: int = 0
    executed_flops: float = 0
    floor_seconds: float | None = None
    failure: str = ""

    @property
    def row(self) -> Row:
        return Row(self.shape, self.dtype, self.phase)

    @property
    def achieved(self) -> float | None:
        """The floor as a share of the time."""
        if self.seconds is None or self.floor_seconds is None:
            return None
        return self.floor_seconds / self.seconds

    def tflops(self, flops: float) -> float | None:
        return None if self.seconds is None else flops / self.seconds / 1e12

    @property
    def intensity(self) -> float:
        """Operations of the direct convolution per byte that has to be read or written."""
        return self.direct_flops / self.minimal_bytes

    def to_info(self) -> dict[str, Any]:
        """As `extra_info` of a benchmark, in whose statistics the time is."""
        info = asdict(self)
        for name in ("seconds", "spread", "rounds"):
            del info[name]
        info["effective_tflops"] = self.tflops(self.direct_flops)
        info["actual_tflops"] = self.tflops(self.executed_flops)
        info["achieved"] = self.achieved
        return info

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Record:
        """The inverse, of an entry of the JSON; those of `failures` have no statistics."""
        info = entry["extra_info"]
        known = {field.name: info[field.name] for field in fields(cls) if field.name in info}
        lengths = {name: tuple(info["shape"][name]) for name in ("size", "kernel_size")}
        known["shape"] = Shape(**info["shape"] | lengths)
        if "stats" in entry:
            stats = entry["stats"]
            known |= {"seconds": stats["median"], "spread": stats["iqr"], "rounds": stats["rounds"]}
        return cls(**known)


@dataclass(frozen=True)
class Row:
    """What the competitors of one comparison have in common."""

    shape: Shape
    dtype: str
    phase: str

    @property
    def tier(self) -> tuple[str, int]:
        return self.dtype, self.shape.num_features

    @property
    def name(self) -> str:
        return f"{self.shape.name} {self.dtype} {PHASE_NAMES[self.phase]}"


Cells = dict[str, Record]
Rows = dict[Row, Cells]


def load(document: Mapping[str, Any]) -> list[Record]:
    """Every record of a JSON, failures last."""
    return [Record.from_entry(entry) for key in ("benchmarks", "failures") for entry in document[key]]


def left_out(document: Mapping[str, Any]) -> list[Record]:
    """What was not run; `failure` says why."""
    return [Record.from_entry(entry) for entry in document.get("left_out", ())]


def machine_facts(machine_info: Mapping[str, Any], facts: Mapping[str, str]) -> dict[str, Any]:
    """What pytest-benchmark knows of the machine, without what tells whose it is, and `facts`."""
    cpu = machine_info.get("cpu", {})
    known = {name: machine_info[name] for name in _MACHINE if name in machine_info}
    return known | {"cpu": {name: cpu.get(name) for name in ("brand_raw", "count")}} | dict(facts)


def clean(
    document: dict[str, Any],
    failures: Iterable[Record],
    left_out: Iterable[Record],
    ceilings: Mapping[str, Any],
) -> None:
    """Turn what pytest-benchmark is about to write into what `load` reads, in place.

    Each round's time goes, and what is constant or in `extra_info`; and a benchmark that was timed but
    cut before its record was complete.
    """
    complete = (entry for entry in document["benchmarks"] if "shape" in entry["extra_info"])
    document["benchmarks"] = list(complete)
    document["failures"] = [{"extra_info": record.to_info()} for record in failures]
    document["left_out"] = [{"extra_info": record.to_info()} for record in left_out]
    document["ceilings"] = dict(ceilings)
    for entry in document["benchmarks"]:
        entry["stats"] = {name: entry["stats"][name] for name in _STATISTICS}
        entry |= {"params": {}, "options": {}}
    document["commit_info"] = {name: document["commit_info"].get(name) for name in _COMMIT}


def compared(records: Iterable[Record]) -> Rows:
    """Rows in the order they ran, and in each the column's faster layout.

    A column in which any layout failed counts as failed.
    """
    gathered: dict[Row, dict[str, list[Record]]] = {}
    for record in records:
        gathered.setdefault(record.row, {}).setdefault(record.column, []).append(record)
    return {
        row: {column: _best(group) for column, group in columns.items()}
        for row, columns in gathered.items()
    }


def _best(records: Sequence[Record]) -> Record:
    return min(records, key=lambda record: -1.0 if record.seconds is None else record.seconds)


def columns(records: Iterable[Record], baseline: bool) -> tuple[str, ...]:
    return tuple(dict.fromkeys(r.column for r in records if r.baseline == baseline))


def speedup(cells: Cells, backend: str, baseline: str) -> float | None:
    """How many times faster `backend` is than `baseline`, where both were measured."""
    return _ratio(*(getattr(cells.get(name), "seconds", None) for name in (baseline, backend)))


def memory_saving(cells: Cells, backend: str, baseline: str) -> float | None:
    """How many times less `backend` takes at its peak than `baseline`, where both were measured."""
    return _ratio(*(getattr(cells.get(name), "memory", None) for name in (baseline, backend)))


def _ratio(theirs: float | None, ours: float | None) -> float | None:
    return None if theirs is None or not ours else theirs / ours


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [log(value) for value in values]
    return exp(sum(logarithms) / len(logarithms))


def minimal_bytes(shape: Shape, phase: str, parameters: int, element_size: int) -> int:
    """Read and written by any implementation: x, parameters, y; of a step also dL/dy and gradients."""
    numel = shape.input_numel + shape.output_numel + parameters
    if phase == "step":
        numel += 2 * shape.input_numel + shape.output_numel + 2 * parameters
    return numel * element_size


def passes(phase: str) -> int:
    """How many times the forward operations a phase takes.

    A dense step adds the gradients by input and weight. One of rank R takes at least three products
    (y, u, the gradient by coefficients) and three depthwise convolutions (z, the other gradients).
    """
    return 1 if phase == "forward" else 3


def floor_seconds(bytes: float, flops: float, bandwidth: float, rate: float) -> float:
    """The least time by the roofline: `bandwidth` in bytes, `rate` in operations a second."""
    return max(bytes / bandwidth, flops / rate)
