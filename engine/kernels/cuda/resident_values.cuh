// How linear_resident.cuh brings the tokens' values into shared memory: as they are, normalised, or put together for a
// draft head. `meanwhile` is called once while the first of them are on their way.

#include "norm_parts.cuh"
#include "seen_parts.cuh"

template <typename Meanwhile>
__device__ __forceinline__ void stage_copied(
    u8* shared, const u16* x, int tokens, int warp, int lane, Meanwhile meanwhile) {
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int token = warp + turn * WARPS;
        if (token < tokens) {
            u8* to = shared + token * PITCH + lane * 16;
            const uint4* from = (const uint4*)x + token * ROW_PIECES + lane;
#pragma unroll
            for (int i = 0; i < LANE_PIECES; ++i)
                if (lane + i * 32 < ROW_PIECES) copy16_async(to + i * 512, from + i * 32);
        }
    }
    commit_copies();
    meanwhile();
    wait_copies<0>();
}

#if NORM
static_assert(ROW_PIECES <= NORM_PLACES, "a lane's places hold one piece each");
constexpr int ROWS_AT_ONCE = TOKEN_TILES * 8 >= 2 * WARPS && LANE_PIECES <= 4 ? 2 : 1;

// Normalise all tokens' values into shared memory. `factors` are a lane's pieces of the norm's weight.
template <typename Meanwhile>
__device__ __forceinline__ void stage_normalized(
    u8* shared, const u16* x, const uint4 (&factors)[LANE_PIECES], u16* normed, int tokens, float eps, int warp,
    int lane, Meanwhile meanwhile) {
#pragma unroll
    for (int turn = 0; turn < TURNS; turn += ROWS_AT_ONCE) {
        const int first = warp + turn * WARPS;
        uint4 kept[ROWS_AT_ONCE][LANE_PIECES];
#pragma unroll
        for (int r = 0; r < ROWS_AT_ONCE; ++r)
#pragma unroll
            for (int i = 0; i < LANE_PIECES; ++i) {
                const int token = first + r * WARPS, piece = lane + i * 32;
                kept[r][i] = make_uint4(0, 0, 0, 0);
                if (token < tokens && piece < ROW_PIECES) kept[r][i] = ((const uint4*)x)[token * ROW_PIECES + piece];
            }
        if (turn == 0) meanwhile();
        if (first >= tokens) break;
#pragma unroll
        for (int r = 0; r < ROWS_AT_ONCE; ++r) {
            const int token = first + r * WARPS;
            float sum = add_squares(0.0f, kept[r][0]);
#pragma unroll
            for (int i = 1; i < LANE_PIECES; ++i) sum += add_squares(0.0f, kept[r][i]);
            const float scale = norm_scale(sum, K, eps);
#pragma unroll
            for (int i = 0; i < LANE_PIECES; ++i) {
                const int piece = lane + i * 32;
                if (token >= tokens || piece >= ROW_PIECES) continue;
                const uint4 result = normalized(kept[r][i], factors[i], scale);
                *(uint4*)(shared + token * PITCH + piece * 16) = result;
                if (normed && blockIdx.x == 0) ((uint4*)normed)[token * ROW_PIECES + piece] = result;
            }
        }
    }
}
#endif

#if SEEN
constexpr int SEEN_PIECES = ROW_PIECES / (1 + SEEN);
constexpr int SEEN_LANE_PIECES = (SEEN_PIECES + 31) / 32;

// A draft head's inputs are put into shared memory by a warp a hidden state or embedding, in turns: lane i looks up the
// token of turn i. Where it stands in the tree is known before the previous kernel's end: 0 the root, -1 no token.
__device__ __forceinline__ int seen_place(const int* ancestor_at, const int* row_nodes, int tokens, int warp, int lane) {
    const int item = warp + lane * WARPS, slot = item % (1 + SEEN);
    return slot == 0 || item >= tokens * (1 + SEEN) ? -1 : ancestor_at[row_nodes[item / (1 + SEEN)] * NEAR + slot - 1];
}

template <typename Meanwhile>
__device__ __forceinline__ void stage_seen(
    u8* shared, const u16* state, const uint4* table, const int* drafted, const int* record, int place, int tokens,
    int warp, int lane, Meanwhile meanwhile) {
    const int token = place < 0 ? 0 : seen_token(drafted, record, place);
    meanwhile();
    for (int turn = 0, item = warp; item < tokens * (1 + SEEN); ++turn, item += WARPS) {
        const int slot = item % (1 + SEEN);
        const uint4* row = table + (long long)__shfl_sync(~0u, token, turn) * SEEN_PIECES;
        const uint4* from = slot == 0 ? (const uint4*)state : row;
        uint4 kept[SEEN_LANE_PIECES];
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < SEEN_LANE_PIECES; ++i) {
            kept[i] = make_uint4(0, 0, 0, 0);
            if (lane + i * 32 < SEEN_PIECES) kept[i] = from[lane + i * 32];
            sum = add_squares(sum, kept[i]);
        }
        const float scale = slot == 0 ? 1.0f : norm_scale(sum, SEEN_PIECES * 8, SEEN_EPS);
        u8* to = shared + item / (1 + SEEN) * PITCH + slot * SEEN_PIECES * 16;
#pragma unroll
        for (int i = 0; i < SEEN_LANE_PIECES; ++i)
            if (lane + i * 32 < SEEN_PIECES) *(uint4*)(to + (lane + i * 32) * 16) = scaled(kept[i], scale);
    }
}
#endif
