/*
 * One ring: requests in, answers out; the C twin of datapath/ring_server.py.
 *
 * Per wake-up the whole batch is copied from the ring, journalled, decoded and set off.  What extents cover is
 * moved by the engine; the rest goes up to Python.  What has ended is answered once per turn of the thread,
 * with one push and one decision about an event.  Answers leave in any order, each exactly once.
 *
 * Order.  Requests have none, but for these (blkif.h): a WRITE_BARRIER waits for everything before it, and holds
 * back everything after it until it is answered; what a flush or a barrier means for the disk is done in Python.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "claims.h"
#include "server.h"
#include "stress.h"

enum {
    SPURIOUS_EVENTS = 16,           /* wake-ups in a row without work before the ring has to rest */
    MOST_REST_MS = 20,
};

enum counter { RD_REQ, WR_REQ, F_REQ, DS_REQ, RD_BYTES, WR_BYTES, ERRORS, UPCALLS, NR_COUNTERS };

static void advance(struct ring *ring);
static void try_drain(struct ring *ring);
static void try_stop(struct ring *ring);

static void count(struct ring *ring, enum counter counter, uint64_t more)
{
    /* One thread writes: no read-modify-write that is locked. */
    uint64_t value = atomic_load_explicit(&ring->counters[counter], memory_order_relaxed);
    atomic_store_explicit(&ring->counters[counter], value + more, memory_order_relaxed);
}

static void set_in_flight(struct ring *ring, unsigned number)
{
    atomic_store_explicit(&ring->in_flight, number, memory_order_relaxed);
}

static unsigned in_flight(struct ring *ring)
{
    return atomic_load_explicit(&ring->in_flight, memory_order_relaxed);
}

static bool is_barrier(const struct request *request)
{
    return request->operation == OP_WRITE_BARRIER && (request->kind == TRANSFER || request->kind == FLUSH);
}

/* -- the event channel --------------------------------------------------------------------------------- */

static void notify(struct ring *ring)
{
    const struct xbd_channel *channel = &ring->channel;
    STRESS_POINT(EVENT_SEND);
    if (channel->handle) {
        ((int (*)(void *, uint32_t))channel->notify)(channel->handle, channel->port);
        return;
    }
    static const uint64_t one = 1;
    /* Full is fine: then an event is pending there in any case. */
    while (write(channel->notify_fd, &one, sizeof(one)) < 0 && errno == EINTR)
        continue;
}

/* Xen masks a port that was seen, until it is unmasked. */
static void see_event(struct ring *ring)
{
    const struct xbd_channel *channel = &ring->channel;
    STRESS_POINT(EVENT_TAKE);
    if (channel->handle && ((int (*)(void *))channel->pending)(channel->handle) >= 0)
        ring->masked = true;
}

/* An eventfd that nobody reads wakes whoever begins to watch it. */
static void drop_events(struct ring *ring)
{
    uint64_t events;
    STRESS_POINT(EVENT_TAKE);
    while (read(ring->channel.fd, &events, sizeof(events)) < 0 && errno == EINTR)
        continue;
    STRESS_POINT(EVENT_TAKEN);
}

static void unmask(struct ring *ring)
{
    const struct xbd_channel *channel = &ring->channel;
    if (ring->masked) {
        STRESS_POINT(EVENT_TAKEN);
        ring->masked = false;
        ((int (*)(void *, uint32_t))channel->unmask)(channel->handle, channel->port);
    }
}

static void watch(struct ring *ring)
{
    if (ring->thread->engine->watch(ring->thread, ring))
        ring->watched = true;
    else
        ring_broken(ring, ENOMEM);
}

void ring_woken(struct ring *ring)
{
    see_event(ring);
    ring->woken = true;
    thread_make_runnable(ring->thread, ring);
}

void ring_unwatched(struct ring *ring)
{
    ring->watched = false;
    if (ring->stopping) {
        try_stop(ring);
    } else if (!ring->resting) {        /* the kernel may end a watch by itself */
        watch(ring);
        thread_make_runnable(ring->thread, ring);
    }
}

/* A guest that rings without asking for anything must not keep the thread busy. */
static void rest(struct ring *ring)
{
    unsigned ms = ring->idle - SPURIOUS_EVENTS;
    ring->rest_until_ns = now_ns() + 1000000 * (uint64_t)(ms < MOST_REST_MS ? ms : MOST_REST_MS);
    if (!ring->resting) {
        ring->resting = true;
        ring->next_resting = ring->thread->resting;
        ring->thread->resting = ring;
    }
    if (ring->watched && ring->thread->engine->unwatch(ring->thread, ring))
        ring->watched = false;
}

bool ring_rested(struct ring *ring)
{
    if (ring->watched)
        return false;
    ring->resting = false;
    if (!ring->stopping) {
        if (!ring->channel.handle)
            drop_events(ring);
        watch(ring);
        thread_make_runnable(ring->thread, ring);
    }
    return true;
}

/* -- trouble ------------------------------------------------------------------------------------------- */

static void give_up(struct ring *ring, enum xbd_event_kind kind, uint64_t number)
{
    ring->taking = false;
    ring->held = true;
    if (ring->troubled)
        return;
    ring->troubled = true;
    ring->trouble.event.kind = kind;
    ring->trouble.event.ring = ring->number;
    ring->trouble.event.number = number;
    connection_tell(&ring->trouble);
}

void ring_broken(struct ring *ring, int error)
{
    give_up(ring, XBD_BROKEN, (uint64_t)error);
}

static void corrupt(struct ring *ring)
{
    give_up(ring, XBD_CORRUPT, ring_claimed(&ring->back));
}

static const uint8_t *entry_of(const struct work *work)
{
    const struct journal *journal = &work->ring->journal;
    return journal->copies + (size_t)work->slot * journal->entry_size;
}

/* -- requests in --------------------------------------------------------------------------------------- */

static void take_in(struct ring *ring, struct work *work, unsigned slot)
{
    struct request *request = &work->transfer.request;
    work->ring = ring;
    work->slot = slot;
    work->state = WAITING;
    ring->open[slot] = work;
    decode(ring->back.abi, &ring->limits, entry_of(work), request, work->segments);
    if (request->kind == REJECTED)
        connection_note(ring, XBD_REJECTED, 0, entry_of(work));
    queue_push(&ring->backlog, work);
}

/* What an earlier backend left. */
static void take_over(struct ring *ring)
{
    for (unsigned slot = 0; slot < ring->owed; slot++) {
        struct work *work = work_get(ring->thread);
        if (!work) {
            ring_broken(ring, ENOMEM);
            return;
        }
        take_in(ring, work, slot);
        set_in_flight(ring, slot + 1);
    }
}

bool ring_serve(struct ring *ring)
{
    int waiting = ring->taking ? ring_waiting(&ring->back) : 0;
    unsigned before = in_flight(ring);
    int taken = 0;
    if (waiting < 0)
        corrupt(ring);
    if (waiting > 0 && atomic_load(&ring->connection->generation) != ring->generation) {
        thread_make_runnable(ring->thread, ring);       /* new limits are on their way here */
        return false;
    }
    for (; taken < waiting; taken++) {
        struct work *work = work_get(ring->thread);
        if (!work) {
            ring_broken(ring, ENOMEM);
            break;
        }
        uint32_t index = ring->back.req_cons;
        ring_take(&ring->back, journal_next(&ring->journal));
        take_in(ring, work, journal_record(&ring->journal, index));
    }
    if (taken)
        set_in_flight(ring, before + (unsigned)taken);
    if (waiting > 0)
        ring->idle = 0;
    else if (ring->woken)
        ring->tired = ++ring->idle > SPURIOUS_EVENTS;
    ring->woken = false;
    if (ring->backlog.first)
        advance(ring);
    return waiting > 0;
}

bool ring_quiet(struct ring *ring)
{
    if (ring->taking) {
        int waiting = ring_final_check(&ring->back);
        if (waiting > 0)
            return true;
        if (waiting < 0)
            corrupt(ring);
    }
    if (ring->tired && !ring->stopping)
        rest(ring);
    else
        unmask(ring);
    ring->tired = false;
    return false;
}

bool ring_beckons(const struct ring *ring)
{
    return ring->taking && ring_waiting(&ring->back) != 0;
}

/* -- setting off --------------------------------------------------------------------------------------- */

void work_finish(struct work *work, int status)
{
    struct ring *ring = work->ring;
    if (status != RSP_OKAY)
        work->transfer.status = (int16_t)status;
    work->state = DONE;
    queue_push(&ring->done, work);
    if (!ring->answering)
        thread_make_answering(ring->thread, ring);
}

static void ask(struct work *work, struct queue *up)
{
    work->state = UPCALLED;
    queue_push(up, work);
}

