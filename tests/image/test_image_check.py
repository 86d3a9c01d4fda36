"""``xbd image check`` and ``snapshot``: their words, their JSON and their exit codes."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from image_world import Run

from xbd.cli import main
from xbd.cli.image.output import finished_first
from xbd.core.driver import CheckReport
from xbd.core.units import MIB
from xbd.drivers.qcow2.format import Qcow2Format
from xbd.drivers.qcow2.image import Image


@pytest.fixture
def path(place: Path, image: Run, qemu: Run) -> Path:
    """An image with some data."""
    image("create", "qcow2:a", "8M")
    qemu("qemu-io", "-c", "write -P 1 0 3M", "a")
    return place / "a"


def check(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["image", "check", *words])
    return result.exit_code, result.stdout, result.stderr


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def leak(path: Path) -> None:
    """A cluster behind the end that is counted."""
    end = path.stat().st_size
    with path.open("ab") as file:
        file.truncate(end + -end % 65536 + 65536)
    patch(path, 2 * 65536 + (end + -end % 65536) // 65536 * 2, b"\0\1")


def corrupt(path: Path) -> None:
    """The count of a cluster with data is 0."""
    with path.open("rb") as file:
        (l1,) = struct.unpack_from(">Q", file.read(65536), 40)
        file.seek(l1)
        (l2,) = struct.unpack(">Q", file.read(8))
        file.seek(l2 & 0x00FFFFFFFFFFFE00)
        (data,) = struct.unpack(">Q", file.read(8))
    patch(path, 2 * 65536 + (data & 0x00FFFFFFFFFFFE00) // 65536 * 2, b"\0\0")


def test_a_sound_image(path: Path) -> None:
    code, text, errors = check("qcow2:a")
    assert (code, errors) == (0, "")
    assert text.splitlines() == [
        "No errors were found on the image.",
        "48/128 = 37.50% allocated, 0.00% fragmented, 0.00% compressed clusters",
        f"Image end offset: {path.stat().st_size}",
    ]


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [(leak, 3, "1 leaked clusters: they take space"), (corrupt, 2, "2 errors: data may")],
)
def test_damage_has_qemus_exit_code(path: Path, damage: object, code: int, said: str) -> None:
    damage(path)  # type: ignore[operator]
    theirs = subprocess.run(
        ["qemu-img", "check", "--output=json", "a"], capture_output=True, text=True, check=False
    )
    assert theirs.returncode == code
    ours, text, errors = check("qcow2:a")
    assert (ours, errors) == (code, "")
    assert said in text
    ours, text, _ = check("--json", "qcow2:a")
    assert ours == code
    told = json.loads(text)
    assert told.pop("messages") != []
    assert told == json.loads(theirs.stdout) | {"filename": str(path)} | {
        key: told[key] for key in ("fragmented-clusters", "compressed-clusters")
    }


@pytest.mark.parametrize(
    ("damage", "how", "said"),
    [
        (leak, "leaks", "1 leaked clusters were given back"),
        (leak, "all", "1 leaked clusters were given back"),
        (corrupt, "all", "2 corruptions were repaired"),
    ],
)
def test_repair(path: Path, qemu: Run, damage: object, how: str, said: str) -> None:
    damage(path)  # type: ignore[operator]
    code, text, errors = check("-r", how, "qcow2:a")
    assert (code, errors) == (0, "")
    assert said in text
    assert "No errors were found" in text
    qemu("qemu-img", "check", "a")
    qemu("qemu-io", "-c", "read -P 1 0 3M", "a")


def test_leaks_alone_do_not_mend_corruptions(path: Path) -> None:
    corrupt(path)
    assert check("--repair", "leaks", "qcow2:a")[0] == 2
    assert check("qcow2:a")[0] == 2


def test_what_could_not_be_checked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = CheckReport(errors=2, corruptions=1, leaks=3)
    monkeypatch.setattr(Qcow2Format, "check", lambda *_, **__: report)
    code, text, _ = check("qcow2:a")
    assert code == 1
    assert "2 places could not be read" in text
    patch(path, 0, b"nope")
    monkeypatch.undo()
    code, text, errors = check(f"qcow2:{path}")
    assert (code, text) == (1, "")
    assert errors.startswith("xbd: ")
    assert "not a qcow2 image" in errors


def test_snapshots(image: Run, qemu: Run, path: Path) -> None:
    assert image("snapshot", "list", "qcow2:a") == "No snapshots.\n"
    assert image("snapshot", "create", "qcow2:a", "before") == (
        f"Created snapshot before: qcow2:{path}\n"
    )
    qemu("qemu-io", "-c", "write -P 2 0 3M", "a")
    told = json.loads(image("snapshot", "create", "--json", "qcow2:a", "after"))
    assert [(one["id"], one["name"]) for one in told] == [("1", "before"), ("2", "after")]
    assert json.loads(image("snapshot", "list", "--json", "qcow2:a")) == told
    image("snapshot", "apply", "qcow2:a", "before")
    qemu("qemu-io", "-c", "read -P 1 0 3M", "a")
    image("snapshot", "delete", "qcow2:a", "1")
    lines = image("snapshot", "list", "qcow2:a").splitlines()
    assert [line.split()[:2] for line in lines] == [["ID", "TAG"], ["2", "after"]]
    assert "nosuch" in image("snapshot", "delete", "qcow2:a", "nosuch", code=2)
    qemu("qemu-img", "check", "a")
    assert path.stat().st_size > 6 * MIB


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("work", ["create", "apply", "delete"])
def test_snapshots_are_finished_before_a_signal_ends_them(
    path: Path, image: Run, qemu: Run, monkeypatch: pytest.MonkeyPatch, work: str, number: int
) -> None:
    if work != "create":
        image("snapshot", "create", "qcow2:a", "one")
        qemu("qemu-io", "-c", "write -P 2 0 1M", "a")
    update = Image.update_header

    def signalled(opened: Image, **changes: Any) -> None:
        os.kill(os.getpid(), number)
        update(opened, **changes)

    monkeypatch.setattr(Image, "update_header", signalled)
    result = CliRunner().invoke(main, ["image", "snapshot", work, "qcow2:a", "one"])
    assert (result.exit_code, result.stderr) == (128 + number, "")
    assert "snapshot one" in result.stdout
    qemu("qemu-img", "check", "-q", "a")
    assert ("one" in qemu("qemu-img", "snapshot", "-l", "a")) == (work != "delete")


def test_a_second_signal_ends_it_at_once() -> None:
    came: list[int] = []

    def twice() -> None:
        with finished_first():
            os.kill(os.getpid(), signal.SIGINT)
            assert not came
            os.kill(os.getpid(), signal.SIGINT)
            assert came == [signal.SIGINT]

    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        with pytest.raises(SystemExit):
            twice()
    finally:
        signal.signal(signal.SIGINT, before)
    assert came
