// What the operations do with a row beside their own sums: how it is cut, bounds for its k-th largest value, the exact
// selection. Compiled once per instruction set, on top of its vec_*.h.
//
// A row is cut into segments, a segment into blocks. Sums run in float over a block, in double across blocks, and
// segments are added in order: results do not depend on how many threads share a row.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "types.h"

namespace deepalign {
namespace DEEPALIGN_ISA {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int kStep = 2 * kLanes;  // entries of a Pair
constexpr double kLog2E = 1.4426950408889634;

// The index within a step that a lane of a Pair holds: first_index + lane * stride.
template <class T>
struct Deal {
  static constexpr int kStride = 1, kSecond = kLanes;
};
template <>
struct Deal<BFloat16> {
  static constexpr int kStride = 2, kSecond = 1;
};

// Lanes that hold the first n entries of a step.
template <class T>
DEEPALIGN_INLINE MaskPair first_entries(int64_t n) {
  if (Deal<T>::kStride == 2) return {first_lanes((n + 1) / 2), first_lanes(n / 2)};
  return {first_lanes(n), first_lanes(n - kLanes)};
}

// The last, partial step of a row: n < kStep entries exist, the rest read as 0 and are not written.
template <class T>
[[gnu::noinline]] Pair load_pair_partial(const T* from, int n) {
  T buffer[kStep] = {};
  std::memcpy(buffer, from, size_t(n) * sizeof(T));
  return load_pair(buffer);
}
template <class T>
[[gnu::noinline]] void store_pair_partial(T* to, Pair x, int n) {
  T buffer[kStep];
  store_pair(buffer, x);
  std::memcpy(to, buffer, size_t(n) * sizeof(T));
}

// The step at `from`, of which n entries exist.
template <class T>
DEEPALIGN_INLINE Pair load_step(const T* from, int64_t n) {
  return n >= kStep ? load_pair(from) : load_pair_partial(from, int(n));
}
template <class T>
DEEPALIGN_INLINE void store_step(T* to, Pair x, int64_t n) {
  n >= kStep ? store_pair(to, x) : store_pair_partial(to, x, int(n));
}

// Asks for what a first pass will read 1024 entries later: the processor's own prefetching stops at the end of a page.
// kWrite: for what a second pass will write, since a line that is written is read first.
template <bool kWrite = false, class T>
DEEPALIGN_INLINE void prefetch_step(const T* at) {
  for (size_t byte = 0; byte < kStep * sizeof(T); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(at + 1024) + byte, kWrite);
  }
}

// Lanes in which every value is neither infinite nor NaN.
DEEPALIGN_INLINE Mask finite(Float x) { return equal(x - x, splat(0)); }
DEEPALIGN_INLINE MaskPair finite(Pair x) { return {finite(x.first), finite(x.second)}; }
template <class V, class... Vs>
DEEPALIGN_INLINE auto finite(V x, Vs... rest) {
  return both(finite(x), finite(rest...));
}

// The offset, in whole bits, that makes 2^(scale x - offset) about 1 at x; false if it is out of the ordinary range.
inline bool whole_bits(double x, double scale, int* offset) {
  const double bits = x * scale;
  if (!(std::abs(bits) < Exponential::kMaxOffset)) return false;
  *offset = int(std::ceil(bits));
  return true;
}

template <class T>
const T* row_of(const Logits& logits, int64_t row) {
  return static_cast<const T*>(logits.data) + row * logits.row_stride;
}

// A sum of many floats: lanes in double, fed once per block.
struct LaneSum {
  alignas(64) double lanes[kLanes] = {};
  DEEPALIGN_INLINE void add(Float x) { add_to_double(lanes, x); }
  double total() const {
    double sum = 0.0;
    for (double lane : lanes) sum += lane;
    return sum;
  }
};

// How a row of `size` entries is cut. Depends on the problem only, never on threads.
struct Cut {
  int64_t size, block, segment, segments;
  int slots;  // blocks share this many sets of group maxima

