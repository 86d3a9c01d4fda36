"""Locks against other processes: xbd's own, and QEMU's tools as the other side."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from xbd.core.errors import OpenFailed
from xbd.core.hostio import locks
from xbd.core.hostio.locks import lock_file, while_busy

OTHER_PROCESS = """
import os, sys
from xbd.core.hostio.locks import lock_file
exclusive = sys.argv[2] == "writer"
fd = os.open(sys.argv[1], os.O_RDWR if exclusive else os.O_RDONLY)
lock_file(fd, "it", exclusive=exclusive)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(65536))
    return path


@contextmanager
def held_by_another_process(image: Path, role: str) -> Iterator[None]:
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, str(image), role],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"locked\n"
        yield
        process.stdin.close()


@contextmanager
def opened(image: Path, role: str) -> Iterator[int]:
    fd = os.open(image, os.O_RDWR if role == "writer" else os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("first", "second"), [("writer", "writer"), ("writer", "reader"), ("reader", "writer")]
)
def test_a_writer_is_alone(image: Path, first: str, second: str) -> None:
    with opened(image, second) as fd:
        with held_by_another_process(image, first), pytest.raises(OpenFailed) as caught:
            lock_file(fd, "/the/image", exclusive=second == "writer")
        assert caught.value.errno == errno.EBUSY
        text = str(caught.value)
        assert text.startswith("/the/image is locked by another process: ")
        assert "errno 16, EBUSY" in text
        lock_file(fd, "/the/image", exclusive=second == "writer")


def test_readers_share(image: Path) -> None:
    with opened(image, "reader") as fd, held_by_another_process(image, "reader"):
        lock_file(fd, "it", exclusive=False)


def test_two_openings_in_one_process_are_two_sides(image: Path) -> None:
    with opened(image, "writer") as one, opened(image, "writer") as other:
        lock_file(one, "it", exclusive=True)
        with pytest.raises(OpenFailed):
            lock_file(other, "it", exclusive=True)


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="needs qemu-io")
@pytest.mark.parametrize(
    ("ours", "qemu", "allowed"),
    [
        ("writer", ["-r"], False),
        ("writer", [], False),
        ("reader", ["-r"], True),
        ("reader", [], False),
    ],
)
def test_qemu_keeps_out_of_our_images(
    image: Path, ours: str, qemu: list[str], allowed: bool
) -> None:
    with opened(image, ours) as fd:
        lock_file(fd, "it", exclusive=ours == "writer")
        command = ["qemu-io", *qemu, "-f", "raw", "-c", "read 0 512", str(image)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is allowed, done.stderr
    assert allowed or "lock" in done.stderr


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="needs qemu-io")
@pytest.mark.parametrize(
    ("qemu", "ours", "allowed"),
    [
        ([], "writer", False),
        ([], "reader", False),
        (["-r"], "writer", False),
        (["-r"], "reader", True),
    ],
)
def test_we_keep_out_of_qemus_images(
    image: Path, qemu: list[str], ours: str, allowed: bool
) -> None:
    with (
        opened(image, ours) as fd,
        subprocess.Popen(
            ["qemu-io", *qemu, "-f", "raw", str(image)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"length\n")
        process.stdin.flush()
        while b"64 KiB" not in process.stdout.readline():
            assert process.poll() is None
        try:
            lock_file(fd, "it", exclusive=ours == "writer")
            got_it = True
        except OpenFailed:
            got_it = False
        process.stdin.write(b"quit\n")
        process.stdin.flush()
    assert got_it is allowed


def test_a_filesystem_without_locks_is_told(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "fcntl", no_locks)
    with opened(image, "writer") as fd, pytest.raises(OpenFailed, match="locking=no") as caught:
        lock_file(fd, "it", exclusive=True)
    assert caught.value.errno == errno.ENOLCK


def test_a_system_without_these_locks_uses_flock(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(fcntl, "F_OFD_SETLK")
    with opened(image, "writer") as one, opened(image, "reader") as other:
        lock_file(one, "it", exclusive=True)
        with pytest.raises(OpenFailed) as caught:
            lock_file(other, "it", exclusive=False)
        assert caught.value.errno == errno.EBUSY


async def test_a_lock_that_is_given_up_soon_is_waited_for(
    autojump_clock: trio.testing.MockClock,
) -> None:
    answers = [errno.EBUSY, errno.EBUSY, 0]

    async def attempt() -> str:
        number = answers.pop(0)
        if number:
            raise OpenFailed("busy", errno=number)
        return "open"

    assert await while_busy(attempt) == "open"


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EACCES])
async def test_other_failures_and_long_ones_are_raised(
    autojump_clock: trio.testing.MockClock, number: int
) -> None:
    async def attempt() -> None:
        raise OpenFailed("no", errno=number)

    start = trio.current_time()
    with pytest.raises(OpenFailed):
        await while_busy(attempt)
    waited = trio.current_time() - start
    assert waited == pytest.approx(locks.PATIENCE_SECONDS if number == errno.EBUSY else 0)
