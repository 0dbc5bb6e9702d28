/* Vectors of integers, for the kernels of quantised weights.
 *
 * `ints` holds INTS numbers of 32 bits, one for each column of a weight. All integer sums are
 * exact, so that every machine computes the same. */
#ifndef SAGELLM_QUANT_H
#define SAGELLM_QUANT_H

#include "linear.h"
#include "vector.h"

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define INTS 16
typedef __m512i ints;
typedef float floats __attribute__((vector_size(64)));
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define INTS 8
typedef __m256i ints;
typedef vec floats;
#else
#define INTS LANES
typedef ivec ints;
typedef vec floats;
typedef int16_t halves __attribute__((vector_size(4 * LANES)));
#endif

/* Compilers keep an array in registers only if all its indices are constants, hence UNROLL. */
#define UNROLL _Pragma("GCC unroll 16")
#define ROLLED _Pragma("GCC unroll 1")
#define BLOCK 32                    /* codes along k whose products are summed as integers */
#define COLS 16                     /* columns of a panel */
#define VECS (INTS == 4 ? 4 : 2)    /* vectors of columns that a tile holds */
#define PANELS (VECS * INTS / COLS) /* panels that these vectors cover: 1 or 2 */

typedef struct {
    Linear linear;
    const int32_t *order; /* the k of each column of codes; NULL: ascending */
    const int8_t *levels; /* the values of the 16 codes of 4 bits; NULL: code - zero */
} Quant;

INLINE ints load_ints(const void *from) {
    ints value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE floats load_floats(const float *from) {
    floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store_floats(float *to, floats value) { memcpy(to, &value, sizeof value); }

/* Repeat four bytes, or two 16-bit numbers, for every column. */
INLINE ints splat(const void *from) {
    int32_t value;
    memcpy(&value, from, sizeof value);
#if INTS == 16
    return _mm512_set1_epi32(value);
#elif defined(__AVX2__)
    return _mm256_set1_epi32(value);
#else
    return (ints){0} + value;
#endif
}

#if INTS == 16
#define OP2(name, wide, narrow) \
    INLINE ints name(ints a, ints b) { return wide(a, b); }
#elif defined(__AVX2__)
#define OP2(name, wide, narrow) \
    INLINE ints name(ints a, ints b) { return narrow(a, b); }
#endif

#ifdef OP2
OP2(add32, _mm512_add_epi32, _mm256_add_epi32)
OP2(less32, _mm512_sub_epi32, _mm256_sub_epi32)
OP2(times32, _mm512_mullo_epi32, _mm256_mullo_epi32)
OP2(both, _mm512_and_si512, _mm256_and_si256)
OP2(either, _mm512_xor_si512, _mm256_xor_si256)
#if INTS == 16
#define RIGHT16(a, n) _mm512_srli_epi16(a, n)
#define NONE _mm512_setzero_si512()
#else
#define RIGHT16(a, n) _mm256_srli_epi16(a, n)
#define NONE _mm256_setzero_si256()
#endif
#else
INLINE ints add32(ints a, ints b) { return a + b; }
INLINE ints less32(ints a, ints b) { return a - b; }
INLINE ints times32(ints a, ints b) { return a * b; }
INLINE ints both(ints a, ints b) { return a & b; }
#define RIGHT16(a, n) ((ints)(((halves)(a) >> (n)) & (halves)((halves){0} + (0xffff >> (n)))))
#define NONE ((ints){0})
#endif

INLINE floats to_floats(ints value) {
#if INTS == 16
    return (floats)_mm512_cvtepi32_ps(value);
#elif defined(__AVX2__)
    return (floats)_mm256_cvtepi32_ps(value);
#else
    return __builtin_convertvector(value, floats);
#endif
}

INLINE floats add_product(floats a, floats b, floats c) {
#if INTS == 16
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return fused(a, b, c);
#endif
}

INLINE float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = (uint32_t)(half & 0x7fff) << 13;
    uint32_t huge = rest >= 0x0f800000 ? 0x70000000 : 0, bits;
    float value;
    memcpy(&value, &rest, sizeof value);
    value *= 0x1p112f; /* corrects the bias of the exponent, and numbers below the least normal one */
    memcpy(&bits, &value, sizeof bits);
    bits |= sign | huge;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE floats load_halves(const uint16_t *from) {
#if INTS == 16
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__AVX2__)
    return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#elif defined(__aarch64__)
    return (floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#else
    floats value = {0};
    for (int i = 0; i < INTS; i++) value[i] = half_to_float(from[i]);
    return value;
#endif
}

#endif
