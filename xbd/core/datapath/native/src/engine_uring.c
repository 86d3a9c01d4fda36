/*
 * Waiting and moving bytes by one io_uring per thread.
 *
 * Event channels are watched by polls that stay armed: an event costs no system call.  Files are registered
 * under their own numbers while a ring uses them.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "server.h"
#include "uring.h"

enum { ENTRIES = 256, COMPLETIONS = 4096, FILES = 1024 };

/* In the lowest bits of user_data; an operation's are 0. */
enum tag { OPERATION, RING, MAIL, UNPOLLED };

#define TAGS ((uint64_t)3)

static const struct timespec MOMENT = {.tv_nsec = 100000};

struct engine {
    struct uring uring;
    bool mail_watched;
    struct operation *waiting, **last_waiting;      /* for room in the submission queue */
    uint16_t users[FILES];                          /* rings that use the registered file of this number */
};

static struct engine *engine_of(struct io_thread *thread)
{
    return thread->engine_state;
}

static struct io_uring_sqe *get_sqe(struct engine *engine)
{
    struct io_uring_sqe *sqe = uring_sqe(&engine->uring);
    if (sqe)
        return sqe;
    uring_enter(&engine->uring, 0, 0);
    return uring_sqe(&engine->uring);
}

static bool poll_always(struct engine *engine, int fd, uint64_t user_data)
{
    struct io_uring_sqe *sqe = get_sqe(engine);
    if (!sqe)
        return false;
    sqe->opcode = IORING_OP_POLL_ADD;
    sqe->fd = fd;
    sqe->len = IORING_POLL_ADD_MULTI;
    sqe->poll32_events = POLLIN;
    sqe->user_data = user_data;
    return true;
}

static bool open_engine(struct io_thread *thread)
{
    struct engine *engine = calloc(1, sizeof(*engine));
    if (!engine)
        return false;
    if (!uring_open(&engine->uring, ENTRIES, COMPLETIONS)) {
        int error = errno;
        free(engine);
        errno = error;
        return false;
    }
    engine->last_waiting = &engine->waiting;
    thread->engine_state = engine;
    engine->mail_watched = poll_always(engine, thread->mail_fd, MAIL);
    return true;
}

static void close_engine(struct io_thread *thread)
{
    uring_close(&engine_of(thread)->uring);
    free(engine_of(thread));
}

static bool watch(struct io_thread *thread, struct ring *ring)
{
    ring->polled = poll_always(engine_of(thread), ring->channel.fd, (uint64_t)(uintptr_t)ring | RING);
    return ring->polled;
}

static bool unwatch(struct io_thread *thread, struct ring *ring)
{
    struct io_uring_sqe *sqe;
    if (ring->unpolling)
        return false;
    while (!(sqe = get_sqe(engine_of(thread))))
        nanosleep(&MOMENT, NULL);       /* the kernel is short of memory */
    /* Not POLL_REMOVE, which lets the poll live if an event has just come (EALREADY). */
    sqe->opcode = IORING_OP_ASYNC_CANCEL;
    sqe->addr = (uint64_t)(uintptr_t)ring | RING;
    sqe->user_data = (uint64_t)(uintptr_t)ring | UNPOLLED;
    ring->unpolling = true;
    return false;
}

/* Two completions, in any order, end a watch: the poll's last one, and that of the request to end it. */
static void poll_ended(struct ring *ring)
{
    ring->polled = false;
    if (!ring->unpolling)
        ring_unwatched(ring);
}

static void unpolled(struct io_thread *thread, struct ring *ring, int32_t result)
{
    ring->unpolling = false;
    if (!ring->polled)
        ring_unwatched(ring);
    else if (result == -EALREADY)
        unwatch(thread, ring);          /* an event was just coming in, and the poll goes on */
}

/* -- files --------------------------------------------------------------------------------------------- */

/* Whether the ring may use fd as a registered file.  It stays open until the ring releases it. */
static bool is_registered(struct engine *engine, struct ring *ring, int fd)
{
    for (unsigned i = 0; i < ring->nr_files; i++)
        if (ring->files[i] == fd)
            return true;
    if (fd >= FILES || ring->nr_files == RING_FILES || ring->no_files)
        return false;
    if (!engine->users[fd] && !uring_set_file(&engine->uring, (unsigned)fd, fd)) {
        ring->no_files = true;
        return false;
    }
    engine->users[fd]++;
    ring->files[ring->nr_files++] = fd;
    return true;
}

/* What is queued with one of these numbers is handed over before; if the kernel does not take it now, it fails with
 * EBADF, and goes to the driver. */
static void release(struct io_thread *thread, struct ring *ring)
{
    struct engine *engine = engine_of(thread);
    if (ring->nr_files && engine->uring.queued)
        uring_enter(&engine->uring, 0, 0);
    while (ring->nr_files) {
        int fd = ring->files[--ring->nr_files];
        if (!--engine->users[fd])
            uring_set_file(&engine->uring, (unsigned)fd, -1);
    }
}

/* -- operations ---------------------------------------------------------------------------------------- */

static void fill(struct engine *engine, struct io_uring_sqe *sqe, struct operation *operation)
{
    bool write = operation->kind == WRITE;
    sqe->fd = operation->fd;
    if (is_registered(engine, operation->ring, operation->fd))
        sqe->flags = IOSQE_FIXED_FILE;
    sqe->user_data = (uint64_t)(uintptr_t)operation;
    if (operation->kind == SYNC) {
        sqe->opcode = IORING_OP_FSYNC;
        sqe->fsync_flags = IORING_FSYNC_DATASYNC;
        return;
    }
    sqe->off = operation->position;
    if (operation->nr_iov == 1) {
        sqe->opcode = write ? IORING_OP_WRITE : IORING_OP_READ;
        sqe->addr = (uint64_t)(uintptr_t)operation->iov->iov_base;
        sqe->len = (uint32_t)operation->iov->iov_len;
    } else {
        sqe->opcode = write ? IORING_OP_WRITEV : IORING_OP_READV;
        sqe->addr = (uint64_t)(uintptr_t)operation->iov;
        sqe->len = operation->nr_iov;
    }
}

static void start_operation(struct io_thread *thread, struct operation *operation)
{
    struct engine *engine = engine_of(thread);
    struct io_uring_sqe *sqe = engine->waiting ? NULL : get_sqe(engine);
    thread->started++;
    thread->in_flight++;
    if (sqe) {
        fill(engine, sqe, operation);
        return;
    }
    operation->next = NULL;
    *engine->last_waiting = operation;
    engine->last_waiting = &operation->next;
}

static void start_waiting(struct engine *engine)
{
    struct io_uring_sqe *sqe;
    while (engine->waiting && (sqe = uring_sqe(&engine->uring))) {
        struct operation *operation = engine->waiting;
        engine->waiting = operation->next;
        if (!engine->waiting)
            engine->last_waiting = &engine->waiting;
        fill(engine, sqe, operation);
    }
}

/* -- turns --------------------------------------------------------------------------------------------- */

static void dispatch(struct io_thread *thread, uint64_t user_data, int32_t result, bool more)
{
    void *object = (void *)(uintptr_t)(user_data & ~TAGS);
    switch ((enum tag)(user_data & TAGS)) {
    case OPERATION:
        thread->in_flight--;
        ((struct operation *)object)->ended(object, result);
        break;
    case RING:
        if (more)
            ring_woken(object);
        else
            poll_ended(object);
        break;
    case MAIL:
        engine_of(thread)->mail_watched = more;
        break;
    case UNPOLLED:
        unpolled(thread, object, result);
        break;
    }
}

static bool reap(struct io_thread *thread)
{
    struct uring *uring = &engine_of(thread)->uring;
    const struct io_uring_cqe *cqe;
    bool found = false;
    for (unsigned i = 0; i < COMPLETIONS && (cqe = uring_peek(uring)); i++) {
        uint64_t user_data = cqe->user_data;
        int32_t result = cqe->res;
        bool more = cqe->flags & IORING_CQE_F_MORE;
        uring_seen(uring);
        dispatch(thread, user_data, result, more);
        found = true;
    }
    return found;
}

static int turn(struct io_thread *thread, uint64_t timeout_ns)
{
    struct engine *engine = engine_of(thread);
    struct uring *uring = &engine->uring;
    int error = 0;
    if (!engine->mail_watched)
        engine->mail_watched = poll_always(engine, thread->mail_fd, MAIL);
    if (timeout_ns || uring->queued || !uring_peek(uring))
        error = uring_enter(uring, timeout_ns && !engine->waiting ? 1 : 0, timeout_ns);
    bool found = reap(thread);
    if (error == EAGAIN || error == EBUSY || error == EINTR) {
        /* The kernel is short of memory, or wants its completions reaped first. */
        if (!found)
            nanosleep(&MOMENT, NULL);
        error = 0;
    }
    start_waiting(engine);
    thread->started = uring->queued;
    return error;
}

static bool pending(struct io_thread *thread)
{
    struct engine *engine = engine_of(thread);
    return engine->uring.queued || engine->waiting || uring_pending(&engine->uring);
}

const struct engine_calls ENGINE_URING = {
    .name = "io_uring",
    .open = open_engine,
    .close = close_engine,
    .watch = watch,
    .unwatch = unwatch,
    .start = start_operation,
    .turn = turn,
    .pending = pending,
    .release = release,
};
