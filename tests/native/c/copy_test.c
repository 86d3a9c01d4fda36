/*
 * First writes that copy what is around them (copy.c), through rings, with a driver whose disk lies in a base file
 * until it is written to: what it lends, takes back, does by itself and forbids meanwhile.
 *
 *     copy_test [N]               the tests, with every engine; N: requests of the last one, 20000
 *
 * No place is ever used twice.  What is done to files is noted on its way to the kernel, or back from it: that tells
 * in which order things were done.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "bed.h"
#include "delays.h"
#include "server.h"
#include "uring.h"

enum {
    SHIFT = 16,
    UNIT = 1 << SHIFT,
    UNITS = 64,
    SECTORS = 8,
    UNIT_SECTORS = UNIT / SECTOR,
    MOST_PLACES = 40000,
    SUPPLY = 64,
};

#define BITS ((uint64_t)1 << 63)
#define SIZE ((uint64_t)UNITS << SHIFT)

static struct bed bed;
static enum xbd_engine engine;
static int store, table;                    /* files: of places, and of entries */
static _Atomic uint64_t entries[UNITS];     /* the driver's memory */
static uint8_t model[SIZE];                 /* what the disk has to be */
static uint64_t next_place;                 /* that was not handed out */
static bool used[MOST_PLACES];

/* -- what the threads do to files ---------------------------------------------------------------------- */

enum call { DATA, SYNC_BEGAN, SYNC_ENDED, ENTRY };

static struct {
    enum call call;
    uint64_t place, end;            /* of a sync: by whom */
} calls[1 << 16];
static atomic_uint nr_calls;
static atomic_ulong entered, spoilt;        /* by the threads; in all */
static atomic_int fail_sync, fail_data;     /* errnos */
static void (*_Atomic while_syncing)(void);

static void note(enum call call, uint64_t place, uint64_t end)
{
    unsigned at = atomic_fetch_add(&nr_calls, 1);
    if (at < sizeof(calls) / sizeof(*calls)) {
        calls[at].call = call;
        calls[at].place = place;
        calls[at].end = end;
    }
}

ssize_t __real_pwritev(int fd, const struct iovec *iov, int count, off_t position);
ssize_t __wrap_pwritev(int fd, const struct iovec *iov, int count, off_t position);
ssize_t __wrap_pwritev(int fd, const struct iovec *iov, int count, off_t position)
{
    int error = fd == store ? atomic_exchange(&fail_data, 0) : 0;
    if (error) {
        errno = error;
        return -1;
    }
    ssize_t result = __real_pwritev(fd, iov, count, position);
    if (fd == store)
        note(DATA, (uint64_t)position, (uint64_t)(position + result));
    return result;
}

ssize_t __real_pwrite(int fd, const void *bytes, size_t length, off_t position);
ssize_t __wrap_pwrite(int fd, const void *bytes, size_t length, off_t position);
ssize_t __wrap_pwrite(int fd, const void *bytes, size_t length, off_t position)
{
    if (fd == table && length)
        for (size_t i = 0; i < length / sizeof(uint64_t); i++, atomic_fetch_add(&entered, 1))
            note(ENTRY, be64toh(((const uint64_t *)bytes)[i]) & ~BITS, 0);
    return __real_pwrite(fd, bytes, length, position);
}

int __real_fdatasync(int fd);
int __wrap_fdatasync(int fd);
int __wrap_fdatasync(int fd)
{
    CHECK(fd == store);
    note(SYNC_BEGAN, 0, (uint64_t)pthread_self());
    void (*hook)(void) = atomic_exchange(&while_syncing, NULL);
    if (hook)
        hook();
    int error = atomic_exchange(&fail_sync, 0);
    int result = error ? -1 : __real_fdatasync(fd);
    errno = error ? error : errno;
    note(SYNC_ENDED, 0, (uint64_t)pthread_self());
    return result;
}

static _Thread_local struct uring *own;     /* of an I/O thread */

int __real_uring_enter(struct uring *uring, unsigned wait, uint64_t timeout_ns);
int __wrap_uring_enter(struct uring *uring, unsigned wait, uint64_t timeout_ns);
int __wrap_uring_enter(struct uring *uring, unsigned wait, uint64_t timeout_ns)
{
    own = uring;
    return __real_uring_enter(uring, wait, timeout_ns);
}

