#pragma once
#include <simde/x86/avx512.h>
#include <cmath>
#undef _mm512_add_epi32
#define _mm512_add_epi32 simde_mm512_add_epi32
#undef _mm512_add_pd
#define _mm512_add_pd simde_mm512_add_pd
#undef _mm512_and_si512
#define _mm512_and_si512 simde_mm512_and_si512
#undef _mm512_castps512_ps256
#define _mm512_castps512_ps256 simde_mm512_castps512_ps256
#undef _mm512_castps_si512
#define _mm512_castps_si512 simde_mm512_castps_si512
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps simde_mm512_castsi512_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask simde_mm512_cmp_ps_mask
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps simde_mm512_cvtph_ps
inline simde__m512i shim_mm512_cvtps_epu32(simde__m512 x){float a[16];uint32_t u[16];simde_mm512_storeu_ps(a,x);for(int i=0;i<16;i++){double v=a[i];u[i]=!(v>=-0.5)||v>=4294967295.5?0xffffffffu:(uint32_t)(int64_t)std::nearbyint(v);}return simde_mm512_loadu_si512(u);}
#define _mm512_cvtps_epu32 shim_mm512_cvtps_epu32
inline simde__m512d shim_mm512_cvtps_pd(__m256 x){float a[8];double d[8];_mm256_storeu_ps(a,x);for(int i=0;i<8;i++)d[i]=a[i];return simde_mm512_loadu_pd(d);}
#define _mm512_cvtps_pd shim_mm512_cvtps_pd
inline __m256i cvtps_ph(simde__m512 x){float a[16];simde_mm512_storeu_ps(a,x);__m128i l=_mm256_cvtps_ph(_mm256_loadu_ps(a),8),h=_mm256_cvtps_ph(_mm256_loadu_ps(a+8),8);return _mm256_set_m128i(h,l);}
#define _mm512_cvtps_ph(x,r) cvtps_ph(x)
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps simde_mm512_extractf32x8_ps
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps simde_mm512_fmadd_ps
#undef _mm512_fmsub_ps
#define _mm512_fmsub_ps simde_mm512_fmsub_ps
#undef _mm512_load_ps
#define _mm512_load_ps simde_mm512_load_ps
#undef _mm512_loadu_pd
#define _mm512_loadu_pd simde_mm512_loadu_pd
#undef _mm512_loadu_ps
#define _mm512_loadu_ps simde_mm512_loadu_ps
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 simde_mm512_loadu_si512
#undef _mm512_mask_add_ps
#define _mm512_mask_add_ps simde_mm512_mask_add_ps
#undef _mm512_mask_mov_epi32
#define _mm512_mask_mov_epi32 simde_mm512_mask_mov_epi32
#undef _mm512_mask_mov_ps
#define _mm512_mask_mov_ps simde_mm512_mask_mov_ps
#undef _mm512_maskz_compress_epi32
#define _mm512_maskz_compress_epi32 simde_mm512_maskz_compress_epi32
#undef _mm512_maskz_compress_ps
#define _mm512_maskz_compress_ps simde_mm512_maskz_compress_ps
#undef _mm512_max_ps
#define _mm512_max_ps simde_mm512_max_ps
#undef _mm512_min_ps
#define _mm512_min_ps simde_mm512_min_ps
#undef _mm512_mullo_epi32
#define _mm512_mullo_epi32 simde_mm512_mullo_epi32
#undef _mm512_or_si512
#define _mm512_or_si512 simde_mm512_or_si512
#undef _mm512_permutex2var_ps
#define _mm512_permutex2var_ps simde_mm512_permutex2var_ps
#undef _mm512_permutexvar_epi16
#define _mm512_permutexvar_epi16 simde_mm512_permutexvar_epi16
#undef _mm512_permutexvar_ps
#define _mm512_permutexvar_ps simde_mm512_permutexvar_ps
#undef _mm512_reduce_max_ps
#define _mm512_reduce_max_ps simde_mm512_reduce_max_ps
#undef _mm512_scalef_ps
#define _mm512_scalef_ps simde_mm512_scalef_ps
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 simde_mm512_set1_epi32
#undef _mm512_set1_ps
#define _mm512_set1_ps simde_mm512_set1_ps
#undef _mm512_set_epi16
#define _mm512_set_epi16 simde_mm512_set_epi16
#undef _mm512_set_epi32
#define _mm512_set_epi32 simde_mm512_set_epi32
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 simde_mm512_slli_epi32
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 simde_mm512_srli_epi32
#undef _mm512_storeu_pd
#define _mm512_storeu_pd simde_mm512_storeu_pd
#undef _mm512_storeu_ps
#define _mm512_storeu_ps simde_mm512_storeu_ps
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 simde_mm512_storeu_si512
#define __m512 simde__m512
#define __m512d simde__m512d
#define __m512i simde__m512i
#define __mmask16 simde__mmask16
