// The linear of linear.cuh on Hopper's own matrix instruction: four warps multiply 64 rows at once, the tokens lie in
// shared memory, and 32 tokens cost hardly more instructions than eight. It adds in the same order, so a matrix may go
// from one kernel to the other between numbers of tokens wherever the two are found to give equal bits.
//
// A warpgroup (four warps) takes 64 rows and a run of slices, one after the other: what it does not share with another
// warpgroup never leaves it. PARTS thread blocks of a cluster share rows, and exchange sums in each other's shared
// memory. While the tensor cores multiply a block of 64 k, the warps decode the next.
//
// Compile-time besides those of linear_parts.cuh: X_BLOCKS (blocks of 64 k that the tokens are copied by; three such
// buffers for each run of slices), CLUSTER (thread blocks that share rows). ROW_WARPS is a multiple of 4, ROW_TILES 1.

#define FEEDERS 4  // warps that copy tokens, together the four that can give registers away
#include "linear_parts.cuh"

constexpr int OPERAND_BYTES = TOKEN_TILES * 1024;  // 64 k of all tokens
constexpr int BUFFER_BYTES = X_BLOCKS * OPERAND_BYTES;
constexpr int BUFFERS = 3, WIDE_BYTES = DECODE == 0 && WIDE_TABLE ? 65536 : 0;
constexpr int GROUPS = SLICE_WARPS * CLUSTER, OWN_SLICES = SLICES / GROUPS;
constexpr int LEVELS = OWN_SLICES == 8 ? 3 : OWN_SLICES == 4 ? 2 : OWN_SLICES == 2 ? 1 : 0;
constexpr int ROUND = X_BLOCKS > DEPTH ? X_BLOCKS : DEPTH;  // blocks a slice is filled up to a multiple of
constexpr int OWN_TILES = ROW_WARPS / CLUSTER;  // row tiles whose sums a thread block of the cluster finishes
constexpr int SUMS = TOKEN_TILES * 32;  // float4 of a warp's sums
constexpr int RUN_FEEDERS = FEEDERS / SLICE_WARPS;  // warps that copy the tokens of one run of slices
// A multiprocessor's registers, as many for each thread, are shared out anew: those that feed need few.
constexpr int REGISTERS = 65536 / MIN_BLOCKS / THREADS / 8 * 8, FEEDER_REGISTERS = 56;
constexpr int LEFT_REGISTERS = (REGISTERS * THREADS - FEEDER_REGISTERS * 32 * FEEDERS) / MULTIPLIERS / 8 * 8;
// Sets of products, where registers allow two: one is added while the next is made.
constexpr int TWO_SETS_TAKE = 12 * TOKEN_TILES + 6 * DEPTH + 48;
constexpr int SETS = IS_NF4 && TWO_SETS_TAKE <= LEFT_REGISTERS && !(ABLATE & ONE_SET) ? 2 : 1;
constexpr int FETCHED = ABLATE & ONE_BY_ONE ? 1 : DEPTH < 4 ? 1 : DEPTH / 2;  // blocks that are loaded together

// Add a finished slice to those before it, as a binary tree. `waiting` holds one value a level for this thread.
__device__ __forceinline__ void add_slice(float (&sums)[TOKEN_TILES][4], float4* waiting, int slice) {
#pragma unroll
    for (int level = 0; level < LEVELS; ++level) {
        float4* place = waiting + level * TOKEN_TILES * MULTIPLIERS;
        if (!(slice >> level & 1)) {
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; ++t)
                place[t * MULTIPLIERS] = make_float4(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
            return;
        }
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; ++t) {
            const float4 before = place[t * MULTIPLIERS];
            sums[t][0] = before.x + sums[t][0];
            sums[t][1] = before.y + sums[t][1];
            sums[t][2] = before.z + sums[t][2];
            sums[t][3] = before.w + sums[t][3];
        }
    }
}

// Copy the tokens of a run of slices into its ring, X_BLOCKS blocks at a time: the work of a few warps, so that those that
// multiply neither spend instructions on it nor wait for each other. `feeder` numbers the threads that share it.
__device__ __forceinline__ void feed_tokens(
    u8* ring, u64* full, u64* empty, const u16* x, int feeder, int tokens, int k, int first_slice, int per_slice) {
    constexpr int PIECES = TOKEN_TILES * 64, STEP = 32 * RUN_FEEDERS, TURNS = (X_BLOCKS * PIECES + STEP - 1) / STEP;
    const int blocks = k / 64, stages = OWN_SLICES * per_slice / X_BLOCKS;
    int slice = first_slice, ahead = 0, buffer = 0, parity = 1;  // the first round finds all buffers empty
    auto publish = [&](int of) {
        publish_to_tensor_cores();
        __syncwarp();
        if ((feeder & 31) == 0) pass_gate(full + of);
    };
    for (int stage = 0; stage < stages; ++stage) {
        await_gate(empty + buffer, parity);
        u8* to = ring + buffer * BUFFER_BYTES;
        const u16* from = x + (ahead * SLICES + slice) * 64;
#pragma unroll 4
        for (int turn = 0; turn < TURNS; ++turn) {
            const int i = turn * STEP + feeder, piece = i & 7, token = i / 8 % (TOKEN_TILES * 8), of = i / PIECES;
            const bool exists = token < tokens && (ahead + of) * SLICES + slice < blocks && !(ABLATE & NO_TOKENS);
            const u16* place = from + (token * k + of * (SLICES * 64) + piece * 8);
            if ((X_BLOCKS * PIECES) % STEP == 0 || i < X_BLOCKS * PIECES)
                copy16_or_zero(to + of * OPERAND_BYTES + operand_offset(token, piece), exists ? place : x, exists);
        }
        commit_copies();
        if (stage > 0) {  // the stage before has had a stage's time to arrive
            wait_copies<1>();
            publish(buffer ? buffer - 1 : BUFFERS - 1);
        }
        if (++buffer == BUFFERS) {
            buffer = 0;
            parity ^= 1;
        }
        ahead += X_BLOCKS;
        if (ahead == per_slice) {
            ahead = 0;
            ++slice;
        }
    }
    wait_copies<0>();
    publish(buffer ? buffer - 1 : BUFFERS - 1);
}

