/* bench-reference: the least that can serve a blkif ring, in one thread of plain C.
 *
 *   bench-reference SOCKET cached:FILE | direct:FILE ...
 *
 * It is what other backends are measured against, not one to be used: it believes the guest
 * everything, keeps no journal, knows no extents, and everything it reads of a request it may read
 * twice.  The guest's memory is mapped once and for all, as with persistent grants.  Requests are
 * taken in batches and submitted together; their answers are pushed together, with one decision
 * about notifying. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>

#include "../guest/blkif_layout.h"
#include "bare.h"
#include "uring.h"

enum { PAGE = 4096, SECTOR = 512, MAX_DISKS = 64, SEGMENTS_PER_PAGE = 512 };

/* What the kernel gives back with an answer; others are numbers of requests. */
static const uint64_t KICKED = UINT64_MAX, HUNG_UP = UINT64_MAX - 1;

struct disk {
    int fd;
    uint64_t size;
};

struct request {
    uint64_t id;
    uint8_t operation; /* that is answered */
    uint32_t length;
    struct iovec part[BARE_SEGMENTS];
};

struct ring {
    struct blkif_ring *shared;
    uint8_t *memory;
    uint64_t memory_size;
    uint32_t mask, consumed, produced, pushed;
    int socket, kick_fd, wake_fd;
    unsigned file; /* the number under which the disk is registered */
    uint64_t kicks; /* where the eventfd's value is read to */
    struct request *request;
    uint32_t *idle; /* requests that are not in use: a stack */
    uint32_t idle_count;
    bool open;
};

