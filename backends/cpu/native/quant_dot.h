/* Sums of one block of 32 products by NEON, exact in any of three ways: products of two rows with
 * two columns (i8mm), sums of four products (dotprod), or products of bytes, which every ARM CPU has.
 *
 * A 16-bit x is two signed bytes: 256 a + b. */
#ifndef SAGELLM_QUANT_DOT_H
#define SAGELLM_QUANT_DOT_H

#include "quant.h"

#define TILE 4          /* rows of a tile: 16 integer sums and 16 float sums */
#define HIGH TILE
#define UNSIGNED_ZERO 0 /* added to 8-bit codes before they are multiplied: nothing */

/* sums + products of the four codes of each column with four bytes that all columns share. */
INLINE ints add_fours(ints sums, int8x16_t codes, const char *x) {
    int8x16_t four = (int8x16_t)splat(x);
#ifdef __ARM_FEATURE_DOTPROD
    return (ints)vdotq_s32((int32x4_t)sums, codes, four);
#else
    int16x8_t left = vmull_s8(vget_low_s8(codes), vget_low_s8(four));
    int16x8_t right = vmull_high_s8(codes, four);
    /* A sum of two is at most 2 x 127 x 128, because codes are above -128. */
    return (ints)vpadalq_s16((int32x4_t)sums, vpaddq_s16(left, right));
#endif
}

#ifdef __ARM_FEATURE_MATMUL_INT8
#define IN_TWOS(rows) ((rows) / 2 * 2) /* rows that are multiplied two at a time */

/* Add the products of the rows at x and x + ldx, over eight of k. `top` gets the sums of columns 0
 * and 1, `end` those of 2 and 3: first those of row x, then those of the other row. */
INLINE void add_twisted(ints *top, ints *end, const int8x16_t codes[2], const char *x, long ldx) {
    int8x16_t rows = vcombine_s8(vld1_s8((const int8_t *)x), vld1_s8((const int8_t *)x + ldx));
    int32x4_t near = (int32x4_t)codes[0], far = (int32x4_t)codes[1];
    *top = (ints)vmmlaq_s32((int32x4_t)*top, rows, (int8x16_t)vzip1q_s32(near, far));
    *end = (ints)vmmlaq_s32((int32x4_t)*end, rows, (int8x16_t)vzip2q_s32(near, far));
}

/* Put the sums of row x into `top`, and those of the other row into `end`. */
INLINE void untwist(ints *top, ints *end) {
    int64x2_t left = (int64x2_t)*top, right = (int64x2_t)*end;
    *top = (ints)vzip1q_s64(left, right);
    *end = (ints)vzip2q_s64(left, right);
}
#else
#define IN_TWOS(rows) 0
#endif

typedef int8x16_t Table; /* the bytes of 16 codes: the level, or the code itself */

INLINE Table table_of(const int8_t *levels) {
    static const int8_t own[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return vld1q_s8(levels ? levels : own);
}

/* Load the codes of k to k + 4 and of k + 4 to k + 8, for each of four columns. `step`: k / 8. */
INLINE void load_eight(const uint8_t *w, int step, int bits, Table table, int8x16_t codes[2]) {
    if (bits == 8) {
        codes[0] = vld1q_s8((const int8_t *)w + 2 * step * COLS * 4);
        codes[1] = vld1q_s8((const int8_t *)w + (2 * step + 1) * COLS * 4);
    } else {
        uint8x16_t both = vld1q_u8(w + step * COLS * 4);
        codes[0] = vqtbl1q_s8(table, vandq_u8(both, vdupq_n_u8(15)));
        codes[1] = vqtbl1q_s8(table, vshrq_n_u8(both, 4));
    }
}

/* sums[r][v] = starts[r] + codes of vector v times row r, over one block. w: the codes of vector v
 * begin at w + v * apart; x: the codes of the rows, one row after the other. */
INLINE void block_sums(const uint8_t *w, long apart, const char *x, const int32_t *starts, int rows,
                       int vecs, int bits, int x_bits, Table table, ints sums[HIGH][VECS]) {
    const long ldx = x_bits * 4;
    ROLLED for (int part = 0; part < x_bits / 8; part++) {
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < vecs; v++) sums[r][v] = part ? sums[r][v] << 8 : NONE;
        UNROLL for (int step = 0; step < 4; step++) {
            const char *from = x + part * 32 + step * 8;
            UNROLL for (int v = 0; v < vecs; v++) {
                int8x16_t codes[2];
                load_eight(w + v * apart, step, bits, table, codes);
#ifdef __ARM_FEATURE_MATMUL_INT8
                UNROLL for (int r = 0; r < IN_TWOS(rows); r += 2)
                    add_twisted(sums[r] + v, sums[r + 1] + v, codes, from + r * ldx, ldx);
#endif
                UNROLL for (int r = IN_TWOS(rows); r < rows; r++)
                    UNROLL for (int half = 0; half < 2; half++)
                        sums[r][v] = add_fours(sums[r][v], codes[half], from + r * ldx + half * 4);
            }
        }
    }
    UNROLL for (int v = 0; v < vecs; v++) {
#ifdef __ARM_FEATURE_MATMUL_INT8
        UNROLL for (int r = 0; r < IN_TWOS(rows); r += 2) untwist(sums[r] + v, sums[r + 1] + v);
#endif
        UNROLL for (int r = 0; r < rows; r++) sums[r][v] = add32(sums[r][v], splat(starts + r));
    }
}

#endif
