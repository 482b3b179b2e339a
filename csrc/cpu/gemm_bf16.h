// out (rows, columns) = left (rows, depth) right (depth, columns), or added to out: products of bfloat16 entries, summed
// and kept in fp32. torch's own products of bfloat16 matrices round their result to bfloat16 on a CPU, and logits rounded
// to bfloat16 are too coarse for a difference of two models.
//
// One instruction of AVX-512 BF16 multiplies 16 pairs of entries and adds both products to 16 floats. Its operands are
// pairs along the depth, so both matrices are packed: a panel of the left one holds kRows dwords (pairs) per step, a
// panel of the right one kColumns. A tile of kRows x kColumns sums stays in 24 of the 32 registers. Blocks as usual: a
// block of the right matrix (kDepth x kPanels panels) stays in the second-level cache, one panel of it about in the first,
// while panels of the left one pass by. Threads share nothing: each has its own columns, and packs the left for itself.
//
// A left matrix in fp32 is multiplied as two terms, each entry's bfloat16 and what rounding it lost. Rounded only, a
// gradient of logits would give the gradients of hidden states 1.4 times the error that an fp32 product has. The second
// terms matter where the first are large, and in a row of a gradient few are: those of entries below the row's level are
// dropped, the others listed row by row and multiplied by themselves. `row_levels` chooses the levels: what is dropped
// belongs to 1/64 of a row's sum of squares at most.
//
// An out that is larger than the caches and written once, logits of short hidden states, is written past them: a store
// reads its cache line first otherwise, which at depth 64 to 256 costs a tenth of the time or more.
//
// Every entry of out is summed in the order of the depth, whatever the other rows and columns are: the result does not
// depend on how rows are cut into chunks, nor on the number of threads. The instruction takes subnormals for 0.
#pragma once

#include "gemm_bf16_pack.h"

namespace deepalign {
namespace DEEPALIGN_ISA {

constexpr int64_t kCached = 16 << 20;  // bytes of out up to which it may still be in cache when it is read

// What rounding to bfloat16 loses of the entries whose magnitude reaches a level, 0 for the others.
DEEPALIGN_INLINE __m512 lost(__m512 x, __m512 level) {
  const __m512i rounded = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16);
  return _mm512_maskz_sub_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(x), level, _CMP_GE_OQ), x, _mm512_castsi512_ps(rounded));
}

// Second terms of a panel of the left matrix, listed row by row: pairs along the depth, and where they belong.
struct SecondTerms {
  uint32_t* pairs;
  int32_t* steps;    // of the right panel, in dwords
  int64_t capacity;  // of a row's list
  int64_t count[kRows];

  // The listed entries begin at `from`; `levels`: one for each line that is contiguous (see pack), or null.
  DEEPALIGN_INLINE void list(const float* from, int64_t stride_row, int64_t stride_depth, int64_t rows, int64_t depth,
                             const float* levels) {
    for (int64_t r = 0; r < kRows; ++r) count[r] = 0;
    if (stride_depth == 1) {
      for (int64_t r = 0; r < rows; ++r) list_row(from + r * stride_row, depth, levels ? levels[r] : 0.0f, r);
    } else {
      list_steps(from, stride_depth, rows, depth, levels);
    }
  }

