/* The guest's RAM: a sealed memfd, dealt out in pages and never taken back. */
#ifndef BENCH_MEMORY_H
#define BENCH_MEMORY_H

#include <stdint.h>

struct memory {
    int fd;
    uint8_t *base;
    uint32_t pages;
    uint32_t next;
};

/* A memfd of this size that can't shrink, mapped at *address. */
int sealed_memfd(const char *name, uint64_t size, void **address);

void memory_open(struct memory *memory, uint32_t pages);

/* The number of the first of `count` pages that lie side by side. */
uint32_t memory_take(struct memory *memory, uint32_t count);

/* Fills `page` with `count` numbers of pages no two of which are neighbours, in no order: the
 * backend can't merge them, as it can't merge what a long-running guest hands it. */
void memory_take_scattered(struct memory *memory, uint32_t *page, uint32_t count);

static inline void *memory_at(const struct memory *memory, uint32_t page) {
    return memory->base + (uint64_t)page * 4096;
}

#endif
