/*
 * The extent cache against what was put into it: a look-up may miss at any time, but never tells anything else than
 * what was put last and not forgotten since; and to forget says false only if nothing could have been known.
 *
 * What is added goes only where nothing is known; so each block is looked up before.  If nothing is dropped
 * meanwhile, all of it is known afterwards.  What was put after an answer was given is newer: in its place the
 * answer must not be found, however much was dropped.
 *
 * The model is a flat array: for each block of some windows of the disk, its file and position.  The windows lie
 * where the cache has its bounds.  Beside them, so far from each other that each takes a page of the cache, lie
 * single chunks: more than there are pages, so that some have to go.
 *
 * The cache is compiled with room for little (see the Makefile), or most inputs would never fill it.
 */
#include "extents.h"
#include "input.h"

enum {
    WINDOWS = 7,
    BLOCKS = 256,                       /* of a window */
    FAR = 40,                           /* chunks, one in each page: there are 16 */
    NARROW = 48,                        /* most that is done is done among so many blocks, so that it meets */
    MOST_TURNS = 300,
    MOST_PUTS = 3000,
    MOST_LONG = 4,                      /* extents over nearly all of it: they take longer */
};

#define FAR_BASE (UINT64_C(3) << 40)
#define FAR_SHIFT 25
#define FAR_LENGTH (UINT64_C(1) << 16)

struct known_place {
    uint32_t epoch;                     /* known if it is this input's */
    int32_t fd;
    uint64_t position;
    unsigned put;                       /* the how manieth it was; 0: it may be dropped without a word */
    bool stays;                         /* the cache knew of it when something was added */
};

struct model {
    struct known_place blocks[WINDOWS][BLOCKS];
    struct known_place far[FAR];
};

struct world {
    struct input *input;
    xbd_extents *extents;
    uint64_t block;                     /* bytes: not always sectors */
    bool at_zero;                       /* the first window begins there */
    unsigned puts, long_ones;
};

static struct model models[2];          /* for reading, for writing */
static uint32_t epoch;

/* -- where the model is -------------------------------------------------------------------------------- */

/* The first block of a window begins there; the last one ends before 2**64. */
static uint64_t base(const struct world *world, unsigned window)
{
    uint64_t half = BLOCKS / 2 * world->block;
    switch (window) {
    case 0:
        return world->at_zero ? 0 : UINT64_C(1) << 32;
    case 1:
        return (UINT64_C(1) << 30) - half;          /* between two pages of the cache */
    case 2:
        return (UINT64_C(1) << 39) - half;          /* what its pages reach with fine chunks */
    case 3:
        return (UINT64_C(1) << 43) - half;          /* and with ordinary ones */
    case 4:
        return (UINT64_C(1) << 63) - half;
    case 5:                             /* in the same page, with fine chunks, as the first one of the far */
        return (FAR_BASE >> 4) - half;
    default:
        return UINT64_MAX - BLOCKS * world->block;
    }
}

static bool is_known(const struct known_place *place)
{
    return place->epoch == epoch;
}

struct range {
    unsigned window;
    unsigned first, number;             /* blocks */
};

static struct range choose_range(struct world *world)
{
    uint8_t where = byte(world->input);
    uint8_t from = byte(world->input);
    uint8_t number = byte(world->input);
    struct range range = {.window = where % WINDOWS};
    if (where < 216) {
        range.first = BLOCKS / 2 - NARROW / 2 + from % NARROW;
        range.number = 1 + number % (NARROW / 2);
    } else {
        range.first = (from * 256u + number) % BLOCKS;
        range.number = 1 + number16(world->input) % (BLOCKS - range.first);
    }
    return range;
}

static uint64_t start_of(const struct world *world, const struct range *range)
{
    return base(world, range->window) + range->first * world->block;
}

/* -- looking up ---------------------------------------------------------------------------------------- */

static void check_pieces(const struct xbd_piece *pieces, unsigned count, unsigned most, uint64_t length)
{
    uint64_t total = 0;
    CHECK(count <= most);
    for (unsigned i = 0; i < count; i++) {
        CHECK(pieces[i].length);
        CHECK(!i || pieces[i].fd != pieces[i - 1].fd ||
              pieces[i].position != pieces[i - 1].position + pieces[i - 1].length);
        total += pieces[i].length;
    }
    CHECK(!count || total == length);
}

/* Byte by byte would be the model; a block and what of it is in the piece is the same. */
static void check_blocks(const struct world *world, const struct known_place *blocks, uint64_t inside,
                         const struct xbd_piece *piece)
{
    for (uint64_t at = 0; at < piece->length;) {
        const struct known_place *place = &blocks[(inside + at) / world->block];
        uint64_t within = (inside + at) % world->block;
        uint64_t part = world->block - within;
        CHECK(is_known(place) && place->fd == piece->fd);
        CHECK(place->position + within == piece->position + at);
        at += part;
    }
}

/* Looks a range up, and holds what is told against the model. */
static void look_up(const struct world *world, bool for_write, unsigned window, uint64_t inside, uint64_t end,
                    unsigned most)
{
    struct xbd_piece pieces[MAX_PIECES];
    uint64_t length = end - inside;
    unsigned count =
        xbd_extents_find(world->extents, for_write, base(world, window) + inside, length, pieces, most);
    check_pieces(pieces, count, most, length);
    for (unsigned i = 0; i < count; i++) {
        check_blocks(world, models[for_write].blocks[window], inside, &pieces[i]);
        inside += pieces[i].length;
    }
}

/* Each block at a range's ends, and the range itself. */
static void look_around(const struct world *world, const struct range *range)
{
    unsigned ends[] = {range->first, range->first + range->number};
    for (unsigned direction = 0; direction < 2; direction++) {
        look_up(world, direction, range->window, range->first * world->block, ends[1] * world->block, MAX_PIECES);
        for (unsigned i = 0; i < 2; i++)
            for (unsigned at = ends[i] < 4 ? 0 : ends[i] - 4; at < ends[i] + 4 && at < BLOCKS; at++)
                look_up(world, direction, range->window, at * world->block, (at + 1) * world->block, 1);
    }
}

static void look_everywhere(const struct world *world)
{
    for (unsigned window = 0; window < WINDOWS; window++)
        for (unsigned at = 0; at < BLOCKS; at++)
            for (unsigned direction = 0; direction < 2; direction++)
                look_up(world, direction, window, at * world->block, (at + 1) * world->block, 1);
}

/* -- putting ------------------------------------------------------------------------------------------- */

/* With a part of a chunk goes what is known of its rest, and that is no want of room. */
static void excuse_rest(const struct world *world, bool for_write, unsigned window, uint64_t bound)
{
    uint64_t chunk = xbd_extents_chunk(world->extents, for_write);
    uint64_t number = bound / chunk;
    for (unsigned i = 0; bound % chunk && i < BLOCKS; i++) {
        uint64_t start = base(world, window) + i * world->block;
        if (start / chunk <= number && number <= (start + world->block - 1) / chunk)
            models[for_write].blocks[window][i].put = 0;
    }
}

static void put(struct world *world, bool for_write, const struct range *range, int32_t fd, uint64_t position)
{
    uint64_t start = start_of(world, range);
    if (world->puts++ >= MOST_PUTS)
        return;
    CHECK(xbd_extents_put(world->extents, for_write, start, start + range->number * world->block, fd, position));
    excuse_rest(world, for_write, range->window, start);
    excuse_rest(world, for_write, range->window, start + range->number * world->block);
    for (unsigned i = 0; i < range->number; i++)
        models[for_write].blocks[range->window][range->first + i] =
            (struct known_place){epoch, fd, position + i * world->block, world->puts, false};
}

static uint64_t choose_position(struct world *world, const struct range *range)
{
    uint8_t how = byte(world->input);
    if (how < 128)                      /* as the disk's: neighbours continue each other */
        return (start_of(world, range) + how * world->block) & INT64_MAX >> 1;
    return how < 192 ? number32(world->input) * world->block : number32(world->input);
}

static void put_range(struct world *world)
{
    struct range range = choose_range(world);
    uint8_t how = byte(world->input);
    put(world, how & 1, &range, how >> 1 & 15, choose_position(world, &range));
    look_around(world, &range);
}

/* Single blocks that do not touch. */
static void put_scattered(struct world *world, struct range range, unsigned step, bool for_write, int32_t fd)
{
    unsigned end = range.first + range.number;
    range.number = 1;
    for (unsigned i = 0; range.first < end; range.first += step, i++)
        put(world, for_write, &range, fd, i * 3 * world->block);
}

static void put_many(struct world *world)
{
    struct range range = choose_range(world);
    uint8_t how = byte(world->input);
    put_scattered(world, range, 2 + (how >> 5), how & 1, how >> 1 & 15);
}

