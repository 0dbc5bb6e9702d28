/* A kernel of a decode step takes some 100 us, and the next kernel follows at once. Waking a
 * sleeping thread takes as long, so threads poll for a while before they sleep. OpenMP polls too,
 * but not in a process with more teams than cores, such as a server.
 *
 * A thread that another program has pushed from its core comes back after milliseconds. Whoever
 * waits for it must sleep: its core may be the one that the other thread needs.
 */
#include "team.h"

#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define BARRIER_NS 50000   /* a thread polls at most this long for the others at a barrier, */
#define LOOK_OUT_NS 200000 /* and a helper for the next kernel, before they sleep */
#define LEAST_NS 2000      /* it polls at least this long, */
#define TRIES 16           /* and the longest again after so many waits that ended in sleep */
#define POLLS 16           /* between two looks at the clock */

typedef struct {
    share *work;
    void *job;
    int threads;
    Gate start;            /* its count is the number of the current round of work */
    Gate end;              /* its count is the number of the last round that has ended */
    atomic_ullong entry;   /* number of the open round, or NO_ROUND; and helpers that entered it */
    atomic_int unfinished; /* helpers that have not ended this round */
    int num_helpers, is_over;
    pthread_t *helpers;
} Team;

typedef struct {
    Team *team;
    int number;
    unsigned round;
} Helper;

