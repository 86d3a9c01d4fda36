"""io_uring without a library: the ring system calls through ctypes, the rings as memory views.

One `IoUring` belongs to one thread: the one that submits, because the kernel finishes requests
in the context of the thread that submitted them.

Memory order.  The kernel reads the submission queue inside `io_uring_enter`, in our own thread,
so nothing has to be ordered there.  It writes a completion first and the completion tail after
it; we read the tail first and the completions after it, then store the head.  x86 keeps loads in
order, and stores behind earlier loads; elsewhere `fence` runs between these steps.

Layouts and numbers: include/uapi/linux/io_uring.h.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import platform
import struct
from collections.abc import Callable
from typing import Any, Final

from xbd.core.errors import DeviceBroken

_LOG = logging.getLogger(__name__)

UNAVAILABLE: Final = frozenset({errno.ENOSYS, errno.EPERM, errno.ENOMEM, errno.EMFILE})
"""The errnos of an `IoUring` that can't be made here, or not now."""
_SUBMIT_ATTEMPTS: Final = 10_000

# The same on every architecture that Xen runs on.
_NR_SETUP: Final = 425
_NR_ENTER: Final = 426

_SETUP_CLAMP: Final = 1 << 4
_SETUP_SUBMIT_ALL: Final = 1 << 7
_SETUP_COOP_TASKRUN: Final = 1 << 8

SETUP_LADDER: Final = (
    _SETUP_CLAMP | _SETUP_SUBMIT_ALL | _SETUP_COOP_TASKRUN,  # Linux 5.19
    _SETUP_CLAMP,  # Linux 5.10
)
"""Tried from first to last.  Never DEFER_TASKRUN: with it the ring's fd is not readable."""

_FEAT_SINGLE_MMAP: Final = 1 << 0
_FEAT_NODROP: Final = 1 << 1
_FEAT_SUBMIT_STABLE: Final = 1 << 2
_FEATURES_NEEDED: Final = _FEAT_SINGLE_MMAP | _FEAT_NODROP | _FEAT_SUBMIT_STABLE

# Arguments of io_uring_enter; making a ctypes number anew costs 0.1 us each.
_NOTHING: Final = ctypes.c_uint(0)
_NO_SIZE: Final = ctypes.c_size_t(0)
_GETEVENTS: Final = ctypes.c_uint(1 << 0)

_OFF_SQ_RING: Final = 0
_OFF_SQES: Final = 0x10000000

_OP_READV: Final = 1
_OP_WRITEV: Final = 2
_OP_FSYNC: Final = 3
_OP_READ: Final = 22
_OP_WRITE: Final = 23
_FSYNC_DATASYNC: Final = 1

# struct io_uring_params: 10 words, then io_sqring_offsets and io_cqring_offsets of 40 bytes each.
_PARAMS: Final = struct.Struct("=2I I 2I I 4I 8IQ 8IQ")
# struct io_uring_sqe: opcode, fd, off, addr, len, rw_flags or fsync_flags, user_data.  Flags and
# ioprio are written as zero; nobody ever writes the last 24 bytes of the 64.
_SQE: Final = struct.Struct("=B3xiQQIIQ")
_SQE_SIZE: Final = 64
# struct io_uring_cqe: user_data, res (and flags, which only other operations use).
_CQE: Final = struct.Struct("=Qi4x")

_X86: Final = platform.machine() in ("x86_64", "AMD64", "i386", "i686")


def _bind(library: ctypes.CDLL) -> Any:
    function = library.syscall
    function.restype = ctypes.c_long
    return function


# Submitting never waits for I/O, so it keeps the GIL: giving it up would cost a switch interval
# (5 ms) per call whenever another thread is computing.  Waiting gives it up.
_syscall_keeping_gil = _bind(ctypes.PyDLL(None, use_errno=True))
_syscall = _bind(ctypes.CDLL(None, use_errno=True))


