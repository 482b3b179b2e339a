// Vectors of 8 floats: AVX2, FMA, F16C, POPCNT.
//
// A `Pair` holds the 2 x 8 entries of one step, bfloat16 entries dealt as in vec_avx512.h: even indices in `first`, odd
// ones in `second`. The lanes of a mask are all ones or all zeros.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "types.h"

namespace deepalign {
namespace DEEPALIGN_ISA {

using Float = __m256;
using Mask = __m256;
constexpr int kLanes = 8;

struct Pair {
  Float first, second;
};
struct MaskPair {
  Mask first, second;
};

DEEPALIGN_INLINE Float splat(float x) { return _mm256_set1_ps(x); }
DEEPALIGN_INLINE Float load(const float* from) { return _mm256_loadu_ps(from); }
DEEPALIGN_INLINE void store(float* to, Float x) { _mm256_storeu_ps(to, x); }
DEEPALIGN_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
DEEPALIGN_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
DEEPALIGN_INLINE Float fms(Float a, Float b, Float c) { return _mm256_fmsub_ps(a, b, c); }
DEEPALIGN_INLINE Float max(Float a, Float b) { return _mm256_max_ps(a, b); }  // b where either is NaN
DEEPALIGN_INLINE Float min(Float a, Float b) { return _mm256_min_ps(a, b); }

DEEPALIGN_INLINE __m256i lane_indices() { return _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0); }
DEEPALIGN_INLINE uint32_t lane_bits(Mask mask) { return uint32_t(_mm256_movemask_ps(mask)); }

DEEPALIGN_INLINE Mask greater(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
DEEPALIGN_INLINE Mask greater_equal(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
DEEPALIGN_INLINE Mask equal(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
DEEPALIGN_INLINE Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
DEEPALIGN_INLINE Mask all_lanes() { return _mm256_castsi256_ps(_mm256_set1_epi32(-1)); }
DEEPALIGN_INLINE Mask opposite(Mask a) { return _mm256_xor_ps(a, all_lanes()); }
DEEPALIGN_INLINE Mask first_lanes(int64_t n) {
  const int existing = n >= kLanes ? kLanes : n <= 0 ? 0 : int(n);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(existing), lane_indices()));
}
// Lanes in turn: bit 2 j is lane j of the first, bit 2 j + 1 of the second.
DEEPALIGN_INLINE uint32_t dealt_bits(MaskPair mask) {
  const __m256i both = _mm256_blend_epi16(_mm256_castps_si256(mask.first), _mm256_castps_si256(mask.second), 0xaa);
  return uint32_t(_mm_movemask_epi8(_mm_packs_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1))));
}
DEEPALIGN_INLINE bool any(MaskPair mask) { return lane_bits(_mm256_or_ps(mask.first, mask.second)) != 0; }
DEEPALIGN_INLINE bool all(MaskPair mask) { return _mm256_movemask_ps(_mm256_and_ps(mask.first, mask.second)) == 0xff; }
DEEPALIGN_INLINE int64_t count(Mask mask) { return _mm_popcnt_u32(lane_bits(mask)); }
DEEPALIGN_INLINE int64_t count(MaskPair mask) { return _mm_popcnt_u32(lane_bits(mask.second) << kLanes | lane_bits(mask.first)); }
// How many lanes many steps choose.
struct LaneCount {
  __m256i lanes;
  void clear() { lanes = _mm256_setzero_si256(); }
  DEEPALIGN_INLINE void add(MaskPair mask) {
    lanes = _mm256_sub_epi32(lanes, _mm256_castps_si256(mask.first));
    lanes = _mm256_sub_epi32(lanes, _mm256_castps_si256(mask.second));
  }
  int64_t total() const {
    int32_t counts[kLanes];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(counts), lanes);
    int64_t sum = 0;
    for (const int32_t lane : counts) sum += lane;
    return sum;
  }
};
DEEPALIGN_INLINE float largest_lane(Float x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
DEEPALIGN_INLINE Float choose(Mask mask, Float a, Float b) { return _mm256_blendv_ps(b, a, mask); }
DEEPALIGN_INLINE Float add_chosen(Float sum, Mask mask, Float x) { return _mm256_add_ps(sum, _mm256_and_ps(mask, x)); }

// Entries of two steps' worth of one model, and back.
DEEPALIGN_INLINE Pair load_pair(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + kLanes)}; }
DEEPALIGN_INLINE Pair load_pair(const Half* from) {
  return {
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + kLanes)))};
}
DEEPALIGN_INLINE Pair load_pair(const BFloat16* from) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return {
      _mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
      _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000u))))};
}
DEEPALIGN_INLINE void store_pair(float* to, Pair x) {
  _mm256_storeu_ps(to, x.first);
  _mm256_storeu_ps(to + kLanes, x.second);
}
DEEPALIGN_INLINE void store_pair(Half* to, Pair x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x.first, kNearest));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kLanes), _mm256_cvtps_ph(x.second, kNearest));
}

