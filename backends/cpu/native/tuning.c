/* The numbers that `sagellm tune` chooses for a machine, with values that suit most machines. */
#include "tuning.h"

#define MOST_AHEAD (256 << 10) /* more than a chunk of a panel: the next chunk is prefetched */

#define DEFAULT {.rows = 48, .panels = 1, .ahead = 4096, .quant_ahead = 4096}

Tuning tuning = DEFAULT;

void sage_tune_get(Tuning *used, Tuning *initial) {
    *used = tuning;
    *initial = (Tuning)DEFAULT;
}

static int is_distance(long bytes) {
    return bytes >= 512 && bytes <= MOST_AHEAD && bytes % 512 == 0;
}

static int is_usable(const Tuning *t) {
    return t->rows >= 1 && t->rows <= MOST_TUNED_ROWS &&
           (t->panels == 1 || t->panels == 2 || t->panels == 4) && is_distance(t->ahead) &&
           is_distance(t->quant_ahead);
}

int sage_tune_set(const Tuning *values) {
    if (!is_usable(values)) return 1;
    tuning = *values;
    return 0;
}
