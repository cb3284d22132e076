/* One tile of outputs times 8 to 16 rows on the AMX matrix unit. Included by linear.c alone.
 *
 * It gives the same integers as dots.h, and the float sums are the same operations in the same order, so which of the
 * two computes a row cannot be seen in the result.
 */
#ifndef LINEAR_AMX_H
#define LINEAR_AMX_H

#include "amx.h"
#include "linear_rows.h"

#if defined(HAS_AMX)
/* Tile registers: four of products, two of activations, two of weights. */
static const TileConfig AMX_16_ROWS = {
    .palette = 1,
    .row_bytes = {64, 64, 64, 64, BLOCK, BLOCK, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 8, 8},
};
static const TileConfig AMX_8_ROWS = {
    .palette = 1,
    .row_bytes = {64, 64, 64, 64, BLOCK, BLOCK, 64, 64},
    .rows = {8, 8, 8, 8, 8, 8, 8, 8},
};

static void amx_begin(int num_rows) { amx_shape(num_rows > 8 ? &AMX_16_ROWS : &AMX_8_ROWS); }

/* A block passes three stations: codes unpacked, products on the unit, products added up. Between them lie a few
 * blocks, so that no station waits for what the one before it has just stored. */
enum { AHEAD = 2, BEHIND = 2, RING = 8 };
typedef struct {
    uint8_t codes[RING][512];
    int32_t dots[RING][CHUNK * TILE];
} Stations;

INLINE void amx_unpack(const uint8_t *packed, uint8_t *to) {
    Codes codes;
    codes_q4(packed, &codes);
    for (int g = 0; g < GROUPS; g++) vi_store(to + 64 * g, codes.group[g]);
}

/* Four sets of tile registers in turn: a set is free again long before it is its turn. */
#define AMX_PRODUCT(sum, left, right)    \
    do {                                 \
        _tile_zero(sum);                 \
        _tile_loadd(right, codes, 64);   \
        _tile_loadd(left, x, BLOCK);     \
        _tile_dpbsud(sum, left, right);  \
        _tile_stored(sum, dots, 64);     \
    } while (0)

INLINE void amx_product(int turn, const uint8_t *codes, const int8_t *x, int32_t *dots) {
    if (turn == 0) AMX_PRODUCT(0, 4, 6);
    else if (turn == 1) AMX_PRODUCT(1, 5, 7);
    else if (turn == 2) AMX_PRODUCT(2, 4, 6);
    else AMX_PRODUCT(3, 5, 7);
}

INLINE void amx_add(const uint16_t *scales, const uint16_t *minimums, const Activations *x, int block, const int kind,
                    const int rows, const int32_t *dots, vf *sums) {
    const float *scale_x = x->scale + block * CHUNK, *sum_x = x->sum + block * CHUNK;
    const int32_t *correction = x->correction + block * CHUNK;
    const vf scale = vf_half(scales + block * TILE);
    const vf minimum = kind == KIND_Q4 ? vf_half(minimums + block * TILE) : vf_zero();
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++) {
        vi dot = vi_load(dots + row * TILE);
        if (kind == KIND_Q8) dot = vi_add(dot, vi_set1(correction[row]));
        sums[row] = vf_fma(vf_from_int(dot), vf_mul(scale, vf_set1(scale_x[row])), sums[row]);
        if (kind == KIND_Q4) sums[row] = vf_fma(minimum, vf_set1(sum_x[row]), sums[row]);
    }
}

INLINE void amx_rows(const uint8_t *tile, const Activations *x, const int kind, const int rows, float *out) {
    const int blocks = x->blocks, ahead = blocks < AHEAD ? blocks : AHEAD;
    const size_t code_bytes = kind == KIND_Q4 ? 256 : 512;
    const uint16_t *scales = (const uint16_t *)(tile + code_bytes * (size_t)blocks), *minimums = scales + blocks * TILE;
    _Alignas(64) Stations at;
    vf sums[CHUNK];
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++) sums[row] = vf_zero();
    for (int i = 0; i < ahead && kind == KIND_Q4; i++) amx_unpack(tile + 256 * i, at.codes[i % RING]);
    for (int start = 0; start < blocks + BEHIND; start += 4)
#pragma GCC unroll 4
        for (int turn = 0; turn < 4; turn++) {
            const int i = start + turn;
            if (kind == KIND_Q4 && i + AHEAD < blocks) amx_unpack(tile + 256 * (i + AHEAD), at.codes[(i + AHEAD) % RING]);
            if (i < blocks) {
                const uint8_t *codes = kind == KIND_Q4 ? at.codes[i % RING] : tile + 512 * (size_t)i;
                prefetch_later(tile, i, kind == KIND_Q4 ? 5 : 9);
                amx_product(turn, codes, x->codes + i * CHUNK * BLOCK, at.dots[i % RING]);
            }
            if (i >= BEHIND && i < blocks + BEHIND)
                amx_add(scales, minimums, x, i - BEHIND, kind, rows, at.dots[(i - BEHIND) % RING], sums);
        }
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++) vf_store(out + row * TILE, sums[row]);
}

#define DEFINE(rows)                                                                   \
    static void amx_q4_##rows(const uint8_t *tile, const Activations *x, float *out) { \
        amx_rows(tile, x, KIND_Q4, rows, out);                                         \
    }                                                                                  \
    static void amx_q8_##rows(const uint8_t *tile, const Activations *x, float *out) { \
        amx_rows(tile, x, KIND_Q8, rows, out);                                         \
    }
DEFINE(8) DEFINE(9) DEFINE(10) DEFINE(11) DEFINE(12) DEFINE(13) DEFINE(14)
DEFINE(15) DEFINE(16)
#undef DEFINE
/* With fewer rows, loading and storing tiles costs more than it saves. */
static const RowsKernel AMX_ROWS[2][CHUNK] = {
    {q4_1, q4_2, q4_3, q4_4, q4_5, q4_6, q4_7, amx_q4_8, amx_q4_9, amx_q4_10, amx_q4_11, amx_q4_12,
     amx_q4_13, amx_q4_14, amx_q4_15, amx_q4_16},
    {q8_1, q8_2, q8_3, q8_4, q8_5, q8_6, q8_7, amx_q8_8, amx_q8_9, amx_q8_10, amx_q8_11, amx_q8_12,
     amx_q8_13, amx_q8_14, amx_q8_15, amx_q8_16},
};
#endif

#endif
