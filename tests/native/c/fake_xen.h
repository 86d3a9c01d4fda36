/*
 * What libxengnttab and libxenevtchn are to the library, without Xen: grants of a test's guest, mapped where and
 * as far as it grants them, and event channels that are masked when they were seen.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "front.h"

struct fake_gnttab {
    struct guest_memory *memory;
    atomic_long mapped;                 /* pages */
    atomic_uint map_calls;
    atomic_bool refuse_maps;            /* whatever the guest grants */
};

struct fake_evtchn {
    pthread_mutex_t lock;
    int fd;                             /* readable while an event is pending that is not masked */
    int to_guest;
    uint32_t port;
    bool pending, masked;
};

/* Sets a domain's handle and calls. */
void fake_gnttab_describe(struct fake_gnttab *gnttab, struct xbd_domain *domain);

void fake_evtchn_open(struct fake_evtchn *evtchn, uint32_t port, int to_guest);
void fake_evtchn_close(struct fake_evtchn *evtchn);
void fake_evtchn_describe(struct fake_evtchn *evtchn, struct xbd_channel *channel);
/* What the guest's notification does. */
void fake_evtchn_kick(struct fake_evtchn *evtchn);
