/* Quantises weights to 4 or 8 bits, with the scale of least squared error for each group of 32.
 *
 * Each try is the scale that maps the largest number of the group to one of the given codes. The
 * last try is the scale that fits best to the codes of the best scale so far. */
#include "quant.h"
#include "team.h"

#define GROUP 32
#define PARTS (GROUP / LANES)

typedef struct {
    const void *weight; /* float or bfloat16, [num_rows, k] */
    const float *tries; /* codes to try for the largest number */
    int8_t *codes;      /* [num_rows, k]; with 4 bits, codes are stored as 0 to 15 */
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

INLINE vec nearest_code(vec value, float least, float most) {
    vec whole = (value + 12582912.0f) - 12582912.0f;
    whole = choose(whole < fill(least), fill(least), whole);
    return choose(whole > fill(most), fill(most), whole);
}

INLINE float inverse(float scale) {
    float size = scale < 0.0f ? -scale : scale;
    return size > 1e-30f ? 1.0f / scale : 0.0f;
}

INLINE float squared_error(const vec *w, float scale, float least, float most) {
    vec errors = {0};
    float by = inverse(scale);
    for (int i = 0; i < PARTS; i++) {
        vec rest = w[i] - nearest_code(w[i] * by, least, most) * scale;
        errors = fused(rest, rest, errors);
    }
    return lanes_sum(errors);
}

/* The scale of least squared error for the codes that `scale` gives. */
INLINE float fitted(const vec *w, float scale, float least, float most) {
    vec above = {0}, below = {0};
    float by = inverse(scale);
    for (int i = 0; i < PARTS; i++) {
        vec code = nearest_code(w[i] * by, least, most);
        above = fused(w[i], code, above);
        below = fused(code, code, below);
    }
    return lanes_sum(above) / (lanes_sum(below) + 1e-30f);
}

INLINE float best_scale(const vec *w, const Making *m, float least, float most) {
    float largest = 0.0f, size = 0.0f, best = 0.0f, error = 3.4e38f;
    for (int i = 0; i < GROUP; i++) {
        float value = w[i / LANES][i % LANES], own = value < 0.0f ? -value : value;
        if (own > size) size = own, largest = value;
    }
    for (int i = 0; i < m->num_tries; i++) {
        float scale = stored(largest / m->tries[i]);
        float found = squared_error(w, scale, least, most);
        if (found < error) error = found, best = scale;
    }
    float fit = stored(fitted(w, best, least, most));
    return squared_error(w, fit, least, most) < error ? fit : best;
}

INLINE void make_group(const Making *m, long row, long group) {
    float least = m->bits == 4 ? -8.0f : -127.0f, most = m->bits == 4 ? 7.0f : 127.0f;
    long num_groups = (m->k + GROUP - 1) / GROUP, first = row * m->k + group * GROUP;
    long count = m->k - group * GROUP < GROUP ? m->k - group * GROUP : GROUP;
    float flat[GROUP] = {0};
    vec w[PARTS];
    for (long i = 0; i < count; i++) flat[i] = load_one(m->weight, first + i, m->bfloat);
    memcpy(w, flat, sizeof w);
    uint16_t half = float_to_half(best_scale(w, m, least, most));
    float by = inverse(half_to_float(half));
    for (int i = 0; i < PARTS; i++) w[i] = nearest_code(w[i] * by, least, most);
    memcpy(flat, w, sizeof w);
    for (long i = 0; i < count; i++)
        m->codes[first + i] = (int8_t)((int)flat[i] + (m->bits == 4 ? 8 : 0));
    m->scales[row * num_groups + group] = half;
}

static void make_rows(void *job, int number, int threads) {
    const Making *m = job;
    long last = m->num_rows * (number + 1) / threads;
    for (long row = m->num_rows * number / threads; row < last; row++)
        for (long group = 0; group * GROUP < m->k; group++) make_group(m, row, group);
}

void sage_quant_make(const void *weight, int bfloat, const float *tries, int num_tries, void *codes,
                     void *scales, int bits, long num_rows, long k, int threads) {
    Making job = {weight, tries, codes, scales, num_rows, k, bfloat, bits, num_tries};
    team_run(make_rows, &job, threads);
}
