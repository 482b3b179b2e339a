"""Triton device functions that find the largest differences of a program's share of a row, exactly.

Group maxima are there after the first read. A bound that enough of them reach leaves few groups to look into again, and
those hold every entry that may be among the k largest. Where heavy ties leave too many, or nothing bounds, the k-th
largest of the share is found by bisection over ordered keys, and its ties are taken in the order of their index.
"""

import triton
import triton.language as tl

from deepalign.kernels.row_math import INFINITY, LOWEST_KEY, midpoint, ordered_key

# What is ranked: the first tensor's entry, b - r, or the contrastive logit, by difference of logits or of
# log-probabilities.
ENTRY = tl.constexpr(0)
DIFFERENCE = tl.constexpr(1)
CONTRAST = tl.constexpr(2)
CONTRAST_LOGPROBS = tl.constexpr(3)


@triton.jit
def contrast(a, b, alpha, threshold, KIND: tl.constexpr):
    """The contrastive logit x (Eq. 7) of finite entries, -inf of others."""
    d = b - a
    excess = d - threshold if KIND == CONTRAST_LOGPROBS else tl.maximum(d, 0.0)
    # Where nothing is taken off nothing is multiplied: alpha or an excess beyond fp32 times 0 is NaN.
    lowered = (d > threshold) & (excess > 0.0) & (alpha + 0.0 * excess > 0.0)
    x = tl.where(lowered, a - alpha * excess, a)
    return tl.where((tl.abs(a) < INFINITY) & (tl.abs(b) < INFINITY), x, -INFINITY)


@triton.jit
def ranked_at(r_ptr, b_ptr, offsets, exists, alpha, threshold, KIND: tl.constexpr):
    """What is ranked, in fp32; NaN where nothing exists."""
    r = tl.load(r_ptr + offsets, mask=exists, other=float("nan")).to(tl.float32)
    if KIND == ENTRY:
        return r
    b = tl.load(b_ptr + offsets, mask=exists, other=float("nan")).to(tl.float32)
    if KIND == DIFFERENCE:
        return b - r
    else:
        return tl.where(exists, contrast(r, b, alpha, threshold, KIND), float("nan"))


