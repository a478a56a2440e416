"""What the cost model says of a Hopper that is not here: `python benchmarks/predictions.py`.

Nothing in it is measured. It writes clocks by resource of each pass beside a dense convolution at 60
and 75% of the tensor cores' peak to benchmarks/results/predicted/hopper.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import competitors, shapes, tables
from benchmarks.shapes import Shape
from hyperconv_ext.backends import cost
from hyperconv_ext.backends.cuda import tiles, wgmma
from hyperconv_ext.backends.figures import figures
from hyperconv_ext.problem import OPS, Device, Op, Wanted

H200 = Device("cuda", wgmma.CAPABILITY, 132)
EFFICIENCIES = (0.6, 0.75)  # of the peak, that a dense convolution may reach
FILE = Path(__file__).resolve().parent / "results" / "predicted" / "hopper.md"
TOGETHER = "∂x, ∂A"
PASSES: dict[str, tuple[Op, Wanted | None]] = {
    **{name: (op, None) for name, op in zip(("y", "∂x", "∂A", "∂φ"), OPS, strict=True)},
    TOGETHER: (OPS[1], (True, True, False)),
}


def _shapes(features: int) -> list[Shape]:
    found = (replace(s, num_features=features) for s in shapes.RESNET if s.in_channels in (64, 128, 256))
    return sorted(found, key=lambda shape: (shape.in_channels, shape.kernel_size))


def _candidates(shape: Shape, name: str) -> dict[str, list[cost.Work]]:
    """Of a pass by algorithm: what its launches execute. `wgmma` only where it takes the shape."""
    op, wanted = PASSES[name]
    problem = competitors.problem(shape, op, "bfloat16", H200, aligned=True)
    problem = replace(problem, wanted=wanted)
    found = {}
    if wanted is None and (choice := tiles.choose(problem)) is not None:
        found["basis"] = tiles.works(problem, choice[0])
    if not wgmma.reason(problem):
        found["wgmma"] = wgmma.works(problem, wgmma.choose(problem)[0])
    return found


def dense_seconds(shape: Shape, efficiency: float) -> float:
    """Of one pass of a dense convolution at this part of the peak."""
    machine = figures(H200)
    peak = machine.library.half * machine.clock * H200.processors
    multiply_adds = shape.batch * shape.in_channels * shape.out_channels * shape.meetings
    return multiply_adds / (efficiency * peak)


def _quickest(shape: Shape, name: str) -> float:
    """Seconds of a pass by the best algorithm; infinite where none computes it."""
    found = _candidates(shape, name).values()
    return min((cost.seconds(works, H200) for works in found), default=math.inf)


def by_resource(chosen: Iterable[Shape]) -> tables.Table:
    """A line for each shape, pass and algorithm: thousands of clocks by resource, and microseconds."""
    dense = (f"dense at {efficiency:.0%}, µs" for efficiency in EFFICIENCIES)
    lines = [["layer", "k", "pass", "algorithm", *cost.Parts._fields, "estimate, µs", *dense]]
    clock = figures(H200).clock
    for shape in chosen:
        for name in PASSES:
            for algorithm, works in _candidates(shape, name).items():
                parts = [sum(part) for part in zip(*(cost.parts(w, H200) for w in works), strict=True)]
                dense_times = (dense_seconds(shape, e) * (1 + (name == TOGETHER)) for e in EFFICIENCIES)
                times = [cost.seconds(works, H200), *dense_times]
                place = [shapes.layer(shape), str(shape.kernel_size[0]), name, algorithm]
                clocks = [f"{part * clock / 1e3:.1f}" for part in parts]
                lines.append([*place, *clocks, *(f"{1e6 * time:.1f}" for time in times)])
    return lines


def ratios() -> tables.Table:
    """Times faster than a dense convolution at either efficiency, of the quickest algorithms."""
    lines = [["layer", "N", "k", "forward", "forward + backward"]]
    for features in (4, 8):
        for shape in _shapes(features):
            y, dx, da, dphi, both = (_quickest(shape, name) for name in PASSES)
            place = [shapes.layer(shape), str(features), str(shape.kernel_size[0])]
            cells = []
            for passes, time in ((1, y), (3, y + min(dx + da, both) + dphi)):
                found = [passes * dense_seconds(shape, e) / time for e in reversed(EFFICIENCIES)]
                cells.append(" to ".join(f"{ratio:.1f}x" for ratio in found))
            lines.append([*place, *cells])
    return lines


_PAGE = """# Predictions for a Hopper

**Nothing here is measured: no GPU has run these kernels.** `python benchmarks/predictions.py` writes
it from the cost model (`hyperconv_ext/backends/cost.py`), by which `auto` ranks candidates: counts of
each kernel's work over data-sheet figures of an H200 ({processors} multiprocessors at {clock:g} GHz).
Latency is in it as a guess. It ranks on one machine; take no ratio here for a speed.

bfloat16, channels last, cold caches. A dense convolution is given 60 or 75% of the tensor cores' peak,
and nothing for memory and launches. `basis`: the kernels of every generation, by mma.sync; `wgmma`:
Hopper's own, which take functions in packs of five: one at N = 4, two at N = 8. `∂x, ∂A`: both in
one kernel, which takes one pack and 64 channels; where that is quicker it is what `forward + backward`
counts.

## Times faster

From the dense convolution at 75% to that at 60% of the peak. The default is N = 4 below 49 taps, 8 from
there on.

{ratios}

## Clocks by resource

Thousands of clocks of the busiest multiprocessor, all launches of a pass together: `products`, of the
tensor cores and what is scalar; `shared`, bytes through shared memory; `cache`, from and to L2; `waits`,
for the loads of a step; `dram`, of all multiprocessors. The slowest decides, and a quarter of the others
is added, and the launches. First N = 4:

{resources_4}

N = 8 where it is the default:

{resources_8}
"""


def text() -> str:
    """The page, a function of the model alone."""
    large = [shape for shape in _shapes(8) if math.prod(shape.kernel_size) >= 49]
    return _PAGE.format(
        processors=H200.processors,
        clock=figures(H200).clock / 1e9,
        ratios="\n".join(tables.markdown(ratios(), labels=3)),
        resources_4="\n".join(tables.markdown(by_resource(_shapes(4)), labels=4)),
        resources_8="\n".join(tables.markdown(by_resource(large), labels=4)),
    )


if __name__ == "__main__":
    FILE.write_text(text())
    print(FILE)
