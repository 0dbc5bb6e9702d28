#include "rows.h"

#include <math.h>

#include "codes.h"
#include "linear.h"
#include "team.h"
#include "vector.h"

static float mean_square(const float *row, long size) {
    vec acc = {0};
    long i = 0;
    for (; i + LANES <= size; i += LANES) {
        vec value = load_float(row + i);
        acc = fused(value, value, acc);
    }
    float sum = lanes_sum(acc);
    for (; i < size; i++) sum = fused_one(row[i], row[i], sum);
    return sum / (float)size;
}

static void normed(const float *row, const float *weight, float *out, long size, float epsilon) {
    float scale = 1.0f / sqrtf(mean_square(row, size) + epsilon);
    for (long i = 0; i < size; i++) out[i] = row[i] * scale * weight[i];
}

void norm_rows(void *norm, int number, int threads) {
    const Norm *n = norm;
    long row, last;
    for (share_of(n->num_rows, number, threads, &row, &last); row < last; row++) {
        const float *from = n->a + row * n->lda;
        if (n->b) {
            const float *more = n->b + row * n->ldb;
            float *to = n->sum + row * n->lds;
            for (long i = 0; i < n->width; i++) to[i] = from[i] + more[i];
            from = to;
        }
        for (long i = 0; i < n->width; i += n->size)
            normed(from + i, n->weight, n->out + row * n->ldo + i, n->size, n->epsilon);
    }
}

INLINE vec combined(Pointwise kind, vec a, vec b) {
    switch (kind) {
        case ADD: return a + b;
        case MUL: return a * b;
        case SILU: return silu(a);
        default: return silu(a) * b;
    }
}

INLINE void combine(Pointwise kind, const float *a, const float *b, float *out, long size) {
    long i = 0;
    for (; i + LANES <= size; i += LANES)
        store_float(out + i, combined(kind, load_float(a + i), load_float(b + i)));
    for (; i < size; i++) out[i] = combined(kind, fill(a[i]), fill(b[i]))[0];
}

static void combine_some(Pointwise kind, const float *a, const float *b, float *out, long size) {
    switch (kind) {
        case ADD: combine(ADD, a, b, out, size); break;
        case MUL: combine(MUL, a, b, out, size); break;
        case SILU: combine(SILU, a, a, out, size); break;
        case SILU_MUL: combine(SILU_MUL, a, b, out, size); break;
    }
}

/* Threads share whole rows if each gets at least one, else they share each row's vectors. */
void pointwise(void *elements, int number, int threads) {
    const Elements *e = elements;
    long row = 0, last_row = e->num_rows, first = 0, last = e->width;
    if (e->num_rows >= threads) {
        share_of(e->num_rows, number, threads, &row, &last_row);
    } else {
        share_of((e->width + LANES - 1) / LANES, number, threads, &first, &last);
        first *= LANES;
        last = last * LANES < e->width ? last * LANES : e->width;
    }
    for (; row < last_row; row++)
        combine_some(e->kind, e->a + row * e->lda + first, e->b + row * e->ldb + first,
                     e->out + row * e->ldo + first, last - first);
}

/* Rotate the halves of a head: (a, b) -> (a cos - b sin, b cos + a sin). */
INLINE void rotate(const float *head, const float *cosine, const float *sine, void *out, long size,
                   int bfloat) {
    long half = size / 2;
    for (long i = 0; i < half; i++) {
        float a = head[i], b = head[half + i];
        store_one(out, i, a * cosine[i] - b * sine[i], bfloat);
        store_one(out, half + i, b * cosine[i] + a * sine[i], bfloat);
    }
}

INLINE void copy(const float *head, void *out, long size, int bfloat) {
    for (long i = 0; i < size; i++) store_one(out, i, head[i], bfloat);
}

/* Write a key or a value to the pool, rotated if there are cosines. */
INLINE void write_one(const float *head, const float *cosine, void *out, long size, int dtype) {
    float turned[dtype == KV_INT8 ? size : 1]; /* head_dim is small */
    void *to = dtype == KV_INT8 ? turned : out;
    int bfloat = dtype == KV_BFLOAT;
    if (cosine)
        rotate(head, cosine, cosine + size / 2, to, size, bfloat);
    else
        copy(head, to, size, bfloat);
    if (dtype == KV_INT8) write_codes(turned, out, size);
}

/* Write the key and the value of one row and KV head to their slot. */
INLINE void write_head(const Turn *t, long row, long head, const float *cosine, int dtype) {
    const Cache *c = &t->cache;
    long size = c->head_dim, block = t->slots[row] / c->block_size;
    long offset = t->slots[row] % c->block_size;
    long at = ((block * c->kv_heads + head) * c->block_size + offset) * kv_row_bytes(size, dtype);
    const float *key = t->k + row * t->ldk + head * size;
    write_one(key, cosine, (char *)c->keys + at, size, dtype);
    write_one(t->v + row * t->ldv + head * size, NULL, (char *)c->values + at, size, dtype);
}

static void write_some(const Turn *t, long row, long head, const float *cosine) {
    switch (t->cache.dtype) {
        case KV_FLOAT: write_head(t, row, head, cosine, KV_FLOAT); break;
        case KV_BFLOAT: write_head(t, row, head, cosine, KV_BFLOAT); break;
        case KV_INT8: write_head(t, row, head, cosine, KV_INT8); break;
    }
}

void turn_rows(void *turn, int number, int threads) {
    const Turn *t = turn;
    long size = t->cache.head_dim, turned = t->q ? t->heads : 0, one, last;
    long each = turned + (t->k ? t->cache.kv_heads : 0);
    for (share_of(t->num_rows * each, number, threads, &one, &last); one < last; one++) {
        long row = one / each, head = one % each;
        const float *cosine = t->tables ? t->tables + t->positions[row] * size : NULL;
        if (head < turned)
            rotate(t->q + row * t->ldq + head * size, cosine, cosine + size / 2,
                   t->out + row * t->ldo + head * size, size, 0);
        else
            write_some(t, row, head - turned, cosine);
    }
}

void pick_rows(void *pick, int number, int threads) {
    const Pick *p = pick;
    const Linear *packed = p->table;
    long row, last;
    for (share_of(p->num_rows, number, threads, &row, &last); row < last; row++) {
        long from = p->chosen[row] * p->ldt;
        float *to = p->out + row * p->ldo;
        switch (p->form) {
            case FLOAT_ROWS:
                memcpy(to, (const float *)p->table + from, sizeof(float) * p->width);
                break;
            case BFLOAT_ROWS:
                for (long i = 0; i < p->width; i++) to[i] = load_one(p->table, from + i, 1);
                break;
            case PACKED: packed->row(packed, p->chosen[row], to); break;
        }
    }
}

/* Below: the same kernels as single calls from Python, with dense results. A kernel that is too
 * small to be worth waking helpers runs on the caller alone. */

void sage_rms_norm(const float *a, long lda, const float *b, long ldb, const float *weight,
                   float *sum, float *out, long num_rows, long width, long size, float epsilon,
                   int threads) {
    Norm job = {a, b, weight, sum, out, lda, ldb, width, width, num_rows, width, size, epsilon};
    team_run(norm_rows, &job, num_rows * width > 16384 ? threads : 1);
}

void sage_silu_mul(const float *gate, long ldg, const float *up, long ldu, float *out,
                   long num_rows, long width, int threads) {
    Elements job = {SILU_MUL, gate, up, out, ldg, ldu, width, num_rows, width};
    team_run(pointwise, &job, num_rows * width > 8192 ? threads : 1);
}

void sage_rope_kv_write(const float *q, long ldq, const float *k, long ldk, const float *v,
                        long ldv, const float *tables, const int64_t *positions,
                        const int64_t *slots, float *out, void *keys, void *values, int dtype,
                        long num_rows, long heads, long kv_heads, long head_dim, long block_size) {
    Cache cache = {keys, values, kv_heads, head_dim, block_size, dtype};
    Turn job = {q, k, v, tables, out, positions, slots, cache, ldq, ldk, ldv, heads * head_dim,
                num_rows, heads};
    turn_rows(&job, 0, 1);
}