@triton.jit
def collect(
    r_ptr, b_ptr, s_ptr, lane_ptr, index_ptr, value_ptr, maxima, bound, k, part, tiles, vocab, shift, alpha, threshold,
    KIND: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr,
    CAPACITY: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Write index and s of every entry of this share that may be among the row's k largest d; return how many.

    Args:
        r_ptr, b_ptr, s_ptr: where tile 0 begins.
        lane_ptr: scratch for ROOM lanes, LANES of them looked into at a time; with ROOM = LANES it may be index_ptr.
        index_ptr, value_ptr: room for CAPACITY entries.
        maxima: per lane.
        bound: none of the k largest is below it.
        alpha, threshold: of a contrast, else not looked at.
        tiles: of the whole row; TILES, a power of 2, of this program at least.
        CAPACITY: at least min(k, share), and ROOM if the lanes share its memory.
    """
    P: tl.constexpr = BLOCK // 2
    active = (maxima >= bound) & (maxima > -INFINITY)
    n_active = tl.sum(active.to(tl.int32))
    count = tl.full((), CAPACITY + 1, tl.int32)
    if n_active <= ROOM:
        seat = tl.cumsum(active.to(tl.int32), 0) - 1
        tl.store(lane_ptr + seat, tl.arange(0, P), mask=active)
        tl.debug_barrier()
        count = tl.full((), 0, tl.int32)
        for first in range(0, n_active, LANES):
            slot = first + tl.arange(0, LANES)
            lane = tl.load(lane_ptr + slot, mask=slot < n_active, other=0)
            turn = tl.arange(0, 2 * TILES)
            tile = (turn // 2) * S + part
            offsets = tl.reshape(tile[None, :] * BLOCK + 2 * lane[:, None] + (turn % 2)[None, :], [LANES * 2 * TILES])
            live = tl.reshape((slot < n_active)[:, None] & (tile < tiles)[None, :], [LANES * 2 * TILES])
            exists = live & (offsets >= shift) & (offsets < shift + vocab)
            hit = ranked_at(r_ptr, b_ptr, offsets, exists, alpha, threshold, KIND) >= bound
            found = tl.sum(hit.to(tl.int32))
            if count + found <= CAPACITY:
                place = count + tl.cumsum(hit.to(tl.int32), 0) - 1
                value = tl.load(s_ptr + offsets, mask=hit, other=0.0).to(tl.float32)
                if ROOM == LANES:
                    tl.debug_barrier()  # everybody has the lanes
                tl.store(index_ptr + place, offsets - shift, mask=hit)
                tl.store(value_ptr + place, value, mask=hit)
            count += found
    if count > CAPACITY:
        tl.debug_barrier()
        low, high = ordered_key(bound), ordered_key(tl.max(maxima))
        count = _collect_exactly(
            r_ptr, b_ptr, s_ptr, index_ptr, value_ptr, low, high, k, part, tiles, vocab, shift, alpha, threshold, KIND,
            S, BLOCK,
        )  # fmt: skip
    return count


@triton.jit
def _keys(r_ptr, b_ptr, tile, vocab, shift, alpha, threshold, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets and ordered keys of a tile, int32 (BLOCK,); LOWEST_KEY where nothing is ranked."""
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    exists = (offsets >= shift) & (offsets < shift + vocab)
    d = ranked_at(r_ptr, b_ptr, offsets, exists, alpha, threshold, KIND)
    return offsets, tl.where(d > -INFINITY, ordered_key(d), LOWEST_KEY)


@triton.jit
def _count_from(
    r_ptr, b_ptr, key, part, tiles, vocab, shift, alpha, threshold, KIND: tl.constexpr, S: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """How many entries of this share have at least this key."""
    count = tl.zeros([BLOCK], tl.int32)
    for tile in range(part, tiles, S):
        _, keys = _keys(r_ptr, b_ptr, tile, vocab, shift, alpha, threshold, KIND, BLOCK)
        count += (keys >= key).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _collect_exactly(
    r_ptr, b_ptr, s_ptr, index_ptr, value_ptr, low, high, k, part, tiles, vocab, shift, alpha, threshold,
    KIND: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The k largest of the share (all, if there are fewer), in the order of their index."""
    low = tl.maximum(low, LOWEST_KEY + 1)
    k = tl.minimum(k, _count_from(r_ptr, b_ptr, low, part, tiles, vocab, shift, alpha, threshold, KIND, S, BLOCK))
    while low < high:
        middle = midpoint(low, high)
        if _count_from(r_ptr, b_ptr, middle, part, tiles, vocab, shift, alpha, threshold, KIND, S, BLOCK) >= k:
            low = middle
        else:
            high = middle - 1
    ties = k - _count_from(r_ptr, b_ptr, low + 1, part, tiles, vocab, shift, alpha, threshold, KIND, S, BLOCK)
    count = tl.full((), 0, tl.int32)
    for tile in range(part, tiles, S):
        offsets, keys = _keys(r_ptr, b_ptr, tile, vocab, shift, alpha, threshold, KIND, BLOCK)
        tied = (keys == low).to(tl.int32)
        hit = (keys > low) | ((tied > 0) & (tl.cumsum(tied, 0) <= ties))
        place = count + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(index_ptr + place, offsets - shift, mask=hit)
        tl.store(value_ptr + place, tl.load(s_ptr + offsets, mask=hit, other=0.0).to(tl.float32), mask=hit)
        count += tl.sum(hit.to(tl.int32))
        ties -= tl.minimum(ties, tl.sum(tied))
    return count


RANKED = tl.constexpr(32)


@triton.jit
def write_largest(r_ptr, index_ptr, count, k, out_ptr):
    """Of `count` listed entries write the index of the k with the largest r, descending, and -1 after the last."""
    at = tl.arange(0, RANKED)
    for first in range(0, k, RANKED):
        tl.store(out_ptr + first + at, tl.full([RANKED], -1, tl.int64), mask=first + at < k)
    tl.debug_barrier()
    for first in range(0, count, RANKED):
        index = tl.load(index_ptr + first + at, mask=first + at < count, other=0)
        key = ordered_key(tl.load(r_ptr + index, mask=first + at < count, other=0.0).to(tl.float32))
        rank = tl.zeros([RANKED], tl.int32)
        for other in range(0, count, RANKED):
            listed = other + at < count
            index_2 = tl.load(index_ptr + other + at, mask=listed, other=0)
            key_2 = ordered_key(tl.load(r_ptr + index_2, mask=listed, other=0.0).to(tl.float32))
            key_2 = tl.where(listed, key_2, LOWEST_KEY)
            same = key_2[None, :] == key[:, None]
            before = (key_2[None, :] > key[:, None]) | (same & (index_2[None, :] < index[:, None]))
            rank += tl.sum(before.to(tl.int32), 1)
        tl.store(out_ptr + rank, index.to(tl.int64), mask=(first + at < count) & (rank < k))
