/* A weight as its kernel wants it, made once at load; and how any such kernel is called. */
#ifndef SAGELLM_LINEAR_H
#define SAGELLM_LINEAR_H

typedef struct Linear Linear;

/* out[m][n] = sum_k x[m][k] * weight[n][k] + bias[n], of this thread's share of rows or columns.
 *
 * All `threads` threads of a team call it with the same arguments; none reads what another writes,
 * so that no barrier is needed inside. Rows of x and out are ldx and ldo floats apart. */
typedef void multiply(const Linear *linear, const float *x, long ldx, float *out, long ldo,
                      long num_rows, int number, int threads);

struct Linear {
    multiply *run;
    multiply *gated; /* silu(first half of the columns) * second half, num_cols / 2; or NULL */
    const void *weight; /* in the kernel's own order */
    const void *scales; /* of quantised weights, else NULL */
    const void *zeros;  /* of asymmetric ones, else NULL */
    const float *bias;  /* or NULL */
    long num_cols, k;
    long group; /* weights along k that share a scale; 0: none */
};

#endif
