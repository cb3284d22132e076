/* Two neighbouring tiles of outputs times one to four rows. Included by linear.c alone.
 *
 * What a row brings is fetched once for both tiles, and twice as many chains of products run side by side. The integers
 * and the float operations are those of linear_rows.h, in the same order, so which of the two computes a row cannot be
 * seen in the result.
 */
#ifndef LINEAR_PAIRS_H
#define LINEAR_PAIRS_H

#include "linear_rows.h"

#if defined(SIMD_AVX512) && defined(__AVX512VNNI__)
#define HAS_PAIRS 1
enum { PAIR_ROWS = 4 };

typedef void (*PairKernel)(const uint8_t *tile, size_t tile_bytes, const Activations *x, float *out, float *next_out);

/* Groups g and g + 4 of a block's codes. */
INLINE void two_groups(const int kind, const uint8_t *packed, int g, __m512i codes[2]) {
    const __m512i first = _mm512_loadu_si512(packed + 64 * g);
    codes[0] = kind == KIND_Q4 ? _mm512_and_si512(first, _mm512_set1_epi8(15)) : first;
    codes[1] = kind == KIND_Q4 ? high_nibbles(first) : _mm512_loadu_si512(packed + 64 * (g + 4));
}

/* Add the products of one block of both tiles to `dots`, [tile][row]. */
INLINE void pair_dots(const int kind, const uint8_t *packed, size_t tile_bytes, const int8_t *x, const int rows,
                      __m512i dots[2][PAIR_ROWS]) {
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS / 2; g++) {
        __m512i codes[2][2];
        two_groups(kind, packed, g, codes[0]);
        two_groups(kind, packed + tile_bytes, g, codes[1]);
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                int32_t four;
                memcpy(&four, x + row * BLOCK + 4 * (g + 4 * half), 4);
                const __m512i inputs = _mm512_set1_epi32(four);
                dots[0][row] = _mm512_dpbusd_epi32(dots[0][row], codes[0][half], inputs);
                dots[1][row] = _mm512_dpbusd_epi32(dots[1][row], codes[1][half], inputs);
            }
    }
}

INLINE void pair_rows(const int kind, const int rows, const uint8_t *tile, size_t tile_bytes, const Activations *x,
                      float *const outs[2]) {
    const int blocks = x->blocks, code_bytes = kind == KIND_Q4 ? 256 : 512, lines = code_bytes / 64 + 1;
    const uint8_t *after_codes = tile + (size_t)code_bytes * (size_t)blocks;
    vf sums[2][PAIR_ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < 2 * rows; i++) sums[i / rows][i % rows] = vf_zero();
    for (int block = 0; block < blocks; block++) {
        const float *scale_x = x->scale + block * CHUNK, *sum_x = x->sum + block * CHUNK;
        __m512i dots[2][PAIR_ROWS];
        prefetch_later(tile, block, lines);
        prefetch_later(tile + tile_bytes, block, lines);
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++)
            dots[0][row] = dots[1][row] = _mm512_set1_epi32(kind == KIND_Q4 ? 0 : x->correction[block * CHUNK + row]);
        pair_dots(kind, tile + (size_t)code_bytes * (size_t)block, tile_bytes, x->codes + block * CHUNK * BLOCK, rows, dots);
#pragma GCC unroll 2
        for (int which = 0; which < 2; which++) {
            const uint16_t *scales = (const uint16_t *)(after_codes + (which ? tile_bytes : 0)) + block * TILE;
            const vf scale = vf_half(scales), minimum = kind == KIND_Q4 ? vf_half(scales + blocks * TILE) : vf_zero();
#pragma GCC unroll 4
            for (int row = 0; row < rows; row++) {
                vf *sum = &sums[which][row];
                *sum = vf_fma(vf_from_int(dots[which][row]), vf_mul(scale, vf_set1(scale_x[row])), *sum);
                if (kind == KIND_Q4) *sum = vf_fma(minimum, vf_set1(sum_x[row]), *sum);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 2 * rows; i++) vf_store(outs[i / rows] + i % rows * TILE, sums[i / rows][i % rows]);
}

#define DEFINE(rows)                                                                                              \
    static void q4_pair_##rows(const uint8_t *tile, size_t bytes, const Activations *x, float *out, float *next) { \
        pair_rows(KIND_Q4, rows, tile, bytes, x, (float *const[]){out, next});                                     \
    }                                                                                                             \
    static void q8_pair_##rows(const uint8_t *tile, size_t bytes, const Activations *x, float *out, float *next) { \
        pair_rows(KIND_Q8, rows, tile, bytes, x, (float *const[]){out, next});                                     \
    }
DEFINE(1) DEFINE(2) DEFINE(3) DEFINE(4)
#undef DEFINE
static const PairKernel PAIRS[2][PAIR_ROWS] = {
    {q4_pair_1, q4_pair_2, q4_pair_3, q4_pair_4},
    {q8_pair_1, q8_pair_2, q8_pair_3, q8_pair_4},
};
#endif

#endif
