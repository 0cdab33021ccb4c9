// flags: -mavx2 -mfma -mf16c
/* Multiply with AVX2, whose vectors are half as wide as a tile. */

#define TOKENS 5
#define FOUR_TILES 1

#include "product.h"

int ranvier_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? 256 : 0;
}

/* Keep a value in a register here. Otherwise gcc regroups the additions of a block, and stores most products before it adds them. */
#define KEEP(x) __asm__ volatile("" : "+x"(x))

/* Multiply `halves` halves of a tile, from number `half` on: the sums of 8 rows each. Eight columns of weights are taken at a
   time, by all tokens: so the weights, the sums of the block and the sums of the rows fit into the sixteen registers. */
INLINE void halves_whole(
    const Product *p, int tile, const int half, const int halves, int first, const int count, const int kind) {
    const Matrix *m = p->matrix;
    const Tokens *tokens = p->tokens;
    int blocks = m->columns / BLOCK;
    size_t block_bytes = kind == INT4 ? 4 * 64 : 8 * 64;
    const uint8_t *weights = (const uint8_t *)m->data + (size_t)tile * blocks * block_bytes + 32 * half;
    const uint16_t *scales = m->scales + (size_t)tile * blocks * TILE + 8 * half;
    const uint16_t *least = kind == INT4 ? m->least + (size_t)tile * blocks * TILE + 8 * half : NULL;
    const int8_t *whole = tokens->whole + (size_t)first * m->columns;
    __m256 sum[2][TOKENS];
    for (int h = 0; h < halves; h++)
        for (int t = 0; t < count; t++)
            sum[h][t] = _mm256_setzero_ps();
    for (int block = 0; block < blocks; block++, whole += BLOCK) {
        const uint8_t *own = weights + block * block_bytes;
        __m256i made[2][TOKENS];
        if (!half)
            for (int line = 0; line < (int)block_bytes; line += 64)
                _mm_prefetch((const char *)(own + 2048 + line), _MM_HINT_T0);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            if (kind == INT4 && i == 4)
                break;
#pragma GCC unroll 2
            for (int h = 0; h < halves; h++) {
                __m256i both = _mm256_loadu_si256((const __m256i *)(own + 64 * i + 32 * h));
                if (kind == INT4) { /* twice eight products of 15 x 127 are 30480, which 16 bits hold */
                    __m256i low = _mm256_and_si256(both, _mm256_set1_epi8(15));
                    __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
#pragma GCC unroll 8
                    for (int t = 0; t < count; t++) {
                        const int32_t *x = (const int32_t *)(whole + (size_t)t * m->columns) + 2 * i;
                        __m256i a = _mm256_maddubs_epi16(low, _mm256_set1_epi32(x[0]));
                        made[h][t] = i ? _mm256_add_epi16(made[h][t], a) : a;
                        made[h][t] = _mm256_add_epi16(made[h][t], _mm256_maddubs_epi16(high, _mm256_set1_epi32(x[1])));
                        KEEP(made[h][t]);
                    }
                } else {
                    __m256i w = _mm256_xor_si256(both, _mm256_set1_epi8(-128)); /* subtract 128 */
                    __m256i size = _mm256_abs_epi8(w);
#pragma GCC unroll 8
                    for (int t = 0; t < count; t++) {
                        /* move the signs of the weights to the token's numbers; none of those is -128, which has no opposite */
                        const int32_t *x = (const int32_t *)(whole + (size_t)t * m->columns) + i;
                        __m256i two = _mm256_maddubs_epi16(size, _mm256_sign_epi8(_mm256_set1_epi32(x[0]), w));
                        __m256i four = _mm256_madd_epi16(two, _mm256_set1_epi16(1));
                        made[h][t] = i ? _mm256_add_epi32(made[h][t], four) : four;
                        KEEP(made[h][t]);
                    }
                }
            }
        }
#pragma GCC unroll 2
        for (int h = 0; h < halves; h++) {
            __m256 scale = from_half(scales + block * TILE + 8 * h);
#pragma GCC unroll 8
            for (int t = 0; t < count; t++) {
                float of_token = tokens->scales[(size_t)(first + t) * blocks + block];
                __m256i all = kind == INT4 ? _mm256_madd_epi16(made[h][t], _mm256_set1_epi16(1)) : made[h][t];
                __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(all), _mm256_set1_ps(of_token));
                sum[h][t] = _mm256_fmadd_ps(scaled, scale, sum[h][t]);
            }
            if (kind == INT8)
                continue;
            __m256 from = from_half(least + block * TILE + 8 * h);
#pragma GCC unroll 8
            for (int t = 0; t < count; t++) {
                __m256 of_token = _mm256_set1_ps(tokens->sums[(size_t)(first + t) * blocks + block]);
                sum[h][t] = _mm256_fmadd_ps(from, of_token, sum[h][t]);
            }
        }
    }
    for (int h = 0; h < halves; h++)
        for (int t = 0; t < count; t++)
            _mm256_storeu_ps(p->out + (size_t)(first + t) * m->rows + tile * TILE + 8 * (half + h), sum[h][t]);
}

INLINE void tile_whole(const Product *p, int tile, int first, const int count, const int kind) {
    if (count <= 2) {
        halves_whole(p, tile, 0, 2, first, count, kind);
    } else {
        halves_whole(p, tile, 0, 1, first, count, kind);
        halves_whole(p, tile, 1, 1, first, count, kind);
    }
}

#include "multiply.c"
#include "pack.c"
#include "attend.c"
#include "finite.c"
#include "step.c"
