// The guesses of a draft head that no launch of its own follows: from the output launch's lists to the tree's nodes.
//
// Compile-time: PLACES (see guess_lists.cuh).

#include "guess_lists.cuh"

// Grid: rows / block_rows (at most 8), of 256 threads. What is left of the head's sums is cleared: `cleared`, pieces of 16
// bytes. The other arguments are those of guess_lists.cuh.
extern "C" __global__ void __launch_bounds__(256) draft_settle(
    const u64* keys, const float* sums, const int* row_of, const int* rank_of, int* tokens, float* chances, const u8* table,
    int row_bytes, uint4* cleared, int num_cleared, int rows, int block_rows, int guesses, int first, int last) {
    DYNAMIC_SHARED(shared);
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int first_row = blockIdx.x * block_rows;
    for (int i = blockIdx.x * 256 + threadIdx.x; i < num_cleared; i += gridDim.x * 256) cleared[i] = make_uint4(0, 0, 0, 0);
    const Lists lists = {keys, sums, guesses};
    const Guessed guessed = {row_of, rank_of, tokens, chances, first, last};
    settle_guesses((u64*)shared, lists, guessed, first_row, min(block_rows, rows - first_row), table, row_bytes);
}
