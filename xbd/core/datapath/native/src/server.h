/*
 * The inside of the native data path: threads, rings and requests under way.
 *
 * A ring belongs to one I/O thread, and all that happens to it happens there.  Others speak to a thread by its
 * mailbox, and a thread speaks to Python by its connection's list of events; both are short critical sections,
 * once per batch, and no lock is held while anything else is done.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "api_types.h"
#include "blkif.h"
#include "extents.h"
#include "journal.h"
#include "pages.h"

enum {
    INLINE_SEGMENTS = 32,           /* what Linux sends at most, unless it is asked to send more */
    MOST_IOV = 1024,                /* of a transfer that is moved here: IOV_MAX */
    MOST_ENTRIES = 1024,            /* of a ring: 32 pages */
    RING_FILES = 8,
    TURN_SEGMENTS = 2048,           /* what a ring sets off before the others have their turn */
};

struct io_thread;
struct ring;
struct work;

/* -- a request under way ------------------------------------------------------------------------------- */

enum operation_kind { READ, WRITE, SYNC };

/* One read or write of a host file, or making all of it durable, while the kernel has it. */
struct operation {
    struct ring *ring;
    enum operation_kind kind;
    void *owner;                    /* of `ended` */
    /* The result of the system call (negative: an errno). */
    void (*ended)(struct operation *operation, int64_t result);
    struct iovec *iov;
    unsigned nr_iov;
    int fd;
    uint64_t position, length;
    struct operation *next;
};

enum work_state {
    WAITING,                        /* in the ring's backlog */
    MOVING,                         /* the kernel has operations of it */
    UPCALLED,                       /* Python has it */
    DONE                            /* about to be answered */
};

struct work {
    struct transfer transfer;
    struct ring *ring;
    struct work *next;
    unsigned slot;                  /* in the journal */
    enum work_state state;
    bool attached;                  /* has pages */
    bool asked;                     /* Python was asked where it lies */
    bool moved;                     /* all finished operations moved all their bytes */
    unsigned operations;            /* of them in flight */
    enum xbd_verdict verdict;       /* of Python */
    uint64_t number;                /* when it was set off: grows */
    struct operation operation;     /* if one is enough */
    struct operation *pieces;       /* else: an allocation of its own, with their iovecs */
    unsigned capacity;              /* segments that these three have room for */
    struct segment *segments;
    struct iovec *iov;
    void **held;
    struct segment inline_segments[INLINE_SEGMENTS];
    struct iovec inline_iov[INLINE_SEGMENTS];
    void *inline_held[INLINE_SEGMENTS];
};

struct queue {
    struct work *first, **last;
};

static inline void queue_init(struct queue *queue)
{
    queue->first = NULL;
    queue->last = &queue->first;
}

static inline void queue_push(struct queue *queue, struct work *work)
{
    work->next = NULL;
    *queue->last = work;
    queue->last = &work->next;
}

static inline void queue_push_front(struct queue *queue, struct work *work)
{
    work->next = queue->first;
    queue->first = work;
    if (queue->last == &queue->first)
        queue->last = &work->next;
}

static inline struct work *queue_pop(struct queue *queue)
{
    struct work *work = queue->first;
    if (work) {
        queue->first = work->next;
        if (!queue->first)
            queue->last = &queue->first;
    }
    return work;
}

/* -- commands ------------------------------------------------------------------------------------------ */

enum command_kind { ADD_RING, SET_LIMITS, DRAIN, RESUME, HOLD, SETTLE, STOP_RING };

/* What several rings are asked for; the last to have it done tells Python. */
struct ticket {
    struct xbd_connection *connection;
    struct xbd_event event;
    atomic_uint left;
    bool owned;                     /* by a ring: not to be freed */
    struct ticket *next;            /* in the connection's list of events */
};

struct command {
    enum command_kind kind;
    struct ring *ring;
    struct command *next;
    struct ticket *ticket;
    struct xbd_limits limits;       /* SET_LIMITS */
    unsigned generation;            /* SET_LIMITS: of the limits */
    uint64_t offset, length;        /* SETTLE */
    uint64_t horizon;               /* SETTLE: works with a higher number were set off later */
};

/* -- rings --------------------------------------------------------------------------------------------- */

