// y[tokens, N] = x[tokens, K] * W^T for few tokens, W in NF4, int8 or 16 bit. Weights are the 16 x 16 left operand of the
// tensor cores, eight tokens the right one.
//
// The order in which a result is summed is fixed by K alone: blocks of 64 along K go round-robin to SLICES slices, a
// slice adds its blocks in order, and the slices are added as a binary tree. How many warps or thread blocks share the
// slices, and how many tokens and rows a warp takes, changes no bit.
//
// Weights lie in tiles of 16 rows x 64 k, a lane's bytes together (see the packing in the Python files): lane (g, q)
// holds rows 2g and 2g + 1 and, of each half of 32 k, the eight from 8q on.
//
// Compile-time: DECODE (0 NF4 by table in shared memory, 1 NF4 by byte permutes, 2 int8,
// 3 plain 16 bit), TOKEN_TILES (of 8 tokens),
// ROW_TILES (of 16 rows, per warp), ROW_WARPS and SLICE_WARPS (their product is the block), DEPTH (blocks of 64 k in
// flight per warp), MIN_BLOCKS (thread blocks per multiprocessor).

#define SLICES 8
#define IS_NF4 (DECODE < 2)

constexpr int THREADS = 32 * ROW_WARPS * SLICE_WARPS;
constexpr int LOADS = IS_NF4 ? 1 : DECODE == 2 ? 2 : 4;  // 16-byte loads a lane and tile
constexpr int SEGMENT_BYTES = SLICE_WARPS * 128;  // one token's 64 k for each slice of this thread block
constexpr int TOKEN_STRIDE = DEPTH * SEGMENT_BYTES + 64;  // the 64 keep eight lanes of a load on different banks
constexpr int STAGE_BYTES = TOKEN_TILES * 8 * TOKEN_STRIDE;
constexpr int BLOCK_ROW_TILES = ROW_WARPS * ROW_TILES;

enum { PLAIN = 0, ADD_RESIDUAL = 1, SWIGLU = 2, FLOAT32 = 3 };

struct Prefetched {
    uint4 codes[LOADS];
    float2 scale;
};

#if DECODE == 0
// The 256 pairs that a byte stands for, one copy a lane: entry b of lane l at b * 32 + l never meets a bank conflict.
SHARED u32 pair_table[256 * 32];

__device__ __forceinline__ void fill_pair_table(const u32* table) {
    for (int i = threadIdx.x; i < 256 * 8; i += THREADS) {
        u32 pair = table[i >> 3];
        ((uint4*)pair_table)[i] = make_uint4(pair, pair, pair, pair);
    }
}

__device__ __forceinline__ u32 look_up(u32 offset) { return *(const u32*)((const u8*)pair_table + offset); }

// Four bytes -> a0 and a2 of two steps.
__device__ __forceinline__ void decode_word(u32 word, u32 lane4, const u32*, u32 (&pairs)[4]) {
    pairs[0] = look_up(and_or(word << 7, 0x7f80, lane4));
    pairs[1] = look_up(and_or(word >> 1, 0x7f80, lane4));
    pairs[2] = look_up(and_or(word >> 9, 0x7f80, lane4));
    pairs[3] = look_up(and_or(word >> 17, 0x7f80, lane4));
}
#elif DECODE == 1
// Codes are numbered so that i and i + 8 have values of equal sign and equal top bit of the low byte. A permute then
// answers "not mine" with the sign of the other half's byte, which the host has taken out of the tables beforehand.
__device__ __forceinline__ u32 four_bytes(u32 selector, u32 t0, u32 t1, u32 t2, u32 t3) {
    return byte_permute(t0, t1, selector) ^ byte_permute(t2, t3, selector ^ 0x8888u);
}

