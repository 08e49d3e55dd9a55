"""Configuration: defaults < TOML file < environment (`STRATUS_SECTION__KEY`) < flags. An unknown key is an error."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from blockdev.units import parse_size
from iscsi.names import target_name

DEFAULT_HOME = "/var/lib/stratus"


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the place and the key."""


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _network(value: str) -> str:
    return str(ip_network(value))


def _listen(value: str) -> str:
    split_portal(value)
    return value


def _portal(value: str) -> str:
    """Initiators are told this address, and tgtd listens there: it is one, and not a name or all of them."""
    host, _ = split_portal(value)
    try:
        unspecified = ip_address(host).is_unspecified
    except ValueError:
        raise ConfigError(f"{value}: give a numeric address") from None
    if unspecified:
        raise ConfigError(f"{value}: give the address that initiators reach, not all of them")
    return value


def _iqn_prefix(value: str) -> str:
    """In lower case, and with a volume's id behind it an iSCSI name."""
    return target_name(value, UUID(int=0)).rpartition(":")[0]


def split_portal(value: str) -> tuple[str, int]:
    """`HOST:PORT` or `[IPV6]:PORT` → host and port; ConfigError says what is wrong."""
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{value!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def _mark(value: object) -> object:
    """Bytes, or text with a unit, or `N%` of the file system."""
    if isinstance(value, str) and value.endswith("%"):
        if not value[:-1].isdigit() or not 0 < int(value[:-1]) <= 100:
            raise ConfigError(f"{value}: a percentage is a whole number from 1 to 100")
        return value
    return _size(value)


def bytes_of_mark(mark: int | str, size: int) -> int:
    """A mark in bytes, on a file system of `size` bytes."""
    return size * int(mark[:-1]) // 100 if isinstance(mark, str) else mark


def _absolute(value: Path) -> Path:
    if not value.is_absolute():
        raise ConfigError(f"{value}: give an absolute path")
    return value


def _http_url(value: str) -> str:
    """http or https, with a host, and nothing secret in it: it is shown to everybody who may see the configuration."""
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None or parts.query:
        raise ConfigError(f"{parts.scheme}://{parts.hostname}: give an http or https URL without a user or a query")
    return value


Bytes = Annotated[int, BeforeValidator(_size), Field(ge=0)]
Cidr = Annotated[str, AfterValidator(_network)]
Listen = Annotated[str, AfterValidator(_listen)]
Portal = Annotated[str, AfterValidator(_portal)]
IqnPrefix = Annotated[str, AfterValidator(_iqn_prefix)]
Mark = Annotated[int | str, BeforeValidator(_mark)]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class Server(Section):
    """The HTTP side."""

    listen: Listen = "127.0.0.1:8080"
    processes: int = Field(default=2, ge=1, le=64, description="gunicorn worker processes")
    threads: int = Field(default=16, ge=2, le=256, description="threads in each; a waiting request occupies one")
    wait: float = Field(default=10.0, ge=0, le=30, description="seconds a mutation waits for its operation before 202")
    idle: float = Field(default=30.0, ge=0.1, le=600, description="seconds an upload or download may stand still")
    tls_cert: Path | None = None
    tls_key: Path | None = None
    behind_proxy: bool = Field(
        default=False, description="a proxy on this host terminates TLS and sets X-Forwarded-For"
    )


class Database(Section):
    url: str | None = Field(default=None, description="SQLAlchemy URL; SQLite under the home directory when left out")


class Pool(Section):
    driver: Literal["directory", "lvm"] = "directory"
    path: Path = Field(description="of a directory; with lvm: VOLUME_GROUP/THIN_POOL")
    overcommit_ratio: float = Field(
        default=4.0, gt=0, description="sum of sizes allowed, as a multiple of the pool's own"
    )
    low_space_percent: float = Field(default=5.0, ge=0, le=90, description="free space below which new work is refused")


class Iscsi(Section):
    target: Literal["tgt", "lio"] = Field(
        default="tgt",
        description="a private tgtd, or the kernel's LIO (which needs root)",
    )
    portal: Portal = "127.0.0.1:3261"
    iqn_prefix: IqnPrefix = "iqn.2026-11.internal.stratus"

    @property
    def mutual_chap_many(self) -> bool:
        """`iscsi.target.Capabilities` of the target, which the API's processes do not load."""
        return self.target == "lio"


class Volumes(Section):
    max_size: Bytes = Field(default=64 << 40, description="largest volume, bytes")


class Attachments(Section):
    direct: bool = Field(default=False, description="owners may attach to an initiator of their own")
    direct_portal: Portal | None = Field(default=None, description="a portal of its own for direct attachments")
    direct_networks: list[Cidr] = Field(
        default=[], description="where direct initiators must come from; empty: anywhere"
    )
    max_sessions: int = Field(
        default=1, ge=1, le=16, description="sessions one connection should have (paths of multipath)"
    )


class ImagePolicy(Section):
    """Which images the site takes. Added to what `images.policy_file` says; an empty allow list allows all."""

    allow_endorsers: list[str] = Field(default=[], description="e-mail addresses")
    deny_endorsers: list[str] = []
    allow_images: list[str] = Field(default=[], description="Marketplace identifiers")
    deny_images: list[str] = []
    allow_checksums: list[str] = Field(default=[], description="hex digits of a SHA-1, SHA-256 or SHA-512")
    deny_checksums: list[str] = []
    allow_hosts: list[str] = Field(default=[], description="hosts of the locations")
    deny_hosts: list[str] = []
    require_signature: bool = Field(default=False, description="only what a configured CA's certificate signed")
    allow_sha1: bool = Field(default=False, description="a SHA-1 may be all there is to verify with")
    allow_deprecated: bool = False
    max_size: Bytes | None = Field(default=None, description="as the entry tells it, bytes")
    formats: list[Literal["raw", "qcow2"]] = ["raw", "qcow2"]


class Images(Section):
    path: AbsolutePath | None = Field(default=None, description="the cache; HOME/images when left out")
    marketplaces: list[HttpUrl] = Field(default=[], description="asked in this order")
    allow_networks: list[Cidr] = Field(default=[], description="private networks with mirrors that may be asked")
    ca_file: AbsolutePath | None = Field(default=None, description="CAs of https servers; the system's when left out")
    max_size: Bytes = Field(default=1 << 40, description="largest virtual size, bytes")
    max_source_size: Bytes = Field(default=256 << 30, description="most bytes of a download, and of what comes out")
    high_mark: Mark = Field(default="80%", description="beyond this the least used go, bytes or percent")
    low_mark: Mark = Field(default="70%", description="until there is no more than this")
    reserve: Bytes = Field(default=1 << 30, description="what stays free on its file system")
    trusted_cas: list[AbsolutePath] = Field(default=[], description="PEM files of CAs whose endorsers are believed")
    sha1_endorsers: list[str] = Field(default=[], description="endorsers whose SHA-1 signatures are believed")
    keyring: AbsolutePath | None = Field(default=None, description="of gpg: who signs SHA256SUMS")
    fingerprints: list[str] = Field(default=[], description="keys in it that are believed; empty: all")
    checksum_files: bool = Field(default=True, description="look for a SHA256SUMS beside an image")
    require_signed_checksums: bool = False
    policy_file: AbsolutePath | None = Field(default=None, description="a policy.cfg of StratusLab")
    fetches: int = Field(default=4, ge=1, le=64, description="images that are fetched and made at once")
    asks: int = Field(default=100, ge=1, description="fetches and judgements that one user has open at once")
    accel_prefix: str | None = Field(
        default=None, pattern=r"^/[!-~]*$", description="of nginx: X-Accel-Redirect to this internal location"
    )
    scrub_interval: float = Field(default=7 * 86400.0, ge=1, description="seconds; every image is read again as often")
    upload_expiry: float = Field(default=86400.0, ge=1, description="seconds an upload may stand still")
    policy: ImagePolicy = ImagePolicy()

    @model_validator(mode="after")
    def _in_order(self) -> Images:
        sample = 1 << 40
        if type(self.high_mark) is type(self.low_mark) and (
            bytes_of_mark(self.low_mark, sample) > bytes_of_mark(self.high_mark, sample)
        ):
            raise ConfigError("low_mark is above high_mark")
        return self


class Quota(Section):
    """What an owner may have who has no quota of their own."""

    size: Bytes = 10 << 40
    count: int = Field(default=1000, ge=0)


class Worker(Section):
    threads: int = Field(
        default=8, ge=1, le=64, description="data operations at once; as many again for attach and detach"
    )
    lease: float = Field(
        default=15.0, ge=1, description="seconds after which a silent worker's operations are taken over"
    )
    reconcile_interval: float = Field(default=60.0, ge=1)
    pool_interval: float = Field(default=10.0, ge=0.2)
    head_interval: float = Field(default=60.0, ge=0.2, description="seconds between signed heads of the event chain")


class Settings(Section):
    home: Path
    server: Server = Server()
    database: Database = Database()
    iscsi: Iscsi = Iscsi()
    volumes: Volumes = Volumes()
    attachments: Attachments = Attachments()
    images: Images = Images()
    quota: Quota = Quota()
    worker: Worker = Worker()
    default_pool: str = "default"
    pools: dict[str, Pool] = {}

    @property
    def database_url(self) -> str:
        return self.database.url or f"sqlite:///{self.home / 'stratus.db'}"

    @property
    def portals(self) -> list[str]:
        """Where the target listens."""
        direct = self.attachments.direct_portal
        return [self.iscsi.portal, *([direct] if direct else [])]

    @property
    def run_dir(self) -> Path:
        return self.home / "run"

    @property
    def log_dir(self) -> Path:
        return self.home / "log"

    @property
    def key_dir(self) -> Path:
        return self.home / "keys"

    @property
    def upload_dir(self) -> Path:
        """What is being uploaded."""
        return self.home / "uploads"

    @property
    def image_dir(self) -> Path:
        """The cache of images."""
        return self.images.path or self.home / "images"

    def image_path(self, digest: str) -> Path:
        """Where the cache keeps it, as `imagecache.cache` does, which the API's processes do not load."""
        return self.image_dir / "images" / f"{digest}.qcow2"

    def make_directories(self) -> None:
        """The home and its rooms, readable by nobody else."""
        for path in (
            self.home,
            self.run_dir,
            self.run_dir / "locks",
            self.run_dir / "waiters",
            self.log_dir,
            self.key_dir,
            self.upload_dir,
        ):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value
    return base


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """`STRATUS_SERVER__LISTEN=…` → {"server": {"listen": …}}; lists and tables are JSON."""
    found: dict[str, Any] = {}
    for variable, text in sorted(environ.items()):
        if not variable.startswith("STRATUS_") or "__" not in variable:
            continue
        *parents, leaf = variable.removeprefix("STRATUS_").lower().split("__")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{variable}: {parent} has a value of its own already")
        place[leaf] = _value(text)
    return found


def _value(text: str) -> Any:
    if text[:1] in "[{":
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def load(home: Path, file: Path | None = None, *, environ: Mapping[str, str] | None = None,
         flags: Mapping[str, Any] | None = None) -> Settings:  # fmt: skip
    """The settings in force for `home`. `file` defaults to `home/config.toml` where that exists.

    Raises ConfigError naming the file or variable and the key.
    """
    home = home.absolute()
    source = file or home / "config.toml"
    values: dict[str, Any] = {}
    if file is not None or source.exists():
        try:
            values = tomllib.loads(source.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # no such file, no UTF-8, no TOML
            raise ConfigError(f"{source}: {error}") from error
    _merge(values, from_environment(os.environ if environ is None else environ))
    _merge(values, flags or {})
    values["home"] = home
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(source, error)) from error
    if not settings.pools:
        settings.pools["default"] = Pool(path=home / "pool")
    if settings.default_pool not in settings.pools:
        raise ConfigError(f"default_pool: there is no [pools.{settings.default_pool}]")
    return settings


def write_effective(settings: Settings) -> Path:
    """Keep what is in force for the service's own processes: all of them run with exactly what was checked."""
    path = settings.run_dir / "effective.json"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(settings.model_dump_json())
    return path


def read_effective(path: Path) -> Settings:
    return Settings.model_validate_json(path.read_text(encoding="utf-8"))


def _explain(source: Path, error: ValidationError) -> str:
    lines = [f"the configuration ({source}, STRATUS_… variables, flags) cannot be used:"]
    for item in error.errors(include_url=False, include_input=False):
        lines.append(f"  {'.'.join(map(str, item['loc']))}: {item['msg']}")
    return "\n".join(lines)


def redacted(settings: Settings) -> dict[str, Any]:
    """What is in force, for people: a password inside the database URL is hidden."""
    from sqlalchemy.engine import make_url

    shown = settings.model_dump(mode="json")
    shown["database"]["url"] = make_url(settings.database_url).render_as_string(hide_password=True)
    return shown
