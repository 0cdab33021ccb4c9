/* Multiply packed matrices with tokens by the tiles of amx.h: groups of up to four tiles of rows at a time. */

#ifndef RANVIER_AMX_PRODUCT_H
#define RANVIER_AMX_PRODUCT_H

#include "amx.h"

#define AMX_TOKENS 256 /* tokens that a product takes at a time: they stay in the second cache */
#define AMX_COLUMNS 1536 /* columns at a time, of more than 16 tokens: sums are put away once for all of these */
#define AMX_BLOCKS 64 /* blocks of whole numbers at a time */
#define TWO_FROM 64 /* more tokens than these are multiplied 32 at a time */
#define WHOLE_FROM 64 /* tokens from which whole numbers are multiplied by tiles; the bits are the same */
#define FAST_FROM 17 /* tokens from which a fast matrix takes only the high parts: fewer wait for the weights anyway */
#define WIDEN_FROM 28 /* tokens from which a fast matrix of whole numbers is widened to bfloat16 */

static _Thread_local float amx_sums[AMX_TOKENS / 16 * 4][256] __attribute__((aligned(64)));
static _Thread_local uint16_t amx_widened[64 * AMX_COLUMNS] __attribute__((aligned(64)));

/* Widen the columns from `first` on of one tile of whole numbers to bfloat16. */
INLINE void widened(const Matrix *m, int tile, int first, int count, uint16_t *to, const int kind) {
    const __m512i low = _mm512_set1_epi32(255);
    uint16_t order[32];
    for (int i = 0; i < 16; i++) {
        order[2 * i] = (uint16_t)i;
        order[2 * i + 1] = (uint16_t)(16 + i);
    }
    const __m512i weave = _mm512_loadu_si512(order);
    for (int block = first / BLOCK; block < (first + count) / BLOCK; block++) {
        size_t at = (size_t)tile * (m->columns / BLOCK) + block;
        __m512i w[8];
        unpack(kind, (const uint8_t *)m->data + at * (kind == INT4 ? 256 : 512), w);
        F scale = f_from_half(m->scales + at * TILE);
        F under = kind == INT4 ? f_from_half(m->least + at * TILE) : f_mul(scale, f_all(-128.0f));
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++, to += 32) {
                __m512i even = _mm512_and_si512(half ? _mm512_srli_epi32(w[i], 16) : w[i], low);
                __m512i odd = half ? _mm512_srli_epi32(w[i], 24) : _mm512_and_si512(_mm512_srli_epi32(w[i], 8), low);
                F a = f_fma(_mm512_cvtepi32_ps(even), scale, under), b = f_fma(_mm512_cvtepi32_ps(odd), scale, under);
                _mm512_storeu_si512(to, _mm512_permutexvar_epi16(weave, (__m512i)_mm512_cvtne2ps_pbh(b, a)));
            }
    }
}

/* Multiply up to four tiles of rows with tokens in tiles, from `first` to `end`. Unless it is the last, the next tiles are fetched. */
static void amx_group(const Product *p, int tile, const int tiles, int first, int end, int last) {
    const Matrix *m = p->matrix;
    int columns = m->columns, padded = (end - first + 15) / 16 * 16, whole = m->kind != BFLOAT16, parts = 1;
    if (padded > 16 || whole)
        parts = (columns + AMX_COLUMNS - 1) / AMX_COLUMNS;
    int together = (columns / 32 + parts - 1) / parts * 32;
    size_t token_row = (size_t)16 * columns;
    const uint16_t *high = p->tokens->high + first / 16 * token_row;
    const uint16_t *low = p->tokens->low ? p->tokens->low + first / 16 * token_row : NULL;
    Tiles all = {(const uint16_t *)m->data + tile * token_row, token_row, 2 * token_row, 512, 64};
    Ahead ahead = {tiles * token_row, 0, 0};
    if (p->finish == GATE) {
        all.row = m->rows / TILE / 2 * token_row;
        all.pair = token_row;
        ahead.further = tiles / 2 * token_row;
    }
    Due due = {0};
    int lines = whole || last ? 0 : (32 + padded / 32 - 1) / (padded / 32 ? padded / 32 : 1);
    for (int c = 0; c < columns; c += together) {
        int some = columns - c < together ? columns - c : together, steps = some / 32, t = 0;
        Tiles w = all;
        w.at += c * TILE;
        if (whole) {
            for (int i = 0; i < tiles; i++)
                if (m->kind == INT4)
                    widened(m, amx_tile(p, tile, i), c, some, amx_widened + i * some * TILE, INT4);
                else
                    widened(m, amx_tile(p, tile, i), c, some, amx_widened + i * some * TILE, INT8);
            w = (Tiles){amx_widened, (size_t)some * TILE, (size_t)some * 2 * TILE, 512, 64};
        }
        for (; padded > TWO_FROM && t + 32 <= padded; t += 32) {
            const uint16_t *h = high + t / 16 * token_row + c * 16, *l = low ? low + t / 16 * token_row + c * 16 : NULL;
            ahead.from = t / 32 * lines < 32 ? t / 32 * lines : 32;
            ahead.to = ahead.from + lines < 32 ? ahead.from + lines : 32;
#pragma GCC unroll 2
            for (int r = 0; r < tiles; r += 2) {
                float *upper = amx_sums[parts > 1 ? t / 16 * 4 + r : t / 32 % 2 * 8 + r], *lower = upper + 4 * 256;
                const int both = r + 1 < tiles;
                Tiles own = w;
                own.at += r / 2 * w.pair;
                if (c)
                    amx_load(upper, lower, both ? upper + 256 : NULL, both ? lower + 256 : NULL, 64);
                else
                    amx_zero();
                if (l)
                    amx_32_tokens(own, h, l, token_row, steps, both, ahead, p, &due);
                else
                    amx_32_tokens(own, h, NULL, token_row, steps, both, ahead, p, &due);
                amx_store(upper, lower, both ? upper + 256 : NULL, both ? lower + 256 : NULL, 64);
                if (c + some == columns)
                    due = amx_due(p, tile, r, tiles, upper, first + t, end);
            }
        }
        amx_finish(p, &due, 32);
        for (; t < padded; t += 16) {
            const uint16_t *h = high + t / 16 * token_row + c * 16, *l = low ? low + t / 16 * token_row + c * 16 : NULL;
            float *a = amx_sums[parts > 1 ? t / 16 * 4 : 0], *b = tiles > 1 ? a + 256 : NULL;
            float *d = tiles > 2 ? a + 512 : NULL, *e = tiles > 3 ? a + 768 : NULL;
            if (c)
                amx_load(a, b, d, e, 64);
            else
                amx_zero();
            if (t)
                amx_16_tokens(w, tiles, h, l, steps, 0);
            else
                amx_16_tokens(w, tiles, h, l, steps, 2048);
            amx_store(a, b, d, e, 64);
            if (c + some == columns)
                for (int r = 0; r < tiles; r += 2) {
                    due = amx_due(p, tile, r, tiles, a + r * 256, first + t, end);
                    amx_finish(p, &due, 16);
                }
        }
    }
}

/* Multiply one tile of whole numbers with tokens of whole numbers in tiles: the same bits as `tile_whole`. */
INLINE void amx_whole(const Product *p, int tile, const int kind) {
    static _Thread_local int32_t made[8][256] __attribute__((aligned(64)));
    static _Thread_local uint8_t unpacked[512 * AMX_BLOCKS] __attribute__((aligned(64)));
    static _Thread_local float scale[AMX_BLOCKS][16], under[AMX_BLOCKS][16];
    const Matrix *m = p->matrix;
    int all = m->columns / BLOCK, tokens = p->tokens->tokens;
    for (int first = 0; first < all; first += AMX_BLOCKS) {
        int blocks = all - first < AMX_BLOCKS ? all - first : AMX_BLOCKS;
        size_t at = (size_t)tile * all + first;
        const uint8_t *data = (const uint8_t *)m->data + at * (kind == INT4 ? 256 : 512);
        for (int b = 0; b < blocks; b++) {
            if (kind == INT4) {
                __m512i w[8];
                unpack(kind, data + b * 256, w);
                for (int i = 0; i < 8; i++)
                    _mm512_store_si512(unpacked + b * 512 + 64 * i, w[i]);
            }
            F s = f_from_half(m->scales + (at + b) * TILE);
            f_store(scale[b], s);
            f_store(under[b], kind == INT4 ? f_from_half(m->least + (at + b) * TILE) : f_mul(s, f_all(-128.0f)));
        }
        if (kind == INT4)
            data = unpacked;
        for (int t = 0; t < tokens; t += 16) {
            const int8_t *own = p->tokens->whole + (size_t)t * m->columns + (size_t)first * 512;
            const float *scales = p->tokens->scales + (size_t)t * all + first * 16;
            const float *sums = p->tokens->sums + (size_t)t * all + first * 16;
            int some = tokens - t < 16 ? tokens - t : 16;
            float *out = p->out + (size_t)t * m->rows + tile * TILE;
            F sum[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                sum[i] = first && i < some ? f_load(out + (size_t)i * m->rows) : f_zero();
#define OF_BLOCK(sum, b) \
    if (b < blocks) { \
        _tile_zero(sum); \
        _tile_loadd(4, own + (size_t)(b) * 512, 32); \
        _tile_loadd(6, data + (size_t)(b) * 512, 64); \
        _tile_dpbsud(sum, 4, 6); \
        _tile_stored(sum, made[(b) & 7], 64); \
    }
#define FOUR_BLOCKS(b) OF_BLOCK(0, b) OF_BLOCK(1, b + 1) OF_BLOCK(2, b + 2) OF_BLOCK(3, b + 3)
            FOUR_BLOCKS(0)
            for (int b = 0; b < blocks; b++) {
                if (b % 4 == 0) {
                    FOUR_BLOCKS(b + 4)
                }
                F s = f_load(scale[b]), u = f_load(under[b]);
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++) {
                    F whole = _mm512_cvtepi32_ps(_mm512_load_si512(made[b & 7] + 16 * i));
                    sum[i] = f_fma(f_mul(whole, f_all(scales[b * 16 + i])), s, sum[i]);
                    sum[i] = f_fma(u, f_all(sums[b * 16 + i]), sum[i]);
                }
            }
#undef FOUR_BLOCKS
#undef OF_BLOCK
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                if (i < some)
                    f_store(out + (size_t)i * m->rows, sum[i]);
        }
    }
}

static void amx_chunk(void *context, int chunk) {
    const Product *p = context;
    int tiles = tiles_of(p), from = chunk * p->tiles_a_chunk, tokens = p->tokens->tokens;
    int to = from + p->tiles_a_chunk < tiles ? from + p->tiles_a_chunk : tiles, columns = p->matrix->columns;
    if (p->tokens->wide) {
        unsigned before = without_denormals();
        size_t step = (size_t)TILE * columns;
        Tiles own = {(const uint16_t *)p->matrix->data + from * step, step, 2 * step, 512, 64};
        float *out = p->out + from * TILE;
        for (; to - from >= 4; from += 4, own.at += 4 * step, out += 4 * TILE)
            one_token(own, columns / 32, p->tokens->wide, p->tokens->wide_low, out, 4);
        for (; from < to; from++, own.at += step, out += TILE)
            one_token(own, columns / 32, p->tokens->wide, p->tokens->wide_low, out, 1);
        _mm_setcsr(before);
        return;
    }
    if (!p->tokens->high) {
        amx_begin(32, 16);
        for (int tile = from; tile < to; tile++)
            if (p->matrix->kind == INT4)
                amx_whole(p, tile, INT4);
            else
                amx_whole(p, tile, INT8);
        amx_end();
        return;
    }
    amx_begin(64, tokens);
    int each = p->finish == GATE ? 2 : 1, at_once = 4 / each; /* of a gate, `tiles` counts only half of those of the matrix */
    for (int first = 0; first < tokens; first += AMX_TOKENS) {
        int end = first + AMX_TOKENS < tokens ? first + AMX_TOKENS : tokens;
        for (int tile = from; tile < to; tile += at_once) {
            int last = tile + at_once >= (pool.helpers ? to : tiles); /* the next chunk may be another thread's */
            switch (each * (to - tile)) {
            case 1: amx_group(p, tile, 1, first, end, last); break;
            case 2: amx_group(p, tile, 2, first, end, last); break;
            case 3: amx_group(p, tile, 3, first, end, last); break;
            default: amx_group(p, tile, 4, first, end, last);
            }
        }
    }
    amx_end();
}

/* Return how many tiles of rows a chunk should have, whole groups of four if there are enough. */
static int amx_tiles(int tiles, int each) { return tiles < 16 ? each : each < 8 ? 4 : each / 4 * 4; }

#endif
