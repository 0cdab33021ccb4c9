/* Sixteen numbers at a time: one register with AVX-512, two with AVX2. kernels.c is written in these and compiled for each.

   Plain words for what the processor does; nothing here knows of weights or tokens. */

#ifndef RANVIER_VECTORS_H
#define RANVIER_VECTORS_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

#ifdef __AVX512F__

typedef __m512 F;  /* 16 float32 */
typedef __m512i I; /* 64 bytes: 16 int32, or 64 int8 */

INLINE F f_load(const float *from) { return _mm512_loadu_ps(from); }
INLINE void f_store(float *to, F x) { _mm512_storeu_ps(to, x); }
INLINE F f_all(float x) { return _mm512_set1_ps(x); }
INLINE F f_add(F x, F y) { return _mm512_add_ps(x, y); }
INLINE F f_sub(F x, F y) { return _mm512_sub_ps(x, y); }
INLINE F f_mul(F x, F y) { return _mm512_mul_ps(x, y); }
INLINE F f_div(F x, F y) { return _mm512_div_ps(x, y); }
INLINE F f_fma(F x, F y, F more) { return _mm512_fmadd_ps(x, y, more); }
INLINE F f_less(F x, F y, F from) { return _mm512_fnmadd_ps(x, y, from); }
INLINE F f_max(F x, F y) { return _mm512_max_ps(x, y); }
INLINE F f_min(F x, F y) { return _mm512_min_ps(x, y); }
INLINE F f_abs(F x) { return _mm512_abs_ps(x); }
INLINE F f_round(F x) { return _mm512_roundscale_ps(x, 0); }
INLINE F f_power_of_two(F n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }
INLINE float f_sum(F x) { return _mm512_reduce_add_ps(x); }
INLINE float f_most(F x) { return _mm512_reduce_max_ps(x); }
INLINE F f_from_half(const uint16_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
INLINE F f_from_bfloat16(const uint16_t *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}
INLINE void f_to_bfloat16(uint16_t *to, F x) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x)); }

/* Sixteen pairs of bfloat16: the first of each as float32, or the second. */
INLINE F f_first(const uint16_t *from) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(from), 16)); }
INLINE F f_second(const uint16_t *from) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(from), _mm512_set1_epi32((int)0xFFFF0000)));
}

/* Rounded to whole numbers from -128 to 127; returns their sum. */
INLINE int32_t f_to_int8(int8_t *to, F x) {
    __m512i whole = _mm512_cvtps_epi32(x);
    _mm_storeu_si128((__m128i *)to, _mm512_cvtsepi32_epi8(whole));
    return _mm512_reduce_add_epi32(whole);
}

#else

typedef struct {
    __m256 a, b;
} F;
typedef struct {
    __m256i a, b;
} I;

INLINE F f_load(const float *from) { return (F){_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
INLINE void f_store(float *to, F x) {
    _mm256_storeu_ps(to, x.a);
    _mm256_storeu_ps(to + 8, x.b);
}
INLINE F f_all(float x) { return (F){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE F f_add(F x, F y) { return (F){_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE F f_sub(F x, F y) { return (F){_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE F f_mul(F x, F y) { return (F){_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE F f_div(F x, F y) { return (F){_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE F f_fma(F x, F y, F more) { return (F){_mm256_fmadd_ps(x.a, y.a, more.a), _mm256_fmadd_ps(x.b, y.b, more.b)}; }
INLINE F f_less(F x, F y, F from) { return (F){_mm256_fnmadd_ps(x.a, y.a, from.a), _mm256_fnmadd_ps(x.b, y.b, from.b)}; }
INLINE F f_max(F x, F y) { return (F){_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE F f_min(F x, F y) { return (F){_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE F f_abs(F x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return (F){_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
INLINE F f_round(F x) { return (F){_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; } /* 8: to the nearest, in silence */
INLINE __m256 power_of_two(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE F f_power_of_two(F n) { return (F){power_of_two(n.a), power_of_two(n.b)}; } /* of -126 to 127 */
INLINE float f_sum(F x) {
    __m256 all = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float f_most(F x) {
    __m256 all = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
INLINE __m256 from_half(const uint16_t *from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }
INLINE F f_from_half(const uint16_t *from) { return (F){from_half(from), from_half(from + 8)}; }
INLINE __m256 from_bfloat16(const uint16_t *from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16));
}
INLINE F f_from_bfloat16(const uint16_t *from) { return (F){from_bfloat16(from), from_bfloat16(from + 8)}; }

/* To the nearest, halves to the even one; what is no number stays none. */
INLINE __m256i to_bfloat16(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    __m256i none = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), none), 16);
}
INLINE void f_to_bfloat16(uint16_t *to, F x) {
    __m256i both = _mm256_packus_epi32(to_bfloat16(x.a), to_bfloat16(x.b));
    _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(both, 0xD8));
}
/* Loaded each time anew: kept for the second of the pairs they would take the registers of sums. */
INLINE __m256i eight_pairs(const uint16_t *from) { return *(const volatile __m256i_u *)from; }
INLINE __m256 first_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
INLINE __m256 second_of(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xFFFF0000)));
}
INLINE F f_first(const uint16_t *from) { return (F){first_of(eight_pairs(from)), first_of(eight_pairs(from + 16))}; }
INLINE F f_second(const uint16_t *from) { return (F){second_of(eight_pairs(from)), second_of(eight_pairs(from + 16))}; }
INLINE int32_t f_to_int8(int8_t *to, F x) {
    __m256i a = _mm256_cvtps_epi32(x.a), b = _mm256_cvtps_epi32(x.b), all = _mm256_add_epi32(a, b);
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8);
    _mm_storeu_si128(
        (__m128i *)to, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
}

#endif

INLINE F f_zero(void) { return f_all(0.0f); }

/* e^x, relative error under 2e-7 for x <= 0: 2^n times a polynomial in the rest (Cephes' expf). */
INLINE F f_exp(F x) {
    x = f_max(f_all(-87.0f), x); /* in this order what is no number stays none */
    F n = f_round(f_mul(x, f_all(1.44269504088896341f)));
    F r = f_less(n, f_all(0.693359375f), x);
    r = f_less(n, f_all(-2.12194440e-4f), r);
    F y = f_all(1.9875691500e-4f);
    y = f_fma(y, r, f_all(1.3981999507e-3f));
    y = f_fma(y, r, f_all(8.3334519073e-3f));
    y = f_fma(y, r, f_all(4.1665795894e-2f));
    y = f_fma(y, r, f_all(1.6666665459e-1f));
    y = f_fma(y, r, f_all(5.0000001201e-1f));
    y = f_fma(y, f_mul(r, r), f_add(r, f_all(1.0f)));
    return f_mul(y, f_power_of_two(n));
}

#endif
