// The rows that draft heads work on, as integers. Guesses need no particular bits, so int8 weights meet values of 16 bits,
// as two planes of int8 on the integer tensor cores: no weight is decoded. What thread blocks add together is in fixed
// point, where the order of additions changes nothing: a draft is the same each time.
//
// Compile-time: HIDDEN (a multiple of 64), TOKEN_TILES (of 8 rows), COPIES (of sums, among which thread blocks take turns).

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
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
        pairs[i] = unpack2(*(const u32*)(row + 4 * (lane + 32 * i)));
        squares = fmaf(pairs[i].x, pairs[i].x, fmaf(pairs[i].y, pairs[i].y, squares));
    }
    __syncwarp();
    const float scale = write_planes(row, pairs, lane);
    return normalizes ? scale * norm_scale(squares, HIDDEN, eps) : scale;
}

// What a lane holds of a tile of 16 rows x 64 k of int8 weights: rows 2g and 2g + 1, 32 k each.
struct Codes {
    uint4 halves[2];
};

__device__ __forceinline__ Codes load_codes(const uint4* weights, int tile, int lane) {
    const uint4* from = weights + (long long)tile * 64 + lane;
    return {{load_once16(from), load_once16(from + 32)}};
}

// A tile's products with eight rows, by plane, and with 2 CHAINS by half of each 64 k: sums that need not wait for each
// other.
template <int CHAINS> struct Products {
    int high[CHAINS][4], low[CHAINS][4];

    __device__ __forceinline__ float sum(int i) const {  // exact up to 1024 k
        const int last = CHAINS - 1;
        return 256.0f * (last ? high[0][i] + high[last][i] : high[0][i]) + (last ? low[0][i] + low[last][i] : low[0][i]);
    }
};

// sums += a tile of weights * eight rows' planes; `row` is where this lane's row (lane % 8) has its 64 values, for lanes
// from 8 on 16 bytes further for each eight.
template <int CHAINS>
__device__ __forceinline__ void multiply_codes(Products<CHAINS>& sums, const Codes& a, const u8* row) {
    const uint4 h = load_matrices(row), l = load_matrices(row + HIDDEN), first = a.halves[0], second = a.halves[1];
    multiply16x8x32(sums.high[0], first.x, first.z, first.y, first.w, h.x, h.y);
    multiply16x8x32(sums.low[0], first.x, first.z, first.y, first.w, l.x, l.y);
    multiply16x8x32(sums.high[CHAINS - 1], second.x, second.z, second.y, second.w, h.z, h.w);
    multiply16x8x32(sums.low[CHAINS - 1], second.x, second.z, second.y, second.w, l.z, l.w);
}

// ---- sums of many thread blocks: int32 [COPIES, ROWS, HIDDEN], two neighbours a 64-bit number ----

// Add two neighbours; a carry from the lower one is taken back on reading.
__device__ __forceinline__ void add_fixed(u64* to, float low, float high) {
    const long long first = __float2int_rn(low * FIXED_ONE), second = __float2int_rn(high * FIXED_ONE);
    atomicAdd(to, (u64)second * 0x100000000ull + (u64)first);
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
