/* The x86_64 layout of xen/include/public/io/blkif.h and ring.h. */
#ifndef BENCH_BLKIF_LAYOUT_H
#define BENCH_BLKIF_LAYOUT_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

enum { BLKIF_READ = 0, BLKIF_WRITE = 1, BLKIF_INDIRECT = 6, BLKIF_OKAY = 0 };
enum { BLKIF_SEGMENTS = 11, BLKIF_INDIRECT_PAGES = 8, BLKIF_LAST_SECTOR = 7 };

struct blkif_segment {
    uint32_t gref;
    uint8_t first_sector, last_sector;
    uint16_t padding;
};

struct blkif_direct {
    uint8_t operation, segments;
    uint16_t handle;
    uint64_t id, sector;
    struct blkif_segment segment[BLKIF_SEGMENTS];
};

struct blkif_indirect {
    uint8_t operation, inner;
    uint16_t segments;
    uint64_t id, sector;
    uint16_t handle;
    uint32_t gref[BLKIF_INDIRECT_PAGES];
};

struct blkif_response {
    uint64_t id;
    uint8_t operation;
    int16_t status;
};

union blkif_entry {
    struct blkif_direct direct;
    struct blkif_indirect indirect;
    struct blkif_response response;
};

struct blkif_ring {
    uint32_t request_produced, request_event, response_produced, response_event;
    uint8_t padding[48];
    union blkif_entry entry[];
};

static_assert(sizeof(struct blkif_segment) == 8, "segment");
static_assert(sizeof(union blkif_entry) == 112, "entry");
static_assert(sizeof(struct blkif_response) == 16, "response");
static_assert(offsetof(struct blkif_direct, id) == 8, "id");
static_assert(offsetof(struct blkif_direct, sector) == 16, "sector");
static_assert(offsetof(struct blkif_direct, segment) == 24, "segments");
static_assert(offsetof(struct blkif_indirect, handle) == 24, "handle");
static_assert(offsetof(struct blkif_indirect, gref) == 28, "grefs");
static_assert(offsetof(struct blkif_ring, entry) == 64, "ring");

#endif
