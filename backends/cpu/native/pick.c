/* Picks tokens: the largest of all logits, or of those that a mask allows. */
#include "pick.h"

#include <math.h>

#include "vector.h"

enum { BITS = 32 }; /* tokens of one word of a mask */

/* The largest of the 32 floats from `from` whose bits are set, at least one. */
INLINE float largest_of_word(const float *from, uint32_t bits) {
    ivec lanes;
    for (int lane = 0; lane < LANES; lane++) lanes[lane] = 1 << lane;
    vec best = fill(-INFINITY);
    for (int at = 0; at < BITS; at += LANES) {
        ivec is_set = (((ivec){0} + (int32_t)(bits >> at)) & lanes) == lanes;
        vec value = choose(is_set, load_float(from + at), best);
        best = choose(value > best, value, best);
    }
    return lanes_max(best);
}

/* The index of the first of the largest floats of a row [size] whose bits are set in `mask`, the
 * lowest bit first; -1 if none of them is above -inf. Bits past the row are clear. */
long sage_largest_allowed(const float *row, const uint32_t *mask, long size) {
    long place = -1;
    float best = -INFINITY;
    for (long word = 0, start = 0; start < size; word++, start += BITS) {
        uint32_t bits = mask[word];
        if (!bits) continue;
        int is_whole = start + BITS <= size;
        if (is_whole && !(largest_of_word(row + start, bits) > best)) continue;
        for (; bits; bits &= bits - 1) {
            long at = start + __builtin_ctz(bits);
            if (row[at] > best) best = row[place = at];
        }
    }
    return place;
}

#define CHUNK 512 /* floats that are compared with the largest one before any is looked at */

/* Whether some float of a chunk is larger than `best`, or is NaN. */
INLINE int has_larger(const float *chunk, float best) {
    ivec larger = {0};
    for (long i = 0; i < CHUNK; i += LANES) larger |= ~(load_float(chunk + i) <= fill(best));
    for (int lane = 0; lane < LANES; lane++)
        if (larger[lane]) return 1;
    return 0;
}

long first_largest(const float *row, long size) {
    long place = 0;
    for (long start = 0, end; start < size; start = end) {
        end = start + CHUNK < size ? start + CHUNK : size;
        if (end - start == CHUNK && !has_larger(row + start, row[place])) continue;
        for (long at = start; at < end; at++) {
            if (row[at] != row[at]) return at;
            if (row[at] > row[place]) place = at;
        }
    }
    return place;
}
