/* Products of rows with a packed weight of float or bfloat16. Sums are in float.
 *
 * Each (m, n) is summed in one order for any number of rows and threads: along k within a chunk,
 * and the chunks are added in order to the bias. So results are batch-invariant. Lanes run along
 * the columns, so that no sum crosses lanes. For PAIRS, x is rounded to bfloat16 first.
 *
 * In the gated form, the first half of the columns is gate and the second half is up: the result is
 * silu(gate) * up. Both sums are complete before a result is written.
 */
#include "linear.h"

#include "pairs.h"
#include "panel.h"
#include "team.h"
#include "tiles.h"
#include "tuning.h"

#if WIDE == 16 || defined(__aarch64__)
#define TILE_ROWS 12 /* with one panel: 24 sums, 2 weights and a value of x, of 32 registers */
#else
#define TILE_ROWS 6 /* 12 sums, 2 weights, a value of x and a mask fill the 16 AVX2 registers */
#endif
#define TILE_COLS 4        /* panels of a tile of one row: enough sums that no addition waits */
#define WARM 4096          /* bytes of each panel of the first tile that linear_warm prefetches */
#define CHUNK 2048         /* of k, at most: a chunk of a panel stays in the second-level cache */
#define APART (CHUNK + 32) /* between rounded rows: a line more than CHUNK, so that sets differ */
#define OWN_ROWS 128       /* threads share rows, not columns, if each gets at least this many */
#define SPAN (128 << 10)   /* numbers of x that stay in the second-level cache beside a chunk */

_Static_assert(MOST_TUNED_ROWS <= SPAN / CHUNK, "a block of rows has room when rounded");

typedef wide Sums[TILE_ROWS][2 * TILE_COLS];

typedef struct {
    const Linear *linear;
    const float *x;
    uint16_t *rounded; /* for PAIRS: the current block of x, rounded, [chunk, row, APART] */
    float *out;
    long ldx, ldo;
    long first_row, first_col; /* row and column of the first element of out */
    long apart;                /* bytes from one panel to the next */
    long first, last;          /* panels of this thread */
    long top, rows, begin;     /* the current block of x: first row, number of rows, first k */
    long ahead;                /* bytes of a panel to prefetch, if one tile has all rows */
    int row_panels;            /* panels of a tile of one row */
} Product;

/* Where a tile of sums is: its first row and panel, and its range of k. */
typedef struct {
    long row, panel, k, k_len;
    const char *ahead; /* the weights to prefetch meanwhile, */
    long hop;          /* `hop` bytes for every two of k; */
    long turn;         /* from this k of the tile on, the weights to prefetch */
    const char *then;  /* are here */
} Place;

static inline long least(long a, long b) { return a < b ? a : b; }

static inline long parts(long whole, long most) { return (whole + most - 1) / most; }

INLINE const char *weights_at(const Product *p, long panel, long k, Kind kind) {
    return (const char *)p->linear->weight + panel * p->apart + k * bytes_of_k(kind);
}

INLINE void add_one_k(const Product *p, const float *x, const char *w, int rows, int panels,
                      Kind kind, Sums sums) {
    for (int c = 0; c < panels; c++) {
        wide low, high;
        load_panel(w + c * p->apart, kind, &low, &high);
        for (int r = 0; r < rows; r++) {
            wide value = fill_wide(x[r * p->ldx]);
            sums[r][2 * c] = fused_wide(value, low, sums[r][2 * c]);
            sums[r][2 * c + 1] = fused_wide(value, high, sums[r][2 * c + 1]);
        }
    }
}

/* add_one_k for two of k at once. */
INLINE void add_pair(const Product *p, const uint16_t *x, const char *w, int rows, int panels,
                     Sums sums) {
    for (int c = 0; c < panels; c++) {
        wide_bits low, high;
        memcpy(&low, w + c * p->apart, sizeof low);
        memcpy(&high, w + c * p->apart + sizeof low, sizeof high);
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, x + r * APART, sizeof pair);
            sums[r][2 * c] = add_products(sums[r][2 * c], low, pair);
            sums[r][2 * c + 1] = add_products(sums[r][2 * c + 1], high, pair);
        }
    }
}

