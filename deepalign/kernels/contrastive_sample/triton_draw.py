"""The end of a row: one token from what the programs of its parts have left in memory. `triton.py` has the essay."""

import triton
import triton.language as tl

from deepalign.kernels.contrastive_sample.triton_rows import (
    LAST_INDEX,
    draw_from_row,
    first_beyond,
    is_kept,
    ties_of_mass,
    weight_of,
)
from deepalign.kernels.row_math import INFINITY, LOWEST_KEY, midpoint, ordered_key
from deepalign.kernels.row_select import contrast


@triton.jit
def _few_cut(x, index, weight, kept, goal, high, vocab, MASS: tl.constexpr):
    """Among few entries: the cut and last tie of the shortest prefix whose count or weight reaches the goal.

    Both ends of the bisection are keys that exist, so that it takes some ten rounds instead of 32.
    """
    key = tl.where(kept, ordered_key(x), LOWEST_KEY)
    low = tl.min(tl.where(kept, key, high))
    while low < high:
        middle = midpoint(low, high)
        reached = kept & (key >= middle)
        if MASS:
            enough = tl.sum(tl.where(reached, weight, 0.0)) >= goal
        else:
            enough = tl.sum(reached.to(tl.int32)).to(tl.float32) >= goal
        least, most = tl.min(tl.where(reached, key, high)), tl.max(tl.where(reached, LOWEST_KEY, key))
        low = tl.where(enough, least, low)
        high = tl.where(enough, high, tl.maximum(most, low))
    above = kept & (key > low)
    tied = kept & (key == low)
    if MASS:
        each = tl.max(tl.where(tied, weight, 0.0))
        ties = ties_of_mass(goal - tl.sum(tl.where(above, weight, 0.0)), each)
    else:
        ties = goal - tl.sum(above.to(tl.int32)).to(tl.float32)
    first, end = tl.full((), 0, tl.int32), vocab - 1
    first = tl.where(tl.sum(tied.to(tl.int32)).to(tl.float32) <= ties, end, first)  # all of them are kept
    while first < end:
        middle = (first + end) // 2
        if tl.sum((tied & (index <= middle)).to(tl.int32)).to(tl.float32) >= ties:
            end = middle
        else:
            first = middle + 1
    return low, first