static void refuse(struct work *work, enum xbd_event_kind why, int error)
{
    connection_note(work->ring, why, (uint64_t)(int64_t)error, entry_of(work));
    if (is_barrier(&work->transfer.request))
        work->ring->barrier = false;
    work->transfer.request.kind = REJECTED;
    work_finish(work, RSP_ERROR);
}

static void expand_indirect(struct ring *ring, struct work *work)
{
    struct request *request = &work->transfer.request;
    uint8_t table[MAX_INDIRECT_PAGES * SEGMENTS_PER_INDIRECT_PAGE * 8];
    int error = 0;
    if (!work_reserve(work, request->nr_segments)) {
        request->kind = REJECTED;
        request->status = RSP_ERROR;
        connection_note(ring, XBD_NO_PAGES, ENOMEM, entry_of(work));
    } else if (!pages_read_indirect(ring->pages, request, table, &error)) {
        request->kind = REJECTED;
        request->status = RSP_ERROR;
        connection_note(ring, XBD_NO_PAGES, (uint64_t)(int64_t)error, entry_of(work));
    } else {
        expand(&ring->limits, request, table, work->segments);
        if (request->kind == REJECTED)
            connection_note(ring, XBD_REJECTED, 0, entry_of(work));
    }
}

/* Whether the engine and the host take the transfer as it is. */
static bool fits(const struct work *work)
{
    const struct xbd_connection_config *config = &work->ring->connection->config;
    const struct request *request = &work->transfer.request;
    if (work->transfer.nr_iov > MOST_IOV)
        return false;
    if (config->request_alignment > 1 && (request->offset | request->length) % config->request_alignment)
        return false;
    if (config->memory_alignment <= SECTOR)
        return true;
    for (unsigned i = 0; i < work->transfer.nr_iov; i++) {
        const struct iovec *iov = &work->transfer.iov[i];
        if (((uintptr_t)iov->iov_base | iov->iov_len) & (config->memory_alignment - 1))
            return false;
    }
    return true;
}

static void work_moved(struct operation *operation, int64_t result);

static void start(struct work *work, struct operation *operations, unsigned number)
{
    struct ring *ring = work->ring;
    bool write = work->transfer.request.operation != OP_READ;
    work->state = MOVING;
    work->moved = true;
    work->operations = number;
    work->number = ring->thread->next_number++;
    ring->moving++;
    for (unsigned i = 0; i < number; i++) {
        operations[i].ring = ring;
        operations[i].kind = write ? WRITE : READ;
        operations[i].owner = work;
        operations[i].ended = work_moved;
        ring->thread->engine->start(ring->thread, &operations[i]);
    }
}

static void start_whole(struct work *work, const struct xbd_piece *piece)
{
    struct operation *operation = &work->operation;
    operation->iov = work->transfer.iov;
    operation->nr_iov = work->transfer.nr_iov;
    operation->fd = piece->fd;
    operation->position = piece->position;
    operation->length = piece->length;
    start(work, operation, 1);
}

unsigned cut_memory(struct iovec *to, const struct iovec **from, size_t *used, uint64_t length)
{
    unsigned number = 0;
    while (length) {
        size_t part = (*from)->iov_len - *used;
        if (part > length)
            part = (size_t)length;
        to[number++] = (struct iovec){.iov_base = (char *)(*from)->iov_base + *used, .iov_len = part};
        length -= part;
        *used += part;
        if (*used == (*from)->iov_len) {
            (*from)++;
            *used = 0;
        }
    }
    return number;
}

static void free_pieces(struct work *work)
{
    if (work->pieces)
        free(work->pieces);
    work->pieces = NULL;
}

static void clear_memory(const struct iovec *iov, unsigned number)
{
    for (unsigned i = 0; i < number; i++)
        memset(iov[i].iov_base, 0, iov[i].iov_len);
}

