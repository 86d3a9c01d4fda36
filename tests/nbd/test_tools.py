"""Other people's NBD clients on ``xbd export``: QEMU's, libnbd's, fio's."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from export_process import SECONDS, Exported

from xbd.core.units import KIB, MIB

SIZE = 16 * MIB


def tool(*words: object) -> str:
    """What a program says; skips the test where it is missing."""
    name = str(words[0])
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def content(seed: int) -> bytes:
    """A disk with data, zeroes and holes in it."""
    dice = random.Random(seed)
    data = bytearray(SIZE)
    for _ in range(12):
        offset = dice.randrange(SIZE // 65536 - 8) * 65536
        length = dice.choice([512, 4096, 200_000])
        data[offset : offset + length] = dice.randbytes(length)
    return bytes(data)


def sparse(path: Path, data: bytes) -> None:
    """Holes where there are only zeroes."""
    with path.open("wb") as file:
        file.truncate(len(data))
        for at in range(0, len(data), 4096):
            if any(data[at : at + 4096]):
                file.seek(at)
                file.write(data[at : at + 4096])


@pytest.fixture(scope="module", params=["none", "writeback"])
def disk(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Exported]]:
    """An image and its server, for all tests: a process takes long to start."""
    directory = tmp_path_factory.mktemp(request.param)
    image = directory / "disk.img"
    sparse(image, content(1))
    exported = Exported(
        f"imagefile:{image}?cache={request.param}&locking=no", directory, "--description", "a test"
    )
    try:
        yield image, exported
        assert exported.stop() == 0
        warned = [line for line in exported.log.read_text().splitlines() if " info: " not in line]
        assert not warned
    finally:
        exported.kill()


def test_what_qemu_sees(disk: tuple[Path, Exported]) -> None:
    image, exported = disk
    info = json.loads(tool("qemu-img", "info", "--output=json", exported.uri))
    assert info["virtual-size"] == SIZE
    ours = json.loads(tool("qemu-img", "map", "--output=json", exported.uri))
    theirs = json.loads(tool("qemu-img", "map", "--output=json", "-f", "raw", image))
    keys = ("start", "length", "data", "zero")
    assert [[part[key] for key in keys] for part in ours] == [
        [part[key] for key in keys] for part in theirs
    ]
    tool("qemu-img", "compare", "-f", "raw", "-F", "raw", exported.uri, image)
    listed = tool("qemu-nbd", "--list", "--socket", exported.socket)
    assert "exports available: 1" in listed
    assert "a test" in listed
    assert "min block: 512" in listed


def test_qemu_copies_both_ways(disk: tuple[Path, Exported], tmp_path: Path) -> None:
    image, exported = disk
    out, new = tmp_path / "out.qcow2", tmp_path / "new.img"
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", exported.uri, out)
    tool("qemu-img", "compare", "-f", "qcow2", "-F", "raw", out, image)
    sparse(new, content(2))
    tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", new, exported.uri)
    assert image.read_bytes() == content(2)


def test_qemu_io(disk: tuple[Path, Exported]) -> None:
    image, exported = disk
    tool(
        "qemu-io",
        "-f",
        "raw",
        *("-c", "write -P 0x5a 100k 300k"),
        *("-c", "write -P 0x5b 513 1021"),
        *("-c", "write -f -P 0x5c 1M 64k"),
        *("-c", "write -z 200k 50k"),
        *("-c", "write -z -u 2M 1M"),
        *("-c", "aio_write -P 0x5d 3M 64k"),
        *("-c", "aio_write -P 0x5e 4M 64k"),
        *("-c", "aio_flush"),
        *("-c", "discard 5M 1M"),
        *("-c", "flush"),
        *("-c", "read -P 0x5a 100k 100k"),
        *("-c", "read -P 0 200k 50k"),
        *("-c", "read -P 0x5a 250k 150k"),
        *("-c", "read -P 0x5b 513 1021"),
        *("-c", "read -P 0x5c 1M 64k"),
        *("-c", "read -P 0 2M 1M"),
        *("-c", "read -P 0x5d 3M 64k"),
        exported.uri,
    )
    data = image.read_bytes()
    assert data[513:1534] == b"\x5b" * 1021
    assert data[4 * MIB : 4 * MIB + 64 * KIB] == b"\x5e" * 64 * KIB
    assert len(data) == SIZE


def test_libnbd(disk: tuple[Path, Exported], tmp_path: Path) -> None:
    image, exported = disk
    (export,) = json.loads(tool("nbdinfo", "--json", exported.uri))["exports"]
    assert export["export-size"] == SIZE
    assert export["description"] == "a test"
    assert export["contexts"] == ["base:allocation"]
    assert export["block_size_minimum"] == 512
    assert export["block_size_maximum"] == 32 * MIB
    expected = {
        "is_read_only": False,
        "can_df": True,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": True,
        "can_zero": True,
        "can_fast_zero": False,
        "can_cache": True,
    }
    assert {name: export[name] for name in expected} == expected
    assert json.loads(tool("nbdinfo", "--json", "--list", exported.uri))["exports"]
    parts = json.loads(tool("nbdinfo", "--map", "--json", exported.uri))
    data = image.read_bytes()
    assert sum(part["length"] for part in parts) == SIZE
    for part in parts:
        assert part["type"] in (0, 3)
        piece = data[part["offset"] : part["offset"] + part["length"]]
        assert part["type"] == 0 or not any(piece)
    out, new = tmp_path / "out.img", tmp_path / "new.img"
    tool("nbdcopy", exported.uri, out)
    assert out.read_bytes() == data
    assert out.stat().st_blocks < SIZE // 512 // 2
    sparse(new, content(3))
    tool("nbdcopy", new, exported.uri)
    assert image.read_bytes() == content(3)


def test_fio_verifies(disk: tuple[Path, Exported]) -> None:
    _, exported = disk
    if "nbd" not in tool("fio", "--enghelp"):
        pytest.skip("this fio has no nbd engine")
    tool(
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={exported.uri}",
        "--rw=randwrite",
        "--bsrange=512-128k",
        "--bs_unaligned=0",
        "--blockalign=512",
        "--iodepth=32",
        f"--size={SIZE}",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--fsync=50",
        "--output-format=terse",
        "--verify_state_save=0",
    )


def test_qemu_as_a_client_that_is_killed(disk: tuple[Path, Exported]) -> None:
    image, exported = disk
    if shutil.which("qemu-io") is None:
        pytest.skip("qemu-io is not installed")
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", exported.uri],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"write -P 0x77 0 4k\n")
        process.stdin.flush()
        said = b""
        while b"wrote 4096" not in said:
            said += os.read(process.stdout.fileno(), 4096)
        process.kill()
    assert image.read_bytes()[:4096] == b"\x77" * 4096
    tool("qemu-io", "-f", "raw", "-c", "read -P 0x77 0 4k", exported.uri)


def test_an_overlay_and_its_backing_image(tmp_path: Path) -> None:
    base, overlay, copy = tmp_path / "base.img", tmp_path / "top.qcow2", tmp_path / "copy.img"
    sparse(base, content(4))
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", overlay)
    write = ("-c", "write -P 9 1M 200k", "-c", "write -z -u 3M 1M", "-c", "write -P 8 10M 512")
    tool("qemu-io", "-f", "qcow2", *write, overlay)
    tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlay, copy)
    exported = Exported(f"qcow2:{overlay}", tmp_path, "--image-dirs", str(tmp_path))
    try:
        tool("qemu-img", "compare", "-f", "raw", "-F", "raw", exported.uri, copy)
        parts = json.loads(tool("qemu-img", "map", "--output=json", exported.uri))
        zeroes = copy.read_bytes()
        assert sum(part["length"] for part in parts) == SIZE
        for part in parts:
            piece = zeroes[part["start"] : part["start"] + part["length"]]
            assert not (part["zero"] and any(piece))
        assert any(part["zero"] and part["start"] <= 3 * MIB for part in parts)
        back = tmp_path / "back.img"
        tool("nbdcopy", exported.uri, back)
        assert back.read_bytes() == zeroes
        tool("qemu-io", "-f", "raw", "-c", "write -P 7 5M 300k", "-c", "flush", exported.uri)
        assert exported.stop() == 0
    finally:
        exported.kill()
    tool("qemu-img", "check", "-q", "-f", "qcow2", overlay)
    tool("qemu-io", "-f", "qcow2", "-c", "read -P 7 5M 300k", overlay)
