"""The position statistics on a GPU. `reference.py` has the equations.

`base_favored_tokens` is the loss's kernel without its distillation: one pass for the partitions, the bound and the
candidates, a second for the count.

`position_divergence` takes one program per row and three sweeps: maxima, with what is absent or bad; partitions and
both divergences; then the Jensen-Shannon divergence and the count. It serves diagnosis, where the models' forward
passes cost a thousand times more, so it is plain: 12 bytes per bf16 entry, of which rows in cache save some.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepalign.kernels.completion_loss.triton import MOST_SELECTED, TILE_LIMIT, Options, check_rows, run_rows
from deepalign.kernels.eager_math import top_k_lowest_index
from deepalign.kernels.launch import launch_of
from deepalign.kernels.row_math import INFINITY, LN2, LOG2E, finite, lower_bound
from deepalign.kernels.row_select import ENTRY, collect, write_largest

BOUND_ROUNDS = tl.constexpr(8)
CHUNK = tl.constexpr(32)


def base_favored_tokens(aligned: Tensor, base: Tensor, top_k: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel of `deepalign::base_favored_tokens`."""
    return favored(aligned, base, top_k, vocab_size, together=True)


def favored(
    aligned: Tensor, base: Tensor, top_k: int, vocab_size: int, together: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, differences, count; `together` as of `completion_loss_`."""
    ones = torch.ones(aligned.shape[0], device=aligned.device)
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
    block = launch.block * 2 // aligned.element_size()
    tiles = triton.next_power_of_2(-(-vocab_size // block))
    lanes = min(triton.next_power_of_2(2 * top_n), block // 2, max(1, TILE_LIMIT // (2 * tiles)))
    capacity = triton.next_power_of_2(max(min(top_n, MOST_SELECTED), lanes))
    floats = torch.empty((4, rows), device=device)
    counts = torch.empty((2, rows), dtype=torch.int64, device=device)
    index = torch.empty((rows, capacity), dtype=torch.int32, device=device)
    value = torch.empty((rows, capacity), device=device)
    listed = top_n > MOST_SELECTED
    top = torch.stack([_largest(logits, vocab_size, top_n) for logits in (aligned, base)]) if listed else None
    if top is None:
        top = torch.empty((2, rows, top_n), dtype=torch.int64, device=device)
    if rows:
        divergence_kernel[(rows,)](
            aligned,
            base,
            *floats,
            *counts,
            index,
            value,
            top[0],
            top[1],
            aligned.stride(0),
            base.stride(0),
            vocab_size,
            top_n,
            BLOCK=block,
            TILES=tiles,
            LANES=lanes,
            CAPACITY=capacity,
            LISTED=listed,
            num_warps=launch.warps,
            enable_fp_fusion=True,
        )  # fmt: skip
    return (*floats.unbind(), *counts.unbind())


def _largest(logits: Tensor, vocab_size: int, top_n: int) -> Tensor:
    """The indices of the largest logits by torch's sort, -1 where fewer are finite; for a top that no program lists."""
    values = logits[:, :vocab_size].float()
    present = values.isfinite()
    index, here = top_k_lowest_index(torch.where(present, values, 0.0), present, top_n)
    return torch.where(here, index, -1)


@triton.jit
def _load(ptr, tile, vocab, BLOCK: tl.constexpr):
    at = tile * BLOCK + tl.arange(0, BLOCK)
    return tl.load(ptr + at, mask=at < vocab, other=-INFINITY).to(tl.float32)


@triton.jit
def _twice_jsd_share(u):
    """h(x) = (1 + x) log(1 + x) + (1 - x) log(1 - x) of x = tanh(u / 2), where u = log q - log p.

    p log(2p / (p + q)) + q log(2q / (p + q)) = (p + q) / 2 h(x). Near 0 by its series, whose terms are all positive.
    """
    e = tl.exp(-tl.abs(u))
    more, less = 1.0 / (1.0 + e), e / (1.0 + e)  # (1 + |x|) / 2, (1 - |x|) / 2
    square = u * u
    near = 0.5 * u * (1.0 - square * (1.0 / 12.0 - square * (1.0 / 120.0)))
    x = tl.where(square < 0.0625, near, more - less)
    y = x * x
    series = y * (1.0 + y * (1 / 6 + y * (1 / 15 + y * (1 / 28 + y * (1 / 45 + y * (1 / 66 + y * (1 / 91)))))))
    far = 2.0 * more * (LN2 + tl.log(more)) + 2.0 * less * tl.where(less > 0, LN2 + tl.log(less), 0.0)
    return tl.where(y < 0.16, series, far)


@triton.jit
def _partitions(a_ptr, b_ptr, tiles, vocab, most_a, most_b, BLOCK: tl.constexpr):
    """Sums of exp(a - max), exp(b - max), and of these times b - a."""
    sum_a, sum_b = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    lift_a, lift_b = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for tile in range(0, tiles):
        a, b = _load(a_ptr, tile, vocab, BLOCK), _load(b_ptr, tile, vocab, BLOCK)
        here = finite(a) & finite(b)
        e_a = tl.where(here, tl.exp2((a - most_a) * LOG2E), 0.0)
        e_b = tl.where(here, tl.exp2((b - most_b) * LOG2E), 0.0)
        sum_a += e_a
        sum_b += e_b
        lift_a += tl.where(here, e_a * (b - a), 0.0)
        lift_b += tl.where(here, e_b * (b - a), 0.0)
    return tl.sum(sum_a), tl.sum(sum_b), tl.sum(lift_a), tl.sum(lift_b)


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


@triton.jit(do_not_specialize=["n"])
def divergence_kernel(
    a_ptr, b_ptr, kl_ptr, reverse_ptr, jsd_ptr, overlap_ptr, count_ptr, in_top_ptr, index_ptr, value_ptr, a_top_ptr,
    b_top_ptr, stride_a, stride_b, vocab, n, BLOCK: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr,
    CAPACITY: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = BLOCK // 2
    row = tl.program_id(0).to(tl.int64)
    a_ptr += row * stride_a
    b_ptr += row * stride_b
    index_ptr += row * CAPACITY
    value_ptr += row * CAPACITY
    a_top_ptr += row * n
    b_top_ptr += row * n
    tiles = (vocab + BLOCK - 1) // BLOCK
    lanes_a, lanes_b = tl.full([BLOCK], -INFINITY, tl.float32), tl.full([BLOCK], -INFINITY, tl.float32)
    present, absent = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for tile in range(0, tiles):
        a, b = _load(a_ptr, tile, vocab, BLOCK), _load(b_ptr, tile, vocab, BLOCK)
        here = finite(a) & finite(b)
        present += here.to(tl.int32)
        absent += ((a == -INFINITY) & (b == -INFINITY)).to(tl.int32)
        lanes_a = tl.maximum(lanes_a, tl.where(here, a, -INFINITY))
        lanes_b = tl.maximum(lanes_b, tl.where(here, b, -INFINITY))
    n_present = tl.sum(present)
    bad = (n_present == 0) | (n_present + tl.sum(absent) < tiles * BLOCK)
    nan = float("nan")
    kl, reverse, jsd, overlap = nan, nan, nan, nan
    total, in_top = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    if bad == False:  # noqa: E712
        most_a, most_b = tl.max(lanes_a), tl.max(lanes_b)
        z_a, z_b, lift_a, lift_b = _partitions(a_ptr, b_ptr, tiles, vocab, most_a, most_b, BLOCK)
        log_a, log_b = tl.log(z_a), tl.log(z_b)
        threshold = (most_b - most_a) + (log_b - log_a)
        kl = threshold - lift_a / z_a
        reverse = lift_b / z_b - threshold
        twice, counted = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
        for tile in range(0, tiles):
            a, b = _load(a_ptr, tile, vocab, BLOCK), _load(b_ptr, tile, vocab, BLOCK)
            here = finite(a) & finite(b)
            counted += (here & (b - a > threshold)).to(tl.int32)
            p = tl.exp2((a - most_a - log_a) * LOG2E)
            q = tl.exp2((b - most_b - log_b) * LOG2E)
            twice += tl.where(here, 0.5 * (p + q) * _twice_jsd_share((b - a) - threshold), 0.0)
        jsd = 0.5 * tl.sum(twice)
        total = tl.sum(counted)
        if not LISTED:
            pairs_a, pairs_b = tl.max(tl.reshape(lanes_a, [P, 2]), 1), tl.max(tl.reshape(lanes_b, [P, 2]), 1)
            found = collect(
                a_ptr, b_ptr, a_ptr, index_ptr, value_ptr, pairs_a, lower_bound(pairs_a, n, BOUND_ROUNDS), n, 0, tiles,
                vocab, 0, 0.0, 0.0, ENTRY, 1, BLOCK, TILES, LANES, CAPACITY,
            )  # fmt: skip
            tl.debug_barrier()
            write_largest(a_ptr, index_ptr, found, n, a_top_ptr)
            tl.debug_barrier()
            found = collect(
                b_ptr, a_ptr, b_ptr, index_ptr, value_ptr, pairs_b, lower_bound(pairs_b, n, BOUND_ROUNDS), n, 0, tiles,
                vocab, 0, 0.0, 0.0, ENTRY, 1, BLOCK, TILES, LANES, CAPACITY,
            )  # fmt: skip
            tl.debug_barrier()
            write_largest(b_ptr, index_ptr, found, n, b_top_ptr)
            tl.debug_barrier()
        size, common, in_top = _shared(a_top_ptr, b_top_ptr, a_ptr, b_ptr, threshold, n)
        overlap = common.to(tl.float32) / size.to(tl.float32)
    tl.store(kl_ptr + row, kl)
    tl.store(reverse_ptr + row, reverse)
    tl.store(jsd_ptr + row, jsd)
    tl.store(overlap_ptr + row, overlap)
    tl.store(count_ptr + row, total.to(tl.int64))
    tl.store(in_top_ptr + row, in_top.to(tl.int64))
