// A draft head's output matrix for few rows, which leaves no scores: each thread block keeps the best of its 128 tokens and
// the sum of their exponentials (see guess_lists.cuh). A warp holds all weights of its 16 tokens in registers before the
// previous kernel has ended.
//
// Compile-time: those of integer_rows.cuh.

#include "integer_rows.cuh"
#include "reductions.cuh"

#define MOST_GUESSES 16
constexpr int BLOCK_TOKENS = 128;
constexpr int SCORE_PITCH = BLOCK_TOKENS + 4;  // the 4 keep the tensor cores' columns on different banks

// The best of one row's 128 scores, by a warp. The embedding of the first is asked for ahead, where there is a table.
__device__ __forceinline__ void keep_best(
    const float* scores, const int (&ids)[4], int guesses, u64* keys, const u8* table, int row_bytes, int lane) {
    u64 left[4];  // a lane's own, the best first
#pragma unroll
    for (int i = 0; i < 4; ++i) left[i] = ids[i] < 0 ? 0 : ordered(scores[lane + 32 * i], ids[i]);
    auto sort = [&](int i, int j) {
        const u64 less = min(left[i], left[j]);
        left[i] = max(left[i], left[j]);
        left[j] = less;
    };
    sort(0, 1), sort(2, 3), sort(0, 2), sort(1, 3), sort(1, 2);
    for (int rank = 0; rank < guesses; ++rank) {
        if (!is_warp_max(left[0])) continue;
        keys[rank * gridDim.x] = left[0];
        if (rank == 0 && table && left[0]) prefetch_l2(table + (long long)index_of(left[0]) * row_bytes, row_bytes);
        left[0] = left[1];
        left[1] = left[2];
        left[2] = left[3];
        left[3] = 0;
    }
}

// The sum of their exponentials, to the base of the best one's, by a warp.
__device__ __forceinline__ float sum_exponentials(const float* scores, const int (&ids)[4], int lane) {
    float values[4], sum = 0.0f;
    u32 top = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        values[i] = scores[lane + 32 * i];
        if (ids[i] >= 0) top = max(top, ordered_bits(values[i]));
    }
    const float first = value_of_bits(warp_max_bits(top));
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (ids[i] >= 0) sum += __expf(values[i] - first);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
}

// Grid: PLACES, of 256 threads. x [1 or rows, HIDDEN], x_stride values apart, to which `added` (sums as in
// integer_rows.cuh, or null) is added; weights int8 [n, HIDDEN] in tiles, scales float2 [n / 2]; token_map [n] or null;
// keys [rows, guesses, gridDim.x], sums [rows, gridDim.x]. The embedding of each place's best token is asked for ahead, where there is a table.
extern "C" __global__ void __launch_bounds__(256, 2) draft_output(
    const u16* x, int x_stride, const int* added, const uint4* weights, const float2* scales, const int* token_map, u64* keys,
    float* sums, const u8* table, int row_bytes, int rows, int n, int guesses) {
    DYNAMIC_SHARED(shared);
    u8* planes = shared;
    float* scores = (float*)(shared + ROWS * ROW_PITCH);
    float* row_scales = scores + ROWS * SCORE_PITCH;
    const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), tile = blockIdx.x * 8 + warp;
    const bool is_there = tile < n / 16;
    Codes codes[ROW_BLOCKS] = {};
    float2 by = make_float2(0.0f, 0.0f);
    if (is_there) by = scales[tile * 8 + (lane >> 2)];
    int ids[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int index = blockIdx.x * BLOCK_TOKENS + lane + 32 * i;
        ids[i] = index >= n ? -1 : token_map ? token_map[index] : index;
    }
    if (is_there)
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS; ++i) {
            const int at = tile * ROW_BLOCKS + i;
            codes[i] = i < AHEAD ? load_codes(weights, at, lane) : load_codes_after(codes[max(0, i - AHEAD)], weights, at, lane);
        }
    let_next_kernel_start();  // not earlier: it would ask for its weights beside these
    wait_for_previous_kernel();  // weights and maps are never written; all else may be the previous kernel's
    for (int row = warp; row < rows; row += 8) {
        float2 pairs[PAIRS];
        add_up(pairs, load_summed(x + row * x_stride, added ? added + row * HIDDEN : nullptr, lane));
        const float scale = write_planes(planes + row * ROW_PITCH, pairs, lane);
        if (lane == 0) row_scales[row] = scale;
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; ++t) {
        Products<2> products = {};
        const u8* from = planes + t * 8 * ROW_PITCH + lane_offset(lane);
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS; ++i) multiply_codes(products, codes[i], from + i * 64);
        const int row = t * 8 + 2 * (lane & 3);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float scale = row_scales[row + j];
            const float2 sums = make_float2(both_planes(products.sum(j, lane)), both_planes(products.sum(j + 2, lane)));
            const float2 pair = make_float2(sums.x * (by.x * scale), sums.y * (by.y * scale));
            if (!PAIRED || row < 4) *(float2*)(scores + (row + j) * SCORE_PITCH + warp * 16 + 2 * (lane >> 2)) = pair;
        }
    }
    __syncthreads();
    for (int item = warp; item < 2 * rows; item += 8) {
        const int row = item < rows ? item : item - rows;
        const float* from = scores + row * SCORE_PITCH;
        if (item < rows) {
            u64* to = keys + (long long)row * guesses * gridDim.x + blockIdx.x;
            keep_best(from, ids, guesses, to, table, row_bytes, lane);
        } else {
            const float sum = sum_exponentials(from, ids, lane);
            if (lane == 0) sums[row * gridDim.x + blockIdx.x] = sum;
        }
    }
}