// Grid: (CLUSTER, row blocks) in clusters of (CLUSTER, 1); arguments as in linear.cuh, but for workspace and counters.
// The last warps of a thread block feed the others.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, MIN_BLOCKS) linear_wgmma(
    const u16* x, const uint4* weights, const float2* scales, const u32* table, const u16* residual, u16* y,
    float4*, u32*, int tokens, int n, int k, int epilogue) {
    DYNAMIC_SHARED(all_shared);
    u8* shared = align1024(all_shared + WIDE_BYTES);
    float4* waiting = (float4*)(shared + SLICE_WARPS * BUFFERS * BUFFER_BYTES);
    float4* exchange = waiting + LEVELS * TOKEN_TILES * MULTIPLIERS;
    u64* gates = (u64*)(exchange + (GROUPS > 1 ? GROUPS * OWN_TILES * SUMS : 0));
    const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);  // known to be uniform
    const bool feeds = warp >= ROW_WARPS * SLICE_WARPS;
    const int row_warp = warp % ROW_WARPS;
    const int slice_warp = feeds ? (warp - ROW_WARPS * SLICE_WARPS) / RUN_FEEDERS : warp / ROW_WARPS;
    const int group = blockIdx.x * SLICE_WARPS + slice_warp, first_slice = group * OWN_SLICES;
    const int blocks = k / 64, row_tiles = n / 16, block_tile = blockIdx.y * ROW_WARPS;
    const int per_slice = ((blocks + SLICES - 1) / SLICES + ROUND - 1) / ROUND * ROUND;
    const int rounds = OWN_SLICES * per_slice / ROUND;
    if (CLUSTER > 1) cluster_arrive();
    u8* ring = shared + slice_warp * BUFFERS * BUFFER_BYTES;
    u64 *full = gates + slice_warp * 2 * BUFFERS, *empty = full + BUFFERS;
    const int feeder = (int)threadIdx.x % (32 * RUN_FEEDERS);
    if (feeds && feeder < BUFFERS) {
        make_gate(full + lane, RUN_FEEDERS);
        make_gate(empty + lane, ROW_WARPS);
    }

    if (feeds) {
        give_registers<FEEDER_REGISTERS>();
        load_tables(table, all_shared);
        let_next_kernel_start();
        __syncthreads();
        wait_for_previous_kernel();
        feed_tokens(ring, full, empty, x, feeder, tokens, k, first_slice, per_slice);
        return;
    }
    take_registers<LEFT_REGISTERS>();

    // Blocks past the end of a slice multiply tokens of zero by any weights; row tiles past the end are not written.
    const long long row_tile = (long long)min(block_tile + row_warp, row_tiles - 1) * blocks;
    const uint4* row_codes = weights + row_tile * (LOADS * 32) + lane;
    const float2* row_scales = scales + row_tile * 8 + lane / 4;
    Prefetched ahead[DEPTH];
    int load_block = first_slice;
    // Load the block of the run that comes next. A slice can only end where it `may`, which is known ahead. Past the end
    // the first block is loaded again, not none: a slot that may keep its value would be loaded beside its place and
    // moved there, and the move would wait for memory.
    auto fetch = [&](Prefetched& slot, bool may_end) {
        const int block = TILE_STEP && load_block < blocks ? load_block : first_slice;
        load_tile(slot, row_codes + block * (LOADS * 32), row_scales + block * 8, 0);
        load_block += SLICES;
        if (may_end && load_block >= per_slice * SLICES) load_block -= per_slice * SLICES - 1;
    };
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) fetch(ahead[d], (d + 1) % ROUND == 0);
    if (PREFETCH && TILE_STEP && threadIdx.x < ROW_WARPS && block_tile + threadIdx.x < row_tiles) {
        const int share = (blocks + CLUSTER - 1) / CLUSTER, from = blockIdx.x * share, count = min(share, blocks - from);
        const long long tile = (long long)(block_tile + threadIdx.x) * blocks + from;
        if (count > 0) {
            prefetch_l2((const u8*)weights + tile * TILE_BYTES, count * TILE_BYTES);
            if (IS_NF4) prefetch_l2(scales + tile * 8, count * 64);
        }
    }
    const Tables tables = load_tables(table, all_shared);
    let_next_kernel_start();
    __syncthreads();  // the table is complete, the gates are made
    wait_for_previous_kernel();  // weights are never written; all else may be the previous kernel's

    float sums[TOKEN_TILES][4] = {}, products[SETS][TOKEN_TILES][4] = {};
    u32 codes[2][4][4] = {};
    int buffer = 0, parity = 0, done = 0, slice = 0;  // `done` blocks of slice number `slice` are in the sums
    // Take the products of a block, which the tensor cores have finished with. That a slice may end at any block is
    // asked so that there is a branch: the compiler keeps what lies behind it behind the products of before.
    auto take = [&](float (&products)[TOKEN_TILES][4], float2 scale) {
#if IS_NF4
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; ++t) add_scaled(sums[t], scale, products[t]);
#endif
        if (++done != per_slice) return;
