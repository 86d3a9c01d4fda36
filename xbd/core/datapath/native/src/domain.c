/*
 * The calls of the hypervisor; see domain.h.
 */
#include "domain.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>

enum { COPY_FROM_GUEST = 1, COPY_TO_GUEST = 2 };        /* GNTCOPY_source_gref, GNTCOPY_dest_gref */
enum { GENERAL_ERROR = -1, BAD_GNTREF = -3 };           /* GNTST_* */

typedef void *map_call(void *handle, uint32_t count, uint32_t domid, uint32_t *refs, int prot);
typedef int unmap_call(void *handle, void *start, uint32_t count);
typedef int copy_call(void *handle, uint32_t count, struct grant_copy *copies);

/* -- a guest of the embedded host ---------------------------------------------------------------------- */

/* Looks once at what the guest grants now. */
static int check(const struct xbd_domain *domain, uint32_t ref, bool writable)
{
    if (ref >= domain->nr_pages)
        return BAD_GNTREF;
    const _Atomic uint64_t *table = domain->table;
    uint64_t entry = atomic_load_explicit(&table[ref], memory_order_relaxed);
    if (entry == domain->granted || (entry == domain->granted_readonly && !writable))
        return 0;
    return GENERAL_ERROR;
}

static char *page(const struct xbd_domain *domain, uint32_t ref, bool writable)
{
    uintptr_t base = writable ? (uintptr_t)domain->writable : (uintptr_t)domain->readable;
    return (char *)(base + (uintptr_t)ref * PAGE);
}

static int16_t copy_one(const struct xbd_domain *domain, const struct grant_copy *copy)
{
    bool to_guest = copy->flags == COPY_TO_GUEST;
    const union grant_place *ours = to_guest ? &copy->source : &copy->dest;
    const union grant_place *theirs = to_guest ? &copy->dest : &copy->source;
    int status = check(domain, theirs->theirs.ref, to_guest);
    if (status)
        return (int16_t)status;
    char *at = page(domain, theirs->theirs.ref, to_guest) + theirs->theirs.offset;
    if (to_guest)
        memcpy(at, ours->ours, copy->length);
    else
        memcpy(ours->ours, at, copy->length);
    return 0;
}

/* -- both ---------------------------------------------------------------------------------------------- */

int domain_map(const struct xbd_domain *domain, uint32_t *refs, unsigned count, bool writable, void **addresses)
{
    if (!domain->gnttab) {
        for (unsigned i = 0; i < count; i++) {
            int status = check(domain, refs[i], writable);
            if (status)
                return status;
            addresses[i] = page(domain, refs[i], writable);
        }
        return 0;
    }
    int prot = PROT_READ | (writable ? PROT_WRITE : 0);
    char *start = ((map_call *)domain->map)(domain->gnttab, count, domain->domid, refs, prot);
    if (!start)
        return errno ? errno : EINVAL;
    for (unsigned i = 0; i < count; i++)
        addresses[i] = start + (size_t)i * PAGE;
    return 0;
}

void domain_unmap(const struct xbd_domain *domain, void *start, unsigned count)
{
    if (domain->gnttab)
        ((unmap_call *)domain->unmap)(domain->gnttab, start, count);
}

void domain_describe_copy(const struct xbd_domain *domain, struct grant_copy *copy, uint32_t ref, unsigned offset,
                          void *ours, unsigned length, bool to_guest)
{
    memset(copy, 0, sizeof(*copy));
    union grant_place *theirs = to_guest ? &copy->dest : &copy->source;
    (to_guest ? &copy->source : &copy->dest)->ours = ours;
    theirs->theirs.ref = ref;
    theirs->theirs.offset = (uint16_t)offset;
    theirs->theirs.domid = (uint16_t)domain->domid;
    copy->length = (uint16_t)length;
    copy->flags = to_guest ? COPY_TO_GUEST : COPY_FROM_GUEST;
}

int domain_copy(const struct xbd_domain *domain, struct grant_copy *copies, unsigned count)
{
    if (domain->gnttab)
        return ((copy_call *)domain->copy)(domain->gnttab, count, copies) ? errno : 0;
    for (unsigned i = 0; i < count; i++)
        copies[i].status = copy_one(domain, &copies[i]);
    return 0;
}
