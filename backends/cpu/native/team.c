/* A kernel of a decode step takes some 100 us, and the next kernel follows 20 us later. Waking a
 * sleeping thread takes as long, so helpers poll for work for a while before they sleep. OpenMP
 * polls too, but not in a process with more teams than cores, such as a server.
 */
#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <time.h>

#define LOOK_OUT_NS 200000 /* a helper polls this long for the next kernel before it sleeps */
#define LOOKS 2000         /* polls at a barrier, some 50 us, before a thread yields its core */
#define PATIENCE_NS 50000  /* the caller polls this long for helpers before it yields its core */

typedef struct {
    share *work;
    void *job;
    int threads;
    atomic_uint round;     /* the number of the current round of work */
    atomic_int unfinished; /* helpers that have not ended this round */
    atomic_int sleepers;
    int num_helpers, is_over;
    pthread_mutex_t door;
    pthread_cond_t bell;
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

/* Wait until the team has a round other than `seen`; return the number of that round. */
static unsigned next_round(Team *team, unsigned seen) {
    unsigned round;
    for (long until = now_ns() + LOOK_OUT_NS; now_ns() < until; breathe())
        if ((round = atomic_load(&team->round)) != seen) return round;
    pthread_mutex_lock(&team->door);
    atomic_fetch_add(&team->sleepers, 1);
    while ((round = atomic_load(&team->round)) == seen)
        pthread_cond_wait(&team->bell, &team->door);
    atomic_fetch_sub(&team->sleepers, 1);
    pthread_mutex_unlock(&team->door);
    return round;
}

static void *help(void *argument) {
    Helper self = *(Helper *)argument;
    Team *team = self.team;
    free(argument);
    for (;;) {
        self.round = next_round(team, self.round);
        if (team->is_over) return NULL;
        if (self.number < team->threads) team->work(team->job, self.number, team->threads);
        atomic_fetch_sub(&team->unfinished, 1);
    }
}

static void start_round(Team *team) {
    atomic_store(&team->unfinished, team->num_helpers);
    atomic_fetch_add(&team->round, 1);
    if (atomic_load(&team->sleepers)) {
        pthread_mutex_lock(&team->door);
        pthread_cond_broadcast(&team->bell);
        pthread_mutex_unlock(&team->door);
    }
}

/* End the team's helpers and free the team, when the thread that owns it ends. */
static void dissolve(void *argument) {
    Team *team = argument;
    team->is_over = 1;
    start_round(team);
    for (int i = 0; i < team->num_helpers; i++) pthread_join(team->helpers[i], NULL);
    pthread_cond_destroy(&team->bell);
    pthread_mutex_destroy(&team->door);
    free(team->helpers);
    free(team);
}

static void make_key(void) { pthread_key_create(&own_team, dissolve); }

static Team *team_of_this_thread(void) {
    pthread_once(&once, make_key);
    Team *team = pthread_getspecific(own_team);
    if (team || !(team = calloc(1, sizeof *team))) return team;
    pthread_mutex_init(&team->door, NULL);
    pthread_cond_init(&team->bell, NULL);
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
        *helper = (Helper){team, team->num_helpers + 1, atomic_load(&team->round)};
        if (pthread_create(helpers + team->num_helpers, NULL, help, helper)) {
            free(helper);
            return;
        }
        team->num_helpers++;
    }
}

void barrier_wait(Barrier *barrier, int threads) {
    unsigned round = atomic_load(&barrier->round);
    if (atomic_fetch_add(&barrier->arrived, 1) == threads - 1) {
        atomic_store(&barrier->arrived, 0);
        atomic_store(&barrier->round, round + 1);
        return;
    }
    for (long tries = 0; tries < LOOKS; tries++, breathe())
        if (atomic_load(&barrier->round) != round) return;
    while (atomic_load(&barrier->round) == round) sched_yield();
}

void team_run(share *work, void *job, int threads) {
    Team *team = threads > 1 ? team_of_this_thread() : NULL;
    if (team && team->num_helpers < threads - 1) grow(team, threads - 1);
    if (!team || !team->num_helpers) {
        work(job, 0, 1);
        return;
    }
    team->work = work;
    team->job = job;
    team->threads = threads < team->num_helpers + 1 ? threads : team->num_helpers + 1;
    start_round(team);
    work(job, 0, team->threads);
    for (long until = now_ns() + PATIENCE_NS; atomic_load(&team->unfinished);)
        now_ns() < until ? breathe() : (void)sched_yield();
}
