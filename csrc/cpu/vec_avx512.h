// Vectors of 16 floats: AVX-512 F, BW, DQ, VL; DEEPALIGN_AVX512_BF16 adds the conversion instruction of AVX-512 BF16.
//
// A `Pair` holds the 2 x 16 entries of one step. bfloat16 entries are dealt: even indices in `first`, odd ones in
// `second`, because a shift and a mask unpack them so; `entry` tells which index a lane holds.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace deepalign {
namespace DEEPALIGN_ISA {

using Float = __m512;
using Mask = __mmask16;
constexpr int kLanes = 16;

struct Pair {
  Float first, second;
};
struct MaskPair {
  Mask first, second;
};

DEEPALIGN_INLINE Float splat(float x) { return _mm512_set1_ps(x); }
DEEPALIGN_INLINE Float load(const float* from) { return _mm512_loadu_ps(from); }
DEEPALIGN_INLINE void store(float* to, Float x) { _mm512_storeu_ps(to, x); }
DEEPALIGN_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
DEEPALIGN_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
DEEPALIGN_INLINE Float fms(Float a, Float b, Float c) { return _mm512_fmsub_ps(a, b, c); }
DEEPALIGN_INLINE Float max(Float a, Float b) { return _mm512_max_ps(a, b); }  // b where either is NaN
DEEPALIGN_INLINE Float min(Float a, Float b) { return _mm512_min_ps(a, b); }

DEEPALIGN_INLINE Mask greater(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
DEEPALIGN_INLINE Mask greater_equal(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
DEEPALIGN_INLINE Mask equal(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
DEEPALIGN_INLINE Mask both(Mask a, Mask b) { return Mask(a & b); }
DEEPALIGN_INLINE Mask all_lanes() { return Mask(0xffff); }
DEEPALIGN_INLINE Mask opposite(Mask a) { return Mask(~a); }
DEEPALIGN_INLINE Mask first_lanes(int64_t n) { return n >= kLanes ? Mask(0xffff) : n <= 0 ? Mask(0) : Mask((1u << n) - 1u); }
DEEPALIGN_INLINE bool all(MaskPair mask) { return Mask(mask.first & mask.second) == Mask(0xffff); }
DEEPALIGN_INLINE int64_t count(Mask mask) { return _mm_popcnt_u32(mask); }
DEEPALIGN_INLINE uint32_t lane_bits(Mask mask) { return mask; }
// Lanes in turn: bit 2 j is lane j of the first, bit 2 j + 1 of the second.
DEEPALIGN_INLINE uint32_t dealt_bits(MaskPair mask) {
  const __m512i low = _mm512_maskz_set1_epi32(mask.first, 0xffff), high = _mm512_maskz_set1_epi32(mask.second, int(0xffff0000u));
  return _mm512_movepi16_mask(_mm512_or_si512(low, high));
}
DEEPALIGN_INLINE float largest_lane(Float x) { return _mm512_reduce_max_ps(x); }
DEEPALIGN_INLINE Float choose(Mask mask, Float a, Float b) { return _mm512_mask_mov_ps(b, mask, a); }
DEEPALIGN_INLINE Float add_chosen(Float sum, Mask mask, Float x) { return _mm512_mask_add_ps(sum, mask, sum, x); }
// In mask registers: each way out of them takes a turn of its own.
DEEPALIGN_INLINE bool any(MaskPair mask) { return _mm512_kortestz(mask.first, mask.second) == 0; }
DEEPALIGN_INLINE int64_t count(MaskPair mask) { return _mm_popcnt_u32(_mm512_kunpackw(mask.second, mask.first)); }
// How many lanes many steps choose.
struct LaneCount {
  int64_t sum;
  void clear() { sum = 0; }
  DEEPALIGN_INLINE void add(MaskPair mask) { sum += count(mask); }
  int64_t total() const { return sum; }
};

// A constant of a loop. Where the loop calls something, compilers make constants anew in every turn, two instructions each.
DEEPALIGN_INLINE __m512i kept(int bits) {
  __m512i x = _mm512_set1_epi32(bits);
  asm("" : "+v"(x));
  return x;
}

// Entries of two steps' worth of one model, and back.
DEEPALIGN_INLINE Pair load_pair(const float* from) { return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + kLanes)}; }
DEEPALIGN_INLINE Pair load_pair(const Half* from) {
  return {
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))),
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + kLanes)))};
}
DEEPALIGN_INLINE Pair load_pair(const BFloat16* from) {
  const __m512i both = _mm512_loadu_si512(from);
  return {
      _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
      _mm512_castsi512_ps(_mm512_and_si512(both, kept(int(0xffff0000u))))};
}
DEEPALIGN_INLINE void store_pair(float* to, Pair x) {
  _mm512_storeu_ps(to, x.first);
  _mm512_storeu_ps(to + kLanes, x.second);
}
DEEPALIGN_INLINE void store_pair(Half* to, Pair x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x.first, kNearest));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kLanes), _mm512_cvtps_ph(x.second, kNearest));
}

