/* Multiply by the tiles of a processor with AMX: its own instructions take 16 tokens x 32 columns x 16 rows at once.

   A tile of weights (product.h) is what these instructions take, so nothing is packed anew. Tokens are split into two numbers of
   bfloat16, the high and the low part, whose products are added up one after the other: 16 bits of each token count. For each
   16 tokens and 32 columns, a tile of tokens holds 16 tokens x 32 numbers.

   The sums of a token and a row grow by 32 columns at a time, in the same order for any number of tokens. So the bits of a
   token do not depend on how many tokens are beside it. */

#ifndef RANVIER_AMX_H
#define RANVIER_AMX_H

#include <sys/syscall.h>
#include <unistd.h>

#include "product.h"

#define AMX_TOKENS 256  /* tokens that a product takes at a time: they stay in the second cache */
#define AMX_COLUMNS 192 /* columns at a time, of more than 16 tokens: four tiles of weights stay in the first cache */
#define AMX_BLOCKS 64   /* blocks of whole numbers at a time */
#define TWO_FROM 64     /* more tokens than these are multiplied 32 at a time */
#define WHOLE_FROM 64   /* tokens from which whole numbers are multiplied by tiles; the bits are the same */
#define FAST_FROM 17    /* tokens from which a fast matrix takes only the high parts: fewer wait for the weights anyway */
#define WIDEN_FROM 28   /* tokens from which a fast matrix of whole numbers is widened to bfloat16 */

/* Ask the system for the permission to use tiles; return 1 if it is given. The threads of the process inherit it. */
static int amx_permitted(void) { return !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */); }

/* Configure the tiles: those of sums (0 to 3) and of tokens (4, 5) have a line for each of `tokens` tokens, up to 16, and those of
   tokens have lines of `token_bytes` bytes: 64, or 32 of whole numbers. */
static void amx_begin(int token_bytes, int tokens) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.bytes[tile] = 64;
        config.rows[tile] = tile < 6 && tokens < 16 ? (uint8_t)tokens : 16;
    }
    config.bytes[4] = config.bytes[5] = (uint16_t)token_bytes;
    if (token_bytes < 64)
        config.rows[6] = config.rows[7] = (uint8_t)(token_bytes / 4);
    __asm__ volatile("" : : "m"(config) : "memory"); /* gcc 12 drops the stores into a configuration without this */
    _tile_loadconfig(&config);
}

static void amx_end(void) { _tile_release(); }

/* Split 32 numbers into high and low parts; without `low`, round them. */
INLINE void split(F a, F b, uint16_t *high, uint16_t *low) {
    __m512i near = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    _mm512_storeu_si512(high, near);
    if (low) {
        F of_a = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(near)), 16));
        F of_b = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(near, 1)), 16));
        _mm512_storeu_si512(low, (__m512i)_mm512_cvtne2ps_pbh(f_sub(b, of_b), f_sub(a, of_a)));
    }
}

/* Where tiles of weights or values lie: the next 32 columns are `column` numbers further, the next 16 rows `row` numbers; the 16
   lines of a tile are `line` bytes apart. */
typedef struct {
    const uint16_t *at;
    size_t row, column, line;
} Tiles;

/* Add to the sums 0 to 3 the products of 32 tokens with 32 rows (or, not `both`, with 16), `steps` times 32 columns. `ahead` is
   what the next products need; it is fetched meanwhile, `lines` lines each step. */
