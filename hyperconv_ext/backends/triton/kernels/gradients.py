"""`basis_conv_bwd_coeff` and `basis_conv_bwd_basis`: z and u are made again, in registers, not saved.

Both are sums over all outputs. The outputs are dealt to `splits` programs in fixed shares; each
program's sum goes to its own slice of `partial`, to be added up in a fixed order, or (coefficients
only, ATOMIC) straight into the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import load_axes, output_pointers, patch_pointers, unit_origins


@triton.jit(
    do_not_specialize=[
        "phases",
        "units",
        "unit_blocks",
        "in_blocks",
        "out_blocks",
        "rank",
        "splits",
    ]
)
def coefficients_kernel(
    g,  # [B, C_out, D', H', W'], any strides
    x,  # [B, C_in, D, H, W], any strides
    bands,  # [bands, R, TP, patch_size]
    scales,  # float32 [R] that the sums are multiplied by, or None
    partial,  # float32 [splits, C_out, C_in/groups, R], or [C_out, C_in/groups, R] if ATOMIC
    rows,
    table,
    strides_g,
    stride_gc,
    strides_x,
    stride_xc,
    phases,
    units,
    unit_blocks,
    in_blocks,
    out_blocks,
    rank,
    splits,
    size_i,
    size_o,
    patch_size,
    TP: tl.constexpr,
    U: tl.constexpr,
    BC: tl.constexpr,
    BO: tl.constexpr,
    BP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """dA[o, i, r] = sum_p g[o, p] z[i, r, p] for one r and one block of (o, i)."""
    axes = load_axes(rows)
    pid = tl.program_id(0)
    r = pid % rank
    pid = pid // rank
    block_i = pid % in_blocks
    pid = pid // in_blocks
    block_o = pid % out_blocks
    pid = pid // out_blocks
    split = pid % splits
    group = pid // splits

    l = tl.arange(0, BP)
    t = tl.arange(0, TP)
    i = block_i * BC + tl.arange(0, BC)
    o = block_o * BO + tl.arange(0, BO)
    x += (group.to(tl.int64) * size_i + i.to(tl.int64))[None, None, :] * stride_xc
    g += (group.to(tl.int64) * size_o + o.to(tl.int64))[None, :] * stride_gc
    bands += r * TP * patch_size + t[:, None] * patch_size

    acc = tl.zeros((BO, BC), dtype=tl.float32)
    work = phases * unit_blocks
    share = tl.cdiv(work, splits)
    for item in range(split * share, tl.minimum((split + 1) * share, work)):
        phase = item // unit_blocks
        block_u = item % unit_blocks
        u = block_u * U + tl.arange(0, U)
        q_d, q_h, q_w, base = unit_origins(strides_x, axes, rows, phase, units, u)
        z = tl.zeros((U, TP, BC), dtype=tl.float32)
        for start in tl.range(0, patch_size, BP, num_stages=STAGES):
            offsets, inside = patch_pointers(
                0, strides_x, axes, q_d, q_h, q_w, base, table, patch_size, start + l
            )
            patch = tl.load(  # [U, BP, BC]
                x + offsets[:, :, None],
                mask=inside[:, :, None] & (i < size_i)[None, None, :],
                other=0.0,
            )
            weight = tl.load(bands + (start + l)[None, :])  # [TP, BP]
            z = tl.dot(
                tl.broadcast_to(weight[None, :, :], (U, TP, BP)),
                patch,
                z,
                input_precision=PRECISION,
            )
        m = block_u * U * TP + tl.arange(0, U * TP)
        offsets, inside = output_pointers(0, strides_g, axes, phase, units, m, TP)
        grad = tl.load(  # [U*TP, BO]
            g + offsets[:, None], mask=inside[:, None] & (o < size_o)[None, :], other=0.0
        )
        z = tl.reshape(z.to(x.dtype.element_ty), (U * TP, BC))
        acc = tl.dot(tl.trans(grad), z, acc, input_precision=PRECISION)

    if scales is not None:
        acc = acc * tl.load(scales + r)
    channel = group.to(tl.int64) * size_o + o.to(tl.int64)
    address = (channel[:, None] * size_i + i[None, :]) * rank + r
    valid = (o < size_o)[:, None] & (i < size_i)[None, :]
    if ATOMIC:
        tl.atomic_add(partial + address, acc, mask=valid, sem="relaxed")
    else:
        groups = tl.num_programs(0) // (rank * in_blocks * out_blocks * splits)
        slice_size = groups.to(tl.int64) * size_o * size_i * rank
        tl.store(partial + split * slice_size + address, acc, mask=valid)


@triton.jit(
    do_not_specialize=[
        "phases",
        "units",
        "unit_blocks",
        "in_blocks",
        "rank",
        "splits",
    ]
)
def basis_gradient_kernel(
    g,  # [B, C_out, D', H', W'], any strides
    x,  # [B, C_in, D, H, W], any strides
    packed,  # [groups, R, C_out/groups, C_in/groups]
    scales,  # float32 [R] that the sums are multiplied by, or None
    partial,  # float32 [splits, patch chunks, R, K]; [R, K], zeros, if ATOMIC
    rows,
    table,
    strides_g,
    stride_gc,
    strides_x,
    stride_xc,
    phases,
    units,
    unit_blocks,
    in_blocks,
    rank,
    splits,
    size_i,
    size_o,
    patch_size,
    groups,
    TP: tl.constexpr,
    U: tl.constexpr,
    BC: tl.constexpr,
    BO: tl.constexpr,
    BP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """dphi_r(k): the gradient of the banded matrix, summed along its diagonals at the end.

    For one r and one piece [BP] of the patch:  d band[t, l] = sum over units and channels of
    u[t, i] x[i, l],  u = sum_o A[o, i, r] g[o, t].
    """
    axes = load_axes(rows)
    pid = tl.program_id(0)
    chunks = patch_size // BP
    chunk = pid % chunks
    pid = pid // chunks
    r = pid % rank
    split = pid // rank

    l = chunk * BP + tl.arange(0, BP)
    c = tl.arange(0, BC)
    o = tl.arange(0, BO)

    acc = tl.zeros((U, TP, BP), dtype=tl.float32)
    work = phases * unit_blocks * in_blocks * groups
    share = tl.cdiv(work, splits)
    for item in range(split * share, tl.minimum((split + 1) * share, work)):
        i = (item % in_blocks) * BC + c
        rest = item // in_blocks
        block_u = rest % unit_blocks
        rest = rest // unit_blocks
        phase = rest % phases
        group = (rest // phases).to(tl.int64)
        m = block_u * U * TP + tl.arange(0, U * TP)
        outputs, inside = output_pointers(g, strides_g, axes, phase, units, m, TP)
        weights = packed + (group * rank + r) * size_o * size_i + i[None, :]
        u_tile = tl.zeros((U * TP, BC), dtype=tl.float32)
        for start in tl.range(0, size_o, BO, num_stages=STAGES):
            channel = (group * size_o + start + o.to(tl.int64)) * stride_gc
            grad = tl.load(  # [U*TP, BO]
                outputs[:, None] + channel[None, :],
                mask=inside[:, None] & (start + o < size_o)[None, :],
                other=0.0,
            )
            a = tl.load(  # [BO, BC]
                weights + (start + o)[:, None] * size_i,
                mask=(start + o < size_o)[:, None] & (i < size_i)[None, :],
                other=0.0,
            )
            u_tile = tl.dot(grad, a, u_tile, input_precision=PRECISION)
        u = block_u * U + tl.arange(0, U)
        q_d, q_h, q_w, base = unit_origins(strides_x, axes, rows, phase, units, u)
        pointers, inside = patch_pointers(x, strides_x, axes, q_d, q_h, q_w, base, table, patch_size, l)
        channel = (group * size_i + i.to(tl.int64)) * stride_xc
        patch = tl.load(  # [U, BP, BC]
            pointers[:, :, None] + channel[None, None, :],
            mask=inside[:, :, None] & (i < size_i)[None, None, :],
            other=0.0,
        )
        u_tile = tl.reshape(u_tile.to(x.dtype.element_ty), (U, TP, BC))
        # [U, TP, BC] @ [U, BC, BP] -> [U, TP, BP]
        acc = tl.dot(u_tile, tl.permute(patch, (0, 2, 1)), acc, input_precision=PRECISION)

    band = tl.sum(acc, axis=0)  # [TP, BP]
    if scales is not None:
        band = band * tl.load(scales + r)
    t = tl.arange(0, TP)
    taps = axes[0].kernel * axes[1].kernel * axes[2].kernel
    t_w = t % axes[2].tile
    t_h = (t // axes[2].tile) % axes[1].tile
    t_d = t // (axes[2].tile * axes[1].tile)
    if ATOMIC:
        partial += r * taps
    else:
        partial += ((split * chunks + chunk).to(tl.int64) * rank + r) * taps
    for first in range(0, taps, BP):
        k = first + tl.arange(0, BP)
        k_w = k % axes[2].kernel
        k_h = (k // axes[2].kernel) % axes[1].kernel
        k_d = k // (axes[2].kernel * axes[1].kernel)
        l_w = axes[2].stride * t_w[:, None] + k_w[None, :]
        l_h = axes[1].stride * t_h[:, None] + k_h[None, :]
        l_d = axes[0].stride * t_d[:, None] + k_d[None, :]
        at = (l_d * axes[1].patch + l_h) * axes[2].patch + l_w - chunk * BP
        here = (at >= 0) & (at < BP)
        diagonal = tl.gather(band, tl.where(here, at, 0), 1)  # [TP, BP] indexed by (t, k)
        gradient = tl.sum(tl.where(here, diagonal, 0.0), axis=0)
        if ATOMIC:
            tl.atomic_add(partial + k, gradient, mask=k < taps, sem="relaxed")
        else:
            tl.store(partial + k, gradient, mask=k < taps)
