/*
 * Rings and requests; see blkif.h.
 *
 * Of the shared page each index is read once, as one word, and an entry is copied before it is looked at.
 * Everything is little endian, as the machines are that this is built for.
 */
#include "blkif.h"

#include <string.h>

#include "stress.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "numbers of the protocol are read as they lie there");

const struct abi ABIS[2] = {
    {.entry_size = 112, .id = 8, .sector = 16, .segments = 24, .indirect_id = 8, .indirect_sector = 16,
     .indirect_refs = 28, .response_size = 16},
    {.entry_size = 108, .id = 4, .sector = 12, .segments = 20, .indirect_id = 4, .indirect_sector = 12,
     .indirect_refs = 24, .response_size = 12},
};

/* -- rings --------------------------------------------------------------------------------------------- */

enum { REQ_PROD, REQ_EVENT, RSP_PROD, RSP_EVENT };     /* the words that a shared ring begins with */

static _Atomic uint32_t *word(const struct back_ring *ring, unsigned number)
{
    return (_Atomic uint32_t *)(void *)ring->shared + number;
}

static uint8_t *slot(const struct back_ring *ring, uint32_t index)
{
    return ring->shared + RING_HEADER + (size_t)(index & (ring->entries - 1)) * ring->abi->entry_size;
}

void ring_attach(struct back_ring *ring, void *shared, const struct abi *abi, uint32_t entries, uint32_t req_cons,
                 uint32_t rsp_prod)
{
    *ring = (struct back_ring){
        .shared = shared,
        .abi = abi,
        .entries = entries,
        .req_cons = req_cons,
        .rsp_prod_pvt = rsp_prod,
        .rsp_prod = rsp_prod,
    };
}

int ring_waiting(const struct back_ring *ring)
{
    STRESS_POINT(RING_LOOK);
    /* acquire: entries are read after the index that says that they are there */
    uint32_t req_prod = atomic_load_explicit(word(ring, REQ_PROD), memory_order_acquire);
    uint32_t waiting = req_prod - ring->req_cons;
    uint32_t room = ring->entries - (ring->req_cons - ring->rsp_prod_pvt);
    return waiting > room ? -1 : (int)waiting;
}

uint32_t ring_claimed(const struct back_ring *ring)
{
    return atomic_load_explicit(word(ring, REQ_PROD), memory_order_relaxed) - ring->rsp_prod_pvt;
}

void ring_take(struct back_ring *ring, uint8_t *entry)
{
    const uint8_t *from = slot(ring, ring->req_cons);
    STRESS_POINT(RING_TAKE);
    /* Where the compiler knows the size it makes no call. */
    if (ring->abi->entry_size == ENTRY_BYTES)
        memcpy(entry, from, ENTRY_BYTES);
    else
        memcpy(entry, from, ring->abi->entry_size);
    ring->req_cons++;
}

void ring_answer(struct back_ring *ring, uint64_t id, uint8_t operation, int16_t status)
{
    uint8_t response[16] = {0};
    memcpy(response, &id, sizeof(id));
    response[8] = operation;
    memcpy(response + 10, &status, sizeof(status));
    uint8_t *to = slot(ring, ring->rsp_prod_pvt);
    if (ring->abi->response_size == sizeof(response))
        memcpy(to, response, sizeof(response));
    else
        memcpy(to, response, ring->abi->response_size);
    ring->rsp_prod_pvt++;
}

bool ring_push(struct back_ring *ring)
{
    uint32_t old = ring->rsp_prod;
    uint32_t new = ring->rsp_prod_pvt;
    if (new == old)
        return false;
    STRESS_POINT(RING_PUSH);
    atomic_store_explicit(word(ring, RSP_PROD), new, memory_order_release);
    ring->rsp_prod = new;
    STRESS_POINT(RING_PUSHED);
    /* The frontend writes rsp_event, then reads rsp_prod: one of the two sees the other's. */
    atomic_thread_fence(memory_order_seq_cst);
    STRESS_POINT(RING_PUSH_LOOK);
    return new - atomic_load_explicit(word(ring, RSP_EVENT), memory_order_relaxed) < new - old;
}

int ring_final_check(struct back_ring *ring)
{
    int waiting = ring_waiting(ring);
    if (waiting)
        return waiting;
    STRESS_POINT(RING_ARM);
    atomic_store_explicit(word(ring, REQ_EVENT), ring->req_cons + 1, memory_order_relaxed);
    STRESS_POINT(RING_ARMED);
    /* The frontend writes req_prod, then reads req_event. */
    atomic_thread_fence(memory_order_seq_cst);
    STRESS_POINT(RING_ARM_LOOK);
    return ring_waiting(ring);
}

/* -- requests ------------------------------------------------------------------------------------------ */

static uint16_t u16(const uint8_t *at)
{
    uint16_t number;
    memcpy(&number, at, sizeof(number));
    return number;
}

static uint32_t u32(const uint8_t *at)
{
    uint32_t number;
    memcpy(&number, at, sizeof(number));
    return number;
}

static uint64_t u64(const uint8_t *at)
{
    uint64_t number;
    memcpy(&number, at, sizeof(number));
    return number;
}

static void reject(struct request *request, int16_t status)
{
    request->kind = REJECTED;
    request->status = status;
}

/* False: so many bytes are past the end of any disk. */
static bool to_bytes(uint64_t sectors, uint64_t *bytes)
{
    *bytes = sectors * SECTOR;
    return sectors <= UINT64_MAX / SECTOR;
}

static bool in_range(const struct xbd_limits *limits, uint64_t offset, uint64_t length)
{
    if (offset > limits->size || length > limits->size - offset)
        return false;
    return !((offset | length) & (limits->logical_block - 1));
}

/* Segments as they lie in a request or an indirect page, and their bytes in all. */
static bool read_segments(const uint8_t *table, unsigned number, struct segment *segments, uint64_t *length)
{
    *length = 0;
    for (unsigned i = 0; i < number; i++) {
        const uint8_t *from = table + (size_t)i * 8;
        unsigned first = from[4];
        unsigned last = from[5];
        if (first > last || last >= SECTORS_PER_PAGE)
            return false;
        segments[i].gref = u32(from);
        segments[i].start = (uint16_t)(first * SECTOR);
        segments[i].length = (uint16_t)((last - first + 1) * SECTOR);
        *length += segments[i].length;
    }
    return true;
}

static void transfer(const struct xbd_limits *limits, struct request *request, const uint8_t *table,
                     struct segment *segments)
{
    bool permitted = request->operation == OP_READ || !limits->read_only;
    if (permitted && read_segments(table, request->nr_segments, segments, &request->length) &&
        in_range(limits, request->offset, request->length))
        request->kind = TRANSFER;
    else
        reject(request, RSP_ERROR);
}

static void decode_direct(const struct abi *abi, const struct xbd_limits *limits, const uint8_t *entry,
                          struct request *request, struct segment *segments)
{
    request->nr_segments = entry[1];
    if (!request->nr_segments || request->nr_segments > MAX_SEGMENTS ||
        !to_bytes(u64(entry + abi->sector), &request->offset))
        reject(request, RSP_ERROR);
    else
        transfer(limits, request, entry + abi->segments, segments);
}

/* FLUSH_DISKCACHE or WRITE_BARRIER.  Without data even a read-only disk takes it. */
static void decode_flush(const struct abi *abi, const struct xbd_limits *limits, const uint8_t *entry,
                         struct request *request, struct segment *segments)
{
    bool offered = request->operation == OP_FLUSH_DISKCACHE ? limits->flush : limits->barrier;
    if (!offered)
        reject(request, RSP_EOPNOTSUPP);
    else if (entry[1])
        decode_direct(abi, limits, entry, request, segments);
    else
        request->kind = FLUSH;
}

static void decode_discard(const struct abi *abi, const struct xbd_limits *limits, const uint8_t *entry,
                           struct request *request)
{
    request->secure = entry[1] & 1;
    if (!limits->discard || (request->secure && !limits->discard_secure))
        reject(request, RSP_EOPNOTSUPP);
    else if (limits->read_only || !to_bytes(u64(entry + abi->sector), &request->offset) ||
             !to_bytes(u64(entry + abi->segments), &request->length) ||
             !in_range(limits, request->offset, request->length))
        reject(request, RSP_ERROR);
    else
        request->kind = DISCARD;
}

/* Whether an indirect request is worth fetching its pages. */
static bool indirect_is_sane(const struct xbd_limits *limits, const struct request *request, unsigned most)
{
    if (request->operation != OP_READ && (request->operation != OP_WRITE || limits->read_only))
        return false;
    if (!request->nr_segments || request->nr_segments > most)
        return false;
    return in_range(limits, request->offset, 0);
}

static void decode_indirect(const struct abi *abi, const struct xbd_limits *limits, const uint8_t *entry,
                            struct request *request)
{
    unsigned most = MAX_INDIRECT_PAGES * SEGMENTS_PER_INDIRECT_PAGE;
    if (most > limits->max_indirect_segments)
        most = limits->max_indirect_segments;
    request->operation = entry[1];
    request->nr_segments = u16(entry + 2);
    request->id = u64(entry + abi->indirect_id);
    if (!most) {
        reject(request, RSP_EOPNOTSUPP);
        return;
    }
    if (!to_bytes(u64(entry + abi->indirect_sector), &request->offset) || !indirect_is_sane(limits, request, most)) {
        reject(request, RSP_ERROR);
        return;
    }
    request->kind = INDIRECT;
    request->nr_refs = (uint8_t)((request->nr_segments + SEGMENTS_PER_INDIRECT_PAGE - 1) / SEGMENTS_PER_INDIRECT_PAGE);
    for (unsigned i = 0; i < request->nr_refs; i++)
        request->refs[i] = u32(entry + abi->indirect_refs + (size_t)i * 4);
}

void decode(const struct abi *abi, const struct xbd_limits *limits, const uint8_t *entry, struct request *request,
            struct segment segments[MAX_SEGMENTS])
{
    request->id = u64(entry + abi->id);
    request->operation = entry[0];
    request->offset = request->length = 0;
    request->nr_segments = 0;
    request->status = RSP_OKAY;
    request->secure = false;
    switch (request->operation) {
    case OP_READ:
    case OP_WRITE:
        decode_direct(abi, limits, entry, request, segments);
        break;
    case OP_WRITE_BARRIER:
    case OP_FLUSH_DISKCACHE:
        decode_flush(abi, limits, entry, request, segments);
        break;
    case OP_DISCARD:
        decode_discard(abi, limits, entry, request);
        break;
    case OP_INDIRECT:
        decode_indirect(abi, limits, entry, request);
        break;
    default:
        reject(request, RSP_EOPNOTSUPP);
    }
}

void expand(const struct xbd_limits *limits, struct request *request, const uint8_t *table, struct segment *segments)
{
    transfer(limits, request, table, segments);
}
