"""The contrastive sampler on a GPU, in one launch. `reference.py` has the equations.

S programs share a row, each a contiguous part of it; few rows are split until they fill the device. A program sums its
part's partitions and publishes them; with those of all parts it knows the threshold of the contrast, and reads its part
again, from the nearest cache, for its largest x. What it finds it leaves in memory; the program of a row that comes
last draws. Programs draw their numbers in the order in which they start, so that a program that waits for partitions
waits only for such as run already; for what is left in memory nobody waits.

Whatever the filters leave is {x > cut} and, in the order of their index, the first of those equal to the cut; so is
each filter's own result. A cut is found by bisection over ordered keys, among the listed entries, held in registers:

    top-k up to 1024    every part lists what may be among its k largest (`row_select.py`)
    top-p, min-p        every part lists some hundreds of its largest; where the row is peaked these hold the prefix
                        that top-p asks for, or all that min-p leaves, and that they do is checked
    otherwise           the last program sweeps over the row, for every step of the bisection
    no filter           every part sums its weights: one of them is read again

The draw inverts the CDF in the order of the index, again by bisection: the weights up to an index, a sum whose rounding
is monotonic, are compared with the uniform's share of all. No float64 but for the uniform: sums are trees of fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepalign.kernels.completion_loss.triton import MOST_SELECTED, check_per_row, check_rows
from deepalign.kernels.completion_loss.triton_math import WORDS, publish, read_words
from deepalign.kernels.launch import ALL_REGISTERS, Launch, at_most_registers, launch_of, split_of_rows
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
MOST_PARTS = 16  # of a row: the last program reads what all have left
LISTED = 4096  # entries that the parts of a row list together at most
GATHERED = 2048  # entries that `collect` looks into at once: more would not stay in registers

# What a program publishes about its part of a row: words of the loss's kind.
OFFSET_A = tl.constexpr(0)
SUM_A = tl.constexpr(1)
OFFSET_B = tl.constexpr(2)
SUM_B = tl.constexpr(3)
PRESENT = tl.constexpr(4)
WRONG = tl.constexpr(5)


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
    together: bool = True,
) -> tuple[Tensor, Tensor]:
    """The kernel of `deepalign::contrastive_sample`.

    `together=False` launches what is before the wait and what is after it one after the other, as an interpreter must
    that runs one program at a time.
    """
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
    top_k = top_k if 0 < top_k < vocab_size else 0
    few = 0 < top_k <= MOST_SELECTED
    split, capacity, wanted = parts_of_rows(launch, rows, vocab_size, top_k if few else 0)
    lists = not greedy and (few or top_p < 1 or min_p > 0)
    weighs = not greedy and not few and (top_p < 1 or min_p == 0)
    capacity = capacity if lists else 1
    block = launch.block
    tiles = -(-vocab_size // (block * split))  # of a part
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, device=device)
    words = new_words(rows * split * WORDS.value + rows + 1, device)
    index = torch.empty((rows, split, 2 * capacity), dtype=torch.int32, device=device)
    value = torch.empty((rows, split, capacity), device=device)
    facts = torch.empty((2, rows, split), device=device)
    counts = torch.empty((2, rows, split), dtype=torch.int32, device=device)

    def launch_kernel(first: bool, second: bool) -> None:
        sample_kernel[(rows * split,)](
            aligned, base, uniforms, tokens, logprobs, words, words[words.numel() - rows - 1 :], index, value, facts[0],
            facts[1], counts[0], counts[1], aligned.stride(0), base.stride(0), vocab_size, tiles * block, alpha,
            temperature, top_k, wanted, top_p, min_p, FIRST=first, SECOND=second, S=split, KIND=3 if log_space else 2,
            FEW=few, GREEDY=greedy, TOP_K=top_k > 0, TOP_P=top_p < 1, MIN_P=min_p > 0,
            LISTS=lists, WEIGHS=weighs, WAITS=first and second and split > 1, BLOCK=block,
            TILES=triton.next_power_of_2(tiles), LANES=lanes_at_once(block, tiles), CAPACITY=capacity,
            num_warps=launch.warps, enable_fp_fusion=True, **at_most_registers(ALL_REGISTERS),
        )  # fmt: skip

    if rows and together:
        launch_kernel(True, True)
    elif rows:
        launch_kernel(True, False)
        launch_kernel(False, True)
    return tokens, logprobs


def new_words(entries: int, device: torch.device) -> Tensor:
    """Room for what programs publish, per row how many parts are done, and the number of the next program."""
    return torch.zeros(entries, dtype=torch.int64, device=device)


def parts_of_rows(launch: Launch, rows: int, vocab: int, top_k: int) -> tuple[int, int, int]:
    """Into how many parts a row is split, how many entries each may list, and how many it should."""
    # The second-level caches of an AMD device's dies do not see each other's plain stores within a launch.
    split = 1 if torch.version.hip else min(split_of_rows(launch, rows, vocab, launch.block), MOST_PARTS)
    if top_k:
        capacity = triton.next_power_of_2(max(top_k, 32))
        while split * capacity > LISTED:
            split //= 2
        return split, capacity, top_k
    capacity = LISTED // split
    return split, capacity, min(capacity // 2, launch.block // 4)


def lanes_at_once(block: int, tiles: int) -> int:
    """How many lanes `collect` looks into at a time."""
    return max(1, min(block // 2, GATHERED // (2 * triton.next_power_of_2(tiles))))


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
def _publish_part(a_ptr, b_ptr, words_ptr, start, tiles, own, BLOCK: tl.constexpr):
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
def _partition_of_row(words_ptr, offset_word: tl.constexpr, sum_word: tl.constexpr, S: tl.constexpr):
    """The offset and the log of the sum from it, over all parts."""
    offset, total = read_words(words_ptr, offset_word, S), read_words(words_ptr, sum_word, S)
    most = tl.max(tl.where(total > 0, offset, -INFINITY))
    return most, tl.log(tl.sum(tl.where(total > 0, total * tl.exp2((offset - most) * LOG2E), 0.0)))


@triton.jit
def _threshold(words_ptr, S: tl.constexpr):
    """Whether the row is bad, and lse(b) - lse(a)."""
    offset_a, log_a = _partition_of_row(words_ptr, OFFSET_A, SUM_A, S)
    offset_b, log_b = _partition_of_row(words_ptr, OFFSET_B, SUM_B, S)
    present, wrong = tl.sum(read_words(words_ptr, PRESENT, S)), tl.sum(read_words(words_ptr, WRONG, S))
    return (present == 0) | (wrong > 0), (offset_b - offset_a) + (log_b - log_a)


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
        ties = _ties_of_mass(goal - tl.sum(tl.where(above, weight, 0.0)), each)
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
        beyond = tl.sum(tl.where(index <= middle, weight, 0.0)).to(tl.float64) > goal
        # both ends move on to where there is a weight
        last = tl.max(tl.where((weight > 0.0) & (index <= middle), index, low))
        first = tl.min(tl.where((weight > 0.0) & (index > middle), index, high))
        low, high = tl.where(beyond, low, tl.minimum(first, high)), tl.where(beyond, tl.minimum(last, middle), high)
    return low


@triton.jit
def _load_listed(
    a_ptr, b_ptr, index_ptr, count_ptr, share, alpha, threshold, KIND: tl.constexpr, S: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """Index and x of what the parts of a row have listed, and which places hold anything."""
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
    weight = _weight(x, most, temperature)
    kept = x > -INFINITY
    high = ordered_key(most)
    if TOP_K:
        cut, last = _few_cut(x, index, weight, kept, top_k.to(tl.float32), high, vocab, False)
        kept = kept & _kept(x, index, cut, last)
    if TOP_P:
        if not MASS:
            goal *= tl.sum(tl.where(kept, weight, 0.0))
        cut, last = _few_cut(x, index, weight, kept, goal, high, vocab, True)
        kept = kept & _kept(x, index, cut, last)
    weight = tl.where(kept & (weight >= min_p), weight, 0.0)
    total = tl.sum(weight)
    token = _first_beyond(weight, index, tl.full((), 0, tl.int32), vocab - 1, u * total.to(tl.float64))
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
    mass = tl.load(mass_ptr + part, volatile=True) * _weight(own, most, temperature)
    total = tl.sum(mass)
    goal = u * total.to(tl.float64)
    upto = tl.sum(tl.where(part[None, :] <= part[:, None], mass[None, :], 0.0), 1)
    last = tl.max(tl.where(mass > 0, part, 0))
    chosen = tl.minimum(tl.sum((upto.to(tl.float64) <= goal).to(tl.int32)), last)
    before = tl.max(tl.where(part < chosen, upto, 0.0)).to(tl.float64)
    of_part = tl.max(tl.where(part == chosen, own, -INFINITY))
    unit = _weight(of_part, most, temperature)
    start = chosen * share
    token, _, _ = _draw_from_row(
        a_ptr + start, b_ptr + start, tiles, tl.minimum(share, vocab - start), alpha, threshold, of_part, temperature,
        0, 1.0, 0.0, (goal - before) / unit.to(tl.float64), KIND, False, False, False, BLOCK,
    )  # fmt: skip
    token += start
    a, b = tl.load(a_ptr + token).to(tl.float32), tl.load(b_ptr + token).to(tl.float32)
    return token, contrast(a, b, alpha, threshold, KIND), total


@triton.jit
def _draw_from_row(
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
        _, mass = _weigh(
            a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, cut, last, LOWEST_KEY, 0.0, KIND, BLOCK
        )
        cut, last = _row_cut(
            a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, cut, last, top_p * mass, KIND, BLOCK, True
        )
    goal, total = u, tl.full((), 0.0, tl.float32)
    if OF_ALL:
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


# ---- the kernel


@triton.jit
def _largest_of_part(
    a_ptr, b_ptr, tiles, own, alpha, threshold, KIND: tl.constexpr, GREEDY: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest x per lane, and its first index there."""
    largest, first = tl.full([BLOCK], -INFINITY, tl.float32), tl.zeros([BLOCK], tl.int32)
    for tile in range(0, tiles):
        at, x = _load_x(a_ptr, b_ptr, tile, own, alpha, threshold, KIND, BLOCK)
        if GREEDY:
            first = tl.where(x > largest, at, first)
        largest = tl.maximum(largest, x)
    return largest, first


