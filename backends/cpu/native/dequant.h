/* Dequantises blocks of weights to pairs of bfloat16, for products of many rows. */
#ifndef SAGELLM_DEQUANT_H
#define SAGELLM_DEQUANT_H

#include "pairs.h"
#include "panel.h"
#include "quant.h"

/* Columns of a dequantised panel, and its vectors: whole panels of codes, and of packed weights. */
#define DENSE (PANEL < COLS ? COLS : PANEL)
#define DENSE_VECS (DENSE / WIDE)

#ifdef __AVX512BF16__
/* Store 4 codes of each of 16 columns (16 x 4 signed bytes) as two rows of pairs: k and k + 1, then
 * k + 2 and k + 3. by[h], add[h]: the factors and offsets of columns 8 h to 8 h + 7, two each. A
 * code is converted as the upper byte of a number, so `by` is 2^-24 of the scale: both exact. */
INLINE void store_pairs(__m512i codes, const __m512 by[2], const __m512 add[2], uint16_t *to) {
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m128i first = _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 13);
    for (int pair = 0; pair < 2; pair++) {
        __m128i bytes = _mm_add_epi8(first, _mm_set1_epi8((char)(2 * pair)));
        __m512 values[2];
        for (int h = 0; h < 2; h++) {
            __m512i columns = _mm512_add_epi32(twice, _mm512_set1_epi32(8 * h));
            __m512i upper = _mm512_maskz_shuffle_epi8(0x8888888888888888,
                                                      _mm512_permutexvar_epi32(columns, codes),
                                                      _mm512_broadcast_i32x4(bytes));
            values[h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(upper), by[h], add[h]);
        }
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh(values[1], values[0]);
        _mm512_storeu_si512(to + 2 * DENSE * pair, both);
    }
}

/* Dequantise a block of 32 codes of 16 columns. The pairs of one k are 2 x DENSE numbers apart from
 * those of the next k. `zeros` NULL: the zero is 8 with 4 bits, 0 with 8 bits. `levels` NULL: codes
 * have no levels. */
INLINE void dequantise_block(const uint8_t *codes, const uint16_t *scales, const int16_t *zeros,
                             const int8_t *levels, int bits, uint16_t *to) {
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)scales));
    __m512 zero = _mm512_set1_ps(bits == 8 || levels ? 0.0f : 8.0f), by[2], add[2];
    if (zeros) {
        __m256i narrow = _mm256_loadu_si256((const __m256i *)zeros);
        zero = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(narrow));
    }
    __m512 offset = _mm512_fnmadd_ps(scale, zero, _mm512_setzero_ps());
    __m512i table = low;
    if (levels) table = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)levels));
    scale = _mm512_mul_ps(scale, _mm512_set1_ps(0x1p-24f));
    for (int h = 0; h < 2; h++) {
        __m512i lanes = _mm512_add_epi32(twice, _mm512_set1_epi32(8 * h));
        by[h] = _mm512_permutexvar_ps(lanes, scale), add[h] = _mm512_permutexvar_ps(lanes, offset);
    }
    for (int step = 0; step < bits; step++, codes += 64, to += 32 / bits * DENSE) {
        __m512i some = _mm512_loadu_si512(codes);
        if (bits == 8) {
            store_pairs(some, by, add, to);
        } else {
            __m512i first = _mm512_and_si512(some, low);
            __m512i second = _mm512_and_si512(_mm512_srli_epi16(some, 4), low);
            store_pairs(levels ? _mm512_shuffle_epi8(table, first) : first, by, add, to);
            store_pairs(levels ? _mm512_shuffle_epi8(table, second) : second, by, add,
                        to + 4 * DENSE);
        }
    }
}
#else
INLINE void dequantise_block(const uint8_t *codes, const uint16_t *scales, const int16_t *zeros,
                             const int8_t *levels, int bits, uint16_t *to) {
    for (int k = 0; k < BLOCK; k++)
        for (int col = 0; col < COLS; col++) {
            int at = (bits == 8 ? k / 4 : k / 8) * 64 + col * 4 + k % 4;
            int code = bits == 8 ? (int8_t)codes[at] : k / 4 % 2 ? codes[at] >> 4 : codes[at] & 15;
            int zero = zeros ? zeros[col] : bits == 8 ? 0 : 8;
            int level = levels ? levels[code] : code - zero;
            float value = (float)level * half_to_float(scales[col]);
            to[k / 2 * 2 * DENSE + col * 2 + k % 2] = rounded(value);
        }
}
#endif

#endif
