// How far two models are apart in a row: KL both ways, JSD, the overlap of their largest entries. Two passes over the
// logits: the first is ModelPair's (base_favored_tokens.h), the second has both probabilities of an entry.
//
// With u = log p_b - log p_a = d - (lse(b) - lse(a)), differenced before anything is rounded to the size of the logits,
//
//     KL(p_a || p_b) = - sum p_a u,    KL(p_b || p_a) = sum p_b u,    JSD = sum (p_a + p_b) S(u),
//     S(u) = [(1 - h) log(1 - h) + (1 + h) log(1 + h)] / 4,    h = tanh(u / 2) = (p_b - p_a) / (p_a + p_b).
//
// No term of the JSD is negative, so nothing cancels: where models nearly agree, log 2 minus its usual terms would leave
// only noise. S needs neither logarithm nor tanh: even, and smooth in u^2, it is a ratio of polynomials in u^2 from 0 to
// where it is log(2) / 2.
//
// `position_statistics` does the same and ranks d too, in the same two passes: what a diagnosis asks of a row.
#pragma once

#include "base_favored_tokens.h"

namespace deepalign {
namespace DEEPALIGN_ISA {

// 8 S(u) = x / (x / (4 log 2) + rest) with x = w over, in which x and rest are polynomials in w = u^2. The rest fades where
// x grows, and with it every error but the last: relative error 4e-9 before rounding, 2.3e-7 with it (5e-8 in the root
// mean square). Minimax for w in [0, 470]; from there on S is log(2) / 2 to 1e-8.
DEEPALIGN_INLINE Pair eight_shares(Pair u) {
  const Pair w = min(u * u, splat(470.0f));
  Pair over = fma(w, splat(9.65636165e-12f), splat(2.62048538e-09f));
  Pair rest = fma(w, splat(2.52954645e-12f), splat(-3.96603905e-09f));
  over = fma(w, over, splat(5.00257045e-07f));
  rest = fma(w, rest, splat(2.4494766e-06f));
  over = fma(w, over, splat(5.06993638e-05f));
  rest = fma(w, rest, splat(-0.000714621274f));
  over = fma(w, over, splat(0.00287866942f));
  rest = fma(w, rest, splat(0.0810108855f));
  over = fma(w, over, splat(0.0820081159f));
  rest = fma(w, rest, splat(1.5f));
  over = fma(w, over, splat(0.75f));
  const Pair x = w * over;
  return x / fma(x, splat(0.36067376f), rest);
}

// What a loop over a block carries.
struct DivergenceAccumulators {
  Float a, b;    // p_a u, p_b u
  Float shares;  // 8 (p_a + p_b) S(u)

  // Not by initialisers: the constructor that they make would be compiled for the plain processor.
  void clear() { a = b = shares = splat(0); }
  DEEPALIGN_INLINE void add(Pair pa, Pair pb, Pair u) {
    a = add_products(a, pa, u);
    b = add_products(b, pb, u);
    shares = add_products(shares, pa + pb, eight_shares(u));
  }
};

// Pass 2 over a step; both return which of its entries are base-favored.
struct DivergenceScan {
  Exponential probability_a, probability_b;
  Float max_a, max_b;
  Float threshold, rest;  // lse(b) - lse(a), and what its rounding left

  DEEPALIGN_INLINE MaskPair add(Pair xa, Pair xb, DivergenceAccumulators& sums) const {
    const Pair d = xb - xa;
    sums.add(probability_a(xa), probability_b(xb), d - threshold - rest);
    return greater(d, threshold);
  }

  // Under a mask, with maxima subtracted.
  DEEPALIGN_INLINE MaskPair add(Pair xa, Pair xb, MaskPair mask, DivergenceAccumulators& sums) const {
    const Float zero = splat(0), widest = splat(std::numeric_limits<float>::max());
    const Pair d = xb - xa;
    const Pair u = max(zero - widest, min(widest, d - threshold - rest));  // finite: 0 u is 0 at logits of 1e38, too
    const Pair pa = probability_a(max(far_below(), xa - max_a)), pb = probability_b(max(far_below(), xb - max_b));
    sums.add(choose(mask, pa, zero), choose(mask, pb, zero), choose(mask, u, zero));
    return both(mask, greater(d, threshold));
  }
};

struct DivergenceLaneSums {
  LaneSum a, b, shares;

