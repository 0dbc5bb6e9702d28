/* Threads that share a kernel's work. Every thread that calls kernels has helpers of its own. */
#ifndef SAGELLM_TEAM_H
#define SAGELLM_TEAM_H

/* One thread's share of a kernel: thread `number` of `threads`. */
typedef void share(void *job, int number, int threads);

/* `work` on `threads` threads at once, the caller's among them; returns when all have ended. Runs
 * on the caller alone where no helper can be started. */
void team_run(share *work, void *job, int threads);

#endif
