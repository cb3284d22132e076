// The far keys of a thread block's rows: every SLOTS-th block of FAR_BLOCK positions, one after the other, by eight
// warps. Warps share the positions for the scores, then the head dims for the sums, so that a sum is made by one warp,
// in order of position. A row beyond a block's end takes nothing from it: its weights are zero, which changes no bit.

// A thread's share of the blocks: the same piece of every FETCH_STEP-th row, a multiple of 8, so that they lie alike.
constexpr int FETCH_STEP = FAR_THREADS / PIECES;
struct Fetch {
    const u16 *keys, *values;  // of round 0
    int to, position;  // in values of a block; of round 0
};

__device__ __forceinline__ Fetch fetch_of(const u16* keys, const u16* values, int slot) {
    const int row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES, position = slot * FAR_BLOCK + row;
    const long long from = (long long)position * HEAD_DIM + piece * 8;
    Fetch fetch = {keys + from, values + from, (int)(piece_at<HEAD_DIM>((u16*)0, row, piece) - (u16*)0), position};
    return fetch;
}

// Bring a round's block on the way into shared memory; zeros past the end, where memory may hold anything.
__device__ __forceinline__ void fetch_round(u16* blocks, const u16* from, const Fetch& fetch, int round, int length) {
    u16* to = blocks + round % STAGES * BLOCK_VALUES + fetch.to;
    const int position = fetch.position + round * SLOTS * FAR_BLOCK;
    from += (long long)round * (SLOTS * FAR_BLOCK * HEAD_DIM);
#pragma unroll
    for (int i = 0; i < FAR_BLOCK / FETCH_STEP; ++i)
        copy16_or_zero(
            to + i * FETCH_STEP * HEAD_DIM, from + i * FETCH_STEP * HEAD_DIM, position + i * FETCH_STEP < length);
}

__device__ __forceinline__ void fetch_keys(u8* memory, const Fetch& fetch, int round, int rounds, int length) {
    if (round < rounds) fetch_round((u16*)(memory + KEYS_AT), fetch.keys, fetch, round, length);
    commit_copies();
}

__device__ __forceinline__ void fetch_values(u8* memory, const Fetch& fetch, int round, int rounds, int length) {
    if (round < rounds) fetch_round((u16*)(memory + VALUES_AT), fetch.values, fetch, round, length);
    commit_copies();
}

// A thread's share of the queries: a piece of a row of the lower half of a head, and the piece that turns with it.
struct QueryPiece {
    const u16* from;  // null where there is no such row
    u16* to[2];
    Turns turns;
};

__device__ __forceinline__ QueryPiece query_piece(
    u8* memory, int item, const u16* qkv, const float2* angles, const int* depth, const Place& place) {
    const int row = item / (PIECES / 2), piece = item % (PIECES / 2), width = place.kv_heads * (GROUP + 2) * HEAD_DIM;
    const RowOwner owner = row_owner(place, row);
    QueryPiece share = {};
    if (row >= ROWS || owner.node < 0) return share;
    share.from = known_early(qkv + (long long)owner.node * width + owner.head * HEAD_DIM + piece * 8);
#pragma unroll
    for (int i = 0; i < 2; ++i)
        share.to[i] = piece_at<HEAD_DIM>((u16*)(memory + QUERY_AT), row, piece + i * PIECES / 2);
    share.turns = load_turns(angles + (long long)(place.length + __ldcg(depth + owner.node)) * (HEAD_DIM / 2), piece * 8);
    return share;
}

__device__ __forceinline__ void place_query(const QueryPiece& share) {
    if (!share.from) return;
    uint4 low = load_early16(share.from), high = load_early16(share.from + HEAD_DIM / 2);
    rotate8(low, high, share.turns);
    *(uint4*)share.to[0] = low;
    *(uint4*)share.to[1] = high;
}

constexpr int TILE_STEP = FAR_WARPS / UNITS, MY_TILES = (ROW_TILES + TILE_STEP - 1) / TILE_STEP;
constexpr int DIM_TILES = HEAD_DIM / 8 / FAR_WARPS;  // of eight head dims, that a warp sums

struct FarState {
    float sums[ROW_TILES][DIM_TILES][4];
    float peak[ROW_TILES][2];  // of rows g and g + 8, in powers of two
    float row_peak, row_total;  // of row threadIdx.x, in the first threads
};

