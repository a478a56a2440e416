"""Tile choices of the CUDA C++ kernels: pure functions from a problem to a frozen, named configuration.

A `Kernel` is an instantiation that exists in csrc/; a `Tile` is a kernel with the shape of its blocks,
which are run-time numbers there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Literal, NamedTuple

from ...problem import Problem
from .. import cost
from ..cost import Work
from ..figures import Number, figures, number
from ..lattice import Axis, Lattice, lattice
from ..shares import basis_shares, coefficient_shares

Family = Literal[
    "basis_conv",
    "coefficient_gradient",
    "basis_gradient",
    "basis_conv_sm90",
    "coefficient_gradient_sm90",
    "basis_gradient_sm90",
    "joint_gradient_sm90",
]


@dataclass(frozen=True)
class Kernel:
    """One template instantiation: output channels of a block (or step) and basis functions at a time."""

    family: Family
    number: Number
    outputs: int
    ranks: int


# What csrc/ instantiates; the reasons stand there, beside each.
ALL = (
    *(Kernel("basis_conv", "half", outputs, ranks) for outputs, ranks in ((16, 5), (64, 5), (128, 2))),
    *(Kernel("basis_conv", "tf32", outputs, 5) for outputs in (16, 64)),
    *(Kernel("basis_conv", "ieee", outputs, 1) for outputs in (16, 64)),
    *(
        Kernel("coefficient_gradient", number, outputs, ranks)
        for number in ("half", "tf32")
        for outputs, ranks in ((16, 5), (64, 3))
    ),
    *(Kernel("coefficient_gradient", "ieee", outputs, 1) for outputs in (16, 64)),
    *(Kernel("basis_gradient", number, 32, 2) for number in ("half", "tf32")),
    Kernel("basis_gradient", "ieee", 32, 1),
)
MAX_RANK = 32

_UNIT = 16  # outputs of a unit: the rows of a tensor-core operand
_UNITS_PER_WARP = 2
_CHANNELS = 16  # input channels of a step
_TILE = 256  # elements of a 16x16 operand
_PIECE = 7  # 16-row tiles of the patch in a piece of the basis gradient
_ITEMS = 64  # of a gradient's work that are located ahead
_WARPS = (8, 4, 2, 1)
# 16-row tiles of the patch whose bands are loaded together where all of them do not fit.
_SLICES = (8, 4, 2, 1)
_PRICED = 12  # shapes of blocks that are priced for each kernel and number of warps


@dataclass(frozen=True)
class Tile:
    """A kernel and the shape of its blocks.

    `unit`: the 16 outputs of a unit as (depth, height, width); `grid`: the units of a block as (images,
    depth, height, width); `slice`: 16-row tiles of the patch whose bands are in shared memory together;
    `stages`: halos in shared memory together; `shared_bytes`: all that a block needs. `patch_width`: of
    a row of the patch, where the kernel is that of `wgmma`, whose `grid` is a consumer's, else 0.
    """

    kernel: Kernel
    unit: tuple[int, int, int]
    grid: tuple[int, int, int, int]
    slice: int
    stages: int
    shared_bytes: int
    patch_width: int = 0

    @property
    def warps(self) -> int:
        """Warps of a block, of `wgmma` those that multiply."""
        if self.patch_width:
            return 12 if self.kernel.family == "joint_gradient_sm90" else 8
        return prod(self.grid) // _UNITS_PER_WARP

    @property
    def name(self) -> str:
        """All of it, short enough for a table."""
        kernel = f"{self.kernel.family}-{self.kernel.number}-o{self.kernel.outputs}-r{self.kernel.ranks}"
        shapes = f"u{'x'.join(map(str, self.unit))}-g{'x'.join(map(str, self.grid))}"
        return f"{kernel}-{shapes}-b{self.slice}-s{self.stages}-{self.shared_bytes}B"


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _size(count: int, width: int) -> int:
    """Bytes of `count` elements of `width` bytes in shared memory, whose pieces start at 128."""
    return _up(count * width, 128)


def family(problem: Problem) -> Family:
    """The kernel family of an operator."""
    if problem.op == "basis_conv_bwd_coeff":
        return "coefficient_gradient"
    return "basis_gradient" if problem.op == "basis_conv_bwd_basis" else "basis_conv"


def shared_memory(problem: Problem) -> int:
    """Bytes of shared memory that a block may use."""
    return figures(problem.device).block_memory


@dataclass(frozen=True)
class Map:
    """A lattice of units, grouped into blocks."""

    units: Lattice
    grid: tuple[int, int, int, int]

    @property
    def halo_shape(self) -> tuple[int, ...]:
        """Inputs that the units of a block read along each axis."""
        return tuple(
            (count * axis.tile - 1) * axis.stride + axis.taps
            for axis, count in zip(self.units.axes, self.grid[1:], strict=True)
        )

    @cached_property
    def halo(self) -> int:
        """Inputs that a block reads, of all its images."""
        return self.grid[0] * prod(self.halo_shape)

    @cached_property
    def chunks(self) -> int:
        """16-row tiles of a unit's patch."""
        return -(-self.units.patch // 16)

    @property
    def axis_blocks(self) -> tuple[int, ...]:
        """Blocks along the images and each axis, of one phase."""
        counts = (self.units.batch, *(axis.tiles for axis in self.units.axes))
        return tuple(-(-count // size) for count, size in zip(counts, self.grid, strict=True))

    @cached_property
    def blocks(self) -> int:
        """Blocks of all phases."""
        return prod(self.axis_blocks) * self.units.phases

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """All of it in the order of `parse_plan` in csrc/library.cpp."""
        batch_blocks, *axis_blocks = self.axis_blocks
        numbers: list[int] = []
        rows = zip(self.units.axes, self.grid[1:], axis_blocks, self.halo_shape, strict=True)
        for axis, count, blocks, halo in rows:
            numbers += [*_fields(axis), axis.tile, count, blocks, axis.patch, halo]
        return (*numbers, self.units.batch, self.grid[0], batch_blocks)


def _fields(axis: Axis) -> tuple[int, ...]:
    return (
        axis.out_size,
        axis.in_size,
        axis.kernel,
        axis.phases,
        axis.step,
        axis.stride,
        axis.taps,
        axis.scale,
        axis.shift,
        axis.divisor,
        axis.inverse,
        axis.residues,
        axis.dilation,
        axis.modulus,
        axis.bands,
        axis.back,
        axis.first,
        axis.tap_step,
    )


def map_of(problem: Problem, unit: tuple[int, int, int], grid: tuple[int, int, int, int]) -> Map:
    """The row map of `problem` in blocks of this shape."""
    transposed = problem.op == "basis_conv_bwd_input"
    return Map(lattice(problem.geometry, problem.batch, transposed, unit), grid)


def channels(problem: Problem) -> tuple[int, int]:
    """(in, out) channels per group of the operator as its kernel sees it."""
    groups = problem.geometry.groups
    pair = problem.in_channels // groups, problem.out_channels // groups
    return pair[::-1] if problem.op == "basis_conv_bwd_input" else pair


def shared_bytes(problem: Problem, kernel: Kernel, map: Map, slice: int, stages: int) -> int:
    """The pieces of ConvShared, CoefficientShared and BasisShared in csrc/."""
    width = 2 if kernel.number == "half" else 4
    halo = _size(stages * map.halo * _CHANNELS, width)
    units = prod(map.grid)
    tables = _size(map.chunks * 16, 4)
    weights = _size(2 * kernel.ranks * (kernel.outputs // 16) * _TILE, width)
    resident = slice >= map.chunks
    if kernel.family == "basis_conv":
        bands = _size((problem.rank if resident else 2 * kernel.ranks) * slice * _TILE, width)
        return halo + weights + bands + tables + _size(map.halo, 8)
    tables += _size(map.halo, 16) + _size(units * _UNIT, 16) + _size(_ITEMS, 64)
    grad = units * _UNIT * kernel.outputs
    if kernel.family == "coefficient_gradient":
        bands = _size((1 if resident else 2) * kernel.ranks * slice * _TILE, width)
        total = _size(kernel.ranks * _CHANNELS * kernel.outputs, 4)
        return max(halo + _size(stages * grad, width) + bands + tables, total)
    total = _size(kernel.ranks * _UNIT * 16 * _PIECE, 4)
    return max(halo + _size(2 * grad, width) + weights + tables, total)


def shares(problem: Problem, tile: Tile) -> tuple[int, bool]:
    """(shares of the sum over outputs, whether atomic) of a gradient; (1, False) for a convolution."""
    return _shares(problem, tile.kernel, map_of(problem, tile.unit, tile.grid))


def _shares(problem: Problem, kernel: Kernel, map: Map) -> tuple[int, bool]:
    size_i, size_o = channels(problem)
    blocks_i, groups = -(-size_i // _CHANNELS), problem.geometry.groups
    rank_blocks = -(-problem.rank // kernel.ranks)
    if kernel.family == "coefficient_gradient":
        programs = rank_blocks * blocks_i * -(-size_o // kernel.outputs) * groups
        return coefficient_shares(problem, programs, map.blocks)
    if kernel.family == "basis_gradient":
        pieces = basis_pieces(map)
        work = map.blocks * blocks_i * groups
        return basis_shares(problem, rank_blocks * pieces, work, pieces)
    return 1, False


def basis_pieces(map: Map) -> int:
    """Pieces of the patch that the basis gradient sums apart."""
    return -(-map.chunks // _PIECE)


class _Loop(NamedTuple):
    """A kernel's main loop.

    Of one item: `products` of 16x16 operands and tiles `read` by a warp, bytes `loaded` by a block and
    its `steps`. `blocks`, the `items` of the busiest and the bytes that it `stored`; `total` products of
    each warp in all blocks.
    """

    products: int
    read: int
    loaded: int
    steps: int
    blocks: int
    items: int
    stored: int
    total: int


def _loop(problem: Problem, tile: Tile, map: Map, count: int, width: int) -> _Loop:
    """With the sum over outputs in `count` shares and tiles of `width` bytes."""
    kernel, units, chunks = tile.kernel, _UNITS_PER_WARP, map.chunks
    size_i, size_o = channels(problem)
    blocks_i, blocks_o = -(-size_i // _CHANNELS), -(-size_o // kernel.outputs)
    tiles_o, groups, rank = kernel.outputs // 16, problem.geometry.groups, problem.rank
    ranks, passes = min(kernel.ranks, rank), -(-rank // kernel.ranks)
    slices = -(-chunks // tile.slice)
    streamed = chunks if slices > 1 else 0  # tiles of a band that do not stay
    halo = map.halo * width // 16
    outputs = units * tile.warps
    if kernel.family == "basis_conv":
        products = units * rank * (chunks + tiles_o)
        blocks = map.blocks * blocks_o * groups
        return _Loop(
            products=products,
            read=units * chunks * passes + rank * (chunks + tiles_o),
            loaded=halo + rank * (tiles_o + streamed) * width,
            steps=passes * slices,
            blocks=blocks,
            items=blocks_i,
            stored=outputs * tiles_o * width,
            total=products * blocks * blocks_i,
        )
    if kernel.family == "coefficient_gradient":
        return _Loop(
            products=units * ranks * (chunks + tiles_o),
            read=units * (chunks + tiles_o) + ranks * chunks,
            loaded=halo + (outputs * tiles_o + ranks * streamed) * width,
            steps=slices,
            blocks=passes * blocks_i * blocks_o * groups * count,
            items=-(-map.blocks // count),
            stored=4 * ranks * _CHANNELS * kernel.outputs,
            total=units * rank * (chunks + tiles_o) * map.blocks * blocks_i * blocks_o * groups,
        )
    piece, pieces, tiles_o = min(_PIECE, chunks), basis_pieces(map), -(-size_o // 16)
    work = map.blocks * blocks_i * groups
    return _Loop(
        products=units * ranks * (piece + tiles_o),
        read=units * piece + (units + ranks) * tiles_o,
        loaded=halo + (outputs + ranks) * tiles_o * width,
        steps=blocks_o,
        blocks=passes * pieces * count,
        items=-(-work // count),
        stored=4 * ranks * problem.geometry.taps,
        total=units * rank * (chunks + pieces * tiles_o) * work,
    )


def works(problem: Problem, tile: Tile) -> list[Work]:
    """What the launches of an operator execute."""
    return _works(problem, tile, map_of(problem, tile.unit, tile.grid))


_PRODUCT = 16**3  # multiply-adds of a product of two 16x16 operands
_SHUFFLED = 128 * 128  # bytes of the 128 shuffles that fetch the operands of such a product in IEEE


def _works(problem: Problem, tile: Tile, map: Map) -> list[Work]:
    kernel = tile.kernel
    width = _TILE * (2 if kernel.number == "half" else 4)
    count, atomic = _shares(problem, kernel, map)
    loop = _loop(problem, tile, map, count, width)
    shuffled = _SHUFFLED * loop.products if kernel.number == "ieee" else 0
    # A single halo, or one read element by element, is waited for by itself.
    alone = tile.stages == 1 or not problem.aligned
    room = figures(problem.device).shared_memory // (tile.shared_bytes + 1024)
    size_i, size_o = channels(problem)
    bands = packed = 0
    if kernel.family != "basis_gradient":
        bands = map.units.bands * problem.rank * map.chunks * width
    if kernel.family != "coefficient_gradient":
        padded = _up(size_o, kernel.outputs if kernel.family == "basis_conv" else 16)
        packed = problem.geometry.groups * -(-size_i // 16) * problem.rank * (padded // 16) * width
    slices = count * (basis_pieces(map) if kernel.family == "basis_gradient" else 1)
    before, dram, after = cost.around(problem, bands, packed, slices, atomic)
    main = Work(
        number=kernel.number,
        multiply_adds=_PRODUCT * tile.warps * loop.total,
        dram=dram,
        blocks=loop.blocks,
        warps=tile.warps,
        resident=max(1, min(8 // tile.warps, room)),
        products=_PRODUCT * tile.warps * loop.products * loop.items,
        shared=loop.items * (tile.warps * (loop.read * width + shuffled) + loop.loaded),
        cache=loop.items * loop.loaded + loop.stored,
        steps=loop.items * (loop.steps + alone),
    )
    return [before, main, *after]


def _splits(total: int, limits: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every split of a power of two over axes, no axis beyond twice what its limit needs."""
    if len(limits) == 1:
        yield (total,)
        return
    size = 1
    while size <= total and size < 2 * limits[0]:
        for rest in _splits(total // size, limits[1:]):
            yield (size, *rest)
        size *= 2


def _maps(problem: Problem, warps: int, needed: bool) -> list[Map]:
    """Every shape of blocks of this many warps, those that multiply and load least first.

    If `needed`, none that reaches far beyond the outputs.
    """
    transposed = problem.op == "basis_conv_bwd_input"
    dims = problem.geometry.dims
    every = (*(1,) * (3 - dims), *(_UNIT,) * dims)
    whole = lattice(problem.geometry, problem.batch, transposed, (1, 1, 1))
    maps = []
    for split in _splits(_UNIT, tuple(axis.tiles for axis in whole.axes) if needed else every):
        units = lattice(problem.geometry, problem.batch, transposed, (split[0], split[1], split[2]))
        counts = tuple(axis.tiles for axis in units.axes) if needed else every
        for b, d, h, w in _splits(_UNITS_PER_WARP * warps, (problem.batch, *counts)):
            maps.append(Map(units, (b, d, h, w)))
    weight = 32 * _UNITS_PER_WARP * warps
    return sorted(maps, key=lambda map: map.blocks * (weight * (map.chunks + 4) + map.halo))


def _tiles(problem: Problem, kernel: Kernel, maps: list[Map]) -> Iterator[tuple[Tile, Map]]:
    """Tiles on the first of `maps` that fit in shared memory."""
    limit = shared_memory(problem)
    found = 0
    for map in maps:
        axes = map.units.axes
        unit = (axes[0].tile, axes[1].tile, axes[2].tile)
        fits = False
        # All bands at once; else, where the kernel streams them, the longest slices that fit.
        lengths = [map.chunks]
        if kernel.family != "basis_gradient":
            lengths += [length for length in _SLICES if length < map.chunks]
        for stages in (2, 1):
            for index, length in enumerate(lengths):
                size = shared_bytes(problem, kernel, map, length, stages)
                if size <= limit:
                    yield Tile(kernel, unit, map.grid, length, stages, size), map
                    fits = True
                    if index > 0:
                        break
        found += fits
        if found == _PRICED:
            return


@lru_cache(maxsize=4096)
def choose(problem: Problem) -> tuple[Tile, float] | None:
    """The tile with the least estimated time, and that time in seconds; None if no tile fits."""
    kernels = [k for k in ALL if (k.family, k.number) == (family(problem), number(problem))]
    for needed in (True, False):
        tiles: list[tuple[Tile, Map]] = []
        for warps in _WARPS:
            maps = _maps(problem, warps, needed)
            tiles += [pair for kernel in kernels for pair in _tiles(problem, kernel, maps)]
        if tiles:
            break
    priced = ((tile, cost.seconds(_works(problem, tile, map), problem.device)) for tile, map in tiles)
    return min(priced, key=lambda pair: pair[1], default=None)


def index_limit(problem: Problem, tile: Tile) -> str:
    """What of `problem` the kernels' 32-bit counters cannot count, or ''. Addresses have 64 bits."""
    map = map_of(problem, tile.unit, tile.grid)
    size_i, size_o = channels(problem)
    blocks = map.blocks * problem.geometry.groups * -(-size_o // 16) * -(-size_i // _CHANNELS)
    if blocks >= 2**31:
        return f"{blocks} blocks of work are more than 2**31 - 1; split the batch"
    return ""
