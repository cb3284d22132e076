// Rotary positions, in one place: a key must have the same bits whichever kernel rotates it, so that the fused
// multiply-adds are spelled out rather than left to the compiler.

// (cos, sin) of eight head dims from `dim` on (dim < head_dim / 2) at a position's row of the table.
struct Turns {
    float4 v[4];
};

__device__ __forceinline__ Turns load_turns(const float2* row, int dim) {
    Turns turns;
#pragma unroll
    for (int i = 0; i < 4; ++i) turns.v[i] = ((const float4*)(row + dim))[i];
    return turns;
}

__device__ __forceinline__ void rotate_pair(float& low, float& high, float cosine, float sine) {
    float turned = fmaf(-high, sine, low * cosine);
    high = fmaf(low, sine, high * cosine);
    low = turned;
}

// Eight dims of the lower half of a head and the eight that belong to them in the upper half.
__device__ __forceinline__ void rotate8(uint4& low, uint4& high, const Turns& turns) {
    u32 lows[4] = {low.x, low.y, low.z, low.w}, highs[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float l0 = to_float((u16)lows[i]), l1 = to_float((u16)(lows[i] >> 16));
        float h0 = to_float((u16)highs[i]), h1 = to_float((u16)(highs[i] >> 16));
        rotate_pair(l0, h0, turns.v[i].x, turns.v[i].y);
        rotate_pair(l1, h1, turns.v[i].z, turns.v[i].w);
        lows[i] = pack2(l0, l1);
        highs[i] = pack2(h0, h1);
    }
    low = make_uint4(lows[0], lows[1], lows[2], lows[3]);
    high = make_uint4(highs[0], highs[1], highs[2], highs[3]);
}
