"""Endorse a metadata entry: say in it who does, and sign it with their key (XML-Signature, enveloped).

What signs is not part of a plain installation; it is loaded when there is something to sign.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from stratus.errors import ConfigError, StratusError
from stratus.metadata import DCTERMS, RDF, SLREQ, instant

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.x509 import Certificate
    from lxml.etree import _Element as Element

    Key = RSAPrivateKey | EllipticCurvePrivateKey

_SIGNATURE = "{http://www.w3.org/2000/09/xmldsig#}Signature"
#: Exclusive: the signature still holds when the entry is taken out of a list of entries (Exclusive XML C14N §1.1).
_C14N = "http://www.w3.org/2001/10/xml-exc-c14n#"
_LEAST_RSA = 2048
#: SHA-2 as strong as the curve.
_ECDSA = {"secp256r1": "ecdsa-sha256", "secp384r1": "ecdsa-sha384", "secp521r1": "ecdsa-sha512"}

#: Asked for the passphrase when a file turns out to be encrypted.
Ask = Callable[[], bytes]


class CannotSign(StratusError):
    """The key, the certificate and the entry do not go together, or one of them is unusable."""


@dataclass(frozen=True)
class Identity:
    """A private key, its certificate, and the certificates that lead from it to an authority."""

    key: Key
    certificate: Certificate
    chain: tuple[Certificate, ...] = ()

    @property
    def emails(self) -> tuple[str, ...]:
        """The addresses the certificate is for: in its alternative names, and in its subject as older ones have it."""
        from cryptography import x509

        try:
            names = self.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            found = names.get_values_for_type(x509.RFC822Name)
        except x509.ExtensionNotFound:
            found = []
        subject = self.certificate.subject.get_attributes_for_oid(x509.NameOID.EMAIL_ADDRESS)
        return tuple(dict.fromkeys([*found, *(str(each.value) for each in subject)]))


def from_pem(key: bytes, certificates: bytes, ask: Ask) -> Identity:
    """The identity in a key and its certificate, intermediate ones after it. Raises CannotSign, ConfigError."""
    with _extra():
        from cryptography import x509
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    try:
        try:
            private = load_pem_private_key(key, None)
        except TypeError:  # it is encrypted
            private = load_pem_private_key(key, ask())
        certificate, *chain = x509.load_pem_x509_certificates(certificates)
    except ValueError as error:
        raise CannotSign(f"the key or the certificate cannot be read: {error}", _READING) from error
    return _checked(private, certificate, chain)


def from_pkcs12(content: bytes, ask: Ask) -> Identity:
    """The identity in a PKCS#12 file, as browsers export it. Raises CannotSign, ConfigError."""
    with _extra():
        from cryptography.hazmat.primitives.serialization.pkcs12 import load_pkcs12
    try:
        found = load_pkcs12(content, ask())
    except ValueError as error:
        raise CannotSign(f"the PKCS#12 file cannot be read: {error}", _READING) from error
    if found.key is None or found.cert is None:
        raise CannotSign("the PKCS#12 file must hold a private key and its certificate")
    return _checked(found.key, found.cert.certificate, [each.certificate for each in found.additional_certs])


_READING = "is the passphrase right? A key is PEM, or both are in one PKCS#12 file: --pkcs12"


def sign(document: bytes, identity: Identity, endorser: str | None, now: dt.datetime) -> bytes:
    """The entry, endorsed and signed by `identity`. An endorsement and a signature it had give way to them.

    `endorser` is one of the certificate's addresses; it may be None if that has one, and any if it has none.
    Raises CannotSign.
    """
    with _extra():
        from lxml import etree
        from signxml.algorithms import DigestAlgorithm, SignatureConstructionMethod
        from signxml.signer import XMLSigner
    root = _entry(document)
    _endorse(root, identity, _email(identity, endorser), now)
    signer = XMLSigner(
        method=SignatureConstructionMethod.enveloped,
        signature_algorithm=_method(identity.key),
        digest_algorithm=DigestAlgorithm.SHA256,
        c14n_algorithm=_C14N,
    )
    signed = signer.sign(root, key=identity.key, cert=[identity.certificate, *identity.chain])
    return bytes(etree.tostring(signed, encoding="UTF-8", xml_declaration=True)) + b"\n"


@contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"signing needs more than is installed: there is no {error.name}",
            "pip install 'stratus-storage[metadata]'",
        ) from error


def _checked(key: object, certificate: Certificate, chain: list[Certificate]) -> Identity:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

    if not isinstance(key, RSAPrivateKey | EllipticCurvePrivateKey):
        raise CannotSign("the key must be RSA or ECDSA; XML signatures know no other of today's")
    if isinstance(key, RSAPrivateKey) and key.key_size < _LEAST_RSA:
        raise CannotSign(f"an RSA key of {key.key_size} bits is too weak; {_LEAST_RSA} are the least")
    if isinstance(key, EllipticCurvePrivateKey) and key.curve.name not in _ECDSA:
        raise CannotSign(f"the curve {key.curve.name} is not one of {', '.join(_ECDSA)}")
    if key.public_key() != certificate.public_key():
        raise CannotSign("the certificate is not that of the key")
    return Identity(key, certificate, tuple(chain))


def _entry(document: bytes) -> Element:
    """The root of an entry that holds one description and may be signed. Nothing outside of it is read."""
    from lxml import etree

    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
    try:
        root = etree.fromstring(document, parser)
    except etree.XMLSyntaxError as error:
        raise CannotSign(f"this is no XML: {error}") from error
    if root.getroottree().docinfo.internalDTD is not None:
        raise CannotSign("the entry has a DOCTYPE; nobody would accept that")
    if root.tag != f"{{{RDF}}}RDF" or len(root.findall(f"{{{RDF}}}Description")) != 1:
        raise CannotSign("this is no entry: rdf:RDF with one rdf:Description", "make one with: stratus-build-metadata")
    return root


def _email(identity: Identity, asked: str | None) -> str:
    known = identity.emails
    if asked is None:
        if len(known) == 1:
            return known[0]
        raise CannotSign(f"the certificate has {len(known)} e-mail addresses", "say which with --email ADDRESS")
    if known and asked.lower() not in [each.lower() for each in known]:
        raise CannotSign(f"{asked} is not in the certificate, which is for {', '.join(known)}")
    return asked


def _endorse(root: Element, identity: Identity, email: str, now: dt.datetime) -> None:
    certificate = identity.certificate
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise CannotSign(
            f"the certificate is valid from {instant(certificate.not_valid_before_utc)} "
            f"to {instant(certificate.not_valid_after_utc)}, and not now"
        )
    for old in root.findall(_SIGNATURE):
        root.remove(old)
    endorsement = _place(cast("Element", root.find(f"{{{RDF}}}Description")))
    _child(endorsement, DCTERMS, "created", instant(now))
    endorser = _child(endorsement, SLREQ, "endorser")
    endorser.set(f"{{{RDF}}}parseType", "Resource")
    _child(endorser, SLREQ, "email", email)
    _child(endorser, SLREQ, "subject", certificate.subject.rfc4514_string())
    _child(endorser, SLREQ, "issuer", certificate.issuer.rfc4514_string())


def _place(description: Element) -> Element:
    """The one, empty element for the endorsement."""
    found = description.findall(f"{{{SLREQ}}}endorsement")
    for more in found[1:]:
        description.remove(more)
    place = found[0] if found else _child(description, SLREQ, "endorsement")
    tail = place.tail
    place.clear()
    place.tail = tail
    place.set(f"{{{RDF}}}parseType", "Resource")
    return place


def _child(parent: Element, namespace: str, name: str, text: str | None = None) -> Element:
    from lxml import etree

    child = etree.SubElement(parent, f"{{{namespace}}}{name}")
    child.text = text
    return child


def _method(key: Key) -> str:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

    return "rsa-sha256" if isinstance(key, RSAPrivateKey) else _ECDSA[key.curve.name]
