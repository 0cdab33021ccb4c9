/* vectors.h with AVX-512: sixteen numbers in one register. */

typedef __m512 F;  /* 16 float32 */
typedef __m512i I; /* 64 bytes: 16 int32, or 64 int8 */

#define REGISTERS 32
#define F_KEEP(x) /* there are registers enough */

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

/* Return the first, or the second, of each of sixteen pairs of bfloat16 as float32. */
INLINE F f_first(const uint16_t *from) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(from), 16)); }
INLINE F f_second(const uint16_t *from) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(from), _mm512_set1_epi32((int)0xFFFF0000)));
}

/* Round to whole numbers from -128 to 127, and return their sum. */
INLINE int32_t f_to_int8(int8_t *to, F x) {
    __m512i whole = _mm512_cvtps_epi32(x);
    _mm_storeu_si128((__m128i *)to, _mm512_cvtsepi32_epi8(whole));
    return _mm512_reduce_add_epi32(whole);
}

/* Keep the numbers from `from` to `to` - 1, and put `other` in place of the rest. */
INLINE F f_only(F x, int from, int to, F other) {
    uint32_t below = to >= 16 ? 0xFFFF : to > 0 ? (1u << to) - 1 : 0, above = from > 16 ? 0xFFFF : from > 0 ? (1u << from) - 1 : 0;
    return _mm512_mask_blend_ps((__mmask16)(below & ~above), other, x);
}
