/*
 * What the hypervisor's services cost in this domain, which grants its pages and offers its ports to itself: the system
 * calls are those that Xen's libraries make, with nothing around them.
 *
 * micro ROUNDS: prints a line "NAME NANOSECONDS" for each service: per call, the median of ROUNDS calls, without what
 * reading the clock takes.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

typedef uint32_t grant_ref_t; /* the kernel's headers want these of Xen's */
typedef uint16_t domid_t;
#include <xen/evtchn.h>
#include <xen/gntalloc.h>
#include <xen/gntdev.h>

enum { PAGE = 4096, MANY = 32, DOMID = 0, DEST_IS_GRANT = 2, EVENT_WAIT_MS = 10000 };

static void fail(const char *what) {
    fprintf(stderr, "micro: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* What one call takes, again and again. */
struct watch {
    int64_t began_ns;
    int64_t *taken_ns;
    long count;
};

static long rounds;
static double clock_ns; /* what reading it takes */

static struct watch new_watch(void) {
    struct watch watch = {.taken_ns = calloc((size_t)rounds, sizeof *watch.taken_ns)};
    if (!watch.taken_ns)
        fail("memory");
    return watch;
}

static void watch_start(struct watch *watch) {
    watch->began_ns = now_ns();
}

static void watch_stop(struct watch *watch) {
    watch->taken_ns[watch->count++] = now_ns() - watch->began_ns;
}

static int compare(const void *left, const void *right) {
    int64_t one = *(const int64_t *)left, other = *(const int64_t *)right;
    return (one > other) - (one < other);
}

static double median_ns(struct watch *watch) {
    qsort(watch->taken_ns, (size_t)watch->count, sizeof *watch->taken_ns, compare);
    double median = (double)watch->taken_ns[watch->count / 2];
    free(watch->taken_ns);
    return median;
}

static void measure_clock(void) {
    struct watch nothing = new_watch();
    for (long round = 0; round < rounds; round++) {
        watch_start(&nothing);
        watch_stop(&nothing);
    }
    clock_ns = median_ns(&nothing);
}

/* Each of the calls has done the same so many times. */
static void tell(const char *name, struct watch *watch, unsigned times) {
    printf("%s %.0f\n", name, (median_ns(watch) - clock_ns) / times);
}

static int open_device(const char *path) {
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        fail(path);
    return fd;
}

/* MANY pages of ours, as a guest's; their references go to `refs`. */
static unsigned char *grant_pages(uint32_t *refs) {
    int fd = open_device("/dev/xen/gntalloc");
    struct ioctl_gntalloc_alloc_gref *order = calloc(1, sizeof *order + MANY * sizeof order->gref_ids[0]);
    if (!order)
        fail("memory");
    order->domid = DOMID;
    order->flags = GNTALLOC_FLAG_WRITABLE;
    order->count = MANY;
    if (ioctl(fd, IOCTL_GNTALLOC_ALLOC_GREF, order))
        fail("granting pages");
    memcpy(refs, order->gref_ids, MANY * sizeof *refs);
    void *pages = mmap(NULL, MANY * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)order->index);
    if (pages == MAP_FAILED)
        fail("mapping pages of our own");
    memset(pages, 1, MANY * PAGE);
    free(order);
    return pages;
}

static unsigned char *map(int gntdev, const uint32_t *refs, unsigned count) {
    static struct {
        struct ioctl_gntdev_map_grant_ref order;
        struct ioctl_gntdev_grant_ref more[MANY];
    } memory;
    struct ioctl_gntdev_map_grant_ref *order = &memory.order;
    order->count = count;
    for (unsigned page = 0; page < count; page++) {
        struct ioctl_gntdev_grant_ref ref = {.domid = DOMID, .ref = refs[page]};
        memcpy((char *)order->refs + page * sizeof ref, &ref, sizeof ref);
    }
    if (ioctl(gntdev, IOCTL_GNTDEV_MAP_GRANT_REF, order))
        fail("describing grants to map");
    void *pages = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, gntdev, (off_t)order->index);
    if (pages == MAP_FAILED)
        fail("mapping grants");
    return pages;
}

/* As libxengnttab does, which keeps no note of the index. */
static void unmap(int gntdev, unsigned char *pages, unsigned count) {
    struct ioctl_gntdev_get_offset_for_vaddr where = {.vaddr = (uintptr_t)pages};
    if (ioctl(gntdev, IOCTL_GNTDEV_GET_OFFSET_FOR_VADDR, &where))
        fail("finding a mapping");
    if (munmap(pages, count * PAGE))
        fail("unmapping");
    struct ioctl_gntdev_unmap_grant_ref order = {.index = where.offset, .count = count};
    if (ioctl(gntdev, IOCTL_GNTDEV_UNMAP_GRANT_REF, &order))
        fail("unmapping grants");
}

