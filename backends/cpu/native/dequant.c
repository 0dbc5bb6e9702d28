/* Products of many rows with quantised weights, in bfloat16.
 *
 * Each panel is dequantised once for a block of rows, to PAIRS of bfloat16 (panel.h) that stay in
 * the second-level cache while all rows of the block are multiplied by them. The rows are rounded
 * to bfloat16 too. quant.c defines the memory layout of the weights.
 */
#include "dequant.h"

#include <limits.h>
#include <stdatomic.h>

#include "team.h"
#include "tiles.h"

#if WIDE == 16
#define TILE_ROWS 12
#else
#define TILE_ROWS 6
#endif
#define MOST_K 1024               /* of k, at most, that a panel is dequantised for at a time */
#define MOST_GATED 2048           /* of k, at most, in a gated product */
#define SPAN (256 << 10)          /* numbers of x: with a panel, they fill half a 1 MiB cache */
#define MOST_ROWS 256             /* most rows of x that use a dequantised panel */
#define AMX_PAIR (2 * AMX_ROWS)   /* rows of two tiles: as many are read after the last row */
#define PAD 32                    /* numbers between rows of x, so that their cache sets differ */
#define OWN_ROWS 128              /* threads share rows, not columns, if each gets at least these */
#define MOST_NUMBERS (SPAN + MOST_ROWS * PAD + AMX_PAIR * (MOST_GATED + PAD))

/* The rounded rows and the dequantised panel of a thread. */
typedef struct {
    _Alignas(64) uint16_t rows[MOST_NUMBERS];
    _Alignas(64) uint16_t panel[MOST_K * DENSE];
    float gate[MOST_ROWS * DENSE], up[MOST_ROWS * DENSE];
} Rounded;

/* A block of rows, and the part of k from the block of codes `first` on. first_col: the column of
 * the first number of `out`; held, num_held: the blocks of k that rows are rounded for. */
typedef struct {
    const Quant *weight;
    const float *x;
    float *out;
    long ldx, ldo, num_rows, first_col;
    long held, num_held;
    long first, num_blocks;
    int bits, by_tiles;
} Part;

static _Thread_local Rounded kept;

int sage_has_tiles(void);

static long least(long a, long b) { return a < b ? a : b; }

static long parts(long whole, long most) { return (whole + most - 1) / most; }

static long stride(const Part *p) { return p->num_held * BLOCK + PAD; }

/* The part of a row that is multiplied by the dequantised panel. */
INLINE const uint16_t *rows_at(const Part *p, long row) {
    return kept.rows + row * stride(p) + (p->first - p->held) * BLOCK;
}

/* Round the held k of each row to bfloat16, in the order of the codes. Beyond the last k, x is 0. */
static void round_rows(const Part *p) {
    const int32_t *order = p->weight->order;
    long k = p->held * BLOCK, whole = p->num_held * BLOCK;
    long count = least(whole, p->weight->linear.k - k);
    for (long r = 0; r < p->num_rows; r++) {
        const float *row = p->x + r * p->ldx;
        uint16_t *to = kept.rows + r * stride(p);
        if (order)
            for (long i = 0; i < count; i++) to[i] = rounded(row[order[k + i]]);
        else
            round_all(row + k, to, count);
        memset(to + count, 0, (size_t)(whole - count) * sizeof *to);
    }
}

/* Dequantise the part of a panel of DENSE columns to kept.panel. */
INLINE void dequantise(const Part *p, long panel, int bits) {
    const Linear *l = &p->weight->linear;
    const int8_t *levels = bits == 4 ? p->weight->levels : NULL;
    long all_blocks = parts(l->k, BLOCK), each = l->group / BLOCK;
    long num_groups = parts(all_blocks, each), block_bytes = BLOCK * COLS * bits / 8;
    for (long c = 0; c < DENSE / COLS; c++) {
        long from = panel * (DENSE / COLS) + c;
        const uint8_t *codes =
            (const uint8_t *)l->weight + (from * all_blocks + p->first) * block_bytes;
        for (long b = 0; b < p->num_blocks; b++, codes += block_bytes) {
            long at = (from * num_groups + (p->first + b) / each) * COLS;
            const int16_t *zeros = l->zeros ? (const int16_t *)l->zeros + at : NULL;
            dequantise_block(codes, (const uint16_t *)l->scales + at, zeros, levels, bits,
                             kept.panel + b * BLOCK * DENSE + c * COLS * 2);
        }
    }
}

