"""Resizing images: sizes, content and soundness as qemu-img sees them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from xbd.core.driver import (
    Backing,
    Capability,
    ConfigError,
    DiskSpec,
    DriverError,
    WriteRequest,
    open_disk,
    parse_options,
)
from xbd.core.hostio import newfile
from xbd.core.units import GIB, KIB, MIB
from xbd.drivers.qcow2 import luks
from xbd.drivers.qcow2.create import create
from xbd.drivers.qcow2.create_options import CreateOptions
from xbd.drivers.qcow2.device import Qcow2Device
from xbd.drivers.qcow2.info import read_info
from xbd.drivers.qcow2.opening import Wishes, open_image
from xbd.drivers.qcow2.resize import resize
from xbd.drivers.qcow2.sizing import set_size
from xbd.drivers.qcow2.writing import Writer
from xbd.drivers.qcow2.zeroing import Zeroer

TIB = GIB << 10

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")


def qemu(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    assert "failed" not in done.stdout
    return done.stdout


def make(path: Path, size: int | None, backing: Backing | None = None, **options: str) -> Path:
    create(path, size, parse_options(CreateOptions, options), backing=backing)
    return path


def io(path: Path, *commands: str, kind: str = "qcow2") -> None:
    qemu("qemu-io", "-f", kind, *(part for line in commands for part in ("-c", line)), path)


def allocated(path: Path) -> int:
    told = json.loads(qemu("qemu-img", "check", "--output=json", path))
    assert not told.keys() & {"leaks", "corruptions"}
    return int(told.get("allocated-clusters", 0))


KINDS: list[dict[str, str]] = [
    {},
    {"compat": "0.10"},
    {"cluster_size": "512", "refcount_bits": "64"},
    {"extended_l2": "on"},
    {"data_file": "data"},
    {"data_file": "data", "data_file_raw": "on"},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("sizes", [(MIB, 5 * MIB), (5 * MIB, MIB), (MIB + 512, 70 * MIB + 512)])
def test_the_content_stays_and_zeroes_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], sizes: tuple[int, int]
) -> None:
    monkeypatch.chdir(tmp_path)  # QEMU looks for data files here
    old, new = sizes
    path = make(tmp_path / "image", old, **options)
    flat = tmp_path / "flat"
    flat.write_bytes(bytes(old))
    writes = [f"write -P 3 0 {old}", f"write -z {300 * KIB} 64k", f"discard {500 * KIB} 64k"]
    io(path, *writes[:2])
    io(flat, *writes[:2], kind="raw")
    resize(path, new, shrink=True)
    qemu("qemu-img", "resize", "-q", "--shrink", "-f", "raw", flat, str(new))
    assert read_info(path).virtual_size == new
    qemu("qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, flat)
    allocated(path)
    io(path, f"write -P 4 {new - 512} 512", f"read -P 4 {new - 512} 512")
    if "data_file_raw" in options:
        assert (tmp_path / "data").stat().st_size >= new
        qemu("qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, tmp_path / "data")


def test_what_was_cut_off_does_not_come_back(tmp_path: Path) -> None:
    path = make(tmp_path / "image", 5 * MIB)
    io(path, "write -P 9 0 5M")
    resize(path, MIB, shrink=True)
    assert allocated(path) == 16
    resize(path, 5 * MIB)
    io(path, "read -P 9 0 1M", "read -P 0 1M 4M")


@pytest.mark.parametrize("options", [{}, {"compat": "0.10"}, {"extended_l2": "on"}])
def test_a_longer_backing_file_does_not_show(tmp_path: Path, options: dict[str, str]) -> None:
    (tmp_path / "base").write_bytes(b"\x07" * (3 * MIB))
    path = make(tmp_path / "image", MIB + 512, Backing(file="base", format="raw"), **options)
    resize(path, 5 * MIB)
    io(path, f"read -P 7 0 {MIB + 512}", f"read -P 0 {MIB + 512} {4 * MIB - 512}")
    allocated(path)


@pytest.mark.parametrize("options", [{}, {"compat": "0.10"}, {"extended_l2": "on"}])
def test_a_guests_state_does_not_show(tmp_path: Path, options: dict[str, str]) -> None:
    """QEMU keeps it behind the disk's end, and does let it show."""
    path = make(tmp_path / "image", MIB, **options)
    io(path, "write -P 5 0 1M")
    before = qemu("qemu-img", "map", path)
    image = open_image(path, Wishes(writable=True))
    coverage = image.header.l1_coverage
    set_size(image, Zeroer(image, Writer(image)), 2 * coverage)
    request = WriteRequest(coverage + 64 * KIB, [memoryview(bytearray(b"s" * 128 * KIB))])
    Writer(image).write([request])
    image.update_header(size=MIB)
    image.close()
    resize(path, coverage + 96 * KIB)
    resize(path, 3 * coverage)
    assert qemu("qemu-img", "map", path) == before
    assert allocated(path) == 16


def test_a_large_disk_gets_a_longer_table(tmp_path: Path) -> None:
    path = make(tmp_path / "image", MIB)
    io(path, "write -P 5 0 64k")
    resize(path, 100 * TIB)
    io(path, "read -P 5 0 64k", f"write -P 6 {100 * TIB - 512} 512")
    assert allocated(path) == 2
    with pytest.raises(DriverError, match="32 MiB"):
        resize(path, 1 << 60)
    assert read_info(path).virtual_size == 100 * TIB


@pytest.mark.slow
@pytest.mark.parametrize("how", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("options", [*KINDS[:2], {"cluster_size": "2M"}, *KINDS[3:]])
def test_preallocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, options: dict[str, str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path / "image", MIB + 512, **options)
    io(path, "write -P 3 0 1M")
    before = allocated(path)
    holder = tmp_path / "data" if "data_file" in options else path
    taken_before = holder.stat().st_blocks * 512
    resize(path, 9 * MIB, preallocation=how)
    cluster = read_info(path).cluster_size or 0
    new = 9 * MIB // cluster - -(-(MIB + 512) // cluster) + (9 * MIB % cluster > 0)
    assert allocated(path) - before == new
    taken = holder.stat().st_blocks * 512 - taken_before
    assert taken > 6 * MIB if how != "metadata" else taken < 2 * MIB
    io(path, "read -P 3 0 1M", "read -P 0 1M 8M", "write -P 4 1M 8M", "read -P 4 1M 8M")
    assert allocated(path) <= -(-9 * MIB // cluster)


def test_preallocation_of_small_clusters(tmp_path: Path) -> None:
    path = make(tmp_path / "image", MIB, cluster_size="512", refcount_bits="64")
    resize(path, MIB + 300 * KIB, preallocation="metadata")
    assert allocated(path) == 600
    io(path, f"read -P 0 0 {MIB + 300 * KIB}", "write -P 4 1M 300k", "read -P 4 1M 300k")


def test_preallocation_over_a_longer_backing_file(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"\x07" * (3 * MIB))
    for number, options in enumerate(({}, {"extended_l2": "on"})):
        path = make(tmp_path / str(number), MIB, Backing(file="base", format="raw"), **options)
        resize(path, 5 * MIB, preallocation="metadata")
        io(path, "read -P 7 0 1M", "read -P 0 1M 4M")
        assert allocated(path) == 64


def test_an_encrypted_image_needs_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(luks, "UNLOCK_SECONDS", 0.01)
    key = tmp_path / "key"
    key.write_text("abc")
    key.chmod(0o600)
    path = make(tmp_path / "image", MIB + 512, encrypt_format="luks", encrypt_key_file=str(key))
    with pytest.raises(DriverError, match="key-file"):
        resize(path, 5 * MIB)
    resize(path, 5 * MIB, key_file=key, preallocation="metadata")
    secret = ["--object", f"secret,id=key,file={key}", "--image-opts"]
    image = f"driver=qcow2,file.filename={path},encrypt.key-secret=key"
    qemu("qemu-io", *secret, "-c", "read -P 0 0 5M", "-c", "write -P 1 0 5M", image)
    qemu("qemu-io", *secret, "-c", "read -P 1 0 5M", image)
    qemu("qemu-img", "check", *secret, image)


def test_a_failed_preallocation_leaves_the_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = make(tmp_path / "image", MIB)
    monkeypatch.setattr(newfile, "write_zero_bytes", full)
    with pytest.raises(DriverError, match="No space left"):
        resize(path, 5 * MIB, preallocation="full")
    assert read_info(path).virtual_size == MIB
    io(path, "read -P 0 0 1M")


@pytest.mark.parametrize(
    ("prepare", "size", "options", "said"),
    [
        ([], KIB, {}, "--shrink"),
        ([], KIB, {"shrink": True, "preallocation": "full"}, "grow"),
        ([], GIB, {"preallocation": "all"}, "none of off, metadata"),
        (["bitmap", "--add", "IMAGE", "b"], GIB, {}, "bitmaps"),
    ],
)
def test_refusals_change_nothing(
    tmp_path: Path, prepare: list[str], size: int, options: dict[str, object], said: str
) -> None:
    path = make(tmp_path / "image", MIB)
    if prepare:
        qemu("qemu-img", *(word.replace("IMAGE", str(path)) for word in prepare))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=said):
        resize(path, size, **options)  # type: ignore[arg-type]
    assert path.read_bytes() == before


def test_snapshots_of_version_2_have_the_disks_size(tmp_path: Path) -> None:
    for compat in ("0.10", "1.1"):
        path = make(tmp_path / compat, MIB, compat=compat)
        io(path, "write -P 3 0 1M")
        qemu("qemu-img", "snapshot", "-c", "one", path)
    with pytest.raises(ConfigError, match="snapshots"):
        resize(tmp_path / "0.10", 5 * MIB)
    path = tmp_path / "1.1"
    resize(path, 5 * MIB)
    resize(path, 64 * KIB, shrink=True)
    allocated(path)
    qemu("qemu-img", "snapshot", "-a", "one", path)
    io(path, "read -P 3 0 1M")


def test_an_l1_table_longer_than_one_refcount_block_counts(tmp_path: Path) -> None:
    image = tmp_path / "long.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", image, "1M")
    resize(image, 2 * GIB)
    assert "No errors" in qemu("qemu-img", "check", image)
    assert image.stat().st_size < MIB


@pytest.mark.parametrize("what", ["bitmap", "disabled bitmap", "snapshot"])
async def test_a_disk_in_use_keeps_its_size_if_it_must(tmp_path: Path, what: str) -> None:
    """QEMU could not open it otherwise."""
    path = tmp_path / "image"
    compat = "0.10" if what == "snapshot" else "1.1"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"compat={compat}", path, "1M")
    if "bitmap" in what:
        disabled = ["--disable"] if "disabled" in what else []
        qemu("qemu-img", "bitmap", "--add", *disabled, "-f", "qcow2", path, "b")
    spec = DiskSpec.parse(f"qcow2:{path}")
    async with open_disk(spec, device_id="test", writable=True) as access:
        if what == "snapshot":
            assert Capability.RESIZE in access.capabilities
            await access.create_snapshot("one")
        else:
            assert Capability.RESIZE not in access.capabilities
        with pytest.raises(DriverError):
            await access.resize(8 * GIB)
        device = access.device
        assert isinstance(device, Qcow2Device)
        with pytest.raises(DriverError, match=r"delete them|remove them"):
            await device.resize(8 * GIB)
        assert access.geometry.size == MIB
    qemu("qemu-img", "check", "-q", path)
    assert read_info(path).virtual_size == MIB
