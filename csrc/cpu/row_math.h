// What the operations do with a row beside their own sums: how it is read and cut. selection.h has the search for its
// largest values. Compiled once per instruction set, on top of its vec_*.h.
//
// A row is cut into segments, a segment into blocks. Sums run in float over a block, in double across blocks, and
// segments are added in order: results do not depend on how many threads share a row.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
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

// Bit j: whether the mask has entry j of a step.
template <class T>
DEEPALIGN_INLINE uint32_t entry_bits(MaskPair mask) {
  return Deal<T>::kStride == 2 ? dealt_bits(mask) : lane_bits(mask.first) | lane_bits(mask.second) << kLanes;
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

// Asks for what a pass will read 4 KiB later: the processor's own prefetching stops at the end of a page.
// kWrite: for what a second pass will write, since a line that is written is read first.
template <bool kWrite = false, class T>
DEEPALIGN_INLINE void prefetch_step(const T* at) {
  for (size_t byte = 0; byte < kStep * sizeof(T); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(at) + 4096 + byte, kWrite);
  }
}

constexpr float kLeastNormal = std::numeric_limits<float>::min();

// While it lives, results below 2^-126 become 0 (of additions, too, differences of two such numbers among them), where an
// Intel processor takes 140 cycles to round one. For loops over exponentials. What compares differences, or x, makes sure
// that those near 0 do not matter to it: a bound below them from `GroupMaxima`, or the conditions that follow.
class FlushToZero {
 public:
  explicit FlushToZero(bool on = true) {
#if defined(__SSE__)
    before_ = _mm_getcsr();
    if (on) _mm_setcsr(before_ | 0x8000u);
#endif
  }
  FlushToZero(const FlushToZero&) = delete;
  ~FlushToZero() {
#if defined(__SSE__)
    _mm_setcsr(before_);
#endif
  }

 private:
  [[maybe_unused]] unsigned before_ = 0;
};

// Whether a comparison with a limit is the same for all numbers near 0; whether none of them reaches a bound, either.
inline bool is_beyond_zero(float limit) { return std::abs(limit) >= kLeastNormal; }
inline bool are_beyond_zero(float bound, float limit) { return bound >= kLeastNormal && is_beyond_zero(limit); }

// Lanes in which every value is neither infinite nor NaN.
DEEPALIGN_INLINE Mask finite(Float x) { return equal(x - x, splat(0)); }
DEEPALIGN_INLINE MaskPair finite(Pair x) { return {finite(x.first), finite(x.second)}; }
template <class V, class... Vs>
DEEPALIGN_INLINE auto finite(V x, Vs... rest) {
  return both(finite(x), finite(rest...));
}

// lse(b) - lse(a) is the logarithm of a mean of exp(b - a), so no less than the least difference and no more than the
// largest. Where rounding says otherwise (models that are equal but for a shift), the nearer of these takes its place, or
// every entry would be base-favored. Ordinary rows have entries on both sides in their first step, and are left there.
template <class T>
[[gnu::noinline]] float between_differences(float ratio, const T* a, const T* b, int64_t size) {
  Float least = splat(kInfinity), largest = splat(-kInfinity);
  bool above = false, below = false;
  for (int64_t i = 0; i < size; i += kStep) {
    const Pair read = load_step(b + i, size - i) - load_step(a + i, size - i);  // NaN where entries are absent
    const Pair d = choose(first_entries<T>(size - i), read, splat(kNaN));
    above |= any(greater_equal(d, splat(ratio))), below |= any(greater_equal(twice(splat(ratio)), d));
    if (above && below) return ratio;
    least = min(d.second, min(d.first, least)), largest = max(d.second, max(d.first, largest));  // NaN is passed over
  }
  return above ? 0.0f - largest_lane(splat(0) - least) : largest_lane(largest);
}

// The offset, in whole bits, that makes 2^(scale x - offset) about 1 at x; false if it is out of the ordinary range.
inline bool whole_bits(double x, double scale, int* offset) {
  const double bits = x * scale;
  if (!(std::abs(bits) < Exponential::kMaxOffset)) return false;
  *offset = int(std::ceil(bits));
  return true;
}

// 2^x for |x| <= 1000 without branch or call, so that a loop over it becomes vectors; relative error 1e-11.
DEEPALIGN_INLINE double exp2_of(double x) {
  const double shifted = x + 0x1.8p52, f = (x - (shifted - 0x1.8p52)) * 0.6931471805599453;  // |f| < 0.35
  double y = fma(f, 1.0 / 362880, 1.0 / 40320);  // e^f: its series
  y = fma(y, f, 1.0 / 5040), y = fma(y, f, 1.0 / 720), y = fma(y, f, 1.0 / 120), y = fma(y, f, 1.0 / 24);
  y = fma(y, f, 1.0 / 6), y = fma(y, f, 0.5), y = fma(y, f, 1.0), y = fma(y, f, 1.0);
  return y * bit_cast<double>((bit_cast<uint64_t>(shifted) + 1023) << 52);
}

template <class T>
const T* row_of(const Logits& logits, int64_t row) {
  return static_cast<const T*>(logits.data) + row * logits.row_stride;
}

