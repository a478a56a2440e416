"""Tables of records, losing rows included, as text or Markdown. Pure functions; no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .records import (
    AUTO,
    CONV,
    FOURIER,
    PHASE_NAMES,
    PHASES,
    Cells,
    Record,
    Row,
    columns,
    compared,
    geometric_mean,
    memory_saving,
    speedup,
)
from .shapes import layer

Table = list[list[str]]
_LABELS = ("shape", "dtype", "pass")
SPEED = (
    "Time in us. How many times faster than nn.Conv; ± the interquartile range of the time in percent "
    "of it, or `once`, as often as it was measured."
)
MEMORY = "Peak memory above inputs and parameters in MiB, and how many times less than nn.Conv."
LAUNCHES = (
    "Time in us: one of many calls in a row, launches included / replayed as a CUDA graph, cold L2 / "
    "as above."
)
ROOFLINE = (
    "Share of the time that memory or arithmetic need at least; TFLOP/s counting the operations of the "
    "direct convolution / those executed."
)
RATES = "Operations executed, in GFLOP/s, and their share of the ceiling."


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


def speed(records: Sequence[Record]) -> Table:
    """`SPEED`; of baselines also the faster layout."""

    def text(cells: Cells, record: Record) -> str:
        parts = [_microseconds(record.seconds)]
        parts.append(_times(speedup(cells, record.column, CONV)))
        if record.rounds == 1:
            parts.append("once")
        elif record.seconds and record.spread is not None:
            parts.append(f"±{record.spread / record.seconds:.0%}")
        if record.baseline:
            parts.append(record.layout)
        return " ".join(parts)

    return _grid(records, text)


def memory(records: Sequence[Record]) -> Table:
    """`MEMORY`, of the rows in which it was measured."""

    def text(cells: Cells, record: Record) -> str:
        if record.memory is None:
            return "-"
        ratio = _times(memory_saving(cells, record.column, CONV))
        return f"{record.memory / 2**20:.1f} {ratio}"

    return _grid([record for record in records if record.memory is not None or record.failure], text)


def launches(records: Sequence[Record]) -> Table:
    """`LAUNCHES`."""

    def text(_: Cells, record: Record) -> str:
        times = (record.eager_seconds, record.graph_seconds, record.seconds)
        return " / ".join(map(_microseconds, times))

    return _grid(records, text)


def roofline(records: Sequence[Record]) -> Table:
    """`ROOFLINE`."""

    def text(_: Cells, record: Record) -> str:
        share = "-" if record.achieved is None else f"{record.achieved:.0%}"
        rates = (record.tflops(record.direct_flops), record.tflops(record.executed_flops))
        return f"{share} {' / '.join(map(_rate, rates))}"

    return _grid(records, text)


def _rate(teraflops: float | None) -> str:
    if teraflops is None:
        return "-"
    return f"{teraflops:.1f}" if teraflops >= 1 else f"{teraflops:.2g}"


def rates(records: Sequence[Record], flops_per_second: Mapping[str, float]) -> Table:
    """`RATES`, by the ceilings of the run."""

    def text(_: Cells, record: Record) -> str:
        if record.seconds is None or record.column == FOURIER:  # whose operations nobody counts
            return "-"
        rate = record.executed_flops / record.seconds
        return f"{rate / 1e9:.1f} {rate / flops_per_second[record.dtype]:.0%}"

    return _grid(records, text)


def by_kernel(records: Sequence[Record], backend: str, baseline: str) -> Table:
    """Times faster, forward / forward + backward: a line per layer, a column per kernel size."""
    ratios: dict[str, dict[int, dict[str, float]]] = {}
    for row, cells in compared(records).items():
        ratio = speedup(cells, backend, baseline)
        if ratio is not None:
            cell = ratios.setdefault(_line(row), {}).setdefault(max(row.shape.kernel_size), {})
            cell[row.phase] = ratio
    kernels = sorted({kernel for cells in ratios.values() for kernel in cells})
    lines = [["layer", *(f"k = {kernel}" for kernel in kernels)]]
    for name, line in ratios.items():
        found = ([line[k].get(phase) for phase in PHASES] if k in line else [] for k in kernels)
        lines.append([name, *(" / ".join(map(_digits, pair)) for pair in found)])
    return lines


def _line(row: Row) -> str:
    """Of `by_kernel`, where fp32 and N = 4 go without saying."""
    text = layer(row.shape)
    text += f", {row.dtype}" if row.dtype != "fp32" else ""
    return text + (f", N = {row.shape.num_features}" if row.shape.num_features != 4 else "")


def _digits(ratio: float | None) -> str:
    """Three of them, as far as they mean anything."""
    if ratio is None:
        return "-"
    return f"{ratio:.0f}x" if ratio >= 99.5 else f"{ratio:.1f}x" if ratio >= 9.95 else f"{ratio:.2f}x"


def span(records: Sequence[Record], backend: str, baseline: str) -> str:
    """The lowest and the highest ratio of `by_kernel` in either pass; '' if there is none."""
    texts = []
    for phase in PHASES:
        rows = (cells for row, cells in compared(records).items() if row.phase == phase)
        ratios = [ratio for cells in rows if (ratio := speedup(cells, backend, baseline)) is not None]
        if ratios:
            low, high = _digits(min(ratios)), _digits(max(ratios))
            texts.append(f"{low} to {high} {PHASE_NAMES[phase]}")
    return ", ".join(texts)


def headline(records: Sequence[Record]) -> list[tuple[str, Table]]:
    """Caption and table of what `auto` gains over nn.ConvNd and over an FFT convolution."""
    pairs = (
        (CONV, "nn.ConvNd in its better layout"),
        (FOURIER, "an FFT convolution with a fixed dense weight, whose spectrum is kept in inference"),
    )
    found = []
    for baseline, text in pairs:
        table = by_kernel(records, AUTO, baseline)
        if len(table) > 1:
            found.append((f"Times faster than {text}, forward / forward + backward:", table))
    return found


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


def align(table: Table, labels: int = len(_LABELS)) -> list[str]:
    """Columns padded to equal width: the first `labels`, names, to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        pairs = enumerate(zip(row, widths, strict=True))
        padded = [t.ljust(w) if i < labels else t.rjust(w) for i, (t, w) in pairs]
        lines.append("  ".join(padded).rstrip())
    return lines


def markdown(table: Table, labels: int = len(_LABELS)) -> list[str]:
    """The first row as the head, the first `labels` columns to the left, the others to the right."""
    head, *body = table
    rule = [":--" if index < labels else "--:" for index in range(len(head))]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *body)]
