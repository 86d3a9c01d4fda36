/*
 * A guest's half of a block ring; see front.h.
 */
#define _GNU_SOURCE
#include "front.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "delays.h"

/* -- memory -------------------------------------------------------------------------------------------- */

void guest_memory_make(struct guest_memory *memory, uint32_t pages)
{
    size_t table = pages * sizeof(uint64_t);
    *memory = (struct guest_memory){.pages = pages, .fd = memfd_create("guest", MFD_CLOEXEC)};
    CHECK(memory->fd >= 0 && !ftruncate(memory->fd, (off_t)pages * PAGE));
    memory->table = mmap(NULL, table, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(memory->table != MAP_FAILED);
}

void guest_memory_map(struct guest_memory *memory)
{
    size_t bytes = (size_t)memory->pages * PAGE;
    memory->writable = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory->fd, 0);
    memory->readable = mmap(NULL, bytes, PROT_READ, MAP_SHARED, memory->fd, 0);
    CHECK(memory->writable != MAP_FAILED && memory->readable != MAP_FAILED);
}

void guest_memory_unmap(struct guest_memory *memory)
{
    size_t bytes = (size_t)memory->pages * PAGE;
    CHECK(!munmap(memory->writable, bytes));
    CHECK(!munmap((void *)(uintptr_t)memory->readable, bytes));
}

void guest_memory_free(struct guest_memory *memory)
{
    CHECK(!munmap(memory->table, memory->pages * sizeof(uint64_t)));
    close(memory->fd);
}

void grant(struct guest_memory *memory, uint32_t page, unsigned number, uint64_t how)
{
    CHECK(page + number <= memory->pages);
    for (unsigned i = 0; i < number; i++)
        atomic_store(&memory->table[page + i], how);
}

void guest_memory_describe(const struct guest_memory *memory, struct xbd_domain *domain)
{
    domain->domid = 7;
    domain->writable = memory->writable;
    domain->readable = memory->readable;
    domain->table = (const void *)(uintptr_t)memory->table;
    domain->nr_pages = memory->pages;
    domain->granted = GRANTED;
    domain->granted_readonly = GRANTED_READONLY;
}

/* -- requests ------------------------------------------------------------------------------------------ */

static void put_u64(uint8_t *at, uint64_t number)
{
    memcpy(at, &number, sizeof(number));
}

void lay_out_segments(uint8_t *page, const struct front_segment *segments, unsigned number)
{
    for (unsigned i = 0; i < number; i++) {
        uint8_t *at = page + (size_t)i * 8;
        memcpy(at, &segments[i].gref, sizeof(segments[i].gref));
        at[4] = segments[i].first;
        at[5] = segments[i].last;
    }
}

void lay_out_transfer(const struct abi *abi, uint8_t *entry, uint8_t operation, uint64_t id, uint64_t sector,
                      const struct front_segment *segments, unsigned number)
{
    memset(entry, 0, abi->entry_size);
    entry[0] = operation;
    entry[1] = (uint8_t)number;
    put_u64(entry + abi->id, id);
    put_u64(entry + abi->sector, sector);
    lay_out_segments(entry + abi->segments, segments, number < MAX_SEGMENTS ? number : MAX_SEGMENTS);
}

void lay_out_discard(const struct abi *abi, uint8_t *entry, uint8_t flag, uint64_t id, uint64_t sector,
                     uint64_t sectors)
{
    memset(entry, 0, abi->entry_size);
    entry[0] = OP_DISCARD;
    entry[1] = flag;
    put_u64(entry + abi->id, id);
    put_u64(entry + abi->sector, sector);
    put_u64(entry + abi->segments, sectors);
}

void lay_out_indirect(const struct abi *abi, uint8_t *entry, uint8_t inner, uint64_t id, uint64_t sector,
                      unsigned number, const uint32_t *refs, unsigned nr_refs)
{
    uint16_t count = (uint16_t)number;
    memset(entry, 0, abi->entry_size);
    entry[0] = OP_INDIRECT;
    entry[1] = inner;
    memcpy(entry + 2, &count, sizeof(count));
    put_u64(entry + abi->indirect_id, id);
    put_u64(entry + abi->indirect_sector, sector);
    memcpy(entry + abi->indirect_refs, refs, nr_refs * sizeof(*refs));
}

/* -- the ring ------------------------------------------------------------------------------------------ */

_Atomic uint32_t *front_word(const struct front_ring *ring, unsigned number)
{
    return (_Atomic uint32_t *)(void *)ring->shared + number;
}

static uint8_t *slot(const struct front_ring *ring, uint32_t index)
{
    return ring->shared + RING_HEADER + (size_t)(index % ring->entries) * ring->abi->entry_size;
}

void front_init(struct front_ring *ring, void *shared, const struct abi *abi, uint32_t entries)
{
    *ring = (struct front_ring){.shared = shared, .abi = abi, .entries = entries};
    memset(shared, 0, RING_HEADER);
    atomic_store(front_word(ring, WORD_REQ_EVENT), 1);
    atomic_store(front_word(ring, WORD_RSP_EVENT), 1);
}

uint32_t front_room(const struct front_ring *ring)
{
    return ring->entries - (ring->req_prod - ring->rsp_cons);
}

void front_put(struct front_ring *ring, const uint8_t *entry)
{
    CHECK(front_room(ring));
    memcpy(slot(ring, ring->req_prod), entry, ring->abi->entry_size);
    ring->req_prod++;
}

bool front_push(struct front_ring *ring)
{
    uint32_t old = ring->req_pushed;
    uint32_t new = ring->req_prod;
    if (new == old)
        return false;
    delay(GUEST_PUSH);
    atomic_store_explicit(front_word(ring, WORD_REQ_PROD), new, memory_order_release);
    ring->req_pushed = new;
    delay(GUEST_PUSHED);
    /* The backend writes req_event, then reads req_prod. */
    atomic_thread_fence(memory_order_seq_cst);
    delay(GUEST_PUSH_LOOK);
    return new - atomic_load_explicit(front_word(ring, WORD_REQ_EVENT), memory_order_relaxed) < new - old;
}

uint32_t front_waiting(const struct front_ring *ring)
{
    delay(GUEST_LOOK);
    uint32_t rsp_prod = atomic_load_explicit(front_word(ring, WORD_RSP_PROD), memory_order_acquire);
    uint32_t waiting = rsp_prod - ring->rsp_cons;
    CHECK(waiting <= ring->req_pushed - ring->rsp_cons);
    return waiting;
}

struct response front_take(struct front_ring *ring)
{
    struct response response;
    delay(GUEST_TAKE);
    const uint8_t *from = slot(ring, ring->rsp_cons++);
    memcpy(&response.id, from, sizeof(response.id));
    response.operation = from[8];
    memcpy(&response.status, from + 10, sizeof(response.status));
    return response;
}

bool front_final_check(struct front_ring *ring, uint32_t wanted)
{
    delay(GUEST_ARM);
    atomic_store_explicit(front_word(ring, WORD_RSP_EVENT), ring->rsp_cons + wanted, memory_order_relaxed);
    delay(GUEST_ARMED);
    /* The backend writes rsp_prod, then reads rsp_event. */
    atomic_thread_fence(memory_order_seq_cst);
    delay(GUEST_ARM_LOOK);
    return front_waiting(ring) >= wanted;
}
