/* Sums of one block of 32 products by AVX2, or by plain C: two products at a time. */
#ifndef SAGELLM_QUANT_PAIRS_H
#define SAGELLM_QUANT_PAIRS_H

#include "quant.h"

#define TILE 4           /* rows of a tile: 8 sums and their operands fill the AVX2 registers */
#define HIGH TILE
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

typedef const int8_t *Table; /* the levels of 16 codes; NULL: codes without levels */

INLINE Table table_of(const int8_t *levels) { return levels; }

/* The level of each of 32 codes. */
INLINE ints levels_of(ints codes, Table levels) {
#ifdef __AVX2__
    __m128i table = _mm_loadu_si128((const __m128i *)levels);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes);
#else
    int8_t found[sizeof codes];
    memcpy(found, &codes, sizeof codes);
    for (size_t i = 0; i < sizeof codes; i++) found[i] = levels[found[i]];
    return load_ints(found);
#endif
}

INLINE void sums_of(const uint8_t *w, long apart, const char *x, const int32_t *starts, int rows,
                       int vecs, int bits, int x_bits, Table levels,
                       ints sums[HIGH][VECS]) {
    const int is_signed = bits == 8 || levels;
    const ints low = splat("\x0f\x0f\x0f\x0f"), ones = splat("\1\0\1");
    ints small[HIGH][VECS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++) small[r][v] = NONE, sums[r][v] = splat(starts + r);
    for (int step = 0; step < (bits == 8 ? 8 : 4); step++) {
        ints codes[VECS];
        for (int v = 0; v < vecs; v++) codes[v] = load_ints(w + step * COLS * 4 + v * apart);
        for (int half = 0; half < (bits == 8 ? 1 : 2); half++) {
            int four = bits == 8 ? step : 2 * step + half;
            ints even[VECS], odd[VECS];
            for (int v = 0; v < vecs; v++) {
                ints four_bits = both(half ? RIGHT16(codes[v], 4) : codes[v], low);
                if (is_signed) {
                    ints byte = bits == 8 ? codes[v] : levels_of(four_bits, levels);
                    even[v] = x_bits == 8 ? byte : SIGNED_RIGHT16(LEFT16(byte, 8), 8);
                    odd[v] = SIGNED_RIGHT16(byte, 8);
                } else {
                    even[v] = x_bits == 8 ? four_bits : both(four_bits, splat("\xff\0\xff"));
                    odd[v] = RIGHT16(four_bits, 8);
                }
            }
            for (int r = 0; r < rows; r++) {
                const char *from = x + r * x_bits * 4 + four * (x_bits / 2);
                ints first = splat(from);
                for (int v = 0; v < vecs; v++) {
                    if (x_bits == 16)
                        sums[r][v] = add_pairs16(sums[r][v], even[v], first);
                    else if (is_signed)
                        sums[r][v] = add_fours8(sums[r][v], even[v], first);
                    else { /* at most 8 x 2 x 15 x 127, which 16 bits hold */
                        small[r][v] = add16(small[r][v], pairs8(even[v], first));
                        IN_ORDER(small[r][v]);
                    }
                }
                if (x_bits == 8) continue;
                ints second = splat(from + 4);
                for (int v = 0; v < vecs; v++)
                    sums[r][v] = add_pairs16(sums[r][v], odd[v], second);
            }
        }
    }
    if (!is_signed && x_bits == 8)
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vecs; v++)
                sums[r][v] = add32(sums[r][v], pairs16(small[r][v], ones));
}

/* sums[r][v] = starts[r] + codes of vector v times row r, over one block. w: the codes of vector v
 * begin at w + v * apart; x: the codes of the rows, one row after the other. */
INLINE void block_sums(const uint8_t *w, long apart, const char *x, const int32_t *starts, int rows,
                       int vecs, int bits, int x_bits, Table levels,
                       ints sums[HIGH][VECS]) {
    if (bits == 4 && levels)
        sums_of(w, apart, x, starts, rows, vecs, bits, x_bits, levels, sums);
    else
        sums_of(w, apart, x, starts, rows, vecs, bits, x_bits, NULL, sums);
}

#endif
