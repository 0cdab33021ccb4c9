/* Compute whole steps through a group of llama-like blocks.

   Included by the file of each instruction set: see product.h. */

#define QUERIES 24 /* queries of one key-value head that go through the cache together */

typedef struct {
    Matrix qkv, out, up, down;
    const float *norm_in, *norm_mid, *qkv_bias; /* the bias and all that follows may be NULL */
    const float *norm_query, *norm_key;        /* of each head, before it is rotated */
    const float *norm_attended, *norm_out;     /* of the outputs of attention and feed-forward part */
    int32_t window;                            /* positions that a token sees; 0: all */
    int32_t local;                             /* which of a row's two rotary tables */
} Layer;

typedef struct {
    int32_t layers, hidden, heads, kv_heads, width, inner, gelu;
    float eps, scale;
    const Layer *layer;
} Group;

/* The next tokens of one session, the first at `position`, and its caches in bfloat16: keys in tiles of 16 positions
   [layers, kv heads, capacity / 16, width / 2, 16, 2], values [layers, kv heads, capacity, width]. */
typedef struct {
    uint16_t *keys, *values;
    int64_t position, capacity;
    const float *cosine[2], *sine[2]; /* [tokens, width], from `position` on; the second is for local layers */
    int32_t tokens;
} Row;

/* Tokens of one row that attend together. The first of them is `first` in the row and `at` in the step. */
typedef struct {
    const Row *row;
    int32_t first, at, tokens;
} Span;

typedef struct {
    const Group *group;
    const Layer *layer;
    int index, longest;
    const Span *spans;
    float *hidden, *norm, *qkv, *attended, *inner, *gated, *made;
    const float *weight; /* of the norm that is being computed */
    const float *after;  /* weight of the norm of `made`, before it is added; NULL: no norm */
    float *scores;       /* a workspace for each thread that attends: [QUERIES, longest + 2 * width] */
    _Atomic int *taken;  /* which of these workspaces are in use */
} Step;

/* Divide the numbers by their root mean square, and multiply each by its weight. */
INLINE void normalised(const float *from, float *to, const float *weight, int width, float eps) {
    F square = f_zero();
    for (int i = 0; i < width; i += 16) {
        F x = f_load(from + i);
        square = f_fma(x, x, square);
    }
    F factor = f_all(1.0f / sqrtf(f_sum(square) / (float)width + eps));
    for (int i = 0; i < width; i += 16)
        f_store(to + i, f_mul(f_mul(f_load(from + i), factor), f_load(weight + i)));
}

static void normed(const void *context, int token) {
    const Step *s = context;
    int width = s->group->hidden;
    normalised(s->hidden + (size_t)token * width, s->norm + (size_t)token * width, s->weight, width, s->group->eps);
}

static void added(float *to, const float *more, size_t count) {
    for (size_t i = 0; i < count; i += 16)
        f_store(to + i, f_add(f_load(to + i), f_load(more + i)));
}

static void made_added(const void *context, int token) {
    const Step *s = context;
    size_t width = s->group->hidden;
    float *made = s->made + token * width;
    if (s->after)
        normalised(made, made, s->after, (int)width, s->group->eps);
    added(s->hidden + token * width, made, width);
}

static void activated(const void *context, int token) {
    const Step *s = context;
    size_t inner = s->group->inner;
    const float *gate = s->inner + token * 2 * inner, *up = gate + inner;
    float *to = s->gated + token * inner;
    for (size_t i = 0; i < inner; i += 16) {
        F x = f_load(gate + i), steep = x;
        if (s->group->gelu) /* gelu by tanh is x times the logistic function of this */
            steep = f_mul(f_mul(x, f_all(1.5957691216057308f)), f_fma(f_mul(x, x), f_all(0.044715f), f_all(1.0f)));
        F near = f_min(f_all(80.0f), f_max(f_all(-80.0f), steep));
        F open = f_add(f_all(1.0f), f_exp(f_sub(f_zero(), near)));
        f_store(to + i, f_mul(f_div(x, open), f_load(up + i)));
    }
}

INLINE void turned(float *x, const float *cosine, const float *sine, int width) {
    int half = width / 2;
    for (int i = 0; i < half; i += 16) {
        F low = f_load(x + i), high = f_load(x + half + i);
        f_store(x + i, f_less(high, f_load(sine + i), f_mul(low, f_load(cosine + i))));
        f_store(x + half + i, f_fma(low, f_load(sine + half + i), f_mul(high, f_load(cosine + half + i))));
    }
}

