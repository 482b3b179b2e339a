// The contrastive sampler: one token from two models' logits, without a sort of the vocabulary.
//
// x (Eq. 7) is known only after a first pass, which sums exp(a) and exp(b) for the threshold lse(b) - lse(a). That pass
// also ranks a lower bound of x, whose group maxima bound the k-th largest x from below, and keeps the largest a of each
// block, which bounds its x from above. The blocks that can hold one of the k largest x are few; only they are read again.
//
// That first pass is cheaper where only k entries need to know on which side of the threshold they are: the essay in
// contrastive_sample_sift.h.
//
//   few kept (top-k up to kFewTopK, temperature 0): the k largest are chosen exactly, filtered and drawn from in double.
//   else: whatever the filters leave is "x > cut, and the first so many of those equal to it". No filter: no cut, and a
//   second pass over all blocks. top-p and a large top-k: a search for the cut, which weighs the entries above a guess;
//   guesses descend from the largest x, each twice as far, so that they read few blocks where few entries have the mass,
//   then close in until the last kFewInReach entries can be sorted. min-p: the cut follows from the largest x.
//   The draw finds the block by sums of weights, and the entry inside it.
//
// Of heavy ties, however many, only counts are needed. All sums are per block, in float over some hundred entries at
// most, in double across blocks and in their order: results do not depend on threads.
#pragma once

#include <atomic>
#include <memory>
#include <optional>

#include "contrastive_sample_row.h"

namespace deepalign {
namespace DEEPALIGN_ISA {

constexpr int64_t kFewTopK = 2048, kFewInReach = 256;
constexpr int64_t kAllTies = std::numeric_limits<int64_t>::max();

// What filters leave: x > cut and the first `ties` of those equal to it, in the order of their index.
struct SampleKept {
  float cut = -kInfinity;
  int64_t ties = 0;
};

struct SampleTally {
  int64_t above = 0, ties = 0;  // x > cut, x == cut
  double mass = 0;              // of the former
};

template <class T>
class ContrastiveSampleWork {
 public:
  explicit ContrastiveSampleWork(const ContrastiveSampleArgs& args)
      : args_(args), top_k_(few_kept(args)), cut_(args.vocab_size, top_k_ ? std::max<int64_t>(512, 4 * top_k_) : 1),
        maxima_(cut_), candidates_(top_k_ ? top_k_ : kFewInReach, false),
        blocks_(size_t((args.vocab_size + cut_.block - 1) / cut_.block)),
        parts_(size_t(cut_.segments)) {}

  // Over the threads of `parallel`, or in this one if that is null.
  void row(int64_t index, const Parallel* parallel);

 private:
  using Row = ContrastiveSampleRow<T>;
  struct Part {  // of a segment
    SampleSums sums;
    SampleSteps large;
  };

  // How many of the largest x are all that matters, 0 if too many.
  static int64_t few_kept(const ContrastiveSampleArgs& args) {
    if (args.temperature == 0) return 1;
    return args.top_k < args.vocab_size && args.top_k <= kFewTopK ? args.top_k : 0;
  }
  double uniform() const { return args_.uniforms[index_]; }
  void write(int64_t token, double logprob) const {
    args_.token_ids[index_] = token, args_.logprobs[index_] = float(logprob);
  }

  template <class Body>
  void each_segment(const Body& body) const;
  SampleSums scan(const Row& row);
  bool sift(Row& row);
  bool sift_rest(const Row& row, int64_t begin, int64_t end, SampleSums& rough);
  void collect(const Row& row, float bound, float below);
  SampleTally tally(const Row& row, float cut);
  void draw_from_few(const Row& row);
  void draw_from_row(const Row& row);
  SampleKept filtered(const Row& row);
  SampleKept search(const Row& row, bool by_mass, double goal);
  SampleKept settle(const Row& row, bool by_mass, double goal, double above, float low, float high);
  SampleKept share_ties(const SampleTally& at, float cut, double weight, double goal) const;
  float smallest_by_min_p(const Row& row) const;
  double weigh(const Row& row, const SampleKept& kept);

