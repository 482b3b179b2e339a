"""Sweeps of the sampler over a row, or a part of one: weights, cuts, and the draw where nothing shorter will do.

`triton.py` has the essay. Everywhere `a_ptr`, `b_ptr` point to the first entry of what is swept, `vocab` entries in
`tiles` tiles; x is the contrastive logit in fp32. `cut` is an ordered key (`row_math.py`), `last` an index: what is
above the cut is kept, and of what is at it all up to `last`.
"""

import triton
import triton.language as tl

from deepalign.kernels.row_math import INFINITY, LOG2E, LOWEST_KEY, float_of_key, midpoint, ordered_key
from deepalign.kernels.row_select import contrast

LAST_INDEX = tl.constexpr(2**31 - 1)


@triton.jit
def load_pair(a_ptr, b_ptr, tile, vocab, BLOCK: tl.constexpr):
    """Indices, and both models' logits in fp32, -inf where none is; (BLOCK,)."""
    at = tile * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + at, mask=at < vocab, other=-INFINITY).to(tl.float32)
    return at, a, tl.load(b_ptr + at, mask=at < vocab, other=-INFINITY).to(tl.float32)


@triton.jit
def load_x(a_ptr, b_ptr, tile, vocab, alpha, threshold, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Indices and x, (BLOCK,)."""
    at, a, b = load_pair(a_ptr, b_ptr, tile, vocab, BLOCK)
    return at, contrast(a, b, alpha, threshold, KIND)


@triton.jit
def weight_of(x, most, temperature):
    """exp((x - max x) / temperature): differenced before it is divided, so that the largest is exactly 1."""
    return tl.where(x > -INFINITY, tl.exp2((x - most) / temperature * LOG2E), 0.0)


@triton.jit
def is_kept(x, index, cut, last):
    """x above the cut, or at it and not after the last of its ties that is kept."""
    key = ordered_key(x)
    return (x > -INFINITY) & ((key > cut) | ((key == cut) & (index <= last)))


@triton.jit
def weigh(
    a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, cut, last, least, min_p,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many entries reach the key `least` and are kept by (cut, last, min_p), and their weight, tile by tile."""
    count, mass = tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float32)
    for tile in range(0, tiles):
        at, x = load_x(a_ptr, b_ptr, tile, vocab, alpha, threshold, KIND, BLOCK)
        kept = is_kept(x, at, cut, last) & (ordered_key(x) >= least)
        weight = weight_of(x, most, temperature)
        kept = kept & (weight >= min_p)
        count += tl.sum(kept.to(tl.int32))
        mass += tl.sum(tl.where(kept, weight, 0.0))
    return count, mass


@triton.jit
def ties_of_mass(missing, each):
    """How many equal weights are needed for what is missing, at least one."""
    return tl.maximum(tl.ceil(missing / tl.where(each > 0.0, each, 1.0)), 1.0)


@triton.jit
def _row_cut(
    a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, cut, last, goal,
    KIND: tl.constexpr, BLOCK: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """The cut and last tie of the shortest prefix whose count or weight (MASS) reaches the goal, of what (cut, last)
    keep; by one sweep for every step of a bisection."""
    low, high = tl.maximum(cut, LOWEST_KEY + 1), ordered_key(most)
    while low < high:
        middle = midpoint(low, high)
        count, mass = weigh(
            a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, cut, last, middle, 0.0, KIND, BLOCK
        )
        if (mass if MASS else count.to(tl.float32)) >= goal:
            low = middle
        else:
            high = middle - 1
    count, mass = weigh(
        a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, cut, last, low + 1, 0.0, KIND, BLOCK
    )
    if MASS:
        ties = ties_of_mass(goal - mass, weight_of(float_of_key(low), most, temperature))
    else:
        ties = goal - count.to(tl.float32)
    # one more sweep finds the last of the ties that are kept
    seen, found = tl.full((), 0.0, tl.float32), tl.full((), LAST_INDEX, tl.int32)
    for tile in range(0, tiles):
        at, x = load_x(a_ptr, b_ptr, tile, vocab, alpha, threshold, KIND, BLOCK)
        tied = (is_kept(x, at, cut, last) & (ordered_key(x) == low)).to(tl.int32)
        order = seen + tl.cumsum(tied, 0).to(tl.float32)
        found = tl.minimum(found, tl.min(tl.where((tied > 0) & (order >= ties), at, LAST_INDEX)))
        seen += tl.sum(tied).to(tl.float32)
    return low, found


@triton.jit
def first_beyond(weight, index, low, high, goal):
    """The lowest index in [low, high] up to which the weights sum to more than the goal; high if none is."""
    while low < high:
        middle = (low + high) // 2
        beyond = tl.sum(tl.where(index <= middle, weight, 0.0)).to(tl.float64) > goal
        # both ends move on to where there is a weight
        last = tl.max(tl.where((weight > 0.0) & (index <= middle), index, low))
        first = tl.min(tl.where((weight > 0.0) & (index > middle), index, high))
        low, high = tl.where(beyond, low, tl.minimum(first, high)), tl.where(beyond, tl.minimum(last, middle), high)
    return low


@triton.jit
def draw_from_row(
    a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, top_k, top_p, min_p, u,
    KIND: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, OF_ALL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """By sweeps over a row. u: a share of all weight (OF_ALL), or the weight itself up to which to go."""
    cut, last = tl.full((), LOWEST_KEY, tl.int32), tl.full((), LAST_INDEX, tl.int32)
    if TOP_K:
        cut, last = _row_cut(
            a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, cut, last, top_k.to(tl.float32),
            KIND, BLOCK, False,
        )  # fmt: skip
    if TOP_P:
        _, mass = weigh(
            a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, cut, last, LOWEST_KEY, 0.0, KIND, BLOCK
        )
        cut, last = _row_cut(
            a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, cut, last, top_p * mass, KIND, BLOCK, True
        )
    goal, total = u, tl.full((), 0.0, tl.float32)
    if OF_ALL:
        _, total = weigh(
            a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, cut, last, LOWEST_KEY, min_p, KIND, BLOCK
        )
        goal = u * total.to(tl.float64)
    mass, token, final = tl.full((), 0.0, tl.float32), tl.full((), -1, tl.int32), tl.full((), 0, tl.int32)
    for tile in range(0, tiles):  # in the order of `weigh`, so that the sums are the same
        at, x = load_x(a_ptr, b_ptr, tile, vocab, alpha, threshold, KIND, BLOCK)
        weight = weight_of(x, most, temperature)
        weight = tl.where(is_kept(x, at, cut, last) & (weight >= min_p), weight, 0.0)
        here = tl.sum(weight)
        if (token < 0) & ((mass + here).to(tl.float64) > goal):
            inside = goal - mass.to(tl.float64)
            token = first_beyond(weight, at, tile * BLOCK, tile * BLOCK + BLOCK - 1, inside)
            token = tl.minimum(token, tl.max(tl.where(weight > 0.0, at, 0)))
        mass += here
        final = tl.maximum(final, tl.max(tl.where(weight > 0.0, at, 0)))
    token = tl.where(token < 0, final, token)
    a, b = tl.load(a_ptr + token).to(tl.float32), tl.load(b_ptr + token).to(tl.float32)
    return token, contrast(a, b, alpha, threshold, KIND), total
