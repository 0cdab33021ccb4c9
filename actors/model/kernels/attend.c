/* Attend: the queries of one key-value head go through the cache together, in parts of PART positions.

   Included by the file of each instruction set: see product.h.

   Each part gives each query its largest score, the sum of 2^(score - largest), and the values times these shares. The parts of
   a query are merged in their order, as in FlashAttention (Dao, arXiv 2307.08691). Parts begin at multiples of PART, so a query's
   bits depend neither on how its prompt was cut nor on what is computed beside it; and the parts of a long cache can be
   computed by several threads (as in Flash-Decoding). The scores and shares of a part stay in the first cache. */

#define QUERIES 32 /* queries of one key-value head that go through the cache together */
#define HELD 256   /* positions of a block of the cache */
#define PART 128   /* positions whose scores are computed together */
#define MOST_WIDTH 512
#define FEW_QUERIES 5

/* The next tokens of one session, the first at `position`, and its cache in bfloat16: blocks of HELD positions, each with, for each
   layer and key-value head, the keys in tiles of 16 positions [HELD / 16, width / 2, 16, 2] and then the values in pairs of
   positions [HELD / 2, width, 2]. */
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
    int chunks;       /* chunks that share the parts of one span and head; */
    int pairs;        /* or, if it is one, how many spans and heads a chunk has */
    size_t own;       /* with several chunks: numbers of `partial` for one span and head */
    float scale;
    const float *qkv; /* [tokens, heads + 2 x kv heads, width], the queries rotated */
    float *attended;  /* [tokens, heads, width] */
    float *partial;   /* with several chunks: for each span and head and part: [queries, 2 + width] */
    uint8_t *work;    /* a workspace of `work_bytes` for each thread */
    _Atomic int *taken; /* which of these workspaces are in use */
} Attention;

/* A workspace. `query` and `share` hold float32, or with AMX tiles of high and low parts in the same bytes. */
typedef struct {
    float *query;  /* [QUERIES, width] */
    float *score;  /* [QUERIES, PART] */
    float *share;  /* [QUERIES, PART]; without AMX the same as `score` */
    float *made;   /* [QUERIES, width]: of one part */
    float *merged; /* [QUERIES, width] */
    int fast;
    size_t next_keys, next_values; /* how many numbers further the next part lies */
    int next;                      /* how many of its positions are fetched meanwhile; 0: none */
} Desk;

