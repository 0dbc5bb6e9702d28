/* Sums of one block of 32 products by AVX512-VNNI: one instruction for 64 products.
 *
 * The instruction multiplies unsigned bytes by signed bytes, and only the signed bytes may be four
 * bytes of memory that all columns share. So the weights become unsigned: 128 is added to 8-bit
 * codes, and a sum starts at -128 times the sum of x. A 16-bit x is two signed bytes: 256 a + b. */
#ifndef SAGELLM_QUANT_VNNI_H
#define SAGELLM_QUANT_VNNI_H

#include "quant.h"

#define TILE 6            /* rows of a tile: 12 integer sums, 12 float sums and 2 weights */
#define HIGH 12           /* rows of a tile of one vector: 12 integer sums, 12 float sums */
#define UNSIGNED_ZERO 128 /* added to 8-bit codes before they are multiplied */

/* The unsigned bytes of 16 codes, four times: the level + UNSIGNED_ZERO, or the code itself. */
typedef ints Table;

INLINE Table table_of(const int8_t *levels) {
    static const int8_t own[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int8_t *bytes = levels ? levels : own;
    ints table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)bytes));
    return levels ? either(table, splat("\x80\x80\x80\x80")) : table;
}

/* The bytes of `table` for 64 codes of 4 bits. */
INLINE ints entries(Table table, ints codes) {
#ifdef __AVX512VBMI__ /* the table has four copies: the upper bits of a byte do not matter */
    return _mm512_permutexvar_epi8(codes, table);
#else
    return _mm512_shuffle_epi8(table, both(codes, splat("\x0f\x0f\x0f\x0f")));
#endif
}

INLINE ints add_fours(ints sums, ints a, ints b) { return _mm512_dpbusd_epi32(sums, a, b); }

/* Add the products of 64 bytes of codes with four bytes of each row; eight bytes if codes have 4
 * bits. */
INLINE void add_step(const ints codes[VECS], const char *x, long ldx, int rows, int vecs, int bits,
                     Table table, ints sums[HIGH][VECS]) {
    const ints high = splat("\x80\x80\x80\x80");
    for (int half = 0; half < (bits == 8 ? 1 : 2); half++) {
        ints now[VECS];
        UNROLL for (int v = 0; v < vecs; v++) {
            if (bits == 8)
                now[v] = either(codes[v], high);
            else
                now[v] = entries(table, half ? RIGHT16(codes[v], 4) : codes[v]);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            ints four = splat(x + r * ldx + half * 4);
            UNROLL for (int v = 0; v < vecs; v++) sums[r][v] = add_fours(sums[r][v], now[v], four);
        }
    }
}

/* block_sums with 16-bit x for few rows: upper and lower bytes at once, so that weights are read
 * once. More rows would not leave enough registers. */
INLINE void few_sums(const uint8_t *w, long apart, const char *x, const int32_t *starts, int rows,
                     int vecs, int bits, Table table, ints sums[HIGH][VECS]) {
    ints upper[HIGH][VECS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vecs; v++) upper[r][v] = NONE, sums[r][v] = splat(starts + r);
    UNROLL for (int step = 0; step < bits; step++) {
        const char *from = x + step * 32 / bits;
        ints codes[VECS];
        UNROLL for (int v = 0; v < vecs; v++)
            codes[v] = load_ints(w + step * COLS * 4 + v * apart);
        add_step(codes, from, 64, rows, vecs, bits, table, upper);
        add_step(codes, from + 32, 64, rows, vecs, bits, table, sums);
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vecs; v++)
            sums[r][v] = add32(sums[r][v], _mm512_slli_epi32(upper[r][v], 8));
}

/* sums[r][v] = starts[r] + codes of vector v times row r, over one block. w: the codes of vector v
 * begin at w + v * apart; x: the codes of the rows, one row after the other. */
INLINE void block_sums(const uint8_t *w, long apart, const char *x, const int32_t *starts, int rows,
                       int vecs, int bits, int x_bits, Table table,
                       ints sums[HIGH][VECS]) {
    if (x_bits == 16 && rows * vecs <= 4) {
        few_sums(w, apart, x, starts, rows, vecs, bits, table, sums);
        return;
    }
    ROLLED for (int part = 0; part < x_bits / 8; part++) {
        UNROLL for (int r = 0; r < rows; r++) {
            int32_t start = part == x_bits / 8 - 1 ? starts[r] : 0;
            UNROLL for (int v = 0; v < vecs; v++)
                sums[r][v] = part ? add32(_mm512_slli_epi32(sums[r][v], 8), splat(&start))
                                  : splat(&start);
        }
        UNROLL for (int step = 0; step < bits; step++) {
            ints codes[VECS];
            UNROLL for (int v = 0; v < vecs; v++)
                codes[v] = load_ints(w + step * COLS * 4 + v * apart);
            add_step(codes, x + part * 32 + step * 32 / bits, x_bits * 4, rows, vecs, bits,
                     table, sums);
        }
    }
}

#endif
