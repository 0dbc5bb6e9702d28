/* Packs weights into panels, once at load, and reads single rows of a packed weight. */
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "pack.h"
#include "pairs.h"
#include "panel.h"
#include "team.h"

#define STRETCH 256 /* of k at once: its part of rows and panel stays in the first-level cache */

#define PART_BYTES (256 << 10) /* read at once: it stays in the second-level cache */

/* Weights that threads pack together. Each takes the next part, which is a few panels: a thread
 * that another program holds up delays one part alone. */
typedef struct {
    const Packing *all;
    long count;
    atomic_long next; /* the number of the next part, counted over all weights */
    atomic_int error; /* an errno; threads stop at the first */
} Packings;

static const float zeros[STRETCH]; /* columns that pad the last panel */

/* Pack k_len of k of one panel. from[c]: the numbers of column c along k. */
INLINE void pack_bfloat(const void *const from[PANEL], void *packed, long k_len) {
    uint32_t *to = packed;
    for (long k = 0; k < k_len; k++, to += WIDE)
        for (int c = 0; c < WIDE; c++)
            to[c] = ((const uint16_t *)from[c])[k] |
                    (uint32_t)((const uint16_t *)from[c + WIDE])[k] << 16;
}

INLINE void pack_float(const void *const from[PANEL], void *packed, long k_len) {
    float *to = packed;
    for (long k = 0; k < k_len; k++, to += PANEL)
        for (int c = 0; c < PANEL; c++) to[c] = ((const float *)from[c])[k];
}

INLINE void pack_pairs(const void *const from[PANEL], void *packed, long k_len) {
    uint16_t *to = packed;
    long k = 0;
#ifdef __AVX512BF16__
    for (; k + 2 * WIDE <= k_len; k += 2 * WIDE, to += 2 * WIDE * PANEL)
        for (int half = 0; half < PANEL; half += WIDE) {
            __m512i pairs[WIDE];
            for (int c = 0; c < WIDE; c++)
                pairs[c] = _mm512_loadu_si512((const uint16_t *)from[half + c] + k);
            transpose_wide(pairs);
            for (int i = 0; i < WIDE; i++)
                _mm512_storeu_si512(to + 2 * (i * PANEL + half), pairs[i]);
        }
#endif
    for (; k + 2 <= k_len; k += 2, to += 2 * PANEL)
        for (int c = 0; c < PANEL; c++) memcpy(to + 2 * c, (const uint16_t *)from[c] + k, 4);
    for (int c = 0; k < k_len && c < PANEL; c++) {
        to[2 * c] = ((const uint16_t *)from[c])[k];
        to[2 * c + 1] = 0;
    }
}

/* Pack one panel. `rows`: its rows of the weight. */
INLINE void pack_panel(const Packing *p, const char *rows, long panel, Kind kind) {
    long size = kind == FLOATS ? 4 : 2, cols = p->num_cols - panel * PANEL;
    for (long k = 0; k < p->k; k += STRETCH) {
        const void *from[PANEL];
        for (long c = 0; c < PANEL; c++)
            from[c] = c < cols ? rows + (c * p->k + k) * size : (const char *)zeros;
        char *to = p->packed + panel * panel_bytes(p->k, kind) + panel_bytes(k, kind);
        long k_len = p->k - k < STRETCH ? p->k - k : STRETCH;
        switch (kind) {
            case FLOATS: pack_float(from, to, k_len); break;
            case BFLOATS: pack_bfloat(from, to, k_len); break;
            case PAIRS: pack_pairs(from, to, k_len); break;
        }
    }
    if (kind == PAIRS) {
        long used = (p->k + 1) / 2 * 2 * bytes_of_k(kind), size = panel_bytes(p->k, kind);
        memset(p->packed + panel * size + used, 0, (size_t)(size - used));
    }
}

static long row_bytes(const Packing *p) { return p->k * (p->kind == FLOATS ? 4 : 2); }

static long panels_of_part(const Packing *p) {
    long panels = PART_BYTES / (PANEL * row_bytes(p) + 1);
    return panels ? panels : 1;
}

static long num_parts(const Packing *p) {
    long panels = panels_of_part(p);
    return (num_panels(p->num_cols) + panels - 1) / panels;
}

/* Read bytes of a file. Return 0, or an errno. */
static int read_file(int fd, char *to, long num_bytes, long offset) {
    while (num_bytes > 0) {
        ssize_t got = pread(fd, to, (size_t)num_bytes, offset);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return got ? errno : EIO; /* the file was cut off */
        to += got, offset += got, num_bytes -= got;
    }
    return 0;
}

