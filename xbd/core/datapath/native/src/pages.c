/*
 * A guest's pages as memory; see pages.h.
 *
 * Pages that stay mapped are mapped and unmapped by units: those of one wake-up that were not there yet.  A unit
 * goes when it is the one that was used least recently, and none of its pages is in use.
 */
#include "pages.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "budget.h"
#include "domain.h"

enum {
    UNIT_PAGES = 64,
    PAGES_PER_ENTRY = 33,           /* of a ring: xen-blkback's measure, 32 segments and an indirect page */
    MOST_KEPT = 8448,               /* per ring, whatever its size */
    PURGE_PART = 20,                /* one in so many is unmapped at a time */
    MOST_BOUNCE = 4096,             /* bounce pages per ring: 16 MiB */
    FIRST_BUCKETS = 64,
};

struct unit;

struct kept {
    uint32_t gref;
    char *address;
    struct unit *unit;
    struct kept *next;              /* in its bucket */
};

struct unit {
    struct unit *newer, *older;
    unsigned count;
    unsigned users;                 /* segments of attached transfers */
    uint64_t used;                  /* the wake-up in which it was last */
    struct kept pages[];
};

struct guest_pages {
    struct xbd_domain domain;
    struct share share;
    uint64_t wake_up;
    unsigned attached;              /* transfers */
    uint64_t drops;                 /* of units */
    uint64_t noted;                 /* `drops` when pages_prepare noted in held_pages what it found */

    struct kept **buckets;
    unsigned nr_buckets;            /* a power of two */
    unsigned nr_kept, most_kept;
    struct unit *newest, *oldest;

    char *bounce;
    uint16_t *free_bounce;
    unsigned nr_free_bounce;

    struct grant_copy *copies;
    struct transfer **owners;       /* of the copies */
    unsigned room;                  /* for both */
};

struct guest_pages *pages_open(const struct xbd_domain *domain, xbd_budget *budget, unsigned entries, unsigned longest)
{
    struct guest_pages *pages = calloc(1, sizeof(*pages));
    if (!pages)
        return NULL;
    pages->domain = *domain;
    pages->most_kept = entries * PAGES_PER_ENTRY < MOST_KEPT ? entries * PAGES_PER_ENTRY : MOST_KEPT;
    share_open(&pages->share, budget, longest);
    return pages;
}

/* -- pages that stay mapped ---------------------------------------------------------------------------- */

static struct kept **bucket(const struct guest_pages *pages, uint32_t gref)
{
    return &pages->buckets[(gref * UINT32_C(2654435761)) & (pages->nr_buckets - 1)];
}

static struct kept *find(const struct guest_pages *pages, uint32_t gref)
{
    if (!pages->nr_buckets)
        return NULL;
    struct kept *kept = *bucket(pages, gref);
    while (kept && kept->gref != gref)
        kept = kept->next;
    return kept;
}

static void hash_in(struct guest_pages *pages, struct kept *kept)
{
    struct kept **head = bucket(pages, kept->gref);
    kept->next = *head;
    *head = kept;
}

static void hash_out(struct guest_pages *pages, const struct kept *kept)
{
    struct kept **at = bucket(pages, kept->gref);
    while (*at != kept)
        at = &(*at)->next;
    *at = kept->next;
}

static bool grow(struct guest_pages *pages)
{
    if (pages->nr_kept < pages->nr_buckets)
        return true;
    unsigned nr_old = pages->nr_buckets;
    struct kept **old = pages->buckets;
    struct kept **buckets = calloc(nr_old ? nr_old * 2 : FIRST_BUCKETS, sizeof(struct kept *));
    if (!buckets)
        return nr_old;
    pages->buckets = buckets;
    pages->nr_buckets = nr_old ? nr_old * 2 : FIRST_BUCKETS;
    for (unsigned i = 0; i < nr_old; i++)
        for (struct kept *kept = old[i], *next; kept; kept = next) {
            next = kept->next;
            hash_in(pages, kept);
        }
    free(old);
    return true;
}

static void link_newest(struct guest_pages *pages, struct unit *unit)
{
    unit->older = pages->newest;
    unit->newer = NULL;
    *(pages->newest ? &pages->newest->newer : &pages->oldest) = unit;
    pages->newest = unit;
}

