"""Tile choices of the Triton kernels: pure functions from a problem to a frozen, named configuration.

Every configuration that `choose` can return is in `ALL`, and `tests/test_triton_aot.py` compiles each
for three GPU generations and checks registers, spills, shared memory and tensor-core instructions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from ...problem import Problem
from .. import cost
from ..cost import Work
from ..figures import Number, number
from ..lattice import Lattice, best_lattice
from ..shares import basis_shares, coefficient_shares

Kernel = Literal["basis", "direct", "coefficients", "basis_gradient"]


@dataclass(frozen=True)
class Tile:
    """Block sizes of one kernel.

    `positions`: outputs per unit, the left side of the banded matrix; `units` per program;
    `channels`: input channels per step; `outputs`: output channels per program (per step in
    `basis_gradient`); `patch`: patch positions per step, the whole patch if `resident`; `rank`: basis
    functions per step (`direct` only, R rounded up); `aligned`: only for tensors that can be read 16
    bytes at a time.
    """

    kernel: Kernel
    number: Number
    positions: int
    units: int
    channels: int
    outputs: int
    patch: int
    resident: bool
    aligned: bool
    warps: int
    stages: int
    rank: int = 1

    @property
    def name(self) -> str:
        """All of it, short enough for a table."""
        kind = f"{self.kernel}-{self.number}"
        sizes = f"p{self.positions}-u{self.units}-c{self.channels}-o{self.outputs}"
        patch = f"r{self.rank}" if self.kernel == "direct" else f"l{self.patch}"
        mode = "-resident" * self.resident + "-aligned" * self.aligned
        return f"{kind}-{sizes}-{patch}-w{self.warps}-s{self.stages}{mode}"


def _tile(
    kernel: Kernel,
    number: Number,
    *sizes: int,
    resident: bool = False,
    aligned: bool = False,
    rank: int = 1,
) -> Tile:
    positions, units, channels, outputs, patch, warps, stages = sizes
    return Tile(
        kernel,
        number,
        positions,
        units,
        channels,
        outputs,
        patch,
        resident,
        aligned,
        warps,
        stages,
        rank,
    )


# Each line: positions, units, channels, outputs, patch, warps, stages.
#
# `aligned` tiles read 16 bytes at a time. Without that every element needs an address of its own, two
# registers each, so the tiles that must also serve odd channel counts and contiguous (NCHW) tensors
# hold a quarter as many inputs.
_BASIS = (
    # The accumulators of y take units * positions * outputs / (32 warps) registers per thread, the
    # resident patch units * patch * channels / (64 warps): 128 positions by 128 outputs fill 8 warps.
    *(
        _tile("basis", "half", 16, 8, 16, outputs, patch, 8, 2, resident=True, aligned=True)
        for outputs in (16, 32, 64, 128)
        for patch in (32, 64, 128)
    ),
    # A patch too large to stay: larger units multiply each streamed input by more of the band.
    *(_tile("basis", "half", 64, 4, 16, outputs, 64, 8, 3, aligned=True) for outputs in (16, 64)),
    *(_tile("basis", "half", 16, 8, 16, outputs, 64, 8, 3, aligned=True) for outputs in (16, 128)),
    *(
        _tile("basis", "half", 16, 4, 16, outputs, patch, 8, 2, resident=True)
        for outputs in (16, 64)
        for patch in (32, 64)
    ),
    *(_tile("basis", "half", 16, 4, 16, outputs, 32, 8, 2) for outputs in (16, 64)),
    *(
        _tile("basis", "tf32", 16, 8, 16, outputs, patch, 8, 2, resident=True, aligned=True)
        for outputs in (16, 32, 64)
        for patch in (32, 64)
    ),
    *(_tile("basis", "tf32", 16, 8, 16, outputs, 32, 8, 2, aligned=True) for outputs in (16, 64)),
    *(_tile("basis", "tf32", 16, 4, 16, outputs, 32, 8, 2) for outputs in (16, 64)),
    *(_tile("basis", "ieee", 16, 2, 16, outputs, 16, 4, 1) for outputs in (16, 32)),
)
_DIRECT = (
    # The weight tile is built from channels * outputs * rank coefficients, the limiting resource.
    *(
        _tile("direct", "half", 1, 128, 32, outputs, 1, 8, 2, rank=8, aligned=True)
        for outputs in (16, 32, 64)
    ),
    *(
        _tile("direct", "half", 1, 128, 16, outputs, 1, 8, 2, rank=rank, aligned=True)
        for rank in (16, 32)
        for outputs in (16, 32)
    ),
    *(_tile("direct", "half", 1, 64, 16, 16, 1, 8, 2, rank=rank) for rank in (8, 16, 32)),
    *(_tile("direct", "tf32", 1, 128, 16, 32, 1, 8, 2, rank=r, aligned=True) for r in (8, 16)),
    *(_tile("direct", "tf32", 1, 64, 16, 16, 1, 8, 2, rank=rank) for rank in (8, 16, 32)),
    *(_tile("direct", "ieee", 1, 32, 16, 16, 1, 4, 1, rank=rank) for rank in (8, 16, 32)),
)
_COEFFICIENTS = (
    *(
        _tile("coefficients", "half", 16, 8, 16, outputs, 64, 8, 2, aligned=True)
        for outputs in (16, 64, 128)
    ),
    *(_tile("coefficients", "half", 16, 4, 16, outputs, 32, 8, 2) for outputs in (16, 64)),
    *(_tile("coefficients", "tf32", 16, 8, 16, outputs, 32, 8, 2, aligned=True) for outputs in (16, 64)),
    _tile("coefficients", "tf32", 16, 4, 16, 16, 32, 8, 2),
    _tile("coefficients", "ieee", 16, 2, 16, 16, 16, 4, 1),
)
_BASIS_GRADIENT = (
    *(
        _tile("basis_gradient", "half", 16, 8, 16, 32, patch, 8, 2, aligned=True)
        for patch in (32, 64, 128)
    ),
    _tile("basis_gradient", "half", 16, 4, 16, 16, 32, 8, 2),
    *(_tile("basis_gradient", "tf32", 16, 8, 16, 32, patch, 8, 2, aligned=True) for patch in (32, 64)),
    _tile("basis_gradient", "tf32", 16, 4, 16, 32, 32, 8, 2),
    _tile("basis_gradient", "ieee", 16, 2, 16, 16, 16, 4, 1),
)
ALL = (*_BASIS, *_DIRECT, *_COEFFICIENTS, *_BASIS_GRADIENT)


# Patches are padded to a multiple of this: the inner dimension of a 16-bit tensor-core product.
PATCH_GRANULE = 16


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def padded_patch(lattice: Lattice, tile: Tile) -> int:
    """Patch positions including the zeros after the last one."""
    return round_up(lattice.patch, max(tile.patch, PATCH_GRANULE))


DIRECT_RANK = max(tile.rank for tile in _DIRECT)


def index_limit(problem: Problem, algorithm: str) -> str:
    """What of `problem` the kernels' 32-bit counters cannot count, or ''. Addresses have 64 bits."""
    tile, _ = choose(problem, algorithm)
    lattice = lattice_of(problem, tile)
    outputs = lattice.phases * (lattice.units + tile.units) * tile.positions
    if outputs >= 2**31:
        return f"{outputs} output positions per channel are more than 2**31 - 1; split the batch"
    packed = max(problem.rank, tile.rank) * problem.in_channels * problem.out_channels
    packed //= problem.geometry.groups**2
    if packed >= 2**31:
        return f"{packed} coefficients per group are more than 2**31 - 1; use more groups"
    return ""


