"""Tiles of the kernels by wgmma, csrc/*_sm90.cu: which problems they take, and how long they need."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import NamedTuple

from ...problem import Problem
from .. import cost
from ..cost import Work
from ..figures import number
from ..shares import basis_shares, coefficient_shares
from .tiles import Family, Kernel, Tile, channels

CAPABILITY = 90
RANKS = 5  # functions of a pack
PACKS = 2  # of a convolution; of a gradient, any number
CHANNELS = (64, 128)  # of a block: out; in, where it is all of them
_SIDE = 8  # outputs along both axes of a square
_UNITS = 4  # of a square
_GROUPS = 2  # warpgroups that multiply
_ROWS = 64  # of a warpgroup's products
_BOX = 64  # channels of a copy
_PART = 32  # channels of u together
_SLOTS = 4  # of z, 16 channels of a square each, between the warpgroups of the joint gradient
_ALIGNMENT, _BARRIERS, _SHARED = 1024, 128, 227 * 1024  # bytes


class Shape(NamedTuple):
    """How a square of 8x8 outputs is divided; `Shape` in csrc/squares.cuh.

    `largest`: kernel size along either axis. `unit`: (height, width) of 16 outputs, whose patch is
    `patch_width` wide in `steps` times 16 positions. `halo`: positions (height, width).
    """

    largest: int
    unit: tuple[int, int]
    patch_width: int
    steps: int
    halo: tuple[int, int]

    @property
    def halo_bytes(self) -> int:
        """Of 64 channels."""
        return prod(self.halo) * 2 * _BOX

    @property
    def band_bytes(self) -> int:
        """Of a pack."""
        return self.steps * RANKS * 16 * 32


SHAPES = (
    Shape(5, (4, 4), 8, 4, (12, 16)),
    Shape(7, (8, 2), 8, 7, (14, 16)),
    Shape(11, (4, 4), 16, 14, (18, 24)),
)
_LARGE_HALO = 32 * 1024  # bytes: fewer of them are in shared memory together


def reason(problem: Problem) -> str:
    """What of `problem` the kernel does not take, whatever the device, or ''."""
    geometry, squares = problem.geometry, _squares(problem)
    plain = {*geometry.stride, *geometry.dilation, geometry.groups} == {1}
    rows = (
        (number(problem) == "half", f"it takes float16 and bfloat16, not {problem.dtype}"),
        (geometry.dims == 2, f"it takes 2 spatial axes, not {geometry.dims}"),
        (
            plain,
            f"it takes stride 1, dilation 1 and one group, "
            f"not {geometry.stride}, {geometry.dilation} and {geometry.groups}",
        ),
        _channels_fit(problem),
        _ranks_fit(problem),
        _kernel_fits(problem),
        (
            problem.aligned,
            "its activations must be channels last; call .to(memory_format=torch.channels_last)",
        ),
        (squares < 2**31, f"{squares} squares of outputs are more than 2**31 - 1; split the batch"),
        (
            problem.wanted is None or problem.wanted[:2] == (True, True),
            "only the gradients of the input and of A share their work, of which not both are wanted",
        ),
    )
    return next((why for fits, why in rows if not fits), "")


def _ranks_fit(problem: Problem) -> tuple[bool, str]:
    convolves = problem.op in ("basis_conv_fwd", "basis_conv_bwd_input")
    most = 1 if problem.wanted else PACKS
    why = f"it takes up to {most * RANKS} basis functions, not {problem.rank}"
    return not convolves or _packs(problem) <= most, why


def _kernel_fits(problem: Problem) -> tuple[bool, str]:
    largest, size = SHAPES[-1].largest, problem.geometry.kernel_size
    return max(size) <= largest, f"it takes kernels up to {largest} along an axis, not {size}"


def _channels_fit(problem: Problem) -> tuple[bool, str]:
    size_i, size_o = channels(problem)
    if problem.wanted:
        fits = size_i == size_o == _BOX
        return fits, f"it takes {_BOX} channels in and out together, not {size_i} and {size_o}"
    fits = size_i % _BOX == size_o % _BOX == 0
    return fits, f"it takes multiples of {_BOX} channels in and out, not {size_i} and {size_o}"


def _together(size_o: int) -> int:
    """Output channels of a block."""
    return max(count for count in CHANNELS if size_o % count == 0)


def _gathered(problem: Problem, shape: Shape) -> int:
    """The same of the gradient of phi; at the largest kernels there is no room for as many."""
    return _BOX if shape is SHAPES[-1] else _together(problem.out_channels)


def _squares(problem: Problem) -> int:
    geometry = problem.geometry
    transposed = problem.op == "basis_conv_bwd_input"  # the squares are of its result
    size = geometry.input_size if transposed else geometry.output_size
    return problem.batch * prod(-(-extent // _SIDE) for extent in size)


def _packs(problem: Problem) -> int:
    """Of its functions, the last one filled up by zeros."""
    return -(-problem.rank // RANKS)


def _multiplied(shape: Shape, size: int, rank: int) -> int:
    """Functions that a convolution multiplies: those of full packs, or one less; `size`: a block's."""
    if rank <= RANKS or rank > 2 * RANKS - 1 or (shape.largest, size) == (11, 128):
        return -(-rank // RANKS) * RANKS
    return 2 * RANKS - 1


def _item_bytes(size: int) -> int:
    """Of A for 16 input channels and a pack."""
    return RANKS * 16 * size * 2


class _Layout(NamedTuple):
    """That of csrc/basis_conv_sm90.cu: halos of each consumer, whether all of A is there, bytes."""

    stages: int
    resident: bool
    shared_bytes: int


def _layout(shape: Shape, size_i: int, size: int, packs: int) -> _Layout:
    """Of blocks of `size` outputs; only where there are as many inputs, can all of A be there."""
    stages = 1 if shape.halo_bytes > _LARGE_HALO else 2
    items, item, limit = size // 16 * packs, _item_bytes(size), _SHARED - _ALIGNMENT - _BARRIERS
    used = _GROUPS * stages * shape.halo_bytes + packs * shape.band_bytes
    staged = _GROUPS * _SIDE**2 * size * 2
    if (limit - used - staged) // item >= 2:  # else y is staged in the halos
        used += staged
    resident = size_i == size and (limit - used) // item >= items
    ring = 1 if resident else min((limit - used) // item, 3)
    used += (items if resident else ring) * item
    barriers = 8 * (1 + 2 * _GROUPS * stages + 2 * ring)
    return _Layout(stages, resident, used + barriers + _ALIGNMENT)


def _convolution(problem: Problem, shape: Shape) -> Tile:
    size_i, size_o = channels(problem)
    size = _together(size_o)
    layout = _layout(shape, size_i, size, _packs(problem))
    return _tile("basis_conv_sm90", size, shape, layout.stages, layout.shared_bytes)


def _coefficients(shape: Shape) -> Tile:
    """`Layout` in csrc/coefficient_gradient_sm90.cu."""
    stages = 3 if shape.halo_bytes > _LARGE_HALO else 4
    shared = stages * _stage_bytes(shape) + shape.band_bytes + 8 * (1 + 2 * stages) + _ALIGNMENT
    return _tile("coefficient_gradient_sm90", _BOX, shape, stages, shared)


def _basis(shape: Shape, size: int) -> Tile:
    """`Layout` in csrc/basis_gradient_sm90.cu, of blocks of `size` output channels."""
    weights, part, stage = RANKS * size * _BOX * 2, _PART * _part_bytes(), _stage_bytes(shape, size)
    room = _SHARED - _ALIGNMENT - 64 - weights - _GROUPS * part
    stages = 2 if room // (_GROUPS * stage) >= 2 else 1
    barriers = 8 * (1 + 2 * _GROUPS * stages)
    shared = _GROUPS * (stages * stage + part) + weights + barriers + _ALIGNMENT
    return _tile("basis_gradient_sm90", size, shape, stages, shared)


def _joint(shape: Shape) -> Tile:
    """`Layout` in csrc/joint_gradient_sm90.cu."""
    stages = 2
    staged = stages * _stage_bytes(shape) + _SIDE**2 * 2 * _BOX
    barriers = 8 * (1 + 2 * stages + 2 * _SLOTS)
    shared = staged + shape.band_bytes + _z_bytes() + barriers + _ALIGNMENT
    return _tile("joint_gradient_sm90", _BOX, shape, stages, shared)


def _z_bytes() -> int:
    """Of 64 channels of z for a square."""
    return _SIDE**2 * RANKS * 2 * _BOX


def _part_bytes() -> int:
    """Of a channel of u for a square."""
    return 2 * RANKS * _SIDE**2


def _stage_bytes(shape: Shape, size: int = _BOX) -> int:
    """Of 64 channels of x and `size` of the gradient, for a square."""
    return shape.halo_bytes + _SIDE**2 * 2 * size


def _tile(family: Family, outputs: int, shape: Shape, stages: int, shared_bytes: int) -> Tile:
    height, width = shape.unit
    return Tile(
        Kernel(family, "half", outputs, RANKS),
        (1, height, width),
        (1, 1, _SIDE // height, _SIDE // width),
        shape.steps,
        stages,
        shared_bytes,
        shape.patch_width,
    )


def tile_of(problem: Problem, shape: Shape) -> Tile:
    """The instantiation for such a problem."""
    if problem.wanted:
        return _joint(shape)
    if problem.op == "basis_conv_bwd_coeff":
        return _coefficients(shape)
    if problem.op == "basis_conv_bwd_basis":
        return _basis(shape, _gathered(problem, shape))
    return _convolution(problem, shape)


def choose(problem: Problem) -> tuple[Tile, float]:
    """The tile of a problem for which there is no `reason`, and the estimated seconds."""
    largest = max(problem.geometry.kernel_size)
    tile = tile_of(problem, next(shape for shape in SHAPES if largest <= shape.largest))
    return tile, cost.seconds(works(problem, tile), problem.device)


def shares(problem: Problem, tile: Tile) -> tuple[int, bool]:
    """(shares of the sum over outputs, whether atomic) of a gradient; (1, False) for a convolution."""
    if tile.kernel.family == "basis_conv_sm90":
        return 1, False
    if tile.kernel.family == "joint_gradient_sm90":
        return coefficient_shares(problem, 1, _squares(problem), alone=True)
    if tile.kernel.family == "basis_gradient_sm90":
        pieces, rounds = basis_pieces(problem, tile), -(-_squares(problem) // _GROUPS)
        return basis_shares(problem, pieces * _packs(problem), rounds, pieces, alone=True)
    return coefficient_shares(problem, _programs(problem), _squares(problem), alone=True)


def basis_pieces(problem: Problem, tile: Tile) -> int:
    """Blocks of input and of output channels, which the gradient of phi sums apart."""
    return problem.in_channels // _BOX * (problem.out_channels // tile.kernel.outputs)


def of_basis(problem: Problem) -> Problem:
    """Of a joint problem that of the gradient of phi, which has launches of its own."""
    return replace(problem, op="basis_conv_bwd_basis", wanted=None)


def _programs(problem: Problem) -> int:
    """Blocks of a share of the gradient of A."""
    return problem.in_channels // _BOX * (problem.out_channels // _BOX) * _packs(problem)


def works(problem: Problem, tile: Tile) -> list[Work]:
    """What the launches execute, of a joint problem also those for phi by itself."""
    shape = next(shape for shape in SHAPES if shape.steps == tile.slice)
    if problem.wanted:
        rest = []
        if problem.wanted[2]:
            phi = of_basis(problem)
            rest = works(phi, tile_of(phi, shape))
        return [*_joint_works(problem, tile, shape), *rest]
    if problem.op == "basis_conv_bwd_coeff":
        return _coefficient_works(problem, tile, shape)
    if problem.op == "basis_conv_bwd_basis":
        return _basis_works(problem, tile, shape)
    return _convolution_works(problem, tile, shape)


def _convolution_works(problem: Problem, tile: Tile, shape: Shape) -> list[Work]:
    (size_i, size_o), size = channels(problem), tile.kernel.outputs
    steps, packs = shape.steps, _packs(problem)
    blocks_i, slices, ranks = size_i // 16, size_o // size, _multiplied(shape, size, problem.rank)
    squares = _squares(problem)
    blocks = min(max(problem.device.processors // slices, 1), -(-squares // _GROUPS))  # of a slice
    busiest = _GROUPS * -(-squares // (_GROUPS * blocks))  # squares of a block
    products = blocks_i * 16 * _ROWS * ranks * (steps * 16 + size)
    packed = blocks_i * packs * _item_bytes(size)
    streamed = 0 if _layout(shape, size_i, size, packs).resident else packed // _GROUPS
    halo = prod(shape.halo) * 2 * size_i
    out = _SIDE**2 * size * 2
    # Patches by ldmatrix, and the right operands; what the copy engine writes and reads.
    read = blocks_i * 32 * (steps * _ROWS + ranks * (steps * 16 + size))
    before, dram, after = cost.around(problem, packs * shape.band_bytes, packed * slices, 1, False)
    main = Work(
        number="half",
        library=True,  # wgmma's rate
        multiply_adds=products * squares * slices,
        dram=dram,
        blocks=blocks * slices,
        warps=4 * _GROUPS,
        products=products * busiest,
        shared=busiest * (read + halo + streamed + 2 * out),
        cache=busiest * (halo + streamed + out),
        steps=busiest // _GROUPS * blocks_i * packs,
    )
    return [before, main, *after]


def _coefficient_works(problem: Problem, tile: Tile, shape: Shape) -> list[Work]:
    steps, columns, squares = shape.steps, 16 * RANKS, _squares(problem)
    programs = _programs(problem)
    count, atomic = shares(problem, tile)
    busiest = -(-squares // count)
    products = _UNITS * 16 * _ROWS * (steps * columns + RANKS * _BOX)
    # The patch by ldmatrix for either warpgroup, and the right operands.
    read = _UNITS * 32 * (steps * (_GROUPS * _ROWS + columns) + RANKS * _BOX)
    bands = _packs(problem) * shape.band_bytes
    before, dram, after = cost.around(problem, bands, 0, count, atomic)
    main = Work(
        number="half",
        library=True,
        multiply_adds=products * squares * programs,
        dram=dram,
        blocks=programs * count,
        warps=4 * _GROUPS,
        products=products * busiest,
        shared=busiest * (read + _stage_bytes(shape)),
        cache=busiest * _stage_bytes(shape) + 4 * RANKS * _ROWS * _BOX,
        steps=busiest * _UNITS,
    )
    return [before, main, *after]


def _joint_works(problem: Problem, tile: Tile, shape: Shape) -> list[Work]:
    steps, columns, squares = shape.steps, 16 * RANKS, _squares(problem)
    count, atomic = shares(problem, tile)
    busiest = -(-squares // count)
    products = _UNITS * 16 * _ROWS * (steps * columns + 2 * RANKS * _BOX)
    # The patch by ldmatrix and the bands; z written, and read for either gradient; x by ldmatrix.
    out = _SIDE**2 * 2 * _BOX
    read = _UNITS * 32 * steps * (_ROWS + columns) + 3 * _z_bytes() + out
    packed = _BOX // 16 * _item_bytes(_BOX)
    sums = replace(problem, op="basis_conv_bwd_coeff", wanted=None)
    before, dram, after = cost.around(sums, shape.band_bytes, packed, count, atomic)
    of_input = problem.op == "basis_conv_bwd_input"
    main = Work(
        number="half",
        library=True,
        multiply_adds=products * squares,
        dram=dram + (cost.input_bytes(problem) if of_input else cost.output_bytes(problem)),
        blocks=count,
        warps=tile.warps,
        products=products * busiest,
        shared=busiest * (read + _stage_bytes(shape) + 2 * out),
        cache=busiest * (_stage_bytes(shape) + out) + packed + 4 * RANKS * _BOX * _BOX,
        steps=busiest * _BOX // 16,
    )
    return [before, main, *after]


def _basis_works(problem: Problem, tile: Tile, shape: Shape) -> list[Work]:
    size, columns, squares = tile.kernel.outputs, 16 * RANKS, _squares(problem)
    count, atomic = shares(problem, tile)
    pieces, packs = basis_pieces(problem, tile), _packs(problem)
    busiest = _GROUPS * -(-squares // (_GROUPS * count))
    rows = _ROWS * -(-shape.steps // 4)  # positions of the patch
    products = _ROWS * _BOX * RANKS * size + _UNITS * rows * _BOX * columns
    # u: g for either part of the channels, A, and u itself written. Then the patch, and u read.
    gathered = 2 * (_BOX // _PART * _ROWS * size + RANKS * size * _BOX) + _BOX * _part_bytes()
    read = gathered + _UNITS * 2 * _BOX * rows // _ROWS * (_ROWS + columns)
    stage = _stage_bytes(shape, size)
    packed = problem.out_channels // 16 * packs * _item_bytes(problem.in_channels)
    before, dram, after = cost.around(problem, 0, packed, count * pieces, atomic)
    main = Work(
        number="half",
        library=True,
        multiply_adds=products * squares * pieces * packs,
        dram=dram,
        blocks=pieces * packs * count,
        warps=4 * _GROUPS,
        products=products * busiest,
        shared=busiest * (read + stage),
        cache=busiest * stage + RANKS * size * _BOX * 2,
        steps=busiest // _GROUPS * _BOX // _PART,
    )
    return [before, main, *after]
