"""The row map: every convolution geometry as dense, stride-only convolutions over phases.

Along one axis the outputs that share a residue p mod `phases` form a *phase*. Within a phase, output
n reads the inputs

    q = origin(phase) + step * (jump * n + j),     j = 0 .. taps - 1,

and meets them with kernel tap  first(phase) + tap_step * j. Dilation has become the distance
between neighbouring inputs, and the holes of a transposed convolution have become the choice of taps
(its polyphase decomposition), so neither costs a multiplication. The forward operator and the input
gradient differ only in these numbers; the kernels never know which one they compute.

A *tile* is a block of neighbouring outputs of one phase, its *patch* the inputs that they read. The
tile times the patch is the banded (block Toeplitz) matrix that holds phi where the two meet. Output t of
a tile meets its first tap at patch position stride * t, and position l is the input

    step * (l // stride * jump + l % stride)

after the tile's first. `stride` is `jump`, but where outputs read inputs far apart and the patch leaves
out those that none of them reads: then it is `taps`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod
from typing import NamedTuple

from ..geometry import Geometry


class Axis(NamedTuple):
    """One spatial axis as the kernels see it: integers only, passed to them as they are.

    With  num = scale * phase + shift  and  tap0 = (num // divisor * inverse) % residues,

        origin(phase) = (num - tap0 * dilation) // modulus - back
        tap(phase, j) = tap0 + first + tap_step * j,  a tap only if in [0, kernel) and
                        num is a multiple of divisor

    There are no more phases than outputs. Phases that agree modulo `modulus` meet the same taps; the
    first `bands` of those there are have banded matrices of their own.
    """

    out_size: int
    in_size: int
    kernel: int
    phases: int
    tile: int
    tiles: int
    step: int
    stride: int
    jump: int
    patch: int
    taps: int
    scale: int
    shift: int
    divisor: int
    inverse: int
    residues: int
    dilation: int
    modulus: int
    bands: int
    back: int
    first: int
    tap_step: int


def _forward(
    size: int,
    out: int,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    tile: int,
    gaps: bool,
) -> Axis:
    # One tap has no dilation; calling it the stride makes neighbouring outputs read neighbours.
    dilation = stride if kernel == 1 else dilation
    common = gcd(stride, dilation)
    phases = min(dilation // common, out)
    jump = stride // common
    neighbour = jump if gaps else min(jump, kernel)
    return Axis(
        out_size=out,
        in_size=size,
        kernel=kernel,
        phases=phases,
        tile=tile,
        tiles=-(-out // (phases * tile)),
        step=dilation,
        stride=neighbour,
        jump=jump,
        patch=(tile - 1) * neighbour + kernel,
        taps=kernel,
        scale=stride,
        shift=-padding,
        divisor=1,
        inverse=0,
        residues=1,
        dilation=0,
        modulus=1,
        bands=1,
        back=0,
        first=0,
        tap_step=1,
    )


def _transposed(
    size: int,
    out: int,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    tile: int,
    gaps: bool,
) -> Axis:
    # Input p receives from output q through tap k where stride * q = p + padding - dilation * k.
    common = gcd(stride, dilation)
    residues, step = stride // common, dilation // common
    phases = min(stride * step, size)
    taps = -(-kernel // residues)
    return Axis(
        out_size=size,
        in_size=out,
        kernel=kernel,
        phases=phases,
        tile=tile,
        tiles=-(-size // (phases * tile)),
        step=step,
        stride=1,
        jump=1,
        patch=tile - 1 + taps,
        taps=taps,
        scale=1,
        shift=padding,
        divisor=common,
        inverse=pow(step, -1, residues),
        residues=residues,
        dilation=dilation,
        modulus=stride,
        bands=min(stride, phases),
        back=step * (taps - 1),
        first=residues * (taps - 1),
        tap_step=-residues,
    )


@dataclass(frozen=True)
class Lattice:
    """Three axes (leading ones of length 1 where the convolution has fewer), outermost first."""

    axes: tuple[Axis, Axis, Axis]
    batch: int

    @property
    def phases(self) -> int:
        """Phases of all axes together."""
        return prod(axis.phases for axis in self.axes)

    @property
    def units(self) -> int:
        """Tiles per phase, over the whole batch."""
        return self.batch * prod(axis.tiles for axis in self.axes)

    @property
    def patch(self) -> int:
        """Inputs that one tile reads."""
        return prod(axis.patch for axis in self.axes)

    @property
    def positions(self) -> int:
        """Outputs of one tile."""
        return prod(axis.tile for axis in self.axes)

    @property
    def bands(self) -> int:
        """Distinct banded matrices: phases that agree modulo the stride share one."""
        return prod(axis.bands for axis in self.axes)


@lru_cache(maxsize=4096)
def lattice(
    geometry: Geometry,
    batch: int,
    transposed: bool,
    tile: tuple[int, int, int],
    gaps: bool = True,
) -> Lattice:
    """The row map of a geometry (or of its input gradient) in tiles of the given shape.

    `gaps`: patches are boxes, with the inputs that no output reads.
    """
    lead = 3 - geometry.dims
    build: Callable[..., Axis] = _transposed if transposed else _forward
    rows = zip(
        (1,) * lead + geometry.input_size,
        (1,) * lead + geometry.output_size,
        (1,) * lead + geometry.kernel_size,
        (1,) * lead + geometry.stride,
        (0,) * lead + geometry.padding,
        (1,) * lead + geometry.dilation,
        tile,
        (gaps,) * 3,
        strict=True,
    )
    depth, height, width = (build(*row) for row in rows)
    return Lattice((depth, height, width), batch)


def _shapes(positions: int) -> list[tuple[int, int, int]]:
    """Every split of a power of two over three axes."""
    powers = [1 << i for i in range(positions.bit_length())]
    return [(d, h, positions // (d * h)) for d in powers for h in powers if d * h <= positions]


@lru_cache(maxsize=4096)
def best_lattice(geometry: Geometry, batch: int, transposed: bool, positions: int) -> Lattice:
    """The tile shape of `positions` outputs that multiplies least: tiles x patch, padding included.

    Patches are without gaps. Between equals the one longest along the last axis wins: its rows are
    contiguous in memory.
    """
    shapes = _shapes(positions)
    choices = [lattice(geometry, batch, transposed, shape, gaps=False) for shape in shapes]
    return min(choices, key=lambda choice: choice.units * choice.patch)
