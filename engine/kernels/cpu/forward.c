/* One step of a Llama-family decoder over the rows of a candidate tree, from token ids to normalised hidden states.
 *
 * A step is one task of the thread pool: each phase is shared out by rows, heads or tiles, with a barrier after it.
 * The prefix attention of draft heads adds three phases at the end; what it reads of middle layers it gets from the
 * norms of the layers after them, which have it at hand.
 */
#include "decoder.h"
#include "simd.h"

#define BLOCK 32

enum { MAX_HEAD_DIM = 256 };

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

/* Where in the prefix attention's input goes what leaves `layer`: 1 or more; 0 where this step does not need it. */
static int feature_of(const Decoder *d, int layer) {
    for (int i = 0; i < d->prefix.num_reads && d->with_prefix; i++)
        if (d->prefix.reads[i] == layer) return 1 + i;
    return 0;
}

static void keep_feature(const Decoder *d, int feature, int row, int block, const float *values) {
    quantize_block(&d->prefix.input, row, feature * (d->config.hidden / BLOCK) + block, values);
}

/* Scale 32 columns of all rows to unit root mean square, keep them as a feature unless that is 0, and weigh them. The
 * last norm has a place for hidden states, and its results take the place of x; others are quantised for the layer.
 * Items are columns, as the rows of a chunk share cache lines, and two threads that write to one line wait for each
 * other. */
static void norm_block(Decoder *d, const float *weight, int block, int feature, float *hidden) {
    float scales[CHUNK], unit[BLOCK], normed[BLOCK];
    const vf weights[2] = {vf_load(weight + block * BLOCK), vf_load(weight + block * BLOCK + LANES)};
    for (int row = 0; row < d->num_nodes; row++) {
        const size_t at = (size_t)row * (size_t)d->config.hidden + (size_t)(block * BLOCK);
        if (row % CHUNK == 0) vf_store(scales, norm_scales(d, row / CHUNK));
        for (int half = 0; half < 2; half++) {
            const vf scaled = vf_mul(vf_load(d->x + at + half * LANES), vf_set1(scales[row % CHUNK]));
            if (feature) vf_store(unit + half * LANES, scaled);
            vf_store(normed + half * LANES, vf_mul(scaled, weights[half]));
        }
        if (feature) keep_feature(d, feature, row, block, unit);
        if (!hidden) {
            quantize_block(&d->to_layer, row, block, normed);
            continue;
        }
        memcpy(hidden + at, normed, sizeof normed);
        memcpy(d->x + at, normed, sizeof normed);
        if (d->with_prefix) keep_feature(d, 0, row, block, normed);
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
static void project_head(Decoder *d, int layer, const Activations *input, int job) {
    const DecoderConfig *c = &d->config;
    const DecoderLayer *weights = &d->layers[layer];
    const int is_query = job < c->heads, is_key = !is_query && job < c->heads + c->kv_heads, dim = c->head_dim;
    const int head = is_query ? job : (job - c->heads) % c->kv_heads;
    const Matrix *matrix = is_query ? weights->query : is_key ? weights->key : weights->value;
    _Alignas(64) float tiles[MAX_HEAD_DIM / TILE][MAX_ROWS * TILE], values[MAX_HEAD_DIM];
    linear_tiles(matrix, head * dim / TILE, dim / TILE, input, d->num_nodes, tiles[0]);
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

/* The parts of the prefix attention, which is the layer after the last, count as one. */
static void lap(Decoder *d, const Walk *walk, int layer, int part) {
    if (!d->times || walk->thread) return;
    const double now = seconds_now();
    d->times[layer < d->config.layers ? part : PART_PREFIX] += now - d->started;
    d->started = now;
}

/* x += a layer's attention over its quantised input. */
static void attend(Decoder *d, int layer, const Activations *input, Walk *walk, int num_threads) {
    const DecoderConfig *c = &d->config;
    const Attention attention = {&d->cache, c->heads, c->heads / c->kv_heads, d->length, d->num_nodes, d->depth,
                                 d->is_chain ? NULL : d->ancestors, d->query, &d->to_output};
    FOR_EACH_ITEM(walk, head, c->heads + 2 * c->kv_heads) project_head(d, layer, input, head);
    lap(d, walk, layer, PART_QKV);
    FOR_EACH_ITEM(walk, item, attention_items(&attention, num_threads))
        attention_item(&attention, layer, item, num_threads, d->work[walk->thread]);
    lap(d, walk, layer, PART_ATTENTION);
    FOR_EACH_ITEM(walk, block, c->hidden / BLOCK) project_back(d, d->layers[layer].output, &d->to_output, block);
    lap(d, walk, layer, PART_OUTPUT);
}

static void run_layer(Decoder *d, int layer, Walk *walk, int num_threads) {
    const DecoderConfig *c = &d->config;
    const DecoderLayer *weights = &d->layers[layer];
    const int feature = feature_of(d, layer - 1);
    FOR_EACH_ITEM(walk, block, c->hidden / BLOCK) norm_block(d, weights->attention_norm, block, feature, NULL);
    lap(d, walk, layer, PART_NORMS);
    attend(d, layer, &d->to_layer, walk, num_threads);
    FOR_EACH_ITEM(walk, block, c->hidden / BLOCK) norm_block(d, weights->mlp_norm, block, 0, NULL);
    lap(d, walk, layer, PART_NORMS);
    FOR_EACH_ITEM(walk, block, c->intermediate / BLOCK) gate_up_block(d, weights, block);
    lap(d, walk, layer, PART_GATE_UP);
    FOR_EACH_ITEM(walk, block, c->hidden / BLOCK) project_back(d, weights->down, &d->to_down, block);
    lap(d, walk, layer, PART_DOWN);
}

static void step_task(void *context, int thread, int num_threads) {
    Decoder *d = context;
    Walk walk = pool_enter(d->pool, thread);
    FOR_EACH_ITEM(&walk, row, d->num_nodes) embed(d, row);
    linear_begin(d->num_nodes);
    if (d->times && !thread) d->started = seconds_now();
    const int layers = d->config.layers, feature = feature_of(d, layers - 1);
    for (int layer = 0; layer < layers; layer++) run_layer(d, layer, &walk, num_threads);
    FOR_EACH_ITEM(&walk, block, d->config.hidden / BLOCK) norm_block(d, d->norm, block, feature, d->hidden);
    lap(d, &walk, layers - 1, PART_NORMS);
    if (d->with_prefix) attend(d, layers, &d->prefix.input, &walk, num_threads);
    linear_end();
}

void decoder_forward(Decoder *d) { pool_run(d->pool, step_task, d); }
