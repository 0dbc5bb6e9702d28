/* Numbers that make kernels faster on one machine than on another. None changes a bit of a result.
 *
 * The length of a chunk of k is no such number: sums are rounded at the ends of chunks. */
#ifndef SAGELLM_TUNING_H
#define SAGELLM_TUNING_H

#define MOST_TUNED_ROWS 64 /* arrays of the kernels have this length */

typedef struct {
    long rows;        /* linear.c: most rows of x that use a chunk of a panel while it is cached */
    long panels;      /* linear.c: panels of a tile of one row: 1, 2 or 4 */
    long ahead;       /* linear.c: bytes of a panel to prefetch for few rows, a multiple of 512 */
    long quant_ahead; /* quant.c: bytes of weights to prefetch, a multiple of 512 */
} Tuning;

/* Kernels read it when a product begins, so it may be set while they run. */
extern Tuning tuning;

/* Copy the values that are used, and those that are used until others are set. */
void sage_tune_get(Tuning *used, Tuning *initial);

/* Use other values; return 0, or 1 and change nothing if one is out of range. */
int sage_tune_set(const Tuning *values);

#endif
