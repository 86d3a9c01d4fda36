/*
 * The stress test's guest: see stress_world.h.
 *
 * Each ring has a thread.  Each place in a ring has pages and sectors of its own, so that whatever is in flight
 * never overlaps, and the guest knows what each sector must hold.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "delays.h"
#include "stress_world.h"

enum { WORDS = SECTOR / 8 };

struct slot {
    bool busy;
    uint32_t generation;
    uint8_t operation;
    bool indirect;
    int16_t status;                     /* that has to be answered */
    unsigned first, sectors;            /* of the slot's part of the disk */
    unsigned nr_segments;
    struct front_segment segments[SLOT_PAGES];
    uint32_t held[SLOT_SECTORS];        /* versions; 0: zeros */
    uint32_t version;                   /* being written */
};

struct guest {
    pthread_t thread;
    struct world *world;
    struct ring_state *state;
    unsigned number;
    struct front_ring ring;
    struct slot *slots;
    uint32_t page;                      /* the first of the slots' */
    uint64_t dice;
    uint32_t in_flight;
    uint32_t depth;                     /* for now */
    unsigned until_new_depth;
    unsigned looks;                     /* that the last answer took */
    uint32_t next_version;
};

static _Noreturn void complain(const struct guest *guest, const char *what, uint64_t id, int status)
{
    fprintf(stderr, "FOUND ring %u: %s: id %lx, status %d\n", guest->number, what, (unsigned long)id, status);
    _exit(1);
}

/* -- bytes --------------------------------------------------------------------------------------------- */

static uint8_t *page_at(const struct guest *guest, uint32_t page)
{
    return guest->world->memory.writable + (size_t)page * PAGE;
}

static uint32_t data_page(const struct guest *guest, uint32_t slot, unsigned page)
{
    return guest->page + slot * (SLOT_PAGES + 1) + page;
}

static uint64_t first_word(const struct guest *guest, uint32_t slot, unsigned sector, uint32_t version)
{
    uint64_t where = (uint64_t)guest->number << 48 | (uint64_t)slot << 32 | (uint64_t)sector << 24;
    return (where ^ version) * UINT64_C(0x9e3779b97f4a7c15) | 1;
}

static void fill_sector(uint64_t *at, uint64_t first, uint32_t version)
{
    for (unsigned i = 0; i < WORDS; i++)
        at[i] = version ? first * (i + 1) : 0;
}

static bool holds(const uint64_t *at, uint64_t first, uint32_t version)
{
    uint64_t differ = 0;
    for (unsigned i = 0; i < WORDS; i++)
        differ |= at[i] ^ (version ? first * (i + 1) : 0);
    return !differ;
}

enum what { FILL, SPOIL, VERIFY };

/* Goes through the sectors of a request, where they lie in memory. */
static bool walk(const struct guest *guest, const struct slot *slot, enum what what)
{
    uint32_t number = (uint32_t)(slot - guest->slots);
    unsigned sector = slot->first;
    for (unsigned i = 0; i < slot->nr_segments; i++) {
        const struct front_segment *segment = &slot->segments[i];
        for (unsigned j = segment->first; j <= segment->last; j++, sector++) {
            uint64_t *at = (uint64_t *)(void *)(page_at(guest, segment->gref) + j * SECTOR);
            uint32_t version = what == FILL ? slot->version : slot->held[sector];
            uint64_t first = first_word(guest, number, sector, version);
            if (what == FILL)
                fill_sector(at, first, version);
            else if (what == SPOIL)
                at[0] = at[WORDS - 1] = ~first;
            else if (!holds(at, first, version))
                return false;
        }
    }
    return true;
}

/* -- requests ------------------------------------------------------------------------------------------ */

/* The sectors in up to four parts of pages. */
static void cut(struct guest *guest, struct slot *slot)
{
    uint32_t number = (uint32_t)(slot - guest->slots);
    unsigned left = slot->sectors;
    slot->nr_segments = 0;
    while (left) {
        unsigned rooms = SLOT_PAGES - slot->nr_segments - 1;
        unsigned least = left > rooms * SECTORS_PER_PAGE ? left - rooms * SECTORS_PER_PAGE : 1;
        unsigned most = left < SECTORS_PER_PAGE ? left : SECTORS_PER_PAGE;
        unsigned length = least + roll_below(&guest->dice, most - least + 1);
        unsigned first = roll_below(&guest->dice, SECTORS_PER_PAGE - length + 1);
        slot->segments[slot->nr_segments] = (struct front_segment){
            data_page(guest, number, slot->nr_segments), (uint8_t)first, (uint8_t)(first + length - 1)};
        slot->nr_segments++;
        left -= length;
    }
}

static void choose(struct guest *guest, struct slot *slot)
{
    uint32_t dice = roll_below(&guest->dice, 64);
    slot->status = RSP_OKAY;
    slot->indirect = false;
    slot->operation = dice % 2 ? OP_READ : OP_WRITE;
    slot->sectors = 1 + roll_below(&guest->dice, one_in(&guest->dice, 8) ? SLOT_SECTORS : 4);
    if (dice < guest->world->scenario.flushes)
        slot->operation = OP_FLUSH_DISKCACHE;
    else if (dice == 62)
        slot->operation = OP_WRITE_BARRIER;
    else if (dice == 61)
        slot->operation = OP_DISCARD;
    else if (dice == 60)
        slot->operation = 99;
    else
        slot->indirect = one_in(&guest->dice, 8);
    if (slot->operation == OP_FLUSH_DISKCACHE || slot->operation == 99)
        slot->sectors = 0;
    if (slot->operation == 99)
        slot->status = RSP_EOPNOTSUPP;
    slot->first = roll_below(&guest->dice, SLOT_SECTORS - slot->sectors + 1);
}

static void lay_out(struct guest *guest, const struct slot *slot, uint64_t id, uint8_t *entry)
{
    const struct abi *abi = guest->ring.abi;
    uint32_t number = (uint32_t)(slot - guest->slots);
    uint64_t disk = ring_disk_bytes(&guest->world->scenario) / SECTOR * guest->number;
    uint64_t sector = disk + (uint64_t)number * SLOT_SECTORS + slot->first;
    uint32_t table = data_page(guest, number, SLOT_PAGES);
    if (slot->operation == OP_DISCARD) {
        lay_out_discard(abi, entry, 0, id, sector, slot->sectors);
    } else if (slot->indirect) {
        lay_out_segments(page_at(guest, table), slot->segments, slot->nr_segments);
        lay_out_indirect(abi, entry, slot->operation, id, sector, slot->nr_segments, &table, 1);
    } else {
        lay_out_transfer(abi, entry, slot->operation, id, sector, slot->segments, slot->nr_segments);
    }
}

static struct slot *free_slot(struct guest *guest)
{
    uint32_t at = roll_below(&guest->dice, guest->ring.entries);
    while (guest->slots[at].busy)
        at = (at + 1) % guest->ring.entries;
    return &guest->slots[at];
}

static void put_one(struct guest *guest)
{
    uint8_t entry[ENTRY_BYTES];
    struct slot *slot = free_slot(guest);
    choose(guest, slot);
    slot->nr_segments = 0;
    if (slot->operation != OP_DISCARD)
        cut(guest, slot);
    slot->version = ++guest->next_version;
    if (slot->operation == OP_DISCARD)
        slot->version = 0;
    slot->busy = true;
    slot->generation++;
    walk(guest, slot, slot->operation == OP_READ ? SPOIL : FILL);
    lay_out(guest, slot, (uint64_t)slot->generation << 32 | (uint32_t)(slot - guest->slots), entry);
    front_put(&guest->ring, entry);
    guest->in_flight++;
}

static void send_event(struct guest *guest)
{
    static const uint64_t one = 1;
    delay(GUEST_SEND);
    CHECK(write(guest->world->to_backend[guest->number], &one, sizeof(one)) == sizeof(one));
}

static void push(struct guest *guest)
{
    atomic_store(&guest->state->in_flight, guest->in_flight);
    if (front_push(&guest->ring))
        send_event(guest);
}

/* Long enough for a backend that spins to give up and sleep. */
static void ponder(struct guest *guest)
{
    uint32_t us = guest->world->scenario.spin_us;
    if (us && !guest->in_flight && one_in(&guest->dice, 4))
        sleep_ns(500L * us + roll_below(&guest->dice, 2000 * us));
}

static void send_some(struct guest *guest)
{
    ponder(guest);
    if (!guest->until_new_depth--) {
        guest->until_new_depth = roll_below(&guest->dice, 1000);
        guest->depth = 1 + roll_below(&guest->dice, guest->world->scenario.depth);
    }
    uint32_t room = guest->in_flight < guest->depth ? guest->depth - guest->in_flight : 0;
    if (guest->in_flight && room)
        room = roll_below(&guest->dice, room + 1);
    bool one_by_one = roll(&guest->dice) & 1;
    for (; room; room--) {
        put_one(guest);
        if (one_by_one)
            push(guest);
    }
    push(guest);
}

/* -- answers ------------------------------------------------------------------------------------------- */

static void judge(struct guest *guest, const struct response *response)
{
    uint32_t number = (uint32_t)response->id;
    struct slot *slot = &guest->slots[number];
    if (number >= guest->ring.entries || !slot->busy || response->id >> 32 != slot->generation)
        complain(guest, "an answer to no request", response->id, response->status);
    if (response->operation != slot->operation)
        complain(guest, "an answer to another operation", response->id, response->operation);
    if (response->status != slot->status)
        complain(guest, "another status", response->id, response->status);
    if (slot->operation == OP_READ && !walk(guest, slot, VERIFY))
        complain(guest, "other bytes", response->id, response->status);
    if (slot->operation != OP_READ)
        for (unsigned i = 0; i < slot->sectors; i++)
            slot->held[slot->first + i] = slot->version;
    slot->busy = false;
    guest->in_flight--;
}

static bool take_answers(struct guest *guest)
{
    uint32_t waiting = front_waiting(&guest->ring);
    for (uint32_t i = 0; i < waiting; i++) {
        struct response response = front_take(&guest->ring);
        judge(guest, &response);
    }
    if (waiting) {
        atomic_store(&guest->state->in_flight, guest->in_flight);
        atomic_store(&guest->state->rsp_cons, guest->ring.rsp_cons);
        atomic_fetch_add(&guest->state->answered, waiting);
        atomic_fetch_add(&guest->world->tally.requests, waiting);
    }
    return waiting;
}

/* -- sleep --------------------------------------------------------------------------------------------- */

static void sleep_in_poll(struct guest *guest)
{
    struct pollfd poll_fd = {.fd = guest->world->to_guest[guest->number], .events = POLLIN};
    uint64_t events;
    atomic_store(&guest->state->guest_sleeps, true);
    delay(GUEST_SLEEP);
    long began = sleep_began();
    while (poll(&poll_fd, 1, -1) < 0)
        CHECK(errno == EINTR);
    sleep_ended(began, &guest->world->tally.guest);
    atomic_store(&guest->state->guest_sleeps, false);
    delay(GUEST_WOKEN);
    if (read(poll_fd.fd, &events, sizeof(events)) < 0)
        CHECK(errno == EAGAIN);
    delay(GUEST_WOKEN);
}

/* A guest may look for a while before it sleeps: for any time, or until about when the last answer came, so that its
 * final check meets the next one. */
static bool look_for_a_while(struct guest *guest)
{
    uint32_t how = roll_below(&guest->dice, 4);
    unsigned most = how == 0 ? roll_below(&guest->dice, 400) : how == 1 ? 0 : guest->looks + roll_below(&guest->dice, 4);
    for (unsigned looks = 0; looks < most; looks++)
        if (front_waiting(&guest->ring)) {
            guest->looks = looks;
            return true;
        }
    if (how > 1)
        guest->looks += roll_below(&guest->dice, 2);
    return false;
}

/* It may want to be woken by more than the next answer. */
static void wait_for_answers(struct guest *guest)
{
    if (look_for_a_while(guest))
        return;
    uint32_t wanted = one_in(&guest->dice, 4) ? 1 + roll_below(&guest->dice, guest->in_flight) : 1;
    atomic_store(&guest->state->rsp_event, guest->ring.rsp_cons + wanted);
    if (!front_final_check(&guest->ring, wanted))
        sleep_in_poll(guest);
}

/* An event without a request, or many of them: the backend may let us wait, but not for ever. */
static void ring_for_nothing(struct guest *guest)
{
    for (unsigned number = one_in(&guest->dice, 16) ? 60 : 1; number; number--) {
        send_event(guest);
        if (roll(&guest->dice) & 1)
            sleep_ns(20000);
    }
}

static void *serve_ring(void *argument)
{
    struct guest *guest = argument;
    for (;;) {
        if (!atomic_load(&guest->world->enough))
            send_some(guest);
        else if (!guest->in_flight)
            break;
        if (one_in(&guest->dice, 4096))
            ring_for_nothing(guest);
        if (!take_answers(guest) && guest->in_flight)
            wait_for_answers(guest);
    }
    free(guest->slots);
    atomic_fetch_sub(&guest->world->guests, 1);
    return NULL;
}

/* -- all of it ----------------------------------------------------------------------------------------- */

static void open_ring(struct guest *guest, struct world *world, unsigned number)
{
    const struct scenario *scenario = &world->scenario;
    uint32_t page = first_page(scenario, number);
    *guest = (struct guest){
        .world = world,
        .state = &world->rings[number],
        .number = number,
        .page = page + ring_pages(scenario->entries),
        .dice = (world->seed + number) * UINT64_C(0x9e3779b97f4a7c15) | 1,
        .slots = calloc(scenario->entries, sizeof(struct slot)),
    };
    CHECK(guest->slots);
    guest->ring = (struct front_ring){
        .shared = page_at(guest, page), .abi = &ABIS[scenario->abi], .entries = scenario->entries};
}

_Noreturn void run_guest(struct world *world)
{
    static struct guest guests[MOST_STRESS_RINGS];
    unsigned rings = world->scenario.rings;
    delays_seed(world->seed * 2);
    guest_memory_map(&world->memory);
    for (unsigned i = 0; i < rings; i++)
        open_ring(&guests[i], world, i);
    for (unsigned i = 0; i < rings; i++)
        CHECK(!pthread_create(&guests[i].thread, NULL, serve_ring, &guests[i]));
    for (unsigned i = 0; i < rings; i++)
        pthread_join(guests[i].thread, NULL);
    guest_memory_unmap(&world->memory);
    exit(0);
}
