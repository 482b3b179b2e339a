// Chooses the instruction set.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace deepalign {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels kTable;
}
namespace avx512_bf16 {
extern const Kernels kTable;
}
namespace avx2 {
extern const Kernels kTable;
}
#endif
namespace portable {
extern const Kernels kTable;
}

namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  bool runs;
};

InstructionSet choose() {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("popcnt");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Kernels* widest = __builtin_cpu_supports("avx512bf16") ? &avx512_bf16::kTable : &avx512::kTable;
  const InstructionSet sets[] = {
      {"avx512", widest, has_avx512}, {"avx2", &avx2::kTable, has_avx2}, {"portable", &portable::kTable, true}};
#else
  const InstructionSet sets[] = {{"portable", &portable::kTable, true}};
#endif
  const char* wanted = std::getenv("DEEPALIGN_CPU_ISA");
  for (const InstructionSet& set : sets) {
    if (wanted && *wanted ? set.name == std::string(wanted) : set.runs) {
      if (set.runs) return set;
      throw std::runtime_error(std::string("DEEPALIGN_CPU_ISA is ") + wanted + ", which this processor does not run; unset it");
    }
  }
  std::string names;
  for (const InstructionSet& set : sets) names += std::string(names.empty() ? "" : ", ") + set.name;
  throw std::runtime_error(std::string("DEEPALIGN_CPU_ISA is ") + wanted + "; expected one of " + names + ", or unset");
}

const InstructionSet& chosen() {
  static const InstructionSet set = choose();
  return set;
}

}  // namespace

const Kernels& kernels() { return *chosen().kernels; }
const char* instruction_set() { return chosen().name; }

}  // namespace deepalign
