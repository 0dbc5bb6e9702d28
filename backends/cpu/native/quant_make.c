/* Quantises weights to 4 or 8 bits, with the scale of least squared error for each group of 32.
 *
 * Each try is the scale that maps the largest number of the group to one of the given numbers. The
 * last try is the scale that fits best to the codes of the best scale so far. Codes of 4 bits stand
 * for 16 levels. */
#include "quant.h"
#include "team.h"

#define GROUP 32
#define PARTS (GROUP / LANES)
#define LEVELS 16

typedef struct {
    const void *weight; /* float or bfloat16, [num_rows, k] */
    const float *tries; /* numbers to try for the largest number */
    const float *levels, *middles; /* the ascending levels of 4 bits, and what lies between them */
    int8_t *codes;      /* [num_rows, k]; with 4 bits, the number of the level */
    uint16_t *scales;   /* float16, [num_rows, groups] */
    long num_rows, k;
    int bfloat, bits, num_tries;
} Making;

static uint16_t float_to_half(float value) {
    uint32_t bits, sign;
    float size = value < 0.0f ? -value : value;
    if (!(size < 65504.0f)) size = 65504.0f;
    size *= 0x1p-112f; /* numbers below float16's normal range become subnormal and are rounded */
    memcpy(&bits, &size, sizeof bits);
    memcpy(&sign, &value, sizeof sign);
    bits += 0xfff + ((bits >> 13) & 1); /* to nearest even */
    return (uint16_t)(((sign >> 16) & 0x8000) | (bits >> 13));
}

/* Round a scale to float16: codes must be chosen for the stored scale. */
INLINE float stored(float scale) {
#ifdef __F16C__
    if (scale < 65504.0f && scale > -65504.0f) return _cvtsh_ss(_cvtss_sh(scale, 0));
#endif
    return half_to_float(float_to_half(scale));
}

/* Element `at` of 16 numbers. */
INLINE vec entries(const float *table, ivec at) {
#if defined(__AVX512VL__)
    return (vec)_mm256_permutex2var_ps((__m256)load_float(table), (__m256i)at,
                                       (__m256)load_float(table + LANES));
#elif defined(__AVX2__)
    return (vec)_mm256_i32gather_ps(table, (__m256i)at, sizeof *table);
#else
    vec found;
    for (int i = 0; i < LANES; i++) found[i] = table[at[i]];
    return found;
#endif
}

/* The number of the level that is nearest. */
INLINE ivec nearest_level(const Making *m, vec value) {
    ivec at = {0};
    for (int half = LEVELS / 2; half; half /= 2)
        at += (value > entries(m->middles, at + (half - 1))) & half;
    return at;
}

/* The nearest number that a code stands for: a level, or a whole number. */
INLINE vec nearest(const Making *m, vec value) {
    const float most = 127.0f;
    if (m->bits == 4) return entries(m->levels, nearest_level(m, value));
    vec whole = (value + 12582912.0f) - 12582912.0f;
    whole = choose(whole < fill(-most), fill(-most), whole);
    return choose(whole > fill(most), fill(most), whole);
}

INLINE float inverse(float scale) {
    float size = scale < 0.0f ? -scale : scale;
    return size > 1e-30f ? 1.0f / scale : 0.0f;
}

INLINE float squared_error(const Making *m, const vec *w, float scale) {
    vec errors = {0};
    float by = inverse(scale);
    for (int i = 0; i < PARTS; i++) {
        vec rest = w[i] - nearest(m, w[i] * by) * scale;
        errors = fused(rest, rest, errors);
    }
    return lanes_sum(errors);
}

/* The scale of least squared error for the codes that `scale` gives. */
INLINE float fitted(const Making *m, const vec *w, float scale) {
    vec above = {0}, below = {0};
    float by = inverse(scale);
    for (int i = 0; i < PARTS; i++) {
        vec code = nearest(m, w[i] * by);
        above = fused(w[i], code, above);
        below = fused(code, code, below);
    }
    return lanes_sum(above) / (lanes_sum(below) + 1e-30f);
}

INLINE float best_scale(const Making *m, const vec *w) {
    float largest = 0.0f, size = 0.0f, best = 0.0f, error = 3.4e38f;
    for (int i = 0; i < GROUP; i++) {
        float value = w[i / LANES][i % LANES], own = value < 0.0f ? -value : value;
        if (own > size) size = own, largest = value;
    }
    for (int i = 0; i < m->num_tries; i++) {
        float scale = stored(largest / m->tries[i]);
        float found = squared_error(m, w, scale);
        if (found < error) error = found, best = scale;
    }
    float fit = stored(fitted(m, w, best));
    return squared_error(m, w, fit) < error ? fit : best;
}

INLINE void make_group(const Making *m, long row, long group) {
    long num_groups = (m->k + GROUP - 1) / GROUP, first = row * m->k + group * GROUP;
    long count = m->k - group * GROUP < GROUP ? m->k - group * GROUP : GROUP;
    float flat[GROUP] = {0};
    vec w[PARTS];
    for (long i = 0; i < count; i++) flat[i] = load_one(m->weight, first + i, m->bfloat);
    memcpy(w, flat, sizeof w);
    uint16_t half = float_to_half(best_scale(m, w));
    float by = inverse(half_to_float(half));
    int32_t codes[GROUP];
    for (int i = 0; i < PARTS; i++) {
        ivec code = m->bits == 4 ? nearest_level(m, w[i] * by)
                                 : __builtin_convertvector(nearest(m, w[i] * by), ivec);
        memcpy(codes + i * LANES, &code, sizeof code);
    }
    for (long i = 0; i < count; i++) m->codes[first + i] = (int8_t)codes[i];
    m->scales[row * num_groups + group] = half;
}

static void make_rows(void *job, int number, int threads) {
    const Making *m = job;
    long last = m->num_rows * (number + 1) / threads;
    for (long row = m->num_rows * number / threads; row < last; row++)
        for (long group = 0; group * GROUP < m->k; group++) make_group(m, row, group);
}

/* `levels`: 16 ascending numbers for 4 bits; not read for 8 bits. */
void sage_quant_make(const void *weight, int bfloat, const float *tries, int num_tries,
                     const float *levels, void *codes, void *scales, int bits, long num_rows,
                     long k, int threads) {
    float middles[LEVELS] = {0};
    for (int i = 0; bits == 4 && i + 1 < LEVELS; i++) middles[i] = (levels[i] + levels[i + 1]) / 2;
    Making job = {weight, tries, levels, middles, codes, scales, num_rows, k, bfloat, bits,
                  num_tries};
    team_run(make_rows, &job, threads);
}
