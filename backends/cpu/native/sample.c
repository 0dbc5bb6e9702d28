/* Samples tokens from logits: temperature, min_p, top_k, top_p, then the cumulative distribution is
 * inverted at one number. sampler.py defines the same in numpy.
 *
 * A row's token depends on the row alone: each row is computed by one thread, in one order.
 */
#include <math.h>
#include <stdlib.h>

#include "team.h"
#include "vector.h"

#define BUCKETS 4096
#define A_UNIT 128.0f /* buckets of one unit of logits: 4095 of them reach 32 below the largest */
#define BLOCK 512     /* tokens whose weights are summed before the token is searched among them */

/* The options of a row; a top_k of 0 and a top_p of 1 keep all tokens. 0 <= number < 1. */
typedef struct {
    float temperature, min_p;
    double top_p, number;
    int64_t top_k;
} Options;

typedef struct {
    float *scores;
    long ld, num_rows, size;
    const Options *options;
    int64_t *tokens;
    atomic_int is_out_of_memory;
} Sampling;

typedef double doubles __attribute__((vector_size(8 * LANES)));

/* The scores from `at`; those past the end of the row are -inf. */
INLINE vec scores_at(const float *row, long at, long size) {
    if (at + LANES <= size) return load_float(row + at);
    vec some = fill(-INFINITY);
    memcpy(&some, row + at, sizeof(float) * (size_t)(size - at));
    return some;
}

INLINE vec weights_at(const float *row, long at, long size, float largest) {
    return lanes_exp(scores_at(row, at, size) - fill(largest));
}

/* Divide the row by the temperature, and return its largest score. */
static float heated(float *row, long size, float temperature) {
    vec best = fill(-INFINITY);
    long i = 0;
    for (; i + LANES <= size; i += LANES) {
        vec value = load_float(row + i) / temperature;
        store_float(row + i, value);
        best = choose(value > best, value, best);
    }
    float largest = lanes_max(best);
    for (; i < size; i++) {
        row[i] /= temperature;
        if (row[i] > largest) largest = row[i];
    }
    return largest;
}

static void drop_below(float *row, long size, float least) {
    for (long i = 0; i < size; i++) row[i] = row[i] < least ? -INFINITY : row[i];
}

/* The bucket of a score. The last bucket has all that are far below the largest. */
static inline long bucket_of(float score, float largest) {
    float below = (largest - score) * A_UNIT;
    return below < BUCKETS - 1 ? (long)below : BUCKETS - 1;
}

/* Gather the scores of one bucket; return their number. */
static long gather(const float *row, long size, float largest, long bucket, float *found) {
    long count = 0;
    for (long i = 0; i < size; i++) {
        found[count] = row[i];
        count += bucket_of(row[i], largest) == bucket;
    }
    return count;
}

static int descending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

/* The `rank`-th largest of some numbers, from 0 (Hoare's selection). */
static float ranked(float *numbers, long count, long rank) {
    long low = 0, high = count - 1;
    while (low < high) {
        float pivot = numbers[(low + high) / 2];
        long i = low, j = high;
        while (i <= j) {
            while (numbers[i] > pivot) i++;
            while (numbers[j] < pivot) j--;
            if (i > j) break;
            float kept = numbers[i];
            numbers[i++] = numbers[j];
            numbers[j--] = kept;
        }
        if (rank <= j)
            high = j;
        else if (rank >= i)
            low = i;
        else
            break;
    }
    return numbers[rank];
}

/* Keep the k largest scores, and those as large as the k-th. */
static void keep_top_k(float *row, long size, float largest, long k, float *scratch) {
    int32_t counts[BUCKETS] = {0};
    for (long i = 0; i < size; i++) counts[bucket_of(row[i], largest)]++;
    long bucket = 0, before = 0;
    while (before + counts[bucket] < k) before += counts[bucket++];
    long count = gather(row, size, largest, bucket, scratch);
    drop_below(row, size, ranked(scratch, count, k - 1 - before));
}

