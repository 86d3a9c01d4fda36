/*
 * A small guest of xbd's embedded host, written from docs/embedded.md alone.
 *
 *     guest DIR
 *
 * It grants page 1 for writing and page 2 for reading, offers port 1, and on every event turns
 * the text in page 1 into capitals and sends an event back.  It outlives the host, and ends with
 * its standard input.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* docs: messages */
enum { HELLO = 1, OFFER = 2, WITHDRAW = 3 };

#define MAGIC        0x48444258u   /* the bytes "XBDH" */
#define VERSION      1u
#define ASSIGN_DOMID 0xFFFFFFFFu
#define REPLY        0x80000000u

struct request {          /* 32 bytes; words that a type does not use are 0 */
    uint32_t type;
    uint32_t id;          /* yours; the reply has it again */
    uint32_t arg[6];
};

struct reply {            /* 160 bytes */
    uint32_t type;        /* the request's, with bit 31 set */
    uint32_t id;
    uint32_t error;       /* 0, or an errno of Linux */
    uint32_t domid;       /* HELLO: who you are */
    uint32_t max_pages;   /* HELLO: the most pages a guest may have here */
    uint32_t max_ports;   /* HELLO: the most ports you may offer at a time */
    uint32_t version;
    uint32_t zero;
    char     text[128];   /* for people; ends with a 0 byte */
};
/* end */

/* docs: grants */
#define PAGE     4096
#define PERMIT   1        /* GTF_permit_access */
#define READONLY 4        /* GTF_readonly */

struct grant {            /* 8 bytes; entry N of the table is page N */
    uint16_t flags;       /* 0, PERMIT, or PERMIT | READONLY */
    uint16_t domid;       /* the only domain that may map the page: 0 for xbd */
    uint32_t zero;
};
/* end */

enum { PAGES = 16, TEXT_REF = 1, READONLY_REF = 2, PORT = 1 };

static int ram_fd, table_fd;
static unsigned char *ram;
static volatile struct grant *table;
static int to_backend, to_guest;
static uint32_t domid = ASSIGN_DOMID;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

/* docs: memory */
static int sealed_memory(const char *name, size_t size, void *where)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);

    if (fd < 0 || ftruncate(fd, size) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK))
        die(name);
    *(void **)where = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (*(void **)where == MAP_FAILED)
        die(name);
    return fd;
}
/* end */

static void grant(uint32_t ref, uint16_t flags)
{
    struct grant entry = { .flags = flags, .domid = 0 };
    uint64_t bits;

    memcpy(&bits, &entry, sizeof bits);
    *(volatile uint64_t *)&table[ref] = bits;   /* in one piece */
}

/* docs: request */
static int ask(int sock, uint32_t type, const uint32_t arg[6], const int fds[2],
               struct reply *reply)
{
    struct request request = { .type = type, .id = 1 };
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(2 * sizeof(int))];
    } control = { 0 };
    struct iovec iov = { &request, sizeof request };
    struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };

    memcpy(request.arg, arg, sizeof request.arg);
    if (fds) {
        message.msg_control = &control;
        message.msg_controllen = sizeof control.space;
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(2 * sizeof(int));
        memcpy(CMSG_DATA(&control.header), fds, 2 * sizeof(int));
    }
    if (sendmsg(sock, &message, MSG_NOSIGNAL) != sizeof request
        || recv(sock, reply, sizeof *reply, 0) != sizeof *reply
        || reply->type != (type | REPLY))
        return ECONNRESET;
    if (reply->error)
        fprintf(stderr, "the host says: %s\n", reply->text);
    return (int)reply->error;
}
/* end */

/* docs: join */
static int join(const char *directory)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    struct reply reply;

    snprintf(address.sun_path, sizeof address.sun_path, "%s/hypervisor.socket", directory);
    if (connect(sock, (struct sockaddr *)&address, sizeof address)
        || ask(sock, HELLO, (uint32_t[6]){ MAGIC, VERSION, domid, PAGES },
               (int[2]){ ram_fd, table_fd }, &reply)) {
        close(sock);
        return -1;
    }
    domid = reply.domid;    /* the same again after the host's death */
    if (ask(sock, OFFER, (uint32_t[6]){ PORT, 0 }, (int[2]){ to_backend, to_guest }, &reply)) {
        close(sock);
        return -1;
    }
    return sock;
}
/* end */

/* docs: event */
static void event(void)
{
    uint64_t count;

    if (read(to_guest, &count, sizeof count) != sizeof count)
        return;             /* nothing came after all */
    for (char *text = (char *)ram + TEXT_REF * PAGE; *text; text++)
        *text = (char)toupper((unsigned char)*text);
    count = 1;
    if (write(to_backend, &count, sizeof count) < 0 && errno != EAGAIN)
        die("notify");
}
/* end */

static int join_patiently(const char *directory)
{
    int sock;

    while ((sock = join(directory)) < 0)
        usleep(50000);
    printf("joined as %u\n", domid);
    fflush(stdout);
    return sock;
}

int main(int argc, char **argv)
{
    int sock;

    if (argc != 2) {
        fprintf(stderr, "usage: guest DIR\n");
        return 2;
    }
    ram_fd = sealed_memory("memory", PAGES * PAGE, &ram);
    table_fd = sealed_memory("grants", PAGES * sizeof(struct grant), &table);
    to_backend = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    to_guest = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (to_backend < 0 || to_guest < 0)
        die("eventfd");
    strcpy((char *)ram + TEXT_REF * PAGE, "hello from c");
    strcpy((char *)ram + READONLY_REF * PAGE, "look only");
    grant(TEXT_REF, PERMIT);
    grant(READONLY_REF, PERMIT | READONLY);
    sock = join_patiently(argv[1]);
    for (;;) {
        struct pollfd wait[3] = {
            { .fd = sock, .events = POLLIN },
            { .fd = to_guest, .events = POLLIN },
            { .fd = STDIN_FILENO, .events = POLLIN },
        };

        if (poll(wait, 3, -1) < 0)
            die("poll");
        if (wait[1].revents)
            event();
        if (wait[2].revents)
            return 0;
        if (wait[0].revents) {      /* the host has gone; everything of ours is still here */
            close(sock);
            sock = join_patiently(argv[1]);
        }
    }
}
