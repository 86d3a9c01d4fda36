/*
 * First writes to units of the disk that lie nowhere, but don't read as zeroes: what is around the write is copied.
 *
 * Read what is missing of the units, write all of them to their new places, make that durable, and only then make the
 * entries that name them: so whoever reads, even after a crash, finds the old units or the new ones.  One sync at a
 * time serves all copies of a ring that were written before it began.
 *
 * Requests of the same ring to the same units wait.  Those of other rings copy for themselves, as the driver may do
 * at the same time: who comes second finds an entry, drops his copy, and writes to the place of the first.
 */
#include <stdlib.h>
#include <string.h>

#include "claims.h"
#include "server.h"
#include "stress.h"

enum {
    MOST_MEMORY = 128,              /* buffers in use, of one thread */
    MOST_SPARE = 32,
    LITTLE = 16 << 10,              /* read in vain, rather than by one more read */
    GAPS = 2,
};

enum step { FETCHING, STORING, STORED, SYNCING };

/* A part of the disk that is copied. */
struct gap {
    uint64_t start, end;
    unsigned char *memory;
};

struct copy {
    struct work *work;
    struct copy *next;              /* of the ring's */
    struct queue followers;         /* that wait for its end */
    struct claimed claimed;
    enum step step;
    unsigned left;                  /* operations in flight */
    bool failed;
    struct gap gaps[GAPS];          /* around the write; or one for all of its unit */
    struct operation *operations;   /* of this step, an allocation with their memory's parts */
};

struct copy_memory {
    struct copy_memory *next;
};

/* -- memory -------------------------------------------------------------------------------------------- */

static void *take_memory(struct io_thread *thread)
{
    struct copy_memory *memory = thread->memory;
    if (thread->memory_in_use == MOST_MEMORY)
        return NULL;
    if (memory) {
        thread->memory = memory->next;
        thread->nr_memory--;
    } else if (!(memory = aligned_alloc(PAGE, XBD_LARGEST_COPY))) {
        return NULL;
    }
    thread->memory_in_use++;
    return memory;
}

static void give_memory(struct io_thread *thread, void *given)
{
    struct copy_memory *memory = given;
    thread->memory_in_use--;
    if (thread->nr_memory == MOST_SPARE) {
        free(memory);
        return;
    }
    memory->next = thread->memory;
    thread->memory = memory;
    thread->nr_memory++;
}

void copy_free_memory(struct io_thread *thread)
{
    for (struct copy_memory *memory; (memory = thread->memory);) {
        thread->memory = memory->next;
        free(memory);
    }
}

static void free_copy(struct copy *copy)
{
    for (unsigned i = 0; i < GAPS; i++)
        if (copy->gaps[i].memory)
            give_memory(copy->work->ring->thread, copy->gaps[i].memory);
    free(copy->operations);
    free(copy);
}

/* -- beginning ----------------------------------------------------------------------------------------- */

static uint64_t start_of(const struct copy *copy)
{
    return copy->claimed.first << copy->claimed.shift;
}

static uint64_t end_of(const struct copy *copy)
{
    return (copy->claimed.first + copy->claimed.number) << copy->claimed.shift;
}

static bool add_gap(struct copy *copy, unsigned which, uint64_t start, uint64_t end)
{
    struct gap *gap = &copy->gaps[which];
    if (start == end)
        return true;
    gap->start = start - start % PAGE;
    gap->end = end + (PAGE - 1 - (end + PAGE - 1) % PAGE);
    gap->memory = take_memory(copy->work->ring->thread);
    return gap->memory;
}

/* What is to be copied; false: too much at a time. */
static bool find_gaps(struct copy *copy)
{
    const struct request *request = &copy->work->transfer.request;
    uint64_t start = start_of(copy);
    uint64_t end = end_of(copy);
    uint64_t first = request->offset;
    uint64_t last = first + request->length;
    if (copy->claimed.number == 1 && first > start && last < end && request->length <= LITTLE)
        return add_gap(copy, 0, start, end);
    return add_gap(copy, 0, start, first) && add_gap(copy, 1, last, end);
}

static struct operation *make_operations(unsigned number, size_t parts)
{
    return calloc(1, number * sizeof(struct operation) + parts * sizeof(struct iovec));
}

static void moved(struct operation *operation, int64_t result);

static void start(struct copy *copy, enum operation_kind kind, unsigned number)
{
    struct ring *ring = copy->work->ring;
    copy->left = number;
    for (unsigned i = 0; i < number; i++) {
        struct operation *operation = &copy->operations[i];
        operation->ring = ring;
        operation->kind = kind;
        operation->owner = copy;
        operation->ended = moved;
        ring->thread->engine->start(ring->thread, operation);
    }
}

