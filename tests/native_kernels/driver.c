/* Runs C kernels on arguments and memory from a file, and writes the results to another file. So a
 * kernel of any CPU runs under an emulator, without a Python of that CPU. calls.py writes and reads
 * the files.
 *
 * A file is a sequence of 64-bit numbers: the names of functions (32 bytes each), then cases. A case
 * is memory (blobs), pointers in that memory (links), and calls. Each case runs on a thread of its
 * own, so that the team of threads of a case ends with the case.
 *
 * A blob ends where an unmapped page begins: reading past the end of an array is a crash. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "linear.h"
#include "tiles.h"

#define PAGE (64L << 10) /* the largest page of any system */
#define NAME 32          /* bytes of the name of a function */
#define MOST_ARGUMENTS 20
#define UNTOUCHED 0xa5 /* fills the memory before a blob, and blobs without contents */

typedef union {
    int64_t number;
    void *pointer;
    float real;
} Value;

typedef int64_t call(const Value *values);

/* Kernels are declared here: their headers hold only what other kernels use. */
#define P(i) values[i].pointer
#define N(i) values[i].number
#define I(i) (int)values[i].number
#define F(i) values[i].real
#define RETURNS(type, name, parameters, arguments) \
    type name parameters;                          \
    static int64_t call_##name(const Value *values) { return (void)values, (int64_t)name arguments; }
#define RUNS(name, parameters, arguments)             \
    void name parameters;                             \
    static int64_t call_##name(const Value *values) { \
        name arguments;                               \
        return 0;                                     \
    }
#define MULTIPLIES(name) void name(void);

RETURNS(int, sage_has_pairs, (void), ())
RETURNS(int, sage_has_tiles, (void), ())
RUNS(sage_tune_get, (void *used, void *initial), (P(0), P(1)))
RETURNS(int, sage_tune_set, (void *values), (P(0)))
RETURNS(int, sage_is_gated, (long n, long k), (N(0), N(1)))
RETURNS(int, sage_is_quant_gated, (long n, long k), (N(0), N(1)))
RETURNS(long, sage_packed_bytes, (long n, long k, int kind), (N(0), N(1), I(2)))
RUNS(sage_pack, (const void *w, int kind, void *to, long n, long k, int threads),
     (P(0), I(1), P(2), N(3), N(4), I(5)))
RUNS(sage_linear, (void *l, void *x, long ldx, void *out, long ldo, long rows, int threads),
     (P(0), P(1), N(2), P(3), N(4), N(5), I(6)))
RUNS(sage_rms_norm, (void *a, long lda, void *b, long ldb, void *weight, void *sum, void *out,
                     long rows, long width, long size, float epsilon, int threads),
     (P(0), N(1), P(2), N(3), P(4), P(5), P(6), N(7), N(8), N(9), F(10), I(11)))
RUNS(sage_silu_mul, (void *gate, long ldg, void *up, long ldu, void *out, long rows, long width,
                     int threads),
     (P(0), N(1), P(2), N(3), P(4), N(5), N(6), I(7)))
RUNS(sage_rope_kv_write, (void *q, long ldq, void *k, long ldk, void *v, long ldv, void *tables,
                          void *positions, void *slots, void *out, void *keys, void *vals,
                          int bfloat, long rows, long heads, long kv_heads, long size, long block),
     (P(0), N(1), P(2), N(3), P(4), N(5), P(6), P(7), P(8), P(9), P(10), P(11), I(12), N(13),
      N(14), N(15), N(16), N(17)))
RETURNS(int, sage_attention, (void *heads, void *batch, void *layer, int threads),
        (P(0), P(1), P(2), I(3)))
RETURNS(int, sage_step_run, (void *step, int threads), (P(0), I(1)))
RUNS(sage_step_close, (void *step), (P(0)))
RUNS(sage_sizes, (void *sizes), (P(0)))
RETURNS(uint64_t, sage_copy_sum, (long count, void *from, void *to, void *sizes),
        (N(0), P(1), P(2), P(3)))
RETURNS(long, sage_largest_allowed, (void *row, void *mask, long size), (P(0), P(1), N(2)))
RETURNS(long, first_largest, (void *row, long size), (P(0), N(1)))
RETURNS(int, sage_sample, (void *scores, long ld, long rows, long size, void *options, void *tokens,
                           int threads),
        (P(0), N(1), N(2), N(3), P(4), P(5), I(6)))
