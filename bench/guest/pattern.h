/* What the disk holds: each sector begins with a stamp that says which sector it is and in which
 * generation it was written; the rest is the same everywhere, and not compressible. */
#ifndef BENCH_PATTERN_H
#define BENCH_PATTERN_H

#include <stdbool.h>
#include <stdint.h>

enum { LAST_GENERATION = 65535 };

/* Lays out everything but the stamps. */
void pattern_body(void *page);

/* Stamps a page for the disk's bytes from `offset` on. */
void pattern_stamp(void *page, uint64_t offset, uint32_t generation);

/* Whether a page holds what was written at `offset` in generation `oldest` to `newest`.  Without
 * `full` only the stamps of the first and the last sector are looked at. */
bool pattern_matches(const void *page, uint64_t offset, uint32_t oldest, uint32_t newest,
                     bool full);

#endif
