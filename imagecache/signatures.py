"""Enveloped XML signatures: which bytes were signed, and whose certificate did it.

One shape is accepted, because every other has been used to show one thing and have another verified (McIntosh and
Austel, "XML Signature Element Wrapping Attacks"): one Signature, a child of the root; one Reference, to the whole
document; the enveloped-signature transform and at most one canonicalisation. Only what the verifier gives back is read.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store, VerificationError
from lxml import etree
from signxml.algorithms import DigestAlgorithm, SignatureMethod
from signxml.exceptions import InvalidSignature, SignXMLException
from signxml.verifier import SignatureConfiguration, XMLVerifier

from .errors import BadSignature
from .xmltree import parse

DS = "{http://www.w3.org/2000/09/xmldsig#}"
MAX_CERTIFICATES = 5

_XML = "{http://www.w3.org/XML/1998/namespace}"
_ENVELOPED = "http://www.w3.org/2000/09/xmldsig#enveloped-signature"
_C14N = {
    f"{algorithm}{comments}"
    for algorithm in (
        "http://www.w3.org/TR/2001/REC-xml-c14n-20010315",
        "http://www.w3.org/2006/12/xml-c14n11",
        "http://www.w3.org/2001/10/xml-exc-c14n#",
    )
    for comments in ("", "WithComments" if algorithm.endswith("#") else "#WithComments")
}
_METHODS = frozenset(
    SignatureMethod[name.format(bits)]
    for name in ("RSA_SHA{}", "ECDSA_SHA{}", "SHA{}_RSA_MGF1")
    for bits in (256, 384, 512)
)
_DIGESTS = frozenset({DigestAlgorithm.SHA256, DigestAlgorithm.SHA384, DigestAlgorithm.SHA512})
_SHA1_METHODS = frozenset({SignatureMethod.RSA_SHA1, SignatureMethod.ECDSA_SHA1})
_SHA1_DIGESTS = frozenset({DigestAlgorithm.SHA1})


def _utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


@dataclass(frozen=True)
class Trust:
    """Whom the site believes: certificates (PEM) of CAs, and of endorsers themselves, which are then believed as they
    are. Signatures made with SHA-1 only by those in `sha1_endorsers` (e-mail addresses or subjects)."""

    ca_files: tuple[Path, ...]
    sha1_endorsers: tuple[str, ...] = ()
    now: Callable[[], dt.datetime] = _utc_now

    @cached_property
    def certificates(self) -> list[x509.Certificate]:
        """Raises OSError, ValueError."""
        return [found for path in self.ca_files for found in x509.load_pem_x509_certificates(path.read_bytes())]


@dataclass(frozen=True)
class Signer:
    """Who made a signature, by a certificate that was verified. `emails` are those in it, in lower case."""

    subject: str
    issuer: str
    emails: tuple[str, ...]

    def is_one_of(self, names: Iterable[str]) -> bool:
        return any(name.lower() in self.emails or name == self.subject for name in names)


def is_signed(root: etree._Element) -> bool:
    """Whether somebody claims so, wherever in it."""
    return next(root.iter(f"{DS}Signature"), None) is not None


def verify(document: bytes, trust: Trust, source: str) -> tuple[etree._Element, Signer]:
    """What was signed, parsed anew from the canonical bytes, and by whom. Raises BadSignature, BadMetadata."""
    root = parse(document, source)
    signature = _check_shape(root, source)
    try:
        leaf = _trusted(list(_certificates(signature, source)), trust, source)
        signer = _signer(leaf)
        signed = _verified(root, leaf, _configuration(trust, signer.is_one_of(trust.sha1_endorsers)))
    except (SignXMLException, ValueError, UnsupportedAlgorithm) as error:
        raise BadSignature(f"{source}: {_cause(error)}") from None
    return parse(signed, source), signer


def _verified(root: etree._Element, leaf: x509.Certificate, configuration: SignatureConfiguration) -> bytes:
    """The signed bytes. SignedInfo, canonicalised by itself, inherits xml:base and its like from the root
    (https://www.w3.org/TR/2001/REC-xml-c14n-20010315, 2.4), which signxml leaves out: what the Marketplace's own tools
    signed is verified with them, what signxml signed without. The signature says nothing else either way."""
    info = _child(_child(root, "Signature"), "SignedInfo")
    plain = etree.tostring(root)
    for name, value in root.items():
        if str(name).startswith(_XML):
            info.set(name, value)
    try:
        return _by_signxml(etree.tostring(root), leaf, configuration)
    except InvalidSignature:
        return _by_signxml(plain, leaf, configuration)


class _Verifier(XMLVerifier):
    def _c14n(self, nodes: etree._Element, algorithm: Any, inclusive_ns_prefixes: Any = None) -> bytes:
        """Of an element that is a document of its own: inside another, lxml 6 writes xmlns="" into its children when
        the element inherits a default namespace, as all do that Java signed."""
        alone = etree.fromstring(etree.tostring(nodes, with_tail=False), self.parser)
        canonical: bytes = super()._c14n(alone, algorithm, inclusive_ns_prefixes)
        return canonical


def _by_signxml(document: bytes, leaf: x509.Certificate, configuration: SignatureConfiguration) -> bytes:
    # Its schema would refuse the attributes above; _check_shape is stricter.
    verified = _Verifier().verify(document, x509_cert=leaf, expect_config=configuration, validate_schema=False)
    assert not isinstance(verified, list)
    return verified.signed_data


def _configuration(trust: Trust, sha1: bool) -> SignatureConfiguration:
    return SignatureConfiguration(
        location="./",
        expect_references=1,
        signature_methods=_METHODS | _SHA1_METHODS if sha1 else _METHODS,
        digest_algorithms=_DIGESTS | _SHA1_DIGESTS if sha1 else _DIGESTS,
        verification_time=trust.now(),
    )


def _cause(error: Exception) -> str:
    text = str(error)[:200]
    if "SHA1" in text:
        return "made with SHA-1, which is not accepted from this endorser"
    return f"the signature does not match: {text or type(error).__name__}"


# ---------------------------------------------------------------- the shape


def _check_shape(root: etree._Element, source: str) -> etree._Element:
    """The one Signature. Everything is checked that could make the verifier look elsewhere, or work for long."""

    def refuse(why: str) -> BadSignature:
        return BadSignature(f"{source}: {why}")

    signatures = list(root.iter(f"{DS}Signature"))
    if len(signatures) != 1 or signatures[0].getparent() is not root:
        raise refuse("a document has one signature, and that is a child of its root")
    signature = signatures[0]
    if _tags(signature) != ["SignedInfo", "SignatureValue", "KeyInfo"]:
        raise refuse("a signature has SignedInfo, SignatureValue and KeyInfo, nothing else")
    info = _child(signature, "SignedInfo")
    if _tags(info) != ["CanonicalizationMethod", "SignatureMethod", "Reference"]:
        raise refuse("a signature is of one reference")
    reference = _child(info, "Reference")
    if reference.attrib.get("URI") != "" or _tags(reference) != ["Transforms", "DigestMethod", "DigestValue"]:
        raise refuse("a signature is of the whole document, by an empty URI")
    if not _are_accepted(_child(reference, "Transforms")):
        raise refuse("its transforms are enveloped-signature and at most one canonicalisation")
    if not (_child(signature, "SignatureValue").text and _child(reference, "DigestValue").text):
        raise refuse("a signature and a digest have a value")
    canonicalisation = _child(info, "CanonicalizationMethod")
    if canonicalisation.get("Algorithm") not in _C14N or len(canonicalisation):
        raise refuse("its canonicalisation is not one that is accepted")
    return signature


def _tags(element: etree._Element) -> list[str]:
    """Names of its children, comments apart; those of other namespaces as they are."""
    return [child.tag.removeprefix(DS) for child in element if isinstance(child.tag, str)]


def _child(element: etree._Element, name: str) -> etree._Element:
    found = element.find(f"{DS}{name}")
    assert found is not None  # after _tags
    return found


def _are_accepted(transforms: etree._Element) -> bool:
    algorithms = [transform.get("Algorithm", "") for transform in transforms]
    plain = all(tag == "Transform" for tag in _tags(transforms)) and not any(len(transform) for transform in transforms)
    return plain and algorithms[:1] == [_ENVELOPED] and len(algorithms) <= 2 and set(algorithms[1:]) <= _C14N


# ---------------------------------------------------------------- the certificate


def _certificates(signature: etree._Element, source: str) -> Iterator[x509.Certificate]:
    info = _child(signature, "KeyInfo")
    data = [item for child in info for item in child]
    if _tags(info) != ["X509Data"] or not 1 <= len(data) <= MAX_CERTIFICATES:
        raise BadSignature(f"{source}: KeyInfo has one X509Data with 1 to {MAX_CERTIFICATES} certificates")
    for item in data:
        if item.tag != f"{DS}X509Certificate":
            raise BadSignature(f"{source}: X509Data has certificates only")
        try:
            yield x509.load_der_x509_certificate(base64.b64decode("".join((item.text or "").split()), validate=True))
        except binascii.Error:
            raise BadSignature(f"{source}: a certificate that is no base64") from None


def _trusted(chain: list[x509.Certificate], trust: Trust, source: str) -> x509.Certificate:
    """The certificate that signed: one the site trusts itself, or one that leads to a CA of the site's."""
    leaf, now = chain[0], trust.now()
    if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
        raise BadSignature(
            f"{source}: the certificate of {leaf.subject.rfc4514_string()} was valid from "
            f"{leaf.not_valid_before_utc:%Y-%m-%d} to {leaf.not_valid_after_utc:%Y-%m-%d}, not now"
        )
    known = {found.fingerprint(SHA256()) for found in trust.certificates}
    if leaf.fingerprint(SHA256()) in known:
        return leaf
    if not trust.certificates:
        raise BadSignature(f"{source}: the site trusts no CA")
    builder = PolicyBuilder().store(Store(trust.certificates)).time(now).max_chain_depth(MAX_CERTIFICATES)
    builder = builder.extension_policies(ca_policy=_ca_policy(), ee_policy=_endorser_policy())
    try:
        builder.build_client_verifier().verify(leaf, chain[1:])
    except VerificationError as error:
        subject = leaf.subject.rfc4514_string()
        raise BadSignature(f"{source}: no CA that the site trusts vouches for {subject}: {str(error)[:200]}") from None
    return leaf


def _ca_policy() -> ExtensionPolicy:
    """A CA says that it is one, and which use it has if it says so; small CAs of sites leave the rest out."""
    policy = ExtensionPolicy.permit_all()
    policy = policy.require_present(
        x509.BasicConstraints, Criticality.AGNOSTIC, lambda _, __, found: _demand(found.ca, "no CA")
    )
    return policy.may_be_present(
        x509.KeyUsage,
        Criticality.AGNOSTIC,
        lambda _, __, found: _demand(found is None or found.key_cert_sign, "no CA by its use"),
    )


def _endorser_policy() -> ExtensionPolicy:
    return ExtensionPolicy.permit_all().may_be_present(
        x509.KeyUsage,
        Criticality.AGNOSTIC,
        lambda _, __, found: _demand(found is None or found.digital_signature, "not for signatures"),
    )


def _demand(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _signer(leaf: x509.Certificate) -> Signer:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        emails = names.get_values_for_type(x509.RFC822Name)
    except x509.ExtensionNotFound:
        emails = []
    emails += [str(attribute.value) for attribute in leaf.subject.get_attributes_for_oid(NameOID.EMAIL_ADDRESS)]
    return Signer(
        leaf.subject.rfc4514_string(), leaf.issuer.rfc4514_string(), tuple({email.lower(): None for email in emails})
    )
