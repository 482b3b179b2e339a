// For an instruction set whose exponentials are right everywhere: none is open (vec_pair.h), nothing is watched.
#pragma once

namespace deepalign {
namespace DEEPALIGN_ISA {

constexpr bool kWatched = false;
using OpenExponential = Exponential;
using OpenCoarseExponential = CoarseExponential;

template <class E>
Interval right_within(const E&) {
  return {};
}

template <class T>
struct Extremes {
  void clear() {}
  void see(const T*) {}
  Interval interval() const { return {}; }
};

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign
