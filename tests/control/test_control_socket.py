"""The control socket: answers, limits, permissions, and a clear line for everything wrong."""

from __future__ import annotations

import json
import socket
import stat

import pytest
import trio

from xbd.core.control import protocol
from xbd.core.control.client import DaemonUnavailable, ask
from xbd.core.control.server import SocketUnavailable, listen, serve
from xbd.core.errors import ConfigError


async def _echo(arguments):
    return arguments


async def _refuse(_arguments):
    raise ConfigError("not today")


async def _bug(_arguments):
    raise RuntimeError("secret details")


HANDLERS = {"echo": _echo, "refuse": _refuse, "bug": _bug}


@pytest.fixture
async def control(tmp_path, nursery):
    path = tmp_path / "run" / "control.sock"
    await nursery.start(serve, path, HANDLERS)
    return path


async def test_a_command_gets_its_result(control):
    assert await ask(control, "echo", text="hallo", number=5) == {"text": "hallo", "number": 5}


async def test_the_socket_is_for_its_owner_alone(control):
    assert stat.S_IMODE(control.stat().st_mode) == 0o600


async def test_an_error_of_ours_is_told(control):
    with pytest.raises(DaemonUnavailable, match="not today"):
        await ask(control, "refuse")


async def test_a_bug_is_not_told_in_detail(control):
    with pytest.raises(DaemonUnavailable, match="its log says why"):
        await ask(control, "bug")
    assert await ask(control, "echo") == {}


async def test_an_unknown_command_names_the_known_ones(control):
    with pytest.raises(DaemonUnavailable, match=r"unknown command 'dance' \(known: bug, echo"):
        await ask(control, "dance")


async def test_several_requests_on_one_connection(control):
    async with await trio.open_unix_socket(control) as stream:
        reader = protocol.LineReader(stream, protocol.MAX_ANSWER)
        requests = [protocol.encode_request("echo", {"n": n}) for n in range(3)]
        await stream.send_all(b"".join(requests))
        for n in range(3):
            assert protocol.decode_answer(await reader.line()) == {"n": n}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"hello\n", "not a line of JSON"),
        (b"[" * 50000 + b"\n", "not a line of JSON"),
        (b"[1]\n", "not a JSON object"),
        (b'{"do":"echo"}\n', "another version"),
        (b'{"v":2,"do":"echo"}\n', "another version"),
        (b'{"v":1}\n', '"do", a name'),
        (b'{"v":1,"do":"echo","with":3}\n', '"do", a name'),
        (b"x" * (protocol.MAX_REQUEST + 2) + b"\n", "a line is longer than"),
        (b"\xff\xfe\n", "not a line of JSON"),
    ],
)
async def test_nonsense_is_answered_and_the_connection_closed(control, line, expected):
    async with await trio.open_unix_socket(control) as stream:
        await stream.send_all(line)
        reader = protocol.LineReader(stream, protocol.MAX_ANSWER)
        answer = json.loads(await reader.line())
        assert answer["ok"] is False
        assert expected in answer["error"]
    assert await ask(control, "echo") == {}


async def test_too_many_clients_are_refused(control):
    async with trio.open_nursery() as nursery:
        streams = [await trio.open_unix_socket(control) for _ in range(16)]
        for stream in streams:
            await stream.send_all(protocol.encode_request("echo", {}))
            await stream.receive_some()
        with pytest.raises(DaemonUnavailable, match="too many clients"):
            await ask(control, "echo")
        for stream in streams:
            nursery.start_soon(stream.aclose)


async def test_no_daemon_is_one_clear_line(tmp_path):
    with pytest.raises(DaemonUnavailable, match="no daemon is running: nothing answers on"):
        await ask(tmp_path / "absent.sock", "echo")


async def test_a_dead_daemons_socket_is_one_clear_line_and_replaced(tmp_path):
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(DaemonUnavailable, match="no daemon is running"):
        await ask(path, "echo")
    await listen(path).aclose()


async def test_a_second_daemon_is_refused(control):
    with pytest.raises(SocketUnavailable, match="another daemon is using it"):
        listen(control)


async def test_a_bad_place_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SocketUnavailable, match="cannot listen on control socket"):
        listen(tmp_path / "file")
    with pytest.raises(SocketUnavailable, match="cannot listen on control socket"):
        listen(tmp_path / "file" / "control.sock")
    with pytest.raises(SocketUnavailable, match="too long"):
        listen(tmp_path / ("x" * 120))


async def test_the_socket_is_removed_at_the_end(tmp_path):
    path = tmp_path / "control.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, path, HANDLERS)
        assert path.is_socket()
        nursery.cancel_scope.cancel()
    assert not path.exists()


async def test_a_client_that_hangs_up_harms_nobody(control):
    for _ in range(5):
        stream = await trio.open_unix_socket(control)
        await stream.send_all(protocol.encode_request("echo", {"x": "y" * 5000}) * 10)
        await stream.aclose()
    assert await ask(control, "echo") == {}
