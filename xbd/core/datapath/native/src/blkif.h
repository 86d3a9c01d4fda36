/*
 * Rings and requests, as xen/include/public/io/{ring,blkif}.h have them.  Everything in bytes.
 *
 * The C twin of xbd/core/blkif/{ring,abi,segments,decode}.py: the same checks in the same order, so that
 * both data paths answer alike.  Nothing here allocates, calls the system or trusts the shared page.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "api_types.h"

enum {
    SECTOR = 512,
    PAGE = 4096,
    SECTORS_PER_PAGE = 8,
    RING_HEADER = 64,
    MAX_SEGMENTS = 11,              /* of a direct request */
    MAX_INDIRECT_PAGES = 8,
    SEGMENTS_PER_INDIRECT_PAGE = 512,
    ENTRY_BYTES = 112,              /* of the largest ABI */
};

enum { OP_READ, OP_WRITE, OP_WRITE_BARRIER, OP_FLUSH_DISKCACHE, OP_DISCARD = 5, OP_INDIRECT = 6 };
enum { RSP_OKAY = 0, RSP_ERROR = -1, RSP_EOPNOTSUPP = -2 };

struct abi {
    uint16_t entry_size;
    uint8_t id, sector, segments;               /* of a direct request; a discard's nr_sectors is at `segments` */
    uint8_t indirect_id, indirect_sector, indirect_refs;
    uint8_t response_size;                      /* written whole: padding is zero (XSA-216) */
};

extern const struct abi ABIS[2];                /* x86_64 and arm; x86_32 */

struct segment {
    uint32_t gref;
    uint16_t start, length;                     /* within the page */
};

enum request_kind { TRANSFER, FLUSH, DISCARD, INDIRECT, REJECTED };

struct request {
    uint64_t id;
    uint64_t offset, length;
    enum request_kind kind;
    uint8_t operation;                          /* what the response repeats; of an indirect one the inner one */
    int16_t status;                             /* of a rejected one */
    uint16_t nr_segments;
    bool secure;                                /* of a discard */
    uint8_t nr_refs;                            /* of an indirect one: pages that hold its segments */
    uint32_t refs[MAX_INDIRECT_PAGES];
};

/* WRITE_BARRIER and FLUSH_DISKCACHE without data are kind FLUSH, with data TRANSFER. */
void decode(const struct abi *abi, const struct xbd_limits *limits, const uint8_t *entry, struct request *request,
            struct segment segments[MAX_SEGMENTS]);

/* Of an INDIRECT request: `table` is a private copy of its nr_segments segments, 8 bytes each, one page after
 * the other.  It becomes a TRANSFER, or REJECTED.  `segments` has room for all of them. */
void expand(const struct xbd_limits *limits, struct request *request, const uint8_t *table, struct segment *segments);

struct back_ring {
    uint8_t *shared;
    const struct abi *abi;
    uint32_t entries;
    uint32_t req_cons, rsp_prod_pvt, rsp_prod;
};

void ring_attach(struct back_ring *ring, void *shared, const struct abi *abi, uint32_t entries, uint32_t req_cons,
                 uint32_t rsp_prod);
/* Requests not consumed yet, or -1: the frontend claims more than there can be.  Reads req_prod once. */
int ring_waiting(const struct back_ring *ring);
/* How many requests the frontend claims to be unanswered; for saying what is wrong. */
uint32_t ring_claimed(const struct back_ring *ring);
/* Copies the next entry (abi->entry_size bytes), once, and counts it as consumed.  After ring_waiting said that
 * it is there. */
void ring_take(struct back_ring *ring, uint8_t *entry);
/* Writes the next response, over a consumed request; nobody sees it before the push. */
void ring_answer(struct back_ring *ring, uint64_t id, uint8_t operation, int16_t status);
/* Publishes the responses; whether the frontend wants an event. */
bool ring_push(struct back_ring *ring);
/* Before sleeping: asks for an event with the next request.  As ring_waiting, looked at afterwards again. */
int ring_final_check(struct back_ring *ring);
