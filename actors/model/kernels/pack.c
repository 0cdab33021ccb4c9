/* Write matrices as tiles (product.h): from bfloat16, from whole numbers, and from GGUF's blocks as they lie in a file.

   Included by the file of each instruction set. */

/* Write some rows of a packed matrix, [count, columns] in float32 or, if `narrow`, rounded to bfloat16. */
void ranvier_rows(const Matrix *matrix, const int64_t *rows, int count, int narrow, void *to) {
    int columns = matrix->columns, blocks = columns / BLOCK, step = matrix->kind == INT4 ? 8 : 4;
    for (int i = 0; i < count; i++)
        for (int block = 0; block < blocks; block++) {
            size_t tile = rows[i] / TILE, row = rows[i] % TILE, place = (tile * blocks + block) * TILE + row;
            float wide[BLOCK];
            if (matrix->kind == BFLOAT16) {
                const uint16_t *own = (const uint16_t *)matrix->data + (tile * columns + block * BLOCK) * TILE + 2 * row;
                for (int n = 0; n < BLOCK; n++) {
                    uint32_t bits = (uint32_t)own[n / 2 * 2 * TILE + n % 2] << 16;
                    memcpy(wide + n, &bits, 4);
                }
            } else {
                float scale = _cvtsh_ss(matrix->scales[place]);
                float under = matrix->kind == INT4 ? _cvtsh_ss(matrix->least[place]) : -128.0f * scale;
                const uint8_t *own = (const uint8_t *)matrix->data + ((tile * columns + block * BLOCK) / step * TILE + row) * 4;
                for (int at = 0; at < BLOCK; at += step, own += TILE * 4)
                    for (int n = 0; n < step; n++) /* the product has at most 19 bits, so nothing is rounded twice */
                        wide[at + n] = scale * (float)(step == 4 ? own[n] : n < 4 ? own[n] & 15 : own[n - 4] >> 4) + under;
            }
            size_t at = (size_t)i * columns + block * BLOCK;
            if (narrow) {
                f_to_bfloat16((uint16_t *)to + at, f_load(wide));
                f_to_bfloat16((uint16_t *)to + at + 16, f_load(wide + 16));
            } else
                memcpy((float *)to + at, wide, sizeof wide);
        }
}

/* Write bfloat16 [rows, columns] as tiles. */
void ranvier_pack_bfloat16(const uint16_t *from, int rows, int columns, uint16_t *to) {
    for (int tile = 0; tile < rows / TILE; tile++)
        for (int pair = 0; pair < columns / 2; pair++)
            for (int row = 0; row < TILE; row++) {
                const uint16_t *two = from + (size_t)(tile * TILE + row) * columns + 2 * pair;
                *to++ = two[0];
                *to++ = two[1];
            }
}

/* Write whole numbers [rows, columns] as tiles: from 0 to 255 for int8 (the number plus 128), from 0 to 15 for int4. */
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

/* Read one block of GGUF: its numbers as unsigned integers (Q8_0: the number plus 128), its scale and its least value. */
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

/* Write blocks [rows, columns] as tiles of int8 (Q8_0) or int4, and their scales and least values as tiles of float16.
   `order` names the file's row for each row; NULL means that the order is the same. */
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

/* Write blocks [rows, columns] as bfloat16, as tiles or row by row. `order`: see `ranvier_pack_blocks`. */
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
                for (int i = 0; i < BLOCK; i++) /* the product has at most 19 bits, so nothing is rounded twice */
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
