#if defined(__x86_64__)
#define DEEPALIGN_ISA avx2
#define DEEPALIGN_TARGET "avx2,fma,f16c,popcnt"
#include "isa_begin.h"
#include "vec_avx2.h"

#include "table.h"
#include "isa_end.h"
#endif