// The bfloat16 nearest to each lane in its upper half; the lower half is left over.
DEEPALIGN_INLINE __m256i rounded_to_bfloat16(Float x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  return _mm256_blendv_epi8(up, nan, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
DEEPALIGN_INLINE void store_pair(BFloat16* to, Pair x) {
  const __m256i low = _mm256_srli_epi32(rounded_to_bfloat16(x.first), 16), high = rounded_to_bfloat16(x.second);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_blend_epi16(low, high, 0xaa));
}

// For every set of lanes, their numbers in order.
struct LaneLists {
  alignas(64) uint8_t lanes[256][kLanes];
};
constexpr LaneLists lane_lists() {
  LaneLists lists{};
  for (int set = 0; set < 256; ++set) {
    int n = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (set >> lane & 1) lists.lanes[set][n++] = uint8_t(lane);
    }
  }
  return lists;
}
inline constexpr LaneLists kLaneLists = lane_lists();
DEEPALIGN_INLINE __m256i chosen_lanes(Mask mask) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLaneLists.lanes[lane_bits(mask)])));
}

// Appends the chosen lanes to `to`, which has room for kLanes more; returns how many.
DEEPALIGN_INLINE int append(float* to, Mask mask, Float x) {
  _mm256_storeu_ps(to, _mm256_permutevar8x32_ps(x, chosen_lanes(mask)));
  return int(count(mask));
}
DEEPALIGN_INLINE void append(int32_t* to, Mask mask, int32_t first_index, int32_t step) {
  const __m256i offset = _mm256_mullo_epi32(chosen_lanes(mask), _mm256_set1_epi32(step));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_add_epi32(_mm256_set1_epi32(first_index), offset));
}

DEEPALIGN_INLINE void append(int32_t* to, Mask mask, const int32_t* from) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(x, chosen_lanes(mask)));
}

// The entries of a dealt step in the order of their indices.
DEEPALIGN_INLINE Pair in_order(Pair dealt) {
  const __m256 low = _mm256_unpacklo_ps(dealt.first, dealt.second), high = _mm256_unpackhi_ps(dealt.first, dealt.second);
  return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
}

// sums[lane] += x[lane], in double.
DEEPALIGN_INLINE void add_to_double(double* sums, Float x, double factor = 1.0) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
  _mm256_storeu_pd(sums, _mm256_fmadd_pd(low, _mm256_set1_pd(factor), _mm256_loadu_pd(sums)));
  _mm256_storeu_pd(sums + 4, _mm256_fmadd_pd(high, _mm256_set1_pd(factor), _mm256_loadu_pd(sums + 4)));
}

// The float whose bits are the integer nearest to x, for x in [0, 2^31); below that, NaN, or `least` becomes negative.
DEEPALIGN_INLINE Float of_bits(Float x, Float& least) {
  least = min(x, least);
  return _mm256_castsi256_ps(_mm256_cvtps_epi32(x));
}

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign

#include "vec_pair.h"

namespace deepalign {
namespace DEEPALIGN_ISA {

// factor * 2^(scale x - offset), scale > 0: a table of 8 entries times a polynomial of degree 3. V is Float or Pair.
//
// z = scale x rounded to a multiple of 1/8 (added to a number whose last place is 1/8, from which the offset, being
// whole, is subtracted without rounding), f = scale x - z in [-1/16, 1/16] without rounding, 2^(scale x - offset) =
// 2^floor(z - offset) * table[8 z mod 8] * P(f). The factor is in the table and in the offset. The sum that rounds has
// 8 (z - offset) in its last bits: shifted up by 20 and added to an entry they change its exponent, and the table takes
// back what the lowest three add to the mantissa.
//
// There is no vscalef, so x is clamped to where that exponent stays in its field (an open exponential leaves that to
// whoever watches the Extremes of x: four instructions and as many loads less), and P carries 2^-kSpare: the smallest
// exponent then gives 0, not 2^-126 (which times a difference of logits of 1e38 would count), and the largest, whose
// field is that of infinity and NaN, comes out as one of these from 2^(128 - kSpare) on. NaN passes; -infinity gives 0.
//
// The exact P has P(0) = 1, so that entry + entry (P - 1) can be had, which rounds less than entry P. The coarse one is
// written from 3/2, near enough to 1 / log 2 (see vec_avx512.h) and a multiple of 1/8: (g^2 + kSquare) g + kRest,
// g = f + 3/2, its leading factor in the table. g comes times kUnit, all that leads to it being so: that makes 2^-kSpare.
template <bool kCoarse, bool kOpen>
class TableExponential {
 public:
  static constexpr int kMaxOffset = 100;  // as in vec_avx512.h, though nothing here depends on it