  // At least `groups` groups of entries, so that the k-th largest of their maxima is a good bound.
  Cut(int64_t size, int64_t groups) : size(size) {
    slots = int(std::max<int64_t>(1, std::min((groups + kStep - 1) / kStep, (size + kStep - 1) / kStep)));
    block = std::min<int64_t>(1024, std::max<int64_t>(kStep, size / slots / kStep * kStep));
    segment = (16384 + block - 1) / block * block;
    segments = (size + segment - 1) / segment;
  }
  int64_t begin(int64_t i) const { return i * segment; }
  int64_t end(int64_t i) const { return std::min(size, (i + 1) * segment); }
};

// Runs body(i, scratch) over the segments of a row: in this thread if `parallel` is null, else shared among threads,
// each with a copy of `scratch`, and then merge(copy) on every copy, in the order of their segments.
template <class Scratch, class Body, class Merge>
void over_segments(const Cut& cut, const Parallel* parallel, Scratch& scratch, const Body& body, const Merge& merge) {
  if (!parallel) {
    for (int64_t i = 0; i < cut.segments; ++i) body(i, scratch);
    return;
  }
  std::vector<std::vector<Scratch>> copies(static_cast<size_t>(cut.segments));  // by first segment; one or none each
  (*parallel)(cut.segments, [&](int64_t first, int64_t last) {
    std::vector<Scratch>& mine = copies[size_t(first)];
    mine.push_back(scratch);
    for (int64_t i = first; i < last; ++i) body(i, mine.front());
  });
  for (const std::vector<Scratch>& mine : copies) {
    for (const Scratch& copy : mine) merge(copy);
  }
}

// Running maxima of groups of a row's values: lane and block (modulo slots) make the group.
class GroupMaxima {
 public:
  explicit GroupMaxima(const Cut& cut) : block_(cut.block), slots_(cut.slots), values_(size_t(cut.slots) * kStep) { clear(); }
  void clear() { std::fill(values_.begin(), values_.end(), -kInfinity); }
  void merge_block(int64_t begin, Pair maxima) {
    const uint32_t number = uint32_t(begin) / uint32_t(block_) % uint32_t(slots_);  // 64 bits would take twice as long
    float* slot = values_.data() + size_t(number) * kStep;
    store(slot, max(maxima.first, load(slot)));
    store(slot + kLanes, max(maxima.second, load(slot + kLanes)));
  }
  void merge(const GroupMaxima& other) {
    for (size_t i = 0; i < values_.size(); ++i) values_[i] = std::max(values_[i], other.values_[i]);
  }

  // A value that at least k entries reach (so that the k-th largest is no smaller), close to the k-th largest maximum;
  // -infinity if there are fewer than k groups.
  float bound(int64_t k) const;

 private:
  int64_t reached_by(float value) const {
    int64_t reached = 0;
    const Float limit = splat(value);
    for (size_t i = 0; i < values_.size(); i += kStep) {
      reached += count(MaskPair{greater_equal(load(&values_[i]), limit), greater_equal(load(&values_[i + kLanes]), limit)});
    }
    return reached;
  }

  int64_t block_;
  int slots_;
  std::vector<float> values_;
};

// Floats in an order of integers; -0 comes as 0.
inline int32_t ordered(float x) {
  const int32_t bits = bit_cast<int32_t>(x + 0.0f);
  return bits >= 0 ? bits : bits ^ 0x7fffffff;
}
inline float from_ordered(int32_t key) { return bit_cast<float>(key >= 0 ? key : key ^ 0x7fffffff); }

inline float GroupMaxima::bound(int64_t k) const {
  if (k > int64_t(values_.size())) return -kInfinity;
  int64_t low = ordered(-kInfinity), high = int64_t(ordered(*std::max_element(values_.begin(), values_.end()))) + 1;
  // Bisection: low is reached by at least k groups, high by fewer. A few groups too many cost less than the last steps.
  const float smallest = *std::min_element(values_.begin(), values_.end());
  if (smallest > -kInfinity) low = ordered(smallest);
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2, reached = reached_by(from_ordered(int32_t(middle)));
    (reached >= k ? low : high) = middle;
    if (reached >= k && reached <= k + k / 32) break;
  }
  return from_ordered(int32_t(low));
}

// Entries that may be among the k largest: all values that reach a bound, which rises whenever the buffer is full.
// Entries must be added in order of their index from step to step; ties then go to the lowest index.
class Candidates {
 public:
  // With `values`, each entry carries two more floats (what happens to be known about it).
  Candidates(int64_t k, bool values)
      : k_(k), capacity_(2 * k + 1024), key_(size_t(capacity_) + kStep), index_(size_t(capacity_) + kStep) {
    if (values) x_.resize(size_t(capacity_) + kStep), y_.resize(size_t(capacity_) + kStep);
  }
  void reset(float bound) { size_ = 0, bound_ = bound; }
  float bound() const { return bound_; }
  int64_t size() const { return size_; }
  int32_t index(int64_t i) const { return index_[size_t(i)]; }
  float key(int64_t i) const { return key_[size_t(i)]; }
  float x(int64_t i) const { return x_[size_t(i)]; }
  float y(int64_t i) const { return y_[size_t(i)]; }