/* Add the sums of a tile to the bias if its part is the first, else to what `out` holds. */
INLINE void add_to_out(const Part *p, long row, long col, int rows, wide (*sums)[DENSE_VECS]) {
    const Linear *l = &p->weight->linear;
    long cols = least(DENSE, l->num_cols - col);
    for (int r = 0; r < rows; r++) {
        float *out = p->out + (row + r) * p->ldo + col - p->first_col;
        const float *before = p->first ? out : l->bias ? l->bias + col : NULL;
        if (cols == DENSE) {
            UNROLL for (int v = 0; v < DENSE_VECS; v++) {
                wide sum = sums[r][v] + (before ? load_wide(before + v * WIDE) : (wide){0});
                memcpy(out + v * WIDE, &sum, sizeof sum);
            }
        } else {
            float part[DENSE];
            UNROLL for (int v = 0; v < DENSE_VECS; v++)
                memcpy(part + v * WIDE, &sums[r][v], sizeof(wide));
            for (long i = 0; i < cols; i++) out[i] = part[i] + (before ? before[i] : 0.0f);
        }
    }
}

INLINE void tile(const Part *p, long row, long col, int rows) {
    const uint16_t *x = rows_at(p, row);
    const char *w = (const char *)kept.panel;
    long ldx = stride(p);
    wide sums[TILE_ROWS][DENSE_VECS];
    for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < DENSE_VECS; v++) sums[r][v] = (wide){0};
    for (long i = 0; i < p->num_blocks * BLOCK; i += 2, w += DENSE_VECS * sizeof(wide)) {
        wide_bits columns[DENSE_VECS];
        UNROLL for (int v = 0; v < DENSE_VECS; v++)
            memcpy(columns + v, w + v * (long)sizeof(wide), sizeof(wide));
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, x + r * ldx + i, sizeof pair);
            UNROLL for (int v = 0; v < DENSE_VECS; v++)
                sums[r][v] = add_products(sums[r][v], columns[v], pair);
        }
    }
    add_to_out(p, row, col, rows, sums);
}

/* Prefetch part `part` of `num_parts` of the codes of a panel. */
INLINE void ask_for(const Part *p, long panel, long part, long num_parts) {
    long all_blocks = parts(p->weight->linear.k, BLOCK), block_bytes = BLOCK * COLS * p->bits / 8;
    for (long c = 0; c < DENSE / COLS; c++) {
        long from = (panel * (DENSE / COLS) + c) * all_blocks + p->first;
        const char *codes = (const char *)p->weight->linear.weight + from * block_bytes;
        long bytes = p->num_blocks * block_bytes, end = bytes * (part + 1) / num_parts;
        for (long at = bytes * part / num_parts; at < end; at += 64)
            __builtin_prefetch(codes + at, 0, 2);
    }
}

/* Call `tile` with the number of rows as a constant, so that the sums stay in registers. */
static void sized_tile(const Part *p, long row, long col, int rows) {
#define CASE(R)               \
    case R:                   \
        tile(p, row, col, R); \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if TILE_ROWS == 12
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
#undef CASE
}

#if TILES
/* Multiply up to 32 rows by the panel with the CPU's tiles: two of rows times both halves of the
 * panel are four tiles of sums. Rows of a tile beyond the last row are computed and left out. */