static void unlink_unit(struct guest_pages *pages, struct unit *unit)
{
    *(unit->newer ? &unit->newer->older : &pages->newest) = unit->older;
    *(unit->older ? &unit->older->newer : &pages->oldest) = unit->newer;
}

static void touch(struct guest_pages *pages, struct unit *unit)
{
    unit->used = pages->wake_up;
    if (pages->newest != unit) {
        unlink_unit(pages, unit);
        link_newest(pages, unit);
    }
}

/* Out of the table, its memory freed; it is not mapped any more. */
static void drop_unit(struct guest_pages *pages, struct unit *unit)
{
    for (unsigned i = 0; i < unit->count; i++)
        hash_out(pages, &unit->pages[i]);
    pages->nr_kept -= unit->count;
    pages->drops++;
    share_give_back(&pages->share, unit->count);
    free(unit);
}

/* Unmaps at least `wanted` pages that were not used for long, as far as there are any; those of this wake-up only
 * if they have to go too.  How many. */
static unsigned purge(struct guest_pages *pages, unsigned wanted, bool all)
{
    unsigned gone = 0;
    for (struct unit *unit = pages->oldest, *newer; unit && gone < wanted; unit = newer) {
        newer = unit->newer;
        if (unit->users || (unit->used == pages->wake_up && !all))
            continue;
        gone += unit->count;
        unlink_unit(pages, unit);
        domain_unmap(&pages->domain, unit->pages[0].address, unit->count);
        drop_unit(pages, unit);
    }
    return gone;
}

/* Room for one more page in the table and in the share. */
static bool admit(struct guest_pages *pages)
{
    if (pages->nr_kept >= pages->most_kept)
        purge(pages, pages->most_kept / PURGE_PART + 1, false);
    if (pages->nr_kept >= pages->most_kept || !grow(pages))
        return false;
    if (share_take(&pages->share, 1))
        return true;
    purge(pages, pages->most_kept / PURGE_PART + 1, false);
    return share_take(&pages->share, 1);
}

/* Notes a page that a unit will map; false: no room for it. */
static bool plan(struct guest_pages *pages, struct unit *unit, uint32_t gref)
{
    if (!admit(pages))
        return false;
    struct kept *kept = &unit->pages[unit->count++];
    *kept = (struct kept){.gref = gref, .unit = unit};
    hash_in(pages, kept);
    pages->nr_kept++;
    return true;
}

/* Maps what is planned.  0, or why it can't be: then the unit is gone. */
static int map_unit(struct guest_pages *pages, struct unit *unit)
{
    uint32_t refs[UNIT_PAGES];
    void *addresses[UNIT_PAGES];
    for (unsigned i = 0; i < unit->count; i++)
        refs[i] = unit->pages[i].gref;
    int error = domain_map(&pages->domain, refs, unit->count, true, addresses);
    if (error) {
        drop_unit(pages, unit);
        return error;
    }
    for (unsigned i = 0; i < unit->count; i++)
        unit->pages[i].address = addresses[i];
    unit->used = pages->wake_up;
    link_newest(pages, unit);
    return 0;
}

static struct unit *new_unit(unsigned room)
{
    return calloc(1, sizeof(struct unit) + room * sizeof(struct kept));
}

/* Plans and maps what is not there yet, notes what is.  False: not for all of them. */
static bool prepare(struct guest_pages *pages, struct transfer *const *transfers, unsigned count, struct unit **unit)
{
    for (unsigned i = 0; i < count; i++) {
        for (unsigned j = 0; j < transfers[i]->request.nr_segments; j++) {
            uint32_t gref = transfers[i]->segments[j].gref;
            struct kept *kept = find(pages, gref);
            transfers[i]->held_pages[j] = kept && kept->address ? kept : NULL;
            if (kept) {
                if (kept->address)
                    touch(pages, kept->unit);
                continue;
            }
            if (!*unit && !(*unit = new_unit(UNIT_PAGES)))
                return false;
            if (!plan(pages, *unit, gref))
                return false;
            if ((*unit)->count == UNIT_PAGES) {
                map_unit(pages, *unit);     /* else attaching finds out which page it is */
                *unit = NULL;
            }
        }
    }
    return true;
}

