#include "embedded.h"

#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "util.h"

enum { HELLO = 1, OFFER = 2, VERSION = 1 };

static const uint32_t MAGIC = 0x48444258, ASSIGN_DOMID = 0xffffffff, REPLY_BIT = 0x80000000;

struct question {
    uint32_t kind, id, argument[6];
};

struct answer {
    uint32_t kind, id, error, domid, max_pages, max_ports, version, zero;
    char text[128];
};

static struct answer ask(struct embedded *host, struct question question, const int fds[2]) {
    question.id = ++host->next_id;
    send_with_fds(host->socket, &question, sizeof question, fds, 2);
    struct answer answer;
    receive_all(host->socket, &answer, sizeof answer, "the embedded host");
    if (answer.kind != (question.kind | REPLY_BIT) || answer.id != question.id)
        die("the embedded host gives an answer that was not asked for");
    if (answer.error)
        die("the embedded host refuses: %.*s", (int)sizeof answer.text, answer.text);
    return answer;
}

void embedded_open(struct embedded *host, const char *directory, uint32_t domid,
                   const struct memory *memory) {
    char path[4096];
    snprintf(path, sizeof path, "%s/hypervisor.socket", directory);
    host->socket = connect_unix(path, SOCK_SEQPACKET);
    if (host->socket < 0)
        die_errno("%s", path);
    void *table;
    int table_fd = sealed_memfd("bench-guest-grants", memory->pages * sizeof *host->grants, &table);
    host->grants = table;
    struct question hello = {
        .kind = HELLO,
        .argument = {MAGIC, VERSION, domid ? domid : ASSIGN_DOMID, memory->pages},
    };
    host->domid = ask(host, hello, (int[2]){memory->fd, table_fd}).domid;
    close(table_fd);
}

void embedded_offer(struct embedded *host, uint32_t port, int to_backend, int to_guest) {
    struct question offer = {.kind = OFFER, .argument = {port}}; /* to domain 0 */
    ask(host, offer, (int[2]){to_backend, to_guest});
}

void embedded_close(struct embedded *host) {
    close(host->socket); /* this ends the domain */
}