#ifndef DEEPALIGN_AVX512_BF16
// The bfloat16 nearest to each lane in its upper half; the lower half is left over.
DEEPALIGN_INLINE __m512i rounded_to_bfloat16(Float x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i nan = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), nan);
}
#endif
DEEPALIGN_INLINE void store_pair(BFloat16* to, Pair x) {
#ifdef DEEPALIGN_AVX512_BF16
  const __m512i deal = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i packed = (__m512i)_mm512_cvtne2ps_pbh(x.second, x.first);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(deal, packed));
#else
  const __m512i low = _mm512_srli_epi32(rounded_to_bfloat16(x.first), 16);
  const __m512i high = _mm512_and_si512(rounded_to_bfloat16(x.second), _mm512_set1_epi32(int(0xffff0000u)));
  _mm512_storeu_si512(to, _mm512_or_si512(low, high));
#endif
}

// Appends the chosen lanes to `to`, which has room for kLanes more; returns how many.
DEEPALIGN_INLINE int append(float* to, Mask mask, Float x) {
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(mask, x));
  return _mm_popcnt_u32(mask);
}
DEEPALIGN_INLINE void append(int32_t* to, Mask mask, int32_t first_index, int32_t step) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(first_index), _mm512_mullo_epi32(lane, _mm512_set1_epi32(step)));
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(mask, index));
}

DEEPALIGN_INLINE void append(int32_t* to, Mask mask, const int32_t* from) {
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(from)));
}

// The entries of a dealt step in the order of their indices.
DEEPALIGN_INLINE Pair in_order(Pair dealt) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  return {_mm512_permutex2var_ps(dealt.first, low, dealt.second), _mm512_permutex2var_ps(dealt.first, high, dealt.second)};
}

// sums[lane] += x[lane], in double.
DEEPALIGN_INLINE void add_to_double(double* sums, Float x, double factor = 1.0) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  _mm512_storeu_pd(sums, _mm512_fmadd_pd(low, _mm512_set1_pd(factor), _mm512_loadu_pd(sums)));
  _mm512_storeu_pd(sums + 8, _mm512_fmadd_pd(high, _mm512_set1_pd(factor), _mm512_loadu_pd(sums + 8)));
}

// The float whose bits are the integer nearest to x, for x in [0, 2^31); below that, NaN, or `least` becomes negative.
DEEPALIGN_INLINE Float of_bits(Float x, Float&) { return _mm512_castsi512_ps(_mm512_cvtps_epu32(x)); }

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign

#include "vec_pair.h"

namespace deepalign {
namespace DEEPALIGN_ISA {

// factor * 2^(scale x - offset): a table of 16 values times a polynomial of degree 2 or 3. V is Float or Pair.
//
// z = scale x to the nearest multiple of 1/16 (added to a number whose last place that is), f = scale x - z without
// rounding, 2^(scale x) = 2^floor(z) * table[16 z mod 16] * P(f). Taylor's polynomials of 2^f all have their centre
// -1 / log 2: written from there they lose a term, and with it an instruction. So P(f) = kLeading (g^2 + kRest), or
// kLeading ((g^2 + kRest) g + kConstant), g = f + 23/16, near enough to 1 / log 2 and a multiple of 1/16: it is subtracted
// with z and costs nothing. Neither do 2^-offset, the factor and kLeading, which are in the table. vscalef takes floor
// itself, gives 0 and infinity at the ends and passes NaN on. Right for |scale x| < 2^17; below that it gives 0.
//
// A table of 32, in two registers, would do with degree 2; but its lookup reads three operands, and on Zen 4 such a one
// takes a multiply-add's turn.
template <int kDegree>
class TableExponential {
 public:
  static constexpr int kMaxOffset = 100;  // 2^-offset is in a float's range, with room for the factor

