/* A Llama-family decoder: its memory, the text that it holds, and the tree that a step adds to it.
 *
 * A chain (a prompt's chunk, or plain decoding) writes its keys and values where its positions are; a tree writes
 * them to the scratch page, and `decoder_commit` moves the accepted ones. What a step computes is in forward.c.
 * The prefix attention's keys and values are one more layer of the cache; it has them for leading positions alone, as
 * steps may leave it out.
 */
#include "decoder.h"

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
    d->heads_state = take(&bump, sizeof(float) * (size_t)c->hidden);
    d->layers = take(&bump, sizeof(DecoderLayer) * (size_t)(c->layers + 1));
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

/* The new memory is had before anything is given up, so a decoder stays as it was where there is none. */
int decoder_attach(Decoder *d, const PrefixLayer *layer, const int32_t *reads, int num_reads) {
    const DecoderConfig *c = &d->config;
    const int inputs = (1 + num_reads) * c->hidden;
    Cache cache;
    if (d->length || d->prefix.memory || num_reads < 0) return STATUS_BAD_CALL;
    Prefix prefix = {.num_reads = num_reads, .bytes = activations_bytes(inputs) + sizeof(int32_t) * (size_t)num_reads};
    prefix.memory = zeroed_memory(prefix.bytes);
    if (!prefix.memory || !cache_create(&cache, c->layers + 1, c->kv_heads, c->head_dim, c->max_positions)) {
        aligned_release(prefix.memory);
        return STATUS_NO_MEMORY;
    }
    activations_place(&prefix.input, prefix.memory, inputs);
    prefix.reads = (int32_t *)((char *)prefix.memory + activations_bytes(inputs));
    memcpy(prefix.reads, reads, sizeof(int32_t) * (size_t)num_reads);
    cache_free(&d->cache);
    d->cache = cache;
    d->prefix = prefix;
    d->layers[c->layers] = (DecoderLayer){
        .query = layer->query, .key = layer->key, .value = layer->value, .output = layer->output};
    d->num_nodes = 0;
    return STATUS_OK;
}

void decoder_free(Decoder *d) {
    if (!d) return;
    cache_free(&d->cache);
    for (int i = 0; i < MAX_THREADS; i++) aligned_release(d->work[i]);
    aligned_release(d->prefix.memory);
    aligned_release(d->memory);
    aligned_release(d);
}

size_t decoder_bytes(const Decoder *d) {
    return sizeof(Decoder) + d->fixed_bytes + d->prefix.bytes + cache_bytes(&d->cache) +
           d->work_floats * sizeof(float) * (size_t)pool_size(d->pool);
}

int decoder_length(const Decoder *d) { return d->length; }

int decoder_prefixed(const Decoder *d) { return d->prefix.memory ? d->prefixed : d->length; }

void decoder_measure(Decoder *d, double *times) { d->times = times; }

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

int decoder_step(Decoder *d, const int32_t *tokens, const int32_t *parents, int rows, int for_heads, float *hidden) {
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
    d->with_prefix = for_heads && d->prefix.memory && d->prefixed == d->length;
    d->hidden = hidden;
    decoder_forward(d);
    return STATUS_OK;
}

int decoder_commit(Decoder *d, const int32_t *path, int count) {
    for (int i = 0; i < count; i++) {
        if (path[i] < 0 || path[i] >= d->num_nodes) return STATUS_BAD_CALL;
        if (d->parents[path[i]] != (i ? path[i - 1] : -1)) return STATUS_BAD_CALL;
    }
    if (!cache_reserve(&d->cache, d->length + count, 0)) return STATUS_NO_MEMORY;
    for (int i = 0; i < count && !d->is_chain; i++) cache_adopt(&d->cache, path[i], d->length + i);
    if (count) {
        const size_t hidden = (size_t)d->config.hidden;
        memcpy(d->heads_state, d->x + (size_t)path[count - 1] * hidden, sizeof(float) * hidden);
        d->has_heads_state = 1;
        if (d->with_prefix) d->prefixed += count;
    }
    d->length += count;
    d->num_nodes = 0;
    return STATUS_OK;
}

int decoder_truncate(Decoder *d, int length) {
    if (length < 0 || length > d->length) return STATUS_BAD_CALL;
    if (length < d->length) d->has_heads_state = 0;
    if (length < d->prefixed) d->prefixed = length;
    d->length = length;
    d->num_nodes = 0;
    cache_release(&d->cache, length);
    return STATUS_OK;
}

int decoder_heads_state(const Decoder *d, float *state) {
    if (!d->has_heads_state) return STATUS_BAD_CALL;
    memcpy(state, d->heads_state, sizeof(float) * (size_t)d->config.hidden);
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
