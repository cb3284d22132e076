/* One tile of outputs times a few rows, on the dot products of dots.h. Included by linear.c alone. */
#ifndef LINEAR_ROWS_H
#define LINEAR_ROWS_H

#include "dots.h"
#include "linear.h"

typedef void (*RowsKernel)(const uint8_t *tile, const Activations *x, float *out);

/* Ask for what is read a little later, into the second-level cache: the memory's own read-ahead is too slow. */
enum { PREFETCH_BYTES = 24576 };
INLINE void prefetch_later(const uint8_t *tile, int block, const int lines) {
    const uint8_t *from = tile + PREFETCH_BYTES + block * lines * 64;
#pragma GCC unroll 16
    for (int line = 0; line < lines; line++) __builtin_prefetch(from + line * 64, 0, 2);
}

/* One tile times `rows` rows (a constant, so that the sums live in registers). `x` points at the first row's cells. */
INLINE void q4_rows(const uint8_t *tile, const Activations *x, const int rows, float *out) {
    const int blocks = x->blocks;
    const uint16_t *scales = (const uint16_t *)(tile + 256 * (size_t)blocks), *minimums = scales + blocks * TILE;
    vf sums[KERNEL_ROWS];
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++) sums[row] = vf_zero();
    for (int block = 0; block < blocks; block++) {
        const int8_t *codes_x = x->codes + block * CHUNK * BLOCK;
        const float *scale_x = x->scale + block * CHUNK, *sum_x = x->sum + block * CHUNK;
        prefetch_later(tile, block, 5);
        Codes codes;
        codes_q4(tile + 256 * (size_t)block, &codes);
        const vf scale = vf_half(scales + block * TILE), minimum = vf_half(minimums + block * TILE);
        vi dots[KERNEL_ROWS];
        dots_q4(&codes, codes_x, rows, dots);
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++) {
            vf dot = vf_from_int(dots[row]);
            sums[row] = vf_fma(dot, vf_mul(scale, vf_set1(scale_x[row])), sums[row]);
            sums[row] = vf_fma(minimum, vf_set1(sum_x[row]), sums[row]);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++) vf_store(out + row * TILE, sums[row]);
}

INLINE void q8_rows(const uint8_t *tile, const Activations *x, const int rows, float *out) {
    const int blocks = x->blocks;
    const uint16_t *scales = (const uint16_t *)(tile + 512 * (size_t)blocks);
    vf sums[KERNEL_ROWS];
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++) sums[row] = vf_zero();
    for (int block = 0; block < blocks; block++) {
        const int8_t *codes_x = x->codes + block * CHUNK * BLOCK;
        const float *scale_x = x->scale + block * CHUNK;
        const int32_t *correction = x->correction + block * CHUNK;
        prefetch_later(tile, block, 9);
        Codes codes;
        codes_q8(tile + 512 * (size_t)block, &codes);
        const vf scale = vf_half(scales + block * TILE);
        vi dots[KERNEL_ROWS];
        dots_q8(&codes, codes_x, correction, rows, dots);
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++) {
            vf dot = vf_from_int(dots[row]);
            sums[row] = vf_fma(dot, vf_mul(scale, vf_set1(scale_x[row])), sums[row]);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++) vf_store(out + row * TILE, sums[row]);
}

#define DEFINE(rows)                                                                                              \
    static void q4_##rows(const uint8_t *tile, const Activations *x, float *out) { q4_rows(tile, x, rows, out); } \
    static void q8_##rows(const uint8_t *tile, const Activations *x, float *out) { q8_rows(tile, x, rows, out); }
DEFINE(1) DEFINE(2) DEFINE(3) DEFINE(4)
#if KERNEL_ROWS == 16
DEFINE(5) DEFINE(6) DEFINE(7) DEFINE(8) DEFINE(9) DEFINE(10) DEFINE(11) DEFINE(12) DEFINE(13) DEFINE(14) DEFINE(15)
DEFINE(16)
static const RowsKernel ROWS[2][KERNEL_ROWS] = {
    {q4_1, q4_2, q4_3, q4_4, q4_5, q4_6, q4_7, q4_8, q4_9, q4_10, q4_11, q4_12, q4_13, q4_14, q4_15, q4_16},
    {q8_1, q8_2, q8_3, q8_4, q8_5, q8_6, q8_7, q8_8, q8_9, q8_10, q8_11, q8_12, q8_13, q8_14, q8_15, q8_16},
};
#else
static const RowsKernel ROWS[2][KERNEL_ROWS] = {{q4_1, q4_2, q4_3, q4_4}, {q8_1, q8_2, q8_3, q8_4}};
#endif
#undef DEFINE

#endif
