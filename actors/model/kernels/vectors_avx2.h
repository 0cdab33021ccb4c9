/* vectors.h with AVX2: sixteen numbers in two registers. */

typedef struct {
    __m256 a, b;
} F;
typedef struct {
    __m256i a, b;
} I;

#define REGISTERS 16
/* Have a value in registers here. Otherwise gcc mixes operations from far apart, and has to store what it added. */
#define F_KEEP(x) __asm__ volatile("" : "+x"((x).a), "+x"((x).b))

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
INLINE F f_round(F x) { return (F){_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; } /* 8: to the nearest, no exception */
INLINE __m256 power_of_two(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE F f_power_of_two(F n) { return (F){power_of_two(n.a), power_of_two(n.b)}; } /* n from -126 to 127 */
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

/* Round to the nearest, halves to even; NaN stays NaN. */
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
/* Load the pairs each time (volatile). If f_second reused those of f_first, they would take registers from the sums. */
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

/* Keep the numbers from `from` to `to` - 1, and put `other` in place of the rest. */
INLINE __m256 only(__m256 x, int first, int from, int to, __m256 other) {
    __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
    __m256i outside = _mm256_or_si256(
        _mm256_cmpgt_epi32(_mm256_set1_epi32(from), lane), _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(to - 1)));
    return _mm256_blendv_ps(x, other, _mm256_castsi256_ps(outside));
}
INLINE F f_only(F x, int from, int to, F other) {
    return (F){only(x.a, 0, from, to, other.a), only(x.b, 8, from, to, other.b)};
}
