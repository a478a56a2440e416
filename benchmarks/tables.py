"""Tables of records, losing rows included, as text or Markdown. Pure functions; no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .records import (
    CONV,
    PHASE_NAMES,
    PHASES,
    Cells,
    Record,
    columns,
    compared,
    geometric_mean,
    memory_saving,
    speedup,
)

Table = list[list[str]]
_LABELS = ("shape", "dtype", "pass")
SPEED_RATIOS = (
    "How many times faster than nn.Conv; ± the interquartile range of the time in percent of it."
)
SPEED = f"Time in us. {SPEED_RATIOS}"
MEMORY = "Peak memory above inputs and parameters in MiB, and how many times less than nn.Conv."
MEMORY_RATIOS = "How many times less peak memory above inputs and parameters than nn.Conv."
LAUNCHES = (
    "Time in us: one of many calls in a row, launches included / replayed as a CUDA graph, cold L2 / "
    "as above."
)
ROOFLINE = (
    "Share of the time that memory or arithmetic need at least; TFLOP/s counting the operations of the "
    "direct convolution / those executed."
)
ROOFLINE_RATIOS = (
    "Share of the time that memory or arithmetic need at least; operations executed per operation of "
    "the direct convolution."
)


def _grid(records: Sequence[Record], text: Callable[[Cells, Record], str]) -> Table:
    """A line per (shape, dtype, pass) and a column per competitor, baselines first."""
    names = (*columns(records, baseline=True), *columns(records, baseline=False))
    lines = [[*_LABELS, *names]]
    for row, cells in compared(records).items():
        line = [row.shape.name, row.dtype, PHASE_NAMES[row.phase]]
        for name in names:
            if name not in cells:
                line.append("-")
            else:
                line.append("FAILED" if cells[name].failure else text(cells, cells[name]))
        lines.append(line)
    return lines


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _microseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:.1f}" if seconds < 1e-3 else f"{seconds * 1e6:.0f}"


def speed(records: Sequence[Record], absolute: bool) -> Table:
    """`SPEED` or `SPEED_RATIOS`; of baselines also the faster layout."""

    def text(cells: Cells, record: Record) -> str:
        parts = [_microseconds(record.seconds)] if absolute else []
        parts.append(_times(speedup(cells, record.column, CONV)))
        if record.seconds and record.spread is not None:
            parts.append(f"±{record.spread / record.seconds:.0%}")
        if record.baseline:
            parts.append(record.layout)
        return " ".join(parts)

    return _grid(records, text)


def memory(records: Sequence[Record], absolute: bool) -> Table:
    """`MEMORY` or `MEMORY_RATIOS`."""

    def text(cells: Cells, record: Record) -> str:
        if record.memory is None:
            return "-"
        ratio = _times(memory_saving(cells, record.column, CONV))
        return f"{record.memory / 2**20:.1f} {ratio}" if absolute else ratio

    return _grid([record for record in records if record.memory is not None or record.failure], text)


def launches(records: Sequence[Record]) -> Table:
    """`LAUNCHES`."""

    def text(_: Cells, record: Record) -> str:
        times = (record.eager_seconds, record.graph_seconds, record.seconds)
        return " / ".join(map(_microseconds, times))

    return _grid(records, text)


def roofline(records: Sequence[Record], absolute: bool) -> Table:
    """`ROOFLINE` or `ROOFLINE_RATIOS`."""

    def text(_: Cells, record: Record) -> str:
        share = "-" if record.achieved is None else f"{record.achieved:.0%}"
        if not absolute:
            return f"{share} {record.executed_flops / record.direct_flops:.2f}"
        rates = (record.tflops(record.direct_flops), record.tflops(record.executed_flops))
        return f"{share} {' / '.join('-' if rate is None else f'{rate:.1f}' for rate in rates)}"

    return _grid(records, text)


def summary(records: Sequence[Record]) -> list[str]:
    """Per backend, baseline and pass: how often it wins, the geometric mean and the worst row."""
    rows = compared(records)
    lines = []
    for backend in columns(records, baseline=False):
        for baseline in columns(records, baseline=True):
            for phase in PHASES:
                ratios = {
                    row: ratio
                    for row, cells in rows.items()
                    if row.phase == phase and (ratio := speedup(cells, backend, baseline))
                }
                if not ratios:
                    continue
                wins = sum(ratio > 1 for ratio in ratios.values())
                mean = geometric_mean(ratios.values())
                worst = min(ratios, key=ratios.__getitem__)
                lines.append(
                    f"{backend} against {baseline}, {PHASE_NAMES[phase]}: faster in {wins} of "
                    f"{len(ratios)} rows, geometric mean {mean:.2f}x, worst {ratios[worst]:.2f}x "
                    f"({worst.shape.name}, {worst.dtype})"
                )
    return lines


def align(table: Table) -> list[str]:
    """Columns padded to equal width: the row's name to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        pairs = enumerate(zip(row, widths, strict=True))
        padded = [t.ljust(w) if i < len(_LABELS) else t.rjust(w) for i, (t, w) in pairs]
        lines.append("  ".join(padded).rstrip())
    return lines


def markdown(table: Table, labels: int = len(_LABELS)) -> list[str]:
    """The first row as the head, the first `labels` columns to the left, the others to the right."""
    head, *body = table
    rule = [":--" if index < labels else "--:" for index in range(len(head))]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *body)]
