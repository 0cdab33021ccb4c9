/* Compute with sixteen numbers at a time: one register with AVX-512, two with AVX2. The shared kernels use these
   functions, and are compiled for each instruction set.

   Each function stands for one or a few instructions. Nothing here depends on weights or tokens. */

#ifndef RANVIER_VECTORS_H
#define RANVIER_VECTORS_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

#ifdef __AVX512F__
#include "vectors_avx512.h"
#else
#include "vectors_avx2.h"
#endif

INLINE F f_zero(void) { return f_all(0.0f); }

/* Return e^x, with a relative error under 2e-7 for x <= 0: 2^n times a polynomial in the rest (Cephes' expf). */
INLINE F f_exp(F x) {
    x = f_max(f_all(-87.0f), x); /* in this order NaN stays NaN */
    F n = f_round(f_mul(x, f_all(1.44269504088896341f)));
    F r = f_less(n, f_all(0.693359375f), x);
    r = f_less(n, f_all(-2.12194440e-4f), r);
    F y = f_all(1.9875691500e-4f);
    y = f_fma(y, r, f_all(1.3981999507e-3f));
    y = f_fma(y, r, f_all(8.3334519073e-3f));
    y = f_fma(y, r, f_all(4.1665795894e-2f));
    y = f_fma(y, r, f_all(1.6666665459e-1f));
    y = f_fma(y, r, f_all(5.0000001201e-1f));
    y = f_fma(y, f_mul(r, r), f_add(r, f_all(1.0f)));
    return f_mul(y, f_power_of_two(n));
}

/* Return 2^x, with a relative error under 2e-7 for x <= 0 (Cephes' exp2f). It is at least 2^-125. */
INLINE F f_exp2(F x) {
    x = f_max(f_all(-125.0f), x);
    F n = f_round(x), r = f_sub(x, n);
    F y = f_all(1.535336188319500e-4f);
    y = f_fma(y, r, f_all(1.339887440266574e-3f));
    y = f_fma(y, r, f_all(9.618437357674640e-3f));
    y = f_fma(y, r, f_all(5.550332471162809e-2f));
    y = f_fma(y, r, f_all(2.402264791363012e-1f));
    y = f_fma(y, r, f_all(6.931472028550421e-1f));
    return f_mul(f_fma(y, r, f_all(1.0f)), f_power_of_two(n));
}

#endif

