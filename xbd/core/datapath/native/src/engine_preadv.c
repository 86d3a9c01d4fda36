/*
 * Waiting by poll(2) and moving bytes by preadv(2), where io_uring is not to be had.  One transfer at a time.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

#include "server.h"
#include "stress.h"

enum { TURNS_PER_LOOK = 32 };       /* while there is work: how often the others are looked at */

struct engine {
    struct pollfd *polls;           /* the mailbox, then the rings in `rings` */
    struct ring **rings;
    unsigned nr_rings, room;
    unsigned turns;
    bool readable;                  /* something is, and was not looked at */
    struct operation *started, **last_started;
};

static struct engine *engine_of(struct io_thread *thread)
{
    return thread->engine_state;
}

static bool grow(struct engine *engine)
{
    unsigned room = engine->room ? engine->room * 2 : 16;
    struct pollfd *polls = realloc(engine->polls, (room + 1) * sizeof(*polls));
    if (!polls)
        return false;
    engine->polls = polls;
    struct ring **rings = realloc(engine->rings, room * sizeof(struct ring *));
    if (!rings)
        return false;
    engine->rings = rings;
    engine->room = room;
    return true;
}

static bool open_engine(struct io_thread *thread)
{
    struct engine *engine = calloc(1, sizeof(*engine));
    if (!engine)
        return false;
    if (!grow(engine)) {
        free(engine->polls);
        free(engine);
        errno = ENOMEM;
        return false;
    }
    engine->polls[0] = (struct pollfd){.fd = thread->mail_fd, .events = POLLIN};
    engine->last_started = &engine->started;
    thread->engine_state = engine;
    return true;
}

static void close_engine(struct io_thread *thread)
{
    struct engine *engine = engine_of(thread);
    free(engine->polls);
    free(engine->rings);
    free(engine);
}

static bool watch(struct io_thread *thread, struct ring *ring)
{
    struct engine *engine = engine_of(thread);
    if (engine->nr_rings == engine->room && !grow(engine))
        return false;
    engine->rings[engine->nr_rings++] = ring;
    engine->polls[engine->nr_rings] = (struct pollfd){.fd = ring->channel.fd, .events = POLLIN};
    return true;
}

static bool unwatch(struct io_thread *thread, struct ring *ring)
{
    struct engine *engine = engine_of(thread);
    for (unsigned i = 0; i < engine->nr_rings; i++)
        if (engine->rings[i] == ring) {
            engine->rings[i] = engine->rings[--engine->nr_rings];
            engine->polls[i + 1] = engine->polls[engine->nr_rings + 1];
            break;
        }
    return true;
}

static void start_operation(struct io_thread *thread, struct operation *operation)
{
    struct engine *engine = engine_of(thread);
    operation->next = NULL;
    *engine->last_started = operation;
    engine->last_started = &operation->next;
    thread->started++;
    thread->in_flight++;
}

static void move(struct operation *operation)
{
    int nr_iov = (int)operation->nr_iov;
    off_t position = (off_t)operation->position;
    ssize_t result;
    do {
        if (operation->kind == SYNC)
            result = fdatasync(operation->fd);
        else if (operation->kind == WRITE)
            result = pwritev(operation->fd, operation->iov, nr_iov, position);
        else
            result = preadv(operation->fd, operation->iov, nr_iov, position);
    } while (result < 0 && errno == EINTR);
    operation->ended(operation, result < 0 ? -errno : result);
}

static void move_started(struct io_thread *thread)
{
    struct engine *engine = engine_of(thread);
    struct operation *operation = engine->started;
    engine->started = NULL;
    engine->last_started = &engine->started;
    thread->started = 0;
    while (operation) {
        struct operation *next = operation->next;
        thread->in_flight--;
        move(operation);
        operation = next;
    }
}

/* An eventfd, or an event channel's descriptor that `ring_woken` reads by itself. */
static void drain(int fd)
{
    uint64_t events;
    STRESS_POINT(EVENT_TAKE);
    while (read(fd, &events, sizeof(events)) < 0 && errno == EINTR)
        continue;
    STRESS_POINT(EVENT_TAKEN);
}

static int look(struct io_thread *thread, uint64_t timeout_ns)
{
    struct engine *engine = engine_of(thread);
    int timeout_ms = timeout_ns > 1000000000 ? (timeout_ns == UINT64_MAX ? -1 : 1000)
                                             : (int)((timeout_ns + 999999) / 1000000);
    engine->turns = 0;
    engine->readable = false;
    if (poll(engine->polls, engine->nr_rings + 1, timeout_ms) < 0)
        return errno == EINTR || errno == EAGAIN ? 0 : errno;
    if (engine->polls[0].revents)
        drain(thread->mail_fd);
    for (unsigned i = 0; i < engine->nr_rings; i++) {
        if (!engine->polls[i + 1].revents)
            continue;
        if (!engine->rings[i]->channel.handle)
            drain(engine->rings[i]->channel.fd);
        ring_woken(engine->rings[i]);
    }
    return 0;
}

static int turn(struct io_thread *thread, uint64_t timeout_ns)
{
    struct engine *engine = engine_of(thread);
    if (!engine->started)
        return look(thread, timeout_ns);
    move_started(thread);
    return ++engine->turns >= TURNS_PER_LOOK ? look(thread, 0) : 0;
}

static bool pending(struct io_thread *thread)
{
    struct engine *engine = engine_of(thread);
    if (engine->started || engine->readable)
        return true;
    if (++engine->turns < TURNS_PER_LOOK)
        return false;
    engine->turns = 0;
    engine->readable = poll(engine->polls, engine->nr_rings + 1, 0) > 0;
    return engine->readable;
}

static void release(struct io_thread *thread, struct ring *ring)
{
    (void)thread;
    (void)ring;
}

const struct engine_calls ENGINE_PREADV = {
    .name = "preadv",
    .open = open_engine,
    .close = close_engine,
    .watch = watch,
    .unwatch = unwatch,
    .start = start_operation,
    .turn = turn,
    .pending = pending,
    .release = release,
};
