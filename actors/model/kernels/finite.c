/* Look for NaN and infinity: numbers whose exponent has all bits set.

   Included by the file of each instruction set: see product.h. */

/* Return 1 if all `count` numbers are finite. `exponent` has the bits of the exponent, in numbers of 16 bits (bfloat16, float16)
   or, if `wide`, of 32 bits (float32). */
int ranvier_finite(const void *numbers, int64_t count, int wide, uint32_t exponent) {
    uint32_t found = 0;
    if (wide) {
        const uint32_t *of = numbers;
        for (int64_t i = 0; i < count; i++) found |= (of[i] & exponent) == exponent;
    } else {
        const uint16_t *of = numbers, all = (uint16_t)exponent;
        for (int64_t i = 0; i < count; i++) found |= (uint16_t)(of[i] & all) == all;
    }
    return !found;
}
