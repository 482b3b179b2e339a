// A row of the contrastive sampler: what is computed of its entries x (Eq. 7), block by block. The order of the passes
// and what is decided between them are in contrastive_sample.h.
#pragma once

#include "selection.h"

namespace deepalign {
namespace DEEPALIGN_ISA {

constexpr float kLargestFloat = std::numeric_limits<float>::max();

// Sums of exp(a - origin_a) and exp(b - origin_b), times a power of two, of some entries; `spread` is finite just where
// all of them are, `largest` is their largest a.
struct SampleSums {
  double a = 0, b = 0, spread = 0;
  float largest = -kInfinity;
  void operator+=(const SampleSums& other) {
    a += other.a, b += other.b, spread += other.spread, largest = std::max(largest, other.largest);
  }
  bool in_range() const { return a > 0x1p-100 && a < 0x1p100 && b > 0x1p-100 && b < 0x1p100; }
};

// The beginnings of steps, ascending.
struct SampleSteps {
  int32_t* begin = nullptr;
  int64_t size = 0;
};

// Entries of both models in the order of their index, up to a step beyond `capacity`.
class SampleEntries {
 public:
  explicit SampleEntries(int64_t capacity)
      : capacity_(capacity), memory_(capacity + 2 * kStep, 3), a_(memory_.floats(0)), b_(memory_.floats(1)),
        index_(memory_.ints(2)) {}
  void clear() { size_ = 0; }
  int64_t size() const { return size_; }
  bool full() const { return size_ > capacity_; }
  Pair a(int64_t i) const { return load_pair(a_ + i); }
  Pair b(int64_t i) const { return load_pair(b_ + i); }
  const int32_t* index(int64_t i) const { return index_ + i; }

  DEEPALIGN_INLINE void add(int32_t index, float a, float b) { index_[size_] = index, a_[size_] = a, b_[size_++] = b; }
  DEEPALIGN_INLINE void add(const int32_t* index, MaskPair mask, Pair a, Pair b) {
    add_half(index, mask.first, a.first, b.first), add_half(index + kLanes, mask.second, a.second, b.second);
  }

 private:
  DEEPALIGN_INLINE void add_half(const int32_t* index, Mask mask, Float a, Float b) {
    append(index_ + size_, mask, index);
    append(a_ + size_, mask, a);
    size_ += append(b_ + size_, mask, b);
  }

  int64_t capacity_, size_ = 0;
  Columns memory_;
  float *a_, *b_;
  int32_t* index_;
};

// The larger entries of a sifted row: `staged` on their way to be weighed, `kept` those that may be among the k largest.
struct SampleLarge {
  SampleEntries staged{128}, kept;  // few: memory that is written for the first time costs more than another batch
  float bound = 0.0f;
  int64_t weighed = 0;  // steps

  explicit SampleLarge(int64_t k) : kept(1024 + 16 * k) {}
  void reset(float reached) { staged.clear(), kept.clear(), bound = reached, weighed = 0; }
};

struct SampleBlock {
  float peak;     // its largest a, which no x of it exceeds
  int64_t above;  // of the latest tally: entries with x > cut,
  int64_t ties;   // with x == cut,
  double mass;    // and the weights of the former
};

// x of a step.
struct Contrast {
  Float limit, shift, alpha;

  // As the reference rounds it: no fused multiply-add.
  DEEPALIGN_INLINE Pair operator()(Pair a, Pair b) const {
    const Pair d = b - a;  // in float: the spacing of bf16 at |x| ~ 16 is 0.125
    return choose(greater(d, limit), a - (d - shift) * alpha, a);
  }
};

// Pass 1 over a block.
template <class Exp>
struct SampleScan {
  Exp exp;
  Float origin_a, origin_b, minus_alpha, start, floor;
  Float a, b, spread, peak;
  Pair lowered;

