/* Products with weights of 4 or 8 bits: in integers within a block of 32, in floats between blocks.
 *
 * weight[n][k] = (code[n][k] - zero[n][k / group]) * scale[n][k / group], or with codes of 4 bits
 * levels[code[n][k]] * scale[n][k / group]. Activations are quantised
 * to 8 or 16 bits with a scale for each block: 16 bits keep the precision of float32 sums. The sum
 * of a block is exact, and blocks are added in order, so that results are batch-invariant.
 *
 * The weight is stored in panels of 16 columns, with 4 codes along k adjacent for each column.
 * Codes of 8 bits are [panel][k / 4][16][4]. Codes of 4 bits are [panel][k / 8][16][4]; the upper
 * half of a byte holds the code of k + 4, and the zero is 8 if `zeros` is NULL. Scales (float16)
 * and zeros (int16) are [panel][group][16]. The number of panels is even.
 */
#include "quant_rows.h"
#include "rows.h"
#include "team.h"
#include "tuning.h"

#define ROOM (256 << 10) /* bytes of quantised activations: at most half a second-level cache */
#define MOST_ROWS 256    /* most rows of x in one pass over the weights */
#define OWN_ROWS 64      /* threads share rows, not columns, if each gets at least this many */
#define FEW 24           /* most rows that read one panel at a time */
#define CHUNK 16         /* blocks of weights that stay in the first-level cache for all rows */
#define UP (32 << 10)    /* numbers of up that wait for their gate: part of the cache */

typedef struct {
    char codes[ROOM];
    float scales[ROOM / BLOCK];
    int32_t sums[ROOM / BLOCK], starts[ROOM / BLOCK];
} Rows;

/* A thread's rows of x. first_col: the column of the first number of `out`; all_blocks: blocks of k
 * in the weight; first, num_blocks: the blocks whose activations are in `rows`. */
typedef struct {
    const Linear *linear;
    const Rows *rows;
    float *out;
    long ldo, num_rows, first_col, all_blocks, first, num_blocks;
} Part;

/* Where a tile is: its first row and panel, and the blocks `from` to `to` of the part. The blocks
 * ahead_from to ahead_to prefetch the weights `ahead` bytes further on. */
typedef struct {
    long row, panel, from, to;
    long ahead;
    long ahead_from, ahead_to;
} Place;

static _Thread_local Rows kept; /* the quantised activations of this thread */

static long least(long a, long b) { return a < b ? a : b; }

static long parts(long whole, long most) { return (whole + most - 1) / most; }

/* Up to FEW rows read one panel at a time: memory is read fastest in one sequence. More rows use
 * weights that are in the cache, and tiles of PANELS panels. */
static long num_tiles(long num_rows) { return parts(num_rows, num_rows <= FEW ? HIGH : TILE); }

/* Quantise block `block` of the part of a row into place `at`. Beyond the last k, x is 0. */
INLINE void quantise_one(const Quant *q, const Part *p, const float *row, long block, long at,
                         int zero, int x_bits) {
    float own[BLOCK];
    long k = (p->first + block) * BLOCK, count = least(BLOCK, q->linear.k - k);
    const float *from = row + k;
    if (q->order || count < BLOCK) {
        for (long i = 0; i < BLOCK; i++)
            own[i] = i < count ? row[q->order ? q->order[k + i] : k + i] : 0.0f;
        from = own;
    }
    quantise_block(from, kept.codes + at * x_bits * 4, kept.scales + at, kept.sums + at, x_bits);
    kept.starts[at] = -zero * kept.sums[at];
}

/* Quantise rows of x into `kept`, in the order in which tiles read them: [tile][block][row]. */
INLINE void quantise(const Quant *q, const Part *p, const float *x, long ldx, int bits,
                     int x_bits) {
    int zero = bits == 8 || q->levels ? UNSIGNED_ZERO : q->linear.zeros ? 0 : 8;
    long tiles = num_tiles(p->num_rows);
    for (long t = 0; t < tiles; t++) {
        long top, end;
        share_of(p->num_rows, (int)t, (int)tiles, &top, &end);
        for (long row = top; row < end; row++)
            for (long block = 0; block < p->num_blocks; block++)
                quantise_one(q, p, x + row * ldx, block,
                             top * p->num_blocks + block * (end - top) + row - top, zero, x_bits);
    }
}

/* Load the zeros of INTS columns as numbers of 32 bits. */
INLINE ints load_zeros(const int16_t *from) {
    int32_t zeros[INTS];
    for (int i = 0; i < INTS; i++) zeros[i] = from[i];
    return load_ints(zeros);
}

/* Prefetch a block of each panel. Only weights of 8 bits gain from asking for scales too. */
INLINE void ask_for(const uint8_t *w, long apart, const uint16_t *scales, long scales_apart,
                    int panels, int bits) {
    for (int panel = 0; panel < panels; panel++) {
        for (int line = 0; line < bits; line++)
            __builtin_prefetch(w + panel * apart + line * 64, 0, 2);
        if (bits == 8) __builtin_prefetch(scales + panel * scales_apart, 0, 2);
    }
}

/* out += (sums - zeros * sum of the row) * weight scale * row scale. `at`: index of the scales and
 * zeros of the first vector, `apart` from those of the next; `row`: index of the first row. */
INLINE void add_block(const Part *p, ints sums[HIGH][VECS], long at, long apart, long row,
                      int rows, int vecs, floats out[HIGH][VECS]) {
    const Linear *l = p->linear;
    floats scales[VECS];
    if (l->zeros)
        UNROLL for (int v = 0; v < vecs; v++) {
            ints zero = load_zeros((const int16_t *)l->zeros + at + v * apart);
            UNROLL for (int r = 0; r < rows; r++)
                sums[r][v] = less32(sums[r][v], times32(zero, splat(p->rows->sums + row + r)));
        }
    UNROLL for (int v = 0; v < vecs; v++)
        scales[v] = load_halves((const uint16_t *)l->scales + at + v * apart);
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vecs; v++) {
            floats scale = scales[v] * p->rows->scales[row + r];
            out[r][v] = add_product(to_floats(sums[r][v]), scale, out[r][v]);
        }
}

/* Add the products of a tile to `out`. */
INLINE void add_blocks(const Part *p, const Place *a, int rows, int vecs, int bits, int x_bits,
                       floats out[HIGH][VECS]) {
    const Linear *l = p->linear;
    const Table table = table_of(bits == 4 ? ((const Quant *)l)->levels : NULL);
    const int panels = vecs * INTS / COLS;
    long each = l->group / BLOCK, num_groups = parts(p->all_blocks, each);
    long block_bytes = BLOCK * COLS * bits / 8, panel_bytes = p->all_blocks * block_bytes;
    long apart = panels > 1 ? panel_bytes : INTS * 4, scales_apart = INTS;
    if (panels > 1) scales_apart = num_groups * COLS;
    long block = p->first + a->from, group = block / each, left = each - block % each;
    long row = a->row * p->num_blocks + a->from * rows;
    const uint8_t *w = (const uint8_t *)l->weight + a->panel * panel_bytes + block * block_bytes;
    const uint16_t *scales = (const uint16_t *)l->scales + a->panel * num_groups * COLS;
    long scales_ahead = a->ahead / block_bytes / each;
    for (long b = a->from; b < a->to; b++, w += block_bytes, row += rows) {
        ints sums[HIGH][VECS];
        if (b >= a->ahead_from && b < a->ahead_to)
            ask_for(w + a->ahead, panel_bytes, scales + (group + scales_ahead) * COLS,
                    num_groups * COLS, panels, bits);
        block_sums(w, apart, p->rows->codes + row * x_bits * 4, p->rows->starts + row, rows, vecs,
                   bits, x_bits, table, sums);
        add_block(p, sums, (a->panel * num_groups + group) * COLS, scales_apart, row, rows, vecs,
                  out);
        if (--left == 0) group++, left = each;
    }
}

