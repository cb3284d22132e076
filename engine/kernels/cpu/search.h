/* The largest few of a row of scores, and the weight of one among all. */
#ifndef SEARCH_H
#define SEARCH_H

#include <stdint.h>

/* The `k` largest of x [n] in falling order, the lower index first among equals. */
void top_k_row(const float *x, int n, int k, float *values, int64_t *indices);

/* The sum of e^(x - largest) over x [n]. */
float sum_of_exponentials(const float *x, int n, float largest);

#endif
