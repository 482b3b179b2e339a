#if defined(__x86_64__)
#define DEEPALIGN_ISA avx512_bf16
#define DEEPALIGN_AVX512_BF16
#define DEEPALIGN_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,popcnt"
#include "isa_begin.h"
#include "vec_avx512.h"

#include "table.h"
#include "isa_end.h"
#endif
