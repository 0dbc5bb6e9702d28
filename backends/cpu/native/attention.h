/* Paged attention of a ragged batch, cut into pieces that any thread of a team can compute. */
#ifndef SAGELLM_ATTENTION_H
#define SAGELLM_ATTENTION_H

#include <stdatomic.h>
#include <stdint.h>

#define BLOCK 64  /* keys at a time; blocks begin at multiples of it */
#define SPAN 512  /* keys that one thread sums before sums are merged; at multiples of it, too */
#define MOST 128  /* rows of a tile (new tokens x query heads of one KV head), if it can be cut */
#define FEW 16    /* up to so many new tokens, threads may share the context of a sequence */

typedef struct {
    long heads, kv_heads, head_dim, window; /* 0: none */
    float scale;
} Heads;

/* The inputs that all layers of a step share. Sequence s has the rows from query_starts[s] to
 * query_starts[s + 1]; they are its last positions before context_lens[s]. */
typedef struct {
    long table_len, num_sequences, block_size;
    const int64_t *query_starts, *context_lens;
    int bfloat; /* whether the pool is bfloat16 */
} Batch;

/* Some new tokens of one sequence. `partial`: index of the sums of its first span, -1 if one thread
 * computes its whole context. */
typedef struct {
    long sequence, row, num_tokens, position, partial, num_spans, finished;
} Tile;

/* The keys first to last of a tile. */
typedef struct {
    long tile, first, last, span;
} Piece;

/* The plan for one step and one kind of layer. The caller owns its memory. */
typedef struct {
    Heads heads;
    Batch batch;
    Tile *tiles;
    Piece *pieces;
    float *partials;       /* per span and KV head: largest score, sum, values of each row */
    atomic_int *finished;  /* per shared tile and KV head: number of finished spans */
    char *scratch;         /* per thread */
    long lanes; /* of a vector: of floats, or of pairs of bfloat16 */
    long num_tiles, num_pieces, tile_tokens, tile_rows, width; /* width: padded head_dim */
    long num_partials, num_shared, partial_len, scratch_len;
} Attention;

/* The tensors of one layer: q and out [rows, heads * head_dim], with rows ldq and ldo floats apart;
 * keys and values [blocks, kv_heads, block_size, head_dim]. */
typedef struct {
    const float *q;
    const void *keys, *values;
    float *out;
    long ldq, ldo;
    const int32_t *tables; /* [sequences, table_len]: its blocks */
} Layer;

/* Plan the pieces of a step, and return the bytes of memory that `attention_place` needs. */
long attention_plan(Attention *plan, const Heads *heads, const Batch *batch, int threads);
void attention_place(Attention *plan, char *memory);

/* Compute pieces until none is left. Threads take them by incrementing `next`, which starts at
 * `base`, and is attention_tickets higher when all threads have returned. */
void attention_share(const Attention *plan, const Layer *layer, atomic_long *next, long base,
                     int number);
long attention_tickets(const Attention *plan, int threads);

#endif
