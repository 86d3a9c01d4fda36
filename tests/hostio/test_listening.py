"""The socket's file: whose it may be, and what is left of it."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from xbd.core.nbd import SocketUnavailable, listening


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o777])
def test_permissions_are_as_wished(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "s"
    with listening(path, mode) as sock:
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert not sock.getblocking()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()
    assert sock.fileno() == -1


def test_what_a_dead_server_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    with listening(path):
        assert path.is_socket()


@pytest.mark.parametrize("backlog", [0, 5])
def test_a_living_server_is_left_alone(tmp_path: Path, backlog: int) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(path))
        living.listen(backlog)
        for _ in range(3):  # with 0, its queue is full from some time on
            with pytest.raises(SocketUnavailable, match="another server is using it"):
                listening(path).__enter__()
        assert path.is_socket()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("file", "Address already in use"),
        ("nowhere/s", "No such file or directory"),
        ("x" * 200, "too long"),
    ],
)
def test_other_trouble_is_one_line(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(SocketUnavailable, match=why) as caught:
        listening(tmp_path / name).__enter__()
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "precious"


def test_somebody_elses_socket_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listening(path):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            inode = path.stat().st_ino
    assert path.stat().st_ino == inode
    with listening(path):
        os.unlink(path)  # noqa: PTH108
