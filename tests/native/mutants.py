"""Faults that the C tests have to find: each is a small change of the library.

Most of them may leave somebody asleep, and are for the stress test.  A fault that is not found
would mean that the test can't see what it is there for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Mutant:
    """`old`, which stands once in `file`, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    scenario: int = 4
    """Of the stress test: one in which it is found soon."""
    command: tuple[str, ...] = ()
    """Another program that has to find it, and its arguments."""
    sanitizer: str = ""


NO_FENCE: Final = "atomic_signal_fence(memory_order_seq_cst);"
"""The compiler keeps the order, the processor need not: x86 lets a load overtake a store."""

MUTANTS: Final = (
    Mutant(
        "the final check does not look again",
        "blkif.c",
        "    STRESS_POINT(RING_ARM_LOOK);\n    return ring_waiting(ring);",
        "    STRESS_POINT(RING_ARM_LOOK);\n    return 0;",
    ),
    Mutant(
        "the final check has no fence",
        "blkif.c",
        "    atomic_thread_fence(memory_order_seq_cst);\n    STRESS_POINT(RING_ARM_LOOK);",
        f"    {NO_FENCE}\n    STRESS_POINT(RING_ARM_LOOK);",
        scenario=1,
    ),
    Mutant(
        "req_event is not written",
        "blkif.c",
        "    atomic_store_explicit(word(ring, REQ_EVENT), ring->req_cons + 1, "
        "memory_order_relaxed);",
        "    (void)REQ_EVENT;",
    ),
    Mutant(
        "req_event is one too far",
        "blkif.c",
        "word(ring, REQ_EVENT), ring->req_cons + 1,",
        "word(ring, REQ_EVENT), ring->req_cons + 2,",
    ),
    Mutant(
        "the push has no fence",
        "blkif.c",
        "    atomic_thread_fence(memory_order_seq_cst);\n    STRESS_POINT(RING_PUSH_LOOK);",
        f"    {NO_FENCE}\n    STRESS_POINT(RING_PUSH_LOOK);",
        scenario=1,
    ),
    Mutant(
        "the push reads rsp_event before it writes rsp_prod",
        "blkif.c",
        "    STRESS_POINT(RING_PUSH);\n",
        "    uint32_t wanted = atomic_load_explicit(word(ring, RSP_EVENT), memory_order_relaxed);\n"
        "    STRESS_POINT(RING_PUSH);\n"
        "    if (new - wanted >= new - old) {\n"
        "        atomic_store_explicit(word(ring, RSP_PROD), new, memory_order_release);\n"
        "        ring->rsp_prod = new;\n"
        "        return false;\n"
        "    }\n",
    ),
    Mutant(
        "the push leaves out one event in between",
        "blkif.c",
        "memory_order_relaxed) < new - old;",
        "memory_order_relaxed) == 0;",
        scenario=2,
    ),
    Mutant(
        "who posts looks whether the thread sleeps before the mail is there",
        "io_thread.c",
        "    atomic_store(&thread->mail, true);\n"
        "    STRESS_POINT(MAIL_POSTED);\n"
        "    if (!atomic_load(&thread->sleeping))\n"
        "        return;\n",
        "    bool asleep = atomic_load(&thread->sleeping);\n"
        "    STRESS_POINT(MAIL_POSTED);\n"
        "    atomic_store(&thread->mail, true);\n"
        "    if (!asleep)\n"
        "        return;\n",
    ),
    Mutant(
        "who posts has no fence",
        "io_thread.c",
        "    atomic_store(&thread->mail, true);\n"
        "    STRESS_POINT(MAIL_POSTED);\n"
        "    if (!atomic_load(&thread->sleeping))\n",
        "    atomic_store_explicit(&thread->mail, true, memory_order_release);\n"
        f"    {NO_FENCE}\n"
        "    STRESS_POINT(MAIL_POSTED);\n"
        "    if (!atomic_load_explicit(&thread->sleeping, memory_order_acquire))\n",
    ),
    Mutant(
        "a thread looks for mail before it says that it sleeps",
        "io_thread.c",
        "    atomic_store(&thread->sleeping, true);\n"
        "    STRESS_POINT(SLEEP_BEGIN);\n"
        "    int error = thread->engine->turn("
        "thread, atomic_load(&thread->mail) ? 0 : timeout_ns);\n",
        "    bool mail = atomic_load(&thread->mail);\n"
        "    STRESS_POINT(SLEEP_BEGIN);\n"
        "    atomic_store(&thread->sleeping, true);\n"
        "    int error = thread->engine->turn(thread, mail ? 0 : timeout_ns);\n",
    ),
    Mutant(
        "a thread that says that it sleeps has no fence",
        "io_thread.c",
        "    atomic_store(&thread->sleeping, true);\n",
        "    atomic_store_explicit(&thread->sleeping, true, memory_order_release);\n"
        f"    {NO_FENCE}\n",
    ),
    Mutant(
        "a thread empties its mailbox before it clears the flag",
        "io_thread.c",
        "    *quit = thread->quit;\n    pthread_mutex_unlock(&thread->lock);\n",
        "    *quit = thread->quit;\n    pthread_mutex_unlock(&thread->lock);\n"
        "    STRESS_POINT(MAIL_CLEARED);\n"
        "    atomic_store(&thread->mail, false);\n",
        scenario=9,
    ),
    Mutant(
        "no final checks before sleep if the thread has spun",
        "io_thread.c",
        "    if (!quiet(thread))\n        return 0;\n",
        "    if (thread->spin_ns)\n"
        "        thread->warm = NULL;\n"
        "    if (!quiet(thread))\n"
        "        return 0;\n",
        scenario=2,
    ),
    Mutant(
        "an event that is reaped while the thread is awake is dropped",
        "engine_uring.c",
        "        if (more)\n            ring_woken(object);\n",
        "        if (more && !thread->nr_warm)\n            ring_woken(object);\n"
        "        else if (more)\n            ;\n",
        scenario=2,
    ),
    Mutant(
        "events are read after their rings were looked into",
        "engine_preadv.c",
        "        if (!engine->rings[i]->channel.handle)\n"
        "            drain(engine->rings[i]->channel.fd);\n"
        "        ring_woken(engine->rings[i]);\n",
        "        if (ring_serve(engine->rings[i]) || ring_quiet(engine->rings[i]))\n"
        "            ring_woken(engine->rings[i]);\n"
        "        drain(engine->rings[i]->channel.fd);\n",
        scenario=1,
    ),
    Mutant(
        "a ring that has rested waits for an event",
        "ring.c",
        "            drop_events(ring);\n"
        "        watch(ring);\n"
        "        thread_make_runnable(ring->thread, ring);\n",
        "            drop_events(ring);\n        watch(ring);\n",
        scenario=2,
    ),
    Mutant(
        "a thread does not know of a ring that it just sent to rest",
        "io_thread.c",
        "    if (thread->resting)\n        timeout_ns = wake_rested(thread);",
        "    if (thread->resting && timeout_ns != UINT64_MAX)\n"
        "        timeout_ns = wake_rested(thread);",
        scenario=1,
    ),
    Mutant(
        "all rings but one have their final check later",
        "io_thread.c",
        "        if (ring_quiet(ring))\n            thread_make_runnable(thread, ring);\n    }\n",
        "        if (ring_quiet(ring))\n            thread_make_runnable(thread, ring);\n"
        "        break;\n    }\n",
        command=("connection_test", "many_rings_of_one_thread"),
    ),
    Mutant(
        "Python is not woken if it was not yet seen to be asleep",
        "connection.c",
        "    *connection->requests.last = works->first;\n"
        "    connection->requests.last = works->last;\n"
        "    bool needed = awaken(connection);\n"
        "    pthread_mutex_unlock(&connection->lock);\n"
        "    wake(connection, needed);\n",
        "    bool needed = awaken(connection);\n"
        "    pthread_mutex_unlock(&connection->lock);\n"
        "    wake(connection, needed);\n"
        "    STRESS_POINT(LIST_PUT);\n"
        "    pthread_mutex_lock(&connection->lock);\n"
        "    *connection->requests.last = works->first;\n"
        "    connection->requests.last = works->last;\n"
        "    pthread_mutex_unlock(&connection->lock);\n",
    ),
    Mutant(
        "Python counts as awake until it finds nothing",
        "connection.c",
        "    if (count < most)\n        connection->awake = false;\n",
        "    if (!count)\n        connection->awake = false;\n",
    ),
    Mutant(
        "a poll with an event is not cancelled, and that is not tried again",
        "engine_uring.c",
        "    sqe->opcode = IORING_OP_ASYNC_CANCEL;\n",
        "    sqe->opcode = IORING_OP_POLL_REMOVE;\n"
        "#undef EALREADY\n"
        "#define EALREADY 0x7fff\n",  # which no result is
        scenario=10,
    ),
    Mutant(
        "transfers in flight are not waited for",
        "ring.c",
        "    return work->state == MOVING && work->number < settle->horizon &&\n",
        "    return work->state == MOVING && work->number > settle->horizon &&\n",
        scenario=10,
    ),
    Mutant(
        "a look-up does not see that the cache has changed",
        "extents.c",
        "        if (GET(known->sequence) != before)\n            continue;\n",
        "",
        command=("extents_threads", "3000000"),
    ),
    Mutant(
        "an answer that is due when the connection stops is left out",
        "ring.c",
        "        ring_answer(&ring->back, request->id, request->operation, "
        "work->transfer.status);\n",
        "        if (ring->connection->stopped)\n"
        "            continue;\n"
        "        ring_answer(&ring->back, request->id, request->operation, "
        "work->transfer.status);\n",
        scenario=10,
    ),
    Mutant(
        "a writer does not say that it changes the cache",
        "extents.c",
        "    SET(known->sequence, GET(known->sequence) + 1);\n    STRESS_POINT(EXTENTS_CHANGING);",
        "    SET(known->sequence, GET(known->sequence) + 2);\n    STRESS_POINT(EXTENTS_CHANGING);",
        command=("extents_threads", "3000000"),
    ),
    Mutant(
        "an entry is seen before it is in the file",
        "claims.c",
        "    STRESS_POINT(CLAIM_WRITE);\n",
        "    for (unsigned i = 0; i < number; i++)\n"
        "        atomic_store(entry_of(&chosen[i]), chosen[i].place | claims->bits);\n"
        "    STRESS_POINT(CLAIM_WRITE);\n",
        command=("claims_threads", "300000"),
    ),
    Mutant(
        "entries are made though somebody has paused",
        "claims.c",
        "    if (atomic_load(&claims->pauses) || !choose",
        "    if (!choose",
        command=("claims_threads", "300000"),
    ),
    Mutant(
        "who pauses does not see that an entry is being made",
        "claims.c",
        "    if (pthread_mutex_trylock(&claims->lock))\n"
        "        return false;\n"
        "    pthread_mutex_unlock(&claims->lock);\n"
        "    return true;\n",
        "    return true;\n",
        command=("claims_threads", "300000"),
    ),
    Mutant(
        "a place is taken twice",
        "claims.c",
        "    claims->next_place = (claims->next_place + 1) % MOST_PLACES;\n",
        "    claims->next_place %= MOST_PLACES;\n",
        command=("claims_threads", "300000"),
    ),
    Mutant(
        "entries are made for what was copied, but is not durable",
        "copy.c",
        "        copy->step = STORED;\n        sync_stored(ring);\n",
        "        end(copy, claims_enter(ring->connection->config.claims, &copy->claimed));\n",
        command=("copy_test", "2000"),
    ),
    Mutant(
        "a sync counts for what was stored after it began",
        "copy.c",
        "        if (copy->step == SYNCING)\n            done",
        "        if (copy->step == SYNCING || copy->step == STORED)\n            done",
        command=("copy_test", "20000"),
    ),
    Mutant(
        "a copy takes the place of what somebody else has entered meanwhile",
        "claims.c",
        "    bool possible = choose_all(claims, claimed->first, claimed->number, chosen);\n"
        "    for (unsigned i = 0; i < claimed->number; i++)\n"
        "        chosen[i].place = claimed->places[i];\n",
        "    bool possible = true;\n"
        "    for (unsigned i = 0; i < claimed->number; i++) {\n"
        "        chosen[i] = (struct claim){\n"
        "            .loan = loan_of(claims, claimed->first + i), .unit = claimed->first + i};\n"
        "        possible &= chosen[i].loan != NULL;\n"
        "        chosen[i].place = claimed->places[i];\n"
        "    }\n",
        command=("copy_test", "20000"),
    ),
    Mutant(
        "a place that was written to in vain is lost",
        "claims.c",
        "    if (!possible)\n        spoil(claims, claimed);\n",
        "",
        command=("copy_test", "2000"),
    ),
    Mutant(
        "writes to a unit that is being copied don't wait",
        "copy.c",
        "    struct copy *other = copy_of(ring, request);\n",
        "    struct copy *other = copy_of(ring, request) ? NULL : NULL;\n",
        command=("copy_test", "2000"),
    ),
    Mutant(
        "a ring that was asked to stop is told more",
        "connection.c",
        "    if (connection->stopped)\n        return;                         /* the rings",
        "    if (!connection)\n        return;                         /* the rings",
        command=("connection_test", "limits_that_change_too_late"),
        sanitizer="address,undefined",
    ),
    Mutant(
        "requests go up to Python without the lock",
        "connection.c",
        "    pthread_mutex_lock(&connection->lock);\n"
        "    *connection->requests.last = works->first;\n"
        "    connection->requests.last = works->last;\n"
        "    bool needed = awaken(connection);\n"
        "    pthread_mutex_unlock(&connection->lock);\n",
        "    *connection->requests.last = works->first;\n"
        "    connection->requests.last = works->last;\n"
        "    bool needed = awaken(connection);\n",
        sanitizer="thread",
    ),
)
