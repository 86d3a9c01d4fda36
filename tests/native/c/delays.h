/*
 * Delays at chance, at the STRESS_POINTs of the library (stress.h) and at those of the tests' own guest; nothing
 * where the tests are built without XBD_STRESS.
 */
#pragma once

#include <stdatomic.h>
#include <stdint.h>

#ifdef XBD_STRESS

#include "stress.h"

enum guest_place {
    GUEST_PUSH = STRESS_PLACES,
    GUEST_PUSHED,
    GUEST_PUSH_LOOK,
    GUEST_LOOK,
    GUEST_TAKE,
    GUEST_ARM,
    GUEST_ARMED,
    GUEST_ARM_LOOK,
    GUEST_SEND,
    GUEST_SLEEP,
    GUEST_WOKEN,
    UPCALL_SLEEP,
    UPCALL_WOKEN,
    UPCALL_READ,
    PLACES
};

#define delay(place) stress_point(place)

#else

#define delay(place) ((void)0)

#endif

/* Of all threads of the process from now on. */
void delays_seed(uint64_t seed);
/* Called at every point, by whoever comes there; NULL: nothing. */
void delays_hook(void (*hook)(unsigned place));
/* Where the I/O threads' sleeps are counted: times that one called the kernel to wait and was taken off the
 * processor, because there was nothing yet. */
void delays_count_sleeps(_Atomic uint64_t *sleeps);
/* The same for a call that a test makes itself: what sleep_began returned is for sleep_ended. */
long sleep_began(void);
void sleep_ended(long began, _Atomic uint64_t *sleeps);
