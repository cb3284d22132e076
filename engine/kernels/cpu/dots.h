/* Exact integer dot products of one weight block with one activation block.
 *
 * A weight block is 16 outputs x 32 inputs; its codes lie as eight groups, group g holding inputs 4g..4g+3 of all 16
 * outputs (four bytes a lane). Activations are 32 int8 in input order. Sums are exact, so every instruction set and
 * every number of rows gives the same integers.
 */
#ifndef DOTS_H
#define DOTS_H

#include "simd.h"

#define BLOCK 32
#define GROUPS 8

#if defined(SIMD_AVX512) && defined(__AVX512VNNI__)
#define PATH_NAME "AVX512 VNNI"
#define KERNEL_ROWS 16
typedef struct { __m512i group[GROUPS]; } Codes;

/* The high half of every byte: one instruction where there is a bit matrix product, two otherwise. */
INLINE __m512i high_nibbles(__m512i bytes) {
#if defined(__GFNI__)
    return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(0x1020408000000000), 0);
#else
    return _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
#endif
}
INLINE void codes_q4(const uint8_t *packed, Codes *codes) {
    for (int g = 0; g < 4; g++) {
        __m512i both = _mm512_loadu_si512(packed + 64 * g);
        codes->group[g] = _mm512_and_si512(both, _mm512_set1_epi8(15));
        codes->group[g + 4] = high_nibbles(both);
    }
}
INLINE void codes_q8(const uint8_t *packed, Codes *codes) {
    for (int g = 0; g < GROUPS; g++) codes->group[g] = _mm512_loadu_si512(packed + 64 * g);
}
INLINE __m512i add_group(const Codes *codes, int g, const int8_t *x, __m512i sum) {
    int32_t four;
    memcpy(&four, x + 4 * g, 4);
    return _mm512_dpbusd_epi32(sum, codes->group[g], _mm512_set1_epi32(four));
}

/* Up to four rows side by side: a sum is a chain of products that wait for each other, and one row's chain leaves the
 * units idle. Few rows get two chains each. */
INLINE void dots_side_by_side(const Codes *codes, const int8_t *x, const int rows, vi *dots) {
    const int is_split = rows < 4, chain = is_split ? GROUPS / 2 : GROUPS;
    __m512i other[4];
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) other[row] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int g = 0; g < chain; g++)
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) {
            dots[row] = add_group(codes, g, x + row * BLOCK, dots[row]);
            if (is_split) other[row] = add_group(codes, g + chain, x + row * BLOCK, other[row]);
        }
#pragma GCC unroll 4
    for (int row = 0; row < rows && is_split; row++) dots[row] = _mm512_add_epi32(dots[row], other[row]);
}
INLINE void dots_of_rows(const Codes *codes, const int8_t *x, const int rows, vi *dots) {
#pragma GCC unroll 4
    for (int row = 0; row < rows; row += 4)
        dots_side_by_side(codes, x + row * BLOCK, rows - row < 4 ? rows - row : 4, dots + row);
}
INLINE void dots_q4(const Codes *codes, const int8_t *x, const int rows, vi *dots) {
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++) dots[row] = _mm512_setzero_si512();
    dots_of_rows(codes, x, rows, dots);
}
/* Stored codes are offset by 128; a row's correction is -128 times the sum of its x. */
INLINE void dots_q8(const Codes *codes, const int8_t *x, const int32_t *correction, const int rows, vi *dots) {
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++) dots[row] = _mm512_set1_epi32(correction[row]);
    dots_of_rows(codes, x, rows, dots);
}

#elif defined(SIMD_AVX2) || defined(SIMD_AVX512)
#define KERNEL_ROWS 4
typedef struct { __m256i group[GROUPS][2]; } Codes;

INLINE void codes_q4(const uint8_t *packed, Codes *codes) {
    const __m256i low = _mm256_set1_epi8(15);
    for (int g = 0; g < 4; g++)
        for (int half = 0; half < 2; half++) {
            __m256i both = _mm256_loadu_si256((const __m256i *)(packed + 64 * g + 32 * half));
            codes->group[g][half] = _mm256_and_si256(both, low);
            codes->group[g + 4][half] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        }
}
INLINE __m256i four_bytes(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}
INLINE vi halves(__m256i a, __m256i b) {
#if defined(SIMD_AVX512)
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
#else
    return PAIR(vi, a, b);
#endif
}

