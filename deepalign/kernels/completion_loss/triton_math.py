"""The arithmetic of the completion loss on a GPU: sums over a share of a row, what they say together, the gradient.

Sums are of powers of 2 from an offset. Optimistically the offset is the row's first entry, rounded to whole bits: one
multiply-add per exponential, no running maximum. A sum that is then not finite (an entry 128 bits above the first,
-inf, NaN) makes its program start again *carefully*: true maxima first, absent entries and bad rows told apart,
differences taken before they are scaled. Offsets are in bits in the first case, in logits in the second.
"""

import triton
import triton.language as tl

from deepalign.kernels.launch import MOST_TOGETHER
from deepalign.kernels.row_math import INFINITY, LN2, LOG2E, finite, whole_offset

# Words that a program publishes about its share of a row, 64 bits each: an fp32 value and, above it, the tag 1. Value
# and flag in one word need no fence. Who reads any reads all up to the last that it needs, so their order is by reader.
OFFSET_R = tl.constexpr(0)
SUM_R = tl.constexpr(1)
OFFSET_B = tl.constexpr(2)
SUM_B = tl.constexpr(3)
LEAST = tl.constexpr(4)
PRESENT = tl.constexpr(5)
BAD = tl.constexpr(6)
CAREFUL = tl.constexpr(7)
FOR_COUNT = tl.constexpr(8)  # how many words the count needs, and how many entries are present
OFFSET_S = tl.constexpr(8)
SUM_S = tl.constexpr(9)
OFFSET_T = tl.constexpr(10)
SUM_T = tl.constexpr(11)
DIVERGENCE = tl.constexpr(12)
FOR_GRADIENT = tl.constexpr(13)  # how many the distillation and its gradient need
TOTAL = tl.constexpr(13)
FOR_CENTERED = tl.constexpr(14)  # how many the mean of s needs
BOUND = tl.constexpr(14)
WORDS = tl.constexpr(16)

WARP = tl.constexpr(MOST_TOGETHER)  # lanes that branch together


@triton.jit
def publish(words_ptr, word: tl.constexpr, value):
    """Write one of this program's words: an fp32 scalar and the tag in one 64-bit store."""
    bits = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(words_ptr + word, bits | (1 << 32))


@triton.jit
def _look(ptrs, COUNT: tl.constexpr, WAIT: tl.constexpr):
    """COUNT words from each pointer on as they are now, and the tag that all have in common: loads of which none waits
    for another."""
    words = (tl.load(ptrs, volatile=WAIT),)
    for word in tl.static_range(1, COUNT):
        words += (tl.load(ptrs + word, volatile=WAIT),)  # type: ignore[assignment]  # unrolled
    together = words[0]
    for word in tl.static_range(1, COUNT):
        together = together & words[word]
    return words, (together >> 32).to(tl.int32)


@triton.jit
def _value(words, S: tl.constexpr):
    """What a word says, (S,) fp32."""
    return tl.max(tl.reshape(words.to(tl.int32), [WARP // S, S]), 0).to(tl.float32, bitcast=True)


@triton.jit
def read_words(words_ptr, COUNT: tl.constexpr, S: tl.constexpr, WAIT: tl.constexpr):
    """The first COUNT words of all S programs, a tuple of (S,) fp32 values; with WAIT only when all are there.

    One wait for all: waits one after the other are as many round trips to the second-level cache, though nothing is
    left to wait for. A warp decides together whether to wait on: with one lane per program the others would read the
    same words, see them at another moment and leave the loop alone, while the rest wait for them in the reduction.

    The values must not all be dropped: a pass of Triton 3.6 fails on a loop that then yields nothing.
    """
    ptrs = words_ptr + (tl.arange(0, WARP) % S) * WORDS
    words, tags = _look(ptrs, COUNT, WAIT)
    if WAIT:
        while tl.min(tags) == 0:
            words, tags = _look(ptrs, COUNT, WAIT)
    return [_value(word, S) for word in words]


@triton.jit
def exponential(x, offset, scale, FROM_LOGITS: tl.constexpr):
    """2^(x scale - offset) in fp32, of x's shape; FROM_LOGITS: the offset is in logits, and differenced first."""
    if FROM_LOGITS:
        return tl.exp2((x - offset) * scale)
    else:
        return tl.exp2(x * scale - offset)


@triton.jit
def accumulate(
    s, a, b, here, sums, offsets, mix, scale, MASKED: tl.constexpr, FROM_LOGITS: tl.constexpr,
    DISTILL: tl.constexpr, TEACHER_STUDENT: tl.constexpr, FROM_STUDENT: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """Add entries, those `here`, to sums per lane: of exp s/tau, t/tau, r and b, of p (s - t), of s; and d's extremes.

    The sum of p (s - t) also watches over the inputs: any NaN or infinity in a row makes it, or a sum, not finite.
    """
    sum_s, sum_t, sum_r, sum_b, divergence, total, largest, least = sums
    offset_s, offset_t, offset_r, offset_b = offsets
    lift = b - a  # in fp32: bf16 spacing at |z| ~ 16 is 0.125, and top-k would be all ties
    r = s if FROM_STUDENT else a
    d = b - r
    e_b = exponential(b, offset_b, LOG2E, FROM_LOGITS)
    e_r = exponential(r, offset_r, LOG2E, FROM_LOGITS)
    if DISTILL:
        t = a + mix * lift
        e_s = exponential(s, offset_s, scale, FROM_LOGITS)
        e_t = exponential(t, offset_t, scale, FROM_LOGITS)
        term = e_t * (t - s) if TEACHER_STUDENT else e_s * (s - t)
    else:
        e_s, e_t, term = e_b, e_r, e_b * d
    d_or_more = d
    if MASKED:
        d_or_more = tl.where(here, d, INFINITY)
        e_s, e_t = tl.where(here, e_s, 0.0), tl.where(here, e_t, 0.0)
        e_r, e_b = tl.where(here, e_r, 0.0), tl.where(here, e_b, 0.0)
        term, d, s = tl.where(here, term, 0.0), tl.where(here, d, -INFINITY), tl.where(here, s, 0.0)
    if DISTILL:
        sum_s, sum_t = sum_s + e_s, sum_t + e_t
    if CENTERED:
        total += s
    largest, least = tl.maximum(largest, d), tl.minimum(least, d_or_more)
    return sum_s, sum_t, sum_r + e_r, sum_b + e_b, divergence + term, total, largest, least


@triton.jit
def measure(s, a, b, exists, found, mix, FROM_STUDENT: tl.constexpr):
    """Maxima of s, t, r and b over present entries; how many are present, and how many neither that nor absent."""
    most_s, most_t, most_r, most_b, present, bad = found
    here = exists & finite(s) & finite(a) & finite(b)
    absent = (s == -INFINITY) & (a == -INFINITY) & (b == -INFINITY)
    most_s = tl.maximum(most_s, tl.where(here, s, -INFINITY))
    most_t = tl.maximum(most_t, tl.where(here, a + mix * (b - a), -INFINITY))
    most_r = tl.maximum(most_r, tl.where(here, s if FROM_STUDENT else a, -INFINITY))
    most_b = tl.maximum(most_b, tl.where(here, b, -INFINITY))
    present += here.to(tl.int32)
    bad += (exists & (here | absent == False)).to(tl.int32)  # noqa: E712  (`not` is not elementwise)
    return most_s, most_t, most_r, most_b, present, bad


@triton.jit
def optimistic_offsets(s, a, b, mix, scale, FROM_STUDENT: tl.constexpr):
    """From the row's first entry, scalars."""
    t = a + mix * (b - a)
    r = s if FROM_STUDENT else a
    return whole_offset(s, scale), whole_offset(t, scale), whole_offset(r, LOG2E), whole_offset(b, LOG2E)


@triton.jit
def _offset(offset, from_logits, careful, scale):
    """The programs' offsets in one unit: bits, or logits if the row is careful."""
    return tl.where(careful, tl.where(from_logits > 0, offset, tl.div_rn(offset, scale)), offset)


@triton.jit
def partition(offset, total, from_logits, careful, scale):
    """Offset and log2 of the sum from it, over all programs; offset in bits, or in logits if the row is careful."""
    offset = _offset(offset, from_logits, careful, scale)
    most = tl.max(tl.where(total > 0, offset, -INFINITY))
    bits = (offset - most) * tl.where(careful, scale, 1.0)
    return most, tl.log2(tl.sum(tl.where(total > 0, total * tl.exp2(bits), 0.0)))


@triton.jit
def partition_difference(left, right, careful, scale):
    """In nats; exactly 0 for equal sums, and no digits lost to a large common offset."""
    bits = (left[0] - right[0]) * tl.where(careful, scale, 1.0) + (left[1] - right[1])
    return bits * LN2


@triton.jit
def row_facts(words):
    """Whether the row is bad, and careful; how many entries are present."""
    present = tl.sum(words[PRESENT])
    bad = (tl.sum(words[BAD]) > 0) | (present == 0)
    return bad, tl.sum(words[CAREFUL]) > 0, present


@triton.jit
def favored_threshold(words, careful):
    """lse(b) - lse(r): what d must exceed to count as base-favored.

    It is a mean of d, so at least the least d; rounding may say otherwise where the models are equal but for a shift,
    and all entries would count.
    """
    b = partition(words[OFFSET_B], words[SUM_B], words[CAREFUL], careful, LOG2E)
    r = partition(words[OFFSET_R], words[SUM_R], words[CAREFUL], careful, LOG2E)
    return tl.maximum(partition_difference(b, r, careful, LOG2E), tl.min(words[LEAST]))


@triton.jit
def divergence_facts(words, careful, scale, tau, TEACHER_STUDENT: tl.constexpr):
    """lse(s/tau), lse(t/tau) as (offset, log2 of the sum), their difference in nats, and KL at temperature tau."""
    part_s = partition(words[OFFSET_S], words[SUM_S], words[CAREFUL], careful, scale)
    part_t = partition(words[OFFSET_T], words[SUM_T], words[CAREFUL], careful, scale)
    gap = partition_difference(part_s, part_t, careful, scale)
    part = part_t if TEACHER_STUDENT else part_s
    offset = _offset(words[OFFSET_T if TEACHER_STUDENT else OFFSET_S], words[CAREFUL], careful, scale)
    share = tl.exp2((offset - part[0]) * tl.where(careful, scale, 1.0) - part[1])
    terms = tl.where(share > 0, words[DIVERGENCE] * share, 0.0)
    mean = tl.sum(terms) / tau  # E[s - t] / tau under p, or E[t - s] / tau under q
    kl = mean + gap if TEACHER_STUDENT else mean - gap
    return part_s, part_t, gap, kl


@triton.jit
def fast_weights(part_s, part_t, gap, kl, wd, tau, TEACHER_STUDENT: tl.constexpr):
    """Constants of the gradient's two multiply-adds: exponents' constants, and factors.

    offset + log2(sum) is rounded once; what the rounding lost goes into the factors.
    """
    lse_s, lse_t = part_s[0] + part_s[1], part_t[0] + part_t[1]
    lost_s = tl.exp2((lse_s - part_s[0]) - part_s[1])
    lost_t = tl.exp2((lse_t - part_t[0]) - part_t[1])
    if TEACHER_STUDENT:
        return lse_s, lse_t, wd * tau * lost_s, -wd * tau * lost_t
    else:
        return lse_s, lse_t, wd * lost_s, tl.where(wd > 0, -wd * tau * lost_s * (gap + kl), 0.0)


@triton.jit
def fast_gradient(s, a, b, weights, mix, scale, TEACHER_STUDENT: tl.constexpr):
    """The distillation's gradient, wD tau p (log p - log q - KL) or wD tau (p - q), of finite entries."""
    lse_s, lse_t, first, second = weights
    t = a + mix * (b - a)
    p = tl.exp2(s * scale - lse_s)
    if TEACHER_STUDENT:
        return p * first + tl.exp2(t * scale - lse_t) * second
    else:
        return p * ((s - t) * first + second)


@triton.jit
def careful_gradient(s, a, b, part_s, part_t, gap, kl, wd, mix, scale, tau, careful, TEACHER_STUDENT: tl.constexpr):
    """The same for any row; 0 where an entry is not finite or wD is 0."""
    t = a + mix * (b - a)
    x, y = s * tl.where(careful, 1.0, scale), t * tl.where(careful, 1.0, scale)
    unit = tl.where(careful, scale, 1.0)
    p = tl.exp2((x - part_s[0]) * unit - part_s[1])
    if TEACHER_STUDENT:
        g = wd * tau * (p - tl.exp2((y - part_t[0]) * unit - part_t[1]))
    else:
        g = wd * tau * p * ((s - t) / tau - gap - kl)
    return tl.where(wd > 0, tl.where(finite(s) & finite(a) & finite(b), g, 0.0), 0.0)
