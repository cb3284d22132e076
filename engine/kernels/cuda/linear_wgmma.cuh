// The linear of linear.cuh on Hopper's own matrix instruction: four warps multiply 64 rows at once, the tokens lie in
// shared memory, and 32 tokens cost hardly more instructions than eight. It adds in the same order, so a matrix may go
// from one kernel to the other between numbers of tokens wherever the two are found to give equal bits.
//
// A warpgroup (four warps) takes 64 rows and a run of slices, one after the other: what it does not share with another
// warpgroup never leaves it. CLUSTER thread blocks share rows, and exchange sums in each other's shared memory. Four more
// warps feed the others through a ring of DEPTH buffers in shared memory, with X_BLOCKS blocks of 64 k of weights and
// tokens each. (Weights on their way in registers were slower: of all the loads ahead of a loop, the compiler waits for
// the last one, not for the one that is needed.)
//
// Compile-time besides those of linear_parts.cuh: X_BLOCKS, CLUSTER. ROW_WARPS is a multiple of 4, ROW_TILES 1.

#define FEEDERS 4  // warps that feed, together the four that can give registers away
#include "linear_parts.cuh"

constexpr int OPERAND_BYTES = TOKEN_TILES * 1024;  // 64 k of all tokens
constexpr int TOKENS_BYTES = X_BLOCKS * OPERAND_BYTES, STAGE_TILES = X_BLOCKS * ROW_WARPS;  // of one buffer
constexpr int SCALE_BYTES = IS_NF4 ? 64 : 0;
constexpr int BUFFERS = DEPTH, WIDE_BYTES = DECODE == 0 && WIDE_TABLE ? 65536 : 0;
constexpr int LAG = BUFFERS - 2;  // buffers on their way when the next is asked for
constexpr int GROUPS = SLICE_WARPS * CLUSTER, OWN_SLICES = SLICES / GROUPS;
constexpr int LEVELS = OWN_SLICES == 8 ? 3 : OWN_SLICES == 4 ? 2 : OWN_SLICES == 2 ? 1 : 0;
constexpr int OWN_TILES = ROW_WARPS / CLUSTER;  // row tiles whose sums a thread block of the cluster finishes
constexpr int SUMS = TOKEN_TILES * 32;  // float4 of a warp's sums
constexpr int RUN_FEEDERS = FEEDERS / SLICE_WARPS;  // warps that feed one run of slices
// A multiprocessor's registers, as many for each thread, are shared out anew: those that feed need few.
constexpr int REGISTERS = 65536 / MIN_BLOCKS / THREADS / 8 * 8, FEEDER_REGISTERS = 72;
constexpr int LEFT_REGISTERS = (REGISTERS * THREADS - FEEDER_REGISTERS * 32 * FEEDERS) / MULTIPLIERS / 8 * 8;
// Sets of products, where registers allow two: one is added while the next is made.
constexpr int SETS = IS_NF4 && 12 * TOKEN_TILES + 72 <= LEFT_REGISTERS && !(ABLATE & ONE_SET) ? 2 : 1;
// The first level of finished slices that wait for another stays in registers where there is room.
constexpr int HELD = LEVELS > 0 && (8 + 4 * SETS) * TOKEN_TILES + 72 <= LEFT_REGISTERS ? 1 : 0;
constexpr int ROUND = SETS == 2 && X_BLOCKS < 4 ? 4 : X_BLOCKS;  // blocks a slice is filled up to a multiple of

// Sums that thread blocks exchange lie between the rows of a wide table where there is one, in the half that it leaves.
constexpr int EXCHANGED = GROUPS > 1 ? GROUPS * OWN_TILES * SUMS : 0;  // float4
constexpr bool IN_TABLE = WIDE_BYTES > 0 && EXCHANGED * 32 <= WIDE_BYTES;
__device__ __forceinline__ float4* exchange_at(float4* exchange, int index) {
    return IN_TABLE ? exchange + index + index / 8 * 8 + 8 : exchange + index;
}

// Add a finished slice to those before it, as a binary tree. `held` is level 0 of those that wait, `waiting` holds one
// value of each further level for this thread.
__device__ __forceinline__ void add_slice(
    float (&sums)[TOKEN_TILES][4], float (&held)[TOKEN_TILES][4], float4* waiting, int slice) {
#pragma unroll
    for (int level = 0; level < LEVELS; ++level) {
        float4* place = waiting + (level - HELD) * TOKEN_TILES * MULTIPLIERS;
        const bool waits = !(slice >> level & 1);
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; ++t) {
            float4 before = make_float4(held[t][0], held[t][1], held[t][2], held[t][3]);
            if (level < HELD) {
                if (waits)
#pragma unroll
                    for (int i = 0; i < 4; ++i) held[t][i] = sums[t][i];
            } else if (waits) {
                place[t * MULTIPLIERS] = make_float4(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
            } else {
                before = place[t * MULTIPLIERS];
            }
            if (waits) continue;
            sums[t][0] = before.x + sums[t][0];
            sums[t][1] = before.y + sums[t][1];
            sums[t][2] = before.z + sums[t][2];
            sums[t][3] = before.w + sums[t][3];
        }
        if (waits) return;
    }
}

// Where a run of slices has come to, by buffers.
struct Run {
    int slice, block, buffer;  // block: of the slice, in order
    __device__ __forceinline__ void advance(int per_slice) {
        buffer = buffer + 1 == BUFFERS ? 0 : buffer + 1;
        block += X_BLOCKS;
        if (block == per_slice) {
            block = 0;
            ++slice;
        }
    }
};

// What the warps that feed one run of slices copy, and where to.
struct Feed {
    u8 *tokens_at, *codes_at, *scales_at;
    u64 *full, *empty;
    const u16* x;
    const uint4* weights;
    const float2* scales;
    int first_tile, row_tiles, blocks, tokens, feeder;  // feeder: this thread, of RUN_THREADS

    __device__ __forceinline__ int row_tile(int row_warp) const { return min(first_tile + row_warp, row_tiles - 1); }
};

constexpr int RUN_THREADS = 32 * RUN_FEEDERS, MY_ROWS = ROW_WARPS / RUN_FEEDERS;

// Copies of weights to a buffer, each warp those of every RUN_FEEDERS-th row warp. Row tiles past the end are the last
// one again; blocks past the end are zeros.
struct WeightCopies {
    int rows[MY_ROWS];  // where this lane's share of a row tile starts, in pieces of 16 bytes
    const Feed& feed;

    __device__ __forceinline__ WeightCopies(const Feed& from) : feed(from) {
#pragma unroll
        for (int i = 0; i < MY_ROWS; ++i)
            rows[i] = feed.row_tile((feed.feeder >> 5) + i * RUN_FEEDERS) * feed.blocks * (LOADS * 32) + (feed.feeder & 31);
    }
    __device__ __forceinline__ void ask(const Run& run) const {
        u8* to = feed.codes_at + (run.buffer * STAGE_TILES + (feed.feeder >> 5)) * TILE_BYTES + (feed.feeder & 31) * 16;
#pragma unroll
        for (int of = 0; of < X_BLOCKS; ++of) {
            const int block = TILE_STEP ? (run.block + of) * SLICES + run.slice : 0;
            const bool exists = block < feed.blocks;
            const uint4* from = feed.weights + (exists ? block * (LOADS * 32) : 0);
#pragma unroll
            for (int i = 0; i < MY_ROWS; ++i)
#pragma unroll
                for (int load = 0; load < LOADS; ++load)
                    copy16_or_zero(to + (of * ROW_WARPS + i * RUN_FEEDERS) * TILE_BYTES + load * 512,
                                   from + rows[i] + load * 32, exists);
        }
#pragma unroll
        for (int i = 0; IS_NF4 && i < (STAGE_TILES * 4 + RUN_THREADS - 1) / RUN_THREADS; ++i) {
            const int item = i * RUN_THREADS + feed.feeder, tile = item / 4;
            const int block = (run.block + tile / ROW_WARPS) * SLICES + run.slice;
            const bool exists = block < feed.blocks;
            const int from = feed.row_tile(tile % ROW_WARPS) * feed.blocks + (exists ? block : 0);
            if ((STAGE_TILES * 4) % RUN_THREADS == 0 || item < STAGE_TILES * 4)
                copy16_or_zero(feed.scales_at + run.buffer * STAGE_TILES * SCALE_BYTES + item * 16,
                               feed.scales + from * 8 + (item & 3) * 2, exists);
        }
    }
};

// A thread copies the same piece of the same few tokens of every block, or of every few blocks.
constexpr int PIECES = TOKEN_TILES * 64, TOKEN_STEP = RUN_THREADS / 8;
constexpr int MY_TOKENS = PIECES > RUN_THREADS ? PIECES / RUN_THREADS : 1;
constexpr int BLOCK_STEP = RUN_THREADS > PIECES ? RUN_THREADS / PIECES : 1;

struct TokenCopies {
    int piece, token, of, copied;
    long long values;  // of a token
    const u16* mine;
    const Feed& feed;

    __device__ __forceinline__ TokenCopies(const Feed& from)
        : piece(from.feeder & 7), token(from.feeder / 8 % (TOKEN_TILES * 8)), of(from.feeder / PIECES),
          copied(ABLATE & NO_TOKENS ? 0 : from.tokens - token), values(from.blocks * 64),
          mine(from.x + token * values + piece * 8), feed(from) {}
    __device__ __forceinline__ void ask(const Run& run) const {
#pragma unroll
        for (int first = 0; first < X_BLOCKS; first += BLOCK_STEP) {
            const int my_of = first + (BLOCK_STEP > 1 ? of : 0), block = (run.block + my_of) * SLICES + run.slice;
            if (BLOCK_STEP > X_BLOCKS && my_of >= X_BLOCKS) break;
            u8* to = feed.tokens_at + run.buffer * TOKENS_BYTES + my_of * OPERAND_BYTES;
            const u16* from = mine + block * 64;
            const int here = block < feed.blocks ? copied : 0;
#pragma unroll
            for (int i = 0; i < MY_TOKENS; ++i) {
                const bool exists = i * TOKEN_STEP < here;
                copy16_or_zero(to + operand_offset(token + i * TOKEN_STEP, piece), exists ? from : feed.x, exists);
                from += TOKEN_STEP * values;
            }
        }
    }
};

// Feed a run of slices after `asked` buffers' weights have been asked for, in groups of their own.
__device__ __forceinline__ void feed_run(
    const Feed& feed, const WeightCopies& weights, Run weights_run, Run run, int asked, int stages, int per_slice) {
    const TokenCopies tokens(feed);
    auto publish = [&](int buffer) {
        publish_to_tensor_cores();
        __syncwarp();
        if ((feed.feeder & 31) == 0) pass_gate(feed.full + buffer);
    };
    int parity = 0, arrived = 0;  // the buffer that is published next
    for (int stage = 0; stage < stages; ++stage) {
        if (stage >= asked) {
            await_gate(feed.empty + weights_run.buffer, parity);
            weights.ask(weights_run);
            weights_run.advance(per_slice);
            if (weights_run.buffer == 0) parity ^= 1;
        }
        tokens.ask(run);
        run.advance(per_slice);
        commit_copies();
        if (stage < LAG) continue;
        wait_copies<LAG>();
        publish(arrived);
        arrived = arrived + 1 == BUFFERS ? 0 : arrived + 1;
    }
    wait_copies<0>();
    for (; arrived != run.buffer; arrived = arrived + 1 == BUFFERS ? 0 : arrived + 1) publish(arrived);
}

