/* Draft heads: from the hidden state and the tokens on each path to guesses for the next depth, one depth at a time.
 *
 * x + down(SiLU(up(x, embeddings of the tokens seen))), a few such blocks, then scores over the draft vocabulary. All
 * nodes of a depth that have children are rows of one product. Guesses need no exactness.
 */
#include "api.h"
#include "search.h"
#include "simd.h"

#define BLOCK 32

enum { TILES_PER_ITEM = 8, MOST_GUESSES = 64 };

struct Drafter {
    DrafterConfig config;
    Pool *pool;
    const Matrix *embedding;
    const int32_t *token_map; /* NULL where the draft vocabulary is the whole one */
    const Matrix **matrices;  /* [heads][blocks][up, down], output */
    int32_t *num_seen;
    /* One run */
    const float *hidden;
    const int32_t *parents, *ranks;
    int32_t *tokens;
    float *probabilities;
    int num_nodes, depths;
    int depth[MAX_ROWS];
    int num_rows[MAX_ROWS], rows[MAX_ROWS][MAX_ROWS]; /* of each depth: the nodes that guesses are made for */
    int guesses[MAX_ROWS];                            /* of each depth: 1 + the highest rank asked for */
    /* Work memory */
    float *x, *scores;
    void *to_up, *to_down, *to_output;
    size_t bytes, score_floats;
};

static const Matrix *matrix_of(const Drafter *d, int head, int which) {
    return d->matrices[head * (2 * d->config.blocks + 1) + which];
}

static int most_seen(const Drafter *d) {
    int most = 0;
    for (int head = 0; head < d->config.heads; head++) most = d->num_seen[head] > most ? d->num_seen[head] : most;
    return most;
}

void drafter_free(Drafter *d) {
    if (!d) return;
    void *parts[] = {d->matrices, d->num_seen, d->x, d->to_up, d->to_down, d->to_output, d->scores};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) aligned_release(parts[i]);
    aligned_release(d);
}

static void *part(Drafter *d, size_t bytes, const void *copy) {
    void *p = zeroed_memory(bytes);
    if (p && copy) memcpy(p, copy, bytes);
    d->bytes += bytes;
    return p;
}

Drafter *drafter_create(Pool *pool, const DrafterConfig *config, const int32_t *num_seen,
                        const Matrix *const *matrices, const Matrix *embedding, const int32_t *token_map) {
    Drafter *d = zeroed_memory(sizeof(Drafter));
    if (!d) return NULL;
    const int count = config->heads * (2 * config->blocks + 1), hidden = config->hidden;
    d->config = *config;
    d->pool = pool;
    d->embedding = embedding;
    d->token_map = token_map;
    d->bytes = sizeof(Drafter);
    d->matrices = part(d, sizeof(Matrix *) * (size_t)count, matrices);
    d->num_seen = part(d, sizeof(int32_t) * (size_t)config->heads, num_seen);
    d->x = part(d, sizeof(float) * MAX_ROWS * (size_t)hidden, NULL);
    d->to_up = d->num_seen ? part(d, activations_bytes(hidden * (1 + most_seen(d))), NULL) : NULL;
    d->to_down = part(d, activations_bytes(config->width), NULL);
    d->to_output = part(d, activations_bytes(hidden), NULL);
    if (d->matrices && d->num_seen && d->x && d->to_up && d->to_down && d->to_output) return d;
    drafter_free(d);
    return NULL;
}

size_t drafter_bytes(const Drafter *d) { return d->bytes; }

/* Scale an embedding to unit root mean square, as the heads were trained to see it. */
static void unit_scale(float *x, int size) {
    vf squares = vf_zero();
    for (int i = 0; i < size; i += LANES) squares = vf_fma(vf_load(x + i), vf_load(x + i), squares);
    const vf scale = vf_set1(1.0f / sqrtf(vf_sum(squares) / (float)size + 1e-6f));
    for (int i = 0; i < size; i += LANES) vf_store(x + i, vf_mul(vf_load(x + i), scale));
}

static void quantize_part(const Activations *to, int row, int first_block, const float *x, int size) {
    for (int block = 0; block < size / BLOCK; block++) quantize_block(to, row, first_block + block, x + block * BLOCK);
}

