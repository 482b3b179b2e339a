// The completion loss: the second pass over a row, its end, and the order in which rows and their parts are worked on.
// completion_loss_math.h has the essay.
#pragma once

#include <numeric>

#include "completion_loss_row.h"

namespace deepalign {
namespace DEEPALIGN_ISA {

// ---- pass 2

template <class T>
int64_t CompletionLossRow<T>::collect(int64_t segment, Candidates& candidates) const {
  return collect_differences(reference(), b_, cut_.begin(segment), cut_.end(segment), threshold_, candidates);
}

template <class T>
int64_t CompletionLossRow<T>::emit(int64_t segment, Candidates& candidates) const {
  const FlushToZero flush(are_beyond_zero(candidates.bound(), threshold_));
  return plain_ && !careful_ ? emit_as<true>(segment, candidates) : emit_as<false>(segment, candidates);
}

template <class T>
template <bool kPlain>
int64_t CompletionLossRow<T>::emit_as(int64_t segment, Candidates& candidates) const {
  const double tau = args_.temperature, shift_s = std::ceil(log2_s_), shift_t = std::ceil(log2_t_);
  using Emit = LossEmit<T, kPlain>;
  const Emit emit{mix(),
                  typename Emit::Exp(scale_, int(shift_s), float(std::exp2(shift_s - log2_s_))),
                  typename Emit::Exp(scale_, int(shift_t), float(std::exp2(shift_t - log2_t_))),
                  splat(wd_), splat(float(wd_ * (-log_ratio_ - tau * raw_kl_))),
                  splat(float(wd_ * tau)), splat(float(shift_)),
                  splat(offsets_.max_s), splat(offsets_.max_t), floor()};
  const Float threshold = splat(threshold_);
  const bool from_student = !kPlain && args_.favored_from_student;
  Float bound = splat(candidates.bound());
  LaneCount favored;
  favored.clear();
  const auto step = [&](int64_t i, int64_t n, auto exists) __attribute__((always_inline)) {
    const Step x = load(i, n);
    const Pair& r = from_student ? x.s : x.a;
    const Pair d = x.b - r;
    Pair g = emit.gradient(x.s, x.a, x.b);
    if (!kPlain && careful_) g = choose(finite(x.s, x.a, x.b), g, splat(0));
    prefetch_again(s_ + i), prefetch_again(a_ + i), prefetch_again(b_ + i), prefetch_step<true>(gradient_ + i);
    store_step(gradient_ + i, g, n);
    favored.add(both(greater(d, threshold), exists));
    const MaskPair chosen = both(greater_equal(d, bound), exists);
    if (any(chosen)) {
      candidates.add<T>(i, chosen, d, x.s, g);
      bound = splat(candidates.bound());
    }
  };
  const int64_t end = cut_.end(segment);
  int64_t i = cut_.begin(segment);
  for (; i + kStep <= end; i += kStep) step(i, kStep, EveryEntry());
  if (i < end) step(i, end - i, first_entries<T>(end - i));
  return favored.total();
}

// ---- after the passes

template <class T>
void CompletionLossRow<T>::select_members(Candidates& candidates, int64_t count, bool emitted) {
  if (!args_.given) {
    candidates.finish();
    members_.resize(size_t(candidates.size()));
    for (int64_t i = 0; i < candidates.size(); ++i) {
      const int32_t index = candidates.index(i);
      members_[size_t(i)] = emitted ? LossMember{index, candidates.x(i), candidates.y(i)} : member(index);
    }
  }
  count_ = count;
  alpha_ = args_.alpha_base * (1.0 + args_.gamma * double(count_) / double(present_));
  double squares = 0.0, sum = 0.0;
  for (const LossMember& m : members_) {
    const double offset = m.s - mean_;
    squares += offset * offset, sum += offset;
  }
  completion_ = args_.lambda_reg * squares;
  if (args_.centered_square) shift_ = -2.0 * wc_ * alpha_ * args_.lambda_reg * sum / double(present_);
}

template <class T>
void CompletionLossRow<T>::finish() const {
  const double kl = args_.temperature * args_.temperature * raw_kl_;
  args_.kl[row_] = float(kl);
  args_.completion[row_] = float(completion_);
  args_.alpha[row_] = float(alpha_);
  args_.count[row_] = count_;
  args_.loss[row_] = float((wd_ > 0 ? wd_ * kl : 0.0) + (wc_ > 0 ? wc_ * alpha_ * completion_ : 0.0));
  int64_t* indices = args_.indices + row_ * args_.top_k;
  if (args_.given) {
    std::copy_n(args_.given + row_ * args_.top_k, args_.top_k, indices);
  } else {
    std::fill_n(indices, args_.top_k, int64_t(-1));
    for (size_t i = 0; i < members_.size(); ++i) indices[i] = members_[i].index;
  }
  if (!gradient_) return;
  if (wc_ > 0) {
    const double factor = 2.0 * wc_ * alpha_ * args_.lambda_reg;
    for (const LossMember& m : members_) {
      from_float(float(m.gradient + factor * (m.s - mean_) + shift_), gradient_ + m.index);
    }
  }
  fill_gradient(cut_.size, args_.width, 0.0f);
}

// A row that is not read (0) or cannot be used (NaN).
template <class T>
void CompletionLossRow<T>::write_blank(float value) const {
  args_.loss[row_] = args_.kl[row_] = args_.completion[row_] = args_.alpha[row_] = value;
  args_.count[row_] = 0;
  std::fill_n(args_.indices + row_ * args_.top_k, args_.top_k, int64_t(-1));
  if (!gradient_) return;
  fill_gradient(0, cut_.size, value);
  fill_gradient(cut_.size, args_.width, 0.0f);
}

template <class T>
void CompletionLossRow<T>::fill_gradient(int64_t begin, int64_t end, float value) const {
  T filler;
  from_float(value, &filler);
  std::fill(gradient_ + begin, gradient_ + end, filler);
}

// ---- the order of work

// A row alone, its segments one after the other or shared among threads: the same parts, put together in the same order.
template <class T>
struct CompletionLossWork {
  const CompletionLossArgs& args;
  Cut cut;
  GroupMaxima maxima;
  Candidates candidates;
  std::vector<LossMember> members;
  std::vector<LossSums> sums;    // of the segments
  std::vector<int64_t> counts;

