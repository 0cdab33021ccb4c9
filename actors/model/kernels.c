/* Products of weights with a few tokens, and whole decoding steps through llama's blocks, for processors with AVX-512.

   Weights lie in tiles of 16 rows, so that one vector holds the same columns of 16 rows: the sums of 16 rows grow side by
   side and are never added up across a vector. A tile of a group of columns holds, in order,

       bfloat16   for each pair of columns: 16 rows x 2 numbers
       int8       for each 32 columns: 8 vectors of 16 rows x 4 numbers (stored plus 128), 16 scales
       int4       for each 32 columns: 4 vectors of 16 rows x 8 numbers (columns 0-3 in the low halves of the bytes, 4-7 in the
                  high ones), 16 scales, 16 least values

   with scales and least values as float16 in a block of their own. Quantised weights are multiplied with tokens that are
   rounded to int8 in blocks of 32, as llama.cpp does. No Python here: called through ctypes, which lets go of the
   interpreter meanwhile. */

#include <immintrin.h>
#include <linux/futex.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,fma")))
#define TILE 16
#define BLOCK 32
#define TOKENS 8 /* whose sums are held in registers at once */

enum { BFLOAT16 = 0, INT8 = 1, INT4 = 2 };

/* A packed matrix. `data` holds the numbers, `scales` [rows / 16][columns / 32][16], float16, and for int4
   `least` the same. */
typedef struct {
    int32_t kind, rows, columns;
    const void *data;
    const uint16_t *scales, *least;
} Matrix;

int ranvier_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vnni");
}

/* -- threads: chunks are taken from one ticket, so a helper that wakes late delays nobody ------------------------------- */

typedef void (*Work)(void *context, int chunk);

typedef struct {
    int helpers;
    Work work;
    void *context;
    _Atomic uint64_t ticket; /* phase (24 bits), chunks (20), next chunk (20) */
    _Atomic int done;
    _Atomic uint32_t awake; /* grows by one at the begin and the end of a step; odd: there may be work */
} Pool;

static Pool pool;

static void take_chunks(Pool *p) {
    for (;;) {
        uint64_t ticket = atomic_load_explicit(&p->ticket, memory_order_acquire);
        uint32_t next = ticket & 0xFFFFF, chunks = (ticket >> 20) & 0xFFFFF;
        if (next >= chunks)
            return;
        if (atomic_compare_exchange_weak(&p->ticket, &ticket, ticket + 1)) {
            p->work(p->context, (int)next);
            atomic_fetch_add_explicit(&p->done, 1, memory_order_release);
        }
    }
}

/* Waits awake, but not at the cost of whoever else wants the core: it may be the one that is waited for. */
static void patient(int *spins) {
    if (++*spins < 1000)
        _mm_pause();
    else {
        *spins = 0;
        sched_yield();
    }
}

