// Attention of the nodes of a candidate tree over the committed cache and the scratch rows of their ancestors.
//
// A token at position p sums the same numbers in the same order whichever of its keys are committed and whichever are
// still scratch. Keys up to p - NEAR are "far": tensor cores, in blocks of FAR_BLOCK absolute positions, always from
// the cache (a tree is less than NEAR deep). The last NEAR keys, itself included, are "near": one warp a token and head,
// one key after the other, each from wherever it lies. The parts are added in order of position, near last.
//
// Compile-time: HEAD_DIM (64 or 128), GROUP (query heads per key/value head).

#define NEAR 16
#define FAR_BLOCK 128
#define FAR_WARPS 4
#define UNIT (FAR_BLOCK / FAR_WARPS)  // positions a warp takes

constexpr int CHUNKS32 = HEAD_DIM / 32, CHUNKS64 = HEAD_DIM / 64;

struct FarState {
    float sums[CHUNKS64 * 8][4];  // n-tile j of chunk c: columns g are head dims 64 c + 8 g + j
    float peak[2], total[2];  // of rows g and g + 8, in powers of two; totals are this lane's share
};

__device__ __forceinline__ float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
    return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}

__device__ __forceinline__ float quad_sum(float v) {
    v += __shfl_xor_sync(~0u, v, 1);
    return v + __shfl_xor_sync(~0u, v, 2);
}

// 16 keys from `first`: scores, running softmax, values. `end` are the rows' far limits, `length` what is committed.
__device__ __forceinline__ void attend16(
    FarState& state, const uint4 (&query)[2][CHUNKS32], const u16* keys, const u16* values, int first, int length,
    const int (&end)[2], float scale, int g, int q) {
    float scores[2][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const u16* key = keys + (long long)min(first + 8 * half + g, length - 1) * HEAD_DIM + q * 8;
#pragma unroll
        for (int c = 0; c < CHUNKS32; ++c) {
            uint4 k = *(const uint4*)(key + 32 * c);
            multiply16x8x16(scores[half], query[0][c].x, query[1][c].x, query[0][c].y, query[1][c].y, k.x, k.y);
            multiply16x8x16(scores[half], query[0][c].z, query[1][c].z, query[0][c].w, query[1][c].w, k.z, k.w);
        }
    }
    u32 weights[2][2];  // [half][row]: pairs of columns 2q, 2q + 1
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float s[4], step_peak = -INFINITY;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int position = first + 8 * (i / 2) + 2 * q + i % 2;
            s[i] = position < end[row] ? scores[i / 2][2 * row + i % 2] * scale : -INFINITY;
            step_peak = fmaxf(step_peak, s[i]);
        }
        float peak = fmaxf(state.peak[row], quad_max(step_peak));
        float base = peak == -INFINITY ? 0.0f : peak;
        float fade = exp2_fast(state.peak[row] - base);
        state.peak[row] = peak;
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            s[i] = exp2_fast(s[i] - base);
            total += s[i];
        }
        state.total[row] = fmaf(state.total[row], fade, total);
        weights[0][row] = pack2(s[0], s[1]);
        weights[1][row] = pack2(s[2], s[3]);
#pragma unroll
        for (int t = 0; t < CHUNKS64 * 8; ++t) {
            state.sums[t][2 * row] *= fade;
            state.sums[t][2 * row + 1] *= fade;
        }
    }
#pragma unroll
    for (int c = 0; c < CHUNKS64; ++c) {
        uint4 v[4];  // rows 2q, 2q + 1, 2q + 8, 2q + 9; zero past the end, where memory may hold anything
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int position = first + 2 * q + (i & 1) + 8 * (i >> 1);
            v[i] = position < length ? *(const uint4*)(values + (long long)position * HEAD_DIM + 64 * c + 8 * g)
                                     : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            u32 pick = j & 1 ? 0x7632 : 0x5410, b[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint4 &low = v[2 * i], &high = v[2 * i + 1];
                b[i] = j < 2   ? byte_permute(low.x, high.x, pick)
                       : j < 4 ? byte_permute(low.y, high.y, pick)
                       : j < 6 ? byte_permute(low.z, high.z, pick)
                               : byte_permute(low.w, high.w, pick);
            }
            multiply16x8x16(
                state.sums[8 * c + j], weights[0][0], weights[0][1], weights[1][0], weights[1][1], b[0], b[1]);
        }
    }
}

