"""The contrastive sampler on a GPU, in one launch. `reference.py` has the equations.

S programs share a row, each a contiguous part of it; few rows are split until they fill the device. A program sums its
part's partitions and publishes them; with those of all parts it knows the threshold of the contrast, and reads its part
again, from the nearest cache, for its largest x. What it finds it leaves in memory; the program of a row that comes
last draws. Programs draw their numbers in the order in which they start, and a row has no more of them than the device
has multiprocessors, so that those that wait for partitions never keep those they wait for from starting (as in the
loss); for what is left in memory nobody waits.

Whatever the filters leave is {x > cut} and, in the order of their index, the first of those equal to the cut; so is
each filter's own result. A cut is found by bisection over ordered keys, among the listed entries, held in registers:

    top-k up to 1024    every part lists what may be among its k largest (`row_select.py`)
    top-p, min-p        every part lists some hundreds of its largest; where the row is peaked these hold the prefix
                        that top-p asks for, or all that min-p leaves, and that they do is checked
    otherwise           the last program sweeps over the row, for every step of the bisection
    no filter           every part sums its weights: one of them is read again

The draw inverts the CDF in the order of the index, again by bisection: the weights up to an index, a sum whose rounding
is monotonic, are compared with the uniform's share of all. No float64 but for the uniform: sums are trees of fp32.

Device code: `triton_parts.py` up to what is left in memory, `triton_draw.py` from there to the token, `triton_rows.py`
sweeps that both need.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepalign.kernels.completion_loss.triton import MOST_SELECTED, check_per_row, check_rows
from deepalign.kernels.completion_loss.triton_math import WORDS
from deepalign.kernels.contrastive_sample.triton_draw import finish_row
from deepalign.kernels.contrastive_sample.triton_parts import leave_part, publish_part, row_threshold
from deepalign.kernels.launch import (
    ALL_REGISTERS,
    MOST_TOGETHER,
    Launch,
    at_most_registers,
    launch_of,
    most_together,
    split_of_rows,
)
from deepalign.kernels.row_select import CONTRAST, CONTRAST_LOGPROBS

MOST_PARTS = 16  # of a row: the last program reads what all have left
LISTED = 4096  # entries that the parts of a row list together at most
GATHERED = 2048  # entries that `collect` looks into at once: more would not stay in registers


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
    vocab_size: int | None,
    together: bool = True,
) -> tuple[Tensor, Tensor]:
    """The kernel of `deepalign::contrastive_sample`.

    `together=False` launches what is before the wait and what is after it one after the other, as an interpreter must
    that runs one program at a time.
    """
    vocab_size = aligned.shape[-1] if vocab_size is None else vocab_size
    check_rows(vocab_size, aligned=aligned, base=base)
    check_per_row("uniforms", uniforms, aligned, torch.float64)
    _check_options(alpha, temperature, top_k, top_p, min_p, vocab_size)
    greedy, temperature = temperature == 0, min(max(temperature, 1e-37), 3e38)  # what fp32 has as normal numbers
    rows, device = aligned.shape[0], aligned.device
    launch = launch_of("contrastive_sample", device)
    top_k = top_k if 0 < top_k < vocab_size else 0
    few = 0 < top_k <= MOST_SELECTED
    split, capacity, wanted = parts_of_rows(launch, rows, vocab_size, top_k if few else 0, most_together(device))
    lists = not greedy and (few or top_p < 1 or min_p > 0)
    weighs = not greedy and not few and (top_p < 1 or min_p == 0)
    capacity = capacity if lists else 1
    kind = (CONTRAST_LOGPROBS if log_space else CONTRAST).value
    block = launch.block
    tiles = -(-vocab_size // (block * split))  # of a part
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    words = new_words(rows * split * WORDS.value + rows + 1, device)
    index = torch.empty((rows, split, 2 * capacity), dtype=torch.int32, device=device)
    value = torch.empty((rows, split, capacity), dtype=torch.float32, device=device)
    facts = torch.empty((2, rows, split), dtype=torch.float32, device=device)
    counts = torch.empty((2, rows, split), dtype=torch.int32, device=device)

    def launch_kernel(first: bool, second: bool) -> None:
        sample_kernel[(rows * split,)](
            aligned, base, uniforms, tokens, logprobs, words, words[words.numel() - rows - 1 :], index, value, facts[0],
            facts[1], counts[0], counts[1], aligned.stride(0), base.stride(0), vocab_size, tiles * block, alpha,
            temperature, top_k, wanted, top_p, min_p, FIRST=first, SECOND=second, S=split, KIND=kind,
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


def _check_options(alpha: float, temperature: float, top_k: int, top_p: float, min_p: float, vocab_size: int) -> None:
    if not (alpha >= 0 and temperature >= 0 and 0 <= top_k <= vocab_size and 0 < top_p <= 1 and 0 <= min_p <= 1):
        raise RuntimeError(
            "deepalign: expected alpha and temperature >= 0, top_k in [0, vocab_size], top_p in (0, 1] and min_p in "
            f"[0, 1], got {alpha}, {temperature}, {top_k}, {top_p}, {min_p}"
        )


def new_words(entries: int, device: torch.device) -> Tensor:
    """Room for what programs publish, per row how many parts are done, and the number of the next program."""
    return torch.zeros(entries, dtype=torch.int64, device=device)


def parts_of_rows(launch: Launch, rows: int, vocab: int, top_k: int, most: int = MOST_TOGETHER) -> tuple[int, int, int]:
    """Into how many parts a row is split, how many entries each may list, and how many it should."""
    # The second-level caches of an AMD device's dies do not see each other's plain stores within a launch.
    split = 1 if torch.version.hip else split_of_rows(launch, rows, vocab, launch.block, min(most, MOST_PARTS))
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


# Of what has entries per row, the place in memory changes with their number: to compile for it would be once more.
PER_ROW = ["uniforms_ptr", "token_ptr", "logprob_ptr", "most_ptr", "mass_ptr", "count_ptr", "first_ptr"]


@triton.jit(do_not_specialize=["top_k", "wanted"], do_not_specialize_on_alignment=PER_ROW)
def sample_kernel(
    a_ptr, b_ptr, uniforms_ptr, token_ptr, logprob_ptr, words_ptr, done_ptr, index_ptr, value_ptr, most_ptr, mass_ptr,
    count_ptr, first_ptr, stride_a, stride_b, vocab, share, alpha, temperature, top_k, wanted, top_p, min_p,
    FIRST: tl.constexpr, SECOND: tl.constexpr, S: tl.constexpr, KIND: tl.constexpr, FEW: tl.constexpr,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    LISTS: tl.constexpr, WEIGHS: tl.constexpr, WAITS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    LANES: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """One program per row and part. `done_ptr`: per row how many parts are done, then the next program's number."""
    if WAITS:  # as in the loss: numbers are drawn in the order in which programs start
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
        publish_part(a_ptr, b_ptr, words_ptr + part * WORDS, start, tiles, own, BLOCK)
    if SECOND:
        most_ptr += row * S
        mass_ptr += row * S
        count_ptr += row * S
        first_ptr += row * S
        index_ptr += row * S * 2 * CAPACITY
        bad, threshold = row_threshold(words_ptr, S)
        if bad == False:  # noqa: E712
            leave_part(
                a_ptr, b_ptr, index_ptr + part * 2 * CAPACITY, value_ptr + (row * S + part) * CAPACITY, most_ptr + part,
                mass_ptr + part, count_ptr + part, first_ptr + part, start, tiles, own, alpha, threshold, temperature,
                wanted, KIND, GREEDY, LISTS, WEIGHS, BLOCK, TILES, LANES, CAPACITY,
            )  # fmt: skip
        tl.debug_barrier()  # what the whole program left comes before the count
        done = tl.atomic_add(done_ptr + row, 1, sem="acq_rel") if S > 1 else 0
        if done == S - 1:
            token, logprob = tl.full((), -1, tl.int32), tl.full((), float("nan"), tl.float32)
            if bad == False:  # noqa: E712
                token, logprob = finish_row(
                    a_ptr, b_ptr, uniforms_ptr + row, index_ptr, most_ptr, mass_ptr, count_ptr, first_ptr, vocab, share,
                    alpha, threshold, temperature, top_k, wanted, top_p, min_p, KIND, FEW, GREEDY, TOP_K, TOP_P, MIN_P,
                    S, BLOCK, CAPACITY,
                )  # fmt: skip
            tl.store(token_ptr + row, token.to(tl.int64))
            tl.store(logprob_ptr + row, logprob)