/* Compute one tile: load what `out` holds, or the bias before the first block; add the products;
 * store the sums. If the tile has fewer columns than its vectors, `padded` stands in for `out`. */
INLINE void tile(const Part *p, const Place *a, int rows, int vecs, int bits, int x_bits) {
    floats sums[HIGH][VECS];
    float padded[HIGH][PANELS * COLS] = {{0}};
    long col = a->panel * COLS, cols = least(vecs * INTS, p->linear->num_cols - col);
    float *out = p->out + a->row * p->ldo + col - p->first_col;
    const float *before = out;
    long ldb = p->ldo;
    if (p->first + a->from == 0) before = p->linear->bias ? p->linear->bias + col : NULL, ldb = 0;
    if (cols < vecs * INTS) {
        for (int r = 0; before && r < rows; r++)
            memcpy(padded[r], before + r * ldb, (size_t)cols * sizeof *out);
        before = padded[0], ldb = PANELS * COLS;
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vecs; v++)
            sums[r][v] = before ? load_floats(before + r * ldb + v * INTS) : (floats){0};
    add_blocks(p, a, rows, vecs, bits, x_bits, sums);
    int is_whole = cols == vecs * INTS;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vecs; v++)
            store_floats(is_whole ? out + r * p->ldo + v * INTS : padded[r] + v * INTS, sums[r][v]);
    for (int r = 0; !is_whole && r < rows; r++)
        memcpy(out + r * p->ldo, padded[r], (size_t)cols * sizeof *out);
}

/* Call `tile` with the number of rows as a constant, so that the sums stay in registers. Where tiles
 * of one panel are higher, those of PANELS panels have at least 5 rows: there are more than FEW. */
INLINE void sized_tile(const Part *p, const Place *a, int rows, int vecs, int bits,
                       int x_bits) {
#define CASE(R)                                                  \
    case R:                                                      \
        if (vecs < VECS || HIGH == TILE || (R > 4 && R <= TILE)) \
            tile(p, a, R, vecs, bits, x_bits);                   \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4)
#if HIGH == 12
        CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
#undef CASE
}

/* Multiply all rows of a part by the panels of `vecs` vectors. */
INLINE void panels_part(const Part *p, long panel, int vecs, int bits, int x_bits) {
    long tiles = num_tiles(p->num_rows), chunks = tiles > 1 ? parts(p->num_blocks, CHUNK) : 1;
    long block_bytes = BLOCK * COLS * bits / 8, ahead = tuning.quant_ahead;
    for (long c = 0; c < chunks; c++) {
        Place a = {.panel = panel, .from = p->num_blocks * c / chunks,
                   .to = p->num_blocks * (c + 1) / chunks, .ahead = ahead};
        long count = a.to - a.from;
        if (c + 1 < chunks)
            a.ahead = count * block_bytes;
        else if (tiles > 1)
            a.ahead = (vecs * INTS / COLS * p->all_blocks - a.from) * block_bytes;
        for (long t = 0; t < tiles; t++) {
            a.row = p->num_rows * t / tiles;
            a.ahead_from = a.from + count * t / tiles;
            a.ahead_to = a.from + count * (t + 1) / tiles;
            sized_tile(p, &a, (int)(p->num_rows * (t + 1) / tiles - a.row), vecs, bits, x_bits);
        }
    }
}

/* Multiply all rows of a part by the panels first to last. */
INLINE void all_panels(const Part *p, long first, long last, int bits, int x_bits) {
    if (p->num_rows <= FEW)
        for (long panel = first; panel < last; panel++)
            panels_part(p, panel, COLS / INTS, bits, x_bits);
    else
        for (long panel = first; panel < last; panel += PANELS)
            panels_part(p, panel, VECS, bits, x_bits);
}

/* Multiply the rows of p by the panels first to last. k is cut into parts whose activations fit in
 * ROOM. */
