// The rows that draft heads work on, as integers. Guesses need no particular bits, so int8 weights meet values of 16 bits,
// as two planes of int8 on the integer tensor cores: no weight is decoded. What thread blocks add together is in fixed
// point, where the order of additions changes nothing: a draft is the same each time.
//
// Compile-time: HIDDEN (a multiple of 64), TOKEN_TILES (of 8 rows), PAIRED (1: there are at most four rows, whose two planes
// share a tile of the tensor cores), COPIES (of sums, among which thread blocks take turns).

#include "norm_parts.cuh"

constexpr int ROWS = 8 * TOKEN_TILES;
constexpr int PAIRS = HIDDEN / 64;           // of neighbouring values that a lane has of a row: lane + 32 i
constexpr int ROW_BLOCKS = HIDDEN / 64;      // of 64 values
constexpr int ROW_PITCH = HIDDEN * 2 + 16;   // the 16 keep eight rows of a load on different banks
constexpr float TOP_CODE = 127.0f * 256.0f;  // the largest code whose high byte is an int8
constexpr float FIXED_ONE = 65536.0f;        // sums reach to 32768, in steps far below those of 16-bit values

__device__ __forceinline__ float2 unpack2(u32 word) { return make_float2(to_float((u16)word), to_float((u16)(word >> 16))); }

// ---- a row as two planes of int8: value = scale * (256 * high + low) ----

// Write a row's planes, high [HIDDEN] then low [HIDDEN], a warp; returns the scale. Within each 16 values the order is that
// of the weights' tiles: 0, 1, 8, 9; 2, 3, 10, 11; ...
__device__ __forceinline__ float write_planes(u8* row, const float2 (&pairs)[PAIRS], int lane) {
    u32 top = __float_as_uint(1e-20f);
#pragma unroll
    for (int i = 0; i < PAIRS; ++i)
        top = max(top, max(__float_as_uint(pairs[i].x) & 0x7fffffffu, __float_as_uint(pairs[i].y) & 0x7fffffffu));
    const float largest = __uint_as_float(warp_max_bits(top)), by = divide_fast(TOP_CODE, largest);
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
        const int pair = lane + 32 * i;
        u8* to = row + pair / 8 * 16 + pair % 4 * 4 + pair % 8 / 4 * 2;
        // beside 1.5 * 2^23 a float's lowest bits are the rounded code
        const u32 x = __float_as_uint(fmaf(pairs[i].x, by, 12582912.0f)), y = __float_as_uint(fmaf(pairs[i].y, by, 12582912.0f));
        *(u16*)to = (u16)byte_permute(x + 128, y + 128, 0x0051);
        *(u16*)(to + HIDDEN) = (u16)byte_permute(x, y, 0x0040);
    }
    return largest * (1.0f / TOP_CODE);
}

// Turn a row of 16-bit values in shared memory into its planes, a warp; with `normalizes` to unit RMS. Returns the scale.
__device__ __forceinline__ float convert_row(u8* row, bool normalizes, float eps, int lane) {
    float2 pairs[PAIRS];
    float2 squares = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
        pairs[i] = unpack2(*(const u32*)(row + 4 * (lane + 32 * i)));
        squares = make_float2(fmaf(pairs[i].x, pairs[i].x, squares.x), fmaf(pairs[i].y, pairs[i].y, squares.y));
    }
    const float by = normalizes ? norm_scale(squares.x + squares.y, HIDDEN, eps) : 1.0f;
    __syncwarp();
    return write_planes(row, pairs, lane) * by;
}

// What a lane holds of a tile of 16 rows x 64 k of int8 weights: rows 2g and 2g + 1, 32 k each.
struct Codes {
    uint4 halves[2];
};

__device__ __forceinline__ Codes load_codes(const uint4* weights, int tile, int lane) {
    const uint4* from = weights + (long long)tile * 64 + lane;
    return {{load_once16(from), load_once16(from + 32)}};
}