  const ContrastiveSampleArgs& args_;
  const int64_t top_k_;
  const Cut cut_;
  GroupMaxima maxima_;
  Candidates candidates_;
  Buffer<SampleBlock> blocks_;
  std::vector<Part> parts_;
  std::unique_ptr<int32_t[]> steps_;    // of all segments; made by the first sift, like what comes of them
  std::optional<SampleLarge> large_;
  std::vector<double> weights_;
  const Parallel* parallel_ = nullptr;
  int64_t index_ = 0;
  float largest_ = 0.0f;
};

template <class T>
void ContrastiveSampleWork<T>::row(int64_t index, const Parallel* parallel) {
  index_ = index, parallel_ = parallel;
  Row row(args_, cut_, blocks_, index);
  if (!sift(row)) {
    SampleSums sums;
    if (!row.bad() && !row.conclude(sums = scan(row))) {
      if (row.ordinary()) row.start_carefully();
      if (!row.bad()) row.conclude(sums = scan(row));
    }
    if (row.bad()) return write(-1, kNaN);
    collect(row, row.bound(maxima_, std::max<int64_t>(top_k_, 1), sums.largest), kInfinity);
  }
  if (candidates_.size() == 0) return write(-1, kNaN);  // every x is -infinity
  largest_ = candidates_.key(0);
  row.set_largest(largest_);
  if (args_.temperature == 0) return write(candidates_.index(0), 0.0);
  top_k_ ? draw_from_few(row) : draw_from_row(row);
}

// ---- the passes over segments, alone or shared among threads

template <class T>
template <class Body>
void ContrastiveSampleWork<T>::each_segment(const Body& body) const {
  if (!parallel_) {
    for (int64_t i = 0; i < cut_.segments; ++i) body(i);
    return;
  }
  (*parallel_)(cut_.segments, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i);
  });
}

template <class T>
SampleSums ContrastiveSampleWork<T>::scan(const Row& row) {
  maxima_.clear();
  over_segments(
      cut_, parallel_, maxima_,
      [&](int64_t i, GroupMaxima& mine) { parts_[size_t(i)].sums = row.scan(cut_.begin(i), cut_.end(i), mine); },
      [this](const GroupMaxima& other) { maxima_.merge(other); });
  SampleSums sums;
  for (const Part& part : parts_) sums += part.sums;
  return sums;
}

// Leaves the candidates of a row of which few entries are kept, without scanning all of it; false if it cannot.
template <class T>
bool ContrastiveSampleWork<T>::sift(Row& row) {
  // Of h entries in the head k reach its bound, and of the rest then k (size - h) / h, in steps to be listed: the head
  // costs a third of a step per step, a listed one as much as 21 (measured).
  const int64_t size = cut_.size, wanted = std::max(size / 8, int64_t(std::sqrt(64.0 * double(top_k_) * double(size))));
  const int64_t head = wanted / cut_.block * cut_.block, whole = size - size % kStep;
  if (top_k_ == 0 || args_.log_space || head == 0 || 2 * head > size || !row.ordinary()) return false;
  maxima_.clear();
  SampleSums exact = row.template scan<CoarseExponential>(0, head, maxima_), rough;
  const float bound = row.bound(maxima_, top_k_, exact.largest);
  if (!row.set_large(exact, bound) || !sift_rest(row, head, whole, rough)) return false;
  large_->reset(bound);
  for (const Part& part : parts_) exact += row.weigh(part.large, *large_, maxima_);
  exact += row.weigh_staged(*large_, maxima_);
  if (large_->kept.full()) return false;
  exact += row.scan(whole, cut_.size, maxima_);
  if (!row.conclude_roughly(exact, rough)) return false;
  candidates_.reset(std::max(bound, row.bound(maxima_, top_k_, exact.largest)));
  bool doubt = row.collect(0, head, kInfinity, candidates_);
  doubt |= row.collect(large_->kept, candidates_);
  doubt |= row.collect(whole, cut_.size, kInfinity, candidates_);
  if (doubt) return false;
  candidates_.finish();
  return true;
}

// false if too much is large for a list of it to pay.
template <class T>
bool ContrastiveSampleWork<T>::sift_rest(const Row& row, int64_t begin, int64_t end, SampleSums& rough) {
  if (!steps_) {
    steps_.reset(new int32_t[size_t(cut_.size / kStep + 1)]);  // not filled: most of it is never touched
    large_.emplace(top_k_);
  }
  std::atomic<bool> crowded{false};
  each_segment([&](int64_t i) {
    const int64_t first = std::max(begin, cut_.begin(i)), last = std::max(first, std::min(end, cut_.end(i)));
    Part& part = parts_[size_t(i)] = {{}, {&steps_[size_t(first / kStep)], 0}};
    if (crowded.load(std::memory_order_relaxed)) return;
    part.sums = row.sift(first, last, part.large);
    if (2 * part.large.size > (last - first) / kStep) crowded = true;
  });
  for (const Part& part : parts_) rough += part.sums;
  return !crowded;
}

