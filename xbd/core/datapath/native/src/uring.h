/*
 * A plain io_uring by its system calls (io_uring(7)): one owner, no locks.
 *
 * All of it happens in the thread that opened it, as IORING_SETUP_SINGLE_ISSUER wants.
 */
#pragma once

#include <linux/io_uring.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "stress.h"

struct uring {
    int fd;
    unsigned entries;                           /* of the submission queue */
    unsigned queued;                            /* entries that were filled and not taken by the kernel yet */
    unsigned sq_mask, cq_mask, sq_tail;
    uint32_t *sq_head, *sq_ktail, *sq_flags;    /* shared with the kernel */
    uint32_t *cq_head, *cq_ktail;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    unsigned files;                             /* how many descriptors can be registered */
    void *sq_memory, *cq_memory;
    uint32_t sq_bytes, cq_bytes, sqe_bytes;
};

/* A word that the kernel writes, and what was stored before it; and the other way round. */
static inline unsigned uring_load(const uint32_t *word)
{
    return atomic_load_explicit((const _Atomic uint32_t *)word, memory_order_acquire);
}

static inline void uring_store(uint32_t *word, unsigned value)
{
    atomic_store_explicit((_Atomic uint32_t *)word, value, memory_order_release);
}

/* An empty entry to fill, or NULL: uring_enter first. */
static inline struct io_uring_sqe *uring_sqe(struct uring *uring)
{
    if (uring->sq_tail - uring_load(uring->sq_head) >= uring->entries)
        return NULL;
    struct io_uring_sqe *sqe = &uring->sqes[uring->sq_tail++ & uring->sq_mask];
    memset(sqe, 0, sizeof(*sqe));
    uring->queued++;
    return sqe;
}

/* The next completion, or NULL; uring_seen when it has been read. */
static inline const struct io_uring_cqe *uring_peek(const struct uring *uring)
{
    STRESS_POINT(KERNEL_REAP);
    uint32_t head = *uring->cq_head;
    return head == uring_load(uring->cq_ktail) ? NULL : &uring->cqes[head & uring->cq_mask];
}

static inline void uring_seen(struct uring *uring)
{
    uring_store(uring->cq_head, *uring->cq_head + 1);
}

/* False with errno set. */
bool uring_open(struct uring *uring, unsigned entries, unsigned completions);
void uring_close(struct uring *uring);
/* Hands everything queued to the kernel, and waits until `wait` completions are there, or a signal, or for
 * timeout_ns nanoseconds (UINT64_MAX: without end).  0, or an errno: EAGAIN and EBUSY when the kernel can't
 * take more before completions are reaped. */
int uring_enter(struct uring *uring, unsigned wait, uint64_t timeout_ns);
/* Whether there is a completion; the kernel is entered if it says that it has left something to do. */
bool uring_pending(struct uring *uring);
/* Lets fd be used as IOSQE_FIXED_FILE, by its own number; -1 takes `index` back.  False: it can't. */
bool uring_set_file(struct uring *uring, unsigned index, int fd);
