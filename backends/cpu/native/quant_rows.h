/* Quantises activations to 8 or 16 bits, with a scale for each block of 32. */
#ifndef SAGELLM_QUANT_ROWS_H
#define SAGELLM_QUANT_ROWS_H

#include "quant.h"
#if INTS == 16
#include "quant_vnni.h"
#elif defined(__aarch64__)
#include "quant_dot.h"
#else
#include "quant_pairs.h"
#endif

#define LARGEST 32639.0f /* 127 x 256 + 127: the largest code that splits into two signed bytes */

/* Store 32 codes as bytes, or as 16-bit numbers. ARM stores 16 bits as quant_dot.h reads them: 32
 * upper bytes, then 32 lower bytes. Elsewhere, of each four 16-bit numbers a b c d, the even ones
 * come first (a c b d), because block_sums multiplies even and odd bytes of weights separately. */
INLINE void store_block(void *codes, const ivec whole[BLOCK / LANES], int bits) {
#ifdef __AVX2__
    __m256i w[4];
    memcpy(w, whole, sizeof w);
    if (bits == 16)
        for (int i = 0; i < 4; i++) w[i] = _mm256_shuffle_epi32(w[i], _MM_SHUFFLE(3, 1, 2, 0));
    __m256i left = _mm256_packs_epi32(w[0], w[1]), right = _mm256_packs_epi32(w[2], w[3]);
    if (bits == 8) {
        const __m256i turned = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        left = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(left, right), turned);
        memcpy(codes, &left, sizeof left);
    } else {
        left = _mm256_permute4x64_epi64(left, _MM_SHUFFLE(3, 1, 2, 0));
        right = _mm256_permute4x64_epi64(right, _MM_SHUFFLE(3, 1, 2, 0));
        memcpy(codes, &left, sizeof left);
        memcpy((char *)codes + sizeof left, &right, sizeof right);
    }
#elif defined(__aarch64__)
    for (int i = 0; i < BLOCK / 8; i++) {
        int16x8_t eight = vcombine_s16(vmovn_s32((int32x4_t)whole[2 * i]),
                                       vmovn_s32((int32x4_t)whole[2 * i + 1]));
        int8_t *to = (int8_t *)codes + 8 * i;
        if (bits == 16) vst1_s8(to, vrshrn_n_s16(eight, 8));
        vst1_s8(to + (bits == 16 ? BLOCK : 0), vmovn_s16(eight));
    }
#else
    static const int places[] = {0, 2, 1, 3};
    for (int i = 0; i < BLOCK; i++) {
        int from = bits == 8 ? i : i / 4 * 4 + places[i % 4];
        int32_t code = whole[from / LANES][from % LANES];
        if (bits == 8)
            ((int8_t *)codes)[i] = (int8_t)code;
        else
            ((int16_t *)codes)[i] = (int16_t)code;
    }
#endif
}

INLINE ivec larger(ivec a, ivec b) {
#ifdef __AVX2__
    return (ivec)_mm256_max_epi32((__m256i)a, (__m256i)b);
#elif defined(__aarch64__)
    return (ivec)vmaxq_s32((int32x4_t)a, (int32x4_t)b);
#else
    return (ivec)choose(a > b, (vec)a, (vec)b);
#endif
}

/* The largest absolute value of 32 numbers; NaN if there is one, which a maximum of floats would
 * lose: without signs, floats have the order of their bits, and NaN is above infinity. */
INLINE float largest(const float *x) {
    ivec most = {0};
    for (int i = 0; i < BLOCK; i += LANES)
        most = larger((ivec)load_float(x + i) & 0x7fffffff, most);
#ifdef __AVX2__
    most = larger(most, (ivec)_mm256_permute2x128_si256((__m256i)most, (__m256i)most, 1));
    most = larger(most, (ivec)_mm256_shuffle_epi32((__m256i)most, _MM_SHUFFLE(1, 0, 3, 2)));
    most = larger(most, (ivec)_mm256_shuffle_epi32((__m256i)most, _MM_SHUFFLE(2, 3, 0, 1)));
    return ((vec)most)[0];
#elif defined(__aarch64__)
    return vgetq_lane_f32(vreinterpretq_f32_s32(vdupq_n_s32(vmaxvq_s32((int32x4_t)most))), 0);
#else
    for (int i = 1; i < LANES; i++) most[0] = most[i] > most[0] ? most[i] : most[0];
    return ((vec)most)[0];
#endif
}

INLINE int32_t whole_sum(ivec value) {
#ifdef __AVX2__
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128((__m256i)value),
                                 _mm256_extracti128_si256((__m256i)value, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(1, 0, 3, 2)));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(half);
#elif defined(__aarch64__)
    return vaddvq_s32((int32x4_t)value);
#else
    int32_t sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += value[lane];
    return sum;
#endif
}

#if INTS == 16
/* Quantise 32 numbers: 8 bits to bytes; 16 bits to 32 upper bytes, then 32 lower bytes. */
INLINE void quantise_block(const float *from, char *codes, float *scale, int32_t *sum, int bits) {
    __m512 x[2] = {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)};
    float most = largest(from), top = bits == 8 ? 127.0f : LARGEST;
    float by = most > 1e-30f ? top / most : 0.0f; /* else it could overflow */
    __m512i whole[2];
    for (int i = 0; i < 2; i++) {
        whole[i] = _mm512_cvtps_epi32(_mm512_mul_ps(x[i], _mm512_set1_ps(by)));
        if (bits == 16) {
            ints upper = _mm512_srai_epi32(add32(whole[i], _mm512_set1_epi32(128)), 8);
            _mm_storeu_si128((__m128i *)(codes + i * 16), _mm512_cvtepi32_epi8(upper));
        }
        _mm_storeu_si128((__m128i *)(codes + (bits == 16 ? BLOCK : 0) + i * 16),
                         _mm512_cvtepi32_epi8(whole[i]));
    }
    *scale = most / top;
    *sum = _mm512_reduce_add_epi32(add32(whole[0], whole[1]));
}
#else
INLINE void quantise_block(const float *from, void *codes, float *scale, int32_t *sum, int bits) {
    vec x[BLOCK / LANES];
    ivec whole[BLOCK / LANES], total = {0};
    memcpy(x, from, sizeof x);
    float most = largest(from), top = bits == 8 ? 127.0f : LARGEST;
    float by = most > 1e-30f ? top / most : 0.0f; /* else it could overflow */
    for (int i = 0; i < BLOCK / LANES; i++) {
        whole[i] = (ivec)(x[i] * by + 12582912.0f) - 0x4b400000; /* to nearest even */
        total += whole[i];
    }
    store_block(codes, whole, bits);
    *scale = most / top;
    *sum = whole_sum(total);
}
#endif

#endif