static void *helper(void *argument) {
    Pool *p = argument;
    int spins = 0;
    for (;;) {
        uint32_t seen = atomic_load(&p->awake);
        if (seen & 1) {
            take_chunks(p);
            patient(&spins);
        } else {
            syscall(SYS_futex, &p->awake, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
        }
    }
    return NULL;
}

/* Threads beside the caller's, once for the life of the process. */
void ranvier_threads(int threads) {
    for (; pool.helpers < threads - 1; pool.helpers++) {
        pthread_t made;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        if (pthread_create(&made, &attributes, helper, &pool))
            return;
    }
}

static void begin(void) {
    if (pool.helpers) {
        atomic_fetch_add(&pool.awake, 1);
        syscall(SYS_futex, &pool.awake, FUTEX_WAKE_PRIVATE, pool.helpers, NULL, NULL, 0);
    }
}

static void end(void) {
    if (pool.helpers)
        atomic_fetch_add(&pool.awake, 1);
}

static void share(Work work, void *context, int chunks) {
    if (!pool.helpers || chunks < 2) {
        for (int chunk = 0; chunk < chunks; chunk++)
            work(context, chunk);
        return;
    }
    pool.work = work;
    pool.context = context;
    atomic_store(&pool.done, 0);
    uint64_t phase = (atomic_load(&pool.ticket) >> 40) + 1;
    atomic_store_explicit(&pool.ticket, phase << 40 | (uint64_t)chunks << 20, memory_order_release);
    take_chunks(&pool);
    int spins = 0;
    while (atomic_load_explicit(&pool.done, memory_order_acquire) < chunks)
        patient(&spins);
}

/* -- packing ------------------------------------------------------------------------------------------------------------ */

/* bfloat16 [rows, columns] into tiles. */
void ranvier_pack_bfloat16(const uint16_t *from, int rows, int columns, uint16_t *to) {
    for (int tile = 0; tile < rows / TILE; tile++)
        for (int pair = 0; pair < columns / 2; pair++)
            for (int row = 0; row < TILE; row++) {
                const uint16_t *two = from + (size_t)(tile * TILE + row) * columns + 2 * pair;
                *to++ = two[0];
                *to++ = two[1];
            }
}

/* Numbers from 0 to 255 (int8, plus 128) or to 15 (int4), [rows, columns], into tiles. */
void ranvier_pack_whole(const uint8_t *from, int rows, int columns, int kind, uint8_t *to) {
    int step = kind == INT4 ? 8 : 4;
    for (int tile = 0; tile < rows / TILE; tile++)
        for (int column = 0; column < columns; column += step)
            for (int row = 0; row < TILE; row++) {
                const uint8_t *own = from + (size_t)(tile * TILE + row) * columns + column;
                for (int i = 0; i < 4; i++)
                    *to++ = kind == INT4 ? own[i] | own[i + 4] << 4 : own[i];
            }
}

/* -- products ----------------------------------------------------------------------------------------------------------- */

/* Tokens as the products want them. */
typedef struct {
    int tokens;
    const float *wide;      /* [tokens, columns], for bfloat16 */
    const int8_t *whole;    /* [tokens, columns] */
    const float *scales;    /* [tokens, columns / 32] */
    const float *sums;      /* [tokens, columns / 32]: of the whole numbers, times their scale */
} Tokens;

typedef struct {
    const Matrix *matrix;
    const Tokens *tokens;
    float *out; /* [tokens, rows] */
    int tiles_a_chunk;
} Product;

/* Two columns of 16 rows as float32. Products in float32 are twice as fast here as the processor's own of bfloat16, which
   starts one every other cycle, and round nothing. */
TARGET static inline __m512 first_of(__m512i pair) { return _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)); }

TARGET static inline __m512 second_of(__m512i pair) {
    return _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32((int)0xFFFF0000)));
}

TARGET static inline __attribute__((always_inline)) void tile_wide(const Product *p, int tile, int first, const int count) {
    const Matrix *m = p->matrix;
    int pairs = m->columns / 2;
    const uint16_t *weights = (const uint16_t *)m->data + (size_t)tile * TILE * m->columns;
    const float *x = p->tokens->wide + (size_t)first * m->columns;
    __m512 even[TOKENS], odd[TOKENS];
    for (int t = 0; t < count; t++)
        even[t] = odd[t] = _mm512_setzero_ps();
    for (int pair = 0; pair < pairs; pair++) {
        __m512i w = _mm512_loadu_si512(weights + (size_t)pair * 2 * TILE);
        __m512 one = first_of(w), two = second_of(w);
#pragma GCC unroll 8
        for (int t = 0; t < count; t++) {
            even[t] = _mm512_fmadd_ps(one, _mm512_set1_ps(x[(size_t)t * m->columns + 2 * pair]), even[t]);
            odd[t] = _mm512_fmadd_ps(two, _mm512_set1_ps(x[(size_t)t * m->columns + 2 * pair + 1]), odd[t]);
        }
    }
    for (int t = 0; t < count; t++)
        _mm512_storeu_ps(p->out + (size_t)(first + t) * m->rows + tile * TILE, _mm512_add_ps(even[t], odd[t]));
}

