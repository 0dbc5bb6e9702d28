/* A weight in the order of its kernel, packed once at load; and the signature of such kernels. */
#ifndef SAGELLM_LINEAR_H
#define SAGELLM_LINEAR_H

typedef struct Linear Linear;

/* out[m][n] = sum_k x[m][k] * weight[n][k] + bias[n], for this thread's share of rows or columns.
 *
 * All `threads` threads of a team call it with the same arguments. No thread reads what another
 * writes, so that it needs no barrier. Rows of x and out are ldx and ldo floats apart. */
typedef void multiply(const Linear *linear, const float *x, long ldx, float *out, long ldo,
                      long num_rows, int number, int threads);

struct Linear {
    multiply *run;
    multiply *gated; /* silu(first half of the columns) * second half, num_cols / 2; or NULL */
    const void *weight; /* in the kernel's order */
    const void *scales; /* of a quantised weight, else NULL */
    const void *zeros;  /* of a quantised weight with zeros, else NULL */
    const float *bias;  /* or NULL */
    long num_cols, k;
    long group; /* numbers along k that share a scale; 0: there are no scales */
};

#endif
