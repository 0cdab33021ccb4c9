// flags: -mavx2 -mfma -mf16c
/* Multiply with AVX2, whose vectors are half as wide as a tile. */

#define TOKENS 5
#define FOUR_TILES 1

#include "product.h"

int ranvier_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? 256 : 0;
}

/* Multiply 32 columns of 8 rows of int4 with those of a token: one sum for each row. */
INLINE __m256i block_int4(const __m256i w[8], const int32_t *x) {
    /* twice eight products of 15 x 127 are 30480, which 16 bits hold */
    __m256i a = _mm256_maddubs_epi16(w[0], _mm256_set1_epi32(x[0])), b = _mm256_maddubs_epi16(w[1], _mm256_set1_epi32(x[1]));
#pragma GCC unroll 4
    for (int i = 2; i < 8; i += 2) {
        a = _mm256_add_epi16(a, _mm256_maddubs_epi16(w[i], _mm256_set1_epi32(x[i])));
        b = _mm256_add_epi16(b, _mm256_maddubs_epi16(w[i + 1], _mm256_set1_epi32(x[i + 1])));
    }
    return _mm256_madd_epi16(_mm256_add_epi16(a, b), _mm256_set1_epi16(1));
}

INLINE __m256i four_int8(__m256i w, int32_t four) {
    /* move the signs of the weights to the token's numbers; none of those is -128, which has no opposite */
    __m256i signed_x = _mm256_sign_epi8(_mm256_set1_epi32(four), w);
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), signed_x), _mm256_set1_epi16(1));
}

INLINE __m256i block_int8(const __m256i w[8], const int32_t *x) {
    __m256i a = four_int8(w[0], x[0]), b = four_int8(w[1], x[1]);
#pragma GCC unroll 4
    for (int i = 2; i < 8; i += 2) {
        a = _mm256_add_epi32(a, four_int8(w[i], x[i]));
        b = _mm256_add_epi32(b, four_int8(w[i + 1], x[i + 1]));
    }
    return _mm256_add_epi32(a, b);
}

/* Multiply half a tile: the sums of 8 rows. */
INLINE void half_whole(const Product *p, int tile, const int half, int first, const int count, const int kind) {
    const Matrix *m = p->matrix;
    const Tokens *tokens = p->tokens;
    int blocks = m->columns / BLOCK;
    size_t block_bytes = kind == INT4 ? 4 * 64 : 8 * 64;
    const uint8_t *weights = (const uint8_t *)m->data + (size_t)tile * blocks * block_bytes + 32 * half;
    const uint16_t *scales = m->scales + (size_t)tile * blocks * TILE + 8 * half;
    const uint16_t *least = kind == INT4 ? m->least + (size_t)tile * blocks * TILE + 8 * half : NULL;
    __m256 sum[TOKENS];
    for (int t = 0; t < count; t++)
        sum[t] = _mm256_setzero_ps();
    for (int block = 0; block < blocks; block++) {
        __m256i w[8];
        const uint8_t *own = weights + block * block_bytes;
        if (!half)
            for (int line = 0; line < (int)block_bytes; line += 64)
                _mm_prefetch((const char *)(own + 2048 + line), _MM_HINT_T0);
        if (kind == INT4) {
            const __m256i low = _mm256_set1_epi8(15);
            for (int i = 0; i < 4; i++) {
                __m256i both = _mm256_loadu_si256((const __m256i *)(own + 64 * i));
                w[2 * i] = _mm256_and_si256(both, low);
                w[2 * i + 1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
            }
        } else {
            for (int i = 0; i < 8; i++) /* subtract 128 */
                w[i] = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(own + 64 * i)), _mm256_set1_epi8(-128));
        }
        __m256 scale = from_half(scales + block * TILE);
        for (int t = 0; t < count; t++) {
            const int32_t *x = (const int32_t *)(tokens->whole + (size_t)(first + t) * m->columns + block * BLOCK);
            size_t at = (size_t)(first + t) * blocks + block;
            __m256i whole = kind == INT4 ? block_int4(w, x) : block_int8(w, x);
            __m256 made = _mm256_mul_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(tokens->scales[at]));
            sum[t] = _mm256_fmadd_ps(made, scale, sum[t]);
            if (kind == INT4)
                sum[t] = _mm256_fmadd_ps(from_half(least + block * TILE), _mm256_set1_ps(tokens->sums[at]), sum[t]);
        }
    }
    for (int t = 0; t < count; t++)
        _mm256_storeu_ps(p->out + (size_t)(first + t) * m->rows + tile * TILE + 8 * half, sum[t]);
}

INLINE void tile_whole(const Product *p, int tile, int first, const int count, const int kind) {
    half_whole(p, tile, 0, first, count, kind);
    half_whole(p, tile, 1, first, count, kind);
}


#include "multiply.c"
#include "pack.c"
#include "attend.c"
#include "finite.c"
#include "step.c"
