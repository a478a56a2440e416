"""Measures tiles of the CPU engine beside each other: what its estimates are judged by, and priced.

    python -m benchmarks.tiles FILE          measure, and write FILE
    python -m benchmarks.tiles FILE --fit    print the prices with which FILE's estimates deviate least

Of each layer, forward and all gradients together: the tiles of either algorithm that are estimated to be
the fastest, and as many others, drawn from those of up to twice their time.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hyperconv_ext.backends import dtype_name
from hyperconv_ext.backends.cpu import launch, tiles
from hyperconv_ext.problem import OPS, Device, Plan, Problem

from . import competitors, machine
from .shapes import CPU, Shape

_SECONDS = 1.0  # for all tiles of one algorithm, at least three rounds
_KEPT = 5
_LONGEST = 400  # taps of a kernel whose sums are tried by taps
# Layers whose like the prices were not fitted to: other channels, ranks, sizes that are no squares.
UNSEEN = (
    Shape("unseen", 2, 96, 96, (48, 48), (5, 5)),
    Shape("unseen", 2, 96, 96, (48, 48), (9, 9)),
    Shape("unseen", 1, 160, 80, (20, 20), (7, 7)),
    Shape("unseen", 2, 32, 32, (80, 80), (13, 13)),
    Shape("unseen", 1, 192, 192, (12, 12), (3, 3), num_features=8),
    Shape("unseen", 2, 64, 64, (40, 72), (7, 7)),
    Shape("unseen", 2, 48, 48, (100, 100), (9, 9)),
    Shape("unseen", 2, 16, 16, (20, 20, 20), (5, 5, 5)),
    Shape("unseen", 2, 64, 64, (1000,), (63,)),
    Shape("unseen", 4, 64, 64, (14, 14), (3, 3)),
)


def problem(shape: Shape, dtype: str, gradients: bool) -> Problem:
    """The forward pass of a layer, or all its gradients together, on a CPU."""
    forward = competitors.problem(shape, OPS[0], dtype_name(competitors.DTYPES[dtype]), Device("cpu"))
    if forward.geometry.trimmed:
        forward = replace(forward, geometry=forward.geometry.trimmed[0])
    return replace(forward, op=OPS[1], wanted=(True, True, True)) if gradients else forward


def rows() -> Iterator[tuple[Shape, str, bool]]:
    """(layer, dtype, whether the prices were fitted to it)."""
    for shape, dtype in CPU:
        if shape.stride == 1 and shape.groups == 1 and shape.taps > 1 and shape.in_channels >= 16:
            yield shape, dtype, True
    for shape in UNSEEN:
        yield shape, "fp32", False


def _tried(found: Problem, algorithm: str) -> list[tiles.Tile]:
    rated = sorted(
        ((tiles.seconds(found, tile), tile) for tile in tiles.candidates(found, algorithm)),
        key=lambda pair: pair[0],
    )
    if not rated or (algorithm == "basis" and found.geometry.taps > _LONGEST):
        return []
    rest = [tile for seconds, tile in rated[_KEPT:] if seconds < 2 * rated[0][0]]
    return [tile for _, tile in rated[:_KEPT]] + random.sample(rest, min(_KEPT, len(rest)))


def _calls(shape: Shape, dtype: str, plans: Sequence[Plan]) -> list[Callable[[], object]]:
    """What the plans compute, of the same tensors."""
    geometry, kind = plans[0].problem.geometry, competitors.DTYPES[dtype]

    def activation(channels: int, size: Sequence[int]) -> torch.Tensor:
        fresh = torch.randn(shape.batch, *size, channels).to(kind)
        return fresh.movedim(-1, 1)

    input = activation(shape.in_channels, geometry.input_size)
    coefficients = torch.randn(shape.out_channels, shape.in_channels, shape.rank).to(kind) * 0.05
    basis = torch.randn(shape.rank, *geometry.kernel_size) * 0.2
    if plans[0].problem.wanted is None:
        return [partial(launch.basis_conv_fwd, plan, input, coefficients, basis, None) for plan in plans]
    grad = activation(shape.out_channels, geometry.output_size)
    operands = (grad, input, coefficients, basis, (True, True, True))
    return [partial(launch.basis_conv_bwd, plan, *operands) for plan in plans]


def _seconds(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Medians of rounds of one call each."""
    for call in calls:
        call()
    taken: list[list[float]] = [[] for _ in calls]
    begin = time.perf_counter()
    while len(taken[0]) < 3 or (time.perf_counter() - begin < _SECONDS and len(taken[0]) < 15):
        for call, seconds in zip(calls, taken, strict=True):
            before = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - before)
    return [median(seconds) for seconds in taken]


