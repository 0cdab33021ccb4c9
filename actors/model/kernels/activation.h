/* Compute activations of sixteen numbers at a time. */

#ifndef RANVIER_ACTIVATION_H
#define RANVIER_ACTIVATION_H

#include "vectors.h"

enum { SILU, GELU_TANH, GELU, RELU };

/* Multiply the numbers by how far the activation lets them through. */
INLINE F let_through(F x, int activation) {
    if (activation == RELU)
        return f_max(f_zero(), x); /* in this order NaN stays NaN */
    F steep = x;
    if (activation == GELU) { /* x times the normal distribution function: Abramowitz and Stegun 7.1.26, within 1.5e-7 */
        F far = f_mul(f_abs(x), f_all(0.70710678118654752f));
        F t = f_div(f_all(1.0f), f_fma(far, f_all(0.3275911f), f_all(1.0f)));
        F y = f_fma(t, f_all(1.061405429f), f_all(-1.453152027f));
        y = f_fma(t, y, f_all(1.421413741f));
        y = f_fma(t, y, f_all(-0.284496736f));
        y = f_mul(t, f_fma(t, y, f_all(0.254829592f)));
        F tail = f_mul(f_mul(y, f_exp(f_sub(f_zero(), f_mul(far, far)))), f_all(0.5f)); /* beyond -|x| */
        return f_less(f_abs(x), tail, f_max(f_zero(), x));
    }
    if (activation == GELU_TANH) /* x times the logistic function of this */
        steep = f_mul(f_mul(x, f_all(1.5957691216057308f)), f_fma(f_mul(x, x), f_all(0.044715f), f_all(1.0f)));
    F near = f_min(f_all(80.0f), f_max(f_all(-80.0f), steep));
    return f_div(x, f_add(f_all(1.0f), f_exp(f_sub(f_zero(), near))));
}

#endif
