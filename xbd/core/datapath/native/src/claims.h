/*
 * Places for first writes, as the I/O threads take them.  What is declared for Python in api.h is here too.
 */
#pragma once

#include "api_types.h"

enum { MOST_UNITS = 64 };           /* that one request may need places for */

/* Units that were given places, but no entries yet. */
struct claimed {
    uint64_t first;                 /* unit of the disk */
    unsigned number;
    unsigned shift;                 /* a unit has 1 << shift bytes */
    int fd;                         /* where the places are */
    uint64_t places[MOST_UNITS];
};

/* Whether the driver should be asked for more places: true once. */
bool claims_run_low(xbd_claims *claims);
/* Whether first writes may copy what is around them, where xbd_claims_take can't help. */
bool claims_copy(const xbd_claims *claims);
/* Places for all units of the range, which lie nowhere.  False: there is something in the way, or are no places. */
bool claims_reserve(xbd_claims *claims, uint64_t offset, uint64_t end, struct claimed *claimed);
/* They were not written to. */
void claims_return(xbd_claims *claims, const struct claimed *claimed);
/* They were written to, perhaps, and nothing comes of it. */
void claims_spoil(xbd_claims *claims, const struct claimed *claimed);
/* Their content is durable: make the entries.  False: something has come between, and the places are gone. */
bool claims_enter(xbd_claims *claims, const struct claimed *claimed);
