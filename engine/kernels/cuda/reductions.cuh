// The largest of many values, the smaller index among equals, in any order of looking.

// A float32 as a number above 0 that orders by value.
__device__ __forceinline__ u32 ordered_bits(float value) {
    const u32 bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of_bits(u32 bits) {  // the float32 that `ordered_bits` took
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// A float32 and its index as one number that orders by value, then by smaller index.
__device__ __forceinline__ u64 ordered(float value, u32 index) {
    return ((u64)ordered_bits(value) << 32) | (0xffffffffu - index);
}

__device__ __forceinline__ u32 index_of(u64 key) { return 0xffffffffu - (u32)key; }

__device__ __forceinline__ u64 warp_max(u64 key) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) key = max(key, __shfl_xor_sync(~0u, key, step));
    return key;
}

// Whether a lane's key is the warp's largest; keys differ but for 0, and where all are 0, all are the largest.
__device__ __forceinline__ bool is_warp_max(u64 key) {
    const u32 high = (u32)(key >> 32), low = (u32)key;
    const bool is_top = high == warp_max_bits(high);
    const u32 tops = __ballot_sync(~0u, is_top);
    if ((tops & (tops - 1)) == 0) return is_top;
    return is_top & (low == warp_max_bits(is_top ? low : 0));
}

__device__ __forceinline__ u64 block_max(u64 key, u64* parts) {  // every thread gets the result; 32 parts in shared memory
    key = warp_max(key);
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x / 32] = key;
    __syncthreads();
    key = parts[0];
    for (int i = 1; i < blockDim.x / 32; ++i) key = max(key, parts[i]);
    __syncthreads();
    return key;
}

__device__ __forceinline__ float value_of(u64 key) { return value_of_bits((u32)(key >> 32)); }