/* The memory of one thread, which grows to the largest part. */
typedef struct {
    char *bytes;
    long size;
} Scratch;

/* Set `rows` to the rows of a weight from row `first` on. Those of a file are read: that takes less
 * time than to map the pages, and to drop them. Return 0, or an errno. */
static int rows_of(const Packing *p, long first, long num_rows, Scratch *scratch,
                   const char **rows) {
    *rows = p->weight + first * row_bytes(p);
    if (p->fd < 0) return 0;
    long num_bytes = num_rows * row_bytes(p);
    if (num_bytes > scratch->size) {
        free(scratch->bytes);
        scratch->bytes = malloc((size_t)num_bytes);
        scratch->size = scratch->bytes ? num_bytes : 0;
        if (!scratch->bytes) return ENOMEM;
    }
    *rows = scratch->bytes;
    return read_file(p->fd, scratch->bytes, num_bytes, p->offset + first * row_bytes(p));
}

static int pack_part(const Packing *p, long part, Scratch *scratch) {
    long panels = panels_of_part(p), begin = part * panels, end = begin + panels;
    end = end < num_panels(p->num_cols) ? end : num_panels(p->num_cols);
    long last_row = end * PANEL < p->num_cols ? end * PANEL : p->num_cols;
    const char *rows;
    int error = rows_of(p, begin * PANEL, last_row - begin * PANEL, scratch, &rows);
    for (long panel = begin; !error && panel < end; panel++, rows += PANEL * row_bytes(p))
        switch ((Kind)p->kind) {
            case FLOATS: pack_panel(p, rows, panel, FLOATS); break;
            case BFLOATS: pack_panel(p, rows, panel, BFLOATS); break;
            case PAIRS: pack_panel(p, rows, panel, PAIRS); break;
        }
    return error;
}

static void pack_parts(void *job, int number, int threads) {
    (void)number, (void)threads;
    Packings *todo = job;
    Scratch scratch = {NULL, 0};
    const Packing *p = todo->all, *end = p + todo->count;
    long before = 0; /* parts of the weights before p */
    while (!atomic_load(&todo->error)) {
        long part = atomic_fetch_add(&todo->next, 1);
        while (p < end && part >= before + num_parts(p)) before += num_parts(p++);
        if (p == end) break;
        int error = pack_part(p, part - before, &scratch);
        if (error) atomic_store(&todo->error, error);
    }
    free(scratch.bytes);
}

/* The bytes of a packed weight of that shape. */
long sage_packed_bytes(long num_cols, long k, int kind) {
    return num_panels(num_cols) * panel_bytes(k, (Kind)kind);
}

/* Pack several weights. Return 0, or an errno: a file could not be read, or there is no memory. */
int sage_pack_all(const Packing *all, long count, int threads) {
    Packings todo = {all, count, 0, 0};
    team_run(pack_parts, &todo, threads);
    return atomic_load(&todo.error);
}

/* Pack a contiguous weight [num_cols, k] into `packed`. */
void sage_pack(const void *weight, int kind, void *packed, long num_cols, long k, int threads) {
    Packing job = {weight, packed, num_cols, k, 0, kind, -1};
    sage_pack_all(&job, 1, threads);
}

/* Read column n of the panels, a row of the weight. The numbers have the bits that were packed. */
INLINE void unpack_row(const Linear *l, long n, float *out, Kind kind) {
    long c = n % PANEL;
    const char *panel = (const char *)l->weight + n / PANEL * panel_bytes(l->k, kind);
    for (long k = 0; k < l->k; k++)
        switch (kind) {
            case FLOATS: out[k] = ((const float *)panel)[k * PANEL + c]; break;
            case BFLOATS: /* a number of 32 bits holds columns c and c + WIDE */
                out[k] = load_one(panel, 2 * (k * WIDE + c % WIDE) + (c >= WIDE), 1);
                break;
            case PAIRS: out[k] = load_one(panel, 2 * (k / 2 * PANEL + c) + k % 2, 1); break;
        }
}

void sage_row_float(const Linear *l, long n, float *out) { unpack_row(l, n, out, FLOATS); }
void sage_row_bfloat(const Linear *l, long n, float *out) { unpack_row(l, n, out, BFLOATS); }
void sage_row_pairs(const Linear *l, long n, float *out) { unpack_row(l, n, out, PAIRS); }
