/*
 * Recovery of a ring's journal; see recover.h.
 */
#include "recover.h"

#include <stdbool.h>
#include <string.h>

#include "check.h"

static const uint64_t VALID = UINT64_C(1) << 32;

struct left {
    uint32_t index;
    uint32_t slot;
};

/* By index; one may have wrapped around, or be much older than rsp_prod. */
static unsigned sort_open(const uint64_t *marks, const uint32_t *indices, uint32_t entries, uint32_t rsp_prod,
                          struct left *left)
{
    unsigned count = 0;
    for (uint32_t slot = 0; slot < entries; slot++) {
        if (!marks[slot])
            continue;
        CHECK(marks[slot] == VALID);
        unsigned at = count++;
        for (; at && (int32_t)(left[at - 1].index - rsp_prod) > (int32_t)(indices[slot] - rsp_prod); at--)
            left[at] = left[at - 1];
        left[at] = (struct left){indices[slot], slot};
    }
    return count;
}

unsigned recover(uint64_t *marks, uint32_t *indices, uint8_t *copies, uint32_t entries, uint32_t entry_size,
                 uint32_t rsp_prod)
{
    struct left *left = calloc(entries, sizeof(*left));
    uint8_t *kept = malloc((size_t)entries * entry_size);
    CHECK(left && kept);
    unsigned count = sort_open(marks, indices, entries, rsp_prod, left);
    for (unsigned i = 0; i < count; i++) {
        CHECK(!i || left[i].index != left[i - 1].index);
        memcpy(kept + (size_t)i * entry_size, copies + (size_t)left[i].slot * entry_size, entry_size);
    }
    memcpy(copies, kept, (size_t)count * entry_size);
    for (uint32_t slot = 0; slot < entries; slot++) {
        marks[slot] = slot < count ? VALID : 0;
        indices[slot] = slot < count ? left[slot].index : 0;
    }
    free(left);
    free(kept);
    return count;
}