#pragma unroll
        for (int t = 0; t < TOKEN_TILES && !IS_NF4; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[t][i] = products[t][i];
        add_slice(sums, waiting + threadIdx.x, slice);
        done = 0;
        if (++slice == OWN_SLICES) return;
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; ++t) sums[t][0] = sums[t][1] = sums[t][2] = sums[t][3] = 0.0f;
    };
    // Loads ahead are made several together: a warp can wait for few of them one by one. A slot is filled when nothing
    // is left to do with its block, or the compiler would load beside it and wait for memory to move what comes.
    auto refill = [&](int from) {
#pragma unroll
        for (int i = from; i < from + FETCHED; ++i) fetch(ahead[i % DEPTH], (i + DEPTH + 1) % ROUND == 0);
    };
    for (int round = 0; round < rounds; ++round) {
#pragma unroll
        for (int d = 0; d < ROUND; ++d) {
            const int set = SETS == 2 ? d & 1 : 0, last_set = SETS == 2 ? set ^ 1 : 0;
            decode_half(ahead[d % DEPTH], 0, tables, codes[d & 1]);
            decode_half(ahead[d % DEPTH], 1, tables, codes[d & 1]);
            auto take_last = [&]() {
                products_wait<SETS - 1>(products[last_set], codes[~d & 1]);
                take(products[last_set], ahead[(d + DEPTH - 1) % DEPTH].scale);
                if (d % X_BLOCKS == 0 && lane == 0) pass_gate(empty + (buffer ? buffer - 1 : BUFFERS - 1));
            };
            if (SETS == 1 && d > 0) take_last();
            if (d % X_BLOCKS == 0) await_gate(full + buffer, parity);
            const Operand operand = operand_at(ring + buffer * BUFFER_BYTES + d % X_BLOCKS * OPERAND_BYTES);
            products_begin();
#pragma unroll
            for (int step = 0; step < 4; ++step)
                multiply64(products[set], codes[d & 1][step][0], codes[d & 1][step][1], codes[d & 1][step][2],
                           codes[d & 1][step][3], operand, step, step > 0 || (!IS_NF4 && done > 0));
            products_commit();
            if (SETS == 2 && d > 0) take_last();  // the tensor cores go on with this block meanwhile
            if (d > 0 && d % FETCHED == 0) refill(d - FETCHED);
            if (d == ROUND - 1) {
                products_wait<0>(products[set], codes[d & 1]);
                take(products[set], ahead[d % DEPTH].scale);
                if (lane == 0) pass_gate(empty + buffer);
                refill(ROUND - FETCHED);
            }
            if (d % X_BLOCKS == X_BLOCKS - 1 && ++buffer == BUFFERS) {
                buffer = 0;
                parity ^= 1;
            }
        }
    }

    if (GROUPS == 1 || (ABLATE & NO_EXCHANGE)) {
        float all[1][TOKEN_TILES][4];
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) all[0][t][i] = sums[t][i];
        write_sums(all, scales, y, residual, block_tile + row_warp, lane, tokens, n, epilogue);
        return;
    }
    if (CLUSTER > 1) cluster_wait();  // the others are there
    const int owner = row_warp / OWN_TILES;
    float4* slot = exchange + (group * OWN_TILES + row_warp % OWN_TILES) * SUMS + lane;
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; ++t)
        store_peer16(slot + t * 32, owner, make_float4(sums[t][0], sums[t][1], sums[t][2], sums[t][3]));
    if (CLUSTER > 1) {
        cluster_barrier();
    } else {
        barrier(1, MULTIPLIERS);
    }
    for (int item = warp; item < OWN_TILES * TOKEN_TILES; item += ROW_WARPS * SLICE_WARPS) {
        float4 part[GROUPS];
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) part[i] = exchange[(i * OWN_TILES * TOKEN_TILES + item) * 32 + lane];
#pragma unroll
        for (int step = 1; step < GROUPS; step *= 2)
#pragma unroll
            for (int i = 0; i < GROUPS; i += 2 * step) part[i] = add4(part[i], part[i + step]);
        const int tile = block_tile + blockIdx.x * OWN_TILES + item / TOKEN_TILES;
        if (tile >= row_tiles) continue;
        const int row = tile * 16 + 2 * (lane >> 2), token = item % TOKEN_TILES * 8 + 2 * (lane & 3);
        float2 by = make_float2(1.0f, 1.0f);
        if (DECODE == 2) by = scales[tile * 8 + (lane >> 2)];
        if (token < tokens) write_pair(y, residual, token, row, n, epilogue, part[0].x * by.x, part[0].z * by.y);
        if (token + 1 < tokens) write_pair(y, residual, token + 1, row, n, epilogue, part[0].y * by.x, part[0].w * by.y);
    }
}
