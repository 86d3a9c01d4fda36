"""The daemon's configuration file: TOML, every key optional, unknown keys refused."""

from __future__ import annotations

import enum
import re
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

import attrs
import cattrs
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn

from xbd.core.backend.policy import FeatureToggles, Limits, OnStop, Policy, between
from xbd.core.control import DEFAULT_SOCKET
from xbd.core.datapath.config import DataPath, GrantMode
from xbd.core.errors import ConfigError

DEFAULT_CONFIG_PATH: Final = Path("/etc/xbd/xbd.toml")
"""Read when it exists and no other file is named."""


# Validators begin their errors with the attribute's name: unlike converters', which cattrs names.
def _absolute(_instance: object, attribute: attrs.Attribute[Any], value: Path | None) -> None:
    if value is not None and not value.is_absolute():
        raise ValueError(f"{attribute.name}: {str(value)!r} is not an absolute path")


def _each_absolute(instance: object, attribute: attrs.Attribute[Any], value: list[Path]) -> None:
    for path in value:
        _absolute(instance, attribute, path)


def _plain(instance: object, attribute: attrs.Attribute[Any], value: Path | None) -> None:
    """A path that stands in a URI among QEMU's options, where some characters mean something."""
    _absolute(instance, attribute, value)
    if value is not None and not re.fullmatch(r"[A-Za-z0-9/._-]+", str(value)):
        raise ValueError(
            f"{attribute.name}: {str(value)!r} has other characters than A-Z a-z 0-9 / . _ -"
        )


def _kinds(_instance: object, attribute: attrs.Attribute[Any], value: list[str]) -> None:
    if not value:
        raise ValueError(f"{attribute.name}: at least one kind is needed")
    for kind in value:
        if not kind.isascii() or not kind.replace("_", "").isalnum():
            raise ValueError(
                f"{attribute.name}: {kind!r} is not a kind of backend; usual are vbd3 and vbd"
            )


@attrs.frozen(kw_only=True)
class StoreConfig:
    """``[store]``: where XenStore is."""

    path: Path | None = attrs.field(default=None, validator=_absolute)
    """Socket or device of XenStore; None: the one this system has."""
    domid: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(between(0, 0x7FEF))
    )
    """This domain's number; None: ask XenStore."""


@attrs.frozen(kw_only=True)
class BackendConfig:
    """``[backend]``: which disks are served, and how."""

    kinds: list[str] = attrs.field(factory=lambda: ["vbd3"], validator=_kinds)
    """Backend directories to watch."""
    grants: GrantMode = GrantMode.AUTO
    datapath: DataPath = DataPath.AUTO
    """Who moves the bytes: threads in C, or Python."""
    io_threads: int = attrs.field(default=0, validator=between(0, 64))
    """Of the native data path; 0: by the number of CPUs."""
    spin_us: int = attrs.field(default=-1, validator=between(-1, 1000))
    """How long one of them looks for work before it sleeps; -1: 50, and 0 with a single CPU."""
    journal_dir: Path | None = attrs.field(default=Path("/run/xbd/journal"), validator=_absolute)
    """On tmpfs; survives the daemon."""
    image_dirs: list[Path] = attrs.field(factory=list, validator=_each_absolute)
    """Directories in which files that an image names (backing files) may be opened."""
    nbd_dir: Path | None = attrs.field(default=Path("/run/xbd/nbd"), validator=_plain)
    """Where disks of HVM guests have sockets for QEMU, which emulates them; empty: nowhere."""
    on_stop: OnStop = OnStop.CLOSE
    """SIGTERM closes the disks (guests lose them), or leaves them for the next daemon."""


@attrs.frozen(kw_only=True)
class ControlConfig:
    """``[control]``: the socket that ``xbd list`` talks to."""

    socket: Path = attrs.field(default=DEFAULT_SOCKET, validator=_absolute)


