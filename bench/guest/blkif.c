/* A blkif front end in a domain of xbd's embedded host. */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "blkif_layout.h"
#include "embedded.h"
#include "transport.h"
#include "util.h"
#include "xenstore.h"

enum { INIT_WAIT = 2, INITIALISED = 3, CONNECTED = 4, CLOSING = 5, CLOSED = 6 };
enum { INFO_READ_ONLY = 4, SEGMENTS_PER_PAGE = 512, PATH_SIZE = 256, PORT = 1 };
enum { WAIT_SECONDS = 30, ENTRIES_PER_PAGE = 32 };

/* What the answer to a request must agree with. */
struct expected {
    const uint32_t *page;
    uint32_t pages;
    uint8_t operation;
    bool in_flight;
};

struct blkif {
    struct transport transport; /* first: they share an address */
    struct memory *memory;
    struct embedded host;
    struct xenstore store;
    char frontend[PATH_SIZE], backend[PATH_SIZE];
    int kick_fd;
    bool persistent;
    uint32_t order, entries;
    uint32_t request_produced, published, response_consumed;
    struct blkif_ring *ring;
    struct expected *expected;
    uint32_t *table; /* page with the segments of each tag's indirect request; NULL if none is */
    uint8_t *granted; /* pages granted for good */
};

/* -- XenStore -- */

static void set_state(struct blkif *self, unsigned state) {
    xenstore_write_number(&self->store, self->frontend, "state", state);
}

/* Waits until the backend's state is one of those whose bits are set in `wanted`. */
static void await_backend(struct blkif *self, unsigned wanted, const char *what) {
    uint64_t deadline_ns = now_ns() + (uint64_t)WAIT_SECONDS * 1000000000u;
    for (;;) {
        uint64_t state = xenstore_number(&self->store, self->backend, "state", 0);
        if (state < 32 && wanted & 1u << state)
            return;
        if (state == CLOSING || state == CLOSED)
            die("the backend closes the disk: see its log");
        xenstore_await(&self->store, deadline_ns, what);
    }
}

static void find_device(struct blkif *self, const char *directory, uint32_t device) {
    char path[4096], value[XENSTORE_VALUE_SIZE];
    snprintf(path, sizeof path, "%s/xenstored-%u.socket", directory, self->host.domid);
    xenstore_open(&self->store, path, WAIT_SECONDS);
    snprintf(self->frontend, sizeof self->frontend, "/local/domain/%u/device/vbd/%u",
             self->host.domid, device);
    snprintf(path, sizeof path, "%s/backend", self->frontend);
    xenstore_watch(&self->store, path);
    uint64_t deadline_ns = now_ns() + (uint64_t)WAIT_SECONDS * 1000000000u;
    while (!xenstore_read(&self->store, path, value))
        xenstore_await(&self->store, deadline_ns, "waiting for the disk to be attached");
    if (strlen(value) >= sizeof self->backend)
        die("%s is too long", path);
    strcpy(self->backend, value);
    snprintf(path, sizeof path, "%s/state", self->backend);
    xenstore_watch(&self->store, path);
}

static uint32_t max_pages(struct blkif *self, uint32_t limit) {
    uint64_t offered =
        xenstore_number(&self->store, self->backend, "feature-max-indirect-segments", 0);
    uint32_t pages = offered <= BLKIF_SEGMENTS     ? BLKIF_SEGMENTS
                     : offered < SEGMENTS_PER_PAGE ? (uint32_t)offered
                                                   : SEGMENTS_PER_PAGE;
    return limit < pages ? limit : pages;
}

static void publish_ring(struct blkif *self, uint32_t first_page) {
    struct xenstore *store = &self->store;
    if (self->order == 0) {
        xenstore_write_number(store, self->frontend, "ring-ref", first_page);
    } else {
        xenstore_write_number(store, self->frontend, "ring-page-order", self->order);
        for (uint32_t i = 0; i < 1u << self->order; i++) {
            char name[32];
            snprintf(name, sizeof name, "ring-ref%u", i);
            xenstore_write_number(store, self->frontend, name, first_page + i);
        }
    }
    xenstore_write_number(store, self->frontend, "event-channel", PORT);
    xenstore_write(store, self->frontend, "protocol", "x86_64-abi");
    xenstore_write_number(store, self->frontend, "feature-persistent", self->persistent);
    set_state(self, INITIALISED);
}

static void read_geometry(struct blkif *self) {
    struct xenstore *store = &self->store;
    uint64_t sectors = xenstore_number(store, self->backend, "sectors", 0);
    uint64_t sector_size = xenstore_number(store, self->backend, "sector-size", SECTOR_SIZE);
    if (sector_size > PAGE_SIZE)
        die("the disk's sectors have %llu bytes", (unsigned long long)sector_size);
    self->transport.size = sectors * SECTOR_SIZE;
    self->transport.read_only =
        xenstore_number(store, self->backend, "info", 0) & INFO_READ_ONLY;
}

/* -- the ring -- */

/* A grant for one request only, or for good. */
static void grant(struct blkif *self, uint32_t page) {
    if (self->granted[page])
        return;
    embedded_grant(&self->host, page);
    self->granted[page] = self->persistent;
}

static void fill_segments(struct blkif *self, struct blkif_segment *segment,
                          const struct request *request) {
    for (uint32_t i = 0; i < request->pages; i++) {
        grant(self, request->page[i]);
        segment[i] = (struct blkif_segment){request->page[i], 0, BLKIF_LAST_SECTOR, 0};
    }
}

static void blkif_submit(struct transport *transport, const struct request *request) {
    struct blkif *self = (struct blkif *)transport;
    if (self->request_produced - self->response_consumed >= self->entries)
        die("the ring is full");
    union blkif_entry *entry = &self->ring->entry[self->request_produced++ & (self->entries - 1)];
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

static void blkif_kick(struct transport *transport) {
    struct blkif *self = (struct blkif *)transport;
    uint32_t old = self->published, new = self->request_produced;
    if (old == new)
        return;
    __atomic_store_n(&self->ring->request_produced, new, __ATOMIC_RELEASE);
    self->published = new;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* our index before the backend's event */
    uint32_t event = __atomic_load_n(&self->ring->request_event, __ATOMIC_RELAXED);
    if (new - event < new - old) {
        transport->kicks++;
        ring_eventfd(self->kick_fd);
    }
}

static void take_back(struct blkif *self, const struct expected *expected, uint32_t tag) {
    for (uint32_t i = 0; i < expected->pages; i++)
        embedded_revoke(&self->host, expected->page[i]);
    if (expected->pages > BLKIF_SEGMENTS)
        embedded_revoke(&self->host, self->table[tag]);
}

static unsigned blkif_reap(struct transport *transport, struct completion *done, unsigned room) {
    struct blkif *self = (struct blkif *)transport;
    uint32_t produced = __atomic_load_n(&self->ring->response_produced, __ATOMIC_ACQUIRE);
    if (produced - self->response_consumed > self->published - self->response_consumed)
        die("the backend answers more than it was asked");
    unsigned count = 0;
    for (; self->response_consumed != produced && count < room; self->response_consumed++) {
        const struct blkif_response *response =
            &self->ring->entry[self->response_consumed & (self->entries - 1)].response;
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

static bool blkif_arm(struct transport *transport) {
    struct blkif *self = (struct blkif *)transport;
    __atomic_store_n(&self->ring->response_event, self->response_consumed + 1, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* our event before the backend's index */
    return __atomic_load_n(&self->ring->response_produced, __ATOMIC_RELAXED) !=
           self->response_consumed;
}

static void blkif_close(struct transport *transport) {
    struct blkif *self = (struct blkif *)transport;
    set_state(self, CLOSING);
    await_backend(self, 1u << CLOSING | 1u << CLOSED | 1u, "waiting for the backend to close");
    set_state(self, CLOSED);
    xenstore_close(&self->store);
    embedded_close(&self->host);
}

/* -- putting it together -- */

static void size_ring(struct blkif *self, const struct blkif_options *options,
                      const struct demand *demand) {
    uint64_t most = xenstore_number(&self->store, self->backend, "max-ring-page-order", 0);
    if (options->ring_order >= 0)
        self->order = (uint32_t)options->ring_order;
    else
        while ((uint32_t)ENTRIES_PER_PAGE << self->order < demand->depth)
            self->order++;
    self->entries = (uint32_t)ENTRIES_PER_PAGE << self->order;
    if (self->order > most)
        die("a ring of 2^%u pages is needed, the backend takes 2^%llu", self->order,
            (unsigned long long)most);
}

static void make_slots(struct blkif *self, const struct demand *demand) {
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

static uint32_t make_ring(struct blkif *self) {
    uint32_t pages = 1u << self->order, first = memory_take(self->memory, pages);
    for (uint32_t i = 0; i < pages; i++)
        embedded_grant(&self->host, first + i);
    self->ring = memory_at(self->memory, first);
    self->ring->request_event = self->ring->response_event = 1;
    return first;
}

struct transport *blkif_open(const struct blkif_options *options, const struct demand *demand,
                             struct memory *memory) {
    struct blkif *self = allocate(1, sizeof *self);
    self->memory = memory;
    self->granted = allocate(memory->pages, sizeof *self->granted);
    self->kick_fd = make_eventfd();
    self->transport = (struct transport){
        .name = "blkif",
        .wake_fd = make_eventfd(),
        .submit = blkif_submit,
        .kick = blkif_kick,
        .reap = blkif_reap,
        .arm = blkif_arm,
        .close = blkif_close,
    };
    embedded_open(&self->host, options->directory, options->domid, memory);
    embedded_offer(&self->host, PORT, self->kick_fd, self->transport.wake_fd);
    printf("domain %u\n", self->host.domid); /* so that a disk can be attached to it */
    fflush(stdout);
    find_device(self, options->directory, options->device);
    await_backend(self, 1u << INIT_WAIT | 1u << CONNECTED, "waiting for the backend");
    self->transport.max_pages = max_pages(self, options->max_segments);
    self->persistent = options->persistent &&
                       xenstore_number(&self->store, self->backend, "feature-persistent", 0);
    size_ring(self, options, demand);
    make_slots(self, demand);
    publish_ring(self, make_ring(self));
    await_backend(self, 1u << CONNECTED, "waiting for the backend to connect");
    read_geometry(self);
    set_state(self, CONNECTED);
    return &self->transport;
}
