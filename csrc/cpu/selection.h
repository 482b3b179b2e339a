// The k largest values of a row, exactly, ties to the lowest index, without a sort of the row.
//
// A first pass keeps running maxima of groups of entries (`GroupMaxima`); the k-th largest of them, or a little less, is
// a bound that the row's k-th largest value reaches. A second pass gives what reaches the bound to `Candidates`. Their
// buffer is in the order of the index throughout, so that nobody has to compare indices: whenever it is full, the k-th
// largest value of it is found and becomes the bound, a tie with it being too late from then on, and the rest is thrown
// out; at the end what is left is ranked.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "row_math.h"

namespace deepalign {
namespace DEEPALIGN_ISA {

// Floats in an order of integers; -0 comes as 0.
inline int32_t ordered(float x) {
  const int32_t bits = bit_cast<int32_t>(x + 0.0f);
  return bits >= 0 ? bits : bits ^ 0x7fffffff;
}
inline float from_ordered(int32_t key) { return bit_cast<float>(key >= 0 ? key : key ^ 0x7fffffff); }

// How many of the values reach a limit. Here and below, values are whole steps of them; NaN fills up the last one.
inline int64_t count_reaching(const float* values, int64_t size, float value) {
  const Float limit = splat(value);
  int64_t reaching = 0;
  for (int64_t i = 0; i < size; i += kStep) {
    reaching += count(MaskPair{greater_equal(load(values + i), limit), greater_equal(load(values + i + kLanes), limit)});
  }
  return reaching;
}

// The k-th largest of the values, or any value below it that no more than `most` reach. Linear: bisection.
inline float value_reached_by(const float* values, int64_t size, int64_t k, int64_t most) {
  Float smallest = splat(kInfinity), largest = splat(-kInfinity);
  for (int64_t i = 0; i < size; i += kLanes) {
    const Float x = load(values + i);
    smallest = min(x, smallest), largest = max(x, largest);  // in this order NaN is passed over
  }
  const float top = largest_lane(largest), bottom = 0.0f - largest_lane(splat(0) - smallest);
  // `low` is reached by at least k, `high` by fewer. Halving the interval closes in fast, halving the number of floats in
  // it always comes to an end.
  int64_t low = ordered(bottom), high = int64_t(ordered(top)) + 1;
  for (bool halve = true; high - low > 1; halve = !halve) {
    int64_t middle = low + (high - low) / 2;
    if (halve) {
      const float value = 0.5f * from_ordered(int32_t(low)) + 0.5f * from_ordered(int32_t(high - 1));
      if (value - value == 0.0f) middle = std::max(low + 1, std::min(high - 1, int64_t(ordered(value))));
    }
    const int64_t reaching = count_reaching(values, size, from_ordered(int32_t(middle)));
    (reaching >= k ? low : high) = middle;
    if (reaching >= k && reaching <= most) break;
  }
  return from_ordered(int32_t(low));
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
  // -infinity if there are fewer than k groups. A few groups too many cost less than the last steps of the search.
  float bound(int64_t k) const {
    const int64_t size = int64_t(values_.size());
    if (k > size) return -kInfinity;
    const float reached = value_reached_by(values_.data(), size, k, k + k / 32);
    return reached <= 0.0f && reached > -kLeastNormal ? -kLeastNormal : reached;  // FlushToZero may have raised it
  }

 private:
  int64_t block_;
  int slots_;
  std::vector<float> values_;
};

// Zeros, then ones.
struct LaterLanes {
  float lanes[2 * kStep] = {};
  constexpr LaterLanes() {
    for (int lane = kStep; lane < 2 * kStep; ++lane) lanes[lane] = 1.0f;
  }
};

// Entries that may be among the k largest: all values that reach a bound, which rises whenever the buffer is full.
// Entries must be added in order of their index from step to step; ties then go to the lowest index.
class Candidates {
 public:
  // With `values`, each entry carries two more floats (what happens to be known about it).
  Candidates(int64_t k, bool values)
      : k_(k), capacity_(2 * k + 1024), values_(values), memory_(capacity_ + kStep, values ? 9 : 5), now_(memory_, 0, values),
        next_(memory_, values ? 4 : 2, values), ranks_(memory_.ints(values ? 8 : 4)) {}
  // As many more, empty.
  Candidates(const Candidates& other) : Candidates(other.k_, other.values_) { bound_ = other.bound_; }
  Candidates(Candidates&&) = default;

  void reset(float bound) { size_ = 0, bound_ = bound; }
  float bound() const { return bound_; }
  int64_t size() const { return size_; }
  int32_t index(int64_t i) const { return now_.index[size_t(i)]; }
  float key(int64_t i) const { return now_.key[size_t(i)]; }
  float x(int64_t i) const { return now_.x[size_t(i)]; }
  float y(int64_t i) const { return now_.y[size_t(i)]; }

