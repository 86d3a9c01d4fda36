/*
 * Places for first writes that the I/O threads take by themselves: the driver lends them parts of its tables, and
 * supplies what is to be entered there.
 *
 * One lock is held while entries are made, over the write to the file as well: who has it knows that no entry is
 * half made.  An entry reaches the file before anybody can see it in memory or among the extents, so nothing that is
 * answered depends on what only this process knows.
 */
#include <endian.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "claims.h"
#include "extents.h"
#include "stress.h"

enum {
    MOST_LOANS = 128,               /* with 64 KiB clusters: all tables of 64 GiB */
    MOST_PLACES = 4096,
    MOST_SPOILT = 1024,             /* that the driver has not fetched; more are lost to it */
};

/* A part of the driver's tables. */
struct loan {
    uint64_t first, end;            /* units of the disk */
    _Atomic uint64_t *entries;      /* the driver's memory */
    uint64_t position;              /* of the entries in the file */
};

struct xbd_claims {
    xbd_extents *extents;
    atomic_uint pauses;
    atomic_uint nr_loans;           /* written under the lock */
    pthread_mutex_t lock;           /* of all that follows, and of the entries lent */
    int fd, table_fd;
    unsigned shift;                 /* a unit has 1 << shift bytes */
    uint64_t bits;                  /* of an entry, beside its place */
    bool behind;                    /* units that lie nowhere may read as something else than zeroes */
    atomic_bool copying;            /* then it is copied */
    unsigned oldest;                /* the loan to give up when there are too many */
    unsigned next_place, nr_places, nr_spoilt;
    unsigned few;                   /* places; with less, the driver is asked for more, once */
    atomic_bool low;                /* it has to be */
    struct room *room;              /* from xbd_claims_begin on */
};

struct room {
    struct loan loans[MOST_LOANS];
    uint64_t places[MOST_PLACES];   /* a ring */
    uint64_t spoilt[MOST_SPOILT];
};

/* A unit that gets a place. */
struct claim {
    struct loan *loan;
    uint64_t unit, place;
};

/* -- taking, in an I/O thread -------------------------------------------------------------------------- */

static struct loan *loan_of(xbd_claims *claims, uint64_t unit)
{
    for (unsigned i = 0; i < claims->nr_loans; i++)
        if (claims->room->loans[i].first <= unit && unit < claims->room->loans[i].end)
            return &claims->room->loans[i];
    return NULL;
}

static _Atomic uint64_t *entry_of(const struct claim *claim)
{
    return &claim->loan->entries[claim->unit - claim->loan->first];
}

static bool is_known(xbd_claims *claims, uint64_t start, uint64_t end)
{
    struct xbd_piece pieces[MAX_PIECES];
    return xbd_extents_find(claims->extents, true, start, end - start, pieces, MAX_PIECES) > 0;
}

static bool reads_as_zeroes(xbd_claims *claims, uint64_t unit)
{
    struct xbd_piece pieces[MAX_PIECES];
    unsigned number = xbd_extents_find(claims->extents, false, unit << claims->shift, (uint64_t)1 << claims->shift,
                                       pieces, MAX_PIECES);
    for (unsigned i = 0; i < number; i++)
        if (pieces[i].fd != XBD_ZEROES)
            return false;
    return number;
}

/* The units of the range that need places; false: there are others of which nothing is known here. */
static bool choose(xbd_claims *claims, uint64_t offset, uint64_t end, struct claim *chosen, unsigned *number)
{
    for (uint64_t unit = offset >> claims->shift; unit <= (end - 1) >> claims->shift; unit++) {
        struct claim claim = {.loan = loan_of(claims, unit), .unit = unit};
        if (!claim.loan)
            return false;
        if (atomic_load_explicit(entry_of(&claim), memory_order_relaxed)) {
            uint64_t low = unit << claims->shift;
            uint64_t high = low + ((uint64_t)1 << claims->shift);
            if (!is_known(claims, low > offset ? low : offset, high < end ? high : end))
                return false;
            continue;
        }
        if (*number == MOST_UNITS || *number == claims->nr_places)
            return false;
        if (claims->behind && !reads_as_zeroes(claims, unit))
            return false;
        chosen[(*number)++] = claim;
    }
    return true;
}

