"""The position statistics on a GPU. `reference.py` has the equations.

`base_favored_tokens` is the loss's kernel without its distillation: one pass for the partitions, the bound and the
candidates, a second for the count.

`position_divergence` takes one program per row and two sweeps, the least there is: the count and the Jensen-Shannon
divergence need both partitions. The first sums exp a, exp b and both times b - a, from the row's first entries, and
keeps the largest per lane of both models; a row whose sums are not finite is read again with true maxima. The second:

    JSD = sum (p_a + p_b) S(u),    u = log p_b - log p_a,    S(u) = [(1 - h) log(1 - h) + (1 + h) log(1 + h)] / 4,

h = tanh(u / 2): even, never negative, and a ratio of polynomials in u^2 (`csrc/cpu/position_divergence.h` says which),
without a logarithm. The largest n of each model are then found in the lanes that may hold them (`row_select.py`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepalign.kernels.completion_loss.triton import (
    MOST_SELECTED,
    Options,
    alignment,
    check_rows,
    from_16_bytes,
    run_rows,
)
from deepalign.kernels.completion_loss.triton_math import exponential
from deepalign.kernels.eager_math import top_k_lowest_index
from deepalign.kernels.launch import ALL_REGISTERS, SHARED_REGISTERS, at_most_registers, launch_of
from deepalign.kernels.row_math import (
    INFINITY,
    LN2,
    LOG2E,
    count_above,
    finite,
    load_tile,
    lower_bound,
    row_pointer,
    row_shift,
    tile_mask,
    whole_offset,
)
from deepalign.kernels.row_select import ENTRY, collect, write_largest

BOUND_ROUNDS = tl.constexpr(8)
CHUNK = tl.constexpr(32)
GATHERED = 1024  # entries that `collect` looks into at once: with more, two programs would not share registers


def base_favored_tokens(aligned: Tensor, base: Tensor, top_k: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel of `deepalign::base_favored_tokens`."""
    return favored(aligned, base, top_k, vocab_size, together=True)


