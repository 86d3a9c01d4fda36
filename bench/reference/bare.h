/* What guest and server tell each other before the ring is all they need.
 * A guest says hello with three descriptors: its memory, the eventfd that wakes the server, and
 * the one that wakes the guest.  Closing the socket ends the ring. */
#ifndef BENCH_BARE_H
#define BENCH_BARE_H

#include <stdint.h>

enum { BARE_FDS = 3, BARE_SEGMENTS = 256 };

struct bare_hello {
    uint32_t disk; /* which of the server's files */
    uint32_t memory_pages;
    uint32_t first_page; /* of the ring */
    uint32_t entries; /* a power of two */
};

struct bare_answer {
    uint64_t size; /* of the disk, bytes */
};

#endif