  explicit CompletionLossWork(const CompletionLossArgs& args)
      : args(args), cut(args.vocab_size, std::max<int64_t>(512, 4 * args.top_k)), maxima(cut),
        candidates(args.given ? 1 : args.top_k, args.gradient != nullptr), sums(size_t(cut.segments)),
        counts(size_t(cut.segments)) {}

  void row(int64_t index, const Parallel* parallel) {
    CompletionLossRow<T> row(args, cut, index, members);
    if (!row.is_read()) return row.write_blank(0.0f);
    if (!row.bad() && !row.conclude(scan(row, parallel))) {
      row.start_carefully();
      if (!row.bad()) row.conclude(scan(row, parallel));
    }
    if (row.bad()) return row.write_blank(kNaN);
    const float bound = row.candidate_bound(maxima);
    if (!row.emits() || row.selects_first()) {
      const int64_t count = second_pass(row, bound, parallel, &CompletionLossRow<T>::collect);
      row.select_members(candidates, count, false);
      if (row.emits()) second_pass(row, kInfinity, parallel, &CompletionLossRow<T>::emit);
    } else {
      const int64_t count = second_pass(row, bound, parallel, &CompletionLossRow<T>::emit);
      row.select_members(candidates, count, true);
    }
    row.finish();
  }

 private:
  LossSums scan(const CompletionLossRow<T>& row, const Parallel* parallel) {
    maxima.clear();
    over_segments(
        cut, parallel, maxima, [&](int64_t i, GroupMaxima& mine) { sums[size_t(i)] = row.scan(i, mine); },
        [this](const GroupMaxima& other) { maxima.merge(other); });
    LossSums sum;
    for (const LossSums& part : sums) sum += part;
    return sum;
  }

  template <class Pass>
  int64_t second_pass(const CompletionLossRow<T>& row, float bound, const Parallel* parallel, Pass pass) {
    candidates.reset(bound);
    over_segments(
        cut, parallel, candidates, [&](int64_t i, Candidates& mine) { counts[size_t(i)] = (row.*pass)(i, mine); },
        [this](const Candidates& other) { candidates.merge(other); });
    return std::accumulate(counts.begin(), counts.end(), int64_t(0));
  }
};

template <class T>
void completion_loss_of(const CompletionLossArgs& args, const Parallel& parallel) {
  // Rows that come out even over the threads are shared row by row, the rest within the row.
  const int64_t whole = args.rows - args.rows % parallel.threads;
  parallel(whole, [&](int64_t first, int64_t last) {
    CompletionLossWork<T> work(args);
    for (int64_t row = first; row < last; ++row) work.row(row, nullptr);
  });
  if (whole == args.rows) return;
  CompletionLossWork<T> work(args);
  for (int64_t row = whole; row < args.rows; ++row) work.row(row, &parallel);
}

inline void completion_loss(const CompletionLossArgs& args, const Parallel& parallel) {
  switch (args.dtype) {
    case Dtype::kFloat: return completion_loss_of<float>(args, parallel);
    case Dtype::kBFloat16: return completion_loss_of<BFloat16>(args, parallel);
    case Dtype::kHalf: return completion_loss_of<Half>(args, parallel);
  }
}

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign
