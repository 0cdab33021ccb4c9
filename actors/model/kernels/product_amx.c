// flags: -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx512vnni -mamx-tile -mamx-bf16 -mamx-int8
/* Multiply with the tiles of AMX: all of bfloat16, and whole numbers with several tokens. The rest is AVX-512. */

#define TOKENS 8
#define FOUR_TILES 2
#define AMX

#include "product.h"

#include "whole_avx512.h"

#include "amx_product.h"

#include <cpuid.h>

int ranvier_supported(void) {
    unsigned a, b, c, d;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni") || !__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return 0;
    unsigned tiles = 1u << 24, bfloat16 = 1u << 22, whole = 1u << 25, all = tiles | bfloat16 | whole;
    return (d & all) == all && amx_permitted() ? 1024 : 0;
}

#include "multiply.c"
#include "pack.c"
#include "attend.c"
#include "finite.c"
#include "step.c"
