// Attention of the nodes of a candidate tree over the committed cache and their ancestors, from a layer's qkv on: one
// launch rotates queries and keys, attends, and leaves the nodes' rotated keys and values in scratch rows.
//
// A token at position p sums the same numbers in the same order whichever of its keys are committed and whichever are
// still scratch. Keys up to p - NEAR are "far" and always in the cache (a tree is less than NEAR deep): blocks of
// FAR_BLOCK absolute positions go round-robin to SLOTS slots, a slot adds its blocks in order. The last NEAR keys,
// itself included, are "near", one tensor-core step. The slots are added in order, near last. How many rows a thread
// block takes, and whether slots meet in a cluster's shared memory or in global memory, changes no bit.

#include "attention_parts.cuh"
#include "attention_far.cuh"
#include "attention_near.cuh"

// Add all parts of a row, a warp: out [HEAD_DIM].
__device__ __forceinline__ void add_row(const Exchange& exchange, int row, int slots, u16* out) {
    constexpr int PAIRS = HEAD_DIM / 64;
    const int dim = (threadIdx.x & 31) * 2 * PAIRS;
    float2 marks[PARTS], sums[PARTS][PAIRS];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        marks[part] = make_float2(-INFINITY, 0.0f);
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) sums[part][i] = make_float2(0.0f, 0.0f);
        if (part >= slots && part < SLOTS) continue;  // a slot beyond the committed rows
        marks[part] = exchange.get(exchange.mark(part, row));
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) sums[part][i] = exchange.get(exchange.sums(part, row) + dim + 2 * i);
    }
    float top = marks[0].x, total = 0.0f;
#pragma unroll
    for (int part = 1; part < PARTS; ++part) top = fmaxf(top, marks[part].x);
    float2 sum[PAIRS] = {};
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        float fade = exp2_fast(marks[part].x - top);
        total = fmaf(marks[part].y, fade, total);
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            sum[i].x = fmaf(sums[part][i].x, fade, sum[i].x);
            sum[i].y = fmaf(sums[part][i].y, fade, sum[i].y);
        }
    }
    const float share = 1.0f / total;
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) *(u32*)(out + dim + 2 * i) = pack2(sum[i].x * share, sum[i].y * share);
}

// Add the rows of this slot (in a cluster), or all rows (in the last thread block to arrive).
__device__ __forceinline__ void add_rows(const Exchange& exchange, const Place& place, u16* out) {
    const int slots = min(far_blocks(place.length), SLOTS);
    for (int i = threadIdx.x / 32; i < (CLUSTER > 1 ? OWN_ROWS : ROWS); i += WARPS) {
        const int row = CLUSTER > 1 ? i * SLOTS + place.slot : i;
        RowOwner owner = row_owner(place, row);
        if (owner.node < 0) continue;
        u16* to = out + ((long long)owner.node * place.kv_heads * GROUP + owner.head) * HEAD_DIM;
        add_row(exchange, row, slots, to);
    }
}

#if CLUSTER > 1
// Make this slot's mailbox for all parts of its rows; returns the bytes that will come.
__device__ __forceinline__ int expect_parts(u8* memory, const Place& place) {
    int rows = 0;
#pragma unroll
    for (int i = 0; i < OWN_ROWS; ++i) rows += row_owner(place, i * SLOTS + place.slot).node >= 0;
    const int bytes = rows * (min(far_blocks(place.length), SLOTS) + 1) * (HEAD_DIM * 4 + 8);
    if (threadIdx.x == 0) make_mailbox(memory + MAILBOX_AT, bytes);
    return bytes;
}
#endif

// True for the last thread block to arrive of those that share rows; it sees what the others have left.
__device__ __forceinline__ bool is_last(u8* memory, u32* counter) {
    u32* last = (u32*)(memory + MAILBOX_AT);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 arrived = atomicAdd(counter, 1u);
        if (arrived == SLOTS - 1) *counter = 0;
        *last = arrived == SLOTS - 1;
        __threadfence();
    }
    __syncthreads();
    return *last;
}

// The arguments that both kinds of warps read. qkv [nodes, kv_heads * (GROUP + 2), HEAD_DIM]: queries, keys, values;
// angles float2 [positions, HEAD_DIM / 2]: (cos, sin); keys, values: a head's rows in the cache.
struct Inputs {
    const u16 *qkv, *keys, *values;
    const float2* angles;
    const int *depth, *ancestor_at;
};

__device__ __forceinline__ void far_warps(
    u8* memory, const Inputs& in, const Place& place, const Exchange& exchange, float scale) {
    const int g = (threadIdx.x & 31) >> 2, blocks = far_blocks(place.length);
    const int rounds = (blocks - place.slot + SLOTS - 1) / SLOTS;  // 0 for a slot beyond the committed rows
    int end[ROW_TILES][2];
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; ++i) {
        int node = row_owner(place, 8 * i + g).node;
        end[i / 2][i % 2] = node < 0 ? 0 : place.length + __ldcg(in.depth + node) - NEAR + 1;
    }
    const QueryPiece share = query_piece(memory, threadIdx.x, in.qkv, in.angles, in.depth, place);
    const Fetch fetch = fetch_of(in.keys, in.values, place.slot);
