// One order of summation for x / rms(x) * weight, wherever it is computed, so that a row has the same bits everywhere:
// pieces of 8 values go round-robin to 256 places; a place adds the squares of its pieces in order; places 32 apart are
// added in order, which leaves 32 sums; those are added as a tree of a warp's lanes.

#define NORM_PLACES 256

__device__ __forceinline__ float add_squares(float sum, uint4 piece) {
    const u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        float low = to_float((u16)words[j]), high = to_float((u16)(words[j] >> 16));
        sum = fmaf(low, low, sum);
        sum = fmaf(high, high, sum);
    }
    return sum;
}

// What every value of a row is multiplied by, from each lane's sum of places; all lanes get it.
__device__ __forceinline__ float norm_scale(float sum, int width, float eps) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return rsqrtf(sum / width + eps);
}

__device__ __forceinline__ uint4 normalized(uint4 piece, uint4 weight, float scale) {
    const u32 words[4] = {piece.x, piece.y, piece.z, piece.w}, by[4] = {weight.x, weight.y, weight.z, weight.w};
    u32 result[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
        result[j] = pack2(to_float((u16)words[j]) * scale * to_float((u16)by[j]),
                          to_float((u16)(words[j] >> 16)) * scale * to_float((u16)(by[j] >> 16)));
    return make_uint4(result[0], result[1], result[2], result[3]);
}
