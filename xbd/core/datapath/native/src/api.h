/*
 * What Python sees of the native data path.  cffi reads this file as it is: declarations alone.
 *
 * All offsets and lengths are bytes.  Nothing here blocks for storage or for another thread, unless it says
 * so, and nothing calls back: what the threads have to say is fetched with xbd_connection_events when the
 * connection's wake descriptor is readable.  Apart from extents and claims, functions on one object are called
 * by one thread at a time.
 */

typedef struct xbd_threads xbd_threads;
typedef struct xbd_budget xbd_budget;
typedef struct xbd_extents xbd_extents;
typedef struct xbd_claims xbd_claims;
typedef struct xbd_connection xbd_connection;

/* -- threads ------------------------------------------------------------------------------------------- */

enum xbd_engine {
    XBD_ENGINE_AUTO,    /* io_uring where the kernel has it */
    XBD_ENGINE_URING,
    XBD_ENGINE_PREADV
};

/* I/O threads, at most 64 of them; spin_us: the longest that one of them looks for work before it sleeps.
 * NULL with errno set if they can't be started. */
xbd_threads *xbd_threads_start(unsigned count, unsigned spin_us, enum xbd_engine engine);
/* What they use: "io_uring" or "preadv". */
const char *xbd_threads_engine(const xbd_threads *threads);
/* Waits for their end.  All connections are freed before. */
void xbd_threads_stop(xbd_threads *threads);

/* -- budgets ------------------------------------------------------------------------------------------- */

/* Pages that may be mapped or bounced at a time; what is taken from it is taken from the parent (NULL:
 * there is none) as well.  Freed after all that use it. */
xbd_budget *xbd_budget_new(xbd_budget *parent, long pages);
void xbd_budget_free(xbd_budget *budget);
long xbd_budget_left(const xbd_budget *budget);

/* -- extents ------------------------------------------------------------------------------------------- */

struct xbd_piece {
    int32_t fd;
    uint64_t position;      /* in the file */
    uint64_t length;
};

/* In the place of a file, for reading: there are zeroes.  The position is the offset of the disk. */
enum { XBD_ZEROES = -2 };

/* What a disk's driver answered to `resolve`. */
xbd_extents *xbd_extents_new(void);
/* When no connection uses it any more. */
void xbd_extents_free(xbd_extents *extents);
/* Keep: the disk's bytes from start to before end lie in the file from position on.  False: no room for it,
 * or out of memory; then it is simply not known. */
bool xbd_extents_put(xbd_extents *extents, bool for_write, uint64_t start, uint64_t end, int fd, uint64_t position);
/* As xbd_extents_put, for who asked the driver while others may have learnt something newer: what is known already
 * stays.  False also if something was dropped since xbd_extents_losses had this value: it may have been newer. */
bool xbd_extents_add(xbd_extents *extents, bool for_write, uint64_t start, uint64_t end, int fd, uint64_t position,
                     uint32_t losses);
/* Grows when something is dropped for want of room. */
uint32_t xbd_extents_losses(const xbd_extents *extents);
/* How many pieces, neighbours joined, the range lies in; 0 if not all of it is known, or if there are more. */
unsigned xbd_extents_find(xbd_extents *extents, bool for_write, uint64_t offset, uint64_t length,
                          struct xbd_piece *pieces, unsigned most);
/* The unit in which most is kept; a driver is best asked from the beginning of one of them. */
uint64_t xbd_extents_chunk(const xbd_extents *extents, bool for_write);
/* Drop what is known of a range.  True: something was, or may have been before it was dropped for want of
 * room, so that I/O through it may be in flight. */
bool xbd_extents_forget(xbd_extents *extents, uint64_t offset, uint64_t length);
/* Bytes of memory in use. */
uint64_t xbd_extents_memory(const xbd_extents *extents);

/* -- claims -------------------------------------------------------------------------------------------- */

/* Bytes of the largest unit that is copied. */
enum { XBD_LARGEST_COPY = 65536 };

/* Parts of a driver's tables in which the I/O threads make entries by themselves, for writes to units of the disk
 * that lie nowhere.  An entry has 64 bits, 0 for such a unit; in memory they are in the machine's
 * order, in the file big-endian.  The functions may be called by any thread at any time, and may wait until the page
 * cache has taken an entry, but for those that say they don't. */
xbd_claims *xbd_claims_new(xbd_extents *extents);
/* When no connection uses it any more. */
void xbd_claims_free(xbd_claims *claims);
/* Before anything is lent or supplied: the file, for data and for entries.  `unit`: bytes, a power of two.  An entry
 * is a place (an offset) | bits.  `behind`: not all units that lie nowhere read as zeroes; the extents for reading
 * say which do.  Where they don't, and `copying`, what is around a first write is copied to the new place, and made
 * durable by syncing `fd`, before the entry is made.  False: out of memory. */
