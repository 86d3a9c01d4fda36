"""New images: they are what qemu-img makes of the same options."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbd.core.driver import Backing, ConfigError, DriverError, parse_options
from xbd.core.hostio import newfile
from xbd.core.units import GIB, KIB, MIB
from xbd.drivers.qcow2 import luks
from xbd.drivers.qcow2.create import create
from xbd.drivers.qcow2.create_options import CreateOptions
from xbd.drivers.qcow2.header import looks_like_qcow2

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")

TIB = GIB << 10
EIB = TIB << 20


def make(path: Path, size: int | None, backing: Backing | None = None, **options: str) -> Path:
    create(path, size, parse_options(CreateOptions, options), backing=backing)
    return path


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def good(*command: str | Path) -> str:
    done = run(*command)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def qemu_create(
    path: Path, size: int | None, backing: Backing | None = None, **options: str
) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if backing is not None:
        command += ["-b", backing.file, "-F", backing.format]
    if options:
        command += ["-o", ",".join(f"{name}={value}" for name, value in options.items())]
    return run(*command, path, *([] if size is None else [str(size)]))


def info(path: Path) -> dict[str, Any]:
    """What qemu-img says of an image, without what depends on its place and on the host."""
    told = json.loads(good("qemu-img", "info", "--output=json", path))
    for key in ("filename", "actual-size", "full-backing-filename"):
        told.pop(key, None)
    return dict(told)


def check(path: Path) -> dict[str, Any]:
    told = json.loads(good("qemu-img", "check", "--output=json", path))
    assert told["check-errors"] == 0
    assert not told.keys() & {"leaks", "corruptions"}
    return {key: told.get(key) for key in ("allocated-clusters", "total-clusters")}


def mapped(path: Path) -> list[tuple[int, int, int, bool]]:
    """Ranges, which image of the chain tells of them, and whether it has a place for them."""
    ranges: list[tuple[int, int, int, bool]] = []
    for entry in json.loads(good("qemu-img", "map", "--output=json", path)):
        start, length, kind = entry["start"], entry["length"], (entry["depth"], "offset" in entry)
        if ranges and ranges[-1][2:] == kind:
            start, length = ranges[-1][0], ranges.pop()[1] + length
        ranges.append((start, length, *kind))
    return ranges


def use(path: Path, size: int) -> None:
    """Have QEMU write to the image's beginning, end and middle, and find it sound."""
    places = sorted({0, size // 2 - size // 2 % 512, size - 512})
    writes = [f"write -P {7 + n} {at} 512" for n, at in enumerate(places)]
    reads = [f"read -P {7 + n} {at} 512" for n, at in enumerate(places)]
    commands = [part for line in writes + reads for part in ("-c", line)]
    told = good("qemu-io", "-f", "qcow2", *commands, path)
    assert "failed" not in told
    assert "error" not in told
    check(path)


# -- every option, as qemu-img has it ---------------------------------------------------------

OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "cluster_size": st.sampled_from(["512", "1k", "4k", "8k", "16k", "64k", "2M", "256", "3k"]),
        "compat": st.sampled_from(["0.10", "1.1", "v2", "v3"]),
        "preallocation": st.sampled_from(["off", "metadata", "falloc", "full"]),
        "refcount_bits": st.sampled_from(["1", "2", "4", "8", "16", "32", "64", "3"]),
        "lazy_refcounts": st.sampled_from(["on", "off"]),
        "extended_l2": st.sampled_from(["on", "off"]),
        "compression_type": st.sampled_from(["zlib", "zstd"]),
        "data_file_raw": st.sampled_from(["on", "off"]),
    },
)


