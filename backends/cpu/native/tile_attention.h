/* Attention of many rows by tiles, over the panels of block_pairs.h.
 *
 * A product of tiles takes long, but occupies none of the units that compute exponentials. So the
 * rows of a block pass in a pipeline of AMX_ROWS each: while the CPU multiplies for the rows after
 * and before them, some rows get their softmax. */
#ifndef SAGELLM_TILE_ATTENTION_H
#define SAGELLM_TILE_ATTENTION_H

#include "block_pairs.h"
#include "tiles.h"

#if TILES && defined(__AVX512BF16__)
#define TILED_ATTENTION 1

#define TILED_FROM 9 /* rows; for fewer, vectors need no panels of values */

/* Load the tile's queries, scaled and rounded: [rows / AMX_ROWS, head_dim / AMX_K, AMX_ROWS,
 * AMX_K]. */
static void load_query_tiles(Work *w) {
    const Heads *h = &w->plan->heads;
    uint16_t *to = (uint16_t *)w->q;
    for (long row = 0; row < w->rows; row += AMX_ROWS)
        for (long i = 0; i < h->head_dim; i += AMX_K)
            for (long r = row; r < row + AMX_ROWS; r++, to += AMX_K) {
                float scaled[AMX_K] = {0};
                for (long j = 0; r < w->rows && j < AMX_K; j++)
                    scaled[j] = query(w, r)[i + j] * h->scale;
                round_all(scaled, to, AMX_K);
            }
}

/* Numbers of bfloat16 as left factors: a tile has AMX_ROWS rows, `apart` bytes apart, and the next
 * AMX_K columns are `step` bytes later. */
typedef struct {
    const void *first;
    long apart, step;
} Left;

/* sums (AMX_ROWS rows, ldc floats apart) = left times one or two panels, `panel_len` pairs apart;
 * added to the sums if `add`. `depth`: tiles along k. */
INLINE void panels_by_tiles(Left left, const int32_t *panel, long panel_len, long depth,
                            float *sums, long ldc, int has_two, int add) {
    const char *a = left.first;
    const long stride = PAIR_PANEL * (long)sizeof *panel, out = ldc * (long)sizeof *sums;
    if (add) {
        TILE_LOAD(0, sums, out);
        TILE_LOAD(1, sums + WIDE, out);
        if (has_two) TILE_LOAD(2, sums + 2 * WIDE, out);
        if (has_two) TILE_LOAD(3, sums + 3 * WIDE, out);
    } else {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
    }
    for (long i = 0; i < depth; i++, a += left.step, panel += AMX_ROWS * PAIR_PANEL) {
        TILE_LOAD(4, a, left.apart);
        TILE_LOAD(5, panel, stride);
        TILE_DOT_BF16(0, 4, 5);
        TILE_LOAD(6, panel + WIDE, stride);
        TILE_DOT_BF16(1, 4, 6);
        if (has_two) {
            TILE_LOAD(5, panel + panel_len, stride);
            TILE_DOT_BF16(2, 4, 5);
            TILE_LOAD(6, panel + panel_len + WIDE, stride);
            TILE_DOT_BF16(3, 4, 6);
        }
    }
    TILE_STORE(0, sums, out);
    TILE_STORE(1, sums + WIDE, out);
    if (has_two) TILE_STORE(2, sums + 2 * WIDE, out);
    if (has_two) TILE_STORE(3, sums + 3 * WIDE, out);
}

INLINE void product_by_tiles(Left left, const int32_t *panels, long panel_len, long depth,
                             float *sums, long ldc, long num_panels, int add) {
    for (long p = 0; p < num_panels; p += 2, sums += 2 * PAIR_PANEL, panels += 2 * panel_len) {
        if (p + 1 < num_panels)
            panels_by_tiles(left, panels, panel_len, depth, sums, ldc, 1, add);
        else
            panels_by_tiles(left, panels, panel_len, depth, sums, ldc, 0, add);
    }
}

static int32_t *key_panels(const Work *w) { return (int32_t *)w->panels; }

static int32_t *value_panels(const Work *w) { return key_panels(w) + BLOCK * w->width / 2; }

/* The number of keys that tiles take: a whole number of panels. Those after the last are zeros. */
static long whole_panels(long num_keys) {
    return (num_keys + PAIR_PANEL - 1) / PAIR_PANEL * PAIR_PANEL;
}

/* Load the panels of `num_keys` keys and values, which product_by_tiles reads. */
static void load_panels(Work *w, long num_keys) {
    int dtype = w->plan->batch.dtype;
    long bytes = kv_row_bytes(w->plan->heads.head_dim, dtype);
    for (long k = 0; k < num_keys; k++) ask_for(w->next.values[k], bytes);
    if (dtype == KV_INT8) {
        load_scales(w, num_keys);
        load_key_codes(w, num_keys, key_panels(w));
        load_value_pairs(w, num_keys, KV_INT8, value_panels(w));
    } else {
        load_key_pairs(w, num_keys, key_panels(w));
        load_value_pairs(w, num_keys, KV_BFLOAT, value_panels(w));
    }
}

/* Score AMX_ROWS rows from `row` on. */
static void score_by_tiles(Work *w, long row, long num_keys) {
    const uint16_t *q = (const uint16_t *)w->q + row * w->width;
    Left left = {q, AMX_BYTES, AMX_ROWS * AMX_BYTES};
    product_by_tiles(left, key_panels(w), PAIR_PANEL * w->width / 2, w->width / AMX_K,
                     w->scores + row * BLOCK, BLOCK, num_keys / PAIR_PANEL, 0);
}

/* Add the weighted values of AMX_ROWS rows from `row` on. */
static void weigh_by_tiles(Work *w, long row, long num_keys) {
    Left left = {w->weights + row * BLOCK, BLOCK * (long)sizeof *w->weights, AMX_BYTES};
    product_by_tiles(left, value_panels(w), PAIR_PANEL * (BLOCK / 2), num_keys / AMX_K,
                     w->sums.values + row * w->width, w->width, w->width / PAIR_PANEL, 1);
}

#else
#define TILED_ATTENTION 0
#define TILED_FROM MOST
#define load_query_tiles load_queries
#endif

#endif
