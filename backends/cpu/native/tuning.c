/* The numbers that `sagellm tune` chooses for a machine, with values that suit most machines. */
#include "tuning.h"

#define MOST_AHEAD (64 << 10) /* more would push out of the first caches what is needed sooner */

#define DEFAULT {.rows = 48, .panels = 4, .quant_ahead = 4096}

Tuning tuning = DEFAULT;

void sage_tune_get(Tuning *used, Tuning *initial) {
    *used = tuning;
    *initial = (Tuning)DEFAULT;
}

static int is_usable(const Tuning *t) {
    int are_panels = t->panels == 1 || t->panels == 2 || t->panels == 4;
    return are_panels && t->rows >= 1 && t->rows <= MOST_TUNED_ROWS && t->quant_ahead >= 1024 &&
           t->quant_ahead <= MOST_AHEAD && t->quant_ahead % 1024 == 0;
}

int sage_tune_set(const Tuning *values) {
    if (!is_usable(values)) return 1;
    tuning = *values;
    return 0;
}