/* Reads for the gaps; false: nobody knows where that is. */
static bool plan_fetching(struct copy *copy, unsigned *number)
{
    xbd_extents *extents = copy->work->ring->connection->config.extents;
    struct xbd_piece pieces[GAPS][MAX_PIECES];
    unsigned found[GAPS] = {0};
    *number = 0;
    for (unsigned i = 0; i < GAPS; i++) {
        const struct gap *gap = &copy->gaps[i];
        if (!gap->memory)
            continue;
        found[i] = xbd_extents_find(extents, false, gap->start, gap->end - gap->start, pieces[i], MAX_PIECES);
        if (!found[i])
            return false;
        for (unsigned j = 0; j < found[i]; j++)
            *number += pieces[i][j].fd != XBD_ZEROES;
    }
    copy->operations = make_operations(*number, *number);
    if (!copy->operations)
        return false;
    struct operation *operation = copy->operations;
    struct iovec *iov = (struct iovec *)(void *)(copy->operations + *number);
    for (unsigned i = 0; i < GAPS; i++) {
        unsigned char *memory = copy->gaps[i].memory;
        for (unsigned j = 0; j < found[i]; j++) {
            const struct xbd_piece *piece = &pieces[i][j];
            if (piece->fd == XBD_ZEROES) {
                memset(memory, 0, piece->length);
            } else {
                *iov = (struct iovec){.iov_base = memory, .iov_len = piece->length};
                *operation++ = (struct operation){.iov = iov++,
                                                  .nr_iov = 1,
                                                  .fd = piece->fd,
                                                  .position = piece->position,
                                                  .length = piece->length};
            }
            memory += piece->length;
        }
    }
    return true;
}

static void store(struct copy *copy);

static struct copy *copy_of(struct ring *ring, const struct request *request)
{
    struct copy *copy = ring->copies;
    while (copy && (request->offset >= end_of(copy) || request->offset + request->length <= start_of(copy)))
        copy = copy->next;
    return copy;
}

bool copy_begin(struct work *work)
{
    struct ring *ring = work->ring;
    xbd_claims *claims = ring->connection->config.claims;
    const struct request *request = &work->transfer.request;
    if (!claims_copy(claims) || work->transfer.nr_iov > MOST_IOV - GAPS)
        return false;
    struct copy *other = copy_of(ring, request);
    if (other) {
        work->state = WAITING;
        queue_push(&other->followers, work);
        return true;
    }
    struct copy *copy = calloc(1, sizeof(*copy));
    if (!copy)
        return false;
    copy->work = work;
    queue_init(&copy->followers);
    unsigned number = 0;
    if (!claims_reserve(claims, request->offset, request->offset + request->length, &copy->claimed)) {
        free_copy(copy);
        return false;
    }
    uint64_t unit = (uint64_t)1 << copy->claimed.shift;
    if (unit < PAGE || unit > XBD_LARGEST_COPY || end_of(copy) > ring->limits.size || !find_gaps(copy) ||
        !plan_fetching(copy, &number)) {
        claims_return(claims, &copy->claimed);
        free_copy(copy);
        return false;
    }
    work->state = MOVING;
    work->number = ring->thread->next_number++;
    ring->moving++;
    copy->next = ring->copies;
    ring->copies = copy;
    if (number)
        start(copy, READ, number);
    else
        store(copy);
    return true;
}

/* -- ending -------------------------------------------------------------------------------------------- */

static void end(struct copy *copy, bool entered)
{
    struct work *work = copy->work;
    struct ring *ring = work->ring;
    struct queue works = copy->followers;
    bool failed = copy->failed;
    struct copy **at = &ring->copies;
    if (!works.first)
        queue_init(&works);
    while (*at != copy)
        at = &(*at)->next;
    *at = copy->next;
    free_copy(copy);
    work->state = WAITING;
    ring->moving--;
    if (entered || ring->stopping)
        work_finish(work, RSP_OKAY);
    else if (failed)
        work_ask(work);
    else
        queue_push_front(&works, work);     /* somebody was faster, or nothing must be entered now */
    ring_go_on(ring, &works);
    ring_moved(ring);
}

static void spoil(struct copy *copy)
{
    claims_spoil(copy->work->ring->connection->config.claims, &copy->claimed);
    end(copy, false);
}

/* -- making it durable --------------------------------------------------------------------------------- */

static void synced(struct operation *operation, int64_t result);

/* Begins a sync for all that are stored, unless there is one. */
static void sync_stored(struct ring *ring)
{
    int fd = -1;                            /* nothing is stored */
    if (ring->syncing)
        return;
    for (struct copy *copy = ring->copies; copy; copy = copy->next) {
        if (copy->step != STORED)
            continue;
        copy->step = SYNCING;
        fd = copy->claimed.fd;
    }
    if (fd < 0)
        return;
    ring->syncing = true;
    STRESS_POINT(COPY_SYNC);
    ring->sync = (struct operation){.ring = ring, .kind = SYNC, .owner = ring, .ended = synced, .fd = fd};
    ring->thread->engine->start(ring->thread, &ring->sync);
}

static void synced(struct operation *operation, int64_t result)
{
    struct ring *ring = operation->owner;
    struct copy *done[MOST_ENTRIES];
    unsigned number = 0;
    ring->syncing = false;
    for (struct copy *copy = ring->copies; copy; copy = copy->next)
        if (copy->step == SYNCING)
            done[number++] = copy;
    sync_stored(ring);                      /* what has come meanwhile */
    for (unsigned i = 0; i < number; i++) {
        if (result != 0) {
            done[i]->failed = true;
            spoil(done[i]);
        } else {
            end(done[i], claims_enter(ring->connection->config.claims, &done[i]->claimed));
        }
    }
}

/* -- storing ------------------------------------------------------------------------------------------- */

/* All bytes of the units, in order: old ones, the guest's, old ones. */
static unsigned whole_memory(const struct copy *copy, struct iovec *whole)
{
    const struct transfer *transfer = &copy->work->transfer;
    const struct gap *before = &copy->gaps[0];      /* from the first unit's beginning on */
    const struct gap *behind = copy->gaps[1].memory ? &copy->gaps[1] : before;
    uint64_t first = transfer->request.offset;
    uint64_t last = first + transfer->request.length;
    unsigned number = 0;
    if (first > start_of(copy))
        whole[number++] = (struct iovec){.iov_base = before->memory, .iov_len = first - start_of(copy)};
    memcpy(whole + number, transfer->iov, transfer->nr_iov * sizeof(*whole));
    number += transfer->nr_iov;
    if (last < end_of(copy))
        whole[number++] = (struct iovec){
            .iov_base = behind->memory + (last - behind->start), .iov_len = end_of(copy) - last};
    return number;
}

/* The next places that follow each other; how many. */
static unsigned run_of(const struct claimed *claimed, unsigned first)
{
    unsigned number = 1;
    while (first + number < claimed->number &&
           claimed->places[first + number] == claimed->places[first] + ((uint64_t)number << claimed->shift))
        number++;
    return number;
}

static bool plan_storing(struct copy *copy, unsigned *number)
{
    const struct claimed *claimed = &copy->claimed;
    struct iovec whole[MOST_IOV];
    unsigned parts = whole_memory(copy, whole);
    free(copy->operations);
    copy->operations = make_operations(claimed->number, parts + claimed->number);
    if (!copy->operations)
        return false;
    const struct iovec *from = whole;
    struct iovec *iov = (struct iovec *)(void *)(copy->operations + claimed->number);
    size_t used = 0;
    *number = 0;
    for (unsigned done = 0, run; done < claimed->number; done += run) {
        run = run_of(claimed, done);
        struct operation *operation = &copy->operations[(*number)++];
        uint64_t length = (uint64_t)run << claimed->shift;
        *operation = (struct operation){
            .iov = iov, .fd = claimed->fd, .position = claimed->places[done], .length = length};
        operation->nr_iov = cut_memory(iov, &from, &used, length);
        iov += operation->nr_iov;
    }
    return true;
}

static void store(struct copy *copy)
{
    unsigned number;
    copy->step = STORING;
    if (plan_storing(copy, &number)) {
        start(copy, WRITE, number);
        return;
    }
    copy->failed = true;
    spoil(copy);
}

static void moved(struct operation *operation, int64_t result)
{
    struct copy *copy = operation->owner;
    struct ring *ring = copy->work->ring;
    if (result < 0 || (uint64_t)result != operation->length)
        copy->failed = true;
    if (--copy->left)
        return;
    if (copy->failed || ring->stopping) {
        spoil(copy);
    } else if (copy->step == FETCHING) {
        store(copy);
    } else {
        copy->step = STORED;
        sync_stored(ring);
    }
}
