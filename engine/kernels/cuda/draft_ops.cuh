// What the draft heads need around their matrices: their inputs, the activation, and the guesses that fill the tree.

#include "norm_parts.cuh"
#include "reductions.cuh"
#include "seen_parts.cuh"

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
    const uint4* from = table + (long long)seen_token(tokens, record, node) * width;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < width; i += 128) sum = add_squares(sum, from[i]);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    const float scale = rsqrtf((parts[0] + parts[1] + parts[2] + parts[3]) / (8 * width) + SEEN_EPS);
    for (int i = threadIdx.x; i < width; i += 128) to[i] = scaled(from[i], scale);
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

// ---- the best guesses of a row ----

#ifndef PER_THREAD
#define PER_THREAD 16
#endif
#define ROW_THREADS 1024
#define ROW_WARPS_ALL (ROW_THREADS / 32)
#define MAX_CONTENDERS 256

struct Row {  // what the threads of a row share
    u32 tops[ROW_WARPS_ALL];  // each warp's largest value, as ordered_bits
    float sums[ROW_WARPS_ALL];
    u32 bound, num_contenders;
    u64 contenders[MAX_CONTENDERS];
    u64 best[64];
    u64 parts[ROW_WARPS_ALL];
};

// Where a thread's values lie: four neighbours, then the next four of its own.
__device__ __forceinline__ int value_index(int i) { return (i / 4 * ROW_THREADS + (int)threadIdx.x) * 4 + i % 4; }

// The k-th largest of 32 warps' largest values, by one warp: at least k values are not below it. 0 for k > 32.
__device__ __forceinline__ u32 bound_of(const u32* tops, int k, int lane) {
    const u32 mine = tops[lane];
    int rank = 0;
#pragma unroll
    for (int i = 0; i < ROW_WARPS_ALL; ++i) rank += tops[i] > mine || (tops[i] == mine && i < lane);
    const u32 holder = __ballot_sync(~0u, rank == k - 1);
    return holder ? __shfl_sync(~0u, mine, __ffs(holder) - 1) : 0;
}

// Put the row's k best keys into row.best: its contenders, each of which counts those before it.
__device__ __forceinline__ void rank_contenders(Row& row, int k) {
    const u32 count = row.num_contenders;
    if (threadIdx.x >= count) return;
    const u64 mine = row.contenders[threadIdx.x];
    int rank = 0;
    for (u32 i = 0; i < count; ++i) rank += row.contenders[i] > mine;
    if (rank < k) row.best[rank] = mine;
}

// The same without contenders, one after the other, for rows where too many values are equal or k is large.
__device__ __forceinline__ void search_best(Row& row, const float (&kept)[PER_THREAD], int vocab, int k) {
    u64 winner = ~0ull;
    for (int rank = 0; rank < k; ++rank) {
        u64 mine = 0;
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i) {
            const u64 key = ordered(kept[i], value_index(i));
            if (value_index(i) < vocab && key < winner) mine = max(mine, key);
        }
        winner = block_max(mine, row.parts);
        if (threadIdx.x == 0) row.best[rank] = winner;
    }
}

// Grid: rows, of 1024 threads. logits float32 [rows, vocab] of at most 1024 * PER_THREAD, a multiple of 4. A row's best
// guesses go to the nodes from `first` to `last` (exclusive) whose row_of is this row: the guess of rank rank_of[node],
// through token_map where there is one, and its probability. k: 1 + the highest rank, at most 64. Smaller indices come
// first among equals. What is read of memory next, after a long step, is asked for ahead: the map, and the tokens' rows of
// the embeddings `table`, of row_bytes each, where there is one.
extern "C" __global__ void __launch_bounds__(ROW_THREADS) draft_tokens(
    const float* logits, const int* token_map, const int* row_of, const int* rank_of, int* tokens, float* chances,
    const u8* table, int row_bytes, int vocab, int k, int first, int last) {
    SHARED Row row;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, node = first + threadIdx.x;
    const bool is_asked = node < last && row_of[node] == (int)blockIdx.x;
    const int my_rank = is_asked ? rank_of[node] : 0;
    if (token_map && blockIdx.x == 0 && threadIdx.x == 0) prefetch_l2(token_map, vocab * 4);
    let_next_kernel_start();
    wait_for_previous_kernel();
    float kept[PER_THREAD];
    u32 mine = 0;
    if (threadIdx.x == 0) row.num_contenders = 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i += 4) {
        float4 four = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
        if (value_index(i) < vocab) {
            four = *(const float4*)(logits + (long long)blockIdx.x * vocab + value_index(i));
            mine = max(mine, max(max(ordered_bits(four.x), ordered_bits(four.y)), max(ordered_bits(four.z), ordered_bits(four.w))));
        }
        kept[i] = four.x;
        kept[i + 1] = four.y;
        kept[i + 2] = four.z;
        kept[i + 3] = four.w;
    }
    const u32 warp_top = warp_max_bits(mine);
    if (lane == 0) row.tops[warp] = warp_top;
    __syncthreads();
    const float top = value_of_bits(warp_max_bits(row.tops[lane]));
    if (warp == 0) {
        const u32 bound = bound_of(row.tops, k, lane);
        if (lane == 0) row.bound = bound;
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) sum += __expf(kept[i] - top);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) row.sums[warp] = sum;
    __syncthreads();
    const u32 bound = row.bound;
    if (mine >= bound) {
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i)
            if (value_index(i) < vocab && ordered_bits(kept[i]) >= bound) {
                const u32 place = atomicAdd(&row.num_contenders, 1u);
                if (place < MAX_CONTENDERS) row.contenders[place] = ordered(kept[i], value_index(i));
            }
    }
    __syncthreads();
    if (row.num_contenders <= MAX_CONTENDERS) rank_contenders(row, k);
    else search_best(row, kept, vocab, k);
    __syncthreads();
    if (!is_asked) return;
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < ROW_WARPS_ALL; ++i) sum += row.sums[i];
    const u64 key = row.best[my_rank];
    const int index = (int)index_of(key);
    const int token = token_map ? token_map[index] : index;
    tokens[node] = token;
    if (table) prefetch_l2(table + (long long)token * row_bytes, row_bytes);
    chances[node] = __expf(value_of(key) - top) / sum;
}
