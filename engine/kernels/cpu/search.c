/* A threshold, the smallest of the best so far, lets most vectors of a row pass with one comparison. */
#include "search.h"

#include "simd.h"

static void insert(float *values, int64_t *indices, int count, float value, int index) {
    int at = count;
    while (at > 0 && values[at - 1] < value) {
        values[at] = values[at - 1];
        indices[at] = indices[at - 1];
        at--;
    }
    values[at] = value;
    indices[at] = index;
}

void top_k_row(const float *x, int n, int k, float *values, int64_t *indices) {
    int count = 0, i = 0;
    for (; i < k; i++) insert(values, indices, count++, x[i], i);
    for (; i < n; i++) {
        while (i + LANES <= n && !vf_any_above(vf_load(x + i), vf_set1(values[k - 1]))) i += LANES;
        if (i < n && x[i] > values[k - 1]) insert(values, indices, k - 1, x[i], i);
    }
}

float sum_of_exponentials(const float *x, int n, float largest) {
    const vf shift = vf_set1(largest);
    vf sum = vf_zero();
    int i = 0;
    for (; i + LANES <= n; i += LANES) sum = vf_add(sum, vf_exp(vf_sub(vf_load(x + i), shift)));
    float rest[LANES] = {0};
    if (i < n) {
        memcpy(rest, x + i, sizeof(float) * (size_t)(n - i));
        sum = vf_add(sum, vf_first(n - i, vf_exp(vf_sub(vf_load(rest), shift)), vf_zero()));
    }
    return vf_sum(sum);
}