static pthread_key_t own_team;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static inline void breathe(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static long now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

/* How long a thread polls before it sleeps: at most `most` nanoseconds, at present `now`. The time
 * doubles after a wait that ended while the thread polled, and is halved after one in which it
 * slept. */
typedef struct {
    long most, now, slept; /* slept: the number of waits in which the thread slept */
} Patience;

static _Thread_local Patience at_barrier = {BARRIER_NS, BARRIER_NS, 0};
static _Thread_local Patience at_start = {LOOK_OUT_NS, LOOK_OUT_NS, 0};

static void learn(Patience *patience, int sufficed) {
    long next = sufficed ? patience->now * 2 : patience->now / 2;
    if (!sufficed && ++patience->slept % TRIES == 0) next = patience->most;
    next = next < LEAST_NS ? LEAST_NS : next;
    patience->now = next > patience->most ? patience->most : next;
}

/* Poll until the gate's count differs from `seen`. Return 0 if it did not in time. */
static int polled(Gate *gate, unsigned seen, Patience *patience) {
    for (long until = 0;;) {
        for (int i = 0; i < POLLS; i++, breathe())
            if (atomic_load(&gate->count) != seen) return 1;
        long now = now_ns();
        if (!until) until = now + patience->now;
        if (now > until) return 0;
    }
}

#ifdef __linux__
static void sleep_at(Gate *gate, unsigned seen) {
    while (atomic_load(&gate->count) == seen)
        syscall(SYS_futex, &gate->count, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void wake_at(Gate *gate) {
    syscall(SYS_futex, &gate->count, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}
#else
static pthread_mutex_t door = PTHREAD_MUTEX_INITIALIZER; /* of all gates: sleeping is rare */
static pthread_cond_t bell = PTHREAD_COND_INITIALIZER;

static void sleep_at(Gate *gate, unsigned seen) {
    pthread_mutex_lock(&door);
    while (atomic_load(&gate->count) == seen) pthread_cond_wait(&bell, &door);
    pthread_mutex_unlock(&door);
}

static void wake_at(Gate *gate) {
    (void)gate;
    pthread_mutex_lock(&door);
    pthread_cond_broadcast(&bell);
    pthread_mutex_unlock(&door);
}
#endif

/* Wait until the gate's count differs from `seen`. */
static void pass(Gate *gate, unsigned seen, Patience *patience) {
    int sufficed = polled(gate, seen, patience);
    learn(patience, sufficed);
    if (sufficed) return;
    atomic_fetch_add(&gate->sleepers, 1);
    sleep_at(gate, seen);
    atomic_fetch_sub(&gate->sleepers, 1);
}

/* Increase the gate's count. A thread that is about to sleep either is among the sleepers by now,
 * or finds the new count. */
static void open_gate(Gate *gate) {
    atomic_fetch_add(&gate->count, 1);
    if (atomic_load(&gate->sleepers)) wake_at(gate);
}

#define NO_ROUND 0ull
#define ENTRY(round) ((unsigned long long)(round) << 32 | 1ull << 31) /* of no round is NO_ROUND */
#define ENTERED(entry) (int)((entry) & 0x7fffffff)

/* Enter a round. Return 0 if it is closed: the helper came too late. */
static int enter(Team *team, unsigned round) {
    unsigned long long entry = atomic_load(&team->entry);
    while (entry != NO_ROUND && entry >> 32 == round)
        if (atomic_compare_exchange_weak(&team->entry, &entry, entry + 1)) return 1;
    return 0;
}

static void *help(void *argument) {
    Helper self = *(Helper *)argument;
    Team *team = self.team;
    free(argument);
    for (;;) {
        pass(&team->start, self.round, &at_start);
        self.round = atomic_load(&team->start.count);
        if (team->is_over) return NULL;
        if (!enter(team, self.round)) continue;
        if (self.number < team->threads) team->work(team->job, self.number, team->threads);
        if (atomic_fetch_sub(&team->unfinished, 1) == 1) open_gate(&team->end);
    }
}

static void start_round(Team *team) {
    atomic_store(&team->unfinished, team->num_helpers);
    atomic_store(&team->entry, ENTRY(atomic_load(&team->start.count) + 1));
    open_gate(&team->start);
}

/* Close the round. Return whether no helper works on it. */
static int close_round(Team *team) {
    int missing = team->num_helpers - ENTERED(atomic_exchange(&team->entry, NO_ROUND));
    return atomic_fetch_sub(&team->unfinished, missing) == missing;
}

/* End the team's helpers and free the team, when the thread that owns it ends. */
static void dissolve(void *argument) {
    Team *team = argument;
    team->is_over = 1;
    start_round(team);
    for (int i = 0; i < team->num_helpers; i++) pthread_join(team->helpers[i], NULL);
    free(team->helpers);
    free(team);
}

static void make_key(void) { pthread_key_create(&own_team, dissolve); }

static Team *team_of_this_thread(void) {
    pthread_once(&once, make_key);
    Team *team = pthread_getspecific(own_team);
    if (team || !(team = aligned_alloc(64, sizeof *team))) return team;
    memset(team, 0, sizeof *team);
    pthread_setspecific(own_team, team);
    return team;
}

/* Start helpers until there are `wanted`, or until the system refuses another. */
static void grow(Team *team, int wanted) {
    pthread_t *helpers = realloc(team->helpers, sizeof(pthread_t) * (size_t)wanted);
    if (!helpers) return;
    team->helpers = helpers;
    while (team->num_helpers < wanted) {
        Helper *helper = malloc(sizeof *helper);
        if (!helper) return;
        *helper = (Helper){team, team->num_helpers + 1, atomic_load(&team->start.count)};
        if (pthread_create(helpers + team->num_helpers, NULL, help, helper)) {
            free(helper);
            return;
        }
        team->num_helpers++;
    }
}

void barrier_wait(Barrier *barrier, int threads) {
    unsigned round = atomic_load(&barrier->gate.count);
    if (atomic_fetch_add(&barrier->arrived, 1) == threads - 1) {
        atomic_store(&barrier->arrived, 0);
        open_gate(&barrier->gate);
    } else {
        pass(&barrier->gate, round, &at_barrier);
    }
}

static void run(share *work, void *job, int threads, int is_open) {
    Team *team = threads > 1 ? team_of_this_thread() : NULL;
    if (team && team->num_helpers < threads - 1) grow(team, threads - 1);
    if (!team || !team->num_helpers) {
        work(job, 0, 1);
        return;
    }
    team->work = work;
    team->job = job;
    team->threads = threads < team->num_helpers + 1 ? threads : team->num_helpers + 1;
    unsigned ended = atomic_load(&team->end.count);
    start_round(team);
    work(job, 0, team->threads);
    if (is_open && close_round(team)) return;
    pass(&team->end, ended, &at_barrier);
}

void team_run(share *work, void *job, int threads) { run(work, job, threads, 0); }

void team_run_open(share *work, void *job, int threads) { run(work, job, threads, 1); }

void begin_meeting(Meeting *meeting) {
    memset(meeting, 0, sizeof *meeting);
    atomic_store(&meeting->threads, 1);
}

int meet(Meeting *meeting, int threads, long at0, long at1) {
    Barrier *end = &meeting->end;
    unsigned round = atomic_load(&end->gate.count);
    if (atomic_fetch_add(&end->arrived, 1) == threads - 1) {
        atomic_store(&end->arrived, 0);
        meeting->at[0] = at0, meeting->at[1] = at1;
        atomic_store(&meeting->threads, 1 + atomic_load(&meeting->helpers));
        open_gate(&end->gate);
    } else {
        pass(&end->gate, round, &at_barrier);
    }
    return atomic_load(&meeting->threads); /* changes when this thread ends its section */
}

int join_meeting(Meeting *meeting) {
    int number = atomic_fetch_add(&meeting->helpers, 1) + 1;
    for (;;) {
        unsigned round = atomic_load(&meeting->end.gate.count);
        if (atomic_load(&meeting->threads) > number) return number;
        if (atomic_load(&meeting->is_over)) return 0;
        pass(&meeting->end.gate, round, &at_barrier);
    }
}

void end_meeting(Meeting *meeting) {
    atomic_store(&meeting->is_over, 1);
    open_gate(&meeting->end.gate);
}
