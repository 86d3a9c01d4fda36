"""The exercise that the demonstration runs: it sees every byte that is wrong."""

from __future__ import annotations

import pytest
import trio

from xbd.core.blkif import X86_32, XenbusState
from xbd.core.frontend import DiskLine, FrontendError, FrontendOptions, Toolstack, connect
from xbd.core.frontend.exercise import Exercise
from xbd.core.frontend.toolstack import AttachFailed
from xbd.core.hypervisor.embedded_guest import GuestDomain
from xbd.core.units import KIB, MIB, Domid
from xbd.core.xenstore.client import StoreClient


@pytest.fixture
async def toolstack(serving):
    async with StoreClient.connect(serving / "xenstored.socket") as store:
        yield Toolstack(store)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


def own_store(serving, domid=1):
    return StoreClient.connect(serving / f"xenstored-{domid}.socket")


@pytest.mark.parametrize(
    "options",
    [
        FrontendOptions(),
        FrontendOptions(ring_order=3, queues=3, indirect_segments=256),
        FrontendOptions(ring_order=1, legacy_ring_key=True),
        FrontendOptions(abi=X86_32, write_protocol=False, persistent=False, indirect_segments=0),
    ],
)
async def test_all_is_well_and_then_a_byte_is_not(serving, toolstack, image, options):
    async with GuestDomain.connect(serving, Domid(1)) as guest:
        await toolstack.create_domain(Domid(1), "guest")
        devid = await toolstack.attach(Domid(1), DiskLine(target=f"imagefile:{image}"))
        async with own_store(serving) as store, connect(store, guest, devid, options) as frontend:
            assert frontend.offer.size == MIB
            exercise = Exercise(frontend, seed=7)
            moved = []
            await exercise.fill(moved.append)
            await exercise.verify(moved.append)
            timing = await exercise.random_reads(50)
            assert (exercise.wrong, sum(moved), timing.count) == ([], 2 * MIB, 50)
            content = bytearray(image.read_bytes())
            assert content == exercise.pattern(0, MIB)
            content[300 * KIB + 17] ^= 1
            await frontend.write(300 * KIB, bytes(content[300 * KIB : 304 * KIB]))
            await exercise.verify(lambda _: None)
            [wrong] = exercise.wrong
            assert wrong <= 300 * KIB + 17


async def test_the_reason_of_a_failed_attach_is_told(serving, toolstack, tmp_path):
    async with GuestDomain.connect(serving, Domid(1)):
        await toolstack.create_domain(Domid(1), "guest")
        with pytest.raises(AttachFailed, match=r"missing\.img.*No such file"):
            await toolstack.attach(
                Domid(1), DiskLine(target=f"imagefile:{tmp_path / 'missing.img'}")
            )


async def test_a_frontend_without_a_disk_says_so(serving, toolstack):
    async with GuestDomain.connect(serving, Domid(1)) as guest:
        await toolstack.create_domain(Domid(1), "guest")
        async with own_store(serving) as store:
            with pytest.raises(FrontendError, match="names no backend"):
                async with connect(store, guest, 51712):
                    pass


async def test_a_disk_that_is_detached_under_a_frontend(serving, toolstack, image):
    async with GuestDomain.connect(serving, Domid(1)) as guest:
        await toolstack.create_domain(Domid(1), "guest")
        line = DiskLine(target=f"imagefile:{image}")
        devid = await toolstack.attach(Domid(1), line)
        async with (
            own_store(serving) as store,
            trio.open_nursery() as nursery,
            connect(store, guest, devid) as frontend,
        ):
            await frontend.write(0, b"d" * 4096)
            nursery.start_soon(toolstack.detach, Domid(1), line)
            await frontend.wait_backend(XenbusState.CLOSING)
    assert image.read_bytes()[:4096] == b"d" * 4096
