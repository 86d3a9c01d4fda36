/* What every part of the load generator needs: giving up with a reason, and the time. */
#ifndef BENCH_UTIL_H
#define BENCH_UTIL_H

#include <stddef.h>
#include <stdint.h>

enum { PAGE_SIZE = 4096, SECTOR_SIZE = 512 };

/* Ends the program with one line on stderr and status 1. */
_Noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* As above, with the meaning of errno appended. */
_Noreturn void die_errno(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* CLOCK_MONOTONIC in nanoseconds. */
uint64_t now_ns(void);

void *allocate(size_t count, size_t size);

/* A number in [0, limit) that depends on *state alone, so that every run asks for the same. */
uint64_t random_below(uint64_t *state, uint64_t limit);

int connect_unix(const char *path, int type);

enum { MAX_FDS = 3 };

/* Sends a message with up to MAX_FDS descriptors; the whole of it, or the program ends. */
void send_with_fds(int socket, const void *data, size_t length, const int *fds, unsigned count);

/* Receives exactly `length` bytes; `what` names the peer if it hangs up. */
void receive_all(int socket, void *data, size_t length, const char *what);

int make_eventfd(void);
void ring_eventfd(int fd);

#endif
