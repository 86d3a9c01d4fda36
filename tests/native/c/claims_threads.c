/*
 * Claims with three threads that take places and a driver that lends, takes back, pauses and frees.
 *
 *     claims_threads [N]          until each of them has taken places so many times
 *
 * No place is ever used twice, so that an entry tells which claim made it.  Whoever sees an entry in memory, or among
 * the extents, finds it in the file, until the driver frees it; and the driver sees nothing change where nobody may
 * change anything.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "api_types.h"
#include "check.h"

enum { TABLES = 6, ENTRIES = 64, UNITS = TABLES * ENTRIES, TAKERS = 3, SHIFT = 16, MOST = 5, SUPPLY = 64, FD = 77 };

#define BITS ((uint64_t)1 << 63)
#define UNIT ((uint64_t)1 << SHIFT)

static xbd_extents *extents;
static xbd_claims *claims;
static int file;                            /* all tables, one after the other */
static _Atomic uint64_t entries[UNITS];     /* the driver's memory */
static uint64_t before[UNITS];
static atomic_bool stop;
static unsigned long wanted;
static uint8_t *used;                       /* by place, counted */
static uint64_t supplied, most_places;

struct taker {
    pthread_t thread;
    uint64_t dice;
    unsigned long taken, refused;
};

static uint64_t in_file(uint64_t unit)
{
    uint64_t word;
    CHECK(pread(file, &word, sizeof(word), (off_t)(unit * sizeof(word))) == sizeof(word));
    return be64toh(word);
}

static uint64_t known(uint64_t unit)
{
    struct xbd_piece piece;
    if (xbd_extents_find(extents, true, unit << SHIFT, UNIT, &piece, 1) != 1)
        return 0;
    CHECK(piece.fd == FD && piece.length == UNIT);
    return piece.position;
}

/* The driver frees in the opposite order: extents, memory, file. */
static void look_at(uint64_t unit)
{
    uint64_t place = known(unit);
    uint64_t entry = atomic_load(&entries[unit]);
    if (entry) {
        uint64_t written = in_file(unit);
        CHECK(written == entry || atomic_load(&entries[unit]) != entry);
    }
    if (place)
        CHECK(entry == (place | BITS) || known(unit) != place);
}

static void *take_all(void *argument)
{
    struct taker *taker = argument;
    while (taker->taken < wanted) {
        uint64_t first = roll(&taker->dice) % UNITS;
        uint64_t number = 1 + roll(&taker->dice) % MOST;
        if (number > UNITS - first)
            number = UNITS - first;
        bool taken = xbd_claims_take(claims, (first << SHIFT) + 512, (number << SHIFT) - 1024);
        taker->taken += taken;
        taker->refused += !taken;
        for (uint64_t unit = first; unit < first + number; unit++)
            look_at(unit);
    }
    return NULL;
}

/* -- the driver ---------------------------------------------------------------------------------------- */

static void supply(void)
{
    uint64_t places[SUPPLY];
    unsigned number = 0;
    if (xbd_claims_supplied(claims) > SUPPLY)
        return;
    for (; number < SUPPLY && supplied + number + 1 < most_places; number++)
        places[number] = (supplied + number + 1) << SHIFT;
    supplied += xbd_claims_supply(claims, places, number);
}

static void lend(uint64_t table)
{
    uint64_t first = table * ENTRIES;
    xbd_claims_lend(claims, first << SHIFT, (uint64_t *)(uintptr_t)&entries[first], ENTRIES, first * sizeof(uint64_t));
}

static void note_use(uint64_t entry)
{
    uint64_t number = (entry & ~BITS) >> SHIFT;
    CHECK(entry & BITS && number > 0 && number <= supplied);
    CHECK(!used[number]);                   /* else two units have one place */
    used[number] = 1;
}

/* Some of a table that is not lent become free. */
static void free_some(uint64_t table, uint64_t *dice)
{
    for (uint64_t unit = table * ENTRIES; unit < (table + 1) * ENTRIES; unit++) {
        uint64_t entry = atomic_load(&entries[unit]);
        uint64_t nothing = 0;
        CHECK(in_file(unit) == entry);
        if (!entry || one_in(dice, 4))
            continue;
        note_use(entry);
        xbd_extents_forget(extents, unit << SHIFT, UNIT);
        atomic_store(&entries[unit], 0);
        CHECK(pwrite(file, &nothing, sizeof(nothing), (off_t)(unit * sizeof(nothing))) == sizeof(nothing));
    }
}

static void see_that_nothing_changes(uint64_t first, uint64_t number, uint64_t *dice)
{
    for (uint64_t unit = first; unit < first + number; unit++)
        before[unit] = atomic_load(&entries[unit]);
    for (uint64_t again = roll(dice) % 2000; again; again--) {
        uint64_t unit = first + roll(dice) % number;
        CHECK(atomic_load(&entries[unit]) == before[unit] && in_file(unit) == before[unit]);
    }
}

static void *drive(void *argument)
{
    uint64_t dice = 88172645463325252u;
    (void)argument;
    while (!atomic_load(&stop)) {
        uint64_t table = roll(&dice) % TABLES;
        supply();
        if (one_in(&dice, 6)) {
            if (!xbd_claims_pause(claims))
                xbd_claims_wait(claims);
            see_that_nothing_changes(0, UNITS, &dice);
            xbd_claims_resume(claims);
            continue;
        }
        xbd_claims_take_back(claims, (table * ENTRIES + roll(&dice) % ENTRIES) << SHIFT);
        if (one_in(&dice, 4))
            see_that_nothing_changes(table * ENTRIES, ENTRIES, &dice);
        free_some(table, &dice);
        lend(table);
    }
    return NULL;
}

static void check_the_end(void)
{
    uint64_t left[SUPPLY];
    uint64_t number = 0;
    for (unsigned some; (some = xbd_claims_end(claims, left, SUPPLY));)
        for (number += some; some--;)
            note_use(left[some] | BITS);
    CHECK(!xbd_claims_take(claims, 0, UNIT));   /* nothing is lent any more */
    for (uint64_t unit = 0; unit < UNITS; unit++) {
        uint64_t entry = atomic_load(&entries[unit]);
        CHECK(in_file(unit) == entry);
        CHECK(known(unit) == (entry & ~BITS));
        if (entry)
            note_use(entry);
    }
    for (uint64_t place = 1; place <= supplied; place++)
        CHECK(used[place]);                 /* else it was lost */
    printf("%lu places, %lu of them left", (unsigned long)supplied, (unsigned long)number);
}

int main(int argc, char **argv)
{
    struct taker takers[TAKERS];
    pthread_t driver;
    unsigned long refused = 0;
    wanted = argc > 1 ? strtoul(argv[1], NULL, 10) : 100000;
    most_places = wanted * TAKERS * MOST + 2 * SUPPLY;
    used = calloc(most_places + 1, 1);
    file = memfd_create("tables", 0);
    extents = xbd_extents_new();
    claims = extents ? xbd_claims_new(extents) : NULL;
    if (!used || file < 0 || !claims || ftruncate(file, sizeof(entries)))
        return 2;
    CHECK(!xbd_claims_take(claims, 0, UNIT));   /* nothing was lent yet */
    CHECK(xbd_claims_begin(claims, FD, file, UNIT, BITS, false, false));
    if (pthread_create(&driver, NULL, drive, NULL))
        return 2;
    for (unsigned i = 0; i < TAKERS; i++) {
        takers[i] = (struct taker){.dice = i + 1};
        if (pthread_create(&takers[i].thread, NULL, take_all, &takers[i]))
            return 2;
    }
    for (unsigned i = 0; i < TAKERS; i++) {
        pthread_join(takers[i].thread, NULL);
        refused += takers[i].refused;
    }
    atomic_store(&stop, true);
    pthread_join(driver, NULL);
    check_the_end();
    printf("; %lu times refused\n", refused);
    xbd_claims_free(claims);
    xbd_extents_free(extents);
    free(used);
    close(file);
    return refused ? 0 : 1;
}