// Grid: (blocks of FAR_BLOCK positions up to the context bucket, key/value heads, groups of 16-row tiles).
// query [nodes, heads, HEAD_DIM]; keys, values [kv heads, capacity, HEAD_DIM]; depth [nodes]; length: one int.
// Answers partial sums [kv heads, nodes * GROUP, blocks, HEAD_DIM] and (peak, total) pairs, both float32.
extern "C" __global__ void __launch_bounds__(32 * FAR_WARPS) attend_far(
    const u16* query, const u16* keys, const u16* values, const int* length_at, const int* depth, float* partial,
    float2* peaks, int nodes, int capacity, float scale) {
    SHARED float sums[FAR_WARPS][16][HEAD_DIM + 4];
    SHARED float2 marks[FAR_WARPS][16];
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
    const int kv_head = blockIdx.y, kv_heads = gridDim.y, rows = nodes * GROUP, heads = kv_heads * GROUP;
    const int length = *length_at, block_start = blockIdx.x * FAR_BLOCK;
    if (block_start >= length) return;  // no node reaches further: a tree is less than NEAR deep
    keys += (long long)kv_head * capacity * HEAD_DIM;
    values += (long long)kv_head * capacity * HEAD_DIM;

    for (int tile = blockIdx.z; tile * 16 < rows; tile += gridDim.z) {
        uint4 query_rows[2][CHUNKS32];
        int end[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int row = min(tile * 16 + g + 8 * i, rows - 1), node = row / GROUP, head = kv_head * GROUP + row % GROUP;
            end[i] = length + depth[node] - NEAR + 1;
#pragma unroll
            for (int c = 0; c < CHUNKS32; ++c)
                query_rows[i][c] = *(const uint4*)(query + ((long long)node * heads + head) * HEAD_DIM + 32 * c + 8 * q);
        }
        FarState state = {};
        state.peak[0] = state.peak[1] = -INFINITY;
#pragma unroll 1
        for (int first = block_start + warp * UNIT; first < block_start + (warp + 1) * UNIT; first += 16)
            if (first < length) attend16(state, query_rows, keys, values, first, length, end, scale, g, q);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float total = quad_sum(state.total[row]);
            if (q == 0) marks[warp][g + 8 * row] = make_float2(state.peak[row], total);
#pragma unroll
            for (int t = 0; t < CHUNKS64 * 8; ++t) {
                float* to = &sums[warp][g + 8 * row][64 * (t / 8) + 16 * q + t % 8];
                to[0] = state.sums[t][2 * row];
                to[8] = state.sums[t][2 * row + 1];
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < 16 * HEAD_DIM; i += 32 * FAR_WARPS) {
            int row = i / HEAD_DIM, dim = i % HEAD_DIM;
            if (tile * 16 + row >= rows) break;
            float peak = -INFINITY, total = 0.0f, sum = 0.0f;
#pragma unroll
            for (int w = 0; w < FAR_WARPS; ++w) peak = fmaxf(peak, marks[w][row].x);
            float base = peak == -INFINITY ? 0.0f : peak;
#pragma unroll
            for (int w = 0; w < FAR_WARPS; ++w) {
                float fade = exp2_fast(marks[w][row].x - base);
                sum = fmaf(sums[w][row][dim], fade, sum);
                total = fmaf(marks[w][row].y, fade, total);
            }
            long long at = ((long long)kv_head * rows + tile * 16 + row) * gridDim.x + blockIdx.x;
            partial[at * HEAD_DIM + dim] = sum;
            if (dim == 0) peaks[at] = make_float2(peak, total);
        }
        __syncthreads();
    }
}

constexpr int DIMS = HEAD_DIM / 32;  // a lane's head dims

struct LaneDims {
    float v[DIMS];
};

__device__ __forceinline__ LaneDims load_dims(const u16* row, int lane) {
    LaneDims dims;
#pragma unroll
    for (int i = 0; i < DIMS; i += 2) {
        u32 pair = *(const u32*)(row + lane * DIMS + i);
        dims.v[i] = to_float((u16)pair);
        dims.v[i + 1] = to_float((u16)(pair >> 16));
    }
    return dims;
}

// Grid: nodes * heads / 4 thread blocks of four warps. The near keys, then all parts of a token and head.
// scratch keys, values [nodes, kv heads, HEAD_DIM]; ancestor_at [nodes, NEAR]: the node at each depth above a node (and
// itself); out [nodes, heads, HEAD_DIM]; blocks: the far kernel's grid.
extern "C" __global__ void __launch_bounds__(128) attend_near(
    const u16* query, const u16* keys, const u16* values, const u16* scratch_keys, const u16* scratch_values,
    const int* length_at, const int* depth, const int* ancestor_at, const float* partial, const float2* peaks, u16* out,
    int nodes, int kv_heads, int capacity, int blocks, float scale) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int lane = threadIdx.x & 31, item = blockIdx.x * 4 + (threadIdx.x >> 5), heads = kv_heads * GROUP;
    if (item >= nodes * heads) return;
    const int node = item / heads, head = item % heads, kv_head = head / GROUP;
    const int length = *length_at, position = length + depth[node], first = position - NEAR + 1;
    LaneDims mine = load_dims(query + (long long)item * HEAD_DIM, lane);

    float scores[NEAR], peak = -INFINITY;
    long long at[NEAR];  // where the key's row starts, in the cache or (negative, less one) in the scratch rows
#pragma unroll
    for (int j = 0; j < NEAR; ++j) {
        int key = first + j;
        scores[j] = -INFINITY;
        if (key >= length)
            at[j] = -1 - ((long long)ancestor_at[node * NEAR + key - length] * kv_heads + kv_head) * HEAD_DIM;
        else at[j] = ((long long)kv_head * capacity + max(key, 0)) * HEAD_DIM;
    }
#pragma unroll
    for (int j = 0; j < NEAR; ++j) {
        LaneDims key = load_dims(at[j] < 0 ? scratch_keys + (-1 - at[j]) : keys + at[j], lane);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < DIMS; ++i) sum = fmaf(mine.v[i], key.v[i], sum);
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (first + j >= 0) scores[j] = sum * scale;
        peak = fmaxf(peak, scores[j]);
    }
    float near_total = 0.0f;
    LaneDims near = {};
#pragma unroll
    for (int j = 0; j < NEAR; ++j) {
        if (first + j < 0) continue;
        LaneDims value = load_dims(at[j] < 0 ? scratch_values + (-1 - at[j]) : values + at[j], lane);
        float weight = exp2_fast(scores[j] - peak);
        near_total += weight;
#pragma unroll
        for (int i = 0; i < DIMS; ++i) near.v[i] = fmaf(weight, value.v[i], near.v[i]);
    }

    const int far_blocks = first <= 0 ? 0 : (first + FAR_BLOCK - 1) / FAR_BLOCK;
    const long long row = ((long long)kv_head * nodes * GROUP + node * GROUP + head % GROUP) * blocks;
    float top = peak, total = 0.0f;
    for (int b = lane; b < far_blocks; b += 32) top = fmaxf(top, peaks[row + b].x);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    LaneDims sum = {};
#pragma unroll 4
    for (int b = 0; b < far_blocks; ++b) {
        float2 mark = peaks[row + b];
        float fade = exp2_fast(mark.x - top);
        total = fmaf(mark.y, fade, total);
        const float* part = partial + (row + b) * HEAD_DIM + lane * DIMS;
#pragma unroll
        for (int i = 0; i < DIMS; ++i) sum.v[i] = fmaf(part[i], fade, sum.v[i]);
    }
    float fade = exp2_fast(peak - top);
    total = fmaf(near_total, fade, total);
#pragma unroll
    for (int i = 0; i < DIMS; ++i) sum.v[i] = fmaf(near.v[i], fade, sum.v[i]) / total;
#pragma unroll
    for (int i = 0; i < DIMS; i += 2)
        *(u32*)(out + (long long)item * HEAD_DIM + lane * DIMS + i) = pack2(sum.v[i], sum.v[i + 1]);
}
