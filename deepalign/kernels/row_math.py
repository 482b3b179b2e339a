"""Triton device functions that the ops share: how a row is read, partitions, bounds, ordered keys.

A row is cut into tiles of BLOCK entries. S programs share it, tile i belonging to program i mod S. A tile is held as
two halves of P = BLOCK / 2 lanes, the even and the odd entries: lane j of all the program's tiles is a *group*, so
that sums and maxima per group need no exchange between threads until the row ends.

ALIGN says how a tile is addressed:
    0   a row may start anywhere: every access is of one entry
    1   rows start at multiples of 16 entries and have a multiple of 16: every access is of 16 bytes
    2   anything else, alike in all tensors: the row's address is rounded down to 16 bytes, `shift` entries too early,
        and only the first and the last tile, which need a mask, are read entry by entry
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
LOWEST_KEY = tl.constexpr(-(2**31))


@triton.jit
def row_shift(row, stride, lead, ALIGN: tl.constexpr):
    """How many entries before the row its 16 bytes begin; lead is the same for the tensor's first entry."""
    if ALIGN == 2:
        return ((lead + row * stride) % 8).to(tl.int32)
    else:
        return tl.full((), 0, tl.int32)


@triton.jit
def row_pointer(ptr, row, stride, lead, ALIGN: tl.constexpr):
    """Where tile 0 of a row begins. `row` is int64: rows * vocabulary passes 2^31."""
    if ALIGN == 2:
        return ptr + ((lead + row * stride) // 8) * 8
    else:
        return ptr + lead + row * stride


@triton.jit
def tile_mask(tile, shift, vocab, BLOCK: tl.constexpr):
    """Which entries of a tile exist."""
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    return (offsets >= shift) & (offsets < shift + vocab)


@triton.jit
def load_tile(ptr, tile, shift, vocab, BLOCK: tl.constexpr, MASKED: tl.constexpr, ALIGN: tl.constexpr):
    """A tile's halves in fp32, -inf where no entry is.

    16-bit entries are read as 32-bit words: a bf16 is then one shift or one mask away from its fp32, where the compiler
    takes one and a half instructions per entry of its own.
    """
    P: tl.constexpr = BLOCK // 2
    element: tl.constexpr = ptr.dtype.element_ty
    if ALIGN != 0 and (not MASKED or ALIGN == 1) and element.primitive_bitwidth == 16:
        words = tile * P + tl.arange(0, P)
        word_ptr = ptr.to(tl.pointer_type(tl.int32))
        if MASKED:
            # 0xff80 is -inf in bf16, 0xfc00 in fp16
            nothing: tl.constexpr = -8323200 if element == tl.bfloat16 else -67044352
            word = tl.load(word_ptr + words, mask=words < vocab // 2, other=nothing)
        else:
            word = tl.load(word_ptr + words)
        return halves_of_word(word, element)
    else:
        offsets = tile * BLOCK + tl.arange(0, BLOCK)
        if MASKED:
            value = tl.load(ptr + offsets, mask=(offsets >= shift) & (offsets < shift + vocab), other=-INFINITY)
        else:
            value = tl.load(ptr + offsets)
        return tl.split(tl.reshape(value.to(tl.float32), [P, 2]))


@triton.jit
def halves_of_word(word, element: tl.constexpr):
    """The two 16-bit entries of a 32-bit word in fp32, the lower address first."""
    if element == tl.bfloat16:
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        high = ((word >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def store_tile(ptr, tile, low, high, shift, vocab, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Round a tile's halves and write them: joined first, so that conversion and store are wide."""
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    value = tl.reshape(tl.join(low, high), [BLOCK]).to(ptr.dtype.element_ty)
    if MASKED:
        tl.store(ptr + offsets, value, mask=(offsets >= shift) & (offsets < shift + vocab))
    else:
        tl.store(ptr + offsets, value)


@triton.jit
def finite(x):
    """Whether x is neither infinite nor NaN, elementwise: NaN compares false."""
    return tl.abs(x) < INFINITY


@triton.jit
def whole_offset(x, scale):
    """x * scale rounded to a whole number of bits: an offset that costs a sum of powers of 2 no digit."""
    return tl.floor(x * scale + 0.5)


@triton.jit
def ordered_key(x):
    """An int32 that orders like the float; -0.0 counts as 0.0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(x == 0.0, 0, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def float_of_key(key):
    """The inverse of `ordered_key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def midpoint(low, high):
    """The middle of two int32, rounded up, without their sum."""
    return (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)


@triton.jit
def lower_bound(maxima, k, ROUNDS: tl.constexpr):
    """A value that at least k of the group maxima reach, near the k-th largest of them; -inf if fewer are present.

    Bisection in the order of the floats, from the two ends of what is there: each round is one count over the groups.
    """
    high = tl.max(maxima)
    low = tl.min(tl.where(maxima > -INFINITY, maxima, INFINITY))
    found = tl.sum((maxima > -INFINITY).to(tl.int32))
    for _ in tl.static_range(ROUNDS):
        middle = 0.5 * low + 0.5 * high
        enough = tl.sum((maxima >= middle).to(tl.int32)) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    # middle may round below low when these are neighbours: still reached by k
    return tl.where(found >= k, low, -INFINITY)


@triton.jit
def count_above(d, threshold, count, MASKED: tl.constexpr):
    """count + 1 where d > threshold.

    Without a mask d is finite and the sign of the difference tells, two instructions instead of three; a sign would
    miscount NaN, which is what a masked tile has where no entry is.
    """
    if MASKED:
        return count + (d > threshold).to(tl.int32)
    else:
        sign = (threshold - d).to(tl.uint32, bitcast=True) >> 31
        return count + sign.to(tl.int32)
