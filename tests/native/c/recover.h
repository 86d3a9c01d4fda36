/*
 * What Python does between two connections to a ring (datapath/recovery.py, journal.py): the requests that the last
 * one left unanswered go into the first slots, in the order in which they were consumed.
 *
 * Nobody was killed here, so what was answered was cleared as well.
 */
#pragma once

#include <stdint.h>

/* How many there are. */
unsigned recover(uint64_t *marks, uint32_t *indices, uint8_t *copies, uint32_t entries, uint32_t entry_size,
                 uint32_t rsp_prod);
