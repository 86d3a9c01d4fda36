/* Latencies in nanoseconds, to within 1.6 %. */
#ifndef BENCH_HISTOGRAM_H
#define BENCH_HISTOGRAM_H

#include <stdint.h>

enum { HISTOGRAM_STEPS = 64, HISTOGRAM_BUCKETS = HISTOGRAM_STEPS * 32 };

struct histogram {
    uint64_t count[HISTOGRAM_BUCKETS];
    uint64_t total;
};

void histogram_add(struct histogram *histogram, uint64_t nanoseconds);

/* The value that `fraction` (0 to 1) of all lie at or below. */
double histogram_quantile(const struct histogram *histogram, double fraction);

#endif