/* The input of a row: the hidden state, then the embeddings of the tokens from the root on that its head sees. */
static void gather(const Drafter *d, int depth, int row, const Activations *to) {
    const int hidden = d->config.hidden, blocks = hidden / BLOCK;
    float *x = d->x + (size_t)row * (size_t)hidden;
    int path[MAX_ROWS], node = d->rows[depth][row];
    for (; node >= 0; node = d->parents[node]) path[d->depth[node]] = node;
    for (int slot = 0; slot < d->num_seen[depth]; slot++) {
        matrix_row(d->embedding, d->tokens[path[slot]], x);
        unit_scale(x, hidden);
        quantize_part(to, row, (1 + slot) * blocks, x, hidden);
    }
    memcpy(x, d->hidden, sizeof(float) * (size_t)hidden);
    quantize_part(to, row, 0, x, hidden);
}

static void up_block(const Matrix *up, const Activations *from, const Activations *to, int rows, int block) {
    _Alignas(64) float out[2][MAX_ROWS * TILE], inner[BLOCK];
    linear_tiles(up, 2 * block, 2, from, rows, out[0]);
    for (int row = 0; row < rows; row++) {
        for (int half = 0; half < 2; half++) vf_store(inner + half * LANES, vf_silu(vf_load(out[half] + row * TILE)));
        quantize_block(to, row, block, inner);
    }
}

static void down_block(const Drafter *d, const Matrix *down, const Activations *from, int rows, int block) {
    _Alignas(64) float out[2][MAX_ROWS * TILE];
    linear_tiles(down, 2 * block, 2, from, rows, out[0]);
    for (int row = 0; row < rows; row++)
        for (int half = 0; half < 2; half++) {
            float *x = d->x + (size_t)row * (size_t)d->config.hidden + (size_t)((2 * block + half) * TILE);
            vf_store(x, vf_add(vf_load(x), vf_load(out[half] + row * TILE)));
        }
}

static void score_tiles(const Drafter *d, const Matrix *output, const Activations *from, int rows, int item) {
    _Alignas(64) float out[TILES_PER_ITEM][MAX_ROWS * TILE];
    const int tiles = (output->n + TILE - 1) / TILE, first = item * TILES_PER_ITEM;
    const int count = tiles - first < TILES_PER_ITEM ? tiles - first : TILES_PER_ITEM;
    linear_tiles(output, first, count, from, rows, out[0]);
    for (int i = 0; i < count; i++) {
        const int at = (first + i) * TILE, left = output->n - at, width = left < TILE ? left : TILE;
        for (int row = 0; row < rows; row++)
            memcpy(d->scores + (size_t)row * (size_t)output->n + (size_t)at, out[i] + row * TILE,
                   sizeof(float) * (size_t)width);
    }
}

/* Give a row's guesses to its children, or to those of all nodes of the depth where one row serves them all. */
static void hand_out(const Drafter *d, int depth, int row, int num_outputs) {
    const float *scores = d->scores + (size_t)row * (size_t)num_outputs;
    const int serves_all = d->num_seen[depth] <= 1;
    float values[MOST_GUESSES];
    int64_t indices[MOST_GUESSES];
    top_k_row(scores, num_outputs, d->guesses[depth], values, indices);
    const float sum = sum_of_exponentials(scores, num_outputs, values[0]);
    for (int node = 1; node < d->num_nodes; node++) {
        const int is_child = serves_all ? d->depth[node] == depth + 1 : d->parents[node] == d->rows[depth][row];
        if (!is_child) continue;
        const int64_t guess = indices[d->ranks[node]];
        d->tokens[node] = d->token_map ? d->token_map[guess] : (int32_t)guess;
        d->probabilities[node] = expf(values[d->ranks[node]] - values[0]) / sum;
    }
}

