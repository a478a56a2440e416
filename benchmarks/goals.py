"""What the fused backends are to reach, and whether they did: a GPU of the H200's class, and CPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from . import shapes
from .records import (
    AUTO,
    CONV,
    FOURIER,
    PHASE_NAMES,
    PHASES,
    Cells,
    Record,
    Row,
    compared,
    geometric_mean,
    memory_saving,
    speedup,
)
from .shapes import Entry, Shape

BACKENDS = ("cuda", "triton")
BASELINES = ("hypernet+conv", "hypernet+conv compiled")
_TIER = ("bf16", 4)
_CHANNELS = 64
CLASSES = ("k=3", "k=5", "k=7", "k=11", "k>=15", "3-D k=5")
# Speed-ups over nn.ConvNd in its better layout.
TARGETS = {
    "forward": dict(zip(CLASSES, (1.0, 1.8, 3.0, 5.0, 8.0, 4.0), strict=True)),
    "step": dict(zip(CLASSES, (0.9, 1.5, 2.5, 4.0, 6.0, 3.0), strict=True)),
}

# The same of `auto` on a CPU, two threads: by dtype and phase, channels, and kernel size.
CPU_KERNELS = (3, 5, 7, 11, 31)
CPU_TARGETS: dict[tuple[str, str], dict[int, tuple[float, ...]]] = {
    ("fp32", "forward"): {
        64: (1.5, 3.5, 6.2, 14, 135),
        128: (1.7, 4.2, 7.8, 18, 190),
        256: (2.0, 5.0, 8.6, 18, 200),
    },
    ("fp32", "step"): {
        64: (1.3, 2.9, 5.0, 11, 150),
        128: (1.4, 3.3, 6.4, 14, 225),
        256: (1.5, 3.7, 6.8, 16, 225),
    },
    ("bf16", "forward"): {128: (1.0, 2.0, 3.0, 8.0, 60)},
}
_CPU_STAGES = frozenset(shapes.CPU_STAGES)


def class_of(shape: Shape) -> str:
    """The class that has a goal of its own, or ''."""
    if min(shape.in_channels, shape.out_channels) < _CHANNELS:
        return ""
    kernel = max(shape.kernel_size)
    name = f"k={kernel}" if kernel < 15 else "k>=15"
    name = {2: name, 3: f"3-D {name}"}.get(shape.dims, "")
    return name if name in CLASSES else ""


@dataclass(frozen=True)
class Verdict:
    """A goal: `target` or more of each of `ratios`. The suite has `rows` such rows."""

    name: str
    target: float
    ratios: dict[Row, float]
    failures: tuple[Row, ...]
    rows: int

    @property
    def missed(self) -> dict[Row, float]:
        """The rows below the target, a failure with ratio 0."""
        low = {row: ratio for row, ratio in self.ratios.items() if ratio < self.target}
        return low | dict.fromkeys(self.failures, 0.0)

    @property
    def status(self) -> str:
        if not self.ratios and not self.failures:
            return "not measured"
        return "missed" if self.missed else "met"

    @property
    def brief(self) -> str:
        """Status and worst row."""
        worst = [f"{min(self.ratios.values()):.2f}x"] if self.ratios else []
        return ": ".join([self.status, *worst])

    @property
    def text(self) -> str:
        """Status, geometric mean and worst row; and how many rows were measured, where not all."""
        if self.status == "not measured":
            return self.status
        parts = [self.status]
        if self.ratios:
            worst = min(self.ratios.values())
            parts.append(f"{geometric_mean(self.ratios.values()):.2f}x, worst {worst:.2f}x")
        if self.failures:
            parts.append(f"{len(self.failures)} failed")
        if (known := len(self.ratios) + len(self.failures)) < self.rows:
            parts.append(f"{known} of {self.rows} rows")
        return ": ".join(parts[:2]) + "".join(f" ({part})" for part in parts[2:])

    def misses(self) -> list[str]:
        """Markdown: the goal if it was missed, and under it each row that did, the worst first."""
        rows = sorted(self.missed.items(), key=lambda item: item[1])
        lines = [f"- {self.name}, >= {self.target}"] if rows else []
        for row, ratio in rows:
            by_how_much = f"{ratio:.2f}x, {self.target - ratio:.2f} short" if ratio else "failed"
            lines.append(f"  - {row.name}: {by_how_much}")
        return lines


def _verdict(
    records: Iterable[Record],
    name: str,
    target: float,
    pair: tuple[str, str],
    admits: Callable[[Row], bool],
    ratio: Callable[[Cells, str, str], float | None] = speedup,
    suite: Sequence[Entry] = shapes.GPU,
) -> Verdict:
    """On `ratio` of the `pair` (backend, baseline) in the rows of `suite` that `admits` takes."""
    planned = [Row(shape, dtype, phase) for shape, dtype in suite for phase in PHASES]
    rows = {row: cells for row, cells in compared(records).items() if admits(row)}
    ratios = {row: value for row, cells in rows.items() if (value := ratio(cells, *pair)) is not None}
    backend = pair[0]
    failed = tuple(row for row, cells in rows.items() if backend in cells and cells[backend].failure)
    return Verdict(name, target, ratios, failed, sum(map(admits, planned)))


def by_class(records: Sequence[Record], backend: str, phase: str) -> list[Verdict]:
    """The verdict on each of `CLASSES` of `backend` against nn.ConvNd."""

    def verdict(kind: str, target: float) -> Verdict:
        def admits(row: Row) -> bool:
            return row.tier == _TIER and row.phase == phase and class_of(row.shape) == kind

        name = f"{backend}, {PHASE_NAMES[phase]}, {kind}"
        return _verdict(records, name, target, (backend, CONV), admits)

    return [verdict(kind, target) for kind, target in TARGETS[phase].items()]


def everywhere(records: Sequence[Record], backend: str) -> list[Verdict]:
    """Ahead of building W in every row, and no training step that takes more memory than nn.ConvNd's."""

    def step(row: Row) -> bool:
        return row.tier == _TIER and row.phase == "step"

    ahead = [
        _verdict(
            records, f"{backend} against {other}", 1.0, (backend, other), lambda row: row.tier == _TIER
        )
        for other in BASELINES
    ]
    name = f"{backend}, peak memory of a training step against nn.Conv"
    return [*ahead, _verdict(records, name, 1.0, (backend, CONV), step, memory_saving)]


