/* A vhost-user-blk front end: one split virtqueue with event indices.
 * The messages are those of QEMU's docs/interop/vhost-user.rst. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "transport.h"
#include "util.h"

enum {
    GET_FEATURES = 1,
    SET_FEATURES = 2,
    SET_OWNER = 3,
    SET_MEM_TABLE = 5,
    SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10,
    GET_VRING_BASE = 11,
    SET_VRING_KICK = 12,
    SET_VRING_CALL = 13,
    GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16,
    SET_VRING_ENABLE = 18,
    GET_CONFIG = 24,
};

enum { FLAG_VERSION = 1, FLAG_REPLY = 4, FLAG_NEED_REPLY = 8 };
enum { F_PROTOCOL_FEATURES = 30, PROTOCOL_F_REPLY_ACK = 3, PROTOCOL_F_CONFIG = 9 };
enum { DEFAULT_QUEUE_SIZE = 256, MAX_QUEUE_SIZE = 1024, FRAME = 2 /* header and status */ };

struct header {
    uint32_t request, flags, size;
};

struct vring_state {
    uint32_t index, number;
};

struct vring_addresses {
    uint32_t index, flags;
    uint64_t descriptors, used, available, log;
};

struct memory_table {
    uint32_t regions, padding;
    uint64_t guest_address, size, user_address, mmap_offset;
};

struct config {
    uint32_t offset, size, flags;
    struct virtio_blk_config content;
} __attribute__((packed));

struct message {
    struct header header;
    union {
        uint64_t number;
        struct vring_state state;
        struct vring_addresses addresses;
        struct memory_table memory;
        struct config config;
    };
} __attribute__((packed));

/* What a request needs beside its data; lies in the guest's memory. */
struct frame {
    struct virtio_blk_outhdr header;
    uint8_t status;
};

struct vhost_user {
    struct transport transport; /* first: they share an address */
    struct memory *memory;
    int socket, kick_fd;
    bool indirect, acknowledges;
    uint32_t queue_size, chain; /* chain: descriptors set aside for each tag */
    struct vring_desc *descriptors; /* the queue's own */
    struct vring_desc *tables; /* one of `chain` for each tag; the queue's own if not indirect */
    struct frame *frames;
    struct vring_avail *available;
    struct vring_used *used;
    uint16_t available_index, kicked_index, used_index;
};

static void tell(struct vhost_user *self, uint32_t request, const void *payload, uint32_t size,
                 int fd) {
    struct message message = {.header = {request, FLAG_VERSION, size}};
    if (self->acknowledges)
        message.header.flags |= FLAG_NEED_REPLY;
    if (size)
        memcpy(&message.number, payload, size);
    send_with_fds(self->socket, &message, sizeof message.header + size, &fd, fd >= 0);
    if (!self->acknowledges)
        return;
    receive_all(self->socket, &message, sizeof message.header + sizeof message.number,
                "the vhost-user backend");
    if (message.number)
        die("the vhost-user backend refuses message %u", request);
}

static void tell_number(struct vhost_user *self, uint32_t request, uint64_t number) {
    tell(self, request, &number, sizeof number, -1);
}

static void tell_state(struct vhost_user *self, uint32_t request, uint32_t number) {
    struct vring_state state = {0, number};
    tell(self, request, &state, sizeof state, -1);
}

/* Sends a question of `size` bytes of payload, and puts the answer in its place. */
static void ask(struct vhost_user *self, struct message *message, uint32_t request, uint32_t size) {
    message->header = (struct header){request, FLAG_VERSION, size};
    send_with_fds(self->socket, message, sizeof message->header + size, NULL, 0);
    receive_all(self->socket, &message->header, sizeof message->header, "the vhost-user backend");
    if (message->header.request != request || !(message->header.flags & FLAG_REPLY) ||
        message->header.size > sizeof *message - sizeof message->header)
        die("the vhost-user backend gives a wrong answer to message %u", request);
    if (message->header.size)
        receive_all(self->socket, &message->number, message->header.size,
                    "the vhost-user backend");
}

static uint64_t ask_number(struct vhost_user *self, uint32_t request) {
    struct message message;
    ask(self, &message, request, 0);
    if (message.header.size != sizeof message.number)
        die("the vhost-user backend gives a wrong answer to message %u", request);
    return message.number;
}

static uint64_t guest_address(const struct vhost_user *self, const void *address) {
    return (uint64_t)((const uint8_t *)address - self->memory->base);
}

