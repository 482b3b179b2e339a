"""The contrastive sampler on a GPU, one launch, one program per row. `reference.py` has the equations.

A first sweep over the row gives both partitions, hence the threshold of the contrast; a second the largest x, and the
largest per lane. Whatever the filters leave is {x > cut} and, in the order of their index, the first of those equal to
the cut; so is each filter's own result. A cut is found by bisection over ordered keys.

Where top-k is at most 1024, all further work is on the few entries that may be among the k largest (`row_select.py`),
held in registers. Else every step of the bisection is a sweep over the row. The draw inverts the CDF in the order of
the index, again by bisection: the weights up to an index, a sum whose rounding is monotonic, are compared with the
uniform's share of all.

No float64 but for the uniform itself: sums are trees of fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepalign.kernels.completion_loss.triton import MOST_SELECTED, TILE_LIMIT, check_per_row, check_rows
from deepalign.kernels.launch import launch_of
from deepalign.kernels.row_math import (
    INFINITY,
    LOG2E,
    LOWEST_KEY,
    finite,
    float_of_key,
    lower_bound,
    midpoint,
    ordered_key,
)
from deepalign.kernels.row_select import collect, contrast

BOUND_ROUNDS = tl.constexpr(8)
LAST_INDEX = tl.constexpr(2**31 - 1)


def contrastive_sample(
    aligned: Tensor,
    base: Tensor,
    uniforms: Tensor,
    alpha: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    log_space: bool,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """The kernel of `deepalign::contrastive_sample`."""
    check_rows(vocab_size, aligned=aligned, base=base)
    check_per_row("uniforms", uniforms, aligned, torch.float64)
    if not (alpha >= 0 and temperature >= 0 and 0 <= top_k <= vocab_size and 0 < top_p <= 1 and 0 <= min_p <= 1):
        raise RuntimeError(
            "deepalign: expected alpha and temperature >= 0, top_k in [0, vocab_size], top_p in (0, 1] and min_p in "
            f"[0, 1], got {alpha}, {temperature}, {top_k}, {top_p}, {min_p}"
        )
    greedy, temperature = temperature == 0, min(max(temperature, 1e-37), 3e38)  # what fp32 has as normal numbers
    rows, device = aligned.shape[0], aligned.device
    launch = launch_of("contrastive_sample", device)
    block = launch.block * 2 // aligned.element_size()
    few = 0 < top_k <= MOST_SELECTED and top_k < vocab_size
    tiles = triton.next_power_of_2(-(-vocab_size // block))
    lanes = min(triton.next_power_of_2(2 * max(top_k, 1)), block // 2, max(1, TILE_LIMIT // (2 * tiles))) if few else 1
    capacity = triton.next_power_of_2(max(top_k, lanes)) if few else 1
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, device=device)
    index = torch.empty((rows, capacity), dtype=torch.int32, device=device)
    value = torch.empty((rows, capacity), device=device)
    if rows:
        sample_kernel[(rows,)](
            aligned, base, uniforms, tokens, logprobs, index, value, aligned.stride(0), base.stride(0), vocab_size,
            alpha, temperature, top_k if 0 < top_k < vocab_size else 0, top_p, min_p, KIND=3 if log_space else 2,
            FEW=few, GREEDY=greedy, TOP_K=0 < top_k < vocab_size, TOP_P=top_p < 1, BLOCK=block, TILES=tiles,
            LANES=lanes, CAPACITY=capacity, num_warps=launch.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return tokens, logprobs


# ---- sweeps over the row


@triton.jit
def _load_pair(a_ptr, b_ptr, tile, vocab, BLOCK: tl.constexpr):
    at = tile * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + at, mask=at < vocab, other=-INFINITY).to(tl.float32)
    return at, a, tl.load(b_ptr + at, mask=at < vocab, other=-INFINITY).to(tl.float32)


@triton.jit
def _load_x(a_ptr, b_ptr, tile, vocab, alpha, threshold, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at, a, b = _load_pair(a_ptr, b_ptr, tile, vocab, BLOCK)
    return at, contrast(a, b, alpha, threshold, KIND)


@triton.jit
def _partitions(a_ptr, b_ptr, tiles, vocab, offset_a, offset_b, BLOCK: tl.constexpr):
    """Sums of exp(a - offset), exp(b - offset), both maxima, and how many entries are present, and absent or beyond."""
    sum_a, sum_b = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    most_a, most_b = tl.full([BLOCK], -INFINITY, tl.float32), tl.full([BLOCK], -INFINITY, tl.float32)
    present, absent = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for tile in range(0, tiles):
        _, a, b = _load_pair(a_ptr, b_ptr, tile, vocab, BLOCK)
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
def _threshold(a_ptr, b_ptr, tiles, vocab, BLOCK: tl.constexpr):
    """Whether the row is bad, and lse(b) - lse(a). From the first entries, then, if that was no use, from the
    maxima."""
    offset_a, offset_b = tl.load(a_ptr).to(tl.float32), tl.load(b_ptr).to(tl.float32)
    sum_a, sum_b, most_a, most_b, present, absent = _partitions(a_ptr, b_ptr, tiles, vocab, offset_a, offset_b, BLOCK)
    bad = (present == 0) | (present + absent < tiles * BLOCK)
    if bad | (finite(sum_a) & finite(sum_b) & (sum_a > 0.0) & (sum_b > 0.0)) == False:  # noqa: E712
        offset_a, offset_b = most_a, most_b
        sum_a, sum_b, _, _, _, _ = _partitions(a_ptr, b_ptr, tiles, vocab, offset_a, offset_b, BLOCK)
    return bad, (offset_b - offset_a) + (tl.log(sum_b) - tl.log(sum_a))


@triton.jit
def _weigh(
    a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, cut, last, least, min_p,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many entries reach the key `least` and are kept by (cut, last, min_p), and their weight, tile by tile."""
    count, mass = tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float32)
    for tile in range(0, tiles):
        at, x = _load_x(a_ptr, b_ptr, tile, vocab, alpha, threshold, KIND, BLOCK)
        kept = _kept(x, at, cut, last) & (ordered_key(x) >= least)
        weight = _weight(x, most, temperature)
        kept = kept & (weight >= min_p)
        count += tl.sum(kept.to(tl.int32))
        mass += tl.sum(tl.where(kept, weight, 0.0))
    return count, mass


