/* bench-guest: drives one disk as a guest would and prints one line of JSON.
 *
 *   bench-guest blkif DIR        the disks of an embedded host's guest
 *   bench-guest bare SOCKET      a disk of bench-reference
 *   bench-guest vhost-user PATH  the disk behind a vhost-user-blk socket
 *   bench-guest fill PATH BYTES  makes a file with the content that the others expect
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "load.h"
#include "pattern.h"
#include "util.h"

enum { MAX_DEPTH = 1024, MAX_BLOCK = 1 << 20, FILL_AT_ONCE = 1 << 20, XVDA = 51712 };

struct settings {
    struct load_options load;
    struct blkif_options blkif;
    struct bare_options bare;
    struct vhost_user_options vhost_user;
    int cpu;
    bool idle;
};

static const char USAGE[] =
    "usage: bench-guest blkif DIR | bare SOCKET | vhost-user SOCKET [OPTION...]\n"
    "       bench-guest fill FILE BYTES\n"
    "  --depth N            operations in flight (32)\n"
    "  --block BYTES        size of each, 4096 to 1048576 (4096)\n"
    "  --span BYTES         use only the first BYTES of the disk\n"
    "  --write PERCENT      share of writes (0)\n"
    "  --sequential         one block after the other (random)\n"
    "  --touch BYTES        before anything is counted, one block in each BYTES (not)\n"
    "  --warmup SECONDS     not counted (0.3)\n"
    "  --seconds SECONDS    counted (2)\n"
    "  --operations N       stop after N instead\n"
    "  --seed N             of the random offsets (1)\n"
    "  --verify WHAT        of data read: none, sample or full (sample)\n"
    "  --generation N       of data written, 1 to 65535 (1)\n"
    "  --check-back N       written blocks to read again at the end (2048)\n"
    "  --spin-us N          look for answers so long before sleeping (0)\n"
    "  --idle               say 'connected' and do nothing until standard input ends\n"
    "  --cpu N              run on this CPU alone\n"
    "  --watch-pid PID      report this process's CPU time; may be repeated\n"
    "blkif:\n"
    "  --domid N            domain to be (the host picks one)\n"
    "  --device N           virtual device number (51712)\n"
    "  --disks N            this one and the next; each has its share of --depth (1)\n"
    "  --ring-order N       ring of 2^N pages (as small as will hold --depth requests)\n"
    "  --max-segments N     per request (32, as Linux's blkfront); for bare, too\n"
    "  --no-persistent      grant each page for one request only\n"
    "bare:\n"
    "  --disk N             which of the server's files (0)\n"
    "vhost-user:\n"
    "  --queue-size N       descriptors (256, or more if needed)\n"
    "  --indirect           one descriptor per request, with a table (only if needed)\n";

enum option_id {
    DEPTH = 1, BLOCK, SPAN, WRITE, SEQUENTIAL, TOUCH, WARMUP, SECONDS, OPERATIONS, SEED, VERIFY,
    GENERATION, CHECK_BACK, CPU, WATCH_PID, DOMID, DEVICE, RING_ORDER, MAX_SEGMENTS,
    NO_PERSISTENT, QUEUE_SIZE, INDIRECT, SPIN_US, IDLE, DISKS, DISK, HELP,
};

static const struct option OPTIONS[] = {
    {"depth", required_argument, NULL, DEPTH},
    {"block", required_argument, NULL, BLOCK},
    {"span", required_argument, NULL, SPAN},
    {"write", required_argument, NULL, WRITE},
    {"sequential", no_argument, NULL, SEQUENTIAL},
    {"touch", required_argument, NULL, TOUCH},
    {"warmup", required_argument, NULL, WARMUP},
    {"seconds", required_argument, NULL, SECONDS},
    {"operations", required_argument, NULL, OPERATIONS},
    {"seed", required_argument, NULL, SEED},
    {"verify", required_argument, NULL, VERIFY},
    {"generation", required_argument, NULL, GENERATION},
    {"check-back", required_argument, NULL, CHECK_BACK},
    {"cpu", required_argument, NULL, CPU},
    {"watch-pid", required_argument, NULL, WATCH_PID},
    {"domid", required_argument, NULL, DOMID},
    {"device", required_argument, NULL, DEVICE},
    {"ring-order", required_argument, NULL, RING_ORDER},
    {"max-segments", required_argument, NULL, MAX_SEGMENTS},
    {"no-persistent", no_argument, NULL, NO_PERSISTENT},
    {"queue-size", required_argument, NULL, QUEUE_SIZE},
    {"indirect", no_argument, NULL, INDIRECT},
    {"spin-us", required_argument, NULL, SPIN_US},
    {"idle", no_argument, NULL, IDLE},
    {"disks", required_argument, NULL, DISKS},
    {"disk", required_argument, NULL, DISK},
    {"help", no_argument, NULL, HELP},
    {NULL, 0, NULL, 0},
};

static uint64_t number(const char *text, const char *what, uint64_t least, uint64_t most) {
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno || value < least || value > most)
        die("%s: '%s' is not a number from %llu to %llu", what, text, (unsigned long long)least,
            (unsigned long long)most);
    return value;
}

static double seconds(const char *text, const char *what) {
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= 0 && value <= 86400))
        die("%s: '%s' is not a number of seconds", what, text);
    return value;
}

static enum verify verify(const char *text) {
    static const char *const NAMES[] = {"none", "sample", "full"};
    for (unsigned i = 0; i < 3; i++)
        if (strcmp(text, NAMES[i]) == 0)
            return (enum verify)i;
    die("verify: '%s' is not none, sample or full", text);
}

static void apply(struct settings *settings, enum option_id id, const char *name,
                  const char *value) {
    struct load_options *load = &settings->load;
    switch (id) {
    case DEPTH: load->depth = (uint32_t)number(value, name, 1, MAX_DEPTH); break;
    case BLOCK: load->block = (uint32_t)number(value, name, PAGE_SIZE, MAX_BLOCK); break;
    case SPAN: load->span = number(value, name, PAGE_SIZE, INT64_MAX); break;
    case WRITE: load->write_percent = (unsigned)number(value, name, 0, 100); break;
    case SEQUENTIAL: load->sequential = true; break;
    case TOUCH: load->touch = number(value, name, PAGE_SIZE, INT64_MAX); break;
    case WARMUP: load->warmup_seconds = seconds(value, name); break;
    case SECONDS: load->seconds = seconds(value, name); break;
    case OPERATIONS: load->operations = number(value, name, 1, INT64_MAX); break;
    case SEED: load->seed = number(value, name, 1, INT64_MAX); break;
    case VERIFY: load->verify = verify(value); break;
    case GENERATION:
        load->generation = (uint32_t)number(value, name, 1, LAST_GENERATION);
        break;
    case CHECK_BACK: load->check_back = (uint32_t)number(value, name, 0, UINT32_MAX); break;
    case CPU: settings->cpu = (int)number(value, name, 0, CPU_SETSIZE - 1); break;
    case WATCH_PID:
        if (load->watched_count == MAX_WATCHED)
            die("at most %d processes can be watched", MAX_WATCHED);
        load->watched[load->watched_count++] = (pid_t)number(value, name, 1, INT32_MAX);
        break;
    case DOMID: settings->blkif.domid = (uint32_t)number(value, name, 1, 0x7fef); break;
    case DEVICE: settings->blkif.device = (uint32_t)number(value, name, 0, UINT32_MAX); break;
    case RING_ORDER: settings->blkif.ring_order = (int)number(value, name, 0, 5); break;
    case MAX_SEGMENTS:
        settings->blkif.max_segments = (uint32_t)number(value, name, 1, 512);
        settings->bare.max_segments = settings->blkif.max_segments;
        break;
    case NO_PERSISTENT: settings->blkif.persistent = false; break;
    case QUEUE_SIZE:
        settings->vhost_user.queue_size = (uint32_t)number(value, name, 1, 1024);
        if (settings->vhost_user.queue_size & (settings->vhost_user.queue_size - 1))
            die("queue-size: %s is not a power of two", value);
        break;
    case INDIRECT: settings->vhost_user.indirect = true; break;
    case SPIN_US: load->spin_ns = number(value, name, 0, 1000000) * 1000; break;
    case IDLE: settings->idle = true; break;
    case DISKS: settings->blkif.disks = (uint32_t)number(value, name, 1, 127); break;
    case DISK: settings->bare.disk = (uint32_t)number(value, name, 0, UINT32_MAX); break;
    case HELP:
        fputs(USAGE, stdout);
        exit(0);
    }
}

static void parse(struct settings *settings, int count, char **arguments) {
    int id, index = 0;
    while ((id = getopt_long(count, arguments, "", OPTIONS, &index)) != -1) {
        if (id == '?')
            exit(2); /* getopt has said why */
        apply(settings, (enum option_id)id, OPTIONS[index].name, optarg);
    }
    struct load_options *load = &settings->load;
    if (load->block % PAGE_SIZE)
        die("block: %u is not a multiple of %d", load->block, PAGE_SIZE);
    if (load->touch % load->block)
        die("touch: not a multiple of the block");
    if (load->depth % settings->blkif.disks)
        die("depth: %u can't be shared by %u disks", load->depth, settings->blkif.disks);
    if (load->operations)
        load->seconds = 0;
    if (!load->write_percent)
        load->generation = 0; /* nothing newer than the file's first content may appear */
}

