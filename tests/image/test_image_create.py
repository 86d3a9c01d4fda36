"""``xbd image create``, ``info`` and ``resize``."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from image_world import Run

from xbd.core.units import GIB, MIB


def test_a_qcow2_image(image: Run, qemu: Run, place: Path) -> None:
    told = image(
        "create", "qcow2:a.qcow2", "10G", "-o", "cluster-size=128k", "-o", "preallocation=metadata"
    )
    assert told == f"Created qcow2:{place}/a.qcow2: a disk of 10 GiB (10737418240 bytes).\n"
    theirs = json.loads(qemu("qemu-img", "info", "--output=json", "a.qcow2"))
    assert (theirs["virtual-size"], theirs["cluster-size"]) == (10 * GIB, 131072)
    ours = json.loads(image("info", "--json", "qcow2:a.qcow2"))
    assert ours == theirs | {"filename": f"{place}/a.qcow2"}


def test_the_names_of_qemu_img_are_known(image: Run, qemu: Run) -> None:
    image("create", "qcow2:a", "1G", "-o", "cluster_size=2M,compat=v3,lazy_refcounts=on")
    told = json.loads(qemu("qemu-img", "info", "--output=json", "a"))
    assert told["cluster-size"] == 2 * MIB
    assert told["format-specific"]["data"]["lazy-refcounts"] is True
    image("create", "qcow2:b", "1G", "-o", "data_file=x,,y=z")
    assert Path("x,y=z").stat().st_size == GIB


def test_an_overlay_is_as_large_as_what_is_behind(image: Run, qemu: Run, place: Path) -> None:
    image("create", "imagefile:base.img", "3M")
    image("create", "qcow2:middle", "-b", "imagefile:base.img")
    told = json.loads(image("create", "--json", "qcow2:top", "-b", f"qcow2:{place}/middle", "5M"))
    assert told["virtual-size"] == 5 * MIB
    theirs = json.loads(qemu("qemu-img", "info", "--output=json", "--backing-chain", "top"))
    ours = json.loads(image("info", "--chain", "--json", "qcow2:top"))
    assert len(ours) == len(theirs) == 3
    for one, other in zip(ours, theirs, strict=True):
        for key in ("backing-filename", "backing-filename-format", "virtual-size", "format"):
            assert one.get(key) == other.get(key)
        assert Path(one["filename"]).samefile(other["filename"])


def test_info_reads_as_qemus(image: Run, qemu: Run, place: Path) -> None:
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "base", "3M")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "a", "5M")
    qemu("qemu-img", "bitmap", "--add", "a", "b0")
    theirs = qemu("qemu-img", "info", "a").replace("image: a\n", f"image: {place}/a\n")
    theirs = theirs.replace("base\n", f"base (actual path: {place}/base)\n", 1)
    ours = image("info", "qcow2:a")
    assert sorted(line.strip() for line in ours.splitlines()) == (
        sorted(line.strip() for line in theirs.splitlines())
    )


def test_snapshots_are_listed(image: Run, qemu: Run) -> None:
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "a", "3M")
    qemu("qemu-img", "snapshot", "-c", "first", "a")
    theirs = json.loads(qemu("qemu-img", "info", "--output=json", "a"))["snapshots"]
    ours = json.loads(image("info", "--json", "qcow2:a"))["snapshots"]
    for snapshot in theirs + ours:
        snapshot.pop("date-nsec")
        snapshot.pop("icount", None)
    assert ours == theirs
    text = image("info", "qcow2:a")
    assert (
        "Snapshot list:\nID  TAG    VM SIZE  DATE                 VM CLOCK\n1   first  0 B" in text
    )


def test_what_a_terminal_would_obey_is_not_printed(image: Run, qemu: Run) -> None:
    name = "a\x1b[31mb\nc"
    Path(name).write_bytes(bytes(512))
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", name, "-F", "raw", "a", "3M")
    qemu("qemu-img", "snapshot", "-c", name, "a")
    text = image("info", "qcow2:a") + image("snapshot", "list", "qcow2:a")
    assert "\x1b" not in text
    assert "backing file: a\\x1b[31mb\\nc (actual" in text
    assert json.loads(image("info", "--json", "qcow2:a"))["backing-filename"] == name


def test_a_chain_that_goes_round_is_told(image: Run, qemu: Run) -> None:
    for name, behind in (("a", "b"), ("b", "a")):
        qemu(
            "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", behind, "-F", "qcow2", name, "1M"
        )
    assert "loop" in image("info", "--chain", "qcow2:a", code=2)
    assert "loop" in image("info", "--chain", "--json", "qcow2:a", code=2)


def test_a_chain_that_cannot_be_followed_is_told(image: Run, qemu: Run) -> None:
    for name, behind in (("a", "nbd:unix:x"), ("b", "nowhere")):
        qemu("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", behind, "-F", "raw", name, "1M")
    assert "nbd:unix:x" in image("info", "--chain", "qcow2:a", code=2)
    assert "nowhere: No such file" in image("info", "--chain", "qcow2:b", code=1)
    image("info", "qcow2:b")


def test_nothing_is_replaced(image: Run, place: Path) -> None:
    (place / "a").write_bytes(b"precious")
    for driver in ("qcow2", "imagefile"):
        assert "exists already" in image("create", f"{driver}:a", "1M", code=2)
    assert (place / "a").read_bytes() == b"precious"


def test_options_are_explained(image: Run, place: Path) -> None:
    text = image("create", "qcow2:a", "-o", "help")
    for word in ("cluster-size=size (65536)", "compression-type=zlib|zstd", "data-file-raw"):
        assert word in text
    assert list(place.iterdir()) == []
    assert "known: cluster-size, compat" in image("create", "qcow2:a", "1M", "-o", "x=1", code=2)
    assert "NAME=VALUE" in image("create", "qcow2:a", "1M", "-o", "compat", code=2)
    assert "twice" in image(
        "create", "qcow2:a", "1M", "-o", "cluster_size=1k", "-o", "cluster-size=1k", code=2
    )


@pytest.mark.parametrize("size", ["", "1X", "-5M", "1.5G", "9E"])
def test_a_size_is_a_number(image: Run, place: Path, size: str) -> None:
    assert "size: " in image("create", "qcow2:a", "--", size, code=2)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(("how", "holes"), [("off", True), ("falloc", False), ("full", False)])
def test_a_flat_image(image: Run, place: Path, how: str, holes: bool) -> None:
    image("create", "imagefile:a", "3000001", "-o", f"preallocation={how}")
    status = (place / "a").stat()
    assert status.st_size == 3000320
    assert (status.st_blocks * 512 < 3000000) == holes
    assert (place / "a").read_bytes() == bytes(3000320)
    told = json.loads(image("info", "--json", "imagefile:a"))
    assert told["format"] == "raw"
    assert told["virtual-size"] == 3000320
    assert told["actual-size"] == status.st_blocks * 512


def test_what_a_flat_image_needs(image: Run, place: Path) -> None:
    assert "needs a size" in image("create", "imagefile:a", code=2)
    assert "use qcow2" in image("create", "imagefile:a", "1M", "-b", "imagefile:b", code=2)
    assert "is a directory" in image("info", "imagefile:.", code=1)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("driver", ["qcow2", "imagefile"])
def test_resizing(image: Run, place: Path, driver: str) -> None:
    name = f"{driver}:a"
    image("create", name, "3M")

    def size() -> int:
        return int(json.loads(image("info", "--json", name))["virtual-size"])

    assert (
        image("resize", name, "5M")
        == f"Resized {driver}:{place}/a: a disk of 5 MiB (5242880 bytes).\n"
    )
    image("resize", name, "+1M")
    assert size() == 6 * MIB
    assert "--shrink" in image("resize", name, "-2M", code=2)
    assert size() == 6 * MIB
    told = json.loads(image("resize", "--json", name, "-2M", "--shrink"))
    assert told["virtual-size"] == size() == 4 * MIB
    assert "has only" in image("resize", name, "-5M", "--shrink", code=2)
    image("resize", name, "8M", "--preallocation", "full")
    assert (place / "a").stat().st_blocks * 512 >= 4 * MIB
    image("resize", name, "9M", "--preallocation=falloc")
    assert size() == 9 * MIB


def test_a_flat_image_has_no_tables_to_preallocate(image: Run, place: Path) -> None:
    image("create", "imagefile:a", "1M")
    assert "none of" in image("resize", "imagefile:a", "2M", "--preallocation=metadata", code=2)
    assert (place / "a").stat().st_size == MIB


def test_images_in_use_stay_alone(image: Run, place: Path) -> None:
    from xbd.core.hostio.locks import lock_file

    for driver in ("qcow2", "imagefile"):
        image("create", f"{driver}:{driver}", "1M")
        with (place / driver).open("r+b") as file:
            lock_file(file.fileno(), driver, exclusive=True)
            assert "locked by another" in image("info", f"{driver}:{driver}", code=1)
            assert "locked by another" in image("resize", f"{driver}:{driver}", "2M", code=1)
            image("info", "-U", f"{driver}:{driver}")
            image("info", "--share", f"{driver}:{driver}")


def test_a_signal_leaves_nothing(place: Path) -> None:
    code = (
        "import time\n"
        "from xbd.drivers.imagefile import format\n"
        "def slow(*_):\n"
        "    print('working', flush=True)\n"
        "    time.sleep(60)\n"
        "format.fill = slow\n"
        "from xbd.cli import main\n"
        "main(['image', 'create', 'imagefile:a', '1M', '-o', 'preallocation=full'])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "working\n"
            assert (place / "a").exists()
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert errors == ""
    assert list(place.iterdir()) == []
