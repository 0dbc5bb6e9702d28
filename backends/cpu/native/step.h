/* One forward step as a flat list of instructions, run by a team without leaving C. */
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
    GATED_LINEAR, /* out[1]: scratch for the products, if its kernel has no gated form */
    ROPE,
    KV_WRITE,
    ROPE_KV_WRITE,
    PAGED_ATTENTION,
    OP_ADD,
    OP_MUL,
    OP_SILU,
    OP_SILU_MUL
} Op;

/* A matrix in a buffer: it begins at `column` of the buffer's rows, which are `width` floats apart.
 * The buffer begins `first` floats a row into the arena; `first` below 0 means the logits. */
typedef struct {
    long first, column, width;
} View;

typedef struct {
    int32_t op;
    int32_t waits;   /* until all threads have finished the earlier instructions */
    int32_t chosen;  /* its results have a row for each row of logits, not for each new token */
    int32_t bfloat;  /* whether the weight of EMBEDDING is bfloat16 */
    View in[3], out[2];
    const void *weight; /* of a norm or EMBEDDING; the Linear of a linear */
    long width;         /* of its results */
    long size;          /* numbers of a norm; rows of EMBEDDING; head_dim of ROPE, KV_WRITE */
    long layer;
    long table;    /* index into the step's tables (ROPE) or heads (PAGED_ATTENTION) */
    long blocks;   /* index of the block table of each sequence */
    float epsilon;
} Instruction;

typedef struct {
    const Instruction *instructions;
    const Heads *heads;         /* kinds of attention */
    const float *const *tables; /* angles of each kind of ROPE */
    long num_instructions, num_heads;
    /* of this step */
    Batch batch;
    const int64_t *token_ids, *positions, *slots, *logit_rows;
    char *pool;
    const int32_t *block_tables; /* the first tables of all sequences, then the second ones, ... */
    long layer_bytes, side_bytes, kv_heads, head_dim;
    long num_rows, num_logit_rows;
    float *arena, *logits;
    long capacity; /* rows of each buffer */
    int64_t *times; /* when each instruction ended, or NULL */
    /* Memory that C allocates and grows between steps; sage_step_close frees it. */
    char *memory;
    long memory_bytes;
} Step;

enum { DONE, NO_MEMORY, NO_SUCH_TOKEN };

#endif
