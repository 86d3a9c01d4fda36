/*
 * The whole library through api.h: a connection's life with everything that a guest, a driver and the daemon do.
 *
 *     connection_test            all tests, with every engine, ABI and way to reach pages that matters to them
 *     connection_test NAME...    these
 *
 * Ends by abort() where something is not as it has to be.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "bed.h"
#include "budget.h"
#include "delays.h"
#include "server.h"
#include "uring.h"

enum { KNOWN = 1, SECTORS = 8 };

static struct bed bed;
static const struct bed_setup *variant;

/* A bed of the variant under test, changed by the test; started, with everything known if it says so. */
static void start(struct bed_setup setup, bool known)
{
    CHECK(bed_open(&bed, &setup));
    if (known)
        bed_know_everything(&bed);
    xbd_connection_start(bed.connection);
}

/* Whole pages, one after the other. */
static uint32_t whole_pages(struct front_segment *segments, unsigned number)
{
    uint32_t page = bed_pages(&bed, number);
    for (unsigned i = 0; i < number; i++)
        segments[i] = (struct front_segment){page + i, 0, SECTORS - 1};
    return page;
}

static void expect_bytes(const uint8_t *found, size_t length, uint64_t from)
{
    uint8_t *wanted = malloc(length);
    CHECK(wanted);
    fill(wanted, length, from);
    CHECK(!memcmp(found, wanted, length));
    free(wanted);
}

/* Fills the disk's first file, so that each byte tells where it belongs. */
static void fill_disk(void)
{
    uint8_t *bytes = malloc(bed.setup.size);
    CHECK(bytes);
    fill(bytes, bed.setup.size, 0);
    bed_file_write(&bed, 0, 0, bytes, bed.setup.size);
    free(bytes);
}

static void expect_disk(uint64_t position, size_t length, uint64_t from)
{
    uint8_t *bytes = malloc(length);
    CHECK(bytes);
    bed_file_read(&bed, 0, position, bytes, length);
    expect_bytes(bytes, length, from);
    free(bytes);
}

/* -- reading and writing ------------------------------------------------------------------------------- */

/* Parts of pages: the other bytes of a page are not touched. */
static void test_parts_of_pages(void)
{
    static const uint8_t bounds[][2] = {{0, 7}, {3, 3}, {0, 0}, {7, 7}, {2, 6}, {1, 7}, {0, 4}};
    enum { NUMBER = sizeof(bounds) / sizeof(bounds[0]) };
    struct front_segment segments[NUMBER];
    start(*variant, KNOWN);
    fill_disk();
    uint32_t page = bed_pages(&bed, NUMBER);
    for (unsigned i = 0; i < NUMBER; i++)
        segments[i] = (struct front_segment){page + i, bounds[i][0], bounds[i][1]};
    memset(bed_page(&bed, page), 0xa5, NUMBER * PAGE);
    CHECK(bed_do(&bed, 0, OP_READ, 77, segments, NUMBER) == RSP_OKAY);
    uint64_t from = 77 * SECTOR;
    for (unsigned i = 0; i < NUMBER; i++) {
        const uint8_t *at = bed_page(&bed, page + i);
        size_t first = bounds[i][0] * SECTOR;
        size_t behind = (bounds[i][1] + 1u) * SECTOR;
        for (size_t j = 0; j < PAGE; j++)
            CHECK((j >= first && j < behind) || at[j] == 0xa5);
        expect_bytes(at + first, behind - first, from);
        from += behind - first;
    }
    CHECK(bed_do(&bed, 0, OP_WRITE, 1000, segments, NUMBER) == RSP_OKAY);
    expect_disk(1000 * SECTOR, from - 77 * SECTOR, 77 * SECTOR);
    expect_disk(999 * SECTOR, SECTOR, 999 * SECTOR);
    expect_disk(1000 * SECTOR + from - 77 * SECTOR, SECTOR, 1000 * SECTOR + from - 77 * SECTOR);
    bed_close(&bed);
}

static void expect_read(uint64_t sector, unsigned pages, uint64_t zeroes, uint64_t until)
{
    struct front_segment segments[32];
    uint32_t page = whole_pages(segments, pages);
    memset(bed_page(&bed, page), 0xa5, (size_t)pages * PAGE);
    uint64_t id = bed_put_indirect(&bed, 0, OP_READ, sector, segments, pages);
    bed_send(&bed, 0);
    CHECK(bed_answer(&bed, 0, id) == RSP_OKAY);
    for (uint64_t i = 0; i < (uint64_t)pages * PAGE; i += SECTOR) {
        static const uint8_t nothing[SECTOR];
        uint64_t at = sector * SECTOR + i;
        if (zeroes <= at && at < until)
            CHECK(!memcmp(bed_page(&bed, page) + i, nothing, SECTOR));
        else
            expect_bytes(bed_page(&bed, page) + i, SECTOR, at);
    }
}

/* Where nothing is to be read from. */
static void test_zeroes(void)
{
    enum { FIRST = 64 << 10, BEHIND = (192 << 10) + 3 * SECTOR };
    start(*variant, KNOWN);
    fill_disk();
    CHECK(xbd_extents_put(bed.extents, false, FIRST, BEHIND, XBD_ZEROES, FIRST));
    CHECK(xbd_extents_put(bed.extents, false, BEHIND, bed.setup.size, bed.files[0], BEHIND));
    CHECK(!xbd_extents_put(bed.extents, false, FIRST, BEHIND, -1, FIRST));
    CHECK(!xbd_extents_put(bed.extents, true, FIRST, BEHIND, XBD_ZEROES, FIRST));
    expect_read(FIRST / SECTOR, 1, FIRST, BEHIND);
    expect_read(FIRST / SECTOR, 32, FIRST, BEHIND);
    expect_read(FIRST / SECTOR - 5, 2, FIRST, BEHIND);
    expect_read(BEHIND / SECTOR - 9, 3, FIRST, BEHIND);
    expect_read(BEHIND / SECTOR, 3, FIRST, BEHIND);
    CHECK(!bed_has_event(&bed, XBD_REQUEST));
    bed_close(&bed);
}

/* A full ring, several times, answered in any order. */
static void test_full_rings(void)
{
    struct bed_setup setup = *variant;
    setup.entries = 128;
    start(setup, KNOWN);
    fill_disk();
    struct front_segment segments[128];
    uint32_t page = whole_pages(segments, 128);
    uint64_t ids[128];
    for (unsigned round = 0; round < 6; round++) {
        bool write = round % 2;
        if (write)
            fill(bed_page(&bed, page), 128 * PAGE, 1000 * round);
        for (unsigned i = 0; i < 128; i++)
            ids[i] = bed_put(&bed, 0, write ? OP_WRITE : OP_READ, i * SECTORS, &segments[i], 1);
        bed_send(&bed, 0);
        for (unsigned i = 0; i < 128; i++)
            CHECK(bed_answer(&bed, 0, ids[i]) == RSP_OKAY);
        expect_bytes(bed_page(&bed, page), 128 * PAGE, write ? 1000 * round : 1000 * (round ? round - 1 : 0));
    }
    bed_close(&bed);
}

/* Neighbouring parts of the disk lie anywhere in two files, and end within segments. */
static void test_many_pieces(void)
{
    enum { PIECE = 3 * SECTOR, PIECES = 24 };
    start(*variant, !KNOWN);
    uint64_t places[PIECES];
    for (unsigned i = 0; i < PIECES; i++) {
        places[i] = (uint64_t)(i * 7 % PIECES) * 2 * PIECE + 5 * SECTOR;
        for (unsigned write = 0; write < 2; write++)
            CHECK(xbd_extents_put(bed.extents, write, i * PIECE, (i + 1) * PIECE, bed.files[i % 2], places[i]));
    }
    struct front_segment segments[9];
    uint32_t page = whole_pages(segments, 9);
    fill(bed_page(&bed, page), 9 * PAGE, 0);
    CHECK(bed_do(&bed, 0, OP_WRITE, 0, segments, 9) == RSP_OKAY);
    for (unsigned i = 0; i < PIECES; i++) {
        uint8_t found[PIECE];
        bed_file_read(&bed, i % 2, places[i], found, PIECE);
        expect_bytes(found, PIECE, i * PIECE);
    }
    memset(bed_page(&bed, page), 0, 9 * PAGE);
    CHECK(bed_do(&bed, 0, OP_READ, 0, segments, 9) == RSP_OKAY);
    expect_bytes(bed_page(&bed, page), 9 * PAGE, 0);
    segments[0] = (struct front_segment){page, 1, 2};
    segments[1] = (struct front_segment){page + 1, 3, 6};
    CHECK(bed_do(&bed, 0, OP_READ, 31, segments, 2) == RSP_OKAY);
    expect_bytes(bed_page(&bed, page) + SECTOR, 2 * SECTOR, 31 * SECTOR);
    expect_bytes(bed_page(&bed, page + 1) + 3 * SECTOR, 4 * SECTOR, 33 * SECTOR);
    CHECK(!bed_has_event(&bed, XBD_REQUEST));
    bed_close(&bed);
}

static void test_indirect(void)
{
    struct bed_setup setup = *variant;
    setup.pages = 6000;
    setup.size = 32 << 20;
    setup.limits = (struct xbd_limits){.logical_block = SECTOR, .max_indirect_segments = 4096};
    start(setup, KNOWN);
    fill_disk();
    static const unsigned numbers[] = {1, 12, 33, 256, 513, 1024};
    static struct front_segment segments[4096];
    uint32_t page = whole_pages(segments, 4096);
    for (unsigned i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
        unsigned number = numbers[i];
        memset(bed_page(&bed, page), 0, (size_t)number * PAGE);
        uint64_t id = bed_put_indirect(&bed, 0, OP_READ, i, segments, number);
        bed_send(&bed, 0);
        CHECK(bed_answer(&bed, 0, id) == RSP_OKAY && bed.rings[0].answers[id].operation == OP_READ);
        expect_bytes(bed_page(&bed, page), (size_t)number * PAGE, i * SECTOR);
    }
    uint64_t write = bed_put_indirect(&bed, 0, OP_WRITE, 2000, segments, 300);
    bed_send(&bed, 0);
    CHECK(bed_answer(&bed, 0, write) == RSP_OKAY && bed.rings[0].answers[write].operation == OP_WRITE);
    expect_disk(2000 * SECTOR, 300 * PAGE, 5 * SECTOR);
    bed_close(&bed);
}

/* More pieces of memory than one system call takes: Python moves them. */
static void test_the_longest_request(void)
{
    struct bed_setup setup = *variant;
    setup.pages = 6000;
    setup.size = 32 << 20;
    setup.limits = (struct xbd_limits){.logical_block = SECTOR, .max_indirect_segments = 4096};
    start(setup, KNOWN);
    fill_disk();
    static struct front_segment segments[4096];
    uint32_t page = whole_pages(segments, 4096);
    for (unsigned i = 0; i < 4096; i++)
        segments[i].gref = page + 4095 - i;     /* or they would be one piece */
    uint64_t id = bed_put_indirect(&bed, 0, OP_READ, 1, segments, 4096);
    bed_send(&bed, 0);
    if (!setup.xen && setup.mode != XBD_COPY) {    /* bounced or mapped together, they are few */
        struct xbd_event event = bed_event(&bed, XBD_REQUEST);
        CHECK(!event.resolvable && event.nr_buffers == 4096 && event.length == 4096u * PAGE &&
              event.offset == SECTOR);
        bed_carry_out(&bed, &event);
    }
    CHECK(bed_answer(&bed, 0, id) == RSP_OKAY);
    for (unsigned i = 0; i < 4096; i++)
        expect_bytes(bed_page(&bed, segments[i].gref), PAGE, SECTOR + (uint64_t)i * PAGE);
    bed_close(&bed);
}

/* -- what goes up to Python ---------------------------------------------------------------------------- */

static void test_upcalls(void)
{
    struct front_segment segments[3];
    start(*variant, !KNOWN);
    fill_disk();
    uint32_t page = whole_pages(segments, 3);
    uint64_t read = bed_put(&bed, 0, OP_READ, 8, segments, 3);
    bed_send(&bed, 0);
    struct xbd_event event = bed_event(&bed, XBD_REQUEST);
    CHECK(event.resolvable && event.operation == OP_READ && event.offset == PAGE && event.length == 3 * PAGE);
    CHECK(event.nr_buffers == 1 && event.buffers[0].length == 3 * PAGE);        /* neighbours are one piece */
    CHECK(xbd_connection_in_flight(bed.connection) == 1);
    CHECK(!bed_is_answered(&bed, 0, read));
    CHECK(xbd_extents_put(bed.extents, false, 0, 1 << 20, bed.files[0], 0));
    bed_verdict(&bed, &event, XBD_TRY_AGAIN, 0);
    CHECK(bed_answer(&bed, 0, read) == RSP_OKAY);
    expect_bytes(bed_page(&bed, page), 3 * PAGE, PAGE);

    fill(bed_page(&bed, page), 3 * PAGE, 12345);
    uint64_t write = bed_put(&bed, 0, OP_WRITE, 100, segments, 3);
    bed_send(&bed, 0);
    event = bed_event(&bed, XBD_REQUEST);
    CHECK(event.resolvable && event.operation == OP_WRITE);
    bed_carry_out(&bed, &event);
    CHECK(bed_answer(&bed, 0, write) == RSP_OKAY);
    expect_disk(100 * SECTOR, 3 * PAGE, 12345);

    uint64_t fails = bed_put(&bed, 0, OP_WRITE, 100, segments, 1);
    bed_send(&bed, 0);
    event = bed_event(&bed, XBD_REQUEST);
    bed_verdict(&bed, &event, XBD_ANSWER, RSP_EOPNOTSUPP);
    CHECK(bed_answer(&bed, 0, fails) == RSP_EOPNOTSUPP);
    bed_close(&bed);
}

static void test_trying_again_in_vain(void)
{
    struct front_segment segment;
    start(*variant, !KNOWN);
    whole_pages(&segment, 1);
    uint64_t id = bed_put(&bed, 0, OP_READ, 0, &segment, 1);
    bed_send(&bed, 0);
    struct xbd_event event = bed_event(&bed, XBD_REQUEST);
    CHECK(event.resolvable);
    bed_verdict(&bed, &event, XBD_TRY_AGAIN, 0);
    event = bed_event(&bed, XBD_REQUEST);
    CHECK(!event.resolvable && !bed_is_answered(&bed, 0, id));
    bed_verdict(&bed, &event, XBD_ANSWER, RSP_OKAY);
    CHECK(bed_answer(&bed, 0, id) == RSP_OKAY);
    bed_close(&bed);
}

/* What can't be moved is for the driver's method to try, and to explain. */
static void test_transfers_that_fail(void)
{
    struct front_segment segments[2];
    start(*variant, !KNOWN);
    fill_disk();
    whole_pages(segments, 2);
    int read_only = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    CHECK(read_only >= 0);
    CHECK(xbd_extents_put(bed.extents, true, 0, PAGE, bed.files[0], 0));
    CHECK(xbd_extents_put(bed.extents, true, PAGE, 2 * PAGE, read_only, 0));
    CHECK(xbd_extents_put(bed.extents, false, 0, PAGE, bed.files[0], 0));
    CHECK(xbd_extents_put(bed.extents, false, PAGE, 2 * PAGE, bed.files[0], bed.setup.size - SECTOR));
    for (uint8_t operation = OP_READ; operation <= OP_WRITE; operation++) {
        uint64_t id = bed_put(&bed, 0, operation, 0, segments, 2);
        bed_send(&bed, 0);
        struct xbd_event event = bed_event(&bed, XBD_REQUEST);
        CHECK(!event.resolvable && event.operation == operation);
        bed_verdict(&bed, &event, XBD_ANSWER, RSP_ERROR);
        CHECK(bed_answer(&bed, 0, id) == RSP_ERROR);
    }
    bed_close(&bed);
    close(read_only);
}

static void test_flush_discard_and_barrier(void)
{
    struct front_segment segment;
    start(*variant, KNOWN);
    uint32_t page = whole_pages(&segment, 1);
    fill(bed_page(&bed, page), PAGE, 99);
    uint64_t flush = bed_put(&bed, 0, OP_FLUSH_DISKCACHE, 0, NULL, 0);
    uint64_t discard = bed_put_discard(&bed, 0, 0, 24, 16);
    bed_send(&bed, 0);
    struct xbd_event event = bed_event(&bed, XBD_REQUEST);
    CHECK(event.operation == OP_FLUSH_DISKCACHE && !event.resolvable && !event.nr_buffers && !event.length);
    bed_verdict(&bed, &event, XBD_ANSWER, RSP_OKAY);
    event = bed_event(&bed, XBD_REQUEST);
    CHECK(event.operation == OP_DISCARD && event.offset == 24 * SECTOR && event.length == 16 * SECTOR);
    bed_verdict(&bed, &event, XBD_ANSWER, RSP_OKAY);
    CHECK(bed_answer(&bed, 0, flush) == RSP_OKAY && bed_answer(&bed, 0, discard) == RSP_OKAY);
    static const uint8_t with_data[] = {OP_FLUSH_DISKCACHE, OP_WRITE_BARRIER};
    for (unsigned i = 0; i < 2; i++) {
        uint64_t id = bed_put(&bed, 0, with_data[i], 16, &segment, 1);
        bed_send(&bed, 0);
        event = bed_event(&bed, XBD_REQUEST);
        CHECK(event.operation == with_data[i] && !event.resolvable && event.nr_buffers == 1);
        bed_carry_out(&bed, &event);
        CHECK(bed_answer(&bed, 0, id) == RSP_OKAY && bed.rings[0].answers[id].operation == with_data[i]);
        expect_disk(16 * SECTOR, PAGE, 99);
    }
    struct xbd_counters counters;
    xbd_connection_counters(bed.connection, &counters);
    CHECK(counters.f_req == 1 && counters.ds_req == 1 && counters.wr_req == 2 && counters.wr_bytes == 2 * PAGE);
    CHECK(counters.upcalls == 4 && !counters.errors && !counters.rd_req);
    bed_close(&bed);
}

/* A barrier waits for what came before, and what comes after waits for it. */
static void test_order_around_a_barrier(void)
{
    struct front_segment segment;
    start(*variant, !KNOWN);
    whole_pages(&segment, 1);
    uint64_t before = bed_put(&bed, 0, OP_READ, 0, &segment, 1);
    uint64_t barrier = bed_put(&bed, 0, OP_WRITE_BARRIER, 0, NULL, 0);
    uint64_t after = bed_put(&bed, 0, OP_READ, 8, &segment, 1);
    bed_send(&bed, 0);
    struct xbd_event first = bed_event(&bed, XBD_REQUEST);
    CHECK(first.operation == OP_READ && first.offset == 0);
    moment();
    CHECK(!bed_has_event(&bed, XBD_REQUEST));
    bed_verdict(&bed, &first, XBD_ANSWER, RSP_OKAY);
    struct xbd_event second = bed_event(&bed, XBD_REQUEST);
    CHECK(second.operation == OP_WRITE_BARRIER && bed_answer(&bed, 0, before) == RSP_OKAY);
    moment();
    CHECK(!bed_has_event(&bed, XBD_REQUEST));
    bed_verdict(&bed, &second, XBD_ANSWER, RSP_OKAY);
    struct xbd_event third = bed_event(&bed, XBD_REQUEST);
    CHECK(third.operation == OP_READ && third.offset == PAGE && bed_answer(&bed, 0, barrier) == RSP_OKAY);
    bed_verdict(&bed, &third, XBD_ANSWER, RSP_OKAY);
    CHECK(bed_answer(&bed, 0, after) == RSP_OKAY);
    bed_close(&bed);
}

/* What the host can't take as it is goes up at once. */
static void test_alignment(void)
{
    struct bed_setup setup = *variant;
    setup.request_alignment = PAGE;
    setup.memory_alignment = PAGE;
    start(setup, KNOWN);
    struct front_segment segments[2];
    uint32_t page = whole_pages(segments, 2);
    CHECK(bed_do(&bed, 0, OP_READ, 8, segments, 2) == RSP_OKAY);
    static const struct {
        uint64_t sector;
        uint8_t first, last;
    } wrong[] = {{1, 0, 7}, {8, 0, 3}, {8, 4, 7}};
    for (unsigned i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        struct front_segment segment = {page, wrong[i].first, wrong[i].last};
        uint64_t id = bed_put(&bed, 0, OP_READ, wrong[i].sector, &segment, 1);
        bed_send(&bed, 0);
        struct xbd_event event = bed_event(&bed, XBD_REQUEST);
        CHECK(!event.resolvable);
        bed_carry_out(&bed, &event);
        CHECK(bed_answer(&bed, 0, id) == RSP_OKAY);
    }
    bed_close(&bed);
}

/* More small extents than the cache's table holds, and no chunk ever. */
static void test_nothing_but_small_extents(void)
{
    struct xbd_piece piece;
    xbd_extents *extents = xbd_extents_new();
    CHECK(extents);
    for (uint64_t i = 0; i < 10000; i++)
        CHECK(xbd_extents_put(extents, true, i * PAGE, i * PAGE + SECTOR, 3, i * SECTOR));
    CHECK(xbd_extents_find(extents, true, 9999 * PAGE, SECTOR, &piece, 1) == 1 && piece.position == 9999 * SECTOR);
    CHECK(xbd_extents_forget(extents, 0, PAGE));
    xbd_extents_free(extents);
}

/* -- what is refused ----------------------------------------------------------------------------------- */

static void expect_rejected(uint64_t id, int status)
{
    bed_send(&bed, 0);
    CHECK(bed_answer(&bed, 0, id) == status);
    struct xbd_event event = bed_event(&bed, XBD_REJECTED);
    uint64_t told;
    memcpy(&told, event.entry + ABIS[bed.setup.abi].id, sizeof(told));
    CHECK(told == id && !event.number && !event.ring);
}

static void test_rejected_requests(void)
{
    struct front_segment segments[12];
    uint64_t end = (4 << 20) / SECTOR;
    start(*variant, KNOWN);
    uint32_t page = whole_pages(segments, 12);
    struct front_segment upside_down = {page, 5, 4};
    struct front_segment beyond = {page, 0, 8};
    expect_rejected(bed_put(&bed, 0, 77, 0, segments, 1), RSP_EOPNOTSUPP);
    expect_rejected(bed_put(&bed, 0, OP_READ, 0, NULL, 0), RSP_ERROR);
    expect_rejected(bed_put(&bed, 0, OP_READ, 0, segments, 12), RSP_ERROR);
    expect_rejected(bed_put(&bed, 0, OP_READ, 0, &upside_down, 1), RSP_ERROR);
    expect_rejected(bed_put(&bed, 0, OP_WRITE, 0, &beyond, 1), RSP_ERROR);
    expect_rejected(bed_put(&bed, 0, OP_READ, end - 7, segments, 1), RSP_ERROR);
    expect_rejected(bed_put(&bed, 0, OP_WRITE, UINT64_MAX, segments, 1), RSP_ERROR);
    expect_rejected(bed_put_discard(&bed, 0, 1, 0, 8), RSP_EOPNOTSUPP);
    expect_rejected(bed_put_discard(&bed, 0, 0, end, 1), RSP_ERROR);
    expect_rejected(bed_put_indirect(&bed, 0, OP_FLUSH_DISKCACHE, 0, segments, 1), RSP_ERROR);
    expect_rejected(bed_put_indirect(&bed, 0, OP_READ, 0, &upside_down, 1), RSP_ERROR);
    expect_rejected(bed_put_indirect(&bed, 0, OP_READ, end - 15, segments, 2), RSP_ERROR);
    CHECK(bed_do(&bed, 0, OP_READ, end - 16, segments, 2) == RSP_OKAY);
    bed_close(&bed);
}

static void test_read_only(void)
{
    struct bed_setup setup = *variant;
    setup.limits = (struct xbd_limits){
        .logical_block = SECTOR, .max_indirect_segments = 32, .read_only = true, .flush = true, .discard = true};
    start(setup, KNOWN);
    fill_disk();
    struct front_segment segments[2];
    uint32_t page = whole_pages(segments, 2);
    expect_rejected(bed_put(&bed, 0, OP_WRITE, 0, segments, 2), RSP_ERROR);
    expect_rejected(bed_put_indirect(&bed, 0, OP_WRITE, 0, segments, 2), RSP_ERROR);
    expect_rejected(bed_put_discard(&bed, 0, 0, 0, 8), RSP_ERROR);
    expect_rejected(bed_put(&bed, 0, OP_WRITE_BARRIER, 0, segments, 2), RSP_EOPNOTSUPP);
    expect_rejected(bed_put(&bed, 0, OP_FLUSH_DISKCACHE, 0, segments, 2), RSP_ERROR);
    CHECK(bed_do(&bed, 0, OP_READ, 3, segments, 2) == RSP_OKAY);
    expect_bytes(bed_page(&bed, page), 2 * PAGE, 3 * SECTOR);
    expect_disk(0, 1 << 20, 0);
    bed_close(&bed);
}

static void expect_no_pages(uint64_t id)
{
    bed_send(&bed, 0);
    CHECK(bed_answer(&bed, 0, id) == RSP_ERROR);
    if (bed.setup.mode == XBD_COPY && !bed_has_event(&bed, XBD_NO_PAGES))
        return;                         /* with copies only indirect pages are told of */
    CHECK(bed_event(&bed, XBD_NO_PAGES).number);
}

/* What a guest does not grant is not touched, whatever else is in the same request or batch. */
static void test_pages_that_are_not_granted(void)
{
    start(*variant, KNOWN);
    fill_disk();
    struct front_segment segments[4];
    uint32_t page = whole_pages(segments, 4);
    uint32_t nr_pages = bed.memory.pages;
    memset(bed_page(&bed, page), 0x77, 4 * PAGE);
    grant(&bed.memory, page + 1, 1, NOT_GRANTED);
    grant(&bed.memory, page + 2, 1, GRANTED_READONLY);
    expect_no_pages(bed_put(&bed, 0, OP_READ, 0, segments + 1, 1));
    expect_no_pages(bed_put(&bed, 0, OP_READ, 0, segments + 2, 1));
    expect_no_pages(bed_put(&bed, 0, OP_WRITE, 0, segments + 1, 1));
    struct front_segment nowhere = {nr_pages, 0, 7};
    expect_no_pages(bed_put(&bed, 0, OP_READ, 0, &nowhere, 1));
    nowhere.gref = UINT32_MAX;
    expect_no_pages(bed_put(&bed, 0, OP_WRITE, 0, &nowhere, 1));
    uint64_t mixed = bed_put(&bed, 0, OP_READ, 0, segments, 4);
    uint64_t good = bed_put(&bed, 0, OP_READ, 0, segments + 3, 1);
    bed_send(&bed, 0);
    CHECK(bed_answer(&bed, 0, mixed) == RSP_ERROR && bed_answer(&bed, 0, good) == RSP_OKAY);
    expect_bytes(bed_page(&bed, page + 3), PAGE, 0);
    for (unsigned i = 0; i < 2 * PAGE; i++)
        CHECK(bed_page(&bed, page + 1)[i] == 0x77);
    /* To be written from, a page need not be writable; but pages that stay mapped are mapped for both. */
    int status = bed_do(&bed, 0, OP_WRITE, 0, segments + 2, 1);
    CHECK(status == (bed.setup.mode == XBD_PERSISTENT ? RSP_ERROR : RSP_OKAY));
    bed_close(&bed);
}

static void test_indirect_pages_that_are_not_granted(void)
{
    start(*variant, KNOWN);
    struct front_segment segments[2];
    whole_pages(segments, 2);
    uint32_t table = bed.next_page;
    uint64_t id = bed_put_indirect(&bed, 0, OP_READ, 0, segments, 2);
    grant(&bed.memory, table, 1, NOT_GRANTED);
    bed_send(&bed, 0);
    CHECK(bed_answer(&bed, 0, id) == RSP_ERROR && bed_event(&bed, XBD_NO_PAGES).number);
    table = bed.next_page;
    id = bed_put_indirect(&bed, 0, OP_READ, 0, segments, 2);
    grant(&bed.memory, table, 1, GRANTED_READONLY);
    bed_send(&bed, 0);
    CHECK(bed_answer(&bed, 0, id) == RSP_OKAY);
    bed_close(&bed);
}

/* A hypervisor that maps nothing now, and maps again later. */
static void test_maps_that_fail(void)
{
    struct front_segment segments[11];
    if (!variant->xen || variant->mode == XBD_COPY)
        return;
    start(*variant, KNOWN);
    whole_pages(segments, 11);
    atomic_store(&bed.gnttab.refuse_maps, true);
    CHECK(bed_do(&bed, 0, OP_READ, 0, segments, 11) == RSP_ERROR);
    struct xbd_event event = bed_event(&bed, XBD_NO_PAGES);
    CHECK(event.number == EINVAL);
    atomic_store(&bed.gnttab.refuse_maps, false);
    CHECK(bed_do(&bed, 0, OP_READ, 0, segments, 11) == RSP_OKAY);
    CHECK(atomic_load(&bed.gnttab.mapped) == (variant->mode == XBD_PERSISTENT ? 11 : 0));
    bed_close(&bed);
}

static void test_a_corrupt_ring(void)
{
    struct bed_setup setup = *variant;
    setup.rings = 2;
    start(setup, !KNOWN);
    struct front_segment segment;
    whole_pages(&segment, 1);
    uint64_t id = bed_put(&bed, 0, OP_READ, 0, &segment, 1);
    bed_send(&bed, 0);
    struct xbd_event request = bed_event(&bed, XBD_REQUEST);
    atomic_store(front_word(&bed.rings[0].front, WORD_REQ_PROD), 40);
    bed_kick(&bed, 0);
    struct xbd_event event = bed_event(&bed, XBD_CORRUPT);
    CHECK(event.number == 40 && event.ring == 0);
    bed_kick(&bed, 0);
    bed_verdict(&bed, &request, XBD_ANSWER, RSP_OKAY);
    CHECK(bed_answer(&bed, 0, id) == RSP_OKAY);
    moment();
    CHECK(!bed_has_event(&bed, XBD_CORRUPT) && !xbd_connection_in_flight(bed.connection));
    /* The other ring goes on. */
    id = bed_put(&bed, 1, OP_READ, 0, &segment, 1);
    bed_send(&bed, 1);
    request = bed_event(&bed, XBD_REQUEST);
    CHECK(request.ring == 1);
    bed_verdict(&bed, &request, XBD_ANSWER, RSP_OKAY);
    CHECK(bed_answer(&bed, 1, id) == RSP_OKAY);
    bed_close(&bed);
}

/* Python is told of some, and how many more there were. */
static void test_a_flood_of_rejected_requests(void)
{
    start(*variant, KNOWN);
    for (unsigned round = 0; round < 10; round++) {
        uint64_t last = 0;
        for (unsigned i = 0; i < 32; i++)
            last = bed_put(&bed, 0, 99, 0, NULL, 0);
        bed_send(&bed, 0);
        while (bed_answer(&bed, 0, last) != RSP_EOPNOTSUPP || front_room(&bed.rings[0].front) != 32)
            CHECK(bed_is_answered(&bed, 0, last));
    }
    uint64_t told = 0;
    while (bed_has_event(&bed, XBD_REJECTED))
        told += 1 + bed_event(&bed, XBD_REJECTED).number;
    CHECK(told == 320);
    expect_rejected(bed_put(&bed, 0, 98, 0, NULL, 0), RSP_EOPNOTSUPP);
    struct xbd_counters counters;
    xbd_connection_counters(bed.connection, &counters);
    CHECK(counters.errors == 321);
    bed_close(&bed);
}

/* -- waiting for the end of things --------------------------------------------------------------------- */

static void test_drain(void)
{
    struct front_segment segment;
    start(*variant, !KNOWN);
    whole_pages(&segment, 1);
    uint64_t taken = bed_put(&bed, 0, OP_READ, 0, &segment, 1);
    bed_send(&bed, 0);
    struct xbd_event request = bed_event(&bed, XBD_REQUEST);
    xbd_connection_drain(bed.connection, 7);
    moment();
    uint64_t late = bed_put(&bed, 0, OP_READ, 0, &segment, 1);
    bed_send(&bed, 0);
    bed_kick(&bed, 0);
    moment();
    CHECK(!bed_has_event(&bed, XBD_DRAINED) && !bed_has_event(&bed, XBD_REQUEST));
    bed_verdict(&bed, &request, XBD_ANSWER, RSP_OKAY);
    bed_event(&bed, XBD_DRAINED);
    CHECK(bed_answer(&bed, 0, taken) == RSP_OKAY && !bed_is_answered(&bed, 0, late));
    CHECK(!xbd_connection_in_flight(bed.connection));
    bed_stop(&bed);
    bed_connect(&bed);
    bed_know_everything(&bed);
    xbd_connection_start(bed.connection);
    CHECK(bed_answer(&bed, 0, late) == RSP_OKAY);
    bed_close(&bed);
}

static void test_draining_twice(void)
{
    struct bed_setup setup = *variant;
    struct front_segment segment;
    setup.rings = 2;
    start(setup, !KNOWN);
    whole_pages(&segment, 1);
    bed_put(&bed, 0, OP_READ, 0, &segment, 1);
    bed_send(&bed, 0);
    struct xbd_event request = bed_event(&bed, XBD_REQUEST);
    xbd_connection_drain(bed.connection, 7);
    xbd_connection_drain(bed.connection, 7);
    moment();
    CHECK(!bed_has_event(&bed, XBD_DRAINED));
    bed_verdict(&bed, &request, XBD_ANSWER, RSP_OKAY);
    bed_event(&bed, XBD_DRAINED);
    bed_event(&bed, XBD_DRAINED);
    xbd_connection_drain(bed.connection, 7);
    bed_event(&bed, XBD_DRAINED);
    bed_close(&bed);
}

static void test_pause_and_resume(void)
{
    struct bed_setup setup = *variant;
    struct front_segment segment;
    setup.rings = 2;
    start(setup, KNOWN);
    whole_pages(&segment, 1);
    for (unsigned round = 0; round < 3; round++) {
        xbd_connection_drain(bed.connection, round);
        CHECK(bed_event(&bed, XBD_DRAINED).number == round);
        uint64_t waiting[] = {bed_put(&bed, 0, OP_READ, 0, &segment, 1), bed_put(&bed, 1, OP_READ, 8, &segment, 1)};
        for (unsigned ring = 0; ring < 2; ring++) {
            bed_send(&bed, ring);
            bed_kick(&bed, ring);
        }
        moment();
        CHECK(!bed_is_answered(&bed, 0, waiting[0]) && !bed_is_answered(&bed, 1, waiting[1]));
        CHECK(!xbd_connection_in_flight(bed.connection));
        xbd_connection_resume(bed.connection);
        for (unsigned ring = 0; ring < 2; ring++)
            CHECK(bed_answer(&bed, ring, waiting[ring]) == RSP_OKAY);
    }
    xbd_connection_resume(bed.connection);      /* which it is */
    xbd_connection_stop(bed.connection);
    xbd_connection_resume(bed.connection);      /* too late, and no harm */
    bed_event(&bed, XBD_STOPPED);
    xbd_connection_free(bed.connection);
    bed_connect(&bed);
    bed_close(&bed);
}

static void test_a_connection_that_begins_paused(void)
{
    struct bed_setup setup = *variant;
    struct front_segment segment;
    setup.paused = true;
    CHECK(bed_open(&bed, &setup));
    bed_know_everything(&bed);
    whole_pages(&segment, 1);
    uint64_t waiting = bed_put(&bed, 0, OP_READ, 0, &segment, 1);
    bed_send(&bed, 0);
    xbd_connection_start(bed.connection);
    moment();
    CHECK(!bed_is_answered(&bed, 0, waiting));
    xbd_connection_resume(bed.connection);
    CHECK(bed_answer(&bed, 0, waiting) == RSP_OKAY);
    bed_close(&bed);
}

static void test_settle_with_nothing_in_flight(void)
{
    struct bed_setup setup = *variant;
    setup.rings = 3;
    setup.threads = 2;
    CHECK(bed_open(&bed, &setup));
    xbd_connection_settle(bed.connection, 0, 1, 5);
    CHECK(bed_event(&bed, XBD_SETTLED).number == 5);
    xbd_connection_start(bed.connection);
    xbd_connection_settle(bed.connection, 0, UINT64_MAX, UINT64_MAX);
    CHECK(bed_event(&bed, XBD_SETTLED).number == UINT64_MAX);
    xbd_connection_settle(bed.connection, UINT64_MAX, UINT64_MAX, 0);
    CHECK(bed_event(&bed, XBD_SETTLED).number == 0);
    /* What Python has is not in flight. */
    struct front_segment segment;
    whole_pages(&segment, 1);
    bed_put(&bed, 1, OP_READ, 0, &segment, 1);
    bed_send(&bed, 1);
    bed_event(&bed, XBD_REQUEST);
    xbd_connection_settle(bed.connection, 0, UINT64_MAX, 9);
    CHECK(bed_event(&bed, XBD_SETTLED).number == 9);
    bed_close(&bed);
}

/* Sends what was put; it has been set off when this returns: a batch is, before one of it is answered. */
static void send_and_see_it_set_off(void)
{
    enum { NO_OPERATION = 77 };
    uint64_t last = bed_put(&bed, 0, NO_OPERATION, 0, NULL, 0);
    bed_send(&bed, 0);
    CHECK(bed_answer(&bed, 0, last) == RSP_EOPNOTSUPP);
}

/* A read of a pipe ends when the test writes into it: what is in flight meanwhile. */
struct pipe_read {
    int to, from;
    uint64_t id;
    uint32_t page;
};

static struct pipe_read begin_pipe_read(uint64_t offset)
{
    struct pipe_read read;
    struct front_segment segment;
    int ends[2];
    CHECK(!pipe2(ends, O_CLOEXEC));
    read.from = ends[0];
    read.to = ends[1];
    CHECK(xbd_extents_put(bed.extents, false, offset, offset + PAGE, read.from, 0));
    read.page = whole_pages(&segment, 1);
    read.id = bed_put(&bed, 0, OP_READ, offset / SECTOR, &segment, 1);
    send_and_see_it_set_off();
    return read;
}

static void end_pipe_read(const struct pipe_read *read, uint64_t from)
{
    uint8_t bytes[PAGE];
    fill(bytes, PAGE, from);
    CHECK(write(read->to, bytes, PAGE) == PAGE);
}

static void close_pipe(const struct pipe_read *read)
{
    close(read->to);
    close(read->from);
}

static void test_settle_waits_for_what_touches_the_range(void)
{
    start(*variant, !KNOWN);
    struct pipe_read one = begin_pipe_read(0);
    struct pipe_read two = begin_pipe_read(2 * PAGE);
    xbd_connection_settle(bed.connection, PAGE - 1, 1, 1);
    xbd_connection_settle(bed.connection, 3 * PAGE - 1, UINT64_MAX, 2);
    xbd_connection_settle(bed.connection, PAGE, PAGE, 3);
    CHECK(bed_event(&bed, XBD_SETTLED).number == 3);
    /* What is set off later is not waited for. */
    struct pipe_read late = begin_pipe_read(0);
    moment();
    CHECK(!bed_has_event(&bed, XBD_SETTLED));
    end_pipe_read(&two, 0);
    CHECK(bed_event(&bed, XBD_SETTLED).number == 2 && bed_answer(&bed, 0, two.id) == RSP_OKAY);
    moment();
    CHECK(!bed_has_event(&bed, XBD_SETTLED));
    end_pipe_read(&one, 7);
    CHECK(bed_event(&bed, XBD_SETTLED).number == 1 && bed_answer(&bed, 0, one.id) == RSP_OKAY);
    expect_bytes(bed_page(&bed, one.page), PAGE, 7);
    CHECK(!bed_is_answered(&bed, 0, late.id));
    end_pipe_read(&late, 9);
    CHECK(bed_answer(&bed, 0, late.id) == RSP_OKAY);
    expect_bytes(bed_page(&bed, late.page), PAGE, 9);
    bed_close(&bed);
    close_pipe(&one);
    close_pipe(&two);
    close_pipe(&late);
}

/* Descriptors have small numbers, which come again at once. */
static void test_a_file_closed_after_settling(void)
{
    struct front_segment segment;
    start(*variant, !KNOWN);
    uint32_t page = whole_pages(&segment, 1);
    for (unsigned i = 0; i < 5; i++) {
        uint8_t bytes[PAGE];
        int fd = memfd_create("short-lived", MFD_CLOEXEC);
        fill(bytes, PAGE, 1000 * i);
        CHECK(fd >= 0 && pwrite(fd, bytes, PAGE, 0) == PAGE);
        CHECK(xbd_extents_put(bed.extents, false, 0, PAGE, fd, 0));
        CHECK(bed_do(&bed, 0, OP_READ, 0, &segment, 1) == RSP_OKAY);
        expect_bytes(bed_page(&bed, page), PAGE, 1000 * i);
        CHECK(xbd_extents_forget(bed.extents, 0, PAGE));
        xbd_connection_settle(bed.connection, 0, UINT64_MAX, i);
        CHECK(bed_event(&bed, XBD_SETTLED).number == i);
        close(fd);
    }
    bed_close(&bed);
}

static atomic_bool kernel_is_busy;

/* Instead of the library's uring_enter, which the linker calls __real_: a kernel that takes nothing for a while, but
 * still tells of events. */
int __real_uring_enter(struct uring *uring, unsigned wait, uint64_t timeout_ns);
int __wrap_uring_enter(struct uring *uring, unsigned wait, uint64_t timeout_ns);

int __wrap_uring_enter(struct uring *uring, unsigned wait, uint64_t timeout_ns)
{
    return uring->queued && atomic_load(&kernel_is_busy) ? EBUSY : __real_uring_enter(uring, wait, timeout_ns);
}

/* The same with more in flight than the submission queue holds: what waits for room uses the file later. */
static void test_a_file_closed_after_a_jam(void)
{
    enum { NUMBER = 300, PAGES = 400 };
    struct bed_setup setup = *variant;
    static struct front_segment segments[NUMBER];
    uint64_t ids[NUMBER];
    uint8_t bytes[PAGE];
    setup.entries = 512;
    start(setup, !KNOWN);
    uint32_t page = whole_pages(segments, NUMBER);
    int fd = memfd_create("short-lived", MFD_CLOEXEC);
    CHECK(fd >= 0 && !ftruncate(fd, (off_t)PAGES * PAGE));
    CHECK(xbd_extents_put(bed.extents, false, 0, (uint64_t)PAGES * PAGE, fd, 0));
    CHECK(bed_do(&bed, 0, OP_READ, 0, segments, 1) == RSP_OKAY);
    atomic_store(&kernel_is_busy, true);
    for (unsigned i = 0; i < NUMBER; i++)
        ids[i] = bed_put(&bed, 0, OP_READ, i * SECTORS, &segments[i], 1);
    send_and_see_it_set_off();
    CHECK(xbd_extents_forget(bed.extents, 0, UINT64_MAX));
    xbd_connection_settle(bed.connection, 0, UINT64_MAX, 1);
    moment();
    CHECK(!bed_has_event(&bed, XBD_SETTLED));
    atomic_store(&kernel_is_busy, false);
    bed_event(&bed, XBD_SETTLED);
    while (bed_has_event(&bed, XBD_REQUEST)) {
        struct xbd_event event = bed_event(&bed, XBD_REQUEST);
        bed_verdict(&bed, &event, XBD_ANSWER, RSP_OKAY);
    }
    for (unsigned i = 0; i < NUMBER; i++)
        CHECK(bed_answer(&bed, 0, ids[i]) == RSP_OKAY);
    close(fd);
    CHECK(memfd_create("another", MFD_CLOEXEC) == fd);
    fill(bytes, PAGE, 77);
    CHECK(pwrite(fd, bytes, PAGE, 0) == PAGE);
    CHECK(xbd_extents_put(bed.extents, false, 0, PAGE, fd, 0));
    CHECK(bed_do(&bed, 0, OP_READ, 0, segments, 1) == RSP_OKAY);
    expect_bytes(bed_page(&bed, page), PAGE, 77);
    bed_close(&bed);
    close(fd);
}

static void test_stop_waits_for_the_kernel(void)
{
    struct bed_setup setup = *variant;
    setup.rings = 2;
    start(setup, !KNOWN);
    struct pipe_read read = begin_pipe_read(0);
    xbd_connection_stop(bed.connection);
    moment();
    CHECK(!bed_has_event(&bed, XBD_STOPPED));
    end_pipe_read(&read, 5);
    bed_event(&bed, XBD_STOPPED);
    xbd_connection_free(bed.connection);
    CHECK(!bed_is_answered(&bed, 0, read.id));
    bed_connect(&bed);
    CHECK(xbd_extents_forget(bed.extents, 0, PAGE));
    bed_know_everything(&bed);
    fill_disk();
    xbd_connection_start(bed.connection);
    CHECK(bed_answer(&bed, 0, read.id) == RSP_OKAY);
    expect_bytes(bed_page(&bed, read.page), PAGE, 0);
    bed_close(&bed);
    close_pipe(&read);
}

/* Whoever waits for the end of transfers waits for it also when the connection is stopped meanwhile. */
static void test_settle_while_stopping(void)
{
    struct bed_setup setup = *variant;
    setup.rings = 2;
    start(setup, !KNOWN);
    struct pipe_read read = begin_pipe_read(0);
    xbd_connection_settle(bed.connection, 0, PAGE, 1);
    xbd_connection_stop(bed.connection);
    xbd_connection_settle(bed.connection, 0, PAGE, 2);
    xbd_connection_drain(bed.connection, 7);
    moment();
    CHECK(!bed_has_event(&bed, XBD_SETTLED) && !bed_has_event(&bed, XBD_DRAINED));
    end_pipe_read(&read, 5);
    uint64_t first = bed_event(&bed, XBD_SETTLED).number;
    uint64_t second = bed_event(&bed, XBD_SETTLED).number;
    CHECK(first + second == 3);
    bed_event(&bed, XBD_DRAINED);
    bed_event(&bed, XBD_STOPPED);
    xbd_connection_settle(bed.connection, 0, PAGE, 3);
    CHECK(bed_event(&bed, XBD_SETTLED).number == 3);
    xbd_connection_free(bed.connection);
    bed_connect(&bed);
    bed_close(&bed);
    close_pipe(&read);
}

/* A guest sends events at any time, also while its ring is being let go of. */
static void *kick_until(void *stop)
{
    while (!atomic_load((atomic_bool *)stop))
        bed_kick(&bed, 0);
    return NULL;
}

static void test_stop_while_the_guest_kicks(void)
{
    pthread_t thread;
    atomic_bool enough = false;
    start(*variant, KNOWN);
    CHECK(!pthread_create(&thread, NULL, kick_until, &enough));
    for (unsigned life = 0; life < 30; life++) {
        bed_stop(&bed);
        bed_connect(&bed);
        xbd_connection_start(bed.connection);
    }
    atomic_store(&enough, true);
    pthread_join(thread, NULL);
    bed_close(&bed);
}

/* Requests that Python has, that wait behind a barrier, and that nobody has looked at yet. */
static void test_what_a_connection_owes_to_the_next(void)
{
    struct bed_setup setup = *variant;
    setup.rings = 2;
    start(setup, !KNOWN);
    fill_disk();
    struct front_segment segments[20];
    uint32_t page = whole_pages(segments, 20);
    uint64_t ids[20];
    for (unsigned i = 0; i < 20; i++) {
        ids[i] = i == 10 ? bed_put(&bed, i % 2, OP_WRITE_BARRIER, 0, NULL, 0)
                         : bed_put(&bed, i % 2, OP_READ, i, &segments[i], 1);
        bed_send(&bed, i % 2);
    }
    struct xbd_event request[3];
    for (unsigned i = 0; i < 3; i++)
        request[i] = bed_event(&bed, XBD_REQUEST);
    bed_carry_out(&bed, &request[1]);
    for (unsigned life = 0; life < 3; life++) {
        bed_stop(&bed);
        bed_connect(&bed);
        xbd_connection_start(bed.connection);
        struct xbd_event again = bed_event(&bed, XBD_REQUEST);
        bed_carry_out(&bed, &again);
    }
    bed_stop(&bed);
    bed_connect(&bed);
    bed_know_everything(&bed);
    xbd_connection_start(bed.connection);
    struct xbd_event barrier = bed_event(&bed, XBD_REQUEST);
    CHECK(barrier.operation == OP_WRITE_BARRIER);
    bed_verdict(&bed, &barrier, XBD_ANSWER, RSP_OKAY);
    for (unsigned i = 0; i < 20; i++) {
        CHECK(bed_answer(&bed, i % 2, ids[i]) == RSP_OKAY);
        if (i != 10)
            expect_bytes(bed_page(&bed, page + i), PAGE, i * SECTOR);
    }
    bed_close(&bed);
}

static void test_limits_that_change(void)
{
    struct front_segment segment;
    CHECK(bed_open(&bed, variant));
    bed_know_everything(&bed);
    whole_pages(&segment, 1);
    struct xbd_limits limits = bed.setup.limits;
    limits.size = 64 * SECTOR;
    xbd_connection_set_limits(bed.connection, &limits);
    xbd_connection_start(bed.connection);
    CHECK(bed_do(&bed, 0, OP_READ, 56, &segment, 1) == RSP_OKAY);
    expect_rejected(bed_put(&bed, 0, OP_READ, 57, &segment, 1), RSP_ERROR);
    limits.size = 128 * SECTOR;
    xbd_connection_set_limits(bed.connection, &limits);
    CHECK(bed_do(&bed, 0, OP_READ, 57, &segment, 1) == RSP_OKAY);
    limits.read_only = true;
    xbd_connection_set_limits(bed.connection, &limits);
    expect_rejected(bed_put(&bed, 0, OP_WRITE, 0, &segment, 1), RSP_ERROR);
    bed_close(&bed);
}

/* The daemon may still be told of other limits when it has begun to let go. */
static void test_limits_that_change_too_late(void)
{
    start(*variant, KNOWN);
    for (unsigned life = 0; life < 200; life++) {
        xbd_connection_stop(bed.connection);
        xbd_connection_set_limits(bed.connection, &bed.setup.limits);
        bed_event(&bed, XBD_STOPPED);
        xbd_connection_free(bed.connection);
        bed_connect(&bed);
        xbd_connection_start(bed.connection);
    }
    bed_close(&bed);
}

static void test_a_connection_that_never_starts(void)
{
    CHECK(bed_open(&bed, variant));
    xbd_connection_drain(bed.connection, 7);
    bed_event(&bed, XBD_DRAINED);
    xbd_connection_free(bed.connection);
    bed_connect(&bed);
    bed_close(&bed);
}

/* -- pages and budgets --------------------------------------------------------------------------------- */

/* Fewer pages may be in use than all rings want at once: they take turns, and all get there. */
static void test_a_budget_that_is_used_up(void)
{
    enum { RINGS = 3, DEPTH = 64, SEGMENTS = 11 };
    struct bed_setup setup = *variant;
    setup.rings = RINGS;
    setup.threads = 2;
    setup.entries = DEPTH;
    setup.budget = 1;
    setup.pages = RINGS * DEPTH * SEGMENTS;
    start(setup, KNOWN);
    fill_disk();
    uint64_t ids[RINGS][DEPTH];
    uint32_t pages[RINGS][DEPTH];
    for (unsigned i = 0; i < RINGS; i++) {
        for (unsigned j = 0; j < DEPTH; j++) {
            struct front_segment segments[SEGMENTS];
            pages[i][j] = whole_pages(segments, SEGMENTS);
            ids[i][j] = bed_put(&bed, i, OP_READ, i + j, segments, SEGMENTS);
        }
        bed_send(&bed, i);
    }
    for (unsigned i = 0; i < RINGS; i++)
        for (unsigned j = 0; j < DEPTH; j++) {
            CHECK(bed_answer(&bed, i, ids[i][j]) == RSP_OKAY);
            expect_bytes(bed_page(&bed, pages[i][j]), SEGMENTS * PAGE, (i + j) * SECTOR);
        }
    bed_close(&bed);
}

static long stolen;

/* Whoever gives pages back to take as many again finds that another ring was faster. */
static void steal_pages(unsigned place)
{
    static _Thread_local bool stealing;
    long left = xbd_budget_left(bed.budget);
    if (place != BUDGET_TAKE || stealing || !left)
        return;
    stealing = true;
    CHECK(budget_take(bed.budget, left));
    stealing = false;
    stolen += left;
}

/* A ring gets on without anything of the budget, whatever it keeps mapped. */
static void test_a_budget_that_others_use_up(void)
{
    enum { PAGES = 660 };
    struct bed_setup setup = *variant;
    setup.budget = PAGES;
    start(setup, KNOWN);
    static struct front_segment segments[PAGES + 11];
    whole_pages(segments, PAGES + 11);
    for (unsigned i = 0; i < PAGES; i += 11)
        CHECK(bed_do(&bed, 0, OP_READ, i, segments + i, 11) == RSP_OKAY);
    stolen = 0;
    delays_hook(steal_pages);
    CHECK(bed_do(&bed, 0, OP_READ, 0, segments + PAGES, 1) == RSP_OKAY);
    CHECK(bed_do(&bed, 0, OP_READ, 0, segments + PAGES, 11) == RSP_OKAY);
    delays_hook(NULL);
    CHECK(stolen || bed.setup.mode != XBD_PERSISTENT);
    budget_give_back(bed.budget, stolen);
    bed_close(&bed);
}

/* More pages than stay mapped: those not used for long are unmapped. */
static void test_pages_that_stay_mapped(void)
{
    enum { PAGES = 1300 };
    struct bed_setup setup = *variant;
    if (variant->mode != XBD_PERSISTENT)
        return;
    setup.pages = PAGES;
    start(setup, KNOWN);
    static struct front_segment segments[PAGES];
    uint32_t page = whole_pages(segments, PAGES);
    for (unsigned round = 0; round < 2; round++)
        for (unsigned i = 0; i + 10 <= PAGES; i += 10) {
            fill(bed_page(&bed, page + i), 10 * PAGE, i);
            CHECK(bed_do(&bed, 0, round ? OP_WRITE : OP_READ, i, segments + i, 10) == RSP_OKAY);
        }
    for (unsigned i = 0; i < 20; i++)       /* some again and again */
        CHECK(bed_do(&bed, 0, OP_READ, 0, segments + i % 3, 11) == RSP_OKAY);
    if (variant->xen)
        CHECK(atomic_load(&bed.gnttab.mapped) > 500 && atomic_load(&bed.gnttab.mapped) <= 33 * 32);
    bed_close(&bed);
}

/* -- events and sleep ---------------------------------------------------------------------------------- */

static bool is_readable(int fd)
{
    struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
    return poll(&poll_fd, 1, 0) == 1;
}

static void wait_until_readable(int fd)
{
    struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
    poll(&poll_fd, 1, BED_SECONDS * 1000);
}

/* The guest is sent an event at the start, and then only when it wants one. */
static void test_events_that_nobody_wants(void)
{
    struct front_segment segment;
    uint64_t events;
    start(*variant, KNOWN);
    whole_pages(&segment, 1);
    struct bed_ring *ring = &bed.rings[0];
    CHECK(bed_do(&bed, 0, OP_READ, 0, &segment, 1) == RSP_OKAY);
    while (read(ring->to_guest, &events, sizeof(events)) == sizeof(events))
        moment();
    uint64_t ids[3];
    for (unsigned i = 0; i < 3; i++) {
        CHECK(!front_final_check(&ring->front, 3 - i));
        ids[i] = bed_put(&bed, 0, OP_READ, 0, &segment, 1);
        bed_send(&bed, 0);
        while (!bed_is_answered(&bed, 0, ids[i]))
            moment();
        if (i == 2)
            wait_until_readable(ring->to_guest);
        else
            moment();
        CHECK(is_readable(ring->to_guest) == (i == 2));
    }
    bed_close(&bed);
}

static void expect_served(unsigned ring)
{
    struct front_segment segment;
    whole_pages(&segment, 1);
    CHECK(bed_do(&bed, ring, OP_READ, 0, &segment, 1) == RSP_OKAY);
}

/* A guest that rings without asking for anything has to wait between, but not for ever. */
static void test_a_request_after_events_for_nothing(void)
{
    static const struct timespec millisecond = {.tv_nsec = 1000000};
    start(*variant, KNOWN);
    for (unsigned round = 0; round < 4; round++) {
        for (unsigned i = 0; i < 30; i++) {
            bed_kick(&bed, 0);
            nanosleep(&millisecond, NULL);
        }
        expect_served(0);
    }
    bed_close(&bed);
}

static void test_a_storm_of_events(void)
{
    struct bed_setup setup = *variant;
    setup.rings = 2;
    start(setup, KNOWN);
    for (unsigned round = 0; round < 20; round++) {
        for (unsigned i = 0; i < 200; i++) {
            bed_kick(&bed, 0);
            if (i % 50 == 0)
                expect_served(0);
        }
        expect_served(1);
    }
    bed_close(&bed);
}

/* More rings than a thread remembers as served since it slept last. */
static void test_many_rings_of_one_thread(void)
{
    struct bed_setup setup = *variant;
    setup.rings = 24;
    start(setup, KNOWN);
    for (unsigned round = 0; round < 20; round++) {
        uint64_t ids[24];
        struct front_segment segment;
        whole_pages(&segment, 1);
        for (unsigned i = 0; i < 24; i++) {
            ids[i] = bed_put(&bed, i, OP_READ, round, &segment, 1);
            bed_send(&bed, i);
        }
        for (unsigned i = 0; i < 24; i++)
            CHECK(bed_answer(&bed, i, ids[i]) == RSP_OKAY);
    }
    bed_close(&bed);
}

/* A guest that has its next request ready whenever it is answered: its ring is never found empty.  It is played by
 * the I/O thread alone, at the points where answers are published; it begins when the other ring is answered. */
static struct front_segment busy_segment;
static atomic_uint requests_to_go;
static _Atomic uint32_t others_sent;                /* requests of the other ring, with their events */
static unsigned passed_over, most_passed_over;      /* the other ring, though it had a request */
/* An engine looks at events every 32 turns or sooner, a thread at what it served every 8 rounds.  Who never looks
 * passes over hundreds. */
enum { BUSY_REQUESTS = 3000, FEW_PASSED_OVER = 64 };

static void take_answer_of_busy(struct front_ring *ring)
{
    bool waits = (int32_t)(atomic_load(&others_sent) - bed.connection->rings[1]->back.req_cons) > 0;
    passed_over = waits ? passed_over + 1 : 0;
    most_passed_over = passed_over > most_passed_over ? passed_over : most_passed_over;
    front_take(ring);
}

static void keep_busy(unsigned place)
{
    struct front_ring *ring = &bed.rings[0].front;
    uint8_t entry[ENTRY_BYTES];
    if (place != RING_PUSHED)
        return;
    if (front_waiting(ring))
        take_answer_of_busy(ring);
    if (front_room(ring) < ring->entries || !atomic_load(&requests_to_go))
        return;
    lay_out_transfer(ring->abi, entry, OP_READ, 0, 0, &busy_segment, 1);
    front_put(ring, entry);
    bed_send(&bed, 0);
    atomic_fetch_sub(&requests_to_go, 1);
}

static void test_a_ring_beside_a_busy_one(void)
{
    struct bed_setup setup = *variant;
    setup.rings = 2;
    start(setup, KNOWN);
    whole_pages(&busy_segment, 1);
    expect_served(1);
    most_passed_over = passed_over = 0;
    atomic_store(&others_sent, 0);
    atomic_store(&requests_to_go, BUSY_REQUESTS);
    delays_hook(keep_busy);
    while (atomic_load(&requests_to_go)) {
        uint64_t id = bed_put(&bed, 1, OP_READ, 0, &busy_segment, 1);
        bed_send(&bed, 1);
        atomic_store(&others_sent, bed.rings[1].front.req_prod);
        CHECK(bed_answer(&bed, 1, id) == RSP_OKAY);
    }
    bed_stop(&bed);
    delays_hook(NULL);
    CHECK(most_passed_over < FEW_PASSED_OVER);
    bed_close(&bed);
}

static double seconds_on_processor(void)
{
    struct rusage usage;
    CHECK(!getrusage(RUSAGE_SELF, &usage));
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

/* With nothing to do, threads sleep: also those that spin first, and even if nobody disturbs them meanwhile (where
 * that can be had). */
static void test_idle_threads(void)
{
    static const struct timespec a_while = {.tv_nsec = 300000000};
    struct sched_param undisturbed = {.sched_priority = 1};
    struct sched_param ordinary = {0};
    sched_setscheduler(0, SCHED_FIFO, &undisturbed);
    double before = seconds_on_processor();
    xbd_threads *threads = xbd_threads_start(2, 50, variant->engine);
    CHECK(threads);
    nanosleep(&a_while, NULL);
    CHECK(seconds_on_processor() - before < 0.15);
    sched_setscheduler(0, SCHED_OTHER, &ordinary);
    xbd_threads_stop(threads);
}

static void test_threads_that_become_idle(void)
{
    static const struct timespec a_while = {.tv_nsec = 300000000};
    struct bed_setup setup = *variant;
    setup.spin_us = 50;
    setup.threads = 2;
    setup.rings = 2;
    start(setup, KNOWN);
    for (unsigned i = 0; i < 5; i++) {
        expect_served(0);
        expect_served(1);
        moment();
    }
    double before = seconds_on_processor();
    nanosleep(&a_while, NULL);
    CHECK(seconds_on_processor() - before < 0.15);
    bed_close(&bed);
}

/* The kernel sets this flag after it has put work there for the thread, which may have done it by then: so it is set
 * for nothing now and then, until there is work again (io_ctx_mark_taskrun).  Here it is set all the time. */
static void *claim_work(void *stop)
{
    struct uring *uring = bed.connection->rings[0]->thread->engine_state;
    while (!atomic_load((atomic_bool *)stop)) {
        atomic_fetch_or((_Atomic uint32_t *)uring->sq_flags, IORING_SQ_TASKRUN);
        sched_yield();
    }
    return NULL;
}

static void test_a_kernel_that_claims_work(void)
{
    pthread_t thread;
    atomic_bool enough = false;
    start(*variant, KNOWN);
    expect_served(0);
    CHECK(!pthread_create(&thread, NULL, claim_work, &enough));
    for (unsigned i = 0; i < 100; i++)
        expect_served(0);
    atomic_store(&enough, true);
    pthread_join(thread, NULL);
    bed_close(&bed);
}

/* -- what is asked for wrongly ------------------------------------------------------------------------- */

static void test_wrong_arguments(void)
{
    CHECK(!xbd_threads_start(0, 0, XBD_ENGINE_AUTO) && errno == EINVAL);
    CHECK(!xbd_threads_start(65, 0, XBD_ENGINE_AUTO) && errno == EINVAL);
    xbd_threads *threads = xbd_threads_start(64, 0, variant->engine);
    CHECK(threads);
    CHECK(!strcmp(xbd_threads_engine(threads), variant->engine == XBD_ENGINE_URING ? "io_uring" : "preadv"));
    xbd_threads_stop(threads);
    CHECK(bed_open(&bed, variant));
    struct xbd_ring_config config = {.entries = 2048};
    CHECK(!xbd_connection_add_ring(bed.connection, &config) && errno == EINVAL);
    config = (struct xbd_ring_config){.entries = 32, .owed = 33};
    CHECK(!xbd_connection_add_ring(bed.connection, &config) && errno == EINVAL);
    bed_close(&bed);
}

/* -- all of them --------------------------------------------------------------------------------------- */

enum which { EVERY, ENGINES, URING_ONLY };

static const struct {
    const char *name;
    void (*run)(void);
    enum which which;
} tests[] = {
#define TEST(name, which) {#name, test_##name, which}
    TEST(parts_of_pages, EVERY),
    TEST(zeroes, EVERY),
    TEST(full_rings, EVERY),
    TEST(many_pieces, EVERY),
    TEST(indirect, EVERY),
    TEST(the_longest_request, ENGINES),
    TEST(upcalls, EVERY),
    TEST(trying_again_in_vain, ENGINES),
    TEST(transfers_that_fail, EVERY),
    TEST(flush_discard_and_barrier, EVERY),
    TEST(order_around_a_barrier, ENGINES),
    TEST(alignment, EVERY),
    TEST(nothing_but_small_extents, ENGINES),
    TEST(rejected_requests, EVERY),
    TEST(read_only, EVERY),
    TEST(pages_that_are_not_granted, EVERY),
    TEST(indirect_pages_that_are_not_granted, EVERY),
    TEST(maps_that_fail, EVERY),
    TEST(a_corrupt_ring, ENGINES),
    TEST(a_flood_of_rejected_requests, ENGINES),
    TEST(drain, EVERY),
    TEST(draining_twice, ENGINES),
    TEST(pause_and_resume, ENGINES),
    TEST(a_connection_that_begins_paused, ENGINES),
    TEST(settle_with_nothing_in_flight, ENGINES),
    TEST(settle_waits_for_what_touches_the_range, URING_ONLY),
    TEST(a_file_closed_after_settling, ENGINES),
    TEST(a_file_closed_after_a_jam, URING_ONLY),
    TEST(stop_waits_for_the_kernel, URING_ONLY),
    TEST(settle_while_stopping, URING_ONLY),
    TEST(stop_while_the_guest_kicks, ENGINES),
    TEST(what_a_connection_owes_to_the_next, EVERY),
    TEST(limits_that_change, ENGINES),
    TEST(limits_that_change_too_late, ENGINES),
    TEST(a_connection_that_never_starts, ENGINES),
    TEST(a_budget_that_is_used_up, EVERY),
    TEST(a_budget_that_others_use_up, EVERY),
    TEST(pages_that_stay_mapped, EVERY),
    TEST(events_that_nobody_wants, ENGINES),
    TEST(a_request_after_events_for_nothing, ENGINES),
    TEST(a_storm_of_events, ENGINES),
    TEST(many_rings_of_one_thread, ENGINES),
    TEST(a_ring_beside_a_busy_one, ENGINES),
    TEST(idle_threads, ENGINES),
    TEST(threads_that_become_idle, ENGINES),
    TEST(a_kernel_that_claims_work, URING_ONLY),
    TEST(wrong_arguments, ENGINES),
};

static bool wanted(const char *name, int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], name))
            return true;
    return argc == 1;
}

/* One for each engine, with and without Xen, and each way to reach pages; ABIs and spinning take turns. */
static unsigned make_variants(struct bed_setup *variants, enum xbd_engine engine)
{
    unsigned count = 0;
    for (unsigned xen = 0; xen < 2; xen++)
        for (unsigned mode = XBD_PERSISTENT; mode <= XBD_COPY; mode++, count++)
            variants[count] = (struct bed_setup){.engine = engine,
                                                 .xen = xen,
                                                 .mode = (enum xbd_pages_mode)mode,
                                                 .abi = (xen + mode) % 2,
                                                 .spin_us = count % 3 == 1 ? 50 : 0};
    return count;
}

static unsigned run_with(enum xbd_engine engine, int argc, char **argv)
{
    struct bed_setup variants[8];
    unsigned count = make_variants(variants, engine);
    unsigned runs = 0;
    for (unsigned i = 0; i < sizeof(tests) / sizeof(tests[0]); i++) {
        if (!wanted(tests[i].name, argc, argv) || (tests[i].which == URING_ONLY && engine != XBD_ENGINE_URING))
            continue;
        for (unsigned j = 0; j < count; j++) {
            variant = &variants[j];
            if (tests[i].which != EVERY && j != 0 && j != 4)
                continue;
            fprintf(stderr, "%s: %s, %s, pages %u\n", tests[i].name, engine == XBD_ENGINE_URING ? "io_uring" : "preadv",
                    variant->xen ? "xen" : "embedded", variant->mode);
            tests[i].run();
            runs++;
        }
    }
    return runs;
}

int main(int argc, char **argv)
{
    unsigned runs = 0;
    setvbuf(stderr, NULL, _IOLBF, 0);
    delays_seed(1);
    xbd_threads *threads = xbd_threads_start(1, 0, XBD_ENGINE_URING);
    if (threads) {
        xbd_threads_stop(threads);
        runs += run_with(XBD_ENGINE_URING, argc, argv);
    } else {
        printf("there is no io_uring here (%s): only preadv is tested\n", strerror(errno));
    }
    runs += run_with(XBD_ENGINE_PREADV, argc, argv);
    printf("%u tests passed\n", runs);
    return runs ? 0 : 1;
}