/* Add the sums of a chunk: the first chunk to the bias, later chunks to what out holds. */
INLINE void add_to_out(const Product *p, const Place *at, int rows, int panels, Sums sums) {
    const Linear *l = p->linear;
    long col = at->panel * PANEL, cols = least(panels * PANEL, l->num_cols - col);
    for (int r = 0; r < rows; r++) {
        float *out = p->out + (at->row - p->first_row + r) * p->ldo + col - p->first_col;
        const float *before = at->k ? out : l->bias ? l->bias + col : NULL;
        if (cols == panels * PANEL) {
            for (int c = 0; c < 2 * panels; c++) {
                wide sum = sums[r][c] + (before ? load_wide(before + c * WIDE) : (wide){0});
                memcpy(out + c * WIDE, &sum, sizeof sum);
            }
        } else {
            float part[PANEL * TILE_COLS];
            for (int c = 0; c < 2 * panels; c++) memcpy(part + c * WIDE, &sums[r][c], sizeof(wide));
            for (long i = 0; i < cols; i++) out[i] = part[i] + (before ? before[i] : 0.0f);
        }
    }
}

INLINE void tile(const Product *p, const Place *at, int rows, int panels, Kind kind) {
    const float *x = p->x + at->row * p->ldx + at->k;
    const uint16_t *pairs =
        p->rounded + ((at->k - p->begin) / CHUNK * p->rows + at->row - p->top) * APART;
    const char *w = weights_at(p, at->panel, at->k, kind), *ahead = at->ahead;
    Sums sums; /* the rest of it stays as it is: clearing 6 KiB takes a twentieth of a short tile */
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 2 * panels; c++) sums[r][c] = (wide){0};
    long i = 0, step = bytes_of_k(kind);
    for (; i + 2 <= at->k_len; i += 2, w += 2 * step, ahead += at->hop) {
        if (i == at->turn) ahead = at->then;
        for (int c = 0; c < panels; c++)
            for (long line = 0; line < 2 * step; line += 64)
                if (rows == 1) /* each line is read once, and soon: to the first-level cache */
                    __builtin_prefetch(ahead + c * p->apart + line, 0, 3);
                else
                    __builtin_prefetch(ahead + c * p->apart + line, 0, 2);
        if (kind == PAIRS) {
            add_pair(p, pairs + i, w, rows, panels, sums);
        } else {
            add_one_k(p, x + i, w, rows, panels, kind, sums);
            add_one_k(p, x + i + 1, w + step, rows, panels, kind, sums);
        }
    }
    if (i < at->k_len) {
        if (kind == PAIRS)
            add_pair(p, pairs + i, w, rows, panels, sums);
        else
            add_one_k(p, x + i, w, rows, panels, kind, sums);
    }
    add_to_out(p, at, rows, panels, sums);
}

/* Call `tile` with its shape as constants, so that the sums stay in registers. */
INLINE void sized_tile(const Product *p, const Place *at, int rows, int panels, Kind kind) {
#define CASE(R, C)               \
    case R * 8 + C:              \
        tile(p, at, R, C, kind); \
        break;
    switch (rows * 8 + panels) {
        CASE(1, 1) CASE(2, 1) CASE(3, 1) CASE(4, 1) CASE(5, 1) CASE(6, 1) CASE(1, 2) CASE(1, 4)
        CASE(2, 2)
#if TILE_ROWS == 12
        CASE(7, 1) CASE(8, 1) CASE(9, 1) CASE(10, 1) CASE(11, 1) CASE(12, 1)
#endif
    }
#undef CASE
}

/* One copy of the tiles for each kind, which all products share: a call is brief beside a tile, and
 * a compiler would make a copy for each place that computes tiles. */
#define TILE_OF_KIND(name, kind)                                                                  \
    static __attribute__((noinline)) void name(const Product *p, const Place *at, int rows,      \
                                               int panels) {                                     \
        sized_tile(p, at, rows, panels, kind);                                                   \
    }
TILE_OF_KIND(float_tile, FLOATS)
TILE_OF_KIND(bfloat_tile, BFLOATS)
TILE_OF_KIND(pairs_tile, PAIRS)
#undef TILE_OF_KIND

INLINE void tile_of_kind(const Product *p, const Place *at, int rows, int panels, Kind kind) {
    switch (kind) {
        case FLOATS: float_tile(p, at, rows, panels); break;
        case BFLOATS: bfloat_tile(p, at, rows, panels); break;
        case PAIRS: pairs_tile(p, at, rows, panels); break;
    }
}