#pragma unroll
    for (int round = 0; round < STAGES; ++round) {
        fetch_keys(memory, fetch, round, rounds, place.length);
        fetch_values(memory, fetch, round, rounds, place.length);
    }
    wait_for_previous_kernel();
    place_query(share);
    for (int item = threadIdx.x + FAR_THREADS; item < ROWS * PIECES / 2; item += FAR_THREADS)
        place_query(query_piece(memory, item, in.qkv, in.angles, in.depth, place));
    barrier_arrive(QUERY_BARRIER, THREADS);
    if (rounds <= 0) {
        keys_done();
        wait_until_keys_done();
        return;
    }
    wait_copies<2 * STAGES - 1>();
    barrier(FAR_BARRIER, FAR_THREADS);  // the queries are there, and the first block's keys
    FarState state = {};
    state.row_peak = -INFINITY;
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; ++i) state.peak[i / 2][i % 2] = -INFINITY;
    far_rounds(state, memory, fetch, place, end, rounds, scale);
    wait_until_keys_done();
    send_far(state, exchange, place);
}

__device__ __forceinline__ void near_warp(
    u8* memory, const Inputs& in, const Place& place, const Exchange& exchange, u16* scratch_keys, u16* scratch_values,
    float scale) {
    keys_done();
    const int warp = threadIdx.x / 32 - FAR_WARPS, task = place.first_task + warp * SLOTS + place.slot;
    if (warp * SLOTS + place.slot >= TASKS || task >= place.num_tasks) {
        wait_for_previous_kernel();
        barrier_arrive(QUERY_BARRIER, THREADS);
        wait_until_keys_done();
        return;
    }
    const int node = task / NODE_TASKS, depth = __ldcg(in.depth + node), first = place.length + depth - NEAR + 1;
    float2* angles = (float2*)(memory + ANGLES_AT);
    u16* near_values = (u16*)(memory + NEAR_VALUES_AT) + warp * NEAR * HEAD_DIM;
    const int owner = near_owner(in.ancestor_at, node, first, place.length);
    fetch_angles(angles, in.angles, place.length, depth);
    const int first_row = (task - place.first_task) * TASK_HEADS;
    const NearTargets targets = near_targets(exchange, place, first_row);
    const NearSources sources = find_near(in.qkv, in.keys, in.values, place, owner, first);
    wait_for_previous_kernel();
    NearKeys near;
    fetch_near(near, near_values, sources);
    wait_copies<1>();
    __syncwarp();
    rotate_near(near, angles, first, place.length);
    barrier(QUERY_BARRIER, THREADS);
    float scores[2][4] = {};
    score_near(scores, near, (u16*)(memory + QUERY_AT), first_row);
    wait_copies<0>();
    __syncwarp();
    if (scratch_keys && task % NODE_TASKS == 0) {
        long long at = ((long long)node * place.kv_heads + place.kv_head) * HEAD_DIM;
        write_scratch(near, near_values, scratch_keys + at, scratch_values + at);
    }
    const NearWeights weights = weigh_near(scores, first, scale);
    wait_until_keys_done();
    send_near(weights, near_values, targets);
}

// Grid: (SLOTS, groups of TASKS tasks, key/value heads), of THREADS threads.
// keys, values [kv heads, capacity, HEAD_DIM]; depth [nodes]; ancestor_at [nodes, NEAR]: the node at each depth above a
// node (and itself); length: one int, the committed rows; out [nodes, heads, HEAD_DIM]. The nodes' keys and values go to
// scratch rows [nodes, kv heads, HEAD_DIM]; without those, the launch before has put them into the cache, depths are
// negative, and all keys are committed.
//
// What is read before the wait: lengths, tables and committed rows, written before this pass over the layers began.
// The pass's first kernel, embed_tokens, lets the next one start only after it has itself waited, so that no kernel of
// the pass runs before all that is older has ended. Kernels of the pass itself write none of it, except for the rows of
// a prompt's chunk, where everything waits, and the tables of a pruned tree: that first kernel writes them, past the L1
// cache for all to see, before it lets the next one start; so they are read past the L1 cache, as
// accept_greedy does.
#if CLUSTER > 1
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 2)
#else
extern "C" __global__ void __launch_bounds__(THREADS, 2)
#endif
attend_tree(
    const u16* qkv, const float2* angles, const int* length_at, const int* depth, const int* ancestor_at,
    const u16* keys, const u16* values, u16* scratch_keys, u16* scratch_values, u16* out, float* workspace,
    u32* counters, int nodes, int capacity, float scale) {
    DYNAMIC_SHARED(memory);
    let_next_kernel_start();
    if (!scratch_keys) wait_for_previous_kernel();
    const Place place = {(int)blockIdx.x, (int)blockIdx.z, (int)gridDim.z, (int)blockIdx.y * TASKS, nodes * NODE_TASKS,
                         __ldcg(length_at)};
    const long long head_at = (long long)place.kv_head * capacity * HEAD_DIM;
    const Inputs in = {qkv, keys + head_at, values + head_at, angles, depth, ancestor_at};
    const long long group = blockIdx.z * gridDim.y + blockIdx.y;
    const Exchange exchange = {memory, workspace + group * WORKSPACE_FLOATS};
#if CLUSTER > 1
    const int expected = expect_parts(memory, place);
#endif
    const bool idle = place.slot >= far_blocks(place.length) && place.first_task + place.slot >= place.num_tasks;
    if (idle) {
        keys_done();
        wait_for_previous_kernel();  // no launch may end before the one that it follows
        wait_until_keys_done();
    } else if (threadIdx.x < FAR_THREADS) far_warps(memory, in, place, exchange, scale);
    else near_warp(memory, in, place, exchange, scratch_keys, scratch_values, scale);
#if CLUSTER > 1
    __syncthreads();  // the mailbox is there for all
    if (expected == 0 || threadIdx.x >= 32 * OWN_ROWS) return;
    await_mailbox(memory + MAILBOX_AT);
    add_rows(exchange, place, out);
#else
    if (is_last(memory, counters + group)) add_rows(exchange, place, out);
#endif
}
