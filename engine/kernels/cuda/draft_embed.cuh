// The embeddings of a tree whose last guesses are still in lists: each node's thread block finds its own token.
//
// Compile-time: PLACES (see guess_lists.cuh).

#include "guess_lists.cuh"
#include "seen_parts.cuh"

// Grid: nodes, of 128 threads. table [vocab, width] -> out [nodes, width]; width counts pieces of 16 bytes. Node 0 is the
// record's bonus token; nodes from `first` to `last` get their tokens and chances here, as from draft_settle, and
// `cleared` is cleared. The lists are [rows, guesses, PLACES].
extern "C" __global__ void __launch_bounds__(128) embed_guessed(
    const u64* keys, const float* sums, const int* row_of, const int* rank_of, int* tokens, float* chances, uint4* cleared,
    int num_cleared, int guesses, int first, int last, const uint4* table, const int* record, uint4* out, int width) {
    DYNAMIC_SHARED(shared);
    SHARED u64 best[MOST_GUESSES];
    const int node = blockIdx.x, lane = threadIdx.x & 31;
    const bool is_guessed = node >= first && node < last;
    const int row = is_guessed ? row_of[node] : 0, rank = is_guessed ? rank_of[node] : 0;
    wait_for_previous_kernel();  // first, so that no kernel after this one starts before all older ones have ended
    let_next_kernel_start();
    int token;
    if (is_guessed) {  // whose lists matter down to its rank
        u64* room = (u64*)shared;
        const u64* from = keys + (long long)row * guesses * PLACES;
        for (int i = threadIdx.x; i < (rank + 1) * PLACES / 2; i += 128) copy16_async(room + 2 * i, from + 2 * i);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        if (threadIdx.x < 32) merge_lists(room, rank + 1, best, lane);
        __syncthreads();
        token = (int)index_of(best[rank]);
    } else token = seen_token(tokens, record, node);
    for (int i = threadIdx.x; i < width; i += 128) out[(long long)node * width + i] = table[(long long)token * width + i];
    for (int i = node * 128 + threadIdx.x; i < num_cleared; i += gridDim.x * 128) cleared[i] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x >= 32) return;
    if (is_guessed) {
        const float top = value_of(best[0]), total = sum_places((const u64*)shared, sums + row * PLACES, top, lane);
        if (lane == 0) chances[node] = __expf(value_of(best[rank]) - top) / total;
    }
    if (lane == 0 && (is_guessed || node == 0)) tokens[node] = token;
}
