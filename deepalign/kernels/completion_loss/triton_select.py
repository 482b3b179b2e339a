"""The kernel that ends a row: M from the candidates, the row's statistics, and the gradient at M."""

import triton
import triton.language as tl

from deepalign.kernels.completion_loss.triton_math import (
    FOR_CENTERED,
    FOR_COUNT,
    FOR_GRADIENT,
    TOTAL,
    WORDS,
    careful_gradient,
    divergence_facts,
    read_words,
    row_facts,
)
from deepalign.kernels.row_math import LOWEST_KEY, finite, ordered_key

CHUNK = tl.constexpr(32)


@triton.jit
def _listed(
    a_ptr, b_ptr, given_ptr, index_ptr, value_ptr, first, end, vocab, FROM_STUDENT: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Places [first, first + CHUNK) of a list: index, s, d's key, d; key LOWEST_KEY where nothing is listed."""
    at = first + tl.arange(0, CHUNK)
    if GIVEN:
        index = tl.load(given_ptr + at, mask=at < end, other=-1)
    else:
        index = tl.load(index_ptr + at, mask=at < end, other=-1).to(tl.int64)
    listed = (index >= 0) & (index < vocab)
    index = tl.where(listed, index, 0)
    s = tl.load(value_ptr + at, mask=listed, other=0.0)
    b = tl.load(b_ptr + index, mask=listed, other=0.0).to(tl.float32)
    if FROM_STUDENT:
        d = b - s
    else:
        d = b - tl.load(a_ptr + index, mask=listed, other=0.0).to(tl.float32)
    if GIVEN:
        # Whatever d is, an entry that exists and is finite counts; its key is never compared.
        key = tl.where(listed & finite(s) & finite(d), 0, LOWEST_KEY)
    else:
        key = tl.where(listed, ordered_key(d), LOWEST_KEY)
    return index, s, key, d


@triton.jit
def _join_lists(index_ptr, value_ptr, found_ptr, S: tl.constexpr, CAPACITY: tl.constexpr):
    """Move what the programs of a row have listed up to one list; return its length.

    Where many programs share a row each lists a few entries, and every list is a chunk of its own to be ranked against
    all others: 1024 steps for 32 programs, 16 for one list of 120. No entry is overwritten before it is read: each
    moves down or stays, those of one chunk together.
    """
    lists = tl.arange(0, S)
    counts = tl.load(found_ptr + lists)
    ends, total = tl.cumsum(counts, 0), tl.sum(counts)
    for first in range(0, total, CHUNK):
        at = first + tl.arange(0, CHUNK)
        free = tl.where(ends[None, :] <= at[:, None], CAPACITY - counts[None, :], 0)
        source = at + tl.sum(free, 1)
        index = tl.load(index_ptr + source, mask=at < total, other=-1)
        value = tl.load(value_ptr + source, mask=at < total, other=0.0)
        tl.store(index_ptr + at, index, mask=at < total)
        tl.store(value_ptr + at, value, mask=at < total)
    tl.store(found_ptr + lists, tl.where(lists == 0, total, 0))  # for a second launch
    tl.debug_barrier()
    return total


@triton.jit
def _rank(
    at, index, key, a_ptr, b_ptr, given_ptr, index_ptr, value_ptr, end, vocab, FROM_STUDENT: tl.constexpr,
    GIVEN: tl.constexpr,
):  # fmt: skip
    """How many listed entries come before these: larger d, or the same and a lower index. Given: equal ones before."""
    rank = tl.zeros([CHUNK], tl.int32)
    for first in range(0, end, CHUNK):
        index_2, _, key_2, _ = _listed(
            a_ptr, b_ptr, given_ptr, index_ptr, value_ptr, first, end, vocab, FROM_STUDENT, GIVEN
        )
        same = key_2[None, :] == key[:, None]
        if GIVEN:
            before = (
                same & (index_2[None, :] == index[:, None]) & ((first + tl.arange(0, CHUNK))[None, :] < at[:, None])
            )
            before = before & (key_2[None, :] > LOWEST_KEY)
        else:
            before = (key_2[None, :] > key[:, None]) | (same & (index_2[None, :] < index[:, None]))
        rank += tl.sum(before.to(tl.int32), 1)
    return rank


@triton.jit
def _write_row(ptr, value, K):
    """Fill K entries with one value."""
    for first in range(0, K, CHUNK):
        at = first + tl.arange(0, CHUNK)
        tl.store(ptr + at, tl.full([CHUNK], value, ptr.dtype.element_ty), mask=at < K)


@triton.jit
def _copy_row(from_ptr, to_ptr, K):
    """Copy K entries of one dtype."""
    for first in range(0, K, CHUNK):
        at = first + tl.arange(0, CHUNK)
        tl.store(to_ptr + at, tl.load(from_ptr + at, mask=at < K), mask=at < K)


@triton.jit
def _write_blank(
    row, given_ptr, loss_ptr, kl_ptr, completion_ptr, alpha_ptr, raise_ptr, out_count_ptr, out_index_ptr,
    out_difference_ptr, K, is_read, bad, DISTILL: tl.constexpr, CENTERED: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """What a row has that is not read (0, -1, -inf) or bad (NaN, -1); what is given is copied out. Others follow it."""
    blank = tl.where(bad, float("nan"), 0.0)
    if GIVEN and is_read & (bad == False):  # noqa: E712
        _copy_row(given_ptr, out_index_ptr, K)
    else:
        _write_row(out_index_ptr, -1, K)
    if not DISTILL:
        _write_row(out_difference_ptr, tl.where(bad, float("nan"), float("-inf")), K)
    else:
        tl.store(loss_ptr + row, blank)
        tl.store(kl_ptr + row, blank)
        tl.store(completion_ptr + row, blank)
        tl.store(alpha_ptr + row, blank)
    tl.store(out_count_ptr + row, tl.full((), 0, tl.int64))
    if CENTERED:
        tl.store(raise_ptr + row, 0.0)


@triton.jit
def _choose(
    a_ptr, b_ptr, g_ptr, listed_ptr, index_ptr, value_ptr, found_ptr, out_index_ptr, out_difference_ptr, vocab, K, mean,
    penalty, raise_by, facts, careful, wd, mix, scale, tau, STATISTICS: tl.constexpr, FIX: tl.constexpr,
    S: tl.constexpr, CAPACITY: tl.constexpr, DISTILL: tl.constexpr, TEACHER_STUDENT: tl.constexpr,
    FROM_STUDENT: tl.constexpr, GIVEN: tl.constexpr, DISTINCT: tl.constexpr,
):  # fmt: skip
    """M among the candidates, each to the place of its rank (STATISTICS), with its gradient (FIX).

    Returns the sums over M of (s - mean)^2 and of s - mean, in fp32.
    """
    squares, offsets = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    end = K if GIVEN else _join_lists(index_ptr, value_ptr, found_ptr, S, CAPACITY)
    for first in range(0, end, CHUNK):
        at = first + tl.arange(0, CHUNK)
        index, s, key, d = _listed(
            a_ptr, b_ptr, listed_ptr, index_ptr, value_ptr, first, end, vocab, FROM_STUDENT, GIVEN
        )
        rank = tl.zeros([CHUNK], tl.int32)
        if not (GIVEN and DISTINCT):
            rank = _rank(
                at, index, key, a_ptr, b_ptr, listed_ptr, index_ptr, value_ptr, end, vocab, FROM_STUDENT, GIVEN
            )
        member = (key > LOWEST_KEY) & (rank < (1 if GIVEN else K))
        e = tl.where(member, s - mean, 0.0)
        squares += e * e
        offsets += e
        if STATISTICS and not GIVEN:
            tl.store(out_index_ptr + rank, index, mask=member)
        if STATISTICS and not DISTILL:
            tl.store(out_difference_ptr + (at if GIVEN else rank), d, mask=member)
        if FIX:
            part_s, part_t, gap, kl = facts
            a = tl.load(a_ptr + index, mask=member, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + index, mask=member, other=0.0).to(tl.float32)
            g = careful_gradient(s, a, b, part_s, part_t, gap, kl, wd, mix, scale, tau, careful, TEACHER_STUDENT)
            g += penalty * e + raise_by
            tl.store(g_ptr + index, g.to(g_ptr.dtype.element_ty), mask=member)
    return squares, offsets


# As of `rows_kernel`.
PER_ROW = [
    *("wd_ptr", "wc_ptr", "given_ptr", "listed_ptr", "raise_ptr", "loss_ptr", "kl_ptr", "completion_ptr", "alpha_ptr"),
    *("out_count_ptr", "out_index_ptr", "out_difference_ptr"),
]


@triton.jit(do_not_specialize=["K"], do_not_specialize_on_alignment=PER_ROW)
def select_kernel(
    a_ptr, b_ptr, g_ptr, wd_ptr, wc_ptr, given_ptr, listed_ptr, words_ptr, index_ptr, value_ptr, found_ptr, count_ptr,
    raise_ptr, loss_ptr, kl_ptr, completion_ptr, alpha_ptr, out_count_ptr, out_index_ptr, out_difference_ptr, stride_a,
    stride_b, stride_g, vocab, K, mix, scale, tau, alpha_base, gamma, lambda_reg, STATISTICS: tl.constexpr, FIX:
    tl.constexpr, S: tl.constexpr, CAPACITY: tl.constexpr, DISTILL: tl.constexpr, TEACHER_STUDENT: tl.constexpr,
    FROM_STUDENT: tl.constexpr, CENTERED: tl.constexpr, GIVEN: tl.constexpr, DISTINCT: tl.constexpr,
):  # fmt: skip
    """One program per row, after all of `rows_kernel`: STATISTICS writes everything per row, FIX the gradient at M."""
    row = tl.program_id(0).to(tl.int64)
    wd, wc = tl.load(wd_ptr + row), tl.load(wc_ptr + row)
    a_ptr += row * stride_a
    b_ptr += row * stride_b
    g_ptr += row * stride_g
    words_ptr += row * S * WORDS
    index_ptr += row * S * CAPACITY
    value_ptr += row * S * CAPACITY
    if GIVEN:
        given_ptr += row * K
        listed_ptr += row * K
    found_ptr += row * S
    out_index_ptr += row * K
    out_difference_ptr += row * K
    is_read = (wd > 0) | (wc > 0)
    COUNT: tl.constexpr = FOR_CENTERED if CENTERED else FOR_GRADIENT if DISTILL else FOR_COUNT
    words = read_words(words_ptr, COUNT, S, False)  # 0 where the row was not read
    bad, careful, present = row_facts(words)
    bad = bad & is_read
    if STATISTICS:
        _write_blank(
            row, given_ptr, loss_ptr, kl_ptr, completion_ptr, alpha_ptr, raise_ptr, out_count_ptr, out_index_ptr,
            out_difference_ptr, K, is_read, bad, DISTILL, CENTERED, GIVEN,
        )  # fmt: skip
        tl.debug_barrier()
    if is_read & (bad == False):  # noqa: E712
        favored = tl.sum(tl.load(count_ptr + row * S + tl.arange(0, S)))
        alpha = alpha_base * (1.0 + gamma * (favored.to(tl.float32) / present))
        mean = tl.sum(words[TOTAL]) / present if CENTERED else 0.0
        if DISTILL:
            facts = divergence_facts(words, careful, scale, tau, TEACHER_STUDENT)
        else:
            facts = ((alpha, alpha), (alpha, alpha), alpha, alpha)
        raise_by = tl.load(raise_ptr + row) if CENTERED and FIX else 0.0
        penalty = tl.where(wc > 0, wc * alpha * 2.0 * lambda_reg, 0.0)
        squares, offsets = _choose(
            a_ptr, b_ptr, g_ptr, listed_ptr, index_ptr, value_ptr, found_ptr, out_index_ptr, out_difference_ptr, vocab,
            K, mean, penalty, raise_by, facts, careful, wd, mix, scale, tau, STATISTICS, FIX, S, CAPACITY, DISTILL,
            TEACHER_STUDENT, FROM_STUDENT, GIVEN, DISTINCT,
        )  # fmt: skip
        if STATISTICS:
            tl.store(out_count_ptr + row, favored.to(tl.int64))
            if CENTERED:
                tl.store(raise_ptr + row, -penalty * tl.sum(offsets) / present)
            if DISTILL:
                completion = lambda_reg * tl.sum(squares)
                kl = tau * tau * facts[3]
                loss = tl.where(wd > 0, wd * kl, 0.0) + tl.where(wc > 0, wc * (alpha * completion), 0.0)
                tl.store(loss_ptr + row, loss)
                tl.store(kl_ptr + row, kl)
                tl.store(completion_ptr + row, completion)
                tl.store(alpha_ptr + row, alpha)
