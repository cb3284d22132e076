/* Quantised activations times packed matrices. */
#include "linear.h"

#include "dots.h"
#include "linear_amx.h"
#include "linear_pairs.h"
#include "linear_rows.h"

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
    const vi low_codes = vi_from_float(vf_mul(low, vf_set1(inverse)));
    const vi high_codes = vi_from_float(vf_mul(high, vf_set1(inverse)));
    const int32_t sum = vi_sum(vi_add(low_codes, high_codes));
    vi_store_bytes(activations->codes + cell * BLOCK, low_codes);
    vi_store_bytes(activations->codes + cell * BLOCK + LANES, high_codes);
    activations->scale[cell] = scale;
    activations->sum[cell] = scale * (float)sum;
    activations->correction[cell] = -128 * sum;
}

void quantize_row(const Activations *activations, int row, const float *x) {
    for (int block = 0; block < activations->blocks; block++) quantize_block(activations, row, block, x + block * BLOCK);
}

#if defined(HAS_AMX)
const char *linear_start(void) { return amx_request() ? PATH_NAME " and AMX" : PATH_NAME; }
void linear_begin(int num_rows) {
    if (amx_is_granted()) amx_begin(num_rows);
}
void linear_end(void) {
    if (amx_is_granted()) _tile_release();
}
static RowsKernel kernel_for(int kind, int rows) {
    return amx_is_granted() ? AMX_ROWS[kind == KIND_Q8][rows - 1] : ROWS[kind == KIND_Q8][rows - 1];
}
#else
const char *linear_start(void) { return PATH_NAME; }
void linear_begin(int num_rows) { (void)num_rows; }
void linear_end(void) {}
static RowsKernel kernel_for(int kind, int rows) { return ROWS[kind == KIND_Q8][rows - 1]; }
#endif

static Activations from_row(const Activations *x, int chunk, int row) {
    const size_t cell = (size_t)chunk * (size_t)x->blocks * CHUNK + (size_t)row;
    return (Activations){x->blocks, x->codes + cell * BLOCK, x->scale + cell, x->sum + cell, x->correction + cell};
}

void linear_tile(const Matrix *matrix, int tile, const Activations *x, int chunk, int num_rows, float *out) {
    const uint8_t *data = matrix->data + matrix->tile_bytes * (size_t)tile;
    for (int row = 0; row < num_rows; row += KERNEL_ROWS) {
        const int rows = num_rows - row < KERNEL_ROWS ? num_rows - row : KERNEL_ROWS;
        const Activations part = from_row(x, chunk, row);
        kernel_for(matrix->kind, rows)(data, &part, out + row * TILE);
    }
}

static void tile_of_all_rows(const Matrix *matrix, int tile, const Activations *x, int num_rows, float *out) {
    for (int row = 0; row < num_rows; row += CHUNK) {
        const int left = num_rows - row;
        linear_tile(matrix, tile, x, row / CHUNK, left < CHUNK ? left : CHUNK, out + row * TILE);
    }
}

void linear_tiles(const Matrix *matrix, int first, int count, const Activations *x, int num_rows, float *out) {
    int done = 0;
#if defined(HAS_PAIRS)
    for (; num_rows <= PAIR_ROWS && done + 2 <= count; done += 2) {
        float *to = out + done * MAX_ROWS * TILE;
        const uint8_t *data = matrix->data + matrix->tile_bytes * (size_t)(first + done);
        PAIRS[matrix->kind == KIND_Q8][num_rows - 1](data, matrix->tile_bytes, x, to, to + MAX_ROWS * TILE);
    }
#endif
    for (; done < count; done++) tile_of_all_rows(matrix, first + done, x, num_rows, out + done * MAX_ROWS * TILE);
}
