"""How a disk is written down: ``DRIVER:PATH[?OPTION=VALUE&...]``.

Everything after DRIVER may contain ``%XX`` for any byte; ``%``, ``?`` in PATH and ``&`` in values
must be written so.  ``+`` is just a plus.  A path's bytes that are not UTF-8 go through
``surrogateescape``, as everywhere in Python.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote_from_bytes

import attrs

from xbd.core.errors import ConfigError

MAX_LENGTH: Final = 4096
"""Characters in a disk's text: what fits in a XenStore value."""

DRIVER_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PERCENT: Final = re.compile(rb"%([0-9A-Fa-f]{2})?")
_SAFE_IN_PATH: Final = "/:@,=~+!*()[]&"
_SAFE_IN_VALUE: Final = "/:@,~+!*()[]?="


@attrs.frozen
class DiskSpec:
    """A driver, the path it is given, and its options, all still text."""

    driver: str
    path: str
    options: Mapping[str, str] = attrs.field(factory=dict, repr=False)

    @classmethod
    def parse(cls, text: str) -> DiskSpec:
        """Take apart ``DRIVER:PATH[?OPTION=VALUE&...]``; raises `ConfigError`."""
        if len(text) > MAX_LENGTH:
            raise ConfigError(f"a disk's text is longer than {MAX_LENGTH} characters")
        driver, colon, rest = text.partition(":")
        if not colon:
            raise ConfigError(f"disk {_shown(text)} is not of the form DRIVER:PATH")
        if not driver:
            raise ConfigError(f"disk {_shown(text)} names no driver before the colon")
        if not DRIVER_NAME.fullmatch(driver):
            raise ConfigError(f"{driver!r} can't be a driver's name (lower case, digits and -)")
        encoded, question, query = rest.partition("?")
        path = _decode(encoded, "the path", text)
        if not path:
            raise ConfigError(f"disk {_shown(text)} has no path after '{driver}:'")
        if question and not query:
            raise ConfigError(f"disk {_shown(text)} has nothing after the '?'")
        return cls(driver, path, _parse_query(query, text) if question else {})

    def texts(self) -> dict[str, str]:
        """All that the driver's options class is given; the path is the option ``path``."""
        return {"path": self.path, **self.options}

    def format(self) -> str:
        """The text that `parse` turns into this again.  It may contain secrets."""
        path = _encode(self.path, _SAFE_IN_PATH)
        pairs = [f"{key}={_encode(value, _SAFE_IN_VALUE)}" for key, value in self.options.items()]
        return f"{self.driver}:{path}" + ("?" + "&".join(pairs) if pairs else "")

    def __str__(self) -> str:
        """For logs and error texts: without options, since those may be secret."""
        return f"{self.driver}:{_encode(self.path, _SAFE_IN_PATH + ' ?&')}"


def _parse_query(query: str, text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    seen = {"path"}
    for part in query.split("&"):
        key, equals, value = part.partition("=")
        if not part:
            raise ConfigError(f"disk {_shown(text)} has an empty option (a stray '&')")
        if not equals or not key:
            raise ConfigError(f"disk {_shown(text)}: options are written NAME=VALUE")
        if not _KEY.fullmatch(key):
            raise ConfigError(f"disk {_shown(text)}: {key[:64]!r} can't be an option's name")
        normal = key.replace("_", "-")
        if normal == "path":
            raise ConfigError(f"disk {_shown(text)}: the path stands after the colon, not in '?'")
        if normal in seen:
            raise ConfigError(f"disk {_shown(text)}: option {key!r} is given twice")
        if not value:
            raise ConfigError(f"disk {_shown(text)}: option {key!r} has no value")
        seen.add(normal)
        options[key] = _decode(value, f"option {key!r}", text)
    return options


def _decode(encoded: str, what: str, text: str) -> str:
    raw = encoded.encode("utf-8", "surrogateescape")
    for match in _PERCENT.finditer(raw):
        if match[1] is None:
            raise ConfigError(
                f"disk {_shown(text)}: {what} has a '%' without two hex digits (write %25 for '%')"
            )
    decoded = _PERCENT.sub(lambda m: bytes((int(m[1], 16),)), raw).decode(
        "utf-8", "surrogateescape"
    )
    if any(unicodedata.category(character) == "Cc" for character in decoded):
        raise ConfigError(f"disk {_shown(text)}: {what} contains a control character")
    return decoded


def _encode(value: str, safe: str) -> str:
    return quote_from_bytes(value.encode("utf-8", "surrogateescape"), safe)


def _shown(text: str) -> str:
    """The text without its options (they may be secret), in one short line."""
    head, question, _ = text.partition("?")
    shown = head if len(head) <= 200 else head[:200] + "..."
    return repr(shown + "?..." if question else shown)
