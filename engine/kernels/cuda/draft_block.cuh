// A draft head's wide block x + D silu(U x) as one launch: each thread block has 16 of the inner features, the rows of U
// and the columns of D that belong to them, in registers before the previous kernel has ended. What D makes of them is
// added to sums of all thread blocks (see integer_rows.cuh); x + sums is for the launch after this one to add up.
//
// A head's first block sees tokens besides the hidden state. The last of them may still be guesses in lists, which every
// thread block merges for itself; one thread block more, the clerk, then gives them to the tree's nodes and clears the
// sums that nobody reads any more.
//
// Compile-time besides those of integer_rows.cuh: SEEN (tokens that a row sees besides the hidden state; 0: a row is
// `base` with what was added to it), WIDTH (inner features, a multiple of 64), PLACES (of the lists that the clerk
// settles, as in guess_lists.cuh; 0: there is no clerk), MERGED (1: the last token seen comes from those lists, of at most
// 16 rows), ROOM_BYTES (of shared memory, for the clerk).

#include "integer_rows.cuh"
#include "seen_parts.cuh"
#if PLACES
#include "guess_lists.cuh"
#endif

#define MOST_MERGED 16
constexpr int WARPS = 8;
constexpr int BLOCKS = (1 + SEEN) * ROW_BLOCKS;            // of 64 input features
constexpr int SLOTS = (BLOCKS + WARPS - 1) / WARPS;        // of them that a warp has at most
constexpr int DOWN_TILES = HIDDEN / 16;                    // of 16 rows of D
constexpr int DOWN_SLOTS = (DOWN_TILES + WARPS - 1) / WARPS;
constexpr int KNOWN = MERGED ? SEEN - 1 : SEEN;            // tokens seen that are known when the launch begins
constexpr int MERGERS = MERGED ? 4 : 0;                    // warps that see to the others
constexpr int ROOT = (SEEN - 1) * ROWS, STATE = ROOT + 1;  // what all rows see lies behind the rows of each token seen
constexpr int NUM_ROWS = SEEN ? STATE + 1 : ROWS;          // in shared memory
static_assert(SEEN == 0 || KNOWN > 0, "of the tokens seen, the root at least is known");
constexpr int FRAGMENT = 128;                              // 16 inner features of eight rows

// Where a row's n-th token seen lies, from 1: the root is token 0.
__device__ __forceinline__ int seen_row(int n, int row) { return (n - 1) * ROWS + row; }

// Ask for a row of 16-bit values, by a warp.
__device__ __forceinline__ void copy_row(u8* to, const u16* from, int lane) {
#pragma unroll
    for (int i = lane; i < HIDDEN / 8; i += 32) copy16_async(to + i * 16, from + i * 8);
}

#if SEEN
// What is known and brought by the last warps, in turns: the hidden state, the root, and of each row the other tokens.
__device__ __forceinline__ int num_known(int rows) { return 2 + rows * (KNOWN - 1); }

// The node of a warp's turn `lane`, -1 for none.
__device__ __forceinline__ int known_node(const int* ancestor_at, const int* row_nodes, int rows, int warp, int lane) {
    const int item = warp - MERGERS + lane * (WARPS - MERGERS), token = item - 2;
    if (item < 1 || item >= num_known(rows)) return -1;
    return item == 1 ? 0 : ancestor_at[row_nodes[token / max(1, KNOWN - 1)] * NEAR + 1 + token % max(1, KNOWN - 1)];
}

// Call `work` with each item's place in shared memory, its turn, and whether it is a token's.
template <typename Work>
__device__ __forceinline__ void known_items(int rows, int warp, Work work) {
    for (int turn = 0, item = warp - MERGERS; item < num_known(rows); ++turn, item += WARPS - MERGERS) {
        const int token = item - 2;
        const int at = seen_row(1 + token % max(1, KNOWN - 1), token / max(1, KNOWN - 1));
        work(item == 0 ? STATE : item == 1 ? ROOT : at, turn, item > 0);
    }
}
#endif

