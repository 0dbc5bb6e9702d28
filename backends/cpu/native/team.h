/* Teams of threads that share a kernel's work. Each thread that calls kernels has its own team. */
#ifndef SAGELLM_TEAM_H
#define SAGELLM_TEAM_H

#include <stdatomic.h>

/* One thread's share of a kernel: thread `number` of `threads`. */
typedef void share(void *job, int number, int threads);

/* Run `work` on `threads` threads at once, including the caller; return when all have finished. If
 * no helper thread can be started, the caller does all the work. */
void team_run(share *work, void *job, int threads);

/* A count that threads wait for. Initialise it with zeros. */
typedef struct {
    _Alignas(64) atomic_uint count;
    atomic_int sleepers; /* threads that must be woken when the count changes */
} Gate;

/* A point where all threads of a team wait for each other. Initialise it with zeros. */
typedef struct {
    _Alignas(64) atomic_int arrived;
    Gate gate; /* its count is the number of times that all have met */
} Barrier;

/* Wait until all `threads` threads have called it. Then each thread may read what the others wrote
 * before. */
void barrier_wait(Barrier *barrier, int threads);

/* The share of thread `number` in `count` items: first <= item < last. */
static inline void share_of(long count, int number, int threads, long *first, long *last) {
    *first = count * number / threads;
    *last = count * (number + 1) / threads;
}

#endif
