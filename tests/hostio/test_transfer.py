"""Whole transfers, with the kernel's short ones played by hand."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbd.core.hostio.transfer import (
    IOV_MAX,
    read_full,
    total,
    write_full,
    write_zero_bytes,
    zero_tail,
)
from xbd.core.units import MIB


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def split(data: bytearray, sizes: Sequence[int]) -> list[memoryview]:
    view, parts = memoryview(data), []
    for size in sizes:
        parts.append(view[:size])
        view = view[size:]
    return parts


def test_more_buffers_than_the_kernel_takes_at_once(file: int) -> None:
    sizes = [3] * (2 * IOV_MAX + 5)
    source = bytearray(os.urandom(sum(sizes)))
    write_full(file, split(source, sizes), 100)
    target = bytearray(len(source))
    assert read_full(file, split(target, sizes), 100) == len(source)
    assert target == source


def test_a_read_past_the_end_tells_how_much_there_was(file: int) -> None:
    os.pwrite(file, b"abcdef", 0)
    target = bytearray(b"------------")
    assert read_full(file, split(target, [4, 4, 4]), 2) == 4
    assert target == b"cdef--------"
    assert read_full(file, split(target, [4]), 6) == 0


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    steps=st.lists(st.integers(1, 7), min_size=120, max_size=120),
)
def test_short_transfers_go_on_through_the_other_descriptor(
    sizes: list[int], steps: list[int]
) -> None:
    content = bytes(range(sum(sizes)))
    fds: list[int] = []
    todo = iter(steps)
    stored = bytearray(len(content))

    def short_preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        fds.append(fd)
        count = done = min(next(todo), total(buffers))
        for buffer in buffers:
            part = min(count, len(buffer))
            buffer[:part] = content[offset : offset + part]
            offset, count = offset + part, count - part
        return done

    def short_pwritev(fd: int, buffers: list[memoryview], offset: int) -> int:
        fds.append(fd)
        data = b"".join(buffers)[: next(todo)]
        stored[offset : offset + len(data)] = data
        return len(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", short_preadv)
        patch.setattr(os, "pwritev", short_pwritev)
        target = bytearray(len(content))
        assert read_full(5, split(target, sizes), 0, 6) == len(content)
        assert target == content
        assert fds == [5] + [6] * (len(fds) - 1)
        write_full(7, split(target, sizes), 0)
        assert stored == content


def test_a_write_of_nothing_is_an_error_not_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    with pytest.raises(OSError, match="Input/output") as caught:
        write_full(1, [memoryview(b"x")], 0)
    assert caught.value.errno == errno.EIO


@given(sizes=st.lists(st.integers(0, 6), max_size=8), start=st.integers(0, 50))
def test_zero_tail_fills_from_the_byte_named(sizes: list[int], start: int) -> None:
    data = bytearray(b"x" * sum(sizes))
    zero_tail(split(data, sizes), start)
    kept = min(start, len(data))
    assert data == b"x" * kept + bytes(len(data) - kept)


def test_zeroes_are_written_in_any_length(file: int) -> None:
    os.pwrite(file, b"x" * (2 * MIB + 30), 0)
    write_zero_bytes(file, 7, 2 * MIB + 9)
    content = os.pread(file, 3 * MIB, 0)
    assert content == b"x" * 7 + bytes(2 * MIB + 9) + b"x" * 14
