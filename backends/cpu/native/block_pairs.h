/* Attention blocks as pairs of bfloat16, for CPUs that multiply such pairs. Queries and softmax
 * weights are rounded to bfloat16. The sums of values are stored in the order of load_value_pair. */
#ifndef SAGELLM_BLOCK_PAIRS_H
#define SAGELLM_BLOCK_PAIRS_H

#include "blocks.h"
#include "code_pairs.h"
#include "pairs.h"

#ifdef __AVX512BF16__

#define PAIR_ROWS 12 /* 12 x 2 sums, 2 vectors of the panel and a pair of a: 27 of 32 registers */

INLINE void pair_tile(const int32_t *a, long across, long down, const int32_t *panel, float *c,
                      long ldc, long depth, int rows, int vecs, int add) {
    wide acc[PAIR_ROWS][PAIR_VECS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++)
            acc[r][v] = add ? load_wide(c + r * ldc + v * WIDE) : (wide){0};
    for (long i = 0; i < depth; i++) {
        wide_bits right[PAIR_VECS];
        for (int v = 0; v < vecs; v++)
            memcpy(right + v, panel + i * PAIR_PANEL + v * WIDE, sizeof *right);
        for (int r = 0; r < rows; r++) {
            int32_t left;
            memcpy(&left, a + r * down + i * across, sizeof left);
            for (int v = 0; v < vecs; v++) acc[r][v] = add_products(acc[r][v], right[v], left);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++) memcpy(c + r * ldc + v * WIDE, &acc[r][v], sizeof(wide));
}

INLINE long pair_parts(long rows) { return (rows + PAIR_ROWS - 1) / PAIR_ROWS; }

/* `product` of matrix.h for pairs: c (rows x 16 vecs) = a (rows x depth pairs) times panels. */
static void product_of_pairs(const int32_t *a, long across, long down, long part, const int32_t *b,
                             long panel_len, float *c, long ldc, long rows, long vecs, long depth,
                             int add) {
    long parts = pair_parts(rows);
    for (long v = 0; v < vecs; v += PAIR_VECS, b += panel_len)
        for (long p = 0; p < parts; p++) {
            long r = rows * p / parts, rows_now = rows * (p + 1) / parts - r;
            const int32_t *left = part ? a + p * part : a + r * down;
            float *out = c + r * ldc + v * WIDE;
#define CASE(R)                                                        \
    case R * 2:                                                        \
        pair_tile(left, across, down, b, out, ldc, depth, R, 1, add);  \
        break;                                                         \
    case R * 2 + 1:                                                    \
        pair_tile(left, across, down, b, out, ldc, depth, R, 2, add);  \
        break;
            switch (rows_now * 2 + (v + 1 < vecs)) {
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
                CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
            }
#undef CASE
        }
}

/* Load the tile's queries, scaled and rounded, in the parts of rows that `product_of_pairs` takes:
 * each part is [pairs of head_dim][PAIR_ROWS]. */
static void load_query_pairs(Work *w) {
    const Heads *h = &w->plan->heads;
    long parts = pair_parts(w->rows), depth = h->head_dim / 2;
    for (long part = 0; part < parts; part++) {
        int32_t *to = (int32_t *)w->q + part * PAIR_ROWS * depth;
        long first = w->rows * part / parts, last = w->rows * (part + 1) / parts;
        for (long r = first; r < last; r++) {
            const float *from = query(w, r);
            for (long i = 0; i < depth; i++) {
                uint32_t high = rounded(from[2 * i + 1] * h->scale);
                to[i * PAIR_ROWS + r - first] =
                    (int32_t)(high << 16 | rounded(from[2 * i] * h->scale));
            }
        }
    }
}

/* Load keys as the columns of panels, [pairs of head_dim][PAIR_PANEL]. */
INLINE void load_key_pairs(Work *w, long num_keys, int32_t *panels) {
    long depth = w->plan->heads.head_dim / 2;
    for (long k = 0; k < num_keys; k += 16) {
        int32_t *to = panels + k / PAIR_PANEL * PAIR_PANEL * depth + k % PAIR_PANEL;
        for (int l = 0; l < 16; l++) ask_for(w->next.keys[k + l], 4 * depth);
        for (long i = 0; i < depth; i += 16) {
            long count = depth - i < 16 ? depth - i : 16;
            __mmask16 mask = (__mmask16)((1 << count) - 1);
            __m512i corner[16];
            for (int l = 0; l < 16; l++)
                corner[l] = _mm512_maskz_loadu_epi32(mask, w->rows_at.keys[k + l] + 4 * i);
            transpose_wide(corner);
            for (int l = 0; l < count; l++)
                _mm512_storeu_si512(to + (i + l) * PAIR_PANEL, corner[l]);
        }
    }
}

/* Load numbers i to i + 32 of the values of keys k and k + 1, as pairs of both keys' numbers. Of
 * every eight pairs, the first four go to `low` and the others to `high`. */
INLINE void load_value_pair(const Work *w, long k, long i, __mmask32 mask, int dtype,
                            wide_bits *low, wide_bits *high) {
    if (dtype == KV_INT8) {
        load_code_pair(w, k, i, mask, low, high);
        return;
    }
    __m512i even = _mm512_maskz_loadu_epi16(mask, w->rows_at.values[k] + 2 * i);
    __m512i odd = _mm512_maskz_loadu_epi16(mask, w->rows_at.values[k + 1] + 2 * i);
    *low = (wide_bits)_mm512_unpacklo_epi16(even, odd);
    *high = (wide_bits)_mm512_unpackhi_epi16(even, odd);
}

/* A mask of the numbers i to i + 32 that exist in a row of head_dim numbers. */
INLINE __mmask32 numbers_from(const Work *w, long i) {
    long left = w->plan->heads.head_dim - i;
    return (__mmask32)(left < 32 ? (1l << left) - 1 : 0xffffffff);
}

/* Write a row of sums, scaled, in ascending order: undo the order of load_value_pair. */
INLINE void store_pairs_row(const Work *w, const float *from, float by, float *to) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    const __m512 factor = _mm512_set1_ps(by);
    for (long i = 0; i < w->plan->heads.head_dim; i += PAIR_PANEL) {
        __mmask32 mask = numbers_from(w, i);
        __m512 low = _mm512_mul_ps(_mm512_loadu_ps(from + i), factor);
        __m512 high = _mm512_mul_ps(_mm512_loadu_ps(from + i + PAIR_LANES), factor);
        _mm512_mask_storeu_ps(to + i, (__mmask16)mask, _mm512_permutex2var_ps(low, first, high));
        _mm512_mask_storeu_ps(to + i + PAIR_LANES, (__mmask16)(mask >> PAIR_LANES),
                              _mm512_permutex2var_ps(low, second, high));
    }
}

/* Load values as the rows of panels, [pairs of keys][PAIR_PANEL]. */
INLINE void load_value_pairs(Work *w, long num_keys, int dtype, int32_t *panels) {
    for (long i = 0; i < w->width; i += PAIR_PANEL, panels += PAIR_PANEL * (BLOCK / 2))
        for (long k = 0; k < num_keys; k += 2) {
            wide_bits both[PAIR_VECS];
            load_value_pair(w, k, i, numbers_from(w, i), dtype, both, both + 1);
            memcpy(panels + k / 2 * PAIR_PANEL, both, sizeof both);
        }
}

/* weigh_pairs for few rows, without panels: the sums of all rows fit in registers, so that every
 * pair of values is loaded once. */
INLINE void weigh_few(Work *w, long num_keys, int rows, int dtype) {
    for (long i = 0; i < w->width; i += PAIR_PANEL) {
        __mmask32 mask = numbers_from(w, i);
        wide acc[PAIR_ROWS][PAIR_VECS];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < PAIR_VECS; v++)
                acc[r][v] = load_wide(w->sums.values + r * w->width + i + v * WIDE);
        for (long k = 0; k < num_keys; k += 2) {
            wide_bits low, high;
            load_value_pair(w, k, i, mask, dtype, &low, &high);
            for (int r = 0; r < rows; r++) {
                int32_t weights;
                memcpy(&weights, w->weights + r * BLOCK + k, sizeof weights);
                acc[r][0] = add_products(acc[r][0], low, weights);
                acc[r][1] = add_products(acc[r][1], high, weights);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < PAIR_VECS; v++)
                memcpy(w->sums.values + r * w->width + i + v * WIDE, &acc[r][v], sizeof(wide));
    }
}

/* exp as lanes_exp computes it, for numbers that are not above 0. */
INLINE __m512 exp_wide(__m512 x) {
    const __m512 low = _mm512_set1_ps(-87.0f);
    __mmask16 some = _mm512_cmp_ps_mask(x, low, _CMP_NLT_UQ);
    __m512 z = _mm512_max_ps(low, x); /* the second operand, x, if it is NaN */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(z, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), z);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(some, p, n);
}

INLINE __m512 times(__m512 values, const float *scales) {
    return _mm512_mul_ps(values, _mm512_loadu_ps(scales));
}

/* `soften_scaled` of blocks.h, which also writes the rounded weights to w->weights. */
INLINE float soften_wide(Work *w, long row, long first, long last, long padded, int scaled) {
    float *scores = w->scores + row * BLOCK, *largest = w->sums.largest + row;
    if (scaled)
        for (long i = 0; i < padded; i += PAIR_LANES)
            _mm512_storeu_ps(scores + i, times(_mm512_loadu_ps(scores + i), w->key_scales + i));
    for (long i = 0; i < first; i++) scores[i] = -INFINITY;
    for (long i = last; i < padded; i++) scores[i] = -INFINITY;
    __m512 most = _mm512_loadu_ps(scores), added = _mm512_setzero_ps();
    for (long i = PAIR_LANES; i < padded; i += PAIR_LANES)
        most = _mm512_max_ps(_mm512_loadu_ps(scores + i), most);
    float before = *largest, found = _mm512_reduce_max_ps(most);
    if (found > before) *largest = found;
    for (long i = 0; i < padded; i += PAIR_LANES) {
        __m512 distance = _mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(*largest));
        __m512 raised = exp_wide(distance);
        __m256bh half = _mm512_cvtneps_pbh(scaled ? times(raised, w->value_scales + i) : raised);
        memcpy(w->weights + row * BLOCK + i, &half, sizeof half);
        added = _mm512_add_ps(added, raised);
    }
    float by = before == *largest ? 1.0f : power(before - *largest);
    w->sums.sum[row] = w->sums.sum[row] * by + _mm512_reduce_add_ps(added);
    return by;
}

static float soften_pairs(Work *w, long row, long first, long last, long padded) {
    if (w->plan->batch.dtype == KV_INT8) return soften_wide(w, row, first, last, padded, 1);
    return soften_wide(w, row, first, last, padded, 0);
}

static void score_pairs(Work *w, long num_keys) {
    long depth = w->plan->heads.head_dim / 2;
    int32_t *panels = (int32_t *)w->panels;
    w->plan->batch.dtype == KV_INT8 ? load_key_codes(w, num_keys, panels)
                                    : load_key_pairs(w, num_keys, panels);
    product_of_pairs((const int32_t *)w->q, PAIR_ROWS, 1, PAIR_ROWS * depth, panels,
                     PAIR_PANEL * depth, w->scores, BLOCK, w->rows, num_keys / PAIR_LANES, depth, 0);
}

INLINE void weigh_rows(Work *w, long num_keys, int dtype) {
    long bytes = kv_row_bytes(w->plan->heads.head_dim, dtype);
    for (long k = 0; k < num_keys; k++) ask_for(w->next.values[k], bytes);
#define CASE(R) \
    case R: weigh_few(w, num_keys, R, dtype); return;
    switch (w->rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
    }
#undef CASE
    int32_t *panels = (int32_t *)w->panels;
    load_value_pairs(w, num_keys, dtype, panels);
    product_of_pairs((const int32_t *)w->weights, 1, BLOCK / 2, 0, panels, PAIR_PANEL * (BLOCK / 2),
                     w->sums.values, w->width, w->rows, w->width / PAIR_LANES, (num_keys + 1) / 2,
                     1);
}

static void weigh_pairs(Work *w, long num_keys) {
    w->plan->batch.dtype == KV_INT8 ? weigh_rows(w, num_keys, KV_INT8)
                                    : weigh_rows(w, num_keys, KV_BFLOAT);
}

#else
#define load_query_pairs load_queries
#define score_pairs score
#define soften_pairs soften
#define weigh_pairs weigh
#define store_pairs_row(w, from, by, to) (void)(from)
#endif

#endif
