/* A ring served by bench/reference, with nothing but a socket to agree on where it is. */
#include <sys/socket.h>
#include <unistd.h>

#include "../reference/bare.h"
#include "ring.h"
#include "util.h"

struct bare {
    struct ring ring; /* first, and in it the transport: they share an address */
    int socket;
};

static void bare_close(struct transport *transport) {
    close(((struct bare *)transport)->socket);
}

struct transport *bare_open(const struct bare_options *options, const struct demand *demand,
                            struct memory *memory) {
    struct bare *self = allocate(1, sizeof *self);
    struct ring *ring = &self->ring;
    /* The whole of the memory is handed over: there is nobody who would read a grant table. */
    uint64_t *grants = allocate(memory->pages, sizeof *grants);
    ring_open(ring, "bare", memory, grants, make_eventfd());
    ring->transport.close = bare_close;
    ring->transport.max_pages =
        options->max_segments < BARE_SEGMENTS ? options->max_segments : BARE_SEGMENTS;
    ring->persistent = true;
    ring->order = ring_order_for(demand->depth);
    ring_lay_out(ring, demand);
    self->socket = connect_unix(options->socket, SOCK_SEQPACKET);
    if (self->socket < 0)
        die_errno("%s", options->socket);
    struct bare_hello hello = {
        .disk = options->disk,
        .memory_pages = memory->pages,
        .first_page = ring->first_page,
        .entries = ring->entries,
    };
    int fds[BARE_FDS] = {memory->fd, ring->kick_fd, ring->transport.wake_fd};
    send_with_fds(self->socket, &hello, sizeof hello, fds, BARE_FDS);
    struct bare_answer answer;
    receive_all(self->socket, &answer, sizeof answer, "the server");
    ring->transport.size = answer.size;
    return &ring->transport;
}
