/*
 * io_uring by its system calls; see uring.h.
 */
#include "uring.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "stress.h"

enum { FILES = 1024 };

/* The best that this kernel knows: completions are worked off by this thread alone, when it asks. */
static int setup(unsigned entries, unsigned completions, struct io_uring_params *params)
{
    static const uint32_t wishes[] = {
#ifdef IORING_SETUP_DEFER_TASKRUN
        IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
#endif
#ifdef IORING_SETUP_COOP_TASKRUN
        IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
#endif
        0,
    };
    for (unsigned i = 0; i < sizeof(wishes) / sizeof(wishes[0]); i++) {
        memset(params, 0, sizeof(*params));
        params->flags = wishes[i] | IORING_SETUP_CQSIZE;
        params->cq_entries = completions;
        int fd = (int)syscall(SYS_io_uring_setup, entries, params);
        if (fd >= 0 || errno != EINVAL)
            return fd;
    }
    return -1;
}

static void *map(int fd, size_t bytes, uint64_t offset)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, (off_t)offset);
    return memory == MAP_FAILED ? NULL : memory;
}

static unsigned register_files(int fd)
{
    struct io_uring_rsrc_register sparse = {.nr = FILES, .flags = IORING_RSRC_REGISTER_SPARSE};
    long result = syscall(SYS_io_uring_register, fd, IORING_REGISTER_FILES2, &sparse, sizeof(sparse));
    return result == 0 ? FILES : 0;
}

bool uring_open(struct uring *uring, unsigned entries, unsigned completions)
{
    struct io_uring_params params;
    memset(uring, 0, sizeof(*uring));
    uring->fd = setup(entries, completions, &params);
    if (uring->fd < 0)
        return false;
    if (!(params.features & IORING_FEAT_EXT_ARG) || !(params.features & IORING_FEAT_NODROP)) {
        close(uring->fd);
        errno = ENOSYS;     /* Linux before 5.11 */
        return false;
    }
    uring->sq_bytes = params.sq_off.array + params.sq_entries * (uint32_t)sizeof(uint32_t);
    uring->cq_bytes = params.cq_off.cqes + params.cq_entries * (uint32_t)sizeof(struct io_uring_cqe);
    uring->sqe_bytes = params.sq_entries * (uint32_t)sizeof(struct io_uring_sqe);
    uring->sq_memory = map(uring->fd, uring->sq_bytes, IORING_OFF_SQ_RING);
    uring->cq_memory = map(uring->fd, uring->cq_bytes, IORING_OFF_CQ_RING);
    uring->sqes = map(uring->fd, uring->sqe_bytes, IORING_OFF_SQES);
    if (!uring->sq_memory || !uring->cq_memory || !uring->sqes) {
        uring_close(uring);
        errno = ENOMEM;
        return false;
    }
    char *sq = uring->sq_memory;
    char *cq = uring->cq_memory;
    uring->entries = params.sq_entries;
    uring->sq_mask = params.sq_entries - 1;
    uring->cq_mask = params.cq_entries - 1;
    uring->sq_head = (uint32_t *)(void *)(sq + params.sq_off.head);
    uring->sq_ktail = (uint32_t *)(void *)(sq + params.sq_off.tail);
    uring->sq_flags = (uint32_t *)(void *)(sq + params.sq_off.flags);
    uring->cq_head = (uint32_t *)(void *)(cq + params.cq_off.head);
    uring->cq_ktail = (uint32_t *)(void *)(cq + params.cq_off.tail);
    uring->cqes = (struct io_uring_cqe *)(void *)(cq + params.cq_off.cqes);
    uint32_t *array = (uint32_t *)(void *)(sq + params.sq_off.array);
    for (uint32_t i = 0; i < params.sq_entries; i++)
        array[i] = i;       /* entries are used in the order in which they lie */
    uring->files = register_files(uring->fd);
    return true;
}

void uring_close(struct uring *uring)
{
    if (uring->sq_memory)
        munmap(uring->sq_memory, uring->sq_bytes);
    if (uring->cq_memory)
        munmap(uring->cq_memory, uring->cq_bytes);
    if (uring->sqes)
        munmap(uring->sqes, uring->sqe_bytes);
    close(uring->fd);
    uring->fd = -1;
}

int uring_enter(struct uring *uring, unsigned wait, uint64_t timeout_ns)
{
    struct __kernel_timespec timeout = {
        .tv_sec = (int64_t)(timeout_ns / 1000000000),
        .tv_nsec = (long long)(timeout_ns % 1000000000),
    };
    struct io_uring_getevents_arg argument = {.ts = (uint64_t)(uintptr_t)&timeout};
    unsigned flags = IORING_ENTER_GETEVENTS;
    void *extra = NULL;
    size_t extra_bytes = 0;
    if (wait && timeout_ns != UINT64_MAX) {
        flags |= IORING_ENTER_EXT_ARG;
        extra = &argument;
        extra_bytes = sizeof(argument);
    }
    STRESS_POINT(KERNEL_SUBMIT);
    uring_store(uring->sq_ktail, uring->sq_tail);
    long taken = syscall(SYS_io_uring_enter, uring->fd, uring->queued, wait, flags, extra, extra_bytes);
    if (taken < 0)
        return errno == EINTR || errno == ETIME ? 0 : errno;
    uring->queued -= (unsigned)taken;
    return 0;
}

bool uring_pending(struct uring *uring)
{
    if (uring_peek(uring))
        return true;
    /* The flags may be left over from what was done already: only doing it tells. */
    uint32_t flags = atomic_load_explicit((const _Atomic uint32_t *)uring->sq_flags, memory_order_relaxed);
    if (flags & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW))
        uring_enter(uring, 0, 0);
    return uring_peek(uring);
}

bool uring_set_file(struct uring *uring, unsigned index, int fd)
{
    if (index >= uring->files)
        return false;
    struct io_uring_files_update update = {.offset = index, .fds = (uint64_t)(uintptr_t)&fd};
    return syscall(SYS_io_uring_register, uring->fd, IORING_REGISTER_FILES_UPDATE, &update, 1) == 1;
}
