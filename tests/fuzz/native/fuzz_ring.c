/*
 * A frontend that writes anything into its ring, at any time: whatever it does, no more is taken than the ring
 * holds, what is accepted is in range and permitted, and what is answered was asked.
 *
 * The input is a small program: how the ring is set up, and then what both sides do.  The ring, each entry and
 * each table are allocations of their own and of exactly their size, so that a byte too far is a find.
 */
#include "blkif.h"
#include "input.h"
#include "journal.h"

enum { MOST_ENTRIES = 128, MOST_TURNS = 4096 };

struct consumed {
    uint64_t id;
    uint8_t operation;
    unsigned slot;
};

struct world {
    struct input *input;
    struct xbd_limits limits;
    struct back_ring ring;
    struct journal journal;
    size_t size;                        /* of the ring in memory */
    struct consumed open[MOST_ENTRIES];         /* consumed, not answered */
    unsigned nr_open;
    struct consumed answered[MOST_ENTRIES];     /* answered, not published */
    unsigned nr_answered;
};

/* -- requests ------------------------------------------------------------------------------------------ */

static void choose_limits(struct world *world)
{
    static const uint64_t sizes[] = {0, 512, 1 << 20, UINT64_C(1) << 40, UINT64_C(1) << 63, UINT64_MAX};
    static const uint32_t indirect[] = {0, 1, 11, 256, 513, 4096, 4097, UINT32_MAX};
    uint8_t flags = byte(world->input);
    uint8_t numbers = byte(world->input);
    world->limits = (struct xbd_limits){
        .size = sizes[numbers % 6],
        .logical_block = numbers & 0x80 ? 4096 : 512,
        .max_indirect_segments = indirect[flags >> 5],
        .read_only = flags & 1,
        .flush = flags & 2,
        .barrier = flags & 4,
        .discard = flags & 8,
        .discard_secure = flags & 16,
    };
}

static void check_range(const struct xbd_limits *limits, const struct request *request)
{
    CHECK(request->offset <= limits->size);
    CHECK(request->length <= limits->size - request->offset);
    CHECK(request->offset % limits->logical_block == 0);
    CHECK(request->length % limits->logical_block == 0);
}

static void check_transfer(const struct xbd_limits *limits, const struct request *request,
                           const struct segment *segments)
{
    uint64_t length = 0;
    CHECK(request->operation == OP_READ || !limits->read_only);
    CHECK(request->operation != OP_WRITE_BARRIER || limits->barrier);
    CHECK(request->operation != OP_FLUSH_DISKCACHE || limits->flush);
    CHECK(request->operation <= OP_FLUSH_DISKCACHE);
    CHECK(request->nr_segments);
    for (unsigned i = 0; i < request->nr_segments; i++) {
        CHECK(segments[i].length && segments[i].start + segments[i].length <= PAGE);
        CHECK(segments[i].start % SECTOR == 0 && segments[i].length % SECTOR == 0);
        length += segments[i].length;
    }
    CHECK(length == request->length);
    check_range(limits, request);
}

static void check_rejected(const struct request *request)
{
    CHECK(request->status == RSP_ERROR || request->status == RSP_EOPNOTSUPP);
}

static void expand_it(struct world *world, struct request *request)
{
    size_t size = (size_t)request->nr_segments * 8;
    uint8_t *table = exactly(size);
    struct segment *segments = exactly(request->nr_segments * sizeof(*segments));
    uint8_t how = byte(world->input);
    if (how & 1) {
        for (size_t at = 0; at < size; at += 8)
            table[at + 5] = 7;          /* whole pages, but for what follows */
        uint32_t at = number32(world->input) % request->nr_segments;
        bytes(world->input, table + (size_t)at * 8, 8);
    } else {
        bytes(world->input, table, size);
    }
    if (how & 2)
        choose_limits(world);           /* they may change at any time */
    expand(&world->limits, request, table, segments);
    CHECK(request->kind == TRANSFER || request->kind == REJECTED);
    if (request->kind == TRANSFER)
        check_transfer(&world->limits, request, segments);
    else
        check_rejected(request);
    free(segments);
    free(table);
}

static void check_indirect(const struct xbd_limits *limits, const struct request *request)
{
    CHECK(request->operation == OP_READ || (request->operation == OP_WRITE && !limits->read_only));
    CHECK(request->nr_segments && request->nr_segments <= limits->max_indirect_segments);
    CHECK(request->nr_refs && request->nr_refs <= MAX_INDIRECT_PAGES);
    CHECK(request->nr_segments <= request->nr_refs * SEGMENTS_PER_INDIRECT_PAGE);
    CHECK(request->nr_segments > (request->nr_refs - 1) * SEGMENTS_PER_INDIRECT_PAGE);
    CHECK(request->offset <= limits->size);
}

static void judge(struct world *world, const uint8_t *entry, struct consumed *consumed)
{
    struct request request;
    struct segment *segments = exactly(MAX_SEGMENTS * sizeof(*segments));
    memset(&request, 0xa5, sizeof(request));
    decode(world->ring.abi, &world->limits, entry, &request, segments);
    consumed->id = request.id;
    consumed->operation = request.operation;
    CHECK(!memcmp(&request.id, entry + world->ring.abi->id, sizeof(request.id)));
    CHECK(request.operation == entry[entry[0] == OP_INDIRECT]);
    switch (request.kind) {
    case TRANSFER:
        CHECK(request.nr_segments <= MAX_SEGMENTS);
        check_transfer(&world->limits, &request, segments);
        break;
    case FLUSH:
        CHECK(request.operation == OP_FLUSH_DISKCACHE ? world->limits.flush : world->limits.barrier);
        break;
    case DISCARD:
        CHECK(world->limits.discard && !world->limits.read_only);
        CHECK(world->limits.discard_secure || !request.secure);
        check_range(&world->limits, &request);
        break;
    case INDIRECT:
        check_indirect(&world->limits, &request);
        expand_it(world, &request);
        break;
    case REJECTED:
        check_rejected(&request);
    }
    free(segments);
}

/* -- turns of the backend ------------------------------------------------------------------------------ */

static void take(struct world *world)
{
    struct back_ring *ring = &world->ring;
    uint8_t most = byte(world->input);
    int waiting = ring_waiting(ring);
    CHECK(waiting >= -1 && waiting <= (int)(ring->entries - world->nr_open));
    for (int i = 0; i < waiting && i < most; i++) {
        struct consumed *consumed = &world->open[world->nr_open];
        uint8_t *entry = exactly(ring->abi->entry_size);
        uint8_t copy[ENTRY_BYTES];
        uint32_t index = ring->req_cons;
        ring_take(ring, copy);
        memcpy(entry, copy, ring->abi->entry_size);
        CHECK(ring->req_cons == index + 1);
        memcpy(journal_next(&world->journal), entry, ring->abi->entry_size);
        consumed->slot = journal_record(&world->journal, index);
        CHECK(consumed->slot < ring->entries);
        judge(world, entry, consumed);
        free(entry);
        world->nr_open++;
        CHECK(ring->req_cons - ring->rsp_prod_pvt == world->nr_open);
    }
}

static void answer(struct world *world)
{
    struct back_ring *ring = &world->ring;
    if (!world->nr_open)
        return;
    unsigned which = byte(world->input) % world->nr_open;
    struct consumed done = world->open[which];
    int16_t status = (int16_t)-(byte(world->input) % 3);
    uint32_t index = ring->rsp_prod_pvt;
    world->open[which] = world->open[--world->nr_open];
    world->answered[world->nr_answered++] = done;
    journal_answering(&world->journal, done.slot, index);
    ring_answer(ring, done.id, done.operation, status);
    const uint8_t *written =
        ring->shared + RING_HEADER + (size_t)(index % ring->entries) * ring->abi->entry_size;
    CHECK(!memcmp(written, &done.id, 8) && written[8] == done.operation && written[9] == 0);
    CHECK(!memcmp(written + 10, &status, 2));
    CHECK(ring->abi->response_size == 12 || !memcmp(written + 12, "\0\0\0\0", 4));
    CHECK(ring->rsp_prod_pvt == index + 1);
}