/* Keep the fewest largest scores whose weights reach `share` of all. */
static void keep_top_p(float *row, long size, float largest, double share, float *scratch) {
    double masses[BUCKETS] = {0}, aim = 0, before = 0;
    for (long i = 0; i < size; i += LANES) {
        vec weights = weights_at(row, i, size, largest);
        long some = size - i < LANES ? size - i : LANES;
        for (long lane = 0; lane < some; lane++)
            masses[bucket_of(row[i + lane], largest)] += weights[lane];
    }
    for (long b = 0; b < BUCKETS; b++) aim += masses[b];
    aim *= share;
    long bucket = 0;
    while (bucket < BUCKETS - 1 && before + masses[bucket] < aim) before += masses[bucket++];
    long count = gather(row, size, largest, bucket, scratch), kept = 0;
    if (!count) return;
    qsort(scratch, (size_t)count, sizeof *scratch, descending);
    for (; kept < count - 1; kept++) {
        before += lanes_exp(fill(scratch[kept] - largest))[0];
        if (before >= aim) break;
    }
    drop_below(row, size, scratch[kept]);
}

/* The sum of all lanes in doubles, added in the order of lanes_sum. */
static double sum_of(vec values) {
    doubles wide = __builtin_convertvector(values, doubles);
    double four[4];
    for (int i = 0; i < 4; i++) four[i] = LANES > 4 ? wide[i] + wide[(i + 4) % LANES] : wide[i];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

/* The sum of the weights of the tokens `first` to `last` (exclusive). */
static double mass_of(const float *row, long first, long last, float largest) {
    double mass = 0;
    for (long i = first; i < last; i += LANES) mass += sum_of(weights_at(row, i, last, largest));
    return mass;
}

/* The first token whose cumulated weight exceeds `number` times the sum of all. */
static long inverted(const float *row, long size, float largest, double number) {
    double total = 0, before = 0;
    for (long i = 0; i < size; i += BLOCK)
        total += mass_of(row, i, i + BLOCK < size ? i + BLOCK : size, largest);
    double aim = number * total;
    long found = 0; /* the last token with a weight: rounding may leave the sum below the aim */
    for (long i = 0, last; i < size; i = last) {
        last = i + BLOCK < size ? i + BLOCK : size;
        double mass = mass_of(row, i, last, largest);
        if (before + mass <= aim && last < size) {
            before += mass;
            continue;
        }
        for (long at = i; at < last; at++) {
            float weight = lanes_exp(fill(row[at] - largest))[0];
            if (weight > 0) found = at;
            if ((before += weight) > aim) return at;
        }
    }
    return found;
}

static long sampled(float *row, long size, const Options *o, float *scratch) {
    float largest = heated(row, size, o->temperature);
    if (o->min_p > 0) drop_below(row, size, largest + logf(o->min_p));
    if (o->top_k > 0 && o->top_k < size) keep_top_k(row, size, largest, o->top_k, scratch);
    if (o->top_p < 1) keep_top_p(row, size, largest, o->top_p, scratch);
    return inverted(row, size, largest, o->number);
}

static void sample_rows(void *job, int number, int threads) {
    Sampling *s = job;
    long row, last;
    float *scratch = malloc(sizeof(float) * (size_t)(s->size + 1));
    if (!scratch) atomic_store(&s->is_out_of_memory, 1);
    share_of(s->num_rows, number, threads, &row, &last);
    for (; scratch && row < last; row++)
        s->tokens[row] = sampled(s->scores + row * s->ld, s->size, s->options + row, scratch);
    free(scratch);
}

/* Sample a token for each row, which is changed. Return 0, or 1 if there is no memory. */
int sage_sample(float *scores, long ld, long num_rows, long size, const Options *options,
                int64_t *tokens, int threads) {
    Sampling job = {scores, ld, num_rows, size, options, tokens, 0};
    team_run(sample_rows, &job, num_rows < threads ? (int)num_rows : threads);
    return atomic_load(&job.is_out_of_memory);
}
