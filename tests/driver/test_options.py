"""Options: texts in, a typed and checked object out, every complaint in one line."""

from __future__ import annotations

import contextlib
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbd.core.driver import (
    OptionError,
    absolute_path,
    boolean,
    choice,
    option,
    parse_options,
    positive_int,
    size,
    text,
)
from xbd.core.driver.options import check_options_class, describe_options


@attrs.frozen(kw_only=True)
class Options:
    path: Path = option(absolute_path, help="the image")
    read_ahead: int | None = option(size, default=None, help="bytes to read ahead")
    direct: bool = option(boolean, default=True, help="bypass the page cache")
    mode: str = option(choice("fast", "safe"), default="safe", help="how")
    depth: int = option(positive_int, default=4, help="requests in flight")
    password: str = option(text, default="", help="for the server", secret=True)

    def __attrs_post_init__(self) -> None:
        if self.mode == "fast" and not self.direct:
            raise ValueError("mode=fast needs direct=yes")


def test_all_options_are_converted() -> None:
    parsed = parse_options(
        Options,
        {"path": "/dev/x", "read-ahead": "64K", "direct": "no", "depth": "9", "password": "pw"},
    )
    assert parsed == Options(
        path=Path("/dev/x"), read_ahead=65536, direct=False, depth=9, password="pw"
    )


def test_names_may_be_typed_with_underscores() -> None:
    assert parse_options(Options, {"path": "/x", "read_ahead": "1"}).read_ahead == 1


def test_every_problem_is_told_at_once_in_one_line() -> None:
    with pytest.raises(OptionError) as caught:
        parse_options(Options, {"direct": "maybe", "depth": "0", "speed": "9", "warp": "1"})
    message = str(caught.value)
    assert "\n" not in message
    assert "direct: 'maybe' is neither yes nor no" in message
    assert "depth: '0' is not a whole number above 0" in message
    assert "unknown options 'speed', 'warp' (known: path, read-ahead, direct," in message
    assert "path: missing (the image)" in message


def test_the_same_option_in_two_spellings_is_refused() -> None:
    with pytest.raises(OptionError, match="read-ahead: given twice"):
        parse_options(Options, {"path": "/x", "read-ahead": "1", "read_ahead": "2"})


def test_the_class_has_the_last_word() -> None:
    with pytest.raises(OptionError, match="mode=fast needs direct=yes"):
        parse_options(Options, {"path": "/x", "mode": "fast", "direct": "no"})


def test_secrets_are_never_printed() -> None:
    @attrs.frozen(kw_only=True)
    class Secretive:
        pin: int = option(positive_int, help="for the safe", secret=True)

    assert "1234" not in repr(parse_options(Secretive, {"pin": "1234"}))
    with pytest.raises(OptionError) as caught:
        parse_options(Secretive, {"pin": "hunter2"})
    assert str(caught.value) == "pin: not valid"


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [("0", 0), ("512", 512), ("512B", 512), ("4k", 4096), ("4KiB", 4096), ("1TB", 1 << 40)],
)
def test_sizes(given_text: str, expected: int) -> None:
    assert size(given_text) == expected


@pytest.mark.parametrize("bad", ["", "-1", "1.5G", "10 Q", "K", "0x10", "9999999999999P", "١"])
def test_bad_sizes(bad: str) -> None:
    with pytest.raises(ValueError, match=r"size|large"):
        size(bad)


@pytest.mark.parametrize("bad", ["relative", "", "/a\0b"])
def test_bad_paths(bad: str) -> None:
    with pytest.raises(ValueError, match=r"path|NUL"):
        absolute_path(bad)


@given(st.text())
def test_converters_raise_only_value_errors(anything: str) -> None:
    for converter in (boolean, size, absolute_path, positive_int, text, choice("a", "b")):
        with contextlib.suppress(ValueError):
            converter(anything)


def test_descriptions() -> None:
    described = {info.name: info for info in describe_options(Options)}
    assert described["path"].required
    assert described["path"].type == "path"
    assert described["mode"].type == "fast|safe"
    assert described["direct"].default is True
    assert described["password"].secret


def test_classes_that_are_not_fit() -> None:
    @attrs.define
    class Thawed:
        path: Path = option(absolute_path, help="x")

    @attrs.frozen
    class Plain:
        path: str = "x"

    for cls, why in ((Thawed, "not frozen"), (Plain, "not made by option"), (int, "not an attrs")):
        with pytest.raises(OptionError, match=why):
            check_options_class(cls)
    check_options_class(Options)
