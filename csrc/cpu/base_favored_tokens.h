// The tokens that the base model raises most over the aligned one, and what the operations on these two models share:
// partitions in one pass, bounds for the largest entries, the order in which rows and their parts are worked on.
//
// Pass 1 (`ModelPair::scan`) reads a and b once, sums exp(a) and exp(b) and keeps maxima of groups of what the operation
// ranks: d = b - a, or the logits of each model. Pass 2, the operation's own, knows lse(b) - lse(a), counts the entries
// above it and collects those that reach the bound of the maxima, among which the largest are then chosen exactly.
//
// No maximum is tracked, as in completion_loss_math.h: a row whose sums are infinite, NaN or out of range is done again,
// carefully, with true maxima and absent entries masked. The sum of d is there for this only: it is finite just where
// all entries are.
#pragma once

#include <algorithm>

#include "selection.h"

namespace deepalign {
namespace DEEPALIGN_ISA {

// What pass 2 ranks entries by, and how many rankings that makes: d; a and b; a, b and d.
constexpr int kByDifference = 1, kByModel = 2, kByAll = 3;

// A row's sums, relative to its offsets.
struct PairSums {
  double a = 0, b = 0;  // 2^(log2(e) x - offset)
  double d = 0;

  void operator+=(const PairSums& other) { a += other.a, b += other.b, d += other.d; }
};

// What is subtracted in the exponents: whole bits for ordinary rows, maxima for careful ones.
struct PairOffsets {
  int a = 0, b = 0;
  float max_a = 0, max_b = 0;
};

// What a loop over a block carries.
template <int kRankings>
struct PairAccumulators {
  Float a, b, d;
  Pair largest[kRankings];

  // Not by initialisers: the constructor that they make would be compiled for the plain processor.
  void clear() {
    a = b = d = splat(0);
    for (Pair& maxima : largest) maxima = twice(splat(-kInfinity));
  }
  DEEPALIGN_INLINE void rank(Pair xa, Pair xb, Pair difference) {
    largest[0] = max(kRankings == kByDifference ? difference : xa, largest[0]);
    if constexpr (kRankings >= kByModel) largest[1] = max(xb, largest[1]);
    if constexpr (kRankings == kByAll) largest[2] = max(difference, largest[2]);
  }
};

// Far below every maximum: its exponential is 0.
DEEPALIGN_INLINE Float far_below() { return splat(float(-200.0 / kLog2E)); }

// Pass 1 over a step.
template <int kRankings>
struct PairScan {
  OpenExponential open_a, open_b;
  Exponential exp_a, exp_b;
  Float max_a, max_b;
  bool careful;

  bool is_right_for(Interval x) const { return holds(right_within(open_a), x) && holds(right_within(open_b), x); }

  DEEPALIGN_INLINE void add(Pair xa, Pair xb, PairAccumulators<kRankings>& sums) const {
    const Pair d = xb - xa;  // in float: the spacing of bf16 at |x| ~ 16 is 0.125
    sums.d = add_both(sums.d, d);
    sums.rank(xa, xb, d);
    sums.a = open_a.add_to(sums.a, xa);
    sums.b = open_b.add_to(sums.b, xb);
  }

  // Under a mask, with maxima subtracted: for careful rows, whose other entries are finite or absent, and for the end of
  // ordinary ones, where whatever is not finite must come through.
  DEEPALIGN_INLINE void add(Pair xa, Pair xb, MaskPair mask, PairAccumulators<kRankings>& sums) const {
    const Float zero = splat(0), lowest = splat(-kInfinity);
    const Pair d = xb - xa;
    if (careful) mask = both(mask, finite(xa, xb));
    sums.a = add_both(sums.a, choose(mask, exp_a(max(far_below(), xa - max_a)), zero));
    sums.b = add_both(sums.b, choose(mask, exp_b(max(far_below(), xb - max_b)), zero));
    sums.d = add_both(sums.d, choose(mask, d, zero));
    sums.rank(choose(mask, xa, lowest), choose(mask, xb, lowest), choose(mask, d, lowest));
  }
};

struct PairLaneSums {
  LaneSum a, b, d;

  template <int kRankings>
  void add_block(
      int64_t begin, const PairAccumulators<kRankings>& block, float scale, std::vector<GroupMaxima>& maxima) {
    const double factor = 1.0 / double(scale);
    a.add(block.a, factor), b.add(block.b, factor), d.add(block.d);
    for (size_t r = 0; r < kRankings; ++r) maxima[r].merge_block(begin, block.largest[r]);
  }
  PairSums total() const { return {a.total(), b.total(), d.total()}; }
};

// One row of both models.
template <class T, int kRankings>
struct ModelPair {
  struct Step {
    Pair a, b;
  };

  ModelPair(const Logits& aligned, const Logits& base, const Cut& cut, int64_t row)
      : cut(cut), a(row_of<T>(aligned, row)), b(row_of<T>(base, row)) {
    guess_offsets();
  }

  DEEPALIGN_INLINE Step load(int64_t i, int64_t n) const { return {load_step(a + i, n), load_step(b + i, n)}; }
  MaskPair present(const Step& x) const;  // in an ordinary row everything is
  PairSums scan(int64_t segment, std::vector<GroupMaxima>& maxima) const;
  bool conclude(const PairSums& sums);  // false: the sums are no use, start carefully
  void start_carefully();

  const Cut& cut;
  const T *const a, *const b;
  bool careful = false, bad = false;
  PairOffsets offsets;
  double log2_a = 0, log2_b = 0;  // partitions, offsets included
  double log_ratio = 0;           // lse(b) - lse(a): d above it is base-favored

