/* Sums of one block of 32 products by AVX2, or by plain C: two products at a time. */
#ifndef SAGELLM_QUANT_PAIRS_H
#define SAGELLM_QUANT_PAIRS_H

#include "quant.h"

#define TILE 4           /* rows of a tile: 8 sums and their operands fill the AVX2 registers */
#define UNSIGNED_ZERO 0  /* added to 8-bit codes before they are multiplied: nothing */

#ifdef __AVX2__
INLINE ints add16(ints a, ints b) { return _mm256_add_epi16(a, b); }
INLINE ints pairs16(ints a, ints b) { return _mm256_madd_epi16(a, b); }
INLINE ints pairs8(ints a, ints b) { return _mm256_maddubs_epi16(a, b); }
#define LEFT16(a, n) _mm256_slli_epi16(a, n)
#define SIGNED_RIGHT16(a, n) _mm256_srai_epi16(a, n)
/* Keep the order of sums: compilers reorder integer sums, and then run out of registers. */
#define IN_ORDER(value) __asm__("" : "+v"(value))
#else
INLINE ints add16(ints a, ints b) { return (ints)((halves)a + (halves)b); }
INLINE ints pairs16(ints a, ints b) {
    ints even = ((a << 16) >> 16) * ((b << 16) >> 16);
    return even + (a >> 16) * (b >> 16);
}
/* Sums of pairs of products: bytes of a are unsigned, bytes of b signed. */
INLINE ints pairs8(ints a, ints b) {
    halves even = ((halves)a & 255) * ((halves)((halves)b << 8) >> 8);
    return (ints)(even + (((halves)a >> 8) & 255) * ((halves)b >> 8));
}
#define LEFT16(a, n) ((ints)((halves)(a) << (n)))
#define SIGNED_RIGHT16(a, n) ((ints)((halves)(a) >> (n)))
#define IN_ORDER(value) (void)(value)
#endif

/* sums + products of pairs of signed 16-bit numbers. */
INLINE ints add_pairs16(ints sums, ints a, ints b) {
    sums = add32(sums, pairs16(a, b));
    IN_ORDER(sums);
    return sums;
}

/* sums + products of four signed bytes, which are above -128. */
INLINE ints add_fours8(ints sums, ints a, ints b) {
#ifdef __AVX2__
    ints products = pairs8(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a)); /* at most 2 x 127^2 */
    return add_pairs16(sums, products, _mm256_set1_epi16(1));
#else
    ints even = pairs16(SIGNED_RIGHT16(LEFT16(a, 8), 8), SIGNED_RIGHT16(LEFT16(b, 8), 8));
    return sums + even + pairs16(SIGNED_RIGHT16(a, 8), SIGNED_RIGHT16(b, 8));
#endif
}

/* sums[r][v] = starts[r] + codes of vector v times row r, over one block. w: the codes of vector v
 * begin at w + v * apart; x: the codes of the rows, one row after the other. */
INLINE void block_sums(const uint8_t *w, long apart, const char *x, const int32_t *starts, int rows,
                       int bits, int x_bits, ints sums[TILE][VECS]) {
    const ints low = splat("\x0f\x0f\x0f\x0f"), ones = splat("\1\0\1");
    ints small[TILE][VECS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECS; v++) small[r][v] = NONE, sums[r][v] = splat(starts + r);
    for (int step = 0; step < (bits == 8 ? 8 : 4); step++) {
        ints codes[VECS];
        for (int v = 0; v < VECS; v++) codes[v] = load_ints(w + step * COLS * 4 + v * apart);
        for (int half = 0; half < (bits == 8 ? 1 : 2); half++) {
            int four = bits == 8 ? step : 2 * step + half;
            ints even[VECS], odd[VECS];
            for (int v = 0; v < VECS; v++) {
                if (bits == 8) {
                    even[v] = x_bits == 8 ? codes[v] : SIGNED_RIGHT16(LEFT16(codes[v], 8), 8);
                    odd[v] = SIGNED_RIGHT16(codes[v], 8);
                } else {
                    ints four_bits = both(half ? RIGHT16(codes[v], 4) : codes[v], low);
                    even[v] = x_bits == 8 ? four_bits : both(four_bits, splat("\xff\0\xff"));
                    odd[v] = RIGHT16(four_bits, 8);
                }
            }
            for (int r = 0; r < rows; r++) {
                const char *from = x + r * x_bits * 4 + four * (x_bits / 2);
                ints first = splat(from);
                for (int v = 0; v < VECS; v++) {
                    if (x_bits == 16)
                        sums[r][v] = add_pairs16(sums[r][v], even[v], first);
                    else if (bits == 8)
                        sums[r][v] = add_fours8(sums[r][v], even[v], first);
                    else { /* at most 8 x 2 x 15 x 127, which 16 bits hold */
                        small[r][v] = add16(small[r][v], pairs8(even[v], first));
                        IN_ORDER(small[r][v]);
                    }
                }
                if (x_bits == 8) continue;
                ints second = splat(from + 4);
                for (int v = 0; v < VECS; v++)
                    sums[r][v] = add_pairs16(sums[r][v], odd[v], second);
            }
        }
    }
    if (bits == 4 && x_bits == 8)
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECS; v++)
                sums[r][v] = add32(sums[r][v], pairs16(small[r][v], ones));
}

#endif