  template <class T>
  DEEPALIGN_INLINE void add(int64_t step_begin, MaskPair mask, Pair keys, Pair x, Pair y) {
    const int64_t before = size_;
    append_half<T>(step_begin, mask.first, keys.first, x.first, y.first);
    const int64_t between = size_;
    append_half<T>(step_begin + Deal<T>::kSecond, mask.second, keys.second, x.second, y.second);
    if (Deal<T>::kStride == 2 && between > before && size_ > between) {  // even indices, then odd ones: once more
      size_ = before;
      append_in_order(step_begin, mask, keys, x, y);
    }
    if (size_ > capacity_ - kStep) prune();
  }
  // Of a step whose entries have their indices at `index`; not with `values`.
  DEEPALIGN_INLINE void add(const int32_t* index, MaskPair mask, Pair keys) {
    append(now_.index + size_, mask.first, index);
    size_ += append(now_.key + size_, mask.first, keys.first);
    append(now_.index + size_, mask.second, index + kLanes);
    size_ += append(now_.key + size_, mask.second, keys.second);
    if (size_ > capacity_ - kStep) prune();
  }
  // Those of a later part of the row.
  void merge(const Candidates& other) {
    for (int64_t i = 0; i < other.size_; i += kLanes) {
      append_from(other.now_, i, both(greater_equal(load(&other.now_.key[size_t(i)]), splat(bound_)), first_lanes(other.size_ - i)));
      if (size_ > capacity_ - kStep) prune();
    }
  }
  // Keeps the min(k, size) largest, in descending order.
  void finish();
  // After that, body(rank) for the ranks below `kept` in the order of their entries' indices.
  template <class Body>
  void in_index_order(int64_t kept, const Body& body) const {
    for (int64_t place = 0; place < places_; ++place) {
      if (ranks_[size_t(place)] < kept) body(int64_t(ranks_[size_t(place)]));
    }
  }

 private:
  struct List {
    float* key;
    int32_t* index;
    float *x, *y;

    List(const Columns& memory, int first, bool values)
        : key(memory.floats(first)), index(memory.ints(first + 1)), x(values ? memory.floats(first + 2) : nullptr),
          y(values ? memory.floats(first + 3) : nullptr) {}
  };
  // Ranks of up to this many entries are counted, in the square of their number but without a branch to mispredict.
  static constexpr int64_t kMostCounted = 32 * kLanes;

  template <class T>
  DEEPALIGN_INLINE void append_half(int64_t first_index, Mask mask, Float keys, Float x, Float y) {
    append(&now_.index[size_t(size_)], mask, int32_t(first_index), Deal<T>::kStride);
    if (values_) append(&now_.x[size_t(size_)], mask, x), append(&now_.y[size_t(size_)], mask, y);
    size_ += append(&now_.key[size_t(size_)], mask, keys);
  }
  DEEPALIGN_INLINE void append_in_order(int64_t step_begin, MaskPair mask, Pair keys, Pair x, Pair y) {
    const Float absent = splat(kNaN);
    keys = in_order({choose(mask.first, keys.first, absent), choose(mask.second, keys.second, absent)});
    if (values_) x = in_order(x), y = in_order(y);
    append_half<float>(step_begin, equal(keys.first, keys.first), keys.first, x.first, y.first);
    append_half<float>(step_begin + kLanes, equal(keys.second, keys.second), keys.second, x.second, y.second);
  }
  void append_from(const List& from, int64_t i, Mask mask) {
    append(&now_.index[size_t(size_)], mask, &from.index[size_t(i)]);
    if (values_) {
      append(&now_.x[size_t(size_)], mask, load(&from.x[size_t(i)]));
      append(&now_.y[size_t(size_)], mask, load(&from.y[size_t(i)]));
    }
    size_ += append(&now_.key[size_t(size_)], mask, load(&from.key[size_t(i)]));
  }
  DEEPALIGN_INLINE void put(size_t to, size_t from) {
    next_.key[to] = now_.key[from], next_.index[to] = now_.index[from];
    if (values_) next_.x[to] = now_.x[from], next_.y[to] = now_.y[from];
  }
  void prune();
  void rank_by_counting();
  void rank_by_sorting(int64_t kept);

