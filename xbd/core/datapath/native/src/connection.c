/*
 * What Python calls, and what it fetches: the functions of api.h on connections.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "server.h"
#include "stress.h"

/* -- from the threads to Python ------------------------------------------------------------------------ */

/* With the lock held: whether Python has to be woken. */
static bool awaken(struct xbd_connection *connection)
{
    bool asleep = !connection->awake;
    connection->awake = true;
    return asleep;
}

static void wake(struct xbd_connection *connection, bool needed)
{
    static const uint64_t one = 1;
    if (!needed)
        return;
    STRESS_POINT(LIST_WAKE);
    while (write(connection->wake_fd, &one, sizeof(one)) < 0 && errno == EINTR)
        continue;
}

void connection_ask(struct xbd_connection *connection, struct queue *works)
{
    STRESS_POINT(LIST_PUT);
    pthread_mutex_lock(&connection->lock);
    *connection->requests.last = works->first;
    connection->requests.last = works->last;
    bool needed = awaken(connection);
    pthread_mutex_unlock(&connection->lock);
    wake(connection, needed);
    queue_init(works);
}

void connection_note(struct ring *ring, enum xbd_event_kind kind, uint64_t number, const uint8_t *entry)
{
    struct xbd_connection *connection = ring->connection;
    struct note *note = malloc(sizeof(*note));
    bool needed = false;
    if (note) {
        note->next = NULL;
        note->event = (struct xbd_event){.kind = kind, .ring = ring->number, .number = number};
        memcpy(note->event.entry, entry, ring->back.abi->entry_size);
    }
    pthread_mutex_lock(&connection->lock);
    if (note && connection->nr_notes < MOST_NOTES) {
        *connection->last_note = note;
        connection->last_note = &note->next;
        connection->nr_notes++;
        needed = awaken(connection);
        note = NULL;
    } else {
        connection->suppressed++;
    }
    pthread_mutex_unlock(&connection->lock);
    free(note);
    wake(connection, needed);
}

/* A list of them, or none. */
static void append_tickets(struct xbd_connection *connection, struct ticket *first, struct ticket **last)
{
    if (!first)
        return;
    *connection->last_ticket = first;
    connection->last_ticket = last;
}

void connection_tell(struct ticket *ticket)
{
    struct xbd_connection *connection = ticket->connection;
    int wake_fd = connection->wake_fd;
    static const uint64_t one = 1;
    ticket->next = NULL;
    STRESS_POINT(LIST_PUT);
    pthread_mutex_lock(&connection->lock);
    if (ticket->event.kind == XBD_STOPPED) {
        connection->gone = true;
        append_tickets(connection, connection->late, connection->last_late);
    }
    append_tickets(connection, ticket, &ticket->next);
    connection->awake = true;
    STRESS_POINT(LIST_WAKE);
    /* Within the lock: who fetches it may free the connection. */
    while (write(wake_fd, &one, sizeof(one)) < 0 && errno == EINTR)
        continue;
    pthread_mutex_unlock(&connection->lock);
}

void connection_forget(struct ring *ring)
{
    struct xbd_connection *connection = ring->connection;
    struct queue kept;
    queue_init(&kept);
    pthread_mutex_lock(&connection->lock);
    for (struct work *work; (work = queue_pop(&connection->requests));)
        if (work->ring != ring)
            queue_push(&kept, work);
    if (kept.first)
        connection->requests = kept;
    pthread_mutex_unlock(&connection->lock);
}

/* -- making one ---------------------------------------------------------------------------------------- */

xbd_connection *xbd_connection_new(const struct xbd_connection_config *config)
{
    xbd_connection *connection = calloc(1, sizeof(*connection));
    if (!connection)
        return NULL;
    connection->config = *config;
    connection->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (connection->wake_fd < 0) {
        free(connection);
        return NULL;
    }
    pthread_mutex_init(&connection->lock, NULL);
    queue_init(&connection->requests);
    connection->last_note = &connection->notes;
    connection->last_ticket = &connection->tickets;
    connection->last_late = &connection->late;
    return connection;
}

