// The embeddings of the likeliest nodes of a drafted tree, and that smaller tree's own tables: what a step verifies.
//
// How likely a node is accepted is the product of the heads' probabilities on its path; a parent comes before its child
// also where both are 1. Every thread block finds the choice for itself and embeds one node.
//
// Compile-time: PLACES (of the lists of the last guesses, as in guess_lists.cuh; 0 where all nodes have their tokens).

#include "seen_parts.cuh"
#if PLACES
#include "guess_lists.cuh"
#endif

#define MOST_NODES 64
#define MOST_LISTED_ROWS 16

// The tree that the heads fill: row_of, rank_of, tokens, chances, depth [nodes]; ancestor_at [nodes, NEAR]. The nodes
// from `first` to `last` are those of the lists, [listed_rows, guesses, PLACES].
struct Filled {
    const int *row_of, *rank_of, *depth, *ancestor_at;
    int* tokens;
    float* chances;
    int nodes, first, last;
};

// What is kept of it, in the order of its nodes: `nodes`, the number of each among the filled ones, and what the kernels
// of the step read: tokens, depth, parents [kept], ancestor_at [kept, NEAR], is_above [kept, kept].
struct Kept {
    int *nodes, *tokens, *depth, *parents, *ancestor_at;
    u8* is_above;
};

// Grid: the nodes to keep, with the root, of 128 threads. `cleared` is cleared, num_cleared pieces of 16 bytes. table
// [vocab, width] -> out [kept, width]; width counts pieces of 16 bytes. The root is the record's bonus token.
extern "C" __global__ void __launch_bounds__(128) embed_likeliest(
    const u64* keys, const float* key_sums, const int* row_of, const int* rank_of, int* tokens, float* chances,
    uint4* cleared, int num_cleared, int listed_rows, int guesses, int first, int last, const int* depth_of,
    const int* ancestor_at, int nodes, int* kept_nodes, int* kept_tokens, int* kept_depth, int* kept_parents,
    int* kept_ancestor_at, u8* kept_is_above, const uint4* table, const int* record, uint4* out, int width) {
    const Filled filled = {row_of, rank_of, depth_of, ancestor_at, tokens, chances, nodes, first, last};
    const Kept kept = {kept_nodes, kept_tokens, kept_depth, kept_parents, kept_ancestor_at, kept_is_above};
    SHARED int token_of[MOST_NODES], new_of[MOST_NODES], node_at[MOST_NODES], depths[MOST_NODES];
    SHARED float chance_of[MOST_NODES];
    SHARED u32 likelihood[MOST_NODES], masks[2];
    const int node = threadIdx.x, lane = node & 31, count = gridDim.x;
    const bool is_node = node < filled.nodes, is_guessed = PLACES && node >= filled.first && node < filled.last;
    const int depth = is_node ? filled.depth[node] : 0;
    int above[NEAR];
#pragma unroll
    for (int d = 0; d < NEAR; ++d) above[d] = is_node ? filled.ancestor_at[node * NEAR + d] : 0;
    const int row = is_guessed ? filled.row_of[node] : 0, rank = is_guessed ? filled.rank_of[node] : 0;
    wait_for_previous_kernel();  // first, so that no kernel after this one starts before all older ones have ended

    int token = node == 0 ? record[RECORD_BONUS] : 0;
    float chance = 1.0f;
    if (is_node && node > 0 && !is_guessed) token = filled.tokens[node], chance = filled.chances[node];
#if PLACES
    DYNAMIC_SHARED(shared);
    SHARED u64 best[MOST_LISTED_ROWS][MOST_GUESSES];
    SHARED float totals[MOST_LISTED_ROWS];
    u64* room = (u64*)shared;
    const Lists lists = {keys, key_sums, guesses};
    for (int r = threadIdx.x / 32; r < listed_rows; r += 4) fetch_lists(room + r * guesses * PLACES, lists, r, lane);
    commit_copies();
    wait_copies<0>();
    __syncwarp();
    for (int r = threadIdx.x / 32; r < listed_rows; r += 4) {
        const u64* listed = room + r * guesses * PLACES;
        merge_lists(listed, guesses, best[r], lane);
        __syncwarp();
        const float total = sum_places(listed, lists.sums + r * PLACES, value_of(best[r][0]), lane);
        if (lane == 0) totals[r] = total;
    }
    __syncthreads();
    if (is_guessed) {
        const u64 key = best[row][rank];
        token = (int)index_of(key), chance = __expf(value_of(key) - value_of(best[row][0])) / totals[row];
    }
#endif
    if (is_node) token_of[node] = token, chance_of[node] = chance, depths[node] = depth;
    __syncthreads();

    float path = 1.0f;  // the same product as its parent's, times its own chance: never larger
#pragma unroll
    for (int d = 1; d < NEAR; ++d)
        if (d <= depth) path *= chance_of[above[d]];
    const u32 mine = node == 0 ? ~0u : path > 0.0f ? __float_as_uint(path) : 0u;
    if (is_node) likelihood[node] = mine;
    __syncthreads();
    int place = 0;
    for (int other = 0; other < filled.nodes; ++other)
        place += likelihood[other] > mine || (likelihood[other] == mine && other < node);
    const bool is_kept = is_node && place < count;
    const u32 mask = __ballot_sync(~0u, is_kept);
    if (lane == 0 && node < MOST_NODES) masks[node / 32] = mask;
    __syncthreads();
    const int index = __popc(mask & ((1u << lane) - 1)) + (node >= 32 ? __popc(masks[0]) : 0);
    if (is_kept) new_of[node] = index, node_at[index] = node;
    __syncthreads();

    if (blockIdx.x == 0) {
        if (is_guessed || node == 0) filled.tokens[node] = token, filled.chances[node] = chance;
        if (is_kept) {
            kept.nodes[index] = node, kept.tokens[index] = token, kept.depth[index] = depth;
            int parent = -1;
#pragma unroll
            for (int d = 0; d < NEAR; ++d) {
                const int at = d <= depth ? new_of[above[d]] : 0;
                if (d + 1 == depth) parent = at;
                kept.ancestor_at[index * NEAR + d] = at;
            }
            kept.parents[index] = parent;
        }
        for (int i = threadIdx.x; i < count * count; i += 128) {
            const int below = node_at[i / count], candidate = node_at[i % count], at = depths[candidate];
            kept.is_above[i] = at <= depths[below] && filled.ancestor_at[below * NEAR + at] == candidate;
        }
        __threadfence();  // attention reads the tables as soon as it starts (see tree_attention.cuh)
        __syncthreads();
    }
    let_next_kernel_start();
    const long long from = (long long)token_of[node_at[blockIdx.x]] * width;
    for (int i = threadIdx.x; i < width; i += 128) out[(long long)blockIdx.x * width + i] = table[from + i];
    for (int i = blockIdx.x * 128 + threadIdx.x; i < num_cleared; i += gridDim.x * 128) cleared[i] = make_uint4(0, 0, 0, 0);
}
