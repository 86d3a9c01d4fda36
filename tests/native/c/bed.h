/*
 * A test's bed: a disk in files, a guest in this process, and a connection between them through api.h.  The test
 * itself is both the guest and what is Python elsewhere.
 */
#pragma once

#include "check.h"
#include "fake_xen.h"
#include "front.h"

enum { BED_RINGS = 24, BED_FILES = 2, BED_EVENTS = 4096, BED_IDS = 4096, BED_SECONDS = 10 };

struct bed_setup {
    enum xbd_engine engine;
    unsigned spin_us;
    unsigned threads;               /* 0: one */
    unsigned abi;
    enum xbd_pages_mode mode;
    bool xen;
    unsigned rings;                 /* 0: one */
    uint32_t entries;               /* 0: 32 */
    uint32_t pages;                 /* of the guest, besides the rings; 0: 1024 */
    long budget;                    /* 0: plenty */
    uint64_t size;                  /* 0: 4 MiB */
    struct xbd_limits limits;       /* size is set; no logical_block: 512, and everything is offered */
    uint32_t request_alignment, memory_alignment;
    bool paused;
};

struct bed_ring {
    struct front_ring front;
    uint32_t page;                  /* the first of the ring's */
    int to_backend, to_guest;
    struct fake_evtchn evtchn;
    uint64_t *marks;
    uint32_t *indices;
    uint8_t *copies;
    bool answered[BED_IDS];
    struct response answers[BED_IDS];
};

struct bed {
    struct bed_setup setup;
    struct guest_memory memory;
    uint32_t next_page;
    struct fake_gnttab gnttab;
    struct bed_ring rings[BED_RINGS];
    uint64_t next_id;
    int files[BED_FILES];
    xbd_threads *threads;
    xbd_budget *host, *budget;
    xbd_extents *extents;
    xbd_claims *claims;             /* nothing is lent, unless the test does that */
    xbd_connection *connection;
    struct xbd_event events[BED_EVENTS];        /* fetched, and not asked for by the test yet */
    unsigned nr_events;
};

/* With a connection that is not started.  False: there is no such engine here. */
bool bed_open(struct bed *bed, const struct bed_setup *setup);
/* Stops the connection if there is one, and looks whether everything was given back. */
void bed_close(struct bed *bed);
/* Another connection to the same rings, after the last one was freed: what that one owes is recovered. */
void bed_connect(struct bed *bed);
void bed_stop(struct bed *bed);     /* and frees the connection */

/* -- the guest ----------------------------------------------------------------------------------------- */

/* So many pages of the guest's, granted for writing; the first one's number. */
uint32_t bed_pages(struct bed *bed, unsigned number);
uint8_t *bed_page(struct bed *bed, uint32_t page);
void bed_kick(struct bed *bed, unsigned ring);
/* Sends what was put, with an event if the backend asks for one. */
void bed_send(struct bed *bed, unsigned ring);
/* Puts a request; its id, for bed_answer. */
uint64_t bed_put(struct bed *bed, unsigned ring, uint8_t operation, uint64_t sector,
                 const struct front_segment *segments, unsigned number);
uint64_t bed_put_indirect(struct bed *bed, unsigned ring, uint8_t inner, uint64_t sector,
                          const struct front_segment *segments, unsigned number);
uint64_t bed_put_discard(struct bed *bed, unsigned ring, uint8_t flag, uint64_t sector, uint64_t sectors);
/* Sleeps until the request is answered. */
int bed_answer(struct bed *bed, unsigned ring, uint64_t id);
bool bed_is_answered(struct bed *bed, unsigned ring, uint64_t id);
/* All three of a request with these segments. */
int bed_do(struct bed *bed, unsigned ring, uint8_t operation, uint64_t sector, const struct front_segment *segments,
           unsigned number);

/* -- what is Python elsewhere -------------------------------------------------------------------------- */

/* Disk and file alike, all of it, for both directions. */
void bed_know_everything(struct bed *bed);
/* Waits for the next event of this kind. */
struct xbd_event bed_event(struct bed *bed, enum xbd_event_kind kind);
/* Whether one is there already; it stays. */
bool bed_has_event(struct bed *bed, enum xbd_event_kind kind);
void bed_verdict(struct bed *bed, const struct xbd_event *event, enum xbd_verdict verdict, int status);
/* Does what the request asks for with the first file, and answers it. */
void bed_carry_out(struct bed *bed, const struct xbd_event *event);

/* -- the disk ------------------------------------------------------------------------------------------ */

/* Some bytes that tell where they belong. */
void fill(uint8_t *at, size_t length, uint64_t from);
void bed_file_write(struct bed *bed, unsigned file, uint64_t position, const void *from, size_t length);
void bed_file_read(struct bed *bed, unsigned file, uint64_t position, void *to, size_t length);
/* A moment, for what should not happen meanwhile. */
void moment(void);
double now(void);