bool xbd_claims_begin(xbd_claims *claims, int fd, int table_fd, uint64_t unit, uint64_t bits, bool behind,
                      bool copying);
/* Lends the entries of `count` units from this offset of the disk on, which lie at `position` in the file.  Until
 * they are taken back the memory stays, and only the I/O threads write to it. */
void xbd_claims_lend(xbd_claims *claims, uint64_t offset, uint64_t *entries, uint64_t count, uint64_t position);
/* Those that the unit at this offset was lent with. */
void xbd_claims_take_back(xbd_claims *claims, uint64_t offset);
/* For one who is about to write to the disk: enters places for all units of the range that lie nowhere, in the file,
 * in the memory lent and among the extents.  Whether all of the range may be known now; if not, the driver has to be
 * asked. */
bool xbd_claims_take(xbd_claims *claims, uint64_t offset, uint64_t length);
/* Whether there are places and entries for first writes to all units of the range; what they read as is not looked
 * at. */
bool xbd_claims_are_free(xbd_claims *claims, uint64_t offset, uint64_t length);
/* Fetches places that were written to, and that no entry names; how many.  After that, nobody uses them. */
unsigned xbd_claims_spoilt(xbd_claims *claims, uint64_t *places, unsigned most);
/* More places, each a unit of zeroes in the file that only waits for its first entry; how many there is room for. */
unsigned xbd_claims_supply(xbd_claims *claims, const uint64_t *places, unsigned number);
/* How many places are left. */
unsigned xbd_claims_supplied(xbd_claims *claims);
/* Takes everything back, and places that are left, at most so many; how many. */
unsigned xbd_claims_end(xbd_claims *claims, uint64_t *places, unsigned most);
/* No more entries are made until everyone who paused has resumed.  Never waits; false: one is being made just now,
 * see xbd_claims_wait. */
bool xbd_claims_pause(xbd_claims *claims);
/* Waits for the end of what is being done. */
void xbd_claims_wait(xbd_claims *claims);
void xbd_claims_resume(xbd_claims *claims);

/* -- connections --------------------------------------------------------------------------------------- */

struct xbd_limits {         /* as Limits in blkif/decode.py */
    uint64_t size;
    uint32_t logical_block;
    uint32_t max_indirect_segments;
    bool read_only;
    bool flush;
    bool barrier;
    bool discard;
    bool discard_secure;
};

enum xbd_pages_mode { XBD_PERSISTENT, XBD_MAP, XBD_COPY };

/* How a domain's pages are reached. */
struct xbd_domain {
    uint32_t domid;
    enum xbd_pages_mode mode;
    /* A guest of the embedded host: its memory mapped twice, and its grant table. */
    void *writable;
    const void *readable;
    const void *table;
    uint32_t nr_pages;
    uint64_t granted;       /* the table's word for a page that we may write to */
    uint64_t granted_readonly;
    /* Else a guest of Xen: libxengnttab, a handle of its own for the connection. */
    void *gnttab;
    void *map;              /* xengnttab_map_domain_grant_refs */
    void *unmap;            /* xengnttab_unmap */
    void *copy;             /* xengnttab_grant_copy, or NULL */
};

/* A bound event channel. */
struct xbd_channel {
    int fd;                 /* becomes readable; does not block */
    int notify_fd;          /* embedded: an eventfd; Xen: -1 */
    uint32_t port;
    void *handle;           /* Xen: a handle of libxenevtchn with this port alone */
    void *pending;          /* xenevtchn_pending */
    void *unmask;
    void *notify;
};

struct xbd_connection_config {
    xbd_threads *threads;
    xbd_extents *extents;
    xbd_claims *claims;     /* over the same extents; NULL: none */
    xbd_budget *budget;     /* the domain's */
    struct xbd_domain domain;
    struct xbd_limits limits;
    uint32_t request_alignment;     /* of the disk's geometry */
    uint32_t memory_alignment;
    unsigned abi;           /* 0: x86_64 and arm; 1: x86_32 */
    bool paused;            /* takes no requests until xbd_connection_resume */
};

struct xbd_ring_config {
    void *ring;             /* its pages, writable, side by side */
    unsigned entries;
    struct xbd_channel channel;
    /* The journal's arrays, each of `entries` elements (journal.py). */
    uint64_t *marks;
    uint32_t *indices;
    uint8_t *copies;
    /* Where an earlier backend stopped, and how many requests it left, in the journal's first slots. */
    uint32_t req_cons;
    uint32_t rsp_prod;
    unsigned owed;
};

