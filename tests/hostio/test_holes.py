"""Where files have data and where holes."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbd.core.hostio import holes
from xbd.core.hostio.holes import data_runs
from xbd.core.hostio.zero import punch_hole

BLOCK = 65536
"""No filesystem has larger ones."""


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("holes")
    yield fd
    os.close(fd)


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(0, 19), st.integers(1, 20))
def test_runs_are_what_was_written(blocks: list[bool], first: int, count: int) -> None:
    fd = os.memfd_create("holes")
    try:
        os.ftruncate(fd, len(blocks) * BLOCK)
        for number, written in enumerate(blocks):
            if written:
                os.pwrite(fd, b"x", number * BLOCK)
        first %= len(blocks)
        start, length = first * BLOCK + 512, count * BLOCK - 512
        runs = data_runs(fd, start, length)
        # One block of data in a hole of a memfd is as long as a page.
        page = os.sysconf("SC_PAGE_SIZE")
        expected = b"".join(bytes([written]) * page + bytes(BLOCK - page) for written in blocks)[
            start : start + length
        ]
        assert b"".join(bytes([data]) * size for size, data in runs) == expected
        assert all(size > 0 for size, _ in runs)
        assert all(a[1] != b[1] for a, b in itertools.pairwise(runs))
    finally:
        os.close(fd)


def test_files_of_the_filesystem_have_holes_too(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(16 * BLOCK)
        file.seek(4 * BLOCK)
        file.write(b"x" * BLOCK)
        file.flush()
        assert data_runs(file.fileno(), 0, 16 * BLOCK) == [
            (4 * BLOCK, False),
            (BLOCK, True),
            (11 * BLOCK, False),
        ]
        punch_hole(file.fileno(), 4 * BLOCK, BLOCK)
        assert data_runs(file.fileno(), BLOCK, BLOCK * 15) == [(15 * BLOCK, False)]


def test_nothing_is_known_behind_the_end(fd: int) -> None:
    os.ftruncate(fd, 4096)
    assert data_runs(fd, 4096, 512) == [(512, True)]
    assert data_runs(fd, 0, 1 << 40) == [(4096, False)]


def test_what_is_no_file_is_data() -> None:
    fd = os.open("/dev/zero", os.O_RDONLY)
    try:
        assert data_runs(fd, 0, 4096) == [(4096, True)]
    finally:
        os.close(fd)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_filesystems_that_do_not_tell(fd: int, number: int, monkeypatch) -> None:
    def refuse(*_: int) -> int:
        raise OSError(number, os.strerror(number))

    os.ftruncate(fd, 8192)
    monkeypatch.setattr(os, "lseek", refuse)
    assert data_runs(fd, 0, 8192) == [(8192, True)]


def test_other_errors_are_told(fd: int, monkeypatch) -> None:
    def fail(*_: int) -> int:
        raise OSError(errno.EIO, "bad")

    os.ftruncate(fd, 8192)
    monkeypatch.setattr(os, "lseek", fail)
    with pytest.raises(OSError, match="bad"):
        data_runs(fd, 0, 8192)


def test_the_answer_is_bounded(fd: int, monkeypatch) -> None:
    monkeypatch.setattr(holes, "MAX_LOOKS", 4)
    page = os.sysconf("SC_PAGE_SIZE")
    os.ftruncate(fd, 64 * page)
    for number in range(1, 64, 2):
        os.pwrite(fd, b"x", number * page)
    assert data_runs(fd, 0, 64 * page) == [(page, False), (page, True)] * 4


def test_a_hole_made_meanwhile_is_no_empty_run(fd: int, monkeypatch) -> None:
    os.ftruncate(fd, 4 * BLOCK)
    os.pwrite(fd, b"x" * BLOCK, BLOCK)
    lseek = os.lseek

    def punched(fd: int, offset: int, what: int) -> int:
        if what == os.SEEK_HOLE:
            punch_hole(fd, BLOCK, BLOCK)
        return lseek(fd, offset, what)

    monkeypatch.setattr(os, "lseek", punched)
    runs = data_runs(fd, 0, 4 * BLOCK)
    assert all(size for size, _ in runs)
    assert sum(size for size, _ in runs) == 4 * BLOCK
    assert not any(data for _, data in runs)
