#include "ring.h"

#include "embedded.h"
#include "util.h"

/* A grant for one request only, or for good. */
static void grant(struct ring *self, uint32_t page) {
    if (self->granted[page])
        return;
    embedded_grant(self->grants, page);
    self->granted[page] = self->persistent;
}

static void fill_segments(struct ring *self, struct blkif_segment *segment,
                          const struct request *request) {
    for (uint32_t i = 0; i < request->pages; i++) {
        grant(self, request->page[i]);
        segment[i] = (struct blkif_segment){request->page[i], 0, BLKIF_LAST_SECTOR, 0};
    }
}

static void ring_submit(struct transport *transport, const struct request *request) {
    struct ring *self = (struct ring *)transport;
    if (self->request_produced - self->response_consumed >= self->entries)
        die("the ring is full");
    union blkif_entry *entry = &self->shared->entry[self->request_produced++ & (self->entries - 1)];
    uint8_t operation = request->write ? BLKIF_WRITE : BLKIF_READ;
    uint64_t sector = request->offset / SECTOR_SIZE;
    if (request->pages <= BLKIF_SEGMENTS) {
        entry->direct.operation = operation;
        entry->direct.segments = (uint8_t)request->pages;
        entry->direct.handle = 0;
        entry->direct.id = request->tag;
        entry->direct.sector = sector;
        fill_segments(self, entry->direct.segment, request);
    } else {
        uint32_t table = self->table[request->tag];
        grant(self, table);
        fill_segments(self, memory_at(self->memory, table), request);
        entry->indirect = (struct blkif_indirect){
            .operation = BLKIF_INDIRECT,
            .inner = operation,
            .segments = (uint16_t)request->pages,
            .id = request->tag,
            .sector = sector,
            .gref = {table},
        };
    }
    self->expected[request->tag] =
        (struct expected){request->page, request->pages, operation, true};
    transport->requests++;
}

static void ring_kick(struct transport *transport) {
    struct ring *self = (struct ring *)transport;
    uint32_t old = self->published, new = self->request_produced;
    if (old == new)
        return;
    __atomic_store_n(&self->shared->request_produced, new, __ATOMIC_RELEASE);
    self->published = new;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* our index before the backend's event */
    uint32_t event = __atomic_load_n(&self->shared->request_event, __ATOMIC_RELAXED);
    if (new - event < new - old) {
        transport->kicks++;
        ring_eventfd(self->kick_fd);
    }
}

static void take_back(struct ring *self, const struct expected *expected, uint32_t tag) {
    for (uint32_t i = 0; i < expected->pages; i++)
        embedded_revoke(self->grants, expected->page[i]);
    if (expected->pages > BLKIF_SEGMENTS)
        embedded_revoke(self->grants, self->table[tag]);
}

static unsigned ring_reap(struct transport *transport, struct completion *done, unsigned room) {
    struct ring *self = (struct ring *)transport;
    uint32_t produced = __atomic_load_n(&self->shared->response_produced, __ATOMIC_ACQUIRE);
    if (produced - self->response_consumed > self->published - self->response_consumed)
        die("the backend answers more than it was asked");
    unsigned count = 0;
    for (; self->response_consumed != produced && count < room; self->response_consumed++) {
        const struct blkif_response *response =
            &self->shared->entry[self->response_consumed & (self->entries - 1)].response;
        uint64_t id = response->id;
        if (id >= self->transport.slots || !self->expected[id].in_flight)
            die("the backend answers request %llu, which is not open", (unsigned long long)id);
        struct expected *expected = &self->expected[id];
        if (response->operation != expected->operation)
            die("the backend answers operation %u with %u", expected->operation,
                response->operation);
        expected->in_flight = false;
        if (!self->persistent)
            take_back(self, expected, (uint32_t)id);
        done[count++] = (struct completion){(uint32_t)id, response->status == BLKIF_OKAY};
    }
    return count;
}

static bool ring_arm(struct transport *transport) {
    struct ring *self = (struct ring *)transport;
    __atomic_store_n(&self->shared->response_event, self->response_consumed + 1, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* our event before the backend's index */
    return __atomic_load_n(&self->shared->response_produced, __ATOMIC_RELAXED) !=
           self->response_consumed;
}

uint32_t ring_order_for(uint32_t depth) {
    uint32_t order = 0;
    while ((uint32_t)ENTRIES_PER_PAGE << order < depth)
        order++;
    return order;
}

void ring_open(struct ring *self, const char *name, struct memory *memory, uint64_t *grants,
               int wake_fd) {
    self->memory = memory;
    self->grants = grants;
    self->granted = allocate(memory->pages, sizeof *self->granted);
    self->kick_fd = make_eventfd();
    self->transport = (struct transport){
        .name = name,
        .wake_fd = wake_fd,
        .submit = ring_submit,
        .kick = ring_kick,
        .reap = ring_reap,
        .arm = ring_arm,
    };
}

static void make_slots(struct ring *self, const struct demand *demand) {
    uint32_t parts = parts_of(demand, self->transport.max_pages);
    uint32_t requests = demand->depth * parts;
    uint32_t slots = requests < self->entries ? requests : self->entries;
    self->transport.slots = slots;
    self->expected = allocate(slots, sizeof *self->expected);
    if ((demand->pages + parts - 1) / parts <= BLKIF_SEGMENTS)
        return;
    self->table = allocate(slots, sizeof *self->table);
    for (uint32_t i = 0; i < slots; i++)
        self->table[i] = memory_take(self->memory, 1);
}

void ring_lay_out(struct ring *self, const struct demand *demand) {
    uint32_t pages = 1u << self->order;
    self->entries = ENTRIES_PER_PAGE << self->order;
    self->first_page = memory_take(self->memory, pages);
    for (uint32_t i = 0; i < pages; i++)
        embedded_grant(self->grants, self->first_page + i);
    self->shared = memory_at(self->memory, self->first_page);
    self->shared->request_event = self->shared->response_event = 1;
    make_slots(self, demand);
}