@triton.jit
def _load_listed(
    a_ptr, b_ptr, index_ptr, count_ptr, share, alpha, threshold, KIND: tl.constexpr, S: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """Index and x of what the parts of a row have listed, (S * CAPACITY,); x is -inf in places that hold nothing."""
    slot = tl.arange(0, S * CAPACITY)
    part, place = slot // CAPACITY, slot % CAPACITY
    listed = place < tl.load(count_ptr + part, volatile=True)
    index = tl.load(index_ptr + part * 2 * CAPACITY + place, mask=listed, other=0, volatile=True) + part * share
    a = tl.load(a_ptr + index, mask=listed, other=-INFINITY).to(tl.float32)
    b = tl.load(b_ptr + index, mask=listed, other=-INFINITY).to(tl.float32)
    return index, contrast(a, b, alpha, threshold, KIND)


@triton.jit
def _listed_from(x, count_ptr, wanted, S: tl.constexpr, CAPACITY: tl.constexpr):
    """The least key from which on everything in the row is listed."""
    keys = tl.reshape(tl.where(x > -INFINITY, ordered_key(x), LAST_INDEX), [S, CAPACITY])
    count = tl.load(count_ptr + tl.arange(0, S), volatile=True)
    # A part that lists fewer than it should has no more; one that lists as many may have cut a tie.
    least = tl.min(keys, 1) + (count == wanted).to(tl.int32)
    return tl.max(tl.where(count < wanted, LOWEST_KEY + 1, least))


@triton.jit
def _draw_from_few(
    x, index, vocab, most, temperature, top_k, goal, min_p, u, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    MASS: tl.constexpr,
):  # fmt: skip
    """Token, its x and the total weight. The goal of top-p is a weight (MASS), or a share of what top-k leaves."""
    weight = weight_of(x, most, temperature)
    kept = x > -INFINITY
    high = ordered_key(most)
    if TOP_K:
        cut, last = _few_cut(x, index, weight, kept, top_k.to(tl.float32), high, vocab, False)
        kept = kept & is_kept(x, index, cut, last)
    if TOP_P:
        if not MASS:
            goal *= tl.sum(tl.where(kept, weight, 0.0))
        cut, last = _few_cut(x, index, weight, kept, goal, high, vocab, True)
        kept = kept & is_kept(x, index, cut, last)
    weight = tl.where(kept & (weight >= min_p), weight, 0.0)
    total = tl.sum(weight)
    token = first_beyond(weight, index, tl.full((), 0, tl.int32), vocab - 1, u * total.to(tl.float64))
    token = tl.minimum(token, tl.max(tl.where(weight > 0.0, index, 0)))
    drawn = tl.max(tl.where((index == token) & (x > -INFINITY), x, -INFINITY))
    return token, drawn, total


@triton.jit
def _draw_from_part(
    a_ptr, b_ptr, most_ptr, mass_ptr, tiles, vocab, share, alpha, threshold, most, temperature, u,
    KIND: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Without a filter: the part that the uniform falls into, and the entry in it."""
    part = tl.arange(0, S)
    own = tl.load(most_ptr + part, volatile=True)
    mass = tl.load(mass_ptr + part, volatile=True) * weight_of(own, most, temperature)
    total = tl.sum(mass)
    goal = u * total.to(tl.float64)
    upto = tl.sum(tl.where(part[None, :] <= part[:, None], mass[None, :], 0.0), 1)
    last = tl.max(tl.where(mass > 0, part, 0))
    chosen = tl.minimum(tl.sum((upto.to(tl.float64) <= goal).to(tl.int32)), last)
    before = tl.max(tl.where(part < chosen, upto, 0.0)).to(tl.float64)
    of_part = tl.max(tl.where(part == chosen, own, -INFINITY))
    unit = weight_of(of_part, most, temperature)
    start = chosen * share
    token, _, _ = draw_from_row(
        a_ptr + start, b_ptr + start, tiles, tl.minimum(share, vocab - start), alpha, threshold, of_part, temperature,
        0, 1.0, 0.0, (goal - before) / unit.to(tl.float64), KIND, False, False, False, BLOCK,
    )  # fmt: skip
    token += start
    a, b = tl.load(a_ptr + token).to(tl.float32), tl.load(b_ptr + token).to(tl.float32)
    return token, contrast(a, b, alpha, threshold, KIND), total


@triton.jit
def _draw_from_most(
    a_ptr, b_ptr, index_ptr, mass_ptr, count_ptr, largest, vocab, share, alpha, threshold, most, temperature, top_k,
    wanted, top_p, min_p, u, KIND: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, S: tl.constexpr,
    BLOCK: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """With top-p or min-p: among each part's largest, where these hold all that is kept; else by sweeps over the row.

    `largest`: x per part, (S,). Token, its x and the total weight.
    """
    index, x = _load_listed(a_ptr, b_ptr, index_ptr, count_ptr, share, alpha, threshold, KIND, S, CAPACITY)
    from_key = _listed_from(x, count_ptr, wanted, S, CAPACITY)
    whole = (x > -INFINITY) & (ordered_key(x) >= from_key)
    weight = weight_of(x, most, temperature)
    if TOP_P:
        mass = tl.load(mass_ptr + tl.arange(0, S), volatile=True) * weight_of(largest, most, temperature)
        goal = top_p * tl.sum(mass)
        suffices = tl.sum(tl.where(whole, weight, 0.0)) >= goal
    else:
        goal = top_p
        # the largest weight that is not listed is below the least from `from_key` on
        suffices = (from_key <= LOWEST_KEY + 1) | (tl.min(tl.where(whole, weight, 2.0)) < min_p)
    if suffices & (TOP_K == False):  # noqa: E712
        token, drawn, total = _draw_from_few(
            x, index, vocab, most, temperature, top_k, goal, min_p, u, False, TOP_P, True
        )
    else:
        token, drawn, total = draw_from_row(
            a_ptr, b_ptr, (vocab + BLOCK - 1) // BLOCK, vocab, alpha, threshold, most, temperature, top_k, top_p, min_p,
            u, KIND, TOP_K, TOP_P, True, BLOCK,
        )  # fmt: skip
    return token, drawn, total


@triton.jit
def finish_row(
    a_ptr, b_ptr, uniform_ptr, index_ptr, most_ptr, mass_ptr, count_ptr, first_ptr, vocab, share, alpha, threshold,
    temperature, top_k, wanted, top_p, min_p, KIND: tl.constexpr, FEW: tl.constexpr, GREEDY: tl.constexpr,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """Token and log-probability from what all parts have left; -1 and NaN where nothing is above -inf."""
    parts = tl.arange(0, S)
    largest = tl.load(most_ptr + parts, volatile=True)
    most = tl.max(largest)
    token, logprob = tl.full((), -1, tl.int32), tl.full((), float("nan"), tl.float32)
    if most > -INFINITY:
        if GREEDY:
            token = tl.min(tl.where(largest == most, tl.load(first_ptr + parts, volatile=True), LAST_INDEX))
            logprob = 0.0 * threshold
        else:
            u = tl.load(uniform_ptr)
            if FEW:
                index, x = _load_listed(a_ptr, b_ptr, index_ptr, count_ptr, share, alpha, threshold, KIND, S, CAPACITY)
                token, drawn, total = _draw_from_few(
                    x, index, vocab, most, temperature, top_k, top_p, min_p, u, True, TOP_P, False
                )
            elif TOP_P or MIN_P:
                token, drawn, total = _draw_from_most(
                    a_ptr, b_ptr, index_ptr, mass_ptr, count_ptr, largest, vocab, share, alpha, threshold, most,
                    temperature, top_k, wanted, top_p, min_p, u, KIND, TOP_K, TOP_P, S, BLOCK, CAPACITY,
                )  # fmt: skip
            elif TOP_K:
                token, drawn, total = draw_from_row(
                    a_ptr, b_ptr, (vocab + BLOCK - 1) // BLOCK, vocab, alpha, threshold, most, temperature, top_k,
                    top_p, min_p, u, KIND, TOP_K, TOP_P, True, BLOCK,
                )  # fmt: skip
            else:
                token, drawn, total = _draw_from_part(
                    a_ptr, b_ptr, most_ptr, mass_ptr, (share + BLOCK - 1) // BLOCK, vocab, share, alpha, threshold,
                    most, temperature, u, KIND, S, BLOCK,
                )  # fmt: skip
            logprob = (drawn - most) / temperature - tl.log(total)
    return token, logprob
