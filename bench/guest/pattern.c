#include "pattern.h"

#include <string.h>

#include "util.h"

enum {
    WORDS = PAGE_SIZE / sizeof(uint64_t),
    WORDS_PER_SECTOR = SECTOR_SIZE / sizeof(uint64_t),
    SECTORS = PAGE_SIZE / SECTOR_SIZE,
};

static uint64_t mix(uint64_t x) { /* splitmix64's finalizer: a bijection that scatters */
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

void pattern_body(void *page) {
    uint64_t *word = page;
    for (unsigned i = 0; i < WORDS; i++)
        word[i] = mix(~(uint64_t)i);
}

void pattern_stamp(void *page, uint64_t offset, uint32_t generation) {
    uint64_t *word = page;
    for (unsigned i = 0; i < SECTORS; i++)
        word[i * WORDS_PER_SECTOR] = mix(offset / SECTOR_SIZE + i) ^ generation;
}

static bool stamped(const uint64_t *sector, uint64_t number, uint32_t oldest, uint32_t newest) {
    uint64_t generation = *sector ^ mix(number);
    return generation >= oldest && generation <= newest;
}

static bool body_matches(const uint64_t *word) {
    static uint64_t body[WORDS];
    if (!body[0])
        pattern_body(body);
    for (unsigned i = 0; i < WORDS; i += WORDS_PER_SECTOR)
        if (memcmp(word + i + 1, body + i + 1, SECTOR_SIZE - sizeof *word) != 0)
            return false;
    return true;
}

bool pattern_matches(const void *page, uint64_t offset, uint32_t oldest, uint32_t newest,
                     bool full) {
    const uint64_t *word = page;
    uint64_t first = offset / SECTOR_SIZE;
    unsigned step = full ? 1 : SECTORS - 1;
    for (unsigned i = 0; i < SECTORS; i += step)
        if (!stamped(word + i * WORDS_PER_SECTOR, first + i, oldest, newest))
            return false;
    return !full || body_matches(word);
}
