// y[tokens, N] = x[tokens, K] * W^T for few tokens, W in NF4, int8 or 16 bit, on any tensor cores. Weights are the
// 16 x 16 left operand, eight tokens the right one. See linear_parts.cuh for the order of sums and the layout.

#include "linear_parts.cuh"

constexpr int SEGMENT_BYTES = SLICE_WARPS * 128;  // one token's 64 k for each slice of this thread block
constexpr int TOKEN_STRIDE = DEPTH * SEGMENT_BYTES + 16;  // the 16 keep eight tokens of a load on different banks
constexpr int STAGE_BYTES = TOKEN_TILES * 8 * TOKEN_STRIDE;
// Token tiles whose products are interleaved: a product waits for the one before it in the same sum.
constexpr int TOGETHER = TOKEN_TILES * ROW_TILES <= 4 ? TOKEN_TILES : ROW_TILES < 4 ? 4 / ROW_TILES : 1;

// Grid: (row tiles / BLOCK_ROW_TILES, SLICES / SLICE_WARPS). n and k are multiples of 16 and 64; x and y are contiguous.
// scales: NF4 float2 [n / 16, k / 64, 8] for rows (2g, 2g + 1); int8 float2 [n / 16, 8].
// table: the 256 pairs, or the eight words of the byte tables; int8 none. counters start at zero and end so.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) linear(
    const u16* x, const uint4* weights, const float2* scales, const u32* table, const u16* residual, u16* y,
    float4* workspace, u32* counters, int tokens, int n, int k, int epilogue) {
    DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);  // known to be uniform
    const int row_warp = warp % ROW_WARPS, slice_warp = warp / ROW_WARPS;
    const int first_slice = blockIdx.y * SLICE_WARPS, slice = first_slice + slice_warp;
    const int blocks = k / 64, row_tiles = n / 16;
    const int first_tile = blockIdx.x * BLOCK_ROW_TILES + row_warp * ROW_TILES;
    const int chunks = (blocks + SLICES * DEPTH - 1) / (SLICES * DEPTH);

    Prefetched ahead[DEPTH][ROW_TILES];
    const uint4* next_codes = weights + ((long long)first_tile * blocks + slice) * (LOADS * 32);
    const float2* next_scales = scales + ((long long)first_tile * blocks + slice) * 8;
    auto prefetch = [&](Prefetched(&slot)[ROW_TILES], int block) {  // called for each block of the slice in turn
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t)
            if (block < blocks && first_tile + t < row_tiles)
                load_tile(slot[t], next_codes + t * blocks * (LOADS * 32), next_scales + t * blocks * 8, lane);
        next_codes += TILE_STEP * LOADS * 32;
        next_scales += TILE_STEP * 8;
    };
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) prefetch(ahead[d], d * SLICES + slice);
    if (PREFETCH && TILE_STEP && threadIdx.x < BLOCK_ROW_TILES && blockIdx.x * BLOCK_ROW_TILES + threadIdx.x < row_tiles)
        prefetch_tiles(weights, scales, (long long)(blockIdx.x * BLOCK_ROW_TILES + threadIdx.x) * blocks, blocks);

    const Tables tables = load_tables(table);
    let_next_kernel_start();
    wait_for_previous_kernel();  // weights are never written; all else may be the previous kernel's

    auto stage_tokens = [&](int chunk) {
        constexpr int PIECES = DEPTH * SEGMENT_BYTES / 16;
        u8* stage = shared + (chunk & 1) * STAGE_BYTES;
        for (int i = threadIdx.x; i < tokens * PIECES; i += THREADS) {
            int token = i / PIECES, piece = i % PIECES;
            int depth = piece / (SEGMENT_BYTES / 16), within = piece % (SEGMENT_BYTES / 16);
            int block = (chunk * DEPTH + depth) * SLICES + first_slice + within / 8;
            if (block < blocks && !(ABLATE & NO_TOKENS))
                copy16_async(stage + token * TOKEN_STRIDE + piece * 16,
                             x + (long long)token * k + block * 64 + (within & 7) * 8);
        }
        commit_copies();
    };
    stage_tokens(0);
    if (chunks > 1) stage_tokens(1);

    float sums[ROW_TILES][TOKEN_TILES][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
        if (chunk + 1 < chunks) wait_copies<1>();
        else wait_copies<0>();
        __syncthreads();
        const u8* stage = shared + (chunk & 1) * STAGE_BYTES + (lane & 7) * TOKEN_STRIDE;
        stage += slice_warp * 128 + (lane >> 3) * 16;
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            int block = (chunk * DEPTH + d) * SLICES + slice;
            if (block < blocks) {
                u32 a[ROW_TILES][4][4];
                float2 scale[ROW_TILES];
#pragma unroll
                for (int t = 0; t < ROW_TILES; ++t) {
                    decode_half(ahead[d][t], 0, tables, a[t]);
                    decode_half(ahead[d][t], 1, tables, a[t]);
                    scale[t] = ahead[d][t].scale;
                }
                prefetch(ahead[d], block + DEPTH * SLICES);
#pragma unroll
                for (int first = 0; first < TOKEN_TILES; first += TOGETHER) {
                    uint4 b[TOGETHER][2];
#pragma unroll
                    for (int i = 0; i < TOGETHER; ++i) {
                        const u8* from = stage + (first + i) * 8 * TOKEN_STRIDE + d * SEGMENT_BYTES;
                        b[i][0] = load_matrices(from);
                        b[i][1] = load_matrices(from + 64);
                    }
                    float c[ROW_TILES][TOGETHER][4] = {};
#pragma unroll
                    for (int step = 0; step < 4; ++step)
#pragma unroll
                        for (int i = 0; i < TOGETHER; ++i)
#pragma unroll
                            for (int t = 0; t < ROW_TILES; ++t) {
                                const uint4& pair = b[i][step / 2];
                                multiply16x8x16(IS_NF4 ? c[t][i] : sums[t][first + i], a[t][step][0], a[t][step][1],
                                                a[t][step][2], a[t][step][3], step & 1 ? pair.z : pair.x,
                                                step & 1 ? pair.w : pair.y);
                            }
                    if (IS_NF4) {
#pragma unroll
                        for (int i = 0; i < TOGETHER; ++i)
#pragma unroll
                            for (int t = 0; t < ROW_TILES; ++t) add_scaled(sums[t][first + i], scale[t], c[t][i]);
                    }
                }
            }
        }
        __syncthreads();
        if (chunk + 2 < chunks) stage_tokens(chunk + 2);
    }

    add_slices(sums, (float4*)shared, row_warp, slice_warp, lane);
    if (!add_parts(sums, workspace, counters, blockIdx.x, row_warp, slice_warp, lane)) return;
    if (slice_warp == 0) write_sums(sums, scales, y, residual, first_tile, lane, tokens, n, epilogue);
}
