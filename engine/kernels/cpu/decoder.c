/* One step of a Llama-family decoder over the rows of a candidate tree, from token ids to normalised hidden states.
 *
 * A step is one task of the thread pool: each phase is shared out by rows, heads or tiles, with a barrier after it.
 * A chain (a prompt's chunk, or plain decoding) writes its keys and values where its positions are; a tree writes
 * them to the scratch page, and `decoder_commit` moves the accepted ones.
 */
#include "api.h"
#include "attention.h"
#include "simd.h"

#define BLOCK 32

enum { MAX_HEAD_DIM = 256 };

struct Decoder {
    DecoderConfig config;
    DecoderLayer *layers;
    const Matrix *embedding;
    const float *norm, *cosines, *sines;
    Pool *pool;
    Cache cache;
    int length;               /* committed positions */
    int num_nodes, is_chain;  /* of the last step; 0 nodes when there is nothing to commit */
    int32_t tokens[MAX_ROWS], parents[MAX_ROWS];
    int depth[MAX_ROWS], ancestors[MAX_ROWS * MAX_ROWS];
    Activations to_layer, to_output, to_down; /* quantised inputs of QKV and gate/up, of the output, of down */
    float *x, *query, *hidden;
    float *squares; /* [chunks][hidden / 16][16 rows] */
    double *times, started; /* seconds of each part, or NULL */
    float *work[MAX_THREADS];
    size_t work_floats, fixed_bytes;
    void *memory;
};

/* Hands out parts of one region; counts only, while there is no region. */
typedef struct {
    char *memory;
    size_t used;
} Bump;

static void *take(Bump *bump, size_t bytes) {
    const size_t at = bump->used;
    bump->used += (bytes + 63) / 64 * 64;
    return bump->memory ? bump->memory + at : NULL;
}

static size_t place(Decoder *d, char *memory) {
    const DecoderConfig *c = &d->config;
    const int wide = c->heads * c->head_dim, inputs[] = {c->hidden, wide, c->intermediate};
    Activations *all[] = {&d->to_layer, &d->to_output, &d->to_down};
    Bump bump = {memory, 0};
    d->x = take(&bump, sizeof(float) * MAX_ROWS * (size_t)c->hidden);
    d->squares = take(&bump, sizeof(float) * MAX_ROWS * (size_t)(c->hidden / TILE));
    d->query = take(&bump, sizeof(float) * MAX_ROWS * (size_t)wide);
    d->layers = take(&bump, sizeof(DecoderLayer) * (size_t)c->layers);
    for (int i = 0; i < 3; i++) {
        void *p = take(&bump, activations_bytes(inputs[i]));
        if (p) activations_place(all[i], p, inputs[i]);
    }
    return bump.used;
}

Decoder *decoder_create(Pool *pool, const DecoderConfig *config, const DecoderLayer *layers, const float *norm,
                        const Matrix *embedding, const float *cosines, const float *sines) {
    Decoder *d = zeroed_memory(sizeof(Decoder));
    if (!d) return NULL;
    d->config = *config;
    d->pool = pool;
    d->norm = norm;
    d->embedding = embedding;
    d->cosines = cosines;
    d->sines = sines;
    d->fixed_bytes = place(d, NULL);
    d->memory = zeroed_memory(d->fixed_bytes);
    if (!d->memory || !cache_create(&d->cache, config->layers, config->kv_heads, config->head_dim, config->max_positions)) {
        aligned_release(d->memory);
        aligned_release(d);
        return NULL;
    }
    place(d, d->memory);
    memcpy(d->layers, layers, sizeof(DecoderLayer) * (size_t)config->layers);
    return d;
}

void decoder_free(Decoder *d) {
    if (!d) return;
    cache_free(&d->cache);
    for (int i = 0; i < MAX_THREADS; i++) aligned_release(d->work[i]);
    aligned_release(d->memory);
    aligned_release(d);
}

size_t decoder_bytes(const Decoder *d) {
    return sizeof(Decoder) + d->fixed_bytes + cache_bytes(&d->cache) +
           d->work_floats * sizeof(float) * (size_t)pool_size(d->pool);
}

int decoder_length(const Decoder *d) { return d->length; }

void decoder_measure(Decoder *d, double *times) { d->times = times; }

