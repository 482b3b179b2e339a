// Pass 1 of the sampler where few entries are kept and the threshold lse(b) - lse(a) only decides for them on which side of
// it they are: then an interval that holds the threshold does, unless a candidate falls into it.
//
//   head    the first part of the row, an eighth or more, is scanned as ever. At least k entries reach the bound that its
//           maxima give, so an entry below it, in a, is none of the k largest; and its sums tell which entries hardly
//           weigh.
//   sift    of the rest, what is small in both respects is summed roughly, with three instructions an entry instead of
//           eight; steps that hold anything larger are listed.
//   weigh   the larger entries of the listed steps are packed, some thousand in the place of 16 times as many, and have
//           their exact exponentials; their group maxima raise the bound.
//   collect the candidates are in the head and among those packed entries. If the interval leaves one in doubt (one row in
//           some tens), or the list is long (flat rows), or anything is not finite, the row is scanned as ever.
//
// The rough exponential takes x log2(e) + exponent bias as the bits of a float: its exponent is right and its mantissa
// linear, (1 + m) for 2^m. Times a constant that is within 3%, whatever x.
#pragma once

#include "contrastive_sample_row.h"

namespace deepalign {
namespace DEEPALIGN_ISA {

// (1 + m) / 2^m is in [1, 1.0615]; 2^-kRoughShift makes that [1 - e, 1 + e]. kRoughError adds what rounding does to sums.
constexpr double kRoughShift = 0.04368, kRoughError = 0.0305;
constexpr double kHardly = 8.0;              // entries below exp(-8) of the head's sum count as small
constexpr float kLargestShift = 1000.0f;     // of base against aligned logits: it is added to x log2(e), which rounds

// What the head says of the rest; false if a sift cannot follow.
template <class T>
bool ContrastiveSampleRow<T>::set_large(const SampleSums& head, float bound) {
  if (!head.in_range() || !(std::abs(head.spread) < double(kInfinity)) || !(std::abs(origin_b_) < kLargestShift)) return false;
  const double unit = offset_ / kLog2E - kHardly;
  large_a_ = std::min(bound, float(std::log(head.a) + unit));
  large_b_ = float(std::log(head.b) + unit + origin_b_);
  return true;
}

// The rough sums over whole steps of what is small; lists the steps that hold something else.
template <class T>
SampleSums ContrastiveSampleRow<T>::sift(int64_t begin, int64_t end, SampleSteps& large) const {
  const double bias = 127.0 - kRoughShift - offset_;
  const Float scale = splat(float(kLog2E * 0x1p23)), bias_a = splat(float(bias * 0x1p23));
  const Float bias_b = splat(float((bias - origin_b_ * kLog2E) * 0x1p23));
  const Float large_a = splat(large_a_), large_b = splat(large_b_);
  Float least = splat(0);
  LaneSum sum_a, sum_b;
  int32_t* to = large.begin;
  for (int64_t block = begin; block < end; block += 1024) {
    Pair a_sums = twice(splat(0)), b_sums = a_sums;
    for (int64_t i = block; i < std::min(block + 1024, end); i += kStep) {
      prefetch_step(a_ + i), prefetch_step(b_ + i);
      const Pair a = load_pair(a_ + i), b = load_pair(b_ + i);
      const MaskPair small_a = greater(twice(large_a), a), small_b = greater(twice(large_b), b);
      a_sums = add_chosen(a_sums, small_a, of_bits(fma(a, scale, bias_a), least));
      b_sums = add_chosen(b_sums, small_b, of_bits(fma(b, scale, bias_b), least));
      *to = int32_t(i);
      to += !all(both(small_a, small_b));  // NaN is listed
    }
    sum_a.add(a_sums.first), sum_a.add(a_sums.second), sum_b.add(b_sums.first), sum_b.add(b_sums.second);
  }
  large.size = to - large.begin;
  if (largest_lane(splat(0) - least) > 0.0f) return {kNaN, kNaN};  // beyond the rough exponential, or absent
  return {sum_a.total(), sum_b.total()};
}

// The exact sums of what a sift has left out, as far as the entries of the steps make whole batches: see `weigh_staged`.
template <class T>
SampleSums ContrastiveSampleRow<T>::weigh(const SampleSteps& steps, SampleLarge& large, GroupMaxima& maxima) const {
  const Pair large_a = twice(splat(large_a_)), large_b = twice(splat(large_b_));
  SampleSums sums;
  for (int64_t j = 0; j < steps.size; ++j) {
    const int32_t i = steps.begin[j];
    // One or two entries: they take less by themselves than a step put in order and packed. NaN is among them.
    const MaskPair small = both(greater(large_a, load_pair(a_ + i)), greater(large_b, load_pair(b_ + i)));
    for (uint32_t left = entry_bits<T>(opposite(small)); left != 0; left &= left - 1) {
      const int32_t at = i + __builtin_ctz(left);
      large.staged.add(at, to_float(a_[at]), to_float(b_[at]));
    }
    if (large.staged.full()) sums += weigh_staged(large, maxima);
  }
  return sums;
}

// The sums of a batch; its maxima, and those that reach the bound in a, are kept.
template <class T>
SampleSums ContrastiveSampleRow<T>::weigh_staged(SampleLarge& large, GroupMaxima& maxima) const {
  const FlushToZero flush;
  const CoarseExponential exp(float(kLog2E), offset_);
  const Float minus_alpha = splat(-alpha_), origin_b = splat(origin_b_), zero = splat(0), lowest = splat(-kLargestFloat);
  const Float large_a = splat(large_a_), large_b = splat(large_b_), bound = splat(large.bound);
  Float sum_a = zero, sum_b = zero, peak = lowest;
  const int64_t size = large.staged.size();
  for (int64_t i = 0; i < size && !large.kept.full(); i += kStep) {
    const MaskPair exists = first_entries<float>(size - i);
    const Pair a = choose(exists, large.staged.a(i), lowest), b = choose(exists, large.staged.b(i), lowest);
    sum_a = add_both(sum_a, choose(greater(twice(large_a), a), zero, exp(a)));
    sum_b = add_both(sum_b, choose(greater(twice(large_b), b), zero, exp(b - origin_b)));
    peak = max(a.second, max(a.first, peak));
    maxima.merge_block(large.weighed++ * cut_.block, fma(minus_alpha, max(b - a, zero), a));  // any entries make a group
    large.kept.add(large.staged.index(i), greater_equal(a, bound), a, b);
  }
  large.staged.clear();
  LaneSum total_a, total_b;
  total_a.add(sum_a), total_b.add(sum_b);
  return {total_a.total(), total_b.total(), 0.0, largest_lane(peak)};
}

// An interval that holds the threshold. Entries within it are taken for not favored and in doubt.
template <class T>
bool ContrastiveSampleRow<T>::conclude_roughly(const SampleSums& exact, const SampleSums& rough) {
  SampleSums low = exact, high = exact;
  low.a += (1 - kRoughError) * rough.a, low.b += (1 - kRoughError) * rough.b;
  high.a += (1 + kRoughError) * rough.a, high.b += (1 + kRoughError) * rough.b;
  if (!low.in_range() || !high.in_range() || !(std::abs(exact.spread) < double(kInfinity))) return false;
  const double least = std::log(low.b / high.a) + double(origin_b_), most = std::log(high.b / low.a) + double(origin_b_);
  const double rounding = 0x1p-16 + 0x1p-22 * (std::abs(least) + std::abs(most));
  const bool lowers = alpha_ > 0.0f;
  start_ = 0.0f, threshold_ = most;
  contrast_.alpha = splat(alpha_), contrast_.shift = splat(0);
  contrast_.limit = splat(lowers ? std::max(float(most + rounding), 0.0f) : kInfinity);
  doubt_above_ = lowers ? std::max(float(least - rounding), 0.0f) : kInfinity;
  return true;
}

// ---- candidates, of a row that was sifted or scanned

template <class T>
DEEPALIGN_INLINE bool ContrastiveSampleRow<T>::in_doubt(MaskPair chosen, Pair d) const {
  return any(both(chosen, both(greater(d, splat(doubt_above_)), greater_equal(twice(contrast_.limit), d))));
}

template <class T>
DEEPALIGN_INLINE bool ContrastiveSampleRow<T>::collect_step(int64_t i, float below, Candidates& candidates) const {
  const Float bound = splat(candidates.bound()), limit = splat(below);
  const int64_t n = cut_.size - i;
  const Pair a = load_step(a_ + i, n);
  if (!any(greater_equal(a, bound))) return false;  // x <= a
  const Pair x = contrasted(i, n), b = load_step(b_ + i, n);
  const MaskPair chosen = both(greater_equal(x, bound), greater(twice(limit), x));
  if (!any(chosen)) return false;
  candidates.add<T>(i, chosen, x, x, x);
  return in_doubt(chosen, b - a);
}

template <class T>
bool ContrastiveSampleRow<T>::collect(int64_t first, int64_t last, float below, Candidates& candidates) const {
  bool doubt = false;
  for (int64_t begin = first; begin < last; begin += cut_.block) {
    if (!(block_at(begin).peak >= candidates.bound())) continue;
    for (int64_t i = begin, end = std::min(begin + cut_.block, last); i < end; i += kStep) {
      doubt |= collect_step(i, below, candidates);
    }
  }
  return doubt;
}

template <class T>
bool ContrastiveSampleRow<T>::collect(const SampleEntries& kept, Candidates& candidates) const {
  const Float bound = splat(candidates.bound());
  bool doubt = false;
  for (int64_t i = 0; i < kept.size(); i += kStep) {
    const Pair a = kept.a(i), b = kept.b(i), x = contrast_(a, b);
    const MaskPair chosen = both(first_entries<float>(kept.size() - i), greater_equal(x, bound));
    candidates.add(kept.index(i), chosen, x);
    doubt |= in_doubt(chosen, b - a);
  }
  return doubt;
}

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign
