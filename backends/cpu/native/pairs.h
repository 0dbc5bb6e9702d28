/* Products of pairs of bfloat16: two numbers that are adjacent along k share 32 bits. */
#ifndef SAGELLM_PAIRS_H
#define SAGELLM_PAIRS_H

#include "vector.h"

#ifdef __AVX512BF16__
#define PAIR_LANES 16 /* attention is computed in pairs too: see block_pairs.h */
#else
#define PAIR_LANES LANES
#endif

/* Whether this CPU multiplies pairs, so that PAIRS are faster than BFLOATS. */
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && WIDE == 4
#define HAS_BFDOT 1
#endif
#if defined(__AVX512BF16__) || defined(HAS_BFDOT)
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

#define PAIR_VECS 2
#define PAIR_PANEL (PAIR_VECS * PAIR_LANES) /* columns of a panel, which is [depth][PAIR_PANEL] */

/* Keys of a vector where keys are codes of 8 bits: these become pairs of bfloat16 by AVX512-VBMI. */
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define CODE_LANES PAIR_LANES
#else
#define CODE_LANES LANES
#endif

/* sums + both products of each column's pair with the pair x. */
INLINE wide add_products(wide sums, wide_bits columns, int32_t x) {
#ifdef __AVX512BF16__
    return (wide)_mm512_dpbf16_ps((__m512)sums, (__m512bh)columns, (__m512bh)_mm512_set1_epi32(x));
#elif defined(HAS_BFDOT)
    return (wide)vbfdotq_f32((float32x4_t)sums, (bfloat16x8_t)columns,
                             (bfloat16x8_t)vdupq_n_s32(x));
#else
    const wide_bits upper = (wide_bits){0} + (int32_t)0xffff0000, both = (wide_bits){0} + x;
    sums = fused_wide((wide)(both << 16), (wide)(columns << 16), sums);
    return fused_wide((wide)(both & upper), (wide)(columns & upper), sums);
#endif
}

INLINE void round_all(const float *from, uint16_t *to, long count) {
    long i = 0;
#ifdef __AVX512BF16__
    for (; i + WIDE <= count; i += WIDE) {
        __m256bh half = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
        memcpy(to + i, &half, sizeof half);
    }
#elif defined(HAS_BFDOT)
    for (; i + WIDE <= count; i += WIDE) {
        bfloat16x4_t half = vcvt_bf16_f32(vld1q_f32(from + i));
        memcpy(to + i, &half, sizeof half);
    }
#endif
    for (; i < count; i++) to[i] = rounded(from[i]);
}

#ifdef __AVX512BF16__
/* Transpose 16 x 16 numbers of 32 bits in place. */
INLINE void transpose_wide(__m512i rows[16]) {
    __m512i fours[16];
    for (int i = 0; i < 16; i += 4) {
        __m512i a = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        __m512i b = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        __m512i c = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]);
        __m512i d = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
        fours[i] = _mm512_unpacklo_epi64(a, c), fours[i + 1] = _mm512_unpackhi_epi64(a, c);
        fours[i + 2] = _mm512_unpacklo_epi64(b, d), fours[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int j = 0; j < 4; j++) {
        __m512i a = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x44);
        __m512i b = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x44);
        __m512i c = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xee);
        __m512i d = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xee);
        rows[j] = _mm512_shuffle_i32x4(a, b, 0x88);
        rows[4 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
        rows[8 + j] = _mm512_shuffle_i32x4(c, d, 0x88);
        rows[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
}
#endif

#endif