/* Let the only tile of a chunk prefetch weights `p->ahead` bytes further on, and at the chunk's end
 * the first weights at `next`. */
INLINE void look_ahead(const Product *p, Place *at, const char *next, Kind kind) {
    long pairs = least(p->ahead / (2 * bytes_of_k(kind)), at->k_len / 2);
    at->ahead = weights_at(p, at->panel, at->k + 2 * pairs, kind);
    at->turn = at->k_len / 2 * 2 - 2 * pairs;
    at->then = next;
}

/* Multiply one chunk of panels by the block of rows, and prefetch weights: if there are several
 * tiles, each prefetches a share of the next chunk, which is at `next`. */
INLINE void block_of_rows(const Product *p, Place at, const char *next, int panels, Kind kind) {
    long tiles = parts(p->rows, TILE_ROWS);
    at.hop = parts(2 * bytes_of_k(kind), tiles);
    for (long t = 0; t < tiles; t++) {
        long row = p->rows * t / tiles, end = p->rows * (t + 1) / tiles;
        at.row = p->top + row;
        at.ahead = next + t * at.hop * (at.k_len / 2);
        if (tiles == 1) look_ahead(p, &at, next, kind);
        tile_of_kind(p, &at, (int)(end - row), panels, kind);
    }
}

/* Round the block of x to bfloat16. Each thread rounds for itself, so no thread waits. */
INLINE void round_block(const Product *p, long end) {
    uint16_t *to = p->rounded;
    for (long k = p->begin; k < end; k += CHUNK)
        for (long row = p->top; row < p->top + p->rows; row++, to += APART) {
            long k_len = least(CHUNK, end - k);
            round_all(p->x + row * p->ldx + k, to, k_len);
            if (k_len & 1) to[k_len] = 0; /* the other half of the last pair */
        }
}

/* Multiply `panels` panels from `panel` on, from the block's first k to `end`. Then comes `then`. */
INLINE void panels_of_k(const Product *p, long panel, long then, long end, int panels, Kind kind) {
    for (long k = p->begin; k < end; k += CHUNK) {
        Place at = {p->top, panel, k, least(CHUNK, end - k), NULL, 0, -1, NULL};
        long more = k + at.k_len;
        const char *next = more < end ? weights_at(p, panel, more, kind)
                                      : weights_at(p, then, p->begin, kind);
        block_of_rows(p, at, next, panels, kind);
    }
}

/* How many panels wide the tiles are at `panel`: more for few rows. */
INLINE int panels_at(const Product *p, long panel) {
    int most = p->rows == 1 ? p->row_panels : p->rows == 2 ? 2 : 1;
    return p->last - panel < most ? 1 : most;
}

/* Multiply all of this thread's panels, from the block's first k to `end`. */
INLINE void span_of_k(const Product *p, long end, Kind kind) {
    int panels;
    if (kind == PAIRS) round_block(p, end);
    for (long panel = p->first; panel < p->last; panel += panels) {
        panels = panels_at(p, panel);
        panels_of_k(p, panel, panel + panels, end, panels, kind);
    }
}

/* Multiply all of this thread's panels of gate, each with its panel of up. */
INLINE void gated_panels(const Product *p, Kind kind) {
    float gate[MOST_TUNED_ROWS * PANEL], up[MOST_TUNED_ROWS * PANEL];
    long half = num_panels(p->linear->num_cols) / 2, k = p->linear->k;
    Product own = *p;
    int panels;
    if (kind == PAIRS) round_block(p, k);
    own.first_row = p->top;
    for (long panel = p->first; panel < p->last; panel += panels) {
        panels = panels_at(p, panel);
        long width = own.ldo = panels * PANEL;
        own.out = gate, own.first_col = panel * PANEL;
        panels_of_k(&own, panel, half + panel, k, panels, kind);
        own.out = up, own.first_col += half * PANEL;
        panels_of_k(&own, half + panel, panel + panels, k, panels, kind);
        for (long r = 0; r < p->rows; r++) {
            float *out = p->out + (p->top + r) * p->ldo + panel * PANEL;
            for (long i = r * width; i < (r + 1) * width; i += WIDE, out += WIDE) {
                wide opened = wide_silu(load_wide(gate + i)) * load_wide(up + i);
                memcpy(out, &opened, sizeof opened);
            }
        }
    }
}

