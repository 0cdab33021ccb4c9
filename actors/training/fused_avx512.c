// flags: -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16
/* Compile fused.c for AVX-512. No operation of bfloat16 is called here: the flag is for vectors_avx512.h. */

#include "fused.c"

int ranvier_supported(void) {
    __builtin_cpu_init();
    int all = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512dq");
    return all ? 512 : 0;
}