RUNS(sage_quant_make, (void *w, int bfloat, void *tries, int num_tries, void *levels, void *codes,
                       void *scales, int bits, long rows, long k, int threads),
     (P(0), I(1), P(2), I(3), P(4), P(5), P(6), I(7), N(8), N(9), I(10)))
MULTIPLIES(sage_multiply_float)
MULTIPLIES(sage_multiply_bfloat)
MULTIPLIES(sage_multiply_pairs)
MULTIPLIES(sage_gated_float)
MULTIPLIES(sage_gated_bfloat)
MULTIPLIES(sage_gated_pairs)
MULTIPLIES(sage_quant_4_8)
MULTIPLIES(sage_quant_4_16)
MULTIPLIES(sage_quant_8_8)
MULTIPLIES(sage_quant_8_16)
MULTIPLIES(sage_quant_4_8_many)
MULTIPLIES(sage_quant_8_8_many)
MULTIPLIES(sage_quant_8_16_many)
MULTIPLIES(sage_quant_4_pairs)
MULTIPLIES(sage_quant_8_pairs)
MULTIPLIES(sage_quant_4_8_gated)
MULTIPLIES(sage_quant_4_16_gated)
MULTIPLIES(sage_quant_8_8_gated)
MULTIPLIES(sage_quant_8_16_gated)
MULTIPLIES(sage_quant_4_8_many_gated)
MULTIPLIES(sage_quant_8_8_many_gated)
MULTIPLIES(sage_quant_8_16_many_gated)
MULTIPLIES(sage_quant_4_pairs_gated)
MULTIPLIES(sage_quant_8_pairs_gated)
MULTIPLIES(sage_row_float)
MULTIPLIES(sage_row_bfloat)
MULTIPLIES(sage_row_pairs)
#if TILES
MULTIPLIES(sage_multiply_tiles)
MULTIPLIES(sage_gated_tiles)
#endif

/* The linker sends the kernels' requests for memory and threads here (--wrap). A request is refused
 * if none is left of those that `allow` granted; negative: any number is left. */
static long allowed = -1;
static int is_refused(void) { return allowed >= 0 && !(allowed && allowed--); }
#define WRAPPED(type, name, parameters, arguments, refusal) \
    type __real_##name parameters;                          \
    type __wrap_##name parameters;                          \
    type __wrap_##name parameters { return is_refused() ? refusal : __real_##name arguments; }
WRAPPED(void *, malloc, (size_t size), (size), NULL)
WRAPPED(void *, calloc, (size_t count, size_t size), (count, size), NULL)
WRAPPED(void *, realloc, (void *old, size_t size), (old, size), NULL)
WRAPPED(void *, aligned_alloc, (size_t unit, size_t size), (unit, size), NULL)
WRAPPED(int, pthread_create,
        (pthread_t *thread, const pthread_attr_t *with, void *(*run)(void *), void *job),
        (thread, with, run, job), 1)

static int64_t call_allow(const Value *values) {
    allowed = N(0);
    return 0;
}

static int64_t call_gated(const Value *values) {
    const Linear *linear = P(0);
    int threads = I(6);
    for (int number = 0; number < threads; number++)
        linear->gated(linear, P(1), N(2), P(3), N(4), N(5), number, threads);
    return 0;
}

static int64_t call_row(const Value *values) {
    const Linear *linear = P(0);
    linear->row(linear, N(1), P(2));
    return 0;
}

static int64_t call_sleep_us(const Value *values) {
    struct timespec span = {0, N(0) * 1000};
    return nanosleep(&span, NULL);
}

static int64_t call_allocate(const Value *values); /* give a blob the size that a call returned */

typedef struct {
    const char *name;
    call *run;
    void *address; /* for links to functions */
} Function;