// The entries with bound <= x < below, descending; the k largest if there are too many.
template <class T>
void ContrastiveSampleWork<T>::collect(const Row& row, float bound, float below) {
  candidates_.reset(bound);
  over_segments(
      cut_, parallel_, candidates_, [&](int64_t i, Candidates& mine) { row.collect(cut_.begin(i), cut_.end(i), below, mine); },
      [this](const Candidates& other) { candidates_.merge(other); });
  candidates_.finish();
}

template <class T>
SampleTally ContrastiveSampleWork<T>::tally(const Row& row, float cut) {
  each_segment([&](int64_t i) { row.tally(i, cut); });
  SampleTally sum;
  for (const SampleBlock& block : blocks_) sum.above += block.above, sum.ties += block.ties, sum.mass += block.mass;
  return sum;
}

// ---- few entries kept: the candidates are the k largest

template <class T>
void ContrastiveSampleWork<T>::draw_from_few(const Row& row) {
  int64_t kept = candidates_.size();
  weights_.resize(size_t(kept));
  double total = 0.0, before = 0.0;
  for (int64_t i = 0; i < kept; ++i) total += weights_[size_t(i)] = row.weight(candidates_.key(i));
  if (args_.top_p < 1) {
    int64_t n = 0;
    for (; n < kept && before < args_.top_p * total; ++n) before += weights_[size_t(n)];
    kept = n;
  }
  while (kept > 1 && weights_[size_t(kept - 1)] < args_.min_p) --kept;
  total = 0.0;
  candidates_.in_index_order(kept, [&](int64_t rank) { total += weights_[size_t(rank)]; });
  SampleDraw draw{uniform() * total};
  candidates_.in_index_order(kept, [&](int64_t rank) {
    draw.offer(candidates_.index(rank), candidates_.key(rank), weights_[size_t(rank)]);
  });
  write(draw.token, row.exponent(draw.x) - std::log(total));
}

// ---- many entries kept

template <class T>
void ContrastiveSampleWork<T>::draw_from_row(const Row& row) {
  const SampleKept kept = filtered(row);
  const double total = weigh(row, kept), target = uniform() * total;
  double reached = 0.0, before = 0.0;
  size_t chosen = 0;
  for (size_t i = 0; i < blocks_.size() && !(reached > target); ++i) {
    if (blocks_[i].mass > 0.0) chosen = i, before = reached, reached += blocks_[i].mass;
  }
  SampleDraw draw{target - before};
  row.offer(int64_t(chosen), kept.cut, blocks_[chosen].ties, draw);
  write(draw.token, row.exponent(draw.x) - std::log(total));
}

// Leaves in each block how many ties it keeps and the mass that it keeps; returns the sum of the latter.
template <class T>
double ContrastiveSampleWork<T>::weigh(const Row& row, const SampleKept& kept) {
  tally(row, kept.cut);
  int64_t left = kept.ties;
  double total = 0.0;
  const double weight = left > 0 ? row.weight(kept.cut) : 0.0;
  for (SampleBlock& block : blocks_) {
    block.ties = std::min(block.ties, left), left -= block.ties;
    block.mass += weight * double(block.ties);
    total += block.mass;
  }
  return total;
}

template <class T>
SampleKept ContrastiveSampleWork<T>::filtered(const Row& row) {
  SampleKept kept;
  const auto restrict_to = [&kept](SampleKept other) {
    if (other.cut > kept.cut || (other.cut == kept.cut && other.ties < kept.ties)) kept = other;
  };
  if (args_.top_k > 0 && args_.top_k < args_.vocab_size) restrict_to(search(row, false, double(args_.top_k)));
  if (args_.top_p < 1) restrict_to(search(row, true, args_.top_p * weigh(row, kept)));
  if (args_.min_p > 0) restrict_to({smallest_by_min_p(row), kAllTies});
  return kept;
}

