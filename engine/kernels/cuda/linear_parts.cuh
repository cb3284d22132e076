// What the linears (linear*.cuh) share: codes into operands, and what happens to the sums.
//
// The order in which a result is summed is fixed by K alone: blocks of 64 along K go round-robin to SLICES slices, a
// slice adds its blocks in order, and the slices are added as a binary tree. How many warps or thread blocks share the
// slices, and how many tokens and rows a warp takes, changes no bit.
//
// Weights lie in tiles of 16 rows x 64 k, a lane's bytes together (see the packing in the Python files): lane (g, q)
// holds rows 2g and 2g + 1 and, of each 16 k, the pairs at 2q and at 8 + 2q: the left operand of the tensor cores.
//
// Compile-time: DECODE (0 NF4 by table in shared memory, 1 NF4 by byte permutes, 2 int8, 3 plain 16 bit), TOKEN_TILES
// (of 8 tokens), ROW_TILES (of 16 rows, per warp), ROW_WARPS and SLICE_WARPS (their product is the block), DEPTH
// (blocks of 64 k in flight per warp), MIN_BLOCKS (thread blocks per multiprocessor), PREFETCH (ask for the weights'
// way into the L2 cache at the start). ABLATE leaves a stage out, for measurements only: its results are wrong.

#define SLICES 8
#define IS_NF4 (DECODE < 2)
#ifndef ABLATE
#define ABLATE 0
#endif
#ifndef WIDE_TABLE
#define WIDE_TABLE 0
#endif
enum { NO_DECODE = 1, NO_TOKENS = 2, NO_EXCHANGE = 4, NO_WEIGHTS = 8, ONE_SET = 16 };

#ifndef FEEDERS
#define FEEDERS 0
#endif
constexpr int MULTIPLIERS = 32 * ROW_WARPS * SLICE_WARPS, THREADS = MULTIPLIERS + 32 * FEEDERS;
constexpr int LOADS = IS_NF4 ? 1 : DECODE == 2 ? 2 : 4;  // 16-byte loads a lane and tile
constexpr int TILE_BYTES = LOADS * 512;
constexpr int BLOCK_ROW_TILES = ROW_WARPS * ROW_TILES;
constexpr int TILE_STEP = ABLATE & NO_WEIGHTS ? 0 : SLICES;  // from one block of a slice to its next
constexpr int PARTS = SLICES / SLICE_WARPS;  // thread blocks that share rows

enum { PLAIN = 0, ADD_RESIDUAL = 1, SWIGLU = 2, FLOAT32 = 3, SILU = 4 };

struct Prefetched {
    uint4 codes[LOADS];
    float2 scale;
};

// Load a lane's share of a tile, whose bytes start at `codes` and whose scales at `scales`.
__device__ __forceinline__ void load_tile(Prefetched& slot, const uint4* codes, const float2* scales, int lane) {
#pragma unroll
    for (int i = 0; i < LOADS; ++i) slot.codes[i] = load_once16(codes + i * 32 + lane);
    if (IS_NF4) slot.scale = load_once8(scales + (lane >> 2));
}

// Ask for this thread block's share of `count` tiles' bytes to be brought into the L2 cache, by one thread.
__device__ __forceinline__ void prefetch_tiles(const uint4* weights, const float2* scales, long long tile, int count) {
    const int share = (count + PARTS - 1) / PARTS, first = blockIdx.y * share;
    if (first >= count) return;
    const int mine = first + share < count ? share : count - first;
    prefetch_l2((const u8*)weights + (tile + first) * TILE_BYTES, mine * TILE_BYTES);
    if (IS_NF4) prefetch_l2(scales + (tile + first) * 8, mine * 64);
}

// What decoding needs: this lane's column of the pair table, or the byte tables.
struct Tables {
    SharedAddress column;
    const u8* wide;
    u32 lane4, bytes[8];
};

#if DECODE == 0
// The 256 pairs that a byte stands for, one copy a lane: entry b of lane l never meets a bank conflict. A wide table
// leaves every other 128 bytes free, so that one permute makes an entry's place: the byte, then four times the lane.
#if WIDE_TABLE
constexpr int TABLE_ROW = 256;
#else
constexpr int TABLE_ROW = 128;
SHARED u32 pair_table[256 * 32];
#endif

// The 16 values, two a word, as `code_tables` of nf4_linear.py numbers them: here, so that no launch waits for a table.
__device__ __forceinline__ u32 value_bits(int code) {
    const bool second = code & 2, third = code & 4, fourth = code & 8;
#if BF16
    const u32 low = third ? (second ? 0xbedebfc3 : 0xbe0ebf4d) : second ? 0x3f8d3df8 : 0x3f2c3e7b;
    const u32 high = third ? (second ? 0xbe90bf88 : 0x8000bf1a) : second ? 0x3fc33ec0 : 0x3f5c3f04;
#else
    const u32 low = third ? (second ? 0xb4a8ba9e : 0xb72bbe4d) : second ? 0x398e3b17 : 0x36343003;
    const u32 high = third ? (second ? 0xb097b8fa : 0x8000bc63) : second ? 0x3c8e3e4d : 0x3842340e;
#endif
    const u32 word = fourth ? high : low;
    return code & 1 ? word >> 16 : word & 0xffff;
}

