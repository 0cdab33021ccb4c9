/* Define packed matrices, and their products with tokens in float32.

   A tile holds 16 rows of a matrix, so that one vector holds the same columns of 16 rows. The sums of 16 rows grow side by
   side and are never added up across a vector. For each group of columns, a tile holds, in this order:

       bfloat16   for each pair of columns: 16 rows x 2 numbers
       int8       for each 32 columns: 8 vectors of 16 rows x 4 numbers (the number plus 128)
       int4       for each 32 columns: 4 vectors of 16 rows x 8 numbers (columns 0-3 in the low halves of the bytes, 4-7 in
                  the high halves)

   The scales, and the least values of int4, are float16 in separate tiles: 16 for each 32 columns. Quantised weights
   are multiplied with tokens that are rounded to int8 in blocks of 32, as llama.cpp does. Keys are cached as tiles of
   bfloat16, too: 16 positions are the rows, so that the scores of a query are a product like any other. No file here uses
   Python's API. The functions are called through ctypes, which releases the interpreter's lock during the call.

   Each instruction set has one file, product_<set>.c. Its first line gives the compiler flags. It defines TOKENS and
   FOUR_TILES before it includes this header. It also defines the rest of this list:

       TOKENS        how many tokens' sums of one tile are held in registers at once
       FOUR_TILES    up to how many tokens are multiplied with four tiles together; twice as many take two tiles
       tile_whole    the product of one tile of whole numbers with up to TOKENS tokens
       WHOLE_AT_ONCE(kind)
                     optional: how many tokens `tile_whole` takes, if fewer than TOKENS
       WIDEN, widen  optional: weights in int8 are multiplied with tokens of 16 bits, which `widen` makes of 32 columns
       COLUMNS       optional: how many columns of bfloat16 are multiplied at a time, if there are more than TOKENS tokens
       PAIRS, pairs, pairs_any
                     optional: products with up to PAIRS tokens that are rounded to bfloat16, used if `pairs()` is true
       AMX           optional: products of bfloat16, and attention, by the tiles of the processor (amx.h, amx_product.h)
       ranvier_supported
                     a number greater than 0 if this processor has the instructions: the greatest one is used

   Then it includes multiply.c, pack.c, attend.c, step.c and finite.c, which use these definitions. setup.py makes an extension of each such
   file, and native.py finds them. An instruction set with other vectors also needs its own vectors_<set>.h. */

#ifndef RANVIER_PRODUCT_H
#define RANVIER_PRODUCT_H

#include <string.h>

#include "activation.h"
#include "pool.h"
#include "vectors.h"

#define TILE 16
#define BLOCK 32

/* Run `call` with N = count. It is compiled for each count from 1 to TOKENS, so that all sums stay in registers. */
#define ONE_COUNT(count, call) \
    case count: { \
        enum { N = count }; \
        call; \
        break; \
    }
#if TOKENS == 8
#define WIDE_COUNTS(call) ONE_COUNT(6, call) ONE_COUNT(7, call) ONE_COUNT(8, call)
#elif TOKENS == 6
#define WIDE_COUNTS(call) ONE_COUNT(6, call)
#else
#error "give WIDE_COUNTS for this number of TOKENS"
#endif
#define BY_COUNT(count, call) \
    switch (count) { \
        ONE_COUNT(1, call) \
        ONE_COUNT(2, call) \
        ONE_COUNT(3, call) \
        ONE_COUNT(4, call) \
        ONE_COUNT(5, call) \
        WIDE_COUNTS(call) \
    }

enum { BFLOAT16 = 0, INT8 = 1, INT4 = 2 };

/* A packed matrix. `data` holds the numbers, `scales` the scales [rows / 16][columns / 32][16] in float16, and `least` the
   least values of int4 in the same shape. */
typedef struct {
    int32_t kind, rows, columns;
    int32_t fast; /* products may depend on the number of tokens, if that is faster */
    const void *data;
    const uint16_t *scales, *least;
} Matrix;

/* Multiply `count` rows of x with `tiles` tiles of 16 rows of bfloat16 each; add to what `out` holds if `more`. Each sum grows
   column by column, whatever the number of tokens and tiles beside it: a token's bits do not depend on them. Products in float32
   round nothing. They are twice as fast as the processor's own products of bfloat16 where those start every other cycle. */