static void amx_tile(const Part *p, long row, long col, int rows) {
    const uint16_t *x = rows_at(p, row), *w = kept.panel;
    long apart = stride(p) * (long)sizeof *x, line = 2 * AMX_BYTES;
    wide sums[2 * AMX_ROWS][DENSE_VECS];
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (long b = 0; b < p->num_blocks; b++, x += BLOCK, w += BLOCK * DENSE) {
        TILE_LOAD(6, w, line);
        TILE_LOAD(7, w + DENSE, line);
        TILE_LOAD(4, x, apart);
        TILE_DOT_BF16(0, 4, 6);
        TILE_DOT_BF16(1, 4, 7);
        if (rows <= AMX_ROWS) continue;
        TILE_LOAD(5, x + AMX_ROWS * stride(p), apart);
        TILE_DOT_BF16(2, 5, 6);
        TILE_DOT_BF16(3, 5, 7);
    }
    TILE_STORE(0, sums[0], line);
    TILE_STORE(1, sums[0] + 1, line);
    TILE_STORE(2, sums[AMX_ROWS], line);
    TILE_STORE(3, sums[AMX_ROWS] + 1, line);
    add_to_out(p, row, col, rows, sums);
}
#else
static void amx_tile(const Part *p, long row, long col, int rows) { sized_tile(p, row, col, rows); }
#endif

/* Multiply the rows of p by the part of a panel, and prefetch the same part of the panel `next`. */
static void panel_part(const Part *p, long panel, long next) {
    long tiles = parts(p->num_rows, p->by_tiles ? AMX_PAIR : TILE_ROWS);
    p->bits == 8 ? dequantise(p, panel, 8) : dequantise(p, panel, 4);
    for (long t = 0; t < tiles; t++) {
        long row = p->num_rows * t / tiles, end = p->num_rows * (t + 1) / tiles;
        ask_for(p, next, t, tiles);
        p->by_tiles ? amx_tile(p, row, panel * DENSE, (int)(end - row))
                    : sized_tile(p, row, panel * DENSE, (int)(end - row));
    }
}

/* Take part `part` of `num_parts` of k. */
static void set_part(Part *p, long part, long num_parts) {
    long all_blocks = parts(p->weight->linear.k, BLOCK);
    p->first = all_blocks * part / num_parts;
    p->num_blocks = all_blocks * (part + 1) / num_parts - p->first;
}

/* Multiply the rows of p by the panels first to last. */
static void product(Part *p, long first, long last, long num_parts) {
    for (long part = 0; part < num_parts; part++) {
        set_part(p, part, num_parts);
        p->held = p->first, p->num_held = p->num_blocks;
        round_rows(p);
        for (long panel = first; panel < last; panel++) panel_part(p, panel, panel + 1);
    }
}

/* Multiply the rows of p by the panels first to last of gate, each with its panel of up. */
static void gated_product(const Part *p, long first, long last, long num_parts) {
    long half = p->weight->linear.num_cols / DENSE / 2;
    Part own = *p;
    own.held = 0, own.num_held = parts(p->weight->linear.k, BLOCK), own.ldo = DENSE;
    round_rows(&own);
    for (long panel = first; panel < last; panel++) {
        for (int is_up = 0; is_up < 2; is_up++) {
            long now = panel + is_up * half, next = is_up ? panel + 1 : panel + half;
            own.out = is_up ? kept.up : kept.gate, own.first_col = now * DENSE;
            for (long part = 0; part < num_parts; part++) {
                set_part(&own, part, num_parts);
                panel_part(&own, now, next);
            }
        }
        for (long r = 0; r < p->num_rows; r++) {
            float *out = p->out + r * p->ldo + panel * DENSE;
            for (long i = r * DENSE; i < (r + 1) * DENSE; i += WIDE, out += WIDE) {
                wide opened = wide_silu(load_wide(kept.gate + i)) * load_wide(kept.up + i);
                memcpy(out, &opened, sizeof opened);
            }
        }
    }
}

/* Whether this process may use the tiles of AMX. */
static int may_use_tiles(void) {
    static atomic_int known; /* 0: not known; 1: no; 2: yes */
    int found = atomic_load_explicit(&known, memory_order_relaxed);
    if (!found) atomic_store_explicit(&known, found = 1 + sage_has_tiles(), memory_order_relaxed);
    return found - 1;
}

