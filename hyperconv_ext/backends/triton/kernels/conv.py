"""`basis_conv_fwd` and `basis_conv_bwd_input`: one kernel for both per algorithm."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import load_axes, output_pointers, patch_pointers, phase_band, unit_origins


@triton.jit
def _split_program(out_blocks, unit_blocks, phases):
    """This program's (output-channel block, unit block, phase, group), the first fastest."""
    pid = tl.program_id(0)
    rest = pid // out_blocks
    phase = (rest // unit_blocks) % phases
    return pid % out_blocks, rest % unit_blocks, phase, rest // (unit_blocks * phases)


@triton.jit
def _store_tile(
    y, bias, acc, strides, stride_c, axes, phase, units, m, group, o, size_o, TP: tl.constexpr
):
    """Add the bias to acc [M, BO] and store it at outputs `m`, channels `o` of the group."""
    if bias is not None:
        acc += tl.load(bias + group * size_o + o, mask=o < size_o, other=0.0).to(tl.float32)[None, :]
    pointers, inside = output_pointers(y, strides, axes, phase, units, m, TP)
    channel = (group.to(tl.int64) * size_o + o) * stride_c
    tl.store(
        pointers[:, None] + channel[None, :],
        acc.to(y.dtype.element_ty),
        mask=inside[:, None] & (o < size_o)[None, :],
    )


@triton.jit(do_not_specialize=["phases", "units", "unit_blocks", "out_blocks", "rank"])
def basis_kernel(
    x,  # [B, C_in, D, H, W], any strides
    bands,  # [bands, R, TP, patch_size]
    packed,  # [groups, R, C_in/groups, C_out/groups]
    bias,  # [C_out] or None
    y,  # [B, C_out, D', H', W'], any strides
    rows,
    table,
    strides_x,  # (batch, depth, height, width)
    stride_xc,
    strides_y,
    stride_yc,
    phases,
    units,
    unit_blocks,
    out_blocks,
    rank,
    size_i,  # C_in/groups
    size_o,  # C_out/groups
    patch_size,
    TP: tl.constexpr,
    U: tl.constexpr,
    BC: tl.constexpr,
    BO: tl.constexpr,
    BP: tl.constexpr,
    RESIDENT: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = A z with z = phi * x formed tile by tile in registers.

    Each of U units contributes TP outputs. For one basis function the banded matrix [TP, patch] times
    the unit's patch [patch, BC] is z [TP, BC]; its accumulators are, register by register, the left
    operand of the second product with A_r [BC, BO]. RESIDENT keeps the whole patch for all R
    functions; otherwise it streams through in pieces of BP for each.
    """
    axes = load_axes(rows)
    block_o, block_u, phase, group = _split_program(out_blocks, unit_blocks, phases)

    u = block_u * U + tl.arange(0, U)
    l = tl.arange(0, BP)
    t = tl.arange(0, TP)
    c = tl.arange(0, BC)
    o = block_o * BO + tl.arange(0, BO)
    x += group.to(tl.int64) * size_i * stride_xc
    band = phase_band(rows, phase)
    bands += band.to(tl.int64) * rank * TP * patch_size
    packed += group.to(tl.int64) * rank * size_i * size_o
    band_tile = t[:, None] * patch_size + l[None, :]  # [TP, BP]
    packed_tile = c[:, None] * size_o + o[None, :]  # [BC, BO]

    q_d, q_h, q_w, base = unit_origins(strides_x, axes, rows, phase, units, u)
    if RESIDENT:
        pointers, inside = patch_pointers(x, strides_x, axes, q_d, q_h, q_w, base, table, patch_size, l)
    acc = tl.zeros((U * TP, BO), dtype=tl.float32)
    for i in range(0, size_i, BC):
        channel = (i + c).to(tl.int64) * stride_xc
        valid = (i + c < size_i)[None, None, :]
        if RESIDENT:
            patch = tl.load(  # [U, BP, BC]
                pointers[:, :, None] + channel[None, None, :],
                mask=inside[:, :, None] & valid,
                other=0.0,
            )
        for r in tl.range(0, rank, num_stages=STAGES):
            if RESIDENT:
                weight = tl.load(bands + r * TP * patch_size + band_tile)
                # [U, TP, BP] @ [U, BP, BC] -> [U, TP, BC]
                z = tl.dot(
                    tl.broadcast_to(weight[None, :, :], (U, TP, BP)),
                    patch,
                    input_precision=PRECISION,
                )
            else:
                z = tl.zeros((U, TP, BC), dtype=tl.float32)
                for start in tl.range(0, patch_size, BP, num_stages=STAGES):
                    pointers, inside = patch_pointers(
                        x, strides_x, axes, q_d, q_h, q_w, base, table, patch_size, start + l
                    )
                    patch = tl.load(
                        pointers[:, :, None] + channel[None, None, :],
                        mask=inside[:, :, None] & valid,
                        other=0.0,
                    )
                    weight = tl.load(bands + r * TP * patch_size + start + band_tile)
                    z = tl.dot(
                        tl.broadcast_to(weight[None, :, :], (U, TP, BP)),
                        patch,
                        z,
                        input_precision=PRECISION,
                    )
            z = tl.reshape(z.to(x.dtype.element_ty), (U * TP, BC))
            a = tl.load(
                packed + (r * size_i + i) * size_o + packed_tile,
                mask=(i + c < size_i)[:, None] & (o < size_o)[None, :],
                other=0.0,
            )
            acc = tl.dot(z, a, acc, input_precision=PRECISION)  # [U*TP, BC] @ [BC, BO]

    m = block_u * U * TP + tl.arange(0, U * TP)
    _store_tile(y, bias, acc, strides_y, stride_yc, axes, phase, units, m, group, o, size_o, TP)


@triton.jit(do_not_specialize=["phases", "units", "unit_blocks", "out_blocks", "rank", "taps"])
def direct_kernel(
    x,  # [B, C_in, D, H, W], any strides
    bands,  # float32 [bands, R, 1, patch_size]: phi itself, in the phase's order of taps
    packed,  # [groups, C_in/groups, C_out/groups, BR]
    bias,  # [C_out] or None
    y,  # [B, C_out, D', H', W'], any strides
    rows,
    table,
    strides_x,
    stride_xc,
    strides_y,
    stride_yc,
    phases,
    units,
    unit_blocks,
    out_blocks,
    rank,
    size_i,
    size_o,
    patch_size,
    taps,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BO: tl.constexpr,
    BR: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Implicit GEMM over (channels, taps) whose weight tile [BC, BO] is made here: sum_r A_r phi_r(k).

    A tile is one output, so a patch position is a tap and a unit an output.
    """
    axes = load_axes(rows)
    block_o, block_m, phase, group = _split_program(out_blocks, unit_blocks, phases)

    m = block_m * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    o = block_o * BO + tl.arange(0, BO)
    r = tl.arange(0, BR)
    x += group.to(tl.int64) * size_i * stride_xc
    bands += phase_band(rows, phase).to(tl.int64) * rank * patch_size
    packed += group.to(tl.int64) * size_i * size_o * BR
    packed_tile = (c[:, None] * size_o + o[None, :])[:, :, None] * BR + r[None, None, :]

    q_d, q_h, q_w, base = unit_origins(strides_x, axes, rows, phase, units, m)
    acc = tl.zeros((BM, BO), dtype=tl.float32)
    for step in tl.range(0, tl.cdiv(size_i, BC) * taps, num_stages=STAGES):
        i = (step // taps) * BC
        tap = step % taps
        pointers, inside = patch_pointers(
            x, strides_x, axes, q_d, q_h, q_w, base, table, patch_size, tap + tl.arange(0, 1)
        )
        channel = (i + c).to(tl.int64) * stride_xc
        inputs = tl.load(  # [BM, BC]
            pointers + channel[None, :], mask=inside & (i + c < size_i)[None, :], other=0.0
        )
        phi = tl.load(bands + r * patch_size + tap, mask=r < rank, other=0.0)
        a = tl.load(  # [BC, BO, BR]
            packed + i * size_o * BR + packed_tile,
            mask=((i + c < size_i)[:, None] & (o < size_o)[None, :])[:, :, None],
            other=0.0,
        )
        weight = tl.sum(a.to(tl.float32) * phi[None, None, :], axis=2)
        acc = tl.dot(
            inputs, weight.to(x.dtype.element_ty), acc, input_precision=PRECISION
        )  # [BM, BC] @ [BC, BO]

    _store_tile(y, bias, acc, strides_y, stride_yc, axes, phase, units, m, group, o, size_o, 1)
