"""Tiles of csrc/basis_conv_sm90.cu: which problems it takes, and how long it needs for them."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from ...problem import Problem
from .. import cost
from ..cost import Work
from ..figures import number
from .tiles import Kernel, Tile, channels

CAPABILITY = 90
RANKS = 5
CHANNELS = (64, 128)  # in, and as many out
_SIDE = 8  # outputs along both axes of a consumer's square
_CONSUMERS = 2
_ROWS = 64  # of a warpgroup's products
_BOX = 64  # channels of a copy


class Shape(NamedTuple):
    """How a consumer's 8x8 outputs are divided; `Shape` in csrc/basis_conv_sm90.cu.

    `largest`: kernel size along either axis. `unit`: (height, width) of 16 outputs, whose patch is
    `patch_width` wide in `steps` times 16 positions. `halo`: positions (height, width), `stages` of them
    in shared memory for each consumer.
    """

    largest: int
    unit: tuple[int, int]
    patch_width: int
    steps: int
    halo: tuple[int, int]
    stages: int


SHAPES = (
    Shape(5, (4, 4), 8, 4, (12, 16), 2),
    Shape(7, (8, 2), 8, 7, (14, 16), 2),
    Shape(11, (4, 4), 16, 14, (18, 24), 1),
)


def reason(problem: Problem) -> str:
    """What of `problem` the kernel does not take, whatever the device, or ''."""
    geometry, squares = problem.geometry, _squares(problem)
    size_i, size_o = channels(problem)
    plain = {*geometry.stride, *geometry.dilation, geometry.groups} == {1}
    counts = " or ".join(map(str, CHANNELS))
    rows = (
        (problem.op in ("basis_conv_fwd", "basis_conv_bwd_input"), f"it computes no {problem.op}"),
        (number(problem) == "half", f"it takes float16 and bfloat16, not {problem.dtype}"),
        (geometry.dims == 2, f"it takes 2 spatial axes, not {geometry.dims}"),
        (
            plain,
            f"it takes stride 1, dilation 1 and one group, "
            f"not {geometry.stride}, {geometry.dilation} and {geometry.groups}",
        ),
        (
            size_i == size_o and size_i in CHANNELS,
            f"it takes {counts} channels in and as many out, not {size_i} and {size_o}",
        ),
        (problem.rank <= RANKS, f"it takes up to {RANKS} basis functions, not {problem.rank}"),
        (
            max(geometry.kernel_size) <= SHAPES[-1].largest,
            f"it takes kernels up to {SHAPES[-1].largest} along an axis, not {geometry.kernel_size}",
        ),
        (
            problem.aligned,
            "its activations must be channels last; call .to(memory_format=torch.channels_last)",
        ),
        (squares < 2**31, f"{squares} squares of outputs are more than 2**31 - 1; split the batch"),
    )
    return next((why for fits, why in rows if not fits), "")


def _squares(problem: Problem) -> int:
    geometry = problem.geometry
    forward = problem.op == "basis_conv_fwd"
    size = geometry.output_size if forward else geometry.input_size
    return problem.batch * prod(-(-extent // _SIDE) for extent in size)


def _block_bytes(size: int) -> int:
    """Of A for 16 input channels."""
    return RANKS * 16 * size * 2


def _shared_bytes(shape: Shape, size: int) -> int:
    """`Layout` in csrc/basis_conv_sm90.cu."""
    resident = size == _BOX
    ring = 1 if resident else shape.stages + 1
    halo = _CONSUMERS * shape.stages * prod(shape.halo) * 2 * _BOX
    out = _CONSUMERS * _SIDE**2 * size * 2
    weights = (size // 16 if resident else ring) * _block_bytes(size)
    barriers = 1 + 2 * _CONSUMERS * shape.stages + 2 * ring
    return halo + out + shape.steps * RANKS * 16 * 32 + weights + 8 * barriers + 1024


def tile_of(shape: Shape, size: int) -> Tile:
    """The instantiation for so many channels."""
    height, width = shape.unit
    return Tile(
        Kernel("basis_conv_sm90", "half", size, RANKS),
        (1, height, width),
        (1, 1, _SIDE // height, _SIDE // width),
        shape.steps,
        shape.stages,
        _shared_bytes(shape, size),
        shape.patch_width,
    )


def choose(problem: Problem) -> tuple[Tile, float]:
    """The tile of a problem for which there is no `reason`, and the estimated seconds."""
    largest = max(problem.geometry.kernel_size)
    shape = next(shape for shape in SHAPES if largest <= shape.largest)
    tile = tile_of(shape, channels(problem)[0])
    return tile, cost.seconds(works(problem, tile), problem.device)


def works(problem: Problem, tile: Tile) -> list[Work]:
    """What the two launches execute."""
    size, steps = tile.kernel.outputs, tile.slice
    shape = next(shape for shape in SHAPES if shape.steps == steps)
    blocks_i, columns = size // 16, 16 * RANKS
    squares = _squares(problem)
    blocks = min(problem.device.processors, -(-squares // _CONSUMERS))
    busiest = _CONSUMERS * -(-squares // (_CONSUMERS * blocks))  # squares of a block
    products = blocks_i * 16 * _ROWS * (steps * columns + RANKS * size)
    streamed = 0 if size == _BOX else blocks_i * _block_bytes(size) // _CONSUMERS
    halo = prod(shape.halo) * 2 * size
    out = _SIDE**2 * size * 2
    # Patches by ldmatrix, and the right operands; what the copy engine writes and reads.
    read = blocks_i * 32 * (steps * (_ROWS + columns) + RANKS * size)
    bands, packed = 32 * steps * columns, blocks_i * _block_bytes(size)
    before, dram, after = cost.around(problem, bands, packed, 1, False)
    main = Work(
        number="half",
        library=True,  # wgmma's rate
        multiply_adds=products * squares,
        dram=dram,
        blocks=blocks,
        warps=4 * _CONSUMERS,
        products=products * busiest,
        shared=busiest * (read + halo + streamed + 2 * out),
        cache=busiest * (halo + streamed + out),
        steps=busiest // _CONSUMERS * blocks_i,
    )
    return [before, main, *after]