/* More than the table holds. */
static void fill_table(struct world *world)
{
    uint8_t how = byte(world->input);
    for (unsigned i = 0; i < WINDOWS; i++) {
        struct range range = {.window = i, .number = BLOCKS};
        put_scattered(world, range, how & 8 ? 3 : 2, how & 1, how >> 1 & 3);
    }
    look_everywhere(world);
}

static void put_far(struct world *world)
{
    uint8_t how = byte(world->input);
    unsigned first = byte(world->input) % FAR;
    unsigned number = how & 0x80 ? byte(world->input) : 1;
    bool for_write = how & 1;
    for (unsigned i = first; i < FAR && i < first + number && world->puts < MOST_PUTS; i++, world->puts++) {
        uint64_t start = FAR_BASE + ((uint64_t)i << FAR_SHIFT);
        uint64_t position = (uint64_t)i * FAR_LENGTH;
        int32_t fd = (how >> 1 & 7) + (int32_t)(i % 5);
        CHECK(xbd_extents_put(world->extents, for_write, start, start + FAR_LENGTH, fd, position));
        models[for_write].far[i] = (struct known_place){epoch, fd, position, world->puts + 1, false};
    }
}

/* One extent over many of these and all between them. */
static void put_over_far(struct world *world)
{
    uint8_t how = byte(world->input);
    unsigned first = byte(world->input) % FAR;
    unsigned last = first + byte(world->input) % (FAR - first);
    bool for_write = how & 1;
    int32_t fd = how >> 1 & 15;
    uint64_t start = FAR_BASE + ((uint64_t)first << FAR_SHIFT);
    uint64_t end = FAR_BASE + ((uint64_t)last << FAR_SHIFT) + FAR_LENGTH;
    CHECK(xbd_extents_put(world->extents, for_write, start, end, fd, start));
    for (unsigned i = first; i <= last; i++)
        models[for_write].far[i] =
            (struct known_place){epoch, fd, FAR_BASE + ((uint64_t)i << FAR_SHIFT), 0, false};
}

/* Nothing comes of these. */
static void put_nonsense(struct world *world)
{
    struct range range = choose_range(world);
    uint64_t start = start_of(world, &range);
    bool for_write = byte(world->input) & 1;
    CHECK(!xbd_extents_put(world->extents, for_write, start, start, 3, 0));
    CHECK(!xbd_extents_put(world->extents, for_write, start + 1, start, 3, 0));
    CHECK(!xbd_extents_put(world->extents, for_write, start, start + 512, -1, 0));
    CHECK(!xbd_extents_put(world->extents, for_write, start, start + 512, 3, UINT64_MAX));
    CHECK(!xbd_extents_put(world->extents, for_write, 0, 1024, 3, INT64_MAX - 512));
    uint32_t losses = xbd_extents_losses(world->extents);
    CHECK(!xbd_extents_add(world->extents, for_write, start, start, 3, 0, losses));
    CHECK(!xbd_extents_add(world->extents, for_write, start + 1, start, 3, 0, losses));
    CHECK(!xbd_extents_add(world->extents, for_write, start, start + 512, -1, 0, losses));
    CHECK(!xbd_extents_add(world->extents, for_write, 0, 1024, 3, INT64_MAX - 512, losses));
}

/* -- adding -------------------------------------------------------------------------------------------- */

/* What a driver says, and when it was asked. */
struct answer {
    bool for_write;
    uint64_t start, end;
    int32_t fd;
    uint64_t position;
    uint32_t losses;
    unsigned puts;
};

static struct answer ask(const struct world *world, bool for_write, uint64_t start, uint64_t end, int32_t fd,
                         uint64_t position)
{
    return (struct answer){for_write, start, end, fd, position, xbd_extents_losses(world->extents), world->puts};
}

typedef bool visit(const struct world *world, const struct answer *answer, uint64_t start, uint64_t length,
                   struct known_place *place);

/* All places that the answer is about; whether each visit said true. */
static bool each_place(const struct world *world, const struct answer *answer, visit *visit)
{
    struct model *model = &models[answer->for_write];
    bool all = true;
    for (unsigned window = 0; window < WINDOWS; window++)
        for (unsigned i = 0; i < BLOCKS; i++) {
            uint64_t start = base(world, window) + i * world->block;
            if (answer->start <= start && start < answer->end)
                all &= visit(world, answer, start, world->block, &model->blocks[window][i]);
        }
    for (unsigned i = 0; i < FAR; i++) {
        uint64_t start = FAR_BASE + ((uint64_t)i << FAR_SHIFT);
        if (answer->start <= start && start < answer->end)
            all &= visit(world, answer, start, FAR_LENGTH, &model->far[i]);
    }
    return all;
}

