// The best guesses of a row from lists: a draft head's output launch leaves the best of each of its thread blocks, and who
// needs tokens merges them, a warp a row. A key orders by value, then by smaller token.
//
// Compile-time: PLACES (the thread blocks of the output launch; a multiple of 2, at most 256).

#include "reductions.cuh"

#define MOST_GUESSES 16
constexpr int LANE_PLACES = (PLACES + 31) / 32;

// Where lists lie: keys [rows, guesses, PLACES], the place's best first; sums [rows, PLACES]: of exp(value - its best).
struct Lists {
    const u64* keys;
    const float* sums;
    int guesses;
};

// Bring a row's lists into shared memory, by the warp that merges them; it commits its copies.
__device__ __forceinline__ void fetch_lists(u64* to, const Lists& lists, int row, int lane) {
    const u64* from = lists.keys + (long long)row * lists.guesses * PLACES;
    for (int i = lane; i < lists.guesses * PLACES / 2; i += 32) copy16_async(to + 2 * i, from + 2 * i);
}

// A row's best keys in order, by a warp: best [guesses].
__device__ __forceinline__ void merge_lists(const u64* keys, int guesses, u64* best, int lane) {
    u64 heads[LANE_PLACES];
    int depths[LANE_PLACES] = {};
#pragma unroll
    for (int i = 0; i < LANE_PLACES; ++i) heads[i] = lane + 32 * i < PLACES ? keys[lane + 32 * i] : 0;
    auto largest = [&] {
        u64 mine = heads[0];
#pragma unroll
        for (int i = 1; i < LANE_PLACES; ++i) mine = max(mine, heads[i]);
        return mine;
    };
    u64 mine = largest();
    for (int rank = 0; rank < guesses; ++rank) {
        if (!is_warp_max(mine)) continue;
        best[rank] = mine;
#pragma unroll
        for (int i = 0; i < LANE_PLACES; ++i)
            if (heads[i] == mine) heads[i] = ++depths[i] < guesses ? keys[depths[i] * PLACES + lane + 32 * i] : 0;
        mine = largest();
    }
}

// The sum of exp(value - top) over a row, by a warp. keys: the places' best, in shared memory; sums: the row's.
__device__ __forceinline__ float sum_places(const u64* keys, const float* sums, float top, int lane) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < LANE_PLACES; ++i)
        if (lane + 32 * i < PLACES && keys[lane + 32 * i])
            sum = fmaf(sums[lane + 32 * i], __expf(value_of(keys[lane + 32 * i]) - top), sum);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
}

// The nodes from `first` to `last` (exclusive) of a tree, whose guesses the lists hold: row_of, rank_of [all nodes].
struct Guessed {
    const int *row_of, *rank_of;
    int* tokens;
    float* chances;
    int first, last;
};

// Give the nodes of at most eight rows from `first` on their tokens and chances: a thread block of eight warps, with room
// for the rows' lists in shared memory. Tokens' rows of the embeddings `table`, of row_bytes each, are asked for ahead.
__device__ __forceinline__ void settle_guesses(
    u64* room, const Lists& lists, const Guessed& guessed, int first, int rows, const u8* table, int row_bytes) {
    SHARED u64 best[8][MOST_GUESSES];
    SHARED float totals[8];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    if (warp < rows) {
        u64* keys = room + warp * lists.guesses * PLACES;
        fetch_lists(keys, lists, first + warp, lane);
        commit_copies();
        wait_copies<0>();
        __syncwarp();
        merge_lists(keys, lists.guesses, best[warp], lane);
        __syncwarp();
        const float total = sum_places(keys, lists.sums + (first + warp) * PLACES, value_of(best[warp][0]), lane);
        if (lane == 0) totals[warp] = total;
    }
    __syncthreads();
    for (int node = guessed.first + threadIdx.x; node < guessed.last; node += 256) {
        const int row = guessed.row_of[node] - first;
        if (row < 0 || row >= rows) continue;
        const u64 key = best[row][guessed.rank_of[node]];
        const int token = (int)index_of(key);
        guessed.tokens[node] = token;
        guessed.chances[node] = __expf(value_of(key) - value_of(best[row][0])) / totals[row];
        if (table) prefetch_l2(table + (long long)token * row_bytes, row_bytes);
    }
}
