/* Tiles of Intel AMX: eight registers, each of up to 16 rows of 64 bytes, and their products.
 *
 * The right factor of a product holds pairs of bfloat16, or fours of bytes, that are adjacent along
 * k, as a panel of PAIRS does. TILES is 1 where a file may use tiles: the compiler's target has
 * AMX, or SAGE_TILE_MODEL asks for a model of the instructions in plain C, which every CPU runs.
 * The model stops the process where the CPU would raise an exception.
 *
 * Numbers of tiles are literals, because they are part of an instruction. Source: Intel 64 and
 * IA-32 Architectures Software Developer's Manual, volume 2, LDTILECFG and TDPBF16PS. */
#ifndef SAGELLM_TILES_H
#define SAGELLM_TILES_H

#include "vector.h"

#define AMX_TILES 8
#define AMX_ROWS 16  /* of a tile */
#define AMX_BYTES 64 /* of a row of a tile */
#define AMX_K 32     /* numbers of bfloat16 of a row: k of a product */

/* The operand of LDTILECFG: how many rows and bytes of a row each tile has. */
typedef struct {
    uint8_t palette, first_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} TileShapes;

#if defined(SAGE_TILE_MODEL)
#define TILES 1

typedef float model_floats __attribute__((vector_size(AMX_BYTES)));
typedef int32_t model_ints __attribute__((vector_size(AMX_BYTES)));
typedef uint32_t model_words __attribute__((vector_size(AMX_BYTES)));

static _Thread_local TileShapes model_shapes; /* palette 0: no tile may be used */
static _Thread_local char model_tiles[AMX_TILES][AMX_ROWS][AMX_BYTES];

static inline void model_must(int holds) {
    if (!holds) __builtin_trap();
}

static inline void model_configure(const TileShapes *shapes) {
    model_must(shapes->palette == 1 && !shapes->first_row);
    for (int t = 0; t < 16; t++) {
        int is_used = shapes->rows[t] > 0;
        model_must(shapes->rows[t] <= (t < AMX_TILES ? AMX_ROWS : 0));
        model_must(shapes->bytes[t] <= AMX_BYTES && is_used == (shapes->bytes[t] > 0));
    }
    model_shapes = *shapes;
    memset(model_tiles, 0, sizeof model_tiles);
}

static inline void model_release(void) { memset(&model_shapes, 0, sizeof model_shapes); }

static inline void model_zero(int tile) {
    model_must(model_shapes.rows[tile]);
    memset(model_tiles[tile], 0, sizeof *model_tiles);
}

static inline void model_load(int tile, const void *from, long stride) {
    model_zero(tile);
    for (int r = 0; r < model_shapes.rows[tile]; r++)
        memcpy(model_tiles[tile][r], (const char *)from + r * stride, model_shapes.bytes[tile]);
}

static inline void model_store(int tile, void *to, long stride) {
    model_must(model_shapes.rows[tile]);
    for (int r = 0; r < model_shapes.rows[tile]; r++)
        memcpy((char *)to + r * stride, model_tiles[tile][r], model_shapes.bytes[tile]);
}

/* Check the shapes of a product sums += a * b. Return the rows of b. */
static inline int model_depth(int sums, int a, int b) {
    const TileShapes *s = &model_shapes;
    model_must(sums != a && sums != b && a != b);
    model_must(s->rows[sums] && s->rows[sums] == s->rows[a] && s->bytes[sums] == s->bytes[b]);
    model_must(s->bytes[a] == 4 * s->rows[b] && s->bytes[b] % 4 == 0);
    return s->rows[b];
}

/* Zeros instead of numbers below the least normal one, as AMX reads and writes them. */
static inline model_floats model_normal(model_floats value) {
    const model_ints bits = (model_ints)value;
    return (model_floats)(bits & (((bits & 0x7f800000) != 0) | (int32_t)0x80000000));
}

/* Products of even k and of odd k have sums of their own, which are added to `sums` at the end. A
 * product of two bfloat16 is exact in float, so a sum needs no fused addition. */