def measure() -> list[dict[str, Any]]:
    """All rows, each with the tiles that were tried, as `tile` reads them."""
    random.seed(0)
    found = []
    for shape, dtype, fitted in rows():
        for gradients in (False, True):
            subject = problem(shape, dtype, gradients)
            cells = []
            for algorithm in ("basis", "fft"):
                tried = _tried(subject, algorithm)
                if not tried:
                    continue
                plans = [Plan(subject, "cpu", algorithm, tile, 0.0) for tile in tried]
                taken = _seconds(_calls(shape, dtype, plans))
                cells += [
                    asdict(tile) | {"seconds": float(f"{seconds:.4g}")}
                    for tile, seconds in zip(tried, taken, strict=True)
                ]
            row = {"layer": asdict(shape), "dtype": dtype, "gradients": gradients, "fitted": fitted}
            found.append(row | {"tiles": cells})
            best = min(cell["seconds"] for cell in cells)
            kind = "gradients" if gradients else "forward"
            print(f"{shape.name} {dtype} {kind} {best * 1e3:.2f} ms", flush=True)
    return found


def shape_of(row: dict[str, Any]) -> Shape:
    """The layer of a row."""
    fields = dict(row["layer"])
    return Shape(**fields | {key: tuple(fields[key]) for key in ("size", "kernel_size")})


def tile_of(cell: dict[str, Any]) -> tiles.Tile:
    """The tile of a row's cell."""
    circles = cell["circles"]
    fields = {key: value for key, value in cell.items() if key not in ("seconds", "rest")}
    shape = tuple(cell["shape"])
    return tiles.Tile(**fields | {"shape": shape, "circles": circles and tuple(circles)})


def fit(found: list[dict[str, Any]]) -> tiles.Counts:
    """Prices, none below 0, with the least squares of relative deviations, large ones counting less."""
    lines, times = [], []
    for row in found:
        if row["fitted"]:
            subject = problem(shape_of(row), row["dtype"], row["gradients"])
            for cell in row["tiles"]:
                lines.append(list(tiles.counts(subject, tile_of(cell))))
                times.append(cell["seconds"] - tiles.CALL)
    counts = torch.tensor(lines, dtype=torch.float64) / torch.tensor(times, dtype=torch.float64)[:, None]
    scale = counts.amax(0).clamp_min(1e-300)
    counts, weights = counts / scale, torch.ones(len(times), dtype=torch.float64)
    prices = torch.zeros(counts.shape[1], dtype=torch.float64)
    for _ in range(8):
        square = counts.T @ (weights[:, None] * counts)
        target = counts.T @ weights
        for _ in range(2000):  # coordinate by coordinate
            for index in range(len(prices)):
                rest = target[index] - square[index] @ prices + square[index, index] * prices[index]
                prices[index] = max(0.0, float(rest / square[index, index].clamp_min(1e-300)))
        weights = 1 / (counts @ prices - 1).abs().clamp_min(0.03)
    return tiles.Counts(*(prices / scale).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures tiles of the CPU engine beside each other.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--fit", action="store_true")
    arguments = parser.parse_args()
    if arguments.fit:
        for name, price in fit(json.loads(arguments.file.read_text())["rows"])._asdict().items():
            print(f"{name}={price:.3g},")
        return
    document = {"machine_info": machine.describe(), "rows": measure()}
    arguments.file.write_text(json.dumps(document, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