static bool knows(const struct world *world, bool for_write, uint64_t start, uint64_t length)
{
    struct xbd_piece piece;
    return xbd_extents_find(world->extents, for_write, start, length, &piece, 1);
}

/* False: it is known in part, since it lies in two chunks; after the addition it might be in two places. */
static bool look_before(const struct world *world, const struct answer *answer, uint64_t start, uint64_t length,
                        struct known_place *place)
{
    bool for_write = answer->for_write;
    place->stays = knows(world, for_write, start, length);
    return place->stays || !(knows(world, for_write, start, 1) || knows(world, for_write, start + length - 1, 1));
}

static bool is_as_before(const struct world *world, const struct answer *answer, uint64_t start, uint64_t length,
                         struct known_place *place)
{
    return knows(world, answer->for_write, start, length) == place->stays;
}

static bool learn(const struct world *world, const struct answer *answer, uint64_t start, uint64_t length,
                  struct known_place *place)
{
    (void)world;
    (void)length;
    bool newer = is_known(place) && place->put > answer->puts;
    if (!place->stays && !newer)
        *place = (struct known_place){epoch, answer->fd, answer->position + (start - answer->start), 0, false};
    return true;
}

/* Whether it is known; then it is as the model says. */
static bool is_known_now(const struct world *world, const struct answer *answer, uint64_t start, uint64_t length,
                         struct known_place *place)
{
    struct xbd_piece piece;
    if (!xbd_extents_find(world->extents, answer->for_write, start, length, &piece, 1))
        return false;
    CHECK(is_known(place) && place->fd == piece.fd);
    CHECK(place->position == piece.position && piece.length == length);
    return true;
}

static void add(const struct world *world, const struct answer *answer)
{
    if (!each_place(world, answer, look_before))
        return;
    uint32_t losses = xbd_extents_losses(world->extents);
    bool done = xbd_extents_add(world->extents, answer->for_write, answer->start, answer->end, answer->fd,
                                answer->position, answer->losses);
    bool lost = losses != xbd_extents_losses(world->extents);
    if (losses != answer->losses) {
        CHECK(!done && !lost && each_place(world, answer, is_as_before));
        return;
    }
    CHECK(done || lost);
    each_place(world, answer, learn);
    CHECK(each_place(world, answer, is_known_now) || lost);
}

static void add_range(struct world *world)
{
    struct range range = choose_range(world);
    uint8_t how = byte(world->input);
    uint64_t start = start_of(world, &range);
    struct answer answer = ask(world, how & 1, start, start + range.number * world->block, how >> 1 & 15,
                               choose_position(world, &range));
    for (unsigned puts = how >> 5; puts; puts--)        /* of others, who know better */
        put_range(world);
    add(world, &answer);
    look_around(world, &range);
}

static void add_over_far(struct world *world)
{
    uint8_t how = byte(world->input);
    unsigned first = byte(world->input) % FAR;
    unsigned last = first + byte(world->input) % (FAR - first);
    uint64_t start = FAR_BASE + ((uint64_t)first << FAR_SHIFT);
    uint64_t end = FAR_BASE + ((uint64_t)last << FAR_SHIFT) + FAR_LENGTH;
    struct answer answer = ask(world, how & 1, start, end, how >> 1 & 15, start);
    for (unsigned puts = how >> 5; puts; puts--)
        put_far(world);
    add(world, &answer);
}

/* From the first window on over most others and what is far, beyond what pages reach. */
static void add_long(struct world *world)
{
    uint8_t how = byte(world->input);
    uint64_t start = base(world, 0);
    struct answer answer = ask(world, how & 1, start, base(world, 3) + BLOCKS * world->block, how >> 1 & 15, start);
    if (world->long_ones++ >= MOST_LONG)
        return;
    for (unsigned puts = how >> 5; puts; puts--)
        put_range(world);
    add(world, &answer);
}

/* -- forgetting ---------------------------------------------------------------------------------------- */

static bool drop(struct known_place *place)
{
    bool known = is_known(place);
    place->epoch = epoch - 1;
    return known;
}

static bool drop_blocks(const struct range *range)
{
    bool known = false;
    for (unsigned direction = 0; direction < 2; direction++)
        for (unsigned i = 0; i < range->number; i++)
            known |= drop(&models[direction].blocks[range->window][range->first + i]);
    return known;
}

static bool drop_far(unsigned first, unsigned number)
{
    bool known = false;
    for (unsigned direction = 0; direction < 2; direction++)
        for (unsigned i = first; i < FAR && i < first + number; i++)
            known |= drop(&models[direction].far[i]);
    return known;
}

static void forget_range(struct world *world)
{
    struct range range = choose_range(world);
    bool told = xbd_extents_forget(world->extents, start_of(world, &range), range.number * world->block);
    bool known = drop_blocks(&range);
    CHECK(told || !known);
    look_around(world, &range);
}

static void forget_far(struct world *world)
{
    unsigned first = byte(world->input) % FAR;
    unsigned number = byte(world->input);
    uint64_t start = FAR_BASE + ((uint64_t)first << FAR_SHIFT);
    bool told = xbd_extents_forget(world->extents, start, (uint64_t)number << FAR_SHIFT);
    bool known = drop_far(first, number);
    CHECK(told || !known);
}

/* Block by block: of none that is known may it be said that there is nothing to forget. */
static void forget_one_by_one(struct world *world)
{
    struct range range = {.number = 1};
    for (range.window = 0; range.window < WINDOWS; range.window++)
        for (range.first = 0; range.first < BLOCKS; range.first++)
            if (drop_blocks(&range))
                CHECK(xbd_extents_forget(world->extents, start_of(world, &range), world->block));
}

static void forget_all(struct world *world)
{
    bool told = xbd_extents_forget(world->extents, 0, UINT64_MAX);
    bool known = drop_far(0, FAR);
    for (unsigned window = 0; window < WINDOWS; window++) {
        struct range range = {.window = window, .number = BLOCKS};
        known |= drop_blocks(&range);
    }
    CHECK(told || !known);
}

/* -- looking up at chance ------------------------------------------------------------------------------ */

static void find_range(struct world *world)
{
    struct range range = choose_range(world);
    uint8_t how = byte(world->input);
    uint64_t cut = how & 2 ? number16(world->input) % world->block : 0;
    look_up(world, how & 1, range.window, range.first * world->block + cut,
            (range.first + range.number) * world->block, how & 4 ? 1 + (how >> 3) : MAX_PIECES);
}

static void find_far(struct world *world)
{
    struct xbd_piece piece;
    uint8_t how = byte(world->input);
    unsigned which = byte(world->input) % FAR;
    uint64_t within = (uint64_t)byte(world->input) % FAR_LENGTH;
    uint64_t offset = FAR_BASE + ((uint64_t)which << FAR_SHIFT) + within;
    const struct known_place *place = &models[how & 1].far[which];
    if (!xbd_extents_find(world->extents, how & 1, offset, FAR_LENGTH - within, &piece, 1))
        return;
    CHECK(is_known(place) && place->fd == piece.fd);
    CHECK(place->position + within == piece.position && piece.length == FAR_LENGTH - within);
}

/* A disk has an end, but a look-up need not know it. */
static void find_beyond(struct world *world)
{
    struct xbd_piece pieces[2];
    CHECK(!xbd_extents_find(world->extents, false, UINT64_MAX - 511, 1024, pieces, 2));
    CHECK(!xbd_extents_find(world->extents, true, UINT64_C(1) << 50, 512, pieces, 2));
}

/* -- all of it ----------------------------------------------------------------------------------------- */

static void turn(struct world *world)
{
    static void (*const turns[])(struct world *) = {
        put_range, put_range, put_many, fill_table, put_far, put_over_far, put_nonsense, forget_range, forget_far,
        forget_all, find_range, find_range, find_range, find_far, find_beyond, add_range, add_range, add_over_far,
        add_long,
    };
    turns[byte(world->input) % (sizeof(turns) / sizeof(turns[0]))](world);
}

static void check_bounds(const struct world *world)
{
    for (unsigned direction = 0; direction < 2; direction++) {
        uint64_t chunk = xbd_extents_chunk(world->extents, direction);
        CHECK(chunk == 65536 || chunk == 4096);
    }
    CHECK(xbd_extents_memory(world->extents) < 1 << 20);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint64_t sizes[] = {512, 512, 4096, 65536, 1000, 12288};
    struct input input = {data, size};
    struct world world = {.input = &input, .extents = xbd_extents_new()};
    CHECK(world.extents);
    uint8_t how = byte(&input);
    world.block = sizes[how % (sizeof(sizes) / sizeof(sizes[0]))];
    world.at_zero = how & 0x80;
    epoch += 2;
    for (unsigned turns = 0; input.left && turns < MOST_TURNS; turns++)
        turn(&world);
    check_bounds(&world);
    forget_one_by_one(&world);
    xbd_extents_free(world.extents);
    return 0;
}
