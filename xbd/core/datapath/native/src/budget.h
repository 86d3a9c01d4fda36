/*
 * How many pages are mapped or bounced at a time (datapath/pages/budget.py, XSA-300).
 *
 * Every ring has a reserve that holds its longest request, so a ring never waits for another one; what it uses
 * beyond that comes out of its domain's budget, and out of the host's.
 */
#pragma once

#include <stdbool.h>

#include "api_types.h"

bool budget_take(xbd_budget *budget, long pages);
void budget_give_back(xbd_budget *budget, long pages);

/* One ring's part; used by its thread alone. */
struct share {
    xbd_budget *budget;
    long used, reserve;
};

void share_open(struct share *share, xbd_budget *budget, unsigned longest);
/* False: not now.  Never false for a request while nothing is in use. */
bool share_take(struct share *share, unsigned pages);
void share_give_back(struct share *share, unsigned pages);