def _failure(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def _setup(entries: int) -> tuple[int, tuple[int, ...]]:
    """The new ring's fd and its parameters, with the best flags that this kernel knows."""
    if platform.system() != "Linux":  # there these numbers mean other system calls
        raise OSError(errno.ENOSYS, "io_uring is part of Linux")
    params = ctypes.create_string_buffer(_PARAMS.size)
    for flags in SETUP_LADDER:
        _PARAMS.pack_into(params, 0, 0, 0, flags, *[0] * 25)
        fd = _syscall(ctypes.c_long(_NR_SETUP), ctypes.c_uint(entries), ctypes.byref(params))
        if fd >= 0:
            return fd, _PARAMS.unpack(params)
        if ctypes.get_errno() != errno.EINVAL:
            break
    raise _failure("io_uring_setup")


def _default_fence() -> Callable[[], None] | None:
    if _X86:
        return None
    from xbd.core.hostio.fence import full_fence

    return full_fence


class IoUring:
    """A submission and a completion queue shared with the kernel.

    Queue requests, `submit` them, wait until `fd` is readable (``trio.lowlevel.wait_readable``),
    then `reap`.  Buffers and the requests' fds must stay as they are until a request has been
    reaped; iovec arrays only until `submit` has taken it.

    More requests than the completion queue can answer are refused, so it never overflows.
    """

    __slots__ = (
        "__weakref__",
        "_cq_entries",
        "_cq_head_word",
        "_cq_mask",
        "_cq_tail_word",
        "_cqes",
        "_enter_fixed",
        "_fence",
        "_limit",
        "_maps",
        "_queued",
        "_reaped",
        "_sq_entries",
        "_sq_mask",
        "_sq_tail_word",
        "_sqes",
        "_submitted",
        "_words",
        "fd",
    )

    fd: int
    """The ring; readable while completions are waiting."""

    def __init__(self, entries: int = 256, *, fence: Callable[[], None] | None = None) -> None:
        """Make a ring for `entries` queued requests (rounded up to a power of two).

        `fence` is a full memory barrier; by default none on x86, the machine's own elsewhere.
        Raises OSError where the kernel has no io_uring (ENOSYS), forbids it (EPERM), or has one
        too old to be used (ENOSYS).
        """
        self.fd, params = _setup(entries)
        try:
            if params[5] & _FEATURES_NEEDED != _FEATURES_NEEDED:
                raise OSError(errno.ENOSYS, "this kernel's io_uring is too old (Linux 5.5 needed)")
            self._map(params)
        except BaseException:
            os.close(self.fd)
            raise
        self._fence = fence or _default_fence()
        # All three run freely; Python's numbers never wrap.
        self._queued = self._submitted = self._reaped = 0
        self._limit = self._sq_entries
        self._enter_fixed = (ctypes.c_long(_NR_ENTER), ctypes.c_int(self.fd))

    def _map(self, params: tuple[int, ...]) -> None:
        self._sq_entries, self._cq_entries = params[0], params[1]
        sq, cq = params[10:19], params[19:28]
        length = max(sq[6] + 4 * self._sq_entries, cq[5] + _CQE.size * self._cq_entries)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        rings = mmap.mmap(self.fd, length, flags, offset=_OFF_SQ_RING)
        sqes = mmap.mmap(self.fd, _SQE_SIZE * self._sq_entries, flags, offset=_OFF_SQES)
        self._maps = (rings, sqes)
        self._words = memoryview(rings)[: length & ~3].cast("I")
        self._sqes = memoryview(sqes)
        self._cqes = memoryview(rings)[cq[5] : cq[5] + _CQE.size * self._cq_entries]
        self._sq_tail_word, self._sq_mask = sq[1] // 4, self._words[sq[2] // 4]
        self._cq_head_word, self._cq_tail_word = cq[0] // 4, cq[1] // 4
        self._cq_mask = self._words[cq[2] // 4]
        for slot in range(self._sq_entries):  # slot n of the queue is always entry n
            self._words[sq[6] // 4 + slot] = slot

    @property
    def in_flight(self) -> int:
        """Requests queued or submitted and not yet reaped."""
        return self._queued - self._reaped

    @property
    def queued(self) -> int:
        """Requests queued and not yet taken by the kernel."""
        return self._queued - self._submitted

    @property
    def free(self) -> int:
        """How many requests can be queued now."""
        return self._limit - self._queued

    # The next five repeat themselves, because a shared helper would cost each request a call.

    def readv(self, fd: int, iov_address: int, iov_count: int, offset: int, user_data: int) -> None:
        """Queue a preadv into the `iov_count` (at most 1024) iovecs at `iov_address`."""
        tail = self._queued
        if tail == self._limit:
            raise self._full()
        _SQE.pack_into(
            self._sqes, (tail & self._sq_mask) << 6,
            _OP_READV, fd, offset, iov_address, iov_count, 0, user_data,
        )  # fmt: skip
        self._queued = tail + 1

    def writev(
        self, fd: int, iov_address: int, iov_count: int, offset: int, user_data: int
    ) -> None:
        """Queue a pwritev from the `iov_count` (at most 1024) iovecs at `iov_address`."""
        tail = self._queued
        if tail == self._limit:
            raise self._full()
        _SQE.pack_into(
            self._sqes, (tail & self._sq_mask) << 6,
            _OP_WRITEV, fd, offset, iov_address, iov_count, 0, user_data,
        )  # fmt: skip
        self._queued = tail + 1

    def read(self, fd: int, address: int, length: int, offset: int, user_data: int) -> None:
        """Queue a pread of `length` bytes from file `offset` to memory at `address`."""
        tail = self._queued
        if tail == self._limit:
            raise self._full()
        _SQE.pack_into(
            self._sqes, (tail & self._sq_mask) << 6,
            _OP_READ, fd, offset, address, length, 0, user_data,
        )  # fmt: skip
        self._queued = tail + 1

    def write(self, fd: int, address: int, length: int, offset: int, user_data: int) -> None:
        """Queue a pwrite of `length` bytes at `address` to file `offset`."""
        tail = self._queued
        if tail == self._limit:
            raise self._full()
        _SQE.pack_into(
            self._sqes, (tail & self._sq_mask) << 6,
            _OP_WRITE, fd, offset, address, length, 0, user_data,
        )  # fmt: skip
        self._queued = tail + 1

    def fsync(self, fd: int, user_data: int, datasync: bool = True) -> None:
        """Queue an fdatasync (or fsync) of what was written before; it waits for no request
        of this ring."""
        tail = self._queued
        if tail == self._limit:
            raise self._full()
        flags = _FSYNC_DATASYNC if datasync else 0
        _SQE.pack_into(
            self._sqes, (tail & self._sq_mask) << 6, _OP_FSYNC, fd, 0, 0, 0, flags, user_data
        )
        self._queued = tail + 1

    def _full(self) -> BlockingIOError:
        return BlockingIOError(errno.EAGAIN, "the io_uring is full: submit, reap, then go on")

    def submit(self) -> int:
        """Hand all queued requests to the kernel; returns how many it took.

        Fewer than queued: the kernel is short of memory for now.  The rest stays queued; reap,
        then submit again.
        """
        before = self._submitted
        while pending := self._queued - self._submitted:
            taken = self._enter(_syscall_keeping_gil, pending, _NOTHING, _NOTHING)
            if taken <= 0:
                break
            self._submitted += taken
        self._set_limit()
        return self._submitted - before

    def submit_all(self) -> None:
        """`submit`, again while the kernel is short of memory.

        Raises `DeviceBroken` if it stays so.
        """
        for _ in range(_SUBMIT_ATTEMPTS):
            self.submit()
            if not self.queued:
                return
        raise DeviceBroken("the kernel takes no more I/O requests: it is out of memory")

    def wait(self, count: int = 1) -> None:
        """Submit, then block this thread until `count` completions can be reaped (or all)."""
        self.submit()
        count = min(count, self._submitted - self._reaped)
        while count > 0 and self._waiting() < count:
            self._enter(_syscall, 0, ctypes.c_uint(count), _GETEVENTS)

    def reap(self) -> list[tuple[int, int]]:
        """Take all completions: (user_data, bytes done or negative errno), oldest first.

        A transfer can be short: at the end of the file, and rarely elsewhere.
        """
        count = self._waiting()
        if not count:
            return []
        if self._fence is not None:
            self._fence()
        first = self._reaped & self._cq_mask
        last = first + count
        if last <= self._cq_entries:
            done = list(_CQE.iter_unpack(self._cqes[first << 4 : last << 4]))
        else:
            done = list(_CQE.iter_unpack(self._cqes[first << 4 :]))
            done += _CQE.iter_unpack(self._cqes[: (last - self._cq_entries) << 4])
        if self._fence is not None:
            self._fence()
        self._reaped += count
        self._words[self._cq_head_word] = self._reaped & 0xFFFFFFFF
        self._set_limit()
        return done

    def _waiting(self) -> int:
        return (self._words[self._cq_tail_word] - self._reaped) & 0xFFFFFFFF

    def _set_limit(self) -> None:
        by_sq = self._submitted + self._sq_entries
        by_cq = self._reaped + self._cq_entries
        self._limit = by_sq if by_sq < by_cq else by_cq

    def _enter(
        self, syscall: Any, to_submit: int, min_complete: ctypes.c_uint, flags: ctypes.c_uint
    ) -> int:
        """io_uring_enter; 0 when the kernel cannot take more now."""
        self._words[self._sq_tail_word] = self._queued & 0xFFFFFFFF
        taken: int = syscall(
            *self._enter_fixed,
            ctypes.c_uint(to_submit),
            min_complete,
            flags,
            None,
            _NO_SIZE,
        )
        if taken >= 0:
            return taken
        if ctypes.get_errno() in (errno.EAGAIN, errno.EBUSY, errno.EINTR):
            return 0
        raise _failure("io_uring_enter")

    def close(self) -> None:
        """Give the ring back.  Idempotent.

        Only when nothing is in flight: the kernel goes on reading and writing the buffers of
        requests after the ring is closed, so drain first.  With requests in flight it raises
        RuntimeError and does nothing; `abandon` is the way out for storage that never answers.
        """
        if self.fd < 0:
            return
        if self.in_flight:
            raise RuntimeError(f"io_uring closed with {self.in_flight} requests in flight")
        self._words.release()
        self._sqes.release()
        self._cqes.release()
        for mapping in self._maps:  # each holds the ring too
            mapping.close()
        os.close(self.fd)
        self.fd = -1

    def abandon(self) -> None:
        """Close if nothing is in flight, else keep the ring for as long as the process lives.

        A leak on purpose.  The buffers of the requests in flight must be leaked likewise.
        """
        if not self.in_flight:
            self.close()
        elif self not in _abandoned:
            _LOG.error("io_uring with %d requests in flight left behind", self.in_flight)
            _abandoned.append(self)


_abandoned: Final[list[IoUring]] = []
