/* One forward step as a flat list of instructions, which a team of threads runs without returning
 * to Python. */
#ifndef SAGELLM_STEP_H
#define SAGELLM_STEP_H

#include "attention.h"
#include "linear.h"

typedef enum {
    EMBEDDING,
    SELECT_ROWS,
    RMS_NORM,
    ADD_RMS_NORM,
    LINEAR,
    GATED_LINEAR, /* out[1]: scratch for gate and up, if the linear has no gated kernel */
    ROPE,
    KV_WRITE,
    ROPE_KV_WRITE,
    PAGED_ATTENTION,
    OP_ADD,
    OP_MUL,
    OP_SILU,
    OP_SILU_MUL
} Op;

/* A matrix in a buffer. The matrix begins at `column` of the buffer's rows, which are `width`
 * floats apart. The buffer begins first * capacity floats into the arena. A negative `first` stands
 * for the tensor of the logits. */
typedef struct {
    long first, column, width;
} View;

typedef struct {
    int32_t op;
    int32_t waits;   /* whether threads wait until all have finished the earlier instructions */
    int32_t chosen;  /* whether results have a row per row of logits, not per new token */
    int32_t table_form; /* the TableForm of EMBEDDING */
    View in[3], out[2];
    const void *weight; /* the weight of a norm; the table of EMBEDDING; the Linear of a linear */
    long width;         /* width of the results */
    long size;          /* numbers of a norm; vocabulary of EMBEDDING; head_dim of ROPE, KV_WRITE */
    long layer;
    long table;    /* index into the step's tables (ROPE) or heads (PAGED_ATTENTION) */
    long blocks;   /* which of the block tables of each sequence */
    float epsilon;
} Instruction;

typedef struct {
    const Instruction *instructions;
    const Heads *heads;         /* the kinds of attention */
    const float *const *tables; /* cosines and sines of each kind of ROPE */
    long num_instructions, num_heads;
    /* The inputs of this step. */
    Batch batch;
    const int64_t *token_ids, *positions, *slots, *logit_rows;
    char *pool;
    const int32_t *block_tables; /* first tables of all sequences, then their second tables, ... */
    long layer_bytes, side_bytes, kv_heads, head_dim;
    long num_rows, num_logit_rows;
    float *arena, *logits;
    int64_t *largest; /* for each row of logits, the index of the largest; NULL: not wanted */
    long capacity; /* rows of each buffer */
    int64_t *times; /* when each instruction began, and the step ended, in ns; NULL: not measured */
    /* Memory that C allocates and grows between steps; sage_step_close frees it. */
    char *memory;
    long memory_bytes;
} Step;

enum { DONE, NO_MEMORY, NO_SUCH_TOKEN };

#endif
