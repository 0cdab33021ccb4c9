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

/* Where up to four tiles of weights or values lie: the second one is `row` numbers further, the third `pair` numbers and the fourth
   both; the next 32 columns are `column` numbers further. The 16 lines of a tile are `line` bytes apart. */
typedef struct {
    const uint16_t *at;
    size_t row, pair, column, line;
} Tiles;

/* What is fetched into the second cache meanwhile: the lines `from` to `to` - 1 of each two tiles, `further` numbers from where they
   are read. */
typedef struct {
    size_t further;
    int from, to;
} Ahead;

/* Return the number in the matrix of one of four tiles that are multiplied together: those of a gate alternate with what it lets
   through. */
INLINE int amx_tile(const Product *p, int tile, int i) {
    return p->finish == GATE ? tile + i / 2 + i % 2 * (p->matrix->rows / TILE / 2) : tile + i;
}

/* Sums of up to 32 tokens and one or two tiles of rows that are ready, and what is to be done with them. It is done line by line
   while the tiles compute the next sums. */
typedef struct {
    const float *sums; /* of 16 tokens and two tiles; those of the next 16 tokens are 1024 numbers further */
    size_t to;         /* where the first token's numbers go to */
    int line, lines, tiles;
} Due;

/* Return what is to be done with the sums of the tiles from the i-th on, and of the tokens from t on. */
INLINE Due amx_due(const Product *p, int tile, int i, int tiles, const float *sums, int t, int end) {
    int lines = end - t;
    if (p->finish != GATE)
        return (Due){sums, (size_t)t * p->matrix->rows + (tile + i) * TILE, 0, lines < 32 ? lines : 32, tiles - i};
    if (end > 16)
        lines = 32; /* the lines behind the last token are zero */
    size_t column = (size_t)(tile + i / 2) * TILE;
    return (Due){sums, (size_t)t * p->next.columns + column / 32 * 512 + column % 32, 0, lines, 2};
}

/* Do what is due with some more lines. */
INLINE void amx_finish(const Product *p, Due *due, int lines) {
    int stop = due->line + lines < due->lines ? due->line + lines : due->lines;
    for (int n = due->line; n < stop; n++) {
        const float *sums = due->sums + n / 16 * 1024 + n % 16 * 16;
        F first = f_load(sums);
        if (p->finish == GATE) {
            size_t to = due->to + (size_t)(n / 16) * 16 * p->next.columns + n % 16 * 32;
            F x = f_mul(let_through(first, p->activation), f_load(sums + 256));
            f_to_bfloat16(p->next.high + to, x);
            if (p->next.low)
                f_to_bfloat16(p->next.low + to, f_sub(x, f_from_bfloat16(p->next.high + to)));
            continue;
        }
        float *out = p->out + due->to + (size_t)n * p->matrix->rows;
        f_store(out, p->finish == ADD ? f_add(f_load(out), first) : first);
        if (due->tiles > 1) {
            F second = f_load(sums + 256);
            f_store(out + TILE, p->finish == ADD ? f_add(f_load(out + TILE), second) : second);
        }
    }
    due->line = stop;
}

/* Add to the sums 0 to 3 the products of 32 tokens with 32 rows (or, not `both`, with 16), `steps` times 32 columns. Meanwhile, do
   what is `due` with the product's earlier sums (NULL: nothing). */
INLINE void amx_32_tokens(
    Tiles w, const uint16_t *high, const uint16_t *low, size_t token_row, int steps, const int both, Ahead ahead, const Product *p,
    Due *due) {
    int lines = (32 + steps - 1) / steps;
    for (int k = 0; k < steps; k++) {
        if (p)
            amx_finish(p, due, lines);
        for (int i = ahead.from; i < ahead.to; i++)
            _mm_prefetch(
                (const char *)(w.at + k * w.column + ahead.further + i / 16 * w.row) + i % 16 * w.line, _MM_HINT_T1);
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
        const uint16_t *own = w.at + i % 2 * w.row + i / 2 * w.pair + k * w.column; \
        for (int line = 0; further && line < 16; line++) \
            _mm_prefetch((const char *)own + 2 * further + line * w.line, _MM_HINT_T1); \
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

/* Return 2^x with a relative error under 8e-5: numbers in bfloat16 are 50 times as rough. */
INLINE F amx_exp2(F x) {
    F r = _mm512_reduce_ps(x, 9); /* what is above the next whole number below */
    F y = f_fma(f_all(7.802431e-2f), r, f_all(2.2606778e-1f));
    y = f_fma(y, r, f_all(6.9583313e-1f));
    return _mm512_scalef_ps(f_fma(y, r, f_all(9.9992528e-1f)), x);
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

#endif