def _kernel(row: Row) -> int:
    return max(row.shape.kernel_size)


_Admits = Callable[[Row], bool]
# Of both phases.
_CPU_OTHERS: tuple[tuple[str, float, _Admits], ...] = (
    ("N = 16, k >= 7", 1.0, lambda row: row.shape.num_features == 16 and _kernel(row) >= 7),
    ("3-D, k = 5", 8.0, lambda row: row.shape.dims == 3 and _kernel(row) == 5),
    ("3-D, k = 7", 20.0, lambda row: row.shape.dims == 3 and _kernel(row) == 7),
    ("3-D, k = 11", 50.0, lambda row: row.shape.dims == 3 and _kernel(row) == 11),
    ("U-Net's first layers", 2.0, lambda row: row.shape.family == "unet"),
    ("1-D, k = 127", 8.0, lambda row: row.shape.dims == 1 and _kernel(row) == 127),
    ("1-D, k = 1025", 60.0, lambda row: row.shape.dims == 1 and _kernel(row) == 1025),
    ("every row but 1x1", 0.95, lambda row: row.shape.taps > 1),
)


def on_cpu(records: Sequence[Record], dtype: str, phase: str, channels: int) -> list[Verdict]:
    """The verdict on each of `CPU_KERNELS` for the square layers with so many channels."""

    def verdict(kernel: int, target: float) -> Verdict:
        def admits(row: Row) -> bool:
            known = row.shape in _CPU_STAGES and row.shape.in_channels == channels
            return known and (row.dtype, row.phase, _kernel(row)) == (dtype, phase, kernel)

        name = f"{channels} channels, {dtype}, {PHASE_NAMES[phase]}, k = {kernel}"
        return _verdict(records, name, target, (AUTO, CONV), admits, suite=shapes.CPU)

    targets = CPU_TARGETS[dtype, phase][channels]
    return [verdict(*pair) for pair in zip(CPU_KERNELS, targets, strict=True)]


def elsewhere_on_cpu(records: Sequence[Record]) -> list[Verdict]:
    """The other layers, a dense convolution by FFT, and memory as PyTorch's allocator counts it."""

    def verdict(name: str, target: float, admits: _Admits, other: str = CONV) -> Verdict:
        return _verdict(records, name, target, (AUTO, other), admits, suite=shapes.CPU)

    def step(row: Row) -> bool:
        return row.phase == "step" and row.shape.taps > 1

    memory = "peak memory of a training step"
    return [
        *(verdict(*goal) for goal in _CPU_OTHERS),
        verdict("against an FFT convolution, k >= 11", 1.0, lambda row: _kernel(row) >= 11, FOURIER),
        _verdict(records, memory, 1.0, (AUTO, CONV), step, memory_saving, shapes.CPU),
    ]
