/* Kernels that go row by row: norms, silu * mul, rotation with the write to the pool. */
#include <math.h>

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

/* Which of `count` rows are a thread's: first <= row < last. */
static void share_of(long count, int number, int threads, long *first, long *last) {
    *first = count * number / threads;
    *last = count * (number + 1) / threads;
}

typedef struct {
    const float *a, *b, *weight;
    float *sum, *out;
    long lda, ldb, num_rows, width, size;
    float epsilon;
} Norm;

static void norm_rows(void *job, int number, int threads) {
    const Norm *n = job;
    long row, last;
    for (share_of(n->num_rows, number, threads, &row, &last); row < last; row++) {
        const float *from = n->a + row * n->lda;
        if (n->b) {
            float *to = n->sum + row * n->width;
            for (long i = 0; i < n->width; i++) to[i] = from[i] + n->b[row * n->ldb + i];
            from = to;
        }
        for (long i = 0; i < n->width; i += n->size)
            normed(from + i, n->weight, n->out + row * n->width + i, n->size, n->epsilon);
    }
}

/* sum = a + b where b is given (else a is normed); every run of `size` of a row is normed. */
void sage_rms_norm(const float *a, long lda, const float *b, long ldb, const float *weight,
                   float *sum, float *out, long num_rows, long width, long size, float epsilon,
                   int threads) {
    Norm job = {a, b, weight, sum, out, lda, ldb, num_rows, width, size, epsilon};
    team_run(norm_rows, &job, num_rows * width > 16384 ? threads : 1);
}

typedef struct {
    const float *gate, *up;
    float *out;
    long ldg, ldu, num_rows, width;
} SiluMul;

INLINE vec silu_times(vec gate, vec up) { return gate / (lanes_exp(-gate) + 1.0f) * up; }

static void silu_mul_rows(void *job, int number, int threads) {
    const SiluMul *s = job;
    long row, last;
    for (share_of(s->num_rows, number, threads, &row, &last); row < last; row++) {
        const float *g = s->gate + row * s->ldg, *u = s->up + row * s->ldu;
        float *to = s->out + row * s->width;
        long i = 0;
        for (; i + LANES <= s->width; i += LANES)
            store_float(to + i, silu_times(load_float(g + i), load_float(u + i)));
        for (; i < s->width; i++) to[i] = silu_times(fill(g[i]), fill(u[i]))[0];
    }
}

void sage_silu_mul(const float *gate, long ldg, const float *up, long ldu, float *out,
                   long num_rows, long width, int threads) {
    SiluMul job = {gate, up, out, ldg, ldu, num_rows, width};
    team_run(silu_mul_rows, &job, num_rows * width > 8192 ? threads : 1);
}

/* Halves rotated: (a, b) -> (a cos - b sin, b cos + a sin). */
static void rotate(const float *head, const float *cosine, const float *sine, void *out, long size,
                   int bfloat) {
    long half = size / 2;
    for (long i = 0; i < half; i++) {
        float a = head[i], b = head[half + i];
        store_one(out, i, a * cosine[i] - b * sine[i], bfloat);
        store_one(out, half + i, b * cosine[i] + a * sine[i], bfloat);
    }
}

static void copy(const float *head, void *out, long size, int bfloat) {
    for (long i = 0; i < size; i++) store_one(out, i, head[i], bfloat);
}

/* keys, values: one layer of the pool, [blocks, kv_heads, block_size, head_dim].
 * tables: [positions, 2, head_dim / 2], cosines then sines. */
void sage_rope_kv_write(const float *q, long ldq, const float *k, long ldk, const float *v,
                        long ldv, const float *tables, const int64_t *positions,
                        const int64_t *slots, float *out, void *keys, void *values, int bfloat,
                        long num_rows, long heads, long kv_heads, long head_dim, long block_size) {
    long itemsize = bfloat ? 2 : 4;
    for (long row = 0; row < num_rows; row++) {
        const float *cosine = tables + positions[row] * head_dim, *sine = cosine + head_dim / 2;
        for (long h = 0; h < heads; h++)
            rotate(q + row * ldq + h * head_dim, cosine, sine,
                   out + (row * heads + h) * head_dim, head_dim, 0);
        long block = slots[row] / block_size, offset = slots[row] % block_size;
        for (long h = 0; h < kv_heads; h++) {
            long at = ((block * kv_heads + h) * block_size + offset) * head_dim * itemsize;
            rotate(k + row * ldk + h * head_dim, cosine, sine, (char *)keys + at, head_dim, bfloat);
            copy(v + row * ldv + h * head_dim, (char *)values + at, head_dim, bfloat);
        }
    }
}
