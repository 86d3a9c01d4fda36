"""Opening, sizes, alignment and errors of host files."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from xbd.core.errors import DeviceBroken, DriverError, MediaError, NoSpace, OpenFailed, Unsupported
from xbd.core.hostio import files
from xbd.core.hostio.failures import io_failure, open_failure, shown
from xbd.core.hostio.files import (
    O_DIRECT,
    DirectAlignment,
    direct_alignment,
    kind_of,
    open_again,
    open_file,
    size_of,
    stat_path,
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(16384))
    return path


@pytest.fixture
def direct_fd(image: Path) -> int:
    try:
        return open_file(image, writable=False, flags=O_DIRECT)
    except OSError:
        pytest.skip(f"no O_DIRECT on the filesystem of {image}")


def test_opened_files_are_not_inherited(image: Path) -> None:
    fd = open_file(image, writable=True)
    assert not os.get_inheritable(fd)
    assert size_of(fd) == 16384
    os.close(fd)


def test_a_file_opened_for_reading_refuses_writes(image: Path) -> None:
    fd = open_file(image, writable=False)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(fd, b"x", 0)
    os.close(fd)


def test_direct_alignment_is_what_the_kernel_accepts(direct_fd: int) -> None:
    alignment = direct_alignment(direct_fd)
    assert alignment is not None
    for number in (alignment.offset, alignment.memory):
        assert number & (number - 1) == 0
        assert 1 <= number <= 65536
    os.close(direct_fd)


def test_where_the_kernel_does_not_tell_alignment_is_found_by_trying(
    direct_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = direct_alignment(direct_fd)
    monkeypatch.setattr(files, "_statx", None)
    tried = direct_alignment(direct_fd)
    assert told is not None
    assert tried is not None
    assert tried.offset == max(512, told.offset)
    assert tried.memory >= told.memory
    os.close(direct_fd)


def test_a_filesystem_that_demands_more_than_a_page_has_no_direct_io_for_us(
    direct_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "refused")

    monkeypatch.setattr(files, "_statx", None)
    monkeypatch.setattr(os, "preadv", refuse)
    assert direct_alignment(direct_fd) is None
    monkeypatch.setattr(files, "_statx_alignment", lambda fd: DirectAlignment(offset=0, memory=0))
    assert direct_alignment(direct_fd) is None
    os.close(direct_fd)


def test_a_file_replaced_between_two_opens_is_noticed(image: Path) -> None:
    fd = open_file(image, writable=False)
    same = open_again(image, fd, writable=False)
    os.close(same)
    image.rename(image.with_name("old"))
    image.write_bytes(b"new")
    with pytest.raises(OpenFailed, match="was replaced"):
        open_again(image, fd, writable=False)
    os.close(fd)


def test_kinds_are_told_in_words(tmp_path: Path, image: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert kind_of(stat_path(image)) == "regular file"
    assert kind_of(stat_path(tmp_path)) == "directory"
    assert kind_of(stat_path(tmp_path / "pipe")) == "named pipe"
    assert kind_of(stat_path(Path("/dev/null"))) == "character device"
    assert stat.S_ISREG(stat_path(image).st_mode)


def test_a_missing_file_is_told_with_its_errno(tmp_path: Path) -> None:
    with pytest.raises(OpenFailed) as caught:
        stat_path(tmp_path / "nothing")
    assert caught.value.errno == errno.ENOENT
    assert str(caught.value).endswith("nothing: No such file or directory (errno 2, ENOENT)")


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EIO, MediaError),
        (errno.EROFS, MediaError),
        (errno.ENOSPC, NoSpace),
        (errno.EDQUOT, NoSpace),
        (errno.EOPNOTSUPP, Unsupported),
        (errno.ENODEV, DeviceBroken),
        (errno.EBADF, DeviceBroken),
    ],
)
def test_errnos_become_the_error_that_owns_what_happens(
    number: int, kind: type[DriverError]
) -> None:
    error = io_failure("write /disk", number)
    assert type(error) is kind
    assert error.errno == number
    assert f"errno {number}, {errno.errorcode[number]}" in str(error)


def test_advice_follows_the_reason() -> None:
    assert str(open_failure("no", errno.EACCES, "ask")) == (
        "no: Permission denied (errno 13, EACCES); ask"
    )


def test_paths_of_any_bytes_fit_in_one_line() -> None:
    assert shown(Path("/a b/ü")) == "/a b/ü"
    assert shown(Path("/a\nb")) == r"'/a\nb'"
    assert shown(Path(os.fsdecode(b"/\xff"))) == r"'/\udcff'"
