"""The kernel that reads rows: statistics and candidates, then count and gradient. `triton.py` has the essay."""

import triton
import triton.language as tl

from deepalign.kernels.completion_loss.triton_math import (
    BAD,
    BOUND,
    CAREFUL,
    DIVERGENCE,
    FOR_COUNT,
    FOR_GRADIENT,
    LEAST,
    OFFSET_B,
    OFFSET_R,
    OFFSET_S,
    OFFSET_T,
    PRESENT,
    SUM_B,
    SUM_R,
    SUM_S,
    SUM_T,
    TOTAL,
    WORDS,
    accumulate,
    careful_gradient,
    divergence_facts,
    fast_gradient,
    fast_weights,
    favored_threshold,
    measure,
    optimistic_offsets,
    publish,
    read_words,
    row_facts,
)
from deepalign.kernels.row_math import (
    INFINITY,
    count_above,
    finite,
    load_tile,
    lower_bound,
    row_pointer,
    row_shift,
    store_tile,
    tile_mask,
)
from deepalign.kernels.row_select import DIFFERENCE, collect

BOUND_ROUNDS = tl.constexpr(8)


@triton.jit
def _add_tile(
    s_ptr, a_ptr, b_ptr, tile, shift, vocab, sums, offsets, mix, scale, MASKED: tl.constexpr, CAREFUL_: tl.constexpr,
    BLOCK: tl.constexpr, ALIGN: tl.constexpr, DISTILL: tl.constexpr, TEACHER_STUDENT: tl.constexpr,
    FROM_STUDENT: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """Add one tile's two halves to `sums` of (BLOCK / 2,) fp32 lanes each: see `accumulate`."""
    P: tl.constexpr = BLOCK // 2
    s_low, s_high = load_tile(s_ptr, tile, shift, vocab, BLOCK, MASKED, ALIGN)
    a_low, a_high = load_tile(a_ptr, tile, shift, vocab, BLOCK, MASKED, ALIGN)
    b_low, b_high = load_tile(b_ptr, tile, shift, vocab, BLOCK, MASKED, ALIGN)
    low, high = tl.full([P], True, tl.int1), tl.full([P], True, tl.int1)
    if MASKED:
        low, high = tl.split(tl.reshape(tile_mask(tile, shift, vocab, BLOCK), [P, 2]))
    if CAREFUL_:
        low = low & finite(s_low) & finite(a_low) & finite(b_low)
        high = high & finite(s_high) & finite(a_high) & finite(b_high)
    sums = accumulate(
        s_low, a_low, b_low, low, sums, offsets, mix, scale, MASKED, CAREFUL_,
        DISTILL, TEACHER_STUDENT, FROM_STUDENT, CENTERED,
    )  # fmt: skip
    return accumulate(
        s_high, a_high, b_high, high, sums, offsets, mix, scale, MASKED, CAREFUL_,
        DISTILL, TEACHER_STUDENT, FROM_STUDENT, CENTERED,
    )  # fmt: skip


@triton.jit
def _add_share(
    s_ptr, a_ptr, b_ptr, part, tiles, shift, vocab, offsets, mix, scale, CAREFUL_: tl.constexpr,
    S: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, DISTILL: tl.constexpr, TEACHER_STUDENT: tl.constexpr,
    FROM_STUDENT: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """The sums over this program's tiles: the first and the last of the row masked, those between at full width."""
    P: tl.constexpr = BLOCK // 2
    zero = tl.zeros([P], tl.float32)
    sums = (zero, zero, zero, zero, zero, zero, tl.full([P], -INFINITY, tl.float32), tl.full([P], INFINITY, tl.float32))
    if CAREFUL_:
        for tile in range(part, tiles, S):
            sums = _add_tile(
                s_ptr, a_ptr, b_ptr, tile, shift, vocab, sums, offsets, mix, scale, True, True,
                BLOCK, ALIGN, DISTILL, TEACHER_STUDENT, FROM_STUDENT, CENTERED,
            )  # fmt: skip
    else:
        first, last = whole_tiles(part, shift, vocab, S, BLOCK)
        for tile in range(first, last, S):
            sums = _add_tile(
                s_ptr, a_ptr, b_ptr, tile, shift, vocab, sums, offsets, mix, scale, False, False,
                BLOCK, ALIGN, DISTILL, TEACHER_STUDENT, FROM_STUDENT, CENTERED,
            )  # fmt: skip
        for edge in range(0, 2):
            tile = edge * (tiles - 1)
            if is_edge(tile, edge, part, tiles, shift, vocab, S, BLOCK):
                sums = _add_tile(
                    s_ptr, a_ptr, b_ptr, tile, shift, vocab, sums, offsets, mix, scale, True, False,
                    BLOCK, ALIGN, DISTILL, TEACHER_STUDENT, FROM_STUDENT, CENTERED,
                )  # fmt: skip
    return sums


@triton.jit
def whole_tiles(part, shift, vocab, S: tl.constexpr, BLOCK: tl.constexpr):
    """First and end of this program's tiles that need no mask."""
    first = part + tl.where((shift > 0) & (part == 0), S, 0)
    return first, (shift + vocab) // BLOCK


@triton.jit
def is_edge(tile, edge, part, tiles, shift, vocab, S: tl.constexpr, BLOCK: tl.constexpr):
    """Whether the row's first (edge 0) or last tile (edge 1) is this program's, needs a mask, and is not both."""
    cut = tl.where(edge == 0, shift > 0, ((shift + vocab) % BLOCK > 0) & ((tiles > 1) | (shift == 0)))
    return cut & (tile % S == part)


@triton.jit
def entries_of(part, tiles, shift, vocab, S: tl.constexpr, BLOCK: tl.constexpr):
    """How many entries a program's tiles have."""
    whole = tl.maximum((tiles - part + S - 1) // S, 0) * BLOCK
    after = tl.where((tiles - 1) % S == part, tiles * BLOCK - (shift + vocab), 0)
    return whole - tl.where(part == 0, shift, 0) - after


@triton.jit
def _read_share(
    s_ptr, a_ptr, b_ptr, words_ptr, part, tiles, shift, vocab, mix, scale, k,
    S: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, DISTILL: tl.constexpr, TEACHER_STUDENT: tl.constexpr,
    FROM_STUDENT: tl.constexpr, CENTERED: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Pass 1: publish what this share says; return the largest d per lane, and the bound from them alone."""
    words_ptr += part * WORDS
    s0, a0 = tl.load(s_ptr + shift).to(tl.float32), tl.load(a_ptr + shift).to(tl.float32)
    offsets = optimistic_offsets(s0, a0, tl.load(b_ptr + shift).to(tl.float32), mix, scale, FROM_STUDENT)
    sums = _add_share(
        s_ptr, a_ptr, b_ptr, part, tiles, shift, vocab, offsets, mix, scale, False,
        S, BLOCK, ALIGN, DISTILL, TEACHER_STUDENT, FROM_STUDENT, CENTERED,
    )  # fmt: skip
    sum_s, sum_t, sum_r, sum_b, divergence, total, largest, least = sums
    z_s, z_t, z_r, z_b, z_d = tl.sum(sum_s), tl.sum(sum_t), tl.sum(sum_r), tl.sum(sum_b), tl.sum(divergence)
    o_s, o_t, o_r, o_b = offsets
    z_total = tl.sum(total)
    n_present = entries_of(part, tiles, shift, vocab, S, BLOCK)
    n_bad, careful = tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float32)
    sound = finite(z_s) & finite(z_t) & finite(z_r) & finite(z_b) & finite(z_d)
    if not (sound & finite(o_s + o_t + o_r + o_b)):
        careful += 1.0
        nothing, none = tl.full([BLOCK], -INFINITY, tl.float32), tl.zeros([BLOCK], tl.int32)
        found = (nothing, nothing, nothing, nothing, none, none)
        for tile in range(part, tiles, S):
            exists = tile_mask(tile, shift, vocab, BLOCK)
            at = tile * BLOCK + tl.arange(0, BLOCK)
            s = tl.load(s_ptr + at, mask=exists, other=0.0).to(tl.float32)
            a = tl.load(a_ptr + at, mask=exists, other=0.0).to(tl.float32)
            found = measure(
                s, a, tl.load(b_ptr + at, mask=exists, other=0.0).to(tl.float32), exists, found, mix, FROM_STUDENT
            )
        most_s, most_t, most_r, most_b, present, bad = found
        o_s, o_t, o_r, o_b = tl.max(most_s), tl.max(most_t), tl.max(most_r), tl.max(most_b)
        n_present, n_bad = tl.sum(present), tl.sum(bad)
        sums = _add_share(
            s_ptr, a_ptr, b_ptr, part, tiles, shift, vocab, (o_s, o_t, o_r, o_b), mix, scale, True,
            S, BLOCK, ALIGN, DISTILL, TEACHER_STUDENT, FROM_STUDENT, CENTERED,
        )  # fmt: skip
        sum_s, sum_t, sum_r, sum_b, divergence, total, largest, least = sums
        z_s, z_t, z_r, z_b, z_d = tl.sum(sum_s), tl.sum(sum_t), tl.sum(sum_r), tl.sum(sum_b), tl.sum(divergence)
        z_total = tl.sum(total)
    bound = tl.full((), INFINITY, tl.float32) if GIVEN else lower_bound(largest, k, BOUND_ROUNDS)
    publish(words_ptr, OFFSET_R, o_r)
    publish(words_ptr, SUM_R, z_r)
    publish(words_ptr, OFFSET_B, o_b)
    publish(words_ptr, SUM_B, z_b)
    publish(words_ptr, LEAST, tl.min(least))
    publish(words_ptr, BOUND, bound)
    publish(words_ptr, PRESENT, n_present.to(tl.float32))
    publish(words_ptr, BAD, n_bad.to(tl.float32))
    publish(words_ptr, CAREFUL, careful)
    if DISTILL:
        publish(words_ptr, OFFSET_S, o_s)
        publish(words_ptr, SUM_S, z_s)
        publish(words_ptr, OFFSET_T, o_t)
        publish(words_ptr, SUM_T, z_t)
        publish(words_ptr, DIVERGENCE, z_d)
    if CENTERED:
        publish(words_ptr, TOTAL, z_total)
    return largest, bound


@triton.jit
def _emit_tile(
    s_ptr, a_ptr, b_ptr, g_ptr, tile, shift, vocab, threshold, count, weights, mix, scale, raise_by,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, GRADIENT: tl.constexpr,
    TEACHER_STUDENT: tl.constexpr, FROM_STUDENT: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """Count and gradient of a tile of a row all of whose entries are finite."""
    b_low, b_high = load_tile(b_ptr, tile, shift, vocab, BLOCK, MASKED, ALIGN)
    if GRADIENT or not FROM_STUDENT:
        a_low, a_high = load_tile(a_ptr, tile, shift, vocab, BLOCK, MASKED, ALIGN)
    if GRADIENT or FROM_STUDENT:
        s_low, s_high = load_tile(s_ptr, tile, shift, vocab, BLOCK, MASKED, ALIGN)
    if FROM_STUDENT:
        count = count_above(b_low - s_low, threshold, count, MASKED)
        count = count_above(b_high - s_high, threshold, count, MASKED)
    else:
        count = count_above(b_low - a_low, threshold, count, MASKED)
        count = count_above(b_high - a_high, threshold, count, MASKED)
    if GRADIENT:
        low = fast_gradient(s_low, a_low, b_low, weights, mix, scale, TEACHER_STUDENT)
        high = fast_gradient(s_high, a_high, b_high, weights, mix, scale, TEACHER_STUDENT)
        if CENTERED:
            low, high = low + raise_by, high + raise_by
        store_tile(g_ptr, tile, low, high, shift, vocab, BLOCK, MASKED)
    return count


@triton.jit
def _emit_share_carefully(
    s_ptr, a_ptr, b_ptr, g_ptr, part, tiles, shift, vocab, threshold, facts, bad, careful, wd, mix, scale, tau,
    raise_by, S: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr, TEACHER_STUDENT: tl.constexpr,
    FROM_STUDENT: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """Count and gradient where entries are absent, or the row is bad."""
    part_s, part_t, gap, kl = facts
    count = tl.zeros([BLOCK], tl.int32)
    for tile in range(part, tiles, S):
        exists = tile_mask(tile, shift, vocab, BLOCK)
        at = tile * BLOCK + tl.arange(0, BLOCK)
        s = tl.load(s_ptr + at, mask=exists, other=-INFINITY).to(tl.float32)
        a = tl.load(a_ptr + at, mask=exists, other=-INFINITY).to(tl.float32)
        b = tl.load(b_ptr + at, mask=exists, other=-INFINITY).to(tl.float32)
        here = finite(s) & finite(a) & finite(b)
        d = b - s if FROM_STUDENT else b - a
        count += (here & (d > threshold)).to(tl.int32)
        if GRADIENT:
            g = careful_gradient(s, a, b, part_s, part_t, gap, kl, wd, mix, scale, tau, careful, TEACHER_STUDENT)
            if CENTERED:
                g += tl.where(here, raise_by, 0.0)
            g = tl.where(bad, float("nan"), g)
            tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty), mask=exists)
    return tl.sum(count)


@triton.jit
def _emit_share(
    s_ptr, a_ptr, b_ptr, g_ptr, words_ptr, part, tiles, shift, vocab, wd, mix, scale, tau, raise_by,
    S: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, GRADIENT: tl.constexpr, TEACHER_STUDENT: tl.constexpr,
    FROM_STUDENT: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """Pass 2: write the share's gradient without the penalty's part at M; return its count."""
    words = read_words(words_ptr, FOR_GRADIENT if GRADIENT else FOR_COUNT, S, True)
    bad, careful, _ = row_facts(words)
    threshold = favored_threshold(words, careful)
    if GRADIENT:
        facts = divergence_facts(words, careful, scale, tau, TEACHER_STUDENT)
        part_s, part_t, gap, kl = facts
        weights = fast_weights(part_s, part_t, gap, kl, wd, tau, TEACHER_STUDENT)
    else:
        facts = ((threshold, threshold), (threshold, threshold), threshold, threshold)
        weights = (threshold, threshold, threshold, threshold)
    if bad | careful:
        total = _emit_share_carefully(
            s_ptr, a_ptr, b_ptr, g_ptr, part, tiles, shift, vocab, threshold, facts, bad, careful, wd, mix, scale, tau,
            raise_by, S, BLOCK, GRADIENT, TEACHER_STUDENT, FROM_STUDENT, CENTERED,
        )  # fmt: skip
    else:
        count = tl.zeros([BLOCK // 2], tl.int32)
        for edge in range(0, 2):
            tile = edge * (tiles - 1)
            if is_edge(tile, edge, part, tiles, shift, vocab, S, BLOCK):
                count = _emit_tile(
                    s_ptr, a_ptr, b_ptr, g_ptr, tile, shift, vocab, threshold, count, weights, mix, scale, raise_by,
                    True, BLOCK, ALIGN, GRADIENT, TEACHER_STUDENT, FROM_STUDENT, CENTERED,
                )  # fmt: skip
        first, end = whole_tiles(part, shift, vocab, S, BLOCK)
        turns = (end - first + S - 1) // S
        for turn in range(0, turns):
            tile = first + (turns - 1 - turn) * S  # what pass 1 read last is still in the nearest cache
            count = _emit_tile(
                s_ptr, a_ptr, b_ptr, g_ptr, tile, shift, vocab, threshold, count, weights, mix, scale, raise_by,
                False, BLOCK, ALIGN, GRADIENT, TEACHER_STUDENT, FROM_STUDENT, CENTERED,
            )  # fmt: skip
        total = tl.sum(count)
    return total


@triton.jit
def _fill_zero(row_ptr, start, end, part, S: tl.constexpr, BLOCK: tl.constexpr):
    """Write 0 to this program's share of entries [start, end): padding, or all of a row that is not read."""
    for first in range(start + part * BLOCK, end, S * BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(row_ptr + at, tl.zeros([BLOCK], row_ptr.dtype.element_ty), mask=at < end)


@triton.jit
def _gather_given(s_ptr, given_ptr, value_ptr, K, vocab, part, S: tl.constexpr, BLOCK: tl.constexpr):
    """Keep s of the given entries: in place, pass 2 overwrites them."""
    for first in range(part * BLOCK, K, S * BLOCK):
        at = first + tl.arange(0, BLOCK)
        index = tl.load(given_ptr + at, mask=at < K, other=-1)
        exists = (index >= 0) & (index < vocab)
        value = tl.load(s_ptr + index, mask=exists, other=0.0).to(tl.float32)
        tl.store(value_ptr + at, value, mask=at < K)


# Of what has entries per row, the place in memory changes with their number: to compile for it would be once more.
PER_ROW = ["wd_ptr", "wc_ptr", "given_ptr", "raise_ptr"]


@triton.jit(do_not_specialize=["k", "K"], do_not_specialize_on_alignment=PER_ROW)
def rows_kernel(
    s_ptr, a_ptr, b_ptr, g_ptr, wd_ptr, wc_ptr, given_ptr, words_ptr, ticket_ptr, index_ptr, value_ptr, found_ptr,
    count_ptr, raise_ptr, stride_s, stride_a, stride_b, stride_g, lead, vocab, width, k, K, mix, scale, tau,
    FIRST: tl.constexpr, SECOND: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    LANES: tl.constexpr, CAPACITY: tl.constexpr, ALIGN: tl.constexpr, DISTILL: tl.constexpr, GRADIENT: tl.constexpr,
    TEACHER_STUDENT: tl.constexpr, FROM_STUDENT: tl.constexpr, CENTERED: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """One program per row and part: pass 1 (FIRST), pass 2 (SECOND), or both with a wait for the row's other
    programs."""
    if FIRST and SECOND:
        # Programs wait for others of their row, so their numbers must be those in which they start: a number is drawn,
        # not the grid's. All rows but the last one that has begun are then complete, and end.
        ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed").to(tl.int32)
    else:
        ticket = tl.program_id(0)
    row, part = (ticket // S).to(tl.int64), ticket % S
    wd, wc = tl.load(wd_ptr + row), tl.load(wc_ptr + row)
    shift = row_shift(row, stride_s, lead, ALIGN)
    tiles = (shift + vocab + BLOCK - 1) // BLOCK
    s_row = row_pointer(s_ptr, row, stride_s, lead, ALIGN)
    a_row = row_pointer(a_ptr, row, stride_a, lead, ALIGN)
    b_row = row_pointer(b_ptr, row, stride_b, lead, ALIGN)
    g_row = row_pointer(g_ptr, row, stride_g, lead, ALIGN)
    words_ptr += row * S * WORDS
    index_ptr += ticket.to(tl.int64) * CAPACITY
    value_ptr += ticket.to(tl.int64) * CAPACITY
    is_read = (wd > 0) | (wc > 0)
    if is_read:
        r_row = s_row if FROM_STUDENT else a_row
        if FIRST:
            if GIVEN:  # before anything is published: in place, the others overwrite their shares after that
                given_row = value_ptr - part.to(tl.int64) * CAPACITY
                _gather_given(s_row + shift, given_ptr + row * K, given_row, K, vocab, part, S, BLOCK)
            largest, bound = _read_share(
                s_row, a_row, b_row, words_ptr, part, tiles, shift, vocab, mix, scale, k,
                S, BLOCK, ALIGN, DISTILL, TEACHER_STUDENT, FROM_STUDENT, CENTERED, GIVEN,
            )  # fmt: skip
            if not GIVEN:
                if SECOND:
                    bound = tl.min(read_words(words_ptr + BOUND, 1, S, True)[0])
                found = collect(
                    r_row, b_row, s_row, index_ptr, index_ptr, value_ptr, largest, bound, K, part, tiles, vocab, shift,
                    0.0, 0.0, DIFFERENCE, S, BLOCK, TILES, LANES, CAPACITY, LANES,
                )  # fmt: skip
                tl.store(found_ptr + ticket, found)
        if SECOND:
            tl.debug_barrier()  # in place, what candidates were read from is overwritten now
            raise_by = tl.load(raise_ptr + row) if CENTERED and GRADIENT else 0.0
            count = _emit_share(
                s_row, a_row, b_row, g_row, words_ptr, part, tiles, shift, vocab, wd, mix, scale, tau, raise_by,
                S, BLOCK, ALIGN, GRADIENT, TEACHER_STUDENT, FROM_STUDENT, CENTERED,
            )  # fmt: skip
            tl.store(count_ptr + ticket, count)
    if SECOND and GRADIENT:
        _fill_zero(g_row + shift, tl.where(is_read, vocab, 0), width, part, S, BLOCK)