def kernel_of(problem: Problem, algorithm: str) -> Kernel:
    """The kernel that computes an operator; the coefficient and basis gradients have one each."""
    if problem.op == "basis_conv_bwd_coeff":
        return "coefficients"
    if problem.op == "basis_conv_bwd_basis":
        return "basis_gradient"
    return "basis" if algorithm == "basis" else "direct"


def lattice_of(problem: Problem, tile: Tile) -> Lattice:
    """The row map on which `tile` computes `problem`."""
    transposed = problem.op == "basis_conv_bwd_input"
    return best_lattice(problem.geometry, problem.batch, transposed, tile.positions)


def fits(problem: Problem, tile: Tile) -> bool:
    """Whether `tile` can compute `problem` at all."""
    if tile.number != number(problem) or (tile.aligned and not problem.aligned):
        return False
    if tile.kernel == "direct":
        return problem.rank <= tile.rank
    return not tile.resident or lattice_of(problem, tile).patch <= tile.patch


class _Loop(NamedTuple):
    """A program's outer loop.

    Of one item: multiply-adds of `products` and of W as it is `built`, bytes `loaded` and through
    `shared` memory, `steps`. `programs`, the `items` of the busiest and the bytes that it `stored`;
    items in `total`.
    """

    products: int
    loaded: int
    shared: int
    steps: int
    programs: int
    items: int
    total: int
    stored: int
    built: int = 0


