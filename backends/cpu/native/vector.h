/* Eight floats at a time, in the vector extension that gcc and clang share. */
#ifndef SAGELLM_VECTOR_H
#define SAGELLM_VECTOR_H

#include <stdint.h>
#include <string.h>

#ifdef __FMA__
#include <immintrin.h>
#endif

#define LANES 8
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(32)));
typedef int32_t ivec __attribute__((vector_size(32)));
typedef uint16_t half_vec __attribute__((vector_size(16)));

/* a * b + c. Compiled with -ffp-contract=off, so that no compiler fuses elsewhere at will: the bits
 * of a result must not depend on which copy of a loop computed it. */
INLINE vec fused(vec a, vec b, vec c) {
#ifdef __FMA__
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

INLINE float fused_one(float a, float b, float c) {
#ifdef __FMA__
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
    half_vec half;
    memcpy(&half, from, sizeof half);
    return (vec)(__builtin_convertvector(half, ivec) << 16);
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

/* Rounds to nearest even, as torch does. */
INLINE void store_one(void *to, long index, float value, int bfloat) {
    if (!bfloat) {
        ((float *)to)[index] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits += 0x7fff + ((bits >> 16) & 1);
    ((uint16_t *)to)[index] = (uint16_t)(bits >> 16);
}

/* One order of addition, always. */
INLINE float lanes_sum(vec value) {
    float a = (value[0] + value[4]) + (value[2] + value[6]);
    float b = (value[1] + value[5]) + (value[3] + value[7]);
    return a + b;
}

INLINE vec fill(float value) { return (vec){0} + value; }

INLINE vec choose(ivec mask, vec yes, vec no) {
    return (vec)((mask & (ivec)yes) | (~mask & (ivec)no));
}

/* exp, clamped above 88, 0 below -87; relative error under 2e-7 (Cephes expf). */
INLINE vec lanes_exp(vec x) {
    const vec low = fill(-87.0f), high = fill(88.0f);
    vec z = choose(x < low, low, choose(x > high, high, x));
    vec n = (z * 1.44269504f + 12582912.0f) - 12582912.0f; /* rounds to a whole number */
    vec r = fused(n, fill(2.12194440e-4f), fused(n, fill(-0.693359375f), z));
    vec p = fill(1.9875691500e-4f);
    p = fused(p, r, fill(1.3981999507e-3f));
    p = fused(p, r, fill(8.3334519073e-3f));
    p = fused(p, r, fill(4.1665795894e-2f));
    p = fused(p, r, fill(1.6666665459e-1f));
    p = fused(p, r, fill(5.0000001201e-1f));
    p = fused(p, r * r, r) + 1.0f;
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return choose(x < low, (vec){0}, p * (vec)power);
}

#endif
