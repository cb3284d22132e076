// The linear of linear.cuh on Hopper's own matrix instruction: four warps multiply 64 rows at once and the tokens stay
// in shared memory, so that 32 tokens cost hardly more shared-memory traffic, and no more instructions, than eight.
// Every number of tokens goes through it on such a GPU, because its sums need not equal the other's bits.
//
// Compile-time besides those of linear_parts.cuh: ROW_LOOP (row blocks per thread block), X_BLOCKS (blocks of 64 k per
// slice and buffer; of two buffers, which hold all tokens' values where they fit). ROW_WARPS is a multiple of 4,
// X_BLOCKS of DEPTH; ROW_TILES is 1.

#include "linear_parts.cuh"

constexpr int OPERAND_BYTES = TOKEN_TILES * 1024;  // 64 k of all tokens
constexpr int BUFFER_BYTES = SLICE_WARPS * X_BLOCKS * OPERAND_BYTES;

// Grid: (row blocks / ROW_LOOP, SLICES / SLICE_WARPS); arguments as in linear.cuh.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) linear_wgmma(
    const u16* x, const uint4* weights, const float2* scales, const u32* table, const u16* residual, u16* y,
    float4* workspace, u32* counters, int tokens, int n, int k, int epilogue) {
    DYNAMIC_SHARED(unaligned);
    u8* shared = align1024(unaligned);
    const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);  // known to be uniform
    const int row_warp = warp % ROW_WARPS, slice_warp = warp / ROW_WARPS;
    const int first_slice = blockIdx.y * SLICE_WARPS, slice = first_slice + slice_warp;
    const int blocks = k / 64, row_tiles = n / 16, row_blocks = (row_tiles + ROW_WARPS - 1) / ROW_WARPS;
    const int chunks = (blocks + SLICES * X_BLOCKS - 1) / (SLICES * X_BLOCKS), padded = chunks * X_BLOCKS;
    const bool resident = chunks <= 2;  // one copy of the tokens serves all row blocks
    const int row_rounds = (row_blocks - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
    const int stages = resident ? chunks : row_rounds * chunks;

    Prefetched ahead[DEPTH];
    // The next block to load: blocks of this slice in turn, then those of the next row block.
    int next_tile = blockIdx.x * ROW_WARPS + row_warp, next_block = slice;
    const uint4* next_codes = weights + ((long long)next_tile * blocks + slice) * (LOADS * 32);
    const float2* next_scales = scales + ((long long)next_tile * blocks + slice) * 8;
    auto fetch = [&](Prefetched& slot) {
        if (next_block < blocks && next_tile < row_tiles) load_tile(slot, next_codes, next_scales, lane);
        next_block += SLICES;
        next_codes += TILE_STEP * LOADS * 32;
        next_scales += TILE_STEP * 8;
        if (ROW_LOOP > 1 && next_block >= padded * SLICES) {
            next_block = slice;
            next_tile += gridDim.x * ROW_WARPS;
            next_codes = weights + ((long long)next_tile * blocks + slice) * (LOADS * 32);
            next_scales = scales + ((long long)next_tile * blocks + slice) * 8;
        }
    };
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) fetch(ahead[d]);
    if (PREFETCH && TILE_STEP) {
        for (int i = threadIdx.x; i < row_rounds * ROW_WARPS; i += THREADS) {
            int tile = (blockIdx.x + i / ROW_WARPS * gridDim.x) * ROW_WARPS + i % ROW_WARPS;
            if (tile < row_tiles) prefetch_tiles(weights, scales, (long long)tile * blocks, blocks);
        }
    }
    const Tables tables = load_tables(table);
    let_next_kernel_start();
    wait_for_previous_kernel();  // weights are never written; all else may be the previous kernel's

    auto stage_tokens = [&](int stage) {
        constexpr int PER_TOKEN = SLICE_WARPS * X_BLOCKS * 8;
        u8* buffer = shared + (stage & 1) * BUFFER_BYTES;
        const int first = stage % chunks * X_BLOCKS;
        for (int i = threadIdx.x; i < tokens * PER_TOKEN; i += THREADS) {
            int token = i / PER_TOKEN, within = i % PER_TOKEN, piece = within & 7;
            int slice_of = within / 8 % SLICE_WARPS, ahead_of = within / 8 / SLICE_WARPS;
            int block = (first + ahead_of) * SLICES + first_slice + slice_of;
            if (block < blocks && !(ABLATE & NO_TOKENS))
                copy16_async(buffer + (slice_of * X_BLOCKS + ahead_of) * OPERAND_BYTES + operand_offset(token, piece),
                             x + (long long)token * k + block * 64 + piece * 8);
        }
        commit_copies();
    };
    stage_tokens(0);
    if (stages > 1) stage_tokens(1);

    float4* exchange = (float4*)(ROW_LOOP == 1 ? shared : shared + (stages > 1 ? 2 : 1) * BUFFER_BYTES);
    int stage = 0;
    for (int row_block = blockIdx.x; row_block < row_blocks; row_block += gridDim.x) {
        float sums[1][TOKEN_TILES][4] = {};
        for (int chunk = 0; chunk < chunks; ++chunk, ++stage) {
            if (stage < stages) {
                if (stage + 1 < stages) wait_copies<1>();
                else wait_copies<0>();
                publish_to_tensor_cores();
                __syncthreads();
            }
            const int buffer = resident ? chunk : stage & 1;
            const Operand operand = operand_at(shared + buffer * BUFFER_BYTES + slice_warp * X_BLOCKS * OPERAND_BYTES);
            for (int from = 0; from < X_BLOCKS; from += DEPTH) {
#pragma unroll
                for (int d = 0; d < DEPTH; ++d) {
                    const int i = chunk * X_BLOCKS + from + d;
                    if (i * SLICES + slice < blocks) {
                        const Operand here = operand_after(operand, (from + d) * OPERAND_BYTES);
                        const float2 scale = ahead[d].scale;
                        u32 a[4][4];
#if IS_NF4
                        float c[TOKEN_TILES][4];
#else
                        float(&c)[TOKEN_TILES][4] = sums[0];
#endif
#pragma unroll
                        for (int half = 0; half < 2; ++half) {  // one half is multiplied while the next is decoded
                            decode_half(ahead[d], half, tables, a);
                            products_begin();
#pragma unroll
                            for (int step = 2 * half; step < 2 * half + 2; ++step)
                                multiply64(c, a[step][0], a[step][1], a[step][2], a[step][3], here, step,
                                           !IS_NF4 || step > 0);
                        }
                        fetch(ahead[d]);
                        products_end();
#if IS_NF4
#pragma unroll
                        for (int tt = 0; tt < TOKEN_TILES; ++tt) add_scaled(sums[0][tt], scale, c[tt]);
#endif
                    } else if (ROW_LOOP > 1) {
                        fetch(ahead[d]);
                    }
                }
            }
            if (!resident) {
                __syncthreads();
                if (stage + 2 < stages) stage_tokens(stage + 2);
            }
        }
        if (ROW_LOOP == 1 && SLICE_WARPS > 1 && resident) __syncthreads();  // the exchange lies over the tokens
        add_slices(sums, exchange, row_warp, slice_warp, lane);
        if (add_parts(sums, workspace, counters, row_block, row_warp, slice_warp, lane) && slice_warp == 0)
            write_sums(sums, scales, y, residual, row_block * ROW_WARPS + row_warp, lane, tokens, n, epilogue);
    }
}
