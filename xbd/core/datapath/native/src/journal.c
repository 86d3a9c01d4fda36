/*
 * A ring's journal; see journal.h.
 *
 * A kill leaves behind what the processor has done up to some instruction.  So nothing else is needed for the
 * order of the stores than that the compiler keeps it, which the fences make it do; what they cost elsewhere is
 * nothing on x86, and little on other machines.
 */
#include "journal.h"

#include <assert.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "stress.h"

static const uint64_t VALID = UINT64_C(1) << 32;
static const uint64_t ANSWERING = UINT64_C(2) << 32;

/* After all that was stored before, and before all that is stored later. */
static void mark(struct journal *journal, unsigned slot, uint64_t value)
{
    _Atomic uint64_t *at = (_Atomic uint64_t *)&journal->marks[slot];
    STRESS_POINT(JOURNAL_MARK);
    atomic_store_explicit(at, value, memory_order_release);
    atomic_thread_fence(memory_order_release);
}

bool journal_open(struct journal *journal, uint64_t *marks, uint32_t *indices, uint8_t *copies, unsigned entries,
                  unsigned entry_size, unsigned owed)
{
    *journal = (struct journal){
        .marks = marks, .indices = indices, .copies = copies, .entries = entries, .entry_size = entry_size};
    journal->free = malloc(entries * sizeof(*journal->free));
    if (!journal->free)
        return false;
    for (unsigned slot = entries; slot-- > owed;)
        journal->free[journal->nr_free++] = (uint16_t)slot;
    return true;
}

void journal_close(struct journal *journal)
{
    free(journal->free);
    journal->free = NULL;
    journal->nr_free = 0;
}

uint8_t *journal_next(const struct journal *journal)
{
    assert(journal->nr_free);
    return journal->copies + (size_t)journal->free[journal->nr_free - 1] * journal->entry_size;
}

unsigned journal_record(struct journal *journal, uint32_t index)
{
    unsigned slot = journal->free[--journal->nr_free];
    journal->indices[slot] = index;
    mark(journal, slot, VALID);
    return slot;
}

void journal_answering(struct journal *journal, unsigned slot, uint32_t response)
{
    mark(journal, slot, ANSWERING | response);
}

void journal_clear(struct journal *journal, unsigned slot)
{
    mark(journal, slot, 0);
    journal->free[journal->nr_free++] = (uint16_t)slot;
}