static void push(struct world *world)
{
    struct back_ring *ring = &world->ring;
    uint32_t published;
    bool wanted = ring_push(ring);
    CHECK(!wanted || world->nr_answered);
    memcpy(&published, ring->shared + 8, sizeof(published));
    CHECK(!world->nr_answered || published == ring->rsp_prod_pvt);
    CHECK(ring->rsp_prod == ring->rsp_prod_pvt);
    CHECK(ring->req_cons - ring->rsp_prod == world->nr_open);
    while (world->nr_answered)
        journal_clear(&world->journal, world->answered[--world->nr_answered].slot);
    CHECK(world->journal.nr_free == ring->entries - world->nr_open);
}

static void final_check(struct world *world)
{
    struct back_ring *ring = &world->ring;
    uint32_t req_cons = ring->req_cons;
    int waiting = ring_final_check(ring);
    CHECK(waiting >= -1 && waiting <= (int)(ring->entries - world->nr_open));
    CHECK(ring->req_cons == req_cons);
}

/* -- turns of the frontend ----------------------------------------------------------------------------- */

static void write_index(struct world *world)
{
    uint8_t how = byte(world->input);
    uint32_t value = how & 4 ? number32(world->input) : world->ring.req_cons + byte(world->input);
    memcpy(world->ring.shared + (size_t)(how % 4) * 4, &value, sizeof(value));
}

static void write_anywhere(struct world *world)
{
    size_t at = number32(world->input) % world->size;
    size_t most = world->size - at;
    size_t number = byte(world->input);
    bytes(world->input, world->ring.shared + at, number < most ? number : most);
}

/* A request where the backend will look for it, and which it will find. */
static void ask(struct world *world)
{
    struct back_ring *ring = &world->ring;
    uint32_t req_prod = ring->req_cons + 1;
    uint8_t *entry =
        ring->shared + RING_HEADER + (size_t)(ring->req_cons % ring->entries) * ring->abi->entry_size;
    bytes(world->input, entry, ring->abi->entry_size);
    memcpy(ring->shared, &req_prod, sizeof(req_prod));
}

/* As ring_answer_done: what is answered is published and cleared before more is taken.  The frontend doesn't
 * wait for that. */
static void answer_some(struct world *world)
{
    for (unsigned number = byte(world->input) % MOST_ENTRIES + 1; number && world->nr_open; number--) {
        answer(world);
        if (byte(world->input) == 1)
            write_anywhere(world);
    }
    push(world);
}

static void turn(struct world *world)
{
    switch (byte(world->input) % 8) {
    case 0:
    case 1:
        take(world);
        break;
    case 2:
        answer_some(world);
        break;
    case 3:
        final_check(world);
        break;
    case 4:
        write_index(world);
        break;
    case 5:
        write_anywhere(world);
        break;
    case 6:
        ask(world);
        take(world);
        break;
    default:
        choose_limits(world);
    }
}

/* What an earlier backend left: consumed and in the first slots. */
static void take_over(struct world *world, unsigned owed)
{
    for (; world->nr_open < owed; world->nr_open++)
        world->open[world->nr_open] = (struct consumed){.slot = world->nr_open};
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    struct world world = {.input = &input};
    uint8_t how = byte(&input);
    const struct abi *abi = &ABIS[how & 1];
    uint32_t entries = 32u << (how >> 1) % 3;
    uint32_t start = number32(&input);
    uint32_t owed = how & 0x80 ? byte(&input) % (entries + 1) : 0;
    uint64_t *marks = exactly(entries * sizeof(*marks));
    uint32_t *indices = exactly(entries * sizeof(*indices));
    uint8_t *copies = exactly((size_t)entries * abi->entry_size);

    choose_limits(&world);
    world.size = RING_HEADER + (size_t)entries * abi->entry_size;
    ring_attach(&world.ring, exactly(world.size), abi, entries, start + owed, start);
    CHECK(journal_open(&world.journal, marks, indices, copies, entries, abi->entry_size, owed));
    take_over(&world, owed);
    for (unsigned turns = 0; input.left && turns < MOST_TURNS; turns++)
        turn(&world);
    journal_close(&world.journal);
    free(world.ring.shared);
    free(copies);
    free(indices);
    free(marks);
    return 0;
}
