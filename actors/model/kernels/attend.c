/* Attend: the queries of one key-value head go through the cache together, in blocks of PART positions.

   Included by the file of each instruction set: see product.h.

   Each block gives each query its largest score, the sum of 2^(score - largest), and the values times these shares. The blocks of
   a query are merged in their order, as in FlashAttention (Dao, arXiv 2307.08691). Blocks begin at multiples of PART, so a query's
   bits depend neither on how its prompt was cut nor on what is computed beside it; and the blocks of a long cache can be
   computed by several threads (as in Flash-Decoding). */

#define QUERIES 32 /* queries of one key-value head that go through the cache together */
#define PART 256   /* positions of a block */
#define MOST_WIDTH 512
#define FEW_QUERIES 5

/* The next tokens of one session, the first at `position`, and its cache in bfloat16: blocks of PART positions, each with, for each
   layer and key-value head, the keys in tiles of 16 positions [PART / 16, width / 2, 16, 2] and then the values in pairs of
   positions [PART / 2, width, 2]. */
typedef struct {
    uint16_t *cache;
    int64_t position;
    int32_t tokens;
} Row;

/* Tokens of one row that attend together. The first of them is `first` in the row and `at` in the step. */
typedef struct {
    const Row *row;
    int32_t first, at, tokens;
} Span;

/* What attention computes in one layer. */
typedef struct {
    const Span *spans;
    int span_count, heads, kv_heads, width, window;
    int layer, layers; /* the layer, and how many there are, in the caches */
    int fast;          /* with AMX: of more than 16 queries, only the high parts of queries and shares count */
    int parts;        /* chunks that share the blocks of one span and head */
    size_t own;       /* with parts: numbers of `partial` for one span and head */
    float scale;
    const float *qkv; /* [tokens, heads + 2 x kv heads, width], the queries rotated */
    float *attended;  /* [tokens, heads, width] */
    float *partial;   /* with parts: for each span and head and block: [queries, 2 + width] */
    uint8_t *work;    /* a workspace of `work_bytes` for each thread */
    _Atomic int *taken; /* which of these workspaces are in use */
} Attention;

/* A workspace. `query` and `share` hold float32, or with AMX tiles of high and low parts in the same bytes. */
typedef struct {
    float *query;  /* [QUERIES, width] */
    float *score;  /* [QUERIES, PART] */
    float *share;  /* [QUERIES, PART]; without AMX the same as `score` */
    float *made;   /* [QUERIES, width]: of one block */
    float *merged; /* [QUERIES, width] */
    int fast;
} Desk;

/* Return the keys of one block, layer and head. The values follow them, after PART x width numbers. */
INLINE uint16_t *keys_of(const Row *row, int64_t block, int layers, int layer, int kv_heads, int head, int width) {
    return row->cache + ((block * layers + layer) * kv_heads + head) * 2 * PART * width;
}

static size_t work_bytes(int width) { return (size_t)QUERIES * (3 * width + 2 * PART) * 4 + 64; }

static Desk workspace(uint8_t *at, int width) {
    Desk d;
    d.query = (float *)at;
    d.score = d.query + (size_t)QUERIES * width;
    d.share = d.score + (size_t)QUERIES * PART;
    d.made = d.share + (size_t)QUERIES * PART;
    d.merged = d.made + (size_t)QUERIES * width;
#ifndef AMX
    d.share = d.score;
#endif
    return d;
}

#ifdef AMX
/* Return a place in tiles [rows / 16, columns / 32, 16, 32] of high parts, which low parts follow. */
INLINE size_t in_tiles(int row, int column, int columns) {
    return ((size_t)(row / 16) * (columns / 32) + column / 32) * 512 + (size_t)(row % 16) * 32;
}

static void put_query(Desk d, int q, const float *from, F scale, int width) {
    uint16_t *high = (uint16_t *)d.query, *low = high + (size_t)QUERIES * width;
    for (int i = 0; i < width; i += 32) {
        size_t to = in_tiles(q, i, width);
        split(f_mul(scale, f_load(from + i)), f_mul(scale, f_load(from + i + 16)), high + to, d.fast ? NULL : low + to);
    }
}

