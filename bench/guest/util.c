#define _GNU_SOURCE
#include "util.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static _Noreturn void vdie(const char *format, va_list arguments, const char *reason) {
    fputs("bench-guest: ", stderr);
    vfprintf(stderr, format, arguments);
    if (reason)
        fprintf(stderr, ": %s", reason);
    fputc('\n', stderr);
    exit(1);
}

void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vdie(format, arguments, NULL);
}

void die_errno(const char *format, ...) {
    const char *reason = strerror(errno);
    va_list arguments;
    va_start(arguments, format);
    vdie(format, arguments, reason);
}

uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void *allocate(size_t count, size_t size) {
    void *memory = calloc(count, size);
    if (!memory)
        die("out of memory");
    return memory;
}

uint64_t random_below(uint64_t *state, uint64_t limit) {
    uint64_t x = *state; /* xorshift64*: the high bits are the good ones */
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *state = x;
    return (uint64_t)((__extension__(unsigned __int128)(x * 0x2545F4914F6CDD1Du) * limit) >> 64);
}

int connect_unix(const char *path, int type) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        die("%s: too long for a socket's path", path);
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
    if (fd < 0)
        die_errno("socket");
    if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0)
        return fd;
    int reason = errno;
    close(fd);
    errno = reason;
    return -1;
}

void send_with_fds(int socket, const void *data, size_t length, const int *fds, unsigned count) {
    union {
        char space[CMSG_SPACE(MAX_FDS * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec part = {.iov_base = (void *)(uintptr_t)data, .iov_len = length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        memset(&control, 0, sizeof control);
        message.msg_control = control.space;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(header), fds, count * sizeof(int));
    }
    ssize_t sent = sendmsg(socket, &message, MSG_NOSIGNAL);
    if (sent < 0)
        die_errno("sendmsg");
    if ((size_t)sent != length)
        die("a message of %zu bytes was sent in part", length);
}

void receive_all(int socket, void *data, size_t length, const char *what) {
    ssize_t got = recv(socket, data, length, MSG_WAITALL);
    if (got < 0)
        die_errno("%s", what);
    if ((size_t)got != length)
        die("%s hung up", what);
}

int make_eventfd(void) {
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (fd < 0)
        die_errno("eventfd");
    return fd;
}

void ring_eventfd(int fd) {
    if (eventfd_write(fd, 1) < 0 && errno != EAGAIN) /* EAGAIN: an event is pending anyway */
        die_errno("eventfd");
}
