// The small steps between the matrices, each one launch over static buffers: norm, rotary positions, argmax, top-k,
// the walk that accepts a path, and the commit of its rows. All sizes that change while decoding are read from memory.

#include "norm_parts.cuh"
#include "reductions.cuh"
#include "rotary.cuh"

// The step's record, int32: what the host copies after a step.
enum { LENGTH = 0, OLD_LENGTH = 1, NUM_ACCEPTED = 2, BONUS = 3, PATH = 4, MAX_PATH = 16, PATH_TOKENS = PATH + MAX_PATH };

// A thread's pieces of a row go to `kept`; returns what scales the row to unit RMS. Every thread of NORM_PLACES calls it.
__device__ __forceinline__ float keep_row(const uint4* row, uint4 (&kept)[8], float* parts, int width, float eps) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        int piece = threadIdx.x + i * NORM_PLACES;
        if (piece >= width / 8) break;
        kept[i] = row[piece];
        sum = add_squares(sum, kept[i]);
    }
    parts[threadIdx.x] = sum;
    __syncthreads();
    sum = parts[threadIdx.x & 31];
#pragma unroll
    for (int i = 32; i < NORM_PLACES; i += 32) sum += parts[(threadIdx.x & 31) + i];
    return norm_scale(sum, width, eps);
}

// out = x / rms(x) * weight, a row a thread block. x [rows, width], width a multiple of 8 and at most 16384.
extern "C" __global__ void __launch_bounds__(NORM_PLACES) rms_norm(
    const u16* x, const u16* weight, u16* out, int width, float eps) {
    SHARED float parts[NORM_PLACES];
    const int pieces = width / 8;
    uint4 factors = make_uint4(0, 0, 0, 0);  // weights are never written, so the first may come early
    if ((int)threadIdx.x < pieces) factors = ((const uint4*)weight)[threadIdx.x];
    let_next_kernel_start();
    wait_for_previous_kernel();
    uint4 kept[8];
    const float scale = keep_row((const uint4*)(x + (long long)blockIdx.x * width), kept, parts, width, eps);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        int piece = threadIdx.x + i * NORM_PLACES;
        if (piece >= pieces) break;
        if (i > 0) factors = ((const uint4*)weight)[piece];
        ((uint4*)(out + (long long)blockIdx.x * width))[piece] = normalized(kept[i], factors, scale);
    }
}

// What the heads' prefix attention reads of a row, side by side: its hidden state, and what left each middle layer, scaled
// to unit RMS. Grid: (rows, features). hidden and the others [rows, width] -> out [rows, features, width]; width as above.
extern "C" __global__ void __launch_bounds__(NORM_PLACES) gather_features(
    const u16* hidden, const u16* first, const u16* second, const u16* third, u16* out, int width, float eps) {
    SHARED float parts[NORM_PLACES];
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int feature = blockIdx.y;
    const u16* from = feature == 0 ? hidden : feature == 1 ? first : feature == 2 ? second : third;
    const uint4* row = (const uint4*)(from + (long long)blockIdx.x * width);
    uint4* to = (uint4*)(out + ((long long)blockIdx.x * gridDim.y + feature) * width);
    if (feature == 0) {
        for (int piece = threadIdx.x; piece < width / 8; piece += NORM_PLACES) to[piece] = row[piece];
        return;
    }
    uint4 kept[8];
    const float scale = keep_row(row, kept, parts, width, eps);
    const u32 one = pack2(1.0f, 1.0f);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        int piece = threadIdx.x + i * NORM_PLACES;
        if (piece >= width / 8) break;
        to[piece] = normalized(kept[i], make_uint4(one, one, one, one), scale);
    }
}

// Put the rotated keys and the values of a prompt's rows into the cache [kv_heads, capacity, head_dim], at positions
// length + depth. qkv [rows, heads + 2 kv_heads, head_dim]; angles float2 [positions, head_dim / 2]: (cos, sin). Grid:
// (rows, kv_heads), of head_dim / 16 threads for the key and as many for the value.
extern "C" __global__ void rotate_into_cache(
    const u16* qkv, const float2* angles, const int* length, const int* depth, u16* keys, u16* values, int heads,
    int head_dim, int capacity) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int row = blockIdx.x, kv_head = blockIdx.y, kv_heads = gridDim.y, half = head_dim / 2;
    const bool is_value = threadIdx.x >= head_dim / 16;
    const int dim = threadIdx.x % (head_dim / 16) * 8, position = *length + depth[row];
    const long long slot = (long long)row * (heads + 2 * kv_heads) + heads + kv_head + (is_value ? kv_heads : 0);
    const u16* from = qkv + slot * head_dim + dim;
    u16* to = (is_value ? values : keys) + ((long long)kv_head * capacity + position) * head_dim + dim;
    uint4 low = *(const uint4*)from, high = *(const uint4*)(from + half);
    if (!is_value) rotate8(low, high, load_turns(angles + (long long)position * half, dim));
    *(uint4*)to = low;
    *(uint4*)(to + half) = high;
}

// Grid: (chunks of 8192 logits, rows). logits float32 [rows, vocab] -> the best key of each chunk, [rows, chunks].
extern "C" __global__ void __launch_bounds__(256) argmax_chunks(const float* logits, u64* keys, int vocab) {
    SHARED u64 parts[32];
    let_next_kernel_start();
    wait_for_previous_kernel();
    const float* row = logits + (long long)blockIdx.y * vocab;
    u64 best = 0;
    for (int i = blockIdx.x * 8192 + threadIdx.x; i < min(vocab, (int)(blockIdx.x + 1) * 8192); i += 256)
        best = max(best, ordered(row[i], i));
    best = block_max(best, parts);
    if (threadIdx.x == 0) keys[blockIdx.y * gridDim.x + blockIdx.x] = best;
}

#define ACCEPT_THREADS 512

// One thread block. Exact greedy acceptance: from the root, go to the child whose token is the target's argmax, while
// there is one. Writes the step's record and moves the committed length.
// keys [nodes, places]: a node's target is the index of its largest; tokens, parents [nodes], the root's parent -1. The
// bonus token's row of the embeddings `table`, of row_bytes each, is asked for ahead.
extern "C" __global__ void __launch_bounds__(ACCEPT_THREADS) accept_greedy(
    const u64* keys, const int* tokens, const int* parents, int* record, const u8* table, int row_bytes, int nodes,
    int places) {
    SHARED int targets[64];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    int parent[2] = {-2, -2}, token[2] = {0, 0};  // of nodes lane and lane + 32
    if (warp == 0)
        for (int i = 0; i < 2; ++i)
            if (lane + 32 * i < nodes) parent[i] = __ldcg(parents + lane + 32 * i);
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int length = record[LENGTH];
    for (int node = warp; node < nodes; node += ACCEPT_THREADS / 32) {
        u64 best = 0;
#pragma unroll 8
        for (int i = lane; i < places; i += 32) best = max(best, keys[node * places + i]);
        best = warp_max(best);
        if (lane == 0) targets[node] = (int)index_of(best);
    }
    if (warp == 0)
        for (int i = 0; i < 2; ++i)
            if (lane + 32 * i < nodes) token[i] = tokens[lane + 32 * i];
    __syncthreads();
    if (warp > 0) return;
    int node = 0, accepted = 0;
    if (lane == 0) {
        record[PATH] = 0;
        record[PATH_TOKENS] = token[0];
    }
    while (true) {
        const u32 low = __ballot_sync(~0u, parent[0] == node && token[0] == targets[node]);
        const u32 high = __ballot_sync(~0u, parent[1] == node && token[1] == targets[node]);
        if (!(low | high)) break;
        node = low ? __ffs(low) - 1 : 31 + __ffs(high);
        ++accepted;
        if (lane == (node & 31)) {
            record[PATH + accepted] = node;
            record[PATH_TOKENS + accepted] = node < 32 ? token[0] : token[1];
        }
    }
    if (lane == 0) {
        record[OLD_LENGTH] = length;
        record[LENGTH] = length + accepted + 1;
        record[NUM_ACCEPTED] = accepted;
        record[BONUS] = targets[node];
        if (table) prefetch_l2(table + (long long)targets[node] * row_bytes, row_bytes);
    }
}

// Grid: layers * kv_heads + 1, of MAX_PATH * head_dim / 8 threads. Scratch rows [layers, nodes, kv_heads, head_dim] of the
// record's path become cache rows [layers, kv_heads, capacity, head_dim]. The last block copies the hidden state of the
// path's end, of hidden [nodes, width], to state [width], where the heads read it; width counts pieces of 16 bytes.
extern "C" __global__ void commit_path(
    const uint4* scratch_keys, const uint4* scratch_values, uint4* keys, uint4* values, const uint4* hidden, uint4* state,
    const int* record, int nodes, int kv_heads, int capacity, int width) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int layer = blockIdx.x / kv_heads, kv_head = blockIdx.x % kv_heads, pieces = blockDim.x / MAX_PATH;
    const int step = threadIdx.x / pieces, piece = threadIdx.x % pieces;
    if (blockIdx.x == gridDim.x - 1) {
        const uint4* from = hidden + (long long)record[PATH + record[NUM_ACCEPTED]] * width;
        for (int i = threadIdx.x; i < width; i += blockDim.x) state[i] = from[i];
        return;
    }
    if (step > record[NUM_ACCEPTED]) return;
    long long from = (((long long)layer * nodes + record[PATH + step]) * kv_heads + kv_head) * pieces + piece;
    long long to = ((long long)blockIdx.x * capacity + record[OLD_LENGTH] + step) * pieces + piece;
    keys[to] = scratch_keys[from];
    values[to] = scratch_values[from];
}

// Grid: rows, of 128 threads. Embeddings of tokens [rows] from a table [vocab, width]; width counts pieces of 16 bytes.
// With a record, node 0 is its bonus token, which is noted in tokens.
extern "C" __global__ void __launch_bounds__(128) embed_tokens(
    int* tokens, const uint4* table, const int* record, uint4* out, int width) {
    wait_for_previous_kernel();  // first, so that no kernel after this one starts before all older ones have ended
    let_next_kernel_start();
    const int row = blockIdx.x, token = record && row == 0 ? record[BONUS] : tokens[row];
    if (record && row == 0 && threadIdx.x == 0) tokens[0] = token;
    for (int i = threadIdx.x; i < width; i += 128) out[(long long)row * width + i] = table[(long long)token * width + i];
}