  int64_t k_, capacity_, size_ = 0, places_ = 0;
  bool values_;
  float bound_ = -kInfinity;
  Columns memory_;
  List now_, next_;
  int32_t* ranks_;  // of the places in the order of the index
  std::vector<uint64_t> order_;
};

// Collects what of a step reaches the bound, which rises when there is too much of it.
template <class T, class Entries>
DEEPALIGN_INLINE void gather(int64_t i, const Pair& keys, Entries mask, Candidates& candidates, Float& bound) {
  const MaskPair chosen = both(greater_equal(keys, bound), mask);
  if (!any(chosen)) return;
  candidates.add<T>(i, chosen, keys, keys, keys);
  bound = splat(candidates.bound());
}

// Asks for logits that a first pass has read. Rows of 16-bit logits that the second-level cache does not quite hold gain
// by it (Zen 5, 128256 entries: 16.5 cycles per 32 entries instead of 23), smaller ones lose nothing, rows of floats lose.
template <class T>
DEEPALIGN_INLINE void prefetch_again(const T* at) {
  if (sizeof(T) == 2) prefetch_step(at);
}

// A second pass over d = b - r: returns how many are above the threshold, collects those that reach the bound.
template <class T>
int64_t collect_differences(const T* r, const T* b, int64_t begin, int64_t end, float threshold, Candidates& candidates) {
  const Float limit = splat(threshold);
  Float bound = splat(candidates.bound());
  LaneCount above;
  above.clear();
  // d is NaN where entries are absent, and no comparison holds; beyond the end it is 0.
  const auto step = [&](int64_t i, int64_t n, auto exists) __attribute__((always_inline)) {
    prefetch_again(r + i), prefetch_again(b + i);
    const Pair xr = load_step(r + i, n), xb = load_step(b + i, n);
    const Pair d = xb - xr;
    above.add(both(greater(d, limit), exists));
    gather<T>(i, d, exists, candidates, bound);
  };
  int64_t i = begin;
  for (; i + kStep <= end; i += kStep) step(i, kStep, EveryEntry());
  if (i < end) step(i, end - i, first_entries<T>(end - i));
  return above.total();
}

// Keeps the k largest of at least k, in the order of their indices. What is added later must be larger than the least of
// them, not equal to it: its index is higher.
[[gnu::noinline]] inline void Candidates::prune() {
  const int64_t n = size_;
  const Float absent = splat(kNaN);
  store(&now_.key[size_t(n)], absent), store(&now_.key[size_t(n + kLanes)], absent);
  const float least = value_reached_by(now_.key, n, k_, k_);
  const Float limit = splat(least);
  int64_t ties = k_;  // those that may stay
  for (int64_t i = 0; i < n; i += kLanes) ties -= count(greater(load(&now_.key[size_t(i)]), limit));
  size_ = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Float keys = load(&now_.key[size_t(i)]);
    const Mask tied = equal(keys, limit);
    int kept = kLanes;  // lanes that may stay though they are tied
    if (count(tied) > ties) {
      for (kept = 0; count(both(tied, first_lanes(kept))) < ties;) ++kept;
    }
    ties -= count(both(tied, first_lanes(kept)));
    const Float late = choose(tied, absent, keys);
    append_from(now_, i, greater_equal(choose(first_lanes(kept), keys, late), limit));
  }
  bound_ = std::nextafter(least, kInfinity);
}

inline void Candidates::finish() {
  if (size_ > k_ + k_ / 2 + 2 * kStep) prune();
  const int64_t kept = std::min(k_, size_);
  places_ = size_;
  size_ <= kMostCounted ? rank_by_counting() : rank_by_sorting(kept);
  std::swap(now_, next_);
  size_ = kept;
}

// An entry comes after those that are larger and, all being in the order of their indices, after earlier ones equal to it.
inline void Candidates::rank_by_counting() {
  static constexpr LaterLanes kLater;
  const int64_t n = size_;
  const float* keys = now_.key;
  const Float zero = splat(0), one = splat(1);
  float ranks[kMostCounted];
  for (int64_t i = 0; i < n; i += kStep) {
    const Pair own{load(keys + i), load(keys + i + kLanes)};
    Pair rank{zero, zero};
    int64_t j = 0;
    for (; j < i; ++j) {
      const Float other = splat(keys[j]);
      rank.first = choose(greater_equal(other, own.first), rank.first + one, rank.first);
      rank.second = choose(greater_equal(other, own.second), rank.second + one, rank.second);
    }
    for (; j < std::min(n, i + kStep); ++j) {
      const Float other = splat(keys[j]);
      const float* later = kLater.lanes + kStep - 1 - (j - i);  // 1 for entries after j
      rank.first = rank.first + choose(greater(other, own.first), one, choose(equal(other, own.first), load(later), zero));
      rank.second = rank.second +
                    choose(greater(other, own.second), one, choose(equal(other, own.second), load(later + kLanes), zero));
    }
    for (; j < n; ++j) {
      const Float other = splat(keys[j]);
      rank.first = choose(greater(other, own.first), rank.first + one, rank.first);
      rank.second = choose(greater(other, own.second), rank.second + one, rank.second);
    }
    store(ranks + i, rank.first), store(ranks + i + kLanes, rank.second);
  }
  for (int64_t i = 0; i < n; ++i) {
    ranks_[size_t(i)] = int32_t(ranks[i]);
    put(size_t(ranks_[size_t(i)]), size_t(i));  // nobody looks beyond the k largest
  }
}

inline void Candidates::rank_by_sorting(int64_t kept) {
  order_.resize(size_t(size_));
  for (int64_t i = 0; i < size_; ++i) {  // descending values, then ascending places in the buffer
    order_[size_t(i)] = uint64_t(0x7fffffffu - uint32_t(ordered(key(i)))) << 32 | uint64_t(i);
  }
  if (kept < size_) std::nth_element(order_.begin(), order_.begin() + kept, order_.end());
  std::sort(order_.begin(), order_.begin() + kept);
  std::fill_n(ranks_, size_, int32_t(kept));
  for (int64_t rank = 0; rank < kept; ++rank) {
    const size_t place = uint32_t(order_[size_t(rank)]);
    ranks_[place] = int32_t(rank);
    put(size_t(rank), place);
  }
}

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign
