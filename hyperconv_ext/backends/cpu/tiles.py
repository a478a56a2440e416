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
_VECTOR_BYTES = {"avx512": 64, "avx2": 32, "baseline": 16}
_REGISTERS = {"avx512": 32, "avx2": 16, "baseline": 16}
_L2 = 1 << 20  # bytes that a thread can count on

# Of the peak of fused multiply-adds, what the loops reach (Zen 4, AVX-512): products, taps, transforms.
_PRODUCT, _TAPS, _TRANSFORM = 0.9, 0.8, 0.42
_CLOCK = 3.3e9
_CALL = 10e-6  # seconds before and after the loops
_SLICES, _PARTS = 4, 8
_PLANES = 96  # rows of z in planes, which are to stay in a cache
_SLICE_BYTES = 1 << 22  # of sums, from which on there are two slices


@dataclass(frozen=True)
class Tile:
    """How a problem is computed.

    `shape`: positions of the target along the axes of one phase. `circles`: points of the transforms,
    None by taps. `transposed`: the source is y (or its gradient) and the target x. Sums are dealt into
    `slices` of the tiles and `parts` of the blocks of source channels. `planes`: lanes are positions in
    the place of source channels. `rest`: how the sums of a joint
    problem are computed, if not with the output.
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


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class _Shape(NamedTuple):
    """What a tile's estimate needs: vectors of 2 lanes a flop are counted, a thread's bytes too."""

    tiles: int
    positions: int
    bytes: int


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


def _fft_shapes(axes: tuple[Axis, Axis, Axis]) -> Iterator[tuple[Triple, Triple]]:
    """(positions, circles) of tiles: all of an axis, or what a circle leaves of a kernel."""
    choices: list[list[tuple[int, int]]] = []
    for axis, count in zip(axes, _counts(axes), strict=True):
        sizes: list[tuple[int, int]] = []
        if axis.taps == 1 and axis.in_size == 1 and count == 1:
            sizes.append((1, 1))
        else:
            sizes += [(count, size) for size in circle_sizes(max(_circle(axis, count), 3))[:1]]
            for factor in (1, 1.5, 2, 3, 4):
                tile = int(axis.taps * factor)
                if 2 <= tile < count:
                    tile = -(-count // -(-count // tile))  # evenly
                    sizes += [(tile, size) for size in circle_sizes(max(tile - 1 + axis.taps, 3))[:1]]
        choices.append(sorted(set(sizes)))
    for depth in choices[0]:
        for height in choices[1]:
            for width in choices[2]:
                pairs = (depth, height, width)
                yield (
                    (pairs[0][0], pairs[1][0], pairs[2][0]),
                    (pairs[0][1], pairs[1][1], pairs[2][1]),
                )


def _plane_shapes(counts: Triple, lanes: int) -> Iterator[Triple]:
    """Blocks of some hundred positions, in whole vectors along the last axis."""
    for width in {min(_up(counts[2], lanes), size * lanes) for size in (1, 2, 4, 8)}:
        for height in {min(counts[1], size) for size in (1, 4, 8, 16)}:
            for depth in {min(counts[0], size) for size in (1, 4)}:
                if depth * height * width <= 512:
                    yield depth, height, width


def _product_work(size: Channels, rank: int, lanes: int, count: int) -> float:
    """Vector multiply-adds of `count` products per position and block of `lanes` source channels."""
    if size.lanewise:
        return count * rank * 3
    vector = lanes
    return count * rank * lanes * -(-size.target // vector)


def _seconds(problem: Problem, tile: Tile) -> float:
    """Estimated, on one machine's threads."""
    wanted = wanted_of(problem)
    lanes, _ = _lanes(problem)
    size = channels(problem, tile.transposed)
    axes = map_of(problem, tile).axes
    rank, by_fft = problem.rank, tile.circles is not None
    block = 2 * lanes if by_fft else lanes
    groups = problem.geometry.groups
    blocks = -(-groups // block) if size.lanewise else groups * -(-size.source // block)
    counts = _counts(axes)
    phases = prod(axis.phases for axis in axes)
    tiles = problem.batch * phases * prod(axis.tiles for axis in axes)
    positions = problem.batch * phases * prod(counts)
    sums = bool(wanted & (OUTPUT | COEFFICIENTS)) + bool(wanted & BASIS)
    products = _product_work(size, rank, lanes, len(problem.ops)) * (block // lanes)
    clocks = positions * blocks * products / _PRODUCT
    if tile.planes:
        rounded = _up(counts[2], lanes) / counts[2] if counts[2] < tile.shape[2] else 1.0
        vectors = positions * groups * rounded / lanes
        taps = prod(axis.taps for axis in axes)
        clocks = vectors * size.source * rank * taps * sums / _TAPS
        clocks += vectors * size.source * rank * size.target * len(problem.ops) / _PRODUCT
        lengths = [(n - 1) * axis.stride + axis.taps for n, axis in zip(tile.shape, axes, strict=True)]
        reads = lengths[0] * lengths[1] * _up(lengths[2], lanes)
        clocks += 1.5 * tiles * groups * size.source * reads
        clocks += positions * groups * size.target * (1 + (len(problem.ops) > 1))
        return clocks / (2 * _CLOCK) + _CALL
    if tile.circles is None:
        taps = prod(axis.taps for axis in axes)
        rounded = _up(tile.shape[2], 4) / tile.shape[2]
        patch = prod((n - 1) * axis.stride + axis.taps for n, axis in zip(tile.shape, axes, strict=True))
        clocks += positions * blocks * rank * taps * rounded * sums / _TAPS
        clocks += tiles * blocks * patch * 2
    else:
        points = prod(tile.circles)
        stages = sum(math.log2(n) for n in tile.circles if n > 1)
        transforms = 1 + rank * sums
        clocks += tiles * blocks * points * (transforms * 2.5 * stages + 4 * rank) / _TRANSFORM
        held = 4 * points * 2 * block * (2 if problem.geometry.dims < 3 else 3)
        if held > _L2:
            clocks += tiles * blocks * points * transforms * 4
        # phi's spectra, and the way back.
        bands = prod(min(axis.modulus, axis.phases) for axis in axes)
        clocks += bands * -(-rank // lanes) * points * 5 * stages * (1 + bool(wanted & BASIS))
        clocks += points * rank * 4
    clocks += 3 * rank * blocks * block * size.target  # A packed
    threads = 2  # of which more are used alike by all
    return clocks / (_CLOCK * threads) + _CALL


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


def _best(problem: Problem, algorithm: str) -> tuple[Tile, float] | None:
    lanes, registers = _lanes(problem)
    best: tuple[Tile, float] | None = None
    for transposed in directions(problem):
        whole = lattice(problem.geometry, problem.batch, transposed, (1, 1, 1), gaps=False)
        size = channels(problem, transposed)
        shapes: Iterator[tuple[Triple, Triple | None]]
        if algorithm == "fft":
            if any(axis.jump > 1 for axis in whole.axes):
                continue
            shapes = iter(_fft_shapes(whole.axes))
        else:
            step = 4 if registers == 32 else 2
            shapes = ((shape, None) for shape in _tap_shapes(_counts(whole.axes), step))
        found = []
        for shape, circles in shapes:
            block = 2 * lanes if circles else lanes
            found.append(Tile(shape, circles, transposed, *_slices(problem, size, block)))
        if algorithm == "basis" and size.source < lanes and size.source * problem.rank <= _PLANES:
            slices, _ = _slices(problem, size, lanes)
            for shape in _plane_shapes(_counts(whole.axes), lanes):
                found.append(Tile(shape, None, transposed, slices, 1, planes=True))
        for tile in found:
            seconds = _seconds(problem, tile)
            if best is None or seconds < best[1]:
                best = tile, seconds
    return best


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
_HALF = 1.6  # times as fast the library's products are in 16 bits, the engine's not


def outruns_dense(weight: WeightShape) -> bool:
    """Whether this engine beats building W and the library's convolution, by counts and a margin.

    Per position and input channel W takes K * C_out multiply-adds, here they are R * C_out and R * K, or
    what a transform costs in the place of K. Columns of fewer than sixteen outputs are padded; where
    source channels are few, moving data counts more than multiplying. Of 110 rows (1 to 256 channels,
    k = 1 to 7, R = 5 and 17, two threads of a Zen 4, forward and step, W built each time) those within
    the margins were level or ahead.
    """
    taps, rank = weight.taps, weight.rank
    margin = _HALF if weight.width == 2 else 1.0
    formed = min(taps, _TRANSFORMED)
    if weight.inputs == weight.outputs == 1:  # of a depthwise convolution
        return taps > 1.8 * margin * rank * formed
    few = weight.inputs < 16
    columns = weight.outputs if few else _up(weight.outputs, 16)
    ratio = taps * columns / (rank * (columns + formed))
    if weight.strides > 1:  # a step multiplies at every input position for the gradient there
        here = rank * ((3 + weight.strides) * columns + 3 * formed)
        ratio = min(ratio, 3 * taps * columns / here)
    return ratio > margin * (2.5 if few else 1.2)
