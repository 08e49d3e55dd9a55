"""From a reference to what is said about the image.

ID                              asked of the site's Marketplaces
…/metadata/?id=ID, …/ID/…       a Marketplace, or whatever serves metadata: read
any other URL                   looked at: the beginning of metadata is read whole, anything else is the image itself,
                                looked up by its location, its checksum, a SHA256SUMS beside it
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from . import checksum_files, metadata
from .addresses import parse as parse_url
from .addresses import shown
from .checksum_files import Keys
from .entries import ALGORITHMS, DIGEST_LENGTH, Entry, Fetched
from .errors import BadReference, ImageError, NoEntry, Unreachable, WrongDigest
from .identifiers import identifier_of, is_identifier
from .signatures import Trust
from .web import Web
from .xmltree import MAX_BYTES

Kind = Literal["identifier", "metadata", "image"]
Check = Callable[[], None]

_ACCEPT = {"Accept": "application/rdf+xml, application/xml;q=0.9, */*;q=0.1"}
_LOOK = 512
"""Bytes of a URL's body that tell metadata from an image."""
_MAX_REFERENCE = 4096


@dataclass(frozen=True)
class Sources:
    """Where the site asks, and whom it believes. `marketplaces` are their URLs, without /metadata. Files of checksums
    beside an image are looked for if `checksum_files`; keys in `keyring` sign them, of these only `fingerprints` if any
    are given."""

    marketplaces: tuple[str, ...] = ()
    trust: Trust | None = None
    keyring: Path | None = None
    fingerprints: tuple[str, ...] = ()
    require_signed_checksums: bool = False
    checksum_files: bool = True

    @property
    def keys(self) -> Keys | None:
        return None if self.keyring is None else Keys(self.keyring, self.fingerprints)


@dataclass(frozen=True)
class Resolution:
    """What a reference means. Kind "image" without entries: nobody is known to say anything about what `location`
    gives; Resolver.by_digest may find somebody once the bytes are there. `checksums` are what the asker demands."""

    reference: str
    kind: Kind
    entries: tuple[Entry, ...]
    location: str | None = None
    checksums: Mapping[str, str] = field(default_factory=dict)