__device__ __forceinline__ void fill_pair_table(u8* to) {
    for (int i = threadIdx.x; i < 256 * 8; i += THREADS) {
        const u32 pair = value_bits(i >> 7) | value_bits(i >> 3 & 15) << 16;
        *(uint4*)(to + (i >> 3) * TABLE_ROW + (i & 7) * 16) = make_uint4(pair, pair, pair, pair);
    }
}

// Four bytes -> a0 and a2 of two steps.
__device__ __forceinline__ void decode_word(u32 word, const Tables& tables, u32 (&pairs)[4]) {
#if WIDE_TABLE
    pairs[0] = *(const u32*)(tables.wide + byte_permute(word, tables.lane4, 0x5504));
    pairs[1] = *(const u32*)(tables.wide + byte_permute(word, tables.lane4, 0x5514));
    pairs[2] = *(const u32*)(tables.wide + byte_permute(word, tables.lane4, 0x5524));
    pairs[3] = *(const u32*)(tables.wide + byte_permute(word, tables.lane4, 0x5534));
#else
    pairs[0] = load_shared4(tables.column + byte_permute(word, 0, 0x4440) * 128);
    pairs[1] = load_shared4(tables.column + byte_permute(word, 0, 0x4441) * 128);
    pairs[2] = load_shared4(tables.column + byte_permute(word, 0, 0x4442) * 128);
    pairs[3] = load_shared4(tables.column + byte_permute(word, 0, 0x4443) * 128);
#endif
}
#elif DECODE == 1
// Codes are numbered so that i and i + 8 have values of equal sign and equal top bit of the low byte. A permute then
// answers "not mine" with the sign of the other half's byte, which the host has taken out of the tables beforehand.
__device__ __forceinline__ u32 four_bytes(u32 selector, u32 t0, u32 t1, u32 t2, u32 t3) {
    return byte_permute(t0, t1, selector) ^ byte_permute(t2, t3, selector ^ 0x8888u);
}

__device__ __forceinline__ void decode_word(u32 word, const Tables& tables, u32 (&pairs)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 selector = half ? word >> 16 : word;
        u32 low = four_bytes(selector, tables.bytes[0], tables.bytes[1], tables.bytes[2], tables.bytes[3]);
        u32 high = four_bytes(selector, tables.bytes[4], tables.bytes[5], tables.bytes[6], tables.bytes[7]);
        pairs[2 * half] = byte_permute(low, high, 0x4051);
        pairs[2 * half + 1] = byte_permute(low, high, 0x6273);
    }
}
#endif

// `wide` is where a wide table goes.
__device__ __forceinline__ Tables load_tables(const u32* table, u8* wide = nullptr) {
    Tables tables = {};
#if DECODE == 0 && WIDE_TABLE
    fill_pair_table(wide);
    tables.wide = wide;
    tables.lane4 = (threadIdx.x & 31) * 4;
#elif DECODE == 0
    fill_pair_table((u8*)pair_table);
    tables.column = shared_address(pair_table + (threadIdx.x & 31));
#elif DECODE == 1
#pragma unroll
    for (int i = 0; i < 8; ++i) tables.bytes[i] = table[i];
#endif
    return tables;
}

// Half a tile's 4 x 4 operand registers, 32 k: a[step][0..3] for steps 2 * half and 2 * half + 1.
__device__ __forceinline__ void decode_half(
    const Prefetched& tile, int half, const Tables& tables, u32 (&a)[4][4]) {
#if DECODE == 3 || (ABLATE & 1)
#pragma unroll
    for (int step = 2 * half; step < 2 * half + 2; ++step) {
        const uint4& codes = tile.codes[DECODE == 3 ? step : 0];
        a[step][0] = codes.x;
        a[step][1] = codes.y;
        a[step][2] = codes.z;
        a[step][3] = codes.w;
    }
#elif DECODE == 2
    const uint4& codes = tile.codes[half];
    const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // words 0, 1: row 2g, steps 0, 1 of this half; words 2, 3: row 2g + 1
        int step = 2 * half + (i & 1), row = i >> 1;
        a[step][row] = widen_int8<0>(words[i]);
        a[step][row + 2] = widen_int8<2>(words[i]);
    }
#else
    const u32 words[2] = {half ? tile.codes[0].y : tile.codes[0].x, half ? tile.codes[0].w : tile.codes[0].z};
#pragma unroll
    for (int row = 0; row < 2; ++row) {  // 2g and 2g + 1
        u32 pairs[4];
        decode_word(words[row], tables, pairs);
        a[2 * half][row] = pairs[0];
        a[2 * half][row + 2] = pairs[1];
        a[2 * half + 1][row] = pairs[2];
        a[2 * half + 1][row + 2] = pairs[3];
    }
