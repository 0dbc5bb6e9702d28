/* Runs all instructions of a step in one round of the team. Threads wait for each other only before
 * an instruction that could touch what another thread still works on.
 */
#include "step.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "rows.h"
#include "team.h"
#include "tuning.h"

#define OWN_ROWS 128 /* threads take portions of rows if there are this many rows for each thread */
#define TILED 256    /* rows of a portion where tiles multiply: see ROWS of tile_linear.c */

typedef struct {
    const Step *step;
    Attention *attentions; /* one plan per kind of attention */
    atomic_long *next;     /* of each instruction and thread: the next piece of work */
    int threads;
    long portion; /* rows, at most: as many as use a chunk of a weight while it is cached */
    Barrier barrier;
} Run;

static atomic_long *counter(const Run *run, long instruction, int thread) {
    return run->next + instruction * run->threads + thread;
}

static float *at(const Step *s, const View *v) {
    return v->first < 0 ? s->logits : s->arena + v->first * s->capacity + v->column;
}

static Cache cache_of(const Step *s, long layer) {
    char *keys = s->pool + layer * s->layer_bytes;
    return (Cache){keys, keys + s->side_bytes, s->kv_heads, s->head_dim, s->batch.block_size,
                   s->batch.dtype};
}

static long rows_of(const Step *s, const Instruction *i) {
    return i->chosen ? s->num_logit_rows : s->num_rows;
}

static void run_pick(const Step *s, const Instruction *i, int number, int threads) {
    Pick embed = {i->weight, s->token_ids, at(s, i->out), i->width, i->out[0].width,
                  s->num_rows, i->width, i->bfloat};
    Pick select = {at(s, i->in), s->logit_rows, at(s, i->out), i->in[0].width, i->out[0].width,
                   s->num_logit_rows, i->width, 0};
    pick_rows(i->op == EMBEDDING ? &embed : &select, number, threads);
}

static void run_norm(const Step *s, const Instruction *i, int number, int threads) {
    int adds = i->op == ADD_RMS_NORM;
    const View *out = i->out + adds, *sum = i->out;
    Norm job = {at(s, i->in), adds ? at(s, i->in + 1) : NULL, i->weight, at(s, sum), at(s, out),
                i->in[0].width, i->in[1].width, sum->width, out->width, rows_of(s, i), i->width,
                i->size, i->epsilon};
    norm_rows(&job, number, threads);
}

/* After a linear, prefetch from the weights of the next one. */
static void warm_next(const Step *s, long n, int number, int threads) {
    while (++n < s->num_instructions) {
        const Instruction *i = s->instructions + n;
        if (i->op != LINEAR && i->op != GATED_LINEAR) continue;
        const Linear *next = i->weight;
        if (rows_of(s, i) == 1)
            linear_warm(next, i->op == GATED_LINEAR && next->gated, number, threads);
        return;
    }
}

/* Multiply rows first to last (exclusive): alone if `threads` is 1, else this thread's share. */
static void multiply_rows(const Step *s, const Instruction *i, long first, long last, int number,
                          int threads) {
    const Linear *linear = i->weight;
    int gates = i->op == GATED_LINEAR;
    const View *in = i->in, *out = i->out + (gates && !linear->gated);
    multiply *run = gates && linear->gated ? linear->gated : linear->run;
    run(linear, at(s, in) + first * in->width, in->width, at(s, out) + first * out->width,
        out->width, last - first, number, threads);
}

/* Many rows are computed in equal portions. A thread takes its own in turn, whose rows are in its
 * cache, and then those that others have not begun: a thread whose core runs other programs too
 * computes fewer. Kernels of quantised weights unpack the weight for every call, so they get all of
 * a thread's rows at once. */
static void run_linear(Run *run, long n, int number, int threads) {
    const Step *s = run->step;
    const Instruction *i = s->instructions + n;
    long rows = rows_of(s, i), most = run->portion * threads, each = (rows + most - 1) / most, next;
    if (threads == 1 || rows < threads * OWN_ROWS || ((const Linear *)i->weight)->scales) {
        multiply_rows(s, i, 0, rows, number, threads);
        warm_next(s, n, number, threads);
        return;
    }
    for (int turn = 0; turn < threads; turn++) {
        int owner = (number + turn) % threads;
        while ((next = atomic_fetch_add(counter(run, n, owner), 1)) < each) {
            long portion = owner * each + next, count = each * threads;
            multiply_rows(s, i, rows * portion / count, rows * (portion + 1) / count, 0, 1);
        }
    }
}

/* out = silu(gate) * up. Gate and up are the halves of one matrix, which all threads have made. */
static void run_gate(const Step *s, const Instruction *i, int number, int threads) {
    const View *both = i->out + 1;
    const float *gate = at(s, both);
    Elements job = {SILU_MUL, gate, gate + i->width, at(s, i->out), both->width, both->width,
                    i->out[0].width, rows_of(s, i), i->width};
    pointwise(&job, number, threads);
}

static void run_gated(Run *run, long n, int number, int threads) {
    const Instruction *i = run->step->instructions + n;
    run_linear(run, n, number, threads);
    if (((const Linear *)i->weight)->gated) return;
    barrier_wait(&run->barrier, threads);
    run_gate(run->step, i, number, threads);
}

