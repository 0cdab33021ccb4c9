/* Compute whole steps through a group of blocks.

   Included by the file of each instruction set: see product.h. */

/* One layer. Whatever is not one of the matrices, `norm_in` or `norm_mid` may be NULL: then the layer does without it. */
typedef struct {
    Matrix qkv, out, up, down;
    const float *norm_in, *norm_mid;
    const float *norm_query, *norm_key;    /* of each head, before it is rotated */
    const float *norm_attended, *norm_out; /* of the outputs of attention and feed-forward part */
    const float *norm_in_bias, *norm_mid_bias;
    const float *qkv_bias, *out_bias, *up_bias, *down_bias;
    int32_t window; /* positions that a token sees; 0: all */
    int32_t local;  /* which of the two rotary tables */
} Layer;

typedef struct {
    int32_t layers, hidden, heads, kv_heads, width, inner;
    int32_t activation;
    int32_t gated;     /* `up` has a gate, too: [2, inner] */
    int32_t centred;   /* norms take off the mean first (layer norm); only `norm_in` and `norm_mid` can be such */
    int32_t attention; /* only attention: the feed-forward part runs elsewhere */
    int32_t first, cached; /* the first of these layers in the caches, and how many layers these have */
    int32_t fast;          /* attention may depend on the number of tokens, if that is faster */
    float eps, scale;
    const Layer *layer;
    const float *cosine[2], *sine[2]; /* rotary tables [positions, width]; NULL: positions are not rotated */
} Group;