// Memory that is written before it is read. A std::vector would fill it: for one row of the sampler, when other code had
// the caches, a tenth of its time.
template <class V>
class Buffer {
 public:
  explicit Buffer(size_t size) : size_(size), data_(new V[size]) {
#ifdef __SANITIZE_ADDRESS__
    std::memset(static_cast<void*>(data_.get()), 0xff, size * sizeof(V));  // NaN and -1: what is read too early shows
#endif
  }
  Buffer(const Buffer& other) : Buffer(other.size_) { std::memcpy(data_.get(), other.data_.get(), size_ * sizeof(V)); }
  Buffer(Buffer&&) = default;
  Buffer& operator=(Buffer&&) = default;
  size_t size() const { return size_; }
  V* data() const { return data_.get(); }
  V& operator[](size_t i) { return data_[i]; }
  const V& operator[](size_t i) const { return data_[i]; }
  V* begin() const { return data_.get(); }
  V* end() const { return data_.get() + size_; }

 private:
  size_t size_;
  std::unique_ptr<V[]> data_;
};

// Columns of 4-byte values in one such piece of memory: an allocation of kilobytes takes half a microsecond.
class Columns {
 public:
  Columns(int64_t rows, int columns) : stride_(size_t(rows) * 4 + kGap), memory_(stride_ * size_t(columns)) {
#ifdef __SANITIZE_ADDRESS__
    for (int i = 0; i < columns; ++i) __asan_poison_memory_region(at(i) + stride_ - kGap, kGap);
#endif
  }
  float* floats(int column) const { return reinterpret_cast<float*>(at(column)); }
  int32_t* ints(int column) const { return reinterpret_cast<int32_t*>(at(column)); }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kGap = 64;  // what writes beyond a column shows
#else
  static constexpr size_t kGap = 0;
#endif
  unsigned char* at(int column) const { return memory_.data() + stride_ * size_t(column); }

  size_t stride_;
  Buffer<unsigned char> memory_;
};

// A sum of many floats: lanes in double, fed once per block.
struct LaneSum {
  alignas(64) double lanes[kLanes] = {};
  DEEPALIGN_INLINE void add(Float x, double factor = 1.0) { add_to_double(lanes, x, factor); }
  double total() const {
    double sums[kLanes];
    std::copy_n(lanes, kLanes, sums);
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
    }
    return sums[0];
  }
  // (x - y) factor, of all lanes.
  static double of(Float x, Float y, double factor) {
    LaneSum sum;
    sum.add(x, factor), sum.add(y, -factor);
    return sum.total();
  }
};

// How a row of `size` entries is cut. Depends on the problem only, never on threads.
struct Cut {
  static constexpr int64_t kMostBlock = kLanes < 8 ? 512 : 1024;  // what a lane adds before its sum becomes a double
  int64_t size, block, segment, segments;
  int slots;  // blocks share this many sets of group maxima

  // At least `groups` groups of entries, so that the k-th largest of their maxima is a good bound.
  Cut(int64_t size, int64_t groups) : size(size) {
    slots = int(std::max<int64_t>(1, std::min((groups + kStep - 1) / kStep, (size + kStep - 1) / kStep)));
    block = std::min(kMostBlock, std::max<int64_t>(kStep, size / slots / kStep * kStep));
    segment = (16384 + block - 1) / block * block;
    segments = (size + segment - 1) / segment;
  }
  int64_t begin(int64_t i) const { return i * segment; }
  int64_t end(int64_t i) const { return std::min(size, (i + 1) * segment); }
};

// By how much the exponentials of a part of a row are scaled: 1 to 2, in steps of the golden ratio. Terms that are equal
// would be rounded alike in every part, where a lane adds 64 or more of them by up to 1e-6; scaled differently, errors are
// of either sign, also those of terms that are only a few last places of the sum. Never down: what is too large would no
// longer become infinite.
inline float scale_of_part(int64_t number) { return bit_cast<float>(0x3f800000u | (uint32_t(number) * 0x9e3779b9u >> 9)); }

// Whether eight values make up n entries, but for an eighth of those that are finite. In most rows few entries are equal
// to the ones that are asked for first.
inline bool has_few_values(const float* x, int64_t n) {
  constexpr int kValues = 8;
  int finite = 0, repeated = 0;
  for (int64_t j = 0; j < n; ++j) finite += x[j] - x[j] == 0.0f;
  for (int64_t i = n / 3; i < n / 3 + 4 && i < n; ++i) {
    int equal = 0;
    for (int64_t j = 0; j < n; ++j) equal += x[j] == x[i];
    repeated = std::max(repeated, equal);
  }
  if (finite < 16 || repeated < 3) return false;
  float values[kValues];
  int found = 0, others = 0;
  for (int64_t i = 0; i < n && 8 * others <= finite; ++i) {
    if (x[i] - x[i] != 0.0f || std::find(values, values + found, x[i]) != values + found) continue;
    if (found < kValues) values[found++] = x[i];
    else ++others;
  }
  return 8 * others <= finite;
}

template <class... Exponentials>
DEEPALIGN_INLINE void scale_all(float scale, Exponentials&... exponentials) {
  (exponentials.scale_by(splat(scale)), ...);
}

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

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign
