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
    GATED_LINEAR, /* out[1]: room for what it multiplies to where its kernel does not gate */
    ROPE,
    KV_WRITE,
    ROPE_KV_WRITE,
    PAGED_ATTENTION,
    OP_ADD,
    OP_MUL,
    OP_SILU,
    OP_SILU_MUL
} Op;

/* A matrix: its rows lie `width` floats apart, `column` floats into those of a buffer. A buffer
 * begins `first` floats a row into the arena; below 0, it is that of the logits. */
typedef struct {
    long first, column, width;
} View;

typedef struct {
    int32_t op;
    int32_t waits;   /* for all threads to have ended what came before */
    int32_t chosen;  /* it has a row for each row of logits, not for each new token */
    int32_t bfloat;  /* the weight of EMBEDDING */
    View in[3], out[2];
    const void *weight; /* of norms and EMBEDDING; Linear of linears */
    long width;         /* of its results */
    long size;          /* runs that are normed; rows of EMBEDDING; head_dim of ROPE and KV_WRITE */
    long layer;
    long table;    /* which angles, or which kind of attention */
    long blocks;   /* which block table of each sequence */
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
    const int32_t *block_tables; /* of all sequences for the first table, then for the next */
    long layer_bytes, side_bytes, kv_heads, head_dim;
    long num_rows, num_logit_rows;
    float *arena, *logits;
    long capacity; /* rows of each buffer */
    int64_t *times; /* when each instruction ended, or NULL */
    /* grown by the step, freed by sage_step_close */
    char *memory;
    long memory_bytes;
} Step;

enum { DONE, NO_MEMORY, NO_SUCH_TOKEN };

#endif
