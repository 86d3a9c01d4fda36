/*
 * The guest's pages as memory (datapath/pages/): kept mapped, mapped for a request, or copied.
 *
 * One of these per ring; all its functions are called by the ring's I/O thread, pages_close by whoever frees
 * the connection.  What a guest grants is its own affair at any moment: a refused page fails its request.
 */
#pragma once

#include <sys/uio.h>

#include "api_types.h"
#include "blkif.h"

struct guest_pages;

/* What a transfer holds; of its owner, who sets request, segments, and where iov is. */
struct transfer {
    struct request request;
    struct segment *segments;       /* request.nr_segments of them */
    struct iovec *iov;              /* room for as many; pages_attach fills it */
    unsigned nr_iov;                /* how many it has taken: segments that are neighbours in memory share one */
    void *held;                     /* of guest_pages */
    void **held_pages;              /* of guest_pages: room for a pointer per segment */
    int16_t status;                 /* RSP_OKAY, or what pages_fetch or pages_finish made of it */
};

/* longest: segments of the longest request that is offered; entries: of the ring.  NULL with errno set. */
struct guest_pages *pages_open(const struct xbd_domain *domain, xbd_budget *budget, unsigned entries, unsigned longest);

enum attached { ATTACHED, NO_ROOM, REFUSED };

/* Before the pages_attach calls of one wake-up: tells which transfers come, so that pages that are to be kept
 * are mapped together, in few calls of the hypervisor.  Nothing fails here. */
void pages_prepare(struct guest_pages *pages, struct transfer *const *transfers, unsigned count);
/* Gives a transfer its memory.  NO_ROOM: none is left now, try again after a pages_finish (never said while
 * nothing is attached).  REFUSED: *error says why (errno or GNTST). */
enum attached pages_attach(struct guest_pages *pages, struct transfer *transfer, int *error);
/* Before the I/O: brings the data of writes, with one call of the hypervisor.  Sets status where that fails. */
void pages_fetch(struct guest_pages *pages, struct transfer *const *transfers, unsigned count);
/* After the I/O, before the answers: delivers the data of reads whose status is RSP_OKAY, gives the memory
 * back.  Sets status where a delivery fails. */
void pages_finish(struct guest_pages *pages, struct transfer *const *transfers, unsigned count);
/* Whether the memory of an attached transfer can't be written to. */
bool pages_are_read_only(const struct guest_pages *pages, const struct transfer *transfer);
/* A private copy of an indirect request's segments, request->nr_segments * 8 bytes.  False: *error says why. */
bool pages_read_indirect(struct guest_pages *pages, const struct request *request, uint8_t *table, int *error);
/* Unmaps everything.  Nothing is attached any more, or its memory is left to who still uses it. */
void pages_close(struct guest_pages *pages);