typedef struct {
    const Group *group;
    const Layer *layer;
    int index;
    const Span *spans;
    float *hidden, *norm, *qkv, *attended, *inner, *gated, *made;
    const float *weight, *shift; /* of the norm that is being computed, and what it adds (NULL: nothing) */
    const float *after;          /* weight of the norm of `made`, before it is added; NULL: no norm */
    const float *bias;           /* of the matrix that has made `made`; NULL: no bias */
    const uint16_t *from;        /* bfloat16: where the tokens come from, */
    uint16_t *to;                /* and where they go to */
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

/* Take off the mean of the numbers, divide them by their standard deviation, multiply each by its weight and add its shift. */
INLINE void centred(const float *from, float *to, const float *weight, const float *shift, int width, float eps) {
    F sum = f_zero(), square = f_zero();
    for (int i = 0; i < width; i += 16)
        sum = f_add(sum, f_load(from + i));
    F mean = f_all(f_sum(sum) / (float)width);
    for (int i = 0; i < width; i += 16) {
        F x = f_sub(f_load(from + i), mean);
        square = f_fma(x, x, square);
    }
    F factor = f_all(1.0f / sqrtf(f_sum(square) / (float)width + eps));
    for (int i = 0; i < width; i += 16) {
        F x = f_mul(f_mul(f_sub(f_load(from + i), mean), factor), f_load(weight + i));
        f_store(to + i, shift ? f_add(x, f_load(shift + i)) : x);
    }
}

static void normed(const void *context, int token) {
    const Step *s = context;
    int width = s->group->hidden;
    const float *from = s->hidden + (size_t)token * width;
    float *to = s->norm + (size_t)token * width;
    if (s->group->centred)
        centred(from, to, s->weight, s->shift, width, s->group->eps);
    else
        normalised(from, to, s->weight, width, s->group->eps);
}

static void added(float *to, const float *more, size_t count) {
    for (size_t i = 0; i < count; i += 16)
        f_store(to + i, f_add(f_load(to + i), f_load(more + i)));
}

static void made_added(const void *context, int token) {
    const Step *s = context;
    size_t width = s->group->hidden;
    float *made = s->made + token * width;
    if (s->bias)
        added(made, s->bias, width);
    if (s->after)
        normalised(made, made, s->after, (int)width, s->group->eps);
    added(s->hidden + token * width, made, width);
}

static void activated(const void *context, int token) {
    const Step *s = context;
    size_t inner = s->group->inner, wide = s->group->gated ? 2 * inner : inner;
    float *gate = s->inner + token * wide, *up = gate + inner, *to = s->gated + token * inner;
    if (s->layer->up_bias)
        added(gate, s->layer->up_bias, wide);
    for (size_t i = 0; i < inner; i += 16) {
        F x = let_through(f_load(gate + i), s->group->activation);
        f_store(to + i, s->group->gated ? f_mul(x, f_load(up + i)) : x);
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
        int64_t position = row->position + span->first + t;
        const float *cosine = g->cosine[s->layer->local], *sine = g->sine[s->layer->local];
        float *key = own + (size_t)(g->heads + head) * width, *value = key + (size_t)g->kv_heads * width;
        for (int q = 0; q < queries; q++) {
            float *query = own + (size_t)(head * queries + q) * width;
            if (s->layer->norm_query)
                normalised(query, query, s->layer->norm_query, width, g->eps);
            if (cosine)
                turned(query, cosine + position * width, sine + position * width, width);
        }
        if (s->layer->norm_key)
            normalised(key, key, s->layer->norm_key, width, g->eps);
        if (cosine)
            turned(key, cosine + position * width, sine + position * width, width);
        uint16_t *keys = keys_of(row, position / HELD, g->cached, g->first + s->index, g->kv_heads, head, width);
        int at = position % HELD;
        uint16_t narrow[16], *to = keys + (size_t)(at / TILE) * TILE * width + 2 * (at % TILE);
        uint16_t *pair = keys + (size_t)HELD * width + (size_t)(at / 2) * 2 * width + at % 2;
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

static void tokens_in(const void *context, int token) {
    const Step *s = context;
    size_t width = s->group->hidden, at = token * width;
    for (size_t i = at; i < at + width; i += 16)
        f_store(s->hidden + i, f_from_bfloat16(s->from + i));
}

static void tokens_out(const void *context, int token) {
    const Step *s = context;
    size_t width = s->group->hidden, at = token * width;
    for (size_t i = at; i < at + width; i += 16)
        f_to_bfloat16(s->to + i, f_load(s->hidden + i));
}

/* Return how many bytes `ranvier_step` needs for `tokens` tokens. After it, the longest session has `longest` positions. */
int64_t ranvier_room(const Group *g, int tokens, int64_t longest) {
    int64_t attended = (int64_t)g->heads * g->width, widest = attended > g->hidden ? attended : g->hidden;
    int64_t floats = 3 * g->hidden + (g->heads + 2 * g->kv_heads) * g->width + attended + 3 * g->inner;
    int columns = (int)(g->inner > widest ? g->inner : widest), threads = pool.helpers + 1;
    int64_t shared = 4 * threads * (int64_t)partial_of(longest, g->width) * 4; /* spans and heads that have parts */
    return tokens * (4 * floats + (int64_t)sizeof(Span)) + threads * (int64_t)(work_bytes(g->width) + sizeof(int)) + shared +
           (int64_t)prepared_bytes(tokens, columns) + 256;
}

static uint8_t *next_line(void *at) { return (uint8_t *)(((uintptr_t)at + 63) / 64 * 64); }

/* Multiply, and add the products to the hidden states, after a bias and a norm if there are such. */
static void add_product(Step *s, const Matrix *matrix, const Tokens *ready, const float *bias, const float *norm) {
    if (ready->high && !bias && !norm) { /* with AMX */
        multiply((Product){matrix, ready, s->hidden, ADD});
        return;
    }
    multiply((Product){matrix, ready, s->made, STORE});
    s->after = norm, s->bias = bias;
    each(ready->tokens, made_added, s);
}

static void attention_part(Step *s, Attention *attention, int tokens, int spans, uint8_t *rest) {
    const Layer *layer = s->layer;
    s->weight = layer->norm_in, s->shift = layer->norm_in_bias;
    each(tokens, normed, s);
    product(&layer->qkv, s->norm, tokens, s->qkv, rest);
    if (layer->qkv_bias)
        for (int t = 0; t < tokens; t++)
            added(s->qkv + (size_t)t * layer->qkv.rows, layer->qkv_bias, layer->qkv.rows);
    share(remember_chunk, s, spans * s->group->kv_heads);
    attention->layer = s->group->first + s->index;
    attention->window = layer->window;
    attend(attention);
    Tokens ready = prepared(&layer->out, s->attended, tokens, rest);
    add_product(s, &layer->out, &ready, layer->out_bias, layer->norm_attended);
}

#ifdef AMX
enum { FEW = 8 /* tokens: the room of fewer does not hold a whole tile of them */ };

/* Multiply with a matrix [gate, up], and make the tokens of the next product of it at once; or return 0. */
static int gated_at_once(Step *s, int tokens, uint8_t *rest, Tokens *next) {
    const Layer *layer = s->layer;
    if (tokens < FEW || !s->group->gated || layer->up_bias || !in_parts(&layer->up, tokens) || !in_parts(&layer->down, tokens))
        return 0;
    Tokens ready = prepared(&layer->up, s->norm, tokens, rest);
    uint16_t *high = (uint16_t *)s->inner, *low = high + (size_t)(tokens + 15) / 16 * 16 * layer->down.columns;
    *next = (Tokens){.tokens = tokens, .high = high, .low = with_low(&layer->down, tokens) ? low : NULL};
    multiply((Product){
        &layer->up, &ready, .finish = GATE, .activation = s->group->activation,
        .next = {high, next->low ? low : NULL, layer->down.columns}});
    return 1;
}
#else
static int gated_at_once(Step *s, int tokens, uint8_t *rest, Tokens *next) { return 0; }
#endif

static void feed_forward_part(Step *s, int tokens, uint8_t *rest) {
    const Layer *layer = s->layer;
    s->weight = layer->norm_mid, s->shift = layer->norm_mid_bias;
    each(tokens, normed, s);
    Tokens ready;
    if (!gated_at_once(s, tokens, rest, &ready)) {
        product(&layer->up, s->norm, tokens, s->inner, rest);
        each(tokens, activated, s);
        ready = prepared(&layer->down, s->gated, tokens, rest);
    }
    add_product(s, &layer->down, &ready, layer->down_bias, layer->norm_out);
}

/* Compute all layers from `from` to `to`, both [tokens of all rows, hidden] in float32 or, if `narrow`, bfloat16; they may be the
   same. The caches grow by the tokens of each row. Return whether all numbers of the result are finite. */
int ranvier_step(
    const Group *g, const Row *rows, int count, const void *from, void *to, int narrow, int64_t longest, uint8_t *room) {
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
    Step s = {.group = g, .spans = span, .from = from, .to = to};
    s.norm = (float *)next_line(span + spans);
    s.qkv = s.norm + tokens * H;
    s.attended = s.qkv + tokens * KV;
    s.inner = s.attended + tokens * Q;
    s.gated = s.inner + (size_t)tokens * 2 * g->inner;
    s.made = s.gated + (size_t)tokens * g->inner;
    s.hidden = narrow ? s.made + tokens * H : to;
    Attention attention = {
        .spans = span, .span_count = spans, .heads = g->heads, .kv_heads = g->kv_heads, .width = g->width, .layers = g->cached, .fast = g->fast,
        .chunks = chunks_of(spans * g->kv_heads, longest), .own = partial_of(longest, g->width),
        .scale = g->scale * 1.44269504f /* 2^x is quicker than e^x */,
        .qkv = s.qkv, .attended = s.attended};
    attention.work = next_line(s.made + 2 * tokens * H);
    attention.partial = (float *)(attention.work + (pool.helpers + 1) * work_bytes(g->width));
    attention.taken = (_Atomic int *)(attention.partial +
        (attention.chunks > 1 ? spans * g->kv_heads * attention.own : 0));
    memset((void *)attention.taken, 0, sizeof(int) * (pool.helpers + 1));
    uint8_t *rest = next_line(attention.taken + pool.helpers + 1);
    begin();
    if (narrow)
        each(tokens, tokens_in, &s);
    else if (from != to)
        memcpy(to, from, tokens * H * sizeof(float));
    for (s.index = 0; s.index < g->layers; s.index++) {
        s.layer = &g->layer[s.index];
        attention_part(&s, &attention, tokens, spans, rest);
        if (!g->attention)
            feed_forward_part(&s, tokens, rest);
    }
    if (narrow)
        each(tokens, tokens_out, &s);
    end();
    return ranvier_finite(to, (int64_t)(tokens * H), !narrow, narrow ? 0x7F80 : 0x7F800000);
}

/* Return how many bytes `ranvier_head` needs. */
int64_t ranvier_head_room(int tokens, int columns) {
    return 2 * (int64_t)tokens * columns * 4 + (int64_t)prepared_bytes(tokens, columns) + 128;
}

/* Compute the logits `to` [tokens, rows] in float32: the norm of `from` [tokens, columns], in float32 or, if `narrow`, bfloat16,
   times the matrix. `weight` and `shift` (or NULL) belong to the norm, which is `centred` or not. */
void ranvier_head(
    const Matrix *matrix, const float *weight, const float *shift, int is_centred, float eps, const void *from, int narrow, int tokens,
    float *to, uint8_t *room) {
    Group group = {.hidden = matrix->columns, .centred = is_centred, .eps = eps};
    Step s = {.group = &group, .weight = weight, .shift = shift, .from = from};
    float *wide = (float *)next_line(room);
    s.norm = wide + (size_t)tokens * matrix->columns;
    s.hidden = narrow ? wide : (float *)from;
    begin();
    if (narrow)
        each(tokens, tokens_in, &s);
    each(tokens, normed, &s);
    product(matrix, s.norm, tokens, to, next_line(s.norm + (size_t)tokens * matrix->columns));
    end();
}

/* Return the place of the largest of a few numbers, the first one if there are several; NaN is the largest. */
static int64_t largest_here(const float *numbers, int64_t count) {
    enum { AT_ONCE = 64 };
    int64_t whole = count / AT_ONCE * AT_ONCE;
    float most = -INFINITY;
    for (int64_t i = 0; i < whole; i += AT_ONCE) {
        F two = f_max(f_load(numbers + i), f_load(numbers + i + 16));
        F all = f_max(two, f_max(f_load(numbers + i + 32), f_load(numbers + i + 48)));
        float here = f_most(all);
        most = here > most ? here : most;
    }
    for (int64_t i = whole; i < count; i++)
        most = numbers[i] > most ? numbers[i] : most;
    int64_t first = -1, wrong = -1;
    for (int64_t i = 0; i < count && wrong < 0; i += AT_ONCE) {
        int64_t end = i + AT_ONCE < count ? i + AT_ONCE : count;
        int found = 0;
        for (int64_t n = i; n < end; n++)
            found |= !(numbers[n] < most); /* also for NaN */
        for (int64_t n = i; found && n < end && wrong < 0; n++) {
            if (numbers[n] == most && first < 0)
                first = n;
            if (numbers[n] != numbers[n])
                wrong = n;
        }
    }
    return wrong >= 0 ? wrong : first >= 0 ? first : 0;
}

/* Return the place of the largest of `count` numbers, the first one if there are several; NaN is the largest. */
int64_t ranvier_largest(const float *numbers, int64_t count) {
    enum { NUMBERS = 4096 }; /* they stay in the first cache while they are read twice */
    int64_t best = 0;
    for (int64_t at = 0; at < count; at += NUMBERS) {
        int64_t here = at + largest_here(numbers + at, count - at < NUMBERS ? count - at : NUMBERS);
        if (numbers[here] != numbers[here])
            return here;
        best = numbers[here] > numbers[best] ? here : best;
    }
    return best;
}

typedef struct {
    const float *numbers;
    int64_t count, *to;
} Rows;

static void largest_of_row(void *context, int row) {
    const Rows *r = context;
    const float *numbers = r->numbers + row * r->count;
    int64_t best = ranvier_largest(numbers, r->count);
    r->to[row] = isfinite(numbers[best]) ? best : INT32_MAX; /* NOWHERE in sampling.py */
}

/* Put the place of the largest number of each row of [rows, count] into `to`, on all threads; INT32_MAX if it is not finite. */
void ranvier_largest_of_rows(const float *numbers, int rows, int64_t count, int64_t *to) {
    Rows r = {numbers, count, to};
    if (rows > 1) /* one thread is enough for one row */
        begin();
    share(largest_of_row, &r, rows);
    if (rows > 1)
        end();
}

/* Return the place of the largest of those numbers whose bit is set, the first one if there are several; NaN is the largest. -1: no
   bit is set. `bits` has 8 of them in each byte, the lowest first, and as many bytes as `count` needs. */
int64_t ranvier_largest_allowed(const float *numbers, int64_t count, const uint8_t *bits) {
    int64_t first = -1;
    for (int64_t at = 0; at < count; at += 64) {
        int64_t bytes = (count - at + 7) / 8;
        uint64_t set = 0;
        memcpy(&set, bits + at / 8, bytes < 8 ? (size_t)bytes : 8);
        if (count - at < 64)
            set &= ((uint64_t)1 << (count - at)) - 1;
        for (; set; set &= set - 1) {
            int64_t i = at + __builtin_ctzll(set);
            if (numbers[i] != numbers[i])
                return i;
            if (first < 0 || numbers[i] > numbers[first])
                first = i;
        }
    }
    return first;
}