struct xbd_counters {       /* as DiskStats */
    uint64_t rd_req;
    uint64_t wr_req;
    uint64_t f_req;
    uint64_t ds_req;
    uint64_t rd_bytes;
    uint64_t wr_bytes;
    uint64_t errors;
    uint64_t upcalls;       /* requests that Python moved */
};

/* NULL with errno set. */
xbd_connection *xbd_connection_new(const struct xbd_connection_config *config);
/* Before the start.  False with errno set. */
bool xbd_connection_add_ring(xbd_connection *connection, const struct xbd_ring_config *config);
/* Serve: look at the rings at once, and send each guest an event at once. */
void xbd_connection_start(xbd_connection *connection);
/* Readable when there are events; read 8 bytes, then fetch until none are left. */
int xbd_connection_wake_fd(const xbd_connection *connection);
/* For requests that are consumed from now on. */
void xbd_connection_set_limits(xbd_connection *connection, const struct xbd_limits *limits);
/* Take no more requests.  XBD_DRAINED with this ticket follows when all that were taken are answered. */
void xbd_connection_drain(xbd_connection *connection, uint64_t ticket);
/* Take requests again. */
void xbd_connection_resume(xbd_connection *connection);
/* Take no more requests, and set nothing off any more: the connection is about to be stopped, when Python has let
 * go of what it was asked for.  What has been set off is answered still. */
void xbd_connection_hold(xbd_connection *connection);
/* XBD_SETTLED with this ticket follows when no transfer through an extent that was set off before now and
 * touches the range is in flight. */
void xbd_connection_settle(xbd_connection *connection, uint64_t offset, uint64_t length, uint64_t ticket);
/* Do nothing more but finish what the kernel works on.  XBD_STOPPED follows, and whatever was still waited for
 * comes true with it. */
void xbd_connection_stop(xbd_connection *connection);
/* Requests consumed and not answered; bytes of each kind moved so far. */
unsigned xbd_connection_in_flight(const xbd_connection *connection);
void xbd_connection_counters(const xbd_connection *connection, struct xbd_counters *counters);
/* Only after XBD_STOPPED, or when it was never started: unmaps the guest's pages. */
void xbd_connection_free(xbd_connection *connection);

struct xbd_buffer {
    void *start;
    size_t length;
};

enum xbd_event_kind {
    XBD_REQUEST,            /* to be answered with xbd_connection_answer */
    XBD_REJECTED,           /* answered already: `entry` tells why; number: the rest of a flood, not shown */
    XBD_NO_PAGES,           /* answered already: the guest's pages can't be reached; number: errno or GNTST */
    XBD_CORRUPT,            /* the ring is not served any more; number: how many requests the frontend claims */
    XBD_BROKEN,             /* the threads can't go on with this connection; number: errno */
    XBD_FEW_PLACES,         /* claims will soon have no places any more */
    XBD_DRAINED,            /* number: the ticket, as of the next one */
    XBD_SETTLED,
    XBD_STOPPED
};

struct xbd_event {
    enum xbd_event_kind kind;
    unsigned ring;
    uint64_t number;
    /* XBD_REQUEST */
    uint64_t request;       /* what xbd_connection_answer is called with */
    uint8_t operation;      /* BLKIF_OP_*: READ, WRITE, WRITE_BARRIER, FLUSH_DISKCACHE or DISCARD */
    bool resolvable;        /* a transfer that only needs extents: put them and answer XBD_TRY_AGAIN */
    uint64_t offset;
    uint64_t length;        /* 0 of a flush or barrier without data */
    const struct xbd_buffer *buffers;   /* until it is answered; of a write nobody changes them but the guest */
    unsigned nr_buffers;
    bool read_only;         /* the buffers' memory: who writes to it ends the process */
    /* XBD_REJECTED */
    uint8_t entry[112];
};

/* Fetches at most `most` events; how many there were. */
unsigned xbd_connection_events(xbd_connection *connection, struct xbd_event *events, unsigned most);

enum xbd_verdict {
    XBD_ANSWER,             /* with `status` */
    XBD_TRY_AGAIN           /* extents are known by now; if not, it comes back with `resolvable` false */
};

struct xbd_answer {
    uint64_t request;
    enum xbd_verdict verdict;
    int16_t status;         /* BLKIF_RSP_* */
};

void xbd_connection_answer(xbd_connection *connection, const struct xbd_answer *answers, unsigned count);
