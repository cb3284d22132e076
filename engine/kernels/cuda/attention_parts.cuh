// What the parts of tree attention (attention_far.cuh, attention_near.cuh, tree_attention.cuh) share: who computes
// what, and where it lies in shared memory.
//
// Compile-time: HEAD_DIM (64 or 128), GROUP (query heads per key/value head), ROW_TILES (of 16 query rows, per thread
// block), SLOTS (thread blocks that share rows), FAR_BLOCK (positions, 64 or 128), STAGES (blocks in shared memory),
// CLUSTER (SLOTS, or 1 where thread blocks cannot write into each other's shared memory).

#include "rotary.cuh"

#define NEAR 16

// A task is a node with up to 16 of the query heads that share a key/value head. A row is one of its heads.
constexpr int TASK_HEADS = GROUP < 16 ? GROUP : 16, NODE_TASKS = (GROUP + TASK_HEADS - 1) / TASK_HEADS;
constexpr int ROWS = 16 * ROW_TILES, TASKS = ROWS / TASK_HEADS;  // of a thread block, and of the SLOTS that share them
constexpr int UNITS = FAR_BLOCK / 16;
constexpr int FAR_WARPS = 8, FAR_THREADS = 32 * FAR_WARPS;
constexpr int NEAR_WARPS = (TASKS + SLOTS - 1) / SLOTS;
constexpr int WARPS = FAR_WARPS + NEAR_WARPS, THREADS = 32 * WARPS;
constexpr int PIECES = HEAD_DIM / 8;  // of 16 bytes, in a row of a head
constexpr int CHUNKS32 = HEAD_DIM / 32, CHUNKS64 = HEAD_DIM / 64;

// The partial sums of a row: of the far keys by slot, then of the near keys. Row r is added by slot r % SLOTS of a
// cluster, or by the last thread block to arrive.
constexpr int PARTS = SLOTS + 1, OWN_ROWS = ROWS / SLOTS;
constexpr int WORKSPACE_FLOATS = PARTS * ROWS * (HEAD_DIM + 2);  // for SLOTS thread blocks

// Offsets in bytes. What slots send takes the place of the first block's keys when all scores are made.
constexpr int BLOCK_VALUES = FAR_BLOCK * HEAD_DIM;
constexpr int KEYS_AT = 0, VALUES_AT = KEYS_AT + STAGES * BLOCK_VALUES * 2;
constexpr int QUERY_AT = VALUES_AT + STAGES * BLOCK_VALUES * 2;
constexpr int WEIGHTS_AT = QUERY_AT + ROWS * HEAD_DIM * 2;
constexpr int NEAR_VALUES_AT = WEIGHTS_AT + ROWS * FAR_BLOCK * 2;
constexpr int ANGLES_AT = NEAR_VALUES_AT + NEAR_WARPS * NEAR * HEAD_DIM * 2;
constexpr int NEAR_SUMS_AT = ANGLES_AT + NEAR * HEAD_DIM * 4;
constexpr int PEAKS_AT = NEAR_SUMS_AT + OWN_ROWS * HEAD_DIM * 4;
constexpr int TOTALS_AT = PEAKS_AT + ROWS * UNITS * 4;
constexpr int MARKS_AT = TOTALS_AT + ROWS * UNITS * 4;  // (peak, total)
constexpr int MAILBOX_AT = MARKS_AT + PARTS * OWN_ROWS * 8, LAST_AT = MAILBOX_AT + 16;
static_assert(SLOTS * OWN_ROWS * HEAD_DIM * 4 <= BLOCK_VALUES * 2, "the far sums need the room of a block's keys");

enum { FAR_BARRIER = 1, QUERY_BARRIER = 2 };

// A thread block's place: one of SLOTS that share the rows of `first_task` and on of one key/value head.
struct Place {
    int slot, kv_head, kv_heads, first_task, num_tasks, length;
};

// The row's node and query head among all heads, or node -1 where there is none.
struct RowOwner {
    int node, head;
};
__device__ __forceinline__ RowOwner row_owner(const Place& place, int row) {
    int task = place.first_task + row / TASK_HEADS, head = task % NODE_TASKS * TASK_HEADS + row % TASK_HEADS;
    bool exists = row < TASKS * TASK_HEADS && task < place.num_tasks && head < GROUP;
    RowOwner owner = {exists ? task / NODE_TASKS : -1, place.kv_head * GROUP + head};
    return owner;
}

__device__ __forceinline__ int far_blocks(int length) { return (length + FAR_BLOCK - 1) / FAR_BLOCK; }

// Rows of WIDTH 16-bit values in pieces of 16 bytes, exchanged so that eight rows' pieces lie in different banks.
template <int WIDTH>
__device__ __forceinline__ u16* piece_at(u16* rows, int row, int piece) {
    return rows + row * WIDTH + ((piece ^ (row & 7)) << 3);
}

// Where a row's partial sums and (peak, total) lie: in the shared memory of the slot that adds the row, or in the
// workspace of the thread blocks that share rows.
struct Exchange {
    u8* memory;
    float* workspace;

    __device__ __forceinline__ float* sums(int part, int row) const {
        if (CLUSTER == 1) return workspace + (part * ROWS + row) * HEAD_DIM;
        return (float*)(memory + (part == SLOTS ? NEAR_SUMS_AT : KEYS_AT + part * OWN_ROWS * HEAD_DIM * 4)) +
               row / SLOTS * HEAD_DIM;
    }
    __device__ __forceinline__ float2* mark(int part, int row) const {
        if (CLUSTER == 1) return (float2*)(workspace + PARTS * ROWS * HEAD_DIM) + part * ROWS + row;
        return (float2*)(memory + MARKS_AT) + part * OWN_ROWS + row / SLOTS;
    }
    __device__ __forceinline__ float2 get(const void* from) const {
        return CLUSTER == 1 ? __ldcg((const float2*)from) : *(const float2*)from;
    }
};

// Where a thread's share of a row's part goes.
struct Target {
#if CLUSTER > 1
    PeerAddress sums, mark, mailbox;
    __device__ __forceinline__ void put_sums(int dim, float2 v) const { send8(sums + 4 * dim, mailbox, v); }
    __device__ __forceinline__ void put_mark(float2 v) const { send8(mark, mailbox, v); }
#else
    float* sums;
    float2* mark;
    __device__ __forceinline__ void put_sums(int dim, float2 v) const { *(float2*)(sums + dim) = v; }
    __device__ __forceinline__ void put_mark(float2 v) const { *mark = v; }
#endif
};
__device__ __forceinline__ Target target_of(const Exchange& exchange, int part, int row) {
#if CLUSTER > 1
    const int rank = row % SLOTS;
    Target target = {peer_address(exchange.sums(part, row), rank), peer_address(exchange.mark(part, row), rank),
                     peer_address(exchange.memory + MAILBOX_AT, rank)};
#else
    Target target = {exchange.sums(part, row), exchange.mark(part, row)};
#endif
    return target;
}

// A thread has no more to read of the first block's keys; and: nobody in the cluster has. Each thread says and asks it
// once, also where it sends nothing: none may end while others count on it.
__device__ __forceinline__ void keys_done() {
#if CLUSTER > 1
    cluster_arrive();
#endif
}
__device__ __forceinline__ void wait_until_keys_done() {
#if CLUSTER > 1
    cluster_wait();
#endif
}

__device__ __forceinline__ float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
    return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}

__device__ __forceinline__ float quad_sum(float v) {
    v += __shfl_xor_sync(~0u, v, 1);
    return v + __shfl_xor_sync(~0u, v, 2);
}