def favored(
    aligned: Tensor, base: Tensor, top_k: int, vocab_size: int, together: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, differences, count; `together` as of `completion_loss_`."""
    ones = torch.ones(aligned.shape[0], dtype=torch.float32, device=aligned.device)
    options = Options(top_k, 1.0, 1.0, 0.0, 0.0, 0.0, False, False, False, vocab_size, distill=False)
    *_, count, indices, differences = run_rows(aligned, aligned, base, ones, ones, None, options, None, together)
    return indices, differences, count


def position_divergence(aligned: Tensor, base: Tensor, top_n: int, vocab_size: int) -> tuple[Tensor, ...]:
    """The kernel of `deepalign::position_divergence`."""
    check_rows(vocab_size, aligned=aligned, base=base)
    if not 1 <= top_n <= vocab_size:
        raise RuntimeError(f"deepalign: top_n must be in [1, vocab_size], got {top_n}")
    rows, device = aligned.shape[0], aligned.device
    launch = launch_of("position_divergence", device)
    block = launch.block
    align, lead = alignment([aligned, base], vocab_size)
    tiles = triton.next_power_of_2(-(-(vocab_size + 7) // block))
    lanes = min(block // 2, max(1, GATHERED // (2 * tiles)))
    capacity = triton.next_power_of_2(max(2 * min(top_n, MOST_SELECTED), lanes))
    floats = torch.empty((4, rows), dtype=torch.float32, device=device)
    counts = torch.empty((2, rows), dtype=torch.int64, device=device)
    index = torch.empty((rows, 2 * capacity), dtype=torch.int32, device=device)
    value = torch.empty((rows, capacity), dtype=torch.float32, device=device)
    listed = top_n > MOST_SELECTED
    top = torch.stack([_largest(logits, vocab_size, top_n) for logits in (aligned, base)]) if listed else None
    if top is None:
        top = torch.empty((2, rows, top_n), dtype=torch.int64, device=device)
    if rows:
        divergence_kernel[(rows,)](
            from_16_bytes(aligned, lead), from_16_bytes(base, lead), *floats, *counts, index, value, top[0], top[1],
            aligned.stride(0), base.stride(0), lead, vocab_size, top_n, BLOCK=block, TILES=tiles, LANES=lanes,
            CAPACITY=capacity, LISTED=listed, ALIGN=align, num_warps=launch.warps, enable_fp_fusion=True,
            **at_most_registers(SHARED_REGISTERS if aligned.element_size() == 2 else ALL_REGISTERS),
        )  # fmt: skip
    return (*floats.unbind(), *counts.unbind())


def _largest(logits: Tensor, vocab_size: int, top_n: int) -> Tensor:
    """The indices of the largest logits by torch's sort, -1 where fewer are finite; for a top that no program lists."""
    values = logits[:, :vocab_size].float()
    present = values.isfinite()
    index, here = top_k_lowest_index(torch.where(present, values, 0.0), present, top_n)
    return torch.where(here, index, -1)


@triton.jit
def _eight_shares(u):
    """8 S(u), a ratio of polynomials in u^2: relative error 4e-9 before rounding."""
    w = tl.minimum(u * u, 470.0)
    over = w * 9.65636165e-12 + 2.62048538e-09
    over = w * over + 5.00257045e-07
    over = w * over + 5.06993638e-05
    over = w * over + 0.00287866942
    over = w * over + 0.0820081159
    over = w * over + 0.75
    rest = w * 2.52954645e-12 + -3.96603905e-09
    rest = w * rest + 2.4494766e-06
    rest = w * rest + -0.000714621274
    rest = w * rest + 0.0810108855
    rest = w * rest + 1.5
    x = w * over
    return x / (x * 0.36067376 + rest)


@triton.jit
def _add(a, b, here, sums, offset_a, offset_b, MASKED: tl.constexpr, CAREFUL: tl.constexpr):
    """Sums of e_a = exp(a - offset), e_b, e_a (b - a), e_b (b - a), the largest a and b, the least b - a, per lane."""
    sum_a, sum_b, lift_a, lift_b, top_a, top_b, least = sums
    d = b - a
    e_a, e_b = exponential(a, offset_a, LOG2E, CAREFUL), exponential(b, offset_b, LOG2E, CAREFUL)
    u_a, u_b = e_a * d, e_b * d
    if CAREFUL:  # 0 times a difference beyond fp32 is 0
        u_a, u_b = tl.where(e_a > 0, u_a, 0.0), tl.where(e_b > 0, u_b, 0.0)
    if MASKED:
        e_a, e_b = tl.where(here, e_a, 0.0), tl.where(here, e_b, 0.0)
        u_a, u_b = tl.where(here, u_a, 0.0), tl.where(here, u_b, 0.0)
        a, b, d = tl.where(here, a, -INFINITY), tl.where(here, b, -INFINITY), tl.where(here, d, INFINITY)
    top_a, top_b, least = tl.maximum(top_a, a), tl.maximum(top_b, b), tl.minimum(least, d)
    return sum_a + e_a, sum_b + e_b, lift_a + u_a, lift_b + u_b, top_a, top_b, least


@triton.jit
def _load_pair(
    a_ptr, b_ptr, tile, shift, vocab, BLOCK: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Halves of both models, and which entries are there; CAREFUL: and finite."""
    P: tl.constexpr = BLOCK // 2
    a_low, a_high = load_tile(a_ptr, tile, shift, vocab, BLOCK, MASKED, ALIGN)
    b_low, b_high = load_tile(b_ptr, tile, shift, vocab, BLOCK, MASKED, ALIGN)
    low, high = tl.full([P], True, tl.int1), tl.full([P], True, tl.int1)
    if MASKED:
        low, high = tl.split(tl.reshape(tile_mask(tile, shift, vocab, BLOCK), [P, 2]))
    if CAREFUL:
        low, high = low & finite(a_low) & finite(b_low), high & finite(a_high) & finite(b_high)
    return a_low, b_low, low, a_high, b_high, high


@triton.jit
def _add_tile(
    a_ptr, b_ptr, tile, shift, vocab, sums, offset_a, offset_b, MASKED: tl.constexpr, CAREFUL: tl.constexpr,
    BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Add one tile's two halves to `sums` of (BLOCK / 2,) fp32 lanes each: see `_add`."""
    a_low, b_low, low, a_high, b_high, high = _load_pair(
        a_ptr, b_ptr, tile, shift, vocab, BLOCK, MASKED, CAREFUL, ALIGN
    )
    sums = _add(a_low, b_low, low, sums, offset_a, offset_b, MASKED, CAREFUL)
    return _add(a_high, b_high, high, sums, offset_a, offset_b, MASKED, CAREFUL)


@triton.jit
def _measure(a_ptr, b_ptr, tiles, shift, vocab, BLOCK: tl.constexpr):
    """Maxima of both models over present entries, and whether the row is bad."""
    most_a, most_b = tl.full([BLOCK], -INFINITY, tl.float32), tl.full([BLOCK], -INFINITY, tl.float32)
    present, wrong = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for tile in range(0, tiles):
        exists = tile_mask(tile, shift, vocab, BLOCK)
        at = tile * BLOCK + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + at, mask=exists, other=-INFINITY).to(tl.float32)
        b = tl.load(b_ptr + at, mask=exists, other=-INFINITY).to(tl.float32)
        here = finite(a) & finite(b)
        present += here.to(tl.int32)
        wrong += ((here | ((a == -INFINITY) & (b == -INFINITY))) == False).to(tl.int32)  # noqa: E712
        most_a, most_b = (
            tl.maximum(most_a, tl.where(here, a, -INFINITY)),
            tl.maximum(most_b, tl.where(here, b, -INFINITY)),
        )
    return tl.max(most_a), tl.max(most_b), (tl.sum(present) == 0) | (tl.sum(wrong) > 0)


@triton.jit
def _read_row(a_ptr, b_ptr, tiles, shift, vocab, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """Sweep 1: partitions, divergences, the largest per lane, and the least b - a, which a threshold cannot be below.

    Offsets are in bits; in logits if the row is careful.
    """
    P: tl.constexpr = BLOCK // 2
    zero, lowest = tl.zeros([P], tl.float32), tl.full([P], -INFINITY, tl.float32)
    nothing = (zero, zero, zero, zero, lowest, lowest, tl.full([P], INFINITY, tl.float32))
    offset_a = whole_offset(tl.load(a_ptr + shift).to(tl.float32), LOG2E)
    offset_b = whole_offset(tl.load(b_ptr + shift).to(tl.float32), LOG2E)
    sums = nothing
    first, end = tl.where(shift > 0, 1, 0), (shift + vocab) // BLOCK
    for tile in range(first, end):
        sums = _add_tile(a_ptr, b_ptr, tile, shift, vocab, sums, offset_a, offset_b, False, False, BLOCK, ALIGN)
    for edge in range(0, 2):
        tile = edge * (tiles - 1)
        if _is_edge(edge, tiles, shift, vocab, BLOCK):
            sums = _add_tile(a_ptr, b_ptr, tile, shift, vocab, sums, offset_a, offset_b, True, False, BLOCK, ALIGN)
    sum_a, sum_b, lift_a, lift_b, top_a, top_b, least = sums
    z_a, z_b, l_a, l_b = tl.sum(sum_a), tl.sum(sum_b), tl.sum(lift_a), tl.sum(lift_b)
    careful, bad = tl.full((), False, tl.int1), tl.full((), False, tl.int1)
    if not (
        finite(z_a) & finite(z_b) & finite(l_a) & finite(l_b) & finite(offset_a + offset_b) & (z_a > 0) & (z_b > 0)
    ):
        careful = careful | True
        offset_a, offset_b, bad = _measure(a_ptr, b_ptr, tiles, shift, vocab, BLOCK)
        sums = nothing
        for tile in range(0, tiles):
            sums = _add_tile(a_ptr, b_ptr, tile, shift, vocab, sums, offset_a, offset_b, True, True, BLOCK, ALIGN)
        sum_a, sum_b, lift_a, lift_b, top_a, top_b, least = sums
        z_a, z_b, l_a, l_b = tl.sum(sum_a), tl.sum(sum_b), tl.sum(lift_a), tl.sum(lift_b)
    return bad, careful, offset_a, offset_b, z_a, z_b, l_a, l_b, top_a, top_b, tl.min(least)


@triton.jit
def _is_edge(edge, tiles, shift, vocab, BLOCK: tl.constexpr):
    """Whether the first (edge 0) or the last tile (edge 1) needs a mask, and is not both."""
    return tl.where(edge == 0, shift > 0, ((shift + vocab) % BLOCK > 0) & ((tiles > 1) | (shift == 0)))


@triton.jit
def _compare(a, b, here, twice, count, threshold, unit, part_a, part_b, MASKED: tl.constexpr):
    """8 JSD and the count, per lane."""
    d = b - a
    p = tl.exp2((a * unit - part_a[0]) * part_a[2] - part_a[1])
    q = tl.exp2((b * unit - part_b[0]) * part_b[2] - part_b[1])
    share = (p + q) * _eight_shares(d - threshold)
    if MASKED:
        share = tl.where(here, share, 0.0)
        count += (here & (d > threshold)).to(tl.int32)
    else:
        count = count_above(d, threshold, count, MASKED)
    return twice + share, count


@triton.jit
def _compare_tile(
    a_ptr, b_ptr, tile, shift, vocab, shares, count, threshold, unit, part_a, part_b, MASKED: tl.constexpr,
    BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Add one tile's two halves to `shares` and `count`, (BLOCK / 2,) each: see `_compare`."""
    a_low, b_low, low, a_high, b_high, high = _load_pair(a_ptr, b_ptr, tile, shift, vocab, BLOCK, MASKED, MASKED, ALIGN)
    shares, count = _compare(a_low, b_low, low, shares, count, threshold, unit, part_a, part_b, MASKED)
    return _compare(a_high, b_high, high, shares, count, threshold, unit, part_a, part_b, MASKED)


@triton.jit
def _compare_row(
    a_ptr, b_ptr, tiles, shift, vocab, careful, threshold, part_a, part_b, BLOCK: tl.constexpr, ALIGN: tl.constexpr
):
    """Sweep 2: the Jensen-Shannon divergence and the count."""
    P: tl.constexpr = BLOCK // 2
    unit = tl.where(careful, 1.0, LOG2E)
    shares, count = tl.zeros([P], tl.float32), tl.zeros([P], tl.int32)
    first, end = tl.where(shift > 0, 1, 0), (shift + vocab) // BLOCK
    end = tl.where(careful, first, end)
    for tile in range(first, end):
        shares, count = _compare_tile(
            a_ptr, b_ptr, tile, shift, vocab, shares, count, threshold, unit, part_a, part_b, False, BLOCK, ALIGN
        )
    for tile in range(0, tiles):
        whole = (tile >= first) & (tile < end)
        if whole == False:  # noqa: E712
            shares, count = _compare_tile(
                a_ptr, b_ptr, tile, shift, vocab, shares, count, threshold, unit, part_a, part_b, True, BLOCK, ALIGN
            )
    return 0.125 * tl.sum(shares), tl.sum(count)


@triton.jit
def _top(
    r_ptr, other_ptr, index_ptr, value_ptr, out_ptr, maxima, n, tiles, vocab, shift, BLOCK: tl.constexpr,
    TILES: tl.constexpr, LANES: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Write the indices of a model's n largest entries, descending."""
    bound = lower_bound(maxima, n, BOUND_ROUNDS)
    found = collect(
        r_ptr, other_ptr, r_ptr, index_ptr + CAPACITY, index_ptr, value_ptr, maxima, bound, n, 0, tiles, vocab,
        shift, 0.0, 0.0, ENTRY, 1, BLOCK, TILES, LANES, CAPACITY, CAPACITY,
    )  # fmt: skip
    tl.debug_barrier()
    write_largest(r_ptr + shift, index_ptr, found, n, out_ptr)
    tl.debug_barrier()


@triton.jit
def _shared(a_top_ptr, b_top_ptr, a_ptr, b_ptr, threshold, n):
    """How many entries two tops have, the first has in common with the second, and are base-favored in the first."""
    at = tl.arange(0, CHUNK)
    size, common, favored_count = tl.zeros([CHUNK], tl.int32), tl.zeros([CHUNK], tl.int32), tl.zeros([CHUNK], tl.int32)
    for first in range(0, n, CHUNK):
        index = tl.load(a_top_ptr + first + at, mask=first + at < n, other=-1)
        here = index >= 0
        size += here.to(tl.int32)
        a = tl.load(a_ptr + index, mask=here, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + index, mask=here, other=-INFINITY).to(tl.float32)
        favored_count += (here & (b - a > threshold)).to(tl.int32)
        for other in range(0, n, CHUNK):
            index_2 = tl.load(b_top_ptr + other + at, mask=other + at < n, other=-1)
            same = (index[:, None] == index_2[None, :]) & (index[:, None] >= 0)
            common += tl.sum(same.to(tl.int32), 1)
    return tl.sum(size), tl.sum(common), tl.sum(favored_count)


# Of what has entries per row, the place in memory changes with their number: to compile for it would be once more.
PER_ROW = ["kl_ptr", "reverse_ptr", "jsd_ptr", "overlap_ptr", "count_ptr", "in_top_ptr", "a_top_ptr", "b_top_ptr"]


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=PER_ROW)
def divergence_kernel(
    a_ptr, b_ptr, kl_ptr, reverse_ptr, jsd_ptr, overlap_ptr, count_ptr, in_top_ptr, index_ptr, value_ptr, a_top_ptr,
    b_top_ptr, stride_a, stride_b, lead, vocab, n, BLOCK: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr,
    CAPACITY: tl.constexpr, LISTED: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One program per row: every statistic, fp32 or int64. LISTED: both tops, (n,) indices, are given, not found."""
    row = tl.program_id(0).to(tl.int64)
    shift = row_shift(row, stride_a, lead, ALIGN)
    a_ptr, b_ptr = row_pointer(a_ptr, row, stride_a, lead, ALIGN), row_pointer(b_ptr, row, stride_b, lead, ALIGN)
    index_ptr += row * 2 * CAPACITY
    value_ptr += row * CAPACITY
    a_top_ptr += row * n
    b_top_ptr += row * n
    tiles = (shift + vocab + BLOCK - 1) // BLOCK
    bad, careful, offset_a, offset_b, z_a, z_b, lift_a, lift_b, top_a, top_b, least = _read_row(
        a_ptr, b_ptr, tiles, shift, vocab, BLOCK, ALIGN
    )
    nan = float("nan")
    kl, reverse, jsd, overlap = nan, nan, nan, nan
    total, in_top = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    if bad == False:  # noqa: E712
        scale = tl.where(careful, LOG2E, 1.0)  # bits of an offset's unit
        part_a, part_b = (offset_a, tl.log2(z_a), scale), (offset_b, tl.log2(z_b), scale)
        threshold = ((offset_b - offset_a) * scale + (part_b[1] - part_a[1])) * LN2
        kl = tl.maximum(threshold - lift_a / z_a, 0.0)
        reverse = tl.maximum(lift_b / z_b - threshold, 0.0)
        # A mean of the differences: where rounding says less than the least of them, all would count.
        threshold = tl.maximum(threshold, least)
        jsd, total = _compare_row(a_ptr, b_ptr, tiles, shift, vocab, careful, threshold, part_a, part_b, BLOCK, ALIGN)
        if not LISTED:
            _top(
                a_ptr, b_ptr, index_ptr, value_ptr, a_top_ptr, top_a, n, tiles, vocab, shift, BLOCK, TILES, LANES,
                CAPACITY,
            )  # fmt: skip
            _top(
                b_ptr, a_ptr, index_ptr, value_ptr, b_top_ptr, top_b, n, tiles, vocab, shift, BLOCK, TILES, LANES,
                CAPACITY,
            )  # fmt: skip
        size, common, in_top = _shared(a_top_ptr, b_top_ptr, a_ptr + shift, b_ptr + shift, threshold, n)
        overlap = tl.div_rn(common.to(tl.float32), size.to(tl.float32))  # `/` may say 0.99999994
    tl.store(kl_ptr + row, kl)
    tl.store(reverse_ptr + row, reverse)
    tl.store(jsd_ptr + row, jsd)
    tl.store(overlap_ptr + row, overlap)
    tl.store(count_ptr + row, total.to(tl.int64))
    tl.store(in_top_ptr + row, in_top.to(tl.int64))
