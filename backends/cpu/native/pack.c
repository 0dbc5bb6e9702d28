/* Packs weights into panels, once at load, and reads single rows of a packed weight. */
#include "pairs.h"
#include "panel.h"
#include "team.h"

#define STRETCH 256 /* of k at once: its part of rows and panel stays in the first-level cache */

typedef struct {
    const char *weight;
    char *packed;
    long num_cols, k;
} Packing;

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

INLINE void pack_panel(const Packing *p, long panel, Kind kind) {
    long size = kind == FLOATS ? 4 : 2, cols = p->num_cols - panel * PANEL;
    for (long k = 0; k < p->k; k += STRETCH) {
        const void *from[PANEL];
        for (long c = 0; c < PANEL; c++)
            from[c] = c < cols ? p->weight + ((panel * PANEL + c) * p->k + k) * size
                               : (const char *)zeros;
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

INLINE void pack_share(const Packing *p, int number, int threads, Kind kind) {
    long first, last;
    share_of(num_panels(p->num_cols), number, threads, &first, &last);
    for (long panel = first; panel < last; panel++) pack_panel(p, panel, kind);
}

static void pack_floats(void *job, int number, int threads) {
    pack_share(job, number, threads, FLOATS);
}

static void pack_bfloats(void *job, int number, int threads) {
    pack_share(job, number, threads, BFLOATS);
}

static void pack_all_pairs(void *job, int number, int threads) {
    pack_share(job, number, threads, PAIRS);
}

/* The bytes of a packed weight of that shape. */
long sage_packed_bytes(long num_cols, long k, int kind) {
    return num_panels(num_cols) * panel_bytes(k, (Kind)kind);
}

/* Pack a contiguous weight [num_cols, k] into `packed`. */
void sage_pack(const void *weight, int kind, void *packed, long num_cols, long k, int threads) {
    Packing job = {weight, packed, num_cols, k};
    share *const by_kind[] = {pack_floats, pack_bfloats, pack_all_pairs};
    team_run(by_kind[kind], &job, threads);
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
