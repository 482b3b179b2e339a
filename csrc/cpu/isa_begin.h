// Starts a file of kernels for one instruction set: define DEEPALIGN_ISA (a namespace) and DEEPALIGN_TARGET (features, or
// leave it out), include this file, then vec_*.h and the kernels; close with isa_end.h.
//
// Whatever other files share is included above the pragma. Functions of the standard library and of namespace deepalign
// are therefore compiled for the plain processor in every file: the linker keeps one copy of each, and it must run on all.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "kernels.h"
#include "types.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's own intrinsics start from undefined registers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wignored-attributes"  // vectors as template arguments
#endif

// For whatever a loop over entries calls: out of line its vectors would go through memory (measured: twice the time).
#define DEEPALIGN_INLINE [[gnu::always_inline]] inline

#ifdef DEEPALIGN_TARGET
#if defined(__clang__)
#define DEEPALIGN_PRAGMA(text) _Pragma(#text)
#define DEEPALIGN_BEGIN(features) DEEPALIGN_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
DEEPALIGN_BEGIN(DEEPALIGN_TARGET)
#else
#pragma GCC push_options
#define DEEPALIGN_PRAGMA(text) _Pragma(#text)
#define DEEPALIGN_BEGIN(features) DEEPALIGN_PRAGMA(GCC target(features))
DEEPALIGN_BEGIN(DEEPALIGN_TARGET)
#endif
#endif
