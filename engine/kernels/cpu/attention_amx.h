/* Scores and values of up to 16 rows on the AMX unit. Included by attention.c alone.
 *
 * The unit sums pairs of bfloat16 products the way attention.h defines: even and odd ones apart, then both onto the
 * total. So these give the bits of the vector kernels.
 */
#ifndef ATTENTION_AMX_H
#define ATTENTION_AMX_H

#include "amx.h"

#if defined(HAS_AMX)
enum { AMX_ROWS_AT_ONCE = 16 };

/* Tile registers: four of sums, one of queries or weights, two of keys or values. */
static void amx_attention_begin(int rows) {
    TileConfig config = {.palette = 1};
    for (int i = 0; i < 7; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = (uint8_t)(i < 5 ? rows : 16);
    }
    amx_shape(&config);
}

/* Round to pairs of bfloat16: `count` floats that are exact already. */
INLINE void to_pairs(const float *x, int count, uint16_t *out) {
    for (int i = 0; i < count; i += LANES)
        _mm256_storeu_si256((__m256i *)(out + i), _mm512_cvtepi32_epi16(vi_shr(vi_bits(vf_load(x + i)), 16)));
}

/* Scores of 32 keys, a block's two halves: query [rows][head_dim] in bfloat16. */
INLINE void amx_score_block(const uint16_t *keys, int head_dim, const uint16_t *query, float *scores, size_t stride) {
    const uint16_t *second = keys + 16 * head_dim;
    _tile_zero(0);
    _tile_zero(1);
    for (int d = 0; d < head_dim; d += 32) {
        _tile_loadd(4, query + d, (size_t)head_dim * sizeof(uint16_t));
        _tile_loadd(5, keys + 16 * d, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, second + 16 * d, 64);
        _tile_dpbf16ps(1, 4, 6);
    }
    _tile_stored(0, scores, stride * sizeof(float));
    _tile_stored(1, scores + 16, stride * sizeof(float));
}

/* One block's values times weights, added to a sum tile: 16 dims from `d` on. */
#define AMX_VALUES(sum, at, d)                                        \
    _tile_loadd(at, values + 2 * (d), (size_t)head_dim * 2 * sizeof(uint16_t)); \
    _tile_dpbf16ps(sum, 4, at)

typedef const uint16_t *(*ValuesOf)(const void *rows, int key, int keys);

/* out [rows][head_dim] = the weighted values of `keys` positions, in whole blocks. */
INLINE void amx_values(ValuesOf values_of, const void *rows, int head_dim, const uint16_t *weights, size_t stride,
                       int keys, float *out) {
    const size_t row_bytes = (size_t)head_dim * sizeof(float);
    for (int d = 0; d < head_dim; d += 64) {
        const int is_whole = head_dim - d >= 64;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int key = 0; key < keys; key += 32) {
            const uint16_t *values = values_of(rows, key, keys);
            _tile_loadd(4, weights + key, stride * sizeof(uint16_t));
            AMX_VALUES(0, 5, d);
            AMX_VALUES(1, 6, d + 16);
            if (!is_whole) continue;
            AMX_VALUES(2, 5, d + 32);
            AMX_VALUES(3, 6, d + 48);
        }
        _tile_stored(0, out + d, row_bytes);
        _tile_stored(1, out + d + 16, row_bytes);
        if (!is_whole) continue;
        _tile_stored(2, out + d + 32, row_bytes);
        _tile_stored(3, out + d + 48, row_bytes);
    }
}
#endif

#endif