#endif
}

// sum += scale * product, rows 2g and 2g + 1 of two tokens.
__device__ __forceinline__ void add_scaled(float (&sum)[4], float2 scale, const float (&product)[4]) {
    sum[0] = fmaf(scale.x, product[0], sum[0]);
    sum[1] = fmaf(scale.x, product[1], sum[1]);
    sum[2] = fmaf(scale.y, product[2], sum[2]);
    sum[3] = fmaf(scale.y, product[3], sum[3]);
}

__device__ __forceinline__ float silu(float x) { return divide_fast(x, 1.0f + exp2_fast(-1.4426950408889634f * x)); }

// Where rows `row` and `row + 1` of one token lie in the residual and, but for SWIGLU, in y.
__device__ __forceinline__ long long pair_at(int token, int row, int n) { return (long long)token * n + row; }

// Write rows 2g and 2g + 1 (values low, high) of one token; `before` is the residual's pair. The
// compiler never joins __fadd_rn with the product of a scale before it; a plain addition it would join in some
// configurations and not in others.
__device__ __forceinline__ void write_pair(
    u16* y, u32 before, int token, int row, int n, int epilogue, float low, float high) {
    if (epilogue == SWIGLU) {  // gate and up rows are interleaved
        y[(long long)token * (n / 2) + row / 2] = from_float(silu(low) * high);
        return;
    }
    const long long at = pair_at(token, row, n);
    if (epilogue == FLOAT32) {
        *(float2*)((float*)y + at) = make_float2(low, high);
        return;
    }
    if (epilogue == ADD_RESIDUAL) {
        low = __fadd_rn(low, to_float((u16)before));
        high = __fadd_rn(high, to_float((u16)(before >> 16)));
    }
    if (epilogue == SILU) {
        low = silu(low);
        high = silu(high);
    }
    *(u32*)(y + at) = pack2(low, high);
}

__device__ __forceinline__ void write_pair(
    u16* y, const u16* residual, int token, int row, int n, int epilogue, float low, float high) {
    const u32 before = epilogue == ADD_RESIDUAL ? *(const u32*)(residual + pair_at(token, row, n)) : 0;
    write_pair(y, before, token, row, n, epilogue, low, high);
}

__device__ __forceinline__ float4 add4(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// The slices of this thread block, as a binary tree: lane-private sums travel through shared memory. Slice 0 ends with
// all of them. `exchange` holds SLICE_WARPS / 2 senders; every thread of the block takes part.
__device__ __forceinline__ void add_slices(
    float (&sums)[ROW_TILES][TOKEN_TILES][4], float4* exchange, int row_warp, int slice_warp, int lane) {
#pragma unroll
    for (int step = 1; step < SLICE_WARPS; step *= 2) {
        float4* slot = exchange + (slice_warp / (2 * step) * ROW_WARPS + row_warp) * ROW_TILES * TOKEN_TILES * 32 + lane;
        if (slice_warp % (2 * step) == step) {
#pragma unroll
            for (int i = 0; i < ROW_TILES * TOKEN_TILES; ++i) {
                const float(&s)[4] = sums[i / TOKEN_TILES][i % TOKEN_TILES];
                slot[i * 32] = make_float4(s[0], s[1], s[2], s[3]);
            }
        }
        __syncthreads();
        if (slice_warp % (2 * step) == 0) {
#pragma unroll
            for (int i = 0; i < ROW_TILES * TOKEN_TILES; ++i) {
                float4 other = slot[i * 32];
                float(&s)[4] = sums[i / TOKEN_TILES][i % TOKEN_TILES];
                s[0] += other.x; s[1] += other.y; s[2] += other.z; s[3] += other.w;
            }
        }
        __syncthreads();
    }
}

// The thread blocks that share these rows: the last to arrive adds all of them, in the tree's order. True for it.
__device__ __forceinline__ bool add_parts(
    float (&sums)[ROW_TILES][TOKEN_TILES][4], float4* workspace, u32* counters, int row_block, int row_warp,
    int slice_warp, int lane) {
    if (PARTS == 1 || (ABLATE & NO_EXCHANGE)) return true;
    SHARED u32 arrived;
    float4* mine = workspace + ((long long)row_block * ROW_WARPS + row_warp) * PARTS * ROW_TILES * TOKEN_TILES * 32;
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
        arrived = atomicAdd(counters + row_block, 1u);
        if (arrived == PARTS - 1) counters[row_block] = 0;
        __threadfence();
    }
    __syncthreads();
    if (arrived != PARTS - 1) return false;
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
    return true;
}

// Write a warp's rows of all tokens.
__device__ __forceinline__ void write_sums(
    const float (&sums)[ROW_TILES][TOKEN_TILES][4], const float2* scales, u16* y, const u16* residual, int first_tile,
    int lane, int tokens, int n, int epilogue) {
    const int g = lane >> 2, q = lane & 3;
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
        if (first_tile + t >= n / 16) break;
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