INLINE void tile_rows(
    const uint16_t *tile, size_t tile_step, int columns, const float *x, size_t x_step, float *out, size_t out_step, int more,
    const int count, const int tiles) {
    F sum[TOKENS][4];
    for (int t = 0; t < count; t++)
        for (int i = 0; i < tiles; i++)
            sum[t][i] = more ? f_load(out + t * out_step + i * TILE) : f_zero();
    for (int column = 0; column < columns; column += 2)
#pragma GCC unroll 4
        for (int i = 0; i < tiles; i++) {
            const uint16_t *own = tile + i * tile_step + (size_t)column * TILE;
            _mm_prefetch((const char *)(own + 1024), _MM_HINT_T0);
            F w = f_first(own);
#pragma GCC unroll 8
            for (int t = 0; t < count; t++) {
                sum[t][i] = f_fma(w, f_all(x[t * x_step + column]), sum[t][i]);
                F_KEEP(sum[t][i]);
            }
            w = f_second(own);
#pragma GCC unroll 8
            for (int t = 0; t < count; t++) {
                sum[t][i] = f_fma(w, f_all(x[t * x_step + column + 1]), sum[t][i]);
                F_KEEP(sum[t][i]);
            }
        }
    for (int t = 0; t < count; t++)
        for (int i = 0; i < tiles; i++)
            f_store(out + t * out_step + i * TILE, sum[t][i]);
}

/* Multiply `count` rows of x, at most TOKENS, with some tiles. The next row of `out` is `out_step` numbers further, the sums of the
   next tile 16 numbers. Few tokens take several tiles together, so that no addition waits for the previous one. */
static void tile_any(
    const uint16_t *tile, size_t tile_step, int tiles, int columns, const float *x, size_t x_step, float *out, size_t out_step,
    int more, int count) {
    int together = count <= FOUR_TILES ? 4 : count <= 2 * FOUR_TILES ? 2 : 1;
#define ROWS(n, of) tile_rows(tile, tile_step, columns, x, x_step, out, out_step, more, n, of)
    for (; tiles >= together; tiles -= together, tile += together * tile_step, out += together * TILE)
        switch (together > 1 ? count : 0) {
        case 1: ROWS(1, 4); break;
        case 2: ROWS(2, 2 * FOUR_TILES > 2 ? 4 : 2); break;
        case 3: ROWS(3, 2); break;
        case 4: ROWS(4, 2); break;
        default: BY_COUNT(count, ROWS(N, 1))
        }
    for (; tiles; tiles--, tile += tile_step, out += TILE)
        BY_COUNT(count, ROWS(N, 1))
#undef ROWS
}

/* Tokens as the products need them. */
typedef struct {
    int tokens;
    const float *wide;      /* [tokens, columns], for weights in bfloat16 (with AMX, of one token, the high parts); */
    const float *wide_low;  /* with AMX, their low parts; or, if the set has products of `pairs`, */
    const uint16_t *narrow; /* the same, rounded to bfloat16 */
    const uint16_t *high;   /* or, with AMX, their high and low parts in tiles (amx.h); */
    const uint16_t *low;    /* NULL: the tokens are only rounded */
    const int8_t *whole;    /* [tokens, columns], for weights in int8 or int4; */
    const int16_t *wider;   /* the same numbers in 16 bits, for weights in int8, if the set has `widen` */
    int in_tiles;           /* `whole`, `scales` and `sums` lie in tiles of 16 tokens (`Rounding` of multiply.c) */
    const float *scales;    /* [tokens, columns / 32] */
    const float *sums;      /* [tokens, columns / 32]: the sum of the whole numbers, times their scale */
} Tokens;

/* What is done with the sums of a product: they are stored, added to what `out` holds, or, of a matrix [gate, up], become the next
   product's tokens: the activation of the gate times what is beside it. */
enum { STORE, ADD, GATE };

typedef struct {
    const Matrix *matrix;
    const Tokens *tokens;
    float *out; /* [tokens, rows] */
    int finish, activation;
    struct {
        uint16_t *high, *low;
        int columns;
    } next; /* of GATE, only with AMX: the next product's tokens */
    int tiles_a_chunk;
} Product;

/* Return how many tiles of rows are divided into chunks: those of a gate take the others with them. */
INLINE int tiles_of(const Product *p) { return p->matrix->rows / TILE / (p->finish == GATE ? 2 : 1); }

/* Return how many of the tokens that are left are multiplied next: at most `most`, and never one alone at the end. */
static int next_of(int left, int most) {
    int times = (left + most - 1) / most;
    return (left + times - 1) / times;
}

static int next(int left) { return next_of(left, TOKENS); }


#endif
