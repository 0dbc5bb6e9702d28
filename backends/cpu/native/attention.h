/* Paged attention of a ragged batch, cut into pieces that any thread of a team can compute. */
#ifndef SAGELLM_ATTENTION_H
#define SAGELLM_ATTENTION_H

#include <stdatomic.h>
#include <stdint.h>

#define BLOCK 64  /* keys that are scored at once; a block begins at a multiple of it */
#define SPAN 512  /* keys whose sums are merged as one; a span begins at a multiple of it */
#define MOST 128  /* rows of a tile (new tokens x query heads of a KV head), at least one token */
#define FEW 16    /* threads share the context of a sequence with up to this many new tokens */

typedef struct {
    long heads, kv_heads, head_dim, window; /* window 0: attend to all earlier tokens */
    float scale;
} Heads;

/* The inputs that all layers of a step share. Sequence s has the rows from query_starts[s] to
 * query_starts[s + 1]; the last of these rows is at position context_lens[s] - 1. */
typedef struct {
    long table_len, num_sequences, block_size;
    const int64_t *query_starts, *context_lens;
    int dtype; /* of the pool: KV_FLOAT, KV_BFLOAT or KV_INT8 */
    int tiles; /* whether tiles may multiply: a row's bits then depend on the rows around it */
} Batch;

/* Some new tokens of one sequence, whose first row and position are given. `partial`: index of the
 * sums of the tile's first span, or -1 if one thread computes the whole context. `finished`: index
 * of the tile's counters of finished spans. */
typedef struct {
    long sequence, row, num_tokens, position, partial, num_spans, finished;
} Tile;

/* The work on keys `first` to `last` (exclusive) for one tile; `span`: their number in the tile. */
typedef struct {
    long tile, first, last, span;
} Piece;

/* The plan for one step and one kind of layer. The caller owns its memory. */
typedef struct {
    Heads heads;
    Batch batch;
    Tile *tiles;
    Piece *pieces;
    float *partials;       /* per span and KV head: largest score, sum and values of each row */
    atomic_int *finished;  /* per shared tile and KV head: number of finished spans */
    char *scratch;         /* per thread */
    long lanes; /* keys of a vector: LANES, or PAIR_LANES where products are of bfloat16 pairs */
    int by_tiles; /* whether many rows of bfloat16 pairs are multiplied by tiles */
    long num_tiles, num_pieces, tile_tokens, tile_rows, width; /* width: padded head_dim */
    long num_partials, num_shared, partial_len, scratch_len;
} Attention;

/* The tensors of one layer: q and out [rows, heads * head_dim], with rows ldq and ldo floats apart;
 * keys and values [blocks, kv_heads, block_size], rows of the pool's dtype. */
typedef struct {
    const float *q;
    const void *keys, *values;
    float *out;
    long ldq, ldo;
    const int32_t *tables; /* [sequences, table_len]: the blocks of each sequence */
} Layer;

/* Plan the pieces of a step, and return the bytes of memory that `attention_place` needs. */
long attention_plan(Attention *plan, const Heads *heads, const Batch *batch, int threads);
/* Complete the plan in `memory`, which the caller frees after the last attention_share. */
void attention_place(Attention *plan, char *memory);

/* Compute pieces until none is left. Threads take a piece by incrementing `next`, which starts at
 * `base` and has grown by attention_tickets when all threads have returned. */
void attention_share(const Attention *plan, const Layer *layer, atomic_long *next, long base,
                     int number);
long attention_tickets(const Attention *plan, int threads);

#endif
