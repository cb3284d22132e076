/* Scores, softmax, values; a few rows together, which share the reads of keys and values. */
#include "attention.h"

#include "attention_amx.h"
#include "simd.h"

#define SUB 16 /* keys that one vector of scores covers */
#if defined(HAS_AMX)
#define MOST_ROWS 16
#elif defined(SIMD_AVX512)
#define MOST_ROWS 12
#else
#define MOST_ROWS 3
#endif
#define SCRATCH_KEYS PAGE_KEYS

enum { MAX_HEAD_DIM = 256 };

/* Scores of 16 keys for `rows` rows: row r's query at query + r * head_dim, its scores at scores + r * stride. */
INLINE void score_rows(const uint16_t *keys, int head_dim, const float *query, const int rows, float *scores,
                       size_t stride) {
    vf total[MOST_ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) total[r] = vf_zero();
    for (int d = 0; d < head_dim; d += 32) {
        vf even[MOST_ROWS], odd[MOST_ROWS];
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) even[r] = odd[r] = vf_zero();
        for (int i = d; i < d + 32; i += 2) {
            const vi pairs = vi_load(keys + i * SUB);
            const vf key_even = vf_even(pairs), key_odd = vf_odd(pairs);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                even[r] = vf_fma(key_even, vf_set1(query[r * head_dim + i]), even[r]);
                odd[r] = vf_fma(key_odd, vf_set1(query[r * head_dim + i + 1]), odd[r]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) total[r] = vf_add(total[r], vf_add(even[r], odd[r]));
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) vf_store(scores + (size_t)r * stride, total[r]);
}

/* Add one block's values, `pairs` pairs of positions, weighted by 32 probabilities of each row, to out [rows][dim]. */
INLINE void value_rows(const uint16_t *values, int head_dim, const float *weights, size_t stride, int pairs,
                       const int rows, float *out) {
    for (int d = 0; d < head_dim; d += LANES) {
        vf even[MOST_ROWS], odd[MOST_ROWS];
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) even[r] = odd[r] = vf_zero();
        for (int i = 0; i < pairs; i++) {
            const vi both = vi_load(values + (i * head_dim + d) * 2);
            const vf value_even = vf_even(both), value_odd = vf_odd(both);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                even[r] = vf_fma(value_even, vf_set1(weights[(size_t)r * stride + (size_t)(2 * i)]), even[r]);
                odd[r] = vf_fma(value_odd, vf_set1(weights[(size_t)r * stride + (size_t)(2 * i + 1)]), odd[r]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            float *to = out + r * head_dim + d;
            vf_store(to, vf_add(vf_load(to), vf_add(even[r], odd[r])));
        }
    }
}

#define DEFINE(rows)                                                                                             \
    static void score_##rows(const uint16_t *keys, int dim, const float *query, float *scores, size_t stride) {  \
        score_rows(keys, dim, query, rows, scores, stride);                                                      \
    }                                                                                                            \
    static void value_##rows(const uint16_t *values, int dim, const float *weights, size_t stride, int pairs,    \
                             float *out) {                                                                       \
        value_rows(values, dim, weights, stride, pairs, rows, out);                                              \
    }
DEFINE(1) DEFINE(2) DEFINE(3)
#if MOST_ROWS >= 12
DEFINE(6) DEFINE(12)
#endif

typedef struct {
    int rows;
    void (*score)(const uint16_t *, int, const float *, float *, size_t);
    void (*value)(const uint16_t *, int, const float *, size_t, int, float *);
} RowsKernel;

static const RowsKernel KERNELS[] = {
#if MOST_ROWS >= 12
    {12, score_12, value_12}, {6, score_6, value_6},
#endif
    {3, score_3, value_3}, {2, score_2, value_2}, {1, score_1, value_1},
};

/* A few rows of one head of keys, which share every read. */
typedef struct {
    const Attention *a;
    const RowsKernel *kernel; /* NULL where the matrix unit computes them */
    int layer, head;
    int first, count; /* rows within the head: node * group + query head */
    size_t stride;    /* floats between the scores of two rows */
    float *scores, *node_scores, *out;
    uint16_t *weights, *query; /* in bfloat16, for the matrix unit: the weights have the scores' stride */
} Rows;