  TableExponential(float scale, int offset, float factor = 1.0f) : scale_(splat(scale)) {
    const double common = double(factor) * double(bit_cast<float>(uint32_t(127 - offset) << 23)) * kLeading;
    const __m256 low = _mm512_cvtpd_ps(_mm512_mul_pd(_mm512_load_pd(kTable), _mm512_set1_pd(common)));
    const __m256 high = _mm512_cvtpd_ps(_mm512_mul_pd(_mm512_load_pd(kTable + 8), _mm512_set1_pd(common)));
    table_ = _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
  }

  // Its values times a factor of 1 to 2.
  DEEPALIGN_INLINE void scale_by(Float factor) { table_ = table_ * factor; }

  template <class V>
  DEEPALIGN_INLINE V operator()(V x) const {
    const Parts<V> parts = split(x);
    return parts.entry * parts.polynomial;
  }

  DEEPALIGN_INLINE Float add_to(Float sum, Float x) const {
    const Parts<Float> parts = split(x);
    return fma(parts.entry, parts.polynomial, sum);
  }
  DEEPALIGN_INLINE Float add_to(Float sum, Pair x) const {
    const Parts<Pair> parts = split(x);
    return add_products(sum, parts.entry, parts.polynomial);
  }

  DEEPALIGN_INLINE Pair add_to(Pair sums, Pair x) const {
    const Parts<Pair> parts = split(x);
    return fma(parts.entry, parts.polynomial, sums);
  }

  // The values, added to the sum as add_to does: equal models have equal sums.
  DEEPALIGN_INLINE Pair value_and_add(Pair x, Float& sum) const {
    const Parts<Pair> parts = split(x);
    sum = add_products(sum, parts.entry, parts.polynomial);
    return parts.entry * parts.polynomial;
  }

 private:
  static constexpr int kCentre = 23;
  static constexpr float kMagic = 0x1.8p19f;
  // 2^(i/16), times 2 or 4: z is short of the centre by 23/16, of which floor takes 1 or 2. In double, so that the factor is
  // rounded with it, not after it.
  alignas(64) static constexpr double kTable[16] = {
      4.0, 4.177095129709655, 4.362030930661031, 4.555154539026766,
      4.756828460010884, 4.967431248293936, 5.187358218604039, 2.7085110938737853,
      2.8284271247461903, 2.9536522918789987, 3.0844216508158815, 3.2209806638985086,
      3.363585661014858, 3.512504320746599, 3.668016172818685, 3.830413122794295};
  // Minimax on [-1/32, 1/32], free of error in the mean: 6.8e-7 and 2.2e-9.
  static constexpr float kRest = kDegree == 2 ? 2.08103442f : 6.24343777f, kConstant = 6.00556135f;
  static constexpr double kLeading = kDegree == 2 ? 0.24111248278877206 : 0.05570732037184028;

  template <class V>
  struct Parts {
    V entry, polynomial;  // of the table, scaled
  };

  template <class V>
  DEEPALIGN_INLINE Parts<V> split(V x) const {
    const V shifted = fma(x, scale_, splat(kMagic));
    const V z = shifted - splat(kMagic + kCentre / 16.0f);
    const V entry = lookup(shifted);
    const V g = fms(x, scale_, z);
    const V square = fma(g, g, splat(kRest));
    if constexpr (kDegree == 2) return {scaled(entry, z), square};
    else return {scaled(entry, z), fma(square, g, splat(kConstant))};
  }

  DEEPALIGN_INLINE Float lookup(Float index) const { return _mm512_permutexvar_ps(_mm512_castps_si512(index), table_); }
  DEEPALIGN_INLINE Pair lookup(Pair index) const { return {lookup(index.first), lookup(index.second)}; }
  DEEPALIGN_INLINE static Float scaled(Float x, Float power) { return _mm512_scalef_ps(x, power); }
  DEEPALIGN_INLINE static Pair scaled(Pair x, Pair power) {
    return {scaled(x.first, power.first), scaled(x.second, power.second)};
  }

  Float scale_, table_;
};

using Exponential = TableExponential<3>;  // relative error 1.5e-7 with all rounding
using CoarseExponential = TableExponential<2>;  // 7e-7: for what is counted by, or rounded to 16 bits

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign

#include "vec_unwatched.h"