struct ring {
    struct back_ring back;
    struct journal journal;
    struct guest_pages *pages;
    struct xbd_connection *connection;
    struct io_thread *thread;
    struct xbd_channel channel;
    struct xbd_limits limits;
    unsigned generation;            /* of the limits */
    struct hint hints[2];           /* for reading, for writing */
    unsigned number;                /* within the connection */
    unsigned owed;

    struct work **open;             /* by journal slot */
    struct queue backlog;
    struct queue done;
    bool barrier;                   /* one is under way */
    bool taking;                    /* consumes requests */
    bool held;                      /* sets nothing off any more */
    bool stopping;
    bool watched;                   /* its channel is */
    bool polled, unpolling;         /* of the engine: the kernel has a poll of it, and a request to end that */
    bool woken;                     /* by an event that was not looked into yet */
    bool masked;                    /* Xen: the port is, until it is unmasked */
    bool tired;                     /* of events without requests */
    bool runnable, answering, warm, resting;    /* in the thread's lists of these names */
    struct ring *next;              /* of the thread's */
    struct ring *next_runnable, *next_answering, *next_resting, *next_warm;
    unsigned idle;                  /* wake-ups in a row without work */
    uint64_t rest_until_ns;
    unsigned under_way;             /* works that were set off and not answered */
    unsigned moving;                /* works that the kernel has */
    struct copy *copies;            /* first writes under way */
    struct operation sync;          /* for them */
    bool syncing;
    int files[RING_FILES];          /* registered with the engine */
    unsigned nr_files;
    bool no_files;                  /* they can't be */
    struct command *settling;       /* waiting for works to end */
    struct command *draining;       /* waiting for all requests to be answered */
    struct command *stop;
    struct ticket trouble;          /* for XBD_CORRUPT or XBD_BROKEN, once; the ring's own */
    bool troubled;

    atomic_uint in_flight;          /* consumed and not answered; written by the thread */
    _Atomic uint64_t counters[8];   /* struct xbd_counters; written by the thread */
};

/* -- connections --------------------------------------------------------------------------------------- */

enum { MOST_QUEUES = 64, MOST_NOTES = 64 };

/* A request that was answered already, told of for the log. */
struct note {
    struct xbd_event event;
    struct note *next;
};

struct xbd_connection {
    struct xbd_connection_config config;
    struct ring *rings[MOST_QUEUES];
    unsigned nr_rings;
    bool started;
    bool stopped;
    atomic_uint generation;         /* of the limits: a ring that has older ones takes no requests */
    int wake_fd;

    pthread_mutex_t lock;           /* of what follows: what Python has not fetched yet */
    struct queue requests;
    struct note *notes, **last_note;
    unsigned nr_notes;
    uint64_t suppressed;            /* notes that there was no room for */
    struct ticket *tickets, **last_ticket;
    struct ticket *late, **last_late;       /* told together with XBD_STOPPED */
    bool gone;                      /* that was told */
    bool awake;                     /* wake_fd was written to, and the list not emptied since */
};

/* For the ring's thread: hands these to Python (the queue is empty afterwards). */
void connection_ask(struct xbd_connection *connection, struct queue *works);
void connection_note(struct ring *ring, enum xbd_event_kind kind, uint64_t number, const uint8_t *entry);
/* Frees the ticket with the event, unless it is a ring's own. */
void connection_tell(struct ticket *ticket);
void connection_tell_few(struct xbd_connection *connection);
/* Python shall not see any more of what it has not fetched of this ring. */
void connection_forget(struct ring *ring);

/* -- threads ------------------------------------------------------------------------------------------- */

/* How a thread waits and moves bytes: io_uring, or poll(2) and preadv(2). */
struct engine_calls {
    const char *name;
    bool (*open)(struct io_thread *thread);
    void (*close)(struct io_thread *thread);
    /* Let ring_woken be called when the ring's channel becomes readable. */
    bool (*watch)(struct io_thread *thread, struct ring *ring);
    /* No more; false: not yet, ring_unwatched is called when it is so. */
    bool (*unwatch)(struct io_thread *thread, struct ring *ring);
    /* Carry it out; its `ended` is called from `turn`. */
    void (*start)(struct io_thread *thread, struct operation *operation);
    /* Sets off what was started, and says what has ended and who woke.  Sleeps until something is there, at
     * most timeout_ns (0: not at all).  0 or an errno. */
    int (*turn)(struct io_thread *thread, uint64_t timeout_ns);
    /* Whether `turn` would find something; for spinning. */
    bool (*pending)(struct io_thread *thread);
    /* The ring's files may be closed from now on; what is in flight keeps them. */
    void (*release)(struct io_thread *thread, struct ring *ring);
};

