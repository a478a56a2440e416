"""One small launch before each kernel: banded matrices, row map, coefficients in their order.

phi is read, or the coordinate MLP is evaluated here: a program does so at a few taps and writes their
phi wherever the bands meet them, while others write the zeros between. No element has two writers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...lattice import Axis
from .mlp import evaluate
from .rows import HEADER


@triton.jit
def _number(code):
    """The integer that `launch` passes as 4 times itself plus 3.

    As it is, each would be compiled in where it happens to be 1, or a multiple of 16, and nearly every
    geometry would compile this kernel again, for a launch that has no use for knowing it.
    """
    return (code - 3) >> 2


@triton.jit
def _axis(codes):
    return Axis(
        _number(codes[0]),
        _number(codes[1]),
        _number(codes[2]),
        _number(codes[3]),
        _number(codes[4]),
        _number(codes[5]),
        _number(codes[6]),
        _number(codes[7]),
        _number(codes[8]),
        _number(codes[9]),
        _number(codes[10]),
        _number(codes[11]),
        _number(codes[12]),
        _number(codes[13]),
        _number(codes[14]),
        _number(codes[15]),
        _number(codes[16]),
        _number(codes[17]),
        _number(codes[18]),
        _number(codes[19]),
        _number(codes[20]),
        _number(codes[21]),
    )


@triton.jit
def _power_above(total):
    """The power of two above `total`, with room for the rounding of its terms; 1 for 0 and infinity."""
    exponent = (total * 1.001953125).to(tl.int32, bitcast=True) >> 23
    power = tl.where((exponent > 0) & (exponent <= 250), exponent + 1, 127)
    return (power << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scale(basis, norms, norm_rows, taps, rank, r, BS: tl.constexpr):
    """What function `r` of the first product's factor is divided by: see `backends.scaling`.

    phi_r by its sum of magnitudes over the taps; without phi, A_r by the largest of `norms` [rows, R].
    """
    i = tl.arange(0, BS)
    total = tl.zeros((BS,), dtype=tl.float32)
    if basis is not None:
        for start in range(0, taps, BS):
            at = start + i
            total += tl.abs(tl.load(basis + r * taps + at, mask=at < taps, other=0.0).to(tl.float32))
        result = tl.sum(total, axis=0)
    else:
        for start in range(0, norm_rows, BS):
            at = start + i
            row = tl.load(norms + at * rank + r, mask=at < norm_rows, other=0.0)
            total = tl.maximum(total, row)
        result = tl.max(total, axis=0)
    return _power_above(result)


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
def _write_band(
    basis,
    bands,
    scales,
    axes,
    pid,
    rank,
    patch_size,
    TP: tl.constexpr,
    BB: tl.constexpr,
    BS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """bands[band, r, t, l] = phi_r(tap at (l, t)): one [TP, BB] block; without phi its zeros alone."""
    chunks = patch_size // BB
    l = (pid % chunks) * BB + tl.arange(0, BB)
    r = (pid // chunks) % rank
    band = pid // (chunks * rank)
    t = tl.arange(0, TP)
    w = _tap(
        axes[2],
        band % axes[2].bands,
        (l % axes[2].patch)[None, :],
        (t % axes[2].tile)[:, None],
    )
    l_outer = l // axes[2].patch
    t_outer = t // axes[2].tile
    band_outer = band // axes[2].bands
    h = _tap(
        axes[1],
        band_outer % axes[1].bands,
        (l_outer % axes[1].patch)[None, :],
        (t_outer % axes[1].tile)[:, None],
    )
    d = _tap(
        axes[0],
        band_outer // axes[1].bands,
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
        if SCALED:
            scale = _scale(basis, None, 0, taps, rank, r, BS)
            value = value.to(tl.float32) * (1.0 / scale)
            if scales is not None:  # noqa: SIM102
                if pid % chunks + band == 0:
                    tl.store(scales + r, scale)
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
    linear_output: tl.constexpr,
    windowed: tl.constexpr,
    TP: tl.constexpr,
    BW: tl.constexpr,
    BK: tl.constexpr,
):
    """phi of the MLP at BK taps: into `computed` [R, K], and into the bands where they meet the taps."""
    taps = axes[0].kernel * axes[1].kernel * axes[2].kernel
    k = pid * BK + tl.arange(0, BK)
    n = tl.arange(0, BW)
    features: tl.constexpr = widths[len(widths) - 1]
    phi = evaluate(mlp, k, taps, widths, activation, linear_output, windowed, BW)  # [BK, BW]
    present = (k < taps)[:, None] & (n < features)[None, :]
    constant = k < tl.where(rank > features, taps, 0)
    tl.store(computed + n[None, :] * taps + k[:, None], phi, mask=present)
    ones = tl.full((BK,), 1.0, dtype=tl.float32)
    tl.store(computed + features * taps + k, ones, mask=constant)
    phi = phi.to(bands.dtype.element_ty)
    ones = ones.to(bands.dtype.element_ty)
    k_outer = k // axes[2].kernel
    for band in range(axes[0].bands * axes[1].bands * axes[2].bands):
        band_outer = band // axes[2].bands
        w = _position(axes[2], band % axes[2].bands, k % axes[2].kernel)
        h = _position(axes[1], band_outer % axes[1].bands, k_outer % axes[1].kernel)
        d = _position(axes[0], band_outer // axes[1].bands, k_outer // axes[1].kernel)
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
    tl.store(rows + 5, axis.step * axis.jump * axis.tile)
    tl.store(rows + 6, axis.kernel)
    tl.store(rows + 7, axis.stride)
    tl.store(rows + 8, axis.patch)


@triton.jit
def _place(axis, l):
    """How far patch position `l` of one axis is from the tile's first input."""
    return axis.step * (l // axis.stride * axis.jump + l % axis.stride)


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
    band = (phase_d % axes[0].bands) * axes[1].bands + phase_h % axes[1].bands
    band = band * axes[2].bands + phase_w % axes[2].bands
    tl.store(origins + i * 4, _origin(axes[0], phase_d), mask=i < phases)
    tl.store(origins + i * 4 + 1, _origin(axes[1], phase_h), mask=i < phases)
    tl.store(origins + i * 4 + 2, _origin(axes[2], phase_w), mask=i < phases)
    tl.store(origins + i * 4 + 3, band, mask=i < phases)

    within = i < axes[0].patch * axes[1].patch * axes[2].patch
    outside = 1 << 30  # beyond any axis, and added to any coordinate still below 2**31
    i_outer = i // axes[2].patch
    w = tl.where(within, _place(axes[2], i % axes[2].patch), outside)
    h = tl.where(within, _place(axes[1], i_outer % axes[1].patch), outside)
    d = tl.where(within, _place(axes[0], i_outer // axes[1].patch), outside)
    tl.store(table + i, d, mask=i < patch_size)
    tl.store(table + patch_size + i, h, mask=i < patch_size)
    tl.store(table + 2 * patch_size + i, w, mask=i < patch_size)


@triton.jit
def _write_coefficients(
    basis,
    norms,
    scales,
    coefficients,
    packed,
    taps,
    norm_rows,
    source,
    pid,
    sizes,
    rank,
    BP: tl.constexpr,
    BS: tl.constexpr,
    SCALED: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """packed[group, r, in, out], or [group, in, out, r] if DIRECT; zero for r >= rank.

    `source` holds the coefficients' strides (group, r, in, out); `sizes` is (in, out) channels per group
    and the number of r to write.
    """
    first = pid
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
    read += group * source[0] + r.to(tl.int64) * source[1]
    value = tl.load(coefficients + read, mask=present, other=0.0)
    if SCALED:
        scale = _scale(basis, norms, norm_rows, taps, rank, r, BS)
        value = value.to(tl.float32)
        value *= 1.0 / scale if basis is None else scale
        if scales is not None:  # noqa: SIM102
            if first == r * blocks_in * blocks_out:
                tl.store(scales + r, scale)
    plane = i.to(tl.int64)[:, None] * sizes[1] + o[None, :]
    if DIRECT:
        write = (group * sizes[0] * sizes[1] + plane) * sizes[2] + r
    else:
        write = (group * sizes[2] + r) * sizes[0] * sizes[1] + plane
    tl.store(packed + write, value.to(packed.dtype.element_ty), mask=valid)


@triton.jit(
    do_not_specialize=[
        "tap_programs",
        "band_programs",
        "row_programs",
        "norm_rows",
        "rank",
        "patch_size",
    ]
)
def prepare_kernel(
    basis,  # [R, K]; None if an MLP computes it
    mlp,  # as of `mlp_kernel`, or None
    computed,  # [R, K] or None
    norms,  # float32 [rows, R]: what SCALED coefficients without a basis are scaled by; or None
    scales,  # float32 [R], written: what sums of SCALED factors are to be multiplied by; or None
    bands,  # [bands, R, TP, patch_size] or None
    rows,  # int32 [HEADER + 4 * phases]
    table,  # int32 [3, patch_size]
    coefficients,  # any strides, or None
    packed,  # coefficients in the kernel's order, or None
    axes,  # three times the fields of `lattice.Axis`, as codes of `_number`
    tap_programs,
    band_programs,
    row_programs,
    norm_rows,
    rank,
    patch_size,
    source,  # codes of the coefficients' strides (group, r, in, out)
    sizes,  # codes of (in, out) channels per group and the r to write
    widths: tl.constexpr,
    activation: tl.constexpr,
    linear_output: tl.constexpr,
    windowed: tl.constexpr,
    TP: tl.constexpr,
    BB: tl.constexpr,
    BL: tl.constexpr,
    BP: tl.constexpr,
    BW: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
    SCALED: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """`tap_programs` evaluate the MLP, the next write bands, the next the row map, the rest pack."""
    pid = tl.program_id(0)
    axes = _axis(axes[0]), _axis(axes[1]), _axis(axes[2])
    if pid < tap_programs:
        if mlp is not None:
            _write_taps(
                mlp,
                computed,
                bands,
                axes,
                pid,
                rank,
                patch_size,
                widths,
                activation,
                linear_output,
                windowed,
                TP,
                BW,
                BK,
            )
    elif pid < tap_programs + band_programs:
        if bands is not None:
            _write_band(
                basis, bands, scales, axes, pid - tap_programs, rank, patch_size, TP, BB, BS, SCALED
            )
    elif pid < tap_programs + band_programs + row_programs:
        _write_rows(rows, table, axes, pid - tap_programs - band_programs, patch_size, BL)
    elif packed is not None:
        first = tap_programs + band_programs + row_programs
        taps = axes[0].kernel * axes[1].kernel * axes[2].kernel
        strides = _number(source[0]), _number(source[1]), _number(source[2]), _number(source[3])
        shape = _number(sizes[0]), _number(sizes[1]), _number(sizes[2])
        _write_coefficients(
            basis,
            norms,
            scales,
            coefficients,
            packed,
            taps,
            norm_rows,
            strides,
            pid - first,
            shape,
            rank,
            BP,
            BS,
            SCALED,
            DIRECT,
        )
