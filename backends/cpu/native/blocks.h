/* The working memory of a thread in attention, and loading blocks of keys and values into its
 * cache. */
#ifndef SAGELLM_BLOCKS_H
#define SAGELLM_BLOCKS_H

#include <math.h>

#include "attention.h"
#include "matrix.h"

/* The state of an online softmax, per row: largest score, sum of exponentials, weighted values. */
typedef struct {
    float *largest, *sum, *values;
} Sums;

/* The addresses of the keys and values of a block. Keys that no row may see point to zeros. */
typedef struct {
    const char *keys[BLOCK], *values[BLOCK];
} Rows;

typedef struct {
    const Attention *plan;
    const Layer *layer;
    const Tile *tile;
    long head, rows, width;
    int by_tiles; /* whether this tile has rows enough for tiles of the CPU */
    float *q, *scores, *panels, *zeros; /* panels hold a block's keys, and later its values */
    uint16_t *weights;                  /* rounded scores, for products of bfloat16 pairs */
    float key_scales[BLOCK], value_scales[BLOCK]; /* of a block in 8 bits */
    Sums sums, total;
    Rows rows_at, next; /* the addresses of this block and of the next one */
    const Piece *later; /* the thread's next piece, for KV head `later_head`; NULL if unknown */
    long later_head;
} Work;

/* Find the addresses of keys `first` to `last` (exclusive) of the block at `start`. */
static void find_rows(const Work *w, long start, long first, long last, Rows *rows) {
    const Batch *b = &w->plan->batch;
    const Heads *h = &w->plan->heads;
    const int32_t *table = w->layer->tables + w->tile->sequence * b->table_len;
    long row_bytes = kv_row_bytes(h->head_dim, b->dtype);
    const char *nothing = (const char *)w->zeros;
    for (long i = 0; i < first - start; i++) rows->keys[i] = rows->values[i] = nothing;
    for (long i = last - start; i < BLOCK; i++) rows->keys[i] = rows->values[i] = nothing;
    for (long at = first, end; at < last; at = end) {
        long block = at / b->block_size, offset = at % b->block_size;
        end = at - offset + b->block_size < last ? at - offset + b->block_size : last;
        long row = (table[block] * h->kv_heads + w->head) * b->block_size + offset;
        const char *key = (const char *)w->layer->keys + row * row_bytes;
        const char *value = (const char *)w->layer->values + row * row_bytes;
        for (long i = at - start; i < end - start; i++, key += row_bytes, value += row_bytes)
            rows->keys[i] = key, rows->values[i] = value;
    }
}

/* The query of a row of the tile. Rows are ordered by new token, then by head of the group. */
INLINE const float *query(const Work *w, long row) {
    const Heads *h = &w->plan->heads;
    long group = h->heads / h->kv_heads;
    return w->layer->q + (w->tile->row + row / group) * w->layer->ldq +
           (w->head * group + row % group) * h->head_dim;
}

/* Prefetch a key or a value of the next block. */
INLINE void ask_for(const char *row, long bytes) {
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
}

/* Load the scales of a block in 8 bits. */
static void load_scales(Work *w, long num_keys) {
    long size = w->plan->heads.head_dim;
    for (long k = 0; k < num_keys; k++) w->key_scales[k] = scale_of(w->rows_at.keys[k], size);
    for (long k = 0; k < num_keys; k++) w->value_scales[k] = scale_of(w->rows_at.values[k], size);
}

/* Load keys, or their codes, as the columns of panels, in floats. num_keys is a multiple of
 * LANES. */
INLINE void load_keys(Work *w, long num_keys, int dtype, int whole) {
    long size = w->plan->heads.head_dim, width = w->width, bytes = kv_row_bytes(size, dtype);
    for (long k = 0; k < num_keys; k += LANES) {
        float *to = w->panels + k / PANEL * PANEL * width + k % PANEL;
        for (int l = 0; l < LANES; l++) ask_for(w->next.keys[k + l], bytes);
        for (long i = 0; i < width; i += LANES) {
            vec corner[LANES];
            for (int l = 0; l < LANES; l++)
                corner[l] = load_padded(w->rows_at.keys[k + l], i, size, dtype, whole);
            transpose(corner);
            for (int l = 0; l < LANES; l++) store_float(to + (i + l) * PANEL, corner[l]);
        }
    }
}

/* Load values, or their codes, as the rows of panels, in floats. */
INLINE void load_values(Work *w, long num_keys, int dtype, int whole) {
    long size = w->plan->heads.head_dim, width = w->width, bytes = kv_row_bytes(size, dtype);
    for (long k = 0; k < num_keys; k++) {
        const char *row = w->rows_at.values[k];
        float *to = w->panels + k * PANEL;
        ask_for(w->next.values[k], bytes);
        for (long i = 0; i < width; i += PANEL, to += PANEL * BLOCK) {
            store_float(to, load_padded(row, i, size, dtype, whole));
            if (i + LANES < width)
                store_float(to + LANES, load_padded(row, i + LANES, size, dtype, whole));
        }
    }
}

/* Call `load` with the pool's dtype, and whether head_dim is whole vectors, as constants. */
#define SPECIALISED(load, w, num_keys)                                     \
    switch (2 * w->plan->batch.dtype + (w->plan->heads.head_dim == w->width)) { \
        case 2 * KV_FLOAT: load(w, num_keys, KV_FLOAT, 0); break;          \
        case 2 * KV_FLOAT + 1: load(w, num_keys, KV_FLOAT, 1); break;      \
        case 2 * KV_BFLOAT: load(w, num_keys, KV_BFLOAT, 0); break;        \
        case 2 * KV_BFLOAT + 1: load(w, num_keys, KV_BFLOAT, 1); break;    \
        case 2 * KV_INT8: load(w, num_keys, KV_INT8, 0); break;            \
        case 2 * KV_INT8 + 1: load(w, num_keys, KV_INT8, 1); break;        \
    }

/* Load the tile's queries, scaled, in the parts of rows that `product` takes: each part is
 * [width][TILE_ROWS]. */
static void load_queries(Work *w) {
    const Heads *h = &w->plan->heads;
    long parts = num_parts(w->rows);
    for (long part = 0; part < parts; part++) {
        float *to = w->q + part * TILE_ROWS * w->width;
        long first = w->rows * part / parts, last = w->rows * (part + 1) / parts;
        for (long r = first; r < last; r++) {
            const float *from = query(w, r);
            for (long i = 0; i < w->width; i++)
                to[i * TILE_ROWS + r - first] = i < h->head_dim ? from[i] * h->scale : 0.0f;
        }
    }
}

/* scores = queries times keys. num_keys is a multiple of LANES. */
static void score(Work *w, long num_keys) {
    SPECIALISED(load_keys, w, num_keys)
    product(w->q, TILE_ROWS, 1, TILE_ROWS * w->width, w->panels, PANEL * w->width, w->scores, BLOCK,
            w->rows, num_keys / LANES, w->width, 0);
}

static float power(float x) { return lanes_exp(fill(x))[0]; }

/* `soften`. If `scaled`, scores are of codes, and weights will multiply codes. */
INLINE float soften_scaled(Work *w, long row, long first, long last, long padded, int scaled) {
    float *scores = w->scores + row * BLOCK, *largest = w->sums.largest + row;
    if (scaled)
        for (long i = 0; i < padded; i++) scores[i] *= w->key_scales[i];
    for (long i = 0; i < first; i++) scores[i] = -INFINITY;
    for (long i = last; i < padded; i++) scores[i] = -INFINITY;
    vec most = load_float(scores);
    for (long i = LANES; i < padded; i += LANES) {
        vec more = load_float(scores + i);
        most = choose(more > most, more, most);
    }
    float before = *largest, found = lanes_max(most);
    if (found > before) *largest = found;
    vec added = {0};
    for (long i = 0; i < padded; i += LANES) {
        vec raised = lanes_exp(load_float(scores + i) - *largest);
        store_float(scores + i, scaled ? raised * load_float(w->value_scales + i) : raised);
        added += raised;
    }
    float by = before == *largest ? 1.0f : power(before - *largest);
    w->sums.sum[row] = w->sums.sum[row] * by + lanes_sum(added);
    return by;
}

/* Replace a row's scores by exp(score - the largest score so far), and by 0 outside of `first` to
 * `last`. Return the factor that scales the row's earlier sums to the new largest score. */
static float soften(Work *w, long row, long first, long last, long padded) {
    if (w->plan->batch.dtype == KV_INT8) return soften_scaled(w, row, first, last, padded, 1);
    return soften_scaled(w, row, first, last, padded, 0);
}

/* sums += scores times values. */
static void weigh(Work *w, long num_keys) {
    SPECIALISED(load_values, w, num_keys)
    product(w->scores, 1, BLOCK, 0, w->panels, PANEL * BLOCK, w->sums.values, w->width, w->rows,
            w->width / LANES, num_keys, 1);
}

#endif
