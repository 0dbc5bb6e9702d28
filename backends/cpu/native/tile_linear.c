/* Products of rows with a weight in PAIRS by tiles. Sums are in float.
 *
 * Rows are rounded to bfloat16 into tiles. A panel needs no other order: DEEP of k of half a panel
 * are a tile whose rows are a line apart. Two tiles of rows times both halves of a panel are four
 * tiles of sums, so that every tile that is loaded is used twice.
 *
 * A row's sums do not depend on other rows, but differ from those of vectors in the last bits. So
 * results are batch-invariant only among batches of at least TILES_FROM rows.
 */
#include "linear.h"
#include "pairs.h"
#include "panel.h"
#include "team.h"
#include "tiles.h"

#if TILES
#define TILES_FROM 4              /* rows; vectors multiply fewer while they read the weight */
#define PAIR (2 * AMX_ROWS)       /* rows of two tiles */
#define NUMBERS (AMX_ROWS * DEEP) /* numbers of a tile of rows */
#define CHUNK 12  /* tiles along k: a chunk of a panel and of a pair of rows take 48 KiB, the cache */
#define ROWS 256  /* most rows that use a panel at once: reading it takes less time than products */
#define SPAN (512 << 10) /* rounded numbers, which fill half of the second-level cache */
#define OWN_ROWS 128     /* threads share rows, not columns, if each gets at least this many */

_Static_assert(DEEP == AMX_K && 2 * PANEL == AMX_BYTES, "panels are tiles of the CPU");

typedef struct {
    _Alignas(64) uint16_t rounded[SPAN]; /* tiles [rows / AMX_ROWS, k / DEEP, AMX_ROWS, DEEP] */
    float gate[ROWS * PANEL], up[ROWS * PANEL];
} Scratch;

typedef struct {
    const Linear *linear;
    const float *x;
    Scratch *scratch;
    float *out;
    long ldx, ldo;
    long first_row, first_col; /* row and column of the first element of out */
    long first, last;          /* panels of this thread */
    long top, rows, begin, end; /* the current block of x: first row, number of rows, range of k */
} Product;

/* A pair of rows times a chunk of a panel. Distances are in bytes. */
typedef struct {
    const uint16_t *rows; /* of the first tile of rows; those of the second are `apart` later */
    const char *panel, *ahead; /* the weights, and those to prefetch: `hop` for each tile of k */
    long apart, hop, count;    /* count: tiles along k */
    const float *before;       /* the sums before, */
    float *sums;               /* and where the sums are stored */
    long before_apart, sums_apart;
} Block;

static inline long least(long a, long b) { return a < b ? a : b; }

static inline long parts(long whole, long most) { return (whole + most - 1) / most; }

/* Round the block of x into tiles, with zeros after its last row and its last k. */
static void round_block(const Product *p) {
    uint16_t *to = p->scratch->rounded;
    for (long row = p->top; row < p->top + p->rows; row += AMX_ROWS)
        for (long k = p->begin; k < p->end; k += DEEP)
            for (long r = row; r < row + AMX_ROWS; r++, to += DEEP) {
                long count = r < p->top + p->rows ? least(DEEP, p->end - k) : 0;
                if (count) round_all(p->x + r * p->ldx + k, to, count);
                for (long i = count; i < DEEP; i++) to[i] = 0;
            }
}

INLINE void block_of_sums(const Block *b, int has_two) {
    const char *rows = (const char *)b->rows, *panel = b->panel, *ahead = b->ahead;
    const char *before = (const char *)b->before;
    char *sums = (char *)b->sums;
    TILE_LOAD(0, before, b->before_apart);
    TILE_LOAD(1, before + AMX_BYTES, b->before_apart);
    if (has_two) {
        before += AMX_ROWS * b->before_apart;
        TILE_LOAD(2, before, b->before_apart);
        TILE_LOAD(3, before + AMX_BYTES, b->before_apart);
    }
    for (long i = 0; i < b->count; i++, rows += 2 * NUMBERS, panel += DEEP * bytes_of_k(PAIRS)) {
        TILE_LOAD(6, panel, 2 * AMX_BYTES);
        TILE_LOAD(7, panel + AMX_BYTES, 2 * AMX_BYTES);
        TILE_LOAD(4, rows, AMX_BYTES);
        TILE_DOT_BF16(0, 4, 6);
        TILE_DOT_BF16(1, 4, 7);
        if (has_two) {
            TILE_LOAD(5, rows + b->apart, AMX_BYTES);
            TILE_DOT_BF16(2, 5, 6);
            TILE_DOT_BF16(3, 5, 7);
        }
        for (long line = 0; line < b->hop; line += 64) __builtin_prefetch(ahead + line, 0, 2);
        ahead += DEEP * bytes_of_k(PAIRS);
    }
    TILE_STORE(0, sums, b->sums_apart);
    TILE_STORE(1, sums + AMX_BYTES, b->sums_apart);
    if (has_two) {
        sums += AMX_ROWS * b->sums_apart;
        TILE_STORE(2, sums, b->sums_apart);
        TILE_STORE(3, sums + AMX_BYTES, b->sums_apart);
    }
}

static void copy_rows(const float *from, long ldf, float *to, long ldt, long rows, long cols) {
    for (long r = 0; r < rows; r++) memcpy(to + r * ldt, from + r * ldf, sizeof(float) * cols);
}

/* Complete the block for up to PAIR rows from `row` on, and multiply it. `bias`: PANEL numbers that
 * the sums begin with; NULL: they are added to what out holds. */
static void multiply_block(const Product *p, Block *b, long row, long panel, const float *bias) {
    float part[PAIR * PANEL]; /* the sums, if out has not all of their rows and columns */
    long col = panel * PANEL, cols = least(PANEL, p->linear->num_cols - col);
    long rows = least(PAIR, p->top + p->rows - row);
    float *out = p->out + (row - p->first_row) * p->ldo + col - p->first_col;
    int is_whole = cols == PANEL && rows % AMX_ROWS == 0;
    b->sums = is_whole ? out : part;
    b->sums_apart = (long)sizeof(float) * (is_whole ? p->ldo : PANEL);
    b->before = bias ? bias : b->sums;
    b->before_apart = bias ? 0 : b->sums_apart;
    if (!is_whole && !bias) copy_rows(out, p->ldo, part, PANEL, rows, cols);
    rows > AMX_ROWS ? block_of_sums(b, 1) : block_of_sums(b, 0);
    if (!is_whole) copy_rows(part, PANEL, out, p->ldo, rows, cols);
}

static const char *weights_at(const Product *p, long panel, long k) {
    const char *weight = p->linear->weight;
    return weight + panel * panel_bytes(p->linear->k, PAIRS) + k * bytes_of_k(PAIRS);
}

/* Multiply a panel by the block of rows. Meanwhile prefetch the panel `then`. */
static void multiply_panel(const Product *p, long panel, long then) {
    long tiles = parts(p->end - p->begin, DEEP), chunks = parts(tiles, CHUNK);
    long pairs = parts(p->rows, PAIR), line = 2 * AMX_BYTES * AMX_ROWS;
    long cols = least(PANEL, p->linear->num_cols - panel * PANEL);
    Block b = {.apart = tiles * 2 * NUMBERS, .hop = parts(line / 64, pairs) * 64};
    float bias[PANEL] = {0};
    if (p->linear->bias) memcpy(bias, p->linear->bias + panel * PANEL, sizeof(float) * cols);
    for (long c = 0; c < chunks; c++) {
        long first = tiles * c / chunks, last = tiles * (c + 1) / chunks;
        const char *next = c + 1 < chunks ? weights_at(p, panel, p->begin + last * DEEP)
                                          : weights_at(p, then, p->begin);
        b.panel = weights_at(p, panel, p->begin + first * DEEP);
        b.count = last - first;
        for (long pair = 0; pair < pairs; pair++) {
            b.rows = p->scratch->rounded + (2 * pair * tiles + first) * NUMBERS;
            b.ahead = next + pair * b.hop;
            multiply_block(p, &b, p->top + pair * PAIR, panel, p->begin + first ? NULL : bias);
        }
    }
}

