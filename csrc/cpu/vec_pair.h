// Arithmetic on a Pair, from what vec_*.h, which include this file, define on its halves.
//
// Every operation is done on both halves before the next one, in that order in the machine code, too (setup.py turns the
// compiler's own reordering off): two of a kind in a row go to both of a processor's pipes for them, whereas operations
// that alternate in kind were seen to fill one pipe of each (Zen 4: pass 1 of the loss in 55 cycles instead of 49).
#pragma once

namespace deepalign {
namespace DEEPALIGN_ISA {

DEEPALIGN_INLINE Float first_half(Float x) { return x; }
DEEPALIGN_INLINE Float second_half(Float x) { return x; }
DEEPALIGN_INLINE Float first_half(Pair x) { return x.first; }
DEEPALIGN_INLINE Float second_half(Pair x) { return x.second; }

DEEPALIGN_INLINE Pair twice(Float x) { return {x, x}; }
DEEPALIGN_INLINE Pair operator+(Pair a, Pair b) { return {a.first + b.first, a.second + b.second}; }
DEEPALIGN_INLINE Pair operator-(Pair a, Pair b) { return {a.first - b.first, a.second - b.second}; }
DEEPALIGN_INLINE Pair operator*(Pair a, Pair b) { return {a.first * b.first, a.second * b.second}; }
DEEPALIGN_INLINE Pair operator/(Pair a, Pair b) { return {a.first / b.first, a.second / b.second}; }
DEEPALIGN_INLINE Pair operator+(Pair a, Float b) { return a + twice(b); }
DEEPALIGN_INLINE Pair operator-(Pair a, Float b) { return a - twice(b); }
DEEPALIGN_INLINE Pair operator*(Pair a, Float b) { return a * twice(b); }

// a b + c and a b - c; here and below, at least one operand is a Pair.
template <class A, class B, class C>
DEEPALIGN_INLINE Pair fma(A a, B b, C c) {
  return {fma(first_half(a), first_half(b), first_half(c)), fma(second_half(a), second_half(b), second_half(c))};
}
template <class A, class B, class C>
DEEPALIGN_INLINE Pair fms(A a, B b, C c) {
  return {fms(first_half(a), first_half(b), first_half(c)), fms(second_half(a), second_half(b), second_half(c))};
}
template <class A, class B>
DEEPALIGN_INLINE Pair max(A a, B b) {
  return {max(first_half(a), first_half(b)), max(second_half(a), second_half(b))};
}
template <class A, class B>
DEEPALIGN_INLINE Pair min(A a, B b) {
  return {min(first_half(a), first_half(b)), min(second_half(a), second_half(b))};
}

template <class B>
DEEPALIGN_INLINE MaskPair greater(Pair a, B b) {
  return {greater(a.first, first_half(b)), greater(a.second, second_half(b))};
}
template <class B>
DEEPALIGN_INLINE MaskPair greater_equal(Pair a, B b) {
  return {greater_equal(a.first, first_half(b)), greater_equal(a.second, second_half(b))};
}
DEEPALIGN_INLINE MaskPair equal(Pair a, Float b) { return {equal(a.first, b), equal(a.second, b)}; }
DEEPALIGN_INLINE MaskPair both(MaskPair a, MaskPair b) { return {both(a.first, b.first), both(a.second, b.second)}; }
// The mask of a whole step: compilers do not see that a vector of ones changes nothing.
struct EveryEntry {};
DEEPALIGN_INLINE MaskPair both(MaskPair a, EveryEntry) { return a; }
DEEPALIGN_INLINE MaskPair opposite(MaskPair a) { return {opposite(a.first), opposite(a.second)}; }
template <class A, class B>
DEEPALIGN_INLINE Pair choose(MaskPair mask, A a, B b) {
  return {choose(mask.first, first_half(a), first_half(b)), choose(mask.second, second_half(a), second_half(b))};
}

DEEPALIGN_INLINE Pair add_chosen(Pair sums, MaskPair mask, Pair x) {
  return {add_chosen(sums.first, mask.first, x.first), add_chosen(sums.second, mask.second, x.second)};
}
DEEPALIGN_INLINE Pair of_bits(Pair x, Float& least) { return {of_bits(x.first, least), of_bits(x.second, least)}; }

// Both halves into one sum.
DEEPALIGN_INLINE Float add_both(Float sum, Pair x) { return sum + x.first + x.second; }
DEEPALIGN_INLINE Float add_products(Float sum, Pair a, Pair b) { return fma(a.second, b.second, fma(a.first, b.first, sum)); }

// An open exponential does not see to what is out of its range. Where there is one (kWatched), whoever uses it watches the
// `Extremes` of what it is given, at less cost, and does again what went beyond the interval in which it is right.
struct Interval {
  float lowest, highest;
};
inline bool holds(Interval x, Interval part) { return x.lowest <= part.lowest && part.highest <= x.highest; }  // no NaN

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign
