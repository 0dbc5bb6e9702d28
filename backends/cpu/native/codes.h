/* Keys and values in 8 bits. A row of the pool holds head_dim codes, from -127 to 127, and then its
 * scale, a bfloat16. A number is its code times the scale. The product of the scale and a softmax
 * weight of 1 is a bfloat16 too, so that kernels that round weights lose nothing there. */
#ifndef SAGELLM_CODES_H
#define SAGELLM_CODES_H

#include <math.h>

#include "vector.h"

/* The dtypes of a pool. The first two are also values of the parameter `bfloat`. */
enum { KV_FLOAT, KV_BFLOAT, KV_INT8 };

/* The bytes of a key or a value in the pool. */
INLINE long kv_row_bytes(long head_dim, int dtype) {
    return dtype == KV_INT8 ? head_dim + 2
                            : head_dim * (dtype == KV_BFLOAT ? 2 : 4);
}

INLINE float scale_of(const char *row, long head_dim) { return load_one(row + head_dim, 0, 1); }

/* LANES codes as floats. */
INLINE vec load_codes(const int8_t *from) {
#ifdef __AVX2__
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    vec value;
    for (int l = 0; l < LANES; l++) value[l] = from[l];
    return value;
#endif
}

/* Quantise a row, to nearest even. If a number is not finite, the scale is NaN, so that every
 * result that the row enters is NaN. */
INLINE void write_codes(const float *row, char *out, long size) {
    const vec zero = {0};
    vec most = zero, invalid = zero;
    long i = 0;
    for (; i + LANES <= size; i += LANES) {
        vec value = load_float(row + i), magnitude = choose(value < zero, -value, value);
        most = choose(magnitude > most, magnitude, most);
        invalid += value * 0.0f;
    }
    float largest = lanes_max(most), none = lanes_sum(invalid); /* none: 0 or NaN */
    for (; i < size; i++) {
        float magnitude = row[i] < 0 ? -row[i] : row[i];
        if (magnitude > largest) largest = magnitude;
        none += row[i] * 0.0f;
    }
    memset(out, 0, (size_t)size);
    /* Smaller numbers, for which the inverse would overflow, become 0. */
    store_one(out + size, 0, none == 0 && largest > 1e-30f ? largest / 127.0f : none, 1);
    float inverse = 1.0f / scale_of(out, size);
    for (i = 0; i < size && inverse < INFINITY; i++) {
        float code = (row[i] * inverse + 12582912.0f) - 12582912.0f; /* to a whole number */
        out[i] = (char)(int)code;
    }
}

#endif
