/* Vectors of LANES floats, in the extension that gcc and clang share; vectors of WIDE floats for
 * matrix products. */
#ifndef SAGELLM_VECTOR_H
#define SAGELLM_VECTOR_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX__
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* The floats of a register of AVX, or of 16 bytes, which every other CPU has. gcc keeps a vector
 * that is longer than a register in memory. */
#ifdef __AVX__
#define LANES 8
#else
#define LANES 4
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_vec __attribute__((vector_size(2 * LANES)));

/* a * b + c. With -ffp-contract=off, compilers fuse nothing by themselves: the bits of a result
 * must not depend on which copy of a loop computed it. */
INLINE vec fused(vec a, vec b, vec c) {
#ifdef __FMA__
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* The floats that a register of this CPU holds. Panels of 16 fit tiles. */
#ifndef WIDE
#if defined(__AVX512F__) || defined(SAGE_TILE_MODEL)
#define WIDE 16
#else
#define WIDE LANES
#endif
#endif

typedef float wide __attribute__((vector_size(4 * WIDE)));
typedef int32_t wide_bits __attribute__((vector_size(4 * WIDE)));

INLINE wide fused_wide(wide a, wide b, wide c) {
#if WIDE == LANES
    return (wide)fused((vec)a, (vec)b, (vec)c);
#elif defined(__AVX512F__) && WIDE == 16
    return (wide)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    vec parts[3][WIDE / LANES];
    memcpy(parts[0], &a, sizeof a), memcpy(parts[1], &b, sizeof b), memcpy(parts[2], &c, sizeof c);
    for (int i = 0; i < WIDE / LANES; i++)
        parts[2][i] = fused(parts[0][i], parts[1][i], parts[2][i]);
    memcpy(&c, parts[2], sizeof c);
    return c;
#endif
}

INLINE wide load_wide(const float *from) {
    wide value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE wide fill_wide(float value) { return value - (wide){0}; } /* -0.0 + 0 would be 0.0 */

INLINE float fused_one(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

INLINE vec load_float(const float *from) {
    vec value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store_float(float *to, vec value) { memcpy(to, &value, sizeof value); }

/* bfloat16 is the upper half of a float. */
INLINE vec load_bfloat(const uint16_t *from) {
#ifdef __AVX2__ /* compilers would make two conversions of the code below */
    __m128i half = _mm_loadu_si128((const __m128i *)from);
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#elif defined(__aarch64__)
    return (vec)vshll_n_u16(vld1_u16(from), 16);
#else
    half_vec half;
    memcpy(&half, from, sizeof half);
    return (vec)(__builtin_convertvector(half, ivec) << 16);
#endif
}

INLINE vec load(const void *from, long index, int bfloat) {
    return bfloat ? load_bfloat((const uint16_t *)from + index)
                  : load_float((const float *)from + index);
}

INLINE float load_one(const void *from, long index, int bfloat) {
    if (!bfloat) return ((const float *)from)[index];
    uint32_t wide = (uint32_t)((const uint16_t *)from)[index] << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* Round to bfloat16, to nearest even. NaN stays NaN. */
INLINE uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t half = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0 : half);
}

/* Store a number as float or bfloat16, rounded as torch does. */
INLINE void store_one(void *to, long index, float value, int bfloat) {
    if (bfloat)
        ((uint16_t *)to)[index] = rounded(value);
    else
        ((float *)to)[index] = value;
}

/* The sum of all lanes, always added in the same order. */
INLINE float lanes_sum(vec value) {
    float four[4];
    for (int i = 0; i < 4; i++) four[i] = LANES > 4 ? value[i] + value[(i + 4) % LANES] : value[i];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

INLINE float lanes_max(vec value) {
    float most[LANES];
    memcpy(most, &value, sizeof value);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) most[i] = most[i] > most[i + half] ? most[i] : most[i + half];
    return most[0];
}

INLINE vec fill(float value) { return value - (vec){0}; } /* see fill_wide */

INLINE vec choose(ivec mask, vec yes, vec no) {
    return (vec)((mask & (ivec)yes) | (~mask & (ivec)no));
}

INLINE wide choose_wide(wide_bits mask, wide yes, wide no) {
    return (wide)((mask & (wide_bits)yes) | (~mask & (wide_bits)no));
}

/* exp (Cephes expf, relative error under 2e-7; 0 below -87, exp(88) above 88), and silu. The bits
 * do not depend on the number of lanes. */
#define EXP_AND_SILU(exp_name, silu_name, reals, wholes, fuse, pick)                      \
    INLINE reals exp_name(reals x) {                                                      \
        const reals zero = {0}, low = zero - 87.0f, high = zero + 88.0f;                  \
        reals z = pick(x < low, low, pick(x > high, high, x));                            \
        reals n = (z * 1.44269504f + 12582912.0f) - 12582912.0f; /* to a whole number */  \
        reals r = fuse(n, zero + 2.12194440e-4f, fuse(n, zero - 0.693359375f, z));        \
        reals p = zero + 1.9875691500e-4f;                                                \
        p = fuse(p, r, zero + 1.3981999507e-3f);                                          \
        p = fuse(p, r, zero + 8.3334519073e-3f);                                          \
        p = fuse(p, r, zero + 4.1665795894e-2f);                                          \
        p = fuse(p, r, zero + 1.6666665459e-1f);                                          \
        p = fuse(p, r, zero + 5.0000001201e-1f);                                          \
        p = fuse(p, r * r, r) + 1.0f;                                                     \
        wholes power = (__builtin_convertvector(n, wholes) + 127) << 23;                  \
        return pick(x < low, zero, p * (reals)power);                                     \
    }                                                                                     \
    INLINE reals silu_name(reals gate) { return gate / (exp_name(-gate) + 1.0f); }
EXP_AND_SILU(lanes_exp, silu, vec, ivec, fused, choose)
EXP_AND_SILU(wide_exp, wide_silu, wide, wide_bits, fused_wide, choose_wide)
#undef EXP_AND_SILU

#endif
