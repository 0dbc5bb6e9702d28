/* Attention over the blocks of a sequence in the pool. Keys and values of a block are loaded into
 * the cache as floats, once for all query heads of their KV head. Softmax is computed online
 * (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao 2022, arXiv:2205.14135).
 *
 * A row's result depends on its query and its context alone: blocks and spans begin at multiples of
 * a constant, masked keys have a weight of exactly 0, and sums are merged in order. So a row has
 * the same bits in any batch, with any chunks of a prompt, and on any number of threads.
 */
#include "attention.h"

#include <math.h>
#include <stdlib.h>

#include "block_pairs.h"
#include "blocks.h"
#include "team.h"
#include "tile_attention.h"

#define NOTHING -1e30f /* stands for the largest score before a key was seen */

static void clear(Sums *sums, long rows, long width) {
    for (long r = 0; r < rows; r++) sums->largest[r] = NOTHING;
    memset(sums->sum, 0, sizeof(float) * rows);
    memset(sums->values, 0, sizeof(float) * rows * width);
}

INLINE void scale_row(float *row, long width, float by) {
    for (long i = 0; i < width; i += LANES) store_float(row + i, load_float(row + i) * by);
}

/* Merge `sums` into `total`, as if the keys of `sums` followed those of `total`. */
static void join(Sums *total, const Sums *sums, long rows, long width) {
    for (long r = 0; r < rows; r++) {
        float largest = fmaxf(total->largest[r], sums->largest[r]);
        float by = power(sums->largest[r] - largest);
        float kept = power(total->largest[r] - largest);
        total->largest[r] = largest;
        total->sum[r] = total->sum[r] * kept + sums->sum[r] * by;
        float *to = total->values + r * width;
        const float *from = sums->values + r * width;
        for (long i = 0; i < width; i += LANES)
            store_float(to + i, fused(load_float(from + i), fill(by), load_float(to + i) * kept));
    }
}

static long least(long a, long b) { return a < b ? a : b; }
static long greatest(long a, long b) { return a > b ? a : b; }

/* Make weights of the scores of rows `top` to `bottom` (exclusive), for keys `first` to `last`
 * (exclusive) of the block at `start`. Scale the rows' sums to their new largest scores. */
static void soften_rows(Work *w, long top, long bottom, long start, long first, long last,
                        long padded) {
    const Heads *h = &w->plan->heads;
    long group = h->heads / h->kv_heads, num_keys = last - start;
    int pairs = w->plan->lanes != LANES;
    for (long r = top; r < bottom; r++) {
        long position = w->tile->position + r / group;
        long low = h->window ? greatest(position - h->window + 1 - start, 0) : 0;
        long end = least(position + 1 - start, num_keys);
        low = least(greatest(low, first - start), padded);
        end = greatest(end, low);
        float by = pairs ? soften_pairs(w, r, low, end, padded) : soften(w, r, low, end, padded);
        if (by != 1.0f) scale_row(w->sums.values + r * w->width, w->width, by);
    }
}

#if TILED_ATTENTION
/* add_block by tiles. Each round of the loop has products of tiles for the rows after and before
 * those that it softens. */
static void add_tiles(Work *w, long start, long first, long last) {
    const long some = AMX_ROWS, padded = whole_panels(last - start);
    load_panels(w, padded);
    for (long row = 0; row < w->rows + 2 * some; row += some) {
        if (row < w->rows) score_by_tiles(w, row, padded);
        if (row >= 2 * some) weigh_by_tiles(w, row - 2 * some, padded);
        if (row >= some)
            soften_rows(w, row - some, least(row, w->rows), start, first, last, padded);
    }
}
#else
#define add_tiles(w, start, first, last) (void)first
#endif

/* Add keys `first` to `last` (exclusive) of the block at `start` to the tile's sums. */
static void add_block(Work *w, long start, long first, long last) {
    long num_keys = last - start, lanes = w->plan->lanes;
    long padded = (num_keys + lanes - 1) / lanes * lanes;
    if (w->by_tiles) {
        add_tiles(w, start, first, last);
        return;
    }
    if (w->plan->batch.dtype == KV_INT8) load_scales(w, padded);
    lanes != LANES ? score_pairs(w, padded) : score(w, padded);
    soften_rows(w, 0, w->rows, start, first, last, padded);
    lanes != LANES ? weigh_pairs(w, num_keys) : weigh(w, num_keys);
}

/* Find the rows to prefetch: of the block at `start`, or else of the first block of the thread's
 * next piece. Keys of the current piece end at `last`. */
static void find_next(Work *w, long start, long last) {
    if (start < last || !w->later) {
        find_rows(w, start, start, least(start + BLOCK, last), &w->next);
        return;
    }
    Work later = {.plan = w->plan, .layer = w->layer, .zeros = w->zeros, .head = w->later_head,
                  .tile = w->plan->tiles + w->later->tile};
    long first = w->later->first, block = first / BLOCK * BLOCK;
    find_rows(&later, block, first, least(block + BLOCK, w->later->last), &w->next);
}

/* Set the tile's sums to those of keys `first` to `last` (exclusive), which are in one span. The
 * keys of the piece end at `end_of_piece`. */
static void add_span(Work *w, long first, long last, long end_of_piece) {
    clear(&w->sums, w->rows, w->width);
    long start = first / BLOCK * BLOCK, end = least(start + BLOCK, last);
    find_rows(w, start, first, end, &w->next);
    while (start < last) {
        w->rows_at = w->next;
        find_next(w, end, end < last ? last : end_of_piece);
        add_block(w, start, greatest(start, first), end);
        start = end;
        end = least(start + BLOCK, last);
    }
}

static void store(const Work *w, const Sums *sums) {
    const Heads *h = &w->plan->heads;
    long group = h->heads / h->kv_heads, size = h->head_dim, pairs = w->plan->lanes != LANES;
    for (long r = 0; r < w->rows; r++) {
        float *to = w->layer->out + (w->tile->row + r / group) * w->layer->ldo +
                    (w->head * group + r % group) * size;
        const float *from = sums->values + r * w->width;
        float by = 1.0f / sums->sum[r];
        if (pairs)
            store_pairs_row(w, from, by, to);
        else
            for (long i = 0; i < size; i++) to[i] = from[i] * by;
    }
}

static Sums partial(const Work *w, long span) {
    const Attention *p = w->plan;
    long number = w->tile->partial + span * p->heads.kv_heads + w->head;
    float *from = p->partials + number * p->partial_len;
    return (Sums){from, from + p->tile_rows, from + 2 * p->tile_rows};
}

/* Compute one span of a tile that threads share. The thread that ends last merges all spans. */
static void add_shared(Work *w, const Piece *piece) {
    w->sums = partial(w, piece->span);
    add_span(w, piece->first, piece->last, piece->last);
    atomic_int *finished = w->plan->finished + w->tile->finished + w->head;
    if (atomic_fetch_add(finished, 1) < w->tile->num_spans - 1) return;
    atomic_store(finished, 0); /* for the next layer */
    clear(&w->total, w->rows, w->width);
    for (long span = 0; span < w->tile->num_spans; span++) {
        Sums sums = partial(w, span);
        join(&w->total, &sums, w->rows, w->width);
    }
    store(w, &w->total);
}

static void add_alone(Work *w, const Piece *piece) {
    if (w->tile->num_spans == 1) {
        add_span(w, piece->first, piece->last, piece->last);
        store(w, &w->sums);
        return;
    }
    clear(&w->total, w->rows, w->width);
    for (long first = piece->first, last; first < piece->last; first = last) {
        last = least((first / SPAN + 1) * SPAN, piece->last);
        add_span(w, first, last, piece->last);
        join(&w->total, &w->sums, w->rows, w->width);
    }
    store(w, &w->total);
}

static float *floats(char **memory, long count) {
    float *found = (float *)*memory;
    *memory += sizeof(float) * count;
    return found;
}

/* Arrays whose rows are whole vectors come first, so that they are aligned to vectors. */
static void place(Work *w, char *memory) {
    long rows = w->plan->tile_rows, width = w->width = w->plan->width;
    w->panels = floats(&memory, (width + PANEL) * BLOCK);
    w->q = floats(&memory, num_parts(rows) * TILE_ROWS * width);
    w->scores = floats(&memory, rows * BLOCK);
    w->sums.values = floats(&memory, rows * width);
    w->total.values = floats(&memory, rows * width);
    w->zeros = floats(&memory, width);
    w->weights = (uint16_t *)floats(&memory, rows * BLOCK / 2);
    w->sums.largest = floats(&memory, rows);
    w->sums.sum = floats(&memory, rows);
    w->total.largest = floats(&memory, rows);
    w->total.sum = floats(&memory, rows);
    memset(w->zeros, 0, sizeof(float) * width);
}

void attention_share(const Attention *p, const Layer *layer, atomic_long *next, long base,
                     int number) {
    Work w = {.plan = p, .layer = layer};
    place(&w, p->scratch + p->scratch_len * number);
    if (p->by_tiles) tiles_begin();
    Sums own = w.sums;
    long kv_heads = p->heads.kv_heads, num_tickets = p->num_pieces * kv_heads;
    long ticket = atomic_fetch_add(next, 1) - base, later = -1;
    for (; ticket < num_tickets; ticket = later < 0 ? atomic_fetch_add(next, 1) - base : later) {
        const Piece *piece = p->pieces + ticket / kv_heads;
        w.tile = p->tiles + piece->tile;
        w.head = ticket % kv_heads;
        w.rows = w.tile->num_tokens * (p->heads.heads / kv_heads);
        w.sums = own;
        /* A small piece takes its first keys from memory, so the next piece is chosen early. */
        later = w.tile->num_tokens <= FEW ? atomic_fetch_add(next, 1) - base : -1;
        w.later = later >= 0 && later < num_tickets ? p->pieces + later / kv_heads : NULL;
        w.later_head = later % kv_heads;
        w.by_tiles = p->by_tiles && w.rows >= TILED_FROM;
        w.by_tiles ? load_query_tiles(&w)
                   : p->lanes == LANES ? load_queries(&w) : load_query_pairs(&w);
        w.tile->partial < 0 ? add_alone(&w, piece) : add_shared(&w, piece);
    }
    if (p->by_tiles) tiles_end();
}

typedef struct {
    Attention plan;
    Layer layer;
    atomic_long next;
} Job;

static void pieces(void *job, int number, int threads) {
    (void)threads;
    Job *j = job;
    attention_share(&j->plan, &j->layer, &j->next, 0, number);
}

/* Return 0, or 1 if there is no memory. */
int sage_attention(const Heads *heads, const Batch *batch, const Layer *layer, int threads) {
    Job job = {.layer = *layer};
    char *memory = malloc((size_t)attention_plan(&job.plan, heads, batch, threads));
    if (!memory) return 1;
    attention_place(&job.plan, memory);
    team_run(pieces, &job, threads);
    free(memory);
    return 0;
}