static void measure_map(int gntdev, const uint32_t *refs, unsigned count, const char *mapping,
                        const char *unmapping) {
    struct watch mapped = new_watch(), unmapped = new_watch();
    for (long round = 0; round < rounds; round++) {
        watch_start(&mapped);
        unsigned char *pages = map(gntdev, refs, count);
        watch_stop(&mapped);
        watch_start(&unmapped);
        unmap(gntdev, pages, count);
        watch_stop(&unmapped);
    }
    tell(mapping, &mapped, 1);
    tell(unmapping, &unmapped, 1);
}

static void measure_copy(int gntdev, const uint32_t *refs, unsigned count, const char *name) {
    static unsigned char buffer[MANY * PAGE] __attribute__((aligned(PAGE)));
    memset(buffer, 2, sizeof buffer);
    struct watch copied = new_watch();
    for (long round = 0; round < rounds; round++) {
        struct gntdev_grant_copy_segment segments[MANY];
        memset(segments, 0, sizeof segments);
        for (unsigned page = 0; page < count; page++) {
            segments[page].source.virt = buffer + page * PAGE;
            segments[page].dest.foreign.ref = refs[page];
            segments[page].dest.foreign.domid = DOMID;
            segments[page].len = PAGE;
            segments[page].flags = DEST_IS_GRANT;
        }
        struct ioctl_gntdev_grant_copy order = {.count = count, .segments = segments};
        watch_start(&copied);
        int result = ioctl(gntdev, IOCTL_GNTDEV_GRANT_COPY, &order);
        watch_stop(&copied);
        if (result)
            fail("copying to grants");
        for (unsigned page = 0; page < count; page++) {
            if (segments[page].status) {
                fprintf(stderr, "micro: copying to a grant: status %d\n", segments[page].status);
                exit(1);
            }
        }
    }
    tell(name, &copied, 1);
}

/* What a page costs whose grant is mapped already: the copy into it, as a read from the page cache makes it. */
static void measure_persistent_hit(int gntdev, const uint32_t *refs) {
    static unsigned char buffer[MANY * PAGE] __attribute__((aligned(PAGE)));
    unsigned char *pages = map(gntdev, refs, MANY);
    struct watch hit = new_watch();
    for (long round = 0; round < rounds; round++) {
        memset(buffer, (int)round, sizeof buffer);
        watch_start(&hit);
        for (unsigned page = 0; page < MANY; page++)
            memcpy(pages + page * PAGE, buffer + page * PAGE, PAGE);
        watch_stop(&hit);
    }
    unmap(gntdev, pages, MANY);
    tell("hit", &hit, MANY);
}

static void wait_pending(int fd) {
    struct pollfd wanted = {.fd = fd, .events = POLLIN};
    if (poll(&wanted, 1, EVENT_WAIT_MS) != 1) {
        fprintf(stderr, "micro: an event did not arrive\n");
        exit(1);
    }
}

static void measure_events(void) {
    int ours = open_device("/dev/xen/evtchn"), theirs = open_device("/dev/xen/evtchn");
    struct ioctl_evtchn_bind_unbound_port offer = {.remote_domain = DOMID};
    int port = ioctl(ours, IOCTL_EVTCHN_BIND_UNBOUND_PORT, &offer);
    if (port < 0)
        fail("offering a port");
    struct ioctl_evtchn_bind_interdomain bind = {.remote_domain = DOMID, .remote_port = (unsigned)port};
    int remote = ioctl(theirs, IOCTL_EVTCHN_BIND_INTERDOMAIN, &bind);
    if (remote < 0)
        fail("binding a port");

    struct watch notified = new_watch(), read_port = new_watch(), unmasked = new_watch();
    struct ioctl_evtchn_notify notify = {.port = (unsigned)remote};
    for (long round = 0; round < rounds; round++) {
        uint32_t pending;
        watch_start(&notified);
        int result = ioctl(theirs, IOCTL_EVTCHN_NOTIFY, &notify);
        watch_stop(&notified);
        if (result)
            fail("notifying");
        wait_pending(ours);
        watch_start(&read_port);
        ssize_t got = read(ours, &pending, sizeof pending);
        watch_stop(&read_port);
        if (got != sizeof pending || pending != (uint32_t)port)
            fail("reading a pending port");
        watch_start(&unmasked);
        ssize_t put = write(ours, &pending, sizeof pending);
        watch_stop(&unmasked);
        if (put != sizeof pending)
            fail("unmasking");
    }
    tell("notify", &notified, 1);
    tell("read-port", &read_port, 1);
    tell("unmask", &unmasked, 1);
    close(theirs);
    close(ours);
}

int main(int count, char **words) {
    rounds = count == 2 ? strtol(words[1], NULL, 10) : 0;
    if (rounds < 1) {
        fprintf(stderr, "usage: micro ROUNDS\n");
        return 2;
    }
    uint32_t refs[MANY];
    grant_pages(refs);
    int gntdev = open_device("/dev/xen/gntdev");
    measure_clock();
    measure_map(gntdev, refs, 1, "map-1", "unmap-1");
    measure_map(gntdev, refs, MANY, "map-32", "unmap-32");
    measure_copy(gntdev, refs, 1, "copy-1");
    measure_copy(gntdev, refs, MANY, "copy-32");
    measure_persistent_hit(gntdev, refs);
    measure_events();
    return 0;
}
