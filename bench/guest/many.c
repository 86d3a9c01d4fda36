/* Several disks of the same content as one: each has the same share of the requests in flight.
 * A request's tag says whose it is. */
#include "transport.h"
#include "util.h"

struct many {
    struct transport transport; /* first: they share an address */
    struct transport **each;
    uint32_t count;
    uint32_t next; /* whose answers are collected first */
};

static void many_submit(struct transport *transport, const struct request *request) {
    struct many *self = (struct many *)transport;
    struct transport *one = self->each[request->tag % self->count];
    struct request part = *request;
    part.tag = request->tag / self->count;
    one->submit(one, &part);
    transport->requests++;
}

static void many_kick(struct transport *transport) {
    struct many *self = (struct many *)transport;
    transport->kicks = 0;
    for (uint32_t i = 0; i < self->count; i++) {
        self->each[i]->kick(self->each[i]);
        transport->kicks += self->each[i]->kicks;
    }
}

static unsigned many_reap(struct transport *transport, struct completion *done, unsigned room) {
    struct many *self = (struct many *)transport;
    unsigned count = 0;
    for (uint32_t i = 0; i < self->count && count < room; i++) {
        uint32_t number = self->next++ % self->count;
        struct transport *one = self->each[number];
        unsigned more = one->reap(one, done + count, room - count);
        for (; more; more--, count++)
            done[count].tag = done[count].tag * self->count + number;
    }
    return count;
}

static bool many_arm(struct transport *transport) {
    struct many *self = (struct many *)transport;
    bool some = false;
    for (uint32_t i = 0; i < self->count; i++)
        some |= self->each[i]->arm(self->each[i]);
    return some;
}

static void many_close(struct transport *transport) {
    struct many *self = (struct many *)transport;
    for (uint32_t i = 0; i < self->count; i++)
        self->each[i]->close(self->each[i]);
}

struct transport *many_open(struct transport **each, uint32_t count) {
    struct many *self = allocate(1, sizeof *self);
    self->each = each;
    self->count = count;
    self->transport = *each[0];
    for (uint32_t i = 1; i < count; i++)
        if (each[i]->size != each[0]->size || each[i]->slots != each[0]->slots)
            die("the disks are not alike");
    self->transport.slots *= count;
    self->transport.requests = self->transport.kicks = 0;
    self->transport.submit = many_submit;
    self->transport.kick = many_kick;
    self->transport.reap = many_reap;
    self->transport.arm = many_arm;
    self->transport.close = many_close;
    return &self->transport;
}
