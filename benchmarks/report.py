"""The table at the end: every measured row, losing ones included. Pure functions of records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, log


@dataclass
class Record:
    """One benchmark; `seconds` stays None if it failed its gate or raised."""

    shape: str
    dtype: str
    phase: str
    column: str
    layout: str
    baseline: bool
    seconds: float | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Cell:
    """A column's entry in a row: the faster of its layouts."""

    seconds: float | None
    memory: int | None
    layout: str


Row = tuple[str, str, str]
ROW_HEADER = ("shape", "dtype", "pass")


def _cells(records: Iterable[Record]) -> dict[Row, dict[str, Cell]]:
    """Rows in the order they ran; a column in which any layout failed counts as failed."""
    gathered: dict[Row, dict[str, list[Record]]] = {}
    for record in records:
        row = (record.shape, record.dtype, record.phase)
        gathered.setdefault(row, {}).setdefault(record.column, []).append(record)
    return {
        row: {column: _best(group) for column, group in columns.items()}
        for row, columns in gathered.items()
    }


def _best(records: Sequence[Record]) -> Cell:
    best = records[0]
    for record in records:
        if record.seconds is None:
            return Cell(None, None, record.layout)
        if best.seconds is None or record.seconds < best.seconds:
            best = record
    return Cell(best.seconds, best.memory, best.layout)


def _speedup(cells: dict[str, Cell], backend: str, baseline: str) -> float | None:
    """How many times faster `backend` is than `baseline`, where both were measured."""
    if backend not in cells or baseline not in cells:
        return None
    ours, theirs = cells[backend].seconds, cells[baseline].seconds
    return None if ours is None or theirs is None else theirs / ours


def _microseconds(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _texts(cell: Cell | None) -> tuple[str, str]:
    """(time, memory) as printed."""
    if cell is None:
        return "-", "-"
    if cell.seconds is None:
        return "FAILED", "-"
    memory = "-" if cell.memory is None else f"{cell.memory / 2**20:.1f}"
    return _microseconds(cell.seconds), memory


def _columns(records: Iterable[Record], baseline: bool) -> tuple[str, ...]:
    return tuple(dict.fromkeys(r.column for r in records if r.baseline == baseline))


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to equal width: the row's name to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        pairs = enumerate(zip(row, widths, strict=True))
        padded = [t.ljust(w) if i < len(ROW_HEADER) else t.rjust(w) for i, (t, w) in pairs]
        lines.append("  ".join(padded).rstrip())
    return lines


def table(records: Sequence[Record]) -> list[str]:
    """One line per (shape, dtype, pass): time, memory and layout of the baselines; time, memory and
    speed-up over each baseline of the backends.
    """
    baselines, backends = _columns(records, baseline=True), _columns(records, baseline=False)
    header = list(ROW_HEADER)
    for name in baselines:
        header += [f"{name} us", "MiB", "layout"]
    for name in backends:
        header += [f"{name} us", "MiB", *(f"vs {baseline}" for baseline in baselines)]
    rows = [header]
    for row, cells in _cells(records).items():
        line = list(row)
        for name in baselines:
            line += [*_texts(cells.get(name)), cells[name].layout if name in cells else "-"]
        for name in backends:
            line += _texts(cells.get(name))
            for baseline in baselines:
                speedup = _speedup(cells, name, baseline)
                line.append("-" if speedup is None else f"{speedup:.2f}x")
        rows.append(line)
    return _align(rows)


def summary(records: Sequence[Record]) -> list[str]:
    """Per backend, baseline and pass: how often it wins, the geometric mean and the worst row."""
    rows = _cells(records)
    lines = []
    for backend in _columns(records, baseline=False):
        for baseline in _columns(records, baseline=True):
            for phase in dict.fromkeys(row[2] for row in rows):
                ratios = {
                    row: ratio
                    for row, cells in rows.items()
                    if row[2] == phase and (ratio := _speedup(cells, backend, baseline))
                }
                if not ratios:
                    continue
                wins = sum(ratio > 1 for ratio in ratios.values())
                mean = exp(sum(map(log, ratios.values())) / len(ratios))
                worst = min(ratios, key=ratios.__getitem__)
                lines.append(
                    f"{backend} against {baseline}, {phase}: faster in {wins} of {len(ratios)} rows, "
                    f"geometric mean {mean:.2f}x, worst {ratios[worst]:.2f}x ({worst[0]}, {worst[1]})"
                )
    return lines
