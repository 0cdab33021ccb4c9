/* Multiply a packed matrix with tokens: round the tokens as the matrix needs them, and share the tiles among threads.

   Included by the file of each instruction set: see product.h. */

#define TOGETHER 96 /* tokens that a product takes at a time: they stay in a near cache while the weights are read */
#define COLUMNS 256 /* columns at a time, if there are more tokens than are summed at once */

#ifdef PAIRS
static int summed_at_once(const Tokens *tokens) { return tokens->narrow ? PAIRS : TOKENS; }
#else
static int pairs(void) { return 0; }
static int summed_at_once(const Tokens *tokens) { return TOKENS; }
#endif

/* Multiply a tile with the tokens from `first` to `end`. If there are more tokens than are summed at once, take COLUMNS
   columns at a time: those of the tokens and of the weights then stay in the nearest cache. */
static void tile_bfloat16(const Product *p, int tile, int first, int end) {
    const Matrix *m = p->matrix;
    size_t columns = m->columns, together = end - first > summed_at_once(p->tokens) ? COLUMNS : columns;
    for (size_t column = 0; column < columns; column += together)
        for (int t = first, count; t < end; t += count) {
            const uint16_t *own = (const uint16_t *)m->data + (tile * columns + column) * TILE;
            int some = (int)(columns - column < together ? columns - column : together);
            float *out = p->out + (size_t)t * m->rows + tile * TILE;
#ifdef PAIRS
            if (p->tokens->narrow) {
                count = next_of(end - t, PAIRS);
                pairs_any(own, some, p->tokens->narrow + t * columns + column, columns, out, m->rows, column > 0, count);
                continue;
            }
#endif
            count = next(end - t);
            tile_any(own, some, p->tokens->wide + t * columns + column, columns, out, m->rows, column > 0, count);
        }
}

INLINE void tile_rounded(const Product *p, int tile, int first, int end, const int kind) {
    for (int t = first, count; t < end; t += count) {
        count = next(end - t);
        BY_COUNT(count, tile_whole(p, tile, t, N, kind))
    }
}

static void tile_int8(const Product *p, int tile, int first, int end) { tile_rounded(p, tile, first, end, INT8); }
static void tile_int4(const Product *p, int tile, int first, int end) { tile_rounded(p, tile, first, end, INT4); }

static void product_chunk(void *context, int chunk) {
    const Product *p = context;
    int tiles = p->matrix->rows / TILE, from = chunk * p->tiles_a_chunk, tokens = p->tokens->tokens;
    int to = from + p->tiles_a_chunk < tiles ? from + p->tiles_a_chunk : tiles;
    void (*one)(const Product *, int, int, int) =
        p->matrix->kind == BFLOAT16 ? tile_bfloat16 : p->matrix->kind == INT8 ? tile_int8 : tile_int4;
    for (int near = 0; near < tokens; near += TOGETHER) {
        int end = near + TOGETHER < tokens ? near + TOGETHER : tokens;
        for (int tile = from; tile < to; tile++)
            one(p, tile, near, end);
    }
}

static void multiply(const Matrix *matrix, const Tokens *tokens, float *out) {
    int tiles = matrix->rows / TILE, chunks = pool.helpers ? 4 * (pool.helpers + 1) : 1;
    int each = (tiles + chunks - 1) / chunks;
    Product product = {matrix, tokens, out, each};
    share(product_chunk, &product, (tiles + each - 1) / each);
}

typedef struct {
    const float *from;
    int columns;
    float *scales, *sums;
    int8_t *whole;
} Rounding;

static void rounded(const void *context, int token) {
    const Rounding *r = context;
    size_t blocks = r->columns / BLOCK;
    for (size_t block = token * blocks; block < (token + 1) * blocks; block++) {
        F a = f_load(r->from + block * BLOCK), b = f_load(r->from + block * BLOCK + 16);
        float most = f_most(f_max(f_abs(a), f_abs(b)));
        F back = f_all(most > 0 ? 127.0f / most : 0.0f);
        int32_t sum = f_to_int8(r->whole + block * BLOCK, f_mul(a, back)) +
                      f_to_int8(r->whole + block * BLOCK + 16, f_mul(b, back));
        r->scales[block] = most / 127.0f;
        r->sums[block] = r->scales[block] * (float)sum;
    }
}

typedef struct {
    const float *from;
    int columns;
    uint16_t *narrow;
} Narrowing;

static void narrowed(const void *context, int token) {
    const Narrowing *n = context;
    for (size_t i = (size_t)token * n->columns; i < (size_t)(token + 1) * n->columns; i += 16)
        f_to_bfloat16(n->narrow + i, f_load(n->from + i));
}

/* Return float32 [tokens, columns] as a matrix of this kind needs it. `room` holds at least tokens x (3 x columns) bytes. */
static Tokens prepared(int kind, const float *from, int tokens, int columns, uint8_t *room) {
    if (kind == BFLOAT16 && !pairs())
        return (Tokens){.tokens = tokens, .wide = from};
    if (kind == BFLOAT16) {
        Narrowing narrowing = {from, columns, (uint16_t *)room};
        each(tokens, narrowed, &narrowing);
        return (Tokens){.tokens = tokens, .narrow = narrowing.narrow};
    }
    size_t blocks = (size_t)tokens * (columns / BLOCK);
    float *scales = (float *)room, *sums = scales + blocks;
    Rounding rounding = {from, columns, scales, sums, (int8_t *)(sums + blocks)};
    each(tokens, rounded, &rounding);
    return (Tokens){tokens, NULL, NULL, rounding.whole, scales, sums};
}

/* Compute out [tokens, rows] = tokens [tokens, columns] times the matrix, all float32. `room`: see `prepared`. */
void ranvier_multiply(const Matrix *matrix, const float *from, int tokens, float *out, uint8_t *room) {
    begin();
    Tokens ready = prepared(matrix->kind, from, tokens, matrix->columns, room);
    multiply(matrix, &ready, out);
    end();
}