/* A transfer in several places: its memory is cut where they end.  False: out of memory. */
static bool start_split(struct work *work, const struct xbd_piece *pieces, unsigned number)
{
    const struct iovec *from = work->transfer.iov;
    size_t most_iov = (size_t)work->transfer.nr_iov + number;
    struct operation *operations = malloc(number * sizeof(*operations) + most_iov * sizeof(struct iovec));
    if (!operations)
        return false;
    struct iovec *to = (struct iovec *)(void *)(operations + number);
    size_t used = 0;                    /* of the part of memory that is being cut */
    unsigned count = 0;
    for (unsigned i = 0; i < number; i++) {
        unsigned nr_iov = cut_memory(to, &from, &used, pieces[i].length);
        if (pieces[i].fd == XBD_ZEROES)
            clear_memory(to, nr_iov);
        else
            operations[count++] = (struct operation){.iov = to,
                                                     .nr_iov = nr_iov,
                                                     .fd = pieces[i].fd,
                                                     .position = pieces[i].position,
                                                     .length = pieces[i].length};
        to += nr_iov;
    }
    work->pieces = operations;
    if (count) {
        start(work, operations, count);
    } else {
        free_pieces(work);
        work_finish(work, RSP_OKAY);
    }
    return true;
}

static unsigned look_up(struct ring *ring, bool write, const struct request *request, struct xbd_piece *pieces)
{
    return hint_find(&ring->hints[write], ring->connection->config.extents, write, request->offset, request->length,
                     pieces, MAX_PIECES);
}

/* A first write.  True: it is on its way, or waits. */
static bool claim(struct work *work, struct xbd_piece *pieces, unsigned *number)
{
    struct ring *ring = work->ring;
    const struct request *request = &work->transfer.request;
    xbd_claims *claims = ring->connection->config.claims;
    bool begun = false;
    if (xbd_claims_take(claims, request->offset, request->length))
        *number = look_up(ring, true, request, pieces);
    else
        begun = copy_begin(work);
    if (claims_run_low(claims))
        connection_tell_few(ring->connection);
    return begun;
}

/* A transfer that has its pages, and the data if it is a write. */
static void set_off(struct work *work, struct queue *up)
{
    const struct request *request = &work->transfer.request;
    bool write = request->operation == OP_WRITE;
    struct hint *hint = &work->ring->hints[write];
    struct xbd_piece pieces[MAX_PIECES];
    unsigned number = 0;
    if (request->operation > OP_WRITE || !fits(work)) {
        work->asked = true;             /* Python has to move it, wherever it lies */
    } else if (hint_has(hint, request->offset, request->length, pieces)) {
        number = 1;
    } else {
        number = look_up(work->ring, write, request, pieces);
        if (hint->changing)
            work->asked = false;        /* nothing was learnt from looking: it is worth asking again */
        else if (!number && write && claim(work, pieces, &number))
            return;
    }
    if (number == 1 && pieces->fd != XBD_ZEROES)
        start_whole(work, pieces);
    else if (number == 0 || !start_split(work, pieces, number))
        ask(work, up);
}

/* The next requests that go together; barriers alone. */
static unsigned gather(struct ring *ring, struct work **batch, struct queue *up)
{
    unsigned number = 0;
    unsigned segments = 0;
    while (ring->backlog.first && !ring->barrier && number < MOST_ENTRIES) {
        struct work *work = ring->backlog.first;
        struct request *request = &work->transfer.request;
        if (segments >= TURN_SEGMENTS) {
            thread_make_runnable(ring->thread, ring);
            break;
        }
        if (request->kind == INDIRECT)
            expand_indirect(ring, work);
        if (is_barrier(request)) {
            if (ring->under_way)
                break;
            ring->barrier = true;
        }
        queue_pop(&ring->backlog);
        ring->under_way++;
        if (request->kind == REJECTED) {
            work_finish(work, request->status);
        } else if (request->kind == TRANSFER) {
            batch[number++] = work;
            segments += request->nr_segments;
        } else {
            ask(work, up);
        }
    }
    return number;
}

/* Gives the batch its pages; how many have them.  Those for which there is no room now wait again. */
static unsigned attach(struct ring *ring, struct work **batch, unsigned number)
{
    struct transfer *transfers[MOST_ENTRIES];
    unsigned attached = 0;
    if (!number)
        return 0;
    for (unsigned i = 0; i < number; i++)
        transfers[i] = &batch[i]->transfer;
    pages_prepare(ring->pages, transfers, number);
    for (unsigned i = 0; i < number; i++) {
        struct work *work = batch[i];
        int error = 0;
        work->transfer.status = RSP_OKAY;
        enum attached how = pages_attach(ring->pages, &work->transfer, &error);
        if (how == NO_ROOM) {
            for (unsigned back = number; back-- > i;) {
                ring->under_way--;
                if (is_barrier(&batch[back]->transfer.request))
                    ring->barrier = false;
                queue_push_front(&ring->backlog, batch[back]);
            }
            break;
        }
        if (how == REFUSED) {
            refuse(work, XBD_NO_PAGES, error);
            continue;
        }
        work->attached = true;
        transfers[attached] = &work->transfer;
        batch[attached++] = work;
    }
    pages_fetch(ring->pages, transfers, attached);
    return attached;
}

/* Sets off waiting requests, as far as they can go now. */
static void advance(struct ring *ring)
{
    struct work *batch[MOST_ENTRIES];
    struct queue up;
    if (ring->stopping || ring->held)
        return;
    queue_init(&up);
    unsigned number = attach(ring, batch, gather(ring, batch, &up));
    for (unsigned i = 0; i < number; i++) {
        if (batch[i]->transfer.status == RSP_OKAY)
            set_off(batch[i], &up);
        else
            work_finish(batch[i], batch[i]->transfer.status);
    }
    if (up.first)
        connection_ask(ring->connection, &up);
}

/* -- answers out --------------------------------------------------------------------------------------- */

static void count_answer(uint64_t totals[NR_COUNTERS], const struct work *work)
{
    const struct request *request = &work->transfer.request;
    if (request->kind == TRANSFER) {
        bool read = request->operation == OP_READ;
        totals[read ? RD_REQ : WR_REQ]++;
        totals[read ? RD_BYTES : WR_BYTES] += request->length;
    } else if (request->kind != REJECTED) {
        totals[request->kind == FLUSH ? F_REQ : DS_REQ]++;
    }
    totals[ERRORS] += work->transfer.status != RSP_OKAY;
}

/* Delivers what was read, and gives the pages back. */
static void release_pages(struct ring *ring, struct work *works)
{
    struct transfer *transfers[MOST_ENTRIES];
    unsigned attached = 0;
    for (struct work *work = works; work; work = work->next) {
        if (work->attached)
            transfers[attached++] = &work->transfer;
        work->attached = false;
    }
    if (attached)
        pages_finish(ring->pages, transfers, attached);
}

static void forget(struct ring *ring, struct work *work)
{
    ring->open[work->slot] = NULL;
    work_put(ring->thread, work);
}

void ring_answer_done(struct ring *ring)
{
    struct work *works = ring->done.first;
    unsigned number = 0;
    uint64_t totals[NR_COUNTERS] = {0};
    if (ring->stopping)
        return;                         /* whoever comes next will do it again */
    queue_init(&ring->done);
    release_pages(ring, works);
    for (struct work *work = works; work; work = work->next) {
        const struct request *request = &work->transfer.request;
        journal_answering(&ring->journal, work->slot, ring->back.rsp_prod_pvt);
        ring_answer(&ring->back, request->id, request->operation, work->transfer.status);
        count_answer(totals, work);
        number++;
    }
    for (unsigned i = 0; i < NR_COUNTERS; i++)
        if (totals[i])
            count(ring, i, totals[i]);
    ring->under_way -= number;
    set_in_flight(ring, in_flight(ring) - number);
    if (ring_push(&ring->back))
        notify(ring);
    for (struct work *next; works; works = next) {
        next = works->next;
        journal_clear(&ring->journal, works->slot);
        if (is_barrier(&works->transfer.request))
            ring->barrier = false;
        forget(ring, works);
    }
    if (ring->backlog.first)
        advance(ring);
    try_drain(ring);
}

/* -- what the engine and Python say -------------------------------------------------------------------- */

static bool touches(const struct work *work, const struct command *settle)
{
    const struct request *request = &work->transfer.request;
    return work->state == MOVING && work->number < settle->horizon &&
           request->offset < settle->offset + settle->length && settle->offset < request->offset + request->length;
}

static bool settled(const struct ring *ring, const struct command *settle)
{
    for (unsigned slot = 0; slot < ring->back.entries && ring->moving; slot++)
        if (ring->open[slot] && touches(ring->open[slot], settle))
            return false;
    return true;
}

static void complete(struct command *command)
{
    struct ticket *ticket = command->ticket;
    free(command);
    STRESS_POINT(TICKET_DONE);
    if (atomic_fetch_sub_explicit(&ticket->left, 1, memory_order_acq_rel) == 1)
        connection_tell(ticket);
}

static void complete_all(struct command **list)
{
    for (struct command *command; (command = *list);) {
        *list = command->next;
        complete(command);
    }
}

static void look_for_settled(struct ring *ring)
{
    for (struct command **at = &ring->settling; *at;) {
        struct command *settle = *at;
        if (settled(ring, settle)) {
            *at = settle->next;
            /* Its driver may close a file now, and open another that gets its number. */
            ring->thread->engine->release(ring->thread, ring);
            complete(settle);
        } else {
            at = &settle->next;
        }
    }
}

static void work_moved(struct operation *operation, int64_t result)
{
    struct work *work = operation->owner;
    struct ring *ring = work->ring;
    if (result < 0 || (uint64_t)result != operation->length)
        work->moved = false;
    if (--work->operations)
        return;
    free_pieces(work);
    ring->moving--;
    if (work->moved || ring->stopping) {
        work_finish(work, RSP_OKAY);
    } else {
        work_ask(work);
    }
    ring_moved(ring);
}

void work_ask(struct work *work)
{
    struct queue up;
    queue_init(&up);
    work->asked = true;
    ask(work, &up);
    connection_ask(work->ring->connection, &up);
}

void ring_moved(struct ring *ring)
{
    if (ring->settling)
        look_for_settled(ring);
    if (ring->stopping)
        try_stop(ring);
}

void ring_go_on(struct ring *ring, struct queue *works)
{
    struct queue up;
    if (ring->stopping || ring->held)
        return;                         /* nothing is set off any more */
    queue_init(&up);
    for (struct work *work; (work = queue_pop(works));)
        set_off(work, &up);
    if (up.first)
        connection_ask(ring->connection, &up);
}

void ring_verdict(struct work *work)
{
    struct ring *ring = work->ring;
    if (ring->stopping)
        return;
    if (work->verdict == XBD_ANSWER) {
        count(ring, UPCALLS, 1);
        work_finish(work, work->transfer.status);
        return;
    }
    if (ring->held)
        return;
    struct queue up;
    queue_init(&up);
    work->asked = true;
    set_off(work, &up);
    if (up.first)
        connection_ask(ring->connection, &up);
}

/* -- commands ------------------------------------------------------------------------------------------ */

static void try_drain(struct ring *ring)
{
    if (!in_flight(ring))
        complete_all(&ring->draining);
}

/* The last that happens to a ring in its thread, when the kernel knows it no more. */
static void try_stop(struct ring *ring)
{
    struct command *command = ring->stop;
    struct queue left;
    if (!command || ring->moving || ring->watched)
        return;
    ring->stop = NULL;
    queue_init(&left);
    for (unsigned slot = 0; slot < ring->back.entries; slot++) {
        if (!ring->open[slot])
            continue;
        ring->open[slot]->transfer.status = RSP_ERROR;      /* nobody knows what was read: deliver nothing */
        queue_push(&left, ring->open[slot]);
    }
    release_pages(ring, left.first);
    for (struct work *work; (work = queue_pop(&left));)
        forget(ring, work);
    queue_init(&ring->backlog);
    queue_init(&ring->done);
    look_for_settled(ring);
    complete_all(&ring->draining);
    ring->thread->engine->release(ring->thread, ring);
    thread_remove(ring->thread, ring);
    complete(command);
}

static void add(struct ring *ring)
{
    thread_add(ring->thread, ring);
    take_over(ring);
    watch(ring);
    notify(ring);                       /* events may have been lost before we were here */
    thread_make_runnable(ring->thread, ring);
}

void ring_command(struct ring *ring, struct command *command)
{
    switch (command->kind) {
    case ADD_RING:
        add(ring);
        free(command);
        break;
    case SET_LIMITS:
        ring->limits = command->limits;
        ring->generation = command->generation;
        free(command);
        break;
    case DRAIN:
        ring->taking = false;
        command->next = ring->draining;
        ring->draining = command;
        try_drain(ring);
        break;
    case HOLD:
        ring->taking = false;
        ring->held = true;
        free(command);
        break;
    case RESUME:
        ring->taking = !ring->held && !ring->stopping;
        thread_make_runnable(ring->thread, ring);
        free(command);
        break;
    case SETTLE:
        command->horizon = ring->thread->next_number;
        command->next = ring->settling;
        ring->settling = command;
        look_for_settled(ring);
        break;
    case STOP_RING:
        ring->taking = false;
        if (ring->done.first)
            ring_answer_done(ring);
        ring->stopping = true;
        ring->stop = command;
        connection_forget(ring);
        if (ring->watched && ring->thread->engine->unwatch(ring->thread, ring))
            ring->watched = false;
        try_stop(ring);
        break;
    }
}