/* Write the shares of 32 positions, from p on. */
INLINE void put_shares(Desk d, int q, int p, F a, F b) {
    uint16_t *high = (uint16_t *)d.share, *low = high + (size_t)QUERIES * PART;
    split(a, b, high + in_tiles(q, p, PART), d.fast ? NULL : low + in_tiles(q, p, PART));
}

/* Multiply the queries with the keys of a block. */
static void block_scores(Desk d, const uint16_t *keys, int positions, int width, int count) {
    const uint16_t *high = (const uint16_t *)d.query, *low = high + (size_t)QUERIES * width;
    size_t row = (size_t)TILE * width;
    int padded = (positions + 31) / 32 * 32;
    for (int p = 0, some; p < padded; p += some) {
        Tiles tiles = {keys + (size_t)p * width, row, 512, 64};
        float *a = d.score + p, *b = a + TILE;
        amx_zero();
        if (count > 16) {
            some = 32;
            amx_32_tokens(tiles, high, d.fast ? NULL : low, row, width / 32, 1, NULL, NULL, 0);
            amx_store(a, a + 16 * PART, b, b + 16 * PART, PART * 4);
        } else if (padded - p >= 64) {
            some = 64;
            amx_16_tokens(tiles, 4, high, low, width / 32, 4 * row);
            amx_store(a, b, b + TILE, b + 2 * TILE, PART * 4);
        } else {
            some = 32;
            amx_16_tokens(tiles, 2, high, low, width / 32, 4 * row);
            amx_store(a, b, NULL, NULL, PART * 4);
        }
    }
}

INLINE void mix_tiles(Desk d, const uint16_t *values, int first, int steps, int width, int count, int more) {
    const uint16_t *high = (const uint16_t *)d.share + (size_t)first * 512, *low = high + (size_t)QUERIES * PART;
    size_t row = (size_t)TILE * PART;
    for (int i = 0; i < width; i += count > 16 ? 32 : 64) {
        Tiles tiles = {values + 2 * i, 32, (size_t)32 * width, (size_t)4 * width};
        float *a = d.made + i, *b = a + TILE;
        if (count > 16) {
            if (more)
                amx_load(a, a + 16 * width, b, b + 16 * width, 4 * width);
            else
                amx_zero();
            amx_32_tokens(tiles, high, d.fast ? NULL : low, row, steps, 1, NULL, NULL, 0);
            amx_store(a, a + 16 * width, b, b + 16 * width, 4 * width);
        } else if (width - i >= 64) {
            if (more)
                amx_load(a, b, b + TILE, b + 2 * TILE, 4 * width);
            else
                amx_zero();
            amx_16_tokens(tiles, 4, high, low, steps, (size_t)128 * width);
            amx_store(a, b, b + TILE, b + 2 * TILE, 4 * width);
        } else {
            if (more)
                amx_load(a, b, NULL, NULL, 4 * width);
            else
                amx_zero();
            amx_16_tokens(tiles, 2, high, low, steps, (size_t)128 * width);
            amx_store(a, b, NULL, NULL, 4 * width);
        }
    }
}

/* Add up the values of a block, each times its share. What lies behind the last position is no number that anyone wrote, and even
   0 x NaN is NaN: the last 32 positions are copied, with zeros behind the end. */
static void block_mix(Desk d, const uint16_t *values, int positions, int width, int count) {
    int whole = positions / 32;
    if (whole)
        mix_tiles(d, values, 0, whole, width, count, 0);
    if (positions % 32) {
        static _Thread_local uint16_t last[32 * MOST_WIDTH];
        size_t pairs = (size_t)(positions % 32) / 2 * 2 * width;
        const uint16_t *from = values + (size_t)whole * 32 * width;
        memcpy(last, from, pairs * 2);
        memset(last + pairs, 0, ((size_t)32 * width - pairs) * 2);
        if (positions % 2)
            for (int i = 0; i < width; i++)
                last[pairs + 2 * i] = from[pairs + 2 * i];
        mix_tiles(d, last, whole, 1, width, count, whole > 0);
    }
}
#else
static void put_query(Desk d, int q, const float *from, F scale, int width) {
    for (int i = 0; i < width; i += 16)
        f_store(d.query + (size_t)q * width + i, f_mul(scale, f_load(from + i)));
}

INLINE void put_shares(Desk d, int q, int p, F a, F b) {
    f_store(d.share + q * PART + p, a);
    f_store(d.share + q * PART + p + 16, b);
}

static void block_scores(Desk d, const uint16_t *keys, int positions, int width, int count) {
    for (int q = 0, few; q < count; q += few)
        tile_any(
            keys, (size_t)TILE * width, (positions + TILE - 1) / TILE, width, d.query + (size_t)q * width, width,
            d.score + q * PART, PART, 0, few = next(count - q));
}

/* Add up `wide` times 16 widths of the values of a block, each times its share. */
INLINE void mix_rows(
    const uint16_t *values, size_t width, int positions, const float *shares, float *out, const int count, const int wide) {
    F sum[TOKENS][4];
    for (int t = 0; t < count; t++)
        for (int i = 0; i < wide; i++)
            sum[t][i] = f_zero();
    int p = 0;
    for (; p + 2 <= positions; p += 2) {
        const uint16_t *own = values + (size_t)p * width;
#pragma GCC unroll 4
        for (int i = 0; i < wide; i++) {
            _mm_prefetch((const char *)(own + 24 * width + 32 * i), _MM_HINT_T0);
            F v = f_first(own + 32 * i);
#pragma GCC unroll 8
            for (int t = 0; t < count; t++) {
                sum[t][i] = f_fma(v, f_all(shares[t * PART + p]), sum[t][i]);
                F_KEEP(sum[t][i]);
            }
            v = f_second(own + 32 * i);
#pragma GCC unroll 8
            for (int t = 0; t < count; t++) {
                sum[t][i] = f_fma(v, f_all(shares[t * PART + p + 1]), sum[t][i]);
                F_KEEP(sum[t][i]);
            }
        }
    }
    if (p < positions)
        for (int t = 0; t < count; t++)
            for (int i = 0; i < wide; i++)
                sum[t][i] = f_fma(f_first(values + (size_t)p * width + 32 * i), f_all(shares[t * PART + p]), sum[t][i]);
    for (int t = 0; t < count; t++)
        for (int i = 0; i < wide; i++)
            f_store(out + t * width + 16 * i, sum[t][i]);
}

static void block_mix(Desk d, const uint16_t *values, int positions, int width, int count) {
    /* Four vectors at once read the values in their order. But many queries then need 32 registers. */
    int wide = width % 64 == 0 && (REGISTERS == 32 || count <= FEW_QUERIES) ? 4 : 1;
    for (int i = 0; i < width; i += 16 * wide)
        for (int q = 0, few; q < count; q += few) {
            const float *shares = d.share + q * PART;
            float *out = d.made + (size_t)q * width + i;
            if (wide == 1) {
                few = next_of(count - q, 5);
                BY_COUNT(few, mix_rows(values + 2 * i, width, positions, shares, out, N, 1))
                continue;
            }
            switch (few = next_of(count - q, 5)) {
            case 1: mix_rows(values + 2 * i, width, positions, shares, out, 1, 4); break;
            case 2: mix_rows(values + 2 * i, width, positions, shares, out, 2, 4); break;
            case 3: mix_rows(values + 2 * i, width, positions, shares, out, 3, 4); break;
            case 4: mix_rows(values + 2 * i, width, positions, shares, out, 4, 4); break;
            default: mix_rows(values + 2 * i, width, positions, shares, out, 5, 4);
            }
        }
}
#endif

/* Turn one query's scores of the positions `from` to `to` into shares: 2^(score - most), and 0 outside, up to `positions`. The scores
   have the factor that makes 2 of e. Return the sum of the shares, and set `most`. */
static float shares_of(Desk d, int q, int positions, int from, int to, float *most) {
    const float *mine = d.score + q * PART;
    F none = f_all(-INFINITY), top = none, total = f_zero();
    for (int p = from / 16 * 16; p < to; p += 16) {
        F x = f_load(mine + p);
        top = f_max(top, p < from || p + 16 > to ? f_only(x, from - p, to - p, none) : x);
    }
    *most = f_most(top);
    top = f_all(*most);
    for (int p = 0; p < positions; p += 32) {
        F a = f_zero(), b = a;
        if (p < to && p + 32 > from) {
            a = f_exp2(f_sub(f_load(mine + p), top));
            b = f_exp2(f_sub(f_load(mine + p + 16), top));
            if (p < from || p + 32 > to) { /* what lies outside is anything */
                a = f_only(a, from - p, to - p, f_zero());
                b = f_only(b, from - p - 16, to - p - 16, f_zero());
            }
            total = f_add(total, f_add(a, b));
        }
        put_shares(d, q, p, a, b);
    }
    return f_sum(total);
}

/* Merge what a block gave to one query into what the blocks before it gave. */
static void merged(float *out, float *most, float *total, const float *made, float block_most, float block_total, int width) {
    float now = *most > block_most ? *most : block_most;
    F before = f_exp2(f_all(*most - now)), next = f_exp2(f_all(block_most - now));
    float factor[2][16];
    if (*total == 0.0f && block_total == 0.0f) /* no position yet that this query sees */
        before = next = f_zero();
    f_store(factor[0], before);
    f_store(factor[1], next);
    *most = now;
    *total = *total * factor[0][0] + block_total * factor[1][0];
    for (int i = 0; i < width; i += 16)
        f_store(out + i, f_fma(f_load(made + i), next, f_mul(f_load(out + i), before)));
}

static void attended(const Attention *a, const Span *span, int head, int q, const float *out, float total) {
    int queries = a->heads / a->kv_heads;
    float *to = a->attended + ((size_t)(span->at + q / queries) * a->heads + head * queries + q % queries) * a->width;
    F part = f_all(1.0f / total);
    for (int i = 0; i < a->width; i += 16)
        f_store(to + i, f_mul(part, f_load(out + i)));
}

/* Return the first block that a span sees, and set the number of blocks. */
static int64_t blocks_of(const Attention *a, const Span *span, int *count) {
    int64_t position = span->row->position + span->first, end = position + span->tokens;
    int64_t first = a->window && position + 1 > a->window ? (position + 1 - a->window) / PART : 0;
    *count = (int)((end + PART - 1) / PART - first);
    return first;
}

