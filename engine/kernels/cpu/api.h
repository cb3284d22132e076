/* What Python calls. Handles are opaque; every pointer is checked for shape and type on the Python side. */
#ifndef API_H
#define API_H

#include "linear.h"
#include "platform.h"
#include "pool.h"

typedef struct Arena Arena;
typedef struct Decoder Decoder;

typedef struct {
    int32_t hidden, layers, heads, kv_heads, head_dim, intermediate, vocab, max_positions;
    float eps;
} DecoderConfig;

typedef struct {
    const Matrix *query, *key, *value, *output, *gate, *up, *down;
    const float *attention_norm, *mlp_norm;
} DecoderLayer;

/* The attention of draft heads; its query, key and value take (1 + middle layers read) * hidden inputs. */
typedef struct {
    const Matrix *query, *key, *value, *output;
} PrefixLayer;

enum { STATUS_OK = 0, STATUS_NO_MEMORY = 1, STATUS_BAD_CALL = 2 };

EXPORT const char *path_name(void);

EXPORT void *threads_create(int num_threads);
EXPORT void threads_free(void *pool);

/* Memory for weights: one region, handed out in order. */
EXPORT Arena *arena_create(size_t bytes);
EXPORT void arena_free(Arena *arena);

EXPORT size_t matrix_size(int kind, int n, int k); /* bytes of an arena that one matrix takes */
EXPORT Matrix *matrix_create(Arena *arena, int kind, int n, int k, const void *codes, const uint16_t *scale,
                             const uint16_t *minimum);
EXPORT void matrix_values(const Matrix *matrix, const int64_t *rows, int num_rows, float *out);

/* y [rows][n] = x [rows][k] times the matrix; `work` holds linear_work(k) bytes. */
EXPORT size_t linear_work(int k);
EXPORT void linear_run(Pool *pool, const Matrix *matrix, const float *x, int rows, float *y, void *work);

/* The largest output of each row, the lowest index among equals, without writing the outputs. */
EXPORT void linear_argmax(Pool *pool, const Matrix *matrix, const float *x, int rows, int64_t *best, void *work);

/* The `k` largest of each row of x [rows][n] in falling order, the lower index first among equals. */
EXPORT void top_k(Pool *pool, const float *x, int rows, int n, int k, float *values, int64_t *indices);

/* A decoder over weights that outlive it; cosines and sines are [max_positions][head_dim / 2]. */
EXPORT Decoder *decoder_create(Pool *pool, const DecoderConfig *config, const DecoderLayer *layers, const float *norm,
                               const Matrix *embedding, const float *cosines, const float *sines);
EXPORT void decoder_free(Decoder *decoder);
EXPORT size_t decoder_bytes(const Decoder *decoder);
EXPORT int decoder_length(const Decoder *decoder);

/* Add the heads' prefix attention (see engine/prefix_attention.py), once and before any text, as the layer after the
 * last. It reads the last hidden state and what leaves the layers `reads`, rising, each scaled to unit root mean square
 * with the model's eps. The matrices must outlive the decoder. */
EXPORT int decoder_attach(Decoder *decoder, const PrefixLayer *layer, const int32_t *reads, int num_reads);
EXPORT int decoder_prefixed(const Decoder *decoder); /* leading positions that it has seen; all where there is none */

/* Run `rows` nodes after the committed text; `parents` is NULL for a chain. hidden [rows][hidden], after the norm. The
 * prefix attention runs `for_heads`, where it has seen all that went before: else what it gave would mean nothing. */
EXPORT int decoder_step(Decoder *decoder, const int32_t *tokens, const int32_t *parents, int rows, int for_heads,
                        float *hidden);

/* Append a path of nodes, root first, of the last step. */
EXPORT int decoder_commit(Decoder *decoder, const int32_t *path, int count);
EXPORT int decoder_truncate(Decoder *decoder, int length);

/* What heads read behind the last committed position, [hidden]: what the prefix attention made of it, or where that did
 * not run the hidden state itself. A bad call where nothing was committed since the start or since a position was cut. */
EXPORT int decoder_heads_state(const Decoder *decoder, float *state);

/* Where the time of the steps goes: add each part's seconds, as thread 0 sees them, to times [NUM_PARTS]; NULL stops. */
enum { PART_NORMS, PART_QKV, PART_ATTENTION, PART_OUTPUT, PART_GATE_UP, PART_DOWN, PART_PREFIX, NUM_PARTS };
EXPORT void decoder_measure(Decoder *decoder, double *times);

/* Copy committed keys and values of one layer, the prefix attention's being the one after the last:
 * [kv_heads][length][head_dim] each. */
EXPORT void decoder_rows(const Decoder *decoder, int layer, float *keys, float *values);

/* Draft heads whose first block may see the tokens before its guess (see engine/heads.py). `matrices` holds for each
 * head up and down of each block, then the output; `num_seen` [heads] is 0, 1, or the head's number plus 1. */
typedef struct Drafter Drafter;
typedef struct {
    int32_t hidden, width, heads, blocks;
} DrafterConfig;

EXPORT Drafter *drafter_create(Pool *pool, const DrafterConfig *config, const int32_t *num_seen,
                               const Matrix *const *matrices, const Matrix *embedding, const int32_t *token_map);
EXPORT void drafter_free(Drafter *drafter);
EXPORT size_t drafter_bytes(const Drafter *drafter);

/* Fill tokens [nodes] and their heads' probabilities from the hidden state [hidden] behind `root`. Nodes are ordered
 * by depth; `ranks` says which guess of its head a node is. */
EXPORT int drafter_run(Drafter *drafter, const float *hidden, int32_t root, const int32_t *parents,
                       const int32_t *ranks, int nodes, int32_t *tokens, float *probabilities);

#endif