static void draft_depth(Drafter *d, int depth, Walk *walk) {
    const int hidden = d->config.hidden, rows = d->num_rows[depth];
    const Matrix *output = matrix_of(d, depth, 2 * d->config.blocks);
    const int score_items = ((output->n + TILE - 1) / TILE + TILES_PER_ITEM - 1) / TILES_PER_ITEM;
    Activations to_up, to_down, to_output;
    activations_place(&to_up, d->to_up, hidden * (1 + d->num_seen[depth]));
    activations_place(&to_down, d->to_down, d->config.width);
    activations_place(&to_output, d->to_output, hidden);
    FOR_EACH_ITEM(walk, row, rows) gather(d, depth, row, &to_up);
    for (int block = 0; block < d->config.blocks; block++) {
        const Matrix *up = matrix_of(d, depth, 2 * block), *down = matrix_of(d, depth, 2 * block + 1);
        FOR_EACH_ITEM(walk, item, d->config.width / BLOCK) up_block(up, block ? &to_output : &to_up, &to_down, rows, item);
        FOR_EACH_ITEM(walk, item, hidden / BLOCK) down_block(d, down, &to_down, rows, item);
        FOR_EACH_ITEM(walk, row, rows) quantize_row(&to_output, row, d->x + (size_t)row * (size_t)hidden);
    }
    FOR_EACH_ITEM(walk, item, score_items) score_tiles(d, output, &to_output, rows, item);
    FOR_EACH_ITEM(walk, row, rows) hand_out(d, depth, row, output->n);
}

static void draft_task(void *context, int thread, int num_threads) {
    Drafter *d = context;
    Walk walk = pool_enter(d->pool, thread);
    (void)num_threads;
    for (int depth = 0; depth < d->depths; depth++) {
        linear_begin(d->num_rows[depth]);
        draft_depth(d, depth, &walk);
    }
    linear_end();
}

/* Find each depth's rows and how many guesses it needs; 0 for a tree that these heads cannot fill. */
static int set_tree(Drafter *d, const int32_t *parents, const int32_t *ranks, int nodes) {
    int has_children[MAX_ROWS] = {0};
    memset(d->num_rows, 0, sizeof d->num_rows);
    memset(d->guesses, 0, sizeof d->guesses);
    d->depth[0] = d->depths = 0;
    for (int node = 1; node < nodes; node++) {
        if (parents[node] < 0 || parents[node] >= node || ranks[node] < 0 || ranks[node] >= MOST_GUESSES) return 0;
        const int depth = d->depth[parents[node]];
        if (depth >= d->config.heads || ranks[node] >= matrix_of(d, depth, 2 * d->config.blocks)->n) return 0;
        d->depth[node] = depth + 1;
        if (depth + 1 > d->depths) d->depths = depth + 1;
        if (ranks[node] >= d->guesses[depth]) d->guesses[depth] = ranks[node] + 1;
        has_children[parents[node]] = 1;
    }
    for (int node = 0; node < nodes; node++) {
        if (!has_children[node]) continue;
        const int depth = d->depth[node];
        if (d->num_rows[depth] == 0 || d->num_seen[depth] > 1) d->rows[depth][d->num_rows[depth]++] = node;
    }
    return 1;
}

static int reserve_scores(Drafter *d) {
    size_t needed = 0;
    for (int depth = 0; depth < d->depths; depth++) {
        const size_t floats = (size_t)d->num_rows[depth] * (size_t)matrix_of(d, depth, 2 * d->config.blocks)->n;
        needed = floats > needed ? floats : needed;
    }
    if (needed <= d->score_floats) return 1;
    aligned_release(d->scores);
    d->bytes -= d->score_floats * sizeof(float);
    d->scores = zeroed_memory(needed * sizeof(float));
    d->score_floats = d->scores ? needed : 0;
    d->bytes += d->score_floats * sizeof(float);
    return d->scores != NULL;
}

int drafter_run(Drafter *d, const float *hidden, int32_t root, const int32_t *parents, const int32_t *ranks, int nodes,
                int32_t *tokens, float *probabilities) {
    if (nodes < 1 || nodes > MAX_ROWS || root < 0 || root >= d->embedding->n) return STATUS_BAD_CALL;
    if (!set_tree(d, parents, ranks, nodes)) return STATUS_BAD_CALL;
    if (!reserve_scores(d)) return STATUS_NO_MEMORY;
    d->hidden = hidden;
    d->parents = parents;
    d->ranks = ranks;
    d->tokens = tokens;
    d->probabilities = probabilities;
    d->num_nodes = nodes;
    tokens[0] = root;
    probabilities[0] = 1.0f;
    if (d->depths) pool_run(d->pool, draft_task, d);
    return STATUS_OK;
}