static void run_turn(const Step *s, const Instruction *i, int number, int threads) {
    const View *q = i->in, *k = i->op == KV_WRITE ? i->in : i->in + 1, *v = k + 1;
    Turn job = {.tables = i->op == KV_WRITE ? NULL : s->tables[i->table],
                .positions = s->positions, .slots = s->slots + i->blocks * s->num_rows,
                .num_rows = s->num_rows,
                .cache = cache_of(s, i->layer)};
    if (i->op != KV_WRITE) {
        job.q = at(s, q), job.ldq = q->width;
        job.out = at(s, i->out), job.ldo = i->out[0].width;
        job.heads = i->width / i->size;
        job.cache.head_dim = i->size;
    }
    if (i->op != ROPE) {
        job.k = at(s, k), job.ldk = k->width;
        job.v = at(s, v), job.ldv = v->width;
    }
    turn_rows(&job, number, threads);
}

static void run_pointwise(const Step *s, const Instruction *i, int number, int threads) {
    const View *b = i->op == OP_SILU ? i->in : i->in + 1;
    Elements job = {(Pointwise)(i->op - OP_ADD), at(s, i->in), at(s, b), at(s, i->out),
                    i->in[0].width, b->width, i->out[0].width, rows_of(s, i), i->width};
    pointwise(&job, number, threads);
}

static void run_attention(Run *run, long n, int number) {
    const Step *s = run->step;
    const Instruction *i = s->instructions + n;
    Cache cache = cache_of(s, i->layer);
    Layer layer = {at(s, i->in), cache.keys, cache.values, at(s, i->out), i->in[0].width,
                   i->out[0].width,
                   s->block_tables + i->blocks * s->batch.num_sequences * s->batch.table_len};
    attention_share(run->attentions + i->table, &layer, counter(run, n, 0), number);
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

static void run_share(void *job, int number, int threads) {
    Run *run = job;
    const Step *s = run->step;
    for (long n = 0; n < s->num_instructions; n++) {
        const Instruction *i = s->instructions + n;
        if (i->waits || s->times) barrier_wait(&run->barrier, threads);
        if (s->times && !number) s->times[n] = now_ns();
        switch ((Op)i->op) {
            case EMBEDDING:
            case SELECT_ROWS: run_pick(s, i, number, threads); break;
            case RMS_NORM:
            case ADD_RMS_NORM: run_norm(s, i, number, threads); break;
            case LINEAR: run_linear(run, n, number, threads); break;
            case GATED_LINEAR: run_gated(run, n, number, threads); break;
            case ROPE:
            case KV_WRITE:
            case ROPE_KV_WRITE: run_turn(s, i, number, threads); break;
            case PAGED_ATTENTION: run_attention(run, n, number); break;
            case OP_ADD:
            case OP_MUL:
            case OP_SILU:
            case OP_SILU_MUL: run_pointwise(s, i, number, threads); break;
        }
    }
}

static long rounded_up(long bytes) { return (bytes + 63) / 64 * 64; }

/* Plan every kind of attention and set all counters to zero, in memory that lives until
 * sage_step_close. Return whether there is memory. */
static int plan(Run *run, Step *s, int threads) {
    long plans = rounded_up(s->num_heads * (long)sizeof(Attention));
    long counters = s->num_instructions * threads * (long)sizeof(atomic_long);
    long bytes = plans + rounded_up(counters);
    Attention sized;
    for (long kind = 0; kind < s->num_heads; kind++)
        bytes += rounded_up(attention_plan(&sized, s->heads + kind, &s->batch, threads));
    if (bytes > s->memory_bytes) {
        free(s->memory);
        s->memory = aligned_alloc(64, (size_t)bytes);
        s->memory_bytes = s->memory ? bytes : 0;
        if (!s->memory) return 0;
    }
    run->attentions = (Attention *)s->memory;
    run->next = memset(s->memory + plans, 0, (size_t)counters);
    char *memory = s->memory + plans + rounded_up(counters);
    for (long kind = 0; kind < s->num_heads; kind++) {
        long size = attention_plan(run->attentions + kind, s->heads + kind, &s->batch, threads);
        attention_place(run->attentions + kind, memory);
        memory += rounded_up(size);
    }
    return 1;
}

/* Whether all token ids are in the vocabulary: EMBEDDING would read outside of its weight. */
static int are_tokens(const Step *s) {
    for (long n = 0; n < s->num_instructions; n++)
        if (s->instructions[n].op == EMBEDDING)
            for (long row = 0; row < s->num_rows; row++)
                if (s->token_ids[row] < 0 || s->token_ids[row] >= s->instructions[n].size) return 0;
    return 1;
}

int sage_step_run(Step *step, int threads) {
    if (!are_tokens(step)) return NO_SUCH_TOKEN;
    /* All threads must cut alike, so they read `tuning`, which may change meanwhile, only once. */
    Run run = {.step = step, .threads = threads,
               .portion = step->batch.tiles ? TILED : tuning.rows};
    if (!plan(&run, step, threads)) return NO_MEMORY;
    team_run(run_share, &run, threads);
    if (step->times) step->times[step->num_instructions] = now_ns();
    return DONE;
}

void sage_step_close(Step *step) {
    free(step->memory);
    step->memory = NULL;
    step->memory_bytes = 0;
}

/* The sizes of the structs that Python fills, for the test that compares them with c_structs.py. */
void sage_sizes(long *sizes) {
    long found[] = {sizeof(Step), sizeof(Instruction), sizeof(Linear),
                    sizeof(Heads), sizeof(Batch), sizeof(Layer)};
    for (int i = 0; i < 6; i++) sizes[i] = found[i];
}
