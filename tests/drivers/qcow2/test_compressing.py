"""Filling images with compressed clusters, next to plain writes, as qemu-img judges it."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from xbd.core.driver import DriverError, WriteRequest
from xbd.core.units import MIB
from xbd.drivers.qcow2 import snapshots
from xbd.drivers.qcow2.compressing import CompressedWriter
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.opening import Wishes, open_image
from xbd.drivers.qcow2.snapshots import create_snapshot
from xbd.drivers.qcow2.tables import Kind, Tables
from xbd.drivers.qcow2.writing import Writer
from xbd.drivers.qcow2.zeroing import Zeroer

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")

SIZE = 8 * MIB
OPTIONS = (
    "cluster_size=4k",
    "cluster_size=512",
    "cluster_size=64k,compression_type=zstd",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=4k,refcount_bits=2",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=4k,compat=0.10",
)


def qemu(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


class Filled:
    """An image, and what should be in it."""

    def __init__(self, path: Path, image: Image) -> None:
        self.path, self.image = path, image
        self.plain = Writer(image)
        self.packing = CompressedWriter(image, self.plain)
        self.zeroer = Zeroer(image, self.plain)
        self.model = bytearray(SIZE)

    def write(self, writer: Writer | CompressedWriter, *pieces: tuple[int, bytes]) -> None:
        requests = [WriteRequest(at, [memoryview(bytearray(data))]) for at, data in pieces]
        writer.write(requests)
        for request, (at, data) in zip(requests, pieces, strict=True):
            assert request.error is None
            self.model[at : at + len(data)] = data

    def finish(self) -> None:
        """Compare by xbd, close, check and compare by QEMU."""
        found = bytearray(SIZE)
        self.image.readv(0, [memoryview(found)])
        assert found == self.model
        self.image.close()
        qemu("qemu-img", "check", self.path)
        flat = self.path.with_suffix(".raw")
        qemu("qemu-img", "convert", "-O", "raw", self.path, flat)
        assert flat.read_bytes() == self.model


@pytest.fixture(params=OPTIONS)
def filled(request, tmp_path: Path) -> Iterator[Filled]:
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", request.param, path, str(SIZE))
    image = open_image(path, Wishes(writable=True))
    yield Filled(path, image)
    image.close()


def text(chance: random.Random, length: int) -> bytes:
    return (b"%d lines of %d, " % (chance.randrange(99), chance.randrange(9999)) * length)[:length]


def test_compressed_and_plain_writes_in_turns(filled: Filled) -> None:
    chance = random.Random(7)
    cluster = filled.image.header.cluster_size
    for _ in range(60):
        pieces = []
        for number in chance.sample(range(SIZE // cluster), 6):
            make = text if chance.random() < 0.7 else random.Random.randbytes
            pieces.append((number * cluster, make(chance, cluster)))
        turn = chance.random()
        if turn < 0.6:
            filled.write(filled.packing, *pieces)
        elif turn < 0.8:
            filled.write(filled.plain, *((at + 512 % cluster, data[512:]) for at, data in pieces))
        elif turn < 0.9:
            at, length = pieces[0][0], min(3 * cluster, SIZE - pieces[0][0])
            filled.zeroer.zero(at, length, may_unmap=True)
            filled.model[at : at + length] = bytes(length)
        else:
            filled.image.flush()
    filled.finish()


def test_nothing_is_packed_behind_what_was_given_up(filled: Filled) -> None:
    chance = random.Random(1)
    cluster = filled.image.header.cluster_size
    filled.write(filled.packing, (0, text(chance, cluster)))
    filled.write(filled.plain, (0, chance.randbytes(cluster)))
    filled.image.flush()  # the compressed one's host cluster is free now
    count = min(1500, SIZE // cluster - 2)
    pieces = [(number * cluster, chance.randbytes(cluster)) for number in range(1, count)]
    filled.write(filled.plain, *pieces)
    filled.write(filled.packing, (count * cluster, text(chance, cluster)))
    filled.finish()


def test_nothing_is_packed_behind_what_a_snapshot_has_replaced(filled: Filled) -> None:
    if not snapshots.possible(filled.image):
        return
    chance = random.Random(2)
    cluster = filled.image.header.cluster_size
    filled.write(filled.plain, (0, chance.randbytes(cluster)))
    snapshots.create(filled.image, "then")
    then = bytes(filled.model)
    filled.write(filled.packing, (cluster, text(chance, cluster)))
    snapshots.apply(filled.image, "then")
    filled.model[:] = then
    filled.write(filled.plain, *((n * cluster, chance.randbytes(cluster)) for n in range(3, 128)))
    filled.write(filled.packing, (2 * cluster, text(chance, cluster)))
    filled.finish()


def test_what_was_linked_before_the_host_failed_has_moved(
    filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(3)
    cluster, image = filled.image.header.cluster_size, filled.image
    pieces = [(n * cluster, chance.randbytes(cluster)) for n in range(4)]
    filled.write(filled.plain, *pieces)
    change, changes = Tables.change, 0

    def fail(self: Tables, index: int, words: Mapping[int, int]) -> None:
        nonlocal changes
        changes += 1
        if changes == 3:
            raise DriverError("no")
        change(self, index, words)

    monkeypatch.setattr(Tables, "change", fail)
    new = [text(chance, cluster) for _ in pieces]
    requests = [WriteRequest(at, [memoryview(bytearray(data))]) for at, data in pieces]
    for request, data in zip(requests, new, strict=True):
        request.buffers = [memoryview(bytearray(data))]
    moved = filled.packing.write(requests)
    monkeypatch.undo()
    assert {(n * cluster, cluster) for n in range(2)} <= set(moved)
    assert requests[3].error is not None
    filled.model[: 2 * cluster] = b"".join(new[:2])
    assert [piece.kind for piece in image.pieces(0, 4 * cluster)] == [
        Kind.COMPRESSED,
        Kind.COMPRESSED,
        Kind.NORMAL,
    ]
    filled.finish()


def test_snapshots_of_encrypted_images_need_no_key(tmp_path: Path) -> None:
    key, path = tmp_path / "key", tmp_path / "secret.qcow2"
    key.write_bytes(b"secret")
    secret = ("--object", f"secret,id=s,file={key}")
    luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    for attempt in range(5):
        command = ["qemu-img", "create", "-q", *secret, "-f", "qcow2", "-o", luks, path, "1M"]
        done = subprocess.run(list(map(str, command)), capture_output=True, check=False)
        # QEMU sometimes fails to measure the processor's speed.
        if done.returncode == 0:
            break
        assert attempt < 4, done.stderr
    create_snapshot(path, "one")
    options = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"
    assert "one" in qemu("qemu-img", "snapshot", *secret, "--image-opts", "-l", options)


def test_what_was_just_packed_is_read_past_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE))
    image = open_image(path, Wishes(writable=True, direct=True))
    assert image.data_host.direct
    filled = Filled(path, image)
    cluster = image.header.cluster_size
    chance = random.Random(3)
    for number in range(SIZE // cluster):
        half = chance.randbytes(cluster // 2)
        filled.write(filled.packing, (number * cluster, half.ljust(cluster)))
        image.clusters.clear()
        found = bytearray((number + 1) * cluster)  # long runs, whose ends are not on the disk yet
        image.readv(0, [memoryview(found)])
        assert found == filled.model[: len(found)]
    assert image.packed_until > SIZE // 2
    filled.finish()
