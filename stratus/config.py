"""Where the service is and how to sign in.

A flag wins over `STRATUS_*`, that over `~/.config/stratus/config.ini`, that over `/etc/stratus/config.ini`. Files hold
one section, `[stratus]`; relative paths in them start at the file's own directory. How to sign in is taken as a
whole from the first of these places that says anything about it, so that a `--username` never meets the password of
another account.
"""

from __future__ import annotations

import configparser
import ipaddress
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypedDict, TypeVar
from urllib.parse import urlsplit

import platformdirs

from stratus.errors import ConfigError
from stratus.text import clean

DEFAULT_ENDPOINT = "http://127.0.0.1:8080"
FORMATS = ("table", "json", "csv")
KEYS = ("endpoint", "token", "token_file", "username", "password_file", "cacert", "timeout", "format", "marketplace")
SITE_FILE = Path("/etc/stratus/config.ini")
_PATHS = ("token_file", "password_file", "cacert")
_SIGN_IN = ("token", "token_file", "username")
_SECRET_MAX = 4096
_PRIVATE_MAX = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class Config:
    """The settings in force. `timeout` is in seconds for the whole command; None waits as long as it takes.
    `marketplace` is the address of the one that metadata is posted to."""

    endpoint: str = DEFAULT_ENDPOINT
    token: str | None = field(default=None, repr=False)
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    cacert: Path | None = None
    timeout: float | None = None
    format: str = "table"
    marketplace: str | None = None

    @property
    def loopback(self) -> bool:
        """The service is on this machine."""
        host = urlsplit(self.endpoint).hostname or ""
        return host == "localhost" or _is_loopback(host)

    @property
    def insecure(self) -> bool:
        """Secrets would cross a network in plain text."""
        return self.endpoint.startswith("http:") and not self.loopback


class Layer(NamedTuple):
    """Settings from one place, and its name for messages."""

    source: str
    values: Mapping[str, str]


def load(
    flags: Mapping[str, str | None],
    environ: Mapping[str, str] | None = None,
    files: Sequence[Path] | None = None,
    ask: Callable[[str], str] | None = None,
) -> Config:
    """The settings in force; `ask` asks the user for the password of a name when no file has it.

    Raises ConfigError for an unknown key, an invalid value, a file that cannot be read or a secret others can read.
    """
    layers = [
        Layer("the command line", {key: value for key, value in flags.items() if value is not None}),
        _environment(os.environ if environ is None else environ),
        *(_file(path) for path in (default_files() if files is None else files)),
    ]
    return Config(
        endpoint=_find(layers, "endpoint", _endpoint) or DEFAULT_ENDPOINT,
        cacert=_find(layers, "cacert", _existing_file),
        timeout=_find(layers, "timeout", _seconds),
        format=_find(layers, "format", _format) or "table",
        marketplace=_find(layers, "marketplace", _marketplace),
        **_sign_in(layers, ask),
    )


def default_files() -> list[Path]:
    """The user's file, then the site's."""
    return [Path(platformdirs.user_config_dir("stratus")) / "config.ini", SITE_FILE]


def read_secret(path: Path) -> str:
    """The one line of a token or password file.

    Raises ConfigError when it cannot be read, is empty or longer than a line, or when others may read it.
    """
    try:
        with path.open("rb") as file:
            _refuse_if_shared(path, os.fstat(file.fileno()).st_mode)
            raw = file.read(_SECRET_MAX + 1)
        secret = raw.decode().removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{path} holds no text") from None
    if not secret or "\n" in secret or len(raw) > _SECRET_MAX:
        raise ConfigError(f"{path} must hold one line, the secret")
    return secret


def read_private(path: Path) -> bytes:
    """A file that holds a private key. Raises ConfigError when it cannot be read, or others may read it."""
    try:
        with path.open("rb") as file:
            _refuse_if_shared(path, os.fstat(file.fileno()).st_mode)
            return file.read(_PRIVATE_MAX)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _refuse_if_shared(path: Path, mode: int) -> None:
    # A pipe (`--token-file <(pass show stratus)`) has no readers but us.
    if stat.S_ISREG(mode) and mode & 0o077:
        raise ConfigError(
            f"{path} holds a secret and others may read it (mode {stat.S_IMODE(mode):04o})", f"chmod 600 {path}"
        )


