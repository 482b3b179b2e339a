// A row of the completion loss: its first pass, and what the passes share. completion_loss_exact.h has what comes between
// the passes, completion_loss.h the second.
#pragma once

#include "completion_loss_math.h"
#include "selection.h"

namespace deepalign {
namespace DEEPALIGN_ISA {

// An entry of M.
struct LossMember {
  int64_t index;
  float s, gradient;  // the gradient without the penalty's part
};

template <class T>
class CompletionLossRow {
 public:
  // Its selection is put into `members`.
  CompletionLossRow(const CompletionLossArgs& args, const Cut& cut, int64_t row, std::vector<LossMember>& members);

  bool is_read() const { return wd_ > 0 || wc_ > 0; }
  bool bad() const { return bad_; }
  bool emits() const { return gradient_ != nullptr; }
  bool selects_first() const { return emits() && args_.centered_square; }  // its gradient needs M in every entry
  float candidate_bound(const GroupMaxima& maxima) const { return args_.given ? kInfinity : maxima.bound(args_.top_k); }

  LossSums scan(int64_t segment, GroupMaxima& maxima) const;
  bool conclude(const LossSums& rounded);  // false: the sums are no use, start carefully
  void start_carefully();
  int64_t collect(int64_t segment, Candidates& candidates) const;
  int64_t emit(int64_t segment, Candidates& candidates) const;
  void select_members(Candidates& candidates, int64_t count, bool emitted);
  void finish() const;
  void write_blank(float value) const;

 private:
  struct Step {
    Pair s, a, b;
  };
  struct Entry {
    double s, t;
  };
  struct PeakSteps {
    int64_t s, t;
  };

  DEEPALIGN_INLINE Step load(int64_t i, int64_t n) const { return {load_step(s_ + i, n), load_step(a_ + i, n), load_step(b_ + i, n)}; }
  void guess_offsets();
  template <class Body>
  LossSums with_scan(const Body& body) const {
    if (careful_) return body(masked_scan());
    return plain_ ? body(ordinary_scan<true>()) : body(ordinary_scan<false>());
  }
  template <class Scan>
  LossSums scan_with(const Scan& scan, int64_t segment, GroupMaxima& maxima) const;
  template <class Scan, class Body>
  bool over_block(const Scan& scan, int64_t begin, const Body& body) const;
  template <class Scan>
  Pair scan_block(const Scan& scan, int64_t begin, LossLaneSums& sums) const;
  template <bool kPlain>
  LossScan<kPlain> ordinary_scan() const;
  LossMaskedScan masked_scan() const;
  LossSums refined(LossSums sums) const;
  template <class Scan>
  LossSums divergence_lost_in(const Scan& scan, int64_t begin) const;
  template <class Scan>
  LossSums threshold_lost_in(const Scan& scan, int64_t begin) const;
  LossSums scan_finely(const LossSums& rounded) const;
  // Errors are multiplied by the square of the temperature, and make up for each other where they are many and differ.
  bool wants_fine_sums() const { return args_.temperature > kFineTemperature || repeats_ || wants_doubles(); }
  bool wants_doubles() const {
    return has_few_values_ || args_.temperature > 5.0 || cut_.size <= (args_.temperature > 2.0 ? 4096 : 64);
  }
  bool cancels() const;
  double lost_with_teacher(const LossSums& sums) const;
  bool is_even(double partition, const LossPeak& peak) const;
  PeakSteps peak_steps(int64_t begin) const;
  void add_exactly(const Step& x, MaskPair exists, LossExactSums& sums) const;
  template <bool kPlain>
  int64_t emit_as(int64_t segment, Candidates& candidates) const;
  void fill_gradient(int64_t begin, int64_t end, float value) const;
  void use_given();
  Entry entry(int64_t i) const {
    const float a = to_float(a_[i]), b = to_float(b_[i]);
    return {to_float(s_[i]), rounds_teacher() ? largest_lane(fma(splat(mix_), splat(b - a), splat(a))) : teacher(a, b)};
  }
  // Passes take a float for 1 - teacher_mix, and round the difference and t.
  double teacher(double a, double b) const { return a + (1.0 - args_.teacher_mix) * (b - a); }
  // Floats are a tenth apart: sums of t as passes round it and of t in double would not go together.
  bool is_coarse() const { return std::abs(offsets_.max_t) >= 0x1p20f; }
  bool rounds_teacher() const { return (args_.teacher_student && !wants_doubles()) || is_coarse(); }
  LossMember member(int64_t index) const;
  bool finite_at(int64_t i) const;
  LossMix mix() const { return {splat(mix_), splat(lead_), args_.teacher_student, args_.favored_from_student}; }
  Float floor() const { return splat(-200.0f / std::min(scale_, float(kLog2E))); }
  const T* reference() const { return args_.favored_from_student ? s_ : a_; }

