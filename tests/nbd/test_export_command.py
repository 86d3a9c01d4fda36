"""``xbd export``: what it says, and how it begins and ends."""

from __future__ import annotations

import os
import signal
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner
from export_process import Exported
from nbd_client import DISC, EXPORT_NAME, READ, WRITE, option, request

from xbd.cli import main
from xbd.core.units import MIB

Start = Callable[..., Exported]
Command = Callable[..., tuple[int, str]]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(MIB)
    return path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers; those that are left at the end are killed."""
    started: list[Exported] = []

    def begin(disk: str, *options: str) -> Exported:
        started.append(Exported(disk, tmp_path, *options))
        return started[-1]

    yield begin
    for exported in started:
        exported.kill()


@pytest.fixture
def xbd(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command that ends by itself, in this process: its status, and what it said."""
    monkeypatch.setattr("xbd.logs.setup_logs", lambda level, format_: None)

    def run(*words: object) -> tuple[int, str]:
        result = CliRunner().invoke(main, list(map(str, words)))
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.exit_code, result.stderr

    return run


def connect(path: Path, name: bytes = b"") -> socket.socket:
    """In the transmission phase, with simple replies."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(30)
    client.connect(str(path))
    client.sendall(struct.pack(">I", 3) + option(EXPORT_NAME, name))
    receive(client, 28)
    return client


def receive(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = client.recv(size - len(data))
        assert more, "the server hung up"
        data += more
    return data


def test_it_serves_until_told_to_stop(image: Path, start: Start, xbd: Command) -> None:
    exported = start(f"imagefile:{image}?cache=writeback", "--name", "a disk/1", "--mode", "660")
    assert exported.line == (
        f"serving imagefile:{image} at nbd+unix:///a%20disk%2F1?socket={exported.socket}\n"
    )
    assert stat.S_IMODE(exported.socket.stat().st_mode) == 0o660
    with connect(exported.socket, b"a disk/1") as client:
        client.sendall(request(WRITE, 4096, cookie=1, data=b"x" * 4096))
        assert receive(client, 16) == struct.pack(">IIQ", 0x67446698, 0, 1)
        status, said = xbd("export", f"imagefile:{image}", "--nbd", exported.socket.parent / "t")
        assert (status, said.count("\n")) == (1, 1)
        assert "locked by another process" in said
        assert exported.stop() == 0
        assert client.recv(1) == b""
    assert not exported.socket.exists()
    assert image.read_bytes()[4096:8192] == b"x" * 4096
    assert "stopping on SIGTERM" in exported.log.read_text()


def test_read_only_and_interrupted(image: Path, start: Start) -> None:
    exported = start(f"imagefile:{image}", "-r")
    with connect(exported.socket) as client:
        client.sendall(request(WRITE, 0, data=b"x" * 512) + request(READ, 0, 512, cookie=2))
        assert receive(client, 16)[:8] == struct.pack(">II", 0x67446698, 1)
        assert receive(client, 16 + 512)[16:] == bytes(512)
    assert exported.stop(signal.SIGINT) == 0
    assert not exported.socket.exists()


def test_it_ends_with_its_last_client(image: Path, start: Start) -> None:
    exported = start(f"imagefile:{image}", "--exit-after-last")
    with socket.socket(socket.AF_UNIX) as shy:  # who only looks in does not count
        shy.connect(str(exported.socket))
        receive_greeting = shy.recv(18)
        assert receive_greeting.startswith(b"NBDMAGIC")
    with connect(exported.socket) as first, connect(exported.socket) as second:
        first.sendall(request(DISC))
        assert first.recv(1) == b""
        assert exported.process.poll() is None
        second.sendall(request(DISC))
        assert exported.ended() == 0
    assert not exported.socket.exists()


def test_what_is_in_flight_is_answered_before_it_ends(image: Path, start: Start) -> None:
    exported = start(f"imagefile:{image}")
    with connect(exported.socket) as client:
        for number in range(64):
            client.sendall(request(WRITE, number * 4096, cookie=number, data=b"y" * 4096))
        receive(client, 16)
        exported.process.send_signal(signal.SIGTERM)
        answered = 16
        with suppress(ConnectionError):
            while more := client.recv(4096):
                answered += len(more)
    assert exported.ended() == 0
    assert answered % 16 == 0
    assert image.read_bytes().count(b"y" * 4096) >= answered // 16


def test_a_second_signal_ends_it_at_once(image: Path, start: Start) -> None:
    exported = start(f"imagefile:{image}")
    with connect(exported.socket) as client:  # who does not read is waited for
        client.sendall(b"".join(request(READ, 0, MIB, cookie=n) for n in range(8)))
        receive(client, 16)
        exported.process.send_signal(signal.SIGTERM)
        exported.logs("stopping on SIGTERM")
        assert exported.stop(signal.SIGINT) == 130
    assert not exported.socket.exists()


def test_a_killed_servers_socket_is_replaced_and_a_living_ones_is_not(
    image: Path, start: Start, tmp_path: Path, xbd: Command
) -> None:
    first = start(f"imagefile:{image}")
    first.process.kill()
    first.process.wait()
    assert first.socket.exists()
    second = start(f"imagefile:{image}")
    other = tmp_path / "other.img"
    other.write_bytes(bytes(4096))
    status, said = xbd("export", f"imagefile:{other}", "--nbd", second.socket)
    assert status == 1
    assert said == f"xbd: cannot listen on {second.socket}: another server is using it\n"
    with connect(second.socket) as client:
        client.sendall(request(READ, 0, 512))
        receive(client, 528)
    assert second.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["imagefile:/nowhere/x"], 1, "cannot open /nowhere/x: No such file"),
        (["nosuchdriver:/x"], 2, "nosuchdriver"),
        (["no disk"], 2, "not of the form DRIVER:PATH"),
        (["imagefile:IMAGE?cache=maybe"], 2, "cache: 'maybe' is none of"),
        (["imagefile:IMAGE", "--name", "x" * 5000], 2, "name has at most 4096 bytes"),
        (["imagefile:IMAGE", "--mode", "rw"], 2, "no mode such as 0660"),
        (["imagefile:IMAGE", "--mode", "1777"], 2, "no mode such as 0660"),
    ],
)
def test_mistakes_are_told_in_a_line(
    image: Path, tmp_path: Path, xbd: Command, arguments: list[str], status: int, text: str
) -> None:
    words = [word.replace("IMAGE", str(image)) for word in arguments]
    code, said = xbd("export", *words, "--nbd", tmp_path / "s")
    assert code == status
    assert text in said
    assert "Traceback" not in said
    assert not (tmp_path / "s").exists()


def test_a_directory_where_no_socket_can_be(image: Path, xbd: Command) -> None:
    code, said = xbd("export", f"imagefile:{image}", "--nbd", "/nowhere/s")
    assert (code, said) == (1, "xbd: cannot listen on /nowhere/s: No such file or directory\n")
    assert os.stat(image).st_size == MIB  # noqa: PTH116
