"""The handshake: every option, every refusal, in whatever pieces it arrives."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbd_client import (
    ABORT,
    ACK,
    ERR_INVALID,
    ERR_POLICY,
    ERR_UNKNOWN,
    ERR_UNSUP,
    EXPORT_NAME,
    GO,
    INFO,
    LIST,
    LIST_META,
    PEEK_EXPORT,
    REP_INFO,
    REP_META,
    SERVER,
    SET_META,
    STARTTLS,
    STRUCTURED,
    info,
    option,
    queries,
    string,
)

from xbd.core.driver import BlockDevice, Capability, Concurrency, DeviceAccess, Geometry
from xbd.core.driver.testing import ALL_CAPABILITIES
from xbd.core.errors import ConfigError
from xbd.core.nbd import Export
from xbd.core.nbd.errors import BadClient
from xbd.core.nbd.negotiation import MAX_OPTION, Negotiation

SIZE = 1 << 20
HELLO = struct.pack(">I", 3)
ALLOCATION = b"base:allocation"

READ_ONLY, FLUSH, FUA, TRIM, ZEROES, DF, MULTI, CACHE = (1 << n for n in (1, 2, 3, 5, 6, 7, 8, 10))
ALWAYS = 1 | MULTI | CACHE
WRITABLE = ALWAYS | FLUSH | FUA | ZEROES


class Shape(BlockDevice):
    """A disk to look at."""

    geometry = Geometry(size=SIZE, physical_block=8192)

    def __init__(self, capabilities: Capability) -> None:
        self.is_capable_of = capabilities

    @property
    def capabilities(self) -> Capability:
        return self.is_capable_of

    async def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError


def export(
    *,
    name: str = "disk",
    description: str = "",
    writable: bool = True,
    capabilities: Capability = ALL_CAPABILITIES,
) -> Export:
    access = DeviceAccess(
        Shape(capabilities), device_id="x", concurrency=Concurrency.SERIAL, writable=writable
    )
    return Export(access=access, name=name, description=description)


def talk(negotiation: Negotiation, *pieces: bytes) -> bytes:
    """What the server says to all of it."""
    said = []
    for piece in pieces:
        negotiation.receive(piece)
        while (reply := negotiation.next_reply()) is not None:
            said.append(reply)
    return b"".join(said)


def replies(said: bytes) -> list[tuple[int, int, bytes]]:
    """Option, kind and data of each."""
    found = []
    while said:
        magic, number, kind, length = struct.unpack_from(">QIII", said)
        assert magic == 0x3E889045565A9
        found.append((number, kind, said[20 : 20 + length]))
        said = said[20 + length :]
    return found


def ask(number: int, data: bytes = b"", **how) -> list[tuple[int, bytes]]:
    """The replies to one option by itself."""
    said = replies(talk(Negotiation(export(**how)), HELLO, option(number, data)))
    assert all(answered == number for answered, _, _ in said)
    return [(kind, payload) for _, kind, payload in said]


def test_the_greeting() -> None:
    assert Negotiation.greeting == b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)


@pytest.mark.parametrize("flags", [4, 7, 1 << 31])
def test_unknown_client_flags_end_it(flags: int) -> None:
    with pytest.raises(BadClient, match="client flags"):
        talk(Negotiation(export()), struct.pack(">I", flags))


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
@pytest.mark.parametrize("name", [b"", b"disk"])
def test_export_name(flags: int, name: bytes) -> None:
    negotiation = Negotiation(export())
    said = talk(negotiation, struct.pack(">I", flags), option(EXPORT_NAME, name) + b"next")
    padding = b"" if flags & 2 else bytes(124)
    assert said == struct.pack(">QH", SIZE, WRITABLE | TRIM) + padding
    assert negotiation.agreed is not None
    assert not negotiation.agreed.structured
    assert not negotiation.agreed.allocation
    assert negotiation.rest == b"next"


@pytest.mark.parametrize("name", [b"other", b"Disk", b"disk\0", b"\xff", b"x" * 5000])
def test_a_wrong_export_name_ends_it(name: bytes) -> None:
    with pytest.raises(BadClient, match="not here"):
        talk(Negotiation(export()), HELLO, option(EXPORT_NAME, name))


def test_go_and_info_tell_what_is_asked() -> None:
    negotiation = Negotiation(export(description="two words"))
    said = talk(negotiation, HELLO, option(INFO, info(b"disk", 3, 2, 1, 77)))
    *infos, end = replies(said)
    assert end == (INFO, ACK, b"")
    assert all((number, kind) == (INFO, REP_INFO) for number, kind, _ in infos)
    assert {payload for _, _, payload in infos} == {
        struct.pack(">HQH", 0, SIZE, WRITABLE | TRIM),
        struct.pack(">H", 1) + b"disk",
        struct.pack(">H", 2) + b"two words",
        struct.pack(">HIII", 3, 512, 8192, 32 << 20),
    }
    assert negotiation.agreed is None
    again = talk(negotiation, option(GO, info(b"disk", 3, 2, 1, 77)))
    assert replies(again)[:-1] == [(GO, kind, payload) for _, kind, payload in infos]
    assert negotiation.agreed is not None


def test_little_is_told_to_who_asks_for_nothing() -> None:
    assert ask(GO, info()) == [
        (REP_INFO, struct.pack(">HQH", 0, SIZE, WRITABLE | TRIM)),
        (ACK, b""),
    ]


@pytest.mark.parametrize("number", [INFO, GO])
@pytest.mark.parametrize(
    ("data", "error"),
    [
        (info(b"nothing"), ERR_UNKNOWN),
        (b"", ERR_INVALID),
        (b"\0\0\0", ERR_INVALID),
        (struct.pack(">I", 100) + b"disk\0\0", ERR_INVALID),
        (struct.pack(">I", 2**32 - 1) + b"\0\0", ERR_INVALID),
        (string(b"disk"), ERR_INVALID),
        (info(b"disk", 1, 2)[:-1], ERR_INVALID),
        (info(b"disk") + b"\0", ERR_INVALID),
        (string(b"x" * 4097) + b"\0\0", ERR_INVALID),
    ],
)
def test_go_and_info_refuse(number: int, data: bytes, error: int) -> None:
    negotiation = Negotiation(export())
    ((_, kind, text),) = replies(talk(negotiation, HELLO, option(number, data)))
    assert kind == error
    assert text.decode().isprintable()
    assert negotiation.agreed is None
    assert replies(talk(negotiation, option(GO, info(b"disk"))))[-1] == (GO, ACK, b"")


def test_list() -> None:
    assert ask(LIST, description="words") == [(SERVER, string(b"disk") + b"words"), (ACK, b"")]
    ((kind, _),) = ask(LIST, b"x")
    assert kind == ERR_INVALID


def test_abort_ends_it_whatever_comes_along() -> None:
    negotiation = Negotiation(export())
    said = talk(negotiation, HELLO, option(ABORT, b"ignored") + option(LIST))
    assert replies(said) == [(ABORT, ACK, b"")]
    assert negotiation.over
    assert negotiation.agreed is None


@pytest.mark.parametrize(
    ("number", "error"),
    [(STARTTLS, ERR_POLICY), (PEEK_EXPORT, ERR_UNSUP), (11, ERR_UNSUP), (2**32 - 1, ERR_UNSUP)],
)
def test_other_options_are_refused_and_it_goes_on(number: int, error: int) -> None:
    negotiation = Negotiation(export())
    said = talk(negotiation, HELLO, option(number, b"whatever"))
    ((answered, kind, _),) = replies(said)
    assert (answered, kind) == (number, error)
    assert replies(talk(negotiation, option(LIST)))[-1] == (LIST, ACK, b"")


def test_structured_replies() -> None:
    negotiation = Negotiation(export())
    ((_, kind, _),) = replies(talk(negotiation, HELLO, option(STRUCTURED, b"x")))
    assert kind == ERR_INVALID
    assert replies(talk(negotiation, option(STRUCTURED))) == [(STRUCTURED, ACK, b"")]
    (_, _, told), _ = replies(talk(negotiation, option(GO, info())))
    assert told == struct.pack(">HQH", 0, SIZE, WRITABLE | TRIM | DF)
    assert negotiation.agreed is not None
    assert negotiation.agreed.structured
    assert not negotiation.agreed.allocation


@pytest.mark.parametrize(
    ("how", "flags"),
    [
        ({"writable": False}, ALWAYS | READ_ONLY),
        ({"capabilities": Capability.NONE}, ALWAYS | READ_ONLY),
        ({"capabilities": Capability.WRITE}, WRITABLE),
        ({"capabilities": Capability.WRITE | Capability.FLUSH}, WRITABLE),
        ({"capabilities": Capability.WRITE | Capability.DISCARD}, WRITABLE | TRIM),
    ],
)
def test_flags_follow_capabilities(how: dict[str, object], flags: int) -> None:
    assert ask(GO, info(), **how)[0][1] == struct.pack(">HQH", 0, SIZE, flags)


# -- metadata contexts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ([], True),
        ([b"base:"], True),
        ([ALLOCATION], True),
        ([b"qemu:dirty-bitmap:x", ALLOCATION], True),
        ([b"qemu:"], False),
        ([b"base:allocationx"], False),
        ([b"base"], False),
    ],
)
def test_listing_contexts(wanted: list[bytes], found: bool) -> None:
    said = ask(LIST_META, queries(b"disk", *wanted))
    context = [(REP_META, struct.pack(">I", 0) + ALLOCATION)] if found else []
    assert said == [*context, (ACK, b"")]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ([], False),
        ([b"base:"], False),
        ([ALLOCATION, ALLOCATION], True),
        ([b"base:x", b"", ALLOCATION], True),
    ],
)
def test_selecting_contexts(wanted: list[bytes], found: bool) -> None:
    negotiation = Negotiation(export())
    talk(negotiation, HELLO, option(STRUCTURED))
    said = replies(talk(negotiation, option(SET_META, queries(b"disk", *wanted))))
    assert [kind for _, kind, _ in said] == [REP_META, ACK][not found :]
    talk(negotiation, option(GO, info(b"disk")))
    assert negotiation.agreed is not None
    assert negotiation.agreed.allocation == found


def test_the_last_selection_counts_and_only_for_its_export() -> None:
    for steps, selected in (
        ([queries(b"disk", ALLOCATION)], True),
        ([queries(b"disk", ALLOCATION), queries(b"disk")], False),
        ([queries(b"disk", ALLOCATION), b"malformed"], False),
        ([queries(b"disk", ALLOCATION), queries(b"other", ALLOCATION)], False),
        ([queries(b"", ALLOCATION)], False),
        ([queries(b"other", ALLOCATION), queries(b"disk", ALLOCATION)], True),
    ):
        negotiation = Negotiation(export())
        talk(negotiation, HELLO, option(STRUCTURED), *(option(SET_META, step) for step in steps))
        talk(negotiation, option(EXPORT_NAME, b"disk"))
        assert negotiation.agreed is not None
        assert negotiation.agreed.allocation == selected, steps


@pytest.mark.parametrize("number", [LIST_META, SET_META])
@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", ERR_INVALID),
        (queries(b"disk", ALLOCATION)[:-1], ERR_INVALID),
        (queries(b"disk", ALLOCATION) + b"\0", ERR_INVALID),
        (string(b"disk") + struct.pack(">I", 2**32 - 1), ERR_INVALID),
        (string(b"disk") + struct.pack(">II", 1, 2**32 - 1), ERR_INVALID),
        (queries(b"other", ALLOCATION), ERR_UNKNOWN),
    ],
)
def test_contexts_refused(number: int, data: bytes, error: int) -> None:
    negotiation = Negotiation(export())
    talk(negotiation, HELLO, option(STRUCTURED))
    ((_, kind, _),) = replies(talk(negotiation, option(number, data)))
    assert kind == error


def test_contexts_need_structured_replies() -> None:
    ((kind, _),) = ask(SET_META, queries(b"disk", ALLOCATION))
    assert kind == ERR_INVALID


# -- malformed ----------------------------------------------------------------------------------


def test_a_wrong_magic_number_ends_it() -> None:
    with pytest.raises(BadClient, match="magic"):
        talk(Negotiation(export()), HELLO, b"IHAVEOPX" + bytes(8))


def test_an_endless_option_ends_it_before_it_arrives() -> None:
    header = struct.pack(">8sII", b"IHAVEOPT", LIST, MAX_OPTION + 1)
    with pytest.raises(BadClient, match="bytes of data"):
        talk(Negotiation(export()), HELLO, header)


options = st.one_of(
    st.tuples(st.integers(0, 12), st.binary(max_size=30)),
    st.tuples(
        st.sampled_from([INFO, GO]),
        st.builds(info, st.sampled_from([b"", b"disk", b"x"]), st.integers(0, 4)),
    ),
    st.tuples(
        st.sampled_from([SET_META, LIST_META]),
        st.builds(
            queries,
            st.sampled_from([b"", b"disk", b"x"]),
            st.sampled_from([ALLOCATION, b"base:", b"x:y"]),
        ),
    ),
    st.just((STRUCTURED, b"")),
)


@given(st.lists(options, max_size=8), st.lists(st.integers(1, 40), min_size=1, max_size=40))
def test_pieces_make_no_difference(script: list[tuple[int, bytes]], sizes: list[int]) -> None:
    stream = HELLO + b"".join(option(number, data) for number, data in script)
    whole, parts = Negotiation(export()), Negotiation(export())
    pieces = []
    rest = stream
    while rest:
        for size in sizes:
            pieces.append(rest[:size])
            rest = rest[size:]

    def result(negotiation: Negotiation, *pieces: bytes) -> object:
        try:
            return talk(negotiation, *pieces)
        except BadClient as error:
            return str(error)

    one, many = result(whole, stream), result(parts, *pieces)
    assert (one, whole.agreed, whole.over) == (many, parts.agreed, parts.over)
    if isinstance(one, bytes):
        assert whole.rest == parts.rest


@given(st.binary(max_size=200))
def test_any_bytes_are_answered_or_end_it(data: bytes) -> None:
    for start in (b"", HELLO, HELLO + b"IHAVEOPT"):
        with suppress(BadClient):
            talk(Negotiation(export()), start + data)


# -- what can be exported -----------------------------------------------------------------------


@pytest.mark.parametrize("what", ["name", "description"])
@pytest.mark.parametrize("text", ["x" * 4097, "a\0b", "\udcff"])
def test_names_that_the_protocol_can_not_carry(what: str, text: str) -> None:
    with pytest.raises(ConfigError, match=what):
        export(**{what: text})


def test_names_are_utf8() -> None:
    assert ask(LIST, name="gäste") == [(SERVER, string("gäste".encode())), (ACK, b"")]