INLINE void product(const Linear *linear, const float *x, long ldx, float *out, long ldo,
                    long num_rows, int number, int threads, Kind kind, int gated) {
    static _Thread_local uint16_t rounding[SPAN / CHUNK * APART];
    long k = linear->k, most = tuning.rows;
    long panels = num_panels(linear->num_cols) / (gated ? 2 : 1), start = 0, end = num_rows;
    Product p = {.linear = linear, .x = x, .rounded = rounding, .out = out, .ldx = ldx, .ldo = ldo,
                 .apart = panel_bytes(k, kind), .ahead = tuning.ahead,
                 .row_panels = (int)tuning.panels};
    if (gated) most = least(most, SPAN / (parts(k, CHUNK) * CHUNK));
    if (num_rows >= threads * OWN_ROWS)
        share_of(num_rows, number, threads, &start, &end), p.last = panels;
    else
        share_of(panels, number, threads, &p.first, &p.last);
    long count = end - start, blocks = parts(count, most);
    for (long b = 0; b < blocks; b++) {
        p.top = start + count * b / blocks, p.rows = start + count * (b + 1) / blocks - p.top;
        if (gated) {
            gated_panels(&p, kind);
            continue;
        }
        long span = SPAN / p.rows / CHUNK * CHUNK;
        for (p.begin = 0; p.begin < k; p.begin += span)
            span_of_k(&p, least(p.begin + span, k), kind);
    }
}

#define MULTIPLY(name, kind, gated)                                                      \
    void name(const Linear *linear, const float *x, long ldx, float *out, long ldo,      \
              long num_rows, int number, int threads) {                                  \
        product(linear, x, ldx, out, ldo, num_rows, number, threads, kind, gated);       \
    }
MULTIPLY(sage_multiply_float, FLOATS, 0)
MULTIPLY(sage_multiply_bfloat, BFLOATS, 0)
MULTIPLY(sage_multiply_pairs, PAIRS, 0)
MULTIPLY(sage_gated_float, FLOATS, 1)
MULTIPLY(sage_gated_bfloat, BFLOATS, 1)
MULTIPLY(sage_gated_pairs, PAIRS, 1)
#undef MULTIPLY

#if TILES
multiply sage_multiply_tiles; /* multiplies few rows by the vectors of sage_multiply_pairs */
#define TILED_RUN sage_multiply_tiles
#else
#define TILED_RUN NULL
#endif

/* Find the kind of the panels. Return 0 for weights of other kernels. */
static int kind_of(const Linear *l, Kind *kind) {
    multiply *const runs[] = {sage_multiply_float, sage_multiply_bfloat, sage_multiply_pairs};
    for (*kind = FLOATS; *kind <= PAIRS; ++*kind)
        if (l->run == runs[*kind]) return 1;
    *kind = PAIRS;
    return TILES && l->run == TILED_RUN;
}

void linear_warm(const Linear *l, int gated, int number, int threads) {
    Kind kind;
    if (!kind_of(l, &kind)) return;
    long first, last, apart = panel_bytes(l->k, kind);
    share_of(num_panels(l->num_cols) / (gated ? 2 : 1), number, threads, &first, &last);
    const char *panel = (const char *)l->weight + first * apart;
    for (long c = 0; c < least(TILE_COLS, last - first); c++, panel += apart)
        for (long line = 0; line < least(WARM, apart); line += 64)
            __builtin_prefetch(panel + line, 0, 2);
}

/* Whether the gated form supports the shape: halves of whole panels, and rows that fit SPAN. */
int sage_is_gated(long num_cols, long k) { return num_cols % (2 * PANEL) == 0 && k <= SPAN; }

int sage_has_pairs(void) { return HAS_PAIRS; }

typedef struct {
    const Linear *linear;
    const float *x;
    long ldx;
    float *out;
    long ldo, num_rows;
} Run;

static void run_share(void *job, int number, int threads) {
    const Run *r = job;
    r->linear->run(r->linear, r->x, r->ldx, r->out, r->ldo, r->num_rows, number, threads);
}

/* Multiply rows by any weight, with the weight's kernel, on a team of `threads` threads. */
void sage_linear(const Linear *linear, const float *x, long ldx, float *out, long ldo,
                 long num_rows, int threads) {
    Run job = {linear, x, ldx, out, ldo, num_rows};
    team_run(run_share, &job, threads);
}
