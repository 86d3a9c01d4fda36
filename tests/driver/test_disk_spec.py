"""DRIVER:PATH?OPTION=VALUE&...: what is understood, and what is refused how."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbd.core.driver import ConfigError, DiskSpec


@pytest.mark.parametrize(
    ("given_text", "driver", "path", "options"),
    [
        ("raw:/dev/vg/disk", "raw", "/dev/vg/disk", {}),
        ("rbd:pool/image@snap", "rbd", "pool/image@snap", {}),
        ("qcow2:/a:b", "qcow2", "/a:b", {}),
        ("raw:/a?direct=no", "raw", "/a", {"direct": "no"}),
        ("raw:/a%3Fb%25c+d?x=1%262&y=a=b", "raw", "/a?b%c+d", {"x": "1&2", "y": "a=b"}),
        ("raw:/caf%C3%A9", "raw", "/café", {}),
        ("raw:/bytes%FF", "raw", "/bytes\udcff", {}),
    ],
)
def test_parse(given_text: str, driver: str, path: str, options: dict[str, str]) -> None:
    assert DiskSpec.parse(given_text) == DiskSpec(driver, path, options)


@pytest.mark.parametrize(
    ("given_text", "why"),
    [
        ("", "not of the form DRIVER:PATH"),
        ("/dev/sda", "not of the form DRIVER:PATH"),
        (":/dev/sda", "no driver"),
        ("Raw:/x", "can't be a driver's name"),
        ("raw:", "no path"),
        ("raw:?a=b", "no path"),
        ("raw:/x?", "nothing after"),
        ("raw:/x?a=1&", "stray '&'"),
        ("raw:/x?a=1&&b=2", "stray '&'"),
        ("raw:/x?a", "NAME=VALUE"),
        ("raw:/x?=1", "NAME=VALUE"),
        ("raw:/x?a.b=1", "can't be an option's name"),
        ("raw:/x?a=", "has no value"),
        ("raw:/x?a-b=1&a_b=2", "given twice"),
        ("raw:/x?path=/y", "stands after the colon"),
        ("raw:/x%", "without two hex digits"),
        ("raw:/x%2", "without two hex digits"),
        ("raw:/x?a=%zz", "without two hex digits"),
        ("raw:/x%00", "control character"),
        ("raw:/x\ny", "control character"),
        ("raw:/x?a=%0a", "control character"),
        ("raw:/" + "x" * 5000, "longer than"),
    ],
)
def test_refusals_are_one_clear_line(given_text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        DiskSpec.parse(given_text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_options_stay_out_of_logs() -> None:
    spec = DiskSpec.parse("rbd:pool/x?key=hunter2")
    assert "hunter2" not in f"{spec} {spec!r}"
    assert str(spec) == "rbd:pool/x"
    with pytest.raises(ConfigError) as caught:
        DiskSpec.parse("rbd:pool/x?key=hunter2&key=hunter2")
    assert "hunter2" not in str(caught.value)


values = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)
keys = st.from_regex(r"[a-z0-9-]{1,8}", fullmatch=True).filter(lambda key: key != "path")


@given(
    st.from_regex(r"[a-z0-9][a-z0-9-]{0,8}", fullmatch=True), values, st.dictionaries(keys, values)
)
def test_format_and_parse_are_inverse(driver: str, path: str, options: dict[str, str]) -> None:
    spec = DiskSpec(driver, path, options)
    if len(spec.format()) <= 4096:
        assert DiskSpec.parse(spec.format()) == spec


@given(st.text(st.sampled_from("raw:/?&=%20aZ\n\udcff"), max_size=30))
def test_any_text_parses_or_is_refused(anything: str) -> None:
    try:
        spec = DiskSpec.parse(anything)
    except ConfigError:
        return
    assert DiskSpec.parse(spec.format()) == spec
