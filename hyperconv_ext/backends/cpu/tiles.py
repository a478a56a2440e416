"""The choice of algorithm, blocks and circles on a CPU: pure functions of numbers.

Every operator is one loop nest over tiles of a *target* (where its result is, or what it is summed
against), which reads a patch of a *source* for each tile and block of source channels; see
`csrc/cpu/convolve.h`. The row map of `backends.lattice` says which, in either direction.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch

from ...problem import Problem, WeightShape
from ..lattice import Axis, Lattice, lattice
from . import library

Triple = tuple[int, int, int]

OUTPUT, COEFFICIENTS, BASIS = library.OUTPUT, library.COEFFICIENTS, library.BASIS
_BITS = {
    "basis_conv_fwd": OUTPUT,
    "basis_conv_bwd_input": OUTPUT,
    "basis_conv_bwd_coeff": COEFFICIENTS,
    "basis_conv_bwd_basis": BASIS,
}
_RADICES = (8, 6, 5, 4, 3)
_STAGES = 4
_VECTOR_BYTES = {"avx512_bf16": 64, "avx512": 64, "avx2": 32, "baseline": 16}
_REGISTERS = {"avx512_bf16": 32, "avx512": 32, "avx2": 16, "baseline": 16}
_MIB = 1 << 20

# Arithmetic instructions a point of the transforms of one stage.
_BUTTERFLY = {3: 4.7, 4: 4.0, 5: 7.2, 6: 8.0, 8: 7.0}
_SLICES, _PARTS = 4, 8
_PLANES = 96  # rows of z in planes, which are to stay in a cache
_SLICE_BYTES = 1 << 22  # of sums, from which on there are two slices


@dataclass(frozen=True)
class Tile:
    """How a problem is computed.

    `shape`: positions of the target along the axes of one phase. `circles`: points of the transforms,
    None by taps. `transposed`: the source is y (or its gradient) and the target x. Sums are dealt into
    `slices` of the tiles and `parts` of the blocks of source channels. `planes`: lanes are positions in
    the place of source channels. `rest`: how the sums of a joint problem are computed, if not with the
    output.
    """

    shape: Triple
    circles: Triple | None
    transposed: bool
    slices: int
    parts: int
    planes: bool = False
    rest: Tile | None = None

    @property
    def name(self) -> str:
        """For people."""
        text = "x".join(map(str, self.shape)) + (" in planes" if self.planes else "")
        return text if self.circles is None else f"{text} of {'x'.join(map(str, self.circles))}"


class Channels(NamedTuple):
    """Of the source and the target, per group; and whether lanes hold the groups of a depthwise one."""

    source: int
    target: int
    lanewise: bool


def channels(problem: Problem, transposed: bool) -> Channels:
    """Those of a problem in one direction."""
    groups = problem.geometry.groups
    size_i, size_o = problem.in_channels // groups, problem.out_channels // groups
    pair = (size_o, size_i) if transposed else (size_i, size_o)
    return Channels(*pair, lanewise=groups > 1 and pair == (1, 1))


@lru_cache
def radices(points: int) -> tuple[int, ...] | None:
    """Those of a transform's stages, at most four of them; None if there are none for that size."""
    if points == 1:
        return ()
    best: tuple[int, ...] | None = None
    for radix in _RADICES:
        if points % radix == 0:
            rest = radices(points // radix)
            if rest is not None and len(rest) < _STAGES and (best is None or len(rest) + 1 < len(best)):
                best = (*rest, radix)
    return best


@lru_cache
def roots(points: int) -> tuple[float, ...]:
    """cos and sin of 2 pi i j / length for each stage but the last, by i from 1 on, then j."""
    numbers: list[float] = []
    length = points
    for radix in (radices(points) or ())[:-1]:
        rest = length // radix
        for i in range(1, radix):
            for j in range(rest):
                angle = 2 * math.pi * (i * j % length) / length
                numbers += (math.cos(angle), math.sin(angle))
        length = rest
    return tuple(numbers)


@lru_cache
def _all_sizes() -> tuple[int, ...]:
    """Of circles, products of one to four radices, in order."""
    products = {1}
    sizes: set[int] = set()
    for _ in range(_STAGES):
        products = {points * radix for points in products for radix in _RADICES}
        sizes |= products
    return tuple(sorted(sizes))


@lru_cache
def circle_sizes(least: int) -> tuple[int, ...]:
    """The three smallest sizes of circles from `least` points on: fewer or none beyond 4096."""
    sizes = _all_sizes()
    first = bisect_left(sizes, least)
    return sizes[first : first + 3]


def map_of(problem: Problem, tile: Tile) -> Lattice:
    """The row map of a tile."""
    return lattice(problem.geometry, problem.batch, tile.transposed, tile.shape, gaps=False)


@lru_cache(maxsize=4096)
def wanted_of(problem: Problem) -> int:
    """Bits of what is asked for."""
    return sum(_BITS[op] for op in problem.ops)


def directions(problem: Problem) -> tuple[bool, ...]:
    """Which may be the target: where the output is, or either."""
    if wanted_of(problem) & OUTPUT:
        return (problem.op == "basis_conv_bwd_input",)
    return (False, True)


def _lanes(problem: Problem) -> tuple[int, int]:
    """(lanes of a vector, registers)."""
    capability = library.capability() or "avx2"
    width = 8 if problem.dtype == "float64" else 4
    return _VECTOR_BYTES[capability] // width, _REGISTERS[capability]


def _step(registers: int) -> int:
    """Positions whose sums over taps are formed at once: `kStep` of csrc/cpu/taps.h."""
    return 4 if registers == 32 else 2


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _counts(axes: tuple[Axis, Axis, Axis]) -> Triple:
    """Positions of the largest phase along each axis."""
    depth, height, width = (-(-axis.out_size // axis.phases) for axis in axes)
    return depth, height, width


def _tap_shapes(counts: Triple, step: int) -> Iterator[Triple]:
    """Blocks of about a hundred positions, long along the last axis."""
    width_sizes = {min(_up(counts[2], step), size) for size in (8, 16, 32, 64, 128)}
    for width in width_sizes:
        for height in {min(counts[1], size) for size in (1, 2, 4, 7, 8, 16)}:
            for depth in {min(counts[0], size) for size in (1, 2, 4)}:
                if depth * height * width <= 192:
                    yield depth, height, width


def _circle(axis: Axis, tile: int) -> int:
    """Points that one axis of a tile needs: its patch, less the zeros that can share the circle's."""
    patch = tile - 1 + axis.taps
    count = -(-axis.out_size // axis.phases)
    if tile < count:
        return patch
    # One tile: inputs exist for first <= l < last; l + points must be beyond the patch for them. Both
    # sink from phase to phase of those that agree modulo `modulus` and have as many positions, so that
    # the first and the last of these decide.
    points, full = max(tile, axis.taps), axis.out_size - axis.phases * (count - 1)
    for begin, end, positions in ((0, full, count), (full, axis.phases, count - 1)):
        ends = {*range(begin, end)[: axis.modulus], *range(begin, end)[-axis.modulus :]}
        for phase in ends:
            num = axis.scale * phase + axis.shift
            tap0 = (num // axis.divisor * axis.inverse) % axis.residues
            origin = (num - tap0 * axis.dilation) // axis.modulus - axis.back
            patch = positions - 1 + axis.taps
            first = max(0, -(origin // axis.step))
            last = min(patch, (axis.in_size - 1 - origin) // axis.step + 1)
            if first < last:
                points = max(points, last, patch - first)
    return points


def _fft_sizes(axis: Axis, count: int, pieces: int, kept: int) -> list[tuple[int, int]]:
    """(positions, circle) of one axis: all of it, or evenly in up to so many pieces, the `kept` best."""
    if axis.taps == 1 and axis.in_size == 1 and count == 1:
        return [(1, 1)]
    sizes = [(count, size) for size in circle_sizes(max(_circle(axis, count), 3))[:2]]
    for tile in sorted({-(-count // parts) for parts in range(2, pieces + 1)}):
        if 2 <= tile < count and 2 * tile >= axis.taps:
            sizes += [(tile, size) for size in circle_sizes(max(tile - 1 + axis.taps, 3))[:2]]

    def work(choice: tuple[int, int]) -> float:
        tile, circle = choice
        stages, arithmetic = _arithmetic(circle)
        return -(-count // tile) * circle * (arithmetic + 4 * stages)

    # The whole axis may be the one without a halo in memory, many pieces the ones that stay in a cache.
    return sizes[:2] + sorted(sizes[2:], key=work)[:kept]


def _fft_shapes(axes: tuple[Axis, Axis, Axis]) -> Iterator[tuple[Triple, Triple]]:
    """(positions, circles) of tiles."""
    held = _counts(axes)
    dims = sum(axis.in_size > 1 or count > 1 for axis, count in zip(axes, held, strict=True))
    choices = [
        _fft_sizes(axis, count, {1: 64, 2: 8}.get(dims, 4), {1: 24, 2: 6}.get(dims, 3))
        for axis, count in zip(axes, held, strict=True)
    ]
    for depth, circle_d in choices[0]:
        for height, circle_h in choices[1]:
            for width, circle_w in choices[2]:
                yield (depth, height, width), (circle_d, circle_h, circle_w)


def _plane_shapes(counts: Triple, lanes: int) -> Iterator[Triple]:
    """Blocks of some hundred positions, in whole vectors along the last axis."""
    for width in {min(_up(counts[2], lanes), size * lanes) for size in (1, 2, 4, 8)}:
        for height in {min(counts[1], size) for size in (1, 4, 8, 16)}:
            for depth in {min(counts[0], size) for size in (1, 4)}:
                if depth * height * width <= 512:
                    yield depth, height, width


class Counts(NamedTuple):
    """What a tile's estimate is made of, each with its price: mostly instructions on whole vectors.

    `multiplied`: multiply-adds of products with A. `tapped`: those of sums over taps. `read`, `written`:
    vectors of patches and of results; `rows` of patches. `passes`, `turned`: loads and stores, and
    arithmetic, of transforms. `spilled`: passes beyond what the caches hold. `packed`: of A. `summed`:
    of lanes. `gathered`: numbers of planes.
    """

    multiplied: float = 0.0
    tapped: float = 0.0
    read: float = 0.0
    rows: float = 0.0
    written: float = 0.0
    passes: float = 0.0
    turned: float = 0.0
    spilled: float = 0.0
    packed: float = 0.0
    summed: float = 0.0
    gathered: float = 0.0


# Seconds on two threads of a Zen 4 with AVX-512, by which the estimates of the tiles that were measured
# (benchmarks/results/cpu/tiles.json) deviate least.
_PRICES = Counts(
    multiplied=1.69e-10,
    tapped=1.63e-10,
    read=7e-11,
    rows=8.1e-9,
    written=4.95e-9,
    passes=5.76e-10,
    turned=1.56e-10,
    spilled=3.35e-10,
    packed=2.1e-8,
    summed=2.41e-9,
    gathered=2.3e-10,
)
CALL = 10e-6  # seconds before and after the loops


def _spill(size: float) -> float:
    """How much a pass over `size` bytes waits for them: from the second cache on, then for memory."""
    mib = size / _MIB
    return min(max((mib - 0.3) / 0.2, 0), 1) + 1.2 * max(mib - 3, 0)


def _arithmetic(points: int) -> tuple[int, float]:
    """(stages, instructions a point) of a transform: butterflies, and turns between the stages."""
    factors = radices(points) or ()
    turns = sum(4 * (radix - 1) / radix for radix in factors[:-1])
    return len(factors), turns + sum(_BUTTERFLY[radix] for radix in factors)


def _transformed(held: Triple, circles: Triple, times: float) -> tuple[float, float]:
    """(passes, arithmetic) of `times` transforms to or from `held` positions."""
    depth, height, width = circles
    passes = turned = 0.0
    for points, lines in (
        (width, held[0] * held[1]),
        (height, held[0] * width),
        (depth, width * height),
    ):
        stages, arithmetic = _arithmetic(points)
        passes += times * lines * points * stages
        turned += times * lines * points * arithmetic
    return passes, turned


def counts(problem: Problem, tile: Tile) -> Counts:
    """Of a problem by one tile, not by that of its `rest`."""
    wanted = wanted_of(problem)
    lanes, registers = _lanes(problem)
    size = channels(problem, tile.transposed)
    axes = map_of(problem, tile).axes
    rank, groups, ops = problem.rank, problem.geometry.groups, len(problem.ops)
    block = 2 * lanes if tile.circles else lanes
    columns = block // lanes if size.lanewise else -(-size.target // lanes)
    if size.lanewise:
        blocks = -(-groups // block)
    elif tile.planes:
        blocks = groups
    else:
        blocks = groups * -(-size.source // block)
    targets = blocks if size.lanewise else groups
    held = _counts(axes)
    phases = prod(axis.phases for axis in axes)
    tiles = problem.batch * phases * prod(axis.tiles for axis in axes)
    positions = problem.batch * phases * prod(held)
    formed = bool(wanted & (OUTPUT | COEFFICIENTS))
    sums = formed + bool(wanted & BASIS)
    taps = prod(axis.taps for axis in axes)
    moved = positions * targets * columns * (2 * bool(wanted & OUTPUT) + bool(wanted & ~OUTPUT))
    packed = (
        rank
        * blocks
        * block
        * columns
        * (bool(wanted & OUTPUT) + bool(wanted & BASIS) + tile.slices * bool(wanted & COEFFICIENTS))
    )
    longest = min(held[2], tile.shape[2])
    lengths = [(n - 1) * axis.stride + axis.taps for n, axis in zip(tile.shape, axes, strict=True)]
    if tile.planes:
        vectors = positions * groups * _up(longest, lanes) / longest / lanes
        return Counts(
            multiplied=vectors * size.source * rank * size.target * ops,
            tapped=vectors * size.source * rank * taps * sums,
            gathered=tiles * groups * size.source * lengths[0] * lengths[1] * _up(lengths[2], lanes)
            + positions * groups * size.target * (1 + (ops > 1)),
        )
    products = rank * (3 * columns if size.lanewise else block * columns)
    if problem.dtype == "bfloat16" and library.capability() == "avx512_bf16" and not size.lanewise:
        products //= 2  # of pairs
    multiplied = float(positions * blocks * products * ops)
    if tile.circles is None:
        rounded = _up(longest, _step(registers)) / longest
        return Counts(
            multiplied=multiplied,
            tapped=positions * blocks * rank * taps * rounded * sums,
            read=tiles * blocks * prod(lengths),
            rows=tiles * blocks * lengths[0] * lengths[1],
            written=moved,
            packed=packed,
            summed=tiles * blocks * taps * rank * bool(wanted & BASIS),
        )
    points, circles = prod(tile.circles), tile.circles
    filled = [
        min(n, axis.in_size, n_tile - 1 + axis.taps)
        for n, n_tile, axis in zip(circles, tile.shape, axes, strict=True)
    ]
    each = tiles * blocks
    source = _transformed((filled[0], filled[1], filled[2]), circles, each)
    others = _transformed(tile.shape, circles, each * rank * sums)
    bands = prod(min(axis.modulus, axis.phases) for axis in axes)
    kernel = (min(axes[0].taps, circles[0]), min(axes[1].taps, circles[1]), axes[2].taps)
    spectra = _transformed(kernel, circles, bands * -(-rank // lanes) * (1 + bool(wanted & BASIS)))
    passes = source[0] + others[0] + spectra[0]
    number = 8 if problem.dtype == "float64" else 4
    buffers = block * (2 + (circles[0] > 1)) + 2 * rank * bool(wanted & BASIS)
    return Counts(
        multiplied=multiplied,
        read=2 * each * prod(filled),
        written=moved,
        passes=passes,
        turned=source[1] + others[1] + spectra[1] + 4 * each * points * rank * sums,
        spilled=passes * _spill(number * points * buffers),
        packed=packed,
        summed=each * points * rank * bool(wanted & BASIS),
    )


def _unevenness(problem: Problem, tile: Tile) -> tuple[float, float]:
    """Of two threads the busier one's time against half of all: to form z, and to multiply it."""
    wanted = wanted_of(problem)
    if not wanted & OUTPUT:  # parts of the blocks are tasks of their own
        return 1.0, 1.0
    axes = map_of(problem, tile).axes
    targets = problem.batch * prod(axis.phases * axis.tiles for axis in axes)
    if not channels(problem, tile.transposed).lanewise:
        targets *= problem.geometry.groups
    if targets == 1 and wanted == OUTPUT:  # both form z, for columns of their own
        return 2.0, 1.0
    busier = max(-(-targets // 2), -(-targets // tile.slices) if wanted != OUTPUT else 0)
    uneven = 2 * busier / targets
    return uneven, uneven


_MULTIPLIED = {"multiplied", "written"}
_SHARED = {"packed"}


def seconds(problem: Problem, tile: Tile) -> float:
    """Estimated, on two threads."""
    formed, multiplied = _unevenness(problem, tile)
    total = CALL
    for name, count, price in zip(Counts._fields, counts(problem, tile), _PRICES, strict=True):
        uneven = 1.0 if name in _SHARED else multiplied if name in _MULTIPLIED else formed
        total += uneven * count * price
    return total


def _slices(problem: Problem, size: Channels, lanes: int) -> tuple[int, int]:
    """(slices of the tiles, parts of the blocks)."""
    wanted = wanted_of(problem)
    if not wanted & (COEFFICIENTS | BASIS):
        return 1, 1
    numbers = size.source * size.target * problem.rank * problem.geometry.groups
    heavy = wanted & COEFFICIENTS and 4 * numbers > _SLICE_BYTES
    blocks = 1 if size.lanewise else -(-size.source // lanes)
    return 2 if heavy else _SLICES, min(_PARTS, blocks)


def halves(problem: Problem) -> tuple[Problem, Problem] | None:
    """(the output's problem, that of the sums) of a joint problem with both; None of any other."""
    if problem.wanted is None or not problem.wanted[0]:
        return None
    output, sums = replace(problem, wanted=None), problem.ops[1:]
    if len(sums) == 1:
        return output, replace(output, op=sums[0])
    return output, replace(problem, wanted=(False, *problem.wanted[1:]))


@lru_cache(maxsize=4096)
def choose(problem: Problem, algorithm: str) -> tuple[Tile, float] | None:
    """The tile with the least estimated time, and that time in seconds; None if none computes it.

    The gradients of a strided layer need not share: its input has more positions than its output, where
    sums are as well formed.
    """
    best = _best(problem, algorithm)
    pair = halves(problem)
    if best is None or pair is None:
        return best
    output, sums = _best(pair[0], algorithm), _best(pair[1], algorithm)
    if output is None or sums is None or output[1] + sums[1] >= best[1]:
        return best
    return replace(output[0], rest=sums[0]), output[1] + sums[1]


def why_no_transform(problem: Problem) -> str:
    """The reason for which `choose` finds no circles."""
    strided = any(
        axis.jump > 1
        for transposed in directions(problem)
        for axis in lattice(problem.geometry, problem.batch, transposed, (1, 1, 1), gaps=False).axes
    )
    if strided:
        return "outputs that read inputs a stride apart would waste a transform; use algorithm='basis'"
    longest = _all_sizes()[-1]
    return f"its transforms have up to {longest} points, too few for this kernel; use algorithm='basis'"


def candidates(problem: Problem, algorithm: str) -> Iterator[Tile]:
    """The tiles among which `choose` chooses."""
    lanes, registers = _lanes(problem)
    for transposed in directions(problem):
        axes = lattice(problem.geometry, problem.batch, transposed, (1, 1, 1), gaps=False).axes
        size = channels(problem, transposed)
        if algorithm == "fft":
            if any(axis.jump > 1 for axis in axes):
                continue
            dealt = _slices(problem, size, 2 * lanes)
            for shape, circles in _fft_shapes(axes):
                yield Tile(shape, circles, transposed, *dealt)
            continue
        slices, parts = _slices(problem, size, lanes)
        for shape in _tap_shapes(_counts(axes), _step(registers)):
            yield Tile(shape, None, transposed, slices, parts)
        if not size.lanewise and size.source < lanes and size.source * problem.rank <= _PLANES:
            for shape in _plane_shapes(_counts(axes), lanes):
                yield Tile(shape, None, transposed, slices, 1, planes=True)


def _best(problem: Problem, algorithm: str) -> tuple[Tile, float] | None:
    rated = ((tile, seconds(problem, tile)) for tile in candidates(problem, algorithm))
    return min(rated, key=lambda pair: pair[1], default=None)


def flops(problem: Problem, tile: Tile) -> float:
    """Operations of what is asked for: two for each multiply-add, transforms by 5 n log2 n."""
    pair = halves(problem)
    if tile.rest is not None and pair is not None:
        return flops(pair[0], replace(tile, rest=None)) + flops(pair[1], tile.rest)
    size = channels(problem, tile.transposed)
    axes = map_of(problem, tile).axes
    phases = prod(axis.phases for axis in axes)
    positions = problem.batch * phases * prod(_counts(axes))
    groups, rank, wanted = problem.geometry.groups, problem.rank, wanted_of(problem)
    products = 2.0 * positions * groups * size.source * size.target * rank * len(problem.ops)
    sums = bool(wanted & (OUTPUT | COEFFICIENTS)) + bool(wanted & BASIS)
    if tile.circles is None:
        taps = prod(axis.taps for axis in axes)
        return products + 2.0 * positions * groups * size.source * rank * taps * sums
    tiles = problem.batch * phases * prod(axis.tiles for axis in axes)
    points = prod(tile.circles)
    transforms = 5.0 * points * math.log2(points) * (1 + rank * sums) + 6.0 * points * rank * sums
    return products + tiles * groups * size.source / 2 * transforms


_TRANSFORMED = 40  # taps that a transform costs per position, channel and function, at most
# How much faster than in float32, and than the engine's, the library's products are in 16 bits: those of
# this engine are as much faster where it multiplies pairs, and tiles of a matrix (AMX) another 8 times.
_HALF, _TILES = 1.6, 8.0
# Multiply-adds that take less time than building W by the framework's calls; than asking whether a kept
# W still holds, and the same where a group has one to four input channels.
_TINY, _TINY_KEPT, _TINY_FEW = 8e6, 4e6, 1e6


def _margin(width: int) -> float:
    """How much faster the library's products are, against those of this engine, than in float32."""
    if width != 2:
        return 1.0
    if torch.cpu._is_amx_tile_supported():
        return _TILES
    return 1.0 if library.capability() == "avx512_bf16" else _HALF


def outruns_dense(weight: WeightShape) -> bool:
    """Whether this engine beats building W and the library's convolution, by counts and a margin.

    Per position and input channel W takes K * C_out multiply-adds, here they are R * C_out and R * K, or
    what a transform costs in the place of K. Columns of fewer than sixteen outputs are padded. Where
    source channels are few, moving data counts more than multiplying; but with one to four the library
    takes even longer, its gradients most; in each of many groups both do. Of 110 rows (1 to 256
    channels, k = 1 to 7, R = 5 and 17, two threads of a Zen 4, forward and step, W built anew) those
    within the margins were level or ahead, as were training steps of depthwise layers (k = 3 to 11).
    A W that is kept costs no building: of 33 rows (1 to 512 channels, 7x7 to 256x256 positions,
    forward) the way picked was within 10% of the faster in all.
    """
    depthwise = weight.groups > 1 and weight.inputs == weight.outputs == 1
    scattered = weight.groups > 1 and weight.inputs <= 4 and not depthwise
    tiny = (_TINY_KEPT if weight.inputs > 4 else _TINY_FEW) if weight.kept else _TINY
    if 0 < weight.work <= tiny and not scattered:
        return True
    taps, rank = weight.taps, weight.rank
    margin = _margin(weight.width)
    formed = min(taps, _TRANSFORMED)
    if depthwise:  # of which the library's gradients take long
        return taps > (0.17 if weight.trained else 1.8) * margin * rank * formed
    few = weight.inputs < 16
    columns = weight.outputs if few else _up(weight.outputs, 16)
    ratio = taps * columns / (rank * (columns + formed))
    if weight.inputs <= 4:
        least = 4.0 if weight.kept else 2.0 if scattered else 0.8 if weight.trained else 1.0
        return ratio > least * margin
    if (
        weight.strides > 1 and weight.trained
    ):  # a step multiplies at every input position for the gradient there
        here = rank * ((3 + weight.strides) * columns + 3 * formed)
        ratio = min(ratio, 3 * taps * columns / here)
    return ratio > margin * (2.5 if few else 1.2)
