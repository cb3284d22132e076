/* Sixteen float lanes, written once and implemented three times: AVX512, AVX2 with FMA, and compiler vectors.
 *
 * Every operation is elementwise or reduces in one fixed order, so that the three give the same bits wherever fused
 * multiply-add exists. Nothing above this file knows an instruction set, but for `dots.h` and the AMX tiles.
 */
#ifndef SIMD_H
#define SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(ONLY_PORTABLE) /* for comparing with the rest */
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define SIMD_AVX512 1
typedef __m512 vf;
typedef __m512i vi;
INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vf_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }
INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf vf_sqrt(vf a) { return _mm512_sqrt_ps(a); }
INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf vf_abs(vf a) { return _mm512_abs_ps(a); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vf_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf vf_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE void vi_store(void *p, vi v) { _mm512_storeu_si512(p, v); }
INLINE vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
INLINE vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
INLINE vi vi_shl(vi a, int n) { return _mm512_slli_epi32(a, n); }
INLINE vi vi_shr(vi a, int n) { return _mm512_srli_epi32(a, n); }
INLINE vf vf_bits(vi a) { return _mm512_castsi512_ps(a); }
INLINE vi vi_bits(vf a) { return _mm512_castps_si512(a); }
INLINE vf vf_from_int(vi a) { return _mm512_cvtepi32_ps(a); }
INLINE vi vi_from_float(vf a) { return _mm512_cvtps_epi32(a); }
INLINE void vi_store_bytes(int8_t *p, vi a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(a)); }
/* a where the lane's number is below n, else b. */
INLINE vf vf_first(int n, vf a, vf b) { return _mm512_mask_mov_ps(b, (__mmask16)((1u << n) - 1), a); }
INLINE int vf_any_above(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define SIMD_AVX2 1
typedef struct { __m256 a, b; } vf;
typedef struct { __m256i a, b; } vi;
#define PAIR(type, x, y) ((type){(x), (y)})
INLINE vf vf_load(const float *p) { return PAIR(vf, _mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
INLINE void vf_store(float *p, vf v) { _mm256_storeu_ps(p, v.a); _mm256_storeu_ps(p + 8, v.b); }
INLINE vf vf_set1(float x) { __m256 v = _mm256_set1_ps(x); return PAIR(vf, v, v); }
INLINE vf vf_zero(void) { return vf_set1(0.0f); }
INLINE vf vf_add(vf x, vf y) { return PAIR(vf, _mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
INLINE vf vf_sub(vf x, vf y) { return PAIR(vf, _mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
INLINE vf vf_mul(vf x, vf y) { return PAIR(vf, _mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
INLINE vf vf_div(vf x, vf y) { return PAIR(vf, _mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
INLINE vf vf_sqrt(vf x) { return PAIR(vf, _mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)); }
INLINE vf vf_max(vf x, vf y) { return PAIR(vf, _mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
INLINE vf vf_min(vf x, vf y) { return PAIR(vf, _mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)); }
INLINE vf vf_abs(vf x) {
    __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return PAIR(vf, _mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m));
}
INLINE vf vf_fma(vf x, vf y, vf z) {
    return PAIR(vf, _mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
#define ROUND8(x) _mm256_round_ps((x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
INLINE vf vf_round(vf x) { return PAIR(vf, ROUND8(x.a), ROUND8(x.b)); }
INLINE vf vf_half(const uint16_t *p) {
    return PAIR(vf, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8))));
}
INLINE vi vi_load(const void *p) {
    return PAIR(vi, _mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1));
}
INLINE void vi_store(void *p, vi v) {
    _mm256_storeu_si256((__m256i *)p, v.a);
    _mm256_storeu_si256((__m256i *)p + 1, v.b);
}
INLINE vi vi_set1(int32_t x) { __m256i v = _mm256_set1_epi32(x); return PAIR(vi, v, v); }
INLINE vi vi_add(vi x, vi y) { return PAIR(vi, _mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)); }
INLINE vi vi_and(vi x, vi y) { return PAIR(vi, _mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)); }
INLINE vi vi_or(vi x, vi y) { return PAIR(vi, _mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)); }
INLINE vi vi_shl(vi x, int n) { return PAIR(vi, _mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)); }
INLINE vi vi_shr(vi x, int n) { return PAIR(vi, _mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)); }
INLINE vf vf_bits(vi x) { return PAIR(vf, _mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)); }
INLINE vi vi_bits(vf x) { return PAIR(vi, _mm256_castps_si256(x.a), _mm256_castps_si256(x.b)); }
INLINE vf vf_from_int(vi x) { return PAIR(vf, _mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)); }
INLINE vi vi_from_float(vf x) { return PAIR(vi, _mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)); }
INLINE void vi_store_bytes(int8_t *p, vi x) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
INLINE vf vf_first(int n, vf x, vf y) {
    __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), limit = _mm256_set1_epi32(n);
    __m256i high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
    return PAIR(vf, _mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, low))),
                _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, high))));
}
INLINE int vf_any_above(vf x, vf y) {
    return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)));
}

