/* Teams of threads that share a kernel's work. Each thread that calls kernels has its own team. */
#ifndef SAGELLM_TEAM_H
#define SAGELLM_TEAM_H

#include <stdatomic.h>

/* One thread's share of a kernel: thread `number` of `threads`. */
typedef void share(void *job, int number, int threads);

/* Run `work` on `threads` threads at once, including the caller; return when all have finished. If
 * no helper thread can be started, the caller does all the work. */
void team_run(share *work, void *job, int threads);

/* As team_run, for work that helpers join late or not at all: see Meeting. A helper that has not
 * begun when the caller has finished gets no share, and is not waited for. */
void team_run_open(share *work, void *job, int threads);

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

/* Work in sections, whose number of threads grows as helpers come: a helper may come late, because
 * another thread has its core. Initialise it with begin_meeting. */
typedef struct {
    Barrier end;                 /* of the current section */
    atomic_int threads, helpers; /* threads of the current section; helpers that have come */
    atomic_int is_over;
    long at[2]; /* where the current section begins, for the helpers that join it */
} Meeting;

void begin_meeting(Meeting *meeting);

/* End a section, as all its `threads` threads must, with equal `at`. Return the number of threads
 * of the next section, which includes the helpers that have come. */
int meet(Meeting *meeting, int threads, long at0, long at1);

/* Wait until a section includes the calling helper. Return its number in all later sections, or 0
 * if the work is over. */
int join_meeting(Meeting *meeting);

/* Release the helpers that no section includes. Thread 0 calls it after the last section. */
void end_meeting(Meeting *meeting);

/* The share of thread `number` in `count` items: first <= item < last. */
static inline void share_of(long count, int number, int threads, long *first, long *last) {
    *first = count * number / threads;
    *last = count * (number + 1) / threads;
}

#endif
