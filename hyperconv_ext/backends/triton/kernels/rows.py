"""Leaf functions of the kernels: from a unit (tile of one phase) to addresses and masks.

Names: `u` unit, `t` position inside a tile, `l` position inside a patch, `q` input coordinate.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# int32 elements of the row map before its table of phases.
HEADER: tl.constexpr = tl.constexpr(32)


class Rows(NamedTuple):
    """What the kernels need of one `lattice.Axis`; `pitch` is the inputs between two tiles."""

    out_size: tl.tensor
    in_size: tl.tensor
    phases: tl.tensor
    tile: tl.tensor
    tiles: tl.tensor
    pitch: tl.tensor
    kernel: tl.tensor
    stride: tl.tensor
    patch: tl.tensor


@triton.jit
def _load_axis(rows):
    return Rows(
        tl.load(rows),
        tl.load(rows + 1),
        tl.load(rows + 2),
        tl.load(rows + 3),
        tl.load(rows + 4),
        tl.load(rows + 5),
        tl.load(rows + 6),
        tl.load(rows + 7),
        tl.load(rows + 8),
    )


@triton.jit
def load_axes(rows):
    """The three axes of the row map that `prepare` wrote: a few words in place of 27 arguments.

    As arguments they would be compiled in where they happen to be 1 or a multiple of 16, and every
    new geometry would compile every kernel again.
    """
    return _load_axis(rows), _load_axis(rows + 9), _load_axis(rows + 18)


@triton.jit
def split_unit(u, axes):
    """Unit number -> (batch index, tile index on each axis), last axis fastest."""
    tile_w = u % axes[2].tiles
    u = u // axes[2].tiles
    tile_h = u % axes[1].tiles
    u = u // axes[1].tiles
    return u // axes[0].tiles, u % axes[0].tiles, tile_h, tile_w


@triton.jit
def unit_origins(strides, axes, rows, phase, units, u):
    """First input of units `u` [U]: (q_d, q_h, q_w, offset from the start of x), each [U].

    `strides` are x's (batch, depth, height, width) in elements. Units past the last one
    lie outside every input.
    """
    batch, tile_d, tile_h, tile_w = split_unit(u, axes)
    origin = rows + HEADER + phase * 4
    q_d = tl.load(origin) + tile_d * axes[0].pitch
    q_h = tl.load(origin + 1) + tile_h * axes[1].pitch
    q_w = tl.load(origin + 2) + tile_w * axes[2].pitch
    base = (
        batch.to(tl.int64) * strides[0]
        + q_d.to(tl.int64) * strides[1]
        + q_h.to(tl.int64) * strides[2]
        + q_w.to(tl.int64) * strides[3]
    )
    return tl.where(u < units, q_d, -(1 << 30)), q_h, q_w, base


@triton.jit
def patch_pointers(x, strides, axes, q_d, q_h, q_w, base, table, table_size, l):
    """Addresses and validity [U, L] of the inputs at patch positions `l` [L] of units at (q, base).

    `table` [3, table_size] holds the coordinates of each patch position relative to the unit's first
    input, far outside any input for the padding after the last position.
    """
    l_d = tl.load(table + l)
    l_h = tl.load(table + table_size + l)
    l_w = tl.load(table + 2 * table_size + l)
    offset = (
        l_d.to(tl.int64) * strides[1] + l_h.to(tl.int64) * strides[2] + l_w.to(tl.int64) * strides[3]
    )
    d = q_d[:, None] + l_d[None, :]
    h = q_h[:, None] + l_h[None, :]
    w = q_w[:, None] + l_w[None, :]
    inside = (d >= 0) & (d < axes[0].in_size) & (h >= 0) & (h < axes[1].in_size)
    inside = inside & (w >= 0) & (w < axes[2].in_size)
    return x + (base[:, None] + offset[None, :]), inside


@triton.jit
def phase_band(rows, phase):
    """Which banded matrix a phase uses."""
    return tl.load(rows + HEADER + phase * 4 + 3)


@triton.jit
def output_pointers(y, strides, axes, phase, units, m, TP: tl.constexpr):
    """Addresses and validity of the outputs `m` = unit * TP + position in tile, [M]."""
    u = m // TP
    t = m % TP
    batch, tile_d, tile_h, tile_w = split_unit(u, axes)
    phase_w = phase % axes[2].phases
    phase_h = (phase // axes[2].phases) % axes[1].phases
    phase_d = phase // (axes[2].phases * axes[1].phases)
    t_w = t % axes[2].tile
    t_h = (t // axes[2].tile) % axes[1].tile
    t_d = t // (axes[2].tile * axes[1].tile)
    d = phase_d + axes[0].phases * (tile_d * axes[0].tile + t_d)
    h = phase_h + axes[1].phases * (tile_h * axes[1].tile + t_h)
    w = phase_w + axes[2].phases * (tile_w * axes[2].tile + t_w)
    offset = (
        batch.to(tl.int64) * strides[0]
        + d.to(tl.int64) * strides[1]
        + h.to(tl.int64) * strides[2]
        + w.to(tl.int64) * strides[3]
    )
    inside = (d < axes[0].out_size) & (h < axes[1].out_size) & (w < axes[2].out_size)
    return y + offset, inside & (u < units)
