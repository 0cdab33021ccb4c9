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

   Each instruction set has one file, product_<set>.c. Its first line gives the compiler flags. It defines TOKENS and SPLIT
   before it includes this header. It also defines the rest of this list:

       TOKENS        how many tokens' sums are held in registers at once: one or two vectors for each
       SPLIT         up to how many tokens have two vectors, so that an addition need not wait for the previous one
       tile_whole    the product of one tile of whole numbers with up to TOKENS tokens
       PAIRS, pairs, pairs_any
                     optional: products with up to PAIRS tokens that are rounded to bfloat16, used if `pairs()` is true
       ranvier_supported
                     a number greater than 0 if this processor has the instructions: the greatest one is used

   Then it includes multiply.c, pack.c, step.c and finite.c, which use these definitions. setup.py makes an extension of each such
   file, and native.py finds them. An instruction set with other vectors also needs its own vectors_<set>.h. */

#ifndef RANVIER_PRODUCT_H
#define RANVIER_PRODUCT_H

#include <string.h>

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
#else
#define WIDE_COUNTS(call)
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
    const void *data;
    const uint16_t *scales, *least;
} Matrix;

/* Multiply `count` rows of x with a tile of 16 rows of bfloat16; add to what `out` holds if `more`. Products in float32 round
   nothing. They are twice as fast as the processor's own products of bfloat16 where those start every other cycle. */
INLINE void tile_rows(
    const uint16_t *tile, int columns, const float *x, size_t x_step, float *out, size_t out_step, int more, const int count) {
    const int split = count <= SPLIT;
    F even[TOKENS], odd[TOKENS];
    for (int t = 0; t < count; t++) {
        even[t] = more ? f_load(out + t * out_step) : f_zero();
        odd[t] = f_zero();
    }
    for (int column = 0; column < columns; column += 2) {
        _mm_prefetch((const char *)(tile + (size_t)column * TILE + 1024), _MM_HINT_T0);
        F weights = f_first(tile + (size_t)column * TILE);
#pragma GCC unroll 8
        for (int t = 0; t < count; t++)
            even[t] = f_fma(weights, f_all(x[t * x_step + column]), even[t]);
        weights = f_second(tile + (size_t)column * TILE);
#pragma GCC unroll 8
        for (int t = 0; t < count; t++)
            if (split)
                odd[t] = f_fma(weights, f_all(x[t * x_step + column + 1]), odd[t]);
            else
                even[t] = f_fma(weights, f_all(x[t * x_step + column + 1]), even[t]);
    }
    for (int t = 0; t < count; t++)
        f_store(out + t * out_step, split ? f_add(even[t], odd[t]) : even[t]);
}

/* Multiply one row of x with a tile: four sums grow side by side, and memory is prefetched. */
INLINE void tile_row(const uint16_t *tile, int columns, const float *x, float *out, int more) {
    F sum[4];
    for (int i = 0; i < 4; i++)
        sum[i] = f_zero();
    for (int column = 0; column < columns; column += 4) {
#pragma GCC unroll 2
        for (int i = 0; i < 4; i += 2) {
            const uint16_t *own = tile + (size_t)(column + i) * TILE;
            _mm_prefetch((const char *)(own + 1024), _MM_HINT_T0);
            sum[i] = f_fma(f_first(own), f_all(x[column + i]), sum[i]);
            sum[i + 1] = f_fma(f_second(own), f_all(x[column + i + 1]), sum[i + 1]);
        }
    }
    F all = f_add(f_add(sum[0], sum[1]), f_add(sum[2], sum[3]));
    f_store(out, more ? f_add(f_load(out), all) : all);
}

/* Multiply `count` rows of x, at most TOKENS, with a tile. */
static void tile_any(
    const uint16_t *tile, int columns, const float *x, size_t x_step, float *out, size_t out_step, int more, int count) {
    if (count == 1)
        tile_row(tile, columns, x, out, more);
    else
        BY_COUNT(count, tile_rows(tile, columns, x, x_step, out, out_step, more, N))
}


/* Tokens as the products need them. */
typedef struct {
    int tokens;
    const float *wide;      /* [tokens, columns], for weights in bfloat16; or, if the set has products of `pairs`, */
    const uint16_t *narrow; /* the same, rounded to bfloat16 */
    const int8_t *whole;    /* [tokens, columns], for weights in int8 or int4 */
    const float *scales;    /* [tokens, columns / 32] */
    const float *sums;      /* [tokens, columns / 32]: the sum of the whole numbers, times their scale */
} Tokens;

typedef struct {
    const Matrix *matrix;
    const Tokens *tokens;
    float *out; /* [tokens, rows] */
    int tiles_a_chunk;
} Product;
/* Return how many of the tokens that are left are multiplied next: at most `most`, and never one alone at the end. */
static int next_of(int left, int most) {
    int times = (left + most - 1) / most;
    return (left + times - 1) / times;
}

static int next(int left) { return next_of(left, TOKENS); }


#endif
