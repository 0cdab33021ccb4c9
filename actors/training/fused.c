/* Compute the operations between the matrix products of a block, forward and backward, in one pass each. All numbers
   are float32, and rows are contiguous.

   Shape suffixes as in layers.py: T tokens, B sequences of S, H hidden, I inner width, D head width. The caller ensures
   that the widths H and I are multiples of 16, and D of 2. Included by fused_avx2.c and fused_avx512.c. */

#include <stddef.h>

#include "../model/kernels/vectors.h"

/* Compute out = x / rms(x) * (w + more), and keep 1 / rms of each row in `inverse`. */
void ranvier_rms(
    const float *x, const float *w, float eps, float more, float *out, float *inverse, int64_t rows, int64_t width) {
    for (int64_t t = 0; t < rows; t++, x += width, out += width) {
        F sum = f_zero();
        for (int64_t j = 0; j < width; j += 16) {
            F v = f_load(x + j);
            sum = f_fma(v, v, sum);
        }
        inverse[t] = 1.0f / sqrtf(f_sum(sum) / (float)width + eps);
        F scale = f_all(inverse[t]);
        for (int64_t j = 0; j < width; j += 16)
            f_store(out + j, f_mul(f_mul(f_load(x + j), scale), f_add(f_load(w + j), f_all(more))));
    }
}

/* Compute dx from the gradient g of out, and add to dw, which the caller sets to zero first. */
void ranvier_rms_back(
    const float *x, const float *w, float more, const float *inverse, const float *g, float *dx, float *dw, int64_t rows,
    int64_t width) {
    for (int64_t t = 0; t < rows; t++, x += width, g += width, dx += width) {
        F sum = f_zero(), scale = f_all(inverse[t]);
        for (int64_t j = 0; j < width; j += 16) {
            F gx = f_mul(f_load(g + j), f_load(x + j));
            sum = f_fma(gx, f_add(f_load(w + j), f_all(more)), sum);
            f_store(dw + j, f_fma(gx, scale, f_load(dw + j)));
        }
        F less = f_all(f_sum(sum) / (float)width * inverse[t] * inverse[t]);
        for (int64_t j = 0; j < width; j += 16) {
            F gw = f_mul(f_load(g + j), f_add(f_load(w + j), f_all(more)));
            f_store(dx + j, f_mul(scale, f_less(f_load(x + j), less, gw)));
        }
    }
}

/* Return 1 / (1 + e^-x); the exponent is at most 87, so that e^-x is finite. */
INLINE F sigmoid(F x) {
    return f_div(f_all(1.0f), f_add(f_all(1.0f), f_exp(f_min(f_all(87.0f), f_sub(f_zero(), x)))));
}

/* Compute out = silu(gate) * up; gate and up lie side by side in `inner` [T, 2 I]. */
void ranvier_swiglu(const float *inner, float *out, int64_t rows, int64_t width) {
    for (int64_t t = 0; t < rows; t++, inner += 2 * width, out += width)
        for (int64_t j = 0; j < width; j += 16) {
            F gate = f_load(inner + j);
            f_store(out + j, f_mul(f_mul(gate, sigmoid(gate)), f_load(inner + width + j)));
        }
}

void ranvier_swiglu_back(const float *inner, const float *g, float *dinner, int64_t rows, int64_t width) {
    for (int64_t t = 0; t < rows; t++, inner += 2 * width, dinner += 2 * width, g += width)
        for (int64_t j = 0; j < width; j += 16) {
            F gate = f_load(inner + j), up = f_load(inner + width + j), given = f_load(g + j), s = sigmoid(gate);
            F silu = f_mul(gate, s); /* its derivative is s + silu (1 - s) */
            f_store(dinner + j, f_mul(f_mul(given, up), f_fma(silu, f_sub(f_all(1.0f), s), s)));
            f_store(dinner + width + j, f_mul(given, silu));
        }
}

/* Rotate one head of one token by its position's angles: (x1, x2) -> (x1 c1 - x2 s1, x2 c2 + x1 s2). */
static void turn(
    const float *restrict x, const float *restrict c, const float *restrict s, float *restrict out, int64_t width) {
    int64_t half = width / 2;
    for (int64_t i = 0; i < half; i++) {
        out[i] = x[i] * c[i] - x[half + i] * s[i];
        out[half + i] = x[half + i] * c[half + i] + x[i] * s[half + i];
    }
}

static void turn_back(
    const float *restrict g, const float *restrict c, const float *restrict s, float *restrict dx, int64_t width) {
    int64_t half = width / 2;
    for (int64_t i = 0; i < half; i++) {
        dx[i] = g[i] * c[i] + g[half + i] * s[half + i];
        dx[half + i] = g[half + i] * c[half + i] - g[i] * s[i];
    }
}

static void copy(const float *restrict from, float *restrict to, int64_t width) {
    for (int64_t i = 0; i < width; i++)
        to[i] = from[i];
}

/* Split qkv [B S, heads + 2 kv, D] into query [B, heads, S, D], keys and values [B, kv, S, D]; rotate the first two. */
void ranvier_heads(
    const float *qkv, const float *cos, const float *sin, float *query, float *keys, float *values, int64_t batch,
    int64_t sequence, int64_t heads, int64_t kv, int64_t width) {
    for (int64_t b = 0; b < batch; b++)
        for (int64_t p = 0; p < sequence; p++) {
            const float *token = qkv + (b * sequence + p) * (heads + 2 * kv) * width;
            const float *c = cos + p * width, *s = sin + p * width;
            for (int64_t n = 0; n < heads; n++)
                turn(token + n * width, c, s, query + ((b * heads + n) * sequence + p) * width, width);
            for (int64_t n = 0; n < kv; n++) {
                int64_t at = ((b * kv + n) * sequence + p) * width;
                turn(token + (heads + n) * width, c, s, keys + at, width);
                copy(token + (heads + kv + n) * width, values + at, width);
            }
        }
}

void ranvier_heads_back(
    const float *dquery, const float *dkeys, const float *dvalues, const float *cos, const float *sin, float *dqkv,
    int64_t batch, int64_t sequence, int64_t heads, int64_t kv, int64_t width) {
    for (int64_t b = 0; b < batch; b++)
        for (int64_t p = 0; p < sequence; p++) {
            float *token = dqkv + (b * sequence + p) * (heads + 2 * kv) * width;
            const float *c = cos + p * width, *s = sin + p * width;
            for (int64_t n = 0; n < heads; n++)
                turn_back(dquery + ((b * heads + n) * sequence + p) * width, c, s, token + n * width, width);
            for (int64_t n = 0; n < kv; n++) {
                int64_t at = ((b * kv + n) * sequence + p) * width;
                turn_back(dkeys + at, c, s, token + (heads + n) * width, width);
                copy(dvalues + at, token + (heads + kv + n) * width, width);
            }
        }
}