extern const struct engine_calls ENGINE_URING, ENGINE_PREADV;

struct io_thread {
    pthread_t id;
    const struct engine_calls *engine;
    void *engine_state;
    struct xbd_threads *threads;
    int start_error;

    int mail_fd;                    /* wakes it */
    atomic_bool mail;               /* something is in the mailbox */
    atomic_bool sleeping;           /* it has to be woken */
    pthread_mutex_t lock;           /* of the mailbox */
    struct command *commands, **last_command;
    struct queue answers;
    bool quit;

    struct ring *rings;             /* all */
    atomic_uint nr_rings;           /* for choosing the idlest; counted when a ring is given to it */
    uint64_t next_number;           /* of works */
    struct ring *runnable, **last_runnable;
    struct ring *answering;
    struct ring *resting;
    struct ring *warm;              /* served since the last sleep: looked at while spinning */
    unsigned nr_warm;
    struct work *pool;              /* of unused works */
    struct copy_memory *memory;     /* unused, for copies */
    unsigned nr_memory, memory_in_use;
    unsigned started;               /* operations since the last turn */
    unsigned in_flight;             /* operations */
    unsigned batches;               /* handed to the engine; wraps around */
    unsigned rounds;                /* in which there was something to do; wraps around */
    bool ends_at_once;              /* most of the last sampled batch did */
    uint64_t most_spin_ns, spin_ns;
};

struct xbd_threads {
    unsigned count;
    unsigned spin_us;
    const struct engine_calls *engine;
    pthread_barrier_t started;
    struct io_thread thread[];
};

struct io_thread *threads_pick(struct xbd_threads *threads);
void thread_post(struct io_thread *thread, struct command *command);
/* Python's verdicts (the queue is empty afterwards). */
void thread_answer(struct io_thread *thread, struct queue *works);
void thread_add(struct io_thread *thread, struct ring *ring);
void thread_make_runnable(struct io_thread *thread, struct ring *ring);
void thread_make_answering(struct io_thread *thread, struct ring *ring);
/* Out of all its lists. */
void thread_remove(struct io_thread *thread, struct ring *ring);
uint64_t now_ns(void);

struct work *work_get(struct io_thread *thread);
/* Room for so many segments; false: out of memory. */
bool work_reserve(struct work *work, unsigned segments);
void work_put(struct io_thread *thread, struct work *work);

/* -- what happens to a ring, in its thread ------------------------------------------------------------- */

/* Its channel became readable. */
void ring_woken(struct ring *ring);
void ring_unwatched(struct ring *ring);
/* Takes a batch and sets it off.  Whether there was one. */
bool ring_serve(struct ring *ring);
/* Before sleeping; true: there is something to serve already. */
bool ring_quiet(struct ring *ring);
/* Publishes what is done. */
void ring_answer_done(struct ring *ring);
void ring_command(struct ring *ring, struct command *command);
/* Python's answer. */
void ring_verdict(struct work *work);
/* Whether a look at the shared page shows something new; for spinning. */
bool ring_beckons(const struct ring *ring);
void ring_broken(struct ring *ring, int error);
/* Its rest is over; false: not yet, its channel is still being unwatched. */
bool ring_rested(struct ring *ring);
/* Sets off what was held back by something that is over now. */
void ring_go_on(struct ring *ring, struct queue *works);
/* What has ended may be waited for. */
void ring_moved(struct ring *ring);
/* Answers with this status. */
void work_finish(struct work *work, int status);
/* The driver's method tries again, and says what is wrong. */
void work_ask(struct work *work);
/* Cuts the first `length` bytes off memory, of which `used` bytes of the first part are gone; how many parts. */
unsigned cut_memory(struct iovec *to, const struct iovec **from, size_t *used, uint64_t length);

/* -- first writes that copy what is around them; copy.c ------------------------------------------------ */

/* Whether the write is on its way, or waits for one that is. */
bool copy_begin(struct work *work);
/* When the thread ends. */
void copy_free_memory(struct io_thread *thread);