class Resolver:
    def __init__(self, web: Web, sources: Sources) -> None:
        self._web = web
        self._sources = sources

    def resolve(self, reference: str, checksum: str | None = None, check: Check = lambda: None) -> Resolution:
        """`checksum` is sha256:HEX (or sha1, sha512), or the hex alone: the image must have it, whatever else is said.
        So must it what `?sha256=` in a URL says. `check` may end the waiting, as in Web.open.

        Raises BadReference, NoEntry, BadMetadata, BadSignature, BadChecksumFile, TooLarge, and what Web.open does.
        """
        demanded = {} if checksum is None else dict([read_checksum(checksum)])
        if is_identifier(reference):
            return self._by_identifier(reference, demanded, check)
        if len(reference) > _MAX_REFERENCE or "://" not in reference:
            raise BadReference("a reference is an identifier of 27 characters, or a URL")
        parse_url(reference)
        url, stated = take_checksums(reference)
        for algorithm, digest in stated.items():
            if demanded.setdefault(algorithm, digest) != digest:
                raise BadReference(f"two different values of {algorithm} are asked for")
        document = self._metadata(url, check)
        if document is None:
            return self._by_image(reference, url, demanded, check)
        return self._by_metadata(reference, url, document, demanded)

    def by_digest(self, resolution: Resolution, fetched: Fetched, check: Check = lambda: None) -> Resolution:
        """What is known about the bytes that came, to be judged again: entries that match them by the strongest
        checksum each gives, with all that was computed added. With none before, the Marketplaces are asked for the
        SHA-1, and if they know nothing there is one of nobody, with what was computed.

        Raises WrongDigest if the bytes are not what the asker demanded or any entry is about, and what looking up
        raises.
        """
        if not _has(fetched, resolution.checksums):
            raise WrongDigest(f"{shown(fetched.location)}: not the checksum that was asked for")
        entries = resolution.entries or self._of_digests(fetched, check)
        matching = tuple(_completed(entry, fetched) for entry in entries if matches(entry, fetched))
        if resolution.entries and not matching:
            raise WrongDigest(f"{shown(fetched.location)}: not the image that the entries are about")
        return replace(resolution, entries=matching or (_of_nobody(fetched),))

    # ---------------------------------------------------------------- the kinds

    def _by_identifier(self, identifier: str, demanded: Mapping[str, str], check: Check) -> Resolution:
        entries = self._of_identifier(identifier, check)
        if not entries:
            raise NoEntry(f"{identifier}: no Marketplace of the site has an entry")
        return Resolution(identifier, "identifier", _demanded(entries, demanded, identifier), checksums=demanded)

    def _by_metadata(
        self, reference: str, url: str, entries: Iterable[Entry], demanded: Mapping[str, str]
    ) -> Resolution:
        wanted = _identifier_in(url)
        kept = tuple(entry for entry in entries if wanted is None or _is_about(entry, wanted))
        if not kept:
            raise NoEntry(f"{shown(url)}: no entry about {wanted or 'any image'}")
        if len({_image(entry) for entry in kept if entry.fault is None}) > 1:
            raise BadReference(f"{shown(url)}: entries about more than one image; name one")
        return Resolution(reference, "metadata", _demanded(kept, demanded, shown(url)), checksums=demanded)

    def _by_image(self, reference: str, url: str, demanded: dict[str, str], check: Check) -> Resolution:
        """Several may speak: endorsers, the asker, the server's own list of checksums."""
        found = list(self._of_location(url, check))
        if "sha1" in demanded:
            found += self._of_identifier(identifier_of(demanded["sha1"]), check)
        entries = [replace(entry, locations=_first(url, entry.locations)) for entry in _agreeing(found, demanded)]
        if demanded:
            entries.append(Entry(source="the asker", checksums=demanded, locations=(url,)))
        elif not entries and self._sources.checksum_files:
            entries += self._beside(url, check)
        return Resolution(reference, "image", tuple(entries), url, demanded)

    def _beside(self, url: str, check: Check) -> list[Entry]:
        sources = self._sources
        stated = checksum_files.find(url, self._web, sources.keys, sources.require_signed_checksums, check)
        if stated is None:
            return []
        by = f"{stated.source}, signed by {stated.signer}" if stated.signer else f"{stated.source}, unsigned"
        return [Entry(source=by, checksums={stated.algorithm: stated.digest}, locations=(url,))]

    # ---------------------------------------------------------------- asking

    def _metadata(self, url: str, check: Check) -> list[Entry] | None:
        """The entries that a URL leads to; None if what is there is no metadata. Of an image only the beginning comes,
        from servers that know ranges."""
        identifier = _identifier_in(url)
        if identifier is None and not self._begins_as_metadata(url, check):
            return None
        try:
            return self._read(url, check)
        except Unreachable as error:
            if identifier is None or error.status != 404:
                raise
            raise NoEntry(f"{shown(url)}: no entry about {identifier}") from None

    def _begins_as_metadata(self, url: str, check: Check) -> bool:
        """No disk and no compressed file begins with a tag; what does is read as metadata, or refused as none."""
        beginning, buffer = b"", bytearray(_LOOK)
        headers = {**_ACCEPT, "Range": f"bytes=0-{_LOOK - 1}"}
        with self._web.open(url, headers, allowed={416}, check=check) as answer:
            while answer.status != 416 and len(beginning) < _LOOK and (got := answer.readinto(buffer)):
                beginning += buffer[:got]
        return beginning.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<")

    def _read(self, url: str, check: Check) -> list[Entry]:
        document = self._web.read(url, MAX_BYTES, headers=_ACCEPT, check=check)
        return metadata.parse(document.body, shown(document.url), self._sources.trust)

    def _ask(self, query: str, check: Check) -> list[Entry]:
        """Of all Marketplaces; one that does not answer counts only if no other knows the image."""
        found: list[Entry] = []
        failures: list[ImageError] = []
        for base in self._sources.marketplaces:
            try:
                found += self._read(f"{base.rstrip('/')}/metadata/?{query}", check)
            except Unreachable as error:
                if error.status != 404:
                    failures.append(error)
            except ImageError as error:
                failures.append(error)
        if failures and not found:
            raise failures[0]
        return found

    def _of_identifier(self, identifier: str, check: Check) -> tuple[Entry, ...]:
        found = self._ask(urlencode({"id": identifier}), check)
        return tuple(entry for entry in found if _is_about(entry, identifier))

    def _of_location(self, url: str, check: Check) -> tuple[Entry, ...]:
        """A URL with userinfo or a query may hold a secret, and is nothing to tell Marketplaces."""
        if parse_url(url).userinfo is not None or urlsplit(url).query:
            return ()
        found = self._ask(urlencode({"location": url}, quote_via=quote), check)
        return tuple(entry for entry in found if url in entry.locations)

    def _of_digests(self, fetched: Fetched, check: Check) -> tuple[Entry, ...]:
        digests = dict.fromkeys(stream["sha1"] for stream in _streams(fetched) if "sha1" in stream)
        return tuple(entry for digest in digests for entry in self._of_identifier(identifier_of(digest), check))


# ---------------------------------------------------------------- checksums


def read_checksum(text: str) -> tuple[str, str]:
    """Algorithm and digest of "sha256:HEX", or of HEX by its length. Raises BadReference."""
    name, _, digest = text.strip().lower().rpartition(":")
    algorithm = name.replace("-", "") or next((a for a in ALGORITHMS if DIGEST_LENGTH[a] == len(digest)), "")
    if not re.fullmatch(r"[0-9a-f]+", digest) or DIGEST_LENGTH.get(algorithm) != len(digest):
        raise BadReference("a checksum is sha256:HEX (or sha512, sha1), or the hex digits alone")
    return algorithm, digest


def take_checksums(url: str) -> tuple[str, dict[str, str]]:
    """A URL without `?sha256=` and its like, and what they said. The rest of the query stays as it was written."""
    parts = urlsplit(url)
    kept: list[str] = []
    taken: dict[str, str] = {}
    for piece in parts.query.split("&") if parts.query else []:
        name, _, value = piece.partition("=")
        if name.lower() not in DIGEST_LENGTH:
            kept.append(piece)
            continue
        algorithm, digest = read_checksum(f"{name}:{value}")
        if taken.setdefault(algorithm, digest) != digest:
            raise BadReference(f"two different values of {algorithm} are asked for")
    return urlunsplit((parts.scheme, parts.netloc, parts.path, "&".join(kept), "")), taken


def matches(entry: Entry, fetched: Fetched) -> bool:
    """Whether the bytes, as sent or as kept, have every checksum that the entry gives: by its strongest they are the
    image, and one that contradicts it would open lists of what is allowed to something else."""
    return entry.strongest is not None and _has(fetched, entry.checksums)


def _streams(fetched: Fetched) -> tuple[Mapping[str, str], ...]:
    return fetched.stored_digests, fetched.digests


def _has(fetched: Fetched, checksums: Mapping[str, str]) -> bool:
    return any(map(partial(_says, checksums), _streams(fetched)))


def _says(checksums: Mapping[str, str], stream: Mapping[str, str]) -> bool:
    return all(stream.get(name) == digest for name, digest in checksums.items())


def _agreeing(entries: Iterable[Entry], demanded: Mapping[str, str]) -> tuple[Entry, ...]:
    """Those that say nothing against what the asker demands. It is not added to what they say: a stronger checksum of
    the asker's would decide in place of the endorser's."""
    return tuple(
        entry
        for entry in entries
        if all(entry.checksums.get(name, digest) == digest for name, digest in demanded.items())
    )


def _demanded(entries: Iterable[Entry], demanded: Mapping[str, str], source: str) -> tuple[Entry, ...]:
    kept = _agreeing(entries, demanded)
    if not kept:
        raise NoEntry(f"{source}: no entry about an image with the checksum that was asked for")
    return kept


def _is_about(entry: Entry, identifier: str) -> bool:
    """Also one with a fault that says nothing readable: it was given as an answer, and the fault is told."""
    return entry.identifier == identifier or (entry.identifier is None and entry.fault is not None)


def _first(url: str, locations: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((url, *locations)))


def _completed(entry: Entry, fetched: Fetched) -> Entry:
    """With all that was computed of the stream that it is about, and apart from that of the other one, so that a deny
    list sees the image by every name."""
    stream = next(filter(partial(_says, entry.checksums), _streams(fetched)))
    others = sorted({digest for each in _streams(fetched) for digest in each.values()} - set(stream.values()))
    locations = entry.locations or (fetched.location,)
    identifier = identifier_of(stream["sha1"]) if "sha1" in stream else entry.identifier
    known = replace(entry, identifier=identifier, checksums=dict(stream), locations=locations)
    return replace(known, other_digests=tuple(others))


def _of_nobody(fetched: Fetched) -> Entry:
    nobody = Entry(source="nobody", checksums=fetched.stored_digests, locations=(fetched.location,))
    return _completed(nobody, fetched)


# ---------------------------------------------------------------- URLs and documents


def _identifier_in(url: str) -> str | None:
    """The image that a URL of a Marketplace asks for: …/metadata/?id=ID, …/metadata/ID/…"""
    parts = urlsplit(url)
    _, found, after = parts.path.rpartition("/metadata")
    if not found:
        return None
    named = dict(parse_qsl(parts.query)).get("id") or unquote(after.lstrip("/").partition("/")[0])
    return named if is_identifier(named) else None


def _image(entry: Entry) -> object:
    return entry.identifier or entry.strongest
