// Vectors of 4 floats in the compiler's own vector types: any processor, no intrinsics.
//
// Four, because 16 bytes are the registers of SSE2 and NEON: of longer vectors GCC makes scalar code for every
// comparison and choice. A `Pair` holds the 2 x 4 entries of one step, bfloat16 entries dealt as in vec_avx512.h: even
// indices in `first`, odd ones in `second`. The lanes of a mask are all ones or all zeros.
#pragma once

#include <cmath>

#include "types.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bfloat16 entries are dealt for little-endian processors only; without native kernels the reference serves"
#endif

namespace deepalign {
namespace DEEPALIGN_ISA {

constexpr int kLanes = 4;
typedef float Float __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));  // what a comparison gives
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef uint16_t ShortBits __attribute__((vector_size(8)));
typedef uint64_t LongBits __attribute__((vector_size(16)));

struct Pair {
  Float first, second;
};
struct MaskPair {
  Mask first, second;
};

template <class Vector, class T>
Vector load_as(const T* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
template <class T, class Vector>
void store_as(T* to, Vector x) {
  std::memcpy(to, &x, sizeof x);
}

DEEPALIGN_INLINE Float splat(float x) { return Float{x, x, x, x}; }
DEEPALIGN_INLINE Bits splat_bits(uint32_t x) { return Bits{x, x, x, x}; }
DEEPALIGN_INLINE Float load(const float* from) { return load_as<Float>(from); }
DEEPALIGN_INLINE void store(float* to, Float x) { store_as(to, x); }
DEEPALIGN_INLINE Float fma(Float a, Float b, Float c) { return a * b + c; }  // rounds twice
DEEPALIGN_INLINE double fma(double a, double b, double c) { return a * b + c; }
DEEPALIGN_INLINE Float fms(Float a, Float b, Float c) { return a * b - c; }
DEEPALIGN_INLINE Float max(Float a, Float b) { return a > b ? a : b; }       // b where either is NaN
DEEPALIGN_INLINE Float min(Float a, Float b) { return a < b ? a : b; }

DEEPALIGN_INLINE Mask greater(Float a, Float b) { return a > b; }
DEEPALIGN_INLINE Mask greater_equal(Float a, Float b) { return a >= b; }
DEEPALIGN_INLINE Mask equal(Float a, Float b) { return a == b; }
DEEPALIGN_INLINE Mask both(Mask a, Mask b) { return a & b; }
DEEPALIGN_INLINE Mask all_lanes() { return Mask{-1, -1, -1, -1}; }
DEEPALIGN_INLINE Mask opposite(Mask a) { return ~a; }
DEEPALIGN_INLINE Mask first_lanes(int64_t n) {
  const int32_t existing = n >= kLanes ? kLanes : n <= 0 ? 0 : int32_t(n);
  return Mask{0, 1, 2, 3} < Mask{existing, existing, existing, existing};
}
DEEPALIGN_INLINE bool any(MaskPair mask) {
  const LongBits halves = LongBits(mask.first | mask.second);
  return (halves[0] | halves[1]) != 0;
}
DEEPALIGN_INLINE bool all(MaskPair mask) {
  const LongBits halves = LongBits(mask.first & mask.second);
  return (halves[0] & halves[1]) == ~uint64_t(0);
}
DEEPALIGN_INLINE int64_t sum_of_lanes(Mask x) {  // none of them negative
  const LongBits halves = LongBits(x);
  const uint64_t sums = halves[0] + halves[1];
  return int64_t((sums >> 32) + (sums & 0xffffffffu));
}
DEEPALIGN_INLINE int64_t count(Mask mask) { return sum_of_lanes(-mask); }
DEEPALIGN_INLINE int64_t count(MaskPair mask) { return sum_of_lanes(-(mask.first + mask.second)); }
// How many lanes many steps choose.
struct LaneCount {
  Mask lanes;
  void clear() { lanes = Mask{0, 0, 0, 0}; }
  DEEPALIGN_INLINE void add(MaskPair mask) { lanes -= mask.first, lanes -= mask.second; }
  int64_t total() const { return sum_of_lanes(lanes); }
};
DEEPALIGN_INLINE Float choose(Mask mask, Float a, Float b) { return mask ? a : b; }
DEEPALIGN_INLINE Float add_chosen(Float sum, Mask mask, Float x) { return sum + Float(mask & Mask(x)); }
DEEPALIGN_INLINE uint32_t lane_bits(Mask mask) {
  return uint32_t((mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8));
}
// Lanes in turn: bit 2 j is lane j of the first, bit 2 j + 1 of the second.
DEEPALIGN_INLINE uint32_t dealt_bits(MaskPair mask) {
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= uint32_t((mask.first[lane] & 1) | (mask.second[lane] & 2)) << 2 * lane;
  return bits;
}
DEEPALIGN_INLINE float largest_lane(Float x) {
  float largest = x[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = x[lane] > largest ? x[lane] : largest;
  return largest;
}

// Halves as floats and back, as to_float and from_float do it.
DEEPALIGN_INLINE Float widened(ShortBits x) {
  const Bits bits = __builtin_convertvector(x, Bits);
  const Bits sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
  const Bits scaled = Bits(Float(magnitude) * 0x1p112f);
  return Float(sign | (Mask(magnitude) >= 0x7c00 << 13 ? magnitude | 0x7f800000u : scaled));
}
DEEPALIGN_INLINE ShortBits narrowed(Float x) {
  const Bits bits = Bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const Bits subnormal = Bits(Float(magnitude) + 0.5f) - 0x3f000000u;
  const Bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Mask order = Mask(magnitude);  // no sign: integers compare like the floats
  Bits half = order < 0x38800000 ? subnormal : normal;
  half = order >= 0x477ff000 ? splat_bits(0x7c00u) : half;
  half = order > 0x7f800000 ? splat_bits(0x7e00u) : half;
  return __builtin_convertvector(sign | half, ShortBits);
}

// The bfloat16 nearest to each lane in its upper half; the lower half is left over.
DEEPALIGN_INLINE Bits rounded_to_bfloat16(Float x) {
  const Bits bits = Bits(x);
  const Bits up = bits + (((bits >> 16) & 1u) + 0x7fffu);
  return x == x ? up : bits | 0x400000u;
}

// Entries of two steps' worth of one model, and back.
DEEPALIGN_INLINE Pair load_pair(const float* from) { return {load(from), load(from + kLanes)}; }
DEEPALIGN_INLINE Pair load_pair(const Half* from) {
  return {widened(load_as<ShortBits>(from)), widened(load_as<ShortBits>(from + kLanes))};
}
DEEPALIGN_INLINE Pair load_pair(const BFloat16* from) {
  const Bits both = load_as<Bits>(from);
  return {Float(both << 16), Float(both & 0xffff0000u)};
}
DEEPALIGN_INLINE void store_pair(float* to, Pair x) { store(to, x.first), store(to + kLanes, x.second); }
DEEPALIGN_INLINE void store_pair(Half* to, Pair x) {
  store_as(to, narrowed(x.first)), store_as(to + kLanes, narrowed(x.second));
}
DEEPALIGN_INLINE void store_pair(BFloat16* to, Pair x) {
  store_as(to, (rounded_to_bfloat16(x.first) >> 16) | (rounded_to_bfloat16(x.second) & 0xffff0000u));
}

// Appends the chosen lanes to `to`, which has room for kLanes more; returns how many.
DEEPALIGN_INLINE int append(float* to, Mask mask, Float x) {
  int n = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    to[n] = x[lane];
    n -= mask[lane];
  }
  return n;
}
DEEPALIGN_INLINE void append(int32_t* to, Mask mask, int32_t first_index, int32_t step) {
  int n = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    to[n] = first_index + lane * step;
    n -= mask[lane];
  }
}

