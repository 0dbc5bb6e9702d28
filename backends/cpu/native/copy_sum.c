/* Copies runs of bytes and computes their checksum in one pass over memory. The checksum is the
 * 64-bit XXH3 of all runs in order, as the xxhash library computes it. */
#include <stdint.h>
#include <string.h>

typedef uint64_t Lanes __attribute__((vector_size(64)));

enum { STRIPE = 64, STRIPES = 16 }; /* bytes of a stripe; stripes of a block */

static const uint64_t PRIME32_1 = 0x9E3779B1, PRIME32_2 = 0x85EBCA77, PRIME32_3 = 0xC2B2AE3D;
static const uint64_t PRIME64_1 = 0x9E3779B185EBCA87, PRIME64_2 = 0xC2B2AE3D27D4EB4F,
                      PRIME64_3 = 0x165667B19E3779F9, PRIME64_4 = 0x85EBCA77C2B2AE63,
                      PRIME64_5 = 0x27D4EB2F165667C5;

static const uint8_t SECRET[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

static Lanes load(const void *from) {
    Lanes lanes;
    memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

static uint64_t word(const uint8_t *from) {
    uint64_t w;
    memcpy(&w, from, sizeof w);
    return w;
}

/* Swap neighbouring lanes. */
static inline Lanes swapped(Lanes data) {
#ifdef __clang__
    return __builtin_shufflevector(data, data, 1, 0, 3, 2, 5, 4, 7, 6);
#else
    return __builtin_shuffle(data, (Lanes){1, 0, 3, 2, 5, 4, 7, 6});
#endif
}

static inline Lanes taken_in(Lanes sums, Lanes data, const uint8_t *secret) {
    Lanes key = data ^ load(secret);
    return sums + swapped(data) + (key & 0xffffffff) * (key >> 32);
}

static uint64_t folded(uint64_t a, uint64_t b) {
    __uint128_t product = (__uint128_t)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint64_t merged(Lanes sums, uint64_t num_bytes) {
    uint64_t sum = num_bytes * PRIME64_1;
    for (int i = 0; i < 8; i += 2)
        sum += folded(sums[i] ^ word(SECRET + 11 + 8 * i), sums[i + 1] ^ word(SECRET + 19 + 8 * i));
    sum = (sum ^ sum >> 37) * 0x165667919E3779F9;
    return sum ^ sum >> 32;
}

/* Each size must be a multiple of STRIPE, and their sum above 240 bytes: XXH3 of shorter inputs is
 * another algorithm. */
uint64_t sage_copy_sum(long num_runs, const char *const *from, char *const *to, const long *sizes) {
    Lanes sums = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                  PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    Lanes stripe = sums;
    long number = 0, num_bytes = 0; /* number: of the stripe in its block */
    for (long run = 0; run < num_runs; run++) num_bytes += sizes[run];
    long left = num_bytes / STRIPE;
    for (long run = 0; run < num_runs; run++) {
        for (long at = 0; at < sizes[run]; at += STRIPE) {
            stripe = load(from[run] + at);
            memcpy(to[run] + at, &stripe, STRIPE);
            if (--left == 0) break; /* the last stripe has its own secret: see below */
            sums = taken_in(sums, stripe, SECRET + 8 * number);
            if (++number == STRIPES) {
                number = 0;
                sums = (sums ^ sums >> 47 ^ load(SECRET + 128)) * PRIME32_1;
            }
        }
    }
    return merged(taken_in(sums, stripe, SECRET + 121), (uint64_t)num_bytes);
}
