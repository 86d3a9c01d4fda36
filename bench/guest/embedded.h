/* A domain on xbd's embedded host: memory, grants and event channels (docs/embedded.md). */
#ifndef BENCH_EMBEDDED_H
#define BENCH_EMBEDDED_H

#include <stdint.h>

#include "memory.h"

struct embedded {
    int socket;
    uint32_t domid;
    uint64_t *grants; /* the grant table; a page's number is its grant reference */
    uint32_t next_id;
};

/* Becomes a domain with this memory; `domid` 0 lets the host choose. */
void embedded_open(struct embedded *host, const char *directory, uint32_t domid,
                   const struct memory *memory);

/* Lets domain 0 read and write a page. */
static inline void embedded_grant(uint64_t *grants, uint32_t page) {
    enum { PERMIT_ACCESS = 1 };
    __atomic_store_n(&grants[page], PERMIT_ACCESS, __ATOMIC_RELEASE);
}

static inline void embedded_revoke(uint64_t *grants, uint32_t page) {
    __atomic_store_n(&grants[page], 0, __ATOMIC_RELEASE);
}

/* Offers domain 0 an event channel of this number: the first eventfd wakes it, the second us. */
void embedded_offer(struct embedded *host, uint32_t port, int to_backend, int to_guest);

void embedded_close(struct embedded *host);

#endif