static int node_of(const Rows *rows, int r) { return (rows->first + r) / rows->a->group; }
static int position_of(const Rows *rows, int r) { return rows->a->length + rows->a->depth[node_of(rows, r)]; }

static uint16_t *block_of(const Rows *rows, int position) {
    const Cache *cache = rows->a->cache;
    return cache_block(cache, cache->pages[position / PAGE_KEYS], rows->layer, rows->head, position);
}

/* Ask for half a block (keys or values) a few blocks ahead; the pages are too far apart for the memory's read-ahead. */
static void prefetch_ahead(const Rows *rows, int key, int keys, int is_values) {
    enum { BLOCKS_AHEAD = 4 };
    const int ahead = key + BLOCKS_AHEAD * KEY_BLOCK, half = KEY_BLOCK * rows->a->cache->head_dim;
    if (ahead >= keys) return;
    const uint16_t *from = block_of(rows, ahead) + (is_values ? half : 0);
    for (int i = 0; i < half; i += 32) __builtin_prefetch(from + i, 0, 2);
}

static size_t row_stride(int length) { return ((size_t)length + 2 * KEY_BLOCK) / KEY_BLOCK * KEY_BLOCK; }

size_t attention_work(int length) {
    return MOST_ROWS * (row_stride(length) + SCRATCH_KEYS + MAX_HEAD_DIM + (row_stride(length) + MAX_HEAD_DIM) / 2);
}

/* Scores of a block of 32 keys, or of its first 16 where that is all there are. */
static void score_block(const Rows *rows, const uint16_t *block, const float *query, int keys, float *scores, size_t stride) {
    const int dim = rows->a->cache->head_dim;
#if defined(HAS_AMX)
    if (!rows->kernel) {
        amx_score_block(block, dim, rows->query, scores, stride);
        return;
    }
#endif
    for (int key = 0; key < keys && key < KEY_BLOCK; key += SUB)
        rows->kernel->score(block + key * dim, dim, query, scores + key, stride);
}

static void score_pages(const Rows *rows, const float *query, int keys) {
    for (int key = 0; key < keys; key += KEY_BLOCK) {
        prefetch_ahead(rows, key, keys, 0);
        score_block(rows, block_of(rows, key), query, keys - key, rows->scores + key, rows->stride);
    }
}

/* Score all nodes of the tree, and put those of a row's ancestors where their positions are. */
static void score_nodes(const Rows *rows, const float *query) {
    const Attention *a = rows->a;
    for (int node = 0; node < a->num_nodes; node += KEY_BLOCK) {
        const uint16_t *block = cache_block(a->cache, a->cache->scratch, rows->layer, rows->head, node);
        score_block(rows, block, query, a->num_nodes - node, rows->node_scores + node, SCRATCH_KEYS);
    }
    for (int r = 0; r < rows->count; r++) {
        const int node = node_of(rows, r), *ancestors = a->ancestors + node * MAX_ROWS;
        float *to = rows->scores + (size_t)r * rows->stride + a->length;
        for (int i = 0; i <= a->depth[node]; i++) to[i] = rows->node_scores[r * SCRATCH_KEYS + ancestors[i]];
    }
}

/* Turn scores [0, count) into weights rounded to bfloat16, zero from count to `end`; return one over their sum. */
static float softmax(float *scores, int count, int end) {
    const vf lowest = vf_set1(-INFINITY), zero = vf_zero();
    vf largest = lowest, sum = zero;
    for (int i = 0; i < count; i += LANES) {
        const int left = count - i;
        largest = vf_max(largest, left < LANES ? vf_first(left, vf_load(scores + i), lowest) : vf_load(scores + i));
    }
    largest = vf_set1(vf_largest(largest));
    for (int i = 0; i < count; i += LANES) {
        const int left = count - i;
        vf weight = vf_to_bf16(vf_exp(vf_sub(vf_load(scores + i), largest)));
        if (left < LANES) weight = vf_first(left, weight, zero);
        sum = vf_add(sum, weight);
        vf_store(scores + i, weight);
    }
    for (int i = (count + LANES - 1) / LANES * LANES; i < end; i += LANES) vf_store(scores + i, zero);
    return 1.0f / vf_sum(sum);
}

