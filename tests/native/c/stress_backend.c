/*
 * The stress test's backend: the library, a thread for what Python does elsewhere, and one that looks whether all
 * of them go on; see stress_world.h.
 *
 * The disk lies in units, each in one of two files.  Now and then a unit moves to the other one, as a driver's
 * clusters do: what is known of it is forgotten, transfers that are in flight settle, it is copied, and where it
 * was is spoilt.  Now and then the connection is drained or stopped, and the next one takes over what is owed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "delays.h"
#include "recover.h"
#include "server.h"
#include "stress_world.h"

enum { MOST_AT_A_TIME = 16, MOST_HELD = 1024, TICK_MS = 10, TICKS_OF_HEALTH = 10 };

enum order { NOTHING, DRAIN_IT, STOP_IT, END_IT };

struct journal_memory {
    uint64_t *marks;
    uint32_t *indices;
    uint8_t *copies;
};

struct unit {
    uint8_t home;
    bool moving;
};

struct backend {
    struct world *world;
    xbd_threads *threads;
    xbd_budget *host, *budget;
    xbd_extents *extents;
    xbd_connection *_Atomic connection;
    struct journal_memory journals[MOST_STRESS_RINGS];
    struct unit *units;
    unsigned nr_units, nr_moving;
    struct xbd_event held[MOST_HELD];           /* requests that touch what moves */
    unsigned nr_held;
    struct xbd_answer answers[MOST_AT_A_TIME + MOST_HELD];
    unsigned nr_answers;
    uint64_t dice;

    int orders;                         /* wakes the upcalls' thread for the monitor's sake */
    _Atomic(enum order) order;
    bool draining, stopping, ending;
    atomic_bool ended;
    atomic_bool sleeps;
};

/* -- the disk ------------------------------------------------------------------------------------------ */

static int home_of(const struct backend *backend, uint64_t unit)
{
    return backend->world->homes[backend->units[unit].home];
}

static void move_bytes(int fd, bool write, char *bytes, size_t length, uint64_t position)
{
    ssize_t moved = write ? pwrite(fd, bytes, length, (off_t)position) : pread(fd, bytes, length, (off_t)position);
    CHECK(moved == (ssize_t)length);
}

/* One buffer, which may lie in several units. */
static void move_buffer(struct backend *backend, bool write, char *bytes, size_t length, uint64_t offset)
{
    while (length) {
        size_t part = UNIT - offset % UNIT;
        if (part > length)
            part = length;
        move_bytes(home_of(backend, offset / UNIT), write, bytes, part, offset);
        bytes += part;
        length -= part;
        offset += part;
    }
}

static void discard(struct backend *backend, uint64_t offset, uint64_t length)
{
    static char zeros[SLOT_SECTORS * SECTOR];
    CHECK(length <= sizeof(zeros));
    move_buffer(backend, true, zeros, length, offset);
}

static void put_unit(struct backend *backend, uint64_t unit)
{
    for (unsigned write = 0; write < 2; write++)
        CHECK(xbd_extents_put(backend->extents, write, unit * UNIT, (unit + 1) * UNIT, home_of(backend, unit),
                              unit * UNIT));
}

/* -- requests ------------------------------------------------------------------------------------------ */

static void add_answer(struct backend *backend, uint64_t request, enum xbd_verdict verdict)
{
    backend->answers[backend->nr_answers++] = (struct xbd_answer){.request = request, .verdict = verdict};
}

static void send_answers(struct backend *backend)
{
    if (backend->nr_answers)
        xbd_connection_answer(backend->connection, backend->answers, backend->nr_answers);
    backend->nr_answers = 0;
}

static void carry_out(struct backend *backend, const struct xbd_event *event)
{
    uint64_t offset = event->offset;
    for (unsigned i = 0; i < event->nr_buffers; i++) {
        move_buffer(backend, event->operation != OP_READ, event->buffers[i].start, event->buffers[i].length, offset);
        offset += event->buffers[i].length;
    }
    if (event->operation == OP_DISCARD)
        discard(backend, event->offset, event->length);
    add_answer(backend, event->request, XBD_ANSWER);
}

static bool touches_what_moves(const struct backend *backend, const struct xbd_event *event)
{
    if (!event->length)
        return false;
    for (uint64_t unit = event->offset / UNIT; unit <= (event->offset + event->length - 1) / UNIT; unit++)
        if (backend->units[unit].moving)
            return true;
    return false;
}

static void serve_request(struct backend *backend, const struct xbd_event *event)
{
    if (touches_what_moves(backend, event)) {
        CHECK(backend->nr_held < MOST_HELD);
        backend->held[backend->nr_held++] = *event;
        return;
    }
    if (!event->resolvable || one_in(&backend->dice, 4)) {
        carry_out(backend, event);
        return;
    }
    for (uint64_t unit = event->offset / UNIT; unit <= (event->offset + event->length - 1) / UNIT; unit++)
        put_unit(backend, unit);
    add_answer(backend, event->request, XBD_TRY_AGAIN);
}

static void serve_held(struct backend *backend)
{
    unsigned count = backend->nr_held;
    backend->nr_held = 0;
    for (unsigned i = 0; i < count; i++)
        serve_request(backend, &backend->held[i]);      /* which may be held again, in an earlier place */
}

/* -- moving units -------------------------------------------------------------------------------------- */

static void finish_move(struct backend *backend, uint64_t unit)
{
    char bytes[UNIT];
    struct unit *moved = &backend->units[unit];
    CHECK(moved->moving);
    move_bytes(home_of(backend, unit), false, bytes, UNIT, unit * UNIT);
    move_bytes(backend->world->homes[!moved->home], true, bytes, UNIT, unit * UNIT);
    memset(bytes, POISON, UNIT);
    move_bytes(home_of(backend, unit), true, bytes, UNIT, unit * UNIT);
    moved->home = !moved->home;
    moved->moving = false;
    backend->nr_moving--;
    atomic_fetch_add(&backend->world->tally.moves, 1);
    if (!backend->stopping)
        serve_held(backend);
}

static void begin_move(struct backend *backend)
{
    uint64_t unit = roll_below(&backend->dice, backend->nr_units);
    if (backend->units[unit].moving || backend->stopping)
        return;
    backend->units[unit].moving = true;
    backend->nr_moving++;
    if (xbd_extents_forget(backend->extents, unit * UNIT, UNIT))
        xbd_connection_settle(backend->connection, unit * UNIT, UNIT, unit);
    else
        finish_move(backend, unit);
}

/* -- lives of the connection --------------------------------------------------------------------------- */

static void add_ring(struct backend *backend, unsigned number)
{
    const struct scenario *scenario = &backend->world->scenario;
    const struct abi *abi = &ABIS[scenario->abi];
    struct journal_memory *journal = &backend->journals[number];
    uint8_t *shared = backend->world->memory.writable + (size_t)first_page(scenario, number) * PAGE;
    struct front_ring indices = {.shared = shared};
    uint32_t rsp_prod = atomic_load(front_word(&indices, WORD_RSP_PROD));
    unsigned owed = recover(journal->marks, journal->indices, journal->copies, scenario->entries, abi->entry_size,
                            rsp_prod);
    struct xbd_ring_config config = {
        .ring = shared,
        .entries = scenario->entries,
        .channel = {.fd = backend->world->to_backend[number], .notify_fd = backend->world->to_guest[number]},
        .marks = journal->marks,
        .indices = journal->indices,
        .copies = journal->copies,
        .req_cons = rsp_prod + owed,
        .rsp_prod = rsp_prod,
        .owed = owed,
    };
    CHECK(xbd_connection_add_ring(backend->connection, &config));
}

static struct xbd_limits limits_of(const struct scenario *scenario)
{
    return (struct xbd_limits){
        .size = disk_bytes(scenario),
        .logical_block = SECTOR,
        .max_indirect_segments = 32,
        .flush = true,
        .barrier = true,
        .discard = true,
    };
}