  void clear() {
    a = b = spread = splat(0);
    peak = splat(-kInfinity), lowered = twice(peak);
  }
  DEEPALIGN_INLINE void add(Pair xa, Pair xb) {  // of an ordinary row, where origin_a is 0
    const Pair d = xb - xa;
    spread = add_both(spread, d);
    peak = max(xa.second, max(xa.first, peak));
    lowered = max(fma(minus_alpha, max(d, start), xa), lowered);
    a = exp.add_to(a, xa);
    b = exp.add_to(b, xb - origin_b);
  }
  DEEPALIGN_INLINE void add(Pair xa, Pair xb, MaskPair mask) {
    const Float zero = splat(0), lowest = splat(-kInfinity);
    const Pair d = xb - xa, seen = choose(mask, xa, lowest);
    a = exp.add_to(a, choose(mask, max(floor, xa - origin_a), floor));
    b = exp.add_to(b, choose(mask, max(floor, xb - origin_b), floor));
    spread = add_both(spread, choose(mask, d, zero));
    peak = max(seen.second, max(seen.first, peak));
    lowered = max(choose(mask, fma(minus_alpha, max(d, start), xa), lowest), lowered);
  }
};

// 2^(scale x), exactly 1 at 0: equal entries at the top then have exact sums. The exponential is off by its own error
// there, which a factor next to 1 makes good.
inline Exponential weight_exponential(float scale) {
  float factor = 1.0f;
  for (int tries = 0; tries < 4; ++tries) {
    const float one = largest_lane(Exponential(scale, 0, factor)(splat(0)));
    if (one == 1.0f) break;
    factor = std::nextafter(factor, one > 1.0f ? 0.0f : 2.0f);
  }
  return Exponential(scale, 0, factor);
}

// Entries offered in the order of their index: the first at which the running sum of weights exceeds the target, else
// the last that has weight.
struct SampleDraw {
  double target, reached = 0.0;
  int64_t token = -1;
  float x = 0;
  bool done = false;

  void offer(int64_t index, float value, double weight) {
    if (done || !(weight > 0.0)) return;
    token = index, x = value;
    reached += weight;
    done = reached > target;
  }
};

template <class T>
class ContrastiveSampleRow {
 public:
  ContrastiveSampleRow(const ContrastiveSampleArgs& args, const Cut& cut, Buffer<SampleBlock>& blocks, int64_t row);

  bool bad() const { return bad_; }
  bool ordinary() const { return !careful_; }
  void start_carefully();
  template <class Exp = Exponential>
  SampleSums scan(int64_t begin, int64_t end, GroupMaxima& maxima) const;
  bool conclude(const SampleSums& sums);  // false: the sums are no use, start carefully
  float bound(const GroupMaxima& maxima, int64_t k, float largest) const;

  // In place of a scan of all (contrastive_sample_sift.h).
  bool set_large(const SampleSums& head, float bound);
  SampleSums sift(int64_t begin, int64_t end, SampleSteps& large) const;
  SampleSums weigh(const SampleSteps& steps, SampleLarge& large, GroupMaxima& maxima) const;
  SampleSums weigh_staged(SampleLarge& large, GroupMaxima& maxima) const;
  bool conclude_roughly(const SampleSums& exact, const SampleSums& rough);

  // The rest after one of the conclusions, and all but `collect` after `set_largest`. What is collected is what has
  // bound <= x < below; the result says whether an entry of it is in doubt.
  bool collect(int64_t begin, int64_t end, float below, Candidates& candidates) const;
  bool collect(const SampleEntries& kept, Candidates& candidates) const;
  void set_largest(float x);
  void tally(int64_t segment, float cut) const;
  void offer(int64_t block, float cut, int64_t ties, SampleDraw& draw) const;
  double exponent(float x) const { return (double(x) - largest_) / args_.temperature; }
  double weight(float x) const { return std::exp(exponent(x)); }

