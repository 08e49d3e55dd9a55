"""The Marketplace's metadata: RDF/XML as StratusLab wrote it, read strictly.

<metadata>                       the Marketplace's list, optional
  <rdf:RDF>                      what one endorser signs
    <rdf:Description> … </>      an entry
    <ds:Signature> … </>
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator
from dataclasses import replace

from lxml import etree

from .entries import DIGEST_LENGTH, Entry
from .errors import BadMetadata, BadSignature
from .identifiers import identifier_of, is_identifier, sha1_of
from .signatures import Signer, Trust, is_signed, verify
from .xmltree import parse as parse_xml

RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
DCTERMS = "{http://purl.org/dc/terms/}"
SLREQ = "{http://mp.stratuslab.eu/slreq#}"
SLTERMS = "{http://mp.stratuslab.eu/slterms#}"
MAX_LOCATIONS = 32

_COMPRESSIONS = {"gzip": "gz", "bzip2": "bz2", "zstd": "zst"}
_DATE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.\d+)?(Z|[+-]\d\d:?\d\d)")


def parse(document: bytes, source: str, trust: Trust | None) -> list[Entry]:
    """The entries in a document, which `source` names for people; none for the Marketplace's empty list.

    With `trust`, what is signed is verified and read from the signed bytes only; without, nobody is believed to have
    signed anything. An entry that cannot be believed has its `fault` told, so that one endorser's mistake does not
    take away what another says; if that is so of all, the first fault is raised: BadSignature or BadMetadata.
    """
    root = parse_xml(document, source)
    entries: list[Entry] = []
    faults: list[BadMetadata | BadSignature] = []
    for graph in _graphs(root, source):
        try:
            entries += _read(graph, source, trust)
        except (BadMetadata, BadSignature) as error:
            faults.append(error)
            entries.append(_claimed(graph, source, error))
    if faults and len(faults) == len(entries):
        raise type(faults[0])("; ".join(dict.fromkeys(map(str, faults))))
    return entries


def _graphs(root: etree._Element, source: str) -> list[etree._Element]:
    if root.tag == f"{RDF}RDF":
        return [root]
    if root.tag == "metadata":
        children = [child for child in root if isinstance(child.tag, str)]
        if all(child.tag == f"{RDF}RDF" for child in children):
            return children
    raise BadMetadata(f"{source}: no metadata: its root is {root.tag}")


def _read(graph: etree._Element, source: str, trust: Trust | None) -> list[Entry]:
    if trust is None or not is_signed(graph):
        return [_entry(found, source) for found in _descriptions(graph, source)]
    graph, signer = verify(etree.tostring(graph, with_tail=False), trust, source)
    return [_signed(_entry(found, source), found, signer) for found in _descriptions(graph, source)]


def _descriptions(graph: etree._Element, source: str) -> list[etree._Element]:
    found = graph.findall(f"{RDF}Description") if graph.tag == f"{RDF}RDF" else []
    if not found:
        raise BadMetadata(f"{source}: no rdf:Description in it")
    return found


def _claimed(graph: etree._Element, source: str, error: Exception) -> Entry:
    """What an entry with a fault says of itself, as far as it can be read."""
    try:
        entry = _entry(_descriptions(graph, source)[0], source)
    except BadMetadata:
        return Entry(source=source, fault=str(error))
    return replace(entry, fault=str(error))


def _signed(entry: Entry, description: etree._Element, signer: Signer) -> Entry:
    """The entry as the signer's. Its e-mail address is believed when the certificate has it; a certificate without any
    speaks for its subject only. Raises BadSignature when the entry names somebody else."""
    claimed = _Fields(_endorser(_Fields(description, entry.source)), entry.source).text(f"{SLREQ}subject")
    if signer.emails and (entry.endorser or "").lower() not in signer.emails:
        raise BadSignature(
            f"{entry.source}: endorsed by {entry.endorser}, signed by the certificate of {', '.join(signer.emails)}"
        )
    if not signer.emails and not _same_name(claimed, signer.subject):
        raise BadSignature(f"{entry.source}: endorsed by {claimed}, signed by the certificate of {signer.subject}")
    endorser = (entry.endorser or "").lower() if signer.emails else None
    return replace(entry, signed=True, endorser=endorser, subject=signer.subject, issuer=signer.issuer)


def _same_name(claimed: str | None, subject: str) -> bool:
    """Java writes a name as RFC 2253 or 1779 does: they differ in spaces after commas, and in order."""
    parts = re.split(r",\s*", claimed or "")
    return parts in (subject.split(","), subject.split(",")[::-1])


def _entry(description: etree._Element, source: str) -> Entry:
    fields = _Fields(description, source)
    endorsement = _Fields(fields.only(f"{SLREQ}endorsement"), source)
    checksums = _checksums(description, source)
    identifier = _identifier(fields, checksums, source)
    if identifier is not None:
        checksums.setdefault("sha1", sha1_of(identifier))
    compression = (fields.text(f"{DCTERMS}compression") or "none").lower()
    deprecated = fields.only(f"{SLTERMS}deprecated")
    return Entry(
        source=source,
        identifier=identifier,
        size=_size(fields, source),
        checksums=checksums,
        format=(fields.text(f"{DCTERMS}format") or "").lower() or None,
        compression=None if compression == "none" else _COMPRESSIONS.get(compression, compression),
        locations=_locations(description, source),
        endorser=_Fields(_endorser(fields), source).text(f"{SLREQ}email"),
        created_at=_date(endorsement.text(f"{DCTERMS}created") or fields.text(f"{DCTERMS}created"), source),
        valid_until=_date(fields.text(f"{DCTERMS}valid"), source),
        deprecated=None if deprecated is None else _text(deprecated) or "no reason is given",
        title=fields.text(f"{DCTERMS}alternative") or fields.text(f"{DCTERMS}title"),
        os=fields.text(f"{SLTERMS}os"),
        os_version=fields.text(f"{SLTERMS}os-version"),
        architecture=fields.text(f"{SLTERMS}os-arch"),
        version=fields.text(f"{SLTERMS}version"),
    )


def _endorser(fields: _Fields) -> etree._Element | None:
    return _Fields(fields.only(f"{SLREQ}endorsement"), fields.source).only(f"{SLREQ}endorser")


class _Fields:
    """Children of an element that may stand there once; an element that is not there has none."""

    def __init__(self, element: etree._Element | None, source: str) -> None:
        self._element = element
        self.source = source

    def only(self, tag: str) -> etree._Element | None:
        found = [] if self._element is None else self._element.findall(tag)
        if len(found) > 1:
            raise BadMetadata(f"{self.source}: more than one {etree.QName(tag).localname} in an entry")
        return found[0] if found else None

    def text(self, tag: str) -> str | None:
        found = self.only(tag)
        return None if found is None else _text(found) or None


def _text(element: etree._Element) -> str:
    """Of the element itself: comments do not cut it short, and what lies in other elements is not its text."""
    tails = [child.tail or "" for child in element]
    return "".join([element.text or "", *tails]).strip()


def _identifier(fields: _Fields, checksums: dict[str, str], source: str) -> str | None:
    identifier = fields.text(f"{DCTERMS}identifier")
    if identifier is None:
        return identifier_of(checksums["sha1"]) if "sha1" in checksums else None
    if not is_identifier(identifier):
        raise BadMetadata(f"{source}: {identifier[:40]!r} is no identifier")
    if "sha1" in checksums and identifier_of(checksums["sha1"]) != identifier:
        raise BadMetadata(f"{source}: {identifier} is not the identifier of the SHA-1 that it gives")
    return identifier


def _checksums(description: etree._Element, source: str) -> dict[str, str]:
    checksums: dict[str, str] = {}
    for algorithm, value in _stated_checksums(description, source):
        if algorithm not in DIGEST_LENGTH:
            continue
        if not re.fullmatch(rf"[0-9a-f]{{{DIGEST_LENGTH[algorithm]}}}", value):
            raise BadMetadata(f"{source}: no {algorithm}: {value[:140]!r}")
        if checksums.setdefault(algorithm, value) != value:
            raise BadMetadata(f"{source}: two values of {algorithm}")
    return checksums


def _stated_checksums(description: etree._Element, source: str) -> Iterator[tuple[str, str]]:
    for element in description.findall(f"{SLREQ}checksum"):
        fields = _Fields(element, source)
        algorithm, value = fields.text(f"{SLREQ}algorithm"), fields.text(f"{SLREQ}value")
        yield (algorithm or "").lower().replace("-", ""), (value or "").lower()


def _size(fields: _Fields, source: str) -> int | None:
    text = fields.text(f"{SLREQ}bytes")
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise BadMetadata(f"{source}: {text[:40]!r} is no number of bytes")
    return int(text)


def _locations(description: etree._Element, source: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(filter(None, map(_text, description.findall(f"{SLTERMS}location")))))
    if len(found) > MAX_LOCATIONS:
        raise BadMetadata(f"{source}: more than {MAX_LOCATIONS} locations")
    return found


def _date(text: str | None, source: str) -> dt.datetime | None:
    if text is None:
        return None
    match = _DATE.fullmatch(text)
    try:
        return dt.datetime.fromisoformat("".join(match.groups()) if match else "").astimezone(dt.UTC)
    except (ValueError, OverflowError):
        raise BadMetadata(f"{source}: {text[:40]!r} is no date") from None