# ---- weights and cuts, of a tile


@triton.jit
def _weight(x, most, temperature):
    """exp((x - max x) / temperature): differenced before it is divided, so that the largest is exactly 1."""
    return tl.where(x > -INFINITY, tl.exp2((x - most) / temperature * LOG2E), 0.0)


@triton.jit
def _kept(x, index, cut, last):
    """x above the cut, or at it and not after the last of its ties that is kept."""
    key = ordered_key(x)
    return (x > -INFINITY) & ((key > cut) | ((key == cut) & (index <= last)))


@triton.jit
def _few_cut(x, index, weight, kept, goal, high, vocab, MASS: tl.constexpr):
    """Among few entries: the cut and last tie of the shortest prefix whose count or weight reaches the goal."""
    key = tl.where(kept, ordered_key(x), LOWEST_KEY)
    low = tl.full((), LOWEST_KEY + 1, tl.int32)
    while low < high:
        middle = midpoint(low, high)
        reached = kept & (key >= middle)
        if MASS:
            enough = tl.sum(tl.where(reached, weight, 0.0)) >= goal
        else:
            enough = tl.sum(reached.to(tl.int32)).to(tl.float32) >= goal
        if enough:
            low = middle
        else:
            high = middle - 1
    above = kept & (key > low)
    tied = kept & (key == low)
    if MASS:
        each = tl.max(tl.where(tied, weight, 0.0))
        ties = _ties_of_mass(goal - tl.sum(tl.where(above, weight, 0.0)), each)
    else:
        ties = goal - tl.sum(above.to(tl.int32)).to(tl.float32)
    first, end = tl.full((), 0, tl.int32), vocab - 1
    while first < end:
        middle = (first + end) // 2
        if tl.sum((tied & (index <= middle)).to(tl.int32)).to(tl.float32) >= ties:
            end = middle
        else:
            first = middle + 1
    return low, first