  // A block's, whose probabilities were `scale` times as large.
  void add(const DivergenceAccumulators& sums, float scale) {
    const double factor = 1.0 / double(scale);
    a.add(sums.a, factor), b.add(sums.b, factor), shares.add(sums.shares, factor);
  }
};

template <class T, int kRanks>
class PositionDivergenceRow {
 public:
  using Args = PositionDivergenceArgs;
  static constexpr int kRankings = kRanks;  // kByModel or kByAll
  struct Part {
    double a = 0, b = 0, shares = 0;
    int64_t favored = 0;
    void operator+=(const Part& other) {
      a += other.a, b += other.b, shares += other.shares, favored += other.favored;
    }
  };

  PositionDivergenceRow(const Args& args, const Cut& cut, int64_t row)
      : pair(args.aligned, args.base, cut, row), args_(args), row_(row) {}

  Part collect(int64_t segment, std::vector<Candidates>& candidates) const;
  void finish(const Part& part, const std::vector<Candidates>& candidates) const;
  void write_bad() const;

  ModelPair<T, kRankings> pair;

 private:
  DivergenceScan divergence_scan() const;

  const Args& args_;
  const int64_t row_;
};

// p of one model from its logits.
inline Exponential normalised(double log2_partition) {
  const double whole = std::ceil(log2_partition);
  return Exponential(float(kLog2E), int(whole), float(std::exp2(whole - log2_partition)));
}

template <class T, int kRanks>
DivergenceScan PositionDivergenceRow<T, kRanks>::divergence_scan() const {
  const float threshold = float(pair.log_ratio);
  return {normalised(pair.log2_a), normalised(pair.log2_b),
          splat(pair.offsets.max_a), splat(pair.offsets.max_b),
          splat(threshold), splat(float(pair.log_ratio - threshold))};
}

template <class T, int kRanks>
typename PositionDivergenceRow<T, kRanks>::Part PositionDivergenceRow<T, kRanks>::collect(
    int64_t segment, std::vector<Candidates>& candidates) const {
  const DivergenceScan unscaled = divergence_scan();
  const EveryEntry all;
  const float bound_of_d = kRanks == kByAll ? candidates[kRanks - 1].bound() : kInfinity;
  const FlushToZero flush(are_beyond_zero(bound_of_d, float(pair.log_ratio)));
  Float bound_a = splat(candidates[0].bound()), bound_b = splat(candidates[1].bound());
  [[maybe_unused]] Float bound_d = splat(candidates[kRanks - 1].bound());
  DivergenceLaneSums sums;
  LaneCount favored;
  favored.clear();
  for (int64_t begin = pair.cut.begin(segment); begin < pair.cut.end(segment); begin += pair.cut.block) {
    const int64_t end = std::min(begin + pair.cut.block, pair.cut.end(segment));
    const float scale = scale_of_part(begin / pair.cut.block);
    DivergenceScan scan = unscaled;
    scale_all(scale, scan.probability_a, scan.probability_b);
    DivergenceAccumulators plain, masked;
    plain.clear(), masked.clear();
    int64_t i = begin;
    for (; !pair.careful && i + kStep <= end; i += kStep) {
      const Pair xa = load_pair(pair.a + i), xb = load_pair(pair.b + i);
      favored.add(scan.add(xa, xb, plain));
      gather<T>(i, xa, all, candidates[0], bound_a);
      gather<T>(i, xb, all, candidates[1], bound_b);
      if constexpr (kRanks == kByAll) gather<T>(i, xb - xa, all, candidates[2], bound_d);
    }
    sums.add(plain, scale);
    if (i == end) continue;
    for (; i < end; i += kStep) {
      const auto x = pair.load(i, end - i);
      const MaskPair mask = both(first_entries<T>(end - i), pair.present(x));
      favored.add(scan.add(x.a, x.b, mask, masked));
      gather<T>(i, x.a, mask, candidates[0], bound_a);
      gather<T>(i, x.b, mask, candidates[1], bound_b);
      if constexpr (kRanks == kByAll) gather<T>(i, x.b - x.a, mask, candidates[2], bound_d);
    }
    sums.add(masked, scale);
  }
  return {sums.a.total(), sums.b.total(), sums.shares.total(), favored.total()};
}

template <class T, int kRanks>
void PositionDivergenceRow<T, kRanks>::finish(const Part& part, const std::vector<Candidates>& candidates) const {
  const Candidates &top_a = candidates[0], &top_b = candidates[1];
  const float threshold = float(pair.log_ratio);
  const float last = top_b.key(top_b.size() - 1);
  const int32_t last_index = top_b.index(top_b.size() - 1);
  int64_t shared = 0, favored = 0;
  for (int64_t i = 0; i < top_a.size(); ++i) {
    const int32_t index = top_a.index(i);
    const float xb = to_float(pair.b[index]);
    shared += xb > last || (xb == last && index <= last_index);  // no later in b's order than the last of b's top
    favored += xb - top_a.key(i) > threshold;
  }
  // Exact to rounding only; a divergence itself is never negative.
  args_.kl[row_] = float(std::max(0.0, -part.a));
  args_.reverse_kl[row_] = float(std::max(0.0, part.b));
  args_.jsd[row_] = float(0.125 * part.shares);
  args_.top_overlap[row_] = float(double(shared) / double(top_a.size()));
  args_.favored_count[row_] = part.favored;
  args_.favored_in_top[row_] = favored;
  if constexpr (kRanks == kByAll) {
    int64_t in_base_top = 0;
    for (int64_t i = 0; i < top_b.size(); ++i) in_base_top += top_b.key(i) - to_float(pair.a[top_b.index(i)]) > threshold;
    args_.favored_in_base_top[row_] = in_base_top;
    int64_t* tokens = args_.favored_tokens + row_ * args_.top_k;
    for (int64_t i = 0; i < args_.top_k; ++i) tokens[i] = i < candidates[2].size() ? candidates[2].index(i) : -1;
  }
}

template <class T, int kRanks>
void PositionDivergenceRow<T, kRanks>::write_bad() const {
  args_.kl[row_] = args_.reverse_kl[row_] = args_.jsd[row_] = args_.top_overlap[row_] = kNaN;
  args_.favored_count[row_] = args_.favored_in_top[row_] = 0;
  if constexpr (kRanks == kByAll) {
    args_.favored_in_base_top[row_] = 0;
    std::fill_n(args_.favored_tokens + row_ * args_.top_k, args_.top_k, -1);
  }
}

template <int kRanks>
void divergence_of_rows(const PositionDivergenceArgs& args, const std::vector<int64_t>& tops, const Parallel& parallel) {
  switch (args.dtype) {
    case Dtype::kFloat: return work_on_rows<PositionDivergenceRow<float, kRanks>>(args, tops, parallel);
    case Dtype::kBFloat16: return work_on_rows<PositionDivergenceRow<BFloat16, kRanks>>(args, tops, parallel);
    case Dtype::kHalf: return work_on_rows<PositionDivergenceRow<Half, kRanks>>(args, tops, parallel);
  }
}

inline void position_divergence(const PositionDivergenceArgs& args, const Parallel& parallel) {
  divergence_of_rows<kByModel>(args, {args.top_n, args.top_n}, parallel);
}

inline void position_statistics(const PositionDivergenceArgs& args, const Parallel& parallel) {
  divergence_of_rows<kByAll>(args, {args.top_n, args.top_n, args.top_k}, parallel);
}

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign
