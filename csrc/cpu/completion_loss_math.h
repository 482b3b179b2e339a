// The completion loss of a row, in two passes over the logits of its three models.
//
// Pass 1 (`scan`) reads s, a, b once and sums exp(s/tau), exp(t/tau), exp(a), exp(b) and p (s - t): partitions and KL.
// Running maxima of groups of d = b - a give a bound that the k-th largest d reaches. Pass 2 needs one exponential per
// entry: `emit` writes the gradient, counts base-favored entries and collects those above the bound; without a gradient
// `collect` does the latter two. M is then chosen exactly among them and its gradient corrected.
//
// No maximum is tracked: sums are taken relative to the largest of the first entries and, in float, overflow only if a
// later one is 2^100 times larger. A row whose sums are infinite, NaN or out of range is done again, carefully: with
// true maxima, absent entries masked. -inf, NaN and extreme logits go that way; ordinary rows do not pay for them.
#pragma once

#include "row_math.h"

namespace deepalign {
namespace DEEPALIGN_ISA {

// The block in which the largest entries of a distribution lie.
struct LossPeak {
  float mass = 0, least = 0;  // of one lane; of the lane that has least where it has most
  int64_t begin = 0;

  void see(const LossPeak& other) {
    if (other.mass > mass) *this = other;
  }
};

// A row's sums, relative to its offsets. The reference r is the model that b is compared with: a, or s.
struct LossSums {
  double s = 0, t = 0, r = 0, b = 0;  // 2^(scale x - offset)
  double divergence = 0;              // p (s - t - lead), or q (t - s + lead), unnormalised
  double logits = 0;                  // s
  LossPeak peak_s, peak_t, peak_r, peak_b;

  void operator+=(const LossSums& other) {
    s += other.s, t += other.t, r += other.r, b += other.b;
    divergence += other.divergence, logits += other.logits;
    peak_s.see(other.peak_s), peak_t.see(other.peak_t), peak_r.see(other.peak_r), peak_b.see(other.peak_b);
  }
};

// Those of s, t and the divergence of entries that are taken in double, by lane of a step.
struct LossExactSums {
  double s[kStep] = {}, t[kStep] = {}, divergence[kStep] = {};

  LossSums total() const {
    LossSums sums;
    for (int lane = 0; lane < kStep; ++lane) sums.s += s[lane], sums.t += t[lane], sums.divergence += divergence[lane];
    return sums;
  }
};

// Above this temperature, whose square multiplies every error, the sums of s, t and the divergence are taken once more in
// double. Exponentials without vscalef are rounded once more than those with it.
constexpr double kFineTemperature = kLanes < 16 ? 3.0 : 4.0;

// What is subtracted in the exponents: whole bits for ordinary rows, maxima for careful ones.
struct LossOffsets {
  int s = 0, t = 0, r = 0, b = 0;
  float max_s = 0, max_t = 0, max_r = 0, max_b = 0;
};

struct LossMix {
  Float base;  // t = a + base (b - a)
  Float lead;  // by how much s is above t, roughly: it is taken off s - t
  bool teacher_student, from_student;
};

// What a loop over a block carries.
struct LossAccumulators {
  Float s, t, r, b, divergence, logits;

  // Not by initialisers: the constructor that they make would be compiled for the plain processor.
  void clear() { s = t = r = b = divergence = logits = splat(0); }
};

// Pass 1 over a step. kPlain fixes the default options, so that their loop holds no choice.
//
// The exponentials of what is loaded come before that of t, which is computed: on Zen 5 the loop does not fill its pipes
// because the schedulers are full of operations that wait (independent ones would take 22 cycles), and in this order it
// takes 25.5 cycles instead of 28.
template <bool kIsPlain>
struct LossScan {
  static constexpr bool kPlain = kIsPlain, kOpen = kWatched;
  LossMix mix;
  OpenExponential exp_s, exp_t;
  OpenCoarseExponential exp_r, exp_b;

  // Whether its exponentials are, for s, a and b in an interval, and t = a + base (b - a).
  bool is_right_for(Interval x, float base) const {
    const float a = (1.0f - base) * x.lowest, b = base * x.lowest, c = (1.0f - base) * x.highest, d = base * x.highest;
    const Interval t{std::min(a, c) + std::min(b, d), std::max(a, c) + std::max(b, d)};
    return holds(right_within(exp_s), x) && holds(right_within(exp_r), x) && holds(right_within(exp_b), x) &&
           holds(right_within(exp_t), t);
  }

  DEEPALIGN_INLINE void add(Pair xs, Pair xa, Pair xb, MaskPair, LossAccumulators& sums, Pair& largest) const {
    const Pair xr = reference(xs, xa);
    largest = max(xb - xr, largest);  // in float: the spacing of bf16 at |x| ~ 16 is 0.125, and top-k would be all ties
    const Pair p = add_student(xs, sums);
    add_pair(xr, xb, sums);
    add_teacher(xs, xa, xb, p, sums);
    if (!kPlain) sums.logits = add_both(sums.logits, xs);
  }
  // Its parts: s, t and their divergence; r and b.
  DEEPALIGN_INLINE void add_divergence(Pair xs, Pair xa, Pair xb, MaskPair, LossAccumulators& sums) const {
    add_teacher(xs, xa, xb, add_student(xs, sums), sums);
  }
  DEEPALIGN_INLINE void add_threshold(Pair xs, Pair xa, Pair xb, MaskPair, LossAccumulators& sums) const {
    add_pair(reference(xs, xa), xb, sums);
  }

 private:
  DEEPALIGN_INLINE bool student_teacher() const { return kPlain || !mix.teacher_student; }
  DEEPALIGN_INLINE Pair reference(Pair xs, Pair xa) const { return !kPlain && mix.from_student ? xs : xa; }
  DEEPALIGN_INLINE Pair add_student(Pair xs, LossAccumulators& sums) const {
    if (student_teacher()) return exp_s.value_and_add(xs, sums.s);
    sums.s = exp_s.add_to(sums.s, xs);
    return xs;
  }
  DEEPALIGN_INLINE void add_pair(Pair xr, Pair xb, LossAccumulators& sums) const {
    sums.r = exp_r.add_to(sums.r, xr);
    sums.b = exp_b.add_to(sums.b, xb);
  }
  DEEPALIGN_INLINE void add_teacher(Pair xs, Pair xa, Pair xb, Pair p, LossAccumulators& sums) const {
    const Pair xt = fma(mix.base, xb - xa, xa);
    Pair q;
    if (student_teacher()) sums.t = exp_t.add_to(sums.t, xt);
    else q = exp_t.value_and_add(xt, sums.t);
    const Pair difference = xs - mix.lead - xt;
    sums.divergence = add_products(sums.divergence, student_teacher() ? p : twice(splat(0)) - q, difference);
  }
};

// The same under a mask, with maxima subtracted: for careful rows, whose other entries are finite or absent, and for the
// end of ordinary ones, where whatever is not finite must come through.
struct LossMaskedScan {
  static constexpr bool kPlain = false, kOpen = false;
  LossMix mix;
  Exponential exp_s, exp_t, exp_r, exp_b;
  Float max_s, max_t, max_r, max_b;
  Float floor;  // far below every maximum: its exponential is 0
  bool careful;
  // NaN stays NaN; an ordinary row's entries go as they are, so that one out of range shows.
  DEEPALIGN_INLINE Pair relative(Pair x, Float largest) const { return careful ? max(floor, x - largest) : x; }

  DEEPALIGN_INLINE void add(Pair xs, Pair xa, Pair xb, MaskPair mask, LossAccumulators& sums, Pair& largest) const {
    add_threshold(xs, xa, xb, mask, sums);
    add_divergence(xs, xa, xb, mask, sums);
    mask = masked(xs, xa, xb, mask);
    sums.logits = add_both(sums.logits, xs);
    largest = max(choose(mask, xb - (mix.from_student ? xs : xa), splat(-kInfinity)), largest);
  }
  DEEPALIGN_INLINE void add_threshold(Pair xs, Pair xa, Pair xb, MaskPair mask, LossAccumulators& sums) const {
    const Float zero = splat(0);
    mask = masked(xs, xa, xb, mask);
    sums.r = add_both(sums.r, choose(mask, exp_r(relative(mix.from_student ? xs : xa, max_r)), zero));
    sums.b = add_both(sums.b, choose(mask, exp_b(relative(xb, max_b)), zero));
  }
  DEEPALIGN_INLINE void add_divergence(Pair xs, Pair xa, Pair xb, MaskPair mask, LossAccumulators& sums) const {
    const Float zero = splat(0);
    mask = masked(xs, xa, xb, mask);
    const Pair xt = fma(mix.base, xb - xa, xa);
    const Pair p = choose(mask, exp_s(relative(xs, max_s)), zero);
    const Pair q = choose(mask, exp_t(relative(xt, max_t)), zero);
    sums.s = add_both(sums.s, p), sums.t = add_both(sums.t, q);
    const Pair rounded = xs - xt, part = rounded - xs, lost = xs - (rounded - part) - (xt + part);
    const Pair difference = rounded - mix.lead + lost;
    sums.divergence = mix.teacher_student ? add_products(sums.divergence, q, twice(zero) - difference)
                                          : add_products(sums.divergence, p, difference);
  }

 private:
  // What is outside the mask becomes 0, in careful rows also what is not finite; returns the rest.
  DEEPALIGN_INLINE MaskPair masked(Pair& xs, Pair& xa, Pair& xb, MaskPair mask) const {
    const Float zero = splat(0);
    if (careful) mask = both(mask, finite(xs, xa, xb));
    xs = choose(mask, xs, zero), xa = choose(mask, xa, zero), xb = choose(mask, xb, zero);
    return mask;
  }
};

// A LossPeak per lane; blocks are numbered in floats, which hold 2^24 of them.
struct LossLanePeak {
  Float mass, number;

  DEEPALIGN_INLINE void see(Float block_mass, Float block_number) {
    const Mask larger = greater(block_mass, mass);
    mass = choose(larger, block_mass, mass), number = choose(larger, block_number, number);
  }
  LossPeak of_all_lanes(int64_t block) const {
    const float largest = largest_lane(mass);
    const float last = largest_lane(choose(equal(mass, splat(largest)), number, splat(0)));
    return {largest, 0.0f - largest_lane(splat(0) - mass), int64_t(last) * block};
  }
};

struct LossLaneSums {
  LaneSum s, t, r, b, divergence, logits;
  LossLanePeak peak_s, peak_t, peak_r, peak_b;
  int64_t block;

  explicit LossLaneSums(int64_t block) : block(block) {
    for (LossLanePeak* peak : {&peak_s, &peak_t, &peak_r, &peak_b}) peak->mass = peak->number = splat(0);
  }
  // A block's, whose exponentials were `scale` times as large.
  template <bool kPlain>
  DEEPALIGN_INLINE void add(const LossAccumulators& sums, int64_t begin, float scale = 1.0f) {
    const double factor = 1.0 / double(scale);
    add_divergence(sums, factor);
    r.add(sums.r, factor), b.add(sums.b, factor);
    if (!kPlain) logits.add(sums.logits);
    const Float number = splat(float(uint32_t(begin) / uint32_t(block))), back = splat(float(factor));
    peak_s.see(sums.s * back, number), peak_t.see(sums.t * back, number);
    peak_r.see(sums.r * back, number), peak_b.see(sums.b * back, number);
  }
  DEEPALIGN_INLINE void add_divergence(const LossAccumulators& sums, double factor) {
    s.add(sums.s, factor), t.add(sums.t, factor), divergence.add(sums.divergence, factor);
  }
  LossSums total() const {
    return {s.total(),
            t.total(),
            r.total(),
            b.total(),
            divergence.total(),
            logits.total(),
            peak_s.of_all_lanes(block),
            peak_t.of_all_lanes(block),
            peak_r.of_all_lanes(block),
            peak_b.of_all_lanes(block)};
  }
};

// Pass 2 over a step: the gradient without the penalty's part, for logits of type T.
template <class T, bool kPlain>
struct LossEmit {
  using Exp = std::conditional_t<sizeof(T) == 2, CoarseExponential, Exponential>;
  LossMix mix;
  Exp exp_s, exp_t;          // normalised: p and q
  Float scale, constant;     // wD tau (log p - log q - KL) = scale (s - t) + constant;  scale is wD
  Float weight, shift;       // wD tau;  the part of "centered_square" that every entry has
  Float max_s, max_t, floor;

  DEEPALIGN_INLINE Pair gradient(Pair xs, Pair xa, Pair xb) const {
    const Pair xt = fma(mix.base, xb - xa, xa);
    if (kPlain) return exp_s(xs) * fma(xs - xt, scale, constant);
    const Pair p = exp_s(max(floor, xs - max_s));
    if (!mix.teacher_student) return fma(p, fma(xs - xt, scale, constant), shift);
    return fma(p - exp_t(max(floor, xt - max_t)), weight, shift);
  }
};

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign
