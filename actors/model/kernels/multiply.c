/* Multiply a packed matrix with tokens: round the tokens as the matrix needs them, and share the tiles among threads.

   Included by the file of each instruction set: see product.h. */

#define TOGETHER 96 /* tokens that a product takes at a time: they stay in a near cache while the weights are read */
#ifndef COLUMNS
#define COLUMNS 256
#endif
#ifndef WHOLE_AT_ONCE
#define WHOLE_AT_ONCE(kind) TOKENS
#endif

#ifdef PAIRS
static int summed_at_once(const Tokens *tokens) { return tokens->narrow ? PAIRS : TOKENS; }
#else
INLINE int pairs(void) { return 0; }
static int summed_at_once(const Tokens *tokens) { return TOKENS; }
#endif

/* Return how many columns are multiplied at a time: equal parts of at most COLUMNS, in whole blocks. */
static size_t columns_at_once(size_t columns) {
    size_t blocks = (columns + BLOCK - 1) / BLOCK, parts = (columns + COLUMNS - 1) / COLUMNS;
    return (blocks + parts - 1) / parts * BLOCK;
}

/* Multiply some tiles with the tokens from `first` to `end`. If there are more tokens than are summed at once, take some of the
   columns at a time: those of the tokens and of the weights then stay in a near cache. */
static void tiles_bfloat16(const Product *p, int tile, int tiles, int first, int end) {
    const Matrix *m = p->matrix;
    size_t columns = m->columns, together = end - first > summed_at_once(p->tokens) ? columns_at_once(columns) : columns;
    for (size_t column = 0; column < columns; column += together)
        for (int t = first, count; t < end; t += count) {
            const uint16_t *own = (const uint16_t *)m->data + (tile * columns + column) * TILE;
            int some = (int)(columns - column < together ? columns - column : together);
            float *out = p->out + (size_t)t * m->rows + tile * TILE;
#ifdef PAIRS
            if (p->tokens->narrow) {
                count = next_of(end - t, PAIRS);
                pairs_any(
                    own, columns * TILE, tiles, some, p->tokens->narrow + t * columns + column, columns, out, m->rows, column > 0,
                    count);
                continue;
            }
#endif
            count = next(end - t);
            tile_any(
                own, columns * TILE, tiles, some, p->tokens->wide + t * columns + column, columns, out, m->rows, column > 0,
                count);
        }
}

INLINE void tile_rounded(const Product *p, int tile, int first, int end, const int kind) {
    for (int t = first, count; t < end; t += count) {
        count = next_of(end - t, WHOLE_AT_ONCE(kind));
        BY_COUNT(count, tile_whole(p, tile, t, N, kind))
    }
}

static void product_chunk(void *context, int chunk) {
    const Product *p = context;
    int kind = p->matrix->kind, tiles = p->matrix->rows / TILE, from = chunk * p->tiles_a_chunk, tokens = p->tokens->tokens;
    int to = from + p->tiles_a_chunk < tiles ? from + p->tiles_a_chunk : tiles;
    int together = kind == BFLOAT16 && tokens <= 8 ? 4 : 1; /* of few tokens, several tiles are multiplied at once */
    for (int near = 0; near < tokens; near += TOGETHER) {
        int end = near + TOGETHER < tokens ? near + TOGETHER : tokens;
        for (int tile = from; tile < to; tile += together)
            if (kind == BFLOAT16)
                tiles_bfloat16(p, tile, to - tile < together ? to - tile : together, near, end);
            else if (kind == INT8)
                tile_rounded(p, tile, near, end, INT8);
            else
                tile_rounded(p, tile, near, end, INT4);
    }
}

static void multiply(Product product) {
    int tiles = tiles_of(&product), chunks = pool.helpers ? 4 * (pool.helpers + 1) : 1;
    int each = product.tiles_a_chunk = (tiles + chunks - 1) / chunks;
#ifdef AMX
    const Tokens *tokens = product.tokens;
    if (tokens->wide || tokens->high || tokens->in_tiles) {
        if (!tokens->in_tiles)
            each = product.tiles_a_chunk = amx_tiles(tiles, each);
        share(amx_chunk, &product, (tiles + each - 1) / each);
        return;
    }
#endif
    share(product_chunk, &product, (tiles + each - 1) / each);
}

typedef struct {
    const float *from;
    int columns, tokens;
    float *scales, *sums;
    int8_t *whole;
    int16_t *wider; /* NULL: not needed */
    int in_tiles; /* of 16 tokens: [tokens / 16, columns / 32, 16, 32], scales and sums [tokens / 16, columns / 32, 16] */
} Rounding;

static void rounded(const void *context, int token) {
    const Rounding *r = context;
    size_t blocks = r->columns / BLOCK;
    for (size_t block = 0; block < blocks; block++) {
        size_t at = token * blocks + block;
        if (r->in_tiles)
            at = (size_t)(token / TILE) * TILE * blocks + block * TILE + token % TILE;
        if (token >= r->tokens) { /* a tile has no end before its 16th token */
            r->scales[at] = r->sums[at] = 0.0f;
            memset(r->whole + at * BLOCK, 0, BLOCK);
            continue;
        }
        const float *from = r->from + token * (size_t)r->columns + block * BLOCK;
        F a = f_load(from), b = f_load(from + 16);
        float most = f_most(f_max(f_abs(a), f_abs(b)));
        F back = f_all(most > 0 ? 127.0f / most : 0.0f);
        int32_t sum = f_to_int8(r->whole + at * BLOCK, f_mul(a, back)) + f_to_int8(r->whole + at * BLOCK + 16, f_mul(b, back));
#ifdef WIDEN
        if (r->wider)
            widen(r->whole + at * BLOCK, r->wider + at * BLOCK);
#endif
        r->scales[at] = most / 127.0f;
        r->sums[at] = r->scales[at] * (float)sum;
    }
}

typedef struct {
    const float *from;
    int columns, tokens;
    uint16_t *narrow, *low;
} Narrowing;

#ifdef AMX
/* Return whether tokens are multiplied with this matrix as high and low parts, or as high parts. */
static int in_parts(const Matrix *m, int tokens) { return m->kind == BFLOAT16 || (m->fast && tokens >= WIDEN_FROM); }

/* Return whether the low parts count, too. */
static int with_low(const Matrix *m, int tokens) { return !m->fast || tokens < FAST_FROM; }

/* Write the only token's high and low parts as float32. */
static void widened_parts(const void *context, int token) {
    const Narrowing *n = context;
    size_t all = (size_t)n->tokens * n->columns;
    float *high = (float *)n->narrow;
    for (size_t i = (size_t)token * n->columns; i < (size_t)(token + 1) * n->columns; i += 16)
        split_wide(f_load(n->from + i), high + i, high + all + i);
}

/* Write a token's high and low parts into tiles (amx.h). */
static void narrowed(const void *context, int token) {
    const Narrowing *n = context;
    size_t steps = n->columns / 32, to = (size_t)(token / 16) * steps * 512 + (size_t)(token % 16) * 32;
    const float *from = n->from + (size_t)token * n->columns;
    for (size_t step = 0; step < steps; step++, to += 512, from += 32)
        if (token >= n->tokens)
            split(f_zero(), f_zero(), n->narrow + to, n->low ? n->low + to : NULL);
        else
            split(f_load(from), f_load(from + 16), n->narrow + to, n->low ? n->low + to : NULL);
}
#else
static void narrowed(const void *context, int token) {
    const Narrowing *n = context;
    for (size_t i = (size_t)token * n->columns; i < (size_t)(token + 1) * n->columns; i += 16)
        f_to_bfloat16(n->narrow + i, f_load(n->from + i));
}
#endif

/* Return how many bytes `prepared` needs. */
static size_t prepared_bytes(int tokens, int columns) { return (size_t)(tokens + 15) * columns * 4 + 64; }

/* Return float32 [tokens, columns] as a matrix needs it. `room` has `prepared_bytes`, from a multiple of 64 on. */
static Tokens prepared(const Matrix *matrix, const float *from, int tokens, uint8_t *room) {
    int columns = matrix->columns, in_tiles = 0, padded = (tokens + 15) / 16 * 16;
#ifdef AMX
    if (in_parts(matrix, tokens)) {
        Narrowing narrowing = {from, columns, tokens, (uint16_t *)room, NULL};
        if (tokens == 1) {
            each(tokens, widened_parts, &narrowing);
            return (Tokens){.tokens = tokens, .wide = (float *)room, .wide_low = (float *)room + (size_t)tokens * columns};
        }
        if (with_low(matrix, tokens))
            narrowing.low = narrowing.narrow + (size_t)padded * columns;
        each(padded, narrowed, &narrowing);
        return (Tokens){.tokens = tokens, .high = narrowing.narrow, .low = narrowing.low};
    }
    in_tiles = tokens >= WHOLE_FROM;
#else
    if (matrix->kind == BFLOAT16 && !pairs())
        return (Tokens){.tokens = tokens, .wide = from};
    if (matrix->kind == BFLOAT16) {
        Narrowing narrowing = {from, columns, tokens, (uint16_t *)room, NULL};
        each(tokens, narrowed, &narrowing);
        return (Tokens){.tokens = tokens, .narrow = narrowing.narrow};
    }
#endif
    int count = in_tiles ? padded : tokens;
    size_t blocks = (size_t)count * (columns / BLOCK);
    float *scales = (float *)room, *sums = scales + blocks;
    int8_t *whole = (int8_t *)(sums + blocks);
    int16_t *wider = NULL;
#ifdef WIDEN
    if (matrix->kind == INT8)
        wider = (int16_t *)(whole + (size_t)count * columns);
#endif
    Rounding rounding = {from, columns, tokens, scales, sums, whole, wider, in_tiles};
    each(count, rounded, &rounding);
    return (Tokens){.tokens = tokens, .whole = whole, .wider = wider, .in_tiles = in_tiles, .scales = scales, .sums = sums};
}

static void product(const Matrix *matrix, const float *from, int tokens, float *out, uint8_t *room) {
    Tokens ready = prepared(matrix, from, tokens, room);
    multiply((Product){matrix, &ready, out, STORE});
}

/* Return how many bytes of `room` a product of so many tokens and columns needs. */
int64_t ranvier_product_room(int tokens, int columns) { return (int64_t)prepared_bytes(tokens, columns); }

/* Compute out [tokens, rows] = tokens [tokens, columns] times the matrix, all float32. `room`: see `ranvier_product_room`. */
void ranvier_multiply(const Matrix *matrix, const float *from, int tokens, float *out, uint8_t *room) {
    if (!tokens) /* as for an expert that no token goes to */
        return;
    begin();
    product(matrix, from, tokens, out, room);
    end();
}
