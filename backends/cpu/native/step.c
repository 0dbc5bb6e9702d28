/* Runs all instructions of a step in one round of the team. Threads wait for each other only before
 * an instruction that could touch what another thread still works on. There, helpers join that the
 * system has given no core before.
 */
#include "step.h"

#include <stdlib.h>
#include <time.h>

#include "pack.h"
#include "pick.h"
#include "rows.h"
#include "team.h"

typedef struct {
    const Step *step;
    Attention *attentions; /* one plan per kind of attention */
    Meeting meeting;
    Barrier gated; /* between the parts of an instruction */
    _Alignas(64) atomic_long next; /* the next piece of attention to compute */
} Run;

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
                  s->num_rows, i->width, (TableForm)i->table_form};
    Pick select = {at(s, i->in), s->logit_rows, at(s, i->out), i->in[0].width, i->out[0].width,
                   s->num_logit_rows, i->width, FLOAT_ROWS};
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

static void run_linear(const Step *s, const Instruction *i, int number, int threads) {
    const Linear *linear = i->weight;
    linear->run(linear, at(s, i->in), i->in[0].width, at(s, i->out), i->out[0].width,
                rows_of(s, i), number, threads);
}

/* out = silu(gate) * up. Gate and up are the halves of one matrix, which all threads have made. */
static void run_gate(const Step *s, const Instruction *i, int number, int threads) {
    const View *both = i->out + 1;
    const float *gate = at(s, both);
    Elements job = {SILU_MUL, gate, gate + i->width, at(s, i->out), both->width, both->width,
                    i->out[0].width, rows_of(s, i), i->width};
    pointwise(&job, number, threads);
}

static void run_gated(Run *run, const Instruction *i, int number, int threads) {
    const Step *s = run->step;
    const Linear *linear = i->weight;
    const View *out = i->out + !linear->gated;
    multiply *multiply_rows = linear->gated ? linear->gated : linear->run;
    multiply_rows(linear, at(s, i->in), i->in[0].width, at(s, out), out->width, rows_of(s, i),
                  number, threads);
    if (linear->gated) return;
    barrier_wait(&run->gated, threads);
    run_gate(s, i, number, threads);
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

static void run_attention(Run *run, const Instruction *i, long *base, int number, int threads) {
    const Step *s = run->step;
    Cache cache = cache_of(s, i->layer);
    Layer layer = {at(s, i->in), cache.keys, cache.values, at(s, i->out), i->in[0].width,
                   i->out[0].width,
                   s->block_tables + i->blocks * s->batch.num_sequences * s->batch.table_len};
    attention_share(run->attentions + i->table, &layer, &run->next, *base, number);
    *base += attention_tickets(run->attentions + i->table, threads);
}

/* After a linear, prefetch from the weights of the next linear. */
static void warm_next(const Step *s, long n, int number, int threads) {
    if (s->instructions[n].op != LINEAR && s->instructions[n].op != GATED_LINEAR) return;
    while (++n < s->num_instructions) {
        const Instruction *i = s->instructions + n;
        if (i->op != LINEAR && i->op != GATED_LINEAR) continue;
        const Linear *next = i->weight;
        if (rows_of(s, i) == 1)
            linear_warm(next, i->op == GATED_LINEAR && next->gated, number, threads);
        return;
    }
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

/* Find the largest logit of each row, while the logits are cached. */
static void find_largest(const Step *s, int number, int threads) {
    long width = s->instructions[s->num_instructions - 1].width, first, last;
    share_of(s->num_logit_rows, number, threads, &first, &last);
    for (long row = first; row < last; row++)
        s->largest[row] = first_largest(s->logits + row * width, width);
}

/* Run instruction `n`. `base`: the first ticket of attention, which it increases. */
static void run_instruction(Run *run, long n, long *base, int number, int threads) {
    const Step *s = run->step;
    const Instruction *i = s->instructions + n;
    switch ((Op)i->op) {
        case EMBEDDING:
        case SELECT_ROWS: run_pick(s, i, number, threads); break;
        case RMS_NORM:
        case ADD_RMS_NORM: run_norm(s, i, number, threads); break;
        case LINEAR: run_linear(s, i, number, threads); break;
        case GATED_LINEAR: run_gated(run, i, number, threads); break;
        case ROPE:
        case KV_WRITE:
        case ROPE_KV_WRITE: run_turn(s, i, number, threads); break;
        case PAGED_ATTENTION: run_attention(run, i, base, number, threads); break;
        case OP_ADD:
        case OP_MUL:
        case OP_SILU:
        case OP_SILU_MUL: run_pointwise(s, i, number, threads); break;
    }
    warm_next(s, n, number, threads);
}

/* A section ends before each instruction that waits. Thread 0 begins alone. A thread `begins` where
 * its first section does, and has nothing to wait for. */
static void run_share(void *job, int helper, int most) {
    (void)most;
    Run *run = job;
    const Step *s = run->step;
    int number = helper ? join_meeting(&run->meeting) : 0;
    if (helper && !number) return;
    int threads = helper ? atomic_load(&run->meeting.threads) : 1;
    long n = helper ? run->meeting.at[0] : 0, base = helper ? run->meeting.at[1] : 0;
    int begins = helper;
    for (; n < s->num_instructions; n++, begins = 0) {
        if (!begins && (s->instructions[n].waits || s->times))
            threads = meet(&run->meeting, threads, n, base);
        if (s->times && !number) s->times[n] = now_ns();
        run_instruction(run, n, &base, number, threads);
    }
    if (s->largest) {
        if (!begins) threads = meet(&run->meeting, threads, n, base);
        find_largest(s, number, threads);
    }
    if (!number) end_meeting(&run->meeting);
}

/* Plan every kind of attention, in memory that lives until sage_step_close. Return NULL without
 * memory. */
static Attention *planned(Step *s, int threads) {
    long head = (s->num_heads * (long)sizeof(Attention) + 64) / 64 * 64, bytes = head;
    Attention plan;
    for (long kind = 0; kind < s->num_heads; kind++)
        bytes += (attention_plan(&plan, s->heads + kind, &s->batch, threads) + 63) / 64 * 64;
    if (bytes > s->memory_bytes) {
        free(s->memory);
        s->memory = aligned_alloc(64, (size_t)bytes);
        s->memory_bytes = s->memory ? bytes : 0;
        if (!s->memory) return NULL;
    }
    Attention *plans = (Attention *)s->memory;
    char *memory = s->memory + head;
    for (long kind = 0; kind < s->num_heads; kind++) {
        long size = attention_plan(plans + kind, s->heads + kind, &s->batch, threads);
        attention_place(plans + kind, memory);
        memory += (size + 63) / 64 * 64;
    }
    return plans;
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
    Run run = {.step = step, .attentions = planned(step, threads)};
    if (!run.attentions) return NO_MEMORY;
    begin_meeting(&run.meeting);
    team_run_open(run_share, &run, threads);
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
                    sizeof(Heads), sizeof(Batch), sizeof(Layer), sizeof(Packing)};
    for (int i = 0; i < 7; i++) sizes[i] = found[i];
}
