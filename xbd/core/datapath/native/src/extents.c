/*
 * The extent cache; see extents.h.
 *
 * For each direction most is kept by chunks, eight bytes each, in pages of 512 that are found through an array of
 * pointers; what does not come in whole chunks, and extents so long that one need not look further, lie in a short
 * sorted table.  Chunks come first.
 *
 * A look-up is made between two readings of a sequence number that is odd while a writer changes something; if
 * it has changed, what was seen is not used.  So a look-up may see any mixture of old and new words, but never
 * memory that is none of this: pages that are dropped stay here for the next use.
 */
#include "extents.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "stress.h"

enum {
    CHUNK_SHIFT = 16,               /* 64 KiB: qcow2's usual cluster */
    FINE_CHUNK_SHIFT = 12,          /* on a disk that has too many extents smaller than that */
    PAGE_SHIFT = 9,
    PAGE_CHUNKS = 1 << PAGE_SHIFT,
    MOST_PAGES = 4096,              /* 16 MiB for each direction: 128 GiB in scattered chunks of 64 KiB */
    MOST_TOP = 1 << 18,             /* pages that can be reached: the first 8 TiB in chunks of 64 KiB */
    MOST_EXTENTS = 4096,            /* in the table */
    MOST_FILES = 8,                 /* whose chunks are kept; the extents of others are in the table */
    ATTEMPTS = 64,
    SECTOR_SHIFT = 9,
};

/* A chunk's word: 0, or the host's position in sectors, the file's index, and a bit that says so. */
#define KNOWN ((uint64_t)1)
#define FILE_SHIFT 1
#define POSITION_SHIFT 4
#define FILE_MASK ((uint64_t)(MOST_FILES - 1))

struct page {
    _Atomic uint64_t words[PAGE_CHUNKS];
};

struct entry {
    _Atomic uint64_t start, end, position;
    _Atomic int64_t fd;
};

struct known {
    _Atomic uint32_t sequence;
    _Atomic uint32_t shift;
    _Atomic(struct page *) *top;            /* MOST_TOP of them */
    struct entry *table;
    _Atomic uint32_t nr_entries;
    _Atomic int fds[MOST_FILES];
    unsigned nr_fds;
    uint32_t *used;                         /* of top, in the order in which they were taken */
    unsigned nr_used;
    struct page **spare;
    unsigned nr_spare;
    bool dropped;                           /* something was that nobody asked to forget */
    _Atomic uint32_t losses;                /* how often something was dropped for want of room */
    unsigned most_entries;                  /* that there ever were; with `touched` for xbd_extents_memory */
    bool *touched;                          /* by each 4 KiB of top */
};

/* Of one direction, reserved: memory is taken where something is written. */
struct room {
    _Atomic(struct page *) top[MOST_TOP];
    struct entry table[MOST_EXTENTS + 1];
};

struct xbd_extents {
    pthread_mutex_t lock;                   /* of those who change it */
    struct known known[2];                  /* for reading, for writing */
    struct room *rooms;
};

#define GET(object) atomic_load_explicit(&(object), memory_order_relaxed)
#define SET(object, value) atomic_store_explicit(&(object), (value), memory_order_relaxed)

static void begin_change(struct known *known)
{
    STRESS_POINT(EXTENTS_CHANGE);
    SET(known->sequence, GET(known->sequence) + 1);
    STRESS_POINT(EXTENTS_CHANGING);
    atomic_thread_fence(memory_order_seq_cst);
}

static void end_change(struct known *known)
{
    STRESS_POINT(EXTENTS_CHANGED);
    atomic_store_explicit(&known->sequence, GET(known->sequence) + 1, memory_order_release);
}

/* -- looking up ---------------------------------------------------------------------------------------- */

static uint64_t word_of(const struct known *known, uint64_t chunk)
{
    if (chunk >> PAGE_SHIFT >= MOST_TOP)
        return 0;
    struct page *page = atomic_load_explicit(&known->top[chunk >> PAGE_SHIFT], memory_order_acquire);
    return page ? GET(page->words[chunk % PAGE_CHUNKS]) : 0;
}

/* The index of the first entry that ends behind offset. */
static unsigned first_behind(const struct known *known, uint64_t offset)
{
    unsigned low = 0;
    unsigned high = GET(known->nr_entries);
    while (low < high) {
        unsigned middle = (low + high) / 2;
        if (GET(known->table[middle].end) <= offset)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Where a byte lies. */
static bool look_up(const struct known *known, uint64_t offset, struct place *place)
{
    unsigned shift = GET(known->shift);
    uint64_t word = word_of(known, offset >> shift);
    if (word) {
        place->start = offset >> shift << shift;
        place->end = place->start + ((uint64_t)1 << shift);
        place->fd = GET(known->fds[word >> FILE_SHIFT & FILE_MASK]);
        place->position = word >> POSITION_SHIFT << SECTOR_SHIFT;
        return true;
    }
    unsigned at = first_behind(known, offset);
    if (at >= GET(known->nr_entries))
        return false;
    const struct entry *entry = &known->table[at];
    place->start = GET(entry->start);
    place->end = GET(entry->end);
    STRESS_POINT(EXTENTS_READ);
    place->fd = (int32_t)GET(entry->fd);
    place->position = GET(entry->position);
    return place->start <= offset && offset < place->end;       /* else it is not known, or a mixture */
}

static unsigned collect(const struct known *known, uint64_t offset, uint64_t end, struct xbd_piece *pieces,
                        unsigned most, struct place *place)
{
    unsigned count = 0;
    while (offset < end) {
        if (!look_up(known, offset, place))
            return 0;
        uint64_t position = place->position + (offset - place->start);
        uint64_t length = (place->end < end ? place->end : end) - offset;
        struct xbd_piece *last = count ? &pieces[count - 1] : NULL;
        offset += length;
        if (last && last->fd == place->fd && last->position + last->length == position) {
            last->length += length;
            continue;
        }
        if (count == most)
            return 0;
        pieces[count++] = (struct xbd_piece){.fd = place->fd, .position = position, .length = length};
    }
    return count;
}

void hint_init(struct hint *hint, xbd_extents *extents, bool for_write)
{
    *hint = (struct hint){.sequence = &extents->known[for_write].sequence};
}

unsigned hint_find(struct hint *hint, xbd_extents *extents, bool for_write, uint64_t offset, uint64_t length,
                   struct xbd_piece *pieces, unsigned most)
{
    const struct known *known = &extents->known[for_write];
    hint->changing = false;
    if (length > UINT64_MAX - offset)
        return 0;
    for (unsigned attempt = 0; attempt < ATTEMPTS; attempt++) {
        uint32_t before = atomic_load_explicit(&known->sequence, memory_order_acquire);
        if (before % 2)
            continue;
        STRESS_POINT(EXTENTS_FIND);
        struct place place;
        unsigned count = collect(known, offset, offset + length, pieces, most, &place);
        STRESS_POINT(EXTENTS_FOUND);
        atomic_thread_fence(memory_order_acquire);
        if (GET(known->sequence) != before)
            continue;
        if (count) {
            hint->seen = before;
            hint->place = place;
        }
        return count;
    }
    hint->changing = true;
    return 0;
}

unsigned xbd_extents_find(xbd_extents *extents, bool for_write, uint64_t offset, uint64_t length,
                          struct xbd_piece *pieces, unsigned most)
{
    struct hint hint;
    return hint_find(&hint, extents, for_write, offset, length, pieces, most);
}

/* -- forgetting ---------------------------------------------------------------------------------------- */

static void copy_entry(struct entry *to, const struct entry *from)
{
    SET(to->start, GET(from->start));
    SET(to->end, GET(from->end));
    SET(to->position, GET(from->position));
    SET(to->fd, GET(from->fd));
}

/* Moves the entries from `at` on by `by` places. */
static void shift_entries(struct known *known, unsigned at, int by)
{
    unsigned count = GET(known->nr_entries);
    if (by > 0)
        for (unsigned i = count; i-- > at;)
            copy_entry(&known->table[i + (unsigned)by], &known->table[i]);
    else
        for (unsigned i = at; i < count; i++)
            copy_entry(&known->table[i - (unsigned)-by], &known->table[i]);
    count = (unsigned)((int)count + by);
    SET(known->nr_entries, count);
    if (count > known->most_entries)
        known->most_entries = count;
}

static void set_entry(struct known *known, unsigned at, uint64_t start, uint64_t end, int fd, uint64_t position)
{
    struct entry *entry = &known->table[at];
    SET(entry->start, start);
    SET(entry->end, end);
    SET(entry->fd, fd);
    SET(entry->position, position);
}

static void count_loss(struct known *known)
{
    known->dropped = true;
    SET(known->losses, GET(known->losses) + 1);
}

/* Takes the range out of the table; what reaches beyond it stays.  Whether anything was there. */
static bool cut_table(struct known *known, uint64_t start, uint64_t end)
{
    bool found = false;
    for (unsigned at = first_behind(known, start); at < GET(known->nr_entries);) {
        struct entry *entry = &known->table[at];
        uint64_t entry_start = GET(entry->start);
        uint64_t entry_end = GET(entry->end);
        if (entry_start >= end)
            break;
        found = true;
        if (entry_start < start && entry_end > end && GET(known->nr_entries) < MOST_EXTENTS) {
            shift_entries(known, at + 1, 1);
            copy_entry(&known->table[at + 1], entry);
            SET(known->table[at + 1].position, GET(entry->position) + (end - entry_start));
            SET(known->table[at + 1].start, end);
            SET(entry->end, start);
            break;
        }
        if (entry_start < start) {              /* with a full table its end is forgotten as well */
            if (entry_end > end)
                count_loss(known);
            SET(entry->end, start);
            at++;
        } else if (entry_end > end) {
            SET(entry->position, GET(entry->position) + (end - entry_start));
            SET(entry->start, end);
            at++;
        } else {
            shift_entries(known, at + 1, -1);
        }
    }
    return found;
}

static bool clear_words(struct page *page, uint64_t first, uint64_t last)
{
    bool found = false;
    for (uint64_t i = first; i < last; i++) {
        found |= GET(page->words[i]) != 0;
        SET(page->words[i], 0);
    }
    return found;
}

static bool clear_page(struct known *known, uint64_t number, uint64_t first, uint64_t last)
{
    struct page *page = GET(known->top[number]);
    uint64_t begin = number << PAGE_SHIFT;
    uint64_t low = first > begin ? first - begin : 0;
    uint64_t high = last < begin + PAGE_CHUNKS ? last - begin : PAGE_CHUNKS;
    return page && last > begin && low < high && clear_words(page, low, high);
}

/* All chunks that the range touches.  What is known of the rest of the first and the last goes with it, and may be
 * in use: so it counts as dropped. */
static bool clear_chunks(struct known *known, uint64_t start, uint64_t end)
{
    unsigned shift = GET(known->shift);
    uint64_t inside = ((uint64_t)1 << shift) - 1;
    uint64_t first = start >> shift;
    uint64_t last = (end >> shift) + ((end & inside) != 0);
    bool found = false;
    known->dropped |= (start & inside && word_of(known, first)) || (end & inside && word_of(known, last - 1));
    if (first < last && ((last - 1) >> PAGE_SHIFT) - (first >> PAGE_SHIFT) < known->nr_used) {
        for (uint64_t i = first >> PAGE_SHIFT; i <= (last - 1) >> PAGE_SHIFT && i < MOST_TOP; i++)
            found |= clear_page(known, i, first, last);
    } else {
        for (unsigned i = 0; i < known->nr_used; i++)
            found |= clear_page(known, known->used[i], first, last);
    }
    return found;
}

static bool forget(struct known *known, uint64_t start, uint64_t end)
{
    begin_change(known);
    bool found = clear_chunks(known, start, end);
    found |= cut_table(known, start, end);
    end_change(known);
    return found;
}

bool xbd_extents_forget(xbd_extents *extents, uint64_t offset, uint64_t length)
{
    uint64_t end = length > UINT64_MAX - offset ? UINT64_MAX : offset + length;
    pthread_mutex_lock(&extents->lock);
    bool found = forget(&extents->known[0], offset, end);
    found |= forget(&extents->known[1], offset, end);
    found |= extents->known[0].dropped || extents->known[1].dropped;
    pthread_mutex_unlock(&extents->lock);
    return found;
}

/* -- keeping ------------------------------------------------------------------------------------------- */

static bool make_lists(struct known *known)
{
    if (!known->used)
        known->used = calloc(MOST_PAGES, sizeof(*known->used));
    if (!known->spare)
        known->spare = calloc(MOST_PAGES, sizeof(struct page *));
    if (!known->touched)
        known->touched = calloc(MOST_TOP >> PAGE_SHIFT, sizeof(*known->touched));
    return known->used && known->spare && known->touched;
}

/* Makes `count` of the pages that were taken first spare. */
static void drop_pages(struct known *known, unsigned count)
{
    if (!count)
        return;                     /* there may be no lists yet */
    for (unsigned i = 0; i < count; i++) {
        struct page *page = GET(known->top[known->used[i]]);
        SET(known->top[known->used[i]], NULL);
        clear_words(page, 0, PAGE_CHUNKS);
        known->spare[known->nr_spare++] = page;
    }
    known->nr_used -= count;
    memmove(known->used, known->used + count, known->nr_used * sizeof(*known->used));
    count_loss(known);
}

static struct page *page_at(struct known *known, uint64_t number)
{
    struct page *page = GET(known->top[number]);
    if (page)
        return page;
    if (known->nr_used == MOST_PAGES)
        drop_pages(known, MOST_PAGES / 2);
    page = known->nr_spare ? known->spare[--known->nr_spare] : calloc(1, sizeof(*page));
    if (!page)
        return NULL;
    atomic_store_explicit(&known->top[number], page, memory_order_release);
    known->touched[number >> PAGE_SHIFT] = true;
    known->used[known->nr_used++] = (uint32_t)number;
    return page;
}

static int file_index(struct known *known, int fd)
{
    for (unsigned i = 0; i < known->nr_fds; i++)
        if (GET(known->fds[i]) == fd)
            return (int)i;
    if (known->nr_fds == MOST_FILES)
        return -1;
    SET(known->fds[known->nr_fds], fd);
    return (int)known->nr_fds++;
}

/* Whole chunks, the first of which lies at `position`; false: they belong into the table. */
static bool fill(struct known *known, uint64_t first, uint64_t last, int fd, uint64_t position)
{
    unsigned shift = GET(known->shift);
    int file = file_index(known, fd);
    if (file < 0 || position % ((uint64_t)1 << SECTOR_SHIFT) || last > (uint64_t)MOST_TOP << PAGE_SHIFT)
        return false;
    for (uint64_t chunk = first; chunk < last; chunk++) {
        struct page *page = page_at(known, chunk >> PAGE_SHIFT);
        if (!page)
            return false;
        uint64_t sector = (position + ((chunk - first) << shift)) >> SECTOR_SHIFT;
        SET(page->words[chunk % PAGE_CHUNKS], sector << POSITION_SHIFT | (uint64_t)file << FILE_SHIFT | KNOWN);
    }
    return true;
}

/* Drops the half of the table that is not near `start`; or all, for finer chunks. */
static void make_table_room(struct known *known, uint64_t start)
{
    unsigned shift = GET(known->shift);
    unsigned small = 0;
    for (unsigned i = 0; i < MOST_EXTENTS; i++)
        small += GET(known->table[i].end) - GET(known->table[i].start) < (uint64_t)1 << shift;
    count_loss(known);
    if (shift > FINE_CHUNK_SHIFT && small > MOST_EXTENTS / 2) {
        drop_pages(known, known->nr_used);
        SET(known->shift, FINE_CHUNK_SHIFT);
        SET(known->nr_entries, 0);
    } else if (first_behind(known, start) < MOST_EXTENTS / 2) {
        SET(known->nr_entries, MOST_EXTENTS / 2);
    } else {
        shift_entries(known, MOST_EXTENTS / 2, -(MOST_EXTENTS / 2));
    }
}

/* Into the table, as one with neighbours that it continues. */
static void insert(struct known *known, uint64_t start, uint64_t end, int fd, uint64_t position)
{
    if (GET(known->nr_entries) == MOST_EXTENTS)
        make_table_room(known, start);
    unsigned at = first_behind(known, start);
    if (at < GET(known->nr_entries)) {
        const struct entry *next = &known->table[at];
        if (GET(next->start) == end && GET(next->fd) == fd && GET(next->position) == position + (end - start)) {
            end = GET(next->end);
            shift_entries(known, at + 1, -1);
        }
    }
    if (at) {
        const struct entry *last = &known->table[at - 1];
        uint64_t length = GET(last->end) - GET(last->start);
        if (GET(last->end) == start && GET(last->fd) == fd && GET(last->position) + length == position) {
            SET(known->table[at - 1].end, end);
            return;
        }
    }
    shift_entries(known, at, 1);
    set_entry(known, at, start, end, fd, position);
}

static void put(struct known *known, uint64_t start, uint64_t end, int fd, uint64_t position)
{
    unsigned shift = GET(known->shift);
    uint64_t chunk = (uint64_t)1 << shift;
    uint64_t first = (start >> shift) + (start % chunk != 0);
    uint64_t last = end >> shift;
    uint64_t head = first << shift;
    uint64_t tail = last << shift;
    if (first >= last || last - first > PAGE_CHUNKS || !make_lists(known) ||
        !fill(known, first, last, fd, position + (head - start))) {
        clear_chunks(known, start, end);        /* of which some may have been filled */
        insert(known, start, end, fd, position);
        return;
    }
    if (start < head)
        insert(known, start, head, fd, position);
    if (tail < end)
        insert(known, tail, end, fd, position + (tail - start));
}

static bool is_possible(bool for_write, uint64_t start, uint64_t end, int fd, uint64_t position)
{
    bool somewhere = fd >= 0 || (fd == XBD_ZEROES && !for_write);
    return somewhere && start < end && position <= INT64_MAX && end - start <= INT64_MAX - position;
}

bool xbd_extents_put(xbd_extents *extents, bool for_write, uint64_t start, uint64_t end, int fd, uint64_t position)
{
    struct known *known = &extents->known[for_write];
    if (!is_possible(for_write, start, end, fd, position))
        return false;
    pthread_mutex_lock(&extents->lock);
    begin_change(known);
    clear_chunks(known, start, end);
    cut_table(known, start, end);
    put(known, start, end, fd, position);
    end_change(known);
    pthread_mutex_unlock(&extents->lock);
    return true;
}

/* The first chunk from this one on, and before the last, of which something is known. */
static uint64_t next_chunk(const struct known *known, uint64_t chunk, uint64_t last)
{
    while (known->nr_used && chunk < last && !word_of(known, chunk)) {
        bool page = chunk >> PAGE_SHIFT < MOST_TOP && GET(known->top[chunk >> PAGE_SHIFT]);
        chunk = page ? chunk + 1 : ((chunk >> PAGE_SHIFT) + 1) << PAGE_SHIFT;
    }
    return known->nr_used && chunk < last ? chunk : last;
}

/* Where something is known again, behind an offset of which nothing is. */
static uint64_t end_of_gap(const struct known *known, uint64_t offset, uint64_t end)
{
    unsigned shift = GET(known->shift);
    unsigned at = first_behind(known, offset);
    if (at < GET(known->nr_entries) && GET(known->table[at].start) < end)
        end = GET(known->table[at].start);
    uint64_t last = ((end - 1) >> shift) + 1;
    if (last > (uint64_t)MOST_TOP << PAGE_SHIFT)
        last = (uint64_t)MOST_TOP << PAGE_SHIFT;    /* there are no pages behind */
    uint64_t chunk = next_chunk(known, (offset >> shift) + 1, last);
    return chunk < last ? chunk << shift : end;
}

bool xbd_extents_add(xbd_extents *extents, bool for_write, uint64_t start, uint64_t end, int fd, uint64_t position,
                     uint32_t losses)
{
    struct known *known = &extents->known[for_write];
    if (!is_possible(for_write, start, end, fd, position))
        return false;
    pthread_mutex_lock(&extents->lock);
    bool lost = xbd_extents_losses(extents) != losses;
    begin_change(known);
    for (uint64_t at = start, stop; at < end && !lost; at = stop) {
        struct place place;
        if (look_up(known, at, &place)) {
            stop = place.end;
            continue;
        }
        stop = end_of_gap(known, at, end);
        put(known, at, stop, fd, position + (at - start));
        lost = xbd_extents_losses(extents) != losses;   /* what was known behind it may be gone */
    }
    end_change(known);
    pthread_mutex_unlock(&extents->lock);
    return !lost;
}

uint32_t xbd_extents_losses(const xbd_extents *extents)
{
    return GET(extents->known[0].losses) + GET(extents->known[1].losses);
}

uint64_t xbd_extents_chunk(const xbd_extents *extents, bool for_write)
{
    return (uint64_t)1 << GET(extents->known[for_write].shift);
}

/* -- the object ---------------------------------------------------------------------------------------- */

xbd_extents *xbd_extents_new(void)
{
    xbd_extents *extents = calloc(1, sizeof(*extents));
    if (!extents)
        return NULL;
    void *memory = mmap(NULL, 2 * sizeof(struct room), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        free(extents);
        return NULL;
    }
    /* One pointer or entry shall not cost 2 MiB; a kernel that knows no huge pages refuses, which is as good. */
    (void)madvise(memory, 2 * sizeof(struct room), MADV_NOHUGEPAGE);
    extents->rooms = memory;
    pthread_mutex_init(&extents->lock, NULL);
    for (unsigned i = 0; i < 2; i++) {
        extents->known[i].top = extents->rooms[i].top;
        extents->known[i].table = extents->rooms[i].table;
        SET(extents->known[i].shift, CHUNK_SHIFT);
    }
    return extents;
}

static void free_known(struct known *known)
{
    for (unsigned i = 0; i < known->nr_used; i++)
        free(GET(known->top[known->used[i]]));
    for (unsigned i = 0; i < known->nr_spare; i++)
        free(known->spare[i]);
    free(known->used);
    free(known->spare);
    free(known->touched);
}

void xbd_extents_free(xbd_extents *extents)
{
    free_known(&extents->known[0]);
    free_known(&extents->known[1]);
    pthread_mutex_destroy(&extents->lock);
    munmap(extents->rooms, 2 * sizeof(struct room));
    free(extents);
}

uint64_t xbd_extents_memory(const xbd_extents *extents)
{
    uint64_t bytes = sizeof(*extents);
    for (unsigned i = 0; i < 2; i++) {
        const struct known *known = &extents->known[i];
        bytes += (uint64_t)(known->nr_used + known->nr_spare) * sizeof(struct page);
        bytes += known->most_entries * sizeof(struct entry);
        bytes += known->used ? MOST_PAGES * sizeof(*known->used) : 0;
        bytes += known->spare ? MOST_PAGES * sizeof(struct page *) : 0;
        for (unsigned j = 0; known->touched && j < MOST_TOP >> PAGE_SHIFT; j++)
            bytes += known->touched[j] ? PAGE_CHUNKS * sizeof(*known->top) : 0;
    }
    return bytes;
}