static void close_block(vf sums[2][MAX_HEAD_DIM / LANES], int vectors, float *out) {
    for (int d = 0; d < vectors; d++) {
        vf_store(out + LANES * d, vf_add(vf_load(out + LANES * d), vf_add(sums[0][d], sums[1][d])));
        sums[0][d] = sums[1][d] = vf_zero();
    }
}

/* The positions after the last full committed block: the block's committed part, then the row's ancestors. */
static void value_tail(const Rows *rows, int r) {
    const Attention *a = rows->a;
    const Cache *cache = a->cache;
    const int vectors = cache->head_dim / LANES, last = position_of(rows, r), start = a->length / KEY_BLOCK * KEY_BLOCK;
    const int *ancestors = a->ancestors + node_of(rows, r) * MAX_ROWS;
    const float *weights = rows->scores + (size_t)r * rows->stride;
    vf sums[2][MAX_HEAD_DIM / LANES];
    for (int d = 0; d < vectors; d++) sums[0][d] = sums[1][d] = vf_zero();
    for (int position = start; position <= last; position++) {
        const int is_node = position >= a->length, slot = is_node ? ancestors[position - a->length] : position;
        uint16_t *block = is_node ? cache_block(cache, cache->scratch, rows->layer, rows->head, slot) : block_of(rows, slot);
        const uint16_t *pair = cache_values(cache, block) + slot % KEY_BLOCK / 2 * 2 * cache->head_dim;
        vf *to = sums[position % 2];
        for (int d = 0; d < vectors; d++) {
            const vi both = vi_load(pair + 2 * LANES * d);
            to[d] = vf_fma(slot % 2 ? vf_odd(both) : vf_even(both), vf_set1(weights[position]), to[d]);
        }
        if (position % KEY_BLOCK == KEY_BLOCK - 1 || position == last)
            close_block(sums, vectors, rows->out + r * cache->head_dim);
    }
}

#if defined(HAS_AMX)
static const uint16_t *values_of(const void *rows, int key, int keys) {
    prefetch_ahead(rows, key, keys, 1);
    return cache_values(((const Rows *)rows)->a->cache, block_of(rows, key));
}
#endif

/* Sum the values of the committed positions; a chain's last block may be a part of one. */
static void value_pages(const Rows *rows, int keys) {
    const Cache *cache = rows->a->cache;
    int key = 0;
#if defined(HAS_AMX)
    if (!rows->kernel) {
        key = keys / KEY_BLOCK * KEY_BLOCK;
        for (int r = 0; r < rows->count; r++)
            to_pairs(rows->scores + (size_t)r * rows->stride, key, rows->weights + (size_t)r * rows->stride);
        amx_values(values_of, rows, cache->head_dim, rows->weights, rows->stride, key, rows->out);
    }
#endif
    for (; key < keys; key += KEY_BLOCK) {
        const int left = keys - key, pairs = left < KEY_BLOCK ? (left + 1) / 2 : KEY_BLOCK / 2;
        const uint16_t *values = cache_values(cache, block_of(rows, key));
        prefetch_ahead(rows, key, keys, 1);
        const RowsKernel *kernel = rows->kernel ? rows->kernel : KERNELS;
        for (int r = 0; r < rows->count; r += kernel->rows) {
            while (kernel->rows > rows->count - r) kernel++;
            kernel->value(values, cache->head_dim, rows->scores + (size_t)r * rows->stride + key, rows->stride, pairs,
                          rows->out + r * cache->head_dim);
        }
    }
}

