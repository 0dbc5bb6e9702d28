/* Keys and values in 8 bits as pairs of bfloat16, which holds every code exactly. Scales are not
 * applied here: `soften_pairs` multiplies scores and softmax weights with them. */
#ifndef SAGELLM_CODE_PAIRS_H
#define SAGELLM_CODE_PAIRS_H

#include "blocks.h"
#include "pairs.h"

#if CODE_LANES == 16

/* A byte of the bfloat16 n, for 0 <= n < 128. */
#define LOG2(n) (31 - __builtin_clz((n) | 1))
#define BITS(n) ((n) ? (127 + LOG2(n)) << 7 | ((n) << (7 - LOG2(n)) & 127) : 0)
#define BYTE(n, shift) (uint8_t)(BITS(n) >> (shift) & 255)
#define BYTES_4(n, shift) BYTE(n, shift), BYTE(n + 1, shift), BYTE(n + 2, shift), BYTE(n + 3, shift)
#define BYTES_16(n, shift) \
    BYTES_4(n, shift), BYTES_4(n + 4, shift), BYTES_4(n + 8, shift), BYTES_4(n + 12, shift)
#define BYTES_64(n, shift) \
    BYTES_16(n, shift), BYTES_16(n + 16, shift), BYTES_16(n + 32, shift), BYTES_16(n + 48, shift)
static const uint8_t LOWER[2][64] = {{BYTES_64(0, 0)}, {BYTES_64(64, 0)}};
static const uint8_t UPPER[2][64] = {{BYTES_64(0, 8)}, {BYTES_64(64, 8)}};

/* The lower and the upper bytes of 64 codes as bfloat16. */
typedef struct {
    __m512i lower, upper;
} Split;

INLINE Split split_codes(__m512i codes) {
    __m512i size = _mm512_abs_epi8(codes);
    __m512i lower = _mm512_permutex2var_epi8(_mm512_loadu_si512(LOWER[0]), size,
                                             _mm512_loadu_si512(LOWER[1]));
    __m512i upper = _mm512_permutex2var_epi8(_mm512_loadu_si512(UPPER[0]), size,
                                             _mm512_loadu_si512(UPPER[1]));
    __m512i sign = _mm512_and_si512(codes, _mm512_set1_epi8((char)0x80));
    return (Split){lower, _mm512_or_si512(upper, sign)}; /* compilers fuse both operations */
}

/* In each 32 bits of `places`: which codes form the pair, each as its lower and its upper byte. */
INLINE __m512i pairs_at(Split split, __m512i places) {
    return _mm512_permutex2var_epi8(split.lower, places, split.upper);
}

/* place(n) for n from 0 to 15. */
#define SIXTEEN(place)                                                                          \
    _mm512_setr_epi32(place(0), place(1), place(2), place(3), place(4), place(5), place(6),     \
                      place(7), place(8), place(9), place(10), place(11), place(12), place(13), \
                      place(14), place(15))
#define FIRST_OF_FOUR(n) (0x41014000 + (n) * 0x04040404)
#define PAIR_OF_KEYS(n) (0x60204000 + ((n) / 4 * 8 + (n) % 4) * 0x01010101)

/* load_key_pairs for codes. Four codes are transposed as one number of 32 bits. */
INLINE void load_key_codes(Work *w, long num_keys, int32_t *panels) {
    long size = w->plan->heads.head_dim, depth = size / 2;
    const __m512i first = SIXTEEN(FIRST_OF_FOUR);
    const __m512i second = _mm512_add_epi8(first, _mm512_set1_epi8(2));
    for (long k = 0; k < num_keys; k += 16) {
        int32_t *to = panels + k / PAIR_PANEL * PAIR_PANEL * depth + k % PAIR_PANEL;
        for (int l = 0; l < 16; l++) ask_for(w->next.keys[k + l], kv_row_bytes(size, KV_INT8));
        for (long i = 0; i < depth; i += 32) {
            long left = size - 2 * i;
            __mmask64 mask = left < 64 ? (1ull << left) - 1 : ~0ull;
            __m512i corner[16];
            for (int l = 0; l < 16; l++)
                corner[l] = _mm512_maskz_loadu_epi8(mask, w->rows_at.keys[k + l] + 2 * i);
            transpose_wide(corner);
            for (long l = 0; l < 16 && i + 2 * l < depth; l++) {
                Split split = split_codes(corner[l]);
                int32_t *pair = to + (i + 2 * l) * PAIR_PANEL;
                _mm512_storeu_si512(pair, pairs_at(split, first));
                if (i + 2 * l + 1 < depth)
                    _mm512_storeu_si512(pair + PAIR_PANEL, pairs_at(split, second));
            }
        }
    }
}

/* load_value_pair for codes. */
INLINE void load_code_pair(const Work *w, long k, long i, __mmask32 mask, wide_bits *low,
                           wide_bits *high) {
    __m256i even = _mm256_maskz_loadu_epi8(mask, w->rows_at.values[k] + i);
    __m256i odd = _mm256_maskz_loadu_epi8(mask, w->rows_at.values[k + 1] + i);
    Split split = split_codes(_mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1));
    const __m512i first = SIXTEEN(PAIR_OF_KEYS);
    *low = (wide_bits)pairs_at(split, first);
    *high = (wide_bits)pairs_at(split, _mm512_add_epi8(first, _mm512_set1_epi8(4)));
}

#elif defined(__AVX512BF16__) /* a plan for codes does not choose pairs here, see CODE_LANES */

INLINE void load_key_codes(Work *w, long num_keys, int32_t *panels) {
    (void)w, (void)num_keys, (void)panels;
}

INLINE void load_code_pair(const Work *w, long k, long i, __mmask32 mask, wide_bits *low,
                           wide_bits *high) {
    (void)w, (void)k, (void)i, (void)mask;
    *low = *high = (wide_bits){0};
}

#endif

#endif
