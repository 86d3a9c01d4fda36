#define _GNU_SOURCE
#include "load.h"

#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <time.h>

#include "pattern.h"
#include "util.h"

enum { REAP_AT_ONCE = 256, HUNG_MILLISECONDS = 30000 };

/* What is known of a block's content. */
enum { UNWRITTEN, SUBMITTED, WRITTEN };

struct operation {
    uint64_t started_ns;
    uint64_t block;
    uint32_t parts_left;
    uint32_t oldest; /* the generation that a read must at least return */
    bool write, failed;
};

struct load {
    const struct load_options *options;
    struct transport *transport;
    struct memory *memory;
    struct load_result *result;
    uint32_t pages; /* per operation */
    uint32_t parts; /* requests per operation */
    uint64_t blocks;
    uint64_t next_block; /* sequential only */
    uint64_t random;
    uint32_t *page; /* `pages` numbers for each operation */
    struct operation *operation;
    uint8_t *state; /* of each block; NULL if nothing is written */
    uint32_t in_flight;
    bool counting, stopping;
    uint64_t counting_from_ns, ends_at_ns;
};

static double cpu_seconds(clockid_t clock) {
    struct timespec time;
    if (clock_gettime(clock, &time) < 0)
        die_errno("a watched process has gone");
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static double watched_cpu_seconds(const struct load_options *options) {
    double sum = 0;
    for (unsigned i = 0; i < options->watched_count; i++) {
        clockid_t clock;
        int error = clock_getcpuclockid(options->watched[i], &clock);
        if (error)
            die("no process %d to watch", (int)options->watched[i]);
        sum += cpu_seconds(clock);
    }
    return sum;
}

static uint64_t choose_block(struct load *load) {
    if (!load->options->sequential)
        return random_below(&load->random, load->blocks);
    uint64_t block = load->next_block;
    load->next_block = block + 1 == load->blocks ? 0 : block + 1;
    return block;
}

/* Stages the requests of one operation; its block and direction are set. */
static void stage(struct load *load, uint32_t index) {
    struct operation *operation = &load->operation[index];
    const uint32_t *page = load->page + (uint64_t)index * load->pages;
    uint64_t offset = operation->block * load->options->block;
    if (operation->write)
        for (uint32_t i = 0; i < load->pages; i++)
            pattern_stamp(memory_at(load->memory, page[i]), offset + (uint64_t)i * PAGE_SIZE,
                          load->options->generation);
    operation->parts_left = load->parts;
    operation->failed = false;
    for (uint32_t part = 0, from = 0; part < load->parts; part++) {
        uint32_t to = (uint32_t)((uint64_t)load->pages * (part + 1) / load->parts);
        struct request request = {
            .tag = index * load->parts + part,
            .write = operation->write,
            .offset = offset + (uint64_t)from * PAGE_SIZE,
            .page = page + from,
            .pages = to - from,
        };
        load->transport->submit(load->transport, &request);
        from = to;
    }
    load->in_flight++;
}

static void start(struct load *load, uint32_t index, uint64_t now) {
    const struct load_options *options = load->options;
    struct operation *operation = &load->operation[index];
    operation->block = choose_block(load);
    operation->started_ns = now;
    operation->write = options->write_percent > 0 &&
                       random_below(&load->random, 100) < options->write_percent;
    if (operation->write && load->state[operation->block] == UNWRITTEN)
        load->state[operation->block] = SUBMITTED;
    bool sure = load->state && load->state[operation->block] == WRITTEN;
    operation->oldest = sure ? options->generation : 0;
    stage(load, index);
}

static bool holds_the_right_data(struct load *load, uint32_t index, bool full) {
    const struct operation *operation = &load->operation[index];
    const uint32_t *page = load->page + (uint64_t)index * load->pages;
    uint64_t offset = operation->block * load->options->block;
    for (uint32_t i = 0; i < load->pages; i++)
        if (!pattern_matches(memory_at(load->memory, page[i]), offset + (uint64_t)i * PAGE_SIZE,
                             operation->oldest, load->options->generation, full))
            return false;
    return true;
}

static void begin_counting(struct load *load, uint64_t now) {
    struct load_result *result = load->result;
    load->counting = true;
    load->counting_from_ns = now;
    load->ends_at_ns = load->options->seconds > 0
                           ? now + (uint64_t)(load->options->seconds * 1e9)
                           : UINT64_MAX;
    result->requests = load->transport->requests;
    result->kicks = load->transport->kicks;
    result->wakeups = 0;
    result->guest_cpu_seconds = cpu_seconds(CLOCK_PROCESS_CPUTIME_ID);
    result->watched_cpu_seconds = watched_cpu_seconds(load->options);
}

static void end_counting(struct load *load, uint64_t now) {
    struct load_result *result = load->result;
    result->guest_cpu_seconds = cpu_seconds(CLOCK_PROCESS_CPUTIME_ID) - result->guest_cpu_seconds;
    result->watched_cpu_seconds = watched_cpu_seconds(load->options) - result->watched_cpu_seconds;
    result->requests = load->transport->requests - result->requests;
    result->kicks = load->transport->kicks - result->kicks;
    result->seconds = (double)(now - load->counting_from_ns) / 1e9;
    load->counting = false;
    load->stopping = true;
}

static void end_operation(struct load *load, uint32_t index, uint64_t now) {
    struct operation *operation = &load->operation[index];
    struct load_result *result = load->result;
    load->in_flight--;
    if (operation->failed)
        result->errors++; /* counted at any time: one error spoils the run */
    else if (operation->write)
        load->state[operation->block] = WRITTEN;
    else if (load->options->verify != VERIFY_NOT &&
             !holds_the_right_data(load, index, load->options->verify == VERIFY_FULL))
        result->mismatches++;
    if (load->counting) {
        result->operations++;
        histogram_add(&result->latency, now - operation->started_ns);
        if (load->options->operations && result->operations == load->options->operations)
            end_counting(load, now);
    }
    if (!load->stopping)
        start(load, index, now);
}

static void wait_for_event(struct load *load) {
    struct pollfd poll_fd = {.fd = load->transport->wake_fd, .events = POLLIN};
    int ready = poll(&poll_fd, 1, HUNG_MILLISECONDS);
    if (ready < 0 && errno != EINTR)
        die_errno("poll");
    if (ready == 0)
        die("the backend has not answered %u operations for %d seconds", load->in_flight,
            HUNG_MILLISECONDS / 1000);
    eventfd_t count;
    if (eventfd_read(load->transport->wake_fd, &count) < 0 && errno != EAGAIN)
        die_errno("eventfd");
    load->result->wakeups++;
}

/* One round: collect what is there, start anew what ended, or wait. */
static void turn(struct load *load, void (*ended)(struct load *, uint32_t, uint64_t)) {
    struct completion done[REAP_AT_ONCE];
    unsigned count = load->transport->reap(load->transport, done, REAP_AT_ONCE);
    if (!count) {
        if (!load->transport->arm(load->transport))
            wait_for_event(load);
        return;
    }
    uint64_t now = now_ns();
    for (unsigned i = 0; i < count; i++) {
        uint32_t index = done[i].tag / load->parts;
        struct operation *operation = &load->operation[index];
        operation->failed |= !done[i].ok;
        if (--operation->parts_left == 0)
            ended(load, index, now);
    }
    load->transport->kick(load->transport);
}

static void run_timed(struct load *load) {
    uint64_t now = now_ns();
    uint64_t warm_at_ns = now + (uint64_t)(load->options->warmup_seconds * 1e9);
    bool warm = false;
    for (uint32_t i = 0; i < load->options->depth; i++)
        start(load, i, now);
    load->transport->kick(load->transport);
    while (load->in_flight) {
        turn(load, end_operation);
        if (load->stopping)
            continue;
        now = now_ns();
        if (!warm && now >= warm_at_ns) {
            warm = true;
            begin_counting(load, now);
        } else if (load->counting && now >= load->ends_at_ns) {
            end_counting(load, now);
        }
    }
}

static bool start_check(struct load *load, uint32_t index) {
    while (load->next_block < load->blocks && load->state[load->next_block] != WRITTEN)
        load->next_block++;
    if (load->next_block == load->blocks ||
        load->result->checked_back == load->options->check_back)
        return false;
    load->result->checked_back++;
    struct operation *operation = &load->operation[index];
    operation->block = load->next_block++;
    operation->write = false;
    operation->oldest = load->options->generation;
    stage(load, index);
    return true;
}

static void end_check(struct load *load, uint32_t index, uint64_t now) {
    (void)now;
    load->in_flight--;
    if (load->operation[index].failed)
        load->result->errors++;
    else if (!holds_the_right_data(load, index, true))
        load->result->mismatches++;
    start_check(load, index);
}

/* Reads blocks whose writes were answered, which must now hold what was written. */
static void check_back(struct load *load) {
    load->next_block = 0;
    for (uint32_t i = 0; i < load->options->depth; i++)
        if (!start_check(load, i))
            break;
    load->transport->kick(load->transport);
    while (load->in_flight)
        turn(load, end_check);
}

void load_run(const struct load_options *options, struct transport *transport,
              struct memory *memory, struct load_result *result) {
    uint64_t span = options->span && options->span < transport->size ? options->span
                                                                     : transport->size;
    struct load load = {
        .options = options,
        .transport = transport,
        .memory = memory,
        .result = result,
        .pages = options->block / PAGE_SIZE,
        .blocks = span / options->block,
        .random = options->seed * 0x9E3779B97F4A7C15u | 1,
    };
    if (!load.blocks)
        die("the disk of %llu bytes is smaller than one block",
            (unsigned long long)transport->size);
    if (options->write_percent && transport->read_only)
        die("the disk is read-only");
    struct demand demand = {.depth = options->depth, .pages = load.pages};
    load.parts = parts_of(&demand, transport->max_pages);
    load.page = allocate((size_t)options->depth * load.pages, sizeof *load.page);
    memory_take_scattered(memory, load.page, options->depth * load.pages);
    for (uint32_t i = 0; i < options->depth * load.pages; i++)
        pattern_body(memory_at(memory, load.page[i]));
    load.operation = allocate(options->depth, sizeof *load.operation);
    if (options->write_percent)
        load.state = allocate(load.blocks, sizeof *load.state);
    run_timed(&load);
    if (load.state && options->check_back)
        check_back(&load);
}