INLINE void product(Part p, const float *x, long ldx, long first, long last, int bits,
                    int x_bits) {
    long num_parts = parts(p.all_blocks * p.num_rows * BLOCK * (x_bits / 8), ROOM);
    if (num_parts > 1) num_parts = parts(p.all_blocks, ROOM / BLOCK / (x_bits / 8) / p.num_rows);
    for (long part = 0; part < num_parts; part++) {
        p.first = p.all_blocks * part / num_parts;
        p.num_blocks = p.all_blocks * (part + 1) / num_parts - p.first;
        quantise((const Quant *)p.linear, &p, x, ldx, bits, x_bits);
        all_panels(&p, first, last, bits, x_bits);
    }
}

/* Multiply the rows of p by the panels first to last of gate and of up. Few rows take all panels of
 * gate, then all of up, so that memory is read in one sequence. */
INLINE void gated_product(Part p, const float *x, long ldx, long first, long last, int bits,
                          int x_bits) {
    static _Thread_local float up[UP];
    long half = p.linear->num_cols / COLS / 2, most = UP / COLS / p.num_rows / 2 * 2;
    p.num_blocks = p.all_blocks;
    quantise((const Quant *)p.linear, &p, x, ldx, bits, x_bits);
    for (long panel = first; panel < last; panel += most) {
        long count = least(most, last - panel);
        Part own = p;
        all_panels(&own, panel, panel + count, bits, x_bits);
        own.out = up, own.ldo = count * COLS, own.first_col = (half + panel) * COLS;
        all_panels(&own, half + panel, half + panel + count, bits, x_bits);
        float *out = p.out + panel * COLS;
        Elements job = {SILU_MUL, out, up, out, p.ldo, own.ldo, p.ldo, p.num_rows, own.ldo};
        pointwise(&job, 0, 1);
    }
}

/* Compute a thread's share: of the columns if rows are few, else of the rows, so that each row is
 * quantised by one thread only. */
INLINE void multiply_share(const Linear *l, const float *x, long ldx, float *out, long ldo,
                           long num_rows, int number, int threads, int bits, int x_bits,
                           int gated) {
    long cols = l->num_cols / (gated ? 2 : 1), most = MOST_ROWS, all_blocks = parts(l->k, BLOCK);
    long pairs = parts(cols, 2 * COLS), top = 0, end = num_rows, first = 0, last = pairs;
    if (gated) most = least(most, ROOM / (all_blocks * BLOCK * (x_bits / 8)));
    if (num_rows >= threads * OWN_ROWS)
        share_of(num_rows, number, threads, &top, &end);
    else
        share_of(pairs, number, threads, &first, &last);
    long blocks = first < last ? parts(end - top, most) : 0;
    for (long b = 0; b < blocks; b++) {
        long row = top + (end - top) * b / blocks, next = top + (end - top) * (b + 1) / blocks;
        Part p = {.linear = l, .rows = &kept, .out = out + row * ldo, .ldo = ldo,
                  .num_rows = next - row, .all_blocks = all_blocks};
        if (gated)
            gated_product(p, x + row * ldx, ldx, 2 * first, 2 * last, bits, x_bits);
        else
            product(p, x + row * ldx, ldx, 2 * first, least(2 * last, parts(cols, COLS)), bits,
                    x_bits);
    }
}

#define MULTIPLY(name, bits, x_bits, gated)                                                        \
    void name(const Linear *l, const float *x, long ldx, float *out, long ldo, long num_rows,      \
              int number, int threads) {                                                           \
        multiply_share(l, x, ldx, out, ldo, num_rows, number, threads, bits, x_bits, gated);       \
    }
MULTIPLY(sage_quant_4_8, 4, 8, 0)
MULTIPLY(sage_quant_4_16, 4, 16, 0)
MULTIPLY(sage_quant_8_8, 8, 8, 0)
MULTIPLY(sage_quant_8_16, 8, 16, 0)
MULTIPLY(sage_quant_4_8_gated, 4, 8, 1)
MULTIPLY(sage_quant_4_16_gated, 4, 16, 1)
MULTIPLY(sage_quant_8_8_gated, 8, 8, 1)
MULTIPLY(sage_quant_8_16_gated, 8, 16, 1)