  TableExponential(float scale, int offset, float factor = 1.0f) {
    int power = kNothing;
    double mantissa = 0.5;
    if (factor != 0.0f) mantissa = std::frexp(double(factor), &power);
    const double shift = double(kSpare) + power - offset, magic = 0x1.8p20 + shift;
    scale_ = splat((scale + (factor - factor)) * kUnit);  // a factor that is infinite or NaN makes everything NaN
    magic_ = splat(float(magic * double(kUnit))), centre_ = splat(float((magic + kCentre) * double(kUnit)));
    lowest_ = splat(float((-125.0 - shift) / scale));
    highest_ = splat(float((129.0 - shift) / scale));
    interval_ = {float((-124.0 - shift) / scale), float((127.0 - shift) / scale)};
    const __m256d common = _mm256_set1_pd(kLeading * mantissa);
    const __m128 low = _mm256_cvtpd_ps(_mm256_mul_pd(_mm256_load_pd(kTable), common));
    const __m128 high = _mm256_cvtpd_ps(_mm256_mul_pd(_mm256_load_pd(kTable + 4), common));
    const __m256i bits = _mm256_castps_si256(_mm256_set_m128(high, low));
    table_ = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(lane_indices(), 20)));
  }

  // Its values times a factor of 1 to 2. Made with a factor of its own, it may no longer show what is beyond 2^98.
  DEEPALIGN_INLINE void scale_by(Float factor) {
    const __m256i excess = _mm256_slli_epi32(lane_indices(), 20);
    const Float table = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(table_), excess)) * factor;
    table_ = _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(table), excess));
  }

  template <class V>
  DEEPALIGN_INLINE V operator()(V x) const {
    return value(split(x));
  }
  template <class Sum, class V>
  DEEPALIGN_INLINE Sum add_to(Sum sum, V x) const {
    return added(sum, split(x));
  }

  // The values, added to the sum as add_to does: equal models have equal sums.
  DEEPALIGN_INLINE Pair value_and_add(Pair x, Float& sum) const {
    const Parts<Pair> parts = split(x);
    sum = added(sum, parts);
    return value(parts);
  }

  friend Interval right_within(const TableExponential& exponential) { return exponential.interval_; }

 private:
  static constexpr int kNothing = -1000;  // 2^kNothing stands for a factor of 0
  // Exact: minimax 2^f on [-1/16, 1/16], 1.9e-8: kConstant (1 + k1 f + k2 f^2 + k3 f^3), the last three times 2^-kSpare.
  static constexpr double kConstant = 0.99999998166726722;
  static constexpr float kOne = 0x1p-28f;
  static constexpr float k1 = 0.69314722123918515f * kOne, k2 = 0.24026407730382424f * kOne, k3 = 0.055498901477790741f * kOne;
  // Coarse: minimax, free of error in the mean, 1.3e-7: kLeading ((g^2 + kSquare) g + kRest), times
  // 2^-kSpare: of the 33 bits that three kUnit make, kLeading takes 5.
  static constexpr float kUnit = kCoarse ? 0x1p-11f : 1.0f;
  static constexpr double kCentre = kCoarse ? 1.5 : 0.0;
  static constexpr double kLeading = kCoarse ? 32 * 0.053393432377723815 : kConstant;
  static constexpr float kSquare = 6.23199652f * kUnit * kUnit, kRest = 6.00590001f * kUnit * kUnit * kUnit;
  static constexpr int kSpare = 28;
  // 2^(i/8). In double, so that the factor is rounded with it, not after it.
  alignas(32) static constexpr double kTable[8] = {
      1.0,
      1.0905077326652577,
      1.1892071150027211,
      1.2968395546510096,
      1.4142135623730951,
      1.5422108254079407,
      1.6817928305074292,
      1.8340080864093424};

  template <class V>
  struct Parts {
    V entry, f, slope;  // of the table, its exponent adjusted; (P(f) - 1) / f, or the coarse P
  };

  template <class V>
  DEEPALIGN_INLINE static V value(Parts<V> x) {
    if constexpr (kCoarse) return x.entry * x.slope;
    else return fma(x.entry, x.f * x.slope, x.entry * splat(kOne));
  }
  template <class V>
  DEEPALIGN_INLINE static V polynomial(Parts<V> x) {
    if constexpr (kCoarse) return x.slope;
    else return fma(x.f, x.slope, splat(kOne));
  }
  DEEPALIGN_INLINE static Float added(Float sum, Parts<Float> x) { return fma(x.entry, polynomial(x), sum); }
  DEEPALIGN_INLINE static Float added(Float sum, Parts<Pair> x) { return add_products(sum, x.entry, polynomial(x)); }
  DEEPALIGN_INLINE static Pair added(Pair sums, Parts<Pair> x) { return fma(x.entry, polynomial(x), sums); }

  template <class V>
  DEEPALIGN_INLINE Parts<V> split(V x) const {
    if constexpr (!kOpen) x = min(highest_, max(lowest_, x));  // in this order of operands NaN stays
    const V shifted = fma(x, scale_, magic_);
    const V f = fms(x, scale_, shifted - (kCoarse ? centre_ : magic_));
    if constexpr (kCoarse) return {entry(shifted), f, fma(fma(f, f, splat(kSquare)), f, splat(kRest))};
    else return {entry(shifted), f, fma(f, fma(f, splat(k3), splat(k2)), splat(k1))};
  }

  DEEPALIGN_INLINE Float entry(Float shifted) const {
    const __m256i bits = _mm256_castps_si256(shifted);
    const __m256i entry = _mm256_castps_si256(_mm256_permutevar8x32_ps(table_, bits));
    return _mm256_castsi256_ps(_mm256_add_epi32(entry, _mm256_slli_epi32(bits, 20)));
  }
  DEEPALIGN_INLINE Pair entry(Pair shifted) const { return {entry(shifted.first), entry(shifted.second)}; }

  Float scale_, magic_, centre_, lowest_, highest_, table_;
  Interval interval_;
};

