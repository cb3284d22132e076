/* Block-quantised matrices packed for the dot products, activations quantised for them, and their product.
 *
 * y[row][n] = sum over blocks, in order, of scale_w * scale_x * (integer dot) + minimum_w * (scale_x * sum of codes).
 * A row's result depends on that row alone: its integers are exact and its float sums run over the blocks in order.
 */
#ifndef LINEAR_H
#define LINEAR_H

#include <stddef.h>
#include <stdint.h>

#define CHUNK 16    /* rows whose activations lie together */
#define MAX_ROWS 80 /* rows of one call: a tree of 64 drafted nodes and its root, in whole chunks */
#define TILE 16     /* outputs computed together */

enum { KIND_Q4 = 4, KIND_Q8 = 8 };

typedef struct {
    int kind, n, k; /* n outputs, k inputs */
    int blocks;     /* k / 32 */
    size_t tile_bytes;
    const uint8_t *data; /* [tiles][codes of all blocks | half scales [blocks][16] | half minimums, Q4 only] */
} Matrix;

typedef struct {
    int blocks;
    int8_t *codes;       /* [chunks][blocks][16 rows][32] */
    float *scale;        /* [chunks][blocks][16 rows] */
    float *sum;          /* scale * sum of the codes, same shape */
    int32_t *correction; /* -128 * sum of the codes, same shape */
} Activations;

size_t matrix_bytes(int kind, int n, int k);

/* Pack rows of codes [n][k] (Q4: 0..15; Q8: signed bytes) and half scales [n][k / 32] into `data`. */
void matrix_pack(Matrix *matrix, uint8_t *data, int kind, int n, int k, const void *codes, const uint16_t *scale,
                 const uint16_t *minimum);

/* Write one dequantised row, float [k]. */
void matrix_row(const Matrix *matrix, int row, float *out);

size_t activations_bytes(int k);
void activations_place(Activations *activations, void *memory, int k);

/* Quantise 32 values as block `block` of row `row`. */
void quantize_block(const Activations *activations, int row, int block, const float *x);
void quantize_row(const Activations *activations, int row, const float *x);

/* Choose the instructions for this process and name them; call once before the rest. Then every thread brackets its
 * work on tiles with begin, which is told of how many rows, and end. */
const char *linear_start(void);
void linear_begin(int num_rows);
void linear_end(void);

/* Outputs 16 tile .. 16 tile + 15 of rows 16 chunk .. + num_rows: out [num_rows][16]. */
void linear_tile(const Matrix *matrix, int tile, const Activations *x, int chunk, int num_rows, float *out);

/* Tiles first .. first + count - 1 of all of num_rows rows: out [count][MAX_ROWS][16]. */
void linear_tiles(const Matrix *matrix, int first, int count, const Activations *x, int num_rows, float *out);

#endif
