"""What is told of images: what qemu-img tells."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from xbd.core.driver import DriverError, OpenFailed, parse_options
from xbd.core.units import MIB
from xbd.drivers.qcow2 import luks
from xbd.drivers.qcow2.create import create
from xbd.drivers.qcow2.create_options import CreateOptions
from xbd.drivers.qcow2.header import pack_header, parse_header
from xbd.drivers.qcow2.info import read_info
from xbd.drivers.qcow2.layout import Autoclear, Incompatible

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")


def qemu(*command: str | Path) -> str:
    done = subprocess.run(
        ["qemu-img", *map(str, command)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def told_by_qemu(path: Path) -> dict[str, Any]:
    return dict(json.loads(qemu("info", "--output=json", path)))


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10",
        "compat=1.1,lazy_refcounts=on,refcount_bits=1",
        "extended_l2=on,cluster_size=2M,compression_type=zstd",
        "data_file=DATA",
        "data_file=DATA,data_file_raw=on,extended_l2=on",
    ],
)
def test_the_details_are_qemus(tmp_path: Path, options: str) -> None:
    path = tmp_path / "image"
    options = options.replace("DATA", str(tmp_path / "data"))
    qemu("create", "-q", "-f", "qcow2", "-o", options, path, "5M")
    same_as_qemus(path)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "cipher-alg": "aes-128",
            "cipher-mode": "cbc",
            "ivgen-alg": "essiv",
            "hash-alg": "sha1",
        },
    ],
)
def test_the_details_of_encrypted_images_are_qemus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    monkeypatch.setattr(luks, "UNLOCK_SECONDS", 0.01)
    path, key = tmp_path / "image", tmp_path / "key"
    key.write_text("abc")
    key.chmod(0o600)
    texts = {"format": "luks", "key-file": str(key)} | options
    chosen = parse_options(CreateOptions, {f"encrypt-{name}": texts[name] for name in texts})
    create(path, 5 * MIB, chosen)
    same_as_qemus(path)


def same_as_qemus(path: Path) -> None:
    theirs, ours = told_by_qemu(path), read_info(path)
    assert ours.details == theirs["format-specific"]["data"]
    assert ours.encrypted == theirs.get("encrypted", False)
    assert ours.cluster_size == theirs["cluster-size"]
    assert ours.virtual_size == theirs["virtual-size"] == 5 * MIB
    assert ours.actual_size == theirs["actual-size"]
    assert ours.data_file == theirs["format-specific"]["data"].get("data-file")
    assert (ours.path, ours.format) == (path, "qcow2")


def test_snapshots(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu("create", "-q", "-f", "qcow2", path, "5M")
    qemu("snapshot", "-c", "first", path)
    qemu("resize", path, "6M")
    qemu("snapshot", "-c", "sécond", path)
    theirs = told_by_qemu(path)["snapshots"]
    ours = read_info(path).snapshots
    assert [snapshot.name for snapshot in ours] == ["first", "sécond"]
    assert [snapshot.size for snapshot in ours] == [5 * MIB, 6 * MIB]
    for one, other in zip(ours, theirs, strict=True):
        assert one.id == other["id"]
        assert int(one.date.timestamp()) == other["date-sec"]
        assert one.vm_state_size == other["vm-state-size"]


def test_bitmaps(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu("create", "-q", "-f", "qcow2", path, "5M")
    qemu("bitmap", "--add", "-g", "32k", path, "on")
    qemu("bitmap", "--add", "--disable", path, "off")
    assert read_info(path).details == told_by_qemu(path)["format-specific"]["data"]
    assert len(read_info(path).details["bitmaps"]) == 2


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("base", "DIR/base"),
        ("/some/where", "/some/where"),
        ("file:/some/where", "/some/where"),
        ("nbd:unix:/socket", None),
        ('json:{"driver":"raw"}', None),
    ],
)
def test_what_is_behind(tmp_path: Path, name: str, found: str | None) -> None:
    path = tmp_path / "image"
    qemu("create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", path, "5M")
    info = read_info(path)
    assert info.backing_file == name
    assert info.backing_format == "raw"
    assert info.backing_path == (
        None if found is None else Path(found.replace("DIR", str(tmp_path)))
    )


def test_a_missing_format_is_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu("create", "-q", "-u", "-f", "qcow2", "-b", "base", "-F", "raw", path, "5M")
    header = parse_header(path.read_bytes()[:65536])
    rewrite(path, extensions=())
    assert header.backing_format == "raw"
    assert read_info(path).backing_format is None


def rewrite(path: Path, **changes: Any) -> None:
    """Change an image's header."""
    import attrs

    with path.open("r+b") as file:
        packed = pack_header(attrs.evolve(parse_header(file.read(65536)), **changes))
        file.seek(0)
        file.write(packed + bytes(8))


def test_dirty_and_corrupt_images_are_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu("create", "-q", "-f", "qcow2", path, "5M")
    rewrite(path, incompatible=Incompatible.DIRTY | Incompatible.CORRUPT)
    info = read_info(path)
    assert info.dirty
    assert info.corrupt
    assert info.details["corrupt"]


@pytest.mark.parametrize("content", [b"", b"QFI\xfb", b"x" * 100_000])
def test_what_is_no_image_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image"
    path.write_bytes(content)
    with pytest.raises(DriverError, match=f"^{path}: [^\n]+$"):
        read_info(path)


def test_a_broken_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu("create", "-q", "-f", "qcow2", path, "5M")
    rewrite(path, autoclear=Autoclear.BITMAPS)
    with pytest.raises(DriverError, match=f"{path}: it should have bitmaps"):
        read_info(path)


def test_nothing_but_files_and_devices_is_opened(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(OpenFailed, match="not an image file"):
            read_info(place)
    with pytest.raises(OpenFailed, match="No such file"):
        read_info(tmp_path / "nowhere")


def test_an_image_in_use_can_be_shared(tmp_path: Path) -> None:
    from xbd.drivers.qcow2.host import open_host

    path = tmp_path / "image"
    qemu("create", "-q", "-f", "qcow2", path, "5M")
    host = open_host(path, writable=True)
    try:
        with pytest.raises(OpenFailed, match="locked"):
            read_info(path)
        assert read_info(path, share=True).virtual_size == 5 * MIB
    finally:
        host.close()
