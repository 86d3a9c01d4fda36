/* XenStore's wire protocol (xen/include/public/io/xs_wire.h), as much as a frontend needs.
 * Whatever goes wrong ends the program. */
#ifndef BENCH_XENSTORE_H
#define BENCH_XENSTORE_H

#include <stdint.h>

struct xenstore {
    int socket;
    uint32_t next_id;
    uint32_t events; /* watch events that came while something else was awaited */
};

enum { XENSTORE_VALUE_SIZE = 4097 };

/* Connects; waits up to `seconds` for the server to listen. */
void xenstore_open(struct xenstore *store, const char *path, double seconds);

/* The node's value, or NULL if there is none.  Lives in `value`. */
char *xenstore_read(struct xenstore *store, const char *path, char value[XENSTORE_VALUE_SIZE]);

/* The number in a node below `directory`, or `otherwise` if there is no such node. */
uint64_t xenstore_number(struct xenstore *store, const char *directory, const char *name,
                         uint64_t otherwise);

void xenstore_write(struct xenstore *store, const char *directory, const char *name,
                    const char *value);
void xenstore_write_number(struct xenstore *store, const char *directory, const char *name,
                           uint64_t value);

/* From now on each change at or below the path is an event; one comes at once. */
void xenstore_watch(struct xenstore *store, const char *path);

/* Waits for an event until `deadline_ns` (CLOCK_MONOTONIC); `what` was to happen. */
void xenstore_await(struct xenstore *store, uint64_t deadline_ns, const char *what);

void xenstore_close(struct xenstore *store);

#endif
