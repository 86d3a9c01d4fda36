"""What lies behind an image, and who may say so."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import attrs
import pytest
from host_storage import loop_device
from qcow2_walk import tool

from xbd.core.driver import DriverError, OpenFailed
from xbd.core.driver.buffers import aligned_buffer
from xbd.core.hostio.files import CACHED, O_DIRECT
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2 import chain, confined
from xbd.drivers.qcow2.chain import MAX_IMAGES, RawBacking, open_backing, open_data_file
from xbd.drivers.qcow2.confined import named_path
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import Header, pack_header
from xbd.drivers.qcow2.host import Host, open_host
from xbd.drivers.qcow2.image import Backing
from xbd.drivers.qcow2.layout import ExtensionType
from xbd.drivers.qcow2.offline import read_header
from xbd.drivers.qcow2.opening import Wishes, make_image

SIZE = MIB


@pytest.fixture(autouse=True)
def _no_descriptor_is_left_open() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    yield
    assert set(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


def make(host: Host, header: Header, backing: Backing | None) -> Backing:
    image = make_image(host, header, Wishes(with_backing=False))
    image.backing = backing
    return image


def behind(path: Path, image_dirs: Sequence[Path] | None = None, **options: object) -> Backing:
    """What lies behind an image, whose own file is closed again."""
    with closing(open_host(path, writable=False)) as host:
        opened = open_backing(host, read_header(host), make, image_dirs=image_dirs, **options)  # type: ignore[arg-type]
    assert opened is not None
    return opened


def content(backing: Backing, length: int | None = None) -> bytes:
    data = aligned_buffer(backing.size if length is None else length, 4096)
    backing.readv(0, [data])
    return bytes(data)


def qcow2(path: Path, backing: str | Path | None = None, kind: str = "qcow2") -> Path:
    named = () if backing is None else ("-u", "-b", backing, "-F", kind)
    tool("qemu-img", "create", "-q", "-f", "qcow2", *named, path, str(SIZE))
    return path


def image(path: Path, **fields: object) -> Path:
    """A header alone: enough to name what is behind it."""
    header = Header(refcount_table_clusters=1, refcount_table_offset=65536)
    kind = fields.pop("backing_format", None)
    if isinstance(kind, str):
        header = header.with_extension(ExtensionType.BACKING_FORMAT, kind.encode())
    header = attrs.evolve(header, **fields)
    path.write_bytes(pack_header(header).ljust(2 * 65536, b"\0"))
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


def refused(path: Path, image_dirs: Sequence[Path] | None = None, **options: object) -> str:
    with pytest.raises((OpenFailed, CorruptImage)) as caught:
        behind(path, image_dirs, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- chains that QEMU made ----------------------------------------------------------------------


def test_a_chain_of_images_reads_as_qemu_reads_it(base: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    middle = qcow2(tmp_path / "images" / "middle", "../base.raw", "raw")
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 7 100k 300k", middle)
    upper = qcow2(tmp_path / "upper", middle)
    tool("qemu-io", "-f", "qcow2", "-c", "write -z 200k 64k", "-c", "write -P 8 900k 64k", upper)
    top = qcow2(tmp_path / "top", upper)
    tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, tmp_path / "flat")
    with closing(behind(top, [tmp_path])) as backing:
        assert backing.size == SIZE
        assert content(backing) == (tmp_path / "flat").read_bytes()
        extent = backing.resolve(0, 4096)
        assert extent is not None
        assert os.pread(extent.fd, 4096, extent.offset) == base.read_bytes()[:4096]
        assert fcntl.fcntl(extent.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def test_nothing_is_behind_most_images(tmp_path: Path) -> None:
    with closing(open_host(qcow2(tmp_path / "top"), writable=False)) as host:
        assert open_backing(host, read_header(host), make, image_dirs=[]) is None


def test_a_shorter_backing_file_is_followed_by_zeroes(base: Path, tmp_path: Path) -> None:
    os.truncate(base, 1000)
    start = base.read_bytes()
    with closing(behind(qcow2(tmp_path / "top", base, "raw"))) as backing:
        assert backing.size == 1000
        assert content(backing, 4096) == start.ljust(4096, b"\0")
        after = bytearray(b"x" * 100)
        backing.readv(5000, [memoryview(after)])
        assert after == bytes(100)
        assert backing.status(0, 4096)[-1] == (3096, True)
        assert backing.status(8192, 512) == [(512, True)]
        extent = backing.resolve(0, 4096)
        assert extent is not None
        assert extent.length == 512
        assert backing.resolve(512, 512) is None
        assert backing.resolve(1 << 40, 512) is None


# -- formats ------------------------------------------------------------------------------------


def test_a_format_is_never_guessed(base: Path, tmp_path: Path) -> None:
    # What a guest could write into its raw disk: an image that names a secret.
    qcow2(base, "/etc/passwd", "raw")
    top = image(tmp_path / "top", backing_file="base.raw")
    text = refused(top)
    assert "never guessed" in text
    assert "backing-format=raw|qcow2" in text
    with closing(behind(top, backing_format="raw")) as backing:
        assert content(backing, 4) == b"QFI\xfb"
    advice = text[text.index("(") + 1 : text.index(")")].replace("FORMAT", "raw")
    subprocess.run(shlex.split(advice), check=True, cwd=tmp_path)
    with closing(behind(top)) as backing:
        assert content(backing, 4) == b"QFI\xfb"


def test_the_option_is_for_the_first_backing_file_alone(base: Path, tmp_path: Path) -> None:
    image(tmp_path / "middle", backing_file="base.raw")
    top = image(tmp_path / "top", backing_file="middle", backing_format="raw")
    assert "middle does not say" in refused(top, backing_format="qcow2")


def test_other_formats_are_refused(base: Path, tmp_path: Path) -> None:
    for kind in ("vmdk", "", "\x1b[2J"):
        text = refused(image(tmp_path / "top", backing_file="base.raw", backing_format=kind))
        assert "only raw|qcow2 is supported" in text
        assert text.isprintable()


def test_a_backing_file_of_another_format_than_said_is_refused(base: Path, tmp_path: Path) -> None:
    assert "base.raw: it is not a qcow2 image" in refused(qcow2(tmp_path / "top", base))


# -- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("base", "/images/base"),
        ("../base", "/images/../base"),
        ("./nbd:base", "/images/nbd:base"),
        ("dir/a:b", "/images/dir/a:b"),
        ("/other/base", "/other/base"),
        ("file:/other/base", "/other/base"),
    ],
)
def test_names_are_paths(name: str, path: str) -> None:
    assert named_path(name, Path("/images"), "the backing file") == Path(path)


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver": "file", "filename": "/etc/passwd"}',
        "nbd://10.0.0.1/disk",
        "nbd:unix:/run/socket",
        "https://example.org/disk",
        "file:base",
        "a:b",
        "fat:rw:/",
    ],
)
def test_protocols_are_refused(tmp_path: Path, name: str) -> None:
    top = image(tmp_path / "top", backing_file=name, backing_format="raw")
    assert "only paths are supported" in refused(top)


@pytest.mark.parametrize("name", ["a\0b", "\x1b[2J\n", "x" * 300, "a/\udcff"])
def test_names_that_nobody_has_are_one_line(tmp_path: Path, name: str) -> None:
    refused(image(tmp_path / "top", backing_file=name, backing_format="raw"))


def test_what_is_no_disk_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, problem in (
        ("missing", "ENOENT"),
        ("pipe", "is a named pipe"),
        (".", "is a directory"),
        ("/dev/zero", "is a character device"),
    ):
        assert problem in refused(image(tmp_path / "top", backing_file=name, backing_format="raw"))


# -- confinement --------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    directory.mkdir()
    (directory / "inside").write_bytes(bytes(SIZE))
    (tmp_path / "images-too").mkdir()
    (tmp_path / "images-too" / "outside").write_bytes(bytes(SIZE))
    return directory


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("images/inside", True),
        ("images/../images/inside", True),
        ("link-to-inside", True),
        ("images-too/outside", False),
        ("images/../images-too/outside", False),
        ("images/link-to-outside", False),
        ("images/link-to-directory/outside", False),
        ("/etc/passwd", False),
    ],
)
def test_images_open_nothing_outside_of_image_dirs(
    images: Path, tmp_path: Path, name: str, allowed: bool
) -> None:
    (tmp_path / "link-to-inside").symlink_to(images / "inside")
    (images / "link-to-outside").symlink_to("../images-too/outside")
    (images / "link-to-directory").symlink_to(tmp_path / "images-too")
    top = image(tmp_path / "top", backing_file=name, backing_format="raw")
    (tmp_path / "allowed").symlink_to(images)  # a configured directory may be a link
    for image_dirs in ([images], [tmp_path / "missing", tmp_path / "allowed"]):
        if allowed:
            behind(top, image_dirs).close()
        else:
            text = refused(top, image_dirs)
            assert "add its directory to image_dirs" in text
            assert ("(that is " in text) is ("link" in name or ".." in name)
    assert "image_dirs" in refused(top, [])
    behind(top, None).close()


def test_every_image_of_the_chain_is_confined(images: Path, tmp_path: Path) -> None:
    middle = image(images / "middle", backing_file="/etc/passwd", backing_format="raw")
    top = image(tmp_path / "top", backing_file=str(middle), backing_format="qcow2")
    assert f"{middle}: the backing file /etc/passwd is not in a directory" in refused(top, [images])


@pytest.mark.parametrize("proc", [True, False])
def test_a_name_that_changes_between_check_and_opening_is_noticed(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proc: bool
) -> None:
    def exchange(path: Path, **options: bool) -> Host:
        (images / "inside").unlink()
        (images / "inside").symlink_to(tmp_path / "images-too" / "outside")
        return open_host(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(confined, "open_host", exchange)
    if not proc:
        monkeypatch.setattr(confined, "_OPEN_FILES", tmp_path / "none")
    top = image(tmp_path / "top", backing_file="images/inside", backing_format="raw")
    assert "image_dirs" in refused(top, [images])


# -- circles and depth --------------------------------------------------------------------------


def test_circles_are_noticed(tmp_path: Path) -> None:
    itself = image(tmp_path / "itself", backing_file="itself", backing_format="qcow2")
    assert "go round in a circle" in refused(itself)
    image(tmp_path / "a", backing_file="b", backing_format="qcow2")
    (tmp_path / "link").symlink_to("a")
    os.link(tmp_path / "a", tmp_path / "hard")
    for name in ("a", "link", "hard"):
        image(tmp_path / "b", backing_file=name, backing_format="qcow2")
        assert "circle" in refused(tmp_path / "b")
        top = image(tmp_path / "top", backing_file="b", backing_format="qcow2")
        assert "circle" in refused(top)
        raw = image(tmp_path / "raw", backing_file="b", backing_format="qcow2")
        image(tmp_path / "b", backing_file="raw", backing_format="raw")
        assert "circle" in refused(raw)


def test_long_chains_work_up_to_a_limit(base: Path, tmp_path: Path) -> None:
    lower, kind = base, "raw"
    for number in range(MAX_IMAGES + 1):
        path = tmp_path / f"{number:03}"
        fields = {"size": SIZE, "l1_size": 1, "l1_table_offset": 65536}
        image(path, backing_file=lower.name, backing_format=kind, **fields)
        lower, kind = path, "qcow2"
    with closing(behind(tmp_path / f"{MAX_IMAGES - 1:03}")) as backing:
        assert content(backing) == base.read_bytes()
        assert sum(length for length, _ in backing.status(0, SIZE)) == SIZE
        assert backing.resolve(0, SIZE) is not None
    assert f"more than {MAX_IMAGES} images" in refused(lower)


# -- sharing and failing ------------------------------------------------------------------------


def test_backing_files_are_shared_and_nobody_writes_to_them(base: Path, tmp_path: Path) -> None:
    top, other = qcow2(tmp_path / "top", base, "raw"), qcow2(tmp_path / "other", base, "raw")
    with (
        closing(behind(top)),
        closing(behind(other)),
        pytest.raises(OpenFailed, match="locked by another process"),
    ):
        open_host(base, writable=True)
    with closing(open_host(base, writable=True)):
        assert "locked" in refused(top)
        behind(top, lock=False).close()


def test_a_failure_anywhere_leaves_nothing_open(base: Path, tmp_path: Path) -> None:
    qcow2(tmp_path / "middle", base, "raw")
    top = qcow2(tmp_path / "top", tmp_path / "middle")

    def fail(host: Host, header: Header, backing: Backing | None) -> Backing:
        raise CorruptImage("no")

    with closing(open_host(top, writable=False)) as host, pytest.raises(CorruptImage):
        open_backing(host, read_header(host), fail, image_dirs=None)


def test_direct_io_is_used_where_its_units_fit(base: Path, tmp_path: Path) -> None:
    top = qcow2(tmp_path / "top", base, "raw")
    with closing(open_host(top, writable=False, direct=True)) as host:
        if not host.direct:
            pytest.skip("the filesystem of the temporary directory has no O_DIRECT")
        header, units = read_header(host), host.alignment
        smaller = attrs.evolve(units, offset=units.offset // 2)
        for direct, alignment, expected in (
            (True, units, True),
            (True, smaller, False),
            (True, CACHED, False),
            (False, units, False),
        ):
            host.alignment = alignment
            opened = open_backing(host, header, make, image_dirs=None, direct=direct)
            assert opened is not None
            with closing(opened) as backing:
                extent = backing.resolve(0, SIZE)
                assert extent is not None
                assert bool(fcntl.fcntl(extent.fd, fcntl.F_GETFL) & O_DIRECT) is expected
                assert content(backing) == base.read_bytes()


# -- raw images ---------------------------------------------------------------------------------


@pytest.fixture
def holes(tmp_path: Path) -> Path:
    path = tmp_path / "holes"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for offset in (256 * KIB, 640 * KIB):
            file.seek(offset)
            file.write(b"x" * 128 * KIB)
        file.flush()
        os.fsync(file.fileno())
    if path.stat().st_blocks * 512 >= SIZE:
        pytest.skip("the filesystem of the temporary directory has no holes")
    return path


def test_holes_of_raw_images_read_as_zeroes(holes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(RawBacking(open_host(holes, writable=False))) as backing:
        pieces = [
            (256 * KIB, True),
            (128 * KIB, False),
            (256 * KIB, True),
            (128 * KIB, False),
            (256 * KIB, True),
        ]
        assert backing.status(0, SIZE) == pieces
        assert backing.status(300 * KIB, 4096) == [(4096, False)]
        assert backing.status(0, SIZE + 512)[-1] == (512, True)
        monkeypatch.setattr(chain, "MAX_RUNS", 2)
        monkeypatch.setattr(chain, "data_runs", lambda fd, offset, length: [(length // 2, False)])
        assert backing.status(0, SIZE) == [
            (SIZE // 2, True),
            (SIZE // 4, True),
            (SIZE // 4, False),
        ]


def test_what_the_host_refuses_is_a_driver_error(
    holes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, offset: int, length: int) -> list[tuple[int, bool]]:
        raise OSError(errno.EIO, "disk")

    monkeypatch.setattr(chain, "data_runs", fail)
    with closing(RawBacking(open_host(holes, writable=False))) as backing:
        with pytest.raises(DriverError, match="look for holes"):
            backing.status(0, SIZE)
        backing.close()
        with pytest.raises(DriverError):
            backing.readv(0, [memoryview(bytearray(512))])


def test_a_block_device_can_lie_behind_an_image(base: Path, tmp_path: Path) -> None:
    with loop_device(base) as device:
        top = image(tmp_path / "top", backing_file=str(device), backing_format="raw")
        with closing(behind(top, [Path("/dev")])) as backing:
            assert backing.size == SIZE
            assert content(backing) == base.read_bytes()
            assert backing.status(0, SIZE) == [(SIZE, False)]
        assert "image_dirs" in refused(top, [tmp_path])


# -- external data files ------------------------------------------------------------------------


def open_data(
    path: Path, image_dirs: Sequence[Path] | None = None, *, writable: bool = False, **options: Path
) -> Host:
    with closing(open_host(path, writable=False)) as host:
        return open_data_file(
            host, read_header(host), image_dirs=image_dirs, writable=writable, **options
        )


def test_a_data_file_is_opened_as_the_image_is(tmp_path: Path) -> None:
    top = tmp_path / "top"
    settings = f"data_file={tmp_path / 'data'},data_file_raw=on"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", settings, top, str(SIZE))
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 9 64k 64k", top)
    with closing(open_data(top, [tmp_path], writable=True)) as data:
        assert data.read(64 * KIB, 64 * KIB) == b"\x09" * 64 * KIB
        data.write(0, b"ours")
        with pytest.raises(OpenFailed, match="locked"):
            open_data(top)
    tool("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0x6f 0 1", top)
    with closing(open_data(top, [tmp_path])) as data, pytest.raises(DriverError):
        data.write(0, b"ours")


def test_data_files_are_confined_unless_the_administrator_names_them(
    images: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "images-too" / "outside"
    header = Header().with_extension(ExtensionType.DATA_FILE, str(outside).encode())
    top = image(tmp_path / "top", extensions=header.extensions)
    with pytest.raises(OpenFailed, match="image_dirs"):
        open_data(top, [images])
    open_data(top, [images.parent]).close()
    open_data(top, [], override=outside).close()
    with pytest.raises(OpenFailed, match="ENOENT"):
        open_data(top, None, override=tmp_path / "missing")


def test_an_image_is_not_its_own_data_file(images: Path, tmp_path: Path) -> None:
    top = image(tmp_path / "top")
    with pytest.raises(OpenFailed, match="data-file=/PATH"):
        open_data(top)
    (tmp_path / "link").symlink_to("top")
    for name in ("top", "link"):
        with pytest.raises(OpenFailed, match="names itself"):
            open_data(top, override=tmp_path / name, writable=True)
