/* Quantised activations times packed matrices. */
#include "linear.h"

#include "dots.h"

#define CHUNKS (MAX_ROWS / CHUNK)

size_t activations_bytes(int k) {
    return (size_t)MAX_ROWS * (size_t)(k / BLOCK) * (BLOCK + 2 * sizeof(float) + sizeof(int32_t));
}

void activations_place(Activations *activations, void *memory, int k) {
    const size_t cells = (size_t)MAX_ROWS * (size_t)(k / BLOCK);
    char *p = memory;
    activations->blocks = k / BLOCK;
    activations->codes = (int8_t *)p;
    activations->scale = (float *)(p + cells * BLOCK);
    activations->sum = activations->scale + cells;
    activations->correction = (int32_t *)(activations->sum + cells);
}

void quantize_block(const Activations *activations, int row, int block, const float *x) {
    const size_t cell = ((size_t)(row / CHUNK) * (size_t)activations->blocks + (size_t)block) * CHUNK + (size_t)(row % CHUNK);
    const vf low = vf_load(x), high = vf_load(x + LANES);
    const float largest = vf_largest(vf_max(vf_abs(low), vf_abs(high)));
    const float scale = largest / 127.0f, inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
    int8_t *codes = activations->codes + cell * BLOCK;
    vi_store_bytes(codes, vi_from_float(vf_mul(low, vf_set1(inverse))));
    vi_store_bytes(codes + LANES, vi_from_float(vf_mul(high, vf_set1(inverse))));
    int sum = 0;
    for (int i = 0; i < BLOCK; i++) sum += codes[i];
    activations->scale[cell] = scale;
    activations->sum[cell] = scale * (float)sum;
    activations->correction[cell] = -128 * sum;
}

void quantize_row(const Activations *activations, int row, const float *x) {
    for (int block = 0; block < activations->blocks; block++) quantize_block(activations, row, block, x + block * BLOCK);
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
        Codes codes;
        codes_q4(tile + 256 * (size_t)block, &codes);
        const vf scale = vf_half(scales + block * TILE), minimum = vf_half(minimums + block * TILE);
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++) {
            vf dot = vf_from_int(dot_q4(&codes, codes_x + row * BLOCK));
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
        Codes codes;
        codes_q8(tile + 512 * (size_t)block, &codes);
        const vf scale = vf_half(scales + block * TILE);
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++) {
            vf dot = vf_from_int(dot_q8(&codes, codes_x + row * BLOCK, correction[row]));
            sums[row] = vf_fma(dot, vf_mul(scale, vf_set1(scale_x[row])), sums[row]);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++) vf_store(out + row * TILE, sums[row]);
}

typedef void (*RowsKernel)(const uint8_t *tile, const Activations *x, float *out);
#define DEFINE(rows)                                                                                          \
    static void q4_##rows(const uint8_t *tile, const Activations *x, float *out) { q4_rows(tile, x, rows, out); } \
    static void q8_##rows(const uint8_t *tile, const Activations *x, float *out) { q8_rows(tile, x, rows, out); }
DEFINE(1) DEFINE(2) DEFINE(3) DEFINE(4)
#if KERNEL_ROWS == 16
DEFINE(5) DEFINE(6) DEFINE(7) DEFINE(8) DEFINE(9) DEFINE(10) DEFINE(11) DEFINE(12) DEFINE(13) DEFINE(14) DEFINE(15)
DEFINE(16)
static const RowsKernel Q4[] = {q4_1, q4_2,  q4_3,  q4_4,  q4_5,  q4_6,  q4_7,  q4_8,
                                q4_9, q4_10, q4_11, q4_12, q4_13, q4_14, q4_15, q4_16};
static const RowsKernel Q8[] = {q8_1, q8_2,  q8_3,  q8_4,  q8_5,  q8_6,  q8_7,  q8_8,
                                q8_9, q8_10, q8_11, q8_12, q8_13, q8_14, q8_15, q8_16};
#else
static const RowsKernel Q4[] = {q4_1, q4_2, q4_3, q4_4};
static const RowsKernel Q8[] = {q8_1, q8_2, q8_3, q8_4};
#endif

static Activations from_row(const Activations *x, int chunk, int row) {
    const size_t cell = (size_t)chunk * (size_t)x->blocks * CHUNK + (size_t)row;
    return (Activations){x->blocks, x->codes + cell * BLOCK, x->scale + cell, x->sum + cell, x->correction + cell};
}

void linear_tile(const Matrix *matrix, int tile, const Activations *x, int chunk, int num_rows, float *out) {
    const uint8_t *data = matrix->data + matrix->tile_bytes * (size_t)tile;
    const RowsKernel *kernels = matrix->kind == KIND_Q4 ? Q4 : Q8;
    for (int row = 0; row < num_rows; row += KERNEL_ROWS) {
        const int rows = num_rows - row < KERNEL_ROWS ? num_rows - row : KERNEL_ROWS;
        const Activations part = from_row(x, chunk, row);
        kernels[rows - 1](data, &part, out + row * TILE);
    }
}
