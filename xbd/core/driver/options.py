"""A driver's options: declared once as attrs fields, given as strings, checked all together.

    @attrs.frozen(kw_only=True)
    class Options:
        path: Path = option(absolute_path, help="the image")
        size: int | None = option(size, default=None, help="bytes; none: as it is")

A field named ``read_ahead`` is the option ``read-ahead`` for those who type it.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Generic, TypeVar, overload

import attrs

from xbd.core.errors import OptionError

T = TypeVar("T")
D = TypeVar("D")

_METADATA_KEY: Final = "xbd.option"
_SIZE_PATTERN: Final = re.compile(r"([0-9]{1,19})(?:([KMGTP])(?:iB|B)?|B)?", re.IGNORECASE)
_SIZE_SHIFT: Final = {"K": 10, "M": 20, "G": 30, "T": 40, "P": 50}
_LARGEST: Final = (1 << 63) - 1
_TRUE: Final = frozenset({"yes", "true", "on", "1"})
_FALSE: Final = frozenset({"no", "false", "off", "0"})


class _Required(enum.Enum):
    REQUIRED = enum.auto()


@attrs.frozen
class Converter(Generic[T]):
    """A function from text to a value, with a name for help texts.

    It raises `ValueError` whose text completes the sentence "size: ...".  Any function that does
    so can be given to `option`; this class only adds the name.
    """

    name: str
    function: Callable[[str], T]

    def __call__(self, text: str) -> T:
        return self.function(text)


@attrs.frozen(kw_only=True)
class OptionInfo:
    """What can be told about an option without opening anything."""

    name: str
    """As it is typed: with ``-``."""
    type: str
    help: str
    required: bool
    default: Any
    """Meaningless when `required`."""
    secret: bool


@overload
def option(converter: Callable[[str], T], *, help: str, secret: bool = False) -> T: ...


@overload
def option(
    converter: Callable[[str], T],
    *,
    default: D,
    help: str,
    secret: bool = False,
) -> T | D: ...


def option(
    converter: Callable[[str], Any],
    *,
    default: Any = _Required.REQUIRED,
    help: str,  # noqa: A002
    secret: bool = False,
) -> Any:
    """A field of a driver's options class, converted from text by `converter`.

    Without `default` the option must be given.  The value of a `secret` option is never printed.
    """
    metadata = {_METADATA_KEY: (converter, help, secret)}
    if default is _Required.REQUIRED:
        return attrs.field(metadata=metadata, repr=not secret)
    return attrs.field(default=default, metadata=metadata, repr=not secret)


def check_options_class(cls: type) -> None:
    """Raise `OptionError` unless `cls` is fit to be `DriverDescriptor.options`."""
    if not attrs.has(cls):
        raise OptionError(f"{cls!r} is not an attrs class")
    if cls.__setattr__ is object.__setattr__:
        raise OptionError(f"{cls.__name__} is not frozen: use @attrs.frozen(kw_only=True)")
    for field in attrs.fields(cls):
        if _METADATA_KEY not in field.metadata:
            raise OptionError(f"{cls.__name__}.{field.name} was not made by option()")
        if not field.init or field.alias != field.name:
            raise OptionError(f"{cls.__name__}.{field.name} must not begin with an underscore")


def describe_options(cls: type) -> list[OptionInfo]:
    """The options of a driver's options class, in the order of their declaration."""
    described = []
    for field in _fields(cls):
        converter, text, secret = field.metadata[_METADATA_KEY]
        described.append(
            OptionInfo(
                name=_typed(field.name),
                type=_type_name(converter),
                help=text,
                required=field.default is attrs.NOTHING,
                default=None if field.default is attrs.NOTHING else field.default,
                secret=secret,
            )
        )
    return described


