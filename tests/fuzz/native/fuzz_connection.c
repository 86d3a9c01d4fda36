/*
 * A whole connection with a guest that does anything, a driver that answers in any order, and the I/O thread played
 * step by step.  Whatever the guest writes into rings, grant table, indirect pages and pages of data:
 *
 *  - of its pages nothing is written but the sectors of a read that it asked for, and only where it grants that;
 *  - of the image nothing is written or read beyond the disk, and nothing is written if that is read-only;
 *  - every request that was taken is answered once at most, and once exactly if all comes to its end;
 *  - and it does come to its end, with everything given back, and everything told that was waited for.
 *
 * The input is a small program.  Rings, journals and the grant table are allocations of exactly their size; pages
 * have guards around them, and cannot be written at all where the backend should only read them.
 */
#define _GNU_SOURCE
#include <sys/mman.h>
#include <sys/stat.h>

/* Its functions are called one by one here, instead of by a thread. */
#include "io_thread.c"

#include "front.h"
#include "input.h"
#include "recover.h"

enum {
    PAGES = 14,                         /* of the guest, besides its rings */
    RINGS = 2,
    ENTRIES = 32,
    BLOCK = 4096,
    BLOCKS = 12,                        /* of the disk */
    FILE_BLOCKS = 3 * BLOCKS,           /* of the file: the others belong to nobody */
    MOST_HELD = 2 * ENTRIES * RINGS,
    MOST_TURNS = 120,
    MOST_STEPS = 3000,                  /* until all has come to its end */
    SECRET = 0xc5,                      /* fills what belongs to nobody */
};

/* A request that was taken and not answered, by its place in the journal. */
struct taken {
    bool open;
    uint64_t id;
    uint8_t operation;                  /* that the answer has to repeat */
    bool reads;
    bool indirect;
    uint8_t sectors[PAGES];             /* of a direct one, that it may fill: a bit each */
};

struct guest_ring {
    uint8_t *shared;
    uint64_t *marks;
    uint32_t *indices;
    uint8_t *copies;
    int to_backend, to_guest;
    uint32_t answered;                  /* responses seen */
    struct taken taken[ENTRIES];
};

struct world {
    struct input *input;
    struct xbd_threads *threads;
    struct io_thread *thread;
    xbd_budget *budget;
    long pages;
    xbd_extents *extents;
    xbd_connection *connection;
    struct xbd_connection_config config;
    uint64_t largest;                   /* that the disk has ever been */
    unsigned nr_rings;
    struct guest_ring rings[RINGS];
    _Atomic uint64_t *table;
    bool was_granted[PAGES];            /* for writing, at some time that still counts */
    struct xbd_event held[MOST_HELD];
    unsigned nr_held;
    unsigned drains, drained;           /* asked for, and told of */
    unsigned settles, settled;
    bool corrupt;                       /* one of the rings: it answers no more */
    bool stopping, stopped;
};

static struct guest_memory memory;      /* between guards; of all inputs */
static uint8_t before[PAGES * PAGE];    /* what the pages held before the backend's last step */
static int file;
static uint8_t *file_bytes;

/* There is no other engine here. */
const struct engine_calls ENGINE_URING = {.name = "none"};

/* -- once ---------------------------------------------------------------------------------------------- */

static void *between_guards(int fd, size_t size, int protection)
{
    char *start = mmap(NULL, size + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(start != MAP_FAILED);
    CHECK(mmap(start + PAGE, size, protection, MAP_SHARED | MAP_FIXED, fd, 0) == start + PAGE);
    return start + PAGE;
}

static void make_memory(void)
{
    if (memory.pages)
        return;
    memory.pages = PAGES;
    memory.fd = memfd_create("guest", MFD_CLOEXEC);
    file = memfd_create("disk", MFD_CLOEXEC);
    CHECK(memory.fd >= 0 && !ftruncate(memory.fd, PAGES * PAGE) && file >= 0 && !ftruncate(file, FILE_BLOCKS * BLOCK));
    memory.writable = between_guards(memory.fd, PAGES * PAGE, PROT_READ | PROT_WRITE);
    memory.readable = between_guards(memory.fd, PAGES * PAGE, PROT_READ);
    file_bytes = between_guards(file, FILE_BLOCKS * BLOCK, PROT_READ | PROT_WRITE);
}

/* -- the image ----------------------------------------------------------------------------------------- */

/* The disk's blocks lie in no order, and never beside each other. */
static uint64_t place_of(uint64_t block)
{
    return (block * 5 % BLOCKS * 3 + 1) * BLOCK;
}

static void fill_file(void)
{
    memset(file_bytes, SECRET, FILE_BLOCKS * BLOCK);
    for (unsigned i = 0; i < BLOCKS; i++)
        memset(file_bytes + place_of(i), (int)i + 1, BLOCK);
}

static bool is_filled_with(const uint8_t *block, uint8_t value)
{
    return block[0] == value && !memcmp(block, block + 1, BLOCK - 1);
}

static void check_file(const struct world *world)
{
    struct stat status;
    CHECK(!fstat(file, &status) && status.st_size == FILE_BLOCKS * BLOCK);
    for (unsigned i = 0; i < FILE_BLOCKS; i++)
        CHECK(i % 3 == 1 || is_filled_with(file_bytes + i * BLOCK, SECRET));
    for (unsigned i = 0; i < BLOCKS; i++)
        if (world->config.limits.read_only || (uint64_t)i * BLOCK >= world->largest)
            CHECK(is_filled_with(file_bytes + place_of(i), (uint8_t)(i + 1)));
}

/* -- what was taken ------------------------------------------------------------------------------------ */

static struct ring *ring_of(const struct world *world, unsigned number)
{
    return world->connection->rings[number];
}

static void note_segments(struct taken *taken, const uint8_t *table, unsigned number)
{
    for (unsigned i = 0; i < number && i < MAX_SEGMENTS; i++, table += 8) {
        uint32_t gref;
        memcpy(&gref, table, sizeof(gref));
        for (unsigned sector = table[4]; sector <= table[5] && sector < SECTORS_PER_PAGE && gref < PAGES; sector++)
            taken->sectors[gref] |= (uint8_t)(1u << sector);
    }
}

static void note_taken(const struct world *world, struct taken *taken, const uint8_t *entry)
{
    const struct abi *abi = &ABIS[world->config.abi];
    memset(taken, 0, sizeof(*taken));
    taken->open = true;
    taken->indirect = entry[0] == OP_INDIRECT;
    taken->operation = entry[taken->indirect];
    taken->reads = taken->operation == OP_READ;
    memcpy(&taken->id, entry + abi->id, sizeof(taken->id));
    if (taken->reads && !taken->indirect)
        note_segments(taken, entry + abi->segments, entry[1]);
}

/* All that the journal has now and had not before. */
static void look_for_taken(struct world *world)
{
    size_t size = ABIS[world->config.abi].entry_size;
    for (unsigned i = 0; i < world->nr_rings; i++)
        for (unsigned slot = 0; slot < ENTRIES; slot++)
            if (world->rings[i].marks[slot] && !world->rings[i].taken[slot].open)
                note_taken(world, &world->rings[i].taken[slot], world->rings[i].copies + slot * size);
}

static unsigned nr_open(const struct world *world)
{
    unsigned number = 0;
    for (unsigned i = 0; i < world->nr_rings; i++)
        for (unsigned slot = 0; slot < ENTRIES; slot++)
            number += world->rings[i].taken[slot].open;
    return number;
}

/* -- what was written ---------------------------------------------------------------------------------- */

/* The sectors of the page that some request may fill now. */
static uint8_t fillable(const struct world *world, unsigned page)
{
    uint8_t sectors = 0;
    if (world->config.domain.mode == XBD_COPY ? world->table[page] != GRANTED : !world->was_granted[page])
        return 0;
    for (unsigned i = 0; i < world->nr_rings; i++)
        for (unsigned slot = 0; slot < ENTRIES; slot++) {
            const struct taken *taken = &world->rings[i].taken[slot];
            if (taken->open && taken->reads)
                sectors |= taken->indirect ? 0xff : taken->sectors[page];
        }
    return sectors;
}

static void check_pages(const struct world *world)
{
    if (!memcmp(before, memory.writable, sizeof(before)))
        return;
    for (unsigned page = 0; page < PAGES; page++) {
        uint8_t sectors = fillable(world, page);
        for (unsigned sector = 0; sector < SECTORS_PER_PAGE; sector++) {
            const uint8_t *now = memory.writable + page * PAGE + sector * SECTOR;
            if (!memcmp(before + page * PAGE + sector * SECTOR, now, SECTOR))
                continue;
            CHECK(sectors & 1u << sector);
            CHECK(now[0] != SECRET || now[1] != SECRET || now[SECTOR - 1] != SECRET);
        }
    }
    memcpy(before, memory.writable, sizeof(before));
}

/* -- what was answered --------------------------------------------------------------------------------- */

static void check_response(const struct taken *cleared, bool *matched, unsigned number, const uint8_t *response)
{
    int16_t status;
    uint64_t id;
    memcpy(&id, response, sizeof(id));
    memcpy(&status, response + 10, sizeof(status));
    CHECK(status <= RSP_OKAY && status >= RSP_EOPNOTSUPP);
    unsigned request = 0;
    while (request < number &&
           (matched[request] || cleared[request].id != id || cleared[request].operation != response[8]))
        request++;
    CHECK(request < number);
    matched[request] = true;
}

/* What left the journal was answered, and nothing else. */
static void check_answers(struct world *world, unsigned number)
{
    struct guest_ring *ring = &world->rings[number];
    const struct back_ring *back = &ring_of(world, number)->back;
    struct taken cleared[ENTRIES];
    bool matched[ENTRIES] = {false};
    unsigned count = 0;
    for (unsigned slot = 0; slot < ENTRIES; slot++)
        if (ring->taken[slot].open && !ring->marks[slot]) {
            cleared[count++] = ring->taken[slot];
            ring->taken[slot].open = false;
        }
    CHECK(back->rsp_prod - ring->answered == count);
    for (; ring->answered != back->rsp_prod; ring->answered++)
        check_response(cleared, matched, count,
                       ring->shared + RING_HEADER + (size_t)(ring->answered % ENTRIES) * back->abi->entry_size);
}

/* After each step of the backend. */
static void check_all(struct world *world)
{
    look_for_taken(world);
    check_pages(world);
    for (unsigned i = 0; i < world->nr_rings; i++)
        check_answers(world, i);
    CHECK(xbd_connection_in_flight(world->connection) == nr_open(world));
    if (!nr_open(world) && world->config.domain.mode == XBD_MAP)
        for (unsigned page = 0; page < PAGES; page++)
            world->was_granted[page] = world->table[page] == GRANTED;
}

/* -- the backend --------------------------------------------------------------------------------------- */

static void step_backend(struct world *world)
{
    bool quit = false;
    wake_rested(world->thread);
    read_mail(world->thread, &quit);
    check_all(world);
    serve(world->thread);
    check_all(world);
    answer(world->thread);
    check_all(world);
    CHECK(!turn(world->thread, false, 0));
    check_all(world);
}

/* -- the driver ---------------------------------------------------------------------------------------- */

static void move_bytes(uint8_t *memory_bytes, size_t length, uint64_t offset, bool to_file)
{
    for (size_t i = 0; i < length; i++, offset++) {
        uint8_t *at = file_bytes + place_of(offset / BLOCK) + offset % BLOCK;
        if (to_file)
            *at = memory_bytes[i];
        else
            memory_bytes[i] = *at;
    }
}

static void carry_out(const struct world *world, const struct xbd_event *event)
{
    uint64_t offset = event->offset;
    bool write = event->operation != OP_READ;
    CHECK(!write || !event->nr_buffers || !world->config.limits.read_only);
    for (unsigned i = 0; i < event->nr_buffers; i++) {
        /* Pages that are neighbours may be one buffer. */
        CHECK(event->buffers[i].length && event->buffers[i].length <= event->offset + event->length - offset);
        move_bytes(event->buffers[i].start, event->buffers[i].length, offset, write);
        offset += event->buffers[i].length;
    }
    CHECK(!event->nr_buffers || offset == event->offset + event->length);
}

/* Tells where some of the blocks lie. */
static void resolve(const struct world *world, const struct xbd_event *event, uint8_t how)
{
    for (uint64_t block = event->offset / BLOCK; block * BLOCK < event->offset + event->length; block++) {
        if (how & 1 && block % 3 == 0)
            continue;
        CHECK(xbd_extents_put(world->extents, event->operation == OP_WRITE, block * BLOCK, (block + 1) * BLOCK, file,
                              place_of(block)));
    }
}

static void give_verdict(struct world *world, unsigned which, uint8_t how)
{
    struct xbd_event event = world->held[which];
    struct xbd_answer answer = {.request = event.request, .verdict = XBD_ANSWER};
    world->held[which] = world->held[--world->nr_held];
    if (world->stopping)
        return;
    if (how % 4 == 0) {
        answer.status = RSP_ERROR;
    } else if (how % 4 == 1 && event.resolvable) {
        answer.verdict = XBD_TRY_AGAIN;
        resolve(world, &event, how >> 2);
    } else {
        carry_out(world, &event);
        check_all(world);
    }
    xbd_connection_answer(world->connection, &answer, 1);
}

static void check_request(const struct world *world, const struct xbd_event *event)
{
    CHECK(event->ring < world->nr_rings && event->operation <= OP_DISCARD);
    CHECK(event->offset <= world->largest && event->length <= world->largest - event->offset);
    CHECK(!event->resolvable || (event->nr_buffers && event->operation <= OP_WRITE));
    for (unsigned i = 0; i < world->nr_held; i++)
        CHECK(world->held[i].request != event->request);
}

static void note_event(struct world *world, const struct xbd_event *event)
{
    switch (event->kind) {
    case XBD_REQUEST:
        check_request(world, event);
        CHECK(world->nr_held < MOST_HELD && !world->stopping);
        world->held[world->nr_held++] = *event;
        break;
    case XBD_DRAINED:
        CHECK(event->number < world->drains && world->drained++ < world->drains);
        break;
    case XBD_STOPPED:
        world->stopped = true;
        break;
    case XBD_SETTLED:
        CHECK(event->number < world->settles && world->settled++ < world->settles);
        break;
    case XBD_FEW_PLACES:
    case XBD_BROKEN:
        CHECK(event->kind != XBD_BROKEN);
        break;
    case XBD_CORRUPT:
        world->corrupt = true;
        break;
    case XBD_REJECTED:
    case XBD_NO_PAGES:
        break;
    }
}

static void fetch_events(struct world *world)
{
    struct xbd_event events[8];
    unsigned count;
    while ((count = xbd_connection_events(world->connection, events, 8)))
        for (unsigned i = 0; i < count; i++)
            note_event(world, &events[i]);
}

static void step_driver(struct world *world)
{
    uint8_t how = byte(world->input);
    fetch_events(world);
    if (world->nr_held)
        give_verdict(world, how % world->nr_held, byte(world->input));
}

static void answer_all_held(struct world *world)
{
    fetch_events(world);
    while (world->nr_held)
        give_verdict(world, 0, 1);
}

static void forget_some(struct world *world)
{
    uint64_t offset = byte(world->input) % BLOCKS * BLOCK;
    xbd_extents_forget(world->extents, offset, byte(world->input) * UINT64_C(512));
    xbd_connection_settle(world->connection, offset, byte(world->input) * UINT64_C(512), world->settles++);
}

/* -- the guest ----------------------------------------------------------------------------------------- */

static struct guest_ring *choose_ring(struct world *world)
{
    return &world->rings[byte(world->input) % world->nr_rings];
}

static void choose_segments(struct world *world, struct front_segment *segments, unsigned number)
{
    for (unsigned i = 0; i < number; i++) {
        uint8_t page = byte(world->input);
        uint8_t bounds = byte(world->input);
        segments[i] = (struct front_segment){
            .gref = page % (PAGES + 1), .first = bounds & 7, .last = bounds >> 3 & 15};
        if (segments[i].last > 7 && bounds < 0xf0)
            segments[i].last = 7;
    }
}

/* Where the backend will look for the next one. */
static void ask(struct world *world, unsigned which, const uint8_t *entry)
{
    struct guest_ring *ring = &world->rings[which];
    const struct back_ring *back = &ring_of(world, which)->back;
    uint32_t req_prod;
    memcpy(&req_prod, ring->shared, sizeof(req_prod));
    if (req_prod - back->rsp_prod >= ENTRIES)
        return;
    memcpy(ring->shared + RING_HEADER + (size_t)(req_prod % ENTRIES) * back->abi->entry_size, entry,
           back->abi->entry_size);
    req_prod++;
    memcpy(ring->shared, &req_prod, sizeof(req_prod));
}

static void ask_directly(struct world *world)
{
    struct front_segment segments[MAX_SEGMENTS];
    uint8_t entry[ENTRY_BYTES];
    unsigned which = byte(world->input) % world->nr_rings;
    uint8_t operation = byte(world->input);
    uint8_t number = byte(world->input);
    uint8_t sector = byte(world->input);
    choose_segments(world, segments, number % (MAX_SEGMENTS + 1));
    lay_out_transfer(&ABIS[world->config.abi], entry, operation & 0x80 ? operation : operation % 4, number, sector % 100,
                     segments, number % (MAX_SEGMENTS + 1));
    ask(world, which, entry);
}

static void ask_to_discard(struct world *world)
{
    uint8_t entry[ENTRY_BYTES];
    uint8_t how = byte(world->input);
    lay_out_discard(&ABIS[world->config.abi], entry, how & 1, how, byte(world->input), byte(world->input));
    ask(world, how % world->nr_rings, entry);
}

static void ask_indirectly(struct world *world)
{
    struct front_segment segments[24];
    uint8_t entry[ENTRY_BYTES];
    uint32_t refs[MAX_INDIRECT_PAGES];
    uint8_t how = byte(world->input);
    uint8_t number = byte(world->input);
    uint8_t inner = byte(world->input);
    for (unsigned i = 0; i < MAX_INDIRECT_PAGES; i++)
        refs[i] = (how + i) % (PAGES + 1);
    choose_segments(world, segments, number % 24);
    lay_out_segments(memory.writable + how % PAGES * PAGE, segments, number % 24);
    lay_out_indirect(&ABIS[world->config.abi], entry, inner & 0x80 ? inner : inner & 1, number,
                     byte(world->input) % 100, inner & 0x40 ? number * 9u : number % 24, refs, MAX_INDIRECT_PAGES);
    ask(world, how % world->nr_rings, entry);
}

static void ask_anything(struct world *world)
{
    uint8_t entry[ENTRY_BYTES];
    unsigned which = byte(world->input) % world->nr_rings;
    bytes(world->input, entry, sizeof(entry));
    ask(world, which, entry);
}

static void write_index(struct world *world)
{
    struct guest_ring *ring = choose_ring(world);
    uint8_t how = byte(world->input);
    uint32_t value = how & 4 ? number32(world->input) : ring->answered + byte(world->input);
    memcpy(ring->shared + (how & 3) * 4, &value, sizeof(value));
}

static void scribble(struct world *world)
{
    struct guest_ring *ring = choose_ring(world);
    size_t size = ring_bytes(&ABIS[world->config.abi], ENTRIES);
    size_t at = number16(world->input) % size;
    size_t number = byte(world->input);
    bytes(world->input, ring->shared + at, number < size - at ? number : size - at);
}

static void change_grant(struct world *world)
{
    static const uint64_t ways[] = {GRANTED, GRANTED, GRANTED, NOT_GRANTED, GRANTED_READONLY, 77};
    unsigned page = byte(world->input) % PAGES;
    world->table[page] = ways[byte(world->input) % (sizeof(ways) / sizeof(ways[0]))];
    world->was_granted[page] |= world->table[page] == GRANTED;
}

static void change_page(struct world *world)
{
    unsigned at = number16(world->input) % (PAGES * PAGE);
    unsigned number = byte(world->input);
    bytes(world->input, memory.writable + at, number < PAGES * PAGE - at ? number : PAGES * PAGE - at);
}

static void kick(struct world *world)
{
    static const uint64_t one = 1;
    CHECK(write(choose_ring(world)->to_backend, &one, sizeof(one)) == sizeof(one));
}

/* -- a connection -------------------------------------------------------------------------------------- */

static void choose_limits(struct world *world)
{
    static const uint32_t indirect[] = {0, 8, 40, 600};
    uint8_t how = byte(world->input);
    world->config.limits = (struct xbd_limits){
        .size = (BLOCKS - how % 3u) * BLOCK,
        .logical_block = how & 4 ? 4096 : 512,
        .max_indirect_segments = indirect[how >> 6],
        .read_only = how & 8,
        .flush = how & 16,
        .barrier = how & 32,
        .discard = how & 16,
    };
    world->largest = world->config.limits.size;
}

/* The disk may change its size, but not whether it may be written. */
static void change_limits(struct world *world)
{
    struct xbd_limits limits = world->config.limits;
    limits.size = byte(world->input) % (BLOCKS + 1) * BLOCK;
    world->largest = limits.size > world->largest ? limits.size : world->largest;
    xbd_connection_set_limits(world->connection, &limits);
}

static void open_ring(struct world *world, struct guest_ring *ring)
{
    const struct abi *abi = &ABIS[world->config.abi];
    ring->shared = exactly(ring_bytes(abi, ENTRIES));
    ring->marks = exactly(ENTRIES * sizeof(*ring->marks));
    ring->indices = exactly(ENTRIES * sizeof(*ring->indices));
    ring->copies = exactly((size_t)ENTRIES * abi->entry_size);
    ring->to_backend = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    ring->to_guest = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    CHECK(ring->to_backend >= 0 && ring->to_guest >= 0);
}

static void close_ring(struct guest_ring *ring)
{
    close(ring->to_backend);
    close(ring->to_guest);
    free(ring->shared);
    free(ring->marks);
    free(ring->indices);
    free(ring->copies);
}

static void connect_ring(struct world *world, struct guest_ring *ring)
{
    unsigned owed = recover(ring->marks, ring->indices, ring->copies, ENTRIES, ABIS[world->config.abi].entry_size,
                            ring->answered);
    struct xbd_ring_config config = {
        .ring = ring->shared,
        .entries = ENTRIES,
        .channel = {.fd = ring->to_backend, .notify_fd = ring->to_guest},
        .marks = ring->marks,
        .indices = ring->indices,
        .copies = ring->copies,
        .req_cons = ring->answered + owed,
        .rsp_prod = ring->answered,
        .owed = owed,
    };
    CHECK(xbd_connection_add_ring(world->connection, &config));
    memset(ring->taken, 0, sizeof(ring->taken));
}

static void connect_all(struct world *world)
{
    world->drains = world->drained = world->settles = world->settled = world->nr_held = 0;
    world->corrupt = world->stopping = world->stopped = false;
    for (unsigned page = 0; page < PAGES; page++)
        world->was_granted[page] = world->table[page] == GRANTED;
    world->connection = xbd_connection_new(&world->config);
    CHECK(world->connection);
    for (unsigned i = 0; i < world->nr_rings; i++)
        connect_ring(world, &world->rings[i]);
    xbd_connection_start(world->connection);
    /* What is owed counts as taken when the thread has heard of it. */
    bool quit = false;
    read_mail(world->thread, &quit);
    check_all(world);
}

/* Nothing more is taken; nobody waits for that. */
static void pause_taking(struct world *world)
{
    xbd_connection_drain(world->connection, world->drains++);
}

static void resume_taking(struct world *world)
{
    xbd_connection_resume(world->connection);
}

/* The driver answers everything now; nothing more is taken.  A corrupt ring is only stopped. */
static void drain_all(struct world *world)
{
    pause_taking(world);
    for (unsigned steps = 0; world->drained < world->drains && !world->corrupt; steps++) {
        CHECK(steps < MOST_STEPS);
        answer_all_held(world);
        step_backend(world);
        fetch_events(world);
    }
    CHECK(world->corrupt || !nr_open(world));
}

static void stop_all(struct world *world)
{
    world->stopping = true;
    xbd_connection_stop(world->connection);
    for (unsigned steps = 0; !world->stopped; steps++) {
        CHECK(steps < MOST_STEPS);
        bool quit = false;
        read_mail(world->thread, &quit);
        CHECK(!turn(world->thread, false, 0));
        fetch_events(world);
    }
    CHECK(world->drained == world->drains && world->settled == world->settles);
    look_for_taken(world);
    check_pages(world);
    for (unsigned i = 0; i < world->nr_rings; i++)
        check_answers(world, i);
    xbd_connection_free(world->connection);
    CHECK(xbd_budget_left(world->budget) == world->pages);
}

static void open_world(struct world *world)
{
    uint8_t how = byte(world->input);
    world->threads = exactly(sizeof(*world->threads) + sizeof(struct io_thread));
    world->threads->count = 1;
    world->threads->engine = &ENGINE_PREADV;
    pthread_barrier_init(&world->threads->started, NULL, 2);
    world->thread = &world->threads->thread[0];
    CHECK(prepare(world->threads, world->thread, &ENGINE_PREADV) && ENGINE_PREADV.open(world->thread));
    world->table = exactly(PAGES * sizeof(*world->table));
    for (unsigned page = 0; page < PAGES; page++)
        world->table[page] = page % 7 == 5 ? NOT_GRANTED : page % 7 == 6 ? GRANTED_READONLY : GRANTED;
    memory.table = world->table;
    world->nr_rings = 1 + (how & 1);
    world->pages = byte(world->input) % 64;
    world->budget = xbd_budget_new(NULL, world->pages);
    world->extents = xbd_extents_new();
    CHECK(world->budget && world->extents);
    world->config = (struct xbd_connection_config){
        .threads = world->threads,
        .extents = world->extents,
        .budget = world->budget,
        .domain = {.mode = (enum xbd_pages_mode)(how >> 1 & 3) % 3},
        .request_alignment = how & 8 ? 4096 : 1,
        .memory_alignment = how & 16 ? 4096 : 1,
        .abi = how >> 5 & 1,
        .paused = how & 64,
    };
    guest_memory_describe(&memory, &world->config.domain);
    choose_limits(world);
    for (unsigned i = 0; i < world->nr_rings; i++)
        open_ring(world, &world->rings[i]);
}

static void close_world(struct world *world)
{
    for (unsigned i = 0; i < world->nr_rings; i++)
        close_ring(&world->rings[i]);
    CHECK(!world->thread->rings && !world->thread->in_flight && !atomic_load(&world->thread->nr_rings));
    ENGINE_PREADV.close(world->thread);
    free_pool(world->thread);
    dispose(world->threads);
    xbd_extents_free(world->extents);
    xbd_budget_free(world->budget);
    free((void *)(uintptr_t)world->table);
}

/* -- all of it ----------------------------------------------------------------------------------------- */

static void hold_all(struct world *world)
{
    xbd_connection_hold(world->connection);
    step_backend(world);
    step_driver(world);
    step_backend(world);
}

static void reconnect(struct world *world)
{
    uint8_t how = byte(world->input);
    world->config.paused = how & 1;
    if (how & 2)
        drain_all(world);
    if (how & 4)
        hold_all(world);
    stop_all(world);
    connect_all(world);
}

static void act(struct world *world)
{
    static void (*const acts[])(struct world *) = {
        step_backend, step_backend, step_backend, step_driver, step_driver, ask_directly, ask_directly, ask_directly,
        ask_indirectly, ask_to_discard, ask_anything, write_index, scribble, change_grant, change_page, kick,
        change_limits, forget_some, pause_taking, resume_taking, reconnect,
    };
    acts[byte(world->input) % (sizeof(acts) / sizeof(acts[0]))](world);
    /* What the guest did to its own pages is not the backend's doing. */
    memcpy(before, memory.writable, sizeof(before));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    struct world world = {.input = &input};
    make_memory();
    memset(memory.writable, 0x5a, PAGES * PAGE);
    memcpy(before, memory.writable, sizeof(before));
    fill_file();
    open_world(&world);
    connect_all(&world);
    for (unsigned turns = 0; input.left && turns < MOST_TURNS; turns++)
        act(&world);
    if (data && size && data[size - 1] & 1)
        drain_all(&world);
    stop_all(&world);
    check_file(&world);
    close_world(&world);
    return 0;
}
