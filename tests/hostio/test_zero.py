"""The ladder of means for holes and zeroes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from xbd.core.hostio import zero
from xbd.core.hostio.transfer import write_zero_bytes
from xbd.core.hostio.zero import FileSpace, fallocate

PUNCH, ZERO, ALLOCATE = 0x2, 0x10, 0x0
BLOCK = 65536


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"x" * (4 * BLOCK), 0)
    os.fsync(fd)
    yield fd
    os.close(fd)


class Kernel:
    """Lets some modes of fallocate through to the real one and refuses the others."""

    def __init__(self, refused: set[int], number: int = errno.EOPNOTSUPP) -> None:
        self.refused = refused
        self.number = number
        self.asked: list[int] = []

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        means = mode & ~0x1
        self.asked.append(means)
        if means in self.refused:
            raise OSError(self.number, os.strerror(self.number))
        fallocate(fd, mode, offset, length)


def space_on(fd: int) -> FileSpace:
    return FileSpace(fd, lambda offset, length: write_zero_bytes(fd, offset, length))


def allocated(fd: int) -> int:
    os.fsync(fd)
    return os.fstat(fd).st_blocks * 512


def need_real_holes(fd: int) -> None:
    try:
        fallocate(fd, 0x11, 8 * BLOCK, BLOCK)
        fallocate(fd, 0x3, 8 * BLOCK, BLOCK)
    except OSError:
        pytest.skip("the filesystem of the temporary directory has no holes or no ZERO_RANGE")


@pytest.mark.parametrize("may_unmap", [True, False])
@pytest.mark.parametrize(
    "refused", [set(), {ZERO}, {PUNCH}, {ZERO, PUNCH}, {ZERO, ALLOCATE}, {ZERO, PUNCH, ALLOCATE}]
)
def test_whatever_the_kernel_refuses_the_range_reads_as_zeroes(
    file: int, monkeypatch: pytest.MonkeyPatch, refused: set[int], may_unmap: bool
) -> None:
    need_real_holes(file)
    kernel = Kernel(refused)
    monkeypatch.setattr(zero, "fallocate", kernel.fallocate)
    space = space_on(file)
    for _ in range(2):
        os.pwrite(file, b"x" * (4 * BLOCK), 0)
        space.zero(BLOCK - 512, BLOCK + 1024, may_unmap=may_unmap)
        content = os.pread(file, 4 * BLOCK, 0)
        assert content[: BLOCK - 512] == b"x" * (BLOCK - 512)
        assert content[BLOCK - 512 : 2 * BLOCK + 512] == bytes(BLOCK + 1024)
        assert content[2 * BLOCK + 512 :] == b"x" * (2 * BLOCK - 512)
        assert len(content) == 4 * BLOCK
    for means in refused:
        assert kernel.asked.count(means) <= 1


def test_space_is_freed_only_where_allowed(file: int) -> None:
    need_real_holes(file)
    space = space_on(file)
    full = allocated(file)
    space.zero(BLOCK, BLOCK, may_unmap=False)
    assert allocated(file) == full
    space.zero(BLOCK, BLOCK, may_unmap=True)
    assert allocated(file) <= full - BLOCK
    assert space.discard(2 * BLOCK, BLOCK)
    assert allocated(file) <= full - 2 * BLOCK
    space.zero(BLOCK, BLOCK, may_unmap=False)
    assert allocated(file) >= full - BLOCK


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EFBIG])
def test_an_error_of_one_call_is_raised_and_spoils_no_means(
    file: int, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    kernel = Kernel({PUNCH}, number)
    monkeypatch.setattr(zero, "fallocate", kernel.fallocate)
    space = space_on(file)
    for _ in range(2):
        with pytest.raises(OSError, match=os.strerror(number)):
            space.discard(0, BLOCK)
    assert kernel.asked == [PUNCH, PUNCH]


def test_asking_whether_holes_can_be_made_changes_nothing(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_real_holes(file)
    before = allocated(file)
    assert space_on(file).can_discard(4 * BLOCK)
    assert allocated(file) == before
    assert os.pread(file, 5 * BLOCK, 0) == b"x" * (4 * BLOCK)
    monkeypatch.setattr(zero, "fallocate", Kernel({PUNCH}).fallocate)
    assert not space_on(file).can_discard(4 * BLOCK)


def test_a_system_without_fallocate_writes_zeroes(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero, "_fallocate", None)
    space = space_on(file)
    space.zero(0, 512, may_unmap=True)
    assert os.pread(file, 513, 0) == bytes(512) + b"x"
    assert not space.discard(0, 512)