__device__ __forceinline__ void decode_word(u32 word, u32, const u32* tables, u32 (&pairs)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 selector = half ? word >> 16 : word;
        u32 low = four_bytes(selector, tables[0], tables[1], tables[2], tables[3]);
        u32 high = four_bytes(selector, tables[4], tables[5], tables[6], tables[7]);
        pairs[2 * half] = byte_permute(low, high, 0x4051);
        pairs[2 * half + 1] = byte_permute(low, high, 0x6273);
    }
}
#endif

// A tile's 4 x 4 operand registers: a[step][0..3].
__device__ __forceinline__ void decode_tile(const Prefetched& tile, u32 lane4, const u32* tables, u32 (&a)[4][4]) {
#if DECODE == 3
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        a[step][0] = tile.codes[step].x;
        a[step][1] = tile.codes[step].y;
        a[step][2] = tile.codes[step].z;
        a[step][3] = tile.codes[step].w;
    }
#elif DECODE == 2
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const u32 words[4] = {tile.codes[half].x, tile.codes[half].y, tile.codes[half].z, tile.codes[half].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // words 0, 1: row 2g, steps 0, 1 of this half; words 2, 3: row 2g + 1
            int step = 2 * half + (i & 1), row = i >> 1;
            a[step][row] = widen_int8<0>(words[i]);
            a[step][row + 2] = widen_int8<2>(words[i]);
        }
    }
#else
    const u32 words[4] = {tile.codes[0].x, tile.codes[0].y, tile.codes[0].z, tile.codes[0].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // words 0, 1: row 2g, both halves of k; words 2, 3: row 2g + 1
        u32 pairs[4];
        decode_word(words[i], lane4, tables, pairs);
        int step = 2 * (i & 1), row = i >> 1;
        a[step][row] = pairs[0];
        a[step][row + 2] = pairs[1];
        a[step + 1][row] = pairs[2];
        a[step + 1][row + 2] = pairs[3];
    }
#endif
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// Write rows 2g and 2g + 1 (values low, high) of one token.
__device__ __forceinline__ void write_pair(
    u16* y, const u16* residual, int token, int row, int n, int epilogue, float low, float high) {
    if (epilogue == SWIGLU) {  // gate and up rows are interleaved
        y[(long long)token * (n / 2) + row / 2] = from_float(silu(low) * high);
        return;
    }
    long long at = (long long)token * n + row;
    if (epilogue == FLOAT32) {
        *(float2*)((float*)y + at) = make_float2(low, high);
        return;
    }
    if (epilogue == ADD_RESIDUAL) {
        u32 before = *(const u32*)(residual + at);
        low += to_float((u16)before);
        high += to_float((u16)(before >> 16));
    }
    *(u32*)(y + at) = pack2(low, high);
}

__device__ __forceinline__ float4 add4(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Grid: (row tiles / BLOCK_ROW_TILES, SLICES / SLICE_WARPS). n and k are multiples of 16 and 64; x and y are contiguous.
// scales: NF4 float2 [n / 16, k / 64, 8] for rows (2g, 2g + 1); int8 float2 [n / 16, 8].
// table: the 256 pairs, or the eight words of the byte tables; int8 none. counters start at zero and end so.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) linear(
    const u16* x, const uint4* weights, const float2* scales, const u32* table, const u16* residual, u16* y,
    float4* workspace, u32* counters, int tokens, int n, int k, int epilogue) {
    DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int g = lane >> 2, q = lane & 3;
    const int slice_warp = warp % SLICE_WARPS, row_warp = warp / SLICE_WARPS;
    const int first_slice = blockIdx.y * SLICE_WARPS, slice = first_slice + slice_warp;
    const int blocks = k / 64, row_tiles = n / 16;
    const int first_tile = blockIdx.x * BLOCK_ROW_TILES + row_warp * ROW_TILES;
    const int chunks = (blocks + SLICES * DEPTH - 1) / (SLICES * DEPTH);

    Prefetched ahead[DEPTH][ROW_TILES];
    auto prefetch = [&](Prefetched(&slot)[ROW_TILES], int block) {
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t) {
            if (block < blocks && first_tile + t < row_tiles) {
                long long tile = (long long)(first_tile + t) * blocks + block;
#pragma unroll
                for (int i = 0; i < LOADS; ++i) slot[t].codes[i] = load_once16(weights + (tile * LOADS + i) * 32 + lane);
                if (IS_NF4) slot[t].scale = load_once8(scales + tile * 8 + g);
            }
        }
    };
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) prefetch(ahead[d], d * SLICES + slice);

    u32 tables[8] = {};