@triton.jit
def _leave_part(
    a_ptr, b_ptr, index_ptr, value_ptr, most_ptr, mass_ptr, count_ptr, first_ptr, start, tiles, own, alpha, threshold,
    temperature, wanted, KIND: tl.constexpr, FEW: tl.constexpr, GREEDY: tl.constexpr, LISTS: tl.constexpr,
    WEIGHS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, CAPACITY: tl.constexpr,
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
        _, mass = _weigh(
            a_ptr, b_ptr, tiles, own, alpha, threshold, most, temperature, LOWEST_KEY, LAST_INDEX, LOWEST_KEY, 0.0,
            KIND, BLOCK,
        )  # fmt: skip
        tl.store(mass_ptr, mass)


@triton.jit(do_not_specialize=["top_k", "wanted"])
def sample_kernel(
    a_ptr, b_ptr, uniforms_ptr, token_ptr, logprob_ptr, words_ptr, done_ptr, index_ptr, value_ptr, most_ptr, mass_ptr,
    count_ptr, first_ptr, stride_a, stride_b, vocab, share, alpha, temperature, top_k, wanted, top_p, min_p,
    FIRST: tl.constexpr, SECOND: tl.constexpr, S: tl.constexpr, KIND: tl.constexpr, FEW: tl.constexpr,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    LISTS: tl.constexpr, WEIGHS: tl.constexpr, WAITS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    LANES: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """One program per row and part. `done_ptr`: per row how many parts are done, then the next program's number."""
    if WAITS:  # as in the loss: whoever waits, waits for programs that run already
        rows = tl.num_programs(0) // S
        ticket = tl.atomic_add(done_ptr + rows, 1, sem="relaxed").to(tl.int32)
    else:
        ticket = tl.program_id(0)
    row, part = (ticket // S).to(tl.int64), ticket % S
    a_ptr += row * stride_a
    b_ptr += row * stride_b
    words_ptr += row * S * WORDS
    start = part * share
    own = tl.maximum(tl.minimum(share, vocab - start), 0)
    tiles = (own + BLOCK - 1) // BLOCK
    if FIRST:
        _publish_part(a_ptr, b_ptr, words_ptr + part * WORDS, start, tiles, own, BLOCK)
    if SECOND:
        most_ptr += row * S
        mass_ptr += row * S
        count_ptr += row * S
        first_ptr += row * S
        index_ptr += row * S * 2 * CAPACITY
        bad, threshold = _threshold(words_ptr, S)
        if bad == False:  # noqa: E712
            _leave_part(
                a_ptr, b_ptr, index_ptr + part * 2 * CAPACITY, value_ptr + (row * S + part) * CAPACITY, most_ptr + part,
                mass_ptr + part, count_ptr + part, first_ptr + part, start, tiles, own, alpha, threshold, temperature,
                wanted, KIND, FEW, GREEDY, LISTS, WEIGHS, BLOCK, TILES, LANES, CAPACITY,
            )  # fmt: skip
        tl.debug_barrier()  # what the whole program left comes before the count
        done = tl.atomic_add(done_ptr + row, 1, sem="acq_rel") if S > 1 else 0
        if done == S - 1:
            token, logprob = tl.full((), -1, tl.int32), tl.full((), float("nan"), tl.float32)
            if bad == False:  # noqa: E712
                token, logprob = _finish_row(
                    a_ptr, b_ptr, uniforms_ptr + row, index_ptr, most_ptr, mass_ptr, count_ptr, first_ptr, vocab, share,
                    alpha, threshold, temperature, top_k, wanted, top_p, min_p, KIND, FEW, GREEDY, TOP_K, TOP_P, MIN_P,
                    S, BLOCK, CAPACITY,
                )  # fmt: skip
            tl.store(token_ptr + row, token.to(tl.int64))
            tl.store(logprob_ptr + row, logprob)


@triton.jit
def _finish_row(
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
            tiles = (vocab + BLOCK - 1) // BLOCK
            if FEW:
                index, x = _load_listed(a_ptr, b_ptr, index_ptr, count_ptr, share, alpha, threshold, KIND, S, CAPACITY)
                token, drawn, total = _draw_from_few(
                    x, index, vocab, most, temperature, top_k, top_p, min_p, u, True, TOP_P, False
                )
            elif TOP_P or MIN_P:
                index, x = _load_listed(a_ptr, b_ptr, index_ptr, count_ptr, share, alpha, threshold, KIND, S, CAPACITY)
                from_key = _listed_from(x, count_ptr, wanted, S, CAPACITY)
                whole = (x > -INFINITY) & (ordered_key(x) >= from_key)
                weight = _weight(x, most, temperature)
                if TOP_P:
                    mass = tl.load(mass_ptr + parts, volatile=True) * _weight(largest, most, temperature)
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
                    token, drawn, total = _draw_from_row(
                        a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, top_k, top_p, min_p, u,
                        KIND, TOP_K, TOP_P, True, BLOCK,
                    )  # fmt: skip
            elif TOP_K:
                token, drawn, total = _draw_from_row(
                    a_ptr, b_ptr, tiles, vocab, alpha, threshold, most, temperature, top_k, top_p, min_p, u,
                    KIND, TOP_K, TOP_P, True, BLOCK,
                )  # fmt: skip
            else:
                token, drawn, total = _draw_from_part(
                    a_ptr, b_ptr, most_ptr, mass_ptr, (share + BLOCK - 1) // BLOCK, vocab, share, alpha, threshold,
                    most, temperature, u, KIND, S, BLOCK,
                )  # fmt: skip
            logprob = (drawn - most) / temperature - tl.log(total)
    return token, logprob