 private:
  // Stores 16 at a time: beyond a row's list lies the next one's, which is written later, or room at the end.
  DEEPALIGN_INLINE void list_row(const float* from, int64_t depth, float level, int64_t row) {
    const __m512 wide = _mm512_set1_ps(level);
    const __m512i within = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t k = 0; k < depth; k += 32) {
      const __m512 low = _mm512_maskz_loadu_ps(lanes(depth - k), from + k);
      const __m512 high = _mm512_maskz_loadu_ps(lanes(depth - k - 16), from + (depth - k > 16 ? k + 16 : 0));
      if (!(_mm512_cmp_ps_mask(_mm512_abs_ps(low), wide, _CMP_GE_OQ) | _mm512_cmp_ps_mask(_mm512_abs_ps(high), wide, _CMP_GE_OQ))) continue;
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(lost(high, wide), lost(low, wide));
      const __mmask16 kept = _mm512_test_epi32_mask(both, both);
      const __m512i step = _mm512_mullo_epi32(_mm512_add_epi32(within, _mm512_set1_epi32(int(k / 2))), _mm512_set1_epi32(int(kColumns)));
      const int64_t at = row * capacity + count[row];
      _mm512_storeu_si512(pairs + at, _mm512_maskz_compress_epi32(kept, both));
      _mm512_storeu_si512(steps + at, _mm512_maskz_compress_epi32(kept, step));
      count[row] += __builtin_popcount(kept);
    }
  }

  DEEPALIGN_INLINE void list_steps(const float* from, int64_t stride_depth, int64_t rows, int64_t depth, const float* levels) {
    const __mmask16 here = lanes(std::min(rows, kRows));
    for (int64_t k = 0; k < depth; k += 2) {
      const bool paired = k + 1 < depth;
      const __m512 level_low = _mm512_set1_ps(levels ? levels[k] : 0.0f), level_high = _mm512_set1_ps(levels && paired ? levels[k + 1] : 0.0f);
      const __m512 low = _mm512_maskz_loadu_ps(here, from + k * stride_depth);
      const __m512 high = _mm512_maskz_loadu_ps(paired ? here : __mmask16(0), from + (paired ? k + 1 : k) * stride_depth);
      if (!((_mm512_cmp_ps_mask(_mm512_abs_ps(low), level_low, _CMP_GE_OQ) | _mm512_cmp_ps_mask(_mm512_abs_ps(high), level_high, _CMP_GE_OQ)) & here)) continue;
      const __m512i both = interleave((__m256i)_mm512_cvtneps_pbh(lost(low, level_low)), (__m256i)_mm512_cvtneps_pbh(lost(high, level_high)));
      alignas(64) uint32_t each[16];
      _mm512_store_si512(each, both);
      for (uint32_t kept = _mm512_test_epi32_mask(both, both); kept; kept &= kept - 1) {
        const int64_t row = __builtin_ctz(kept), at = row * capacity + count[row]++;
        pairs[at] = each[row], steps[at] = int32_t(k / 2 * kColumns);
      }
    }
  }
};

// The lines of memory that the next block of the right matrix will be packed from, a share of them fetched into the
// second-level cache beside every tile of this one: packing would wait for memory otherwise (15% of the time at 64 rows).
struct Prefetch {
  const char* from;
  int64_t stride, bytes, lines;  // contiguous bytes of every line
  int64_t next;                  // how many cache lines have been fetched

  DEEPALIGN_INLINE int64_t per_line() const { return (bytes + 63) / 64; }
  DEEPALIGN_INLINE int64_t left() const { return lines * per_line() - next; }
  DEEPALIGN_INLINE int64_t addresses(int64_t wanted, const char** to) {
    const int64_t count = std::min(wanted, left());
    if (count <= 0) return 0;
    int64_t line = next / per_line(), at = next % per_line();
    for (int64_t i = 0; i < count; ++i) {
      to[i] = from + line * stride + 64 * at;
      if (++at == per_line()) at = 0, ++line;
    }
    next += count;
    return count;
  }
};

struct Sums {
  __m512 at[kRows][3];
};

DEEPALIGN_INLINE void step(const uint32_t* left, const uint32_t* right, Sums& sums) {
  const __m512bh r0 = (__m512bh)_mm512_load_si512(right), r1 = (__m512bh)_mm512_load_si512(right + 16),
                 r2 = (__m512bh)_mm512_load_si512(right + 32);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const __m512bh l = (__m512bh)_mm512_set1_epi32(int(left[r]));
    sums.at[r][0] = _mm512_dpbf16_ps(sums.at[r][0], l, r0);
    sums.at[r][1] = _mm512_dpbf16_ps(sums.at[r][1], l, r1);
    sums.at[r][2] = _mm512_dpbf16_ps(sums.at[r][2], l, r2);
  }
}

// One row's second terms times the right panel. Two sums each: the instruction takes longer than three of them.
DEEPALIGN_INLINE void add_listed(const uint32_t* pairs, const int32_t* steps, int64_t count, const uint32_t* right, __m512 sums[3]) {
  __m512 more[3] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t q = 0;
  for (; q + 2 <= count; q += 2) {
    const __m512bh l = (__m512bh)_mm512_set1_epi32(int(pairs[q])), m = (__m512bh)_mm512_set1_epi32(int(pairs[q + 1]));
#pragma GCC unroll 3
    for (int g = 0; g < 3; ++g) {
      sums[g] = _mm512_dpbf16_ps(sums[g], l, (__m512bh)_mm512_load_si512(right + steps[q] + 16 * g));
      more[g] = _mm512_dpbf16_ps(more[g], m, (__m512bh)_mm512_load_si512(right + steps[q + 1] + 16 * g));
    }
  }
#pragma GCC unroll 3
  for (int g = 0; g < 3; ++g) {
    if (q < count) {
      const __m512bh l = (__m512bh)_mm512_set1_epi32(int(pairs[q]));
      sums[g] = _mm512_dpbf16_ps(sums[g], l, (__m512bh)_mm512_load_si512(right + steps[q] + 16 * g));
    }
    sums[g] = _mm512_add_ps(sums[g], more[g]);
  }
}