// The same, not before the tile `before` has come. A kernel that asks for all its weights at once makes a queue, in which
// the kernel that runs meanwhile waits for its values: on an H100 a draft of 36 nodes took 57 us so, and 54 us with AHEAD
// tiles of each warp under way (63 and 58 us where the weights were not in the cache).
constexpr int AHEAD = 2;
__device__ __forceinline__ Codes load_codes_after(const Codes& before, const uint4* weights, int tile, int lane) {
    return load_codes(known_after(before.halves[1].w, weights), tile, lane);
}

// A tile's products with eight rows, by plane, and with 2 CHAINS by half of each 64 k: sums that need not wait for each
// other. PAIRED, lanes have the high plane's of four rows, or the low plane's.
template <int CHAINS> struct Products {
    int high[CHAINS][4], low[CHAINS][4];

    __device__ __forceinline__ float sum(int i, int lane) const {  // exact up to 1024 k
        const int last = CHAINS - 1, first = last ? high[0][i] + high[last][i] : high[0][i];
        if constexpr (PAIRED) return first * (lane & 2 ? 1.0f : 256.0f);
        else return 256.0f * first + (last ? low[0][i] + low[last][i] : low[0][i]);
    }
};

// The sum of what lanes have of a row: with PAIRED the two planes, on both lanes.
__device__ __forceinline__ float both_planes(float sum) { return PAIRED ? sum + __shfl_xor_sync(~0u, sum, 2) : sum; }

// From where the rows of a tile begin to what a lane loads of 64 values; and the same where all rows are one.
__device__ __forceinline__ int one_offset(int lane) { return (lane >> 3) * 16 + (PAIRED ? (lane >> 2 & 1) * HIDDEN : 0); }
__device__ __forceinline__ int lane_offset(int lane) { return (lane & (PAIRED ? 3 : 7)) * ROW_PITCH + one_offset(lane); }

// sums += a tile of weights * eight rows' planes; `row` is where this lane loads.
template <int CHAINS>
__device__ __forceinline__ void multiply_codes(Products<CHAINS>& sums, const Codes& a, const u8* row) {
    const uint4 h = load_matrices(row), first = a.halves[0], second = a.halves[1];
    multiply16x8x32(sums.high[0], first.x, first.z, first.y, first.w, h.x, h.y);
    multiply16x8x32(sums.high[CHAINS - 1], second.x, second.z, second.y, second.w, h.z, h.w);
    if constexpr (!PAIRED) {
        const uint4 l = load_matrices(row + HIDDEN);
        multiply16x8x32(sums.low[0], first.x, first.z, first.y, first.w, l.x, l.y);
        multiply16x8x32(sums.low[CHAINS - 1], second.x, second.z, second.y, second.w, l.z, l.w);
    }
}

// ---- sums of many thread blocks: int32 [COPIES, ROWS, HIDDEN], two neighbours a 64-bit number ----

// Two neighbours as they are added; a carry from the lower one is taken back on reading.
__device__ __forceinline__ u64 as_fixed(float low, float high) {
    const long long first = __float2int_rn(low * FIXED_ONE), second = __float2int_rn(high * FIXED_ONE);
    return (u64)second * 0x100000000ull + (u64)first;
}

// A lane's pairs of a row as they lie in memory.
struct Summed {
    u32 words[PAIRS];
    u64 added[PAIRS];
};

// Load a row's values, and what has been added to them, if anything (`added`: the sums' row of the first copy).
__device__ __forceinline__ Summed load_summed(const u16* values, const int* added, int lane) {
    Summed row;
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) row.words[i] = ((const u32*)values)[lane + 32 * i];
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
        row.added[i] = 0;
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy)
            if (added) row.added[i] += ((const u64*)added)[copy * (ROWS * HIDDEN / 2) + lane + 32 * i];
    }
    return row;
}

__device__ __forceinline__ void add_up(float2 (&pairs)[PAIRS], const Summed& row) {
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
        const u32 low = (u32)row.added[i], high = (u32)(row.added[i] >> 32) + (low >> 31);
        const float2 value = unpack2(row.words[i]);
        pairs[i] = make_float2(fmaf((float)(int)low, 1.0f / FIXED_ONE, value.x), fmaf((float)(int)high, 1.0f / FIXED_ONE, value.y));
    }
}
