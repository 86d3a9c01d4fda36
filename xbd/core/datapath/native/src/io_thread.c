/*
 * The I/O threads: each serves many rings with one engine, sleeps in one system call, and never waits for
 * Python.
 *
 * Nothing is lost between looking and sleeping: before a thread sleeps, every ring that was served since has had
 * its final check, and `sleeping` is set before the mailbox is looked at for the last time, while who posts puts
 * it there before looking at `sleeping`.
 */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include "server.h"
#include "stress.h"

enum {
    MOST_THREADS = 64,
    FIRST_SPIN_NS = 10000,
    LOOKS_PER_CLOCK = 32,               /* at rings, while spinning: the clock is not free */
    BATCHES_PER_SAMPLE = 64,
    ROUNDS_PER_LOOK = 8,                /* while there is work: how often all that were served are looked at */
};

uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* -- works --------------------------------------------------------------------------------------------- */

struct work *work_get(struct io_thread *thread)
{
    struct work *work = thread->pool;
    if (work) {
        thread->pool = work->next;
    } else {
        work = malloc(sizeof(*work));
        if (!work)
            return NULL;
        work->capacity = INLINE_SEGMENTS;
        work->segments = work->inline_segments;
        work->iov = work->inline_iov;
        work->held = work->inline_held;
    }
    work->transfer.segments = work->segments;
    work->transfer.iov = work->iov;
    work->transfer.held_pages = work->held;
    work->transfer.held = NULL;
    work->transfer.status = RSP_OKAY;
    work->attached = false;
    work->asked = false;
    work->operations = 0;
    work->pieces = NULL;
    return work;
}

bool work_reserve(struct work *work, unsigned segments)
{
    if (segments <= work->capacity)
        return true;
    size_t each = sizeof(struct segment) + sizeof(struct iovec) + sizeof(void *);
    char *memory = malloc(segments * each);
    if (!memory)
        return false;
    if (work->capacity > INLINE_SEGMENTS)
        free(work->iov);
    work->iov = (struct iovec *)(void *)memory;
    work->held = (void **)(void *)(work->iov + segments);
    work->segments = (struct segment *)(void *)(work->held + segments);
    work->capacity = segments;
    work->transfer.segments = work->segments;
    work->transfer.iov = work->iov;
    work->transfer.held_pages = work->held;
    return true;
}

void work_put(struct io_thread *thread, struct work *work)
{
    work->next = thread->pool;
    thread->pool = work;
}

static void free_pool(struct io_thread *thread)
{
    for (struct work *work; (work = thread->pool);) {
        thread->pool = work->next;
        if (work->capacity > INLINE_SEGMENTS)
            free(work->iov);
        free(work);
    }
}

/* -- the mailbox --------------------------------------------------------------------------------------- */

static void wake(struct io_thread *thread)
{
    static const uint64_t one = 1;
    STRESS_POINT(MAIL_POST);
    atomic_store(&thread->mail, true);
    STRESS_POINT(MAIL_POSTED);
    if (!atomic_load(&thread->sleeping))
        return;
    STRESS_POINT(MAIL_WAKE);
    while (write(thread->mail_fd, &one, sizeof(one)) < 0 && errno == EINTR)
        continue;
}

void thread_post(struct io_thread *thread, struct command *command)
{
    command->next = NULL;
    pthread_mutex_lock(&thread->lock);
    *thread->last_command = command;
    thread->last_command = &command->next;
    pthread_mutex_unlock(&thread->lock);
    wake(thread);
}

void thread_answer(struct io_thread *thread, struct queue *works)
{
    pthread_mutex_lock(&thread->lock);
    *thread->answers.last = works->first;
    thread->answers.last = works->last;
    pthread_mutex_unlock(&thread->lock);
    queue_init(works);
    wake(thread);
}

static bool read_mail(struct io_thread *thread, bool *quit)
{
    if (!atomic_load_explicit(&thread->mail, memory_order_relaxed))
        return false;
    STRESS_POINT(MAIL_READ);
    atomic_store(&thread->mail, false);
    STRESS_POINT(MAIL_CLEARED);
    pthread_mutex_lock(&thread->lock);
    struct command *command = thread->commands;
    struct work *answer = thread->answers.first;
    thread->commands = NULL;
    thread->last_command = &thread->commands;
    queue_init(&thread->answers);
    *quit = thread->quit;
    pthread_mutex_unlock(&thread->lock);
    while (answer) {
        struct work *work = answer;
        answer = answer->next;
        ring_verdict(work);
    }
    while (command) {
        struct command *next = command->next;
        ring_command(command->ring, command);
        command = next;
    }
    return true;
}