static uint64_t agree_on_features(struct vhost_user *self) {
    uint64_t wanted = 1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_RING_F_EVENT_IDX |
                      1ull << VIRTIO_RING_F_INDIRECT_DESC | 1ull << F_PROTOCOL_FEATURES;
    uint64_t welcome = 1ull << VIRTIO_BLK_F_SEG_MAX | 1ull << VIRTIO_BLK_F_RO |
                       1ull << VIRTIO_BLK_F_FLUSH | 1ull << VIRTIO_BLK_F_BLK_SIZE;
    uint64_t offered = ask_number(self, GET_FEATURES);
    if ((offered & wanted) != wanted)
        die("the vhost-user backend lacks features: offers %#llx, %#llx are needed",
            (unsigned long long)offered, (unsigned long long)wanted);
    uint64_t protocol = 1ull << PROTOCOL_F_REPLY_ACK | 1ull << PROTOCOL_F_CONFIG;
    protocol &= ask_number(self, GET_PROTOCOL_FEATURES);
    if (!(protocol & 1ull << PROTOCOL_F_CONFIG))
        die("the vhost-user backend does not tell its disk's size");
    tell_number(self, SET_PROTOCOL_FEATURES, protocol);
    self->acknowledges = protocol & 1ull << PROTOCOL_F_REPLY_ACK;
    tell(self, SET_OWNER, NULL, 0, -1);
    tell_number(self, SET_FEATURES, offered & (wanted | welcome));
    return offered;
}

static void read_config(struct vhost_user *self, uint64_t features) {
    /* Backends refuse to tell more than they know: ask for no more than is needed. */
    struct message message = {.config = {.size = offsetof(struct virtio_blk_config, blk_size)}};
    uint32_t size = offsetof(struct config, content) + message.config.size;
    ask(self, &message, GET_CONFIG, size);
    if (message.header.size != size)
        die("the vhost-user backend does not tell its disk's size");
    const struct virtio_blk_config *config = &message.config.content;
    self->transport.size = config->capacity * SECTOR_SIZE;
    self->transport.max_pages = features & 1ull << VIRTIO_BLK_F_SEG_MAX ? config->seg_max : 1;
    self->transport.read_only = features & 1ull << VIRTIO_BLK_F_RO;
}

static uint32_t power_of_two_from(uint32_t number) {
    uint32_t power = 1;
    while (power < number)
        power *= 2;
    return power;
}

static void *take_bytes(struct memory *memory, size_t size) {
    return memory_at(memory, memory_take(memory, (uint32_t)((size + PAGE_SIZE - 1) / PAGE_SIZE)));
}

static void lay_out_queue(struct vhost_user *self, const struct vhost_user_options *options,
                          const struct demand *demand) {
    uint32_t parts = parts_of(demand, self->transport.max_pages);
    uint32_t requests = demand->depth * parts;
    uint32_t most = options->queue_size ? options->queue_size : MAX_QUEUE_SIZE;
    uint32_t slots = requests < most ? requests : most;
    self->transport.slots = slots;
    self->chain = FRAME + (demand->pages + parts - 1) / parts;
    /* Chains cost the backend a little less than tables do. */
    self->indirect = options->indirect || slots * self->chain > most;
    uint32_t needed = self->indirect ? slots : slots * self->chain;
    uint32_t comfortable = needed > DEFAULT_QUEUE_SIZE ? needed : DEFAULT_QUEUE_SIZE;
    self->queue_size = power_of_two_from(comfortable < most ? comfortable : most);
    size_t size = self->queue_size;
    self->descriptors = take_bytes(self->memory, size * sizeof *self->descriptors);
    self->available = take_bytes(self->memory, sizeof *self->available + (size + 1) * 2);
    self->used = take_bytes(self->memory,
                            sizeof *self->used + size * sizeof(struct vring_used_elem) + 2);
    self->frames = take_bytes(self->memory, slots * sizeof *self->frames);
    self->tables = self->indirect
                       ? take_bytes(self->memory, slots * self->chain * sizeof *self->tables)
                       : self->descriptors;
}

static void hand_over_queue(struct vhost_user *self) {
    struct memory_table table = {
        .regions = 1,
        .size = (uint64_t)self->memory->pages * PAGE_SIZE,
        .user_address = (uintptr_t)self->memory->base,
    };
    tell(self, SET_MEM_TABLE, &table, sizeof table, self->memory->fd);
    tell_state(self, SET_VRING_NUM, self->queue_size);
    tell_state(self, SET_VRING_BASE, 0);
    struct vring_addresses addresses = {
        .descriptors = (uintptr_t)self->descriptors,
        .used = (uintptr_t)self->used,
        .available = (uintptr_t)self->available,
    };
    tell(self, SET_VRING_ADDR, &addresses, sizeof addresses, -1);
    uint64_t queue = 0;
    tell(self, SET_VRING_CALL, &queue, sizeof queue, self->transport.wake_fd);
    tell(self, SET_VRING_KICK, &queue, sizeof queue, self->kick_fd);
    tell_state(self, SET_VRING_ENABLE, 1);
}

static void vhost_user_submit(struct transport *transport, const struct request *request) {
    struct vhost_user *self = (struct vhost_user *)transport;
    uint32_t base = self->indirect ? 0 : request->tag * self->chain; /* `next` counts from here */
    struct vring_desc *table = self->tables + (uint64_t)request->tag * self->chain;
    struct frame *frame = &self->frames[request->tag];
    frame->header.type = request->write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN;
    frame->header.sector = request->offset / SECTOR_SIZE;
    frame->status = 0xff;
    table[0] = (struct vring_desc){guest_address(self, frame), sizeof frame->header,
                                   VRING_DESC_F_NEXT, (uint16_t)(base + 1)};
    uint16_t flags = VRING_DESC_F_NEXT | (request->write ? 0 : VRING_DESC_F_WRITE);
    uint32_t i = 0;
    for (; i < request->pages; i++)
        table[i + 1] = (struct vring_desc){(uint64_t)request->page[i] * PAGE_SIZE, PAGE_SIZE,
                                           flags, (uint16_t)(base + i + 2)};
    table[i + 1] = (struct vring_desc){guest_address(self, &frame->status), 1,
                                       VRING_DESC_F_WRITE, 0};
    uint16_t head = (uint16_t)base;
    if (self->indirect) {
        head = (uint16_t)request->tag;
        self->descriptors[head] = (struct vring_desc){
            guest_address(self, table), (i + FRAME) * (uint32_t)sizeof *table,
            VRING_DESC_F_INDIRECT, 0};
    }
    self->available->ring[self->available_index++ & (self->queue_size - 1)] = head;
    transport->requests++;
}

static void vhost_user_kick(struct transport *transport) {
    struct vhost_user *self = (struct vhost_user *)transport;
    uint16_t old = self->kicked_index;
    if (old == self->available_index)
        return;
    __atomic_store_n(&self->available->idx, self->available_index, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* idx before the device's event index */
    const uint16_t *event = (const uint16_t *)&self->used->ring[self->queue_size];
    self->kicked_index = self->available_index;
    if (vring_need_event(__atomic_load_n(event, __ATOMIC_RELAXED), self->available_index, old)) {
        transport->kicks++;
        ring_eventfd(self->kick_fd);
    }
}

static unsigned vhost_user_reap(struct transport *transport, struct completion *done,
                                unsigned room) {
    struct vhost_user *self = (struct vhost_user *)transport;
    uint16_t index = __atomic_load_n(&self->used->idx, __ATOMIC_ACQUIRE);
    unsigned count = 0;
    for (; self->used_index != index && count < room; self->used_index++) {
        uint32_t head = self->used->ring[self->used_index & (self->queue_size - 1)].id;
        uint32_t tag = self->indirect ? head : head / self->chain;
        if (tag >= self->transport.slots)
            die("the backend used descriptor %u, which is none of ours", head);
        done[count++] = (struct completion){tag, self->frames[tag].status == VIRTIO_BLK_S_OK};
    }
    return count;
}

static bool vhost_user_arm(struct transport *transport) {
    struct vhost_user *self = (struct vhost_user *)transport;
    __atomic_store_n(&self->available->ring[self->queue_size], self->used_index,
                     __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* our event index before the device's idx */
    return __atomic_load_n(&self->used->idx, __ATOMIC_RELAXED) != self->used_index;
}

static void vhost_user_close(struct transport *transport) {
    struct vhost_user *self = (struct vhost_user *)transport;
    struct message message = {.state = {0, 0}};
    ask(self, &message, GET_VRING_BASE, sizeof message.state); /* stops the queue */
    close(self->socket);
}

struct transport *vhost_user_open(const struct vhost_user_options *options,
                                  const struct demand *demand, struct memory *memory) {
    struct vhost_user *self = allocate(1, sizeof *self);
    self->memory = memory;
    self->socket = connect_unix(options->socket, SOCK_STREAM);
    if (self->socket < 0)
        die_errno("%s", options->socket);
    self->kick_fd = make_eventfd();
    self->transport = (struct transport){
        .name = "vhost-user",
        .wake_fd = make_eventfd(),
        .submit = vhost_user_submit,
        .kick = vhost_user_kick,
        .reap = vhost_user_reap,
        .arm = vhost_user_arm,
        .close = vhost_user_close,
    };
    read_config(self, agree_on_features(self));
    lay_out_queue(self, options, demand);
    hand_over_queue(self);
    return &self->transport;
}