/* Return the keys of one block, layer and head. The values follow them, after HELD x width numbers. */
INLINE uint16_t *keys_of(const Row *row, int64_t block, int layers, int layer, int kv_heads, int head, int width) {
    return row->cache + ((block * layers + layer) * kv_heads + head) * 2 * HELD * width;
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
INLINE void put_shares(Desk d, int q, int p, F a, F b, const int fast) {
    uint16_t *high = (uint16_t *)d.share, *low = high + (size_t)QUERIES * PART;
    split(a, b, high + in_tiles(q, p, PART), fast ? NULL : low + in_tiles(q, p, PART));
}

/* Multiply the queries with the keys of a part. */
static void part_scores(Desk d, const uint16_t *keys, int positions, int width, int count) {
    const uint16_t *high = (const uint16_t *)d.query, *low = high + (size_t)QUERIES * width;
    size_t row = (size_t)TILE * width;
    int padded = (positions + 31) / 32 * 32;
    for (int p = 0, some; p < padded; p += some) {
        Tiles tiles = {keys + (size_t)p * width, row, 2 * row, 512, 64};
        float *a = d.score + p, *b = a + TILE;
        amx_zero();
        if (count > 16) {
            some = 32;
            amx_32_tokens(tiles, high, d.fast ? NULL : low, row, width / 32, 1, (Ahead){0}, NULL, NULL);
            amx_store(a, a + 16 * PART, b, b + 16 * PART, PART * 4);
        } else if (padded - p >= 64) {
            some = 64;
            amx_16_tokens(tiles, 4, high, low, width / 32, p < d.next ? d.next_keys : 0);
            amx_store(a, b, b + TILE, b + 2 * TILE, PART * 4);
        } else {
            some = 32;
            amx_16_tokens(tiles, 2, high, low, width / 32, p < d.next ? d.next_keys : 0);
            amx_store(a, b, NULL, NULL, PART * 4);
        }
    }
}

INLINE void mix_tiles(Desk d, const uint16_t *values, int first, int steps, int width, int count, int more) {
    const uint16_t *high = (const uint16_t *)d.share + (size_t)first * 512, *low = high + (size_t)QUERIES * PART;
    size_t row = (size_t)TILE * PART, further = 2 * d.next > 32 * steps ? d.next_values : 0;
    for (int i = 0; i < width; i += count > 16 ? 32 : 64) {
        Tiles tiles = {values + 2 * i, 32, 64, (size_t)32 * width, (size_t)4 * width};
        float *a = d.made + i, *b = a + TILE;
        if (count > 16) {
            if (more)
                amx_load(a, a + 16 * width, b, b + 16 * width, 4 * width);
            else
                amx_zero();
            amx_32_tokens(tiles, high, d.fast ? NULL : low, row, steps, 1, (Ahead){0}, NULL, NULL);
            amx_store(a, a + 16 * width, b, b + 16 * width, 4 * width);
        } else if (width - i >= 64) {
            if (more)
                amx_load(a, b, b + TILE, b + 2 * TILE, 4 * width);
            else
                amx_zero();
            amx_16_tokens(tiles, 4, high, low, steps, further);
            amx_store(a, b, b + TILE, b + 2 * TILE, 4 * width);
        } else {
            if (more)
                amx_load(a, b, NULL, NULL, 4 * width);
            else
                amx_zero();
            amx_16_tokens(tiles, 2, high, low, steps, further);
            amx_store(a, b, NULL, NULL, 4 * width);
        }
    }
}

/* Add up the values of a part, each times its share. What lies behind the last position is no number that anyone wrote, and even
   0 x NaN is NaN: the last 32 positions are copied, with zeros behind the end. */
static void part_mix(Desk d, const uint16_t *values, int positions, int width, int count) {
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

INLINE void put_shares(Desk d, int q, int p, F a, F b, const int fast) {
    f_store(d.share + q * PART + p, a);
    f_store(d.share + q * PART + p + 16, b);
}

static void part_scores(Desk d, const uint16_t *keys, int positions, int width, int count) {
    for (int q = 0, few; q < count; q += few)
        tile_any(
            keys, (size_t)TILE * width, (positions + TILE - 1) / TILE, width, d.query + (size_t)q * width, width,
            d.score + q * PART, PART, 0, few = next(count - q));
}

/* Add up `wide` times 16 widths of the values of a part, each times its share. */
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

static void part_mix(Desk d, const uint16_t *values, int positions, int width, int count) {
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

#ifdef AMX
INLINE F share_of(F x, const int fast) { return fast ? amx_exp2(x) : f_exp2(x); }
#else
INLINE F share_of(F x, const int fast) { return f_exp2(x); }
#endif

/* Turn one query's scores of the positions `from` to `to` into shares: 2^(score - most), and 0 outside, up to `positions`; or, if
   `all`, those of a whole part. The scores have the factor that makes 2 of e. Return the sum of the shares, and set `most`. */
INLINE float shares_of(Desk d, int q, int positions, int from, int to, float *most, const int all, const int fast) {
    const float *mine = d.score + q * PART;
    F none = f_all(-INFINITY), top = none, total = f_zero();
    if (all)
        from = 0, to = positions = PART;
#pragma GCC unroll 8
    for (int p = from / 16 * 16; p < to; p += 16) {
        F x = f_load(mine + p);
        top = f_max(top, !all && (p < from || p + 16 > to) ? f_only(x, from - p, to - p, none) : x);
    }
    *most = f_most(top);
    top = f_all(*most);
#pragma GCC unroll 4
    for (int p = 0; p < positions; p += 32) {
        F a = f_zero(), b = a;
        if (all || (p < to && p + 32 > from)) {
            a = share_of(f_sub(f_load(mine + p), top), fast);
            b = share_of(f_sub(f_load(mine + p + 16), top), fast);
            if (!all && (p < from || p + 32 > to)) { /* what lies outside is anything */
                a = f_only(a, from - p, to - p, f_zero());
                b = f_only(b, from - p - 16, to - p - 16, f_zero());
            }
            total = f_add(total, f_add(a, b));
        }
        put_shares(d, q, p, a, b, fast);
    }
    return f_sum(total);
}

/* What the parts of some queries have given so far, or one part gives: the largest score and the sum of the shares of each. */
typedef struct {
    float most[QUERIES], total[QUERIES];
} Weights;

static Weights nothing_seen(void) {
    Weights w;
    for (int q = 0; q < QUERIES; q++) {
        w.most[q] = -INFINITY;
        w.total[q] = 0.0f;
    }
    return w;
}

/* Take the weights of the next part into those of the parts before it. Set the factors of what was before and of what comes. */
static void weighed(Weights *all, const Weights *part, int count, float before[QUERIES], float next[QUERIES]) {
    for (int q = 0; q < count; q += 16) {
        F most = f_load(all->most + q), own = f_load(part->most + q), now = f_max(own, most);
        F old = f_exp2(f_sub(most, now)), new = f_exp2(f_sub(own, now));
        f_store(before + q, old);
        f_store(next + q, new);
        f_store(all->most + q, now);
        for (int i = q; i < q + 16 && i < count; i++) {
            if (all->total[i] == 0.0f && part->total[i] == 0.0f) /* no position yet that this query sees */
                before[i] = next[i] = 0.0f;
            all->total[i] = all->total[i] * before[i] + part->total[i] * next[i];
        }
    }
}

/* Merge what a part gave to one query into what the parts before it gave. */
static void merged(float *out, const float *made, float before, float next, int width) {
    for (int i = 0; i < width; i += 16)
        f_store(out + i, f_fma(f_load(made + i), f_all(next), f_mul(f_load(out + i), f_all(before))));
}

static void attended(const Attention *a, const Span *span, int head, int q, const float *out, float total) {
    int queries = a->heads / a->kv_heads;
    float *to = a->attended + ((size_t)(span->at + q / queries) * a->heads + head * queries + q % queries) * a->width;
    F part = f_all(1.0f / total);
    for (int i = 0; i < a->width; i += 16)
        f_store(to + i, f_mul(part, f_load(out + i)));
}

/* Return the first part that a span sees, and set the number of parts. */
static int64_t parts_of(const Attention *a, const Span *span, int *count) {
    int64_t position = span->row->position + span->first, end = position + span->tokens;
    int64_t first = a->window && position + 1 > a->window ? (position + 1 - a->window) / PART : 0;
    *count = (int)((end + PART - 1) / PART - first);
    return first;
}

/* Compute the shares of a part for all queries, and their weights. The part begins at `begin`, the first query's token at `position`. */
INLINE void part_shares(
    const Attention *a, Desk d, int64_t position, int64_t begin, int positions, int count, Weights *weights, const int fast) {
    int padded = (positions + 31) / 32 * 32, queries = a->heads / a->kv_heads;
    for (int q = 0; q < count; q++) {
        int64_t own = position + q / queries + 1 - begin, least = a->window && own > a->window ? own - a->window : 0;
        int from = least < positions ? (int)least : positions, to = own < 0 ? 0 : own < positions ? (int)own : positions;
        float *most = &weights->most[q];
        if (!from && to == PART)
            weights->total[q] = shares_of(d, q, PART, 0, PART, most, 1, fast);
        else
            weights->total[q] = shares_of(d, q, padded, from, to, most, 0, fast);
    }
}

/* Where a part's keys and values lie. */
typedef struct {
    const uint16_t *keys, *values;
    int64_t begin;
    int positions;
} Place;

/* Return where the i-th part of a span and key-value head lies (`pair`: the spans of a head follow each other). */
static Place place_of(const Attention *a, int pair, int i) {
    const Span *span = &a->spans[pair % a->span_count];
    int parts;
    int64_t begin = (parts_of(a, span, &parts) + i) * PART, left = span->row->position + span->first + span->tokens - begin;
    const uint16_t *keys =
        keys_of(span->row, begin / HELD, a->layers, a->layer, a->kv_heads, pair / a->span_count, a->width) +
        begin % HELD * a->width;
    return (Place){keys, keys + (size_t)HELD * a->width, begin, (int)(left < PART ? left : PART)};
}

/* Attend, for all tokens of a span and one key-value head, to the parts `from` to `to` - 1. Meanwhile, fetch the first part of the next
   span or head, unless it is negative. */
static void attend_parts(const Attention *a, Desk d, int pair, int from, int to, int next) {
    int head = pair / a->span_count, width = a->width, queries = a->heads / a->kv_heads;
    const Span *span = &a->spans[pair % a->span_count];
    int count = span->tokens * queries;
    int64_t position = span->row->position + span->first;
#ifdef AMX
    d.fast = a->fast && count > 16;
    unsigned control = d.fast ? without_denormals() : _mm_getcsr();
    amx_begin(64, count); /* of 17 to 31 queries, lines behind the last one hold anything: they change no other line */
#endif
    for (int q = 0; q < count; q++)
        put_query(
            d, q,
            a->qkv + ((size_t)(span->at + q / queries) * (a->heads + 2 * a->kv_heads) + head * queries + q % queries) * width,
            f_all(a->scale), width);
    Weights all = nothing_seen(), part = all;
    if (a->chunks == 1)
        memset(d.merged, 0, (size_t)count * width * 4);
    Place here = place_of(a, pair, from), then = here;
    for (int i = from; i < to; i++, here = then) {
        d.next = 0;
        if (i + 1 < to || next >= 0) {
            then = i + 1 < to ? place_of(a, pair, i + 1) : place_of(a, next, 0);
            d.next = then.positions;
            d.next_keys = ((size_t)then.keys - (size_t)here.keys) / 2;
            d.next_values = ((size_t)then.values - (size_t)here.values) / 2;
        }
        part_scores(d, here.keys, here.positions, width, count);
        if (d.fast)
            part_shares(a, d, position, here.begin, here.positions, count, &part, 1);
        else
            part_shares(a, d, position, here.begin, here.positions, count, &part, 0);
        part_mix(d, here.values, here.positions, width, count);
        if (a->chunks == 1) {
            float before[QUERIES], after[QUERIES];
            weighed(&all, &part, count, before, after);
            for (int q = 0; q < count; q++)
                merged(d.merged + (size_t)q * width, d.made + (size_t)q * width, before[q], after[q], width);
        } else
            for (int q = 0; q < count; q++) {
                float *own = a->partial + pair * a->own + ((size_t)i * count + q) * (2 * TILE + width);
                own[0] = part.most[q];
                own[1] = part.total[q];
                memcpy(own + 2 * TILE, d.made + (size_t)q * width, (size_t)width * 4);
            }
    }
    if (a->chunks == 1)
        for (int q = 0; q < count; q++)
            attended(a, span, head, q, d.merged + (size_t)q * width, all.total[q]);
#ifdef AMX
    amx_end();
    _mm_setcsr(control);
#endif
}

/* Attend to some of the parts of one span and head, or to all parts of several. */
static void attend_chunk(void *context, int chunk) {
    const Attention *a = context;
    int pairs = a->span_count * a->kv_heads, place = 0, parts;
    while (atomic_exchange(&a->taken[place], 1))
        place = place == pool.helpers ? 0 : place + 1;
    Desk d = workspace(a->work + place * work_bytes(a->width), a->width);
    if (a->chunks > 1) {
        int pair = chunk / a->chunks, own = chunk % a->chunks;
        parts_of(a, &a->spans[pair % a->span_count], &parts);
        int from = (int)((int64_t)parts * own / a->chunks), to = (int)((int64_t)parts * (own + 1) / a->chunks);
        if (from < to)
            attend_parts(a, d, pair, from, to, -1);
    } else
        for (int pair = chunk * a->pairs; pair < pairs && pair < (chunk + 1) * a->pairs; pair++) {
            parts_of(a, &a->spans[pair % a->span_count], &parts);
            int next = pair + 1 < pairs && pair + 1 < (chunk + 1) * a->pairs ? pair + 1 : -1;
            attend_parts(a, d, pair, 0, parts, next);
        }
    atomic_store(&a->taken[place], 0);
}

/* Merge the parts of a span and one key-value head that several threads have computed. */
static void merge_chunk(void *context, int pair) {
    const Attention *a = context;
    int head = pair / a->span_count, parts;
    const Span *span = &a->spans[pair % a->span_count];
    int count = span->tokens * (a->heads / a->kv_heads);
    size_t step = 2 * TILE + a->width;
    parts_of(a, span, &parts);
    Weights all = nothing_seen(), part = all;
    float *out = a->partial + pair * a->own;
    for (int i = 0; i < parts; i++) {
        float *own = out + i * count * step, before[QUERIES], next[QUERIES];
        for (int q = 0; q < count; q++) {
            part.most[q] = own[q * step];
            part.total[q] = own[q * step + 1];
        }
        weighed(&all, &part, count, before, next);
        for (int q = 0; q < count; q++) /* the first part is merged into zeros, as `attend_chunk` does it */
            merged(out + q * step + 2 * TILE, own + q * step + 2 * TILE, i ? before[q] : 0.0f, next[q], a->width);
    }
    for (int q = 0; q < count; q++)
        attended(a, span, head, q, out + q * step + 2 * TILE, all.total[q]);
}

/* Return into how many chunks the parts of each span and head are shared, so that each thread has several. */
static int chunks_of(int pairs, int64_t longest) {
    int wanted = 4 * (pool.helpers + 1), parts = (int)((longest + PART - 1) / PART);
    if (!pool.helpers || pairs >= wanted || parts < 2)
        return 1;
    int chunks = (wanted + pairs - 1) / pairs;
    return chunks < parts ? chunks : parts;
}

/* Return how many numbers of `partial` one span and head need. */
static size_t partial_of(int64_t longest, int width) {
    return (size_t)((longest + PART - 1) / PART + 1) * QUERIES * (2 * TILE + width);
}

static void attend(Attention *a) {
    int pairs = a->span_count * a->kv_heads, wanted = 8 * (pool.helpers + 1);
    if (a->chunks > 1) {
        share(attend_chunk, a, pairs * a->chunks);
        share(merge_chunk, a, pairs);
    } else {
        a->pairs = pool.helpers ? (pairs + wanted - 1) / wanted : pairs;
        share(attend_chunk, a, (pairs + a->pairs - 1) / a->pairs);
    }
}
