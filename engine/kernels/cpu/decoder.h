/* What the files of the decoder share: its state, and the rows of the step at hand. */
#ifndef DECODER_H
#define DECODER_H

#include "api.h"
#include "attention.h"

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

/* Run the step's rows through the layers; see forward.c. */
void decoder_forward(Decoder *decoder);

#endif
