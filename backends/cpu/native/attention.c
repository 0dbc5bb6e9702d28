/* Attention of each row over the blocks of its sequence, read where they lie in the pool.
 *
 * A row's result depends on its query and its context alone, in one order of additions: it is the
 * same bits whatever else is in the batch.
 */
#include <math.h>
#include <stdlib.h>

#include "vector.h"

typedef struct {
    const float *q;
    const void *keys, *values; /* one layer: [blocks, kv_heads, block_size, head_dim] */
    int bfloat;
    const int32_t *tables;
    long table_len;
    const int64_t *sequences, *positions;
    float *out;
    long heads, kv_heads, head_dim, block_size, window;
    float scale;
} Attention;

INLINE float dot(const float *a, const void *b, long from, long size, int bfloat) {
    vec acc = {0};
    long i = 0;
    for (; i + LANES <= size; i += LANES)
        acc = fused(load_float(a + i), load(b, from + i, bfloat), acc);
    float sum = lanes_sum(acc);
    for (; i < size; i++) sum = fused_one(a[i], load_one(b, from + i, bfloat), sum);
    return sum;
}

INLINE void add_scaled(float *out, const void *row, long from, float by, long size, int bfloat) {
    long i = 0;
    for (; i + LANES <= size; i += LANES)
        store_float(out + i, fused(load(row, from + i, bfloat), fill(by), load_float(out + i)));
    for (; i < size; i++) out[i] = fused_one(load_one(row, from + i, bfloat), by, out[i]);
}

/* In place: scores -> exp(score - largest); returns their sum. Padded to whole vectors. */
static float softmax(float *scores, long count) {
    float largest = scores[0];
    for (long i = 1; i < count; i++) largest = scores[i] > largest ? scores[i] : largest;
    while (count % LANES) scores[count++] = -INFINITY;
    vec sum = {0};
    for (long i = 0; i < count; i += LANES) {
        vec power = lanes_exp(load_float(scores + i) - largest);
        store_float(scores + i, power);
        sum += power;
    }
    return lanes_sum(sum);
}

INLINE long place(const Attention *a, const int32_t *table, long head, long position) {
    long block = table[position / a->block_size], offset = position % a->block_size;
    return ((block * a->kv_heads + head) * a->block_size + offset) * a->head_dim;
}

/* The query heads of one row that share one KV head. `scores`: group x stride. */
INLINE void group(const Attention *a, long row, long head, float *scores, long stride, int bfloat) {
    long size = a->head_dim, members = a->heads / a->kv_heads;
    long position = a->positions[row], first = 0;
    if (a->window && position >= a->window) first = position - a->window + 1;
    long count = position + 1 - first;
    const int32_t *table = a->tables + a->sequences[row] * a->table_len;
    const float *q = a->q + (row * a->heads + head * members) * size;
    float *out = a->out + (row * a->heads + head * members) * size;
    for (long i = 0; i < count; i++) {
        long at = place(a, table, head, first + i);
        for (long m = 0; m < members; m++)
            scores[m * stride + i] = a->scale * dot(q + m * size, a->keys, at, size, bfloat);
    }
    memset(out, 0, sizeof(float) * members * size);
    for (long m = 0; m < members; m++) {
        float by = 1.0f / softmax(scores + m * stride, count);
        for (long i = 0; i < count; i++) scores[m * stride + i] *= by;
    }
    for (long i = 0; i < count; i++) {
        long at = place(a, table, head, first + i);
        for (long m = 0; m < members; m++)
            add_scaled(out + m * size, a->values, at, scores[m * stride + i], size, bfloat);
    }
}

/* Returns 0, or 1 if memory for the scores of one row ran out. */
int sage_attention(const float *q, const void *keys, const void *values, int bfloat,
                   const int32_t *tables, long table_len, const int64_t *sequences,
                   const int64_t *positions, float *out, long num_rows, long heads, long kv_heads,
                   long head_dim, long block_size, float scale, long window, int threads) {
    Attention a = {q,   keys,  values,   bfloat,   tables,     table_len, sequences, positions,
                   out, heads, kv_heads, head_dim, block_size, window,    scale};
    long stride = (table_len * block_size + LANES) / LANES * LANES;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *scores = malloc(sizeof(float) * stride * (heads / kv_heads));
        failed |= scores == NULL;
#pragma omp for collapse(2) schedule(dynamic)
        for (long row = 0; row < num_rows; row++)
            for (long head = 0; head < kv_heads; head++) {
                if (!scores) continue;
                if (bfloat)
                    group(&a, row, head, scores, stride, 1);
                else
                    group(&a, row, head, scores, stride, 0);
            }
        free(scores);
    }
    return failed;
}