def _environment(environ: Mapping[str, str]) -> Layer:
    names = {key: "STRATUS_" + key.upper() for key in KEYS}
    return Layer("the environment", {key: environ[name] for key, name in names.items() if environ.get(name)})


def _file(path: Path) -> Layer:
    """The settings in `path`; none if there is no such file."""
    try:
        with path.open(encoding="utf-8") as file:
            values = _section(path, file.read())
            if "token" in values:
                _refuse_if_shared(path, os.fstat(file.fileno()).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return Layer(str(path), {})
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    located = {key: str(path.parent / Path(values[key]).expanduser()) for key in _PATHS if key in values}
    return Layer(str(path), {**values, **located})


def _section(path: Path, text: str) -> dict[str, str]:
    # Without a default section, [DEFAULT] is as unknown as any other.
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    try:
        parser.read_string(text, source=str(path))
    except configparser.Error as error:
        reason = error.message.replace("\n", " ")
        raise ConfigError(f"{path}: {clean(reason)}") from None
    if unknown := set(parser.sections()) - {"stratus"}:
        raise ConfigError(f"{path}: unknown section [{min(unknown)}]; the one it may have is [stratus]")
    values = dict(parser["stratus"]) if parser.has_section("stratus") else {}
    if unknown := set(values) - set(KEYS):
        raise ConfigError(f"{path}: unknown key {min(unknown)!r}; known are {', '.join(KEYS)}")
    return values


def _find(layers: Sequence[Layer], key: str, convert: Callable[[str], T]) -> T | None:
    for layer in layers:
        if key in layer.values:
            try:
                return convert(layer.values[key])
            except ValueError as error:
                raise ConfigError(f"{key} in {layer.source}: {error}") from None
    return None


def _endpoint(text: str) -> str:
    return _address(text, "the service").removesuffix("/v1")


def _marketplace(text: str) -> str:
    return _address(text, "a Marketplace").removesuffix("/metadata")


def _address(text: str, what: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"{text!r} is no http:// or https:// address of {what}")
    if "@" in parts.netloc:
        raise ValueError("an address holds no user name or password; use --username and --password-file")
    _ = parts.port  # a bad one raises ValueError
    return text.rstrip("/")


def _existing_file(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return path


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < 1e9:
        raise ValueError(f"{text!r} is no positive number of seconds")
    return seconds


def _format(text: str) -> str:
    if text not in FORMATS:
        raise ValueError(f"{text!r} is none of {', '.join(FORMATS)}")
    return text


class SignIn(TypedDict, total=False):
    """What the fields of that name in Config hold."""

    token: str
    username: str
    password: str


def _sign_in(layers: Sequence[Layer], ask: Callable[[str], str] | None) -> SignIn:
    for depth, (source, values) in enumerate(layers):
        given = [key for key in _SIGN_IN if key in values]
        if len(given) > 1:
            raise ConfigError(f"{source} gives both {given[0]} and {given[1]}; choose one")
        if "username" in given:
            return _by_password(layers[: depth + 1], values["username"], ask)
        if given:
            return {"token": _token(source, values)}
    return {}


def _token(source: str, values: Mapping[str, str]) -> str:
    token = (values.get("token") or read_secret(Path(values["token_file"]).expanduser())).strip()
    # Said here and without showing it: an HTTP library would print it in its own complaint.
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"what {source} names is no token: it holds characters that no token has")
    return token


def _by_password(layers: Sequence[Layer], username: str, ask: Callable[[str], str] | None) -> SignIn:
    if ":" in username:
        raise ConfigError("a user name has no ':' (RFC 7617)")
    if path := _find(layers, "password_file", lambda text: Path(text).expanduser()):
        return {"username": username, "password": read_secret(path)}
    if ask is None:
        raise ConfigError(f"no password for {username}", "give --password-file FILE, or sign in with a token")
    return {"username": username, "password": ask(username)}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