constexpr bool kWatched = true;
using Exponential = TableExponential<false, false>;  // relative error 1.5e-7 with all rounding
using CoarseExponential = TableExponential<true, false>;  // 3e-7: for what is counted by, or rounded to 16 bits
using OpenExponential = TableExponential<false, true>;
using OpenCoarseExponential = TableExponential<true, true>;

// The most negative and the most positive value seen, and 0: as bits, the largest unsigned and the largest signed integer.
template <class T>
struct Extremes {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  __m256i negative, positive;

  void clear() { negative = positive = _mm256_setzero_si256(); }
  DEEPALIGN_INLINE void see(const T* step) {
    const __m256i* at = reinterpret_cast<const __m256i*>(step);
    if constexpr (sizeof(T) == 2) {
      const __m256i bits = _mm256_loadu_si256(at);
      negative = _mm256_max_epu16(negative, bits), positive = _mm256_max_epi16(positive, bits);
    } else {
      const __m256i first = _mm256_loadu_si256(at), second = _mm256_loadu_si256(at + 1);
      negative = _mm256_max_epu32(negative, first), positive = _mm256_max_epi32(positive, first);
      negative = _mm256_max_epu32(negative, second), positive = _mm256_max_epi32(positive, second);
    }
  }
  // Ends in NaN where one was seen.
  Interval interval() const {
    constexpr Bits kSign = Bits(Bits(1) << (8 * sizeof(T) - 1));
    Bits unsigned_lanes[32 / sizeof(T)], signed_lanes[32 / sizeof(T)], low = kSign, high = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(unsigned_lanes), negative);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(signed_lanes), positive);
    for (const Bits lane : unsigned_lanes) low = std::max(low, lane);
    for (const Bits lane : signed_lanes) high = lane < kSign ? std::max(high, lane) : high;
    return {to_float(bit_cast<T>(low)), to_float(bit_cast<T>(high))};
  }
};

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign
