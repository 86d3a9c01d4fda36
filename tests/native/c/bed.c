/*
 * A test's bed; see bed.h.
 */
#define _GNU_SOURCE
#include "bed.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "recover.h"

enum {
    PLENTY = 1 << 20,
    PERIOD = 65521,                 /* a prime: what is at another sector differs */
};

double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

void moment(void)
{
    static const struct timespec some = {.tv_nsec = 30000000};
    nanosleep(&some, NULL);
}

/* -- opening ------------------------------------------------------------------------------------------- */

static void complete_setup(struct bed_setup *setup)
{
    setup->threads = setup->threads ? setup->threads : 1;
    setup->rings = setup->rings ? setup->rings : 1;
    setup->entries = setup->entries ? setup->entries : 32;
    setup->pages = setup->pages ? setup->pages : 1024;
    setup->budget = setup->budget ? setup->budget : PLENTY;
    setup->size = setup->size ? setup->size : 4 << 20;
    if (!setup->limits.logical_block)
        setup->limits = (struct xbd_limits){
            .logical_block = SECTOR, .max_indirect_segments = 256, .flush = true, .barrier = true, .discard = true};
    setup->limits.size = setup->size;
    setup->request_alignment = setup->request_alignment ? setup->request_alignment : 1;
    setup->memory_alignment = setup->memory_alignment ? setup->memory_alignment : 1;
}

static void open_ring(struct bed *bed, struct bed_ring *ring)
{
    const struct abi *abi = &ABIS[bed->setup.abi];
    uint32_t entries = bed->setup.entries;
    ring->page = bed->next_page;
    bed->next_page += ring_pages(entries);
    front_init(&ring->front, bed_page(bed, ring->page), abi, entries);
    ring->to_backend = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    ring->to_guest = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    CHECK(ring->to_backend >= 0 && ring->to_guest >= 0);
    if (bed->setup.xen)
        fake_evtchn_open(&ring->evtchn, ring->page + 1, ring->to_guest);
    ring->marks = calloc(entries, sizeof(*ring->marks));
    ring->indices = calloc(entries, sizeof(*ring->indices));
    ring->copies = calloc(entries, abi->entry_size);
    CHECK(ring->marks && ring->indices && ring->copies);
}

static void close_ring(struct bed *bed, struct bed_ring *ring)
{
    if (bed->setup.xen)
        fake_evtchn_close(&ring->evtchn);
    close(ring->to_backend);
    close(ring->to_guest);
    free(ring->marks);
    free(ring->indices);
    free(ring->copies);
}

bool bed_open(struct bed *bed, const struct bed_setup *setup)
{
    memset(bed, 0, sizeof(*bed));
    bed->setup = *setup;
    complete_setup(&bed->setup);
    bed->threads = xbd_threads_start(bed->setup.threads, bed->setup.spin_us, bed->setup.engine);
    if (!bed->threads)
        return false;
    guest_memory_make(&bed->memory, bed->setup.pages + bed->setup.rings * ring_pages(bed->setup.entries));
    guest_memory_map(&bed->memory);
    bed->gnttab.memory = &bed->memory;
    for (unsigned i = 0; i < BED_FILES; i++) {
        bed->files[i] = memfd_create("disk", MFD_CLOEXEC);
        CHECK(bed->files[i] >= 0 && !ftruncate(bed->files[i], (off_t)bed->setup.size));
    }
    for (unsigned i = 0; i < bed->setup.rings; i++)
        open_ring(bed, &bed->rings[i]);
    bed->host = xbd_budget_new(NULL, PLENTY);
    bed->budget = xbd_budget_new(bed->host, bed->setup.budget);
    bed->extents = xbd_extents_new();
    CHECK(bed->host && bed->budget && bed->extents);
    bed->claims = xbd_claims_new(bed->extents);
    CHECK(bed->claims);
    bed_connect(bed);
    return true;
}

void bed_close(struct bed *bed)
{
    if (bed->connection)
        bed_stop(bed);
    xbd_threads_stop(bed->threads);
    CHECK(xbd_budget_left(bed->budget) == bed->setup.budget && xbd_budget_left(bed->host) == PLENTY);
    CHECK(!atomic_load(&bed->gnttab.mapped));
    xbd_claims_free(bed->claims);
    xbd_extents_free(bed->extents);
    xbd_budget_free(bed->budget);
    xbd_budget_free(bed->host);
    for (unsigned i = 0; i < bed->setup.rings; i++)
        close_ring(bed, &bed->rings[i]);
    for (unsigned i = 0; i < BED_FILES; i++)
        close(bed->files[i]);
    guest_memory_unmap(&bed->memory);
    guest_memory_free(&bed->memory);
}

/* -- connecting ---------------------------------------------------------------------------------------- */

static void add_ring(struct bed *bed, struct bed_ring *ring)
{
    uint32_t rsp_prod = atomic_load(front_word(&ring->front, WORD_RSP_PROD));
    unsigned owed = recover(ring->marks, ring->indices, ring->copies, bed->setup.entries,
                            ring->front.abi->entry_size, rsp_prod);
    struct xbd_ring_config config = {
        .ring = bed_page(bed, ring->page),
        .entries = bed->setup.entries,
        .channel = {.fd = ring->to_backend, .notify_fd = ring->to_guest},
        .marks = ring->marks,
        .indices = ring->indices,
        .copies = ring->copies,
        .req_cons = rsp_prod + owed,
        .rsp_prod = rsp_prod,
        .owed = owed,
    };
    if (bed->setup.xen)
        fake_evtchn_describe(&ring->evtchn, &config.channel);
    CHECK(xbd_connection_add_ring(bed->connection, &config));
}

void bed_connect(struct bed *bed)
{
    struct xbd_connection_config config = {
        .threads = bed->threads,
        .extents = bed->extents,
        .claims = bed->claims,
        .budget = bed->budget,
        .domain = {.domid = 7, .mode = bed->setup.mode},
        .limits = bed->setup.limits,
        .request_alignment = bed->setup.request_alignment,
        .memory_alignment = bed->setup.memory_alignment,
        .abi = bed->setup.abi,
        .paused = bed->setup.paused,
    };
    if (bed->setup.xen)
        fake_gnttab_describe(&bed->gnttab, &config.domain);
    else
        guest_memory_describe(&bed->memory, &config.domain);
    bed->nr_events = 0;
    bed->connection = xbd_connection_new(&config);
    CHECK(bed->connection);
    for (unsigned i = 0; i < bed->setup.rings; i++)
        add_ring(bed, &bed->rings[i]);
}

void bed_stop(struct bed *bed)
{
    xbd_connection_stop(bed->connection);
    bed_event(bed, XBD_STOPPED);
    xbd_connection_free(bed->connection);
    bed->connection = NULL;
}

/* -- the guest ----------------------------------------------------------------------------------------- */

uint8_t *bed_page(struct bed *bed, uint32_t page)
{
    return bed->memory.writable + (size_t)page * PAGE;
}

uint32_t bed_pages(struct bed *bed, unsigned number)
{
    uint32_t page = bed->next_page;
    bed->next_page += number;
    grant(&bed->memory, page, number, GRANTED);
    return page;
}

void bed_kick(struct bed *bed, unsigned ring)
{
    static const uint64_t one = 1;
    if (bed->setup.xen)
        fake_evtchn_kick(&bed->rings[ring].evtchn);
    else
        CHECK(write(bed->rings[ring].to_backend, &one, sizeof(one)) == sizeof(one));
}

void bed_send(struct bed *bed, unsigned ring)
{
    if (front_push(&bed->rings[ring].front))
        bed_kick(bed, ring);
}

static uint64_t put(struct bed *bed, unsigned ring, const uint8_t *entry)
{
    CHECK(bed->next_id < BED_IDS);
    front_put(&bed->rings[ring].front, entry);
    return bed->next_id++;
}

uint64_t bed_put(struct bed *bed, unsigned ring, uint8_t operation, uint64_t sector,
                 const struct front_segment *segments, unsigned number)
{
    uint8_t entry[ENTRY_BYTES];
    lay_out_transfer(&ABIS[bed->setup.abi], entry, operation, bed->next_id, sector, segments, number);
    return put(bed, ring, entry);
}

uint64_t bed_put_indirect(struct bed *bed, unsigned ring, uint8_t inner, uint64_t sector,
                          const struct front_segment *segments, unsigned number)
{
    uint8_t entry[ENTRY_BYTES];
    uint32_t refs[MAX_INDIRECT_PAGES];
    unsigned nr_refs = (number + SEGMENTS_PER_INDIRECT_PAGE - 1) / SEGMENTS_PER_INDIRECT_PAGE;
    for (unsigned i = 0; i < nr_refs; i++) {
        unsigned rest = number - i * SEGMENTS_PER_INDIRECT_PAGE;
        refs[i] = bed_pages(bed, 1);
        lay_out_segments(bed_page(bed, refs[i]), segments + i * SEGMENTS_PER_INDIRECT_PAGE,
                         rest < SEGMENTS_PER_INDIRECT_PAGE ? rest : SEGMENTS_PER_INDIRECT_PAGE);
    }
    lay_out_indirect(&ABIS[bed->setup.abi], entry, inner, bed->next_id, sector, number, refs, nr_refs);
    return put(bed, ring, entry);
}

uint64_t bed_put_discard(struct bed *bed, unsigned ring, uint8_t flag, uint64_t sector, uint64_t sectors)
{
    uint8_t entry[ENTRY_BYTES];
    lay_out_discard(&ABIS[bed->setup.abi], entry, flag, bed->next_id, sector, sectors);
    return put(bed, ring, entry);
}

static void take_answers(struct bed *bed, struct bed_ring *ring)
{
    while (front_waiting(&ring->front)) {
        struct response response = front_take(&ring->front);
        CHECK(response.id < bed->next_id && !ring->answered[response.id]);
        ring->answered[response.id] = true;
        ring->answers[response.id] = response;
    }
}

bool bed_is_answered(struct bed *bed, unsigned ring, uint64_t id)
{
    take_answers(bed, &bed->rings[ring]);
    return bed->rings[ring].answered[id];
}

static void sleep_for_event(int fd)
{
    struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
    uint64_t events;
    CHECK(poll(&poll_fd, 1, BED_SECONDS * 1000) == 1);
    CHECK(read(fd, &events, sizeof(events)) == sizeof(events));
}

int bed_answer(struct bed *bed, unsigned number, uint64_t id)
{
    struct bed_ring *ring = &bed->rings[number];
    while (!bed_is_answered(bed, number, id))
        if (!front_final_check(&ring->front, 1))
            sleep_for_event(ring->to_guest);
    return ring->answers[id].status;
}

int bed_do(struct bed *bed, unsigned ring, uint8_t operation, uint64_t sector, const struct front_segment *segments,
           unsigned number)
{
    uint64_t id = bed_put(bed, ring, operation, sector, segments, number);
    bed_send(bed, ring);
    return bed_answer(bed, ring, id);
}

/* -- what is Python elsewhere -------------------------------------------------------------------------- */

void bed_know_everything(struct bed *bed)
{
    for (unsigned write = 0; write < 2; write++)
        CHECK(xbd_extents_put(bed->extents, write, 0, bed->setup.size, bed->files[0], 0));
}

static void fetch(struct bed *bed)
{
    for (unsigned count;; bed->nr_events += count) {
        CHECK(bed->nr_events + 16 <= BED_EVENTS);
        count = xbd_connection_events(bed->connection, bed->events + bed->nr_events, 16);
        if (!count)
            return;
    }
}

static struct xbd_event *find_event(struct bed *bed, enum xbd_event_kind kind)
{
    for (unsigned i = 0; i < bed->nr_events; i++)
        if (bed->events[i].kind == kind)
            return &bed->events[i];
    return NULL;
}

bool bed_has_event(struct bed *bed, enum xbd_event_kind kind)
{
    fetch(bed);
    return find_event(bed, kind);
}

struct xbd_event bed_event(struct bed *bed, enum xbd_event_kind kind)
{
    struct xbd_event *found;
    while (!(found = find_event(bed, kind))) {
        sleep_for_event(xbd_connection_wake_fd(bed->connection));
        fetch(bed);
    }
    struct xbd_event event = *found;
    memmove(found, found + 1, (size_t)(bed->events + --bed->nr_events - found) * sizeof(*found));
    return event;
}

void bed_verdict(struct bed *bed, const struct xbd_event *event, enum xbd_verdict verdict, int status)
{
    struct xbd_answer answer = {.request = event->request, .verdict = verdict, .status = (int16_t)status};
    CHECK(event->kind == XBD_REQUEST);
    xbd_connection_answer(bed->connection, &answer, 1);
}

void bed_carry_out(struct bed *bed, const struct xbd_event *event)
{
    uint64_t position = event->offset;
    for (unsigned i = 0; i < event->nr_buffers; i++) {
        const struct xbd_buffer *buffer = &event->buffers[i];
        ssize_t moved = event->operation == OP_READ
                            ? pread(bed->files[0], buffer->start, buffer->length, (off_t)position)
                            : pwrite(bed->files[0], buffer->start, buffer->length, (off_t)position);
        CHECK(moved == (ssize_t)buffer->length);
        position += buffer->length;
    }
    CHECK(!event->nr_buffers || position == event->offset + event->length);
    bed_verdict(bed, event, XBD_ANSWER, RSP_OKAY);
}

/* -- the disk ------------------------------------------------------------------------------------------ */

void fill(uint8_t *at, size_t length, uint64_t from)
{
    static uint8_t bytes[PERIOD];
    static bool made;
    for (; !made; made = true)
        for (unsigned i = 0; i < PERIOD; i++)
            bytes[i] = (uint8_t)(i * UINT64_C(0x9e3779b97f4a7c15) >> 33);
    while (length) {
        size_t first = from % PERIOD;
        size_t part = PERIOD - first < length ? PERIOD - first : length;
        memcpy(at, bytes + first, part);
        at += part;
        from += part;
        length -= part;
    }
}

void bed_file_write(struct bed *bed, unsigned file, uint64_t position, const void *from, size_t length)
{
    CHECK(pwrite(bed->files[file], from, length, (off_t)position) == (ssize_t)length);
}

void bed_file_read(struct bed *bed, unsigned file, uint64_t position, void *to, size_t length)
{
    CHECK(pread(bed->files[file], to, length, (off_t)position) == (ssize_t)length);
}