#define OWN(name) {#name, call_##name, NULL}
#define MULTIPLY(name) {#name, NULL, (void *)name}
static const Function functions[] = {
    OWN(allow), OWN(gated), OWN(row), OWN(sleep_us), OWN(allocate), OWN(sage_has_pairs), OWN(sage_is_gated),
    OWN(sage_has_tiles), OWN(sage_tune_get), OWN(sage_tune_set), OWN(sage_sample),
    OWN(sage_packed_bytes), OWN(sage_pack), OWN(sage_linear), OWN(sage_rms_norm),
    OWN(sage_silu_mul), OWN(sage_rope_kv_write), OWN(sage_attention), OWN(sage_step_run),
    OWN(sage_step_close), OWN(sage_sizes), OWN(sage_copy_sum), OWN(sage_largest_allowed),
    OWN(first_largest), OWN(sage_quant_make), MULTIPLY(sage_multiply_float), MULTIPLY(sage_multiply_bfloat),
    MULTIPLY(sage_multiply_pairs), MULTIPLY(sage_gated_float), MULTIPLY(sage_gated_bfloat),
    MULTIPLY(sage_gated_pairs), MULTIPLY(sage_quant_4_8), MULTIPLY(sage_quant_4_16),
    MULTIPLY(sage_quant_8_8), MULTIPLY(sage_quant_8_16), MULTIPLY(sage_quant_4_8_many),
    MULTIPLY(sage_quant_8_8_many), MULTIPLY(sage_quant_8_16_many), MULTIPLY(sage_quant_4_pairs),
    MULTIPLY(sage_quant_8_pairs), OWN(sage_is_quant_gated), MULTIPLY(sage_quant_4_8_gated),
    MULTIPLY(sage_quant_4_16_gated), MULTIPLY(sage_quant_8_8_gated),
    MULTIPLY(sage_quant_8_16_gated), MULTIPLY(sage_quant_4_8_many_gated),
    MULTIPLY(sage_quant_8_8_many_gated), MULTIPLY(sage_quant_8_16_many_gated),
    MULTIPLY(sage_quant_4_pairs_gated), MULTIPLY(sage_quant_8_pairs_gated),
    MULTIPLY(sage_row_float), MULTIPLY(sage_row_bfloat), MULTIPLY(sage_row_pairs),
#if TILES
    MULTIPLY(sage_multiply_tiles), MULTIPLY(sage_gated_tiles),
#endif
};
#define NUM_FUNCTIONS (sizeof functions / sizeof *functions)

typedef struct {
    int64_t bytes, is_kept;
    const char *contents; /* NULL: none are given */
    char *memory, *pages;
    size_t mapped;
} Blob;

typedef struct {
    int64_t blob, at, target, offset; /* a negative target: the function -1 - target */
} Link;

typedef struct {
    int64_t function, num_values;
    struct {
        int64_t kind, value, offset; /* kind 0: a number or a float's bits; 1: offset in a blob */
    } values[MOST_ARGUMENTS];
} Call;

typedef struct {
    Blob *blobs;
    const Link *links;
    const Call *calls;
    int64_t *found; /* what the calls returned */
    int64_t num_blobs, num_links, num_calls;
} Case;

static const Function *named; /* in the order of the file */
static Case current;
static FILE *results;

static void fail(const char *why, const char *what) {
    fprintf(stderr, "%s: %s\n", why, what);
    exit(2);
}

