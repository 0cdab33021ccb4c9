// flags: -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx512vnni
/* Multiply with AVX-512, its products of whole numbers (VNNI), and its products of bfloat16 (BF16). */

#define TOKENS 8
#define SPLIT 8
#define PAIRS 16

#include "product.h"

#include <cpuid.h>

int ranvier_supported(void) {
    __builtin_cpu_init();
    int all = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16") &&
              __builtin_cpu_supports("avx512vnni");
    return all ? 512 : 0;
}

/* Multiply like `tile_rows`, but with tokens that are rounded to bfloat16: two columns at a time, by the processor's own
   instruction. Where it can start twice a cycle (see `pairs`), this is at most half the work, because nothing is widened. */
INLINE void tile_pairs(
    const uint16_t *tile, int columns, const uint16_t *x, size_t x_step, float *out, size_t out_step, int more,
    const int count) {
    const int split = count <= 4 ? 4 : count <= 8 ? 2 : 1; /* parallel sums, so that no addition waits for the previous one */
    F sum[PAIRS][4];
    for (int t = 0; t < count; t++) {
        sum[t][0] = more ? f_load(out + t * out_step) : f_zero();
        for (int i = 1; i < split; i++)
            sum[t][i] = f_zero();
    }
    for (int column = 0; column < columns; column += 2 * split)
#pragma GCC unroll 4
        for (int i = 0; i < split; i++) {
            const uint16_t *own = tile + (size_t)(column + 2 * i) * TILE;
            _mm_prefetch((const char *)(own + 1024), _MM_HINT_T0);
            __m512bh weights = (__m512bh)_mm512_loadu_si512(own);
#pragma GCC unroll 16
            for (int t = 0; t < count; t++) {
                int32_t pair;
                memcpy(&pair, x + t * x_step + column + 2 * i, 4);
                sum[t][i] = _mm512_dpbf16_ps(sum[t][i], weights, (__m512bh)_mm512_set1_epi32(pair));
            }
        }
    for (int t = 0; t < count; t++) {
        F all = split > 1 ? f_add(sum[t][0], sum[t][1]) : sum[t][0];
        f_store(out + t * out_step, split == 4 ? f_add(all, f_add(sum[t][2], sum[t][3])) : all);
    }
}

static void pairs_any(
    const uint16_t *tile, int columns, const uint16_t *x, size_t x_step, float *out, size_t out_step, int more, int count) {
    if (count <= TOKENS)
        BY_COUNT(count, tile_pairs(tile, columns, x, x_step, out, out_step, more, N))
    else
        switch (count) {
            ONE_COUNT(9, tile_pairs(tile, columns, x, x_step, out, out_step, more, N))
            ONE_COUNT(10, tile_pairs(tile, columns, x, x_step, out, out_step, more, N))
            ONE_COUNT(11, tile_pairs(tile, columns, x, x_step, out, out_step, more, N))
            ONE_COUNT(12, tile_pairs(tile, columns, x, x_step, out, out_step, more, N))
            ONE_COUNT(13, tile_pairs(tile, columns, x, x_step, out, out_step, more, N))
            ONE_COUNT(14, tile_pairs(tile, columns, x, x_step, out, out_step, more, N))
            ONE_COUNT(15, tile_pairs(tile, columns, x, x_step, out, out_step, more, N))
            ONE_COUNT(16, tile_pairs(tile, columns, x, x_step, out, out_step, more, N))
        }
}

/* Return whether the processor's bfloat16 instruction starts as often as that of float32. AMD's does from Zen 5 on. On
   earlier processors it starts every other cycle. For other processors this is not known. */
static int pairs(void) {
    static int known = -1;
    if (known < 0) {
        unsigned a, b, c, d;
        __cpuid(0, a, b, c, d);
        int amd = b == 0x68747541; /* "Auth" */
        __cpuid(1, a, b, c, d);
        known = amd && ((a >> 8) & 15) + ((a >> 20) & 255) >= 26;
    }
    return known;
}


/* Unpack a block of 32 columns: eight vectors of 16 rows x 4 numbers. */
INLINE void unpack(int kind, const uint8_t *from, __m512i to[8]) {
    if (kind == INT8) {
        for (int i = 0; i < 8; i++)
            to[i] = _mm512_loadu_si512(from + 64 * i);
        return;
    }
    const __m512i low = _mm512_set1_epi8(15);
    for (int i = 0; i < 4; i++) {
        __m512i both = _mm512_loadu_si512(from + 64 * i);
        to[2 * i] = _mm512_and_si512(both, low);
        to[2 * i + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    }
}

INLINE void tile_whole(const Product *p, int tile, int first, const int count, const int kind) {
    const Matrix *m = p->matrix;
    const Tokens *tokens = p->tokens;
    int blocks = m->columns / BLOCK;
    size_t block_bytes = kind == INT4 ? 4 * 64 : 8 * 64;
    const uint8_t *weights = (const uint8_t *)m->data + (size_t)tile * blocks * block_bytes;
    const uint16_t *scales = m->scales + (size_t)tile * blocks * TILE;
    const uint16_t *least = kind == INT4 ? m->least + (size_t)tile * blocks * TILE : NULL;
    F sum[TOKENS];
    for (int t = 0; t < count; t++)
        sum[t] = f_zero();
    for (int block = 0; block < blocks; block++) {
        __m512i w[8];
        const uint8_t *own = weights + block * block_bytes;
        for (int line = 0; line < (int)block_bytes; line += 64)
            _mm_prefetch((const char *)(own + 2048 + line), _MM_HINT_T0);
        unpack(kind, own, w);
        F scale = f_from_half(scales + block * TILE);
        F under = kind == INT4 ? f_from_half(least + block * TILE) : f_mul(scale, f_all(-128.0f));
        for (int t = 0; t < count; t++) {
            const int32_t *x = (const int32_t *)(tokens->whole + (size_t)(first + t) * m->columns + block * BLOCK);
            __m512i a = _mm512_setzero_si512(), b = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int i = 0; i < 8; i += 2) {
                a = _mm512_dpbusd_epi32(a, w[i], _mm512_set1_epi32(x[i]));
                b = _mm512_dpbusd_epi32(b, w[i + 1], _mm512_set1_epi32(x[i + 1]));
            }
            size_t at = (size_t)(first + t) * blocks + block;
            F made = f_mul(_mm512_cvtepi32_ps(_mm512_add_epi32(a, b)), f_all(tokens->scales[at]));
            sum[t] = f_fma(made, scale, sum[t]);
            sum[t] = f_fma(under, f_all(tokens->sums[at]), sum[t]);
        }
    }
    for (int t = 0; t < count; t++)
        f_store(p->out + (size_t)(first + t) * m->rows + tile * TILE, sum[t]);
}


#include "multiply.c"
#include "pack.c"
#include "step.c"
#include "finite.c"
