/* A packed weight with its kernel, and the signature of such kernels. */
#ifndef SAGELLM_LINEAR_H
#define SAGELLM_LINEAR_H

typedef struct Linear Linear;

/* out[m][n] = sum_k x[m][k] * weight[n][k] + bias[n], for this thread's share of rows or columns.
 *
 * All `threads` threads of a team call it, each with its own `number`. No thread reads what another
 * writes, so no barrier is needed. Rows of x are ldx floats apart, and rows of out ldo floats. */
typedef void multiply(const Linear *linear, const float *x, long ldx, float *out, long ldo,
                      long num_rows, int number, int threads);

/* Write weight[n][0 .. k) to `out`, as floats, in ascending order of k. */
typedef void look_up(const Linear *linear, long n, float *out);

struct Linear {
    multiply *run;
    multiply *gated; /* writes silu(first half of columns) * second half; NULL: no such kernel */
    look_up *row;    /* for an embedding that shares the weight; NULL: no such kernel */
    const void *weight; /* in the kernel's order */
    const void *scales; /* NULL: the weight is not quantised */
    const void *zeros;  /* NULL: not quantised, or every zero is the code of 0.0 */
    const float *bias;  /* NULL: no bias */
    long num_cols, k;
    long group; /* numbers along k that share a scale; 0: the weight is not quantised */
};

/* Prefetch the first weights of this thread's share of a product with one row, so that the memory
 * is not idle while threads wait for each other. */
void linear_warm(const Linear *linear, int gated, int number, int threads);

#endif
