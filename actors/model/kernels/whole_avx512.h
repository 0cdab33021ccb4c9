/* Multiply whole numbers with AVX-512 and its VNNI. Used by each instruction set that has them. */

#ifndef RANVIER_WHOLE_AVX512_H
#define RANVIER_WHOLE_AVX512_H

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

#endif
