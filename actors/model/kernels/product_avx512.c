// flags: -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx512vnni
/* Multiply with AVX-512, its products of whole numbers (VNNI), and its products of bfloat16 (BF16). */

#define TOKENS 8
#define FOUR_TILES 2
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
    const uint16_t *tile, size_t tile_step, int columns, const uint16_t *x, size_t x_step, float *out, size_t out_step, int more,
    const int count, const int tiles) {
    F sum[PAIRS][4];
    for (int t = 0; t < count; t++)
        for (int i = 0; i < tiles; i++)
            sum[t][i] = more ? f_load(out + t * out_step + i * TILE) : f_zero();
    for (int column = 0; column < columns; column += 2)
#pragma GCC unroll 4
        for (int i = 0; i < tiles; i++) {
            const uint16_t *own = tile + i * tile_step + (size_t)column * TILE;
            _mm_prefetch((const char *)(own + 1024), _MM_HINT_T0);
            __m512bh weights = (__m512bh)_mm512_loadu_si512(own);
#pragma GCC unroll 16
            for (int t = 0; t < count; t++) {
                int32_t pair;
                memcpy(&pair, x + t * x_step + column, 4);
                sum[t][i] = _mm512_dpbf16_ps(sum[t][i], weights, (__m512bh)_mm512_set1_epi32(pair));
            }
        }
    for (int t = 0; t < count; t++)
        for (int i = 0; i < tiles; i++)
            f_store(out + t * out_step + i * TILE, sum[t][i]);
}

static void pairs_many(
    const uint16_t *tile, int columns, const uint16_t *x, size_t x_step, float *out, size_t out_step, int more, int count) {
#define ROWS(n) ONE_COUNT(n, tile_pairs(tile, 0, columns, x, x_step, out, out_step, more, N, 1))
    switch (count) {
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8)
        ROWS(9) ROWS(10) ROWS(11) ROWS(12) ROWS(13) ROWS(14) ROWS(15) ROWS(16)
    }
#undef ROWS
}

static void pairs_any(
    const uint16_t *tile, size_t tile_step, int tiles, int columns, const uint16_t *x, size_t x_step, float *out, size_t out_step,
    int more, int count) {
    int together = count <= 4 ? 4 : count <= 8 ? 2 : 1;
#define ROWS(n, of) tile_pairs(tile, tile_step, columns, x, x_step, out, out_step, more, n, of)
    for (; tiles >= together; tiles -= together, tile += together * tile_step, out += together * TILE)
        switch (together > 1 ? count : 0) {
        case 1: ROWS(1, 4); break;
        case 2: ROWS(2, 4); break;
        case 3: ROWS(3, 4); break;
        case 4: ROWS(4, 4); break;
        case 5: ROWS(5, 2); break;
        case 6: ROWS(6, 2); break;
        case 7: ROWS(7, 2); break;
        case 8: ROWS(8, 2); break;
        default: pairs_many(tile, columns, x, x_step, out, out_step, more, count);
        }
    for (; tiles; tiles--, tile += tile_step, out += TILE)
        pairs_many(tile, columns, x, x_step, out, out_step, more, count);
#undef ROWS
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

#include "whole_avx512.h"

#include "multiply.c"
#include "pack.c"
#include "attend.c"
#include "finite.c"
#include "step.c"