static _Noreturn void fail(const char *what) {
    fprintf(stderr, "bench-reference: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void *allocate(size_t count, size_t size) {
    void *memory = calloc(count, size);
    if (!memory)
        fail("calloc");
    return memory;
}

static struct io_uring_sqe *stage(struct uring *uring) {
    struct io_uring_sqe *sqe = uring_stage(uring);
    if (!sqe)
        fail("io_uring_enter");
    return sqe;
}

/* -- from requests to answers -- */

static void await_kick(struct ring *ring, struct uring *uring) {
    struct io_uring_sqe *sqe = stage(uring);
    sqe->opcode = IORING_OP_READ;
    sqe->fd = ring->kick_fd;
    sqe->addr = (uintptr_t)&ring->kicks;
    sqe->len = sizeof ring->kicks;
    sqe->user_data = KICKED;
}

static void await_hangup(struct ring *ring, struct uring *uring) {
    struct io_uring_sqe *sqe = stage(uring);
    sqe->opcode = IORING_OP_POLL_ADD;
    sqe->fd = ring->socket;
    sqe->poll32_events = 0; /* hanging up is always told */
    sqe->user_data = HUNG_UP;
}

static unsigned gather(const struct ring *ring, const struct blkif_segment *segment, unsigned count,
                       struct request *request) {
    request->length = 0;
    for (unsigned i = 0; i < count; i++) {
        const struct blkif_segment *one = &segment[i];
        size_t length = (size_t)(one->last_sector - one->first_sector + 1) * SECTOR;
        uint8_t *page = ring->memory + (uint64_t)one->gref * PAGE;
        request->part[i] = (struct iovec){page + one->first_sector * SECTOR, length};
        request->length += (uint32_t)length;
    }
    return count;
}

static void start(struct ring *ring, struct uring *uring, const union blkif_entry *entry) {
    uint32_t number = ring->idle[--ring->idle_count];
    struct request *request = &ring->request[number];
    unsigned parts;
    uint8_t operation = entry->direct.operation;
    uint64_t sector;
    if (operation == BLKIF_INDIRECT) {
        operation = entry->indirect.inner;
        request->id = entry->indirect.id;
        sector = entry->indirect.sector;
        const uint8_t *table = ring->memory + (uint64_t)entry->indirect.gref[0] * PAGE;
        parts = gather(ring, (const void *)table, entry->indirect.segments, request);
    } else {
        request->id = entry->direct.id;
        sector = entry->direct.sector;
        parts = gather(ring, entry->direct.segment, entry->direct.segments, request);
    }
    request->operation = operation;
    struct io_uring_sqe *sqe = stage(uring);
    bool write = operation == BLKIF_WRITE;
    if (parts == 1) {
        sqe->opcode = write ? IORING_OP_WRITE : IORING_OP_READ;
        sqe->addr = (uintptr_t)request->part[0].iov_base;
        sqe->len = request->length;
    } else {
        sqe->opcode = write ? IORING_OP_WRITEV : IORING_OP_READV;
        sqe->addr = (uintptr_t)request->part;
        sqe->len = parts;
    }
    sqe->fd = (int)ring->file;
    sqe->flags = IOSQE_FIXED_FILE;
    sqe->off = sector * SECTOR;
    sqe->user_data = number;
}

/* Takes what is there; whether there was anything. */
static bool take(struct ring *ring, struct uring *uring) {
    uint32_t produced = __atomic_load_n(&ring->shared->request_produced, __ATOMIC_ACQUIRE);
    bool some = produced != ring->consumed;
    while (ring->consumed != produced)
        start(ring, uring, &ring->shared->entry[ring->consumed++ & ring->mask]);
    return some;
}

/* Asks to be woken for the next request; whether it is already there. */
static bool arm(struct ring *ring) {
    __atomic_store_n(&ring->shared->request_event, ring->consumed + 1, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* our event before the guest's index */
    return __atomic_load_n(&ring->shared->request_produced, __ATOMIC_RELAXED) != ring->consumed;
}

static void answer(struct ring *ring, uint32_t number, int32_t result) {
    const struct request *request = &ring->request[number];
    struct blkif_response *response =
        &ring->shared->entry[ring->produced++ & ring->mask].response;
    response->id = request->id;
    response->operation = request->operation;
    response->status = result == (int32_t)request->length ? BLKIF_OKAY : -1;
    ring->idle[ring->idle_count++] = number;
}

static void push(struct ring *ring) {
    uint32_t old = ring->pushed, new = ring->produced;
    if (old == new)
        return;
    __atomic_store_n(&ring->shared->response_produced, new, __ATOMIC_RELEASE);
    ring->pushed = new;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* our index before the guest's event */
    uint32_t event = __atomic_load_n(&ring->shared->response_event, __ATOMIC_RELAXED);
    if (new - event < new - old && eventfd_write(ring->wake_fd, 1) < 0)
        fail("eventfd");
}

static void reap(struct ring *ring, struct uring *uring) {
    unsigned head = *uring->cq_head;
    unsigned tail = __atomic_load_n(uring->cq_tail, __ATOMIC_ACQUIRE);
    bool kicked = false;
    for (; head != tail; head++) {
        const struct io_uring_cqe *cqe = &uring->cqe[head & *uring->cq_mask];
        if (cqe->user_data == KICKED)
            kicked = true;
        else if (cqe->user_data == HUNG_UP)
            ring->open = false;
        else
            answer(ring, (uint32_t)cqe->user_data, cqe->res);
    }
    __atomic_store_n(uring->cq_head, head, __ATOMIC_RELEASE);
    if (kicked && ring->open)
        await_kick(ring, uring);
}

static void serve(struct ring *ring, struct uring *uring) {
    await_kick(ring, uring);
    await_hangup(ring, uring);
    while (ring->open) {
        bool busy = take(ring, uring) || arm(ring);
        if (uring_enter(uring, busy ? 0 : 1) < 0)
            fail("io_uring_enter");
        reap(ring, uring);
        push(ring);
    }
}

/* -- from hello to the end -- */

static void receive_hello(int socket, struct bare_hello *hello, int fds[BARE_FDS]) {
    union {
        char space[CMSG_SPACE(BARE_FDS * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec part = {hello, sizeof *hello};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control.space,
                             .msg_controllen = sizeof control.space};
    errno = EPROTO;
    if (recvmsg(socket, &message, MSG_CMSG_CLOEXEC) != (ssize_t)sizeof *hello)
        fail("hello");
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (!header || header->cmsg_len != CMSG_LEN(BARE_FDS * sizeof(int)))
        fail("hello");
    memcpy(fds, CMSG_DATA(header), BARE_FDS * sizeof(int));
}

static void attach(struct ring *ring, const struct disk *disk, unsigned disks) {
    struct bare_hello hello;
    int fds[BARE_FDS];
    receive_hello(ring->socket, &hello, fds);
    if (hello.disk >= disks || !hello.entries || hello.entries & (hello.entries - 1))
        fail("hello");
    ring->memory_size = (uint64_t)hello.memory_pages * PAGE;
    ring->memory = mmap(NULL, ring->memory_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                        fds[0], 0);
    if (ring->memory == MAP_FAILED)
        fail("the guest's memory");
    close(fds[0]);
    ring->shared = (void *)(ring->memory + (uint64_t)hello.first_page * PAGE);
    ring->mask = hello.entries - 1;
    ring->kick_fd = fds[1];
    ring->wake_fd = fds[2];
    /* io_uring does not wait for what is not to be waited for. */
    if (fcntl(ring->kick_fd, F_SETFL, O_RDWR) < 0)
        fail("eventfd");
    ring->file = hello.disk;
    ring->request = allocate(hello.entries, sizeof *ring->request);
    ring->idle = allocate(hello.entries, sizeof *ring->idle);
    for (uint32_t i = 0; i < hello.entries; i++)
        ring->idle[ring->idle_count++] = hello.entries - 1 - i;
    struct bare_answer answer = {.size = disk[hello.disk].size};
    if (send(ring->socket, &answer, sizeof answer, MSG_NOSIGNAL) < 0)
        fail("answering hello");
}

static void detach(struct ring *ring) {
    munmap(ring->memory, ring->memory_size);
    free(ring->request);
    free(ring->idle);
    close(ring->socket);
    close(ring->kick_fd);
    close(ring->wake_fd);
}

static struct disk open_disk(const char *text) {
    bool direct = strncmp(text, "direct:", 7) == 0;
    if (!direct && strncmp(text, "cached:", 7) != 0) {
        errno = EINVAL;
        fail(text);
    }
    struct disk disk = {.fd = open(text + 7, O_RDWR | O_CLOEXEC | (direct ? O_DIRECT : 0))};
    struct stat status;
    if (disk.fd < 0 || fstat(disk.fd, &status) < 0)
        fail(text);
    disk.size = (uint64_t)status.st_size;
    return disk;
}

static int listen_at(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    errno = ENAMETOOLONG;
    if (strlen(path) >= sizeof address.sun_path)
        fail(path);
    strcpy(address.sun_path, path);
    int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) < 0 ||
        listen(listener, 1) < 0)
        fail(path);
    return listener;
}

int main(int count, char **arguments) {
    struct disk disk[MAX_DISKS];
    if (count < 3 || count - 2 > MAX_DISKS) {
        fputs("usage: bench-reference SOCKET cached:FILE | direct:FILE ...\n", stderr);
        return 2;
    }
    unsigned disks = (unsigned)count - 2;
    int fds[MAX_DISKS];
    for (unsigned i = 0; i < disks; i++) {
        disk[i] = open_disk(arguments[i + 2]);
        fds[i] = disk[i].fd;
    }
    int listener = listen_at(arguments[1]);
    for (;;) { /* one guest after the other, each with a new io_uring */
        struct uring uring = {0};
        struct ring ring = {.open = true, .socket = accept(listener, NULL, NULL)};
        if (ring.socket < 0)
            fail("accept");
        if (uring_open(&uring) < 0)
            fail("io_uring");
        if (syscall(SYS_io_uring_register, uring.fd, IORING_REGISTER_FILES, fds, disks) < 0)
            fail("registering files");
        attach(&ring, disk, disks);
        serve(&ring, &uring);
        uring_close(&uring);
        detach(&ring);
    }
}
