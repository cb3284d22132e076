/* Tree attention over committed pages and scratch nodes, split by absolute position.
 *
 * The sums of a row are those of plain decoding, whoever computes it: a score is a sum over dims in order; the values
 * of each block of 32 positions are summed over even and over odd positions, and the block's sum is added to the
 * total. Where a position's key lies, committed or scratch, changes nothing. These are also the AMX unit's own sums.
 */
#ifndef ATTENTION_H
#define ATTENTION_H

#include "cache.h"
#include "linear.h"

typedef struct {
    const Cache *cache;
    int num_heads, group;      /* query heads; query heads for each head of keys and values */
    int length;                /* committed positions */
    int num_nodes;
    const int *depth;          /* [nodes]: a node's position is length + depth */
    const int *ancestors;      /* [nodes][MAX_ROWS]: nodes from the root down to itself; NULL for a chain, whose rows */
                               /* already lie at their positions in the pages */
    const float *query;        /* [heads of keys][nodes][group][head_dim], scaled and rounded to bfloat16 */
    const Activations *output; /* quantised for the output projection: [nodes], heads * head_dim inputs */
} Attention;

/* Floats of work memory that a thread needs for texts of `length` positions, nodes included. */
size_t attention_work(int length);

/* The rows of a layer, `num_heads * num_nodes`, counted in the order of `query`, are shared out as items. */
int attention_items(const Attention *attention, int num_threads);
void attention_item(const Attention *attention, int layer, int item, int num_threads, float *work);

#endif
