"""What launches execute, and how long that takes by a machine's figures: one model for every backend."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..problem import Device, Problem
from .figures import Number, figures

_WIDTHS = {"float16": 2, "bfloat16": 2, "float64": 8}  # bytes of an element; any other: 4

# Unmeasured leads, as the figures are.
_UNHIDDEN = 0.25  # of what could run beside the slowest part
_STEP_CLOCKS = 600  # from a step's loads to its barrier, while the step before it computes
_SETUP_CLOCKS = 3000  # tables, first loads, epilogue
_WARPS = 8  # two to each of the four schedulers keep them busy


class Work(NamedTuple):
    """What one launch executes.

    All blocks together: `multiply_adds`, padding included, and `dram`, the bytes that cross to or from
    memory even if every second use meets a cache. The busiest of the `blocks`, of `warps` each and
    `resident` of them to a multiprocessor: multiply-adds of `products` in format `number` (`library`: by
    a library's kernel) and of `scalars` in ordinary FP32 units; bytes through `shared` memory or L1, and
    from or to L2 `cache`; `steps` that wait for their loads.
    """

    number: Number = "ieee"
    library: bool = False
    multiply_adds: float = 0
    dram: float = 0
    blocks: int = 1
    warps: int = _WARPS
    resident: int = 1
    products: float = 0
    scalars: float = 0
    shared: float = 0
    cache: float = 0
    steps: float = 0


def seconds(works: Iterable[Work], device: Device) -> float:
    """Launches one after the other on a device."""
    return sum(_launch_seconds(work, device) for work in works)


class Parts(NamedTuple):
    """Seconds of a launch by resource, if there were no other: `waits` for the loads of its steps."""

    products: float
    shared: float
    cache: float
    waits: float
    dram: float


def parts(work: Work, device: Device) -> Parts:
    """Of one launch."""
    machine = figures(device)
    waves, resident = _waves(work, device)
    busy = min(1.0, work.warps * resident / _WARPS)
    rates = machine.library if work.library else machine.products
    arithmetic = work.products / getattr(rates, work.number) + work.scalars / rates.ieee
    unit = waves / machine.clock
    return Parts(
        unit * arithmetic / busy,
        unit * work.shared / machine.shared_bandwidth,
        unit * work.cache / machine.cache_bandwidth,
        unit * work.steps * _STEP_CLOCKS / resident,
        work.dram / machine.dram_bandwidth,
    )


def _waves(work: Work, device: Device) -> tuple[int, int]:
    """(blocks of the busiest multiprocessor, how many of them run at once)."""
    waves = -(-work.blocks // device.processors)
    return waves, min(work.resident, waves)


def _launch_seconds(work: Work, device: Device) -> float:
    """The slowest resource and a share of the others: no less than either roofline."""
    machine, found = figures(device), parts(work, device)
    waves, resident = _waves(work, device)
    slowest = max(found)
    exposed = _UNHIDDEN * (sum(found) - slowest)
    return slowest + exposed + waves * _SETUP_CLOCKS / machine.clock / resident + machine.launch


def flops(works: Iterable[Work]) -> float:
    """Operations executed, two for each multiply-add."""
    return 2.0 * sum(work.multiply_adds for work in works)


def width(problem: Problem) -> int:
    """Bytes of an element of the activations."""
    return _WIDTHS.get(problem.dtype, 4)


def input_bytes(problem: Problem) -> float:
    """Of x, or of its gradient; inputs that no tap meets are not read."""
    geometry = problem.geometry
    positions = geometry.input_positions
    if problem.op != "basis_conv_bwd_input":
        positions = min(positions, geometry.output_positions * geometry.taps)
    return float(width(problem) * problem.batch * problem.in_channels * positions)


def output_bytes(problem: Problem) -> float:
    """Of y, or of the gradient by it."""
    positions = problem.batch * problem.geometry.output_positions
    return float(width(problem) * problem.out_channels * positions)


def coefficients(problem: Problem) -> int:
    """Numbers in A."""
    return problem.out_channels * problem.in_channels // problem.geometry.groups * problem.rank


def gradient_numbers(problem: Problem) -> int:
    """Numbers of a gradient that is a sum over all outputs; 0 for a convolution."""
    if problem.op == "basis_conv_bwd_coeff":
        return coefficients(problem)
    return problem.rank * problem.geometry.taps if problem.op == "basis_conv_bwd_basis" else 0


def compulsory_bytes(problem: Problem) -> float:
    """Of x, y (or their gradients) and A, or the gradient that takes one's place: any algorithm's."""
    sizes = input_bytes(problem) + output_bytes(problem) + width(problem) * coefficients(problem)
    return sizes + (4 * gradient_numbers(problem) if problem.op == "basis_conv_bwd_basis" else 0)


def around(
    problem: Problem, bands: float, packed: float, slices: int, atomic: bool
) -> tuple[Work, float, list[Work]]:
    """(the launch before a fused operator's main one, the main one's `dram`, the launches after it).

    Bands and A packed are written first, of so many bytes (0: not needed). The float32 sums that a
    gradient leaves in `slices` are added up, those of atomic additions begin as zeros; the gradient of A
    is cast.
    """
    element, weights, numbers = width(problem), coefficients(problem), gradient_numbers(problem)
    before = Work(dram=bands + packed + (element * weights if packed else 0))
    partial = 4 * numbers * (1 if atomic else slices)
    after = []
    if atomic:
        after.append(Work(dram=4 * numbers))
    elif slices > 1:
        after.append(Work(dram=partial + 4 * numbers))
    if problem.op == "basis_conv_bwd_coeff" and element < 4:
        after.append(Work(dram=(4 + element) * numbers))
    return before, compulsory_bytes(problem) + bands + packed + partial, after