// A tile of out: rows x columns of it exist. `second`: null if there are no second terms. `fetch`: `fetches` <= pairs
// addresses to prefetch on the way. `stream`: out is not added to, and its cache lines are written past the caches.
DEEPALIGN_INLINE void tile(const uint32_t* left, const uint32_t* right, int64_t pairs, const SecondTerms* second, float* out,
                           int64_t stride, int64_t rows, int64_t columns, bool add, bool stream, const char* const* fetch, int64_t fetches) {
  Sums sums;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    sums.at[r][0] = sums.at[r][1] = sums.at[r][2] = _mm512_setzero_ps();
    if (!second) continue;
    const int64_t list = r * second->capacity;
    add_listed(second->pairs + list, second->steps + list, second->count[r], right, sums.at[r]);
  }
  int64_t p = 0;
  for (; p < fetches; ++p, left += kRows, right += kColumns) {
    _mm_prefetch(fetch[p], _MM_HINT_T1);
    step(left, right, sums);
  }
  for (; p < pairs; ++p, left += kRows, right += kColumns) step(left, right, sums);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
#pragma GCC unroll 3
    for (int g = 0; g < 3; ++g) {
      float* at = out + r * stride + 16 * g;
      const __mmask16 mask = lanes(columns - 16 * g);
      const __m512 sum = add ? _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), sums.at[r][g]) : sums.at[r][g];
      if (stream && mask == __mmask16(0xffff)) {
        _mm512_stream_ps(at, sum);
      } else {
        _mm512_mask_storeu_ps(at, mask, sum);
      }
    }
  }
}

// One thread's columns of out.
template <class T>
class GemmColumns {
 public:
  GemmColumns(const GemmArgs& args, int64_t first, int64_t last)
      : args_(args), first_(first), last_(last),
        panels_(kPanels * std::max<int64_t>(1, kDepth / std::max<int64_t>(64, args.depth + args.depth % 2))),
        stream_(streams(args)),
        memory_(size_t(((1 + kListed) * kLeftPanels * kRows + kPanels * kColumns) * kDepth / 2 + 32)),
        steps_(size_t(kListed * (kLeftPanels * kRows * kDepth / 2 + 16))) {
    right_ = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) & ~uintptr_t(63));
    left_ = right_ + kPanels * kColumns * kDepth / 2;
  }

  void run() {
    for (int64_t j = first_; j < last_; j += panels_ * kColumns) {
      for (int64_t k = 0; k < args_.depth; k += kDepth) block(j, k);
    }
    if (stream_) _mm_sfence();  // other threads read what was written past the caches
  }

 private:
  static constexpr int64_t kListed = std::is_same_v<T, float>;  // second terms

  static bool streams(const GemmArgs& args) {
    const bool whole_lines = reinterpret_cast<uintptr_t>(args.out) % 64 == 0 && args.out_stride % 16 == 0;
    return whole_lines && !args.accumulate && args.depth <= kDepth && 4 * args.rows * args.columns > kCached;
  }

  int64_t columns_at(int64_t j) const { return std::min(panels_ * kColumns, last_ - j); }
  int64_t depth_at(int64_t k) const { return std::min(kDepth, args_.depth - k); }
  const BFloat16* right_at(int64_t k, int64_t j) const {
    return static_cast<const BFloat16*>(args_.right) + k * args_.right_stride_depth + j * args_.right_stride_column;
  }

  // What follows the block at (j, k); no lines after the last one.
  Prefetch after(int64_t j, int64_t k) const {
    k += kDepth;
    if (k >= args_.depth) k = 0, j += panels_ * kColumns;
    if (j >= last_) return {nullptr, 0, 0, 0, 0};
    const char* from = reinterpret_cast<const char*>(right_at(k, j));
    const int64_t depth = depth_at(k), columns = columns_at(j);
    if (args_.right_stride_depth == 1) return {from, 2 * args_.right_stride_column, 2 * depth, columns, 0};
    return {from, 2 * args_.right_stride_depth, 2 * columns, depth, 0};
  }

  void block(int64_t j, int64_t k) {
    const int64_t columns = columns_at(j), depth = depth_at(k), pairs = (depth + 1) / 2;
    for (int64_t c = 0; c < columns; c += kColumns) {
      pack<kColumns>(right_at(k, j + c), args_.right_stride_column, args_.right_stride_depth,
                     std::min(kColumns, columns - c), depth, right_ + c * pairs);
    }
    Prefetch prefetch = after(j, k);
    const int64_t tiles = ((args_.rows + kRows - 1) / kRows) * ((columns + kColumns - 1) / kColumns);
    const int64_t share = std::min(pairs, (prefetch.left() + tiles - 1) / tiles);
    for (int64_t i = 0; i < args_.rows; i += kLeftPanels * kRows) rows_of_block(i, j, k, share, prefetch);
  }

  void rows_of_block(int64_t i, int64_t j, int64_t k, int64_t share, Prefetch& prefetch) {
    const int64_t rows = std::min(kLeftPanels * kRows, args_.rows - i), columns = columns_at(j);
    const int64_t depth = depth_at(k), pairs = (depth + 1) / 2;
    const T* left = static_cast<const T*>(args_.left) + i * args_.left_stride_row + k * args_.left_stride_depth;
    SecondTerms second[kLeftPanels];
    for (int64_t r = 0; r < rows; r += kRows) {
      pack<kRows>(left + r * args_.left_stride_row, args_.left_stride_row, args_.left_stride_depth,
                  std::min(kRows, rows - r), depth, left_ + r * pairs);
      if constexpr (kListed) {
        const float* levels = args_.levels ? args_.levels + (args_.left_stride_depth == 1 ? i + r : k) : nullptr;
        second[r / kRows].pairs = left_ + kLeftPanels * kRows * kDepth / 2 + r * pairs;
        second[r / kRows].steps = steps_.data() + r * pairs, second[r / kRows].capacity = pairs;
        second[r / kRows].list(left + r * args_.left_stride_row, args_.left_stride_row, args_.left_stride_depth,
                               std::min(kRows, rows - r), depth, levels);
      }
    }
    const char* addresses[kDepth / 2];
    for (int64_t c = 0; c < columns; c += kColumns) {
      for (int64_t r = 0; r < rows; r += kRows) {
        const int64_t fetches = prefetch.addresses(share, addresses);
        tile(left_ + r * pairs, right_ + c * pairs, pairs, kListed ? second + r / kRows : nullptr,
             args_.out + (i + r) * args_.out_stride + j + c, args_.out_stride, rows - r, std::min(kColumns, columns - c),
             args_.accumulate || k > 0, stream_, addresses, fetches);
      }
    }
  }

  const GemmArgs& args_;
  const int64_t first_, last_;
  const int64_t panels_;  // of the right matrix in a block: more of them where they are short
  const bool stream_;
  std::vector<uint32_t> memory_;
  std::vector<int32_t> steps_;  // of second terms
  uint32_t *right_, *left_;
};