/* The sum of squares of 16 columns of a row, kept with those of the other rows of its chunk. */
static void keep_squares(const Decoder *d, int row, int tile, vf x) {
    const size_t tiles = (size_t)d->config.hidden / TILE, chunk = (size_t)row / CHUNK;
    d->squares[(chunk * tiles + (size_t)tile) * CHUNK + (size_t)(row % CHUNK)] = vf_sum(vf_mul(x, x));
}

/* One over the root mean square of each row of a chunk. */
static vf norm_scales(const Decoder *d, int chunk) {
    const int tiles = d->config.hidden / TILE;
    const float *squares = d->squares + (size_t)chunk * (size_t)tiles * CHUNK;
    vf sum = vf_zero();
    for (int tile = 0; tile < tiles; tile++) sum = vf_add(sum, vf_load(squares + tile * CHUNK));
    const vf mean = vf_div(sum, vf_set1((float)d->config.hidden));
    return vf_div(vf_set1(1.0f), vf_sqrt(vf_add(mean, vf_set1(d->config.eps))));
}

/* Norm 32 columns of all rows, into `hidden` or, where that is NULL, quantised for the layer. Items are columns, as the
 * rows of a chunk share cache lines, and two threads that write to one line wait for each other. */
static void norm_block(const Decoder *d, const float *weight, int block, float *hidden) {
    float scales[CHUNK], normed[BLOCK];
    const vf weights[2] = {vf_load(weight + block * BLOCK), vf_load(weight + block * BLOCK + LANES)};
    for (int row = 0; row < d->num_nodes; row++) {
        const size_t at = (size_t)row * (size_t)d->config.hidden + (size_t)(block * BLOCK);
        if (row % CHUNK == 0) vf_store(scales, norm_scales(d, row / CHUNK));
        for (int half = 0; half < 2; half++) {
            const vf x = vf_load(d->x + at + half * LANES);
            vf_store(normed + half * LANES, vf_mul(vf_mul(x, vf_set1(scales[row % CHUNK])), weights[half]));
        }
        if (hidden) memcpy(hidden + at, normed, sizeof normed);
        else quantize_block(&d->to_layer, row, block, normed);
    }
}

static void embed(const Decoder *d, int row) {
    float *x = d->x + (size_t)row * (size_t)d->config.hidden;
    matrix_row(d->embedding, d->tokens[row], x);
    for (int tile = 0; tile < d->config.hidden / TILE; tile++) keep_squares(d, row, tile, vf_load(x + tile * TILE));
}

/* Rotate pairs (i, i + half) of one head by the angles of a position. */
static void rotate(const Decoder *d, float *head, int position) {
    const int half = d->config.head_dim / 2;
    const float *cosines = d->cosines + (size_t)position * (size_t)half, *sines = d->sines + (size_t)position * (size_t)half;
    for (int i = 0; i < half; i += LANES) {
        const vf low = vf_load(head + i), high = vf_load(head + half + i);
        const vf cosine = vf_load(cosines + i), sine = vf_load(sines + i);
        vf_store(head + i, vf_fma(vf_sub(vf_zero(), high), sine, vf_mul(low, cosine)));
        vf_store(head + half + i, vf_fma(low, sine, vf_mul(high, cosine)));
    }
}

static void round_scaled(float *x, int size, float scale) {
    for (int i = 0; i < size; i += LANES) vf_store(x + i, vf_to_bf16(vf_mul(vf_load(x + i), vf_set1(scale))));
}

static uint16_t *key_block(const Decoder *d, int layer, int head, int row, int *slot) {
    *slot = d->is_chain ? d->length + row : row;
    uint16_t *page = d->is_chain ? d->cache.pages[*slot / PAGE_KEYS] : d->cache.scratch;
    return cache_block(&d->cache, page, layer, head, *slot);
}

static void keep_query(const Decoder *d, int head, int row, float *values) {
    const int dim = d->config.head_dim, group = d->config.heads / d->config.kv_heads;
    const size_t at = (size_t)(head / group) * (size_t)(d->num_nodes * group) + (size_t)(row * group + head % group);
    rotate(d, values, d->length + d->depth[row]);
    round_scaled(values, dim, 1.0f / sqrtf((float)dim));
    memcpy(d->query + at * (size_t)dim, values, sizeof(float) * (size_t)dim);
}

