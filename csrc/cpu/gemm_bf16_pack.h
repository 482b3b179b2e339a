// Blocks of a matrix packed for products of bfloat16: pairs along the depth. gemm_bf16.h has the essay.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace deepalign {
namespace DEEPALIGN_ISA {

constexpr int64_t kRows = 8, kColumns = 48;  // of a tile
constexpr int64_t kDepth = 512;              // of a block
constexpr int64_t kPanels = 11;              // panels of the right matrix in a block
constexpr int64_t kLeftPanels = 16;          // panels of the left matrix in a block
constexpr float kDropped = 1.0f / 64;        // share of a row's sum of squares whose second terms may be dropped

DEEPALIGN_INLINE __mmask16 lanes(int64_t n) { return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1u); }

// 16 entries of a row as 16 bit each, those beyond the mask 0.
DEEPALIGN_INLINE __m256i load_bf16(__mmask16 mask, const BFloat16* from) { return _mm256_maskz_loadu_epi16(mask, from); }
DEEPALIGN_INLINE __m256i load_bf16(__mmask16 mask, const float* from) {
  return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from));
}

// Pairs (low, high) of two rows' entries.
DEEPALIGN_INLINE __m512i interleave(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

DEEPALIGN_INLINE void transpose(__m512i x[16]) {
  __m512i y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[4 * i] = _mm512_unpacklo_epi64(y[4 * i], y[4 * i + 2]);
    x[4 * i + 1] = _mm512_unpackhi_epi64(y[4 * i], y[4 * i + 2]);
    x[4 * i + 2] = _mm512_unpacklo_epi64(y[4 * i + 1], y[4 * i + 3]);
    x[4 * i + 3] = _mm512_unpackhi_epi64(y[4 * i + 1], y[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
    x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd);
  }
}

// 16 pairs of one line of a matrix whose lines run along the depth.
DEEPALIGN_INLINE __m512i load_pairs(const BFloat16* from, int64_t depth) {
  if (depth >= 32) return _mm512_loadu_si512(from);
  return _mm512_maskz_loadu_epi16(__mmask32((1u << depth) - 1u), from);
}
DEEPALIGN_INLINE __m512i load_pairs(const float* from, int64_t depth) {
  const __m512 low = _mm512_maskz_loadu_ps(lanes(depth), from);
  const __m512 high = _mm512_maskz_loadu_ps(lanes(depth - 16), from + (depth > 16 ? 16 : 0));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// 16 lines, or fewer, whose entries run along the depth: 16 pairs of each, transposed into 16 steps of kWidth dwords.
template <int64_t kWidth, bool kWhole, class T>
DEEPALIGN_INLINE void pack_square(const T* from, int64_t stride_line, int64_t lines, int64_t depth, uint32_t* to) {
  __m512i x[16];
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) {
    x[i] = kWhole || i < lines ? load_pairs(from + i * stride_line, kWhole ? 32 : depth) : _mm512_setzero_si512();
  }
  transpose(x);
  const int64_t pairs = (depth + 1) / 2;
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) {
    if constexpr (kWhole && kWidth >= 16) {
      _mm512_storeu_si512(to + i * kWidth, x[i]);
    } else {
      if (kWhole || i < pairs) _mm512_mask_storeu_epi32(to + i * kWidth, lanes(kWidth), x[i]);
    }
  }
}

// `lines` lines (rows of the left matrix, columns of the right one) of a block, kWidth dwords per pair; those missing are
// 0. `stride_line`, `stride_depth`: of the matrix; one of them is 1.
template <int64_t kWidth, class T>
DEEPALIGN_INLINE void pack(const T* from, int64_t stride_line, int64_t stride_depth, int64_t lines, int64_t depth,
                           uint32_t* to) {
  if (stride_depth != 1) {
    for (int64_t k = 0; k < depth; k += 2, to += kWidth) {
      const T *low = from + k * stride_depth, *high = low + stride_depth;
#pragma GCC unroll 3
      for (int64_t g = 0; g < kWidth; g += 16) {
        const __mmask16 mask = lanes(lines - g), second = k + 1 < depth ? mask : __mmask16(0);
        const __m512i pairs = interleave(load_bf16(mask, low + g), load_bf16(second, high + g));
        if constexpr (kWidth >= 16) {
          _mm512_storeu_si512(to + g, pairs);
        } else {
          _mm512_mask_storeu_epi32(to + g, lanes(kWidth), pairs);
        }
      }
    }
    return;
  }
  for (int64_t g = 0; g < kWidth; g += 16) {
    const int64_t here = lines - g;
    for (int64_t k = 0; k < depth; k += 32) {
      const T* at = from + g * stride_line + k;
      if (here >= std::min<int64_t>(16, kWidth) && depth - k >= 32 && kWidth >= 16) {
        pack_square<kWidth, true>(at, stride_line, 16, 32, to + k / 2 * kWidth + g);
      } else {
        const int64_t wanted = std::min<int64_t>(here, kWidth - g);
        pack_square<kWidth, false>(at, stride_line, wanted, std::min<int64_t>(32, depth - k), to + k / 2 * kWidth + g);
      }
    }
  }
}

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign
