"""Metadata of an image, as a StratusLab Marketplace has it: RDF/XML that says what the image is. Who endorses that
statement signs it: stratus/signing.py.

The vocabulary is that of the entries in https://github.com/StratusLab/metadata.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree as Tree

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
DCTERMS = "http://purl.org/dc/terms/"
SLTERMS = "http://mp.stratuslab.eu/slterms#"
SLREQ = "http://mp.stratuslab.eu/slreq#"
BASE = "http://mp.stratuslab.eu/"
#: Their names in a document, by prefix.
NAMESPACES = {"rdf": RDF, "dcterms": DCTERMS, "slterms": SLTERMS, "slreq": SLREQ}
#: Names in a document of the digests we compute.
ALGORITHMS = {"sha1": "SHA-1", "sha256": "SHA-256", "sha512": "SHA-512"}

_CHUNK = 1 << 20
_SHA1 = re.compile(r"[0-9a-f]{40}", re.ASCII)
#: What XML 1.0 cannot hold (§2.2, Char).
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class BadStatement(ValueError):
    """What was said about an image cannot be written down."""


@dataclass(frozen=True)
class Statement:
    """What an entry says of an image. `size` is in bytes; it and `checksums` (sha1 among them, hex) are of the file as
    others will download it. `format` is raw or qcow2, `compression` gz, bz2, xz, zst or None. Times are UTC."""

    size: int
    checksums: Mapping[str, str]
    format: str
    created_at: dt.datetime
    valid_until: dt.datetime
    os: str
    os_version: str
    os_arch: str
    version: str
    title: str = ""
    description: str = ""
    creator: str = ""
    publisher: str = ""
    compression: str | None = None
    locations: tuple[str, ...] = field(default=())

    @property
    def identifier(self) -> str:
        """What a Marketplace calls the image."""
        return identifier_of(self.checksums["sha1"])


def identifier_of(sha1: str) -> str:
    """The 27 characters that a Marketplace calls an image by: its SHA-1 as a number, written in base 64.

    Two zero bits come first, so that 162 bits make 27 digits; urlsafe_b64encode puts its padding at the other end.
    """
    if not _SHA1.fullmatch(sha1):
        raise BadStatement(f"{sha1!r} is no SHA-1: 40 hexadecimal digits in lower case")
    # 24 bytes are 32 digits without padding; the five that stand for the zeros in front are left out.
    return base64.urlsafe_b64encode(bytes(4) + bytes.fromhex(sha1)).decode()[5:]


def measure(path: Path, progress: Callable[[int, int], None]) -> tuple[int, dict[str, str]]:
    """The size of a file and its digests, by ALGORITHMS, in one pass. `progress(done, total)` in bytes.

    Raises OSError.
    """
    sums = {name: hashlib.new(name, usedforsecurity=name != "sha1") for name in ALGORITHMS}
    done = 0
    with path.open("rb", buffering=0) as file:
        total = file.seek(0, 2)
        file.seek(0)
        while chunk := file.read(_CHUNK):
            for each in sums.values():
                each.update(chunk)
            done += len(chunk)
            progress(done, total)
    return done, {name: each.hexdigest() for name, each in sums.items()}


def build(statement: Statement) -> bytes:
    """The entry, not endorsed yet, as an XML document in UTF-8. Raises BadStatement for what XML cannot hold."""
    for prefix, namespace in NAMESPACES.items():
        Tree.register_namespace(prefix, namespace)
    root = Tree.Element(f"{{{RDF}}}RDF", {"{http://www.w3.org/XML/1998/namespace}base": BASE})
    entry = Tree.SubElement(root, f"{{{RDF}}}Description", {f"{{{RDF}}}about": f"#{statement.identifier}"})
    _text(entry, DCTERMS, "identifier", statement.identifier)
    _text(entry, SLREQ, "bytes", str(statement.size))
    for name, digest in statement.checksums.items():
        checksum = _resource(entry, "checksum")
        _text(checksum, SLREQ, "algorithm", ALGORITHMS[name])
        _text(checksum, SLREQ, "value", digest)
    _resource(entry, "endorsement")
    for namespace, name, text in _facts(statement):
        _text(entry, namespace, name, text)
    Tree.indent(root, "    ")
    return bytes(Tree.tostring(root, encoding="UTF-8", xml_declaration=True)) + b"\n"


def instant(at: dt.datetime) -> str:
    """A time as entries have it: RFC 3339 in UTC, whole seconds."""
    return at.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _facts(about: Statement) -> Iterator[tuple[str, str, str]]:
    yield DCTERMS, "type", "base"
    yield SLTERMS, "kind", "machine"
    yield SLTERMS, "os", about.os
    yield SLTERMS, "os-version", about.os_version
    yield SLTERMS, "os-arch", about.os_arch
    yield SLTERMS, "version", about.version
    yield DCTERMS, "compression", about.compression or ""
    yield DCTERMS, "format", about.format
    yield DCTERMS, "creator", about.creator
    yield DCTERMS, "created", instant(about.created_at)
    yield DCTERMS, "valid", instant(about.valid_until)
    if about.title:
        yield DCTERMS, "title", about.title
    yield DCTERMS, "description", about.description
    yield SLTERMS, "hypervisor", "kvm"
    yield DCTERMS, "publisher", about.publisher
    for location in about.locations:
        yield SLTERMS, "location", location


def _resource(parent: Tree.Element, name: str) -> Tree.Element:
    return Tree.SubElement(parent, f"{{{SLREQ}}}{name}", {f"{{{RDF}}}parseType": "Resource"})


def _text(parent: Tree.Element, namespace: str, name: str, text: str) -> None:
    if bad := _NO_XML.search(text):
        raise BadStatement(f"{name}: the character U+{ord(bad[0]):04X} cannot stand in XML")
    Tree.SubElement(parent, f"{{{namespace}}}{name}").text = text