/* Compute one head's query, key or value of all rows and put it where attention finds it. */
static void project_head(Decoder *d, int layer, int job) {
    const DecoderConfig *c = &d->config;
    const DecoderLayer *weights = &d->layers[layer];
    const int is_query = job < c->heads, is_key = !is_query && job < c->heads + c->kv_heads, dim = c->head_dim;
    const int head = is_query ? job : (job - c->heads) % c->kv_heads;
    const Matrix *matrix = is_query ? weights->query : is_key ? weights->key : weights->value;
    _Alignas(64) float tiles[MAX_HEAD_DIM / TILE][MAX_ROWS * TILE], values[MAX_HEAD_DIM];
    linear_tiles(matrix, head * dim / TILE, dim / TILE, &d->to_layer, d->num_nodes, tiles[0]);
    for (int row = 0; row < d->num_nodes; row++) {
        int slot;
        for (int tile = 0; tile < dim / TILE; tile++) vf_store(values + tile * TILE, vf_load(tiles[tile] + row * TILE));
        if (is_query) {
            keep_query(d, head, row, values);
            continue;
        }
        uint16_t *block = key_block(d, layer, head, row, &slot);
        if (is_key) rotate(d, values, d->length + d->depth[row]);
        round_scaled(values, dim, 1.0f);
        if (is_key) cache_put_key(&d->cache, block, slot, values);
        else cache_put_value(&d->cache, block, slot, values);
    }
}

/* x += matrix times the quantised input, for 32 outputs of all rows. */
static void project_back(Decoder *d, const Matrix *matrix, const Activations *input, int block) {
    _Alignas(64) float out[2][MAX_ROWS * TILE];
    linear_tiles(matrix, 2 * block, 2, input, d->num_nodes, out[0]);
    for (int row = 0; row < d->num_nodes; row++)
        for (int half = 0; half < 2; half++) {
            const int tile = 2 * block + half;
            float *x = d->x + (size_t)row * (size_t)d->config.hidden + (size_t)(tile * TILE);
            const vf sum = vf_add(vf_load(x), vf_load(out[half] + row * TILE));
            vf_store(x, sum);
            keep_squares(d, row, tile, sum);
        }
}

/* SiLU(gate) * up for 32 channels of all rows, quantised for the down projection. */
static void gate_up_block(Decoder *d, const DecoderLayer *weights, int block) {
    _Alignas(64) float gate[2][MAX_ROWS * TILE], up[2][MAX_ROWS * TILE], values[BLOCK];
    linear_tiles(weights->gate, 2 * block, 2, &d->to_layer, d->num_nodes, gate[0]);
    linear_tiles(weights->up, 2 * block, 2, &d->to_layer, d->num_nodes, up[0]);
    for (int row = 0; row < d->num_nodes; row++) {
        for (int half = 0; half < 2; half++) {
            const vf silu = vf_silu(vf_load(gate[half] + row * TILE));
            vf_store(values + half * LANES, vf_mul(silu, vf_load(up[half] + row * TILE)));
        }
        quantize_block(&d->to_down, row, block, values);
    }
}

static void lap(Decoder *d, const Walk *walk, int part) {
    if (!d->times || walk->thread) return;
    const double now = seconds_now();
    d->times[part] += now - d->started;
    d->started = now;
}

static void run_layer(Decoder *d, int layer, Walk *walk, int num_threads) {
    const DecoderConfig *c = &d->config;
    const DecoderLayer *weights = &d->layers[layer];
    const Attention attention = {&d->cache, c->heads, c->heads / c->kv_heads, d->length, d->num_nodes, d->depth,
                                 d->is_chain ? NULL : d->ancestors, d->query, &d->to_output};
    FOR_EACH_ITEM(walk, block, c->hidden / BLOCK) norm_block(d, weights->attention_norm, block, NULL);
    lap(d, walk, PART_NORMS);
    FOR_EACH_ITEM(walk, head, c->heads + 2 * c->kv_heads) project_head(d, layer, head);
    lap(d, walk, PART_QKV);
    FOR_EACH_ITEM(walk, item, attention_items(&attention, num_threads))
        attention_item(&attention, layer, item, num_threads, d->work[walk->thread]);
    lap(d, walk, PART_ATTENTION);
    FOR_EACH_ITEM(walk, block, c->hidden / BLOCK) project_back(d, weights->output, &d->to_output, block);
    lap(d, walk, PART_OUTPUT);
    FOR_EACH_ITEM(walk, block, c->hidden / BLOCK) norm_block(d, weights->mlp_norm, block, NULL);
    lap(d, walk, PART_NORMS);
    FOR_EACH_ITEM(walk, block, c->intermediate / BLOCK) gate_up_block(d, weights, block);
    lap(d, walk, PART_GATE_UP);
    FOR_EACH_ITEM(walk, block, c->hidden / BLOCK) project_back(d, weights->down, &d->to_down, block);
    lap(d, walk, PART_DOWN);
}

