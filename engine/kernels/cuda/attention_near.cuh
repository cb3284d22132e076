// The near keys of one task, by one warp: the last NEAR keys of its node, itself included, are 16 rows of a
// tensor-core step in order of position, each from wherever it lies: the cache, or the layer's qkv as an ancestor.

struct NearKeys {
    uint4 keys[2][CHUNKS32];  // lane (g, q): key g of each half, dims 32 c + 8 q and on
};

// The node that has key lane % 16 of the near keys, or -1 for a key of the cache.
__device__ __forceinline__ int near_owner(const int* ancestor_at, int node, int first, int length) {
    int above = first + (threadIdx.x & 15) - length;
    return above >= 0 ? __ldcg(ancestor_at + node * NEAR + above) : -1;
}

// Ask for the angles of the positions from `length` on that the node's path takes. Several warps may write the same
// bytes to the same place.
__device__ __forceinline__ void fetch_angles(float2* to, const float2* angles, int length, int depth) {
    const int lane = threadIdx.x & 31;
    const u8* from = (const u8*)(angles + (long long)length * (HEAD_DIM / 2));
    for (int i = lane; i < (depth + 1) * (HEAD_DIM / 4); i += 32) copy16_async((u8*)to + 16 * i, from + 16 * i);
    commit_copies();
}

// Where this lane's share of the near keys and values comes from; null for values before the text's start.
struct NearSources {
    const u16 *keys[2], *values[NEAR * PIECES / 32];
};

__device__ __forceinline__ NearSources find_near(
    const u16* qkv, const u16* keys, const u16* values, const Place& place, int owner, int first) {
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    const int width = place.kv_heads * (GROUP + 2) * HEAD_DIM;
    const u16* node_keys = qkv + (place.kv_heads * GROUP + place.kv_head) * HEAD_DIM;
    const u16* node_values = node_keys + place.kv_heads * HEAD_DIM;
    NearSources sources;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int from = __shfl_sync(~0u, owner, 8 * half + g), position = max(first + 8 * half + g, 0);
        const u16* key = from >= 0 ? node_keys + (long long)from * width : keys + (long long)position * HEAD_DIM;
        sources.keys[half] = known_early(key + 8 * q);
    }
#pragma unroll
    for (int i = 0; i < NEAR * PIECES / 32; ++i) {
        const int row = (i * 32 + lane) / PIECES, piece = (i * 32 + lane) % PIECES, position = first + row;
        const int from = __shfl_sync(~0u, owner, row);
        const u16* value = from >= 0 ? node_values + (long long)from * width : values + (long long)position * HEAD_DIM;
        sources.values[i] = position >= 0 ? value + piece * 8 : nullptr;
    }
    return sources;
}

// Load the keys as they are, and ask for the values.
__device__ __forceinline__ void fetch_near(NearKeys& near, u16* near_values, const NearSources& sources) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int c = 0; c < CHUNKS32; ++c) near.keys[half][c] = load_early16(sources.keys[half] + 32 * c);
#pragma unroll
    for (int i = 0; i < NEAR * PIECES / 32; ++i) {
        const int row = (i * 32 + lane) / PIECES, piece = (i * 32 + lane) % PIECES;
        copy16_or_zero(piece_at<HEAD_DIM>(near_values, row, piece), sources.values[i], sources.values[i] != nullptr);
    }
    commit_copies();
}

// Rotate the keys that come from qkv; angles are those from position `length` on.
__device__ __forceinline__ void rotate_near(NearKeys& near, const float2* angles, int first, int length) {
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int above = first + 8 * half + g - length;
        if (above < 0) continue;
#pragma unroll
        for (int c = 0; c < CHUNKS64; ++c)
            rotate8(near.keys[half][c], near.keys[half][c + CHUNKS64],
                    load_turns(angles + above * (HEAD_DIM / 2), 32 * c + 8 * q));
    }
}

