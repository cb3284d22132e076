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

// Where a thread block leaves what is added: its own shared memory in a cluster, else its part of the workspace.
struct Part {
    float *sums, *near_sums;
    float2 *marks, *near_marks;
};
constexpr int PART_FLOATS = (ROWS + NEAR_ROWS) * (HEAD_DIM + 2);

__device__ __forceinline__ Part part_at(u8* memory, float* workspace, int slot) {
    if (CLUSTER > 1) {
        float2* marks = (float2*)(memory + MARKS_AT);
        Part part = {(float*)(memory + KEYS_AT), (float*)(memory + NEAR_SUMS_AT), marks, marks + ROWS};
        return part;
    }
    float* at = workspace + ((long long)(blockIdx.z * gridDim.y + blockIdx.y) * SLOTS + slot) * PART_FLOATS;
    float2* marks = (float2*)(at + (ROWS + NEAR_ROWS) * HEAD_DIM);
    Part part = {at, at + ROWS * HEAD_DIM, marks, marks + ROWS};
    return part;
}

// Read what a slot has left: `mine` is where this thread block has the same in its own part.
__device__ __forceinline__ float2 load_part(const void* mine, int mine_slot, int slot) {
#if CLUSTER > 1
    return load_peer8(mine, slot);
#else
    return __ldcg((const float2*)((const float*)mine + (slot - mine_slot) * PART_FLOATS));
#endif
}

// Add all parts of a task's head: far row `row`, and row `near_row` of the near sums of `near_slot`. A warp.
__device__ __forceinline__ void add_parts(
    const Part& part, const Place& place, int row, int near_row, int near_slot, u16* out) {
    constexpr int PAIRS = HEAD_DIM / 64;
    const int dim = (threadIdx.x & 31) * 2 * PAIRS, slots = min(far_blocks(place.length), SLOTS);
    float2 marks[SLOTS + 1], sums[SLOTS + 1][PAIRS];
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
        marks[s] = make_float2(-INFINITY, 0.0f);
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) sums[s][i] = make_float2(0.0f, 0.0f);
        if (s >= slots) continue;
        marks[s] = load_part(part.marks + row, place.slot, s);
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) sums[s][i] = load_part(part.sums + sum_at(row, dim + 2 * i), place.slot, s);
    }
    marks[SLOTS] = load_part(part.near_marks + near_row, place.slot, near_slot);
#pragma unroll
    for (int i = 0; i < PAIRS; ++i)
        sums[SLOTS][i] = load_part(part.near_sums + sum_at(near_row, dim + 2 * i), place.slot, near_slot);
    float top = marks[SLOTS].x, total = 0.0f;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) top = fmaxf(top, marks[s].x);
    float2 sum[PAIRS] = {};
#pragma unroll
    for (int s = 0; s <= SLOTS; ++s) {
        float fade = exp2_fast(marks[s].x - top);
        total = fmaf(marks[s].y, fade, total);
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            sum[i].x = fmaf(sums[s][i].x, fade, sum[i].x);
            sum[i].y = fmaf(sums[s][i].y, fade, sum[i].y);
        }
    }
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) *(u32*)(out + dim + 2 * i) = pack2(sum[i].x / total, sum[i].y / total);
}

// The rows of this thread block's near tasks (in a cluster), or of all tasks (in the last thread block to arrive).
__device__ __forceinline__ void add_rows(const Part& part, const Place& place, u16* out) {
    const int rows = CLUSTER > 1 ? NEAR_ROWS : TASKS * TASK_HEADS;
    for (int i = threadIdx.x / 32; i < rows; i += WARPS) {
        int task = CLUSTER > 1 ? i / TASK_HEADS * SLOTS + place.slot : i / TASK_HEADS;
        int row = task * TASK_HEADS + i % TASK_HEADS, near_row = task / SLOTS * TASK_HEADS + i % TASK_HEADS;
        RowOwner owner = row_owner(place, row);
        if (task >= TASKS || owner.node < 0) continue;
        u16* to = out + ((long long)owner.node * place.kv_heads * GROUP + owner.head) * HEAD_DIM;
        add_parts(part, place, row, near_row, task % SLOTS, to);
    }
}

// True for the last thread block to arrive of those that share rows; it sees what the others have left.
__device__ __forceinline__ bool is_last(u8* memory, u32* counters) {
    u32* last = (u32*)(memory + PEAKS_AT);
    u32* counter = counters + blockIdx.z * gridDim.y + blockIdx.y;
    __threadfence();
    barrier(ALL_BARRIER, THREADS);
    if (threadIdx.x == 0) {
        u32 arrived = atomicAdd(counter, 1u);
        if (arrived == SLOTS - 1) *counter = 0;
        *last = arrived == SLOTS - 1;
        __threadfence();
    }
    barrier(ALL_BARRIER, THREADS);
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
    u8* memory, const Inputs& in, const Place& place, const Part& part, float scale) {
    const int g = (threadIdx.x & 31) >> 2, blocks = far_blocks(place.length);
    const int rounds = (blocks - place.slot + SLOTS - 1) / SLOTS;  // 0 for a slot beyond the committed rows
#pragma unroll
    for (int round = 0; round < STAGES; ++round) {
        fetch_round(memory, KEYS_AT, in.keys, place, round, rounds);
        fetch_round(memory, VALUES_AT, in.values, place, round, rounds);
    }
    int end[ROW_TILES][2];
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; ++i) {
        int node = row_owner(place, 8 * i + g).node;
        end[i / 2][i % 2] = node < 0 ? 0 : place.length + in.depth[node] - NEAR + 1;
    }
    Turns turns = {};
    const int node = row_owner(place, threadIdx.x / (PIECES / 2)).node;
    if (node >= 0)
        turns = load_turns(in.angles + (long long)(place.length + in.depth[node]) * (HEAD_DIM / 2),
                           threadIdx.x % (PIECES / 2) * 8);
    wait_for_previous_kernel();
    place_queries((u16*)(memory + QUERY_AT), in.qkv, in.angles, in.depth, place, turns);
    wait_copies<2 * STAGES - 1>();
    barrier(ALL_BARRIER, THREADS);  // the queries are there, and the first block's keys
    if (rounds <= 0) return;
    FarState state = {};
    state.row_peak = -INFINITY;
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; ++i) state.peak[i / 2][i % 2] = -INFINITY;
    far_rounds(state, memory, in.keys, in.values, place, end, rounds, scale);
    write_far(state, part.sums, part.marks);
}

__device__ __forceinline__ void near_warp(
    u8* memory, const Inputs& in, const Place& place, const Part& part, u16* scratch_keys, u16* scratch_values,
    float scale) {
    const int warp = threadIdx.x / 32 - FAR_WARPS, task = place.first_task + warp * SLOTS + place.slot;
    if (warp * SLOTS + place.slot >= TASKS || task >= place.num_tasks) {
        wait_for_previous_kernel();
        barrier(ALL_BARRIER, THREADS);
        return;
    }
    const int node = task / NODE_TASKS, depth = in.depth[node], first = place.length + depth - NEAR + 1;
    float2* angles = (float2*)(memory + ANGLES_AT);
    u16* near_values = (u16*)(memory + NEAR_VALUES_AT) + warp * NEAR * HEAD_DIM;
    const int owner = near_owner(in.ancestor_at, node, first, place.length);
    fetch_angles(angles, in.angles, place.length, depth);
    wait_for_previous_kernel();
    NearKeys near;
    fetch_near(near, near_values, in.qkv, in.keys, in.values, place, owner, first);
    barrier(ALL_BARRIER, THREADS);  // the queries are there
    wait_copies<0>();
    __syncwarp();
    rotate_near(near, angles, first, place.length);
    if (scratch_keys && task % NODE_TASKS == 0) {
        long long at = ((long long)node * place.kv_heads + place.kv_head) * HEAD_DIM;
        write_scratch(near, near_values, scratch_keys + at, scratch_values + at);
    }
    float scores[2][4] = {};
    score_near(scores, near, (u16*)(memory + QUERY_AT), (task - place.first_task) * TASK_HEADS);
    add_near(scores, near_values, part.near_sums, part.near_marks, warp * TASK_HEADS, first, scale);
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
// a prompt's chunk: there everything waits.
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
    const Place place = {(int)blockIdx.x,         (int)blockIdx.z,    (int)gridDim.z, (int)blockIdx.y * TASKS,
                         nodes * NODE_TASKS, nodes, __ldcg(length_at)};
    const long long head_at = (long long)place.kv_head * capacity * HEAD_DIM;
    const Inputs in = {qkv, keys + head_at, values + head_at, angles, depth, ancestor_at};
    const Part part = part_at(memory, workspace, place.slot);
    const bool idle = place.slot >= far_blocks(place.length) && place.first_task + place.slot >= place.num_tasks;
    if (idle) wait_for_previous_kernel();  // no launch may end before the one that it follows
    else if (threadIdx.x < FAR_THREADS) far_warps(memory, in, place, part, scale);
    else near_warp(memory, in, place, part, scratch_keys, scratch_values, scale);
#if CLUSTER > 1
    cluster_barrier();
    add_rows(part, place, out);
    cluster_barrier();  // nobody ends while others still read its shared memory
#else
    if (is_last(memory, counters)) add_rows(part, place, out);
#endif
}
