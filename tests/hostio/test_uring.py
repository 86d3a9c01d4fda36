"""io_uring against real files, with a bytearray as the model."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from xbd.core.hostio import uring
from xbd.core.hostio.uring import IoUring

BLOCK = 4096
BLOCKS = 64


@pytest.fixture
def ring() -> Iterator[IoUring]:
    try:
        ring = IoUring(8)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM):
            pytest.skip(f"no io_uring here: {error}")
        raise
    yield ring
    ring.wait(ring.in_flight)
    ring.reap()
    ring.close()


@pytest.fixture
def memory() -> mmap.mmap:
    return mmap.mmap(-1, BLOCK * BLOCKS)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.ftruncate(fd, BLOCK * BLOCKS)
    yield fd
    os.close(fd)


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def iovecs(*parts: tuple[int, int]) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(b"".join(struct.pack("NN", *part) for part in parts))


def run(ring: IoUring) -> dict[int, int]:
    ring.wait(ring.in_flight)
    return dict(ring.reap())


def test_random_transfers_agree_with_a_model_across_many_wraps(
    ring: IoUring, memory: mmap.mmap, file: int
) -> None:
    rng = random.Random(7)
    model = bytearray(BLOCK * BLOCKS)
    base = address_of(memory)
    for _ in range(200):
        count = rng.randint(1, ring.free)
        reads: dict[int, int] = {}
        keep = []
        for place, block in enumerate(rng.sample(range(BLOCKS), count)):
            at, lies, half = base + place * BLOCK, block * BLOCK, BLOCK // 2
            vector = iovecs((at + half, half), (at, half))
            keep.append(vector)
            write, vectored = rng.random() < 0.5, rng.random() < 0.5
            if write:
                data = rng.randbytes(BLOCK)
                memory[place * BLOCK : (place + 1) * BLOCK] = data
                model[lies : lies + BLOCK] = data[half:] + data[:half] if vectored else data
            else:
                reads[place] = lies if not vectored else -lies - 1
            if vectored:
                queue = ring.writev if write else ring.readv
                queue(file, ctypes.addressof(vector), 2, lies, place)
            else:
                single = ring.write if write else ring.read
                single(file, at, BLOCK, lies, place)
        results = run(ring)
        assert results == dict.fromkeys(range(count), BLOCK)
        for place, lies in reads.items():
            data = memory[place * BLOCK : (place + 1) * BLOCK]
            if lies < 0:
                lies, data = -lies - 1, data[BLOCK // 2 :] + data[: BLOCK // 2]
            assert data == model[lies : lies + BLOCK]
    assert os.pread(file, len(model), 0) == model


def test_completions_outlast_a_submission_queue_but_never_overflow(
    ring: IoUring, memory: mmap.mmap, file: int
) -> None:
    queued = 0
    while ring.free:
        ring.read(file, address_of(memory), 512, 0, queued)
        queued += 1
        if not ring.free:
            ring.submit()
    assert queued == ring.in_flight == 16  # the kernel makes the completion queue twice as long
    with pytest.raises(BlockingIOError) as caught:
        ring.fsync(file, 99)
    assert caught.value.errno == errno.EAGAIN
    assert run(ring) == dict.fromkeys(range(queued), 512)
    assert ring.in_flight == 0
    assert ring.free == 8


def test_a_read_at_the_end_of_the_file_is_short(
    ring: IoUring, memory: mmap.mmap, file: int
) -> None:
    end = BLOCK * BLOCKS
    ring.read(file, address_of(memory), BLOCK, end - 512, 1)
    ring.read(file, address_of(memory), BLOCK, end, 2)
    assert run(ring) == {1: 512, 2: 0}


def test_errors_are_negative_results_and_spoil_no_other_request(
    ring: IoUring, memory: mmap.mmap, file: int, tmp_path: Path
) -> None:
    read_only = os.open(tmp_path / "image", os.O_RDONLY)
    ring.read(-1, address_of(memory), 512, 0, 1)
    ring.write(read_only, address_of(memory), 512, 0, 2)
    ring.read(file, 0, 512, 0, 3)
    ring.readv(file, 8, 1, 0, 4)
    ring.read(file, address_of(memory), 512, 0, 5)
    results = run(ring)
    os.close(read_only)
    assert results == {
        1: -errno.EBADF,
        2: -errno.EBADF,
        3: -errno.EFAULT,
        4: -errno.EFAULT,
        5: 512,
    }


def test_user_data_and_offsets_keep_all_their_bits(
    ring: IoUring, memory: mmap.mmap, file: int
) -> None:
    far = (1 << 40) + 512
    os.pwrite(file, b"far", far)
    ring.read(file, address_of(memory), 3, far, (1 << 64) - 1)
    assert run(ring) == {(1 << 64) - 1: 3}
    assert memory[:3] == b"far"


def test_fsync(ring: IoUring, file: int) -> None:
    ring.fsync(file, 1)
    ring.fsync(file, 2, datasync=False)
    assert run(ring) == {1: 0, 2: 0}


async def test_the_fd_is_readable_when_a_pipe_answers_later(
    ring: IoUring, memory: mmap.mmap
) -> None:
    reader, writer = os.pipe()
    try:
        for turn in range(20):
            ring.read(reader, address_of(memory), 8, 0, turn)
            ring.submit()
            assert ring.reap() == []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.lowlevel.wait_readable, ring.fd)
                await trio.testing.wait_all_tasks_blocked()
                os.write(writer, b"x")
                nursery.cancel_scope.deadline = trio.current_time() + 5
            assert not nursery.cancel_scope.cancelled_caught
            assert ring.reap() == [(turn, 1)]
    finally:
        os.close(reader)
        os.close(writer)


async def test_polling_loses_no_completion_of_direct_io(
    ring: IoUring, memory: mmap.mmap, tmp_path: Path
) -> None:
    path = tmp_path / "direct"
    path.write_bytes(bytes(BLOCK * BLOCKS))
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        pytest.skip(f"the filesystem of {tmp_path} has no O_DIRECT")
    sent = done = 0
    with trio.fail_after(20):
        while done < 500:
            while ring.free and sent < 500:
                transfer = ring.read if sent % 3 else ring.write
                transfer(
                    fd, address_of(memory) + sent % BLOCKS * BLOCK, BLOCK, sent % BLOCKS * BLOCK, 0
                )
                sent += 1
            ring.submit()
            await trio.lowlevel.wait_readable(ring.fd)
            answers = ring.reap()
            assert all(result == BLOCK for _, result in answers)
            done += len(answers)
    os.close(fd)


def test_older_kernels_get_a_plain_ring(
    monkeypatch: pytest.MonkeyPatch, ring: IoUring, memory: mmap.mmap, file: int
) -> None:
    unknown = 1 << 31
    monkeypatch.setattr(uring, "SETUP_LADDER", (unknown, *uring.SETUP_LADDER[-1:]))
    plain = IoUring(8)
    plain.read(file, address_of(memory), 512, 0, 1)
    assert run(plain) == {1: 512}
    plain.close()
    monkeypatch.setattr(uring, "SETUP_LADDER", (unknown,))
    with pytest.raises(OSError, match="io_uring_setup") as caught:
        IoUring(8)
    assert caught.value.errno == errno.EINVAL


def test_other_systems_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "NetBSD")
    with pytest.raises(OSError, match="Linux") as caught:
        IoUring(8)
    assert caught.value.errno == errno.ENOSYS


def test_the_fence_stands_between_tail_completions_and_head(memory: mmap.mmap, file: int) -> None:
    heads: list[int] = []
    fenced = IoUring(8, fence=lambda: heads.append(fenced._words[fenced._cq_head_word]))
    for _ in range(2):
        fenced.read(file, address_of(memory), 512, 0, 1)
        run(fenced)
    fenced.close()
    assert heads == [0, 0, 1, 1]


def test_close_refuses_while_the_kernel_may_still_write_to_buffers(memory: mmap.mmap) -> None:
    ring = IoUring(8)
    reader, writer = os.pipe()
    ring.read(reader, address_of(memory), 8, 0, 1)
    ring.submit()
    with pytest.raises(RuntimeError, match="1 requests in flight"):
        ring.close()
    os.write(writer, b"x")
    assert run(ring) == {1: 1}
    ring.close()
    ring.close()
    os.close(reader)
    os.close(writer)


def test_abandon_keeps_the_ring_of_requests_that_never_end(
    memory: mmap.mmap, caplog: pytest.LogCaptureFixture
) -> None:
    idle = IoUring(8)
    idle.abandon()
    assert idle.fd == -1
    stuck = IoUring(8)
    reader, writer = os.pipe()
    stuck.read(reader, address_of(memory), 8, 0, 1)
    stuck.submit()
    stuck.abandon()
    stuck.abandon()
    assert uring._abandoned == [stuck]
    assert len(caplog.records) == 1
    os.close(writer)
    assert run(stuck) == {1: 0}
    uring._abandoned.clear()
    stuck.close()
    os.close(reader)


def test_rings_are_given_back() -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(20):
        IoUring(8).close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