/* Multiply all of this thread's panels of gate, each with its panel of up. */
static void gated_panels(const Product *p) {
    float *gate = p->scratch->gate, *up = p->scratch->up;
    long half = num_panels(p->linear->num_cols) / 2;
    Product own = *p;
    own.first_row = p->top, own.ldo = PANEL;
    for (long panel = p->first; panel < p->last; panel++) {
        own.out = gate, own.first_col = panel * PANEL;
        multiply_panel(&own, panel, half + panel);
        own.out = up, own.first_col += half * PANEL;
        multiply_panel(&own, half + panel, panel + 1);
        for (long r = 0; r < p->rows; r++) {
            float *out = p->out + (p->top + r) * p->ldo + panel * PANEL;
            for (long i = r * PANEL; i < (r + 1) * PANEL; i += WIDE, out += WIDE) {
                wide opened = wide_silu(load_wide(gate + i)) * load_wide(up + i);
                memcpy(out, &opened, sizeof opened);
            }
        }
    }
}

static void multiply_rows(Product *p, int gated) {
    long k = p->linear->k, span = SPAN / (parts(p->rows, AMX_ROWS) * AMX_ROWS) / DEEP * DEEP;
    for (p->begin = 0; p->begin < k; p->begin = p->end) {
        p->end = least(p->begin + span, k);
        round_block(p);
        if (gated) gated_panels(p);
        for (long panel = p->first; !gated && panel < p->last; panel++)
            multiply_panel(p, panel, panel + 1);
    }
}

static void product(const Linear *linear, const float *x, long ldx, float *out, long ldo,
                    long num_rows, int number, int threads, int gated) {
    static _Thread_local Scratch scratch;
    long k = parts(linear->k, DEEP) * DEEP, most = (gated ? least(ROWS, SPAN / k) : ROWS) / PAIR;
    long panels = num_panels(linear->num_cols) / (gated ? 2 : 1), pairs = parts(num_rows, PAIR);
    long start = 0, end = pairs;
    Product p = {.linear = linear, .x = x, .scratch = &scratch, .out = out, .ldx = ldx, .ldo = ldo};
    if (num_rows >= threads * OWN_ROWS)
        share_of(pairs, number, threads, &start, &end), p.last = panels;
    else
        share_of(panels, number, threads, &p.first, &p.last);
    if (p.first == p.last) return;
    tiles_begin();
    long blocks = parts(end - start, most);
    for (long b = 0; b < blocks; b++) {
        long first, last;
        share_of(end - start, (int)b, (int)blocks, &first, &last);
        p.top = (start + first) * PAIR, p.rows = least((start + last) * PAIR, num_rows) - p.top;
        multiply_rows(&p, gated);
    }
    tiles_end();
}

multiply sage_multiply_pairs, sage_gated_pairs;

#define MULTIPLY(name, by_vectors, gated)                                                \
    void name(const Linear *linear, const float *x, long ldx, float *out, long ldo,      \
              long num_rows, int number, int threads) {                                  \
        if (num_rows < TILES_FROM || (gated && linear->k > SPAN / PAIR))                 \
            by_vectors(linear, x, ldx, out, ldo, num_rows, number, threads);             \
        else                                                                             \
            product(linear, x, ldx, out, ldo, num_rows, number, threads, gated);         \
    }
MULTIPLY(sage_multiply_tiles, sage_multiply_pairs, 0)
MULTIPLY(sage_gated_tiles, sage_gated_pairs, 1)
#undef MULTIPLY
#endif