#if DECODE == 0
    fill_pair_table(table);
#elif DECODE == 1
#pragma unroll
    for (int i = 0; i < 8; ++i) tables[i] = table[i];
#endif
    let_next_kernel_start();
    wait_for_previous_kernel();  // weights are never written; all else may be the previous kernel's

    auto stage_tokens = [&](int chunk) {
        constexpr int PIECES = DEPTH * SEGMENT_BYTES / 16;
        u8* stage = shared + (chunk & 1) * STAGE_BYTES;
        for (int i = threadIdx.x; i < tokens * PIECES; i += THREADS) {
            int token = i / PIECES, piece = i % PIECES;
            int depth = piece / (SEGMENT_BYTES / 16), within = piece % (SEGMENT_BYTES / 16);
            int block = (chunk * DEPTH + depth) * SLICES + first_slice + within / 8;
            if (block < blocks)
                copy16_async(stage + token * TOKEN_STRIDE + piece * 16,
                             x + (long long)token * k + block * 64 + (within & 7) * 8);
        }
        commit_copies();
    };
    stage_tokens(0);
    if (chunks > 1) stage_tokens(1);

    float sums[ROW_TILES][TOKEN_TILES][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
        if (chunk + 1 < chunks) wait_copies<1>();
        else wait_copies<0>();
        __syncthreads();
        const u8* stage = shared + (chunk & 1) * STAGE_BYTES + g * TOKEN_STRIDE + slice_warp * 128 + q * 16;
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            int block = (chunk * DEPTH + d) * SLICES + slice;
            if (block < blocks) {
                u32 a[ROW_TILES][4][4];
                float2 scale[ROW_TILES];
#pragma unroll
                for (int t = 0; t < ROW_TILES; ++t) {
                    decode_tile(ahead[d][t], lane * 4, tables, a[t]);
                    scale[t] = ahead[d][t].scale;
                }
                prefetch(ahead[d], block + DEPTH * SLICES);
#pragma unroll
                for (int tt = 0; tt < TOKEN_TILES; ++tt) {
                    const u8* from = stage + tt * 8 * TOKEN_STRIDE + d * SEGMENT_BYTES;
                    uint4 b0 = *(const uint4*)from, b1 = *(const uint4*)(from + 64);
#pragma unroll
                    for (int t = 0; t < ROW_TILES; ++t) {
#if !IS_NF4
                        float(&c)[4] = sums[t][tt];
#else
                        float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#endif
                        multiply16x8x16(c, a[t][0][0], a[t][0][1], a[t][0][2], a[t][0][3], b0.x, b0.y);
                        multiply16x8x16(c, a[t][1][0], a[t][1][1], a[t][1][2], a[t][1][3], b0.z, b0.w);
                        multiply16x8x16(c, a[t][2][0], a[t][2][1], a[t][2][2], a[t][2][3], b1.x, b1.y);
                        multiply16x8x16(c, a[t][3][0], a[t][3][1], a[t][3][2], a[t][3][3], b1.z, b1.w);
#if IS_NF4
                        sums[t][tt][0] = fmaf(scale[t].x, c[0], sums[t][tt][0]);
                        sums[t][tt][1] = fmaf(scale[t].x, c[1], sums[t][tt][1]);
                        sums[t][tt][2] = fmaf(scale[t].y, c[2], sums[t][tt][2]);
                        sums[t][tt][3] = fmaf(scale[t].y, c[3], sums[t][tt][3]);
#endif
                    }
                }
            }
        }
        __syncthreads();
        if (chunk + 2 < chunks) stage_tokens(chunk + 2);
    }

    // The slices of this thread block, as a binary tree: lane-private sums travel through shared memory.
    float4* exchange = (float4*)shared;