// The smallest x of weight >= min_p.
template <class T>
float ContrastiveSampleWork<T>::smallest_by_min_p(const Row& row) const {
  int64_t low = int64_t(ordered(-kLargestFloat)) - 1, high = ordered(largest_);
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (row.weight(from_ordered(int32_t(middle))) >= args_.min_p ? high : low) = middle;
  }
  return from_ordered(int32_t(high));
}

// The shortest prefix of the descending order whose mass, or whose length, reaches the goal.
template <class T>
SampleKept ContrastiveSampleWork<T>::search(const Row& row, bool by_mass, double goal) {
  const auto measure = [by_mass](int64_t count, double mass) { return by_mass ? mass : double(count); };
  // The last entry of the prefix is in [low, high); what is known of x >= high, and how many are in [low, infinity).
  float low = -kInfinity, high = kInfinity, guess = largest_;
  double above = 0.0, reach = std::max({by_mass ? args_.temperature : 1.0, std::abs(double(largest_)) * 0x1p-22, 1e-30});
  int64_t count_above = 0, count_low = 0;
  for (bool halve = true;; halve = !halve) {
    const SampleTally at = tally(row, guess);
    const double weight = row.weight(guess), all = measure(at.above + at.ties, at.mass + weight * double(at.ties));
    if (measure(at.above, at.mass) >= goal) {
      low = from_ordered(ordered(guess) + 1), count_low = at.above;
    } else if (all >= goal) {
      return share_ties(at, guess, by_mass ? weight : 1.0, goal - measure(at.above, at.mass));
    } else {
      high = guess, above = all, count_above = at.above + at.ties;
    }
    if (high == -kLargestFloat) return {};  // even all entries do not reach it
    if (low == -kInfinity) {
      guess = std::max(-kLargestFloat, float(largest_ - reach)), reach *= 2;
      continue;
    }
    if (!(low < high)) return {high, kAllTies};  // as near as rounding tells
    if (count_low - count_above <= kFewInReach) return settle(row, by_mass, goal, above, low, high);
    // Halving the interval closes in fast, halving the number of floats in it always comes to an end.
    const int64_t first = ordered(low), last = int64_t(ordered(high)) - 1;
    const int64_t middle = halve ? ordered(float(0.5 * (double(low) + double(high)))) : first + (last - first) / 2;
    guess = from_ordered(int32_t(std::max(first, std::min(last, middle))));
  }
}

// Of entries equal to the cut, as many as the goal still needs.
template <class T>
SampleKept ContrastiveSampleWork<T>::share_ties(const SampleTally& at, float cut, double weight, double goal) const {
  int64_t n = std::max<int64_t>(1, std::min(at.ties, int64_t(std::ceil(goal / weight))));
  while (n > 1 && double(n - 1) * weight >= goal) --n;
  while (n < at.ties && double(n) * weight < goal) ++n;
  return {cut, n};
}

// The end of a search among the few entries in [low, high).
template <class T>
SampleKept ContrastiveSampleWork<T>::settle(
    const Row& row, bool by_mass, double goal, double above, float low, float high) {
  collect(row, low, high);
  SampleKept kept{high, kAllTies};
  for (int64_t i = 0; i < candidates_.size() && above < goal; ++i) {
    const float x = candidates_.key(i);
    kept = {x, x == kept.cut ? kept.ties + 1 : 1};
    above += by_mass ? row.weight(x) : 1.0;
  }
  return kept;
}

// ---- rows

template <class T>
void contrastive_sample_of(const ContrastiveSampleArgs& args, const Parallel& parallel) {
  // Rows that come out even over the threads are shared row by row, the rest within the row.
  const int64_t whole = args.rows - args.rows % parallel.threads;
  parallel(whole, [&](int64_t first, int64_t last) {
    ContrastiveSampleWork<T> work(args);
    for (int64_t row = first; row < last; ++row) work.row(row, nullptr);
  });
  if (whole == args.rows) return;
  ContrastiveSampleWork<T> work(args);
  for (int64_t row = whole; row < args.rows; ++row) work.row(row, &parallel);
}

inline void contrastive_sample(const ContrastiveSampleArgs& args, const Parallel& parallel) {
  switch (args.dtype) {
    case Dtype::kFloat: return contrastive_sample_of<float>(args, parallel);
    case Dtype::kBFloat16: return contrastive_sample_of<BFloat16>(args, parallel);
    case Dtype::kHalf: return contrastive_sample_of<Half>(args, parallel);
  }
}

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign
