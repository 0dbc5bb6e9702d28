/* Kernels that compute row by row, as shares of a team: every thread calls them with the same
 * arguments, and no thread reads what another thread writes. In the structs, lda is the number of
 * floats from one row of `a` to the next; ldb, ldo, ... likewise. */
#ifndef SAGELLM_ROWS_H
#define SAGELLM_ROWS_H

#include <stdint.h>

/* RMSNorm of every `size` consecutive numbers of a row, of sum = a + b if b is given, else of a. */
typedef struct {
    const float *a, *b, *weight;
    float *sum, *out;
    long lda, ldb, lds, ldo, num_rows, width, size;
    float epsilon;
} Norm;
void norm_rows(void *norm, int number, int threads);

typedef enum { ADD, MUL, SILU, SILU_MUL } Pointwise;

/* Element by element. SILU ignores b; out may be the memory of a. */
typedef struct {
    Pointwise kind;
    const float *a, *b;
    float *out;
    long lda, ldb, ldo, num_rows, width;
} Elements;
void pointwise(void *elements, int number, int threads);

/* Keys and values of one layer of the pool: [blocks, kv_heads, block_size], rows of `dtype`. */
typedef struct {
    void *keys, *values;
    long kv_heads, head_dim, block_size;
    int dtype; /* KV_FLOAT, KV_BFLOAT or KV_INT8 */
} Cache;

/* Write rotated q to out; write k and v to their slots, k rotated if there are tables. q may be
 * NULL, and so may k with v. tables: [positions, 2, head_dim / 2], cosines then sines. */
typedef struct {
    const float *q, *k, *v, *tables;
    float *out;
    const int64_t *positions, *slots;
    Cache cache;
    long ldq, ldk, ldv, ldo, num_rows, heads;
} Turn;
void turn_rows(void *turn, int number, int threads);

/* What a table points to. PACKED: a Linear, whose weight has the rows in the order of its kernel. */
typedef enum { FLOAT_ROWS, BFLOAT_ROWS, PACKED } TableForm;

/* Copy the rows `chosen` of a table, with `width` numbers per row. */
typedef struct {
    const void *table;
    const int64_t *chosen;
    float *out;
    long ldt, ldo, num_rows, width;
    TableForm form;
} Pick;
void pick_rows(void *pick, int number, int threads);

#endif