/* For all tokens of a span and one key-value head: rotate queries and keys, and write keys and values to the cache. */
static void remember_chunk(void *context, int chunk) {
    const Step *s = context;
    const Group *g = s->group;
    const Span *span = &s->spans[chunk / g->kv_heads];
    const Row *row = span->row;
    int head = chunk % g->kv_heads, width = g->width, queries = g->heads / g->kv_heads;
    size_t cache = ((size_t)s->index * g->kv_heads + head) * row->capacity * width;
    for (int t = 0; t < span->tokens; t++) {
        float *own = s->qkv + (size_t)(span->at + t) * (g->heads + 2 * g->kv_heads) * width;
        const float *cosine = row->cosine[s->layer->local] + (size_t)(span->first + t) * width;
        const float *sine = row->sine[s->layer->local] + (size_t)(span->first + t) * width;
        float *key = own + (size_t)(g->heads + head) * width, *value = key + (size_t)g->kv_heads * width;
        for (int q = 0; q < queries; q++) {
            float *query = own + (size_t)(head * queries + q) * width;
            if (s->layer->norm_query)
                normalised(query, query, s->layer->norm_query, width, g->eps);
            turned(query, cosine, sine, width);
        }
        if (s->layer->norm_key)
            normalised(key, key, s->layer->norm_key, width, g->eps);
        turned(key, cosine, sine, width);
        int64_t position = row->position + span->first + t;
        uint16_t narrow[16], *to = row->keys + cache + (size_t)(position / TILE) * TILE * width + 2 * (position % TILE);
        for (int i = 0; i < width; i += 16) {
            f_to_bfloat16(narrow, f_load(key + i));
            for (int pair = 0; pair < 8; pair++)
                memcpy(to + (size_t)(i / 2 + pair) * 2 * TILE, narrow + 2 * pair, 4);
            f_to_bfloat16(row->values + cache + position * width + i, f_load(value + i));
        }
    }
}

/* Add to out [count, 16] the values of these positions, each times its share. */
INLINE void mixed_rows(
    const uint16_t *values, size_t width, int positions, const float *shares, size_t share_step, float *out, size_t out_step,
    const int count) {
    F sum[TOKENS];
    for (int t = 0; t < count; t++)
        sum[t] = f_load(out + t * out_step);
    for (int p = 0; p < positions; p++) {
        F value = f_from_bfloat16(values + p * width);
#pragma GCC unroll 8
        for (int t = 0; t < count; t++)
            sum[t] = f_fma(value, f_all(shares[t * share_step + p]), sum[t]);
    }
    for (int t = 0; t < count; t++)
        f_store(out + t * out_step, sum[t]);
}

static void mixed_any(
    const uint16_t *values, size_t width, int positions, const float *shares, size_t share_step, float *out, size_t out_step,
    int count) {
    BY_COUNT(count, mixed_rows(values, width, positions, shares, share_step, out, out_step, N))
}

/* Turn the scores of positions `from` to `to` of one query, which begin at `mine`, into shares: e^(score - most), and 0
   outside. Return the sum of the shares. */
static float shares_of(float *mine, int count, int from, int to) {
    for (int i = 0; i < from; i++)
        mine[i] = -INFINITY;
    for (int i = to; i < count; i++)
        mine[i] = -INFINITY;
    F most = f_load(mine);
    for (int i = 16; i < count; i += 16)
        most = f_max(most, f_load(mine + i));
    F top = f_all(f_most(most)), total = f_zero();
    for (int i = 0; i < count; i += 16) {
        F share = f_exp(f_sub(f_load(mine + i), top));
        total = f_add(total, share);
        f_store(mine + i, share);
    }
    for (int i = 0; i < from; i++)
        mine[i] = 0; /* f_exp gives at least e^-87, which is not zero */
    for (int i = to; i < count; i++)
        mine[i] = 0;
    return f_sum(total);
}

/* Attend, for all tokens of a span and one key-value head: their queries go through the cache together. */
static void attend_chunk(void *context, int chunk) {
    const Step *s = context;
    const Group *g = s->group;
    const Span *span = &s->spans[chunk / g->kv_heads];
    const Row *row = span->row;
    int head = chunk % g->kv_heads, width = g->width, queries = g->heads / g->kv_heads, count = span->tokens * queries;
    size_t cache = ((size_t)s->index * g->kv_heads + head) * row->capacity * width, line = s->longest;
    int place = 0;
    while (atomic_exchange(&s->taken[place], 1))
        place = place == pool.helpers ? 0 : place + 1;
    float *query = s->scores + (size_t)place * QUERIES * (line + 2 * width), *out = query + (size_t)QUERIES * width;
    float *scores = out + (size_t)QUERIES * width;
    F scale = f_all(g->scale);
    for (int t = 0; t < span->tokens; t++) {
        const float *own =
            s->qkv + ((size_t)(span->at + t) * (g->heads + 2 * g->kv_heads) + (size_t)head * queries) * width;
        for (int i = 0; i < queries * width; i += 16)
            f_store(query + (size_t)t * queries * width + i, f_mul(scale, f_load(own + i)));
    }
    int64_t position = row->position + span->first, end = position + span->tokens, window = s->layer->window;
    int64_t first = window && position + 1 > window ? (position + 1 - window) / TILE * TILE : 0;
    int positions = (int)(end - first), padded = (positions + TILE - 1) / TILE * TILE;
    for (int p = 0; p < positions; p += TILE)
        for (int q = 0, few; q < count; q += few)
            tile_any(
                row->keys + cache + (first + p) * width, width, query + (size_t)q * width, width,
                scores + q * line + p, line, 0, few = next(count - q));
    float whole[QUERIES];
    for (int q = 0; q < count; q++) {
        int64_t own = position + q / queries + 1, from = window && own > window ? own - window : 0;
        whole[q] = shares_of(scores + q * line, padded, from > first ? (int)(from - first) : 0, (int)(own - first));
    }
    memset(out, 0, (size_t)count * width * 4);
    for (int p = 0; p < positions; p += 128)
        for (int i = 0; i < width; i += 16)
            for (int q = 0, few; q < count; q += few)
                mixed_any(
                    row->values + cache + (first + p) * width + i, width, positions - p < 128 ? positions - p : 128,
                    scores + q * line + p, line, out + (size_t)q * width + i, width, few = next(count - q));
    for (int q = 0; q < count; q++) {
        float *to = s->attended + ((size_t)(span->at + q / queries) * g->heads + head * queries + q % queries) * width;
        F part = f_all(1.0f / whole[q]);
        for (int i = 0; i < width; i += 16)
            f_store(to + i, f_mul(part, f_load(out + (size_t)q * width + i)));
    }
    atomic_store(&s->taken[place], 0);
}