 private:
  Pair contrasted(int64_t i, int64_t n) const;
  bool in_doubt(MaskPair chosen, Pair d) const;
  bool collect_step(int64_t i, float below, Candidates& candidates) const;
  Pair weights(Pair x) const;
  template <bool kAll>
  void tally_block(SampleBlock& block, int64_t begin, int64_t end, float cut) const;
  void tally_exactly(SampleBlock& block, int64_t begin, int64_t end, float cut) const;
  void set_contrast(double threshold);
  static void unpack(Pair x, float* to);
  SampleBlock& block_at(int64_t begin) const { return blocks_[size_t(begin / cut_.block)]; }

  const ContrastiveSampleArgs& args_;
  const Cut& cut_;
  Buffer<SampleBlock>& blocks_;
  const T *const a_, *const b_;
  const float alpha_, scale_, floor_;
  bool careful_ = false, bad_ = false, exact_ = false;
  float origin_a_ = 0.0f, origin_b_ = 0.0f, start_ = 0.0f, largest_ = 0.0f;
  float large_a_ = 0.0f, large_b_ = 0.0f, doubt_above_ = kInfinity;
  int offset_ = 0;
  double threshold_ = 0.0;
  Contrast contrast_;
  Exponential exp_;
};

template <class T>
ContrastiveSampleRow<T>::ContrastiveSampleRow(
    const ContrastiveSampleArgs& args, const Cut& cut, Buffer<SampleBlock>& blocks, int64_t row)
    : args_(args), cut_(cut), blocks_(blocks), a_(row_of<T>(args.aligned, row)), b_(row_of<T>(args.base, row)),
      alpha_(float(args.alpha)), scale_(float(std::max(0x1p-60, std::min(0x1p60, kLog2E / args.temperature)))),
      floor_(-200.0f / scale_), exp_(weight_exponential(scale_)) {
  // The largest of the first entries stands for the row's largest. Whole bits cost nothing, so only b is shifted, by what
  // makes both sums equal, to the bit, where the models are equal up to a shift.
  float largest_a = -kInfinity, largest_b = -kInfinity;
  for (int64_t i = 0; i < std::min<int64_t>(64, cut.size); ++i) {
    largest_a = std::max(largest_a, to_float(a_[i])), largest_b = std::max(largest_b, to_float(b_[i]));
  }
  origin_b_ = largest_b - largest_a;
  if (!whole_bits(largest_a, kLog2E, &offset_) || !(std::abs(origin_b_) < 1e30f)) start_carefully();
}

// Finds true maxima, absent entries, and whether the row is bad.
template <class T>
void ContrastiveSampleRow<T>::start_carefully() {
  careful_ = true;
  offset_ = 0;
  const Float lowest = splat(-kInfinity);
  Float largest_a = lowest, largest_b = lowest;
  int64_t present = 0, absent = 0;
  const auto add = [&](Float a, Float b, Mask exists) {
    const Mask here = both(exists, finite(a, b));
    present += count(here);
    absent += count(both(exists, both(equal(a, lowest), equal(b, lowest))));
    largest_a = max(choose(here, a, lowest), largest_a), largest_b = max(choose(here, b, lowest), largest_b);
  };
  for (int64_t i = 0; i < cut_.size; i += kStep) {
    const Pair a = load_step(a_ + i, cut_.size - i), b = load_step(b_ + i, cut_.size - i);
    const MaskPair exists = first_entries<T>(cut_.size - i);
    add(a.first, b.first, exists.first);
    add(a.second, b.second, exists.second);
  }
  origin_a_ = largest_lane(largest_a), origin_b_ = largest_lane(largest_b);
  bad_ = present == 0 || present + absent < cut_.size;
}

// ---- pass 1

// What is ranked is a lower bound for x: a - alpha max(d, start), to which `bound` adds alpha min(start, threshold). In
// logits, start is 0; in log-probabilities, a guess of the threshold.
template <class T>
template <class Exp>
SampleSums ContrastiveSampleRow<T>::scan(int64_t first, int64_t last, GroupMaxima& maxima) const {
  const FlushToZero flush;
  const float bits = float(kLog2E), start = args_.log_space ? origin_b_ - origin_a_ : 0.0f;
  SampleScan<Exp> scan{Exp(bits, offset_), splat(origin_a_), splat(origin_b_), splat(-alpha_), splat(start),
                  splat(-200.0f / bits), splat(0), splat(0), splat(0), splat(0), {splat(0), splat(0)}};
  LaneSum sum_a, sum_b, spread;
  float largest = -kInfinity;
  for (int64_t begin = first; begin < last; begin += cut_.block) {
    const int64_t end = std::min(begin + cut_.block, last);
    int64_t i = begin;
    scan.clear();
    for (; !careful_ && i + kStep <= end; i += kStep) {
      prefetch_step(a_ + i), prefetch_step(b_ + i);
      scan.add(load_pair(a_ + i), load_pair(b_ + i));
    }
    for (; i < end; i += kStep) {
      const Pair a = load_step(a_ + i, end - i), b = load_step(b_ + i, end - i);
      MaskPair mask = first_entries<T>(end - i);
      if (careful_) mask = both(mask, finite(a, b));
      scan.add(a, b, mask);
    }
    sum_a.add(scan.a), sum_b.add(scan.b), spread.add(scan.spread);
    maxima.merge_block(begin, scan.lowered);
    const float peak = block_at(begin).peak = largest_lane(scan.peak);
    largest = std::max(largest, peak);
  }
  return {sum_a.total(), sum_b.total(), spread.total(), largest};
}

template <class T>
bool ContrastiveSampleRow<T>::conclude(const SampleSums& sums) {
  if (!(std::abs(sums.spread) < double(kInfinity) && sums.in_range()) && !careful_) return false;
  start_ = args_.log_space ? origin_b_ - origin_a_ : 0.0f;
  threshold_ = (std::log(sums.b) - std::log(sums.a)) + (double(origin_b_) - double(origin_a_));
  const float threshold = float(threshold_);
  contrast_.alpha = splat(alpha_);
  contrast_.shift = splat(args_.log_space ? threshold : 0.0f);
  doubt_above_ = kInfinity;
  contrast_.limit = splat(!(alpha_ > 0.0f) ? kInfinity : args_.log_space ? threshold : std::max(threshold, 0.0f));
  return true;
}

// A value that at least k entries x reach, -infinity if none is known.
template <class T>
float ContrastiveSampleRow<T>::bound(const GroupMaxima& maxima, int64_t k, float largest) const {
  const double lowered = maxima.bound(k), alpha = alpha_;
  const double rounding = std::abs(lowered) + std::max(largest, 0.0f) + alpha * (std::abs(start_) + std::abs(threshold_));
  const double sure = lowered + (args_.log_space ? alpha * std::min(double(start_), threshold_) : 0.0) - 0x1p-19 * rounding;
  return sure > -kLargestFloat ? float(sure) : -kLargestFloat;
}

// ---- x

// x of a step, -infinity where there is no entry.
template <class T>
DEEPALIGN_INLINE Pair ContrastiveSampleRow<T>::contrasted(int64_t i, int64_t n) const {
  const Pair a = load_step(a_ + i, n), b = load_step(b_ + i, n);
  const Pair x = contrast_(a, b);
  if (!careful_ && n >= kStep) return x;
  return choose(both(first_entries<T>(n), finite(a, b)), x, splat(-kInfinity));
}

// ---- weights exp((x - largest) / temperature)

template <class T>
void ContrastiveSampleRow<T>::set_largest(float x) {
  largest_ = x;
  // Where float cannot hold what a weight is computed from, double does.
  const double scale = kLog2E / args_.temperature;
  exact_ = !(scale > 0x1p-60 && scale < 0x1p60) || std::abs(x) > 1e30f;
}

// Relative error 1e-7; exactly 1 for the largest.
template <class T>
DEEPALIGN_INLINE Pair ContrastiveSampleRow<T>::weights(Pair x) const {
  return exp_(max(splat(floor_), x - splat(largest_)));
}

// Counts and weighs the entries above `cut` of each block; -infinity is below them all and is not counted.
template <class T>
void ContrastiveSampleRow<T>::tally(int64_t segment, float cut) const {
  const FlushToZero flush(is_beyond_zero(cut));
  for (int64_t begin = cut_.begin(segment); begin < cut_.end(segment); begin += cut_.block) {
    const int64_t end = std::min(begin + cut_.block, cut_.size);
    SampleBlock& block = block_at(begin);
    block.above = block.ties = 0, block.mass = 0.0;
    if (!(block.peak >= cut)) continue;
    if (exact_) {
      tally_exactly(block, begin, end, cut);
    } else if (cut == -kInfinity) {
      tally_block<true>(block, begin, end, cut);
    } else {
      tally_block<false>(block, begin, end, cut);
    }
  }
}

template <class T>
template <bool kAll>
void ContrastiveSampleRow<T>::tally_block(SampleBlock& block, int64_t begin, int64_t end, float cut) const {
  const Float floor = splat(floor_), largest = splat(largest_), limit = splat(cut);
  const Contrast contrast = contrast_;
  const Exponential exp = exp_;
  Pair sums = twice(splat(0));
  int64_t above = 0, ties = 0;
  const auto add = [&](Pair x) __attribute__((always_inline)) {
    if (!kAll) {
      const MaskPair chosen = greater(x, limit);
      above += count(chosen);
      ties += count(equal(x, limit));
      x = choose(chosen, x, splat(-kInfinity));
    }
    sums = exp.add_to(sums, max(floor, x - largest));
  };
  int64_t i = begin;
  for (; !careful_ && i + kStep <= end; i += kStep) {
    add(contrast(load_pair(a_ + i), load_pair(b_ + i)));
  }
  for (; i < end; i += kStep) add(contrasted(i, end - i));
  LaneSum mass;
  mass.add(sums.first), mass.add(sums.second);
  block.above = above, block.ties = ties, block.mass = mass.total();
}

template <class T>
void ContrastiveSampleRow<T>::tally_exactly(SampleBlock& block, int64_t begin, int64_t end, float cut) const {
  float x[kStep];
  for (int64_t i = begin; i < end; i += kStep) {
    unpack(contrasted(i, end - i), x);
    for (int j = 0; j < kStep; ++j) {
      if (!(x[j] >= cut) || x[j] == -kInfinity) continue;
      if (x[j] == cut) {
        ++block.ties;
      } else {
        ++block.above, block.mass += weight(x[j]);
      }
    }
  }
}

// Offers what is kept of a block: x > cut and the first `ties` of those equal to it.
template <class T>
void ContrastiveSampleRow<T>::offer(int64_t block, float cut, int64_t ties, SampleDraw& draw) const {
  const FlushToZero flush(is_beyond_zero(cut));
  float x[kStep], w[kStep];
  const int64_t begin = block * cut_.block, end = std::min(begin + cut_.block, cut_.size);
  for (int64_t i = begin; i < end && !draw.done; i += kStep) {
    const Pair step = contrasted(i, end - i);
    unpack(step, x), unpack(weights(step), w);
    for (int j = 0; j < kStep && !draw.done; ++j) {
      // Ties were weighed in double, where a weight that is 0 in float need not be.
      if (x[j] > cut) draw.offer(i + j, x[j], exact_ ? weight(x[j]) : double(w[j]));
      if (x[j] == cut && ties-- > 0) draw.offer(i + j, x[j], weight(x[j]));
    }
  }
}

// The lanes of a step in the order of its entries.
template <class T>
void ContrastiveSampleRow<T>::unpack(Pair x, float* to) {
  float lanes[kStep];
  store(lanes, x.first), store(lanes + kLanes, x.second);
  for (int lane = 0; lane < kLanes; ++lane) {
    to[lane * Deal<T>::kStride] = lanes[lane];
    to[lane * Deal<T>::kStride + Deal<T>::kSecond] = lanes[kLanes + lane];
  }
}

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign

#include "contrastive_sample_sift.h"
