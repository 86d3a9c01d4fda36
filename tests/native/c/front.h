/*
 * A guest's half of a block ring: memory that it grants, requests in, responses out.
 *
 * Written from the protocol (xen/include/public/io/{ring,blkif}.h), not from the backend's code; only the layouts
 * are blkif.c's, which Python's tests hold against Xen's.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "blkif.h"

/* -- memory -------------------------------------------------------------------------------------------- */

/* Words of the grant table, as an embedded guest's. */
enum { NOT_GRANTED = 0, GRANTED = 1, GRANTED_READONLY = 5 };

/* A page's number is its grant reference. */
struct guest_memory {
    int fd;
    uint32_t pages;
    uint8_t *writable;
    const uint8_t *readable;            /* the same memory, where nobody can write */
    _Atomic uint64_t *table;            /* shared with processes that are forked later */
};

/* Of another process it is mapped a second time, by `fd`. */
void guest_memory_make(struct guest_memory *memory, uint32_t pages);
void guest_memory_map(struct guest_memory *memory);
void guest_memory_unmap(struct guest_memory *memory);
void guest_memory_free(struct guest_memory *memory);
void grant(struct guest_memory *memory, uint32_t page, unsigned number, uint64_t how);
/* For struct xbd_domain: everything but the mode. */
void guest_memory_describe(const struct guest_memory *memory, struct xbd_domain *domain);

/* -- requests ------------------------------------------------------------------------------------------ */

struct front_segment {
    uint32_t gref;
    uint8_t first, last;                /* sectors of the page */
};

void lay_out_transfer(const struct abi *abi, uint8_t *entry, uint8_t operation, uint64_t id, uint64_t sector,
                      const struct front_segment *segments, unsigned number);
void lay_out_discard(const struct abi *abi, uint8_t *entry, uint8_t flag, uint64_t id, uint64_t sector,
                     uint64_t sectors);
/* `number` segments, that lie in the pages `refs`. */
void lay_out_indirect(const struct abi *abi, uint8_t *entry, uint8_t inner, uint64_t id, uint64_t sector,
                      unsigned number, const uint32_t *refs, unsigned nr_refs);
/* As they lie in an indirect page, from its beginning. */
void lay_out_segments(uint8_t *page, const struct front_segment *segments, unsigned number);

/* -- the ring ------------------------------------------------------------------------------------------ */

struct front_ring {
    uint8_t *shared;
    const struct abi *abi;
    uint32_t entries;
    uint32_t req_prod, rsp_cons;
    uint32_t req_pushed;
};

struct response {
    uint64_t id;
    uint8_t operation;
    int16_t status;
};

static inline size_t ring_bytes(const struct abi *abi, uint32_t entries)
{
    return RING_HEADER + (size_t)entries * abi->entry_size;
}

/* Pages of 4096 bytes that the ring takes. */
static inline uint32_t ring_pages(uint32_t entries)
{
    return entries / 32;
}

/* Writes the indices' first values. */
void front_init(struct front_ring *ring, void *shared, const struct abi *abi, uint32_t entries);
/* Free places: no more requests may be put. */
uint32_t front_room(const struct front_ring *ring);
void front_put(struct front_ring *ring, const uint8_t *entry);
/* Publishes what was put; whether the backend wants an event. */
bool front_push(struct front_ring *ring);
/* Responses not consumed yet. */
uint32_t front_waiting(const struct front_ring *ring);
/* After front_waiting said that there is one. */
struct response front_take(struct front_ring *ring);
/* Before sleeping: asks for an event when `wanted` more are there.  Whether they are already. */
bool front_final_check(struct front_ring *ring, uint32_t wanted);

_Atomic uint32_t *front_word(const struct front_ring *ring, unsigned number);
enum { WORD_REQ_PROD, WORD_REQ_EVENT, WORD_RSP_PROD, WORD_RSP_EVENT };