INLINE void amx_32_tokens(
    Tiles w, const uint16_t *high, const uint16_t *low, size_t token_row, int steps, const int both, const char **ahead,
    const char *stop, const int lines) {
    for (int k = 0; k < steps; k++) {
        if (lines && *ahead < stop) {
#pragma GCC unroll 16
            for (int i = 0; i < lines; i++)
                _mm_prefetch(*ahead + 64 * i, _MM_HINT_T1);
            *ahead += 64 * lines;
        }
        const uint16_t *own = w.at + k * w.column;
        _tile_loadd(6, own, w.line);
        _tile_loadd(4, high + k * 512, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, high + token_row + k * 512, 64);
        _tile_dpbf16ps(1, 5, 6);
        if (both) {
            _tile_loadd(7, own + w.row, w.line);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        if (low) {
            _tile_loadd(4, low + k * 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (both)
                _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, low + token_row + k * 512, 64);
            _tile_dpbf16ps(1, 5, 6);
            if (both)
                _tile_dpbf16ps(3, 5, 7);
        }
    }
}

/* Add to the sums 0 to `rows` - 1 the products of 16 tokens with up to 64 rows. The memory that follows in each tile of rows is
   fetched, `further` numbers from where it is read (0: nothing is). */
INLINE void amx_16_tokens(
    Tiles w, const int rows, const uint16_t *high, const uint16_t *low, int steps, size_t further) {
    for (int k = 0; k < steps; k++) {
        _tile_loadd(4, high + k * 512, 64);
        if (low)
            _tile_loadd(5, low + k * 512, 64);
#define OF_ROW(i, tile) \
    if (rows > i) { \
        const uint16_t *own = w.at + i * w.row + k * w.column; \
        for (int line = 0; further && line < 16; line++) \
            _mm_prefetch((const char *)own + 2 * further + line * w.line, _MM_HINT_T0); \
        _tile_loadd(tile, own, w.line); \
        _tile_dpbf16ps(i, 4, tile); \
        if (low) \
            _tile_dpbf16ps(i, 5, tile); \
    }
        OF_ROW(0, 6) OF_ROW(1, 7) OF_ROW(2, 6) OF_ROW(3, 7)
#undef OF_ROW
    }
}

/* Compute in `out` the products of one token with up to four tiles of 16 rows, by vectors: the same bits as by tiles, since a tile's
   instruction adds the even and the odd columns of 32 one by one, then both sums, then this to what was there (Intel's manual,
   TDPBF16PS). There is so little to compute that memory is read a little faster so. `high` and `low` are float32. */
INLINE void one_token(Tiles w, int steps, const float *high, const float *low, float *out, const int tiles) {
    F sum[4];
    for (int i = 0; i < tiles; i++)
        sum[i] = f_zero();
    for (int k = 0; k < steps; k++) {
        F part[4][4];
        for (int i = 0; i < tiles; i++)
            part[i][0] = part[i][1] = part[i][2] = part[i][3] = f_zero();
#pragma GCC unroll 4
        for (int pair = 0; pair < 16; pair++)
#pragma GCC unroll 4
            for (int i = 0; i < tiles; i++) {
                const uint16_t *own = w.at + i * w.row + k * w.column + pair * (w.line / 2);
                _mm_prefetch((const char *)(own + 1024), _MM_HINT_T0);
                F even = f_first(own), odd = f_second(own);
                size_t at = k * 32 + 2 * pair;
                part[i][0] = f_fma(even, f_all(high[at]), part[i][0]);
                part[i][1] = f_fma(odd, f_all(high[at + 1]), part[i][1]);
                part[i][2] = f_fma(even, f_all(low[at]), part[i][2]);
                part[i][3] = f_fma(odd, f_all(low[at + 1]), part[i][3]);
            }
        for (int i = 0; i < tiles; i++) {
            sum[i] = f_add(sum[i], f_add(part[i][0], part[i][1]));
            sum[i] = f_add(sum[i], f_add(part[i][2], part[i][3]));
        }
    }
    for (int i = 0; i < tiles; i++)
        f_store(out + i * TILE, sum[i]);
}

/* Split 16 numbers into high and low parts, as float32. */
INLINE void split_wide(F x, float *high, float *low) {
    F near = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
    f_store(high, near);
    f_store(low, _mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(f_sub(x, near))), 16)));
}

/* Let vectors treat the smallest numbers as tiles do, as zero. Return what to restore. */
static unsigned without_denormals(void) {
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040); /* flush to zero, denormals are zero */
    return before;
}

/* Set the sums to zero, or to what is at these places, or store them there: `step` bytes from line to line. */
INLINE void amx_zero(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}
INLINE void amx_load(const float *a, const float *b, const float *c, const float *d, size_t step) {
    _tile_loadd(0, a, step);
    if (b)
        _tile_loadd(1, b, step);
    if (c)
        _tile_loadd(2, c, step);
    if (d)
        _tile_loadd(3, d, step);
}
INLINE void amx_store(float *a, float *b, float *c, float *d, size_t step) {
    _tile_stored(0, a, step);
    if (b)
        _tile_stored(1, b, step);
    if (c)
        _tile_stored(2, c, step);
    if (d)
        _tile_stored(3, d, step);
}

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

