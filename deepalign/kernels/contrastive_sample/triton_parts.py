"""What a program of the sampler finds out about its part of a row: partitions, then what the draw needs.

`triton.py` has the essay. Pointers are those of a row; a part begins `start` entries after and has `own` of them.
"""

import triton
import triton.language as tl

from deepalign.kernels.completion_loss.triton_math import publish, read_words
from deepalign.kernels.contrastive_sample.triton_rows import LAST_INDEX, load_pair, load_x, weigh
from deepalign.kernels.row_math import INFINITY, LOG2E, LOWEST_KEY, finite, lower_bound
from deepalign.kernels.row_select import collect

BOUND_ROUNDS = tl.constexpr(8)

# What a program publishes about its part of a row: words of the loss's kind.
OFFSET_A = tl.constexpr(0)
SUM_A = tl.constexpr(1)
OFFSET_B = tl.constexpr(2)
SUM_B = tl.constexpr(3)
PRESENT = tl.constexpr(4)
WRONG = tl.constexpr(5)
PUBLISHED = tl.constexpr(6)


@triton.jit
def _partitions(a_ptr, b_ptr, tiles, vocab, offset_a, offset_b, BLOCK: tl.constexpr):
    """Sums of exp(a - offset), exp(b - offset), both maxima, and how many entries are present, and absent or beyond."""
    sum_a, sum_b = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    most_a, most_b = tl.full([BLOCK], -INFINITY, tl.float32), tl.full([BLOCK], -INFINITY, tl.float32)
    present, absent = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for tile in range(0, tiles):
        _, a, b = load_pair(a_ptr, b_ptr, tile, vocab, BLOCK)
        here = finite(a) & finite(b)
        # differences first: models that differ by a shift have the same sums to the bit
        sum_a += tl.where(here, tl.exp2((a - offset_a) * LOG2E), 0.0)
        sum_b += tl.where(here, tl.exp2((b - offset_b) * LOG2E), 0.0)
        most_a = tl.maximum(most_a, tl.where(here, a, -INFINITY))
        most_b = tl.maximum(most_b, tl.where(here, b, -INFINITY))
        present += here.to(tl.int32)
        absent += ((a == -INFINITY) & (b == -INFINITY)).to(tl.int32)
    return tl.sum(sum_a), tl.sum(sum_b), tl.max(most_a), tl.max(most_b), tl.sum(present), tl.sum(absent)


@triton.jit
def publish_part(a_ptr, b_ptr, words_ptr, start, tiles, own, BLOCK: tl.constexpr):
    """Partitions of a part of `own` entries: from the row's first entries; if that was no use, from its maxima."""
    offset_a, offset_b = tl.load(a_ptr).to(tl.float32), tl.load(b_ptr).to(tl.float32)
    a_ptr += start
    b_ptr += start
    sum_a, sum_b, most_a, most_b, present, absent = _partitions(a_ptr, b_ptr, tiles, own, offset_a, offset_b, BLOCK)
    if not (finite(offset_a) & finite(offset_b) & finite(sum_a) & finite(sum_b)):
        offset_a, offset_b = most_a, most_b
        sum_a, sum_b, _, _, _, _ = _partitions(a_ptr, b_ptr, tiles, own, offset_a, offset_b, BLOCK)
    publish(words_ptr, OFFSET_A, offset_a)
    publish(words_ptr, SUM_A, sum_a)
    publish(words_ptr, OFFSET_B, offset_b)
    publish(words_ptr, SUM_B, sum_b)
    publish(words_ptr, PRESENT, present.to(tl.float32))
    publish(words_ptr, WRONG, (tiles * BLOCK - present - absent).to(tl.float32))


@triton.jit
def _partition_of_row(offset, total):
    """The offset and the log of the sum from it, over all parts."""
    most = tl.max(tl.where(total > 0, offset, -INFINITY))
    return most, tl.log(tl.sum(tl.where(total > 0, total * tl.exp2((offset - most) * LOG2E), 0.0)))


@triton.jit
def row_threshold(words_ptr, S: tl.constexpr):
    """Whether the row is bad, and lse(b) - lse(a)."""
    words = read_words(words_ptr, PUBLISHED, S, True)
    offset_a, log_a = _partition_of_row(words[OFFSET_A], words[SUM_A])
    offset_b, log_b = _partition_of_row(words[OFFSET_B], words[SUM_B])
    present, wrong = tl.sum(words[PRESENT]), tl.sum(words[WRONG])
    return (present == 0) | (wrong > 0), (offset_b - offset_a) + (log_b - log_a)


@triton.jit
def _largest_of_part(
    a_ptr, b_ptr, tiles, own, alpha, threshold, KIND: tl.constexpr, GREEDY: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest x per lane, and its first index there."""
    largest, first = tl.full([BLOCK], -INFINITY, tl.float32), tl.zeros([BLOCK], tl.int32)
    for tile in range(0, tiles):
        at, x = load_x(a_ptr, b_ptr, tile, own, alpha, threshold, KIND, BLOCK)
        if GREEDY:
            first = tl.where(x > largest, at, first)
        largest = tl.maximum(largest, x)
    return largest, first


@triton.jit
def leave_part(
    a_ptr, b_ptr, index_ptr, value_ptr, most_ptr, mass_ptr, count_ptr, first_ptr, start, tiles, own, alpha, threshold,
    temperature, wanted, KIND: tl.constexpr, GREEDY: tl.constexpr, LISTS: tl.constexpr, WEIGHS: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Leave in memory what the program that draws needs to know of a part."""
    a_ptr += start
    b_ptr += start
    largest, first = _largest_of_part(a_ptr, b_ptr, tiles, own, alpha, threshold, KIND, GREEDY, BLOCK)
    most = tl.max(largest)
    tl.store(most_ptr, most)
    if GREEDY:
        tl.store(first_ptr, start + tl.min(tl.where(largest == most, first, LAST_INDEX - start)))
    if LISTS:
        pairs = tl.max(tl.reshape(largest, [BLOCK // 2, 2]), 1)
        found = collect(
            a_ptr, b_ptr, a_ptr, index_ptr + CAPACITY, index_ptr, value_ptr, pairs,
            lower_bound(pairs, wanted, BOUND_ROUNDS), wanted, 0, tiles, own, 0, alpha, threshold, KIND, 1, BLOCK, TILES,
            LANES, CAPACITY, CAPACITY,
        )  # fmt: skip
        tl.store(count_ptr, found)
    if WEIGHS:
        _, mass = weigh(
            a_ptr, b_ptr, tiles, own, alpha, threshold, most, temperature, LOWEST_KEY, LAST_INDEX, LOWEST_KEY, 0.0,
            KIND, BLOCK,
        )  # fmt: skip
        tl.store(mass_ptr, mass)
