/*
 * What a disk's driver answered to `resolve`: once for reading, once for writing (datapath/extents.py).
 *
 * Those who change it wait for each other; any number look things up at the same time, without locks and without
 * waiting for anybody: a look-up that meets a change reports a miss at worst.  Nothing that a look-up
 * may touch is freed before xbd_extents_free.  Memory is bounded: MAX_PAGES pages of 512 chunks for each
 * direction, and a table of MAX_EXTENTS.  What is declared for Python in api.h is here too.
 */
#pragma once

#include <stdatomic.h>

#include "api_types.h"

enum { MAX_PIECES = 64 };

/* Where a part of the disk lies, as far as one word or entry of the cache tells. */
struct place {
    uint64_t start, end;            /* on the disk */
    uint64_t position;              /* in the file, of start */
    int32_t fd;
};

/* What one who looks things up found last: as a rule the next look-up finds it again. */
struct hint {
    const _Atomic uint32_t *sequence;   /* of the cache */
    uint32_t seen;                      /* as it was when this was true */
    struct place place;                 /* no bytes: nothing was found yet */
    bool changing;                      /* the last look-up met changes: nobody could say what was known */
};

void hint_init(struct hint *hint, xbd_extents *extents, bool for_write);
/* As xbd_extents_find, of the hint's cache and direction; keeps the last place that it finds. */
unsigned hint_find(struct hint *hint, xbd_extents *extents, bool for_write, uint64_t offset, uint64_t length,
                   struct xbd_piece *pieces, unsigned most);

/* Whether all of the range lies in the place that was found last. */
static inline bool hint_has(const struct hint *hint, uint64_t offset, uint64_t length, struct xbd_piece *piece)
{
    const struct place *place = &hint->place;
    if (atomic_load_explicit(hint->sequence, memory_order_acquire) != hint->seen || offset < place->start ||
        offset >= place->end || length > place->end - offset)
        return false;
    *piece = (struct xbd_piece){
        .fd = place->fd, .position = place->position + (offset - place->start), .length = length};
    return true;
}