void pages_prepare(struct guest_pages *pages, struct transfer *const *transfers, unsigned count)
{
    struct unit *unit = NULL;
    pages->wake_up++;
    if (pages->domain.mode != XBD_PERSISTENT)
        return;
    bool noted = prepare(pages, transfers, count, &unit);
    if (unit && unit->count)
        map_unit(pages, unit);
    else
        free(unit);
    pages->noted = noted ? pages->drops : UINT64_MAX;
}

/* The page, mapped; NULL: *error says why, or there is no room (0). */
static struct kept *keep(struct guest_pages *pages, uint32_t gref, int *error)
{
    struct kept *kept = find(pages, gref);
    *error = 0;
    if (kept) {
        touch(pages, kept->unit);
        return kept;
    }
    struct unit *unit = new_unit(1);
    if (!unit)
        return NULL;
    if (!plan(pages, unit, gref)) {
        free(unit);
        return NULL;
    }
    *error = map_unit(pages, unit);
    return *error ? NULL : &unit->pages[0];
}

static void release_kept(struct transfer *transfer, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        ((struct kept *)transfer->held_pages[i])->unit->users--;
}

/* The segments' memory, one after the other: the fewer pieces, the less the kernel has to look up. */
static void add_iov(struct transfer *transfer, const struct segment *segment, char *page)
{
    char *start = page + segment->start;
    if (transfer->nr_iov) {
        struct iovec *last = &transfer->iov[transfer->nr_iov - 1];
        if ((char *)last->iov_base + last->iov_len == start) {
            last->iov_len += segment->length;
            return;
        }
    }
    transfer->iov[transfer->nr_iov++] = (struct iovec){.iov_base = start, .iov_len = segment->length};
}

/* -- pages that are mapped for one request ------------------------------------------------------------- */

static enum attached map_transfer(struct guest_pages *pages, struct transfer *transfer, int *error)
{
    unsigned count = transfer->request.nr_segments;
    bool writable = transfer->request.operation == OP_READ;
    uint32_t refs_room[64];
    void *addresses_room[64];
    /* Others may be faster to take what is given back here, until only the reserve is left. */
    while (!share_take(&pages->share, count))
        if (!purge(pages, count, true))
            return NO_ROOM;
    bool many = count > 64;
    uint32_t *refs = many ? malloc(count * sizeof(*refs)) : refs_room;
    void **addresses = many ? malloc(count * sizeof(*addresses)) : addresses_room;
    *error = ENOMEM;
    if (refs && addresses) {
        for (unsigned i = 0; i < count; i++)
            refs[i] = transfer->segments[i].gref;
        *error = domain_map(&pages->domain, refs, count, writable, addresses);
        transfer->nr_iov = 0;
        for (unsigned i = 0; i < count && !*error; i++)
            add_iov(transfer, &transfer->segments[i], addresses[i]);
        transfer->held = *error ? NULL : addresses[0];
    }
    if (many) {
        free(refs);
        free(addresses);
    }
    if (*error) {
        share_give_back(&pages->share, count);
        return REFUSED;
    }
    return ATTACHED;
}

static void unmap_transfer(struct guest_pages *pages, struct transfer *transfer)
{
    unsigned count = transfer->request.nr_segments;
    domain_unmap(&pages->domain, transfer->held, count);
    share_give_back(&pages->share, count);
    transfer->held = NULL;
}

/* -- pages that are copied ----------------------------------------------------------------------------- */

static bool make_bounce(struct guest_pages *pages)
{
    if (pages->bounce)
        return true;
    uint16_t *stack = malloc(MOST_BOUNCE * sizeof(*stack));
    void *memory = mmap(NULL, (size_t)MOST_BOUNCE * PAGE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!stack || memory == MAP_FAILED) {
        free(stack);
        if (memory != MAP_FAILED)
            munmap(memory, (size_t)MOST_BOUNCE * PAGE);
        return false;
    }
    for (unsigned i = MOST_BOUNCE; i-- > 0;)
        stack[pages->nr_free_bounce++] = (uint16_t)i;
    pages->free_bounce = stack;
    pages->bounce = memory;
    return true;
}

static enum attached bounce_transfer(struct guest_pages *pages, struct transfer *transfer, int *error)
{
    unsigned count = transfer->request.nr_segments;
    if (!make_bounce(pages)) {
        *error = ENOMEM;
        return REFUSED;
    }
    if (pages->nr_free_bounce < count || !share_take(&pages->share, count))
        return NO_ROOM;
    transfer->nr_iov = 0;
    for (unsigned i = 0; i < count; i++) {
        char *page = pages->bounce + (size_t)pages->free_bounce[--pages->nr_free_bounce] * PAGE;
        transfer->held_pages[i] = page;
        add_iov(transfer, &transfer->segments[i], page);
    }
    return ATTACHED;
}

static void give_bounce_back(struct guest_pages *pages, struct transfer *transfer)
{
    for (unsigned i = transfer->request.nr_segments; i-- > 0;) {      /* neighbours stay neighbours */
        size_t at = (size_t)((char *)transfer->held_pages[i] - pages->bounce);
        pages->free_bounce[pages->nr_free_bounce++] = (uint16_t)(at / PAGE);
    }
    share_give_back(&pages->share, transfer->request.nr_segments);
}

static bool make_copies(struct guest_pages *pages, unsigned count)
{
    if (count <= pages->room)
        return true;
    struct grant_copy *copies = malloc(count * sizeof(*copies));
    struct transfer **owners = malloc(count * sizeof(struct transfer *));
    if (!copies || !owners) {
        free(copies);
        free(owners);
        return false;
    }
    free(pages->copies);
    free(pages->owners);
    pages->copies = copies;
    pages->owners = owners;
    pages->room = count;
    return true;
}

static bool has_to_be_copied(const struct transfer *transfer, bool to_guest)
{
    return transfer->status == RSP_OKAY && (transfer->request.operation == OP_READ) == to_guest;
}

/* All that the transfers have to copy in one direction, with one call. */
static void copy_all(struct guest_pages *pages, struct transfer *const *transfers, unsigned count, bool to_guest)
{
    unsigned segments = 0;
    for (unsigned i = 0; i < count; i++)
        if (has_to_be_copied(transfers[i], to_guest))
            segments += transfers[i]->request.nr_segments;
    if (!segments)
        return;
    bool failed = !make_copies(pages, segments);
    unsigned used = 0;
    for (unsigned i = 0; i < count; i++) {
        struct transfer *transfer = transfers[i];
        if (!has_to_be_copied(transfer, to_guest))
            continue;
        for (unsigned j = 0; j < transfer->request.nr_segments && !failed; j++) {
            const struct segment *segment = &transfer->segments[j];
            domain_describe_copy(&pages->domain, &pages->copies[used], segment->gref, segment->start,
                                 (char *)transfer->held_pages[j] + segment->start, segment->length, to_guest);
            pages->owners[used++] = transfer;
        }
        if (failed)
            transfer->status = RSP_ERROR;
    }
    failed = failed || domain_copy(&pages->domain, pages->copies, used);
    for (unsigned i = 0; i < used; i++)
        if (failed || pages->copies[i].status)
            pages->owners[i]->status = RSP_ERROR;
}

/* -- what rings call ----------------------------------------------------------------------------------- */

static enum attached attach_kept(struct guest_pages *pages, struct transfer *transfer, int *error)
{
    unsigned count = transfer->request.nr_segments;
    transfer->nr_iov = 0;
    for (unsigned i = 0; i < count; i++) {
        struct kept *kept = pages->drops == pages->noted ? transfer->held_pages[i] : NULL;
        if (!kept)
            kept = keep(pages, transfer->segments[i].gref, error);
        if (!kept) {
            release_kept(transfer, i);
            transfer->held_pages[0] = NULL;
            return *error ? REFUSED : map_transfer(pages, transfer, error);
        }
        kept->unit->users++;
        transfer->held_pages[i] = kept;
        add_iov(transfer, &transfer->segments[i], kept->address);
    }
    return ATTACHED;
}

enum attached pages_attach(struct guest_pages *pages, struct transfer *transfer, int *error)
{
    enum attached how;
    switch (pages->domain.mode) {
    case XBD_PERSISTENT:
        how = attach_kept(pages, transfer, error);
        break;
    case XBD_COPY:
        how = bounce_transfer(pages, transfer, error);
        break;
    case XBD_MAP:
    default:
        transfer->held_pages[0] = NULL;
        how = map_transfer(pages, transfer, error);
        break;
    }
    pages->attached += how == ATTACHED;
    return how;
}

void pages_fetch(struct guest_pages *pages, struct transfer *const *transfers, unsigned count)
{
    if (pages->domain.mode == XBD_COPY)
        copy_all(pages, transfers, count, false);
}

void pages_finish(struct guest_pages *pages, struct transfer *const *transfers, unsigned count)
{
    if (pages->domain.mode == XBD_COPY)
        copy_all(pages, transfers, count, true);
    for (unsigned i = 0; i < count; i++) {
        struct transfer *transfer = transfers[i];
        if (pages->domain.mode == XBD_COPY)
            give_bounce_back(pages, transfer);
        else if (transfer->held_pages[0])
            release_kept(transfer, transfer->request.nr_segments);
        else
            unmap_transfer(pages, transfer);
    }
    pages->attached -= count;
}

bool pages_are_read_only(const struct guest_pages *pages, const struct transfer *transfer)
{
    return pages->domain.mode != XBD_COPY && !transfer->held_pages[0] && transfer->request.operation != OP_READ;
}

static unsigned used_in(const struct request *request, unsigned page)
{
    unsigned rest = request->nr_segments - page * SEGMENTS_PER_INDIRECT_PAGE;
    return (rest < SEGMENTS_PER_INDIRECT_PAGE ? rest : SEGMENTS_PER_INDIRECT_PAGE) * 8;
}

static bool copy_indirect(struct guest_pages *pages, const struct request *request, uint8_t *table, int *error)
{
    struct grant_copy copies[MAX_INDIRECT_PAGES];
    for (unsigned i = 0; i < request->nr_refs; i++)
        domain_describe_copy(&pages->domain, &copies[i], request->refs[i], 0, table + (size_t)i * PAGE,
                             used_in(request, i), false);
    *error = domain_copy(&pages->domain, copies, request->nr_refs);
    for (unsigned i = 0; i < request->nr_refs && !*error; i++)
        *error = copies[i].status;
    return !*error;
}

static bool map_indirect(struct guest_pages *pages, const struct request *request, uint8_t *table, int *error)
{
    uint32_t refs[MAX_INDIRECT_PAGES];
    void *addresses[MAX_INDIRECT_PAGES];
    memcpy(refs, request->refs, sizeof(refs));
    *error = domain_map(&pages->domain, refs, request->nr_refs, false, addresses);
    if (*error)
        return false;
    for (unsigned i = 0; i < request->nr_refs; i++)
        memcpy(table + (size_t)i * PAGE, addresses[i], used_in(request, i));
    domain_unmap(&pages->domain, addresses[0], request->nr_refs);
    return true;
}

static bool copy_kept(struct guest_pages *pages, const struct request *request, uint8_t *table)
{
    for (unsigned i = 0; i < request->nr_refs; i++) {
        int error;
        const struct kept *kept = keep(pages, request->refs[i], &error);
        if (!kept)
            return false;
        memcpy(table + (size_t)i * PAGE, kept->address, used_in(request, i));
    }
    return true;
}

bool pages_read_indirect(struct guest_pages *pages, const struct request *request, uint8_t *table, int *error)
{
    if (pages->domain.mode == XBD_COPY)
        return copy_indirect(pages, request, table, error);
    if (pages->domain.mode == XBD_PERSISTENT && copy_kept(pages, request, table))
        return true;
    return map_indirect(pages, request, table, error);
}

void pages_close(struct guest_pages *pages)
{
    pages->wake_up++;
    purge(pages, UINT32_MAX, true);
    share_give_back(&pages->share, (unsigned)pages->share.used);
    if (pages->bounce)
        munmap(pages->bounce, (size_t)MOST_BOUNCE * PAGE);
    free(pages->free_bounce);
    free(pages->buckets);
    free(pages->copies);
    free(pages->owners);
    free(pages);
}
