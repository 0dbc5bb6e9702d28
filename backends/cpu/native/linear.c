/* out[m][n] = sum_k x[m][k] * w[n][k] + bias[n]: weights float or bfloat16, sums in float.
 *
 * The order of additions for one (m, n) is the same whatever the number of rows: eight lanes along
 * k, summed at the end of each chunk of k, chunks added in order. So results are batch-invariant.
 */
#include "team.h"
#include "vector.h"

#define CHUNK 1024  /* of k: 32 rows of x at a time stay in the second-level cache */
#define ROWS 64     /* of x per pass over the weights of a chunk */
#define FEW 4       /* rows for which weights are used once, so not worth unpacking */
#define AHEAD 4     /* tiles: 20 KiB of bfloat16 at k = 896, what memory takes to answer */
#define COLS 3      /* weight rows side by side: 4 x 3 sums fill the registers of AVX2 */

/* `ahead`: the weights are streamed, so those of a later tile are asked for: hardware stops at the
 * end of a page. */
INLINE void tile(const float *x, long ldx, const void *w, long ldw, int bfloat, int ahead,
                 long k_len, int rows, int cols, float *sums) {
    vec acc[FEW][COLS] = {{{0}}};
    long k = 0;
    for (; k + LANES <= k_len; k += LANES) {
        vec wide[COLS];
        for (int c = 0; c < cols; c++) wide[c] = load(w, c * ldw + k, bfloat);
        if (ahead && k % 32 == 0) /* a cache line of bfloat16 */
            for (int c = 0; c < cols; c++)
                __builtin_prefetch((const char *)w +
                                   ((c + AHEAD * COLS) * ldw + k) * (bfloat ? 2 : 4));
        for (int r = 0; r < rows; r++) {
            vec row = load_float(x + r * ldx + k);
            for (int c = 0; c < cols; c++) acc[r][c] = fused(row, wide[c], acc[r][c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) {
            float sum = lanes_sum(acc[r][c]);
            for (long rest = k; rest < k_len; rest++)
                sum = fused_one(x[r * ldx + rest], load_one(w, c * ldw + rest, bfloat), sum);
            sums[r * COLS + c] = sum;
        }
}

/* The shapes of a tile as constants, so that the sums stay in registers. */
INLINE void sized_tile(const float *x, long ldx, const void *w, long ldw, int bfloat, int ahead,
                       long k_len, int rows, int cols, float *sums) {
#define CASE(R, C)                                              \
    case R * 8 + C:                                             \
        tile(x, ldx, w, ldw, bfloat, ahead, k_len, R, C, sums); \
        break;
    switch (rows * 8 + cols) {
        CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(2, 1) CASE(2, 2) CASE(2, 3)
        CASE(3, 1) CASE(3, 2) CASE(3, 3) CASE(4, 1) CASE(4, 2) CASE(4, 3)
    }
#undef CASE
}

typedef struct {
    const float *x;
    long ldx;
    const void *w;
    int bfloat;
    const float *bias;
    float *out;
    long ldo, num_rows, num_cols, k;
} Product;

INLINE void add_tile(const Product *p, long row, long col, long k, const float *sums, int rows,
                     int cols) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) {
            float *out = p->out + (row + r) * p->ldo + col + c;
            float before = k ? *out : (p->bias ? p->bias[col + c] : 0.0f);
            *out = before + sums[r * COLS + c];
        }
}

static long least(long a, long b) { return a < b ? a : b; }

/* Columns first .. last, few rows: weights stream through the registers once. */
INLINE void few_rows(const Product *p, long first, long last, int bfloat) {
    float sums[FEW * COLS];
    for (long col = first; col < last; col += COLS)
        for (long k = 0; k < p->k; k += CHUNK) {
            int cols = (int)least(COLS, last - col);
            const char *w = (const char *)p->w + (col * p->k + k) * (bfloat ? 2 : 4);
            sized_tile(p->x + k, p->ldx, w, p->k, bfloat, 1, least(CHUNK, p->k - k),
                       (int)p->num_rows, cols, sums);
            add_tile(p, 0, col, k, sums, (int)p->num_rows, cols);
        }
}

static void unpack(float *to, const Product *p, long col, long k, int cols, long k_len) {
    for (int c = 0; c < cols; c++) {
        long from = (col + c) * p->k + k;
        for (long i = 0; i < k_len; i++) to[c * CHUNK + i] = load_one(p->w, from + i, p->bfloat);
    }
}

/* Columns first .. last, many rows: weights are unpacked once for ROWS rows. */
static void many_rows(const Product *p, long first, long last) {
    float wide[COLS * CHUNK], sums[FEW * COLS];
    for (long top = 0; top < p->num_rows; top += ROWS)
        for (long k = 0; k < p->k; k += CHUNK)
            for (long col = first; col < last; col += COLS) {
                int cols = (int)least(COLS, last - col);
                long k_len = least(CHUNK, p->k - k), end = least(top + ROWS, p->num_rows);
                unpack(wide, p, col, k, cols, k_len);
                for (long row = top; row < end; row += FEW) {
                    int rows = (int)least(FEW, end - row);
                    const float *x = p->x + row * p->ldx + k;
                    sized_tile(x, p->ldx, wide, CHUNK, 0, 0, k_len, rows, cols, sums);
                    add_tile(p, row, col, k, sums, rows, cols);
                }
            }
}

/* A thread's columns. */
static void columns(void *job, int number, int threads) {
    const Product *p = job;
    long each = (p->num_cols + threads - 1) / threads;
    long first = least(number * each, p->num_cols), last = least(first + each, p->num_cols);
    if (p->num_rows > FEW)
        many_rows(p, first, last);
    else if (p->bfloat)
        few_rows(p, first, last, 1);
    else
        few_rows(p, first, last, 0);
}

void sage_linear(const float *x, long ldx, const void *w, int bfloat, const float *bias,
                 float *out, long ldo, long num_rows, long num_cols, long k, int threads) {
    Product p = {x, ldx, w, bfloat, bias, out, ldo, num_rows, num_cols, k};
    team_run(columns, &p, threads);
}