static size_t line_of(int64_t longest) { return (size_t)(longest + 2 * TILE) / TILE * TILE; }

/* Return how many bytes `ranvier_step` needs for `tokens` tokens. After it, the longest session has `longest` positions. */
int64_t ranvier_room(const Group *g, int tokens, int64_t longest) {
    int64_t attended = (int64_t)g->heads * g->width, widest = attended > g->hidden ? attended : g->hidden;
    int64_t floats = 2 * g->hidden + (g->heads + 2 * g->kv_heads) * g->width + attended + 3 * g->inner;
    int64_t columns = g->inner > widest ? g->inner : widest;
    int64_t scores = (int64_t)(pool.helpers + 1) * QUERIES * (line_of(longest) + 2 * g->width);
    return tokens * (4 * floats + 3 * columns + (int64_t)sizeof(Span)) + 4 * scores + 64 * (pool.helpers + 1) + 4096;
}

/* Compute all layers on hidden [tokens of all rows, hidden], float32, in place. The caches grow by the tokens of each row. */
void ranvier_step(const Group *g, const Row *rows, int count, float *hidden, int64_t longest, uint8_t *room) {
    int tokens = 0, spans = 0, queries = g->heads / g->kv_heads;
    int together = queries < QUERIES ? QUERIES / queries : 1;
    Span *span = (Span *)room;
    for (int r = 0; r < count; r++)
        for (int first = 0; first < rows[r].tokens; first += together) {
            int own = rows[r].tokens - first < together ? rows[r].tokens - first : together;
            span[spans++] = (Span){&rows[r], first, tokens, own};
            tokens += own;
        }
    size_t H = g->hidden, Q = (size_t)g->heads * g->width, KV = (size_t)(g->heads + 2 * g->kv_heads) * g->width;
    Step s = {.group = g, .spans = span, .hidden = hidden, .longest = (int)line_of(longest)};
    s.norm = (float *)(span + spans);
    s.qkv = s.norm + tokens * H;
    s.attended = s.qkv + tokens * KV;
    s.inner = s.attended + tokens * Q;
    s.gated = s.inner + (size_t)tokens * 2 * g->inner;
    s.made = s.gated + (size_t)tokens * g->inner;
    s.scores = s.made + tokens * H;
    s.taken = (_Atomic int *)(s.scores + (size_t)(pool.helpers + 1) * QUERIES * (s.longest + 2 * g->width));
    uint8_t *rest = (uint8_t *)(s.taken + pool.helpers + 1);
    memset((void *)s.taken, 0, sizeof(int) * (pool.helpers + 1));
    begin();
    for (s.index = 0; s.index < g->layers; s.index++) {
        const Layer *layer = s.layer = &g->layer[s.index];
        s.weight = layer->norm_in;
        each(tokens, normed, &s);
        Tokens ready = prepared(layer->qkv.kind, s.norm, tokens, g->hidden, rest);
        multiply(&layer->qkv, &ready, s.qkv);
        if (layer->qkv_bias)
            for (int t = 0; t < tokens; t++)
                added(s.qkv + t * KV, layer->qkv_bias, KV);
        share(remember_chunk, &s, spans * g->kv_heads);
        share(attend_chunk, &s, spans * g->kv_heads);
        ready = prepared(layer->out.kind, s.attended, tokens, (int)Q, rest);
        multiply(&layer->out, &ready, s.made);
        s.after = layer->norm_attended;
        each(tokens, made_added, &s);
        s.weight = layer->norm_mid;
        each(tokens, normed, &s);
        ready = prepared(layer->up.kind, s.norm, tokens, g->hidden, rest);
        multiply(&layer->up, &ready, s.inner);
        each(tokens, activated, &s);
        ready = prepared(layer->down.kind, s.gated, tokens, g->inner, rest);
        multiply(&layer->down, &ready, s.made);
        s.after = layer->norm_out;
        each(tokens, made_added, &s);
    }
    end();
}