@triton.jit
def _ties_of_mass(missing, each):
    """How many equal weights are needed for what is missing, at least one."""
    return tl.maximum(tl.ceil(missing / tl.where(each > 0.0, each, 1.0)), 1.0)


@triton.jit
def _row_cut(
    a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, cut, last, goal,
    KIND: tl.constexpr, BLOCK: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """The same over the whole row, of what (cut, last) keep."""
    low, high = tl.maximum(cut, LOWEST_KEY + 1), ordered_key(most)
    while low < high:
        middle = midpoint(low, high)
        count, mass = _weigh(
            a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, cut, last, middle, 0.0, KIND, BLOCK
        )
        if (mass if MASS else count.to(tl.float32)) >= goal:
            low = middle
        else:
            high = middle - 1
    count, mass = _weigh(
        a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, cut, last, low + 1, 0.0, KIND, BLOCK
    )
    if MASS:
        ties = _ties_of_mass(goal - mass, _weight(float_of_key(low), most, temperature))
    else:
        ties = goal - count.to(tl.float32)
    # one more sweep finds the last of the ties that are kept
    seen, found = tl.full((), 0.0, tl.float32), tl.full((), LAST_INDEX, tl.int32)
    for tile in range(0, tiles):
        at, x = _load_x(a_ptr, b_ptr, tile, vocab, alpha, threshold, KIND, BLOCK)
        tied = (_kept(x, at, cut, last) & (ordered_key(x) == low)).to(tl.int32)
        order = seen + tl.cumsum(tied, 0).to(tl.float32)
        found = tl.minimum(found, tl.min(tl.where((tied > 0) & (order >= ties), at, LAST_INDEX)))
        seen += tl.sum(tied).to(tl.float32)
    return low, found


# ---- the draw


@triton.jit
def _first_beyond(weight, index, low, high, goal):
    """The lowest index in [low, high] up to which the weights sum to more than the goal; high if none is."""
    while low < high:
        middle = (low + high) // 2
        if tl.sum(tl.where(index <= middle, weight, 0.0)).to(tl.float64) > goal:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def _draw_from_few(
    a_ptr, b_ptr, index_ptr, count, vocab, alpha, threshold, most, temperature, top_k, top_p, min_p, u,
    KIND: tl.constexpr, TOP_P: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, CAPACITY)
    listed = slot < count
    index = tl.load(index_ptr + slot, mask=listed, other=0)
    a = tl.load(a_ptr + index, mask=listed, other=-INFINITY).to(tl.float32)
    b = tl.load(b_ptr + index, mask=listed, other=-INFINITY).to(tl.float32)
    x = contrast(a, b, alpha, threshold, KIND)
    weight = _weight(x, most, temperature)
    kept = x > -INFINITY
    high = ordered_key(most)
    cut, last = _few_cut(x, index, weight, kept, top_k.to(tl.float32), high, vocab, False)
    kept = kept & _kept(x, index, cut, last)
    if TOP_P:
        goal = top_p * tl.sum(tl.where(kept, weight, 0.0))
        cut, last = _few_cut(x, index, weight, kept, goal, high, vocab, True)
        kept = kept & _kept(x, index, cut, last)
    weight = tl.where(kept & (weight >= min_p), weight, 0.0)
    total = tl.sum(weight)
    token = _first_beyond(weight, index, tl.full((), 0, tl.int32), vocab - 1, u * total.to(tl.float64))
    token = tl.minimum(token, tl.max(tl.where(weight > 0.0, index, 0)))
    drawn = tl.max(tl.where((index == token) & listed, x, -INFINITY))
    return token, drawn, total


@triton.jit
def _draw_from_row(
    a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, top_k, top_p, min_p, u,
    KIND: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cut, last = tl.full((), LOWEST_KEY, tl.int32), tl.full((), LAST_INDEX, tl.int32)
    if TOP_K:
        cut, last = _row_cut(
            a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, cut, last, top_k.to(tl.float32),
            KIND, BLOCK, False,
        )  # fmt: skip
    if TOP_P:
        _, mass = _weigh(
            a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, cut, last, LOWEST_KEY, 0.0, KIND, BLOCK
        )
        cut, last = _row_cut(
            a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, cut, last, top_p * mass, KIND, BLOCK, True
        )
    _, total = _weigh(
        a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, cut, last, LOWEST_KEY, min_p, KIND, BLOCK
    )
    goal = u * total.to(tl.float64)
    mass, token, final = tl.full((), 0.0, tl.float32), tl.full((), -1, tl.int32), tl.full((), 0, tl.int32)
    for tile in range(0, tiles):  # in the order of `_weigh`, so that the sums are the same
        at, x = _load_x(a_ptr, b_ptr, tile, vocab, alpha, threshold, KIND, BLOCK)
        weight = _weight(x, most, temperature)
        weight = tl.where(_kept(x, at, cut, last) & (weight >= min_p), weight, 0.0)
        here = tl.sum(weight)
        if (token < 0) & ((mass + here).to(tl.float64) > goal):
            inside = goal - mass.to(tl.float64)
            token = _first_beyond(weight, at, tile * BLOCK, tile * BLOCK + BLOCK - 1, inside)
            token = tl.minimum(token, tl.max(tl.where(weight > 0.0, at, 0)))
        mass += here
        final = tl.maximum(final, tl.max(tl.where(weight > 0.0, at, 0)))
    token = tl.where(token < 0, final, token)
    a, b = tl.load(a_ptr + token).to(tl.float32), tl.load(b_ptr + token).to(tl.float32)
    return token, contrast(a, b, alpha, threshold, KIND), total


@triton.jit(do_not_specialize=["top_k"])
def sample_kernel(
    a_ptr, b_ptr, uniforms_ptr, token_ptr, logprob_ptr, index_ptr, value_ptr, stride_a, stride_b, vocab, alpha,
    temperature, top_k, top_p, min_p, KIND: tl.constexpr, FEW: tl.constexpr, GREEDY: tl.constexpr,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    a_ptr += row * stride_a
    b_ptr += row * stride_b
    index_ptr += row * CAPACITY
    value_ptr += row * CAPACITY
    tiles = (vocab + BLOCK - 1) // BLOCK
    bad, threshold = _threshold(a_ptr, b_ptr, tiles, vocab, BLOCK)
    largest = tl.full([BLOCK], -INFINITY, tl.float32)
    first = tl.full([BLOCK], LAST_INDEX, tl.int32)  # the first index of the largest, per lane
    for tile in range(0, tiles):
        at, x = _load_x(a_ptr, b_ptr, tile, vocab, alpha, threshold, KIND, BLOCK)
        if GREEDY:
            first = tl.where(x > largest, at, first)
        largest = tl.maximum(largest, x)
    most = tl.max(largest)
    token, logprob = tl.full((), -1, tl.int32), tl.full((), float("nan"), tl.float32)
    if (bad == False) & (most > -INFINITY):  # noqa: E712
        if GREEDY:
            token = tl.min(tl.where(largest == most, first, LAST_INDEX))
            logprob = 0.0 * threshold
        else:
            u = tl.load(uniforms_ptr + row)
            if FEW:
                pairs = tl.max(tl.reshape(largest, [BLOCK // 2, 2]), 1)
                count = collect(
                    a_ptr, b_ptr, a_ptr, index_ptr, value_ptr, pairs, lower_bound(pairs, top_k, BOUND_ROUNDS), top_k, 0,
                    tiles, vocab, 0, alpha, threshold, KIND, 1, BLOCK, TILES, LANES, CAPACITY,
                )  # fmt: skip
                tl.debug_barrier()
                token, drawn, total = _draw_from_few(
                    a_ptr, b_ptr, index_ptr, count, vocab, alpha, threshold, most, temperature, top_k, top_p, min_p, u,
                    KIND, TOP_P, CAPACITY,
                )  # fmt: skip
            else:
                token, drawn, total = _draw_from_row(
                    a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, top_k, top_p, min_p, u,
                    KIND, TOP_K, TOP_P, BLOCK,
                )  # fmt: skip
            logprob = (drawn - most) / temperature - tl.log(total)
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, logprob)