/* Multiply up to four tiles of rows with tokens in tiles, from `first` to `end`. */
static void amx_group(const Product *p, int tile, const int tiles, int first, int end) {
    const Matrix *m = p->matrix;
    int columns = m->columns, padded = (end - first + 15) / 16 * 16;
    size_t token_row = (size_t)16 * columns;
    const uint16_t *high = p->tokens->high + first / 16 * token_row;
    const uint16_t *low = p->tokens->low ? p->tokens->low + first / 16 * token_row : NULL;
    int whole = m->kind != BFLOAT16, together = padded > 16 || whole ? AMX_COLUMNS : columns;
    const char *ahead = NULL, *stop = NULL; /* the next group's weights */
    const uint16_t *weights = whole ? NULL : (const uint16_t *)m->data + tile * token_row;
    int times = padded / 32 * ((tiles + 1) / 2) * (columns / 32), lines = 0;
    if (!whole && times && tile + tiles < m->rows / TILE) {
        int next = m->rows / TILE - tile - tiles < 4 ? m->rows / TILE - tile - tiles : 4;
        ahead = (const char *)(weights + tiles * token_row);
        stop = ahead + next * token_row * 2;
        lines = (int)((stop - ahead) / 64 / times);
    }
    for (int c = 0; c < columns; c += together) {
        int some = columns - c < together ? columns - c : together, steps = some / 32, t = 0;
        Tiles w = {weights + c * TILE, token_row, 512, 64};
        if (whole) {
            for (int i = 0; i < tiles; i++)
                if (m->kind == INT4)
                    widened(m, tile + i, c, some, amx_widened + i * some * TILE, INT4);
                else
                    widened(m, tile + i, c, some, amx_widened + i * some * TILE, INT8);
            w = (Tiles){amx_widened, (size_t)some * TILE, 512, 64};
        }
        for (; padded > TWO_FROM && t + 32 <= padded; t += 32)
            for (int r = 0; r < tiles; r += 2) {
                const uint16_t *h = high + t / 16 * token_row + c * 16, *l = low ? low + t / 16 * token_row + c * 16 : NULL;
                float *upper = amx_sums[t / 16 * 4 + r], *lower = amx_sums[t / 16 * 4 + 4 + r];
                Tiles own = {w.at + r * w.row, w.row, w.column, w.line};
                if (r + 1 < tiles) {
                    if (c)
                        amx_load(upper, lower, upper + 256, lower + 256, 64);
                    else
                        amx_zero();
                    if (lines > 8)
                        amx_32_tokens(own, h, l, token_row, steps, 1, &ahead, stop, 16);
                    else if (lines)
                        amx_32_tokens(own, h, l, token_row, steps, 1, &ahead, stop, 8);
                    else
                        amx_32_tokens(own, h, l, token_row, steps, 1, &ahead, stop, 2);
                    amx_store(upper, lower, upper + 256, lower + 256, 64);
                } else {
                    if (c)
                        amx_load(upper, lower, NULL, NULL, 64);
                    else
                        amx_zero();
                    amx_32_tokens(own, h, l, token_row, steps, 0, &ahead, stop, 0);
                    amx_store(upper, lower, NULL, NULL, 64);
                }
            }
        for (; t < padded; t += 16) {
            const uint16_t *h = high + t / 16 * token_row + c * 16, *l = low ? low + t / 16 * token_row + c * 16 : NULL;
            float *a = amx_sums[t / 16 * 4], *b = tiles > 1 ? a + 256 : NULL;
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
        }
    }
    for (int t = first; t < end; t++)
        for (int r = 0; r < tiles; r++)
            f_store(
                p->out + (size_t)t * m->rows + (tile + r) * TILE,
                f_load(amx_sums[(t - first) / 16 * 4 + r] + (t - first) % 16 * 16));
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
    int tiles = p->matrix->rows / TILE, from = chunk * p->tiles_a_chunk, tokens = p->tokens->tokens;
    int to = from + p->tiles_a_chunk < tiles ? from + p->tiles_a_chunk : tiles, columns = p->matrix->columns;
    if (p->tokens->wide) {
        unsigned before = without_denormals();
        size_t step = (size_t)TILE * columns;
        Tiles own = {(const uint16_t *)p->matrix->data + from * step, step, 512, 64};
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
    for (int first = 0; first < tokens; first += AMX_TOKENS) {
        int end = first + AMX_TOKENS < tokens ? first + AMX_TOKENS : tokens;
        for (int tile = from; tile < to; tile += 4)
            switch (to - tile) {
            case 1: amx_group(p, tile, 1, first, end); break;
            case 2: amx_group(p, tile, 2, first, end); break;
            case 3: amx_group(p, tile, 3, first, end); break;
            default: amx_group(p, tile, 4, first, end);
            }
    }
    amx_end();
}

/* Return how many tiles of rows a chunk should have, whole groups of four if there are enough. */
static int amx_tiles(int tiles, int each) { return tiles < 16 ? each : (each + 3) / 4 * 4; }

#endif