// Scores of this warp's 16 positions, in powers of two, -infinity beyond a row's end; their peaks go to shared memory.
__device__ __forceinline__ void score_block(
    float (&scores)[MY_TILES][2][4], u8* memory, u16* keys, const int (&end)[ROW_TILES][2], int first, int length,
    float scale) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
    const int unit = warp % UNITS, part = TILE_STEP == 1 ? 0 : warp / UNITS, matrix = lane >> 3, r = lane & 7;
    u16* query = (u16*)(memory + QUERY_AT);
    float* peaks = (float*)(memory + PEAKS_AT);
    const int steps = first + 16 * unit < length ? HEAD_DIM / 16 : 0;
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
        if (step >= steps) break;
        uint4 k = load_matrices(
            piece_at<HEAD_DIM>(keys, 16 * unit + 8 * (matrix >> 1) + r, 2 * step + (matrix & 1)));
#pragma unroll
        for (int i = 0; i < MY_TILES; ++i) {
            int tile = i * TILE_STEP + part;
            if (tile >= ROW_TILES) break;
            uint4 a = load_matrices(
                piece_at<HEAD_DIM>(query, 16 * tile + 8 * (matrix & 1) + r, 2 * step + (matrix >> 1)));
            multiply16x8x16(scores[i][0], a.x, a.y, a.z, a.w, k.x, k.y);
            multiply16x8x16(scores[i][1], a.x, a.y, a.z, a.w, k.z, k.w);
        }
    }
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile) {
        if (tile % TILE_STEP != part) continue;
        float(&mine)[2][4] = scores[tile / TILE_STEP];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float peak = -INFINITY;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& s = mine[i / 2][2 * row + i % 2];
                int position = first + 16 * unit + 8 * (i / 2) + 2 * q + i % 2;
                s = position < end[tile][row] ? s * scale : -INFINITY;
                peak = fmaxf(peak, s);
            }
            peak = quad_max(peak);
            if (q == 0) peaks[(16 * tile + g + 8 * row) * UNITS + unit] = peak;
        }
    }
}

__device__ __forceinline__ float peak_of(const u8* memory, int row) {
    const float4* peaks = (const float4*)(memory + PEAKS_AT) + row * (UNITS / 4);
    float peak = -INFINITY;
#pragma unroll
    for (int i = 0; i < UNITS / 4; ++i)
        peak = fmaxf(peak, fmaxf(fmaxf(peaks[i].x, peaks[i].y), fmaxf(peaks[i].z, peaks[i].w)));
    return peak;
}

__device__ __forceinline__ float base_of(float peak) { return peak == -INFINITY ? 0.0f : peak; }

// The rows' new peaks, the sums faded to them, and the weights of this warp's positions, to shared memory.
__device__ __forceinline__ void weigh_block(FarState& state, const float (&scores)[MY_TILES][2][4], u8* memory) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
    const int unit = warp % UNITS, part = TILE_STEP == 1 ? 0 : warp / UNITS;
    u16* weights = (u16*)(memory + WEIGHTS_AT);
    float* totals = (float*)(memory + TOTALS_AT);
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int at = 16 * tile + g + 8 * row;
            float peak = fmaxf(state.peak[tile][row], peak_of(memory, at)), base = base_of(peak);
            float fade = exp2_fast(state.peak[tile][row] - base);
            state.peak[tile][row] = peak;
#pragma unroll
            for (int n = 0; n < DIM_TILES; ++n) {
                state.sums[tile][n][2 * row] *= fade;
                state.sums[tile][n][2 * row + 1] *= fade;
            }
            if (tile % TILE_STEP != part) continue;
            const float(&mine)[2][4] = scores[tile / TILE_STEP];
            float total = 0.0f;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float low = exp2_fast(mine[half][2 * row] - base), high = exp2_fast(mine[half][2 * row + 1] - base);
                total += low;
                total += high;
                *(u32*)(piece_at<FAR_BLOCK>(weights, at, 2 * unit + half) + 2 * q) = pack2(low, high);
            }
            total = quad_sum(total);
            if (q == 0) totals[at * UNITS + unit] = total;
        }
    }
}

// sums += weights * values, for this warp's head dims.
__device__ __forceinline__ void add_values(FarState& state, u8* memory, u16* values) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, matrix = lane >> 3, r = lane & 7;
    u16* weights = (u16*)(memory + WEIGHTS_AT);
    uint4 v;  // two tiles of eight dims, or two units of one
    float odd[ROW_TILES][4] = {};  // with one tile, the odd units' sums: two chains of products take half the time
