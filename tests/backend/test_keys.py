"""A frontend's keys: every way Linux, FreeBSD and NetBSD write them, and everything hostile."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbd.core.backend.keys import parse_u32, read_frontend, read_own, shown
from xbd.core.blkif import X86_32, X86_64
from xbd.core.blkif.state import XenbusState
from xbd.core.datapath.config import Features, FrontendConfig, QueueConfig
from xbd.core.errors import BadNegotiation
from xbd.core.units import Domid
from xbd.core.xenstore.base import StoreReader

FE = "/local/domain/7/device/vbd/51712"
OFFERED = Features(max_ring_order=4, max_queues=4)


class Dictionary(StoreReader):
    """A store that is a dict; only reading is needed."""

    def __init__(self, values):
        self.values = values

    async def read(self, path):
        return self.values.get(path)

    async def directory(self, path):
        raise NotImplementedError

    async def write(self, path, value):
        raise NotImplementedError

    async def mkdir(self, path):
        raise NotImplementedError

    async def remove(self, path):
        raise NotImplementedError

    async def get_permissions(self, path):
        raise NotImplementedError

    async def set_permissions(self, path, permissions):
        raise NotImplementedError


async def read(keys, offered=OFFERED, machine="x86_64"):
    store = Dictionary({f"{FE}/{name}": str(value) for name, value in keys.items()})
    return await read_frontend(store, FE, domid=Domid(7), features=offered, machine=machine)


ONE = {"ring-ref": 8, "event-channel": 5, "protocol": "x86_64-abi"}


async def test_one_page():
    assert await read(ONE) == FrontendConfig(
        domid=Domid(7),
        abi=X86_64,
        ring_order=0,
        queues=(QueueConfig(ring_refs=(8,), event_channel=5),),
        persistent=False,
    )


async def test_no_protocol_is_32_bits_on_x86_as_linux_takes_it():
    keys = {"ring-ref": 8, "event-channel": 5}
    assert (await read(keys)).abi is X86_32
    assert (await read(keys, machine="aarch64")).abi is not X86_32


@pytest.mark.parametrize("refs", ["ring-ref0", "ring-ref"])
async def test_order_zero_written_out(refs):
    config = await read({"ring-page-order": 0, refs: 8, "event-channel": 5})
    assert config.ring_order == 0
    assert config.queues[0].ring_refs == (8,)


@pytest.mark.parametrize("order_key", [("ring-page-order", 2), ("num-ring-pages", 4)])
async def test_several_pages(order_key):
    refs = {f"ring-ref{i}": 20 + i for i in range(4)}
    config = await read({order_key[0]: order_key[1], **refs, "event-channel": 5})
    assert config.ring_order == 2
    assert config.queues[0].ring_refs == (20, 21, 22, 23)


async def test_one_page_in_the_legacy_way():
    assert (await read({**ONE, "num-ring-pages": 1})).ring_order == 0


async def test_queues():
    keys = {"multi-queue-num-queues": 3, "ring-page-order": 1}
    for queue in range(3):
        keys |= {f"queue-{queue}/ring-ref{i}": 10 * queue + i for i in range(2)}
        keys[f"queue-{queue}/event-channel"] = 100 + queue
    config = await read(keys)
    assert [queue.ring_refs for queue in config.queues] == [(0, 1), (10, 11), (20, 21)]
    assert [queue.event_channel for queue in config.queues] == [100, 101, 102]


async def test_one_queue_stands_at_the_top():
    assert len((await read({**ONE, "multi-queue-num-queues": 1})).queues) == 1


@pytest.mark.parametrize(("offered", "wanted", "expected"), [(1, 1, 1), (1, 0, 0), (0, 1, 0)])
async def test_persistent_grants_need_both_sides(offered, wanted, expected):
    features = attrs.evolve(OFFERED, persistent=bool(offered))
    config = await read({**ONE, "feature-persistent": wanted}, features)
    assert config.persistent is bool(expected)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ring-ref": None}, "ring-ref is missing"),
        ({"ring-ref": ""}, "ring-ref is '', not a number"),
        ({"ring-ref": "-1"}, "ring-ref is '-1', not a number"),
        ({"ring-ref": "4294967296"}, "not a number"),
        ({"ring-ref": "٣"}, "not a number"),
        ({"ring-ref": "1e3"}, "not a number"),
        ({"ring-ref": "\x1b[2J" * 1000}, "'\\x1b[2J"),
        ({"event-channel": None}, "event-channel is missing"),
        ({"protocol": "sparc-abi"}, "unknown protocol"),
        ({"protocol": ""}, "unknown protocol"),
        ({"ring-page-order": 5}, "ring-page-order is 5, offered was 4 at most"),
        ({"ring-page-order": 4294967295}, "offered was 4 at most"),
        ({"ring-page-order": 1}, "ring-ref0 is missing"),
        ({"num-ring-pages": 3}, "num-ring-pages is 3, not a power of two"),
        ({"num-ring-pages": 0}, "num-ring-pages is 0, not a power of two"),
        ({"num-ring-pages": 64}, "offered was 4 at most"),
        ({"multi-queue-num-queues": 0}, "multi-queue-num-queues is 0, offered were 1 to 4"),
        ({"multi-queue-num-queues": 5}, "multi-queue-num-queues is 5, offered were 1 to 4"),
        ({"multi-queue-num-queues": 2}, "queue-0/ring-ref is missing"),
        ({"feature-persistent": "yes"}, "feature-persistent is 'yes', not a number"),
    ],
)
async def test_what_is_wrong_is_one_clear_line(change, expected):
    keys = {name: value for name, value in {**ONE, **change}.items() if value is not None}
    with pytest.raises(BadNegotiation) as caught:
        await read(keys)
    line = str(caught.value)
    assert expected in line
    assert line.isprintable()
    assert len(line) < 200


async def test_rings_do_not_share_pages_or_ports():
    pages = {"ring-page-order": 1, "ring-ref0": 4, "ring-ref1": 4, "event-channel": 5}
    with pytest.raises(BadNegotiation, match="names a page twice"):
        await read(pages)
    twins = {"multi-queue-num-queues": 2}
    for queue in range(2):
        twins |= {f"queue-{queue}/ring-ref": 4, f"queue-{queue}/event-channel": queue}
    with pytest.raises(BadNegotiation, match="two queues share"):
        await read(twins)


NAMES = st.sampled_from(
    [
        "ring-ref",
        "ring-ref0",
        "ring-ref1",
        "event-channel",
        "protocol",
        "ring-page-order",
        "num-ring-pages",
        "multi-queue-num-queues",
        "queue-0/ring-ref",
        "queue-0/event-channel",
        "queue-1/ring-ref",
        "queue-1/event-channel",
        "feature-persistent",
    ]
)
VALUES = st.one_of(
    st.integers(-1, 5).map(str),
    st.integers().map(str),
    st.sampled_from(["x86_64-abi", "x86_32-abi", "arm-abi"]),
    st.text(st.characters(codec=None), max_size=20),
)


@given(keys=st.dictionaries(NAMES, VALUES))
async def test_whatever_a_guest_writes_is_bounded_or_refused(keys):
    line = ""
    try:
        config = await read(keys)
    except BadNegotiation as error:
        line = str(error)
    else:
        assert 1 <= len(config.queues) <= OFFERED.max_queues
        assert config.ring_order <= OFFERED.max_ring_order
        for queue in config.queues:
            assert len(queue.ring_refs) == 1 << config.ring_order
            assert all(0 <= ref <= 0xFFFFFFFF for ref in queue.ring_refs)
    assert line.isprintable()


@given(st.text())
def test_numbers_are_plain_decimals(text):
    number = parse_u32(text)
    assert number is None or (0 <= number <= 0xFFFFFFFF and text.isascii())


@given(st.text(st.characters(codec=None)))
def test_what_is_shown_is_short_and_harmless(text):
    assert shown(text).isprintable()
    assert shown(text).isascii()
    assert len(shown(text)) <= 500


async def test_our_own_directory():
    path = "/local/domain/0/backend/vbd3/7/51712"
    keys = {"frontend": FE, "frontend-id": "7", "state": "1", "online": "1", "mode": "w"}
    store = Dictionary({f"{path}/{name}": value for name, value in keys.items()})
    own = await read_own(store, path)
    assert own is not None
    assert own.state is XenbusState.INITIALISING
    assert own.writable
    assert own.discard_enable
    assert not own.script_done
    for name in ("frontend", "frontend-id", "state"):
        rest = {key: value for key, value in store.values.items() if key != f"{path}/{name}"}
        assert await read_own(Dictionary(rest), path) is None
    store.values[f"{path}/state"] = "junk"
    own = await read_own(store, path)
    assert own is not None
    assert own.state is XenbusState.UNKNOWN