/* The next completion of io_uring, before it is looked at.  More than once, perhaps. */
static void note_completion(const struct uring *uring)
{
    uint32_t head = *uring->cq_head;
    if (head == uring_load(uring->cq_ktail))
        return;
    uint64_t user_data = uring->cqes[head & uring->cq_mask].user_data;
    const struct operation *operation = (const struct operation *)(uintptr_t)user_data;
    if (!operation || user_data & 3)        /* it is no operation's */
        return;
    if (operation->kind == WRITE && operation->fd == store)
        note(DATA, operation->position, operation->position + operation->length);
    if (operation->kind == SYNC)
        note(SYNC_ENDED, 0, 0);
}

/* With one ring, there is one sync at a time. */
static void note_place(unsigned place)
{
    if (place == COPY_SYNC && engine == XBD_ENGINE_URING)
        note(SYNC_BEGAN, 0, 0);
    if (place == KERNEL_REAP && own)
        note_completion(own);
}

static bool is_written(uint64_t place, unsigned before)
{
    for (unsigned at = before; at--;)       /* neighbours are written together */
        if (calls[at].call == DATA && calls[at].place <= place && place + UNIT <= calls[at].end)
            return true;
    return false;
}

/* Every entry names what was written before a sync began that ended before the entry was made. */
static void expect_order(void)
{
    unsigned number = atomic_load(&nr_calls);
    CHECK(number < sizeof(calls) / sizeof(*calls));
    for (unsigned entry = 0; entry < number; entry++) {
        bool durable = calls[entry].call != ENTRY;
        for (unsigned ended = entry; ended-- && !durable;) {
            if (calls[ended].call != SYNC_ENDED)
                continue;
            unsigned began = ended;
            while (began && (calls[began].call != SYNC_BEGAN || calls[began].end != calls[ended].end))
                began--;
            durable = is_written(calls[entry].place, began);
        }
        CHECK(durable);
    }
}

/* -- the driver ---------------------------------------------------------------------------------------- */

static uint64_t new_place(void)
{
    CHECK(next_place + 1 < MOST_PLACES);
    return ++next_place << SHIFT;
}

static void use(uint64_t place)
{
    CHECK(place && place >> SHIFT < MOST_PLACES && !used[place >> SHIFT]);      /* else two have one place */
    used[place >> SHIFT] = true;
}

static void supply(unsigned number)
{
    uint64_t places[SUPPLY];
    for (unsigned i = 0; i < number; i++)
        places[i] = new_place();
    CHECK(xbd_claims_supply(bed.claims, places, number) == number);
}

static void lend(void)
{
    xbd_claims_lend(bed.claims, 0, (uint64_t *)(uintptr_t)entries, UNITS, 0);
}

static void know_base(void)
{
    CHECK(xbd_extents_put(bed.extents, false, 0, SIZE, bed.files[0], 0));
}

static uint64_t in_file(uint64_t unit)
{
    uint64_t word;
    CHECK(pread(table, &word, sizeof(word), (off_t)(unit * sizeof(word))) == sizeof(word));
    return be64toh(word);
}

static void enter(uint64_t unit, uint64_t place)
{
    uint64_t word = htobe64(place | BITS);
    CHECK(__real_pwrite(table, &word, sizeof(word), (off_t)(unit * sizeof(word))) == sizeof(word));
    atomic_store(&entries[unit], place | BITS);
}

/* The driver does it by itself, as if for a request of its own. */
static void place_by_driver(uint64_t unit)
{
    static uint8_t bytes[UNIT];
    xbd_claims_take_back(bed.claims, 0);
    if (atomic_load(&entries[unit]))
        return;
    uint64_t place = new_place();
    bed_file_read(&bed, 0, unit << SHIFT, bytes, UNIT);
    CHECK(__real_pwrite(store, bytes, UNIT, (off_t)place) == UNIT);
    enter(unit, place);
    xbd_extents_forget(bed.extents, unit << SHIFT, UNIT);
}