def _loop(problem: Problem, tile: Tile, lattice: Lattice, count: int) -> _Loop:
    """With the sum over outputs in `count` shares."""
    groups, rank, warps = problem.geometry.groups, problem.rank, tile.warps
    size_i, size_o = problem.in_channels // groups, problem.out_channels // groups
    if problem.op == "basis_conv_bwd_input":
        size_i, size_o = size_o, size_i
    blocks_i, blocks_o = -(-size_i // tile.channels), -(-size_o // tile.outputs)
    blocks_u = lattice.phases * -(-lattice.units // tile.units)
    chunks = padded_patch(lattice, tile) // tile.patch
    # Multiply-adds of the two products, bytes of their operands.
    rows = tile.units * tile.positions
    product, banded = rows * tile.channels * tile.outputs, rows * tile.patch * tile.channels
    width = 2 if tile.number == "half" else 4
    patch = width * tile.units * tile.patch * tile.channels
    band, bands = width * tile.positions * tile.patch, width * rows * tile.patch
    weight, response = width * tile.channels * tile.outputs, width * rows * tile.channels
    grad = width * rows * tile.outputs
    if tile.kernel == "direct":
        taps, programs = lattice.patch, blocks_u * blocks_o * groups
        return _Loop(
            products=taps * product,
            loaded=taps * (response + tile.rank * weight),
            shared=taps * (2 * response + (1 + warps) * weight),
            steps=taps,
            programs=programs,
            items=blocks_i,
            total=programs * blocks_i,
            stored=grad,
            built=taps * tile.channels * tile.outputs * tile.rank,
        )
    if tile.kernel == "basis":
        streams, programs = chunks if tile.resident else rank * chunks, blocks_u * blocks_o * groups
        return _Loop(
            products=rank * (banded * chunks + product),
            loaded=streams * patch + rank * (chunks * band + weight),
            shared=2 * streams * patch + rank * (chunks * (band + bands) + (1 + warps) * weight),
            steps=rank + 1 if tile.resident else rank * (chunks + 1),
            programs=programs,
            items=blocks_i,
            total=programs * blocks_i,
            stored=grad,
        )
    if tile.kernel == "coefficients":
        programs = rank * blocks_i * blocks_o * groups
        return _Loop(
            products=banded * chunks + product,
            loaded=chunks * (patch + band) + grad,
            shared=chunks * (2 * patch + band + bands) + 2 * grad + (1 + warps) * response,
            steps=chunks + 1,
            programs=programs * count,
            items=-(-blocks_u // count),
            total=programs * blocks_u,
            stored=4 * tile.channels * tile.outputs,
        )
    work = blocks_u * blocks_i * groups
    return _Loop(
        products=banded + product * blocks_o,
        loaded=patch + blocks_o * (grad + weight),
        shared=2 * patch + 2 * response + blocks_o * (2 * grad + (1 + warps) * weight),
        steps=blocks_o + 1,
        programs=rank * chunks * count,
        items=-(-work // count),
        total=rank * chunks * work,
        stored=4 * problem.geometry.taps,
    )


def works(problem: Problem, tile: Tile) -> list[Work]:
    """What the launches of an operator execute, if Triton multiplies by `mma.sync`."""
    lattice, groups = lattice_of(problem, tile), problem.geometry.groups
    patch_size = padded_patch(lattice, tile)
    count, slices, atomic = 1, 1, False
    if tile.kernel == "coefficients":
        count, atomic = split_coefficients(problem, tile)
        slices = count
    elif tile.kernel == "basis_gradient":
        count, atomic = split_basis(problem, tile)
        slices = count * (patch_size // tile.patch)
    loop = _loop(problem, tile, lattice, count)
    width = 2 if tile.number == "half" else 4
    bands = packed = 0
    if tile.kernel != "basis_gradient":
        element = 4 if tile.kernel == "direct" else width
        bands = element * lattice.bands * problem.rank * tile.positions * patch_size
    if tile.kernel != "coefficients":
        rank = tile.rank if tile.kernel == "direct" else problem.rank
        packed = width * problem.in_channels * problem.out_channels // groups * rank
    before, dram, after = cost.around(problem, bands, packed, slices, atomic)
    main = Work(
        number=tile.number,
        multiply_adds=loop.total * (loop.products + loop.built),
        dram=dram,
        blocks=loop.programs,
        warps=tile.warps,
        resident=max(1, 8 // tile.warps),  # by their registers
        products=loop.items * loop.products,
        scalars=loop.items * 2 * loop.built,  # a coefficient is widened, then multiplied and added
        shared=loop.items * loop.shared,
        cache=loop.items * loop.loaded + loop.stored,
        steps=loop.items * loop.steps,
    )
    return [before, main, *after]


@lru_cache(maxsize=4096)
def choose(problem: Problem, algorithm: str) -> tuple[Tile, float]:
    """The tile with the least estimated time, and that time in seconds."""
    kernel = kernel_of(problem, algorithm)
    candidates = [tile for tile in ALL if tile.kernel == kernel and fits(problem, tile)]
    priced = ((tile, cost.seconds(works(problem, tile), problem.device)) for tile in candidates)
    return min(priced, key=lambda pair: pair[1])


def split_coefficients(problem: Problem, tile: Tile) -> tuple[int, bool]:
    """(splits, whether they are summed by atomic additions) of the coefficient gradient."""
    lattice = lattice_of(problem, tile)
    groups = problem.geometry.groups
    blocks_i = -(-(problem.in_channels // groups) // tile.channels)
    blocks_o = -(-(problem.out_channels // groups) // tile.outputs)
    work = lattice.phases * -(-lattice.units // tile.units)
    return coefficient_shares(problem, problem.rank * blocks_i * blocks_o * groups, work)


def split_basis(problem: Problem, tile: Tile) -> tuple[int, bool]:
    """(splits, whether they are summed by atomic additions) of the basis gradient."""
    lattice = lattice_of(problem, tile)
    groups = problem.geometry.groups
    blocks_i = -(-(problem.in_channels // groups) // tile.channels)
    work = lattice.phases * -(-lattice.units // tile.units) * blocks_i * groups
    chunks = padded_patch(lattice, tile) // tile.patch
    return basis_shares(problem, problem.rank * chunks, work, chunks)
