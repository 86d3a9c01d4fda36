/* The way from the load loop to a backend; blkif.c, bare.c and vhost_user.c
 * know one backend each, and many.c makes one disk of several.
 *
 * Closed loop: stage requests with `submit`, publish them with `kick`, collect with `reap`.  When
 * there is nothing to collect, `arm` and, unless it says there is something after all, wait until
 * `wake_fd` is readable. */
#ifndef BENCH_TRANSPORT_H
#define BENCH_TRANSPORT_H

#include <stdbool.h>
#include <stdint.h>

#include "memory.h"

struct request {
    uint32_t tag; /* below the transport's `slots` */
    bool write;
    uint64_t offset; /* bytes */
    const uint32_t *page; /* numbers of the guest's pages, each used whole */
    uint32_t pages; /* 1 to max_pages */
};

struct completion {
    uint32_t tag;
    bool ok;
};

struct transport {
    const char *name;
    uint64_t size; /* of the disk, bytes */
    uint32_t max_pages; /* per request */
    uint32_t slots; /* requests at a time */
    bool read_only;
    int wake_fd; /* an eventfd */
    uint64_t requests, kicks; /* submitted; of these, times the backend was notified */

    void (*submit)(struct transport *transport, const struct request *request);
    void (*kick)(struct transport *transport);
    unsigned (*reap)(struct transport *transport, struct completion *done, unsigned room);
    bool (*arm)(struct transport *transport);
    void (*close)(struct transport *transport);
};

/* What the load will ask for, for which the transport makes room. */
struct demand {
    uint32_t depth; /* operations in flight */
    uint32_t pages; /* per operation; split into requests of at most max_pages */
};

struct blkif_options {
    const char *directory; /* the embedded host's */
    uint32_t domid; /* 0: the host picks one */
    uint32_t device; /* virtual device number */
    uint32_t disks; /* this one and those that follow */
    uint32_t max_segments; /* per request, however many more the backend takes */
    int ring_order; /* -1: as small as will hold `depth` requests */
    bool persistent; /* use feature-persistent if the backend has it */
};

struct vhost_user_options {
    const char *socket;
    uint32_t queue_size; /* 0: 256, or more if the demand needs it */
    bool indirect; /* always one descriptor per request, pointing to a table of its own; else
                      only if the queue can't hold the requests otherwise */
};

struct bare_options {
    const char *socket;
    uint32_t disk; /* which of the server's */
    uint32_t max_segments;
};

/* How many requests an operation becomes. */
static inline uint32_t parts_of(const struct demand *demand, uint32_t max_pages) {
    return (demand->pages + max_pages - 1) / max_pages;
}

struct transport *blkif_open(const struct blkif_options *options, const struct demand *demand,
                             struct memory *memory);
struct transport *bare_open(const struct bare_options *options, const struct demand *demand,
                            struct memory *memory);
/* Disks of the same content that share a `wake_fd`, each with the same number of requests. */
struct transport *many_open(struct transport **each, uint32_t count);
struct transport *vhost_user_open(const struct vhost_user_options *options,
                                  const struct demand *demand, struct memory *memory);

#endif
