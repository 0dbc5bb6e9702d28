/* Threads that share a kernel's work. Every thread that calls kernels has helpers of its own. */
#ifndef SAGELLM_TEAM_H
#define SAGELLM_TEAM_H

#include <stdatomic.h>

/* One thread's share of a kernel: thread `number` of `threads`. */
typedef void share(void *job, int number, int threads);

/* `work` on `threads` threads at once, the caller's among them; returns when all have ended. Runs
 * on the caller alone where no helper can be started. */
void team_run(share *work, void *job, int threads);

/* Where all threads of one share wait for each other; all zero at first. */
typedef struct {
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_uint round;
} Barrier;

/* Returns when all `threads` have called it; what they wrote before, all may read then. */
void barrier_wait(Barrier *barrier, int threads);

/* Which of `count` things are a thread's: first <= one < last. */
static inline void share_of(long count, int number, int threads, long *first, long *last) {
    *first = count * number / threads;
    *last = count * (number + 1) / threads;
}

#endif