TARGET static void tile_bfloat16(const Product *p, int tile, int first, int count) {
    if (count == TOKENS)
        tile_wide(p, tile, first, TOKENS);
    else if (count > 1)
        tile_wide(p, tile, first, count);
    else { /* eight sums side by side: one alone would wait for itself */
        const Matrix *m = p->matrix;
        const uint16_t *weights = (const uint16_t *)m->data + (size_t)tile * TILE * m->columns;
        const float *x = p->tokens->wide + (size_t)first * m->columns;
        __m512 sum[8];
        for (int i = 0; i < 8; i++)
            sum[i] = _mm512_setzero_ps();
        for (int column = 0; column < m->columns; column += 8) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const uint16_t *own = weights + (size_t)(column + 2 * i) * TILE;
                _mm_prefetch((const char *)(own + 1024), _MM_HINT_T0);
                __m512i w = _mm512_loadu_si512(own);
                sum[2 * i] = _mm512_fmadd_ps(first_of(w), _mm512_set1_ps(x[column + 2 * i]), sum[2 * i]);
                sum[2 * i + 1] = _mm512_fmadd_ps(second_of(w), _mm512_set1_ps(x[column + 2 * i + 1]), sum[2 * i + 1]);
            }
        }
        for (int i = 0; i < 4; i++)
            sum[i] = _mm512_add_ps(sum[i], sum[i + 4]);
        sum[0] = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
        _mm512_storeu_ps(p->out + (size_t)first * m->rows + tile * TILE, sum[0]);
    }
}

TARGET static inline __m512 halves(const uint16_t *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}

/* One block of 32 columns, unpacked: eight vectors of 16 rows x 4 numbers. */
TARGET static inline void unpack(int kind, const uint8_t *from, __m512i to[8]) {
    if (kind == INT8) {
        for (int i = 0; i < 8; i++)
            to[i] = _mm512_loadu_si512(from + 64 * i);
        return;
    }
    const __m512i low = _mm512_set1_epi8(15);
    for (int i = 0; i < 4; i++) {
        __m512i both = _mm512_loadu_si512(from + 64 * i);
        to[2 * i] = _mm512_and_si512(both, low);
        to[2 * i + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    }
}

TARGET static inline __attribute__((always_inline)) void tile_whole(
    const Product *p, int tile, int first, int count, const int kind) {
    const Matrix *m = p->matrix;
    const Tokens *tokens = p->tokens;
    int blocks = m->columns / BLOCK;
    size_t block_bytes = kind == INT4 ? 4 * 64 : 8 * 64;
    const uint8_t *weights = (const uint8_t *)m->data + (size_t)tile * blocks * block_bytes;
    const uint16_t *scales = m->scales + (size_t)tile * blocks * TILE;
    const uint16_t *least = kind == INT4 ? m->least + (size_t)tile * blocks * TILE : NULL;
    __m512 sum[TOKENS];
    for (int t = 0; t < count; t++)
        sum[t] = _mm512_setzero_ps();
    for (int block = 0; block < blocks; block++) {
        __m512i w[8];
        const uint8_t *own = weights + block * block_bytes;
        for (int line = 0; line < (int)block_bytes; line += 64)
            _mm_prefetch((const char *)(own + 2048 + line), _MM_HINT_T0);
        unpack(kind, own, w);
        __m512 scale = halves(scales + block * TILE);
        __m512 under = kind == INT4 ? halves(least + block * TILE) : _mm512_mul_ps(scale, _mm512_set1_ps(-128.0f));
        for (int t = 0; t < count; t++) {
            const int32_t *x = (const int32_t *)(tokens->whole + (size_t)(first + t) * m->columns + block * BLOCK);
            __m512i a = _mm512_setzero_si512(), b = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int i = 0; i < 8; i += 2) {
                a = _mm512_dpbusd_epi32(a, w[i], _mm512_set1_epi32(x[i]));
                b = _mm512_dpbusd_epi32(b, w[i + 1], _mm512_set1_epi32(x[i + 1]));
            }
            size_t at = (size_t)(first + t) * blocks + block;
            __m512 made = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(a, b)), _mm512_set1_ps(tokens->scales[at]));
            sum[t] = _mm512_fmadd_ps(made, scale, sum[t]);
            sum[t] = _mm512_fmadd_ps(under, _mm512_set1_ps(tokens->sums[at]), sum[t]);
        }
    }
    for (int t = 0; t < count; t++)
        _mm512_storeu_ps(p->out + (size_t)(first + t) * m->rows + tile * TILE, sum[t]);
}

