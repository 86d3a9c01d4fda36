"""New files: whole or not at all, and never in another's place."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xbd.core.errors import ConfigError, DriverError, NoSpace, Unsupported
from xbd.core.hostio import newfile
from xbd.core.hostio.newfile import fill, new_file, publish, require_absent, reserve


def failing(number: int) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def test_a_file_appears(tmp_path: Path) -> None:
    with new_file(tmp_path / "a") as fd:
        os.write(fd, b"content")
    assert (tmp_path / "a").read_bytes() == b"content"
    assert (tmp_path / "a").stat().st_mode & 0o177 == 0o044 & ~current_umask()


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), new_file(tmp_path / "a"):
        fail(error)
    assert list(tmp_path.iterdir()) == []


def test_the_hosts_errors_are_a_drivers(tmp_path: Path) -> None:
    with pytest.raises(NoSpace, match=f"create {tmp_path}/a: No space"), new_file(tmp_path / "a"):
        failing(errno.ENOSPC)()
    assert list(tmp_path.iterdir()) == []


def test_another_file_that_came_meanwhile_stays(tmp_path: Path) -> None:
    def replace() -> None:
        (tmp_path / "a").unlink()
        (tmp_path / "a").write_bytes(b"precious")
        fail(ValueError("x"))

    with pytest.raises(ValueError, match="x"), new_file(tmp_path / "a"):
        replace()
    assert (tmp_path / "a").read_bytes() == b"precious"


def test_a_flush_that_fails_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newfile.os, "fsync", failing(errno.EIO))
    with pytest.raises(DriverError, match="Input/output"), new_file(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_publishing(tmp_path: Path) -> None:
    (tmp_path / "draft").write_bytes(b"content")
    publish(tmp_path / "draft", tmp_path / "a")
    assert {entry.name for entry in tmp_path.iterdir()} == {"a"}


@pytest.mark.parametrize("links", [True, False])
def test_publishing_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(newfile.os, "link", failing(errno.EPERM))
    (tmp_path / "draft").write_bytes(b"content")
    (tmp_path / "a").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="exists already"):
        require_absent(tmp_path / "a")
    with pytest.raises(ConfigError, match="exists already"):
        publish(tmp_path / "draft", tmp_path / "a")
    assert (tmp_path / "draft").read_bytes() == b"content"
    assert (tmp_path / "a").is_symlink()


def test_publishing_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newfile.os, "link", failing(errno.EPERM))
    (tmp_path / "draft").write_bytes(b"content")
    publish(tmp_path / "draft", tmp_path / "a")
    assert {entry.name for entry in tmp_path.iterdir()} == {"a"}


@pytest.mark.parametrize("allocate", [reserve, fill])
def test_space_is_taken_and_told(tmp_path: Path, allocate: Callable[..., None]) -> None:
    told: list[int] = []
    path = tmp_path / "a"
    with new_file(path) as fd:
        os.write(fd, b"content")
        allocate(path, fd, 4096, 20_000_000, told.append)
    assert sum(told) == 20_000_000
    assert path.stat().st_size == 20_004_096
    assert path.stat().st_blocks * 512 >= 20_000_000
    assert path.read_bytes() == b"content".ljust(20_004_096, b"\0")


def test_a_filesystem_that_cannot_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newfile, "fallocate", failing(errno.EOPNOTSUPP))
    with pytest.raises(Unsupported, match="use preallocation=full"), new_file(tmp_path / "a") as fd:
        reserve(tmp_path / "a", fd, 0, 4096, lambda _: None)
    monkeypatch.setattr(newfile, "fallocate", failing(errno.ENOSPC))
    with pytest.raises(NoSpace), new_file(tmp_path / "a") as fd:
        reserve(tmp_path / "a", fd, 0, 4096, lambda _: None)
    assert list(tmp_path.iterdir()) == []