  const CompletionLossArgs& args_;
  const Cut& cut_;
  const int64_t row_;
  const T *const s_, *const a_, *const b_;
  T* const gradient_;
  const float mix_, scale_, wd_, wc_;
  const bool plain_;
  bool careful_ = false, bad_ = false;
  bool repeats_ = false, has_few_values_ = false;  // the first terms are of few values, or all: they are rounded alike
  int64_t present_, count_ = 0;
  LossOffsets offsets_;
  double log2_s_ = 0, log2_t_ = 0, raw_kl_ = 0, log_ratio_ = 0, mean_ = 0, alpha_ = 0, completion_ = 0, shift_ = 0;
  float threshold_ = 0;
  float lead_ = 0;  // of s over t: the sums of the divergence are without it
  std::vector<LossMember>& members_;
};

template <class T>
CompletionLossRow<T>::CompletionLossRow(
    const CompletionLossArgs& args, const Cut& cut, int64_t row, std::vector<LossMember>& members)
    : args_(args), cut_(cut), row_(row), s_(row_of<T>(args.student, row)), a_(row_of<T>(args.aligned, row)),
      b_(row_of<T>(args.base, row)),
      gradient_(args.gradient ? static_cast<T*>(args.gradient) + row * args.gradient_stride : nullptr),
      mix_(float(1.0 - args.teacher_mix)), scale_(float(kLog2E / args.temperature)), wd_(args.kl_weight[row]),
      wc_(args.completion_weight[row]),
      plain_(!args.teacher_student && !args.favored_from_student && !args.centered_square), present_(cut.size),
      members_(members) {
  if (is_read()) guess_offsets();
}

// The largest of the first entries stands for the row's largest. Where these are of few values, others are looked at, too:
// sorted rows have many.
template <class T>
void CompletionLossRow<T>::guess_offsets() {
  constexpr int64_t kSome = 64;
  float s[kSome], t[kSome], r = -kInfinity, b = -kInfinity;
  const int64_t some = std::min(kSome, cut_.size);
  const auto look = [&](int64_t stride) {
    for (int64_t i = 0; i < some; ++i) {
      const float xa = to_float(a_[i * stride]), xb = to_float(b_[i * stride]);
      s[i] = to_float(s_[i * stride]), t[i] = xa + mix_ * (xb - xa);
      b = std::max(b, xb), r = std::max(r, to_float(reference()[i * stride]));
    }
  };
  look(1);
  const float max_s = *std::max_element(s, s + some), max_t = *std::max_element(t, t + some);
  const bool ordinary = whole_bits(max_s, scale_, &offsets_.s) && whole_bits(max_t, scale_, &offsets_.t) &&
                        whole_bits(r, float(kLog2E), &offsets_.r) && whole_bits(b, float(kLog2E), &offsets_.b);
  lead_ = std::nearbyint(4.0f * (max_s - max_t)) / 4.0f;  // few digits, so that s - lead is mostly exact
  repeats_ = has_few_values(s, some) || has_few_values(t, some);
  if (repeats_) look(cut_.size / some);
  has_few_values_ = repeats_ && (has_few_values(s, some) || has_few_values(t, some));
  if (!ordinary) start_carefully();
}

// Finds true maxima, absent entries, and whether the row is bad.
template <class T>
void CompletionLossRow<T>::start_carefully() {
  careful_ = true;
  offsets_ = LossOffsets();
  const Float lowest = splat(-kInfinity);
  Float s = lowest, t = lowest, r = lowest, b = lowest;
  int64_t absent = 0;
  present_ = 0;
  const auto add = [&](Float xs, Float xa, Float xb, Mask exists) {
    const Mask here = both(exists, finite(xs, xa, xb));
    present_ += count(here);
    absent += count(both(exists, both(equal(xs, lowest), both(equal(xa, lowest), equal(xb, lowest)))));
    s = max(choose(here, xs, lowest), s), b = max(choose(here, xb, lowest), b);
    t = max(choose(here, fma(splat(mix_), xb - xa, xa), lowest), t);
    r = max(choose(here, args_.favored_from_student ? xs : xa, lowest), r);
  };
  for (int64_t i = 0; i < cut_.size; i += kStep) {
    const Step x = load(i, cut_.size - i);
    const MaskPair exists = first_entries<T>(cut_.size - i);
    add(x.s.first, x.a.first, x.b.first, exists.first);
    add(x.s.second, x.a.second, x.b.second, exists.second);
  }
  offsets_.max_s = largest_lane(s), offsets_.max_t = largest_lane(t);
  offsets_.max_r = largest_lane(r), offsets_.max_b = largest_lane(b);
  lead_ = is_coarse() ? 0.0f : offsets_.max_s - offsets_.max_t;
  bad_ = present_ == 0 || present_ + absent < cut_.size;
}

// ---- pass 1

template <class T>
LossSums CompletionLossRow<T>::scan(int64_t segment, GroupMaxima& maxima) const {
  const FlushToZero flush;
  return with_scan([&](const auto& scan) { return scan_with(scan, segment, maxima); });
}

template <class T>
template <bool kPlain>
LossScan<kPlain> CompletionLossRow<T>::ordinary_scan() const {
  const float bits = float(kLog2E);
  return {mix(), OpenExponential(scale_, offsets_.s), OpenExponential(scale_, offsets_.t),
          OpenCoarseExponential(bits, offsets_.r), OpenCoarseExponential(bits, offsets_.b)};
}

template <class T>
LossMaskedScan CompletionLossRow<T>::masked_scan() const {
  const float bits = float(kLog2E);
  return LossMaskedScan{mix(),
                        Exponential(scale_, offsets_.s),
                        Exponential(scale_, offsets_.t),
                        Exponential(bits, offsets_.r),
                        Exponential(bits, offsets_.b),
                        splat(offsets_.max_s),
                        splat(offsets_.max_t),
                        splat(offsets_.max_r),
                        splat(offsets_.max_b),
                        floor(),
                        careful_};
}

template <class T>
template <class Scan>
LossSums CompletionLossRow<T>::scan_with(const Scan& scan, int64_t segment, GroupMaxima& maxima) const {
  LossLaneSums sums(cut_.block);
  for (int64_t begin = cut_.begin(segment); begin < cut_.end(segment); begin += cut_.block) {
    maxima.merge_block(begin, scan_block(scan, begin, sums));
  }
  return sums.total();
}

// body(scan, i, entries, which of them exist) for the steps of a block, the scan's exponentials being scaled; false if a logit
// was out of the range of those that are open.
template <class T>
template <class Scan, class Body>
DEEPALIGN_INLINE bool CompletionLossRow<T>::over_block(const Scan& unscaled, int64_t begin, const Body& body) const {
  const int64_t end = std::min(begin + cut_.block, cut_.size);
  const float scale = scale_of_part(begin / cut_.block);
  Scan scan = unscaled;
  scale_all(scale, scan.exp_s, scan.exp_t, scan.exp_r, scan.exp_b);
  const T *const s = s_, *const a = a_, *const b = b_;
  Extremes<T> extremes;
  extremes.clear();
  int64_t i = begin;
  for (; i + kStep <= end; i += kStep) {
    prefetch_step(s + i), prefetch_step(a + i), prefetch_step(b + i);
    if (Scan::kOpen) extremes.see(s + i), extremes.see(a + i), extremes.see(b + i);
    body(scan, i, Step{load_pair(s + i), load_pair(a + i), load_pair(b + i)}, MaskPair{all_lanes(), all_lanes()});
  }
  if constexpr (Scan::kOpen) {
    if (!scan.is_right_for(extremes.interval(), mix_)) return false;
  }
  if (i < end) {
    LossMaskedScan masked = masked_scan();
    scale_all(scale, masked.exp_s, masked.exp_t, masked.exp_r, masked.exp_b);
    body(masked, i, load(i, end - i), first_entries<T>(end - i));
  }
  return true;
}

// Adds a block to the sums; returns the largest differences.
template <class T>
template <class Scan>
Pair CompletionLossRow<T>::scan_block(const Scan& scan, int64_t begin, LossLaneSums& sums) const {
  Pair largest = twice(splat(-kInfinity));
  LossAccumulators block;
  block.clear();
  const auto add = [&](const auto& scan, int64_t, const Step& x, MaskPair exists) __attribute__((always_inline)) {
    scan.add(x.s, x.a, x.b, exists, block, largest);
  };
  if (!over_block(scan, begin, add)) return scan_block(masked_scan(), begin, sums);
  sums.template add<Scan::kPlain>(block, begin, scale_of_part(begin / cut_.block));
  return largest;
}

// ---- between the passes

template <class T>
bool CompletionLossRow<T>::conclude(const LossSums& rounded) {
  const double tau = args_.temperature, scale = scale_, bits = float(kLog2E);
  LossSums sums = rounded;
  if (std::isfinite(sums.divergence)) sums = refined(sums);
  const auto settle = [&] {
    log2_s_ = std::log2(sums.s) + offsets_.s, log2_t_ = std::log2(sums.t) + offsets_.t;
    // Partitions divided by the very scale of the exponents: a shift of all logits cancels, equal models differ by 0. The
    // lead first: it is about the maxima's difference, in which one of them may be lost.
    const double ratio = (log2_s_ - log2_t_) / scale + ((double(offsets_.max_s) - lead_) - offsets_.max_t);
    log_ratio_ = ratio + lead_;
    raw_kl_ = (args_.teacher_student ? sums.divergence / sums.t + ratio : sums.divergence / sums.s - ratio) / tau;
  };
  settle();
  const double log2_r = std::log2(sums.r) + offsets_.r, log2_b = std::log2(sums.b) + offsets_.b;
  const double limit = Exponential::kMaxOffset;
  const bool usable = std::abs(log2_s_) < limit && std::abs(log2_t_) < limit && std::abs(log2_r) < limit &&
                      std::abs(log2_b) < limit && std::abs(sums.divergence) < double(kInfinity);
  if (!usable && !careful_) return false;
  const double ratio = (log2_b - log2_r) / bits + (double(offsets_.max_b) - offsets_.max_r);
  threshold_ = between_differences(float(ratio), reference(), b_, cut_.size);
  if (wants_fine_sums() || cancels() || is_even(sums.s, sums.peak_s) || is_even(sums.t, sums.peak_t)) {
    lead_ = float(log_ratio_);
    const LossSums fine = scan_finely(sums);
    sums.s = fine.s, sums.t = fine.t, sums.divergence = fine.divergence;
    settle();
  }
  if (rounds_teacher() && !is_coarse()) raw_kl_ += lost_with_teacher(sums);
  mean_ = args_.centered_square ? sums.logits / double(present_) : 0.0;
  if (args_.given) use_given();
  return true;
}

template <class T>
bool CompletionLossRow<T>::finite_at(int64_t i) const {
  const float s = to_float(s_[i]), a = to_float(a_[i]), b = to_float(b_[i]);
  return s - s == 0.0f && a - a == 0.0f && b - b == 0.0f;
}

// One entry's gradient without the penalty's part, from the logits.
template <class T>
LossMember CompletionLossRow<T>::member(int64_t index) const {
  if (!emits()) return {index, to_float(s_[index]), 0.0f};
  const double tau = args_.temperature;
  const Entry x = entry(index);
  const double p = std::exp2(double(scale_) * (x.s - offsets_.max_s) - log2_s_);
  const double q = std::exp2(double(scale_) * (x.t - offsets_.max_t) - log2_t_);
  const double change = args_.teacher_student ? p - q : p * ((x.s - x.t - log_ratio_) / tau - raw_kl_);
  return {index, float(x.s), float(wd_ * tau * change)};
}

// The caller's selection: entries that are present, each once.
template <class T>
void CompletionLossRow<T>::use_given() {
  const int64_t* given = args_.given + row_ * args_.top_k;
  std::vector<int64_t> indices(given, given + args_.top_k);
  std::sort(indices.begin(), indices.end());
  indices.erase(std::unique(indices.begin(), indices.end()), indices.end());
  members_.clear();
  for (int64_t index : indices) {
    if (index >= 0 && index < cut_.size && finite_at(index)) members_.push_back(member(index));
  }
}

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign

#include "completion_loss_exact.h"
