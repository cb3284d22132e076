/* Packing: from rows of codes to tiles of 16 outputs, byte order as in dots.h. */
#include <string.h>

#include "dots.h"
#include "linear.h"

static size_t code_bytes(int kind) { return kind == KIND_Q4 ? 256 : 512; }

static size_t tile_bytes(int kind, int blocks) {
    size_t bytes = (code_bytes(kind) + (kind == KIND_Q4 ? 64 : 32)) * (size_t)blocks;
    return (bytes + 63) / 64 * 64;
}

size_t matrix_bytes(int kind, int n, int k) { return tile_bytes(kind, k / BLOCK) * (size_t)((n + TILE - 1) / TILE); }

static void pack_lane(uint8_t *block, int kind, int lane, const uint8_t *codes) {
    for (int i = 0; i < BLOCK; i++) {
        int group = i / 4;
        if (kind == KIND_Q8) block[64 * group + 4 * lane + i % 4] = codes[i] ^ 0x80;
        else block[64 * (group % 4) + 4 * lane + i % 4] |= (uint8_t)((codes[i] & 15) << (group < 4 ? 0 : 4));
    }
}

void matrix_pack(Matrix *matrix, uint8_t *data, int kind, int n, int k, const void *codes, const uint16_t *scale,
                 const uint16_t *minimum) {
    const int blocks = k / BLOCK;
    *matrix = (Matrix){kind, n, k, blocks, tile_bytes(kind, blocks), data};
    memset(data, 0, matrix_bytes(kind, n, k));
    for (int row = 0; row < n; row++) {
        uint8_t *tile = data + matrix->tile_bytes * (size_t)(row / TILE);
        uint16_t *scales = (uint16_t *)(tile + code_bytes(kind) * (size_t)blocks);
        const int lane = row % TILE;
        for (int block = 0; block < blocks; block++) {
            const uint8_t *from = (const uint8_t *)codes + (size_t)row * (size_t)k + (size_t)(block * BLOCK);
            pack_lane(tile + code_bytes(kind) * (size_t)block, kind, lane, from);
            scales[block * TILE + lane] = scale[(size_t)row * (size_t)blocks + (size_t)block];
            if (kind == KIND_Q4)
                scales[(blocks + block) * TILE + lane] = minimum[(size_t)row * (size_t)blocks + (size_t)block];
        }
    }
}

void matrix_row(const Matrix *matrix, int row, float *out) {
    const uint8_t *tile = matrix->data + matrix->tile_bytes * (size_t)(row / TILE);
    const int lane = row % TILE, blocks = matrix->blocks;
    const uint16_t *scales = (const uint16_t *)(tile + code_bytes(matrix->kind) * (size_t)blocks);
    for (int block = 0; block < blocks; block++, tile += code_bytes(matrix->kind), out += BLOCK) {
        float scale[LANES], minimum[LANES] = {0};
        vf_store(scale, vf_half(scales + block * TILE));
        if (matrix->kind == KIND_Q4) vf_store(minimum, vf_half(scales + (blocks + block) * TILE));
        for (int i = 0; i < BLOCK; i++) {
            int group = i / 4, at = 4 * lane + i % 4;
            if (matrix->kind == KIND_Q8) out[i] = scale[lane] * (float)(tile[64 * group + at] - 128);
            else {
                int code = (tile[64 * (group % 4) + at] >> (group < 4 ? 0 : 4)) & 15;
                out[i] = scale[lane] * (float)code + minimum[lane];
            }
        }
    }
}
