/*
 * Budgets of pages; see budget.h.
 */
#include "budget.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "stress.h"

enum { RESERVE = 264 };             /* a request of 256 segments and its indirect pages */

struct xbd_budget {
    xbd_budget *parent;
    atomic_long left;
};

xbd_budget *xbd_budget_new(xbd_budget *parent, long pages)
{
    xbd_budget *budget = calloc(1, sizeof(*budget));
    if (budget) {
        budget->parent = parent;
        atomic_init(&budget->left, pages);
    }
    return budget;
}

void xbd_budget_free(xbd_budget *budget)
{
    free(budget);
}

long xbd_budget_left(const xbd_budget *budget)
{
    return atomic_load(&((xbd_budget *)(uintptr_t)budget)->left);
}

bool budget_take(xbd_budget *budget, long pages)
{
    if (!budget)
        return true;
    STRESS_POINT(BUDGET_TAKE);
    long left = atomic_load(&budget->left);
    do {
        if (left < pages)
            return false;
        STRESS_POINT(BUDGET_TAKING);
    } while (!atomic_compare_exchange_weak(&budget->left, &left, left - pages));
    if (budget_take(budget->parent, pages))
        return true;
    atomic_fetch_add(&budget->left, pages);
    return false;
}

void budget_give_back(xbd_budget *budget, long pages)
{
    STRESS_POINT(BUDGET_GIVE);
    for (; budget; budget = budget->parent)
        atomic_fetch_add(&budget->left, pages);
}

static long beyond(const struct share *share, long used)
{
    return used > share->reserve ? used - share->reserve : 0;
}

void share_open(struct share *share, xbd_budget *budget, unsigned longest)
{
    share->budget = budget;
    share->used = 0;
    share->reserve = longest + 8 > RESERVE ? (long)longest + 8 : RESERVE;
}

bool share_take(struct share *share, unsigned pages)
{
    long used = share->used + (long)pages;
    long more = beyond(share, used) - beyond(share, share->used);
    if (more && !budget_take(share->budget, more))
        return false;
    share->used = used;
    return true;
}

void share_give_back(struct share *share, unsigned pages)
{
    long used = share->used - (long)pages;
    budget_give_back(share->budget, beyond(share, share->used) - beyond(share, used));
    share->used = used;
}