static void carry_out(const struct xbd_event *event)
{
    uint64_t at = event->offset;
    for (unsigned i = 0; i < event->nr_buffers; i++) {
        const uint8_t *from = event->buffers[i].start;
        for (uint64_t left = event->buffers[i].length; left;) {
            uint64_t unit = at >> SHIFT;
            uint64_t part = ((unit + 1) << SHIFT) - at < left ? ((unit + 1) << SHIFT) - at : left;
            place_by_driver(unit);
            uint64_t position = (atomic_load(&entries[unit]) & ~BITS) + at % UNIT;
            CHECK(__real_pwrite(store, from, part, (off_t)position) == (ssize_t)part);
            at += part;
            from += part;
            left -= part;
        }
    }
    bed_verdict(&bed, event, XBD_ANSWER, RSP_OKAY);
}

/* -- beginning and end --------------------------------------------------------------------------------- */

static void begin(unsigned rings, unsigned threads, unsigned places)
{
    struct bed_setup setup = {
        .engine = engine, .rings = rings, .threads = threads, .size = SIZE, .entries = 256, .pages = 4096};
    CHECK(bed_open(&bed, &setup));
    store = memfd_create("store", MFD_CLOEXEC);
    table = memfd_create("table", MFD_CLOEXEC);
    CHECK(store >= 0 && table >= 0 && !ftruncate(table, sizeof(entries)));
    CHECK(!ftruncate(store, (off_t)MOST_PLACES << SHIFT));
    memset((void *)(uintptr_t)entries, 0, sizeof(entries));
    memset(used, 0, sizeof(used));
    next_place = 0;
    atomic_store(&nr_calls, 0);
    fill(model, SIZE, 0);
    bed_file_write(&bed, 0, 0, model, SIZE);
    know_base();
    CHECK(xbd_claims_begin(bed.claims, store, table, UNIT, BITS, true, true));
    supply(places);
    lend();
    xbd_connection_start(bed.connection);
}

static void expect_model(void)
{
    static uint8_t bytes[UNIT];
    for (uint64_t unit = 0; unit < UNITS; unit++) {
        uint64_t entry = atomic_load(&entries[unit]);
        CHECK(in_file(unit) == entry);
        if (entry)
            CHECK(pread(store, bytes, UNIT, (off_t)(entry & ~BITS)) == UNIT);
        else
            bed_file_read(&bed, 0, unit << SHIFT, bytes, UNIT);
        CHECK(!memcmp(bytes, model + (unit << SHIFT), UNIT));
    }
}

static void fetch_spoilt(void)
{
    uint64_t some[SUPPLY];
    for (unsigned number; (number = xbd_claims_spoilt(bed.claims, some, SUPPLY));)
        for (atomic_fetch_add(&spoilt, number); number--;)
            use(some[number]);
}

/* Every place is named by an entry, or left, or spoilt, and only one of these. */
static void expect_all_places(void)
{
    uint64_t some[SUPPLY];
    fetch_spoilt();
    for (unsigned number; (number = xbd_claims_end(bed.claims, some, SUPPLY));)
        while (number--)
            use(some[number]);
    for (uint64_t unit = 0; unit < UNITS; unit++)
        if (atomic_load(&entries[unit]))
            use(atomic_load(&entries[unit]) & ~BITS);
    for (uint64_t place = 1; place <= next_place; place++)
        CHECK(used[place]);
}

static void finish(void)
{
    bed_stop(&bed);
    expect_model();
    if (engine == XBD_ENGINE_PREADV || bed.setup.rings == 1)
        expect_order();
    expect_all_places();
    bed_close(&bed);
    close(store);
    close(table);
}

/* Puts a write of whole pages from this sector on. */
static uint64_t put_write(unsigned ring, uint64_t sector, unsigned pages)
{
    static uint64_t stamp = 77;
    struct front_segment segments[256];
    uint32_t page = bed_pages(&bed, pages);
    for (unsigned i = 0; i < pages; i++)
        segments[i] = (struct front_segment){page + i, 0, SECTORS - 1};
    stamp += 4099;
    fill(bed_page(&bed, page), (size_t)pages * PAGE, stamp);
    memcpy(model + sector * SECTOR, bed_page(&bed, page), (size_t)pages * PAGE);
    return pages > 11 ? bed_put_indirect(&bed, ring, OP_WRITE, sector, segments, pages)
                      : bed_put(&bed, ring, OP_WRITE, sector, segments, pages);
}

static void expect_written(uint64_t sector, unsigned pages)
{
    uint64_t id = put_write(0, sector, pages);
    bed_send(&bed, 0);
    CHECK(bed_answer(&bed, 0, id) == RSP_OKAY);
}

/* The write comes up; the driver carries it out. */
static void expect_asked(uint64_t sector)
{
    uint64_t id = put_write(0, sector, 1);
    bed_send(&bed, 0);
    struct xbd_event event = bed_event(&bed, XBD_REQUEST);
    carry_out(&event);
    CHECK(bed_answer(&bed, 0, id) == RSP_OKAY);
}

/* -- tests --------------------------------------------------------------------------------------------- */

static void test_what_is_around_is_copied(void)
{
    static const struct {
        uint64_t sector;
        unsigned pages;
    } writes[] = {
        {3 * UNIT_SECTORS + 40, 1},         /* inside */
        {5 * UNIT_SECTORS, 1},              /* at the beginning */
        {8 * UNIT_SECTORS - SECTORS, 1},    /* at the end */
        {9 * UNIT_SECTORS, 16},             /* all of it */
        {11 * UNIT_SECTORS + 3, 1},         /* pages don't fit */
        {13 * UNIT_SECTORS + 8, 12},        /* more than a little */
        {20 * UNIT_SECTORS + 24, 56},       /* parts of the first and the last of several */
        {30 * UNIT_SECTORS, 48},            /* whole ones */
        {(UNITS - 1) * UNIT_SECTORS + 8, 1},
    };
    begin(1, 1, SUPPLY);
    for (unsigned i = 0; i < sizeof(writes) / sizeof(writes[0]); i++) {
        expect_written(writes[i].sector, writes[i].pages);
        expect_written(writes[i].sector, 1);        /* in place */
    }
    CHECK(!bed_has_event(&bed, XBD_REQUEST));
    finish();
}

static void test_places_that_don_t_follow_each_other(void)
{
    begin(1, 1, 0);
    uint64_t places[] = {5, 3, 4, 9};
    for (unsigned i = 0; i < 4; i++)
        places[i] <<= SHIFT;
    CHECK(xbd_claims_supply(bed.claims, places, 4) == 4);
    expect_written(7 * UNIT_SECTORS + 8, 60);
    CHECK(atomic_load(&entries[7]) == (places[0] | BITS) && atomic_load(&entries[10]) == (places[3] | BITS));
    uint64_t others[] = {1, 2, 6, 7, 8};
    for (unsigned i = 0; i < 5; i++)
        others[i] <<= SHIFT;
    CHECK(xbd_claims_supply(bed.claims, others, 5) == 5);
    next_place = 9;
    finish();
}

/* Many writes to few units: each unit is copied once, and has them all. */
static void test_writes_to_one_unit(void)
{
    uint64_t ids[128];
    begin(1, 1, SUPPLY);
    for (unsigned i = 0; i < 128; i++)
        ids[i] = put_write(0, (i % 8) * UNIT_SECTORS + i / 8 * SECTORS, 1);
    bed_send(&bed, 0);
    for (unsigned i = 0; i < 128; i++)
        CHECK(bed_answer(&bed, 0, ids[i]) == RSP_OKAY);
    CHECK(!bed_has_event(&bed, XBD_REQUEST) && xbd_claims_supplied(bed.claims) == SUPPLY - 8);
    finish();
}

/* What reads as zeroes needs no copy; but where more is copied, they are a part of it. */
static void test_zeroes_behind(void)
{
    static const uint8_t nothing[2 * UNIT];
    begin(1, 1, SUPPLY);
    memset(model + 3 * UNIT, 0, 2 * UNIT);
    bed_file_write(&bed, 0, 3 << SHIFT, nothing, 2 * UNIT);
    CHECK(xbd_extents_put(bed.extents, false, 3 << SHIFT, 5 << SHIFT, XBD_ZEROES, 3 << SHIFT));
    expect_written(3 * UNIT_SECTORS + 8, 1);
    for (unsigned i = 0; i < nr_calls; i++)
        CHECK(calls[i].call != SYNC_BEGAN);
    CHECK(in_file(3) && in_file(3) == atomic_load(&entries[3]));
    expect_written(5 * UNIT_SECTORS - 16, 4);
    CHECK(!bed_has_event(&bed, XBD_REQUEST));
    atomic_store(&nr_calls, 0);             /* what reads as zeroes is entered first */
    finish();
}

/* More than memory is kept for: the rest is the driver's. */
static void test_too_many_at_a_time(void)
{
    uint64_t ids[UNITS - 1];
    begin(1, 1, SUPPLY);
    supply(SUPPLY);
    for (unsigned i = 0; i < UNITS - 1; i += 2)     /* two gaps each, of two units */
        ids[i] = put_write(0, i * UNIT_SECTORS + 64, 12);
    for (unsigned i = 1; i < UNITS - 1; i += 2)
        ids[i] = put_write(0, i * UNIT_SECTORS + 64, 12);
    bed_send(&bed, 0);
    for (unsigned i = 0; i < UNITS - 1; i++)
        CHECK(bed_answer(&bed, 0, ids[i]) == RSP_OKAY);
    finish();
}

static void test_what_nobody_knows_comes_up(void)
{
    begin(1, 1, 2);
    xbd_extents_forget(bed.extents, 3 << SHIFT, UNIT);
    uint64_t id = put_write(0, 3 * UNIT_SECTORS + 8, 1);
    bed_send(&bed, 0);
    struct xbd_event event = bed_event(&bed, XBD_REQUEST);
    CHECK(event.resolvable && xbd_claims_are_free(bed.claims, event.offset, event.length));
    know_base();
    bed_verdict(&bed, &event, XBD_TRY_AGAIN, 0);
    CHECK(bed_answer(&bed, 0, id) == RSP_OKAY);
    CHECK(atomic_load(&entries[3]));
    CHECK(!bed_has_event(&bed, XBD_FEW_PLACES));
    expect_written(10 * UNIT_SECTORS, 1);
    bed_event(&bed, XBD_FEW_PLACES);
    expect_asked(4 * UNIT_SECTORS);                 /* there are no places any more */
    CHECK(!xbd_claims_are_free(bed.claims, 5 << SHIFT, 512));
    supply(2);
    lend();
    CHECK(xbd_claims_are_free(bed.claims, 5 << SHIFT, 512));
    CHECK(!xbd_claims_are_free(bed.claims, 4 << SHIFT, 512));
    CHECK(!xbd_claims_are_free(bed.claims, 5 << SHIFT, 3 << SHIFT));
    CHECK(xbd_claims_pause(bed.claims));
    CHECK(!xbd_claims_are_free(bed.claims, 5 << SHIFT, 512));
    expect_asked(5 * UNIT_SECTORS);
    xbd_claims_resume(bed.claims);
    finish();
}

/* What fails is the driver's, and the place is given back. */
static void test_failures(void)
{
    begin(1, 1, SUPPLY);
    CHECK(xbd_extents_put(bed.extents, false, 2 << SHIFT, 3 << SHIFT, store, SIZE << 30));      /* behind the end */
    uint64_t id = put_write(0, 2 * UNIT_SECTORS + 8, 1);
    bed_send(&bed, 0);
    struct xbd_event event = bed_event(&bed, XBD_REQUEST);
    CHECK(!event.resolvable && !atomic_load(&entries[2]));
    know_base();
    carry_out(&event);
    lend();
    CHECK(bed_answer(&bed, 0, id) == RSP_OKAY);
    expect_written(3 * UNIT_SECTORS + 8, 1);
    if (engine == XBD_ENGINE_PREADV) {              /* where calls can be made to fail */
        atomic_store(&fail_data, EIO);
        expect_asked(4 * UNIT_SECTORS + 8);
        lend();
        atomic_store(&fail_sync, EIO);
        expect_asked(5 * UNIT_SECTORS + 8);
        lend();
        expect_written(6 * UNIT_SECTORS + 8, 1);
    }
    finish();
}

static void be_faster(void)
{
    place_by_driver(3);
    lend();
}

static void take_back(void)
{
    xbd_claims_take_back(bed.claims, 0);
}

static void pause_claims(void)
{
    xbd_claims_pause(bed.claims);
}

/* Something comes between the copy and its entry. */
static void test_what_comes_between(void)
{
    if (engine != XBD_ENGINE_PREADV)
        return;
    begin(1, 1, SUPPLY);
    atomic_store(&while_syncing, be_faster);
    expect_asked(3 * UNIT_SECTORS + 8);             /* nobody has said where it is now */
    lend();
    atomic_store(&while_syncing, take_back);
    expect_asked(4 * UNIT_SECTORS + 8);
    lend();
    atomic_store(&while_syncing, pause_claims);
    expect_asked(5 * UNIT_SECTORS + 8);
    xbd_claims_resume(bed.claims);
    lend();
    expect_written(6 * UNIT_SECTORS + 8, 1);
    finish();
}

static atomic_bool go_on;

static void wait_in_sync(void)
{
    while (!atomic_load(&go_on))
        moment();
}

/* A connection that ends meanwhile waits for it; what was not answered is owed by the next one. */
static void test_the_end_meanwhile(void)
{
    if (engine != XBD_ENGINE_PREADV)
        return;
    begin(1, 1, SUPPLY);
    atomic_store(&go_on, false);
    atomic_store(&while_syncing, wait_in_sync);
    uint64_t id = put_write(0, 3 * UNIT_SECTORS + 8, 1);
    uint64_t follower = put_write(0, 3 * UNIT_SECTORS + 32, 1);
    bed_send(&bed, 0);
    while (atomic_load(&while_syncing))
        moment();
    xbd_connection_settle(bed.connection, 3 << SHIFT, UNIT, 7);
    moment();
    CHECK(!bed_has_event(&bed, XBD_SETTLED));
    xbd_connection_hold(bed.connection);
    xbd_connection_stop(bed.connection);
    moment();
    CHECK(!bed_has_event(&bed, XBD_STOPPED));
    atomic_store(&go_on, true);
    bed_event(&bed, XBD_SETTLED);
    bed_event(&bed, XBD_STOPPED);
    xbd_connection_free(bed.connection);
    bed_connect(&bed);
    xbd_connection_start(bed.connection);
    CHECK(bed_answer(&bed, 0, id) == RSP_OKAY && bed_answer(&bed, 0, follower) == RSP_OKAY);
    finish();
}

/* -- everything at the same time ----------------------------------------------------------------------- */

enum { AT_A_TIME = 48 };

struct write {
    unsigned ring;
    uint64_t id, sector;
    unsigned pages;
    bool under_way;
};

static struct write writes[AT_A_TIME];
static uint64_t dice;

static bool overlaps(uint64_t sector, unsigned pages)
{
    for (unsigned i = 0; i < AT_A_TIME; i++)
        if (writes[i].under_way && writes[i].sector < sector + pages * SECTORS &&
            sector < writes[i].sector + writes[i].pages * SECTORS)
            return true;
    return false;
}

/* A guest's page must not be written to while it is on its way: each slot has its own. */
static bool write_in_slot(unsigned slot)
{
    struct write *write = &writes[slot];
    unsigned pages = one_in(&dice, 4) ? 1 + roll_below(&dice, 40) : 1;
    uint64_t sector = roll_below(&dice, UNITS * UNIT_SECTORS - pages * SECTORS);
    sector -= one_in(&dice, 8) ? 0 : sector % SECTORS;
    if (overlaps(sector, pages))
        return false;
    bed.next_page = bed.setup.rings * ring_pages(256) + slot * 48;
    *write = (struct write){.ring = roll_below(&dice, bed.setup.rings), .sector = sector, .pages = pages, .under_way = true};
    write->id = put_write(write->ring, sector, pages);
    bed_send(&bed, write->ring);
    return true;
}

static void drive(void)
{
    while (bed_has_event(&bed, XBD_REQUEST)) {
        struct xbd_event event = bed_event(&bed, XBD_REQUEST);
        if (event.resolvable && one_in(&dice, 2)) {
            if (xbd_claims_supplied(bed.claims) < SUPPLY)
                supply(SUPPLY);
            lend();
            bed_verdict(&bed, &event, XBD_TRY_AGAIN, 0);
        } else {
            carry_out(&event);
        }
    }
    while (bed_has_event(&bed, XBD_FEW_PLACES)) {
        bed_event(&bed, XBD_FEW_PLACES);
        supply(SUPPLY / 2);
    }
    if (one_in(&dice, 600))
        place_by_driver(roll_below(&dice, UNITS));
    if (one_in(&dice, 40))
        lend();
    if (one_in(&dice, 300)) {
        if (!xbd_claims_pause(bed.claims))
            xbd_claims_wait(bed.claims);
        for (unsigned i = 0; i < 100; i++) {
            uint64_t unit = roll_below(&dice, UNITS);
            CHECK(in_file(unit) == atomic_load(&entries[unit]));
        }
        xbd_claims_resume(bed.claims);
    }
}

/* All units lie in the base again, with what they have now. */
static void begin_anew(void)
{
    static uint8_t bytes[UNIT];
    xbd_claims_take_back(bed.claims, 0);
    xbd_extents_forget(bed.extents, 0, SIZE);
    for (uint64_t unit = 0; unit < UNITS; unit++) {
        uint64_t entry = atomic_load(&entries[unit]), nothing = 0;
        if (!entry)
            continue;
        use(entry & ~BITS);
        CHECK(pread(store, bytes, UNIT, (off_t)(entry & ~BITS)) == UNIT);
        bed_file_write(&bed, 0, unit << SHIFT, bytes, UNIT);
        atomic_store(&entries[unit], 0);
        CHECK(__real_pwrite(table, &nothing, sizeof(nothing), (off_t)(unit * sizeof(nothing))) == sizeof(nothing));
    }
    know_base();
    lend();
}

static void test_everything_at_the_same_time(unsigned rings, unsigned threads, unsigned long wanted)
{
    unsigned long begun = 0, rounds = 0;
    dice = 88172645463325252u;
    memset(writes, 0, sizeof(writes));
    begin(rings, threads, SUPPLY);
    for (bool any = true; any || begun < wanted;) {
        any = false;
        for (unsigned i = 0; i < AT_A_TIME; i++) {
            struct write *write = &writes[i];
            if (!write->under_way && begun < wanted && bed.next_id + 1 < BED_IDS && rounds % 40 < 30)
                begun += write_in_slot(i);
            if (write->under_way && bed_is_answered(&bed, write->ring, write->id)) {
                CHECK(bed.rings[write->ring].answers[write->id].status == RSP_OKAY);
                write->under_way = false;
            }
            any |= write->under_way;
        }
        drive();
        rounds += one_in(&dice, 10);
        if (any)
            continue;
        expect_model();
        if (rings == 1)
            expect_order();
        fetch_spoilt();
        begin_anew();
        for (unsigned i = 0; i < rings; i++)
            memset(bed.rings[i].answered, 0, sizeof(bed.rings[i].answered));
        bed.next_id = 0;
        atomic_store(&nr_calls, 0);
        rounds += 10;
    }
    finish();
}

static void run_all(unsigned long wanted)
{
    test_what_is_around_is_copied();
    test_places_that_don_t_follow_each_other();
    test_writes_to_one_unit();
    test_zeroes_behind();
    test_too_many_at_a_time();
    test_what_nobody_knows_comes_up();
    test_failures();
    test_what_comes_between();
    test_the_end_meanwhile();
    test_everything_at_the_same_time(1, 1, wanted);
    test_everything_at_the_same_time(3, 2, wanted);
}

int main(int argc, char **argv)
{
    unsigned long wanted = argc > 1 ? strtoul(argv[1], NULL, 10) : 20000;
    delays_seed(1);
    delays_hook(note_place);
    engine = XBD_ENGINE_PREADV;
    run_all(wanted);
    engine = XBD_ENGINE_URING;
    xbd_threads *threads = xbd_threads_start(1, 0, engine);
    if (threads) {
        xbd_threads_stop(threads);
        run_all(wanted);
    }
    printf("%lu writes, %s: %lu units copied, %lu in vain\n", wanted,
           threads ? "with both engines" : "without io_uring", atomic_load(&entered), atomic_load(&spoilt));
    return entered > wanted / 50 && spoilt ? 0 : 1;
}
