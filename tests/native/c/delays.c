/*
 * Delays at chance; see delays.h.
 *
 * A thread keeps to one way of delaying for a while, then takes up another: what is spread evenly over all places
 * seldom meets anything, while one place that is slow for some time, beside a side that is fast, does.
 *
 * One way is to leave many stores behind that miss the cache: the next store, such as an index, waits for them in
 * the processor's store buffer while later loads are done already.  That is the reordering which x86 does, and
 * which the two fences of the protocol are there to prevent.
 */
#define _GNU_SOURCE
#include "delays.h"

#include <sched.h>
#include <stdbool.h>
#include <sys/resource.h>
#include <time.h>

#include "check.h"

static _Atomic uint64_t seeds = 88172645463325252u;
static _Atomic uint64_t nobody;
static _Atomic uint64_t *_Atomic counted = &nobody;
static void (*_Atomic hooked)(unsigned place);

void delays_seed(uint64_t seed)
{
    atomic_store(&seeds, seed * UINT64_C(0x9e3779b97f4a7c15) | 1);
}

void delays_hook(void (*hook)(unsigned place))
{
    atomic_store(&hooked, hook);
}

void delays_count_sleeps(_Atomic uint64_t *sleeps)
{
    atomic_store(&counted, sleeps);
}

/* -- sleeps -------------------------------------------------------------------------------------------- */

static long switches(void)
{
    struct rusage usage;
    CHECK(!getrusage(RUSAGE_THREAD, &usage));
    return usage.ru_nvcsw;
}

long sleep_began(void)
{
    return switches();
}

void sleep_ended(long began, _Atomic uint64_t *sleeps)
{
    if (switches() != began)
        atomic_fetch_add_explicit(sleeps, 1, memory_order_relaxed);
}

/* -- ways of delaying ---------------------------------------------------------------------------------- */

enum {
    POINTS_PER_MOOD = 256,
    LINES = 1 << 18,                    /* 16 MiB: more than the caches that are near */
    LINE_WORDS = 8,
    MOST_STORES = 56,                   /* what a store buffer holds, more or less */
};

enum mood { CALM, MIXED, FOCUSED, PRESSED, MOODS };

struct delayed {
    uint64_t dice;
    enum mood mood;
    unsigned points;                    /* until the mood changes */
    unsigned place;                     /* of FOCUSED */
    unsigned how;
    long began;                         /* of a sleep */
    bool napped;                        /* since then */
};

static _Atomic uint64_t lines[LINES * LINE_WORDS];
static _Thread_local struct delayed me;

static void pause_for(unsigned loops)
{
    for (unsigned i = 0; i < loops; i++) {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#else
        atomic_signal_fence(memory_order_seq_cst);
#endif
    }
}

static void leave_stores_behind(unsigned number)
{
    for (unsigned i = 0; i < number; i++)
        atomic_store_explicit(&lines[roll_below(&me.dice, LINES) * LINE_WORDS], i, memory_order_relaxed);
}

static void nap(void)
{
    struct timespec moment = {.tv_nsec = roll_below(&me.dice, 30000)};
    nanosleep(&moment, NULL);
    me.napped = true;
}

static void delay_somehow(unsigned how)
{
    if (how < 32)
        pause_for(roll_below(&me.dice, 48));
    else if (how < 56)
        leave_stores_behind(roll_below(&me.dice, MOST_STORES));
    else if (how < 63)
        sched_yield();
    else if (one_in(&me.dice, 32))
        nap();
}

static void delay_here(void)
{
    switch (me.how) {
    case 0:
        pause_for(roll_below(&me.dice, 300));
        break;
    case 1:
        sched_yield();
        break;
    default:
        leave_stores_behind(MOST_STORES);
    }
}

static void change_mood(void)
{
    if (!me.dice)
        me.dice = atomic_fetch_add(&seeds, UINT64_C(0x9e3779b97f4a7c16)) | 1;
    me.points = 1 + roll_below(&me.dice, 2 * POINTS_PER_MOOD);
    me.mood = roll_below(&me.dice, MOODS);
    me.place = roll_below(&me.dice, PLACES);
    me.how = roll_below(&me.dice, 3);
}

static void idle(unsigned place)
{
    if (!me.points)
        change_mood();
    me.points--;
    switch (me.mood) {
    case MIXED:
        if (roll(&me.dice) >> 63)
            delay_somehow(roll_below(&me.dice, 64));
        break;
    case FOCUSED:
        if (place == me.place)
            delay_here();
        break;
    case PRESSED:
        if (place == RING_ARM || place == RING_PUSH || place == MAIL_POST || place == SLEEP_SAY ||
            place == GUEST_PUSH || place == GUEST_ARM || place == EXTENTS_CHANGE)
            leave_stores_behind(MOST_STORES);
        break;
    default:
        break;
    }
}

void stress_point(unsigned place)
{
    void (*hook)(unsigned) = atomic_load_explicit(&hooked, memory_order_relaxed);
    if (hook)
        hook(place);
    if (place == SLEEP_END && !me.napped)
        sleep_ended(me.began, atomic_load_explicit(&counted, memory_order_relaxed));
    idle(place);
    /* Not at SLEEP_BEGIN: a system call there would do a fence's work. */
    if (place == SLEEP_CHECK) {
        me.began = sleep_began();
        me.napped = false;
    }
}
