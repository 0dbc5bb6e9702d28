/* Cuts the attention of a step into pieces.
 *
 * The new tokens of a sequence are cut into tiles. A tile of few tokens is also cut into spans of
 * its context, so that one long sequence keeps all threads busy. The cut changes no bit of a
 * result.
 */
#include <stddef.h>

#include "attention.h"
#include "codes.h"
#include "matrix.h"
#include "pairs.h"
#include "tiles.h"

#define MOST_SHARED (64L << 20) /* bytes of span sums; a batch that needs more shares no tile */

static long rounded_up(long value, long unit) { return (value + unit - 1) / unit * unit; }

static long first_key(const Heads *heads, long position) {
    return heads->window && position >= heads->window ? position - heads->window + 1 : 0;
}

/* Cut the batch into tiles and pieces: count them, and write them if the plan has memory yet. */
static void cut(Attention *p, int may_share) {
    p->num_tiles = p->num_pieces = p->num_partials = p->num_shared = 0;
    const Batch *b = &p->batch;
    for (long s = 0; s < b->num_sequences; s++) {
        long num_rows = b->query_starts[s + 1] - b->query_starts[s];
        for (long top = 0; top < num_rows; top += p->tile_tokens) {
            long tokens = num_rows - top < p->tile_tokens ? num_rows - top : p->tile_tokens;
            long position = b->context_lens[s] - num_rows + top, end = position + tokens;
            long first = first_key(&p->heads, position), span = first / SPAN;
            long spans = (end - 1) / SPAN - span + 1;
            int shared = may_share && spans > 1 && num_rows <= FEW;
            Tile tile = {s, b->query_starts[s] + top, tokens, position, -1, spans, -1};
            if (shared) {
                tile.partial = p->num_partials * p->heads.kv_heads;
                tile.finished = p->num_shared++ * p->heads.kv_heads;
                p->num_partials += spans;
            }
            if (p->tiles) p->tiles[p->num_tiles] = tile;
            for (long i = 0; i < (shared ? spans : 1); i++, p->num_pieces++) {
                Piece piece = {p->num_tiles, first, end, i};
                if (shared && i) piece.first = (span + i) * SPAN;
                if (shared && i < spans - 1) piece.last = (span + i + 1) * SPAN;
                if (p->pieces) p->pieces[p->num_pieces] = piece;
            }
            p->num_tiles++;
        }
    }
}

long attention_plan(Attention *p, const Heads *heads, const Batch *batch, int threads) {
    *p = (Attention){.heads = *heads, .batch = *batch};
    long group = heads->heads / heads->kv_heads;
    p->tile_tokens = group < MOST ? MOST / group : 1;
    long lanes[] = {[KV_FLOAT] = LANES, [KV_BFLOAT] = PAIR_LANES, [KV_INT8] = CODE_LANES};
    p->lanes = heads->head_dim % 2 == 0 ? lanes[batch->dtype] : LANES;
    p->by_tiles = TILES && batch->tiles && p->lanes != LANES && heads->head_dim % AMX_K == 0;
    p->tile_rows = rounded_up(p->tile_tokens * group, p->by_tiles ? AMX_ROWS : 1);
    p->width = rounded_up(heads->head_dim, p->lanes == LANES ? LANES : 2 * p->lanes);
    p->partial_len = p->tile_rows * (p->width + 2);
    /* Per row: sums, total, scores, rounded scores. Then q, a block of keys or values, zeros. */
    long floats = p->tile_rows * (2 * p->width + BLOCK + BLOCK / 2 + 4) +
                  (num_parts(p->tile_rows) * TILE_ROWS + BLOCK + 1) * p->width + PANEL * BLOCK;
    p->scratch_len = rounded_up(floats * (long)sizeof(float), 64);
    cut(p, 1);
    if (p->num_partials * heads->kv_heads * p->partial_len * (long)sizeof(float) > MOST_SHARED)
        cut(p, 0);
    return p->num_tiles * (long)sizeof(Tile) + p->num_pieces * (long)sizeof(Piece) +
           p->num_shared * heads->kv_heads * (long)sizeof(atomic_int) +
           p->num_partials * heads->kv_heads * p->partial_len * (long)sizeof(float) +
           p->scratch_len * threads + 4 * 64;
}

static void *taken(char **memory, long bytes) {
    void *found = *memory;
    *memory += rounded_up(bytes, 64);
    return found;
}

void attention_place(Attention *p, char *memory) {
    long kv_heads = p->heads.kv_heads, shared = p->num_shared;
    p->tiles = taken(&memory, p->num_tiles * (long)sizeof(Tile));
    p->pieces = taken(&memory, p->num_pieces * (long)sizeof(Piece));
    p->finished = taken(&memory, shared * kv_heads * (long)sizeof(atomic_int));
    for (long i = 0; i < shared * kv_heads; i++) atomic_init(p->finished + i, 0);
    p->partials = taken(&memory,
                        p->num_partials * kv_heads * p->partial_len * (long)sizeof(float));
    p->scratch = memory;
    cut(p, shared > 0);
}

long attention_tickets(const Attention *p, int threads) {
    return p->num_pieces * p->heads.kv_heads + threads; /* each thread's last ticket has no piece */
}
