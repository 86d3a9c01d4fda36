#define _GNU_SOURCE
#include "xenstore.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "util.h"

enum { READ = 2, WATCH = 4, WRITE = 11, WATCH_EVENT = 15, ERROR = 16, MAX_PAYLOAD = 4096 };
enum { PATH_SIZE = 512, RETRY_NS = 10000000 };

struct packet {
    uint32_t type, id, transaction, length;
    char payload[MAX_PAYLOAD + 1]; /* always ended by a NUL of ours */
};

enum { HEADER_SIZE = 16 };

void xenstore_open(struct xenstore *store, const char *path, double seconds) {
    uint64_t deadline_ns = now_ns() + (uint64_t)(seconds * 1e9);
    *store = (struct xenstore){.socket = -1};
    while ((store->socket = connect_unix(path, SOCK_STREAM)) < 0) {
        if ((errno != ENOENT && errno != ECONNREFUSED) || now_ns() > deadline_ns)
            die_errno("%s", path);
        struct timespec pause = {.tv_nsec = RETRY_NS};
        nanosleep(&pause, NULL);
    }
}

static void receive(struct xenstore *store, struct packet *packet) {
    receive_all(store->socket, packet, HEADER_SIZE, "xenstored");
    if (packet->length > MAX_PAYLOAD)
        die("xenstored sends a packet of %u bytes", packet->length);
    if (packet->length)
        receive_all(store->socket, packet->payload, packet->length, "xenstored");
    packet->payload[packet->length] = '\0';
}

/* `body` is `length` bytes, NULs included. */
static void call(struct xenstore *store, uint32_t type, const char *body, size_t length,
                 struct packet *answer) {
    struct packet question = {.type = type, .id = ++store->next_id, .length = (uint32_t)length};
    if (length > MAX_PAYLOAD)
        die("%zu bytes are too many for XenStore", length);
    memcpy(question.payload, body, length);
    send_with_fds(store->socket, &question, HEADER_SIZE + length, NULL, 0);
    for (;;) {
        receive(store, answer);
        if (answer->type != WATCH_EVENT)
            break;
        store->events++;
    }
    if (answer->id != question.id || (answer->type != type && answer->type != ERROR))
        die("xenstored gives an answer that was not asked for");
}

char *xenstore_read(struct xenstore *store, const char *path, char value[XENSTORE_VALUE_SIZE]) {
    struct packet answer;
    call(store, READ, path, strlen(path) + 1, &answer);
    if (answer.type == READ)
        return strcpy(value, answer.payload);
    if (strcmp(answer.payload, "ENOENT") != 0)
        die("reading %s: %s", path, answer.payload);
    return NULL;
}

uint64_t xenstore_number(struct xenstore *store, const char *directory, const char *name,
                         uint64_t otherwise) {
    char path[PATH_SIZE], value[XENSTORE_VALUE_SIZE], *end;
    snprintf(path, sizeof path, "%s/%s", directory, name);
    if (!xenstore_read(store, path, value))
        return otherwise;
    errno = 0;
    unsigned long long number = strtoull(value, &end, 10);
    if (end == value || *end || errno)
        die("%s: '%s' is no number", path, value);
    return number;
}

void xenstore_write(struct xenstore *store, const char *directory, const char *name,
                    const char *value) {
    char body[PATH_SIZE * 2];
    int path = snprintf(body, PATH_SIZE, "%s/%s", directory, name);
    int length = snprintf(body + path + 1, PATH_SIZE, "%s", value);
    struct packet answer;
    call(store, WRITE, body, (size_t)(path + 1 + length), &answer);
    if (answer.type == ERROR)
        die("writing %s: %s", body, answer.payload);
}

void xenstore_write_number(struct xenstore *store, const char *directory, const char *name,
                           uint64_t value) {
    char text[32];
    snprintf(text, sizeof text, "%llu", (unsigned long long)value);
    xenstore_write(store, directory, name, text);
}

void xenstore_watch(struct xenstore *store, const char *path) {
    char body[PATH_SIZE + 4];
    int length = snprintf(body, PATH_SIZE, "%s", path);
    memcpy(body + length + 1, "t", 2); /* the token; all watches are alike to us */
    struct packet answer;
    call(store, WATCH, body, (size_t)length + 3, &answer);
    if (answer.type == ERROR)
        die("watching %s: %s", path, answer.payload);
}

void xenstore_await(struct xenstore *store, uint64_t deadline_ns, const char *what) {
    if (!store->events) {
        uint64_t now = now_ns();
        int left = now < deadline_ns ? (int)((deadline_ns - now) / 1000000) : 0;
        struct pollfd poll_fd = {.fd = store->socket, .events = POLLIN};
        if (poll(&poll_fd, 1, left) == 0)
            die("%s: it takes too long", what);
        struct packet packet;
        receive(store, &packet);
        if (packet.type != WATCH_EVENT)
            die("xenstored gives an answer that was not asked for");
    }
    store->events = 0; /* one look will tell what all of them were about */
}

void xenstore_close(struct xenstore *store) {
    close(store->socket);
}
