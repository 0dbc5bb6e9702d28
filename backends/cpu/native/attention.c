/* Attention of each row over the blocks of its sequence, read where they lie in the pool.
 *
 * A row's result depends on its query and its context alone, in one order of additions: it is the
 * same bits whatever else is in the batch.
 */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "team.h"
#include "vector.h"

typedef struct {
    const float *q;
    const void *keys, *values; /* one layer: [blocks, kv_heads, block_size, head_dim] */
    int bfloat;
    const int32_t *tables;
    long table_len;
    const int64_t *sequences, *positions;
    float *out;
    long num_rows, heads, kv_heads, head_dim, block_size, window;
    float scale;
    atomic_long next; /* of row * kv_heads + head: contexts differ, so threads take what is left */
    atomic_int failed;
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

static void groups(void *job, int number, int threads) {
    (void)number, (void)threads;
    Attention *a = job;
    long stride = (a->table_len * a->block_size + LANES) / LANES * LANES, next;
    float *scores = malloc(sizeof(float) * stride * (a->heads / a->kv_heads));
    if (!scores) {
        atomic_store(&a->failed, 1);
        return;
    }
    while ((next = atomic_fetch_add(&a->next, 1)) < a->num_rows * a->kv_heads)
        if (a->bfloat)
            group(a, next / a->kv_heads, next % a->kv_heads, scores, stride, 1);
        else
            group(a, next / a->kv_heads, next % a->kv_heads, scores, stride, 0);
    free(scores);
}

/* Returns 0, or 1 if memory for the scores of one row ran out. */
int sage_attention(const float *q, const void *keys, const void *values, int bfloat,
                   const int32_t *tables, long table_len, const int64_t *sequences,
                   const int64_t *positions, float *out, long num_rows, long heads, long kv_heads,
                   long head_dim, long block_size, float scale, long window, int threads) {
    Attention job = {.q = q, .keys = keys, .values = values, .bfloat = bfloat, .tables = tables,
                     .table_len = table_len, .sequences = sequences, .positions = positions,
                     .out = out, .num_rows = num_rows, .heads = heads, .kv_heads = kv_heads,
                     .head_dim = head_dim, .block_size = block_size, .window = window,
                     .scale = scale};
    team_run(groups, &job, threads);
    return atomic_load(&job.failed);
}
