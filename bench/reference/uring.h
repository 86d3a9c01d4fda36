/* As much of io_uring as the reference server needs, by raw system calls. */
#ifndef BENCH_URING_H
#define BENCH_URING_H

#include <errno.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SQ_ENTRIES = 1024, CQ_ENTRIES = 16384 };

struct uring {
    int fd;
    unsigned *sq_head, *sq_tail, *sq_mask, *cq_head, *cq_tail, *cq_mask;
    struct io_uring_sqe *sqe;
    struct io_uring_cqe *cqe;
    unsigned staged; /* entries that the kernel has not been told of */
    void *map[3];
    size_t size[3];
};

static inline char *uring_map(struct uring *uring, unsigned number, size_t size, off_t offset) {
    void *at =
        mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, uring->fd, offset);
    uring->map[number] = at == MAP_FAILED ? NULL : at;
    uring->size[number] = size;
    return uring->map[number];
}

/* -1 and errno if there is none. */
static inline int uring_open(struct uring *uring) {
    const unsigned best = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
    struct io_uring_params params = {.flags = best | IORING_SETUP_CQSIZE, .cq_entries = CQ_ENTRIES};
    uring->fd = (int)syscall(SYS_io_uring_setup, SQ_ENTRIES, &params);
    if (uring->fd < 0 && errno == EINVAL) { /* before Linux 6.1 */
        params = (struct io_uring_params){.flags = IORING_SETUP_CQSIZE, .cq_entries = CQ_ENTRIES};
        uring->fd = (int)syscall(SYS_io_uring_setup, SQ_ENTRIES, &params);
    }
    if (uring->fd < 0)
        return -1;
    size_t sq_size = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    size_t cq_size = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    char *sq = uring_map(uring, 0, sq_size, IORING_OFF_SQ_RING);
    char *cq = uring_map(uring, 1, cq_size, IORING_OFF_CQ_RING);
    size_t sqe_size = params.sq_entries * sizeof *uring->sqe;
    uring->sqe = (void *)uring_map(uring, 2, sqe_size, IORING_OFF_SQES);
    if (!sq || !cq || !uring->sqe)
        return -1;
    uring->sq_head = (unsigned *)(void *)(sq + params.sq_off.head);
    uring->sq_tail = (unsigned *)(void *)(sq + params.sq_off.tail);
    uring->sq_mask = (unsigned *)(void *)(sq + params.sq_off.ring_mask);
    unsigned *array = (unsigned *)(void *)(sq + params.sq_off.array);
    for (unsigned i = 0; i < params.sq_entries; i++)
        array[i] = i;
    uring->cq_head = (unsigned *)(void *)(cq + params.cq_off.head);
    uring->cq_tail = (unsigned *)(void *)(cq + params.cq_off.tail);
    uring->cq_mask = (unsigned *)(void *)(cq + params.cq_off.ring_mask);
    uring->cqe = (struct io_uring_cqe *)(void *)(cq + params.cq_off.cqes);
    return 0;
}

static inline void uring_close(struct uring *uring) {
    for (unsigned i = 0; i < 3; i++)
        munmap(uring->map[i], uring->size[i]);
    close(uring->fd);
}

/* Tells the kernel what is staged, and waits until there are `wait` answers. */
static inline int uring_enter(struct uring *uring, unsigned wait) {
    long done = syscall(SYS_io_uring_enter, uring->fd, uring->staged, wait, IORING_ENTER_GETEVENTS,
                        NULL, 0);
    if (done < 0)
        return errno == EINTR || errno == EAGAIN || errno == EBUSY ? 0 : -1;
    uring->staged -= (unsigned)done;
    return 0;
}

/* A cleared entry to fill in; NULL if the kernel takes none now. */
static inline struct io_uring_sqe *uring_stage(struct uring *uring) {
    unsigned tail = *uring->sq_tail;
    if (tail - __atomic_load_n(uring->sq_head, __ATOMIC_ACQUIRE) == SQ_ENTRIES)
        if (uring_enter(uring, 0) < 0 ||
            tail - __atomic_load_n(uring->sq_head, __ATOMIC_ACQUIRE) == SQ_ENTRIES)
            return NULL;
    struct io_uring_sqe *sqe = &uring->sqe[tail & *uring->sq_mask];
    memset(sqe, 0, sizeof *sqe);
    __atomic_store_n(uring->sq_tail, tail + 1, __ATOMIC_RELEASE);
    uring->staged++;
    return sqe;
}

#endif