DEEPALIGN_INLINE void append(int32_t* to, Mask mask, const int32_t* from) {
  const Mask x = load_as<Mask>(from);  // before what is written over it
  int n = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    to[n] = x[lane];
    n -= mask[lane];
  }
}

// The entries of a dealt step in the order of their indices.
DEEPALIGN_INLINE Pair in_order(Pair dealt) {
  const Float &even = dealt.first, &odd = dealt.second;
  return {Float{even[0], odd[0], even[1], odd[1]}, Float{even[2], odd[2], even[3], odd[3]}};
}

// sums[lane] += x[lane], in double.
DEEPALIGN_INLINE void add_to_double(double* sums, Float x, double factor = 1.0) {
  for (int lane = 0; lane < kLanes; ++lane) sums[lane] += double(x[lane]) * factor;
}

// The float whose bits are the integer next to x, for x in [0, 2^31); below that, NaN, or `least` becomes negative.
DEEPALIGN_INLINE Float of_bits(Float x, Float&) {
  const Mask fits = (x >= 0.0f) & (x < 0x1p31f);
  return Float((fits ? __builtin_convertvector(fits ? x : splat(0), Mask) : ~fits));
}

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign

#include "vec_pair.h"

namespace deepalign {
namespace DEEPALIGN_ISA {

// factor * 2^(scale x - offset), scale > 0: a polynomial of degree 6, relative error 1.5e-7.
//
// z = scale x rounded to an integer (added to a number whose last place is 1, from which the offset is subtracted
// without rounding), f = scale x - z in [-1/2, 1/2], 2^(scale x - offset) = 2^(z - offset) P(f), P(0) = 1. The sum that
// rounds has z - offset, and the factor's exponent, in its last bits: shifted, they add to the factor's mantissa.
//
// Without a fused multiply-add scale x is rounded, by far too much for large x, and f = scale x - z would keep that
// error. So x is reduced before it is scaled: f = scale (x - z / scale), 1 / scale in two parts. z has at most 9 bits
// and the high part 13: their product is exact, the difference from x nearly so, and f is off by 4e-8 whatever x is.
//
// Clamps and kSpare as in vec_avx2.h: 0 and infinity or NaN at the ends, NaN passes, -infinity gives 0.
class Exponential {
 public:
  static constexpr int kMaxOffset = 100;  // as in vec_avx512.h, though nothing here depends on it

  Exponential(float scale, int offset, float factor = 1.0f) {
    int power = kNothing;
    float mantissa = 0.5f;
    if (factor != 0.0f) mantissa = std::frexp(factor, &power);
    const double shift = double(kSpare) + power - offset, inverse = 1.0 / double(scale);
    const float high = bit_cast<float>(bit_cast<uint32_t>(float(inverse)) & 0xfffff800u);
    scale_ = splat(scale + (factor - factor));  // a factor that is infinite or NaN makes everything NaN
    high_ = splat(high);
    low_ = splat(float(inverse - double(high)));
    magic_ = splat(float(0x1.8p23 + shift));
    lowest_ = splat(float((-125.0 - shift) * inverse));
    highest_ = splat(float((129.0 - shift) * inverse));
    mantissa_ = splat(mantissa);
  }

  // Its values times a factor of 1 to 2. Made with a factor of its own, it may no longer show what is beyond 2^98.
  DEEPALIGN_INLINE void scale_by(Float factor) { mantissa_ = mantissa_ * factor; }

  DEEPALIGN_INLINE Float operator()(Float x) const {
    x = min(highest_, max(lowest_, x));  // in this order of operands NaN stays
    const Float shifted = x * scale_ + magic_, z = shifted - magic_;
    const Float f = ((x - z * high_) - z * low_) * scale_;
    const Float slope = ((((f * k6 + k5) * f + k4) * f + k3) * f + k2) * f + k1;  // (P(f) - 1) / f
    const Float power = Float(Bits(mantissa_) + (Bits(shifted) << 23)) * kUnit;
    return power + power * (f * slope);  // rounds less than power P(f)
  }
  DEEPALIGN_INLINE Pair operator()(Pair x) const { return {(*this)(x.first), (*this)(x.second)}; }

  DEEPALIGN_INLINE Float add_to(Float sum, Float x) const { return sum + (*this)(x); }
  DEEPALIGN_INLINE Float add_to(Float sum, Pair x) const { return add_both(sum, (*this)(x)); }

  DEEPALIGN_INLINE Pair add_to(Pair sums, Pair x) const { return sums + (*this)(x); }

  // The values, added to the sum as add_to does: equal models have equal sums.
  DEEPALIGN_INLINE Pair value_and_add(Pair x, Float& sum) const {
    const Pair values = (*this)(x);
    sum = add_both(sum, values);
    return values;
  }

 private:
  static constexpr int kSpare = 28, kNothing = -1000;  // 2^kNothing stands for a factor of 0
  static constexpr float kUnit = 0x1p-28f;
  // Minimax 2^f on [-1/2, 1/2], 3e-9, fitted one rounded coefficient after the other.
  static constexpr float k1 = 0.693147182f, k2 = 0.240226477f, k3 = 0.0555035993f, k4 = 0.00961850584f,
                         k5 = 0.00133908063f, k6 = 0.000153264715f;

  Float scale_, high_, low_, magic_, lowest_, highest_, mantissa_;
};

using CoarseExponential = Exponential;  // nothing is saved by less than this

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign

#include "vec_unwatched.h"
