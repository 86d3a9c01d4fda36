"""``xbd image convert``: contents are the same, and nothing half-made is left."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from image_world import Run

from xbd.core.hostio import hostfile, locks
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2 import luks


@pytest.fixture
def source(place: Path) -> Path:
    """5 MiB and a bit, with holes, zeroes, and data of several kinds."""
    rng = random.Random(5)
    path = place / "source"
    with path.open("wb") as file:
        file.write(rng.randbytes(MIB + 512))
        file.write(bytes(300 * KIB))
        file.seek(3 * MIB)
        file.write(b"compressible" * 50_000)
        file.truncate(5 * MIB + 512)
    return path


def names(place: Path) -> set[str]:
    return {entry.name for entry in place.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-o", "cluster_size=2M"),
        ("-o", "cluster_size=512,compat=0.10"),
        ("-o", "extended_l2=on,cluster_size=128k"),
        ("-o", "preallocation=metadata"),
        ("-c",),
        ("-c", "-o", "compression_type=zstd,cluster_size=4k"),
    ],
)
def test_to_qcow2_and_back(
    image: Run, qemu: Run, place: Path, source: Path, options: tuple[str, ...]
) -> None:
    told = image("convert", "imagefile:source", "qcow2:a", *options)
    assert told.endswith("a disk of 5 MiB (5243392 bytes).\n")
    qemu("qemu-img", "check", "a")
    qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", "source", "a")
    image("convert", "qcow2:a", "imagefile:back")
    assert (place / "back").read_bytes() == source.read_bytes()
    assert (place / "back").stat().st_blocks * 512 < 2 * MIB
    assert names(place) == {"source", "a", "back"}
    if not options:
        assert (place / "a").stat().st_blocks * 512 < 2.5 * MIB
    if options == ("-c",):
        assert (place / "a").stat().st_size < 1.5 * MIB


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_from_a_chain_that_qemu_made(image: Run, qemu: Run, place: Path, kind: str) -> None:
    qemu("qemu-img", "create", "-q", "-f", kind, "base", "4M")
    qemu("qemu-io", "-f", kind, "-c", "write -P 1 0 3M", "base")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", kind, "top", "6M")
    qemu("qemu-io", "-c", "write -P 2 1M 64k", "-c", "write -z 2M 1M", "top")
    image("convert", "qcow2:top", "qcow2:a")
    qemu("qemu-img", "compare", "top", "a")
    told = json.loads(qemu("qemu-img", "info", "--output=json", "a"))
    assert "backing-filename" not in told
    assert told["actual-size"] < 2.5 * MIB


def test_only_what_differs_goes_into_an_overlay(image: Run, qemu: Run, source: Path) -> None:
    image("convert", "imagefile:source", "imagefile:changed")
    qemu("qemu-io", "-f", "raw", "-c", "write -P 9 1M 64k", "-c", "write -P 0 0 64k", "changed")
    qemu("qemu-io", "-f", "raw", "-c", "write -P 8 4M 512", "changed")
    image("convert", "imagefile:changed", "qcow2:overlay", "-b", "imagefile:source")
    qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", "changed", "overlay")
    told = json.loads(qemu("qemu-img", "check", "--output=json", "overlay"))
    assert told["allocated-clusters"] == 2
    assert json.loads(image("info", "--json", "qcow2:overlay"))["backing-filename"] == "source"


def test_over_what_exists(image: Run, qemu: Run, place: Path, source: Path) -> None:
    (place / "there").write_bytes(b"y" * (6 * MIB))
    image("convert", "-n", "imagefile:source", "imagefile:there")
    assert (place / "there").read_bytes() == source.read_bytes() + b"y" * (MIB - 512)
    image("create", "qcow2:b", "6M")
    image("convert", "-n", "--target-is-zero", "imagefile:source", "qcow2:b")
    image("resize", "qcow2:b", "5243392", "--shrink")
    qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", "source", "b")
    (place / "small").write_bytes(bytes(MIB))
    assert "has 1048576 bytes" in image(
        "convert", "-n", "imagefile:source", "imagefile:small", code=2
    )
    assert (place / "small").read_bytes() == bytes(MIB)
    assert "No such file" in image("convert", "-n", "imagefile:source", "imagefile:no", code=1)


def test_encrypted(
    image: Run, qemu: Run, place: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(luks, "UNLOCK_SECONDS", 0.01)
    key = place / "key"
    key.write_text("secret")
    key.chmod(0o600)
    options = f"encrypt.format=luks,encrypt.key-file={key}"
    image("convert", "imagefile:source", f"qcow2:a?key-file={key}", "-o", options)
    told = image("convert", "qcow2:a", "imagefile:back", code=1)
    assert "key-file" in told
    image("convert", f"qcow2:a?key-file={key}", "imagefile:back")
    assert (place / "back").read_bytes() == source.read_bytes()
    qemu(
        "qemu-img", "compare", "--object", f"secret,id=key,file={key}", "--image-opts",
        "driver=raw,file.filename=source", "driver=qcow2,file.filename=a,encrypt.key-secret=key",
    )  # fmt: skip


def test_data_files(image: Run, qemu: Run, place: Path, source: Path) -> None:
    image("convert", "imagefile:source", "qcow2:a", "-o", "data_file=data,data_file_raw=on")
    assert (place / "data").read_bytes() == source.read_bytes()
    qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", "source", "a")
    assert names(place) == {"source", "a", "data"}


def test_json(image: Run, place: Path, source: Path) -> None:
    assert json.loads(image("convert", "--json", "imagefile:source", "qcow2:a")) == {
        "source": f"imagefile:{place}/source",
        "target": f"qcow2:{place}/a",
        "virtual-size": 5 * MIB + 512,
    }


def test_a_source_in_use(
    image: Run, place: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.1)
    with source.open("r+b") as file:
        locks.lock_file(file.fileno(), "source", exclusive=True)
        assert "locked by another" in image("convert", "imagefile:source", "qcow2:a", code=1)
        assert names(place) == {"source"}
        image("convert", "-U", "imagefile:source", "qcow2:a")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("imagefile:source", "imagefile:source"), 2, "exists already"),
        (("imagefile:nowhere", "qcow2:a"), 1, "No such file"),
        (("imagefile:source", "raw:a"), 2, "no images that could be worked on"),
        (("imagefile:source", "imagefile:a", "-c"), 2, "no option 'compress'"),
        (("imagefile:source", "imagefile:a", "-b", "imagefile:source"), 2, "use qcow2"),
        (("imagefile:source", "qcow2:a", "-b", "imagefile:nowhere"), 1, "No such file"),
        (("imagefile:source", "qcow2:a", "-o", "x=y"), 2, "unknown option"),
        (("imagefile:source", "qcow2:a", "--target-is-zero"), 2, "--no-create"),
        (("imagefile:source", "qcow2:a", "-n", "-o", "x=y"), 2, "nothing is made"),
        (("imagefile:source", "qcow2:a?x=y"), 2, "unknown option"),
        (("imagefile:source", "qcow2:a", "-o", "data_file=source"), 2, "exists already"),
        (("imagefile:source", "qcow2:no/where"), 2, "there is no directory"),
    ],
)
def test_mistakes_are_a_line_and_leave_nothing(
    image: Run, place: Path, source: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    told = image("convert", *words, code=code)
    assert said in told
    assert told.count("\n") == 1
    assert names(place) == {"source"}


@pytest.mark.parametrize("target", ["qcow2:a", "imagefile:a"])
@pytest.mark.parametrize("options", [(), ("-o", "data_file=data")])
def test_a_failure_leaves_nothing(
    image: Run,
    place: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    options: tuple[str, ...],
) -> None:
    if options and target == "imagefile:a":
        options = ()
    read = hostfile.read_full

    def broken(fd: int, buffers: object, offset: int, rest: int | None = None) -> int:
        if offset >= 2 * MIB:
            raise OSError(5, os.strerror(5))
        return read(fd, buffers, offset, rest)  # type: ignore[arg-type]

    monkeypatch.setattr(hostfile, "read_full", broken)
    told = image("convert", "imagefile:source", target, *options, code=1)
    assert "Input/output error" in told
    assert names(place) == {"source"}


def test_nobody_sees_half_an_image_under_its_name(
    image: Run, place: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xbd.core.driver.convert import Copier

    seen = []
    run = Copier.run

    async def watched(copier: Copier) -> None:
        await run(copier)
        seen.append(names(place))

    monkeypatch.setattr(Copier, "run", watched)
    image("convert", "imagefile:source", "qcow2:a")
    assert len(seen) == 1
    assert "a" not in seen[0]
    assert names(place) == {"source", "a"}


def test_what_came_meanwhile_stays(
    image: Run, place: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xbd.core.driver.convert import Copier

    run = Copier.run

    async def slow(copier: Copier) -> None:
        await run(copier)
        (place / "a").write_bytes(b"precious")

    monkeypatch.setattr(Copier, "run", slow)
    assert "exists already" in image("convert", "imagefile:source", "qcow2:a", code=2)
    assert (place / "a").read_bytes() == b"precious"
    assert names(place) == {"source", "a"}


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)]
)
def test_signals_leave_nothing(place: Path, number: signal.Signals, code: int) -> None:
    (place / "data").write_bytes(b"x" * MIB)
    code_text = (
        "import sys\n"
        "from xbd.core.driver import convert\n"
        "async def slow(copier):\n"
        "    import trio\n"
        "    print('working', flush=True)\n"
        "    await trio.sleep_forever()\n"
        "convert.Copier._work = slow\n"
        "from xbd.cli import main\n"
        "main(['image', 'convert', 'imagefile:data', 'qcow2:a'])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code_text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "working\n"
            assert any(name.endswith(".partial") for name in names(place))
            process.send_signal(number)
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == code
    assert errors == ""
    assert names(place) == {"data"}