// Grid: (CLUSTER, row blocks) in clusters of (CLUSTER, 1); arguments as in linear.cuh, but for workspace and counters.
// The last warps of a thread block feed the others.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, MIN_BLOCKS) linear_wgmma(
    const u16* x, const uint4* weights, const float2* scales, const u32* table, const u16* residual, u16* y,
    float4*, u32*, int tokens, int n, int k, int epilogue) {
    DYNAMIC_SHARED(all_shared);
    u8* shared = align1024(all_shared + WIDE_BYTES);
    u8* codes_at = shared + SLICE_WARPS * BUFFERS * TOKENS_BYTES;
    u8* scales_at = codes_at + SLICE_WARPS * BUFFERS * STAGE_TILES * TILE_BYTES;
    float4* waiting = (float4*)(scales_at + SLICE_WARPS * BUFFERS * STAGE_TILES * SCALE_BYTES);
    float4* waiting_end = waiting + (LEVELS - HELD) * TOKEN_TILES * MULTIPLIERS;
    float4* exchange = IN_TABLE ? (float4*)all_shared : waiting_end;
    u64* gates = (u64*)(waiting_end + (IN_TABLE ? 0 : EXCHANGED));
    const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);  // known to be uniform
    const bool feeds = warp >= ROW_WARPS * SLICE_WARPS;
    const int row_warp = warp % ROW_WARPS;
    const int slice_warp = feeds ? (warp - ROW_WARPS * SLICE_WARPS) / RUN_FEEDERS : warp / ROW_WARPS;
    const int group = blockIdx.x * SLICE_WARPS + slice_warp, first_slice = group * OWN_SLICES;
    const int blocks = k / 64, row_tiles = n / 16, block_tile = blockIdx.y * ROW_WARPS;
    const int per_slice = ((blocks + SLICES - 1) / SLICES + ROUND - 1) / ROUND * ROUND;
    if (CLUSTER > 1) cluster_arrive();
    u8* ring = shared + slice_warp * BUFFERS * TOKENS_BYTES;
    codes_at += slice_warp * BUFFERS * STAGE_TILES * TILE_BYTES;
    scales_at += slice_warp * BUFFERS * STAGE_TILES * SCALE_BYTES;
    u64 *full = gates + slice_warp * 2 * BUFFERS, *empty = full + BUFFERS;

    if (feeds) {
        give_registers<FEEDER_REGISTERS>();
        const int feeder = (int)threadIdx.x % RUN_THREADS, stages = OWN_SLICES * per_slice / X_BLOCKS;
        if (feeder < BUFFERS) {
            make_gate(full + feeder, RUN_FEEDERS);
            make_gate(empty + feeder, ROW_WARPS);
        }
        const Feed feed = {ring, codes_at, scales_at, full, empty, x, weights, scales,
                           block_tile, row_tiles, blocks, tokens, feeder};
        const WeightCopies copies(feed);
        Run ahead = {first_slice, 0, 0}, start = ahead;
        const int asked = min(BUFFERS, stages);
        for (int stage = 0; stage < asked; ++stage) {  // weights are never written
            copies.ask(ahead);
            ahead.advance(per_slice);
            commit_copies();
        }
        load_tables(table, all_shared);
        let_next_kernel_start();
        __syncthreads();
        wait_for_previous_kernel();  // all else may be the previous kernel's
        feed_run(feed, copies, ahead, start, asked, stages, per_slice);
        return;
    }
    take_registers<LEFT_REGISTERS>();
    const Tables tables = load_tables(table, all_shared);
    let_next_kernel_start();
    __syncthreads();  // the table is complete, the gates are made
    wait_for_previous_kernel();

    float sums[TOKEN_TILES][4] = {}, held[TOKEN_TILES][4] = {}, products[SETS][TOKEN_TILES][4] = {};
    u32 codes[2][4][4] = {};
    float2 scale[2] = {};
    // `done` blocks of slice number `slice` are in the sums.
    int buffer = 0, parity = 0, done = SETS == 2 ? 0 : -1, slice = 0;
    // Take the products of a block, which the tensor cores have finished with. Where a slice can end there is a branch;
    // elsewhere a warp's barrier keeps what lies behind it behind the products of before in the compiled order too.
    auto take = [&](float (&products)[TOKEN_TILES][4], float2 by, bool may_end) {
#if IS_NF4
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; ++t) add_scaled(sums[t], by, products[t]);
#endif
        ++done;
        if (!may_end) __syncwarp();
        if (!may_end || done != per_slice) return;