// Grid: WIDTH / 16, and the clerk, of 256 threads. base [1 or rows, HIDDEN], base_stride values apart; added: what was
// added to it, or null; x_out [rows, HIDDEN]: gets the two together, where it is not null. up int8 [WIDTH, (1 + SEEN) *
// HIDDEN] and down [HIDDEN, WIDTH] in tiles, with scales by row; sums: cleared memory. The embeddings are table [vocab,
// HIDDEN]; record, ancestor_at, row_nodes as in gather_seen. The lists are of listed_rows rows, the other arguments those
// of draft_settle.
extern "C" __global__ void __launch_bounds__(256, 2) draft_block(
    const u16* base, int base_stride, const int* added, u16* x_out, const uint4* up, const float* up_scales,
    const uint4* down, const float2* down_scales, int* sums, int rows, const u16* table, const int* record,
    const int* ancestor_at, const int* row_nodes, const u64* keys, const float* key_sums, const int* row_of,
    const int* rank_of, int* tokens, float* chances, uint4* cleared, int num_cleared, int listed_rows, int guesses,
    int first, int last) {
    DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
    float* scales = (float*)(shared + NUM_ROWS * ROW_PITCH);
    float4* exchange = (float4*)(shared + NUM_ROWS * ROW_PITCH + (NUM_ROWS + 3) / 4 * 16);
    u16* inner = (u16*)(exchange + WARPS * TOKEN_TILES * 32);
#if PLACES
    u64* room = (u64*)exchange;  // whose lists are merged before anything is exchanged
    const Lists lists = {keys, key_sums, guesses};
    if (blockIdx.x == WIDTH / 16) {
        let_next_kernel_start();
        wait_for_previous_kernel();
        const Guessed guessed = {row_of, rank_of, tokens, chances, first, last};
        const int at_once = max(1, min(8, ROOM_BYTES / (guesses * PLACES * 8)));
        for (int i = threadIdx.x; i < num_cleared; i += 256) cleared[i] = make_uint4(0, 0, 0, 0);
        for (int row = 0; row < listed_rows; row += at_once) {
            settle_guesses((u64*)shared, lists, guessed, row, min(at_once, listed_rows - row), nullptr, 0);
            __syncthreads();
        }
        return;
    }
#endif

    auto block_of = [&](int slot) { return slot * WARPS + warp; };
    auto is_there = [&](int slot) { return (slot + 1) * WARPS <= BLOCKS || block_of(slot) < BLOCKS; };
    // of D a lane has, in each tile of 16 rows x 64 columns, two words of a step of 16 columns (see int8_linear.py)
    u32 words[DOWN_SLOTS][2];
    float2 down_by[DOWN_SLOTS] = {};
#pragma unroll
    for (int i = 0; i < DOWN_SLOTS; ++i) {
        const int tile = i * WARPS + warp, step = blockIdx.x % 4;
        words[i][0] = words[i][1] = 0;
        if ((i + 1) * WARPS > DOWN_TILES && tile >= DOWN_TILES) continue;
        const u32* from = (const u32*)(down + ((long long)tile * (WIDTH / 64) + blockIdx.x / 4) * 64 + step / 2 * 32 + lane);
        words[i][0] = from[step % 2];
        words[i][1] = from[step % 2 + 2];
        down_by[i] = down_scales[tile * 8 + (lane >> 2)];
    }
    // the inner feature of this thread in a fragment of sums, and the row
    const int feature = (threadIdx.x >> 4 & 7) * 2 + (threadIdx.x >> 1 & 1), column = (threadIdx.x >> 2 & 3) * 2 + (threadIdx.x & 1);
    const float up_by = up_scales[blockIdx.x * 16 + feature];
#if SEEN
    const int node = warp < MERGERS ? -1 : known_node(ancestor_at, row_nodes, rows, warp, lane);
#if MERGED
    int guess = 0;  // of turn `lane`: where its key is among those merged
    if (warp < MERGERS && warp + lane * MERGERS < rows) {
        const int parent = ancestor_at[row_nodes[warp + lane * MERGERS] * NEAR + SEEN - 1];
        guess = row_of[parent] * MOST_GUESSES + rank_of[parent];
    }
#endif
#endif
    Codes codes[SLOTS] = {};
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
        if (!is_there(slot)) continue;
        const int at = blockIdx.x * BLOCKS + block_of(slot);
        codes[slot] = slot < AHEAD ? load_codes(up, at, lane) : load_codes_after(codes[max(0, slot - AHEAD)], up, at, lane);
    }
    let_next_kernel_start();  // not earlier: it would ask for its weights beside these
    wait_for_previous_kernel();  // weights and the tree's tables are never written; all else may be the previous kernel's

    u32 a[DOWN_SLOTS][4];
    auto widen_down = [&] {
#pragma unroll
        for (int i = 0; i < DOWN_SLOTS; ++i) {
            a[i][0] = widen_int8<0>(words[i][0]);
            a[i][1] = widen_int8<0>(words[i][1]);
            a[i][2] = widen_int8<2>(words[i][0]);
            a[i][3] = widen_int8<2>(words[i][1]);
        }
    };
    auto convert = [&](int at, bool is_token) {
        const float scale = convert_row(shared + at * ROW_PITCH, is_token, SEEN_EPS, lane);
        if (lane == 0) scales[at] = scale;
    };
#if SEEN
    if (warp >= MERGERS) {
        const int token = node < 0 ? 0 : seen_token(tokens, record, node);
        known_items(rows, warp, [&](int at, int turn, bool is_token) {
            const u16* row = table + (long long)__shfl_sync(~0u, token, turn) * HIDDEN;
            copy_row(shared + at * ROW_PITCH, is_token ? row : base, lane);
        });
        commit_copies();
        widen_down();
        wait_copies<0>();
        __syncwarp();
        known_items(rows, warp, [&](int at, int turn, bool is_token) { convert(at, is_token); });
    }