// Keep the node's own key and value, the last of the near ones, for the commit; scratch row [HEAD_DIM] each.
__device__ __forceinline__ void write_scratch(const NearKeys& near, u16* near_values, u16* key, u16* value) {
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    if (g == 7) {
#pragma unroll
        for (int c = 0; c < CHUNKS32; ++c) *(uint4*)(key + 32 * c + 8 * q) = near.keys[1][c];
    }
    if (lane < PIECES) *(uint4*)(value + 8 * lane) = *(const uint4*)piece_at<HEAD_DIM>(near_values, NEAR - 1, lane);
}

// Scores of 16 keys for the task's heads, whose queries are the rows from first_row on.
__device__ __forceinline__ void score_near(float (&scores)[2][4], const NearKeys& near, u16* query, int first_row) {
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
#pragma unroll
    for (int c = 0; c < CHUNKS32; ++c) {
        uint4 a[2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (g + 8 * i < TASK_HEADS)
                a[i] = *(const uint4*)piece_at<HEAD_DIM>(query, first_row + g + 8 * i, 4 * c + q);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4& k = near.keys[half][c];
            multiply16x8x16(scores[half], a[0].x, a[1].x, a[0].y, a[1].y, k.x, k.y);
            multiply16x8x16(scores[half], a[0].z, a[1].z, a[0].w, a[1].w, k.z, k.w);
        }
    }
}

// What 16 keys' scores weigh, and the sum of their weights, for rows g and g + 8 of the task's heads.
struct NearWeights {
    u32 pairs[2][2];  // [half][row]
    float2 marks[2];  // (peak, total)
};

__device__ __forceinline__ NearWeights weigh_near(const float (&scores)[2][4], int first, float scale) {
    const int q = threadIdx.x & 3;
    NearWeights weights;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float peak = -INFINITY, total = 0.0f, s[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            int position = first + 8 * (j / 2) + 2 * q + j % 2;
            s[j] = position >= 0 ? scores[j / 2][2 * i + j % 2] * scale : -INFINITY;
            peak = fmaxf(peak, s[j]);
        }
        peak = quad_max(peak);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            s[j] = exp2_fast(s[j] - peak);
            total += s[j];
        }
        weights.marks[i] = make_float2(peak, quad_sum(total));
        weights.pairs[0][i] = pack2(s[0], s[1]);
        weights.pairs[1][i] = pack2(s[2], s[3]);
    }
    return weights;
}

// Where the sums of the task's heads go, rows g and g + 8 of those from first_row on.
struct NearTargets {
    Target rows[2];
    bool exists[2];
};

__device__ __forceinline__ NearTargets near_targets(const Exchange& exchange, const Place& place, int first_row) {
    const int g = (threadIdx.x & 31) >> 2;
    NearTargets targets;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = first_row + g + 8 * i;
        targets.exists[i] = g + 8 * i < TASK_HEADS && row_owner(place, row).node >= 0;
        targets.rows[i] = target_of(exchange, SLOTS, row);
    }
    return targets;
}

__device__ __forceinline__ void send_near(const NearWeights& weights, u16* near_values, const NearTargets& targets) {
    const int lane = threadIdx.x & 31, q = lane & 3, matrix = lane >> 3, r = lane & 7;
#pragma unroll
    for (int i = 0; i < 2; ++i)
        if (targets.exists[i] && q == 0) targets.rows[i].put_mark(weights.marks[i]);
#pragma unroll
    for (int pair = 0; pair < PIECES / 2; ++pair) {
        uint4 v = load_matrices_transposed(
            piece_at<HEAD_DIM>(near_values, 8 * (matrix & 1) + r, 2 * pair + (matrix >> 1)));
        float products[2][4] = {};
        const u32(&w)[2][2] = weights.pairs;
        multiply16x8x16(products[0], w[0][0], w[0][1], w[1][0], w[1][1], v.x, v.y);
        multiply16x8x16(products[1], w[0][0], w[0][1], w[1][0], w[1][1], v.z, v.w);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (!targets.exists[i]) continue;
#pragma unroll
            for (int n = 0; n < 2; ++n)
                targets.rows[i].put_sums(
                    16 * pair + 8 * n + 2 * q, make_float2(products[n][2 * i], products[n][2 * i + 1]));
        }
    }
}