#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) {
        if (DIM_TILES == 2)
            v = load_matrices_transposed(
                piece_at<HEAD_DIM>(values, 16 * unit + 8 * (matrix & 1) + r, 2 * warp + (matrix >> 1)));
        else if (unit % 2 == 0)
            v = load_matrices_transposed(piece_at<HEAD_DIM>(values, 16 * unit + 8 * matrix + r, warp));
        else v = make_uint4(v.z, v.w, 0, 0);
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            uint4 a = load_matrices(
                piece_at<FAR_BLOCK>(weights, 16 * tile + 8 * (matrix & 1) + r, 2 * unit + (matrix >> 1)));
            float(&sums)[4] = DIM_TILES == 1 && unit % 2 ? odd[tile] : state.sums[tile][0];
            multiply16x8x16(sums, a.x, a.y, a.z, a.w, v.x, v.y);
            if (DIM_TILES == 2) multiply16x8x16(state.sums[tile][DIM_TILES - 1], a.x, a.y, a.z, a.w, v.z, v.w);
        }
    }
    if (DIM_TILES == 1)
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) state.sums[tile][0][i] += odd[tile][i];
}

// The peak and total of row threadIdx.x, a thread a row.
__device__ __forceinline__ float move_row_peak(FarState& state, const u8* memory) {
    float peak = fmaxf(state.row_peak, peak_of(memory, threadIdx.x));
    float fade = exp2_fast(state.row_peak - base_of(peak));
    state.row_peak = peak;
    return fade;
}

__device__ __forceinline__ void add_row_total(FarState& state, const u8* memory, float fade) {
    const float4* totals = (const float4*)(memory + TOTALS_AT) + threadIdx.x * (UNITS / 4);
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < UNITS / 4; ++i) total = total + totals[i].x + totals[i].y + totals[i].z + totals[i].w;
    state.row_total = fmaf(state.row_total, fade, total);
}

// All rounds of the eight far warps, after the first STAGES rounds have been asked for and the queries are in place.
__device__ __forceinline__ void far_rounds(
    FarState& state, u8* memory, const Fetch& fetch, const Place& place, const int (&end)[ROW_TILES][2], int rounds,
    float scale) {
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        const int stage = round % STAGES, first = (place.slot + round * SLOTS) * FAR_BLOCK;
        float scores[MY_TILES][2][4] = {}, fade = 0.0f;
        score_block(scores, memory, (u16*)(memory + KEYS_AT) + stage * BLOCK_VALUES, end, first, place.length, scale);
        barrier(FAR_BARRIER, FAR_THREADS);  // peaks are there, the block's keys are done with
        if (round + 1 == rounds) keys_done();
        fetch_keys(memory, fetch, round + STAGES, rounds, place.length);
        weigh_block(state, scores, memory);
        if (threadIdx.x < ROWS) fade = move_row_peak(state, memory);
        wait_copies<2 * STAGES - 1>();
        barrier(FAR_BARRIER, FAR_THREADS);  // weights and totals are there, and this block's values
        if (threadIdx.x < ROWS) add_row_total(state, memory, fade);
        add_values(state, memory, (u16*)(memory + VALUES_AT) + stage * BLOCK_VALUES);
        if (round + 1 < rounds) {
            wait_copies<2 * STAGES - 2>();
            barrier(FAR_BARRIER, FAR_THREADS);  // the next block's keys are there, this one's values are done with
            fetch_values(memory, fetch, round + STAGES, rounds, place.length);
        }
    }
}

// Hand the rows' sums and (peak, total) to who adds them.
__device__ __forceinline__ void send_far(const FarState& state, const Exchange& exchange, const Place& place) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = 16 * tile + g + 8 * i;
            if (row_owner(place, row).node < 0) continue;
            const Target target = target_of(exchange, place.slot, row);
#pragma unroll
            for (int n = 0; n < DIM_TILES; ++n)
                target.put_sums((DIM_TILES * warp + n) * 8 + 2 * q,
                                make_float2(state.sums[tile][n][2 * i], state.sums[tile][n][2 * i + 1]));
        }
    const int row = threadIdx.x;
    if (row < ROWS && row_owner(place, row).node >= 0)
        target_of(exchange, place.slot, row).put_mark(make_float2(state.row_peak, state.row_total));
}