#if defined(__AVXVNNI__)
#define PATH_NAME "AVX2 with VNNI"
INLINE void codes_q8(const uint8_t *packed, Codes *codes) {
    for (int g = 0; g < GROUPS; g++)
        for (int half = 0; half < 2; half++)
            codes->group[g][half] = _mm256_loadu_si256((const __m256i *)(packed + 64 * g + 32 * half));
}
INLINE vi dot_groups(const Codes *codes, const int8_t *x, __m256i start) {
    __m256i a = start, b = start;
    for (int g = 0; g < GROUPS; g++) {
        __m256i four = four_bytes(x + 4 * g);
        a = _mm256_dpbusd_avx_epi32(a, codes->group[g][0], four);
        b = _mm256_dpbusd_avx_epi32(b, codes->group[g][1], four);
    }
    return halves(a, b);
}
INLINE vi dot_q4(const Codes *codes, const int8_t *x) { return dot_groups(codes, x, _mm256_setzero_si256()); }
INLINE vi dot_q8(const Codes *codes, const int8_t *x, int32_t correction) {
    return dot_groups(codes, x, _mm256_set1_epi32(correction));
}
#else
#if defined(SIMD_AVX512)
#define PATH_NAME "AVX512 without VNNI"
#else
#define PATH_NAME "AVX2"
#endif
INLINE void codes_q8(const uint8_t *packed, Codes *codes) {
    const __m256i offset = _mm256_set1_epi8(-128);
    for (int g = 0; g < GROUPS; g++)
        for (int half = 0; half < 2; half++) {
            __m256i stored = _mm256_loadu_si256((const __m256i *)(packed + 64 * g + 32 * half));
            codes->group[g][half] = _mm256_xor_si256(stored, offset);
        }
}
/* 16-bit sums cannot overflow: 8 groups x 2 products of at most 15 x 127. */
INLINE vi dot_q4(const Codes *codes, const int8_t *x) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i a = _mm256_setzero_si256(), b = a;
    for (int g = 0; g < GROUPS; g++) {
        __m256i four = four_bytes(x + 4 * g);
        a = _mm256_add_epi16(a, _mm256_maddubs_epi16(codes->group[g][0], four));
        b = _mm256_add_epi16(b, _mm256_maddubs_epi16(codes->group[g][1], four));
    }
    return halves(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones));
}
/* |w| times x with w's sign: two products of at most 128 x 127 fit 16 bits. */
INLINE vi dot_q8(const Codes *codes, const int8_t *x, int32_t correction) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    (void)correction;
    for (int g = 0; g < GROUPS; g++) {
        __m256i four = four_bytes(x + 4 * g);
        for (int half = 0; half < 2; half++) {
            __m256i w = codes->group[g][half];
            __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(four, w));
            sum[half] = _mm256_add_epi32(sum[half], _mm256_madd_epi16(products, ones));
        }
    }
    return halves(sum[0], sum[1]);
}
#endif

#else
#define PATH_NAME "portable C"
#define KERNEL_ROWS 4
typedef struct { int16_t group[GROUPS][LANES * 4]; } Codes;

INLINE void codes_q4(const uint8_t *packed, Codes *codes) {
    for (int g = 0; g < 4; g++)
        for (int i = 0; i < LANES * 4; i++) {
            codes->group[g][i] = packed[64 * g + i] & 15;
            codes->group[g + 4][i] = packed[64 * g + i] >> 4;
        }
}
INLINE void codes_q8(const uint8_t *packed, Codes *codes) {
    for (int g = 0; g < GROUPS; g++)
        for (int i = 0; i < LANES * 4; i++) codes->group[g][i] = (int16_t)(packed[64 * g + i] - 128);
}
INLINE vi dot_groups(const Codes *codes, const int8_t *x) {
    int32_t sum[LANES] = {0};
    for (int g = 0; g < GROUPS; g++)
        for (int lane = 0; lane < LANES; lane++) {
            const int16_t *w = codes->group[g] + 4 * lane;
            sum[lane] += w[0] * x[4 * g] + w[1] * x[4 * g + 1] + w[2] * x[4 * g + 2] + w[3] * x[4 * g + 3];
        }
    return vi_load(sum);
}
INLINE vi dot_q4(const Codes *codes, const int8_t *x) { return dot_groups(codes, x); }
INLINE vi dot_q8(const Codes *codes, const int8_t *x, int32_t correction) {
    (void)correction;
    return dot_groups(codes, x);
}
#endif

#if !defined(SIMD_AVX512) || !defined(__AVX512VNNI__)
INLINE void dots_q4(const Codes *codes, const int8_t *x, const int rows, vi *dots) {
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) dots[row] = dot_q4(codes, x + row * BLOCK);
}
INLINE void dots_q8(const Codes *codes, const int8_t *x, const int32_t *correction, const int rows, vi *dots) {
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) dots[row] = dot_q8(codes, x + row * BLOCK, correction[row]);
}
#endif

#endif
