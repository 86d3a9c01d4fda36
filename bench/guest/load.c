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
    uint32_t parts_unsent, parts_left;
    uint32_t oldest; /* the generation that a read must at least return */
    bool write, failed, wrong;
};

/* A request in flight; its tag is its index. */
struct part {
    uint32_t operation;
    uint32_t from, pages; /* which of the operation's */
};

struct load {
    const struct load_options *options;
    struct transport *transport;
    struct memory *memory;
    struct load_result *result;
    uint32_t pages; /* per operation */
    uint32_t parts; /* requests per operation */
    uint32_t part_pages; /* of the largest part */
    uint64_t blocks;
    uint64_t next_block; /* sequential only */
    uint64_t next_touch; /* of the blocks that come first; `blocks` or more: they are done */
    uint64_t random;
    struct operation *operation;
    uint32_t *waiting; /* operations with parts that no slot was free for: a queue */
    uint32_t waiting_first, waiting_count;
    struct part *part;
    uint32_t *page; /* `part_pages` numbers for each part */
    uint32_t *free_tag; /* a stack */
    uint32_t free_tags;
    uint8_t *state; /* of each block; NULL if nothing is written */
    uint32_t in_flight; /* operations */
    bool counting, stopping;
    enum verify verify;
    uint64_t counting_from_ns, ends_at_ns;
    uint64_t idle_from_ns; /* since when it looks in vain; 0: it does not */
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
    if (load->next_touch < load->blocks) {
        uint64_t block = load->next_touch;
        load->next_touch += load->options->touch / load->options->block;
        return block;
    }
    if (!load->options->sequential)
        return random_below(&load->random, load->blocks);
    uint64_t block = load->next_block;
    load->next_block = block + 1 == load->blocks ? 0 : block + 1;
    return block;
}

static uint64_t offset_of(const struct load *load, const struct part *part) {
    return load->operation[part->operation].block * load->options->block +
           (uint64_t)part->from * PAGE_SIZE;
}

static void send_part(struct load *load, uint32_t index) {
    struct operation *operation = &load->operation[index];
    uint32_t tag = load->free_tag[--load->free_tags];
    uint32_t number = load->parts - operation->parts_unsent--;
    uint32_t from = (uint32_t)((uint64_t)load->pages * number / load->parts);
    uint32_t to = (uint32_t)((uint64_t)load->pages * (number + 1) / load->parts);
    struct part *part = &load->part[tag];
    *part = (struct part){index, from, to - from};
    struct request request = {
        .tag = tag,
        .write = operation->write,
        .offset = offset_of(load, part),
        .page = load->page + (uint64_t)tag * load->part_pages,
        .pages = part->pages,
    };
    if (operation->write)
        for (uint32_t i = 0; i < request.pages; i++)
            pattern_stamp(memory_at(load->memory, request.page[i]),
                          request.offset + (uint64_t)i * PAGE_SIZE, load->options->generation);
    load->transport->submit(load->transport, &request);
}

/* Sends what waits, as long as the transport has slots for it. */
static void send_waiting(struct load *load) {
    while (load->waiting_count && load->free_tags) {
        uint32_t index = load->waiting[load->waiting_first];
        send_part(load, index);
        if (load->operation[index].parts_unsent)
            continue;
        load->waiting_first = (load->waiting_first + 1) % load->options->depth;
        load->waiting_count--;
    }
    load->transport->kick(load->transport);
}

/* Puts an operation in the queue; its block and direction are set. */
static void stage(struct load *load, uint32_t index) {
    struct operation *operation = &load->operation[index];
    operation->parts_unsent = operation->parts_left = load->parts;
    operation->failed = operation->wrong = false;
    load->waiting[(load->waiting_first + load->waiting_count++) % load->options->depth] = index;
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

static bool holds_the_right_data(const struct load *load, uint32_t tag) {
    const struct part *part = &load->part[tag];
    uint32_t oldest = load->operation[part->operation].oldest;
    const uint32_t *page = load->page + (uint64_t)tag * load->part_pages;
    uint64_t offset = offset_of(load, part);
    for (uint32_t i = 0; i < part->pages; i++)
        if (!pattern_matches(memory_at(load->memory, page[i]), offset + (uint64_t)i * PAGE_SIZE,
                             oldest, load->options->generation, load->verify == VERIFY_FULL))
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

static void account(struct load *load, const struct operation *operation) {
    load->in_flight--;
    /* At any time, counted or not: one error spoils the run. */
    load->result->errors += operation->failed;
    load->result->mismatches += operation->wrong;
}

static void end_operation(struct load *load, uint32_t index, uint64_t now) {
    struct operation *operation = &load->operation[index];
    struct load_result *result = load->result;
    account(load, operation);
    if (operation->write && !operation->failed)
        load->state[operation->block] = WRITTEN;
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

/* Whether to look once more instead of going to sleep. */
static bool spins(struct load *load) {
    if (!load->options->spin_ns)
        return false;
    uint64_t now = now_ns();
    if (!load->idle_from_ns)
        load->idle_from_ns = now;
    return now - load->idle_from_ns < load->options->spin_ns;
}

/* One round: collect what is there, start anew what ended, or wait. */
static void turn(struct load *load, void (*ended)(struct load *, uint32_t, uint64_t)) {
    struct completion done[REAP_AT_ONCE];
    unsigned count = load->transport->reap(load->transport, done, REAP_AT_ONCE);
    if (!count) {
        if (!spins(load) && !load->transport->arm(load->transport))
            wait_for_event(load);
        return;
    }
    load->idle_from_ns = 0;
    uint64_t now = now_ns();
    for (unsigned i = 0; i < count; i++) {
        uint32_t tag = done[i].tag, index = load->part[tag].operation;
        struct operation *operation = &load->operation[index];
        if (!done[i].ok)
            operation->failed = true;
        else if (!operation->write && load->verify != VERIFY_NOT)
            operation->wrong |= !holds_the_right_data(load, tag);
        load->free_tag[load->free_tags++] = tag;
        if (--operation->parts_left == 0)
            ended(load, index, now);
    }
    send_waiting(load);
}

static void run_timed(struct load *load) {
    uint64_t now = now_ns();
    uint64_t warm_at_ns = now + (uint64_t)(load->options->warmup_seconds * 1e9);
    bool warm = false;
    for (uint32_t i = 0; i < load->options->depth; i++)
        start(load, i, now);
    send_waiting(load);
    while (load->in_flight) {
        turn(load, end_operation);
        if (load->stopping)
            continue;
        now = now_ns();
        if (load->next_touch < load->blocks)
            warm_at_ns = now + (uint64_t)(load->options->warmup_seconds * 1e9);
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
    account(load, &load->operation[index]);
    start_check(load, index);
}

/* Reads blocks whose writes were answered, which must now hold what was written. */
static void check_back(struct load *load) {
    load->next_block = 0;
    load->verify = VERIFY_FULL;
    for (uint32_t i = 0; i < load->options->depth; i++)
        if (!start_check(load, i))
            break;
    send_waiting(load);
    while (load->in_flight)
        turn(load, end_check);
}

static void make_parts(struct load *load) {
    struct demand demand = {.depth = load->options->depth, .pages = load->pages};
    uint32_t slots = load->transport->slots;
    load->parts = parts_of(&demand, load->transport->max_pages);
    load->part_pages = (load->pages + load->parts - 1) / load->parts;
    load->part = allocate(slots, sizeof *load->part);
    load->page = allocate((size_t)slots * load->part_pages, sizeof *load->page);
    memory_take_scattered(load->memory, load->page, slots * load->part_pages);
    for (uint32_t i = 0; i < slots * load->part_pages; i++)
        pattern_body(memory_at(load->memory, load->page[i]));
    load->free_tag = allocate(slots, sizeof *load->free_tag);
    for (uint32_t i = 0; i < slots; i++)
        load->free_tag[i] = slots - 1 - i;
    load->free_tags = slots;
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
        .verify = options->verify,
        .random = options->seed * 0x9E3779B97F4A7C15u | 1,
    };
    if (!options->touch)
        load.next_touch = load.blocks;
    if (!load.blocks)
        die("the disk of %llu bytes is smaller than one block",
            (unsigned long long)transport->size);
    if (options->write_percent && transport->read_only)
        die("the disk is read-only");
    make_parts(&load);
    load.operation = allocate(options->depth, sizeof *load.operation);
    load.waiting = allocate(options->depth, sizeof *load.waiting);
    if (options->write_percent)
        load.state = allocate(load.blocks, sizeof *load.state);
    run_timed(&load);
    if (load.state && options->check_back)
        check_back(&load);
}
