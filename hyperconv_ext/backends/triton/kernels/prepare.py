"""One small launch before each kernel: banded matrices, row map, coefficients in their order.

phi is read, or the coordinate MLP is evaluated here: a program does so at a few taps and writes their
phi wherever the bands meet them, while others write the zeros between. No element has two writers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .mlp import evaluate
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
def _position(axis, residue, tap):
    """The inverse of `_tap` at t = 0: where in the patch it meets `tap`; -1 for nowhere."""
    num, tap0 = _first_tap(axis, residue)
    offset = tap - axis.first - tap0
    j = offset // axis.tap_step
    meets = (j * axis.tap_step == offset) & (j >= 0) & (j < axis.taps) & (num % axis.divisor == 0)
    return tl.where(meets, j, -1)


@triton.jit
def _write_band(basis, bands, axes, pid, rank, patch_size, TP: tl.constexpr, BB: tl.constexpr):
    """bands[band, r, t, l] = phi_r(tap at (l, t)): one [TP, BB] block; without phi its zeros alone."""
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
    address = ((band * rank + r).to(tl.int64) * TP + t[:, None]) * patch_size + l[None, :]
    if basis is None:
        zeros = tl.zeros((TP, BB), dtype=bands.dtype.element_ty)
        tl.store(bands + address, zeros, mask=meets == 0)
    else:
        taps = axes[0].kernel * axes[1].kernel * axes[2].kernel
        value = tl.load(basis + r * taps + k, mask=meets, other=0.0)
        tl.store(bands + address, value.to(bands.dtype.element_ty))


@triton.jit
def _write_taps(
    mlp,
    computed,
    bands,
    axes,
    pid,
    rank,
    patch_size,
    widths: tl.constexpr,
    activation: tl.constexpr,
    TP: tl.constexpr,
    BW: tl.constexpr,
    BK: tl.constexpr,
):
    """phi of the MLP at BK taps: into `computed` [R, K], and into the bands where they meet the taps."""
    taps = axes[0].kernel * axes[1].kernel * axes[2].kernel
    k = pid * BK + tl.arange(0, BK)
    n = tl.arange(0, BW)
    features: tl.constexpr = widths[len(widths) - 1]
    phi = evaluate(mlp, k, taps, widths, activation, BW)  # [BK, BW]
    present = (k < taps)[:, None] & (n < features)[None, :]
    constant = k < tl.where(rank > features, taps, 0)
    tl.store(computed + n[None, :] * taps + k[:, None], phi, mask=present)
    ones = tl.full((BK,), 1.0, dtype=tl.float32)
    tl.store(computed + features * taps + k, ones, mask=constant)
    phi = phi.to(bands.dtype.element_ty)
    ones = ones.to(bands.dtype.element_ty)
    k_outer = k // axes[2].kernel
    for band in range(axes[0].modulus * axes[1].modulus * axes[2].modulus):
        band_outer = band // axes[2].modulus
        w = _position(axes[2], band % axes[2].modulus, k % axes[2].kernel)
        h = _position(axes[1], band_outer % axes[1].modulus, k_outer % axes[1].kernel)
        d = _position(axes[0], band_outer // axes[1].modulus, k_outer // axes[1].kernel)
        meets = (d >= 0) & (h >= 0) & (w >= 0)
        for t in range(TP):
            t_outer = t // axes[2].tile
            l = d + axes[0].stride * (t_outer // axes[1].tile)
            l = l * axes[1].patch + h + axes[1].stride * (t_outer % axes[1].tile)
            l = l * axes[2].patch + w + axes[2].stride * (t % axes[2].tile)
            row = (band * rank + n).to(tl.int64) * TP + t
            address = row[None, :] * patch_size + l[:, None]
            tl.store(bands + address, phi, mask=present & meets[:, None])
            last = (band * rank + features) * TP + t
            tl.store(bands + tl.cast(last, tl.int64) * patch_size + l, ones, mask=constant & meets)


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
        "tap_programs",
        "band_programs",
        "row_programs",
        "rank",
        "patch_size",
    ]
)
def prepare_kernel(
    basis,  # [R, K]; None if an MLP computes it
    mlp,  # (coordinates [K, D], weights, biases), or None
    computed,  # [R, K] or None
    bands,  # [bands, R, TP, patch_size] or None
    rows,  # int32 [HEADER + 4 * phases]
    table,  # int32 [3, patch_size]
    coefficients,  # any strides, or None
    packed,  # coefficients in the kernel's order, or None
    axes,
    tap_programs,
    band_programs,
    row_programs,
    rank,
    patch_size,
    source,
    target,
    sizes,
    widths: tl.constexpr,
    activation: tl.constexpr,
    TP: tl.constexpr,
    BB: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    BW: tl.constexpr,
    BK: tl.constexpr,
):
    """`tap_programs` evaluate the MLP, the next write bands, the next the row map, the rest pack."""
    pid = tl.program_id(0)
    if pid < tap_programs:
        if mlp is not None:
            _write_taps(
                mlp, computed, bands, axes, pid, rank, patch_size, widths, activation, TP, BW, BK
            )
    elif pid < tap_programs + band_programs:
        if bands is not None:
            _write_band(basis, bands, axes, pid - tap_programs, rank, patch_size, TP, BB)
    elif pid < tap_programs + band_programs + row_programs:
        _write_rows(rows, table, axes, pid - tap_programs - band_programs, patch_size, BL)
    elif packed is not None:
        first = tap_programs + band_programs + row_programs
        _write_coefficients(coefficients, packed, source, target, pid - first, sizes, rank, BP)