/* Writes the entries of neighbours, which become known then. */
static bool enter(xbd_claims *claims, const struct claim *chosen, unsigned number)
{
    uint64_t words[MOST_UNITS];
    const struct loan *loan = chosen->loan;
    for (unsigned i = 0; i < number; i++)
        words[i] = htobe64(chosen[i].place | claims->bits);
    uint64_t position = loan->position + (chosen->unit - loan->first) * sizeof(*words);
    ssize_t wanted = (ssize_t)(number * sizeof(*words));
    STRESS_POINT(CLAIM_WRITE);
    ssize_t written;
    do
        written = pwrite(claims->table_fd, words, (size_t)wanted, (off_t)position);
    while (written < 0 && errno == EINTR);
    if (written != wanted)
        return false;
    for (unsigned i = 0; i < number; i++) {
        uint64_t start = chosen[i].unit << claims->shift;
        uint64_t end = start + ((uint64_t)1 << claims->shift);
        STRESS_POINT(CLAIM_ENTER);
        atomic_store_explicit(entry_of(&chosen[i]), chosen[i].place | claims->bits, memory_order_relaxed);
        xbd_extents_put(claims->extents, false, start, end, claims->fd, chosen[i].place);
        xbd_extents_put(claims->extents, true, start, end, claims->fd, chosen[i].place);
    }
    return true;
}

static void drop(xbd_claims *claims, struct loan *loan)
{
    *loan = claims->room->loans[--claims->nr_loans];
}

static uint64_t next_place(xbd_claims *claims)
{
    uint64_t place = claims->room->places[claims->next_place];
    claims->next_place = (claims->next_place + 1) % MOST_PLACES;
    if (--claims->nr_places < claims->few) {
        claims->few = 0;
        atomic_store_explicit(&claims->low, true, memory_order_relaxed);
    }
    return place;
}

/* Makes entries for them, which have their places. */
static bool enter_all(xbd_claims *claims, const struct claim *chosen, unsigned number)
{
    for (unsigned done = 0, run; done < number; done += run) {
        for (run = 1; done + run < number && chosen[done + run].loan == chosen[done].loan &&
                      chosen[done + run].unit == chosen[done].unit + run; run++)
            continue;
        if (!enter(claims, chosen + done, run)) {
            /* Nobody knows what of it is in the file: those places are never used for anything else, and the
             * driver finds out what is wrong. */
            drop(claims, chosen[done].loan);
            return false;
        }
    }
    return true;
}

static bool take(xbd_claims *claims, uint64_t offset, uint64_t end)
{
    struct claim chosen[MOST_UNITS];
    unsigned number = 0;
    if (atomic_load(&claims->pauses) || !choose(claims, offset, end, chosen, &number))
        return false;
    for (unsigned i = 0; i < number; i++)
        chosen[i].place = next_place(claims);
    return enter_all(claims, chosen, number);
}

static bool anything_lent(const xbd_claims *claims)
{
    return claims && atomic_load_explicit(&claims->nr_loans, memory_order_relaxed);
}

bool xbd_claims_take(xbd_claims *claims, uint64_t offset, uint64_t length)
{
    if (!anything_lent(claims))
        return false;
    if (!length || length > UINT64_MAX - offset)
        return false;
    pthread_mutex_lock(&claims->lock);
    bool taken = take(claims, offset, offset + length);
    pthread_mutex_unlock(&claims->lock);
    return taken;
}

bool claims_run_low(xbd_claims *claims)
{
    return claims && atomic_load_explicit(&claims->low, memory_order_relaxed) && atomic_exchange(&claims->low, false);
}

/* -- copying, in an I/O thread ------------------------------------------------------------------------- */

bool claims_copy(const xbd_claims *claims)
{
    return anything_lent(claims) && atomic_load_explicit(&claims->copying, memory_order_relaxed);
}

/* These units; false: some can't be claimed, or must not be now. */
static bool choose_all(xbd_claims *claims, uint64_t first, uint64_t number, struct claim *chosen)
{
    if (atomic_load(&claims->pauses))
        return false;
    for (unsigned i = 0; i < number; i++) {
        chosen[i] = (struct claim){.loan = loan_of(claims, first + i), .unit = first + i};
        if (!chosen[i].loan || atomic_load_explicit(entry_of(&chosen[i]), memory_order_relaxed))
            return false;
    }
    return true;
}

/* All units of the range, for which there are places; how many.  0: as above, or there are not enough. */
static unsigned choose_range(xbd_claims *claims, uint64_t offset, uint64_t end, struct claim *chosen)
{
    uint64_t first = offset >> claims->shift;
    uint64_t number = ((end - 1) >> claims->shift) - first + 1;
    bool possible = number <= MOST_UNITS && number <= claims->nr_places && choose_all(claims, first, number, chosen);
    return possible ? (unsigned)number : 0;
}

static void put_place(xbd_claims *claims, uint64_t place)
{
    claims->room->places[(claims->next_place + claims->nr_places++) % MOST_PLACES] = place;
}

bool claims_reserve(xbd_claims *claims, uint64_t offset, uint64_t end, struct claimed *claimed)
{
    struct claim chosen[MOST_UNITS];
    pthread_mutex_lock(&claims->lock);
    unsigned number = choose_range(claims, offset, end, chosen);
    *claimed = (struct claimed){
        .first = offset >> claims->shift, .number = number, .shift = claims->shift, .fd = claims->fd};
    for (unsigned i = 0; i < number; i++)
        claimed->places[i] = next_place(claims);
    pthread_mutex_unlock(&claims->lock);
    return number;
}

void claims_return(xbd_claims *claims, const struct claimed *claimed)
{
    pthread_mutex_lock(&claims->lock);
    for (unsigned i = 0; i < claimed->number && claims->nr_places < MOST_PLACES; i++)
        put_place(claims, claimed->places[i]);
    pthread_mutex_unlock(&claims->lock);
}

static void spoil(xbd_claims *claims, const struct claimed *claimed)
{
    for (unsigned i = 0; i < claimed->number && claims->nr_spoilt < MOST_SPOILT; i++)
        claims->room->spoilt[claims->nr_spoilt++] = claimed->places[i];
}

void claims_spoil(xbd_claims *claims, const struct claimed *claimed)
{
    pthread_mutex_lock(&claims->lock);
    spoil(claims, claimed);
    pthread_mutex_unlock(&claims->lock);
}

bool claims_enter(xbd_claims *claims, const struct claimed *claimed)
{
    struct claim chosen[MOST_UNITS];
    STRESS_POINT(CLAIM_COPIED);
    pthread_mutex_lock(&claims->lock);
    bool possible = choose_all(claims, claimed->first, claimed->number, chosen);
    for (unsigned i = 0; i < claimed->number; i++)
        chosen[i].place = claimed->places[i];
    if (!possible)
        spoil(claims, claimed);
    bool entered = possible && enter_all(claims, chosen, claimed->number);
    pthread_mutex_unlock(&claims->lock);
    return entered;
}

/* -- for Python ---------------------------------------------------------------------------------------- */

xbd_claims *xbd_claims_new(xbd_extents *extents)
{
    xbd_claims *claims = calloc(1, sizeof(*claims));
    if (claims && pthread_mutex_init(&claims->lock, NULL)) {
        free(claims);
        return NULL;
    }
    if (claims)
        claims->extents = extents;
    return claims;
}

void xbd_claims_free(xbd_claims *claims)
{
    pthread_mutex_destroy(&claims->lock);
    free(claims->room);
    free(claims);
}

static void take_all_back(xbd_claims *claims)
{
    claims->nr_loans = 0;
}

bool xbd_claims_begin(xbd_claims *claims, int fd, int table_fd, uint64_t unit, uint64_t bits, bool behind,
                      bool copying)
{
    pthread_mutex_lock(&claims->lock);
    if (!claims->room)
        claims->room = malloc(sizeof(*claims->room));
    bool possible = claims->room;
    take_all_back(claims);
    claims->nr_places = claims->nr_spoilt = 0;
    claims->behind = behind;
    atomic_store(&claims->copying, copying);
    claims->fd = fd;
    claims->table_fd = table_fd;
    claims->shift = (unsigned)__builtin_ctzll(unit);
    claims->bits = bits;
    pthread_mutex_unlock(&claims->lock);
    return possible;
}

void xbd_claims_lend(xbd_claims *claims, uint64_t offset, uint64_t *entries, uint64_t count, uint64_t position)
{
    pthread_mutex_lock(&claims->lock);
    uint64_t first = offset >> claims->shift;
    struct loan *loan = loan_of(claims, first);
    if (!loan && claims->nr_loans < MOST_LOANS)
        loan = &claims->room->loans[claims->nr_loans++];
    else if (!loan)
        loan = &claims->room->loans[claims->oldest++ % MOST_LOANS];
    *loan = (struct loan){
        .first = first, .end = first + count, .entries = (_Atomic uint64_t *)entries, .position = position};
    pthread_mutex_unlock(&claims->lock);
}

void xbd_claims_take_back(xbd_claims *claims, uint64_t offset)
{
    pthread_mutex_lock(&claims->lock);
    struct loan *loan = loan_of(claims, offset >> claims->shift);
    if (loan)
        drop(claims, loan);
    pthread_mutex_unlock(&claims->lock);
}

unsigned xbd_claims_supply(xbd_claims *claims, const uint64_t *places, unsigned number)
{
    pthread_mutex_lock(&claims->lock);
    if (number > MOST_PLACES - claims->nr_places)
        number = MOST_PLACES - claims->nr_places;
    for (unsigned i = 0; i < number; i++)
        put_place(claims, places[i]);
    claims->few = claims->nr_places / 2;
    pthread_mutex_unlock(&claims->lock);
    return number;
}

unsigned xbd_claims_supplied(xbd_claims *claims)
{
    pthread_mutex_lock(&claims->lock);
    unsigned number = claims->nr_places;
    pthread_mutex_unlock(&claims->lock);
    return number;
}

unsigned xbd_claims_end(xbd_claims *claims, uint64_t *places, unsigned most)
{
    unsigned number = 0;
    pthread_mutex_lock(&claims->lock);
    take_all_back(claims);
    while (claims->nr_places && number < most)
        places[number++] = next_place(claims);
    pthread_mutex_unlock(&claims->lock);
    return number;
}

unsigned xbd_claims_spoilt(xbd_claims *claims, uint64_t *places, unsigned most)
{
    unsigned number = 0;
    pthread_mutex_lock(&claims->lock);
    while (claims->nr_spoilt && number < most)
        places[number++] = claims->room->spoilt[--claims->nr_spoilt];
    pthread_mutex_unlock(&claims->lock);
    return number;
}

bool xbd_claims_are_free(xbd_claims *claims, uint64_t offset, uint64_t length)
{
    struct claim chosen[MOST_UNITS];
    if (!anything_lent(claims) || !length || length > UINT64_MAX - offset)
        return false;
    pthread_mutex_lock(&claims->lock);
    bool possible = choose_range(claims, offset, offset + length, chosen);
    pthread_mutex_unlock(&claims->lock);
    return possible;
}

bool xbd_claims_pause(xbd_claims *claims)
{
    atomic_fetch_add(&claims->pauses, 1);
    STRESS_POINT(CLAIM_PAUSE);
    if (pthread_mutex_trylock(&claims->lock))
        return false;
    pthread_mutex_unlock(&claims->lock);
    return true;
}

void xbd_claims_wait(xbd_claims *claims)
{
    pthread_mutex_lock(&claims->lock);
    pthread_mutex_unlock(&claims->lock);
}

void xbd_claims_resume(xbd_claims *claims)
{
    atomic_fetch_sub(&claims->pauses, 1);
}
