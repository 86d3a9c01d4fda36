"""Copies of which each piece is written as soon as it is read."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from xbd.core.hostio import parallel
from xbd.core.hostio.parallel import DEPTH, ParallelIo

BLOCK = 4096
BLOCKS = 3 * DEPTH


@pytest.fixture
def io() -> Iterator[ParallelIo]:
    io = ParallelIo()
    if io._take() is None:
        pytest.skip("no io_uring here")
    yield io
    io.close()


@pytest.fixture
def content() -> bytes:
    return random.Random(1).randbytes(BLOCK * BLOCKS)


@pytest.fixture
def files(tmp_path: Path, content: bytes) -> Iterator[tuple[int, int]]:
    """One with the content, and an empty one."""
    (tmp_path / "from").write_bytes(content)
    fds = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("from", "to")]
    yield fds[0], fds[1]
    for fd in fds:
        os.close(fd)


def memory(length: int = BLOCK) -> memoryview:
    return memoryview(mmap.mmap(-1, length))[:length]


def test_everything_is_copied_whatever_the_order(
    io: ParallelIo, files: tuple[int, int], content: bytes
) -> None:
    """More than the ring takes at a time, backwards."""
    source, target = files
    copies = []
    for number in range(BLOCKS):
        buffer = memory()
        to = (BLOCKS - 1 - number) * BLOCK
        copies.append(
            ((source, number * BLOCK, [buffer]), (target, to, [buffer[:1000], buffer[1000:]]))
        )
    assert io.copy(copies) == [True] * BLOCKS
    blocks = [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]
    assert os.pread(target, len(content) + 1, 0) == b"".join(reversed(blocks))


def test_what_is_written_may_be_more_than_what_was_read(
    io: ParallelIo, files: tuple[int, int], content: bytes
) -> None:
    source, target = files
    old, new = memory(), memory(100)
    new[:] = b"n" * 100
    pieces = [old[:500], new, old[600:]]
    assert io.copy([((source, BLOCK, [old]), (target, 0, pieces))]) == [True]
    expected = bytearray(content[BLOCK : 2 * BLOCK])
    expected[500:600] = b"n" * 100
    assert os.pread(target, BLOCK, 0) == expected


def test_nothing_is_written_of_what_was_not_read_whole(
    io: ParallelIo, files: tuple[int, int]
) -> None:
    """At the end of a file, or where it can't be read at all; the others are copied."""
    source, target = files
    write_only = os.open(f"/proc/self/fd/{target}", os.O_WRONLY)
    short, bad, good = memory(2 * BLOCK), memory(), memory()
    copies = [
        ((source, (BLOCKS - 1) * BLOCK, [short]), (target, 0, [short])),
        ((write_only, 0, [bad]), (target, 8 * BLOCK, [bad])),
        ((source, 0, [good]), (target, 16 * BLOCK, [good])),
    ]
    assert io.copy(copies) == [False, False, True]
    assert not any(os.pread(target, 16 * BLOCK, 0))
    os.close(write_only)


def test_what_could_not_be_written_is_told(io: ParallelIo, files: tuple[int, int]) -> None:
    source, _ = files
    read_only = os.open(f"/proc/self/fd/{source}", os.O_RDONLY)
    buffer = memory()
    assert io.copy([((source, 0, [buffer]), (read_only, 0, [buffer]))]) == [False]
    os.close(read_only)


def test_without_io_uring_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(38, "no")

    monkeypatch.setattr(parallel, "IoUring", refuse)
    buffer = memory()
    assert ParallelIo().copy([((-1, 0, [buffer]), (-1, 0, [buffer]))]) == [False]