@attrs.frozen(kw_only=True)
class LogConfig:
    """``[log]``."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


@attrs.frozen(kw_only=True)
class Config:
    """The whole file."""

    store: StoreConfig = attrs.field(factory=StoreConfig)
    backend: BackendConfig = attrs.field(factory=BackendConfig)
    limits: Limits = attrs.field(factory=Limits)
    features: FeatureToggles = attrs.field(factory=FeatureToggles)
    control: ControlConfig = attrs.field(factory=ControlConfig)
    log: LogConfig = attrs.field(factory=LogConfig)

    @property
    def policy(self) -> Policy:
        """What devices are told."""
        return Policy(
            grants=self.backend.grants,
            datapath=self.backend.datapath,
            io_threads=self.backend.io_threads,
            spin_us=self.backend.spin_us,
            journal_dir=self.backend.journal_dir,
            image_dirs=tuple(self.backend.image_dirs),
            on_stop=self.backend.on_stop,
            nbd_dir=self.backend.nbd_dir,
            limits=self.limits,
            features=self.features,
        )


_SECTIONS: Final = (
    StoreConfig,
    BackendConfig,
    Limits,
    FeatureToggles,
    ControlConfig,
    LogConfig,
    Config,
)
_TYPE_NAMES: Final = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _strict(wanted: type) -> Any:
    """A hook that converts nothing: cattrs would take ``"no"`` for true."""
    accepted = (int, float) if wanted is float else (wanted,)

    def structure(value: Any, _type: Any) -> Any:
        if type(value) not in accepted:
            raise ValueError(f"{value!r} is not {_TYPE_NAMES[wanted]}")
        return wanted(value)

    return structure


def _structure_list(converter: cattrs.Converter, value: Any, type_: Any) -> list[Any]:
    """Lists alone: cattrs would take a text for a list of its letters."""
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list")
    (item,) = get_args(type_)
    return [converter.structure(entry, item) for entry in value]


def _has_origin(wanted: Any) -> Callable[[Any], bool]:
    def check(type_: Any) -> bool:
        origin: Any = get_origin(type_)
        return origin is wanted

    return check


def _structure_path(value: Any, _type: Any) -> Path:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a path")
    return Path(value)


def _structure_optional_path(value: Any, type_: Any) -> Path | None:
    return None if value == "" else _structure_path(value, type_)


def _structure_enum(value: Any, type_: type[enum.Enum]) -> enum.Enum:
    try:
        return type_(value)
    except ValueError:
        known = ", ".join(str(member.value) for member in type_)
        raise ValueError(f"{value!r} is not one of: {known}") from None


def _structure_literal(value: Any, type_: Any) -> str:
    known: tuple[str, ...] = get_args(type_)
    if value not in known:
        raise ValueError(f"{value!r} is not one of: {', '.join(known)}")
    return str(value)


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for plain in (bool, int, float, str):
        converter.register_structure_hook(plain, _strict(plain))
    converter.register_structure_hook(Path, _structure_path)
    converter.register_structure_hook(Path | None, _structure_optional_path)
    for choice in (DataPath, GrantMode, OnStop):
        converter.register_structure_hook(choice, _structure_enum)
    converter.register_structure_hook_func(_has_origin(Literal), _structure_literal)
    converter.register_structure_hook_func(_has_origin(list), partial(_structure_list, converter))
    for section in _SECTIONS:
        hook = make_dict_structure_fn(section, converter, _cattrs_forbid_extra_keys=True)
        converter.register_structure_hook(section, hook)
    return converter


def load_config(path: Path | None = None) -> Config:
    """Read the file; the defaults if `path` is None and the default file does not exist.

    Raises `ConfigError` with one line that names the file and everything wrong in it.
    """
    if path is None:
        if not DEFAULT_CONFIG_PATH.exists():
            return Config()
        path = DEFAULT_CONFIG_PATH
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None
    return parse_config(text, name=str(path))


def parse_config(text: str, *, name: str) -> Config:
    """`load_config` for a text; `name` stands in error messages."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not valid TOML: {error}") from None
    for key, value in data.items():
        if not isinstance(value, dict):
            raise ConfigError(f"{name}: {key} stands outside of a [section]")
    try:
        return _make_converter().structure(data, Config)
    except ClassValidationError as error:
        raise ConfigError(f"{name}: {'; '.join(_problems(error, ''))}") from None


def _problems(error: BaseException, where: str) -> list[str]:
    """One phrase for each thing wrong, ``section.key: what``."""
    if isinstance(error, ClassValidationError):
        inner, plain = error.group_exceptions()
        problems = [
            phrase
            for exception, note in inner
            for phrase in _problems(exception, f"{where}.{note.name}".lstrip("."))
        ]
        return problems + [_section_problem(exception, where) for exception in plain]
    return [f"{where}: {error}" if where else str(error)]


def _section_problem(error: BaseException, where: str) -> str:
    """What is wrong with a section as a whole, or what a validator says."""
    if isinstance(error, ForbiddenExtraKeysError):
        known = ", ".join(sorted(field.name for field in attrs.fields(error.cl)))
        extra = ", ".join(f"{where}.{key}".lstrip(".") for key in sorted(error.extra_fields))
        return f"unknown: {extra} (known: {known})"
    return f"{where}.{error}".lstrip(".")
