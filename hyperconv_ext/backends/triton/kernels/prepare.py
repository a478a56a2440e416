"""One small launch before each kernel: banded matrices, row map, coefficients in their order."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import HEADER


@triton.jit
def _first_tap(axis, phase):
    """(num, tap0) of `lattice.Axis` for one phase or a vector of them."""
    num = axis.scale * phase + axis.shift
    return num, ((num // axis.divisor) * axis.inverse) % axis.residues


@triton.jit
def _origin(axis, phase):
    num, tap0 = _first_tap(axis, phase)
    return (num - tap0 * axis.dilation) // axis.modulus - axis.back


@triton.jit
def _tap(axis, residue, l, t):
    """Kernel tap that meets patch position `l` at tile position `t` of one axis; -1 for none."""
    num, tap0 = _first_tap(axis, residue)
    j = l - axis.stride * t
    tap = axis.first + tap0 + axis.tap_step * j
    meets = (j >= 0) & (j < axis.taps) & (tap >= 0) & (tap < axis.kernel)
    return tl.where(meets & (num % axis.divisor == 0), tap, -1)


@triton.jit
def _write_band(basis, bands, axes, pid, rank, patch_size, TP: tl.constexpr, BB: tl.constexpr):
    """bands[band, r, t, l] = phi_r(tap at (l, t)): one [TP, BB] block."""
    chunks = patch_size // BB
    l = (pid % chunks) * BB + tl.arange(0, BB)
    r = (pid // chunks) % rank
    band = pid // (chunks * rank)
    t = tl.arange(0, TP)
    w = _tap(
        axes[2],
        band % axes[2].modulus,
        (l % axes[2].patch)[None, :],
        (t % axes[2].tile)[:, None],
    )
    l_outer = l // axes[2].patch
    t_outer = t // axes[2].tile
    band_outer = band // axes[2].modulus
    h = _tap(
        axes[1],
        band_outer % axes[1].modulus,
        (l_outer % axes[1].patch)[None, :],
        (t_outer % axes[1].tile)[:, None],
    )
    d = _tap(
        axes[0],
        band_outer // axes[1].modulus,
        (l_outer // axes[1].patch)[None, :],
        (t_outer // axes[1].tile)[:, None],
    )
    k = (d * axes[1].kernel + h) * axes[2].kernel + w
    meets = (d >= 0) & (h >= 0) & (w >= 0)
    taps = axes[0].kernel * axes[1].kernel * axes[2].kernel
    value = tl.load(basis + r * taps + k, mask=meets, other=0.0)
    address = ((band * rank + r).to(tl.int64) * TP + t[:, None]) * patch_size + l[None, :]
    tl.store(bands + address, value.to(bands.dtype.element_ty))


@triton.jit
def _write_axis(rows, axis):
    tl.store(rows, axis.out_size)
    tl.store(rows + 1, axis.in_size)
    tl.store(rows + 2, axis.phases)
    tl.store(rows + 3, axis.tile)
    tl.store(rows + 4, axis.tiles)
    tl.store(rows + 5, axis.step * axis.stride * axis.tile)
    tl.store(rows + 6, axis.kernel)
    tl.store(rows + 7, axis.stride)
    tl.store(rows + 8, axis.patch)


@triton.jit
def _write_rows(rows, table, axes, pid, patch_size, BL: tl.constexpr):
    """Header, then per phase (q_d, q_h, q_w, band); table[:, l] = coordinates of patch position l."""
    if pid == 0:
        _write_axis(rows, axes[0])
        _write_axis(rows + 9, axes[1])
        _write_axis(rows + 18, axes[2])
    i = pid * BL + tl.arange(0, BL)
    origins = rows + HEADER
    phases = axes[0].phases * axes[1].phases * axes[2].phases
    phase_w = i % axes[2].phases
    phase_h = (i // axes[2].phases) % axes[1].phases
    phase_d = i // (axes[2].phases * axes[1].phases)
    band = (phase_d % axes[0].modulus) * axes[1].modulus + phase_h % axes[1].modulus
    band = band * axes[2].modulus + phase_w % axes[2].modulus
    tl.store(origins + i * 4, _origin(axes[0], phase_d), mask=i < phases)
    tl.store(origins + i * 4 + 1, _origin(axes[1], phase_h), mask=i < phases)
    tl.store(origins + i * 4 + 2, _origin(axes[2], phase_w), mask=i < phases)
    tl.store(origins + i * 4 + 3, band, mask=i < phases)

    within = i < axes[0].patch * axes[1].patch * axes[2].patch
    outside = 1 << 30  # beyond any axis, and added to any coordinate still below 2**31
    i_outer = i // axes[2].patch
    w = tl.where(within, (i % axes[2].patch) * axes[2].step, outside)
    h = tl.where(within, (i_outer % axes[1].patch) * axes[1].step, outside)
    d = tl.where(within, (i_outer // axes[1].patch) * axes[0].step, outside)
    tl.store(table + i, d, mask=i < patch_size)
    tl.store(table + patch_size + i, h, mask=i < patch_size)
    tl.store(table + 2 * patch_size + i, w, mask=i < patch_size)


@triton.jit
def _write_coefficients(coefficients, packed, source, target, pid, sizes, rank, BP: tl.constexpr):
    """packed[group, r, in, out] in the order of the strides `target`, zero for r >= rank.

    `source` and `target` are strides (group, r, in, out); `sizes` is (in, out) channels per group and
    the number of r to write.
    """
    blocks_out = tl.cdiv(sizes[1], BP)
    blocks_in = tl.cdiv(sizes[0], BP)
    o = (pid % blocks_out) * BP + tl.arange(0, BP)
    pid = pid // blocks_out
    i = (pid % blocks_in) * BP + tl.arange(0, BP)
    pid = pid // blocks_in
    r = pid % sizes[2]
    group = (pid // sizes[2]).to(tl.int64)
    valid = (i < sizes[0])[:, None] & (o < sizes[1])[None, :]
    present = valid & (i < tl.where(r < rank, sizes[0], 0))[:, None]
    read = i.to(tl.int64)[:, None] * source[2] + o.to(tl.int64)[None, :] * source[3]
    value = tl.load(coefficients + group * source[0] + r * source[1] + read, mask=present, other=0.0)
    write = i.to(tl.int64)[:, None] * target[2] + o.to(tl.int64)[None, :] * target[3]
    write += group * target[0] + r.to(tl.int64) * target[1]
    tl.store(packed + write, value.to(packed.dtype.element_ty), mask=valid)


@triton.jit(
    do_not_specialize=[
        "band_programs",
        "row_programs",
        "rank",
        "patch_size",
    ]
)
def prepare_kernel(
    basis,  # [R, K] or None
    bands,  # [bands, R, TP, patch_size] or None
    rows,  # int32 [HEADER + 4 * phases]
    table,  # int32 [3, patch_size]
    coefficients,  # any strides, or None
    packed,  # coefficients in the kernel's order, or None
    axes,
    band_programs,
    row_programs,
    rank,
    patch_size,
    source,
    target,
    sizes,
    TP: tl.constexpr,
    BB: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
):
    """Programs [0, band_programs) write bands, the next row_programs the row map, the rest pack."""
    pid = tl.program_id(0)
    if pid < band_programs:
        if bands is not None:
            _write_band(basis, bands, axes, pid, rank, patch_size, TP, BB)
    elif pid < band_programs + row_programs:
        _write_rows(rows, table, axes, pid - band_programs, patch_size, BL)
    elif packed is not None:
        _write_coefficients(
            coefficients,
            packed,
            source,
            target,
            pid - band_programs - row_programs,
            sizes,
            rank,
            BP,
        )
