/* The memory layout of a packed weight: panels of PANEL columns, each panel in order of k.
 *
 * A column is a row of the weight [num_cols, k]. In BFLOATS, columns c and c + WIDE are adjacent,
 * so that one load, a shift and a mask give both halves of a panel as floats. In PAIRS, also of
 * bfloat16, k and k + 1 of a column are adjacent, as the CPU's instructions need them, and zeros
 * pad the panel to DEEP of k, a whole tile. Zeros pad the columns of the last panel too. */
#ifndef SAGELLM_PANEL_H
#define SAGELLM_PANEL_H

#include "linear.h"
#include "vector.h"

#define PANEL (2 * WIDE)
#define DEEP 32 /* of k in a tile of PAIRS */

typedef enum { FLOATS, BFLOATS, PAIRS } Kind;

INLINE long bytes_of_k(Kind kind) { return PANEL * (kind == FLOATS ? 4 : 2); }

INLINE long panel_bytes(long k, Kind kind) {
    return (kind == PAIRS ? (k + DEEP - 1) / DEEP * DEEP : k) * bytes_of_k(kind);
}

static inline long num_panels(long num_cols) { return (num_cols + PANEL - 1) / PANEL; }

/* Load one k of a panel: `low` gets the first WIDE columns, `high` the others. */
INLINE void load_panel(const char *from, Kind kind, wide *low, wide *high) {
    if (kind == BFLOATS) {
        wide_bits both;
        memcpy(&both, from, sizeof both);
        *low = (wide)(both << 16);
        *high = (wide)(both & (int32_t)0xffff0000);
    } else {
        memcpy(low, from, sizeof *low);
        memcpy(high, from + sizeof *low, sizeof *high);
    }
}

#endif
