// flags: -mavx2 -mfma -mf16c
/* Compile fused.c for AVX2. */

#include "fused.c"

int ranvier_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? 256 : 0;
}