static inline void model_dot_bf16(int sums, int a, int b) {
    const model_ints none = {0}, upper = none + (int32_t)0xffff0000;
    int depth = model_depth(sums, a, b);
    for (int r = 0; r < model_shapes.rows[sums]; r++) {
        model_floats even = {0}, odd = {0}, sum;
        for (int i = 0; i < depth; i++) {
            model_ints left, right;
            int32_t pair;
            memcpy(&pair, model_tiles[a][r] + 4 * i, sizeof pair);
            memcpy(&right, model_tiles[b][i], sizeof right);
            left = none + pair;
            even = model_normal(even + model_normal((model_floats)(left << 16)) *
                                           model_normal((model_floats)(right << 16)));
            odd = model_normal(odd + model_normal((model_floats)(left & upper)) *
                                         model_normal((model_floats)(right & upper)));
        }
        memcpy(&sum, model_tiles[sums][r], sizeof sum);
        sum = model_normal(model_normal(sum) + model_normal(even + odd));
        memcpy(model_tiles[sums][r], &sum, model_shapes.bytes[sums]);
    }
}

/* Byte `place` of each number, extended to 32 bits. */
static inline model_ints model_byte(model_ints value, int place, int is_signed) {
    return is_signed ? value << (24 - 8 * place) >> 24 : value >> 8 * place & 255;
}

/* Sums of 32 bits wrap around. */
static inline void model_dot_int8(int sums, int a, int b, int signed_a, int signed_b) {
    const model_ints none = {0};
    int depth = model_depth(sums, a, b);
    for (int r = 0; r < model_shapes.rows[sums]; r++) {
        model_words sum;
        memcpy(&sum, model_tiles[sums][r], sizeof sum);
        for (int i = 0; i < depth; i++) {
            model_ints right;
            int32_t four;
            memcpy(&four, model_tiles[a][r] + 4 * i, sizeof four);
            memcpy(&right, model_tiles[b][i], sizeof right);
            for (int place = 0; place < 4; place++)
                sum += (model_words)(model_byte(none + four, place, signed_a) *
                                     model_byte(right, place, signed_b));
        }
        memcpy(model_tiles[sums][r], &sum, model_shapes.bytes[sums]);
    }
}

#define TILE_CONFIGURE(shapes) model_configure(shapes)
#define TILE_RELEASE() model_release()
#define TILE_ZERO(tile) model_zero(tile)
#define TILE_LOAD(tile, from, stride) model_load(tile, from, stride)
#define TILE_STORE(tile, to, stride) model_store(tile, to, stride)
#define TILE_DOT_BF16(sums, a, b) model_dot_bf16(sums, a, b)
#define TILE_DOT_SS(sums, a, b) model_dot_int8(sums, a, b, 1, 1)
#define TILE_DOT_SU(sums, a, b) model_dot_int8(sums, a, b, 1, 0)
#define TILE_DOT_US(sums, a, b) model_dot_int8(sums, a, b, 0, 1)

#elif defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define TILES 1

/* The intrinsics of gcc do not tell the compiler that they read memory. Without the fence, the
 * compiler could move an earlier store to that memory past them, or drop it. */
#define TILE_FENCED(instruction)             \
    do {                                     \
        __asm__ volatile("" ::: "memory");   \
        instruction;                         \
    } while (0)
#define TILE_CONFIGURE(shapes) TILE_FENCED(_tile_loadconfig(shapes))
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, from, stride) TILE_FENCED(_tile_loadd(tile, from, stride))
#define TILE_STORE(tile, to, stride) TILE_FENCED(_tile_stored(tile, to, stride))
#define TILE_DOT_BF16(sums, a, b) _tile_dpbf16ps(sums, a, b)
/* Fours of bytes; the first letter says whether bytes of a are signed, the second those of b. */
#define TILE_DOT_SS(sums, a, b) _tile_dpbssd(sums, a, b)
#define TILE_DOT_SU(sums, a, b) _tile_dpbsud(sums, a, b)
#define TILE_DOT_US(sums, a, b) _tile_dpbusd(sums, a, b)

#else
#define TILES 0
#endif

#if TILES
/* Give all tiles their full size. Each thread calls it before it uses tiles, and tiles_end after
 * that: a thread whose tiles are in use has 8 KiB more to save at each switch of threads. */
INLINE void tiles_begin(void) {
    static const TileShapes full = {
        .palette = 1,
        .bytes = {[0 ... AMX_TILES - 1] = AMX_BYTES},
        .rows = {[0 ... AMX_TILES - 1] = AMX_ROWS},
    };
    TILE_CONFIGURE(&full);
}

INLINE void tiles_end(void) { TILE_RELEASE(); }
#else
INLINE void tiles_begin(void) {}
INLINE void tiles_end(void) {}
#endif

#endif
