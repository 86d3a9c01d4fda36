/*
 * The stress test's processes share this: what they are to do, how far they are, and who sleeps.
 *
 * A guest (stress_guest.c) and a backend (stress_backend.c) are processes of their own, with the guest's memory
 * between them as on an embedded host.  The guest sends requests in every rhythm and sleeps in poll(2) by the
 * protocol's rules; the backend is the whole library, with a thread for what Python does elsewhere.  Everybody is
 * delayed at chance at each point where the order matters (delays.h).
 */
#pragma once

#include <time.h>

#include "check.h"
#include "front.h"

enum {
    MOST_STRESS_RINGS = 20,
    SLOT_PAGES = 4,                     /* data pages of each place in a ring */
    SLOT_SECTORS = SLOT_PAGES * SECTORS_PER_PAGE,
    UNIT = 8192,                        /* of the disk: what lies in one piece, and moves as one */
    HOMES = 2,                          /* files, in either of which a unit may lie */
    POISON = 0xee,                      /* where nothing lies any more */
};

struct scenario {
    enum xbd_engine engine;
    unsigned spin_us;
    unsigned threads;
    unsigned rings;
    uint32_t entries;
    unsigned abi;
    enum xbd_pages_mode mode;
    uint32_t depth;                     /* most requests that a guest has in flight in a ring */
    long budget;                        /* pages; 0: plenty */
    unsigned flushes;                   /* so many of 64 requests: each goes up */
    bool apart;                         /* guest and backend have processors of their own, if there are two */
    bool changes;                       /* where bytes lie, and the connection itself: else nothing goes up */
};

struct ring_state {
    _Atomic uint64_t answered;
    _Atomic uint32_t in_flight;         /* the guest's */
    _Atomic uint32_t rsp_cons, rsp_event;
    atomic_bool guest_sleeps;
};

struct tally {
    _Atomic uint64_t guest, io, upcalls;        /* sleeps */
    _Atomic uint64_t requests, asked, lives, moves;
};

struct world {
    struct scenario scenario;
    uint64_t seed;
    uint64_t wanted_sleeps;
    unsigned seconds;                   /* enough after so many; 0: there is no end */
    unsigned stuck_seconds;             /* who sleeps so long with something to do was not woken */
    struct guest_memory memory;
    int homes[HOMES];
    int to_backend[MOST_STRESS_RINGS], to_guest[MOST_STRESS_RINGS];
    atomic_bool enough;                 /* the guest is to come to its end */
    atomic_uint guests;                 /* threads that have not yet */
    struct tally tally;
    struct ring_state rings[MOST_STRESS_RINGS];
};

static inline uint64_t all_sleeps(struct tally *tally)
{
    return atomic_load(&tally->guest) + atomic_load(&tally->io) + atomic_load(&tally->upcalls);
}

static inline uint32_t pages_per_ring(const struct scenario *scenario)
{
    return ring_pages(scenario->entries) + scenario->entries * (SLOT_PAGES + 1);
}

static inline uint32_t first_page(const struct scenario *scenario, unsigned ring)
{
    return ring * pages_per_ring(scenario);
}

static inline uint64_t ring_disk_bytes(const struct scenario *scenario)
{
    return (uint64_t)scenario->entries * SLOT_SECTORS * SECTOR;
}

static inline uint64_t disk_bytes(const struct scenario *scenario)
{
    return scenario->rings * ring_disk_bytes(scenario);
}

static inline void sleep_ns(long ns)
{
    struct timespec moment = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
    nanosleep(&moment, NULL);
}

/* Both end their process: with status 0, or with 1 and a message after something was found. */
_Noreturn void run_guest(struct world *world);
_Noreturn void run_backend(struct world *world);