inline void gemm_bf16(const GemmArgs& args, const Parallel& parallel) {
  const int64_t panels = (args.columns + kColumns - 1) / kColumns;
  parallel(panels, [&](int64_t first, int64_t last) {
    const int64_t end = std::min(last * kColumns, args.columns);
    if (args.left_is_float) {
      GemmColumns<float>(args, first * kColumns, end).run();
    } else {
      GemmColumns<BFloat16>(args, first * kColumns, end).run();
    }
  });
}

// Where second terms of a row are dropped: a magnitude below which entries have at most kDropped of the sum of squares.
inline float level_of(const float* row, int64_t columns) {
  constexpr int kSteps = 8;  // magnitudes that are tried: 2^-1.5, 2^-3, ... of the largest
  __m512 most = _mm512_setzero_ps();
  for (int64_t j = 0; j < columns; j += 16) {
    most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_maskz_loadu_ps(lanes(columns - j), row + j)));
  }
  const float largest = _mm512_reduce_max_ps(most);
  if (!(largest > 0 && largest < std::numeric_limits<float>::infinity())) return 0;
  const __m512 unit = _mm512_set1_ps(1.0f / std::max(largest, std::numeric_limits<float>::min()));
  __m512 tried[kSteps], below[kSteps], all = _mm512_setzero_ps();
  for (int n = 0; n < kSteps; ++n) tried[n] = _mm512_set1_ps(std::exp2(-1.5f * float(n + 1))), below[n] = _mm512_setzero_ps();
  for (int64_t j = 0; j < columns; j += 16) {
    const __m512 x = _mm512_abs_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(lanes(columns - j), row + j), unit));
    all = _mm512_fmadd_ps(x, x, all);
#pragma GCC unroll 8
    for (int n = 0; n < kSteps; ++n) {
      below[n] = _mm512_mask3_fmadd_ps(x, x, below[n], _mm512_cmp_ps_mask(x, tried[n], _CMP_LT_OQ));
    }
  }
  const float allowed = kDropped * _mm512_reduce_add_ps(all);
  for (int n = 0; n < kSteps; ++n) {
    if (_mm512_reduce_add_ps(below[n]) <= allowed) return largest * std::exp2(-1.5f * float(n + 1));
  }
  return 0;
}

inline void row_levels(const float* matrix, int64_t stride, int64_t rows, int64_t columns, float* levels,
                       const Parallel& parallel) {
  parallel(rows, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) levels[row] = level_of(matrix + row * stride, columns);
  });
}

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign
