#define _GNU_SOURCE
#include "memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "util.h"

int sealed_memfd(const char *name, uint64_t size, void **address) {
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || ftruncate(fd, (off_t)size) < 0 ||
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) < 0)
        die_errno("memfd");
    *address = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (*address == MAP_FAILED)
        die_errno("mmap");
    return fd;
}

void memory_open(struct memory *memory, uint32_t pages) {
    void *base;
    memory->fd = sealed_memfd("bench-guest-memory", (uint64_t)pages * PAGE_SIZE, &base);
    memory->base = base;
    memory->pages = pages;
    memory->next = 1; /* as a reference, page 0 is more often a mistake than a page */
}

uint32_t memory_take(struct memory *memory, uint32_t count) {
    if (count > memory->pages - memory->next)
        die("the guest's %u pages of memory are not enough", memory->pages);
    uint32_t first = memory->next;
    memory->next += count;
    return first;
}

void memory_take_scattered(struct memory *memory, uint32_t *page, uint32_t count) {
    uint32_t first = memory_take(memory, 2 * count);
    uint64_t random = 0x5851F42D4C957F2Du;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t j = (uint32_t)random_below(&random, i + 1);
        page[i] = page[j];
        page[j] = first + 2 * i;
    }
}
