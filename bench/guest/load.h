/* The closed loop: a fixed number of operations in flight, a new one for each that ends. */
#ifndef BENCH_LOAD_H
#define BENCH_LOAD_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "histogram.h"
#include "transport.h"

enum { MAX_WATCHED = 8 };

enum verify { VERIFY_NOT, VERIFY_SAMPLE, VERIFY_FULL };

struct load_options {
    uint32_t depth;
    uint32_t block; /* bytes per operation, a multiple of a page */
    uint64_t span; /* bytes from the start of the disk that are used; 0: all of it */
    uint64_t touch; /* bytes: first one block in each of them; 0: none */
    unsigned write_percent;
    bool sequential;
    double warmup_seconds; /* not counted */
    double seconds; /* counted; 0: until `operations` are done */
    uint64_t operations; /* counted; 0: until `seconds` are over */
    uint64_t seed;
    uint64_t spin_ns; /* how long it looks for answers before it sleeps */
    enum verify verify;
    uint32_t generation; /* of what is written */
    uint32_t check_back; /* at most this many written blocks are read again afterwards */
    pid_t watched[MAX_WATCHED]; /* processes whose CPU time is reported, as one sum */
    unsigned watched_count;
};

struct load_result {
    struct histogram latency;
    double seconds;
    uint64_t operations, errors, mismatches, checked_back;
    uint64_t requests, kicks, wakeups;
    double guest_cpu_seconds, watched_cpu_seconds;
};

void load_run(const struct load_options *options, struct transport *transport,
              struct memory *memory, struct load_result *result);

#endif
