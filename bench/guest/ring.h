/* The guest's side of blkif rings, however their backend has come to know of them. */
#ifndef BENCH_RING_H
#define BENCH_RING_H

#include "blkif_layout.h"
#include "transport.h"

enum { ENTRIES_PER_PAGE = 32, SEGMENTS_PER_PAGE = 512 };

/* What the answer to a request must agree with. */
struct expected {
    const uint32_t *page;
    uint32_t pages;
    uint8_t operation;
    bool in_flight;
};

struct ring {
    struct transport transport; /* first: they share an address */
    struct memory *memory;
    uint64_t *grants; /* the grant table */
    int kick_fd;
    bool persistent;
    uint32_t order, entries, first_page;
    uint32_t request_produced, published, response_consumed;
    struct blkif_ring *shared;
    struct expected *expected;
    uint32_t *table; /* page with the segments of each tag's indirect request; NULL if none is */
    uint8_t *granted; /* pages granted for good */
};

/* Everything but the ring itself; answers will be announced by `wake_fd`. */
void ring_open(struct ring *ring, const char *name, struct memory *memory, uint64_t *grants,
               int wake_fd);

/* The ring and what goes with it, when `transport.max_pages`, `persistent` and `order` are set. */
void ring_lay_out(struct ring *ring, const struct demand *demand);

/* Of the smallest ring that holds so many requests. */
uint32_t ring_order_for(uint32_t depth);

#endif