static void free_ring(struct ring *ring)
{
    if (ring->pages)
        pages_close(ring->pages);
    journal_close(&ring->journal);
    free(ring->open);
    free(ring);
}

/* What of it does not need the connection. */
static bool open_ring(struct ring *ring, const struct xbd_connection_config *to,
                      const struct xbd_ring_config *config)
{
    const struct abi *abi = &ABIS[to->abi];
    ring_attach(&ring->back, config->ring, abi, config->entries, config->req_cons, config->rsp_prod);
    ring->open = calloc(config->entries, sizeof(struct work *));
    ring->pages = pages_open(&to->domain, to->budget, config->entries, to->limits.max_indirect_segments);
    return ring->open && ring->pages &&
           journal_open(&ring->journal, config->marks, config->indices, config->copies, config->entries,
                        abi->entry_size, config->owed);
}

bool xbd_connection_add_ring(xbd_connection *connection, const struct xbd_ring_config *config)
{
    if (connection->nr_rings == MOST_QUEUES || config->entries > MOST_ENTRIES || config->owed > config->entries) {
        errno = EINVAL;
        return false;
    }
    struct ring *ring = calloc(1, sizeof(*ring));
    if (!ring)
        return false;
    if (!open_ring(ring, &connection->config, config)) {
        free_ring(ring);
        errno = ENOMEM;
        return false;
    }
    ring->connection = connection;
    ring->channel = config->channel;
    ring->limits = connection->config.limits;
    hint_init(&ring->hints[0], connection->config.extents, false);
    hint_init(&ring->hints[1], connection->config.extents, true);
    ring->number = connection->nr_rings;
    ring->owed = config->owed;
    ring->trouble = (struct ticket){.connection = connection, .owned = true};
    queue_init(&ring->backlog);
    queue_init(&ring->done);
    connection->rings[connection->nr_rings++] = ring;
    return true;
}

void xbd_connection_free(xbd_connection *connection)
{
    for (unsigned i = 0; i < connection->nr_rings; i++)
        free_ring(connection->rings[i]);
    for (struct note *next; connection->notes; connection->notes = next) {
        next = connection->notes->next;
        free(connection->notes);
    }
    for (struct ticket *next; connection->tickets; connection->tickets = next) {
        next = connection->tickets->next;
        if (!connection->tickets->owned)
            free(connection->tickets);
    }
    /* Whoever told the last of them may still be about to let go of the lock. */
    pthread_mutex_lock(&connection->lock);
    pthread_mutex_unlock(&connection->lock);
    pthread_mutex_destroy(&connection->lock);
    close(connection->wake_fd);
    free(connection);
}

/* -- commands ------------------------------------------------------------------------------------------ */

/* The kernel of it all can't do without these few bytes. */
static void *allocate(size_t bytes)
{
    void *memory = calloc(1, bytes);
    if (!memory)
        abort();
    return memory;
}

static struct command *command(struct ring *ring, enum command_kind kind)
{
    struct command *made = allocate(sizeof(*made));
    made->kind = kind;
    made->ring = ring;
    return made;
}

void connection_tell_few(struct xbd_connection *connection)
{
    struct ticket *ticket = calloc(1, sizeof(*ticket));
    if (!ticket)
        return;                         /* it will be asked for places when there are none */
    ticket->connection = connection;
    ticket->event.kind = XBD_FEW_PLACES;
    connection_tell(ticket);
}

/* What is asked of a connection that is being stopped has come true when XBD_STOPPED is told. */
static void tell_when_gone(xbd_connection *connection, struct ticket *ticket)
{
    pthread_mutex_lock(&connection->lock);
    bool gone = connection->gone;
    if (!gone) {
        *connection->last_late = ticket;
        connection->last_late = &ticket->next;
    }
    pthread_mutex_unlock(&connection->lock);
    if (gone)
        connection_tell(ticket);
}

static void post(xbd_connection *connection, enum command_kind kind, const struct command *details,
                 enum xbd_event_kind then, uint64_t number)
{
    struct ticket *ticket = allocate(sizeof(*ticket));
    ticket->connection = connection;
    ticket->event = (struct xbd_event){.kind = then, .number = number};
    if (!connection->nr_rings || !connection->started) {
        connection_tell(ticket);
        return;
    }
    if (connection->stopped && kind != STOP_RING) {
        tell_when_gone(connection, ticket);
        return;
    }
    atomic_store(&ticket->left, connection->nr_rings);
    for (unsigned i = 0, rings = connection->nr_rings; i < rings; i++) {
        struct command *made = command(connection->rings[i], kind);
        if (details) {
            made->offset = details->offset;
            made->length = details->length;
        }
        made->ticket = ticket;
        thread_post(connection->rings[i]->thread, made);
    }
}

void xbd_connection_start(xbd_connection *connection)
{
    connection->started = true;
    for (unsigned i = 0; i < connection->nr_rings; i++) {
        struct ring *ring = connection->rings[i];
        ring->taking = !connection->config.paused;
        ring->thread = threads_pick(connection->config.threads);
        atomic_fetch_add(&ring->thread->nr_rings, 1);
        thread_post(ring->thread, command(ring, ADD_RING));
    }
}

void xbd_connection_set_limits(xbd_connection *connection, const struct xbd_limits *limits)
{
    if (connection->stopped)
        return;                         /* the rings may be gone before they would read it */
    connection->config.limits = *limits;
    /* Before anybody can tell the guest: what it sends then is judged by these limits. */
    unsigned generation = atomic_load(&connection->generation) + connection->started;
    atomic_store(&connection->generation, generation);
    for (unsigned i = 0; i < connection->nr_rings; i++) {
        struct ring *ring = connection->rings[i];
        if (!connection->started) {
            ring->limits = *limits;
            continue;
        }
        struct command *made = command(ring, SET_LIMITS);
        made->limits = *limits;
        made->generation = generation;
        thread_post(ring->thread, made);
    }
}

/* A ring that was told to stop may be gone at any time. */
static void tell_rings(xbd_connection *connection, enum command_kind kind)
{
    for (unsigned i = 0; connection->started && !connection->stopped && i < connection->nr_rings; i++)
        thread_post(connection->rings[i]->thread, command(connection->rings[i], kind));
}

void xbd_connection_hold(xbd_connection *connection)
{
    tell_rings(connection, HOLD);
}

void xbd_connection_drain(xbd_connection *connection, uint64_t ticket)
{
    post(connection, DRAIN, NULL, XBD_DRAINED, ticket);
}

void xbd_connection_resume(xbd_connection *connection)
{
    connection->config.paused = false;
    tell_rings(connection, RESUME);
}

void xbd_connection_settle(xbd_connection *connection, uint64_t offset, uint64_t length, uint64_t ticket)
{
    struct command details = {.offset = offset, .length = length};
    if (details.length > UINT64_MAX - offset)
        details.length = UINT64_MAX - offset;
    post(connection, SETTLE, &details, XBD_SETTLED, ticket);
}

void xbd_connection_stop(xbd_connection *connection)
{
    connection->stopped = true;
    post(connection, STOP_RING, NULL, XBD_STOPPED, 0);
}

/* -- what Python fetches, and its answers -------------------------------------------------------------- */

int xbd_connection_wake_fd(const xbd_connection *connection)
{
    return connection->wake_fd;
}

static void describe(const struct work *work, struct xbd_event *event)
{
    const struct transfer *transfer = &work->transfer;
    bool has_data = transfer->request.kind == TRANSFER;
    *event = (struct xbd_event){
        .kind = XBD_REQUEST,
        .ring = work->ring->number,
        .request = (uint64_t)(uintptr_t)work,
        .operation = transfer->request.operation,
        .resolvable = has_data && !work->asked,
        .offset = transfer->request.offset,
        .length = transfer->request.kind == FLUSH ? 0 : transfer->request.length,
        .buffers = has_data ? (const struct xbd_buffer *)(const void *)transfer->iov : NULL,
        .nr_buffers = has_data ? transfer->nr_iov : 0,
        .read_only = has_data && pages_are_read_only(work->ring->pages, transfer),
    };
}

static unsigned fetch_requests(xbd_connection *connection, struct xbd_event *events, unsigned most)
{
    unsigned count = 0;
    while (count < most && connection->requests.first)
        describe(queue_pop(&connection->requests), &events[count++]);
    return count;
}

static unsigned fetch_notes(xbd_connection *connection, struct xbd_event *events, unsigned most)
{
    unsigned count = 0;
    for (struct note *note; count < most && (note = connection->notes);) {
        connection->notes = note->next;
        if (!connection->notes)
            connection->last_note = &connection->notes;
        connection->nr_notes--;
        events[count] = note->event;
        if (note->event.kind == XBD_REJECTED && !connection->notes) {
            events[count].number = connection->suppressed;
            connection->suppressed = 0;
        }
        count++;
        free(note);
    }
    return count;
}

static unsigned fetch_tickets(xbd_connection *connection, struct xbd_event *events, unsigned most)
{
    unsigned count = 0;
    for (struct ticket *ticket; count < most && (ticket = connection->tickets);) {
        connection->tickets = ticket->next;
        if (!connection->tickets)
            connection->last_ticket = &connection->tickets;
        events[count++] = ticket->event;
        if (!ticket->owned)
            free(ticket);
    }
    return count;
}

unsigned xbd_connection_events(xbd_connection *connection, struct xbd_event *events, unsigned most)
{
    STRESS_POINT(LIST_FETCH);
    pthread_mutex_lock(&connection->lock);
    unsigned count = fetch_requests(connection, events, most);
    count += fetch_notes(connection, events + count, most - count);
    count += fetch_tickets(connection, events + count, most - count);
    STRESS_POINT(LIST_FETCHED);
    if (count < most)
        connection->awake = false;
    pthread_mutex_unlock(&connection->lock);
    return count;
}

void xbd_connection_answer(xbd_connection *connection, const struct xbd_answer *answers, unsigned count)
{
    if (connection->stopped)
        return;
    for (unsigned i = 0; i < count;) {
        struct io_thread *thread = ((struct work *)(uintptr_t)answers[i].request)->ring->thread;
        struct queue works;
        queue_init(&works);
        /* Neighbours for the same thread go together. */
        for (; i < count; i++) {
            struct work *work = (struct work *)(uintptr_t)answers[i].request;
            if (work->ring->thread != thread)
                break;
            work->verdict = answers[i].verdict;
            if (work->verdict == XBD_ANSWER)
                work->transfer.status = answers[i].status;
            queue_push(&works, work);
        }
        thread_answer(thread, &works);
    }
}

unsigned xbd_connection_in_flight(const xbd_connection *connection)
{
    unsigned total = 0;
    for (unsigned i = 0; i < connection->nr_rings; i++)
        total += atomic_load_explicit(&connection->rings[i]->in_flight, memory_order_relaxed);
    return total;
}

void xbd_connection_counters(const xbd_connection *connection, struct xbd_counters *counters)
{
    uint64_t totals[sizeof(*counters) / sizeof(uint64_t)] = {0};
    for (unsigned i = 0; i < connection->nr_rings; i++)
        for (unsigned j = 0; j < sizeof(totals) / sizeof(totals[0]); j++)
            totals[j] += atomic_load_explicit(&connection->rings[i]->counters[j], memory_order_relaxed);
    memcpy(counters, totals, sizeof(*counters));
}