static void begin_life(struct backend *backend)
{
    const struct scenario *scenario = &backend->world->scenario;
    struct xbd_connection_config config = {
        .threads = backend->threads,
        .extents = backend->extents,
        .budget = backend->budget,
        .domain = {.mode = scenario->mode},
        .limits = limits_of(scenario),
        .request_alignment = 1,
        .memory_alignment = 1,
        .abi = scenario->abi,
    };
    guest_memory_describe(&backend->world->memory, &config.domain);
    backend->draining = backend->stopping = false;
    backend->connection = xbd_connection_new(&config);
    CHECK(backend->connection);
    for (unsigned i = 0; i < scenario->rings; i++)
        add_ring(backend, i);
    xbd_connection_start(backend->connection);
    atomic_fetch_add(&backend->world->tally.lives, 1);
}

static void stop(struct backend *backend)
{
    backend->stopping = true;
    backend->nr_held = 0;               /* the next connection gets them from the journal */
    xbd_connection_stop(backend->connection);
}

static void end_life(struct backend *backend)
{
    CHECK(!backend->nr_moving);
    xbd_connection *connection = atomic_exchange(&backend->connection, NULL);
    xbd_connection_free(connection);
}

static void obey(struct backend *backend, enum order order)
{
    struct xbd_limits limits = limits_of(&backend->world->scenario);
    backend->ending |= order == END_IT;
    if (order == NOTHING || backend->draining || backend->stopping)
        return;
    xbd_connection_set_limits(backend->connection, &limits);
    if (order == STOP_IT) {
        stop(backend);
    } else {
        backend->draining = true;
        xbd_connection_drain(backend->connection, 0);
    }
}

/* -- the upcalls' thread ------------------------------------------------------------------------------- */

/* False: the connection's life is over. */
static bool handle(struct backend *backend, const struct xbd_event *event)
{
    switch (event->kind) {
    case XBD_REQUEST:
        atomic_fetch_add(&backend->world->tally.asked, 1);
        if (!backend->stopping)
            serve_request(backend, event);
        return true;
    case XBD_REJECTED:
        return true;
    case XBD_SETTLED:
        finish_move(backend, event->number);
        return true;
    case XBD_DRAINED:
        CHECK(backend->draining && !xbd_connection_in_flight(backend->connection));
        stop(backend);
        return true;
    case XBD_STOPPED:
        return false;
    default:
        fprintf(stderr, "FOUND an event of kind %u, number %lu\n", event->kind, (unsigned long)event->number);
        _exit(1);
    }
}

static void fetch(struct backend *backend)
{
    struct xbd_event events[MOST_AT_A_TIME];
    bool goes_on = true;
    unsigned count;
    do {
        count = xbd_connection_events(backend->connection, events, MOST_AT_A_TIME);
        for (unsigned i = 0; i < count; i++)
            goes_on &= handle(backend, &events[i]);
        if (goes_on && !backend->stopping)
            send_answers(backend);
        backend->nr_answers = 0;
    } while (count == MOST_AT_A_TIME);
    if (!goes_on) {
        end_life(backend);
        if (!backend->ending)
            begin_life(backend);
    }
}

static void read_events(int fd)
{
    uint64_t events;
    delay(UPCALL_READ);
    if (read(fd, &events, sizeof(events)) < 0)
        CHECK(errno == EAGAIN);
    delay(UPCALL_READ);
}

/* Python may be at work already when a request comes up: then its answer meets a thread that is about to sleep.
 * False: it was the connection's last life. */
static bool look_for_a_while(struct backend *backend)
{
    unsigned looks = one_in(&backend->dice, 2) ? roll_below(&backend->dice, 300) : 0;
    while (looks-- && backend->connection)
        fetch(backend);
    return backend->connection;
}

static void *run_upcalls(void *argument)
{
    struct backend *backend = argument;
    begin_life(backend);
    while (look_for_a_while(backend)) {
        struct pollfd fds[] = {
            {.fd = xbd_connection_wake_fd(backend->connection), .events = POLLIN},
            {.fd = backend->orders, .events = POLLIN},
        };
        atomic_store(&backend->sleeps, true);
        delay(UPCALL_SLEEP);
        long began = sleep_began();
        while (poll(fds, 2, -1) < 0)
            CHECK(errno == EINTR);
        sleep_ended(began, &backend->world->tally.upcalls);
        atomic_store(&backend->sleeps, false);
        delay(UPCALL_WOKEN);
        if (fds[1].revents) {
            read_events(fds[1].fd);
            obey(backend, atomic_exchange(&backend->order, NOTHING));
        }
        if (fds[0].revents) {
            read_events(fds[0].fd);
            fetch(backend);
            if (backend->world->scenario.changes && one_in(&backend->dice, 4))
                begin_move(backend);
        }
    }
    atomic_store(&backend->ended, true);
    return NULL;
}

/* -- who sleeps though there is something to do -------------------------------------------------------- */

/* Nobody goes on any more, so what the threads own may be read; ThreadSanitizer can't know that. */
#define AFTER_THE_END __attribute__((no_sanitize("thread")))

AFTER_THE_END static void show_ring(const struct backend *backend, const struct xbd_connection *connection,
                                    unsigned number)
{
    const struct ring_state *state = &backend->world->rings[number];
    struct front_ring indices = {
        .shared = backend->world->memory.writable +
                  (size_t)first_page(&backend->world->scenario, number) * PAGE};
    uint32_t words[4];
    for (unsigned i = 0; i < 4; i++)
        words[i] = atomic_load(front_word(&indices, i));
    fprintf(stderr, "  ring %u shared: req_prod %u, req_event %u, rsp_prod %u, rsp_event %u\n", number,
            words[WORD_REQ_PROD], words[WORD_REQ_EVENT], words[WORD_RSP_PROD], words[WORD_RSP_EVENT]);
    fprintf(stderr, "    guest: rsp_cons %u, asked to be woken at %u, %u in flight, %s\n", state->rsp_cons,
            state->rsp_event, state->in_flight, state->guest_sleeps ? "SLEEPS" : "does not sleep");
    if (!connection)
        return;
    const struct ring *ring = connection->rings[number];
    fprintf(stderr, "    backend: req_cons %u, rsp_prod %u (%u pushed), %u taken, %u in the kernel, %s%s%s%s%s%s%s\n",
            ring->back.req_cons, ring->back.rsp_prod_pvt, ring->back.rsp_prod, ring->in_flight, ring->moving,
            ring->taking ? "taking " : "", ring->stopping ? "stopping " : "", ring->watched ? "watched " : "",
            ring->resting ? "resting " : "", ring->runnable ? "runnable " : "", ring->warm ? "warm " : "",
            ring->backlog.first ? "with a backlog" : "");
}

AFTER_THE_END static void show_threads(const struct backend *backend, const struct xbd_connection *connection)
{
    for (unsigned i = 0; i < backend->threads->count; i++) {
        const struct io_thread *thread = &backend->threads->thread[i];
        fprintf(stderr, "  I/O thread %u: %s, mail %u (commands %s, answers %s), %u in flight\n", i,
                thread->sleeping ? "SLEEPS" : "does not sleep", thread->mail, thread->commands ? "there" : "none",
                thread->answers.first ? "there" : "none", thread->in_flight);
    }
    fprintf(stderr, "  upcalls: %s%s%s, %u units moving, %u requests held\n", backend->sleeps ? "SLEEPS" : "at work",
            backend->draining ? ", draining" : "", backend->stopping ? ", stopping" : "", backend->nr_moving,
            backend->nr_held);
    if (connection)
        fprintf(stderr, "    to fetch: requests %s, notes %s, tickets %s; awake %u\n",
                connection->requests.first ? "there" : "none", connection->notes ? "there" : "none",
                connection->tickets ? "there" : "none", connection->awake);
}

/* What the kernel knows of this process's threads: whether they sleep, and in which system call. */
static void show_tasks(void)
{
    char line[300];
    FILE *tasks = popen("cd /proc/$PPID/task && for task in *; do "
                        "echo \"$task $(cut -d' ' -f3,14,15 $task/stat) $(cut -d' ' -f1-4 $task/syscall)\"; done",
                        "r");
    while (tasks && fgets(line, sizeof(line), tasks))
        fprintf(stderr, "  task, state, user and system time, system call: %s", line);
    if (tasks)
        pclose(tasks);
}

/* In one line, which of them was not woken. */
AFTER_THE_END static const char *blame(const struct backend *backend, const struct xbd_connection *connection,
                                       unsigned number)
{
    const struct ring_state *state = &backend->world->rings[number];
    struct front_ring indices = {
        .shared = backend->world->memory.writable +
                  (size_t)first_page(&backend->world->scenario, number) * PAGE};
    uint32_t rsp_prod = atomic_load(front_word(&indices, WORD_RSP_PROD));
    uint32_t req_prod = atomic_load(front_word(&indices, WORD_REQ_PROD));
    if (!connection)
        return "there is no connection";
    if (state->guest_sleeps && rsp_prod - state->rsp_cons >= state->rsp_event - state->rsp_cons)
        return "the guest sleeps, though rsp_prod has reached rsp_event";
    const struct ring *ring = connection->rings[number];
    const struct io_thread *thread = ring->thread;
    if (thread->sleeping && (thread->commands || thread->answers.first))
        return "the I/O thread sleeps, though its mailbox is not empty";
    if (backend->sleeps && (connection->requests.first || connection->tickets))
        return "the upcalls' thread sleeps, though there is something to fetch";
    if (ring->taking && ring->back.req_cons != req_prod)
        return thread->sleeping ? "the I/O thread sleeps, though req_prod is past req_cons"
                                : "the I/O thread does not look, though req_prod is past req_cons";
    if (thread->sleeping && ring->backlog.first && !ring->under_way)
        return "the I/O thread sleeps, though nothing keeps the ring's backlog";
    if (ring->stopping)
        return "the ring does not come to its stop";
    return "requests are not answered";
}

AFTER_THE_END static _Noreturn void report(struct backend *backend, unsigned number)
{
    const struct xbd_connection *connection = backend->connection;
    fprintf(stderr, "FOUND after %u seconds: %s\n", backend->world->stuck_seconds,
            blame(backend, connection, number));
    for (unsigned i = 0; i < backend->world->scenario.rings; i++)
        if (i == number || backend->world->rings[i].in_flight)
            show_ring(backend, connection, i);
    show_threads(backend, connection);
    show_tasks();
    fflush(stderr);
    _exit(1);
}

/* -- the monitor --------------------------------------------------------------------------------------- */

static void give_order(struct backend *backend, enum order order)
{
    static const uint64_t one = 1;
    atomic_store(&backend->order, order);
    CHECK(write(backend->orders, &one, sizeof(one)) == sizeof(one));
}

struct progress {
    uint64_t answered;
    unsigned ticks;                     /* without any */
};

/* The longest time that a ring with requests has had no answer, in ticks: not in seconds, which also pass while the
 * whole machine does nothing. */
static unsigned longest_standstill(struct backend *backend, struct progress *progress, unsigned *worst)
{
    unsigned longest = 0;
    for (unsigned i = 0; i < backend->world->scenario.rings; i++) {
        const struct ring_state *state = &backend->world->rings[i];
        uint64_t answered = atomic_load(&state->answered);
        bool goes_on = answered != progress[i].answered || !atomic_load(&state->in_flight);
        progress[i].answered = answered;
        progress[i].ticks = goes_on ? 0 : progress[i].ticks + 1;
        if (progress[i].ticks > longest) {
            longest = progress[i].ticks;
            *worst = i;
        }
    }
    return longest;
}

static uint64_t now_ms(void)
{
    return now_ns() / 1000000;
}

static bool is_enough(const struct world *world, uint64_t began_ms)
{
    struct tally *tally = (struct tally *)(uintptr_t)&world->tally;
    return all_sleeps(tally) >= world->wanted_sleeps ||
           (world->seconds && now_ms() - began_ms >= 1000u * world->seconds);
}

/* As long as all goes on, ends lives of the connection; nothing is done that would wake somebody who should have been
 * woken before. */
static void monitor(struct backend *backend)
{
    static struct progress progress[MOST_STRESS_RINGS];
    uint64_t dice = backend->world->seed * 7 + 1;
    uint64_t began_ms = now_ms();
    unsigned most = backend->world->stuck_seconds * 1000 / TICK_MS;
    unsigned until_order = 5;
    unsigned worst = 0;
    while (atomic_load(&backend->world->guests)) {
        sleep_ns(TICK_MS * 1000000L);
        unsigned standstill = longest_standstill(backend, progress, &worst);
        if (standstill > most)
            report(backend, worst);
        if (is_enough(backend->world, began_ms))
            atomic_store(&backend->world->enough, true);
        if (!backend->world->scenario.changes || standstill > TICKS_OF_HEALTH || until_order--)
            continue;
        until_order = roll_below(&dice, 15);
        give_order(backend, one_in(&dice, 2) ? DRAIN_IT : STOP_IT);
    }
}

static void await_the_end(struct backend *backend)
{
    unsigned most = backend->world->stuck_seconds * 1000 / TICK_MS;
    give_order(backend, END_IT);
    for (unsigned ticks = 0; !atomic_load(&backend->ended); ticks++) {
        sleep_ns(TICK_MS * 1000000L);
        if (ticks > most)
            report(backend, 0);
    }
}

/* -- all of it ----------------------------------------------------------------------------------------- */

static void open_backend(struct backend *backend, struct world *world)
{
    const struct scenario *scenario = &world->scenario;
    long pages = scenario->budget ? scenario->budget : 1 << 20;
    *backend = (struct backend){.world = world, .dice = world->seed * 3 + 1};
    guest_memory_map(&world->memory);
    backend->threads = xbd_threads_start(scenario->threads, scenario->spin_us, scenario->engine);
    backend->host = xbd_budget_new(NULL, 1 << 20);
    backend->budget = xbd_budget_new(backend->host, pages);
    backend->extents = xbd_extents_new();
    backend->nr_units = (unsigned)(disk_bytes(scenario) / UNIT);
    backend->units = calloc(backend->nr_units, sizeof(*backend->units));
    backend->orders = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    CHECK(backend->threads && backend->budget && backend->extents && backend->units && backend->orders >= 0);
    for (unsigned i = 0; i < scenario->rings; i++) {
        struct journal_memory *journal = &backend->journals[i];
        journal->marks = calloc(scenario->entries, sizeof(*journal->marks));
        journal->indices = calloc(scenario->entries, sizeof(*journal->indices));
        journal->copies = calloc(scenario->entries, ENTRY_BYTES);
        CHECK(journal->marks && journal->indices && journal->copies);
    }
    for (uint64_t unit = 0; unit < backend->nr_units; unit++)
        put_unit(backend, unit);
}

static void close_backend(struct backend *backend)
{
    const struct scenario *scenario = &backend->world->scenario;
    xbd_threads_stop(backend->threads);
    CHECK(xbd_budget_left(backend->host) == 1 << 20);
    xbd_budget_free(backend->budget);
    xbd_budget_free(backend->host);
    xbd_extents_free(backend->extents);
    for (unsigned i = 0; i < scenario->rings; i++) {
        free(backend->journals[i].marks);
        free(backend->journals[i].indices);
        free(backend->journals[i].copies);
    }
    free(backend->units);
    close(backend->orders);
    guest_memory_unmap(&backend->world->memory);
}

_Noreturn void run_backend(struct world *world)
{
    static struct backend backend;
    pthread_t upcalls;
    delays_seed(world->seed * 2 + 1);
    delays_count_sleeps(&world->tally.io);
    open_backend(&backend, world);
    CHECK(!pthread_create(&upcalls, NULL, run_upcalls, &backend));
    monitor(&backend);
    await_the_end(&backend);
    pthread_join(upcalls, NULL);
    close_backend(&backend);
    exit(0);
}