static void finish_row(const Rows *rows, int r, float scale) {
    const Attention *a = rows->a;
    const int dim = a->cache->head_dim, query_head = rows->head * a->group + (rows->first + r) % a->group;
    float *out = rows->out + r * dim;
    for (int d = 0; d < dim; d += LANES) vf_store(out + d, vf_mul(vf_load(out + d), vf_set1(scale)));
    for (int d = 0; d < dim; d += 32) quantize_block(a->output, node_of(rows, r), (query_head * dim + d) / 32, out + d);
}

static void compute(const Rows *rows) {
    const Attention *a = rows->a;
    const int count = rows->count, dim = a->cache->head_dim, is_chain = a->ancestors == NULL;
    const float *query = a->query + ((size_t)rows->head * (size_t)(a->num_nodes * a->group) + (size_t)rows->first) * (size_t)dim;
    float scale[MOST_ROWS];
    int keys = a->length;
    if (is_chain) keys = position_of(rows, count - 1) + 1;
#if defined(HAS_AMX)
    if (!rows->kernel) to_pairs(query, count * dim, rows->query);
#endif
    score_pages(rows, query, keys);
    if (!is_chain) score_nodes(rows, query);
    for (int r = 0; r < count; r++)
        scale[r] = softmax(rows->scores + (size_t)r * rows->stride, position_of(rows, r) + 1, (keys + 31) / 32 * 32);
    memset(rows->out, 0, sizeof(float) * (size_t)(count * dim));
    value_pages(rows, is_chain ? keys : keys / KEY_BLOCK * KEY_BLOCK);
    for (int r = 0; r < count; r++) {
        if (!is_chain) value_tail(rows, r);
        finish_row(rows, r, scale[r]);
    }
}

/* Compute `left` rows from rows->first on: all at once on the matrix unit, or as the kernels can take them. */
static void compute_all(Rows *rows, int left) {
#if defined(HAS_AMX)
    if (amx_is_granted()) {
        rows->count = left;
        amx_attention_begin(left);
        compute(rows);
        linear_begin(rows->a->num_nodes);
        return;
    }
#endif
    for (; left > 0; left -= rows->count, rows->first += rows->count) {
        for (rows->kernel = KERNELS; rows->kernel->rows > left;) rows->kernel++;
        rows->count = rows->kernel->rows;
        compute(rows);
    }
}

/* Rows of one item: enough items for all threads, as many rows as share their reads within one, and a head's items
 * about as long as each other, in threes, which kernels take whole. */
static int rows_per_item(const Attention *a, int num_threads) {
    const int even = a->num_heads * a->num_nodes / (2 * num_threads), rows = a->num_nodes * a->group;
    const int most = even < 1 ? 1 : even > MOST_ROWS ? MOST_ROWS : even, items = (rows + most - 1) / most;
    const int each = (rows + items - 1) / items, threes = (each + 2) / 3 * 3;
    return each < 3 || threes > MOST_ROWS ? each : threes;
}

static int items_per_head(const Attention *a, int num_threads) {
    const int rows = rows_per_item(a, num_threads);
    return (a->num_nodes * a->group + rows - 1) / rows;
}

int attention_items(const Attention *a, int num_threads) {
    return a->cache->num_heads * items_per_head(a, num_threads);
}

void attention_item(const Attention *a, int layer, int item, int num_threads, float *work) {
    const int per_head = a->num_nodes * a->group, per_item = rows_per_item(a, num_threads);
    Rows rows = {.a = a, .layer = layer, .stride = row_stride(a->length + a->num_nodes)};
    rows.scores = work;
    rows.node_scores = rows.scores + MOST_ROWS * rows.stride;
    rows.out = rows.node_scores + MOST_ROWS * SCRATCH_KEYS;
    rows.weights = (uint16_t *)(rows.out + MOST_ROWS * MAX_HEAD_DIM);
    rows.query = rows.weights + MOST_ROWS * rows.stride;
    rows.head = item / items_per_head(a, num_threads);
    rows.first = item % items_per_head(a, num_threads) * per_item;
    compute_all(&rows, per_head - rows.first < per_item ? per_head - rows.first : per_item);
}