 private:
  void guess_offsets();
};

template <class T, int kRankings>
MaskPair ModelPair<T, kRankings>::present(const Step& x) const {
  if (!careful) return {all_lanes(), all_lanes()};
  return finite(x.a, x.b);
}

// The largest of the first entries stands for the row's largest.
template <class T, int kRankings>
void ModelPair<T, kRankings>::guess_offsets() {
  float largest_a = -kInfinity, largest_b = -kInfinity;
  for (int64_t i = 0; i < std::min<int64_t>(64, cut.size); ++i) {
    largest_a = std::max(largest_a, to_float(a[i])), largest_b = std::max(largest_b, to_float(b[i]));
  }
  if (!whole_bits(largest_a, kLog2E, &offsets.a) || !whole_bits(largest_b, kLog2E, &offsets.b)) start_carefully();
}

// Finds true maxima, absent entries, and whether the row is bad.
template <class T, int kRankings>
void ModelPair<T, kRankings>::start_carefully() {
  careful = true;
  offsets = PairOffsets();
  const Float lowest = splat(-kInfinity);
  Float largest_a = lowest, largest_b = lowest;
  int64_t entries = 0, absent = 0;
  const auto add = [&](Float xa, Float xb, Mask exists) {
    const Mask here = both(exists, finite(xa, xb));
    entries += count(here);
    absent += count(both(exists, both(equal(xa, lowest), equal(xb, lowest))));
    largest_a = max(choose(here, xa, lowest), largest_a), largest_b = max(choose(here, xb, lowest), largest_b);
  };
  for (int64_t i = 0; i < cut.size; i += kStep) {
    const Step x = load(i, cut.size - i);
    const MaskPair exists = first_entries<T>(cut.size - i);
    add(x.a.first, x.b.first, exists.first);
    add(x.a.second, x.b.second, exists.second);
  }
  offsets.max_a = largest_lane(largest_a), offsets.max_b = largest_lane(largest_b);
  bad = entries == 0 || entries + absent < cut.size;
}

template <class T, int kRankings>
PairSums ModelPair<T, kRankings>::scan(int64_t segment, std::vector<GroupMaxima>& maxima) const {
  const FlushToZero flush;
  const float bits = float(kLog2E);
  const PairScan<kRankings> unscaled{
      OpenExponential(bits, offsets.a), OpenExponential(bits, offsets.b), Exponential(bits, offsets.a), Exponential(bits, offsets.b),
      splat(offsets.max_a), splat(offsets.max_b), careful};
  PairLaneSums sums;
  for (int64_t begin = cut.begin(segment); begin < cut.end(segment); begin += cut.block) {
    const int64_t end = std::min(begin + cut.block, cut.end(segment));
    const float scale = scale_of_part(begin / cut.block);
    PairScan<kRankings> scan = unscaled;
    scale_all(scale, scan.open_a, scan.open_b, scan.exp_a, scan.exp_b);
    PairAccumulators<kRankings> plain, masked;
    plain.clear(), masked.clear();
    Extremes<T> extremes;
    extremes.clear();
    int64_t i = begin;
    for (; !careful && i + kStep <= end; i += kStep) {
      extremes.see(a + i), extremes.see(b + i);
      prefetch_step(a + i), prefetch_step(b + i);
      scan.add(load_pair(a + i), load_pair(b + i), plain);
    }
    if (kWatched && !scan.is_right_for(extremes.interval())) plain.clear(), i = begin;
    sums.add_block(begin, plain, scale, maxima);
    if (i == end) continue;
    for (; i < end; i += kStep) {
      const Step x = load(i, end - i);
      scan.add(x.a, x.b, first_entries<T>(end - i), masked);
    }
    sums.add_block(begin, masked, scale, maxima);
  }
  return sums.total();
}

template <class T, int kRankings>
bool ModelPair<T, kRankings>::conclude(const PairSums& sums) {
  log2_a = std::log2(sums.a) + offsets.a, log2_b = std::log2(sums.b) + offsets.b;
  const double limit = Exponential::kMaxOffset;
  const bool usable = std::abs(log2_a) < limit && std::abs(log2_b) < limit && std::abs(sums.d) < double(kInfinity);
  if (!usable && !careful) return false;
  // Divided by the very scale of the exponents: a shift of all logits cancels, equal models differ by 0.
  const double ratio = (log2_b - log2_a) / double(float(kLog2E)) + (double(offsets.max_b) - offsets.max_a);
  const double widest = std::numeric_limits<float>::max();  // only maxima of 3e38 are further apart
  log_ratio = std::max(-widest, std::min(widest, ratio));
  const float rounded = float(log_ratio), threshold = between_differences(rounded, a, b, cut.size);
  if (threshold != rounded) log_ratio = threshold;
  return true;
}

// ---- the order of work

// A row alone, its segments one after the other or shared among threads: the same sums, added in the same order. Maxima
// and candidates are kept per thread: the largest entries do not depend on how they were gathered.
//
// A Row has a ModelPair `pair`, and of its own: `Part`, what pass 2 sums; `collect`, its second pass; `finish` and
// `write_bad`, which write the results.
template <class Row>
class PairWork {
 public:
  using Args = typename Row::Args;
  using Part = typename Row::Part;

  PairWork(const Args& args, int64_t vocab_size, const std::vector<int64_t>& tops)
      : args_(args), tops_(tops), cut_(vocab_size, std::max<int64_t>(512, 4 * *std::max_element(tops.begin(), tops.end()))),
        maxima_(Row::kRankings, GroupMaxima(cut_)) {
    for (const int64_t top : tops) candidates_.emplace_back(top, false);
  }

  void row(int64_t index, const Parallel* parallel) {
    Row row(args_, cut_, index);
    if (!row.pair.bad && !row.pair.conclude(scan(row, parallel))) {
      row.pair.start_carefully();
      if (!row.pair.bad) row.pair.conclude(scan(row, parallel));
    }
    if (row.pair.bad) return row.write_bad();
    for (size_t r = 0; r < maxima_.size(); ++r) candidates_[r].reset(maxima_[r].bound(tops_[r]));
    const Part part = collect(row, parallel);
    for (Candidates& ranking : candidates_) ranking.finish();
    row.finish(part, candidates_);
  }

 private:
  PairSums scan(const Row& row, const Parallel* parallel) {
    std::vector<PairSums> parts(static_cast<size_t>(cut_.segments));
    for (GroupMaxima& groups : maxima_) groups.clear();
    over_segments(
        cut_, parallel, maxima_,
        [&](int64_t i, std::vector<GroupMaxima>& mine) { parts[size_t(i)] = row.pair.scan(i, mine); },
        [this](const std::vector<GroupMaxima>& other) {
          for (size_t r = 0; r < other.size(); ++r) maxima_[r].merge(other[r]);
        });
    PairSums sums;
    for (const PairSums& part : parts) sums += part;
    return sums;
  }

