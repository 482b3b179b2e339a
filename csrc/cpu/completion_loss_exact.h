// Between the passes of a row of the completion loss: sums that rounding has spoilt, taken once more in double.
#pragma once

#include "completion_loss_row.h"

namespace deepalign {
namespace DEEPALIGN_ISA {

// What rounding has taken from a block's sums of s, t and the divergence: they are summed once more as pass 1 did, and
// with the step that holds the block's largest entry of s, and the one of t, in double. In float an exponential is off by
// 1e-7, and what a lane adds after an entry that has most of the mass is rounded to that entry's last place; the divergence
// multiplies both by tau^2.
template <class T>
template <class Scan>
LossSums CompletionLossRow<T>::divergence_lost_in(const Scan& scan, int64_t begin) const {
  const PeakSteps peaks = peak_steps(begin);
  LossAccumulators as_before, rest;
  as_before.clear(), rest.clear();
  LossExactSums exact;
  const auto add = [&](const auto& scan, int64_t i, const Step& x, MaskPair exists) __attribute__((always_inline)) {
    scan.add_divergence(x.s, x.a, x.b, exists, as_before);
    if (i == peaks.s || i == peaks.t) {
      add_exactly(x, exists, exact);
    } else {
      scan.add_divergence(x.s, x.a, x.b, exists, rest);
    }
  };
  if (!over_block(scan, begin, add)) return divergence_lost_in(masked_scan(), begin);
  const double factor = 1.0 / double(scale_of_part(begin / cut_.block));
  LossSums lost = exact.total();
  lost.s += LaneSum::of(rest.s, as_before.s, factor), lost.t += LaneSum::of(rest.t, as_before.t, factor);
  lost.divergence += LaneSum::of(rest.divergence, as_before.divergence, factor);
  return lost;
}

// The same of r and b, of which pass 1 takes coarse exponentials.
template <class T>
template <class Scan>
LossSums CompletionLossRow<T>::threshold_lost_in(const Scan& scan, int64_t begin) const {
  LossMaskedScan exact = masked_scan();
  const float scale = scale_of_part(begin / cut_.block);
  scale_all(scale, exact.exp_r, exact.exp_b);
  LossAccumulators as_before, fine;
  as_before.clear(), fine.clear();
  const auto add = [&](const auto& scan, int64_t, const Step& x, MaskPair exists) __attribute__((always_inline)) {
    scan.add_threshold(x.s, x.a, x.b, exists, as_before);
    exact.add_threshold(x.s, x.a, x.b, exists, fine);
  };
  if (!over_block(scan, begin, add)) return threshold_lost_in(masked_scan(), begin);
  LossSums lost;
  lost.r = LaneSum::of(fine.r, as_before.r, 1.0 / double(scale)), lost.b = LaneSum::of(fine.b, as_before.b, 1.0 / double(scale));
  return lost;
}

// The steps of a block that have its largest entries of s and of t.
template <class T>
typename CompletionLossRow<T>::PeakSteps CompletionLossRow<T>::peak_steps(int64_t begin) const {
  const int64_t end = std::min(begin + cut_.block, cut_.size);
  const Float lowest = splat(-kInfinity), mix = splat(mix_);
  LossLanePeak s{lowest, splat(0)}, t = s;
  float number = 0;
  for (int64_t i = begin; i < end; i += kStep, ++number) {
    const Step x = load(i, end - i);
    Pair xs = x.s, xt = fma(mix, x.b - x.a, x.a);
    if (careful_ || i + kStep > end) {
      const MaskPair here = both(first_entries<T>(end - i), finite(x.s, x.a, x.b));
      xs = choose(here, xs, lowest), xt = choose(here, xt, lowest);
    }
    s.see(max(xs.first, xs.second), splat(number)), t.see(max(xt.first, xt.second), splat(number));
  }
  const auto step_of = [&](const LossLanePeak& peak) {  // the first of them
    const Mask largest = equal(peak.mass, splat(largest_lane(peak.mass)));
    return begin - int64_t(largest_lane(choose(largest, splat(0) - peak.number, lowest))) * kStep;
  };
  return {step_of(s), step_of(t)};
}

template <class T>
void CompletionLossRow<T>::add_exactly(const Step& x, MaskPair exists, LossExactSums& sums) const {
  const Float zero = splat(0);
  const MaskPair here = both(exists, finite(x.s, x.a, x.b));
  const Pair xs = choose(here, x.s, zero), xa = choose(here, x.a, zero), xb = choose(here, x.b, zero);
  const Pair xt = fma(splat(mix_), xb - xa, xa);
  // 1 where an entry has some mass, else 0, which takes the place of its exponent, too: a choice of doubles would keep
  // the loop from becoming vectors.
  const auto weight = [&](Pair x, float max, int offset) {
    const Pair bits = fma(splat(scale_), x - splat(max), twice(splat(float(-offset))));
    return choose(both(here, greater(bits, twice(splat(-900)))), splat(1), zero);
  };
  float s[kStep], a[kStep], b[kStep], has_s[kStep], has_t[kStep];
  store_pair(s, xs), store_pair(a, rounds_teacher() ? xt : xa), store_pair(b, rounds_teacher() ? xt : xb);
  store_pair(has_s, weight(xs, offsets_.max_s, offsets_.s)), store_pair(has_t, weight(xt, offsets_.max_t, offsets_.t));
  double p[kStep], q[kStep], difference[kStep];
  for (int lane = 0; lane < kStep; ++lane) {
    const double in_s = has_s[lane], in_t = has_t[lane], t = teacher(a[lane], b[lane]);
    p[lane] = in_s * exp2_of(in_s * (double(scale_) * (double(s[lane]) - offsets_.max_s) - offsets_.s));
    q[lane] = in_t * exp2_of(in_t * (double(scale_) * (t - offsets_.max_t) - offsets_.t));
    difference[lane] = double(s[lane]) - lead_ - t;
  }
  for (int lane = 0; lane < kStep; ++lane) {
    sums.s[lane] += p[lane], sums.t[lane] += q[lane];
    sums.divergence[lane] += args_.teacher_student ? -q[lane] * difference[lane] : p[lane] * difference[lane];
  }
}

// Gives the sums what rounding has taken from the blocks that hold much of the mass.
template <class T>
LossSums CompletionLossRow<T>::refined(LossSums sums) const {
  const FlushToZero flush;
  const LossPeak s = sums.peak_s, t = sums.peak_t, r = sums.peak_r, b = sums.peak_b;
  if (!wants_fine_sums()) {
    const auto refine = [&](const LossPeak& peak) {
      const LossSums lost = with_scan([&](const auto& scan) { return divergence_lost_in(scan, peak.begin); });
      sums.s += lost.s, sums.t += lost.t, sums.divergence += lost.divergence;
    };
    const bool refine_s = s.mass > sums.s / 64, refine_t = t.mass > sums.t / 64 && !(refine_s && t.begin == s.begin);
    if (refine_s) refine(s);
    if (refine_t) refine(t);
  }
  if (!careful_) {  // else the exponentials were exact
    const auto refine = [&](const LossPeak& peak) {
      const LossSums lost = with_scan([&](const auto& scan) { return threshold_lost_in(scan, peak.begin); });
      sums.r += lost.r, sums.b += lost.b;
    };
    const bool refine_r = r.mass > sums.r / 4, refine_b = b.mass > sums.b / 4 && !(refine_r && b.begin == r.begin);
    if (refine_r) refine(r);
    if (refine_b) refine(b);
  }
  return sums;
}

// Those of s, t and the divergence once more, summed in double, and the peaks' steps taken in double, or all of them: as
// long as pass 1, or three times as long.
template <class T>
LossSums CompletionLossRow<T>::scan_finely(const LossSums& rounded) const {
  const FlushToZero flush;
  LossMaskedScan scan = masked_scan();
  const Exponential exp_s = scan.exp_s, exp_t = scan.exp_t;
  LossLaneSums sums(kStep);
  LossExactSums exact;
  const LossPeak peak_s = rounded.peak_s, peak_t = rounded.peak_t;
  const bool peaked_s = peak_s.mass > rounded.s / 64, peaked_t = peak_t.mass > rounded.t / 64;
  for (int64_t begin = 0; begin < cut_.size; begin += cut_.block) {
    const bool peaked = (peaked_s && begin == peak_s.begin) || (peaked_t && begin == peak_t.begin);
    const PeakSteps peaks = peaked && !wants_doubles() ? peak_steps(begin) : PeakSteps{-1, -1};
    const int64_t end = std::min(begin + cut_.block, cut_.size);
    for (int64_t i = begin; i < end; i += kStep) {
      const Step x = load(i, end - i);
      const MaskPair exists = first_entries<T>(end - i);
      if (wants_doubles() || i == peaks.s || i == peaks.t) {
        add_exactly(x, exists, exact);
        continue;
      }
      LossAccumulators step;
      step.clear();
      const float scale = scale_of_part(i / kStep);
      scan.exp_s = exp_s, scan.exp_t = exp_t;
      scale_all(scale, scan.exp_s, scan.exp_t);
      scan.add_divergence(x.s, x.a, x.b, exists, step);
      sums.add_divergence(step, 1.0 / double(scale));
    }
  }
  LossSums total = sums.total();
  total += exact.total();
  return total;
}

// Whether the divergence's two parts, which are rounded to 4e-8 of themselves, are much larger than it is.
template <class T>
bool CompletionLossRow<T>::cancels() const {
  const double tau = args_.temperature;
  return tau * std::abs(log_ratio_ - lead_) > 10.0 * (1.0 + tau * tau * std::abs(raw_kl_));
}

// Whether terms are alike where they are added up, and so all rounded alike: no lane of a block has more than its share,
// or all have more by as much, as where equal logits are side by side; rougher where 16-bit logits are sorted.
template <class T>
bool CompletionLossRow<T>::is_even(double partition, const LossPeak& peak) const {
  const int64_t steps = (std::min(cut_.size, cut_.block) + kStep - 1) / kStep;
  const double largest = double(peak.mass) / double(2 * steps), mean = partition / double(present_);  // of terms
  const float least = peak.least / peak.mass;
  return largest < 1.05 * mean || (largest > 1.3 * mean && least > 0.97f) || (largest > 4.0 * mean && least > 0.75f);
}

// What the rounding of t to floats has taken from KL(q || p), which changes by q (log q - log p - KL) / tau with t: 1e-6
// and more where logits are large and few of them, or few values, have most of the mass. Else errors cancel.
template <class T>
double CompletionLossRow<T>::lost_with_teacher(const LossSums& sums) const {
  const double about = log2_t_ / scale_ + offsets_.max_t, tau = args_.temperature;  // the largest entries, or a bit more
  const bool even = is_even(sums.t, sums.peak_t);
  if (std::abs(about) < 1.0 || !(even || sums.peak_t.mass > sums.t / 64)) return 0.0;
  const Float least = splat(float(about - (even ? 20.0 : 10.0) / scale_)), zero = splat(0);  // a q of 2^-20, 2^-10
  double lost[kStep] = {};
  for (int64_t i = 0; i < cut_.size; i += kStep) {
    const Step x = load(i, cut_.size - i);
    const Pair xt = fma(splat(mix_), x.b - x.a, x.a);
    const MaskPair large = greater(xt, least);
    if (!any(large)) continue;
    const MaskPair heavy = both(large, both(first_entries<T>(cut_.size - i), finite(x.s, x.a, x.b)));
    float s[kStep], a[kStep], b[kStep], t[kStep], in[kStep];
    store_pair(s, choose(heavy, x.s, zero)), store_pair(a, choose(heavy, x.a, zero));
    store_pair(b, choose(heavy, x.b, zero)), store_pair(t, choose(heavy, xt, zero));
    store_pair(in, choose(heavy, splat(1), zero));
    for (int lane = 0; lane < kStep; ++lane) {
      const double xt = t[lane], exact = teacher(a[lane], b[lane]);
      const double q = in[lane] * exp2_of(in[lane] * (double(scale_) * (xt - offsets_.max_t) - log2_t_));
      lost[lane] += q * ((xt - s[lane] + log_ratio_) / tau - raw_kl_) * (exact - xt);
    }
  }
  return std::accumulate(lost, lost + kStep, 0.0) / tau;
}

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign
