/*
 * The extent cache with one thread that changes it and three that look things up.
 *
 *     extents_threads [N]         until each of them has found something so many times
 *
 * Each place of the disk is put again and again, each time elsewhere: where it is found tells when it was put.
 * That must not be before the last time that it was forgotten when the look-up began, nor after it ended.
 * Places are many enough for the bounds of pages and of the table to be met, and for finer chunks.
 */
#include "extents.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "check.h"

enum { PLACES = 9000, IN_TABLE = 3000, READERS = 3, BLOCK = 4096, UNIT = 128 * 1024 };

static xbd_extents *extents;
static _Atomic uint64_t floors[PLACES];     /* the least version that may be found */
static _Atomic uint64_t newest[PLACES];     /* the greatest */
static _Atomic uint64_t changing;           /* the place that the writer is at */
static atomic_bool stop;
static unsigned long wanted_hits;

struct reader {
    pthread_t thread;
    struct hint hint;
    uint64_t dice;
    unsigned long hits, hinted, misses;
};

/* Chunks in a page each, or what is smaller than a chunk. */
static uint64_t place_start(uint64_t place)
{
    return (place << 25) + (place < IN_TABLE ? BLOCK : 0);
}

static uint64_t place_length(uint64_t place)
{
    return place < IN_TABLE ? 2 * BLOCK : UNIT;
}

static void complain(const char *what, uint64_t place, uint64_t version)
{
    fprintf(stderr, "%s: place %lu, version %lu\n", what, (unsigned long)place, (unsigned long)version);
    abort();
}

static void look_up(struct reader *reader, uint64_t place)
{
    struct xbd_piece piece = {0};
    uint64_t length = place_length(place);
    uint64_t inside = roll(&reader->dice) % 3 ? roll(&reader->dice) % (length / BLOCK) * BLOCK : 0;
    uint64_t size = inside ? BLOCK : length;
    uint64_t least = atomic_load(&floors[place]);
    uint64_t offset = place_start(place) + inside;
    bool hinted = hint_has(&reader->hint, offset, size, &piece);
    unsigned count = hinted ? 1 : hint_find(&reader->hint, extents, false, offset, size, &piece, 1);
    reader->hinted += hinted;
    uint64_t most = atomic_load(&newest[place]);
    if (!count) {
        reader->misses++;
        sched_yield();                  /* the writer has to get on */
        return;
    }
    uint64_t version = piece.position / UNIT / PLACES;
    if (piece.position != (version * PLACES + place) * UNIT + inside || piece.length != size || piece.fd != 3)
        complain("something else was found", place, version);
    if (version < least)
        complain("what was forgotten was found", place, version);
    if (version > most)
        complain("what was never put was found", place, version);
    reader->hits++;
}

static void *read_all(void *argument)
{
    struct reader *reader = argument;
    while (reader->hits < wanted_hits) {
        uint64_t place = one_in(&reader->dice, 2) ? atomic_load(&changing) : roll(&reader->dice) % PLACES;
        for (uint64_t again = roll(&reader->dice) % 3; again; again--)
            look_up(reader, place);
        look_up(reader, place);
    }
    return NULL;
}

static void change(uint64_t *dice)
{
    uint64_t place = roll(dice) % PLACES;
    uint64_t start = place_start(place);
    atomic_store(&changing, place);
    if (roll(dice) % 4 == 0) {
        uint64_t version = atomic_load(&newest[place]);
        if (!xbd_extents_forget(extents, start, place_length(place)) && version > atomic_load(&floors[place]))
            complain("forgotten in silence", place, version);
        atomic_store(&floors[place], version + 1);
    } else {
        uint64_t version = atomic_fetch_add(&newest[place], 1) + 1;
        if (!xbd_extents_put(extents, false, start, start + place_length(place), 3, (version * PLACES + place) * UNIT))
            complain("not kept", place, version);
    }
}

static void *write_all(void *argument)
{
    uint64_t dice = 88172645463325252u;
    (void)argument;
    while (!atomic_load(&stop))
        change(&dice);
    return NULL;
}

int main(int argc, char **argv)
{
    struct reader readers[READERS];
    pthread_t writer;
    unsigned long hits = 0;
    unsigned long hinted = 0;
    unsigned long misses = 0;
    wanted_hits = argc > 1 ? strtoul(argv[1], NULL, 10) : 1000000;
    extents = xbd_extents_new();
    if (!extents || pthread_create(&writer, NULL, write_all, NULL))
        return 2;
    for (unsigned i = 0; i < READERS; i++) {
        readers[i] = (struct reader){.dice = i + 1};
        hint_init(&readers[i].hint, extents, false);
        if (pthread_create(&readers[i].thread, NULL, read_all, &readers[i]))
            return 2;
    }
    for (unsigned i = 0; i < READERS; i++) {
        pthread_join(readers[i].thread, NULL);
        hits += readers[i].hits;
        hinted += readers[i].hinted;
        misses += readers[i].misses;
    }
    atomic_store(&stop, true);
    pthread_join(writer, NULL);
    printf("%lu found, %lu of them by hints, %lu not, chunks of %lu\n", hits, hinted, misses,
           (unsigned long)xbd_extents_chunk(extents, false));
    xbd_extents_free(extents);
    return hinted ? 0 : 1;
}
