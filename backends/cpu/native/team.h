/* Teams of threads that share a kernel's work. Each thread that calls kernels has a team of its
 * own. */
#ifndef SAGELLM_TEAM_H
#define SAGELLM_TEAM_H

#include <stdatomic.h>

/* One thread's share of a kernel: thread `number` of `threads`. */
typedef void share(void *job, int number, int threads);

/* Run `work` on `threads` threads at once, the caller included; return when all have finished. If
 * no helper can be started, the caller runs all of it. */
void team_run(share *work, void *job, int threads);

/* A point where all threads of a team wait for each other. Initialise it with zeros. */
typedef struct {
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_uint round;
} Barrier;

/* Return when all `threads` have called it. Then each may read what the others wrote before. */
void barrier_wait(Barrier *barrier, int threads);

/* The share of a thread of `count` items: first <= item < last. */
static inline void share_of(long count, int number, int threads, long *first, long *last) {
    *first = count * number / threads;
    *last = count * (number + 1) / threads;
}

#endif