#pragma unroll
        for (int t = 0; t < TOKEN_TILES && !IS_NF4; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[t][i] = products[t][i];
        add_slice(sums, held, waiting + threadIdx.x, slice);
        done = 0;
        if (++slice == OWN_SLICES) return;
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; ++t) sums[t][0] = sums[t][1] = sums[t][2] = sums[t][3] = 0.0f;
    };
    const int rounds = OWN_SLICES * per_slice / ROUND;
    for (int round = 0; round < rounds; ++round) {
#pragma unroll
        for (int d = 0; d < ROUND; ++d) {
            const int set = SETS == 2 ? d & 1 : 0, last_set = SETS == 2 ? set ^ 1 : 0;
            if (d % X_BLOCKS == 0) await_gate(full + buffer, parity);
            const int tile_at = buffer * STAGE_TILES + d % X_BLOCKS * ROW_WARPS + row_warp;
            Prefetched tile;
#pragma unroll
            for (int i = 0; i < LOADS; ++i)
                tile.codes[i] = *(const uint4*)(codes_at + tile_at * TILE_BYTES + i * 512 + lane * 16);
            if (IS_NF4) scale[d & 1] = *(const float2*)(scales_at + tile_at * SCALE_BYTES + (lane >> 2) * 8);
            decode_half(tile, 0, tables, codes[d & 1]);
            decode_half(tile, 1, tables, codes[d & 1]);
            auto take_last = [&]() {
                products_wait<SETS - 1>(products[last_set], codes[~d & 1]);
                take(products[last_set], scale[~d & 1], d % ROUND == 0);
                if (d % X_BLOCKS == 0 && lane == 0 && (d > 0 || round > 0))
                    pass_gate(empty + (buffer ? buffer - 1 : BUFFERS - 1));
            };
            if (SETS == 1) take_last();
            const Operand operand = operand_at(ring + buffer * TOKENS_BYTES + d % X_BLOCKS * OPERAND_BYTES);
            products_begin();
#pragma unroll
            for (int step = 0; step < 4; ++step)
                multiply64(products[set], codes[d & 1][step][0], codes[d & 1][step][1], codes[d & 1][step][2],
                           codes[d & 1][step][3], operand, step, step > 0 || (!IS_NF4 && done > 0));
            products_commit();
            if (SETS == 2 && d > 0) take_last();  // the tensor cores go on with this block meanwhile
            if (SETS == 2 && d == ROUND - 1) {
                products_wait<0>(products[set], codes[d & 1]);
                take(products[set], scale[d & 1], true);
                if (lane == 0) pass_gate(empty + buffer);
            }
            if (d % X_BLOCKS == X_BLOCKS - 1 && ++buffer == BUFFERS) {
                buffer = 0;
                parity ^= 1;
            }
        }
    }
    if (SETS == 1) {
        products_wait<0>(products[0], codes[1]);
        take(products[0], scale[1], true);
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
    const int slot = (group * OWN_TILES + row_warp % OWN_TILES) * SUMS + lane;
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; ++t)
        store_peer16(exchange_at(exchange, slot + t * 32), owner, make_float4(sums[t][0], sums[t][1], sums[t][2], sums[t][3]));
    if (CLUSTER > 1) {
        cluster_barrier();
    } else {
        barrier(1, MULTIPLIERS);
    }
    for (int item = warp; item < OWN_TILES * TOKEN_TILES; item += ROW_WARPS * SLICE_WARPS) {
        float4 part[GROUPS];
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) part[i] = *exchange_at(exchange, (i * OWN_TILES * TOKEN_TILES + item) * 32 + lane);
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
