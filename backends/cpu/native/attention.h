/* Paged attention of a ragged batch, in pieces that any thread of a team can take. */
#ifndef SAGELLM_ATTENTION_H
#define SAGELLM_ATTENTION_H

#include <stdatomic.h>
#include <stdint.h>

#define BLOCK 64  /* keys at a time; begins at multiples of it */
#define SPAN 512  /* keys that one thread sums up before sums are brought together; ditto */
#define MOST 128  /* rows of a tile (new tokens x query heads of one KV head) where there is choice */
#define FEW 16    /* new tokens of a sequence up to which its context may be shared by threads */

typedef struct {
    long heads, kv_heads, head_dim, window; /* 0: none */
    float scale;
} Heads;

/* What all layers of a step share. Sequence s has the rows query_starts[s] .. [s + 1], at its last
 * positions before context_lens[s]. */
typedef struct {
    long table_len, num_sequences, block_size;
    const int64_t *query_starts, *context_lens;
    int bfloat; /* the pool */
} Batch;

/* Some new tokens of one sequence. `partial`: the first of its spans' sums, -1 where one thread
 * goes through its whole context. */
typedef struct {
    long sequence, row, num_tokens, position, partial, num_spans, finished;
} Tile;

/* Keys first .. last of a tile's. */
typedef struct {
    long tile, first, last, span;
} Piece;

/* Made once a step and kind of layer. Its memory is the caller's. */
typedef struct {
    Heads heads;
    Batch batch;
    Tile *tiles;
    Piece *pieces;
    float *partials;       /* per span and KV head: largest score, sum, values of each row */
    atomic_int *finished;  /* per tile that is shared and KV head: spans that are done */
    char *scratch;         /* per thread */
    long lanes; /* of the vectors: of floats, or of pairs of bfloat16 */
    long num_tiles, num_pieces, tile_tokens, tile_rows, width; /* width: head_dim, whole vectors */
    long num_partials, num_shared, partial_len, scratch_len;
} Attention;

/* One layer: q and out [rows, heads * head_dim], their rows ldq and ldo floats apart; keys and values
 * [blocks, kv_heads, block_size, head_dim]. */
typedef struct {
    const float *q;
    const void *keys, *values;
    float *out;
    long ldq, ldo;
    const int32_t *tables; /* [sequences, table_len]: its blocks */
} Layer;

/* Bytes that `attention_place` needs. */
long attention_plan(Attention *plan, const Heads *heads, const Batch *batch, int threads);
void attention_place(Attention *plan, char *memory);

/* Pieces until none is left. `next` counts them up from `base`, the same for all threads; it is
 * attention_tickets more when all threads have returned. */
void attention_share(const Attention *plan, const Layer *layer, atomic_long *next, long base,
                     int number);
long attention_tickets(const Attention *plan, int threads);

#endif
