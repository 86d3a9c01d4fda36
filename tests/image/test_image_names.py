"""How images are named: the format is always said, and mistakes are one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from image_world import Run

from xbd.cli import main

COMMANDS = [
    ("create", "X", "1M"),
    ("info", "X"),
    ("resize", "X", "1M"),
    ("snapshot", "list", "X"),
    ("map", "X"),
    ("convert", "X", "imagefile:new"),
    ("convert", "imagefile:there", "X"),
    ("commit", "X"),
    ("rebase", "X", "-b", ""),
]


@pytest.mark.parametrize("words", COMMANDS)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/srv/a.qcow2", "write qcow2:/srv/a.qcow2 or imagefile:/srv/a.qcow2"),
        ("a:b.img/c", "write qcow2:"),
        ("./x:y", "write qcow2:"),
        ("nosuch:/srv/a", "there is no driver 'nosuch' (installed: "),
        ("qcow2:", "no path"),
    ],
)
def test_a_format_is_never_guessed(
    image: Run, place: Path, words: tuple[str, ...], name: str, said: str
) -> None:
    (place / "there").write_bytes(bytes(512))
    told = image(*(name if word == "X" else word for word in words), code=2)
    if name.startswith("a:"):
        said = "there is no driver 'a'"
    assert said in told
    assert told.startswith("xbd: ")
    assert told.count("\n") == 1
    assert {entry.name for entry in place.iterdir()} == {"there"}


def test_check_keeps_qemus_exit_codes_for_mistakes(image: Run) -> None:
    assert "write qcow2:" in image("check", "a.img", code=1)
    assert "No such file" in image("check", "qcow2:nowhere", code=1)
    assert "Usage" in image("check", code=1)
    assert "Usage" in image("check", "qcow2:x", "--nonsense", code=1)
    assert "no driver" in image("check", "nosuch:x", code=1)
    assert "no images that could be worked on" in image("check", "raw:/dev/null", code=1)


def test_options_for_opening_are_not_for_work_on_images(image: Run) -> None:
    assert "takes none" in image("info", "qcow2:x?cache=none", code=2)
    assert "takes none" in image("create", "qcow2:x?cache=none", "1M", code=2)
    assert "no room" in image("create", "qcow2:x", "-b", "qcow2:y?cache=none", code=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("check",), "nothing to check"),
        (("snapshot", "list"), "no snapshots"),
        (("snapshot", "create", "NAME"), "no snapshots"),
        (("snapshot", "apply", "NAME"), "no snapshots"),
        (("snapshot", "delete", "NAME"), "no snapshots"),
        (("commit",), "nothing behind"),
        (("rebase", "-b", "imagefile:b"), "anything behind"),
    ],
)
def test_what_flat_images_cannot_do(image: Run, words: tuple[str, ...], said: str) -> None:
    image("create", "imagefile:a", "1M")
    words = tuple(word for word in words if word != "NAME")
    name = ("one",) if words[0] == "snapshot" and words[1] != "list" else ()
    code = 63 if words == ("check",) else 2
    assert said in image(*words, "imagefile:a", *name, code=code)


NO_IMAGES = {
    "missing": "No such file or directory",
    "junk": "not a qcow2 image",
    "empty": "too short",
    "directory": "a directory",
}


@pytest.mark.parametrize(
    "words",
    [
        ("info", "X"),
        ("check", "X"),
        ("check", "--repair", "all", "X"),
        ("resize", "X", "1M"),
        ("snapshot", "list", "X"),
        ("snapshot", "create", "X", "name"),
        ("snapshot", "apply", "X", "name"),
        ("snapshot", "delete", "X", "name"),
        ("map", "X"),
        ("map", "--json", "X"),
        ("map", "--picture", "X"),
        ("convert", "X", "imagefile:new"),
        ("convert", "imagefile:there", "X", "-n"),
        ("commit", "X"),
        ("rebase", "X", "-b", ""),
        ("create", "qcow2:new", "-b", "X"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_is_named_once(place: Path, words: tuple[str, ...], name: str) -> None:
    """In one line, before anything else is printed or made."""
    (place / "junk").write_bytes(b"junk" * 1000)
    (place / "empty").touch()
    (place / "directory").mkdir()
    (place / "there").write_bytes(bytes(512))
    before = sorted(place.iterdir())
    told = [f"qcow2:{name}" if word == "X" else word for word in words]
    result = CliRunner().invoke(main, ["image", *told])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert NO_IMAGES[name] in result.stderr
    assert result.stderr.count(str(place / name)) == 1
    assert sorted(place.iterdir()) == before