#if MERGED
    else {
        SHARED u64 best[MOST_MERGED][MOST_GUESSES];
        for (int row = warp; row < listed_rows; row += MERGERS) fetch_lists(room + row * guesses * PLACES, lists, row, lane);
        commit_copies();
        widen_down();
        wait_copies<0>();
        __syncwarp();
        for (int row = warp; row < listed_rows; row += MERGERS)
            merge_lists(room + row * guesses * PLACES, guesses, best[row], lane);
        barrier(1, MERGERS * 32);
        const int guessed_token = (int)index_of((&best[0][0])[guess]);
        for (int row = warp, turn = 0; row < rows; row += MERGERS, ++turn) {
            const u16* from = table + (long long)__shfl_sync(~0u, guessed_token, turn) * HIDDEN;
            copy_row(shared + seen_row(SEEN - 1, row) * ROW_PITCH, from, lane);
        }
        commit_copies();
        wait_copies<0>();
        __syncwarp();
        for (int row = warp; row < rows; row += MERGERS) convert(seen_row(SEEN - 1, row), true);
    }
#endif
#else
    auto row_at = [&](int row) {
        return load_summed(base + row * base_stride, added ? added + row * HIDDEN : nullptr, lane);
    };
    Summed summed = {};
    if (warp < rows) summed = row_at(warp);
    widen_down();
    for (int row = warp; row < rows; row += WARPS) {
        float2 pairs[PAIRS];
        add_up(pairs, summed);
        if (row + WARPS < rows) summed = row_at(row + WARPS);
        if (x_out && blockIdx.x == 0)
#pragma unroll
            for (int i = 0; i < PAIRS; ++i) ((u32*)(x_out + row * HIDDEN))[lane + 32 * i] = pack2(pairs[i].x, pairs[i].y);
        const float scale = write_planes(shared + row * ROW_PITCH, pairs, lane);
        if (lane == 0) scales[row] = scale;
    }
#endif
    __syncthreads();

    float part[TOKEN_TILES][4] = {};
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
        const int block = min(block_of(slot), BLOCKS - 1);  // a warp that has no more blocks has codes of 0
        const int item = block / ROW_BLOCKS;                // what is seen, the hidden state and the root first
        const bool is_one = SEEN && item < 2;
        const int at = !SEEN ? 0 : item == 0 ? STATE : item == 1 ? ROOT : seen_row(item - 1, 0);
        const u8* from = shared + at * ROW_PITCH + block % ROW_BLOCKS * 64;
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; ++t) {
            Products<1> products = {};
            multiply_codes(products, codes[slot], from + (is_one ? one_offset(lane) : t * 8 * ROW_PITCH + lane_offset(lane)));
            const float* by = scales + at + (is_one ? 0 : t * 8 + 2 * (lane & (PAIRED ? 1 : 3)));
            const float2 scale = make_float2(by[0], by[is_one ? 0 : 1]);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                part[t][j] = fmaf(products.sum(j, lane), j & 1 ? scale.y : scale.x, part[t][j]);
        }
    }
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; ++t) {
#pragma unroll
        for (int j = 0; j < 4; ++j) part[t][j] = both_planes(part[t][j]);
        exchange[(warp * TOKEN_TILES + t) * 32 + lane] = make_float4(part[t][0], part[t][1], part[t][2], part[t][3]);
    }
    __syncthreads();
    for (int t = threadIdx.x / FRAGMENT; t < TOKEN_TILES; t += 256 / FRAGMENT) {
        float sum = 0.0f;
#pragma unroll
        for (int s = 0; s < WARPS; ++s)
            sum += ((const float*)exchange)[(s * TOKEN_TILES + t) * FRAGMENT + threadIdx.x % FRAGMENT];
        sum *= up_by;
        inner[(t * 8 + column) * 16 + feature] = from_float(divide_fast(sum, 1.0f + exp2_fast(-1.4426950408889634f * sum)));
    }
    __syncthreads();
    sums += (long long)(blockIdx.x % COPIES) * ROWS * HIDDEN;
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; ++t) {
        const u32* b = (const u32*)(inner + (t * 8 + (lane >> 2)) * 16) + (lane & 3);
        const u32 b0 = b[0], b1 = b[4];
        const int row = t * 8 + 2 * (lane & 3);
        u64 pairs[DOWN_SLOTS][2];  // all before any is added: none then waits for another
#pragma unroll
        for (int i = 0; i < DOWN_SLOTS; ++i) {
            float c[4] = {};
            multiply16x8x16(c, a[i][0], a[i][1], a[i][2], a[i][3], b0, b1);
#pragma unroll
            for (int j = 0; j < 2; ++j) pairs[i][j] = as_fixed(c[j] * down_by[i].x, c[j + 2] * down_by[i].y);
        }
#pragma unroll
        for (int i = 0; i < DOWN_SLOTS; ++i) {
            const int tile = i * WARPS + warp;
            u64* to = (u64*)(sums + row * HIDDEN + tile * 16 + 2 * (lane >> 2));
            if (tile >= DOWN_TILES) continue;
            if (row < rows) atomicAdd(to, pairs[i][0]);
            if (row + 1 < rows) atomicAdd(to + HIDDEN / 2, pairs[i][1]);
        }
    }
}
