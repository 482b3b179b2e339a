#if defined(__x86_64__)
#define DEEPALIGN_ISA avx512
#define DEEPALIGN_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt"
#include "isa_begin.h"
#include "vec_avx512.h"

#include "table.h"
#include "isa_end.h"
#endif
