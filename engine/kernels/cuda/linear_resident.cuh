// The linear of linear.cuh, with the same bits, for matrices of few input features: all tokens' values lie in shared
// memory from the start and a warp holds all of its weights in registers, so nothing is waited for between the previous
// kernel's end and the products but the values themselves. They may be made on their way: normalised (RMSNorm), or put
// together from the hidden state and the embeddings of drafted tokens.
//
// Compile-time besides those of linear_parts.cuh: BLOCKS (K / 64), NORM (1: normalise), SEEN (tokens that a draft head
// sees besides the hidden state; 0: values are read from memory), BEST (1: only the largest result of each token is
// asked for), ROW_LOOP (1; more where a thread block goes through several row blocks). A warp takes GROUP neighbouring
// slices.

#include "linear_parts.cuh"
#include "reductions.cuh"

constexpr int WARPS = ROW_WARPS * SLICE_WARPS;
constexpr int GROUP = SLICES / SLICE_WARPS;
constexpr int LEFT = BLOCKS % SLICES;  // blocks beyond whole rounds over the slices
constexpr int SLOTS = BLOCKS / SLICES * GROUP + (LEFT < GROUP ? LEFT : GROUP);  // blocks that a warp has at most
constexpr int K = BLOCKS * 64;
constexpr int ROW_PIECES = BLOCKS * 8;  // of 16 bytes, in a token's values
constexpr int PITCH = K * 2 + 16;  // the 16 keep eight tokens of a load on different banks
constexpr int FRAGMENTS = BLOCK_ROW_TILES * TOKEN_TILES;  // of 16 rows x 8 tokens, whose sums go through the exchange
constexpr int FINISHED = (FRAGMENTS + WARPS - 1) / WARPS;  // fragments whose slices a warp adds, and which it writes
constexpr int TURNS = (TOKEN_TILES * 8 + WARPS - 1) / WARPS;  // in which the warps bring the tokens' values, a warp a token
constexpr int LANE_PIECES = (ROW_PIECES + 31) / 32;
// Whether weights are decoded while the values are on their way: where nothing else needs the registers.
constexpr bool EARLY = DECODE != 0 && ROW_LOOP == 1 && SLOTS * ROW_TILES <= 4;
constexpr int TOGETHER = TOKEN_TILES < 4 ? TOKEN_TILES : 4;  // token tiles whose products are interleaved

#include "resident_values.cuh"

// Grid: row tiles / BLOCK_ROW_TILES, or fewer with ROW_LOOP. With NORM, norm [K] is the norm's weight and `normed`
// [tokens, K], where there is one, gets the normalised values. With SEEN, x is the hidden state [1, K / (1 + SEEN)],
// norm the embeddings [vocab, K / (1 + SEEN)], and the last four arguments are those of gather_seen; a warp has at most
// 32 turns. With BEST, y is u64 [tokens, gridDim.x * BLOCK_ROW_TILES]: the key of the largest among the rows of one place
// in a thread block. residual_stride: from a token's residual to the next one's, n or 0. The other arguments are those
// of linear.cuh.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) linear_resident(
    const u16* x, const uint4* weights, const float2* scales, const u32* table, const u16* residual, const u16* norm,
    u16* normed, u16* y, int tokens, int n, int residual_stride, int epilogue, float eps, const int* drafted,
    const int* record, const int* ancestor_at, const int* row_nodes) {
    DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);  // known to be uniform
    const int row_warp = warp % ROW_WARPS, slice_warp = SLICE_WARPS == 1 ? 0 : warp / ROW_WARPS;
    const int first_slice = slice_warp * GROUP;
    const int row_tiles = n / 16, row_blocks = (row_tiles + BLOCK_ROW_TILES - 1) / BLOCK_ROW_TILES;

    Prefetched ahead[SLOTS][ROW_TILES];
    auto block_of = [&](int slot) { return slot / GROUP * SLICES + first_slice + slot % GROUP; };
    auto is_there = [&](int slot) { return (slot / GROUP + 1) * SLICES <= BLOCKS || block_of(slot) < BLOCKS; };
    auto fetch = [&](int slot, int row_block) {
        const int block = block_of(slot), first_tile = row_block * BLOCK_ROW_TILES + row_warp * ROW_TILES;
        if (!is_there(slot)) return;
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t)
            if (first_tile + t < row_tiles) {
                const long long tile = (long long)(first_tile + t) * BLOCKS + block;
                load_tile(ahead[slot][t], weights + tile * (LOADS * 32), scales + tile * 8, lane);
            }
    };
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) fetch(slot, blockIdx.x);

    // The fragments that this warp writes: those that it has summed itself, or its share of the exchange.
    auto fragment = [&](int i) { return SLICE_WARPS == 1 ? warp * FINISHED + i : warp + i * WARPS; };
    auto tile_of = [&](int i, int row_block) { return row_block * BLOCK_ROW_TILES + fragment(i) / TOKEN_TILES; };
    auto is_mine = [&](int i, int row_block) { return fragment(i) < FRAGMENTS && tile_of(i, row_block) < row_tiles; };
    float2 row_scales[FINISHED];
    auto fetch_row_scales = [&](int row_block) {
#pragma unroll
        for (int i = 0; i < FINISHED; ++i) {
            row_scales[i] = make_float2(1.0f, 1.0f);
            if (DECODE == 2 && is_mine(i, row_block)) row_scales[i] = scales[tile_of(i, row_block) * 8 + (lane >> 2)];
        }
    };
    fetch_row_scales(blockIdx.x);
    const Tables tables = load_tables(table);
    auto decode = [&](int slot, u32(&a)[ROW_TILES][4][4]) {
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t) {
            decode_half(ahead[slot][t], 0, tables, a[t]);
            decode_half(ahead[slot][t], 1, tables, a[t]);
        }
    };
#if NORM
    uint4 factors[LANE_PIECES];
#pragma unroll
    for (int i = 0; i < LANE_PIECES; ++i) {
        factors[i] = make_uint4(0, 0, 0, 0);
        if (lane + i * 32 < ROW_PIECES) factors[i] = ((const uint4*)norm)[lane + i * 32];
    }
#endif
#if SEEN
    const int place = seen_place(ancestor_at, row_nodes, tokens, warp, lane);
#endif
    let_next_kernel_start();
    wait_for_previous_kernel();  // weights are never written; all else may be the previous kernel's

    u32 early[EARLY ? SLOTS : 1][ROW_TILES][4][4];
    auto decode_early = [&] {
        if (!EARLY) return;
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot)
            if (is_there(slot)) decode(slot, early[EARLY ? slot : 0]);
    };
#if NORM
    stage_normalized(shared, x, factors, normed, tokens, eps, warp, lane, decode_early);
#elif SEEN
    stage_seen(shared, x, (const uint4*)norm, drafted, record, place, tokens, warp, lane, decode_early);
#else
    stage_copied(shared, x, tokens, warp, lane, decode_early);
#endif
    float4* exchange = (float4*)(shared + TOKEN_TILES * 8 * PITCH);
    const u8* values = shared + (lane & 7) * PITCH + (lane >> 3) * 16 + first_slice * 128;
    u64 best[FINISHED][2] = {};
    for (int row_block = blockIdx.x; row_block < row_blocks; row_block += gridDim.x) {
        u32 before[FINISHED][2] = {};
#pragma unroll
        for (int i = 0; i < FINISHED; ++i)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int token = fragment(i) % TOKEN_TILES * 8 + 2 * (lane & 3) + j;
                const int row = tile_of(i, row_block) * 16 + 2 * (lane >> 2);
                if (epilogue == ADD_RESIDUAL && is_mine(i, row_block) && token < tokens)
                    before[i][j] = *(const u32*)(residual + (long long)token * residual_stride + row);
            }
        if (row_block == (int)blockIdx.x) __syncthreads();
        float sums[ROW_TILES][GROUP][TOKEN_TILES][4] = {};
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            if (is_there(slot)) {
                u32 late[ROW_TILES][4][4];
                u32(&a)[ROW_TILES][4][4] = EARLY ? early[EARLY ? slot : 0] : late;
                if (!EARLY) decode(slot, a);
                float2 scale[ROW_TILES];
#pragma unroll
                for (int t = 0; t < ROW_TILES; ++t) scale[t] = ahead[slot][t].scale;
                if (ROW_LOOP > 1) fetch(slot, row_block + gridDim.x);
#pragma unroll
                for (int first = 0; first < TOKEN_TILES; first += TOGETHER) {
                    uint4 b[TOGETHER][2];
#pragma unroll
                    for (int i = 0; i < TOGETHER; ++i) {
                        const u8* from = values + (first + i) * 8 * PITCH + (slot / GROUP * SLICES + slot % GROUP) * 128;
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
                                multiply16x8x16(IS_NF4 ? c[t][i] : sums[t][slot % GROUP][first + i], a[t][step][0],
                                                a[t][step][1], a[t][step][2], a[t][step][3],
                                                step & 1 ? pair.z : pair.x, step & 1 ? pair.w : pair.y);
                            }
                    if (IS_NF4) {
#pragma unroll
                        for (int i = 0; i < TOGETHER; ++i)
#pragma unroll
                            for (int t = 0; t < ROW_TILES; ++t)
                                add_scaled(sums[t][slot % GROUP][first + i], scale[t], c[t][i]);
                    }
                }
            }
        }
        // The slices as a binary tree: first a warp's own, then, through the exchange, those of all warps.
#pragma unroll
        for (int f = 0; f < ROW_TILES * TOKEN_TILES; ++f) {
#pragma unroll
            for (int step = 1; step < GROUP; step *= 2)
#pragma unroll
                for (int s = 0; s < GROUP; s += 2 * step)
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        sums[f / TOKEN_TILES][s][f % TOKEN_TILES][j] += sums[f / TOKEN_TILES][s + step][f % TOKEN_TILES][j];
            const float(&s)[4] = sums[f / TOKEN_TILES][0][f % TOKEN_TILES];
            if (SLICE_WARPS > 1)
                exchange[(slice_warp * FRAGMENTS + row_warp * ROW_TILES * TOKEN_TILES + f) * 32 + lane] =
                    make_float4(s[0], s[1], s[2], s[3]);
        }
        if (SLICE_WARPS > 1) __syncthreads();
#pragma unroll
        for (int i = 0; i < FINISHED; ++i) {
            if (!is_mine(i, row_block)) continue;
            float4 sum;
            if (SLICE_WARPS == 1) {
                const float(&s)[4] = sums[i / TOKEN_TILES % ROW_TILES][0][i % TOKEN_TILES];
                sum = make_float4(s[0], s[1], s[2], s[3]);
            } else {
                float4 part[SLICE_WARPS];
#pragma unroll
                for (int s = 0; s < SLICE_WARPS; ++s) part[s] = exchange[(s * FRAGMENTS + fragment(i)) * 32 + lane];
#pragma unroll
                for (int step = 1; step < SLICE_WARPS; step *= 2)
#pragma unroll
                    for (int s = 0; s < SLICE_WARPS; s += 2 * step) part[s] = add4(part[s], part[s + step]);
                sum = part[0];
            }
            const int token = fragment(i) % TOKEN_TILES * 8 + 2 * (lane & 3);
            const int row = tile_of(i, row_block) * 16 + 2 * (lane >> 2);
            const float2 by = row_scales[i];
            const float results[2][2] = {{sum.x * by.x, sum.z * by.y}, {sum.y * by.x, sum.w * by.y}};  // [token, row]
#pragma unroll
            for (int j = 0; j < 2; ++j) {
#if BEST
                best[i][j] = max(best[i][j], max(ordered(results[j][0], row), ordered(results[j][1], row + 1)));
#else
                if (token + j < tokens)
                    write_pair(y, before[i][j], token + j, row, n, epilogue, results[j][0], results[j][1]);
#endif
            }
        }
        if (ROW_LOOP == 1) break;
        fetch_row_scales(row_block + gridDim.x);
        // Two exchanges by turns, so that the barrier between writing and reading one is enough.
        const int next = (row_block / (int)gridDim.x + 1) & 1;
        exchange = (float4*)(shared + TOKEN_TILES * 8 * PITCH) + next * SLICE_WARPS * FRAGMENTS * 32;
    }
#if BEST
#pragma unroll
    for (int i = 0; i < FINISHED; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int step = 4; step < 32; step *= 2) best[i][j] = max(best[i][j], __shfl_xor_sync(~0u, best[i][j], step));
            const int token = fragment(i) % TOKEN_TILES * 8 + 2 * lane + j;
            if (lane < 4 && fragment(i) < FRAGMENTS && token < tokens)
                ((u64*)y)[((long long)token * gridDim.x + blockIdx.x) * BLOCK_ROW_TILES + fragment(i) / TOKEN_TILES] = best[i][j];
        }
#endif
}