static void multiply_share(const Linear *l, const float *x, long ldx, float *out, long ldo,
                           long num_rows, int number, int threads, int bits, int gated) {
    long top = 0, end = num_rows, first = 0, last = parts(l->num_cols, DENSE) / (gated ? 2 : 1);
    if (num_rows >= threads * OWN_ROWS)
        share_of(num_rows, number, threads, &top, &end);
    else
        share_of(last, number, threads, &first, &last);
    long all_blocks = parts(l->k, BLOCK), num_parts = parts(all_blocks, MOST_K / BLOCK);
    long held = gated ? all_blocks : parts(all_blocks, num_parts);
    long most = least(MOST_ROWS, SPAN / (held * BLOCK));
    long blocks = first < last ? parts(end - top, most) : 0;
    for (long b = 0; b < blocks; b++) {
        long row = top + (end - top) * b / blocks, next = top + (end - top) * (b + 1) / blocks;
        Part p = {.weight = (const Quant *)l, .x = x + row * ldx, .out = out + row * ldo,
                  .ldx = ldx, .ldo = ldo, .num_rows = next - row, .bits = bits,
                  .by_tiles = may_use_tiles()};
        if (p.by_tiles) tiles_begin();
        gated ? gated_product(&p, first, last, num_parts) : product(&p, first, last, num_parts);
        if (p.by_tiles) tiles_end();
    }
}

#define PAIRS_OF(name, bits, gated)                                                            \
    void name(const Linear *l, const float *x, long ldx, float *out, long ldo, long num_rows,  \
              int number, int threads) {                                                       \
        multiply_share(l, x, ldx, out, ldo, num_rows, number, threads, bits, gated);           \
    }
PAIRS_OF(sage_quant_4_pairs, 4, 0)
PAIRS_OF(sage_quant_8_pairs, 8, 0)
PAIRS_OF(sage_quant_4_pairs_gated, 4, 1)
PAIRS_OF(sage_quant_8_pairs_gated, 8, 1)

/* From this many rows on, bfloat16 is faster than integers of x_bits. Tiles of bfloat16 are faster
 * than tiles of bytes here, whose sums would have to be scaled after each block of 32. An ARM CPU
 * that multiplies pairs multiplies four times as many bytes at once (i8mm). */
static long many_rows(int x_bits) {
    if (may_use_tiles()) return 16;
    return HAS_PAIRS && WIDE == 16 && x_bits == 16 ? 64 : LONG_MAX;
}

/* Whether gated forms of all kernels of quantised weights support the shape: halves of whole
 * panels, and few enough numbers of k that many rows stay in the cache. */
int sage_is_quant_gated(long num_cols, long k) {
    return num_cols % (4 * COLS) == 0 && k <= MOST_GATED;
}

/* Multiply few rows as integers, and many rows in bfloat16, where that is faster. */
#define MULTIPLY(name, integers, pairs, x_bits)                                                 \
    multiply integers;                                                                          \
    void name(const Linear *l, const float *x, long ldx, float *out, long ldo, long num_rows,   \
              int number, int threads) {                                                        \
        multiply *run = num_rows < many_rows(x_bits) ? integers : pairs;                        \
        run(l, x, ldx, out, ldo, num_rows, number, threads);                                    \
    }
MULTIPLY(sage_quant_4_8_many, sage_quant_4_8, sage_quant_4_pairs, 8)
MULTIPLY(sage_quant_8_8_many, sage_quant_8_8, sage_quant_8_pairs, 8)
MULTIPLY(sage_quant_8_16_many, sage_quant_8_16, sage_quant_8_pairs, 16)
MULTIPLY(sage_quant_4_8_many_gated, sage_quant_4_8_gated, sage_quant_4_pairs_gated, 8)
MULTIPLY(sage_quant_8_8_many_gated, sage_quant_8_8_gated, sage_quant_8_pairs_gated, 8)
MULTIPLY(sage_quant_8_16_many_gated, sage_quant_8_16_gated, sage_quant_8_pairs_gated, 16)
