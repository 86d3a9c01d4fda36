/*
 * Whether anybody is ever left asleep: two processes, all rhythms, delays at chance where the order matters.
 *
 *     stress_test [--sleeps N] [--seconds N] [--stuck N] [--scenario N] [--seed N]
 *
 * Goes through the scenarios until both sides have slept so many times (two million), or for so many seconds.  A
 * sleep is a call of poll(2) or io_uring_enter(2) in which the kernel took the thread off the processor.  Ends with
 * status 1 and a line that begins with FOUND if somebody sleeps for --stuck seconds (10) though there is something
 * for it to do, if a request is answered twice, never or wrongly, or if other bytes are read than were written.
 *
 * See stress_world.h.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "stress_world.h"

#define URING XBD_ENGINE_URING
#define PREADV XBD_ENGINE_PREADV

/* engine, spin_us, threads, rings, entries, abi, mode, depth, budget, flushes, apart, changes */
static const struct scenario scenarios[] = {
    {URING, 0, 1, 1, 32, 0, XBD_PERSISTENT, 1, 0, 1, true, false},
    {PREADV, 0, 1, 1, 32, 1, XBD_PERSISTENT, 1, 0, 1, true, false},
    {URING, 50, 1, 2, 32, 1, XBD_MAP, 2, 0, 1, false, false},
    {PREADV, 50, 1, 2, 32, 0, XBD_COPY, 2, 0, 1, false, false},
    {URING, 0, 1, 1, 32, 1, XBD_PERSISTENT, 1, 0, 60, false, false},
    {PREADV, 20, 1, 1, 32, 0, XBD_PERSISTENT, 1, 0, 60, false, false},
    {URING, 0, 1, 3, 32, 1, XBD_MAP, 4, 0, 1, false, true},
    {PREADV, 0, 1, 3, 64, 0, XBD_COPY, 4, 0, 1, true, true},
    {URING, 50, 1, 3, 64, 0, XBD_COPY, 8, 0, 1, false, true},
    {PREADV, 50, 1, 3, 128, 1, XBD_MAP, 32, 0, 1, true, true},
    {URING, 0, 2, 4, 128, 0, XBD_PERSISTENT, 128, 64, 1, false, true},
    {PREADV, 50, 2, 4, 128, 1, XBD_PERSISTENT, 128, 64, 1, false, true},
    {URING, 20, 1, 20, 32, 0, XBD_PERSISTENT, 2, 0, 1, false, false},
    {PREADV, 0, 1, 20, 32, 1, XBD_PERSISTENT, 2, 0, 1, true, true},
    {URING, 0, 2, 2, 32, 1, XBD_COPY, 1, 0, 1, false, true},
    {PREADV, 20, 2, 2, 32, 0, XBD_MAP, 1, 0, 1, false, true},
};

enum { SCENARIOS = sizeof(scenarios) / sizeof(scenarios[0]) };

struct options {
    uint64_t sleeps;
    unsigned seconds, stuck;
    int scenario;
    uint64_t seed;
};

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* -- one scenario -------------------------------------------------------------------------------------- */

