/* What the files of the decoder share: its state, and the rows of the step at hand. */
#ifndef DECODER_H
#define DECODER_H

#include "api.h"
#include "attention.h"

/* The heads' prefix attention, once it is attached: one more layer, over the last hidden state and what leaves a few
 * middle layers. Its input holds for each row the last hidden state, then a state of each middle layer in order. */
typedef struct {
    Activations input;
    int32_t *reads; /* the middle layers, rising */
    int num_reads;
    size_t bytes;
    void *memory; /* NULL where none is attached */
} Prefix;

struct Decoder {
    DecoderConfig config;
    DecoderLayer *layers; /* and the prefix attention's, of which only the attention is filled */
    Prefix prefix;
    const Matrix *embedding;
    const float *norm, *cosines, *sines;
    Pool *pool;
    Cache cache;
    int length;               /* committed positions */
    int prefixed;             /* leading ones whose keys and values an attached prefix attention has */
    int num_nodes, is_chain;  /* of the last step; 0 nodes when there is nothing to commit */
    int with_prefix;          /* whether it runs the prefix attention */
    int32_t tokens[MAX_ROWS], parents[MAX_ROWS];
    int depth[MAX_ROWS], ancestors[MAX_ROWS * MAX_ROWS];
    Activations to_layer, to_output, to_down; /* quantised inputs of QKV and gate/up, of the output, of down */
    float *x;       /* [rows][hidden]: what leaves a layer, and after a step what heads read */
    float *query, *hidden;
    float *heads_state; /* what heads read behind the last committed position, while has_heads_state */
    int has_heads_state;
    float *squares; /* [chunks][hidden / 16][16 rows] */
    double *times, started; /* seconds of each part, or NULL */
    float *work[MAX_THREADS];
    size_t work_floats, fixed_bytes;
    void *memory;
};

/* Run the step's rows through the layers; see forward.c. */
void decoder_forward(Decoder *decoder);

#endif
