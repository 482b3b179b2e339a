// Closes what isa_begin.h opened, after listing the kernels of this instruction set.
#ifdef DEEPALIGN_TARGET
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