#endif

#if !defined(SIMD_AVX512) && !defined(SIMD_AVX2)
#define SIMD_PORTABLE 1
typedef float vf __attribute__((vector_size(64), aligned(64)));
typedef int32_t vi __attribute__((vector_size(64), aligned(64)));
#define EACH_LANE for (int lane = 0; lane < LANES; lane++)
INLINE vf vf_load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf vf_set1(float x) { vf v; EACH_LANE v[lane] = x; return v; }
INLINE vf vf_zero(void) { return vf_set1(0.0f); }
INLINE vf vf_add(vf a, vf b) { return a + b; }
INLINE vf vf_sub(vf a, vf b) { return a - b; }
INLINE vf vf_mul(vf a, vf b) { return a * b; }
INLINE vf vf_div(vf a, vf b) { return a / b; }
INLINE vf vf_sqrt(vf a) { EACH_LANE a[lane] = sqrtf(a[lane]); return a; }
INLINE vf vf_max(vf a, vf b) { EACH_LANE a[lane] = a[lane] > b[lane] ? a[lane] : b[lane]; return a; }
INLINE vf vf_min(vf a, vf b) { EACH_LANE a[lane] = a[lane] < b[lane] ? a[lane] : b[lane]; return a; }
INLINE vi vi_bits(vf a) { vi v; memcpy(&v, &a, sizeof v); return v; }
INLINE vf vf_bits(vi a) { vf v; memcpy(&v, &a, sizeof v); return v; }
INLINE vi vi_set1(int32_t x) { vi v; EACH_LANE v[lane] = x; return v; }
INLINE vf vf_abs(vf a) { return vf_bits(vi_bits(a) & vi_set1(0x7fffffff)); }
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
INLINE vf vf_fma(vf a, vf b, vf c) { EACH_LANE c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]); return c; }
#else
INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
#endif
/* Round to nearest even by pushing the fraction out of the mantissa; right for |a| < 2^22. */
INLINE vf vf_round(vf a) { vf magic = vf_set1(12582912.0f); return (a + magic) - magic; }
INLINE float half_to_float(uint16_t h) {
    uint32_t exponent = (h >> 10) & 31, fraction = h & 1023, sign = (uint32_t)(h >> 15) << 31, bits;
    if (exponent == 0) {
        float tiny = (float)fraction * 5.9604644775390625e-8f; /* 2^-24 */
        return sign ? -tiny : tiny;
    }
    bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
INLINE vf vf_half(const uint16_t *p) { vf v; EACH_LANE v[lane] = half_to_float(p[lane]); return v; }
INLINE vi vi_load(const void *p) { vi v; memcpy(&v, p, sizeof v); return v; }
INLINE void vi_store(void *p, vi v) { memcpy(p, &v, sizeof v); }
INLINE vi vi_add(vi a, vi b) { return a + b; }
INLINE vi vi_and(vi a, vi b) { return a & b; }
INLINE vi vi_or(vi a, vi b) { return a | b; }
INLINE vi vi_shl(vi a, int n) { EACH_LANE a[lane] = (int32_t)((uint32_t)a[lane] << n); return a; }
INLINE vi vi_shr(vi a, int n) { EACH_LANE a[lane] = (int32_t)((uint32_t)a[lane] >> n); return a; }
INLINE vf vf_from_int(vi a) { vf v; EACH_LANE v[lane] = (float)a[lane]; return v; }
INLINE int32_t lane_to_int(float x) { /* what x86 does with numbers that do not fit */
    return x > -2147483648.0f && x < 2147483648.0f ? (int32_t)x : INT32_MIN;
}
INLINE vi vi_from_float(vf a) { vi v; a = vf_round(a); EACH_LANE v[lane] = lane_to_int(a[lane]); return v; }
INLINE void vi_store_bytes(int8_t *p, vi a) {
    EACH_LANE p[lane] = (int8_t)(a[lane] > 127 ? 127 : a[lane] < -128 ? -128 : a[lane]);
}
INLINE vf vf_first(int n, vf a, vf b) { EACH_LANE b[lane] = lane < n ? a[lane] : b[lane]; return b; }
INLINE int vf_any_above(vf a, vf b) { int any = 0; EACH_LANE any |= a[lane] > b[lane]; return any; }
#endif

/* The sum of all lanes, halves folded onto each other: the same order everywhere. */
#if defined(SIMD_PORTABLE)
INLINE float vf_sum(vf v) {
    float x[LANES];
    vf_store(x, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++) x[lane] += x[lane + width];
    return x[0];
}
#else
INLINE float sum_8(__m256 v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
#if defined(SIMD_AVX512)
INLINE float vf_sum(vf v) { return sum_8(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1))); }
#else
INLINE float vf_sum(vf v) { return sum_8(_mm256_add_ps(v.a, v.b)); }
#endif
#endif

/* The largest lane, and the sum of whole numbers: any order gives the same. */
#if defined(SIMD_AVX512)
INLINE float vf_largest(vf v) { return _mm512_reduce_max_ps(v); }
INLINE int32_t vi_sum(vi v) { return _mm512_reduce_add_epi32(v); }
#else
INLINE float vf_largest(vf v) {
    float x[LANES];
    vf_store(x, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++) x[lane] = x[lane] > x[lane + width] ? x[lane] : x[lane + width];
    return x[0];
}
INLINE int32_t vi_sum(vi v) {
    int32_t x[LANES], sum = 0;
    vi_store(x, v);
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}
#endif

/* e^x, relative error below 2^-21; x is clamped to -87..88, so the result is never 0, denormal or infinite. */
INLINE vf vf_exp(vf x) {
    vf clamped = vf_min(vf_max(x, vf_set1(-87.0f)), vf_set1(88.0f));
    vf n = vf_round(vf_mul(clamped, vf_set1(1.44269504f)));
    vf r = vf_fma(n, vf_set1(-0.693359375f), clamped); /* ln 2 in two parts, the first of few bits */
    r = vf_fma(n, vf_set1(2.12194440e-4f), r);
    vf y = vf_set1(1.9875691500e-4f);
    y = vf_fma(y, r, vf_set1(1.3981999507e-3f));
    y = vf_fma(y, r, vf_set1(8.3334519073e-3f));
    y = vf_fma(y, r, vf_set1(4.1665795894e-2f));
    y = vf_fma(y, r, vf_set1(1.6666665459e-1f));
    y = vf_fma(y, r, vf_set1(5.0000001201e-1f));
    y = vf_add(vf_fma(vf_mul(r, r), y, r), vf_set1(1.0f));
    vi scale = vi_shl(vi_add(vi_from_float(n), vi_set1(127)), 23);
    return vf_mul(y, vf_bits(scale));
}

/* x times its logistic function. */
INLINE vf vf_silu(vf x) { return vf_div(x, vf_add(vf_set1(1.0f), vf_exp(vf_sub(vf_zero(), x)))); }

/* Round to bfloat16 (nearest even) and keep as float; the input is finite. */
INLINE vf vf_to_bf16(vf x) {
    vi bits = vi_bits(x);
    vi odd = vi_and(vi_shr(bits, 16), vi_set1(1));
    return vf_bits(vi_and(vi_add(vi_add(bits, odd), vi_set1(0x7fff)), vi_set1((int32_t)0xffff0000)));
}
/* A lane of two bfloat16: the first one, and the second one, as floats. */
INLINE vf vf_even(vi pairs) { return vf_bits(vi_shl(pairs, 16)); }
INLINE vf vf_odd(vi pairs) { return vf_bits(vi_and(pairs, vi_set1((int32_t)0xffff0000))); }

#endif
