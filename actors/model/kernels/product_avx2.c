// flags: -mavx2 -mfma -mf16c
/* Multiply with AVX2, whose vectors are half as wide as a tile. */

#define TOKENS 6 /* twelve sums, two vectors of weights, one of tokens and a mask fill the sixteen registers */
#define FOUR_TILES 1
#define WHOLE_AT_ONCE(kind) ((kind) == INT4 ? 6 : 5)
#define WIDEN
#define COLUMNS 768

#include "product.h"

int ranvier_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? 256 : 0;
}

#define KEEP(x) __asm__ volatile("" : "+x"(x)) /* as F_KEEP, one register */

/* Make 16 bits of each of 32 numbers. Of each four columns, 0 and 2 lie side by side, and 1 and 3. */
INLINE void widen(const int8_t *from, int16_t *to) {
    for (int i = 0; i < BLOCK; i += 16) {
        __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(from + i)));
        wide = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(wide, 0xD8), 0xD8);
        _mm256_storeu_si256((__m256i *)(to + i), wide);
    }
}

/* Return one of two parts of a line of half a tile, 8 rows: of int4, columns 0-3 or 4-7 in 8 bits; of int8, columns 0 and 2, or 1
   and 3, in 16 bits. The line is loaded each time (volatile), because there is no register that could hold it. */
INLINE __m256i part_of(const uint8_t *line, const int part, const int kind) {
    __m256i both = *(const volatile __m256i_u *)line;
    if (kind == INT4)
        return _mm256_and_si256(part ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
    both = _mm256_xor_si256(both, _mm256_set1_epi8(-128)); /* subtract 128 */
    return _mm256_srai_epi16(part ? both : _mm256_slli_epi16(both, 8), 8);
}

/* Add products to sums: of int4 in 16 bits, which hold sixteen products of 15 x 127; of int8 in 32 bits. */
INLINE __m256i with_product(__m256i sums, __m256i weights, __m256i x, const int kind) {
    if (kind == INT4)
        return _mm256_add_epi16(sums, _mm256_maddubs_epi16(weights, x));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(weights, x));
}

INLINE void tile_whole(const Product *p, int tile, int first, const int count, const int kind) {
    const Matrix *m = p->matrix;
    const Tokens *tokens = p->tokens;
    const int lines = kind == INT4 ? 4 : 8, words = 2 * lines; /* of 32 bits, of a token's block */
    int blocks = m->columns / BLOCK;
    const uint8_t *own = (const uint8_t *)m->data + (size_t)tile * blocks * lines * 64;
    const uint16_t *scales = m->scales + (size_t)tile * blocks * TILE;
    const uint16_t *least = kind == INT4 ? m->least + (size_t)tile * blocks * TILE : NULL;
    const int32_t *x = kind == INT4 ? (const int32_t *)tokens->whole : (const int32_t *)tokens->wider;
    __m256 sum[2][TOKENS];
    for (int half = 0; half < 2; half++)
        for (int t = 0; t < count; t++)
            sum[half][t] = _mm256_setzero_ps();
    for (int block = 0; block < blocks; block++, own += 64 * lines) {
        __m256i made[2][TOKENS];
        const int32_t *of[TOKENS];
        for (int t = 0; t < count; t++) {
            made[0][t] = made[1][t] = _mm256_setzero_si256();
            of[t] = x + ((size_t)(first + t) * blocks + block) * words;
            __asm__ volatile("" : "+r"(of[t])); /* otherwise gcc keeps the place of each word in memory */
        }
        for (int line = 0; line < lines; line++)
            _mm_prefetch((const char *)(own + 2048 + 64 * line), _MM_HINT_T0);
#pragma GCC unroll 16
        for (int word = 0; word < words; word++) {
            const uint8_t *line = own + word / 2 * 64;
            __m256i weights[2] = {part_of(line, word % 2, kind), part_of(line + 32, word % 2, kind)};
#pragma GCC unroll 8
            for (int t = 0; t < count; t++) {
                __m256i columns = _mm256_set1_epi32(of[t][word]);
                made[0][t] = with_product(made[0][t], weights[0], columns, kind);
                made[1][t] = with_product(made[1][t], weights[1], columns, kind);
                KEEP(made[0][t]);
                KEEP(made[1][t]);
            }
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m256 scale = from_half(scales + block * TILE + 8 * half);
            __m256 from = kind == INT4 ? from_half(least + block * TILE + 8 * half) : scale;
#pragma GCC unroll 8
            for (int t = 0; t < count; t++) {
                size_t at = (size_t)(first + t) * blocks + block;
                __m256i all = made[half][t];
                if (kind == INT4)
                    all = _mm256_madd_epi16(all, _mm256_set1_epi16(1));
                __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(all), _mm256_set1_ps(tokens->scales[at]));
                sum[half][t] = _mm256_fmadd_ps(scaled, scale, sum[half][t]);
                if (kind == INT4)
                    sum[half][t] = _mm256_fmadd_ps(from, _mm256_set1_ps(tokens->sums[at]), sum[half][t]);
            }
        }
    }
    for (int half = 0; half < 2; half++)
        for (int t = 0; t < count; t++)
            _mm256_storeu_ps(p->out + (size_t)(first + t) * m->rows + tile * TILE + 8 * half, sum[half][t]);
}

#include "multiply.c"
#include "pack.c"
#include "attend.c"
#include "finite.c"
#include "step.c"