static void stay_on(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set) < 0)
        die_errno("CPU %d", cpu);
}

/* Enough of them to draw the distribution. */
static const double QUANTILES[] = {0.001, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4,
                                   0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95,
                                   0.98, 0.99, 0.995, 0.999, 0.9999};

static void report(const struct load_options *options, const struct transport *transport,
                   const struct load_result *result) {
    double operations = result->operations ? (double)result->operations : 1;
    double iops = (double)result->operations / result->seconds;
    printf("{\"transport\": \"%s\", \"depth\": %u, \"block\": %u, \"write_percent\": %u, "
           "\"sequential\": %s, \"seconds\": %.6f, \"operations\": %llu, \"iops\": %.1f, "
           "\"mib_s\": %.2f, ",
           transport->name, options->depth, options->block, options->write_percent,
           options->sequential ? "true" : "false", result->seconds,
           (unsigned long long)result->operations, iops, iops * options->block / (1 << 20));
    printf("\"latency_us\": [");
    for (unsigned i = 0; i < sizeof QUANTILES / sizeof *QUANTILES; i++)
        printf("%s[%g, %.2f]", i ? ", " : "", QUANTILES[i],
               histogram_quantile(&result->latency, QUANTILES[i]) / 1e3);
    printf("], \"p50_us\": %.2f, \"p99_us\": %.2f, \"guest_cpu_us\": %.4f, \"backend_cpu_us\": %.4f, "
           "\"requests\": %llu, \"kicks\": %llu, \"wakeups\": %llu, \"errors\": %llu, "
           "\"mismatches\": %llu, \"checked_back\": %llu}\n",
           histogram_quantile(&result->latency, 0.5) / 1e3,
           histogram_quantile(&result->latency, 0.99) / 1e3,
           result->guest_cpu_seconds / operations * 1e6,
           result->watched_cpu_seconds / operations * 1e6, (unsigned long long)result->requests,
           (unsigned long long)result->kicks, (unsigned long long)result->wakeups,
           (unsigned long long)result->errors, (unsigned long long)result->mismatches,
           (unsigned long long)result->checked_back);
}

static struct transport *connect_disk(const struct settings *settings,
                                      const struct demand *demand, struct memory *memory) {
    if (settings->blkif.directory)
        return blkif_open(&settings->blkif, demand, memory);
    if (settings->bare.socket)
        return bare_open(&settings->bare, demand, memory);
    return vhost_user_open(&settings->vhost_user, demand, memory);
}

static int stay_idle(void) {
    char byte;
    puts("connected");
    fflush(stdout);
    while (read(STDIN_FILENO, &byte, 1) > 0)
        ;
    return 0; /* the connections end with the process */
}

static int drive(struct settings *settings) {
    const struct load_options *load = &settings->load;
    struct demand demand = {.depth = load->depth / settings->blkif.disks,
                            .pages = load->block / PAGE_SIZE};
    struct memory memory;
    /* Data lies in every second page; rings and tables need less than another half of that. */
    memory_open(&memory, load->depth * demand.pages * 3 + 4096);
    if (settings->cpu >= 0)
        stay_on(settings->cpu);
    struct transport *transport = connect_disk(settings, &demand, &memory);
    if (settings->idle)
        return stay_idle();
    struct load_result *result = allocate(1, sizeof *result);
    load_run(load, transport, &memory, result);
    transport->close(transport);
    report(load, transport, result);
    return result->errors || result->mismatches ? 1 : 0;
}

static int fill(const char *path, uint64_t size) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0)
        die_errno("%s", path);
    uint8_t *buffer = allocate(1, FILL_AT_ONCE);
    for (size_t i = 0; i < FILL_AT_ONCE; i += PAGE_SIZE)
        pattern_body(buffer + i);
    for (uint64_t offset = 0; offset < size; offset += FILL_AT_ONCE) {
        for (size_t i = 0; i < FILL_AT_ONCE; i += PAGE_SIZE)
            pattern_stamp(buffer + i, offset + i, 0);
        if (pwrite(fd, buffer, FILL_AT_ONCE, (off_t)offset) != FILL_AT_ONCE)
            die_errno("%s", path);
    }
    if (fsync(fd) < 0 || close(fd) < 0)
        die_errno("%s", path);
    return 0;
}

int main(int count, char **arguments) {
    struct settings settings = {
        .load = {.depth = 32, .block = PAGE_SIZE, .warmup_seconds = 0.3, .seconds = 2, .seed = 1,
                 .verify = VERIFY_SAMPLE, .generation = 1, .check_back = 2048},
        .blkif = {.device = XVDA, .disks = 1, .ring_order = -1, .max_segments = 32,
                  .persistent = true},
        .bare = {.max_segments = 32},
        .cpu = -1,
    };
    parse(&settings, count, arguments);
    char **word = arguments + optind;
    int words = count - optind;
    if (words == 3 && strcmp(word[0], "fill") == 0) {
        uint64_t size = number(word[2], "size", FILL_AT_ONCE, INT64_MAX);
        if (size % FILL_AT_ONCE)
            die("size: not a multiple of %d", FILL_AT_ONCE);
        return fill(word[1], size);
    }
    if (words == 2 && strcmp(word[0], "blkif") == 0)
        settings.blkif.directory = word[1];
    else if (words == 2 && strcmp(word[0], "bare") == 0)
        settings.bare.socket = word[1];
    else if (words == 2 && strcmp(word[0], "vhost-user") == 0)
        settings.vhost_user.socket = word[1];
    else {
        fputs(USAGE, stderr);
        return 2;
    }
    if (settings.blkif.disks > 1 && !settings.blkif.directory)
        die("disks: only blkif has more than one");
    return drive(&settings);
}