/* Attend, for all tokens of a span and one key-value head, to one part of their blocks. */
static void attend_chunk(void *context, int chunk) {
    const Attention *a = context;
    int pair = chunk / a->parts, part = chunk % a->parts, head = pair / a->span_count;
    const Span *span = &a->spans[pair % a->span_count];
    const Row *row = span->row;
    int width = a->width, queries = a->heads / a->kv_heads, count = span->tokens * queries, blocks;
    int64_t position = row->position + span->first, first = blocks_of(a, span, &blocks), end = position + span->tokens;
    int from = (int)((int64_t)blocks * part / a->parts), to = (int)((int64_t)blocks * (part + 1) / a->parts);
    if (from == to)
        return;
    int place = 0;
    while (atomic_exchange(&a->taken[place], 1))
        place = place == pool.helpers ? 0 : place + 1;
    Desk d = workspace(a->work + place * work_bytes(width), width);
    d.fast = a->fast && count > 16;
#ifdef AMX
    amx_begin(64, count); /* of 17 to 31 queries, lines behind the last one hold anything: they change no other line */
#endif
    for (int q = 0; q < count; q++)
        put_query(
            d, q,
            a->qkv + ((size_t)(span->at + q / queries) * (a->heads + 2 * a->kv_heads) + head * queries + q % queries) * width,
            f_all(a->scale), width);
    float most[QUERIES], total[QUERIES];
    for (int q = 0; q < count; q++) {
        most[q] = -INFINITY;
        total[q] = 0.0f;
    }
    if (a->parts == 1)
        memset(d.merged, 0, (size_t)count * width * 4);
    for (int block = from; block < to; block++) {
        int64_t begin = (first + block) * PART;
        int positions = (int)(end - begin < PART ? end - begin : PART), padded = (positions + 31) / 32 * 32;
        const uint16_t *keys = keys_of(row, first + block, a->layers, a->layer, a->kv_heads, head, width);
        block_scores(d, keys, positions, width, count);
        float block_most[QUERIES], block_total[QUERIES];
        for (int q = 0; q < count; q++) {
            int64_t own = position + q / queries + 1 - begin, least = a->window && own > a->window ? own - a->window : 0;
            block_total[q] = shares_of(
                d, q, padded, least < positions ? (int)least : positions, own < 0 ? 0 : own < positions ? (int)own : positions,
                &block_most[q]);
        }
        block_mix(d, keys + PART * width, positions, width, count);
        for (int q = 0; q < count; q++)
            if (a->parts == 1)
                merged(
                    d.merged + (size_t)q * width, &most[q], &total[q], d.made + (size_t)q * width, block_most[q],
                    block_total[q], width);
            else {
                float *own = a->partial + pair * a->own + ((size_t)block * count + q) * (2 * TILE + width);
                own[0] = block_most[q];
                own[1] = block_total[q];
                memcpy(own + 2 * TILE, d.made + (size_t)q * width, (size_t)width * 4);
            }
    }
    if (a->parts == 1)
        for (int q = 0; q < count; q++)
            attended(a, span, head, q, d.merged + (size_t)q * width, total[q]);
#ifdef AMX
    amx_end();
#endif
    atomic_store(&a->taken[place], 0);
}

/* Merge the blocks of a span and one key-value head that several threads have computed. */
static void merge_chunk(void *context, int pair) {
    const Attention *a = context;
    int head = pair / a->span_count, blocks;
    const Span *span = &a->spans[pair % a->span_count];
    int count = span->tokens * (a->heads / a->kv_heads);
    blocks_of(a, span, &blocks);
    for (int q = 0; q < count; q++) {
        float *out = a->partial + pair * a->own + (size_t)q * (2 * TILE + a->width), most = -INFINITY, total = 0.0f;
        float first[2] = {out[0], out[1]}, *into = out + 2 * TILE;
        /* the first block is merged into zeros, as `attend_chunk` does it */
        merged(into, &most, &total, into, first[0], first[1], a->width);
        for (int block = 1; block < blocks; block++) {
            const float *own = a->partial + pair * a->own + ((size_t)block * count + q) * (2 * TILE + a->width);
            merged(into, &most, &total, own + 2 * TILE, own[0], own[1], a->width);
        }
        attended(a, span, head, q, into, total);
    }
}

/* Return into how many chunks the blocks of each span and head are shared, so that each thread has several. */
static int parts_of(int pairs, int64_t longest) {
    int wanted = 4 * (pool.helpers + 1), blocks = (int)((longest + PART - 1) / PART);
    if (!pool.helpers || pairs >= wanted || blocks < 2)
        return 1;
    int parts = (wanted + pairs - 1) / pairs;
    return parts < blocks ? parts : blocks;
}

/* Return how many numbers of `partial` one span and head need. */
static size_t partial_of(int64_t longest, int width) {
    return (size_t)((longest + PART - 1) / PART + 1) * QUERIES * (2 * TILE + width);
}

static void attend(Attention *a) {
    int pairs = a->span_count * a->kv_heads;
    share(attend_chunk, a, pairs * a->parts);
    if (a->parts > 1)
        share(merge_chunk, a, pairs);
}
