/* Products of weights with tokens, and whole steps through blocks of llama's kind, for processors with AVX2 or AVX-512 (vectors.h).

   Weights lie in tiles of 16 rows, so that one vector holds the same columns of 16 rows: the sums of 16 rows grow side by
   side and are never added up across a vector. A tile of a group of columns holds, in order,

       bfloat16   for each pair of columns: 16 rows x 2 numbers
       int8       for each 32 columns: 8 vectors of 16 rows x 4 numbers (stored plus 128), 16 scales
       int4       for each 32 columns: 4 vectors of 16 rows x 8 numbers (columns 0-3 in the low halves of the bytes, 4-7 in the
                  high ones), 16 scales, 16 least values

   with scales and least values as float16 in a block of their own. Quantised weights are multiplied with tokens that are
   rounded to int8 in blocks of 32, as llama.cpp does. Keys are cached as tiles of bfloat16, too: 16 positions are the rows,
   so that the scores of a query are a product like any other. No Python here: called through ctypes, which lets go of the
   interpreter meanwhile. */

#include "vectors.h"

#include <cpuid.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILE 16
#define BLOCK 32
#ifdef __AVX512F__
#define TOKENS 8 /* whose sums are held in registers at once: a vector for each, or two */
#define SPLIT 8  /* up to so many tokens have two, lest a sum wait for itself */
#define PAIRS 16 /* the same of tokens that are multiplied by two columns at a time */
#else
#define TOKENS 5
#define SPLIT 3
#define PAIRS 1 /* none here */
#endif
#define QUERIES 24  /* of one key-value head that go through the cache together */
#define TOGETHER 96 /* tokens that a product takes at a time: they stay near while the weights pass */
#define COLUMNS 256

/* `call` with N for a count from 1 to TOKENS, compiled for each: so many sums stay in registers. */
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

/* A packed matrix. `data` holds the numbers, `scales` [rows / 16][columns / 32][16], float16, and for int4
   `least` the same. */
typedef struct {
    int32_t kind, rows, columns;
    const void *data;
    const uint16_t *scales, *least;
} Matrix;

int ranvier_supported(void) {
    __builtin_cpu_init();
#ifdef __AVX512F__
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vnni");
#else
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
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

/* -- from GGUF's blocks of 32 numbers, as they lie in the file ----------------------------------------------------------- */

enum { Q4_0 = 0, Q4_1 = 1, Q8_0 = 2 };
static const int STORED_BYTES[] = {18, 20, 34};

/* One block as whole numbers from 0 on (Q8_0: plus 128), its scale and its least value. */
INLINE void whole_block(int kind, const uint8_t *from, uint8_t to[BLOCK], uint16_t *scale, uint16_t *least) {
    memcpy(scale, from, 2);
    if (kind == Q8_0) {
        for (int i = 0; i < BLOCK; i++)
            to[i] = from[2 + i] ^ 128;
        return;
    }
    if (kind == Q4_1)
        memcpy(least, from + 2, 2);
    else
        *least = _cvtss_sh(-8.0f * _cvtsh_ss(*scale), 0);
    const uint8_t *halves = from + (kind == Q4_1 ? 4 : 2);
    for (int i = 0; i < 16; i++) {
        to[i] = halves[i] & 15;
        to[i + 16] = halves[i] >> 4;
    }
}

/* Blocks [rows, columns] into tiles of int8 (Q8_0) or int4, with their scales and least values as float16 in tiles, too. `order`
   says which of the file's rows is each row; NULL: the same. */
void ranvier_pack_blocks(
    const uint8_t *from, int kind, int rows, int columns, const int32_t *order, uint8_t *to, uint16_t *scales, uint16_t *least) {
    size_t blocks = columns / BLOCK, line = blocks * STORED_BYTES[kind];
    int wide = kind == Q8_0;
    for (int tile = 0; tile < rows / TILE; tile++)
        for (size_t block = 0; block < blocks; block++) {
            size_t place = tile * blocks + block;
            uint8_t *data = to + place * (wide ? 512 : 256);
            for (int row = 0; row < TILE; row++) {
                size_t source = order ? (size_t)order[tile * TILE + row] : (size_t)tile * TILE + row;
                uint8_t whole[BLOCK];
                uint16_t none;
                whole_block(
                    kind, from + source * line + block * STORED_BYTES[kind], whole, scales + place * TILE + row,
                    wide ? &none : least + place * TILE + row);
                for (int step = 0; step < BLOCK; step += wide ? 4 : 8)
                    for (int i = 0; i < 4; i++)
                        data[(step / (wide ? 4 : 8) * TILE + row) * 4 + i] =
                            wide ? whole[step + i] : whole[step + i] | whole[step + i + 4] << 4;
            }
        }
}

/* Blocks [rows, columns] as bfloat16: into tiles, or row by row as they come. */
void ranvier_read_blocks(
    const uint8_t *from, int kind, int rows, int columns, const int32_t *order, int tiled, uint16_t *to) {
    size_t blocks = columns / BLOCK, line = blocks * STORED_BYTES[kind];
    for (int tile = 0; tile < (rows + TILE - 1) / TILE; tile++)
        for (size_t block = 0; block < blocks; block++)
            for (int row = 0; row < TILE && tile * TILE + row < rows; row++) {
                size_t own = (size_t)tile * TILE + row, source = order ? (size_t)order[own] : own;
                uint8_t whole[BLOCK];
                uint16_t scale, least = 0;
                whole_block(kind, from + source * line + block * STORED_BYTES[kind], whole, &scale, &least);
                float wide[BLOCK], by = _cvtsh_ss(scale), under = kind == Q8_0 ? -128.0f * by : _cvtsh_ss(least);
                for (int i = 0; i < BLOCK; i++) /* the product has 19 bits at the most, so that nothing is rounded twice */
                    wide[i] = by * (float)whole[i] + under;
                uint16_t narrow[BLOCK];
                f_to_bfloat16(narrow, f_load(wide));
                f_to_bfloat16(narrow + 16, f_load(wide + 16));
                if (!tiled) {
                    memcpy(to + own * columns + block * BLOCK, narrow, sizeof narrow);
                    continue;
                }
                uint16_t *pairs = to + (size_t)tile * TILE * columns + block * BLOCK * TILE + 2 * row;
                for (int pair = 0; pair < BLOCK / 2; pair++)
                    memcpy(pairs + pair * 2 * TILE, narrow + 2 * pair, 4);
            }
}

/* -- products ----------------------------------------------------------------------------------------------------------- */

/* `count` rows of x times a tile of 16 rows of bfloat16, in addition to what is there if `more`. Products in float32 round nothing, and where the processor has its
   own of bfloat16 they are twice as fast as these, which start every other cycle. */
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

/* One row: four sums side by side, and the memory asked for early. */
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

/* Any number of rows up to TOKENS. */
static void tile_any(
    const uint16_t *tile, int columns, const float *x, size_t x_step, float *out, size_t out_step, int more, int count) {
    if (count == 1)
        tile_row(tile, columns, x, out, more);
    else
        BY_COUNT(count, tile_rows(tile, columns, x, x_step, out, out_step, more, N))
}

#ifdef __AVX512F__

/* The same with tokens that are rounded to bfloat16, two columns at a time, by the processor's own instruction. Where that
   starts twice a cycle (see `pairs`) it is half the work, or less: nothing has to be widened. */
INLINE void tile_pairs(
    const uint16_t *tile, int columns, const uint16_t *x, size_t x_step, float *out, size_t out_step, int more,
    const int count) {
    const int split = count <= 4 ? 4 : count <= 8 ? 2 : 1; /* sums side by side, lest one wait for itself */
    F sum[PAIRS][4];
    for (int t = 0; t < count; t++) {
        sum[t][0] = more ? f_load(out + t * out_step) : f_zero();
        for (int i = 1; i < split; i++)
            sum[t][i] = f_zero();
    }
    for (int column = 0; column < columns; column += 2 * split)
#pragma GCC unroll 4
        for (int i = 0; i < split; i++) {
            const uint16_t *own = tile + (size_t)(column + 2 * i) * TILE;
            _mm_prefetch((const char *)(own + 1024), _MM_HINT_T0);
            __m512bh weights = (__m512bh)_mm512_loadu_si512(own);
#pragma GCC unroll 16
            for (int t = 0; t < count; t++) {
                int32_t pair;
                memcpy(&pair, x + t * x_step + column + 2 * i, 4);
                sum[t][i] = _mm512_dpbf16_ps(sum[t][i], weights, (__m512bh)_mm512_set1_epi32(pair));
            }
        }
    for (int t = 0; t < count; t++) {
        F all = split > 1 ? f_add(sum[t][0], sum[t][1]) : sum[t][0];
        f_store(out + t * out_step, split == 4 ? f_add(all, f_add(sum[t][2], sum[t][3])) : all);
    }
}

static void pairs_any(
    const uint16_t *tile, int columns, const uint16_t *x, size_t x_step, float *out, size_t out_step, int more, int count) {
    if (count <= TOKENS)
        BY_COUNT(count, tile_pairs(tile, columns, x, x_step, out, out_step, more, N))
    else
        switch (count) {
            ONE_COUNT(9, tile_pairs(tile, columns, x, x_step, out, out_step, more, N))
            ONE_COUNT(10, tile_pairs(tile, columns, x, x_step, out, out_step, more, N))
            ONE_COUNT(11, tile_pairs(tile, columns, x, x_step, out, out_step, more, N))
            ONE_COUNT(12, tile_pairs(tile, columns, x, x_step, out, out_step, more, N))
            ONE_COUNT(13, tile_pairs(tile, columns, x, x_step, out, out_step, more, N))
            ONE_COUNT(14, tile_pairs(tile, columns, x, x_step, out, out_step, more, N))
            ONE_COUNT(15, tile_pairs(tile, columns, x, x_step, out, out_step, more, N))
            ONE_COUNT(16, tile_pairs(tile, columns, x, x_step, out, out_step, more, N))
        }
}

/* Whether the processor multiplies bfloat16 as fast as float32: AMD's from Zen 5 on. Before, and where it is not known, the
   instruction starts every other cycle. */
static int pairs(void) {
    static int known = -1;
    if (known < 0) {
        unsigned a, b, c, d;
        __cpuid(0, a, b, c, d);
        int amd = b == 0x68747541; /* "Auth" */
        __cpuid(1, a, b, c, d);
        known = amd && ((a >> 8) & 15) + ((a >> 20) & 255) >= 26;
    }
    return known;
}

#else

static int pairs(void) { return 0; }

#endif

/* How many of those that are left come next: at most so many, and not one alone at the end. */
static int next_of(int left, int most) {
    int times = (left + most - 1) / most;
    return (left + times - 1) / times;
}

static int next(int left) { return next_of(left, TOKENS); }

/* Tokens as the products want them. */
typedef struct {
    int tokens;
    const float *wide;      /* [tokens, columns], for bfloat16; or, where the processor has fast products of it, */
    const uint16_t *narrow; /* the same, rounded */
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

/* Tokens `first` to `end`. Of more than are summed at once, so many columns at a time that they, and the weights', stay in
   the nearest cache. */
static void tile_bfloat16(const Product *p, int tile, int first, int end) {
    const Matrix *m = p->matrix;
    size_t columns = m->columns, together = end - first > (p->tokens->narrow ? PAIRS : TOKENS) ? COLUMNS : columns;
    for (size_t column = 0; column < columns; column += together)
        for (int t = first, count; t < end; t += count) {
            const uint16_t *own = (const uint16_t *)m->data + (tile * columns + column) * TILE;
            int some = (int)(columns - column < together ? columns - column : together);
            float *out = p->out + (size_t)t * m->rows + tile * TILE;
#ifdef __AVX512F__
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

#ifdef __AVX512F__

/* One block of 32 columns, unpacked: eight vectors of 16 rows x 4 numbers. */
INLINE void unpack(int kind, const uint8_t *from, __m512i to[8]) {
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

INLINE void tile_whole(const Product *p, int tile, int first, const int count, const int kind) {
    const Matrix *m = p->matrix;
    const Tokens *tokens = p->tokens;
    int blocks = m->columns / BLOCK;
    size_t block_bytes = kind == INT4 ? 4 * 64 : 8 * 64;
    const uint8_t *weights = (const uint8_t *)m->data + (size_t)tile * blocks * block_bytes;
    const uint16_t *scales = m->scales + (size_t)tile * blocks * TILE;
    const uint16_t *least = kind == INT4 ? m->least + (size_t)tile * blocks * TILE : NULL;
    F sum[TOKENS];
    for (int t = 0; t < count; t++)
        sum[t] = f_zero();
    for (int block = 0; block < blocks; block++) {
        __m512i w[8];
        const uint8_t *own = weights + block * block_bytes;
        for (int line = 0; line < (int)block_bytes; line += 64)
            _mm_prefetch((const char *)(own + 2048 + line), _MM_HINT_T0);
        unpack(kind, own, w);
        F scale = f_from_half(scales + block * TILE);
        F under = kind == INT4 ? f_from_half(least + block * TILE) : f_mul(scale, f_all(-128.0f));
        for (int t = 0; t < count; t++) {
            const int32_t *x = (const int32_t *)(tokens->whole + (size_t)(first + t) * m->columns + block * BLOCK);
            __m512i a = _mm512_setzero_si512(), b = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int i = 0; i < 8; i += 2) {
                a = _mm512_dpbusd_epi32(a, w[i], _mm512_set1_epi32(x[i]));
                b = _mm512_dpbusd_epi32(b, w[i + 1], _mm512_set1_epi32(x[i + 1]));
            }
            size_t at = (size_t)(first + t) * blocks + block;
            F made = f_mul(_mm512_cvtepi32_ps(_mm512_add_epi32(a, b)), f_all(tokens->scales[at]));
            sum[t] = f_fma(made, scale, sum[t]);
            sum[t] = f_fma(under, f_all(tokens->sums[at]), sum[t]);
        }
    }
    for (int t = 0; t < count; t++)
        f_store(p->out + (size_t)(first + t) * m->rows + tile * TILE, sum[t]);
}

#else

/* 32 columns of 8 rows times as many of a token: one sum a row. */
INLINE __m256i block_int4(const __m256i w[8], const int32_t *x) {
    /* eight products of 15 x 127, twice: 30480, under what 16 bits hold */
    __m256i a = _mm256_maddubs_epi16(w[0], _mm256_set1_epi32(x[0])), b = _mm256_maddubs_epi16(w[1], _mm256_set1_epi32(x[1]));
#pragma GCC unroll 4
    for (int i = 2; i < 8; i += 2) {
        a = _mm256_add_epi16(a, _mm256_maddubs_epi16(w[i], _mm256_set1_epi32(x[i])));
        b = _mm256_add_epi16(b, _mm256_maddubs_epi16(w[i + 1], _mm256_set1_epi32(x[i + 1])));
    }
    return _mm256_madd_epi16(_mm256_add_epi16(a, b), _mm256_set1_epi16(1));
}

INLINE __m256i four_int8(__m256i w, int32_t four) {
    /* the weights without their signs, which go to the token's numbers: of these none is -128, which has no opposite */
    __m256i signed_x = _mm256_sign_epi8(_mm256_set1_epi32(four), w);
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), signed_x), _mm256_set1_epi16(1));
}

INLINE __m256i block_int8(const __m256i w[8], const int32_t *x) {
    __m256i a = four_int8(w[0], x[0]), b = four_int8(w[1], x[1]);
#pragma GCC unroll 4
    for (int i = 2; i < 8; i += 2) {
        a = _mm256_add_epi32(a, four_int8(w[i], x[i]));
        b = _mm256_add_epi32(b, four_int8(w[i + 1], x[i + 1]));
    }
    return _mm256_add_epi32(a, b);
}

/* Half a tile: the sums of 8 rows. */
INLINE void half_whole(const Product *p, int tile, const int half, int first, const int count, const int kind) {
    const Matrix *m = p->matrix;
    const Tokens *tokens = p->tokens;
    int blocks = m->columns / BLOCK;
    size_t block_bytes = kind == INT4 ? 4 * 64 : 8 * 64;
    const uint8_t *weights = (const uint8_t *)m->data + (size_t)tile * blocks * block_bytes + 32 * half;
    const uint16_t *scales = m->scales + (size_t)tile * blocks * TILE + 8 * half;
    const uint16_t *least = kind == INT4 ? m->least + (size_t)tile * blocks * TILE + 8 * half : NULL;
    __m256 sum[TOKENS];
    for (int t = 0; t < count; t++)
        sum[t] = _mm256_setzero_ps();
    for (int block = 0; block < blocks; block++) {
        __m256i w[8];
        const uint8_t *own = weights + block * block_bytes;
        if (!half)
            for (int line = 0; line < (int)block_bytes; line += 64)
                _mm_prefetch((const char *)(own + 2048 + line), _MM_HINT_T0);
        if (kind == INT4) {
            const __m256i low = _mm256_set1_epi8(15);
            for (int i = 0; i < 4; i++) {
                __m256i both = _mm256_loadu_si256((const __m256i *)(own + 64 * i));
                w[2 * i] = _mm256_and_si256(both, low);
                w[2 * i + 1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
            }
        } else {
            for (int i = 0; i < 8; i++) /* 128 less */
                w[i] = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(own + 64 * i)), _mm256_set1_epi8(-128));
        }
        __m256 scale = from_half(scales + block * TILE);
        for (int t = 0; t < count; t++) {
            const int32_t *x = (const int32_t *)(tokens->whole + (size_t)(first + t) * m->columns + block * BLOCK);
            size_t at = (size_t)(first + t) * blocks + block;
            __m256i whole = kind == INT4 ? block_int4(w, x) : block_int8(w, x);
            __m256 made = _mm256_mul_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(tokens->scales[at]));
            sum[t] = _mm256_fmadd_ps(made, scale, sum[t]);
            if (kind == INT4)
                sum[t] = _mm256_fmadd_ps(from_half(least + block * TILE), _mm256_set1_ps(tokens->sums[at]), sum[t]);
        }
    }
    for (int t = 0; t < count; t++)
        _mm256_storeu_ps(p->out + (size_t)(first + t) * m->rows + tile * TILE + 8 * half, sum[t]);
}

INLINE void tile_whole(const Product *p, int tile, int first, const int count, const int kind) {
    half_whole(p, tile, 0, first, count, kind);
    half_whole(p, tile, 1, first, count, kind);
}

#endif

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

/* -- what is done token by token ------------------------------------------------------------------------------------------ */

typedef struct {
    int32_t tokens;
    void (*one)(const void *context, int token);
    const void *context;
} Each;

static void each_chunk(void *context, int chunk) {
    const Each *e = context;
    int end = (chunk + 1) * 8 < e->tokens ? (chunk + 1) * 8 : e->tokens;
    for (int token = chunk * 8; token < end; token++)
        e->one(e->context, token);
}

/* Eight tokens a chunk: fewer are not worth a second thread. */
static void each(int tokens, void (*one)(const void *, int), const void *context) {
    Each e = {tokens, one, context};
    share(each_chunk, &e, (tokens + 7) / 8);
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

/* float32 [tokens, columns] as a matrix of this kind wants it. `room` holds at least tokens x (3 x columns) bytes. */
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

/* out [tokens, rows] = tokens [tokens, columns] times the matrix, all float32. `room`: see `prepared`. */
void ranvier_multiply(const Matrix *matrix, const float *from, int tokens, float *out, uint8_t *room) {
    begin();
    Tokens ready = prepared(matrix->kind, from, tokens, matrix->columns, room);
    multiply(matrix, &ready, out);
    end();
}

/* -- a step through a group of blocks ----------------------------------------------------------------------------------------- */

typedef struct {
    Matrix qkv, out, up, down;
    const float *norm_in, *norm_mid, *qkv_bias; /* the bias may be NULL, and so may all that follow */
    const float *norm_query, *norm_key;        /* of each head, before it is turned */
    const float *norm_attended, *norm_out;     /* of what attention and the feed-forward part give, before it is added */
    int32_t window;                            /* positions that a token sees; 0: all */
    int32_t local;                             /* which of a row's two rotary tables */
} Layer;

typedef struct {
    int32_t layers, hidden, heads, kv_heads, width, inner, gelu;
    float eps, scale;
    const Layer *layer;
} Group;

/* The next tokens of one session, the first at `position`, and its caches, bfloat16: keys in tiles of 16 positions
   [layers, kv heads, capacity / 16, width / 2, 16, 2], values [layers, kv heads, capacity, width]. */
typedef struct {
    uint16_t *keys, *values;
    int64_t position, capacity;
    const float *cosine[2], *sine[2]; /* [tokens, width] from its first position on; the second of layers that are local */
    int32_t tokens;
} Row;

/* Tokens of one row that attend together: `first` of the row, `at` of the step. */
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
    const float *weight; /* of the norm that is computed */
    const float *after;  /* of the norm of what is added; NULL: none */
    float *scores;       /* for each thread that attends [QUERIES, longest + width] */
    _Atomic int *taken;  /* which of these are in use */
} Step;

/* Divided by their root mean square, times a weight each. */
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
        if (s->group->gelu) /* its form by tanh is x times the logistic function of this */
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

/* All tokens of a span and one key-value head: turn queries and keys, remember keys and values. */
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

/* out [count, 16], more by the values of these positions, each times its share. */
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

/* Scores of positions `from` to `to` of one query, the first of them at `mine`, into shares: e^(score - most), nothing
   outside. Returns their sum. */
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
        mine[i] = 0; /* e^-87, the least that there is, is not nothing */
    for (int i = to; i < count; i++)
        mine[i] = 0;
    return f_sum(total);
}

/* All tokens of a span and one key-value head, whose queries go through the cache together. */
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

/* Bytes that `ranvier_step` needs for so many tokens, the longest session having `longest` positions after it. */
int64_t ranvier_room(const Group *g, int tokens, int64_t longest) {
    int64_t attended = (int64_t)g->heads * g->width, widest = attended > g->hidden ? attended : g->hidden;
    int64_t floats = 2 * g->hidden + (g->heads + 2 * g->kv_heads) * g->width + attended + 3 * g->inner;
    int64_t columns = g->inner > widest ? g->inner : widest;
    int64_t scores = (int64_t)(pool.helpers + 1) * QUERIES * (line_of(longest) + 2 * g->width);
    return tokens * (4 * floats + 3 * columns + (int64_t)sizeof(Span)) + 4 * scores + 64 * (pool.helpers + 1) + 4096;
}

/* hidden [tokens of all rows, hidden], float32, through all layers in place; the caches grow by each row's tokens. */
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