  Part collect(const Row& row, const Parallel* parallel) {
    std::vector<Part> parts(static_cast<size_t>(cut_.segments));
    over_segments(
        cut_, parallel, candidates_,
        [&](int64_t i, std::vector<Candidates>& mine) { parts[size_t(i)] = row.collect(i, mine); },
        [this](const std::vector<Candidates>& other) {
          for (size_t r = 0; r < other.size(); ++r) candidates_[r].merge(other[r]);
        });
    Part sum;
    for (const Part& part : parts) sum += part;
    return sum;
  }

  const Args& args_;
  const std::vector<int64_t> tops_;  // how many largest, per ranking
  const Cut cut_;
  std::vector<GroupMaxima> maxima_;
  std::vector<Candidates> candidates_;
};

template <class Row>
void work_on_rows(const typename Row::Args& args, const std::vector<int64_t>& tops, const Parallel& parallel) {
  // Rows that come out even over the threads are shared row by row, the rest within the row.
  const int64_t whole = args.rows - args.rows % parallel.threads;
  parallel(whole, [&](int64_t first, int64_t last) {
    PairWork<Row> work(args, args.vocab_size, tops);
    for (int64_t row = first; row < last; ++row) work.row(row, nullptr);
  });
  if (whole == args.rows) return;
  PairWork<Row> work(args, args.vocab_size, tops);
  for (int64_t row = whole; row < args.rows; ++row) work.row(row, &parallel);
}

// ---- base-favored tokens

template <class T>
struct BaseFavoredRow {
  using Args = BaseFavoredTokensArgs;
  static constexpr int kRankings = kByDifference;
  struct Part {
    int64_t favored = 0;
    void operator+=(const Part& other) { favored += other.favored; }
  };

  BaseFavoredRow(const Args& args, const Cut& cut, int64_t row)
      : args(args), row(row), pair(args.aligned, args.base, cut, row) {}

  Part collect(int64_t segment, std::vector<Candidates>& candidates) const;
  void finish(const Part& part, const std::vector<Candidates>& candidates) const;
  void write_bad() const { write(0, -1, kNaN); }
  void write(int64_t count, int64_t index, float difference) const;

  const Args& args;
  const int64_t row;
  ModelPair<T, kRankings> pair;
};

template <class T>
typename BaseFavoredRow<T>::Part BaseFavoredRow<T>::collect(int64_t segment, std::vector<Candidates>& candidates) const {
  const Cut& cut = pair.cut;
  return {collect_differences(pair.a, pair.b, cut.begin(segment), cut.end(segment), float(pair.log_ratio), candidates[0])};
}

template <class T>
void BaseFavoredRow<T>::finish(const Part& part, const std::vector<Candidates>& candidates) const {
  write(part.favored, -1, -kInfinity);
  for (int64_t i = 0; i < candidates[0].size(); ++i) {
    args.indices[row * args.top_k + i] = candidates[0].index(i);
    args.differences[row * args.top_k + i] = candidates[0].key(i);
  }
}

template <class T>
void BaseFavoredRow<T>::write(int64_t count, int64_t index, float difference) const {
  args.count[row] = count;
  std::fill_n(args.indices + row * args.top_k, args.top_k, index);
  std::fill_n(args.differences + row * args.top_k, args.top_k, difference);
}

inline void base_favored_tokens(const BaseFavoredTokensArgs& args, const Parallel& parallel) {
  switch (args.dtype) {
    case Dtype::kFloat: return work_on_rows<BaseFavoredRow<float>>(args, {args.top_k}, parallel);
    case Dtype::kBFloat16: return work_on_rows<BaseFavoredRow<BFloat16>>(args, {args.top_k}, parallel);
    case Dtype::kHalf: return work_on_rows<BaseFavoredRow<Half>>(args, {args.top_k}, parallel);
  }
}

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign
