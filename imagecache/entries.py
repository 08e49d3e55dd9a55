"""What is said about an image, by whom, and what was found when its bytes came."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

#: Those we verify with, the strongest first. What else is given (MD5) is not looked at.
ALGORITHMS = ("sha512", "sha256", "sha1")
#: hex digits of each
DIGEST_LENGTH = {"sha1": 40, "sha256": 64, "sha512": 128}

Format = Literal["raw", "qcow2"]
Compression = Literal["gz", "bz2", "xz", "zst"]


@dataclass(frozen=True)
class Entry:
    """One statement about an image: a metadata entry of one endorser, or what the asker said about a URL.

    `identifier` is the Marketplace's (27 characters). `size` is in bytes. `checksums` maps names of ALGORITHMS to hex
    digits in lower case; they, and `size`, may be those of the image as it is stored (compressed) or of what comes out.
    `format` and `compression` are as told, in lower case, None when nothing was said; not all that can be told is
    accepted. `endorser` is an e-mail address, and believed only if `signed`: then `subject` and `issuer` are those of
    the certificate that signed, and all of this was read from the signed bytes. `deprecated` is the reason given.
    `other_digests` are what was computed of the stream that it is not about (of what came out, where it is about the
    compressed one, or the other way round): said by nobody, and for lists of what is denied.
    `source` says where this was read, for people. `fault` says why an entry is not believed (a signature that does not
    match, contradictions); what else it says is then only a claim, to name it by.
    """

    source: str
    identifier: str | None = None
    size: int | None = None
    checksums: Mapping[str, str] = field(default_factory=dict)
    format: str | None = None
    compression: str | None = None
    locations: tuple[str, ...] = ()
    endorser: str | None = None
    subject: str | None = None
    issuer: str | None = None
    signed: bool = False
    created_at: dt.datetime | None = None
    valid_until: dt.datetime | None = None
    deprecated: str | None = None
    title: str | None = None
    os: str | None = None
    os_version: str | None = None
    architecture: str | None = None
    version: str | None = None
    fault: str | None = None
    other_digests: tuple[str, ...] = ()

    @property
    def strongest(self) -> tuple[str, str] | None:
        """The algorithm and digest that decide; None when nothing we verify with was given."""
        return next(((name, self.checksums[name]) for name in ALGORITHMS if name in self.checksums), None)


@dataclass(frozen=True)
class Fetched:
    """The bytes that came: digests by algorithm of the stream as it was sent and of what was kept (the same, where
    nothing was compressed), their sizes in bytes, and the location that gave them."""

    location: str
    stored_digests: Mapping[str, str]
    digests: Mapping[str, str]
    stored_size: int
    size: int


@dataclass(frozen=True)
class Stored:
    """An image in the cache: `digest` is the SHA-256 of its qcow2 file and its name there, `size` the virtual size,
    `file_size` and `allocated` the file's, in bytes. `source_digests` are of the (decompressed) image it was made from,
    `source_format` what that was."""

    digest: str
    size: int
    file_size: int
    allocated: int
    source_digests: Mapping[str, str]
    source_format: Format
