"""A Marketplace: where metadata entries are posted, and found again."""

from __future__ import annotations

import re
from typing import NamedTuple
from xml.etree import ElementTree as Tree

from stratus.errors import Exit, StratusError
from stratus.metadata import DCTERMS, RDF, SLREQ
from stratus.text import clean

_SIGNATURE = "{http://www.w3.org/2000/09/xmldsig#}Signature"
_CONNECT, _ANSWER = 10.0, 60.0
_SHOWN = 500
_TAG = re.compile(r"<[^>]*>|\s+")


class Refused(StratusError):
    """The Marketplace did not take the entry."""


class Endorsed(NamedTuple):
    """What a Marketplace files an entry under."""

    identifier: str
    email: str
    created_at: str


class Receipt(NamedTuple):
    """What the Marketplace answered: a status, where the entry is or will be, and its words."""

    status: int
    location: str
    said: str


def endorsed(document: bytes) -> Endorsed:
    """What is in a signed entry. Raises StratusError when it is none; the signature is the Marketplace's to verify."""
    try:
        root = Tree.fromstring(document)
    except Tree.ParseError as error:
        raise StratusError(f"this is no XML: {error}") from error
    entry = root.find(f"{{{RDF}}}Description")
    if root.tag != f"{{{RDF}}}RDF" or entry is None:
        raise StratusError("this is no entry: rdf:RDF with an rdf:Description", "make one with: stratus-build-metadata")
    place = f"{{{SLREQ}}}endorsement"
    found = Endorsed(
        entry.findtext(f"{{{DCTERMS}}}identifier", ""),
        entry.findtext(f"{place}/{{{SLREQ}}}endorser/{{{SLREQ}}}email", ""),
        entry.findtext(f"{place}/{{{DCTERMS}}}created", ""),
    )
    if not all(found) or root.find(_SIGNATURE) is None:
        raise StratusError("the entry is not endorsed and signed", "sign it with: stratus-sign-metadata")
    return found


def post(marketplace: str, document: bytes, cacert: str | None) -> Receipt:
    """Post a signed entry. The service's token has no business there: nothing but the entry is sent.

    Raises Refused for a refusal, and StratusError with exit code 7 when nobody answers.
    """
    import requests

    about = endorsed(document)
    try:
        response = requests.post(
            f"{marketplace}/metadata/",
            data=document,
            headers={"Content-Type": "application/xml", "User-Agent": "stratus"},
            # An auth of our own that does nothing: ~/.netrc is not asked.
            auth=lambda request: request,
            verify=cacert or True,
            timeout=(_CONNECT, _ANSWER),
            allow_redirects=False,
        )
    except (OSError, requests.RequestException) as error:
        raise _unreachable(marketplace, error) from error
    said = _TAG.sub(" ", response.text[:_SHOWN]).strip()
    if response.status_code not in (200, 201, 202, 204):
        raise Refused(f"the Marketplace answered with status {response.status_code}: {clean(said)}")
    location = response.headers.get("Location") or f"{marketplace}/metadata/{'/'.join(about)}"
    return Receipt(response.status_code, location, said)


def _unreachable(marketplace: str, error: Exception) -> StratusError:
    failure = StratusError(f"no answer from {marketplace}: {error}", "is --marketplace (STRATUS_MARKETPLACE) right?")
    failure.exit_code = Exit.UNAVAILABLE
    return failure