@pytest.mark.slow
@given(
    OPTIONS,
    st.sampled_from([0, 512, 1000, 300 * KIB, MIB + 512, 3 * MIB]),
    st.booleans(),
    st.sampled_from([None, "raw", "qcow2"]),
)
def test_any_options_give_what_qemu_img_makes_of_them(
    options: dict[str, str], size: int, data_file: bool, behind: str | None
) -> None:
    with TemporaryDirectory() as name:
        place = Path(name)
        backing = None
        if behind is not None:
            backing = Backing(file=str(place / "behind"), format=behind)
            good("qemu-img", "create", "-q", "-f", behind, backing.file, "200k")
            good("qemu-io", "-f", behind, "-c", "write -P 9 64k 64k", backing.file)
        theirs, ours = place / "theirs", place / "ours"
        their_options, our_options = dict(options), dict(options)
        if data_file:
            their_options["data_file"] = str(place / "their-data")
            our_options["data_file"] = str(place / "our-data")
        done = qemu_create(theirs, size, backing, **their_options)
        if done.returncode != 0:
            with pytest.raises(ConfigError):
                make(ours, size, backing, **our_options)
            assert {entry.name for entry in place.iterdir()} <= {"behind", "theirs", "their-data"}
            return
        make(ours, size, backing, **our_options)
        assert info(ours) == (
            json.loads(json.dumps(info(theirs)).replace("their-data", "our-data"))
        )
        assert check(ours) == check(theirs)
        assert mapped(ours) == mapped(theirs)
        good("qemu-img", "compare", theirs, ours)
        assert ours.stat().st_size % (int(info(ours)["cluster-size"])) == 0
        if size:
            use(ours, info(ours)["virtual-size"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (64 * TIB, {"cluster_size": "2M"}),
        (128 * GIB, {"cluster_size": "512"}),
        (2 * EIB, {"cluster_size": "2M"}),
        (5 * TIB, {"cluster_size": "2M", "preallocation": "metadata"}),
        (256 * MIB, {"cluster_size": "512", "preallocation": "metadata", "refcount_bits": "64"}),
        (40 * GIB + 512, {"preallocation": "metadata", "refcount_bits": "1"}),
    ],
)
def test_large_disks(tmp_path: Path, size: int, options: dict[str, str]) -> None:
    path = make(tmp_path / "image", size, **options)
    assert info(path)["virtual-size"] == size
    clusters = -(-size // info(path)["cluster-size"])
    allocated = clusters if options.get("preallocation") else None
    assert check(path)["allocated-clusters"] == allocated
    assert path.stat().st_blocks * 512 < 80 * MIB


@pytest.mark.parametrize(
    ("size", "options", "said"),
    [
        (128 * GIB + 512, {"cluster-size": "512"}, "larger cluster-size"),
        (2 * EIB + 512, {"cluster-size": "2M"}, "too large"),
        ((1 << 63) - 1, {}, "too large"),
        (
            100 * GIB,
            {"cluster-size": "512", "preallocation": "metadata", "refcount-bits": "64"},
            "preallocation=off",
        ),
        (1 << 56, {"cluster-size": "2M", "preallocation": "metadata"}, "preallocation=off"),
        (None, {}, "needs a size"),
        (MIB, {"data-file-raw": "on"}, "needs data-file"),
        (MIB, {"encrypt-format": "luks"}, "encrypt-key-file"),
        (MIB, {"encrypt-key-file": "/nowhere"}, "encrypt-format"),
        (MIB, {"compat": "0.10", "extended-l2": "on", "lazy-refcounts": "on"}, "; lazy|; extended"),
    ],
)
def test_what_cannot_be_is_one_line(
    tmp_path: Path, size: int | None, options: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        make(tmp_path / "image", size, **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# -- what is behind an image ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_the_size_comes_from_the_backing_image(tmp_path: Path, kind: str) -> None:
    good("qemu-img", "create", "-q", "-f", kind, tmp_path / "base", "5M")
    path = make(tmp_path / "image", None, Backing(file="base", format=kind))
    assert info(path) == info(path) | {
        "virtual-size": 5 * MIB,
        "backing-filename": "base",
        "backing-filename-format": kind,
    }


def test_a_flat_backing_image_is_rounded_up_to_whole_sectors(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"x" * 1000)
    path = make(tmp_path / "image", None, Backing(file="base", format="raw"))
    assert info(path)["virtual-size"] == 1024
    good("qemu-io", "-c", "read -P 120 0 1000", path)


def test_names_are_relative_to_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "base").write_bytes(bytes(MIB))
    monkeypatch.chdir(tmp_path)
    backing = Backing(file="base", format="raw")
    path = make(Path("images/image"), None, backing)
    make(Path("images/other"), MIB, data_file="data")
    assert info(path)["virtual-size"] == MIB
    assert (tmp_path / "images" / "data").stat().st_size == MIB


@pytest.mark.parametrize(
    ("file", "kind", "said"),
    [
        ("nowhere", "raw", "No such file"),
        ("flat", "qcow2", "not a qcow2 image"),
        ("flat", "vmdk", "vmdk.*only raw or qcow2"),
        ("nbd:flat", "raw", "protocol.*begins with ./"),
        ("x" * 300, "raw", "too long"),
        (".", "raw", "directory"),
        ("./" * 600 + "flat", "raw", "1023 bytes"),
    ],
)
def test_a_backing_image_has_to_be_one(tmp_path: Path, file: str, kind: str, said: str) -> None:
    (tmp_path / "flat").write_bytes(bytes(MIB))
    with pytest.raises((ConfigError, DriverError), match=said):
        make(tmp_path / "image", MIB, Backing(file=file, format=kind))
    assert [entry.name for entry in tmp_path.iterdir()] == ["flat"]


def test_a_name_has_to_fit_into_a_small_cluster(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(MIB))
    backing = Backing(file="./" * 200 + "base", format="raw")
    with pytest.raises(ConfigError, match="shorter name or a larger cluster"):
        make(tmp_path / "image", MIB, backing, cluster_size="512")
    make(tmp_path / "image", MIB, backing, cluster_size="1k")


# -- preallocation ----------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "taken"), [("metadata", 0), ("falloc", 8), ("full", 8)])
@pytest.mark.parametrize("where", ["here", "data file"])
def test_what_preallocation_takes(tmp_path: Path, how: str, taken: int, where: str) -> None:
    options = {} if where == "here" else {"data_file": str(tmp_path / "data")}
    path = make(tmp_path / "image", 8 * MIB, preallocation=how, **options)
    holder = path if where == "here" else tmp_path / "data"
    blocks = holder.stat().st_blocks * 512
    assert taken * MIB <= blocks < (taken + 1) * MIB


def test_data_lies_in_one_piece_in_the_disks_order(tmp_path: Path) -> None:
    path = make(tmp_path / "image", 1200 * MIB, preallocation="metadata")
    entries = json.loads(good("qemu-img", "map", "--output=json", path))
    first = entries[0]["offset"]
    assert all(entry["offset"] - first == entry["start"] for entry in entries)


def test_progress_is_told_to_the_end(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    create(
        tmp_path / "image",
        20 * MIB,
        CreateOptions(preallocation="full"),
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == sorted(told)
    assert len({total for _, total in told}) == 1
    assert told[-1][0] == told[-1][1]


# -- encryption -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cluster_size": "512", "preallocation": "metadata"},
        {"extended_l2": "on", "preallocation": "full", "encrypt_cipher_alg": "aes-128"},
        {"compat": "0.10", "encrypt_ivgen_alg": "essiv", "encrypt_cipher_mode": "cbc"},
        {"cluster_size": "2M", "encrypt_hash_alg": "sha512", "data_file": "DATA"},
    ],
)
def test_encrypted_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    monkeypatch.setattr(luks, "UNLOCK_SECONDS", 0.01)
    key = tmp_path / "key"
    key.write_text("secret")
    key.chmod(0o600)
    if "data_file" in options:
        options |= {"data_file": str(tmp_path / "data")}
    path = make(
        tmp_path / "image", 3 * MIB, encrypt_format="luks", encrypt_key_file=str(key), **options
    )
    secret = ["--object", f"secret,id=key,file={key}", "--image-opts"]
    image = f"driver=qcow2,file.filename={path},encrypt.key-secret=key"
    lines = ("read -P 0 0 3M", "write -P 7 1M 64k", "read -P 7 1M 64k", "read -P 0 0 1M")
    told = good("qemu-io", *secret, *(part for line in lines for part in ("-c", line)), image)
    assert "failed" not in told
    good("qemu-img", "check", *secret, image)
    assert b"\7" * 512 not in path.read_bytes()


# -- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", ["image", "data"])
def test_nothing_is_replaced(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_bytes(b"precious")
    with pytest.raises(ConfigError, match="exists already"):
        make(tmp_path / "image", MIB, data_file="data")
    assert [entry.name for entry in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_bytes() == b"precious"


def test_a_link_to_nowhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "image").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="exists already"):
        make(tmp_path / "image", MIB)
    assert not (tmp_path / "elsewhere").exists()


def test_a_missing_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no directory"):
        make(tmp_path / "a" / "image", MIB)


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(newfile, "write_zero_bytes", full)
    with pytest.raises(DriverError, match="No space left"):
        make(tmp_path / "image", MIB, preallocation="full", data_file="data")
    assert list(tmp_path.iterdir()) == []


def test_until_all_is_durable_the_file_is_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xbd.drivers.qcow2.host import Host

    flushed = []
    flush = Host.flush

    def watched(host: Host) -> None:
        flushed.append(looks_like_qcow2((tmp_path / "image").read_bytes()[:104]))
        flush(host)

    monkeypatch.setattr(Host, "flush", watched)
    path = make(tmp_path / "image", MIB)
    assert flushed
    assert not any(flushed)
    assert looks_like_qcow2(path.read_bytes()[:104])


def test_random_writes_by_qemu_to_a_preallocated_image(tmp_path: Path) -> None:
    path = make(tmp_path / "image", 4 * MIB, preallocation="metadata", cluster_size="4k")
    flat = tmp_path / "flat"
    flat.write_bytes(bytes(4 * MIB))
    rng = random.Random(1)
    lines = []
    for _ in range(40):
        at = rng.randrange(4 * MIB - 64 * KIB) // 512 * 512
        lines += ["-c", f"write -P {rng.randrange(1, 255)} {at} {rng.randrange(1, 128) * 512}"]
    good("qemu-io", "-f", "qcow2", *lines, path)
    good("qemu-io", "-f", "raw", *lines, flat)
    good("qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, flat)
    check(path)
