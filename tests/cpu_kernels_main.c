/* Runs a small random decoder through prompts, trees and commits and prints a digest of every bit it produced.
 * Then the same with the prefix attention of draft heads attached, which some steps leave out.
 *
 * Built with sanitizers it looks for stray reads and writes; built for several instruction sets it shows whether they
 * agree. Argument: number of threads.
 */
#include <stdio.h>

#include "api.h"

enum { HIDDEN = 96, LAYERS = 2, HEADS = 6, KV_HEADS = 2, HEAD_DIM = 96, INNER = 160, VOCAB = 83, POSITIONS = 300 };

static uint32_t state = 12345;
static uint32_t next(uint32_t below) {
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % below;
}

static uint64_t digest = 14695981039346656037u;
static void add(const void *data, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) digest = (digest ^ ((const uint8_t *)data)[i]) * 1099511628211u;
}

static Matrix *matrix(Arena *arena, int kind, int n, int k) {
    uint8_t *codes = malloc((size_t)(n * k));
    uint16_t *scale = malloc(sizeof(uint16_t) * (size_t)(n * k / 16)), *minimum = scale + n * k / 32;
    for (int i = 0; i < n * k; i++) codes[i] = (uint8_t)next(kind == 4 ? 16 : 255);
    for (int i = 0; i < n * k / 32; i++) {
        scale[i] = (uint16_t)((kind == 4 ? 0x2000 : 0x1400) + next(0x400)); /* about 2^-7 and 2^-10 */
        minimum[i] = (uint16_t)(0xa800 + next(0x400));                     /* about -2^-5 */
    }
    for (int i = 0; i < n * k && kind == 8; i++) codes[i] = (uint8_t)(codes[i] - 127);
    Matrix *made = matrix_create(arena, kind, n, k, codes, scale, minimum);
    free(codes);
    free(scale);
    return made;
}

static int for_heads;

static void step(Decoder *decoder, const int32_t *parents, int rows) {
    int32_t tokens[MAX_ROWS];
    float *hidden = malloc(sizeof(float) * (size_t)(rows * HIDDEN));
    for (int i = 0; i < rows; i++) tokens[i] = (int32_t)next(VOCAB);
    if (decoder_step(decoder, tokens, parents, rows, for_heads, hidden)) exit(2);
    add(hidden, sizeof(float) * (size_t)(rows * HIDDEN));
    free(hidden);
}

static void run_tree(Decoder *decoder, int rows) {
    int32_t parents[MAX_ROWS] = {-1}, path[MAX_ROWS], node, count = 0;
    for (int i = 1; i < rows; i++) parents[i] = (int32_t)next((uint32_t)i);
    step(decoder, parents, rows);
    for (node = (int32_t)next((uint32_t)rows); node >= 0; node = parents[node]) count++, path[MAX_ROWS - count] = node;
    if (decoder_commit(decoder, path + MAX_ROWS - count, count)) exit(3);
}

static void run_text(Decoder *decoder) {
    int32_t chain[MAX_ROWS];
    float state[HIDDEN];
    for (int i = 0; i < MAX_ROWS; i++) chain[i] = i;
    for (int rows = 1; rows < 30; rows += 7) {
        step(decoder, NULL, rows);
        if (decoder_commit(decoder, chain, rows)) exit(5);
        run_tree(decoder, rows + 3);
    }
    run_tree(decoder, 65);
    decoder_truncate(decoder, 37);
    while (decoder_length(decoder) + 40 < POSITIONS) run_tree(decoder, 1 + (int)next(40));
    if (decoder_heads_state(decoder, state)) exit(7);
    add(state, sizeof state);
}

static void attach(Decoder *decoder, Arena *arena) {
    const int32_t reads[] = {0, LAYERS - 1};
    const int inputs = 3 * HIDDEN;
    const PrefixLayer layer = {matrix(arena, 4, HEADS * HEAD_DIM, inputs), matrix(arena, 8, KV_HEADS * HEAD_DIM, inputs),
                               matrix(arena, 4, KV_HEADS * HEAD_DIM, inputs), matrix(arena, 4, HIDDEN, HEADS * HEAD_DIM)};
    decoder_truncate(decoder, 0);
    if (decoder_attach(decoder, &layer, reads, 2)) exit(8);
    if (decoder_attach(decoder, &layer, reads, 2) != STATUS_BAD_CALL) exit(9);
}

static void search(Pool *pool, const Matrix *matrix) {
    float x[7 * HIDDEN], *y = malloc(sizeof(float) * 7 * VOCAB), values[7 * 5];
    int64_t best[7], indices[7 * 5];
    void *work = aligned_memory(64, (linear_work(HIDDEN) + 63) / 64 * 64);
    for (int i = 0; i < 7 * HIDDEN; i++) x[i] = (float)next(1000) / 500.0f - 1.0f;
    linear_run(pool, matrix, x, 7, y, work);
    linear_argmax(pool, matrix, x, 7, best, work);
    top_k(pool, y, 7, VOCAB, 5, values, indices);
    for (int i = 0; i < 7; i++)
        if (best[i] != indices[5 * i]) exit(4);
    add(y, sizeof(float) * 7 * VOCAB);
    add(indices, sizeof indices);
    aligned_release(work);
    free(y);
}

/* Heads that see the path, over a draft vocabulary of 50: random trees of up to three levels. */
static void draft(Pool *pool, Arena *arena, const Matrix *embedding) {
    enum { WIDTH = 64, HEADS_DRAFTING = 3, DRAFT_VOCAB = 50 };
    const Matrix *matrices[HEADS_DRAFTING * 3];
    int32_t seen[HEADS_DRAFTING], token_map[DRAFT_VOCAB], parents[40], ranks[40], tokens[40];
    float hidden[HIDDEN], probabilities[40];
    for (int head = 0; head < HEADS_DRAFTING; head++) {
        seen[head] = head + 1;
        matrices[3 * head] = matrix(arena, 4, WIDTH, HIDDEN * (2 + head));
        matrices[3 * head + 1] = matrix(arena, 4, HIDDEN, WIDTH);
        matrices[3 * head + 2] = matrix(arena, 8, DRAFT_VOCAB, HIDDEN);
    }
    for (int i = 0; i < DRAFT_VOCAB; i++) token_map[i] = VOCAB - 1 - i;
    const DrafterConfig config = {HIDDEN, WIDTH, HEADS_DRAFTING, 1};
    Drafter *drafter = drafter_create(pool, &config, seen, matrices, embedding, token_map);
    for (int nodes = 1; nodes <= 40; nodes += 13) {
        const int level = (nodes + 2) / 3; /* first children of the root, then a child for each of the level above */
        for (int i = 0; i < nodes; i++) parents[i] = i == 0 ? -1 : i <= level ? 0 : i - level;
        for (int i = 0; i < nodes; i++) ranks[i] = i <= level ? i - (i > 0) : 0;
        for (int i = 0; i < HIDDEN; i++) hidden[i] = (float)next(2000) / 1000.0f - 1.0f;
        if (drafter_run(drafter, hidden, (int32_t)next(VOCAB), parents, ranks, nodes, tokens, probabilities)) exit(6);
        add(tokens, sizeof(int32_t) * (size_t)nodes);
    }
    drafter_free(drafter);
}

int main(int argc, char **argv) {
    Pool *pool = threads_create(argc > 1 ? atoi(argv[1]) : 1);
    Arena *arena = arena_create((size_t)4 << 20);
    DecoderLayer layers[LAYERS];
    DecoderConfig config = {HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB, POSITIONS, 1e-5f};
    static float norm[HIDDEN], tables[2][POSITIONS * HEAD_DIM / 2];
    for (int i = 0; i < HIDDEN; i++) norm[i] = 0.5f + (float)next(1000) / 1000.0f;
    for (int i = 0; i < POSITIONS * HEAD_DIM / 2; i++) {
        tables[0][i] = (float)next(2001) / 1000.0f - 1.0f; /* any table is a rotation of some kind */
        tables[1][i] = (float)next(2001) / 1000.0f - 1.0f;
    }
    for (int i = 0; i < LAYERS; i++)
        layers[i] = (DecoderLayer){
            matrix(arena, 4, HEADS * HEAD_DIM, HIDDEN), matrix(arena, 8, KV_HEADS * HEAD_DIM, HIDDEN),
            matrix(arena, 4, KV_HEADS * HEAD_DIM, HIDDEN), matrix(arena, 4, HIDDEN, HEADS * HEAD_DIM),
            matrix(arena, 4, INNER, HIDDEN), matrix(arena, 4, INNER, HIDDEN), matrix(arena, 8, HIDDEN, INNER), norm, norm};
    const Matrix *embedding = matrix(arena, 8, VOCAB, HIDDEN);
    Decoder *decoder = decoder_create(pool, &config, layers, norm, embedding, tables[0], tables[1]);
    run_text(decoder);
    attach(decoder, arena);
    for (for_heads = 1; for_heads >= 0; for_heads--) {
        run_text(decoder);
        if (decoder_prefixed(decoder) != (for_heads ? decoder_length(decoder) : 0)) exit(10);
        if (for_heads) decoder_truncate(decoder, 0);
    }
    search(pool, embedding);
    draft(pool, arena, embedding);
    printf("%s: length %d, digest %016llx\n", path_name(), decoder_length(decoder), (unsigned long long)digest);
    decoder_free(decoder);
    arena_free(arena);
    threads_free(pool);
    return 0;
}