static void step_task(void *context, int thread, int num_threads) {
    Decoder *d = context;
    Walk walk = pool_enter(d->pool, thread);
    FOR_EACH_ITEM(&walk, row, d->num_nodes) embed(d, row);
    linear_begin(d->num_nodes);
    if (d->times && !thread) d->started = seconds_now();
    for (int layer = 0; layer < d->config.layers; layer++) run_layer(d, layer, &walk, num_threads);
    linear_end();
    FOR_EACH_ITEM(&walk, block, d->config.hidden / BLOCK) norm_block(d, d->norm, block, d->hidden);
}

/* Depths and ancestor lists from parents; 0 when a parent does not precede its child. */
static int set_tree(Decoder *d, const int32_t *parents, int rows) {
    d->is_chain = 1;
    for (int row = 0; row < rows; row++) {
        const int parent = parents ? parents[row] : row - 1;
        if (parent >= row || (row == 0 ? parent != -1 : parent < 0)) return 0;
        d->parents[row] = parent;
        d->depth[row] = row ? d->depth[parent] + 1 : 0;
        d->is_chain &= parent == row - 1;
    }
    for (int row = 0; row < rows && !d->is_chain; row++)
        for (int node = row; node >= 0; node = d->parents[node]) d->ancestors[row * MAX_ROWS + d->depth[node]] = node;
    return 1;
}

static int reserve(Decoder *d) {
    const size_t needed = attention_work(d->length + d->num_nodes);
    if (needed > d->work_floats) {
        const size_t floats = needed + needed / 2;
        for (int i = 0; i < pool_size(d->pool); i++) {
            aligned_release(d->work[i]);
            d->work[i] = zeroed_memory(floats * sizeof(float));
            if (!d->work[i]) return d->work_floats = 0, 0;
        }
        d->work_floats = floats;
    }
    return cache_reserve(&d->cache, d->length + (d->is_chain ? d->num_nodes : 0), !d->is_chain);
}

int decoder_step(Decoder *d, const int32_t *tokens, const int32_t *parents, int rows, float *hidden) {
    d->num_nodes = 0;
    if (rows < 1 || rows > MAX_ROWS || !set_tree(d, parents, rows)) return STATUS_BAD_CALL;
    for (int row = 0; row < rows; row++)
        if (d->length + d->depth[row] >= d->config.max_positions || tokens[row] < 0 || tokens[row] >= d->config.vocab)
            return STATUS_BAD_CALL;
    d->num_nodes = rows;
    if (!reserve(d)) {
        d->num_nodes = 0;
        return STATUS_NO_MEMORY;
    }
    memcpy(d->tokens, tokens, sizeof(int32_t) * (size_t)rows);
    d->hidden = hidden;
    pool_run(d->pool, step_task, d);
    return STATUS_OK;
}

int decoder_commit(Decoder *d, const int32_t *path, int count) {
    for (int i = 0; i < count; i++) {
        if (path[i] < 0 || path[i] >= d->num_nodes) return STATUS_BAD_CALL;
        if (d->parents[path[i]] != (i ? path[i - 1] : -1)) return STATUS_BAD_CALL;
    }
    if (!cache_reserve(&d->cache, d->length + count, 0)) return STATUS_NO_MEMORY;
    for (int i = 0; i < count && !d->is_chain; i++) cache_adopt(&d->cache, path[i], d->length + i);
    d->length += count;
    d->num_nodes = 0;
    return STATUS_OK;
}

int decoder_truncate(Decoder *d, int length) {
    if (length < 0 || length > d->length) return STATUS_BAD_CALL;
    d->length = length;
    d->num_nodes = 0;
    cache_release(&d->cache, length);
    return STATUS_OK;
}

void decoder_rows(const Decoder *d, int layer, float *keys, float *values) {
    const Cache *cache = &d->cache;
    for (int head = 0; head < cache->num_heads; head++)
        for (int position = 0; position < d->length; position++) {
            const size_t row = ((size_t)head * (size_t)d->length + (size_t)position) * (size_t)cache->head_dim;
            uint16_t *block = cache_block(cache, cache->pages[position / PAGE_KEYS], layer, head, position);
            cache_get(cache, block, position, keys + row, values + row);
        }
}