TARGET static void tile_int8(const Product *p, int tile, int first, int count) { tile_whole(p, tile, first, count, INT8); }
TARGET static void tile_int4(const Product *p, int tile, int first, int count) { tile_whole(p, tile, first, count, INT4); }

static void product_chunk(void *context, int chunk) {
    const Product *p = context;
    int tiles = p->matrix->rows / TILE, from = chunk * p->tiles_a_chunk;
    int to = from + p->tiles_a_chunk < tiles ? from + p->tiles_a_chunk : tiles;
    void (*one)(const Product *, int, int, int) =
        p->matrix->kind == BFLOAT16 ? tile_bfloat16 : p->matrix->kind == INT8 ? tile_int8 : tile_int4;
    for (int tile = from; tile < to; tile++)
        for (int first = 0; first < p->tokens->tokens; first += TOKENS) {
            int left = p->tokens->tokens - first;
            one(p, tile, first, left < TOKENS ? left : TOKENS);
        }
}

static void multiply(const Matrix *matrix, const Tokens *tokens, float *out) {
    int tiles = matrix->rows / TILE, chunks = pool.helpers ? 4 * (pool.helpers + 1) : 1;
    int each = (tiles + chunks - 1) / chunks;
    Product product = {matrix, tokens, out, each};
    share(product_chunk, &product, (tiles + each - 1) / each);
}

/* float32 [tokens, columns] as a matrix of this kind wants it. `room` holds at least tokens x (3 x columns) bytes. */
TARGET static Tokens prepared(int kind, const float *from, int tokens, int columns, uint8_t *room) {
    Tokens made = {tokens, NULL, NULL, NULL, NULL};
    if (kind == BFLOAT16) {
        made.wide = from;
        return made;
    }
    int blocks = columns / BLOCK;
    float *scales = (float *)room, *sums = scales + (size_t)tokens * blocks;
    int8_t *whole = (int8_t *)(sums + (size_t)tokens * blocks);
    for (size_t block = 0; block < (size_t)tokens * blocks; block++) {
        __m512 a = _mm512_loadu_ps(from + block * BLOCK), b = _mm512_loadu_ps(from + block * BLOCK + 16);
        float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
        float scale = most / 127.0f, back = most > 0 ? 127.0f / most : 0.0f;
        __m512i wa = _mm512_cvtps_epi32(_mm512_mul_ps(a, _mm512_set1_ps(back)));
        __m512i wb = _mm512_cvtps_epi32(_mm512_mul_ps(b, _mm512_set1_ps(back)));
        _mm_storeu_si128((__m128i *)(whole + block * BLOCK), _mm512_cvtsepi32_epi8(wa));
        _mm_storeu_si128((__m128i *)(whole + block * BLOCK + 16), _mm512_cvtsepi32_epi8(wb));
        scales[block] = scale;
        sums[block] = scale * (float)_mm512_reduce_add_epi32(_mm512_add_epi32(wa, wb));
    }
    made.whole = whole;
    made.scales = scales;
    made.sums = sums;
    return made;
}

/* out [tokens, rows] = tokens [tokens, columns] times the matrix, all float32. `room`: see `prepared`. */
void ranvier_multiply(const Matrix *matrix, const float *from, int tokens, float *out, uint8_t *room) {
    begin();
    Tokens ready = prepared(matrix->kind, from, tokens, matrix->columns, room);
    multiply(matrix, &ready, out);
    end();
}

/* -- a decoding step through llama's blocks -------------------------------------------------------------------------------- */

typedef struct {
    Matrix qkv, out, up, down;
    const float *norm_in, *norm_mid, *qkv_bias; /* the bias may be NULL */
    int32_t window;                            /* positions that a token sees; 0: all */
} Layer;

typedef struct {
    int32_t layers, hidden, heads, kv_heads, width, inner;
    float eps, scale;
    const Layer *layer;
} Group;

/* One token of one session: its position, and the caches [layers, kv heads, capacity, width], bfloat16. */
typedef struct {
    uint16_t *keys, *values;
    int64_t position, capacity;
    const float *cosine, *sine; /* [width] of its position */
} Row;

TARGET static void normed(const float *from, const float *weight, int width, float eps, float *to) {
    __m512 square = _mm512_setzero_ps();
    for (int i = 0; i < width; i += 16) {
        __m512 x = _mm512_loadu_ps(from + i);
        square = _mm512_fmadd_ps(x, x, square);
    }
    __m512 factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(square) / (float)width + eps));
    for (int i = 0; i < width; i += 16)
        _mm512_storeu_ps(to + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(from + i), factor), _mm512_loadu_ps(weight + i)));
}

/* e^x, relative error under 2e-7 for x <= 0: 2^n times a polynomial in the rest (Cephes' expf). */
TARGET static inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
    y = _mm512_fmadd_ps(y, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(y, n);
}

typedef struct {
    const Group *group;
    const Row *rows;
    int layer;
    float *qkv;      /* [tokens, heads + 2 x kv heads, width] */
    float *attended; /* [tokens, heads, width] */
    float *scores;   /* for each chunk [heads a kv head, longest] */
    int64_t longest;
} Attention;

TARGET static inline __m512 widened(const uint16_t *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

/* One token and one key-value head: turn, remember, attend. */
TARGET static void attend_chunk(void *context, int chunk) {
    const Attention *a = context;
    const Group *g = a->group;
    int token = chunk / g->kv_heads, head = chunk % g->kv_heads, width = g->width, half = width / 2;
    int queries = g->heads / g->kv_heads;
    const Row *row = &a->rows[token];
    float *own = a->qkv + (size_t)token * (g->heads + 2 * g->kv_heads) * width;
    float *key = own + (size_t)(g->heads + head) * width, *value = own + (size_t)(g->heads + g->kv_heads + head) * width;
    size_t cache = ((size_t)a->layer * g->kv_heads + head) * row->capacity * width;
    uint16_t *keys = row->keys + cache, *values = row->values + cache;
    for (int turned = -1; turned < queries; turned++) {
        float *x = turned < 0 ? key : own + (size_t)(head * queries + turned) * width;
        for (int i = 0; i < half; i += 16) {
            __m512 low = _mm512_loadu_ps(x + i), high = _mm512_loadu_ps(x + half + i);
            __m512 c0 = _mm512_loadu_ps(row->cosine + i), s0 = _mm512_loadu_ps(row->sine + i);
            __m512 c1 = _mm512_loadu_ps(row->cosine + half + i), s1 = _mm512_loadu_ps(row->sine + half + i);
            _mm512_storeu_ps(x + i, _mm512_fnmadd_ps(high, s0, _mm512_mul_ps(low, c0)));
            _mm512_storeu_ps(x + half + i, _mm512_fmadd_ps(low, s1, _mm512_mul_ps(high, c1)));
        }
    }
    for (int i = 0; i < width; i += 16) {
        _mm256_storeu_si256((__m256i *)(keys + row->position * width + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(key + i)));
        _mm256_storeu_si256(
            (__m256i *)(values + row->position * width + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(value + i)));
    }
    int64_t window = g->layer[a->layer].window, first = 0, end = row->position + 1;
    if (window && end > window)
        first = end - window;
    int64_t count = end - first;
    float *scores = a->scores + (size_t)chunk * queries * a->longest;
    for (int q = 0; q < queries; q++) {
        const float *query = own + (size_t)(head * queries + q) * width;
        float *mine = scores + (size_t)q * a->longest;
        for (int64_t p = 0; p < count; p++) {
            const uint16_t *k = keys + (first + p) * width;
            __m512 sum = _mm512_setzero_ps();
            for (int i = 0; i < width; i += 16)
                sum = _mm512_fmadd_ps(_mm512_loadu_ps(query + i), widened(k + i), sum);
            mine[p] = _mm512_reduce_add_ps(sum) * g->scale;
        }
        float most = -INFINITY;
        for (int64_t p = 0; p < count; p++)
            most = mine[p] > most ? mine[p] : most;
        __m512 total = _mm512_setzero_ps();
        for (int64_t p = 0; p < count; p += 16) {
            __mmask16 there = count - p < 16 ? (__mmask16)((1u << (count - p)) - 1) : 0xFFFF;
            __m512 e = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(there, mine + p), _mm512_set1_ps(most)));
            e = _mm512_maskz_mov_ps(there, e);
            _mm512_mask_storeu_ps(mine + p, there, e);
            total = _mm512_add_ps(total, e);
        }
        float part = 1.0f / _mm512_reduce_add_ps(total);
        float *to = a->attended + ((size_t)token * g->heads + head * queries + q) * width;
        for (int i = 0; i < width; i += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t p = 0; p < count; p++)
                sum = _mm512_fmadd_ps(_mm512_set1_ps(mine[p]), widened(values + (first + p) * width + i), sum);
            _mm512_storeu_ps(to + i, _mm512_mul_ps(sum, _mm512_set1_ps(part)));
        }
    }
}

TARGET static void added(float *to, const float *more, size_t count) {
    for (size_t i = 0; i < count; i += 16)
        _mm512_storeu_ps(to + i, _mm512_add_ps(_mm512_loadu_ps(to + i), _mm512_loadu_ps(more + i)));
}

/* Bytes that `ranvier_decode` needs for so many tokens, the longest of `longest` positions. */
int64_t ranvier_room(const Group *g, int tokens, int64_t longest) {
    int64_t wide = g->heads * g->width > g->hidden ? g->heads * g->width : g->hidden;
    int64_t floats = g->hidden + wide + (g->heads + 2 * g->kv_heads) * g->width + g->heads * g->width + 3 * g->inner +
                     g->heads * longest;
    int64_t columns = g->inner > wide ? g->inner : wide;
    return tokens * (4 * floats + 3 * columns) + 4096;
}

/* hidden [tokens, hidden], float32, through all layers in place; the caches grow by one position each. */
TARGET void ranvier_decode(const Group *g, const Row *rows, int tokens, float *hidden, int64_t longest, uint8_t *room) {
    size_t H = g->hidden, Q = (size_t)g->heads * g->width, KV = (size_t)(g->heads + 2 * g->kv_heads) * g->width;
    float *norm = (float *)room, *qkv = norm + tokens * (H > Q ? H : Q), *attended = qkv + tokens * KV;
    float *inner = attended + tokens * Q, *gated = inner + (size_t)tokens * 2 * g->inner;
    float *made = gated + (size_t)tokens * g->inner, *scores = made + tokens * H;
    uint8_t *rest = (uint8_t *)(scores + (size_t)tokens * g->heads * longest);
    begin();
    for (int index = 0; index < g->layers; index++) {
        const Layer *layer = &g->layer[index];
        for (int t = 0; t < tokens; t++)
            normed(hidden + t * H, layer->norm_in, g->hidden, g->eps, norm + t * H);
        Tokens ready = prepared(layer->qkv.kind, norm, tokens, g->hidden, rest);
        multiply(&layer->qkv, &ready, qkv);
        if (layer->qkv_bias)
            for (int t = 0; t < tokens; t++)
                added(qkv + t * KV, layer->qkv_bias, KV);
        Attention attention = {g, rows, index, qkv, attended, scores, longest};
        share(attend_chunk, &attention, tokens * g->kv_heads);
        ready = prepared(layer->out.kind, attended, tokens, (int)Q, rest);
        multiply(&layer->out, &ready, made);
        added(hidden, made, tokens * H);
        for (int t = 0; t < tokens; t++)
            normed(hidden + t * H, layer->norm_mid, g->hidden, g->eps, norm + t * H);
        ready = prepared(layer->up.kind, norm, tokens, g->hidden, rest);
        multiply(&layer->up, &ready, inner);
        for (int t = 0; t < tokens; t++)
            for (int i = 0; i < g->inner; i += 16) {
                __m512 gate = _mm512_loadu_ps(inner + (size_t)t * 2 * g->inner + i);
                __m512 up = _mm512_loadu_ps(inner + (size_t)t * 2 * g->inner + g->inner + i);
                __m512 open = _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(),
                    _mm512_min_ps(_mm512_max_ps(gate, _mm512_set1_ps(-80.0f)), _mm512_set1_ps(80.0f)))));
                _mm512_storeu_ps(gated + (size_t)t * g->inner + i, _mm512_mul_ps(_mm512_div_ps(gate, open), up));
            }
        ready = prepared(layer->down.kind, gated, tokens, g->inner, rest);
        multiply(&layer->down, &ready, made);
        added(hidden, made, tokens * H);
    }
    end();
}
