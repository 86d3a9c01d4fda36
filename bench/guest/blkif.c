/* blkif front ends in a domain of xbd's embedded host. */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "embedded.h"
#include "ring.h"
#include "util.h"
#include "xenstore.h"

enum { INIT_WAIT = 2, INITIALISED = 3, CONNECTED = 4, CLOSING = 5, CLOSED = 6 };
enum { INFO_READ_ONLY = 4, PATH_SIZE = 256, FIRST_PORT = 1, NEXT_DEVICE = 16, WAIT_SECONDS = 180 };

/* What all disks of the guest share. */
struct domain {
    struct embedded host;
    struct xenstore store;
    uint32_t disks; /* that are not closed yet */
};

struct blkif {
    struct ring ring; /* first, and in it the transport: they share an address */
    struct domain *domain;
    uint32_t port;
    char frontend[PATH_SIZE], backend[PATH_SIZE];
};

/* -- XenStore -- */

static void set_state(struct blkif *self, unsigned state) {
    xenstore_write_number(&self->domain->store, self->frontend, "state", state);
}

/* Waits until the backend's state is one of those whose bits are set in `wanted`. */
static void await_backend(struct blkif *self, unsigned wanted, const char *what) {
    uint64_t deadline_ns = now_ns() + (uint64_t)WAIT_SECONDS * 1000000000u;
    for (;;) {
        uint64_t state = xenstore_number(&self->domain->store, self->backend, "state", 0);
        if (state < 32 && wanted & 1u << state)
            return;
        if (state == CLOSING || state == CLOSED)
            die("the backend closes the disk: see its log");
        xenstore_await(&self->domain->store, deadline_ns, what);
    }
}

static void open_store(struct domain *domain, const char *directory) {
    char path[4096];
    snprintf(path, sizeof path, "%s/xenstored-%u.socket", directory, domain->host.domid);
    xenstore_open(&domain->store, path, WAIT_SECONDS);
    snprintf(path, sizeof path, "/local/domain/%u/device/vbd", domain->host.domid);
    xenstore_watch(&domain->store, path);
}

static void find_device(struct blkif *self, uint32_t device) {
    char path[PATH_SIZE + 16], value[XENSTORE_VALUE_SIZE];
    snprintf(self->frontend, sizeof self->frontend, "/local/domain/%u/device/vbd/%u",
             self->domain->host.domid, device);
    snprintf(path, sizeof path, "%s/backend", self->frontend);
    uint64_t deadline_ns = now_ns() + (uint64_t)WAIT_SECONDS * 1000000000u;
    while (!xenstore_read(&self->domain->store, path, value))
        xenstore_await(&self->domain->store, deadline_ns, "waiting for the disk to be attached");
    if (strlen(value) >= sizeof self->backend)
        die("%s is too long", path);
    strcpy(self->backend, value);
}

/* All disks' backends at once: they lie side by side, and XenStore allows few watches. */
static void watch_backends(const struct blkif *one) {
    char path[PATH_SIZE];
    strcpy(path, one->backend);
    *strrchr(path, '/') = '\0';
    xenstore_watch(&one->domain->store, path);
}

static uint32_t max_pages(struct blkif *self, uint32_t limit) {
    uint64_t offered =
        xenstore_number(&self->domain->store, self->backend, "feature-max-indirect-segments", 0);
    uint32_t pages = offered <= BLKIF_SEGMENTS     ? BLKIF_SEGMENTS
                     : offered < SEGMENTS_PER_PAGE ? (uint32_t)offered
                                                   : SEGMENTS_PER_PAGE;
    return limit < pages ? limit : pages;
}

static void publish_ring(struct blkif *self) {
    uint32_t first_page = self->ring.first_page;
    struct xenstore *store = &self->domain->store;
    if (self->ring.order == 0) {
        xenstore_write_number(store, self->frontend, "ring-ref", first_page);
    } else {
        xenstore_write_number(store, self->frontend, "ring-page-order", self->ring.order);
        for (uint32_t i = 0; i < 1u << self->ring.order; i++) {
            char name[32];
            snprintf(name, sizeof name, "ring-ref%u", i);
            xenstore_write_number(store, self->frontend, name, first_page + i);
        }
    }
    xenstore_write_number(store, self->frontend, "event-channel", self->port);
    xenstore_write(store, self->frontend, "protocol", "x86_64-abi");
    xenstore_write_number(store, self->frontend, "feature-persistent", self->ring.persistent);
    set_state(self, INITIALISED);
}

static void read_geometry(struct blkif *self) {
    struct xenstore *store = &self->domain->store;
    uint64_t sectors = xenstore_number(store, self->backend, "sectors", 0);
    uint64_t sector_size = xenstore_number(store, self->backend, "sector-size", SECTOR_SIZE);
    if (sector_size > PAGE_SIZE)
        die("the disk's sectors have %llu bytes", (unsigned long long)sector_size);
    self->ring.transport.size = sectors * SECTOR_SIZE;
    self->ring.transport.read_only =
        xenstore_number(store, self->backend, "info", 0) & INFO_READ_ONLY;
}

static void choose_order(struct blkif *self, const struct blkif_options *options,
                         const struct demand *demand) {
    uint64_t most =
        xenstore_number(&self->domain->store, self->backend, "max-ring-page-order", 0);
    self->ring.order =
        options->ring_order >= 0 ? (uint32_t)options->ring_order : ring_order_for(demand->depth);
    if (self->ring.order > most)
        die("a ring of 2^%u pages is needed, the backend takes 2^%llu", self->ring.order,
            (unsigned long long)most);
}

/* -- from attaching to detaching -- */

static void blkif_close(struct transport *transport) {
    struct blkif *self = (struct blkif *)transport;
    set_state(self, CLOSING);
    await_backend(self, 1u << CLOSING | 1u << CLOSED | 1u, "waiting for the backend to close");
    set_state(self, CLOSED);
    if (--self->domain->disks)
        return;
    xenstore_close(&self->domain->store);
    embedded_close(&self->domain->host);
}

static void negotiate(struct blkif *self, const struct blkif_options *options,
                      const struct demand *demand) {
    await_backend(self, 1u << INIT_WAIT | 1u << CONNECTED, "waiting for the backend");
    self->ring.transport.max_pages = max_pages(self, options->max_segments);
    self->ring.persistent =
        options->persistent &&
        xenstore_number(&self->domain->store, self->backend, "feature-persistent", 0);
    choose_order(self, options, demand);
    ring_lay_out(&self->ring, demand);
    publish_ring(self);
}

static void finish(struct blkif *self) {
    await_backend(self, 1u << CONNECTED, "waiting for the backend to connect");
    read_geometry(self);
    set_state(self, CONNECTED);
}

static void offer_ports(struct blkif *disk, uint32_t disks, struct memory *memory) {
    int wake_fd = make_eventfd();
    for (uint32_t i = 0; i < disks; i++) {
        struct domain *domain = disk[i].domain;
        ring_open(&disk[i].ring, "blkif", memory, domain->host.grants, wake_fd);
        disk[i].ring.transport.close = blkif_close;
        disk[i].port = FIRST_PORT + i;
        embedded_offer(&domain->host, disk[i].port, disk[i].ring.kick_fd, wake_fd);
    }
}

struct transport *blkif_open(const struct blkif_options *options, const struct demand *demand,
                             struct memory *memory) {
    uint32_t disks = options->disks;
    struct domain *domain = allocate(1, sizeof *domain);
    struct blkif *disk = allocate(disks, sizeof *disk);
    struct transport **each = allocate(disks, sizeof(struct transport *));
    domain->disks = disks;
    for (uint32_t i = 0; i < disks; i++) {
        disk[i].domain = domain;
        each[i] = &disk[i].ring.transport;
    }
    embedded_open(&domain->host, options->directory, options->domid, memory);
    offer_ports(disk, disks, memory);
    printf("domain %u\n", domain->host.domid); /* so that disks can be attached to it */
    fflush(stdout);
    open_store(domain, options->directory);
    /* Step by step with all of them, so that the backend can prepare some while others talk. */
    for (uint32_t i = 0; i < disks; i++) {
        find_device(&disk[i], options->device + i * NEXT_DEVICE);
        if (i == 0)
            watch_backends(&disk[i]);
    }
    for (uint32_t i = 0; i < disks; i++)
        negotiate(&disk[i], options, demand);
    for (uint32_t i = 0; i < disks; i++)
        finish(&disk[i]);
    return disks == 1 ? each[0] : many_open(each, disks);
}