#pragma unroll
    for (int step = 1; step < SLICE_WARPS; step *= 2) {
        if (slice_warp % (2 * step) == step) {
#pragma unroll
            for (int i = 0; i < ROW_TILES * TOKEN_TILES; ++i) {
                const float(&s)[4] = sums[i / TOKEN_TILES][i % TOKEN_TILES];
                exchange[(warp * ROW_TILES * TOKEN_TILES + i) * 32 + lane] = make_float4(s[0], s[1], s[2], s[3]);
            }
        }
        __syncthreads();
        if (slice_warp % (2 * step) == 0) {
#pragma unroll
            for (int i = 0; i < ROW_TILES * TOKEN_TILES; ++i) {
                float4 other = exchange[((warp + step) * ROW_TILES * TOKEN_TILES + i) * 32 + lane];
                float(&s)[4] = sums[i / TOKEN_TILES][i % TOKEN_TILES];
                s[0] += other.x; s[1] += other.y; s[2] += other.z; s[3] += other.w;
            }
        }
        __syncthreads();
    }

    // The thread blocks that share these rows: the last to arrive adds all of them, in the tree's order.
    constexpr int PARTS = SLICES / SLICE_WARPS;
    if (PARTS > 1) {
        SHARED u32 arrived;
        float4* mine = workspace + ((long long)blockIdx.x * ROW_WARPS + row_warp) * PARTS * ROW_TILES * TOKEN_TILES * 32;
        if (slice_warp == 0) {
#pragma unroll
            for (int i = 0; i < ROW_TILES * TOKEN_TILES; ++i) {
                const float(&s)[4] = sums[i / TOKEN_TILES][i % TOKEN_TILES];
                mine[(blockIdx.y * ROW_TILES * TOKEN_TILES + i) * 32 + lane] = make_float4(s[0], s[1], s[2], s[3]);
            }
            __threadfence();
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            arrived = atomicAdd(counters + blockIdx.x, 1u);
            if (arrived == PARTS - 1) counters[blockIdx.x] = 0;
            __threadfence();
        }
        __syncthreads();
        if (arrived != PARTS - 1) return;
        if (slice_warp == 0) {
#pragma unroll
            for (int i = 0; i < ROW_TILES * TOKEN_TILES; ++i) {
                float4 part[PARTS];
#pragma unroll
                for (int p = 0; p < PARTS; ++p) part[p] = __ldcg(mine + (p * ROW_TILES * TOKEN_TILES + i) * 32 + lane);
#pragma unroll
                for (int step = 1; step < PARTS; step *= 2)
#pragma unroll
                    for (int p = 0; p < PARTS; p += 2 * step) part[p] = add4(part[p], part[p + step]);
                float(&s)[4] = sums[i / TOKEN_TILES][i % TOKEN_TILES];
                s[0] = part[0].x; s[1] = part[0].y; s[2] = part[0].z; s[3] = part[0].w;
            }
        }
    }
    if (slice_warp != 0) return;

#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
        if (first_tile + t >= row_tiles) break;
        int row = (first_tile + t) * 16 + 2 * g;
        float2 scale = make_float2(1.0f, 1.0f);
        if (DECODE == 2) scale = scales[(first_tile + t) * 8 + g];
#pragma unroll
        for (int tt = 0; tt < TOKEN_TILES; ++tt) {
            const float(&s)[4] = sums[t][tt];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int token = tt * 8 + 2 * q + i;
                if (token < tokens)
                    write_pair(y, residual, token, row, n, epilogue, s[i] * scale.x, s[i + 2] * scale.y);
            }
        }
    }
}
