"""XML from strangers into a tree, or a refusal before it costs anything.

Entities, DTDs and external files are never looked at. The bounds keep short what comes after: 40 KB of nested
declarations of namespaces are enough for hours of canonicalisation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from lxml import etree

from .errors import BadMetadata

MAX_BYTES = 1 << 20
MAX_ELEMENTS = 5_000
"""About a hundred entries."""
MAX_DEPTH = 16
MAX_ATTRIBUTES = 16
"""Of one element."""
MAX_NAMESPACES = 32
"""In scope at once. Canonicalisation takes their square for each element: 480, in 33 KB, took 18 s."""

_PIECE = 8 << 10
_DECLARED = re.compile(rb"""^<\?xml[^>]*encoding\s*=\s*["']([A-Za-z0-9._-]+)["']""")


def parse(document: bytes, source: str) -> etree._Element:
    """The root of a document in UTF-8. Raises BadMetadata, naming `source`."""
    _check_bytes(document, source)
    parser = etree.XMLPullParser(
        events=("start", "end", "start-ns", "end-ns", "pi"),
        encoding="utf-8",
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        dtd_validation=False,
        huge_tree=False,
    )
    counts = _Counts(source)
    try:
        for piece in _pieces(document):
            parser.feed(piece)
            counts.look(parser.read_events())
        root: etree._Element = parser.close()
        counts.look(parser.read_events())
    except etree.XMLSyntaxError as error:
        raise BadMetadata(f"{source}: no well-formed XML: {str(error)[:200]}") from None
    if root.getroottree().docinfo.internalDTD is not None or next(root.iter(etree.Entity), None) is not None:
        raise BadMetadata(f"{source}: a DOCTYPE or entity is not accepted")
    return root


def _check_bytes(document: bytes, source: str) -> None:
    if len(document) > MAX_BYTES:
        raise BadMetadata(f"{source}: more than {MAX_BYTES} bytes")
    if b"<!DOCTYPE" in document or b"<!ENTITY" in document:  # before any parser sees it
        raise BadMetadata(f"{source}: a DOCTYPE or entity is not accepted")
    declared = _DECLARED.match(document.removeprefix(b"\xef\xbb\xbf").lstrip())
    if declared and declared[1].lower() not in (b"utf-8", b"us-ascii", b"ascii"):
        raise BadMetadata(f"{source}: only UTF-8 is read")


def _pieces(document: bytes) -> Iterator[bytes]:
    for start in range(0, len(document), _PIECE):
        yield document[start : start + _PIECE]


class _Counts:
    """What the parser has made so far, looked at after each piece it was fed."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._elements = self._depth = self._namespaces = 0

    def look(self, events: Iterator[tuple[str, object]]) -> None:
        for event, what in events:
            if event == "start":
                assert isinstance(what, etree._Element)
                self._elements += 1
                self._depth += 1
                self._at_most(len(what.attrib), MAX_ATTRIBUTES, "attributes of one element")
            elif event == "end":
                self._depth -= 1
            elif event == "start-ns":
                self._namespaces += 1
            elif event == "end-ns":
                self._namespaces -= 1
            else:
                raise BadMetadata(f"{self._source}: processing instructions are not accepted")
            self._at_most(self._elements, MAX_ELEMENTS, "elements")
            self._at_most(self._depth, MAX_DEPTH, "levels of elements")
            self._at_most(self._namespaces, MAX_NAMESPACES, "namespaces at once")

    def _at_most(self, count: int, limit: int, what: str) -> None:
        if count > limit:
            raise BadMetadata(f"{self._source}: more than {limit} {what}")
