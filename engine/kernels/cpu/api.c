/* Memory for weights, and the linears and searches that stand on their own. */
#include "api.h"

#include <limits.h>

#include "dots.h"
#include "search.h"

struct Arena {
    size_t bytes, used;
    uint8_t *memory;
};

const char *path_name(void) { return linear_start(); }

void *threads_create(int num_threads) {
    linear_start();
    return pool_create(num_threads);
}
void threads_free(void *pool) { pool_free(pool); }

Arena *arena_create(size_t bytes) {
    Arena *arena = zeroed_memory(sizeof(Arena));
    if (!arena) return NULL;
    arena->bytes = bytes;
    arena->memory = zeroed_memory(bytes);
    if (arena->memory) return arena;
    aligned_release(arena);
    return NULL;
}

void arena_free(Arena *arena) {
    if (!arena) return;
    aligned_release(arena->memory);
    aligned_release(arena);
}

static void *arena_take(Arena *arena, size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (bytes > arena->bytes - arena->used) return NULL;
    arena->used += bytes;
    return arena->memory + arena->used - bytes;
}

size_t matrix_size(int kind, int n, int k) { return matrix_bytes(kind, n, k) + (sizeof(Matrix) + 63) / 64 * 64; }

Matrix *matrix_create(Arena *arena, int kind, int n, int k, const void *codes, const uint16_t *scale,
                      const uint16_t *minimum) {
    Matrix *matrix = arena_take(arena, sizeof(Matrix));
    uint8_t *data = matrix ? arena_take(arena, matrix_bytes(kind, n, k)) : NULL;
    if (!data) return NULL;
    matrix_pack(matrix, data, kind, n, k, codes, scale, minimum);
    return matrix;
}

void matrix_values(const Matrix *matrix, const int64_t *rows, int num_rows, float *out) {
    for (int i = 0; i < num_rows; i++) matrix_row(matrix, (int)rows[i], out + (size_t)i * (size_t)matrix->k);
}

enum { TILES_PER_ITEM = 8 };

typedef struct {
    float value;
    int index;
} Best;

typedef struct {
    Pool *pool;
    const Matrix *matrix;
    const float *x;
    float *y;    /* outputs, or NULL when only the largest is wanted */
    Best *best;  /* [threads][MAX_ROWS] */
    int rows;
    Activations activations;
} LinearJob;

size_t linear_work(int k) { return activations_bytes(k) + sizeof(Best) * MAX_THREADS * MAX_ROWS; }

static void write_tile(const LinearJob *job, int tile, int row, int rows, const float *out) {
    const int n = job->matrix->n, left = n - tile * TILE, width = left < TILE ? left : TILE;
    for (int r = 0; r < rows; r++)
        memcpy(job->y + (size_t)(row + r) * (size_t)n + (size_t)(tile * TILE), out + r * TILE, sizeof(float) * (size_t)width);
}

/* Tiles come in any order, so equals are told apart by their index. */
static int is_better(Best a, Best b) { return a.value > b.value || (a.value == b.value && a.index < b.index); }

static void keep_best(Best *best, const LinearJob *job, int tile, int rows, const float *out) {
    const int left = job->matrix->n - tile * TILE, width = left < TILE ? left : TILE;
    for (int r = 0; r < rows; r++) {
        const int is_earlier = tile * TILE < best[r].index; /* where an equal value wins */
        const int may_win = is_earlier || vf_any_above(vf_load(out + r * TILE), vf_set1(best[r].value));
        for (int i = 0; i < width && may_win; i++) {
            const Best candidate = {out[r * TILE + i], tile * TILE + i};
            if (is_better(candidate, best[r])) best[r] = candidate;
        }
    }
}

static void run_item(const LinearJob *job, int item, Best *best) {
    _Alignas(64) float out[CHUNK * TILE];
    const int tiles = (job->matrix->n + TILE - 1) / TILE, first = item * TILES_PER_ITEM;
    for (int tile = first; tile < first + TILES_PER_ITEM && tile < tiles; tile++)
        for (int row = 0; row < job->rows; row += CHUNK) {
            const int rows = job->rows - row < CHUNK ? job->rows - row : CHUNK;
            linear_tile(job->matrix, tile, &job->activations, row / CHUNK, rows, out);
            if (job->y) write_tile(job, tile, row, rows, out);
            else keep_best(best + row, job, tile, rows, out);
        }
}

static void linear_task(void *context, int thread, int num_threads) {
    const LinearJob *job = context;
    const int tiles = (job->matrix->n + TILE - 1) / TILE;
    Walk walk = pool_enter(job->pool, thread);
    (void)num_threads;
    FOR_EACH_ITEM(&walk, row, job->rows)
        quantize_row(&job->activations, row, job->x + (size_t)row * (size_t)job->matrix->k);
    linear_begin(job->rows);
    FOR_EACH_ITEM(&walk, item, (tiles + TILES_PER_ITEM - 1) / TILES_PER_ITEM)
        run_item(job, item, job->best + thread * MAX_ROWS);
    linear_end();
}

static LinearJob linear_job(Pool *pool, const Matrix *matrix, void *work) {
    LinearJob job = {.pool = pool, .matrix = matrix, .best = (Best *)((char *)work + activations_bytes(matrix->k))};
    activations_place(&job.activations, work, matrix->k);
    return job;
}

void linear_run(Pool *pool, const Matrix *matrix, const float *x, int rows, float *y, void *work) {
    LinearJob job = linear_job(pool, matrix, work);
    for (int row = 0; row < rows; row += MAX_ROWS) {
        job.rows = rows - row < MAX_ROWS ? rows - row : MAX_ROWS;
        job.x = x + (size_t)row * (size_t)matrix->k;
        job.y = y + (size_t)row * (size_t)matrix->n;
        pool_run(pool, linear_task, &job);
    }
}

void linear_argmax(Pool *pool, const Matrix *matrix, const float *x, int rows, int64_t *best, void *work) {
    const Best none = {-INFINITY, INT_MAX};
    LinearJob job = linear_job(pool, matrix, work);
    for (int row = 0; row < rows; row += MAX_ROWS) {
        job.rows = rows - row < MAX_ROWS ? rows - row : MAX_ROWS;
        job.x = x + (size_t)row * (size_t)matrix->k;
        for (int i = 0; i < pool_size(pool) * MAX_ROWS; i++) job.best[i] = none;
        pool_run(pool, linear_task, &job);
        for (int r = 0; r < job.rows; r++) {
            Best winner = none;
            for (int thread = 0; thread < pool_size(pool); thread++)
                if (is_better(job.best[thread * MAX_ROWS + r], winner)) winner = job.best[thread * MAX_ROWS + r];
            best[row + r] = winner.index < matrix->n ? winner.index : 0; /* a row of NaN has no largest */
        }
    }
}

typedef struct {
    Pool *pool;
    const float *x;
    int rows, n, k;
    float *values;
    int64_t *indices;
} TopKJob;

static void top_k_task(void *context, int thread, int num_threads) {
    const TopKJob *job = context;
    Walk walk = pool_enter(job->pool, thread);
    (void)num_threads;
    FOR_EACH_ITEM(&walk, row, job->rows)
        top_k_row(job->x + (size_t)row * (size_t)job->n, job->n, job->k, job->values + (size_t)row * (size_t)job->k,
                  job->indices + (size_t)row * (size_t)job->k);
}

void top_k(Pool *pool, const float *x, int rows, int n, int k, float *values, int64_t *indices) {
    TopKJob job = {pool, x, rows, n, k, values, indices};
    if (rows) pool_run(pool, top_k_task, &job);
}