  template <class T>
  [[gnu::noinline]] void add(int64_t step_begin, MaskPair mask, Pair keys, Pair x, Pair y) {
    add_half<T>(step_begin, mask.first, keys.first, x.first, y.first);
    add_half<T>(step_begin + Deal<T>::kSecond, mask.second, keys.second, x.second, y.second);
    // Whatever is added later has a higher index, so it must be larger than the k-th, not equal to it.
    if (size_ > capacity_ - kStep) bound_ = std::nextafter(prune(), kInfinity);
  }
  // Those of another part of the row, in any order.
  void merge(const Candidates& other) {
    for (int64_t i = 0; i < other.size_; ++i) {
      if (other.key(i) < bound_) continue;
      put(size_++, other, i);
      if (size_ > capacity_ - kStep) bound_ = prune();
    }
  }
  // Keeps the min(k, size) largest, in descending order.
  void finish();

 private:
  template <class T>
  void add_half(int64_t first_index, Mask mask, Float keys, Float x, Float y) {
    append(&index_[size_t(size_)], mask, int32_t(first_index), Deal<T>::kStride);
    if (!x_.empty()) append(&x_[size_t(size_)], mask, x), append(&y_[size_t(size_)], mask, y);
    size_ += append(&key_[size_t(size_)], mask, keys);
  }
  void put(int64_t to, const Candidates& from, int64_t i) {
    key_[size_t(to)] = from.key_[size_t(i)], index_[size_t(to)] = from.index_[size_t(i)];
    if (!x_.empty()) x_[size_t(to)] = from.x_[size_t(i)], y_[size_t(to)] = from.y_[size_t(i)];
  }
  // Larger value first, then lower index: distinct for distinct entries.
  int64_t rank_key(int64_t i) const { return int64_t(ordered(key(i))) * (int64_t(1) << 32) + (0x7fffffff - index(i)); }
  void keep(const std::vector<int32_t>& order, int64_t n);
  float prune();  // keeps the k largest; returns the least of them

  int64_t k_, capacity_, size_ = 0;
  float bound_ = -kInfinity;
  std::vector<float> key_, x_, y_;
  std::vector<int32_t> index_;
};

inline void Candidates::keep(const std::vector<int32_t>& order, int64_t n) {
  const auto permute = [&](auto& values) {
    auto kept = values;
    for (int64_t i = 0; i < n; ++i) kept[size_t(i)] = values[size_t(order[size_t(i)])];
    values.swap(kept);
  };
  permute(key_), permute(index_);
  if (!x_.empty()) permute(x_), permute(y_);
  size_ = n;
}

inline float Candidates::prune() {
  std::vector<int32_t> order(static_cast<size_t>(size_));
  for (int64_t i = 0; i < size_; ++i) order[size_t(i)] = int32_t(i);
  std::nth_element(order.begin(), order.begin() + (k_ - 1), order.end(), [this](int32_t i, int32_t j) {
    return rank_key(i) > rank_key(j);
  });
  const float least = key(order[size_t(k_ - 1)]) + 0.0f;
  keep(order, k_);
  return least;
}

inline void Candidates::finish() {
  const int64_t n = size_, kept = std::min(k_, n);
  std::vector<int64_t> keys(static_cast<size_t>(n));
  std::vector<int32_t> order(static_cast<size_t>(std::max(n, kept)));
  for (int64_t i = 0; i < n; ++i) keys[size_t(i)] = rank_key(i);
  if (n <= 2048) {  // every rank by counting: no branch to mispredict
    for (int64_t i = 0; i < n; ++i) {
      int64_t rank = 0;
      for (int64_t j = 0; j < n; ++j) rank += keys[size_t(j)] > keys[size_t(i)];
      order[size_t(rank)] = int32_t(i);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) order[size_t(i)] = int32_t(i);
    const auto larger = [&](int32_t i, int32_t j) { return keys[size_t(i)] > keys[size_t(j)]; };
    std::nth_element(order.begin(), order.begin() + std::max<int64_t>(kept - 1, 0), order.end(), larger);
    std::sort(order.begin(), order.begin() + kept, larger);
  }
  keep(order, kept);
}

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign
