/* Products of small matrices that are in the cache, and loads of padded rows. */
#ifndef SAGELLM_MATRIX_H
#define SAGELLM_MATRIX_H

#include "codes.h"
#include "vector.h"

#define TILE_ROWS 6 /* 6 x 2 sums, 2 vectors of the panel and a number of a: 15 of 16 registers */
#define TILE_VECS 2
#define PANEL (TILE_VECS * LANES) /* columns of a panel, which is [depth][PANEL] in memory */

/* Keep `value` in a register. Compilers would load it again for each use, and loads are the
 * bottleneck. */
#ifdef __AVX__
#define IN_REGISTER(value) __asm__("" : "+x"(value))
#elif defined(__aarch64__)
#define IN_REGISTER(value) __asm__("" : "+w"(value))
#else
#define IN_REGISTER(value) (void)(value)
#endif

/* One tile of `product`. `across`: from a number of a to the next in its row; `down`: to the next
 * in its column. */
INLINE void product_tile(const float *a, long across, long down, const float *panel, float *c,
                         long ldc, long depth, int rows, int vecs, int add) {
    vec acc[TILE_ROWS][TILE_VECS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++)
            acc[r][v] = add ? load_float(c + r * ldc + v * LANES) : (vec){0};
    for (long i = 0; i < depth; i++) {
        vec right[TILE_VECS];
        for (int v = 0; v < vecs; v++) {
            right[v] = load_float(panel + i * PANEL + v * LANES);
            IN_REGISTER(right[v]);
        }
        for (int r = 0; r < rows; r++) {
            vec left = fill(a[r * down + i * across]);
            for (int v = 0; v < vecs; v++) acc[r][v] = fused(left, right[v], acc[r][v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++) store_float(c + r * ldc + v * LANES, acc[r][v]);
}

/* The number of parts of about equal size, at most TILE_ROWS, in which `product` takes rows. */
INLINE long num_parts(long rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

/* c (rows x LANES vecs) = a (rows x depth) times panels of b, `panel_len` floats apart; added to c if
 * `add`. If `part` is not 0, a is stored in parts, `part` floats apart.
 *
 * Each element is one sum in the order of depth, in every tile: more rows change no bit. */
INLINE void product(const float *a, long across, long down, long part, const float *b,
                    long panel_len, float *c, long ldc, long rows, long vecs, long depth, int add) {
    long parts = num_parts(rows);
    for (long v = 0; v < vecs; v += TILE_VECS, b += panel_len)
        for (long p = 0; p < parts; p++) {
            long r = rows * p / parts, rows_now = rows * (p + 1) / parts - r;
            const float *left = part ? a + p * part : a + r * down;
            float *out = c + r * ldc + v * LANES;
#define CASE(R)                                                           \
    case R * 2:                                                           \
        product_tile(left, across, down, b, out, ldc, depth, R, 1, add); \
        break;                                                            \
    case R * 2 + 1:                                                       \
        product_tile(left, across, down, b, out, ldc, depth, R, 2, add); \
        break;
            switch (rows_now * 2 + (v + 1 < vecs)) {
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
            }
#undef CASE
        }
}

/* Numbers i to i + LANES of a row of `size` numbers, or codes of a row in 8 bits. Past the end they are
 * zeros. `whole`: rows are whole vectors, so that no load passes the end. */
INLINE vec load_padded(const void *row, long i, long size, int dtype, int whole) {
    const int8_t *codes = row;
    if (whole || i + LANES <= size)
        return dtype == KV_INT8 ? load_codes(codes + i) : load(row, i, dtype);
    vec value = {0};
    for (long l = 0; i + l < size; l++)
        value[l] = dtype == KV_INT8 ? codes[i + l] : load_one(row, i + l, dtype);
    return value;
}

#ifdef __AVX__
/* Transpose 8 x 8 floats in place. */
INLINE void transpose(vec rows[LANES]) {
    __m256 pairs[LANES], fours[LANES];
    for (int i = 0; i < 4; i++) {
        pairs[2 * i] = _mm256_unpacklo_ps((__m256)rows[2 * i], (__m256)rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_ps((__m256)rows[2 * i], (__m256)rows[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            __m256 a = pairs[4 * i + j], b = pairs[4 * i + j + 2];
            fours[4 * i + 2 * j] = _mm256_shuffle_ps(a, b, 0x44);
            fours[4 * i + 2 * j + 1] = _mm256_shuffle_ps(a, b, 0xee);
        }
    for (int i = 0; i < 4; i++) {
        rows[i] = (vec)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
        rows[i + 4] = (vec)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
}
#elif defined(__aarch64__)
/* Transpose 4 x 4 floats in place. */
INLINE void transpose(vec rows[LANES]) {
    float32x4x2_t top = vtrnq_f32((float32x4_t)rows[0], (float32x4_t)rows[1]);
    float32x4x2_t end = vtrnq_f32((float32x4_t)rows[2], (float32x4_t)rows[3]);
    for (int i = 0; i < 2; i++) {
        rows[i] = (vec)vcombine_f32(vget_low_f32(top.val[i]), vget_low_f32(end.val[i]));
        rows[i + 2] = (vec)vcombine_f32(vget_high_f32(top.val[i]), vget_high_f32(end.val[i]));
    }
}
#else
INLINE void transpose(vec rows[LANES]) {
    for (int i = 0; i < LANES; i++)
        for (int j = i + 1; j < LANES; j++) {
            float kept = rows[i][j];
            rows[i][j] = rows[j][i];
            rows[j][i] = kept;
        }
}
#endif

#endif