def parse_options(cls: type[T], values: Mapping[str, str]) -> T:
    """An instance of the options class `cls` made from texts.

    Raises `OptionError` that names every unknown, missing or malformed option in one line.
    """
    fields = {field.name: field for field in _fields(cls)}
    converted: dict[str, Any] = {}
    problems: list[str] = []
    unknown: list[str] = []
    for key, text in values.items():
        field = fields.get(_attribute(key))
        if field is None:
            unknown.append(key)
        elif field.name in converted:
            problems.append(f"{_typed(field.name)}: given twice")
        else:
            converted[field.name] = _convert(field, text, problems)
    if unknown:
        problems.append(_unknown(unknown, fields))
    problems += [
        f"{_typed(field.name)}: missing ({field.metadata[_METADATA_KEY][1]})"
        for field in fields.values()
        if field.default is attrs.NOTHING and field.name not in converted
    ]
    if problems:
        raise OptionError("; ".join(problems))
    try:
        return cls(**converted)
    except ValueError as error:
        raise OptionError(str(error)) from error


def _convert(field: attrs.Attribute[Any], text: str, problems: list[str]) -> Any:
    converter, _, secret = field.metadata[_METADATA_KEY]
    try:
        return converter(text)
    except ValueError as error:
        # A converter's complaint quotes the value.
        problems.append(f"{_typed(field.name)}: {'not valid' if secret else error}")
        return None


def _unknown(keys: list[str], fields: Mapping[str, Any]) -> str:
    names = ", ".join(_typed(name) for name in fields) or "none"
    quoted = ", ".join(repr(key) for key in keys)
    return f"unknown option{'s' if len(keys) > 1 else ''} {quoted} (known: {names})"


def _fields(cls: type) -> tuple[attrs.Attribute[Any], ...]:
    return attrs.fields(cls) if attrs.has(cls) else ()


def _type_name(converter: Any) -> str:
    name = (
        converter.name
        if isinstance(converter, Converter)
        else getattr(converter, "__name__", "text")
    )
    return str(name)


def _typed(attribute: str) -> str:
    return attribute.replace("_", "-")


def _attribute(key: str) -> str:
    return key.replace("-", "_")


def _parse_boolean(text: str) -> bool:
    lowered = text.lower()
    if lowered in _TRUE:
        return True
    if lowered in _FALSE:
        return False
    raise ValueError(f"{text!r} is neither yes nor no")


def _parse_size(text: str) -> int:
    match = _SIZE_PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size (examples: 512, 64K, 10G; powers of 1024)")
    value = int(match[1]) << _SIZE_SHIFT.get((match[2] or "").upper(), 0)
    if value > _LARGEST:
        raise ValueError(f"{text!r} is too large")
    return value


def _parse_positive_int(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) == 0:
        raise ValueError(f"{text!r} is not a whole number above 0")
    return int(text)


def _parse_absolute_path(text: str) -> Path:
    if not text.startswith("/"):
        raise ValueError(f"{text!r} is not an absolute path")
    if "\0" in text:
        raise ValueError(f"{text!r} contains a NUL")
    return Path(text)


def _parse_text(text: str) -> str:
    if not text:
        raise ValueError("is empty")
    return text


def choice(*values: str) -> Converter[str]:
    """One of these words."""

    def parse(text: str) -> str:
        if text not in values:
            raise ValueError(f"{text!r} is none of {', '.join(values)}")
        return text

    return Converter("|".join(values), parse)


boolean: Final = Converter("yes|no", _parse_boolean)
"""``yes``, ``true``, ``on``, ``1`` or ``no``, ``false``, ``off``, ``0``."""

size: Final = Converter("size", _parse_size)
"""Bytes, with K, M, G, T or P for powers of 1024 (``10G``, ``10GiB``)."""

positive_int: Final = Converter("number", _parse_positive_int)
"""A whole number above 0."""

absolute_path: Final = Converter("path", _parse_absolute_path)
"""An absolute `pathlib.Path`."""

text: Final = Converter("text", _parse_text)
"""Any text but the empty one."""
