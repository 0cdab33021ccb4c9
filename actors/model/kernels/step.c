/* Compute whole steps through a group of llama-like blocks.

   Included by the file of each instruction set: see product.h. */

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
    int32_t first, cached; /* the first of these layers in the caches, and how many layers these have */
    int32_t fast;          /* attention may depend on the number of tokens, if that is faster */
    float eps, scale;
    const Layer *layer;
} Group;

typedef struct {
    const Group *group;
    const Layer *layer;
    int index;
    const Span *spans;
    float *hidden, *norm, *qkv, *attended, *inner, *gated, *made;
    const float *weight; /* of the norm that is being computed */
    const float *after;  /* weight of the norm of `made`, before it is added; NULL: no norm */
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
        uint16_t *keys = keys_of(row, position / PART, g->cached, g->first + s->index, g->kv_heads, head, width);
        int at = position % PART;
        uint16_t narrow[16], *to = keys + (size_t)(at / TILE) * TILE * width + 2 * (at % TILE);
        uint16_t *pair = keys + (size_t)PART * width + (size_t)(at / 2) * 2 * width + at % 2;
        for (int i = 0; i < width; i += 16) {
            f_to_bfloat16(narrow, f_load(key + i));
            for (int two = 0; two < 8; two++)
                memcpy(to + (size_t)(i / 2 + two) * 2 * TILE, narrow + 2 * two, 4);
            f_to_bfloat16(narrow, f_load(value + i));
            for (int one = 0; one < 16; one++)
                pair[2 * (i + one)] = narrow[one];
        }
    }
}

/* Return how many bytes `ranvier_step` needs for `tokens` tokens. After it, the longest session has `longest` positions. */
int64_t ranvier_room(const Group *g, int tokens, int64_t longest) {
    int64_t attended = (int64_t)g->heads * g->width, widest = attended > g->hidden ? attended : g->hidden;
    int64_t floats = 2 * g->hidden + (g->heads + 2 * g->kv_heads) * g->width + attended + 3 * g->inner;
    int columns = (int)(g->inner > widest ? g->inner : widest), threads = pool.helpers + 1;
    int64_t shared = 4 * threads * (int64_t)partial_of(longest, g->width) * 4; /* spans and heads that have parts */
    return tokens * (4 * floats + (int64_t)sizeof(Span)) + threads * (int64_t)(work_bytes(g->width) + sizeof(int)) + shared +
           (int64_t)prepared_bytes(tokens, columns) + 256;
}

static uint8_t *next_line(void *at) { return (uint8_t *)(((uintptr_t)at + 63) / 64 * 64); }

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
    Step s = {.group = g, .spans = span, .hidden = hidden};
    s.norm = (float *)next_line(span + spans);
    s.qkv = s.norm + tokens * H;
    s.attended = s.qkv + tokens * KV;
    s.inner = s.attended + tokens * Q;
    s.gated = s.inner + (size_t)tokens * 2 * g->inner;
    s.made = s.gated + (size_t)tokens * g->inner;
    Attention attention = {
        .spans = span, .span_count = spans, .heads = g->heads, .kv_heads = g->kv_heads, .width = g->width, .layers = g->cached, .fast = g->fast,
        .parts = parts_of(spans * g->kv_heads, longest), .own = partial_of(longest, g->width),
        .scale = g->scale * 1.44269504f /* 2^x is quicker than e^x */,
        .qkv = s.qkv, .attended = s.attended};
    attention.work = next_line(s.made + tokens * H);
    attention.partial = (float *)(attention.work + (pool.helpers + 1) * work_bytes(g->width));
    attention.taken = (_Atomic int *)(attention.partial +
        (attention.parts > 1 ? spans * g->kv_heads * attention.own : 0));
    memset((void *)attention.taken, 0, sizeof(int) * (pool.helpers + 1));
    uint8_t *rest = next_line(attention.taken + pool.helpers + 1);
    begin();
    for (s.index = 0; s.index < g->layers; s.index++) {
        const Layer *layer = s.layer = &g->layer[s.index];
        s.weight = layer->norm_in;
        each(tokens, normed, &s);
        product(&layer->qkv, s.norm, tokens, s.qkv, rest);
        if (layer->qkv_bias)
            for (int t = 0; t < tokens; t++)
                added(s.qkv + t * KV, layer->qkv_bias, KV);
        share(remember_chunk, &s, spans * g->kv_heads);
        attention.layer = g->first + s.index;
        attention.window = layer->window;
        attend(&attention);
        product(&layer->out, s.attended, tokens, s.made, rest);
        s.after = layer->norm_attended;
        each(tokens, made_added, &s);
        s.weight = layer->norm_mid;
        each(tokens, normed, &s);
        product(&layer->up, s.norm, tokens, s.inner, rest);
        each(tokens, activated, &s);
        product(&layer->down, s.gated, tokens, s.made, rest);
        s.after = layer->norm_out;
        each(tokens, made_added, &s);
    }
    end();
}
