/*
 * A ring's journal: which consumed requests have no answer yet (datapath/journal.py, layout and rule).
 *
 * The memory is Python's, and outlives this process.  What is written here is written in the order in which
 * the functions are called, for whoever reads it after a kill at any instruction.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

struct journal {
    uint64_t *marks;
    uint32_t *indices;
    uint8_t *copies;
    uint16_t *free;                 /* a stack of slots */
    unsigned nr_free;
    unsigned entries, entry_size;
};

/* The first `owed` slots are taken already.  False with errno set. */
bool journal_open(struct journal *journal, uint64_t *marks, uint32_t *indices, uint8_t *copies, unsigned entries,
                  unsigned entry_size, unsigned owed);
void journal_close(struct journal *journal);
/* Where the copy of the request that is consumed next has to be.  There is always a slot free: no more are open
 * than the ring has entries. */
uint8_t *journal_next(const struct journal *journal);
/* The copy is there: marks it VALID; its slot. */
unsigned journal_record(struct journal *journal, uint32_t index);
/* It is done, and its response will be written at this index. */
void journal_answering(struct journal *journal, unsigned slot, uint32_t response);
/* Its response is published. */
void journal_clear(struct journal *journal, unsigned slot);
