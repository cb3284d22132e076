// What the draft heads need around their matrices: their inputs, the activation, and the guesses that fill the tree.

#include "reductions.cuh"

#define NEAR 16  // columns of ancestor_at, as in tree_attention.cuh
enum { BONUS = 3 };  // of the step's record, as in fused_ops.cuh

// Grid: (1 + seen, rows), of 128 threads. The inputs of one head's first block for the nodes listed in row_nodes, side
// by side: the hidden state [width], then the unit-RMS embeddings of the first `seen` tokens on the way to the node.
// x [rows, width] gets the hidden state, to which blocks add. inputs [rows, 1 + seen, width]; width counts pieces of 8.
extern "C" __global__ void __launch_bounds__(128) gather_seen(
    const uint4* state, const uint4* table, const int* tokens, const int* record, const int* ancestor_at,
    const int* row_nodes, uint4* inputs, uint4* x, int width) {
    SHARED float parts[4];
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int slot = blockIdx.x, row = blockIdx.y;
    uint4* to = inputs + ((long long)row * gridDim.x + slot) * width;
    if (slot == 0) {
        for (int i = threadIdx.x; i < width; i += 128) to[i] = x[(long long)row * width + i] = state[i];
        return;
    }
    const int node = ancestor_at[row_nodes[row] * NEAR + slot - 1];
    const uint4* from = table + (long long)(node == 0 ? record[BONUS] : tokens[node]) * width;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < width; i += 128) {
        const uint4 piece = from[i];
        const u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float low = to_float((u16)words[j]), high = to_float((u16)(words[j] >> 16));
            sum = fmaf(low, low, fmaf(high, high, sum));
        }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    const float scale = rsqrtf((parts[0] + parts[1] + parts[2] + parts[3]) / (8 * width) + 1e-6f);
    for (int i = threadIdx.x; i < width; i += 128) {
        const uint4 piece = from[i];
        const u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
        u32 scaled[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            scaled[j] = pack2(to_float((u16)words[j]) * scale, to_float((u16)(words[j] >> 16)) * scale);
        to[i] = make_uint4(scaled[0], scaled[1], scaled[2], scaled[3]);
    }
}

// Grid: (pieces of 8 / 128, rows). out = residual + silu(x + bias); bias [width] and residual [rows, width] may be null.
extern "C" __global__ void __launch_bounds__(128) silu_rows(
    const uint4* x, const uint4* bias, const uint4* residual, uint4* out, int width) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int i = blockIdx.x * 128 + threadIdx.x;
    if (i >= width) return;
    const long long at = (long long)blockIdx.y * width + i;
    const uint4 none = make_uint4(0, 0, 0, 0), in = x[at], by = bias ? bias[i] : none, add = residual ? residual[at] : none;
    const u32 words[4] = {in.x, in.y, in.z, in.w}, bys[4] = {by.x, by.y, by.z, by.w}, adds[4] = {add.x, add.y, add.z, add.w};
    u32 result[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        float low = to_float((u16)words[j]) + to_float((u16)bys[j]);
        float high = to_float((u16)(words[j] >> 16)) + to_float((u16)(bys[j] >> 16));
        result[j] = pack2(low / (1.0f + __expf(-low)) + to_float((u16)adds[j]),
                          high / (1.0f + __expf(-high)) + to_float((u16)(adds[j] >> 16)));
    }
    out[at] = make_uint4(result[0], result[1], result[2], result[3]);
}

// Grid: rows, of 1024 threads. logits float32 [rows, vocab] of at most 1024 * PER_THREAD. A row's best guesses go to the
// nodes from `first` to `last` (exclusive) whose row_of is this row: the guess of rank rank_of[node], through token_map
// where there is one, and its probability. k: 1 + the highest rank, at most 64. Smaller indices come first among equals.
#ifndef PER_THREAD
#define PER_THREAD 16
#endif
extern "C" __global__ void __launch_bounds__(1024) draft_tokens(
    const float* logits, const int* token_map, const int* row_of, const int* rank_of, int* tokens, float* chances,
    int vocab, int k, int first, int last) {
    SHARED u64 parts[2][32];
    SHARED u64 best[64];
    SHARED float sums[32];
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const float* row = logits + (long long)blockIdx.x * vocab;
    float kept[PER_THREAD];
    u64 mine = 0, winner = 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        int index = threadIdx.x + i * 1024;
        kept[i] = index < vocab ? row[index] : -INFINITY;
        mine = max(mine, ordered(kept[i], index));
    }
    float top = 0.0f;
    for (int rank = 0; rank < k; ++rank) {
        u64 key = warp_max(mine);
        if (lane == 0) parts[rank & 1][warp] = key;  // two sets by turns, so that one barrier a rank is enough
        __syncthreads();
        winner = warp_max(parts[rank & 1][lane]);
        if (rank == 0) top = value_of(winner);
        if (threadIdx.x == 0) best[rank] = winner;
        if (winner == mine) {
            mine = 0;
#pragma unroll
            for (int i = 0; i < PER_THREAD; ++i) {
                u64 other = ordered(kept[i], threadIdx.x + i * 1024);
                if (other < winner) mine = max(mine, other);
            }
        }
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) sum += __expf(kept[i] - top);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int i = 0; i < 32; ++i) sum += sums[i];
    const int node = first + threadIdx.x;
    if (node < last && row_of[node] == (int)blockIdx.x) {
        const u64 key = best[rank_of[node]];
        const int index = (int)index_of(key);
        tokens[node] = token_map ? token_map[index] : index;
        chances[node] = __expf(value_of(key) - top) / sum;
    }
}
