/*
 * Xen's libraries, without Xen; see fake_xen.h.
 */
#define _GNU_SOURCE
#include "fake_xen.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "domain.h"

enum { COPY_FROM_GUEST = 1, COPY_TO_GUEST = 2 };
enum { BAD_GNTREF = -3, PERMISSION = -8 };

/* -- grants -------------------------------------------------------------------------------------------- */

static bool permitted(const struct guest_memory *memory, uint32_t ref, bool writable)
{
    if (ref >= memory->pages)
        return false;
    uint64_t how = atomic_load(&memory->table[ref]);
    return how == GRANTED || (how == GRANTED_READONLY && !writable);
}

/* xengnttab_map_domain_grant_refs: all of them side by side, or none. */
static void *map(void *handle, uint32_t count, uint32_t domid, uint32_t *refs, int prot)
{
    struct fake_gnttab *gnttab = handle;
    CHECK(domid == 7 && count);
    atomic_fetch_add(&gnttab->map_calls, 1);
    for (uint32_t i = 0; i < count; i++)
        if (atomic_load(&gnttab->refuse_maps) || !permitted(gnttab->memory, refs[i], prot & PROT_WRITE)) {
            errno = EINVAL;
            return NULL;
        }
    char *start = mmap(NULL, (size_t)count * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(start != MAP_FAILED);
    for (uint32_t i = 0; i < count; i++)
        CHECK(mmap(start + (size_t)i * PAGE, PAGE, prot, MAP_SHARED | MAP_FIXED, gnttab->memory->fd,
                   (off_t)refs[i] * PAGE) != MAP_FAILED);
    atomic_fetch_add(&gnttab->mapped, count);
    return start;
}

static int unmap(void *handle, void *start, uint32_t count)
{
    struct fake_gnttab *gnttab = handle;
    CHECK(start && count && !munmap(start, (size_t)count * PAGE));
    CHECK(atomic_fetch_sub(&gnttab->mapped, count) >= (long)count);
    return 0;
}

static int16_t copy_one(struct fake_gnttab *gnttab, const struct grant_copy *copy)
{
    bool to_guest = copy->flags == COPY_TO_GUEST;
    const union grant_place *theirs = to_guest ? &copy->dest : &copy->source;
    CHECK(to_guest || copy->flags == COPY_FROM_GUEST);
    CHECK(theirs->theirs.domid == 7 && theirs->theirs.offset + copy->length <= PAGE);
    if (theirs->theirs.ref >= gnttab->memory->pages)
        return BAD_GNTREF;
    if (!permitted(gnttab->memory, theirs->theirs.ref, to_guest))
        return PERMISSION;
    size_t at = (size_t)theirs->theirs.ref * PAGE + theirs->theirs.offset;
    if (to_guest)
        memcpy(gnttab->memory->writable + at, copy->source.ours, copy->length);
    else
        memcpy(copy->dest.ours, gnttab->memory->readable + at, copy->length);
    return 0;
}

static int copy_all(void *handle, uint32_t count, struct grant_copy *copies)
{
    for (uint32_t i = 0; i < count; i++)
        copies[i].status = copy_one(handle, &copies[i]);
    return 0;
}

void fake_gnttab_describe(struct fake_gnttab *gnttab, struct xbd_domain *domain)
{
    domain->gnttab = gnttab;
    domain->map = (void *)(uintptr_t)map;
    domain->unmap = (void *)(uintptr_t)unmap;
    domain->copy = (void *)(uintptr_t)copy_all;
}

/* -- event channels ------------------------------------------------------------------------------------ */

static void make_readable(const struct fake_evtchn *evtchn)
{
    static const uint64_t one = 1;
    CHECK(write(evtchn->fd, &one, sizeof(one)) == sizeof(one));
}

/* xenevtchn_pending: the port, which is masked now; or -1. */
static int take_pending(void *handle)
{
    struct fake_evtchn *evtchn = handle;
    uint64_t events;
    int port = -1;
    pthread_mutex_lock(&evtchn->lock);
    if (evtchn->pending && !evtchn->masked) {
        CHECK(read(evtchn->fd, &events, sizeof(events)) == sizeof(events));
        evtchn->pending = false;
        evtchn->masked = true;
        port = (int)evtchn->port;
    }
    pthread_mutex_unlock(&evtchn->lock);
    return port;
}

static int unmask(void *handle, uint32_t port)
{
    struct fake_evtchn *evtchn = handle;
    pthread_mutex_lock(&evtchn->lock);
    CHECK(port == evtchn->port && evtchn->masked);
    evtchn->masked = false;
    if (evtchn->pending)
        make_readable(evtchn);
    pthread_mutex_unlock(&evtchn->lock);
    return 0;
}

static int notify(void *handle, uint32_t port)
{
    static const uint64_t one = 1;
    struct fake_evtchn *evtchn = handle;
    CHECK(port == evtchn->port);
    CHECK(write(evtchn->to_guest, &one, sizeof(one)) == sizeof(one));
    return 0;
}

void fake_evtchn_open(struct fake_evtchn *evtchn, uint32_t port, int to_guest)
{
    *evtchn = (struct fake_evtchn){.port = port, .to_guest = to_guest, .fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    CHECK(evtchn->fd >= 0);
    pthread_mutex_init(&evtchn->lock, NULL);
}

void fake_evtchn_close(struct fake_evtchn *evtchn)
{
    pthread_mutex_destroy(&evtchn->lock);
    close(evtchn->fd);
}

void fake_evtchn_describe(struct fake_evtchn *evtchn, struct xbd_channel *channel)
{
    *channel = (struct xbd_channel){
        .fd = evtchn->fd,
        .notify_fd = -1,
        .port = evtchn->port,
        .handle = evtchn,
        .pending = (void *)(uintptr_t)take_pending,
        .unmask = (void *)(uintptr_t)unmask,
        .notify = (void *)(uintptr_t)notify,
    };
}

void fake_evtchn_kick(struct fake_evtchn *evtchn)
{
    pthread_mutex_lock(&evtchn->lock);
    if (!evtchn->pending) {
        evtchn->pending = true;
        if (!evtchn->masked)
            make_readable(evtchn);
    }
    pthread_mutex_unlock(&evtchn->lock);
}