static void map(Blob *blob) {
    size_t size = ((size_t)blob->bytes + PAGE - 1) / PAGE * PAGE;
    blob->mapped = size + 2 * PAGE;
    blob->pages = mmap(NULL, blob->mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (blob->pages == MAP_FAILED) fail("mmap", "no memory");
    if (size && mprotect(blob->pages + PAGE, size, PROT_READ | PROT_WRITE)) fail("mprotect", "?");
    memset(blob->pages + PAGE, UNTOUCHED, size);
    blob->memory = blob->pages + PAGE + size - blob->bytes;
    if (blob->contents) memcpy(blob->memory, blob->contents, (size_t)blob->bytes);
}

static void unmap(Blob *blob) {
    if (!blob->pages) return;
    for (const char *at = blob->pages + PAGE; at < blob->memory; at++)
        if (*(const unsigned char *)at != UNTOUCHED) fail("written", "the memory before a blob");
    munmap(blob->pages, blob->mapped);
}

static int64_t call_allocate(const Value *values) {
    Blob *blob = current.blobs + N(0);
    blob->bytes = current.found[N(1)];
    map(blob);
    return blob->bytes;
}

static void link_all(const Case *c) {
    for (int64_t i = 0; i < c->num_links; i++) {
        const Link *l = c->links + i;
        void *target = l->target < 0 ? named[-1 - l->target].address
                                     : c->blobs[l->target].memory + l->offset;
        if (l->target < 0 || c->blobs[l->target].memory)
            memcpy(c->blobs[l->blob].memory + l->at, &target, sizeof target);
    }
}

static void *run_case(void *unused) {
    for (int64_t i = 0; i < current.num_calls; i++) {
        const Call *c = current.calls + i;
        Value values[MOST_ARGUMENTS];
        for (int64_t v = 0; v < c->num_values; v++) {
            values[v].number = c->values[v].value;
            if (c->values[v].kind)
                values[v].pointer = current.blobs[c->values[v].value].memory + c->values[v].offset;
        }
        link_all(&current);
        current.found[i] = named[c->function].run(values);
    }
    return unused;
}

static void write_all(const void *from, int64_t bytes) {
    if (bytes && fwrite(from, (size_t)bytes, 1, results) != 1) fail("fwrite", "no room");
}

/* Read a case at `from`, run it, write its results, and return where the next case is. */
static const int64_t *one_case(const int64_t *from) {
    Case c = {.num_blobs = from[0], .num_links = from[1], .num_calls = from[2]};
    from += 3;
    c.blobs = __real_calloc((size_t)c.num_blobs, sizeof *c.blobs);
    c.found = __real_calloc((size_t)c.num_calls, sizeof *c.found);
    for (int64_t i = 0; i < c.num_blobs; i++) {
        int64_t is_given = from[1];
        c.blobs[i] = (Blob){.bytes = from[0], .is_kept = from[2]};
        from += 3;
        if (is_given) c.blobs[i].contents = (const char *)from, from += (c.blobs[i].bytes + 7) / 8;
        if (c.blobs[i].bytes >= 0) map(c.blobs + i); /* else call_allocate does */
    }
    c.links = (const Link *)from, from += c.num_links * (int64_t)(sizeof(Link) / 8);
    c.calls = (const Call *)from, from += c.num_calls * (int64_t)(sizeof(Call) / 8);
    current = c;
    pthread_t thread;
    if (__real_pthread_create(&thread, NULL, run_case, NULL)) fail("pthread_create", "no thread");
    pthread_join(thread, NULL);
    allowed = -1;
    write_all(c.found, c.num_calls * 8);
    for (int64_t i = 0; i < c.num_blobs; i++) {
        if (c.blobs[i].is_kept) {
            write_all(&c.blobs[i].bytes, 8);
            write_all(c.blobs[i].memory, c.blobs[i].bytes);
        }
        unmap(c.blobs + i);
    }
    free(c.blobs);
    free(c.found);
    return from;
}

static int64_t *whole_file(const char *path, int64_t *bytes) {
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END)) fail("no such file", path);
    *bytes = ftell(file);
    rewind(file);
    int64_t *found = __real_malloc((size_t)*bytes);
    if (!found || fread(found, (size_t)*bytes, 1, file) != 1) fail("cannot read", path);
    fclose(file);
    return found;
}

static Function function_of(const char *name) {
    for (size_t i = 0; i < NUM_FUNCTIONS; i++)
        if (!strncmp(functions[i].name, name, NAME)) return functions[i];
    fail("no such function", name);
    return functions[0];
}

int main(int num_arguments, char **arguments) {
    if (num_arguments != 3) fail("usage", "driver CASES RESULTS");
    int64_t bytes, *from = whole_file(arguments[1], &bytes);
    const int64_t *at = from + 1, *end = from + bytes / 8;
    Function *found = __real_calloc((size_t)from[0] + 1, sizeof *found);
    for (int64_t i = 0; i < from[0]; i++, at += NAME / 8) found[i] = function_of((const char *)at);
    named = found;
    if (!(results = fopen(arguments[2], "wb"))) fail("cannot write", arguments[2]);
    while (at < end) at = one_case(at);
    if (fclose(results)) fail("cannot write", arguments[2]);
    free(found);
    free(from);
    return 0;
}