static struct world *make_world(const struct scenario *scenario)
{
    struct world *world = mmap(NULL, sizeof(*world), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(world != MAP_FAILED);
    world->scenario = *scenario;
    atomic_store(&world->guests, scenario->rings);
    guest_memory_make(&world->memory, scenario->rings * pages_per_ring(scenario));
    guest_memory_map(&world->memory);
    for (unsigned i = 0; i < HOMES; i++) {
        world->homes[i] = memfd_create("disk", MFD_CLOEXEC);
        CHECK(world->homes[i] >= 0 && !ftruncate(world->homes[i], (off_t)disk_bytes(scenario)));
    }
    for (unsigned i = 0; i < scenario->rings; i++) {
        struct front_ring ring;
        uint32_t page = first_page(scenario, i);
        uint32_t pages = ring_pages(scenario->entries);
        front_init(&ring, world->memory.writable + (size_t)page * PAGE, &ABIS[scenario->abi], scenario->entries);
        grant(&world->memory, page + pages, pages_per_ring(scenario) - pages, GRANTED);
        world->to_backend[i] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        world->to_guest[i] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        CHECK(world->to_backend[i] >= 0 && world->to_guest[i] >= 0);
    }
    guest_memory_unmap(&world->memory);
    return world;
}

static void free_world(struct world *world)
{
    for (unsigned i = 0; i < world->scenario.rings; i++) {
        close(world->to_backend[i]);
        close(world->to_guest[i]);
    }
    for (unsigned i = 0; i < HOMES; i++)
        close(world->homes[i]);
    guest_memory_free(&world->memory);
    munmap(world, sizeof(*world));
}

/* The guest has the first processor that we may use, the backend all others. */
static void part(bool backend)
{
    cpu_set_t ours, theirs;
    CHECK(!sched_getaffinity(0, sizeof(ours), &ours));
    if (CPU_COUNT(&ours) < 2)
        return;
    unsigned first = 0;
    while (!CPU_ISSET(first, &ours))
        first++;
    CPU_ZERO(&theirs);
    CPU_SET(first, &theirs);
    CPU_CLR(first, &ours);
    CHECK(!sched_setaffinity(0, sizeof(ours), backend ? &ours : &theirs));
}

static pid_t begin(struct world *world, void (*run)(struct world *))
{
    pid_t parent = getpid();
    pid_t child = fork();
    CHECK(child >= 0);
    if (child)
        return child;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(1);
    if (world->scenario.apart)
        part(run == run_backend);
    run(world);
    abort();                            /* it does not return */
}

/* Waits for both; if one of them fails, the other one is killed. */
static bool await(const char *names[2], const pid_t children[2])
{
    bool passed = true;
    for (unsigned left = 2; left; left--) {
        int status;
        pid_t gone;
        while ((gone = waitpid(-1, &status, 0)) < 0)
            CHECK(errno == EINTR);
        unsigned which = gone == children[1];
        if (!status || !passed)
            continue;
        passed = false;
        if (WIFSIGNALED(status))
            fprintf(stderr, "FOUND the %s was ended by signal %d\n", names[which], WTERMSIG(status));
        else
            fprintf(stderr, "FOUND the %s ended with status %d\n", names[which], WEXITSTATUS(status));
        kill(children[!which], SIGKILL);
    }
    return passed;
}

static void describe(const struct scenario *scenario, char *text, size_t size)
{
    static const char *const modes[] = {"kept pages", "mapped pages", "copied pages"};
    snprintf(text, size, "%s, spin %u, %u ring%s of %u for %u thread%s, %s, depth %u, %s%s%s",
             scenario->engine == URING ? "io_uring" : "preadv", scenario->spin_us, scenario->rings,
             scenario->rings > 1 ? "s" : "", scenario->entries, scenario->threads, scenario->threads > 1 ? "s" : "",
             scenario->abi ? "x86_32" : "x86_64", scenario->depth, modes[scenario->mode],
             scenario->changes ? ", with changes" : "", scenario->apart ? ", apart" : "");
}

static void add_up(struct tally *total, const struct tally *tally)
{
    total->guest += tally->guest;
    total->io += tally->io;
    total->upcalls += tally->upcalls;
    total->requests += tally->requests;
    total->asked += tally->asked;
    total->lives += tally->lives;
    total->moves += tally->moves;
}

static void show(const char *what, struct tally *tally, double seconds)
{
    printf("%s: %lu sleeps (guest %lu, I/O threads %lu, upcalls %lu), %lu requests, %lu of them upcalls, "
           "%lu connections, %lu moves, %.1f s\n",
           what, (unsigned long)all_sleeps(tally), (unsigned long)tally->guest, (unsigned long)tally->io,
           (unsigned long)tally->upcalls, (unsigned long)tally->requests, (unsigned long)tally->asked,
           (unsigned long)tally->lives, (unsigned long)tally->moves, seconds);
    fflush(stdout);
}

static bool play(unsigned number, const struct options *options, uint64_t sleeps, unsigned seconds,
                 struct tally *total)
{
    static const char *names[2] = {"guest", "backend"};
    char text[200];
    struct world *world = make_world(&scenarios[number]);
    double began = now();
    world->seed = options->seed * 1000 + number + 1;
    world->wanted_sleeps = sleeps;
    world->seconds = seconds;
    world->stuck_seconds = options->stuck;
    pid_t children[2] = {begin(world, run_guest), begin(world, run_backend)};
    bool passed = await(names, children);
    describe(&scenarios[number], text, sizeof(text));
    show(text, &world->tally, now() - began);
    add_up(total, &world->tally);
    free_world(world);
    return passed;
}

/* -- all of them --------------------------------------------------------------------------------------- */

static uint64_t number_of(const char *text)
{
    char *end;
    uint64_t number = strtoull(text, &end, 10);
    if (*end || end == text) {
        fprintf(stderr, "not a number: %s\n", text);
        exit(2);
    }
    return number;
}

static void read_options(int argc, char **argv, struct options *options)
{
    static const struct option known[] = {
        {"sleeps", required_argument, NULL, 'n'},  {"seconds", required_argument, NULL, 's'},
        {"stuck", required_argument, NULL, 't'},   {"scenario", required_argument, NULL, 'o'},
        {"seed", required_argument, NULL, 'e'},    {NULL, 0, NULL, 0},
    };
    for (int which; (which = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        if (which == '?')
            exit(2);
        uint64_t number = number_of(optarg);
        if (which == 'n')
            options->sleeps = number;
        else if (which == 's')
            options->seconds = (unsigned)number;
        else if (which == 't')
            options->stuck = (unsigned)number;
        else if (which == 'o')
            options->scenario = (int)number;
        else
            options->seed = number;
    }
    if (options->scenario >= SCENARIOS || !options->sleeps || !options->stuck)
        exit(2);
}

static bool has_uring(void)
{
    pid_t child = fork();               /* threads may not have run in this process */
    int status;
    CHECK(child >= 0);
    if (!child) {
        xbd_threads *threads = xbd_threads_start(1, 0, XBD_ENGINE_URING);
        if (threads)
            xbd_threads_stop(threads);
        _exit(threads ? 0 : 1);
    }
    CHECK(waitpid(child, &status, 0) == child);
    return !status;
}

int main(int argc, char **argv)
{
    struct options options = {.sleeps = 2000000, .stuck = 10, .scenario = -1, .seed = (uint64_t)time(NULL)};
    struct tally total = {0};
    double began = now();
    read_options(argc, argv, &options);
    bool uring = has_uring();
    if (!uring)
        printf("there is no io_uring here: only preadv is stressed\n");
    unsigned left = SCENARIOS;
    for (unsigned i = 0; i < SCENARIOS; i++, left--) {
        uint64_t slept = all_sleeps(&total);
        uint64_t sleeps = options.sleeps > slept ? (options.sleeps - slept) / left + 1 : 1;
        if (options.scenario >= 0 && options.scenario != (int)i)
            continue;
        if (scenarios[i].engine == URING && !uring)
            continue;
        if (options.scenario >= 0)
            sleeps = options.sleeps;
        unsigned seconds = options.scenario >= 0 ? options.seconds : (options.seconds + SCENARIOS - 1) / SCENARIOS;
        if (!play(i, &options, sleeps, seconds, &total)) {
            printf("seed %lu, after %.1f s\n", (unsigned long)options.seed, now() - began);
            return 1;
        }
    }
    show("in all", &total, now() - began);
    return 0;
}
