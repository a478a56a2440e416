"""Tile choices of the Triton kernels: pure functions from a problem to a frozen, named configuration.

Every configuration that `choose` can return is in `ALL`, and `tests/test_triton_aot.py` compiles each
for three GPU generations and checks registers, spills, shared memory and tensor-core instructions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ...problem import Problem
from ..lattice import Lattice, best_lattice
from ..shares import basis_shares, coefficient_shares

Kernel = Literal["basis", "direct", "coefficients", "basis_gradient"]
Number = Literal["half", "tf32", "ieee"]


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


def number(problem: Problem) -> Number:
    """The arithmetic of the products: 16-bit operands, TF32, or IEEE float32."""
    if problem.dtype in ("float16", "bfloat16"):
        return "half"
    return "tf32" if problem.tf32 else "ieee"


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


# Per multiprocessor and clock: multiply-adds of dense products, and bytes from the caches. Leads from
# data sheets for ranking tiles against each other, not promises of speed.
_MULTIPLY_ADDS: dict[Number, int] = {"half": 1024, "tf32": 512, "ieee": 128}
_CACHE_BYTES = 48
_CLOCK = 1.7e9
_STEP_CLOCKS = 150  # barriers and latency that one pass of an inner loop does not hide


def seconds(problem: Problem, tile: Tile) -> float:
    """Estimated time of one launch: per step the slower of arithmetic and cache traffic."""
    lattice = lattice_of(problem, tile)
    groups = problem.geometry.groups
    size_i, size_o = problem.in_channels // groups, problem.out_channels // groups
    if problem.op == "basis_conv_bwd_input":
        size_i, size_o = size_o, size_i
    width = 2 if tile.number == "half" else 4
    rate = _MULTIPLY_ADDS[tile.number]
    rows = tile.units * tile.positions
    blocks_i, blocks_o = -(-size_i // tile.channels), -(-size_o // tile.outputs)
    blocks_u = lattice.phases * -(-lattice.units // tile.units)
    product = rows * tile.channels * tile.outputs
    traffic: float
    if tile.kernel == "direct":
        steps = blocks_i * lattice.patch
        built = tile.channels * tile.outputs * tile.rank
        clocks = product / rate + 2 * built / _MULTIPLY_ADDS["ieee"]
        traffic = width * (rows * tile.channels + built)
        programs = blocks_u * blocks_o * groups
    else:
        chunks = padded_patch(lattice, tile) // tile.patch
        banded = rows * tile.patch * tile.channels
        patch_bytes = width * tile.units * tile.patch * tile.channels
        weight_bytes = width * tile.channels * tile.outputs
        band_bytes = width * tile.positions * tile.patch
        grad_bytes = width * rows * tile.outputs
        if tile.kernel == "basis":
            steps = blocks_i * problem.rank
            reads = patch_bytes / problem.rank if tile.resident else patch_bytes * chunks
            clocks = (banded * chunks + product) / rate
            traffic = reads + band_bytes * chunks + weight_bytes
            programs = blocks_u * blocks_o * groups
        elif tile.kernel == "coefficients":
            steps = blocks_u
            clocks = (banded * chunks + product) / rate
            traffic = (patch_bytes + band_bytes) * chunks + grad_bytes
            programs = problem.rank * blocks_i * blocks_o * groups
        else:
            steps = blocks_u * blocks_i * groups
            clocks = (banded + product * blocks_o) / rate
            traffic = patch_bytes + (grad_bytes + weight_bytes) * blocks_o
            programs = problem.rank * chunks
    step = max(clocks, traffic / _CACHE_BYTES) + _STEP_CLOCKS
    if tile.kernel in ("basis", "direct"):
        return -(-programs // problem.device.processors) * steps * step / _CLOCK
    return max(1.0, programs / problem.device.processors * steps) * step / _CLOCK


@lru_cache(maxsize=4096)
def choose(problem: Problem, algorithm: str) -> tuple[Tile, float]:
    """The tile with the least estimated time, and that time in seconds."""
    kernel = kernel_of(problem, algorithm)
    candidates = [tile for tile in ALL if tile.kernel == kernel and fits(problem, tile)]
    return min(((tile, seconds(problem, tile)) for tile in candidates), key=lambda pair: pair[1])


def split_coefficients(problem: Problem, tile: Tile) -> tuple[int, bool]:
    """(splits, whether they are summed by atomic additions) of the coefficient gradient."""
    lattice = lattice_of(problem, tile)
    groups = problem.geometry.groups
    blocks_i = -(-(problem.in_channels // groups) // tile.channels)
    blocks_o = -(-(problem.out_channels // groups) // tile.outputs)
    work = lattice.phases * -(-lattice.units // tile.units)
    return coefficient_shares(problem, problem.rank * blocks_i * blocks_o * groups, work)


def split_basis(problem: Problem, tile: Tile) -> int:
    """Splits of the basis gradient."""
    lattice = lattice_of(problem, tile)
    groups = problem.geometry.groups
    blocks_i = -(-(problem.in_channels // groups) // tile.channels)
    work = lattice.phases * -(-lattice.units // tile.units) * blocks_i * groups
    chunks = padded_patch(lattice, tile) // tile.patch
    return basis_shares(problem, problem.rank * chunks, work, chunks)