/* -- lists of rings ------------------------------------------------------------------------------------ */

void thread_make_runnable(struct io_thread *thread, struct ring *ring)
{
    if (ring->runnable)
        return;
    ring->runnable = true;
    ring->next_runnable = NULL;
    *thread->last_runnable = ring;
    thread->last_runnable = &ring->next_runnable;
}

void thread_make_answering(struct io_thread *thread, struct ring *ring)
{
    if (ring->answering)
        return;
    ring->answering = true;
    ring->next_answering = thread->answering;
    thread->answering = ring;
}

static struct ring *take_runnable(struct io_thread *thread)
{
    struct ring *ring = thread->runnable;
    thread->runnable = NULL;
    thread->last_runnable = &thread->runnable;
    return ring;
}

void thread_add(struct io_thread *thread, struct ring *ring)
{
    ring->next = thread->rings;
    thread->rings = ring;
}

void thread_remove(struct io_thread *thread, struct ring *ring)
{
    struct ring *rest = take_runnable(thread);
    for (struct ring *next; rest; rest = next) {
        next = rest->next_runnable;
        rest->runnable = false;
        if (rest != ring)
            thread_make_runnable(thread, rest);
    }
    for (struct ring **at = &thread->answering; *at; at = &(*at)->next_answering)
        if (*at == ring) {
            *at = ring->next_answering;
            break;
        }
    for (struct ring **at = &thread->resting; *at; at = &(*at)->next_resting)
        if (*at == ring) {
            *at = ring->next_resting;
            break;
        }
    for (struct ring **at = &thread->warm; *at; at = &(*at)->next_warm)
        if (*at == ring) {
            *at = ring->next_warm;
            thread->nr_warm--;
            break;
        }
    for (struct ring **at = &thread->rings; *at; at = &(*at)->next)
        if (*at == ring) {
            *at = ring->next;
            break;
        }
    ring->runnable = ring->answering = ring->resting = ring->warm = false;
    atomic_fetch_sub(&thread->nr_rings, 1);
}

/* -- turns --------------------------------------------------------------------------------------------- */

/* Served just now: it gets its final check before the thread sleeps.  Until then its guest is not asked for events:
 * `warm_beckons` sees what it sends. */
static void keep_warm(struct io_thread *thread, struct ring *ring)
{
    if (ring->warm)
        return;
    ring->warm = true;
    ring->next_warm = thread->warm;
    thread->warm = ring;
    thread->nr_warm++;
}

static bool serve(struct io_thread *thread)
{
    struct ring *ring = take_runnable(thread);
    bool served = ring != NULL;
    while (ring) {
        struct ring *next = ring->next_runnable;
        ring->runnable = false;
        ring_serve(ring);
        keep_warm(thread, ring);
        ring = next;
    }
    return served;
}

static bool answer(struct io_thread *thread)
{
    bool answered = thread->answering != NULL;
    for (struct ring *ring; (ring = thread->answering);) {
        thread->answering = ring->next_answering;
        ring->answering = false;
        ring_answer_done(ring);
        if (ring_beckons(ring))
            thread_make_runnable(thread, ring);
        else
            keep_warm(thread, ring);
    }
    return answered;
}

/* The final checks; false: there is something to do. */
static bool quiet(struct io_thread *thread)
{
    for (struct ring *ring; (ring = thread->warm);) {
        thread->warm = ring->next_warm;
        ring->warm = false;
        if (ring_quiet(ring))
            thread_make_runnable(thread, ring);
    }
    thread->nr_warm = 0;
    return !thread->runnable;
}

static bool warm_beckons(struct io_thread *thread)
{
    bool found = false;
    for (struct ring *ring = thread->warm; ring; ring = ring->next_warm)
        if (ring_beckons(ring)) {
            thread_make_runnable(thread, ring);
            found = true;
        }
    return found;
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Looks for work for a while; whether there is some. */
static bool spin(struct io_thread *thread, uint64_t until_ns)
{
    for (unsigned looks = 0;;) {
        if (warm_beckons(thread) || atomic_load_explicit(&thread->mail, memory_order_relaxed) ||
            thread->engine->pending(thread))
            return true;
        looks += 1 + thread->nr_warm;
        if (looks >= LOOKS_PER_CLOCK) {
            if (now_ns() >= until_ns)
                return false;
            looks = 0;
        }
        relax();
    }
}

/* Longer if a longer spin would have found what came, shorter if even the longest would not have. */
static void adapt(struct io_thread *thread, uint64_t slept_ns)
{
    if (slept_ns > thread->most_spin_ns)
        thread->spin_ns = thread->spin_ns / 2 < FIRST_SPIN_NS ? 0 : thread->spin_ns / 2;
    else if (slept_ns > thread->spin_ns)
        thread->spin_ns = thread->spin_ns ? thread->spin_ns * 2 : FIRST_SPIN_NS;
    if (thread->spin_ns > thread->most_spin_ns)
        thread->spin_ns = thread->most_spin_ns;
}

/* How long nothing has to be looked at; UINT64_MAX: for ever. */
static uint64_t wake_rested(struct io_thread *thread)
{
    uint64_t soonest = UINT64_MAX;
    if (!thread->resting)
        return soonest;
    uint64_t now = now_ns();
    for (struct ring **at = &thread->resting; *at;) {
        struct ring *ring = *at;
        if (ring->rest_until_ns <= now && ring_rested(ring)) {
            *at = ring->next_resting;
            soonest = 0;
            continue;
        }
        uint64_t left = ring->rest_until_ns > now ? ring->rest_until_ns - now : 1000000;
        soonest = left < soonest ? left : soonest;
        at = &ring->next_resting;
    }
    return soonest;
}

/* Spins, then sleeps until something happens; or returns at once, because something has. */
static int wait(struct io_thread *thread, uint64_t timeout_ns)
{
    uint64_t began = thread->most_spin_ns ? now_ns() : 0;
    if (timeout_ns && thread->spin_ns && spin(thread, began + thread->spin_ns))
        return 0;
    STRESS_POINT(SLEEP_CHECK);
    if (!quiet(thread))
        return 0;
    if (thread->resting)
        timeout_ns = wake_rested(thread);       /* some were sent to rest only now */
    STRESS_POINT(SLEEP_SAY);
    atomic_store(&thread->sleeping, true);
    STRESS_POINT(SLEEP_BEGIN);
    int error = thread->engine->turn(thread, atomic_load(&thread->mail) ? 0 : timeout_ns);
    STRESS_POINT(SLEEP_END);
    atomic_store(&thread->sleeping, false);
    if (thread->most_spin_ns)
        adapt(thread, now_ns() - began);
    return error;
}

/* Whether what was started is better handed over before the thread gets ready to sleep.  What ends at once (the
 * page cache has it) is answered then without asking the guest for an event meanwhile; what does not end at once
 * would only cost one more system call.  Looked at anew from time to time. */
static bool hand_over_first(struct io_thread *thread)
{
    return thread->spin_ns || thread->ends_at_once || thread->batches++ % BATCHES_PER_SAMPLE == 0;
}

static int hand_over(struct io_thread *thread)
{
    unsigned before = thread->in_flight;
    unsigned started = thread->started;
    int error = thread->engine->turn(thread, 0);
    if (started)
        thread->ends_at_once = before - thread->in_flight >= (started + 1) / 2;
    return error;
}

static int turn(struct io_thread *thread, bool busy, uint64_t timeout_ns)
{
    /* A ring that was served gets an event again after its final check, which a busy one might put off for ever. */
    if (busy && ++thread->rounds % ROUNDS_PER_LOOK == 0)
        warm_beckons(thread);
    if (thread->started ? hand_over_first(thread) : thread->engine->pending(thread))
        return hand_over(thread);
    if (busy && !thread->started)
        return 0;
    return wait(thread, timeout_ns);
}

/* The kernel refuses this thread's engine: its disks are closed, the others go on. */
static void break_all(struct io_thread *thread, int error)
{
    static const struct timespec moment = {.tv_nsec = 10000000};
    for (struct ring *ring = thread->rings; ring; ring = ring->next)
        ring_broken(ring, error);
    nanosleep(&moment, NULL);
}

static void *run(void *argument)
{
    struct io_thread *thread = argument;
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL);     /* signals are Python's */
    prctl(PR_SET_NAME, "xbd-io");               /* for top(1) */
    bool opened = thread->engine->open(thread);
    thread->start_error = opened ? 0 : errno;
    pthread_barrier_wait(&thread->threads->started);
    for (bool quit = !opened; !quit;) {
        uint64_t timeout_ns = wake_rested(thread);
        bool busy = read_mail(thread, &quit);
        busy |= serve(thread);
        busy |= answer(thread);
        int error = turn(thread, busy || quit, timeout_ns);
        if (error)
            break_all(thread, error);
    }
    if (opened)
        thread->engine->close(thread);
    free_pool(thread);
    copy_free_memory(thread);
    return NULL;
}

/* -- all threads --------------------------------------------------------------------------------------- */

struct io_thread *threads_pick(struct xbd_threads *threads)
{
    struct io_thread *idlest = &threads->thread[0];
    for (unsigned i = 1; i < threads->count; i++)
        if (atomic_load(&threads->thread[i].nr_rings) < atomic_load(&idlest->nr_rings))
            idlest = &threads->thread[i];
    return idlest;
}

static bool prepare(struct xbd_threads *threads, struct io_thread *thread, const struct engine_calls *engine)
{
    thread->threads = threads;
    thread->engine = engine;
    thread->last_command = &thread->commands;
    thread->last_runnable = &thread->runnable;
    thread->most_spin_ns = (uint64_t)threads->spin_us * 1000;
    thread->spin_ns = thread->most_spin_ns;
    queue_init(&thread->answers);
    pthread_mutex_init(&thread->lock, NULL);
    thread->mail_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return thread->mail_fd >= 0;
}

static void dispose(struct xbd_threads *threads)
{
    for (unsigned i = 0; i < threads->count; i++) {
        pthread_mutex_destroy(&threads->thread[i].lock);
        if (threads->thread[i].mail_fd >= 0)
            close(threads->thread[i].mail_fd);
    }
    pthread_barrier_destroy(&threads->started);
    free(threads);
}

static void join(struct xbd_threads *threads, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        struct io_thread *thread = &threads->thread[i];
        pthread_mutex_lock(&thread->lock);
        thread->quit = true;
        pthread_mutex_unlock(&thread->lock);
        wake(thread);
        pthread_join(thread->id, NULL);
    }
}

/* NULL with errno set: ENOSYS, EPERM, ENOMEM if the engine is not to be had. */
static struct xbd_threads *start(unsigned count, unsigned spin_us, const struct engine_calls *engine)
{
    struct xbd_threads *threads = calloc(1, sizeof(*threads) + count * sizeof(struct io_thread));
    if (!threads)
        return NULL;
    threads->count = count;
    threads->spin_us = spin_us;
    threads->engine = engine;
    int error = 0;
    bool all = true;
    pthread_barrier_init(&threads->started, NULL, 2);
    for (unsigned i = 0; i < count; i++)
        all &= prepare(threads, &threads->thread[i], engine);
    if (!all)
        error = errno;
    unsigned running = 0;
    while (running < count && !error) {
        struct io_thread *thread = &threads->thread[running];
        error = pthread_create(&thread->id, NULL, run, thread);
        if (error)
            break;
        running++;
        pthread_barrier_wait(&threads->started);        /* one after the other */
        error = thread->start_error;
    }
    if (!error)
        return threads;
    join(threads, running);
    dispose(threads);
    errno = error;
    return NULL;
}

xbd_threads *xbd_threads_start(unsigned count, unsigned spin_us, enum xbd_engine engine)
{
    if (count < 1 || count > MOST_THREADS) {
        errno = EINVAL;
        return NULL;
    }
    xbd_threads *threads = NULL;
    if (engine != XBD_ENGINE_PREADV)
        threads = start(count, spin_us, &ENGINE_URING);
    if (!threads && engine != XBD_ENGINE_URING)
        threads = start(count, spin_us, &ENGINE_PREADV);
    return threads;
}

const char *xbd_threads_engine(const xbd_threads *threads)
{
    return threads->engine->name;
}

void xbd_threads_stop(xbd_threads *threads)
{
    join(threads, threads->count);
    dispose(threads);
}
