// What a draft head sees of the tokens drafted before its guess: their embeddings, scaled to unit RMS.

#define NEAR 16  // columns of ancestor_at, as in tree_attention.cuh
#define SEEN_EPS 1e-6f
enum { RECORD_BONUS = 3 };  // of the step's record, as in fused_ops.cuh

// The token of a node; the root's is the record's bonus token.
__device__ __forceinline__ int seen_token(const int* drafted, const int* record, int node) {
    return node == 0 ? record[RECORD_BONUS] : drafted[node];
}

__device__ __forceinline__ uint4 scaled(uint4 piece, float scale) {
    const u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
    u32 result[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
        result[j] = pack2(to_float((u16)words[j]) * scale, to_float((u16)(words[j] >> 16)) * scale);
    return make_uint4(result[0], result[1], result[2], result[3]);
}
