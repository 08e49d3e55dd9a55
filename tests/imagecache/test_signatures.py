"""What a signature makes believed, and every other shape of one."""

from __future__ import annotations

import base64
import datetime as dt
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from lxml import etree
from signxml.algorithms import SignatureMethod
from signxml.signer import SignatureReference, XMLSigner

from imagecache.entries import Entry
from imagecache.errors import BadMetadata, BadSignature
from imagecache.metadata import parse
from imagecache.signatures import Trust, verify
from tests.support.endorsements import NOW, Authority, Endorser, entry, sign

DATA = Path(__file__).parent / "data"
DS = "{http://www.w3.org/2000/09/xmldsig#}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
IMAGE = b"an image"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def jane(authority: Authority) -> Endorser:
    return authority.issue()


@pytest.fixture
def trust(authority: Authority, tmp_path: Path) -> Trust:
    return Trust((authority.write(tmp_path / "ca.pem"),))


def read(document: bytes, trust: Trust) -> Entry:
    (found,) = parse(document, "http://example.org/entry", trust)
    return found


def refused(document: bytes, trust: Trust, why: str) -> None:
    with pytest.raises(BadSignature, match=why):
        parse(document, "http://example.org/entry", trust)


# ---------------------------------------------------------------- what is believed


def test_a_signed_entry(jane: Endorser, trust: Trust) -> None:
    found = read(sign(entry(IMAGE), jane), trust)
    assert found.signed
    assert found.fault is None
    assert (found.endorser, found.subject) == ("jane.tester@example.org", "CN=Jane Tester,O=StratusLab")
    assert found.issuer == "CN=Test CA,O=StratusLab"
    assert found.identifier == read(entry(IMAGE), trust).identifier


def test_an_unsigned_entry(trust: Trust) -> None:
    assert not read(entry(IMAGE), trust).signed


def test_addresses_are_compared_without_case(authority: Authority, trust: Trust) -> None:
    jane = authority.issue("Jane.Tester@Example.org")
    assert read(sign(entry(IMAGE), jane), trust).endorser == "jane.tester@example.org"


def test_a_certificate_of_somebody_else(authority: Authority, trust: Trust) -> None:
    joe = authority.issue("joe@example.org", name="Joe Tester")
    refused(sign(entry(IMAGE), joe), trust, r"endorsed by jane\.tester@example\.org, signed by .* joe@example\.org")
    refused(sign(entry(IMAGE, subject=joe.subject), joe), trust, "endorsed by jane")


def test_a_certificate_without_an_address_speaks_for_its_subject(authority: Authority, trust: Trust) -> None:
    jane = authority.issue(in_certificate=False)
    found = read(sign(entry(IMAGE), jane), trust)
    assert (found.signed, found.endorser, found.subject) == (True, None, "CN=Jane Tester,O=StratusLab")
    assert read(sign(entry(IMAGE, subject="O=StratusLab, CN=Jane Tester"), jane), trust).signed
    refused(sign(entry(IMAGE, subject="CN=Other,O=StratusLab"), jane), trust, "endorsed by CN=Other")


def test_each_description_is_the_signers(jane: Endorser, trust: Trust) -> None:
    inner = re.search(rb"<rdf:Description.*</rdf:Description>", entry(b"2", endorser="joe@example.org"), re.DOTALL)
    assert inner
    refused(sign(entry(IMAGE).replace(b"</rdf:RDF>", inner[0] + b"</rdf:RDF>"), jane), trust, "endorsed by joe")


def test_without_trust_nobody_signed(jane: Endorser) -> None:
    (found,) = parse(sign(entry(IMAGE), jane), "entry", None)
    assert not found.signed


def test_what_was_signed_is_read(jane: Endorser, trust: Trust) -> None:
    """Comments are no part of it, and split nothing."""
    signed = sign(entry(IMAGE), jane).replace(b"jane.tester@", b"jane<!-- -->.tes<!-- x -->ter@")
    assert read(signed, trust).endorser == "jane.tester@example.org"


def test_what_comes_back_is_what_was_signed(jane: Endorser, trust: Trust) -> None:
    root, _ = verify(sign(entry(IMAGE), jane).replace(b"Debian", b"<!-- -->Debian"), trust, "entry")
    assert list(root.iter(etree.Comment)) == []
    assert list(root.iter(f"{DS}Signature")) == []
    assert root.tag == f"{RDF}RDF"


# ---------------------------------------------------------------- real ones


def pinned(sample: str, directory: Path, when: str, *sha1_endorsers: str) -> Trust:
    """Trust in the certificate in a sample, at a time."""
    found = re.search(rb"<X509Certificate>(.*?)</X509Certificate>", (DATA / sample).read_bytes(), re.DOTALL)
    assert found
    pem = b"-----BEGIN CERTIFICATE-----\n" + found[1].strip() + b"\n-----END CERTIFICATE-----\n"
    (directory / "endorser.pem").write_bytes(pem)
    now = dt.datetime.fromisoformat(when).replace(tzinfo=dt.UTC)
    return Trust((directory / "endorser.pem",), sha1_endorsers, lambda: now)


JANE_DN = "CN=Jane Tester,OU=Testing Department,O=StratusLab Project,C=EU"
REAL = {
    "valid-indate-signature.xml": ("2014-03-10", None),
    "valid-indate-deprecated-signature.xml": ("2014-03-10", None),
    "valid-two-locations.xml": ("2014-03-10", None),
    "valid-alternative.xml": ("2014-06-01", "jane.tester@example.org"),
    "valid-expired-signature.xml": ("2012-01-01", "jane.tester@example.org"),
    "invalid-special-characters-signature.xml": ("2012-01-01", "jane.tester@example.org"),
}


@pytest.mark.parametrize("sample", REAL)
def test_real_signatures_match(sample: str, tmp_path: Path) -> None:
    """Made by the Marketplace's own tools, with SHA-1, under certificates that only here are trusted themselves."""
    when, endorser = REAL[sample]
    found = read((DATA / sample).read_bytes(), pinned(sample, tmp_path, when, JANE_DN))
    assert (found.signed, found.subject, found.endorser) == (True, JANE_DN, endorser)


@pytest.mark.parametrize("sample", REAL)
def test_real_signatures_are_of_what_they_sign(sample: str, tmp_path: Path) -> None:
    tampered = (DATA / sample).read_bytes().replace(b"ttylinux", b"ttylinuX")
    refused(tampered, pinned(sample, tmp_path, REAL[sample][0], JANE_DN), "does not match")


def test_real_signatures_need_the_opt_in_and_their_time(tmp_path: Path) -> None:
    sample = "valid-alternative.xml"
    document = (DATA / sample).read_bytes()
    refused(document, pinned(sample, tmp_path, "2014-06-01"), "SHA-1")
    refused(document, pinned(sample, tmp_path, "2026-06-01", JANE_DN), "not now")
    assert read(document, pinned(sample, tmp_path, "2014-06-01", "jane.tester@example.org")).signed


# ---------------------------------------------------------------- certificates


def test_certificates_out_of_their_time(authority: Authority, trust: Trust) -> None:
    refused(sign(entry(IMAGE), authority.issue(days=(-30, -1))), trust, "was valid from .*, not now")
    refused(sign(entry(IMAGE), authority.issue(days=(1, 30))), trust, "not now")


def test_an_expired_certificate_is_not_saved_by_an_old_date(authority: Authority, trust: Trust) -> None:
    """Who has an old key can write any date."""
    then = NOW - dt.timedelta(20)
    refused(sign(entry(IMAGE, created=then), authority.issue(days=(-30, -1))), trust, "not now")


def test_a_ca_nobody_knows(trust: Trust) -> None:
    refused(sign(entry(IMAGE), Authority("Other CA").issue()), trust, "no CA that the site trusts")


def test_a_ca_with_the_same_name_and_another_key(trust: Trust) -> None:
    other = Authority("Other CA")
    other.name = "Test CA"
    refused(sign(entry(IMAGE), other.issue()), trust, "no CA that the site trusts")


def test_no_ca_at_all(jane: Endorser) -> None:
    refused(sign(entry(IMAGE), jane), Trust(()), "trusts no CA")


def test_an_intermediate_ca(authority: Authority, trust: Trust) -> None:
    below = Authority("Below", authority)
    jane = below.issue()
    assert read(sign(entry(IMAGE), jane), trust).signed
    refused(sign(entry(IMAGE), replace(jane, chain=jane.chain[:1])), trust, "no CA that the site trusts")


def test_an_endorser_is_no_ca(authority: Authority, trust: Trust) -> None:
    not_a_ca = Authority("Mallory", authority, is_ca=False)
    refused(sign(entry(IMAGE), not_a_ca.issue()), trust, "no CA that the site trusts")


def test_an_endorser_whose_certificate_is_trusted_is_no_ca_either(tmp_path: Path) -> None:
    mallory = Authority("Mallory", is_ca=False)
    pinning = Trust((mallory.write(tmp_path / "mallory.pem"),))
    refused(sign(entry(IMAGE), mallory.issue()), pinning, "no CA that the site trusts")


def test_what_certificates_may_be_used_for(authority: Authority, trust: Trust) -> None:
    good = Authority("Below", authority, may_sign=True).issue(may_sign=True)
    assert read(sign(entry(IMAGE), good), trust).signed
    refused(sign(entry(IMAGE), authority.issue(may_sign=False)), trust, "not for signatures")
    below = Authority("Below", authority, may_sign=False)
    refused(sign(entry(IMAGE), below.issue()), trust, "no CA that the site trusts")


def test_an_endorsers_own_certificate_may_be_trusted(tmp_path: Path, trust: Trust) -> None:
    jane = Authority("Other CA").issue()
    (tmp_path / "jane.pem").write_bytes(jane.certificate.public_bytes(Encoding.PEM))
    pinning = Trust((*trust.ca_files, tmp_path / "jane.pem"))
    assert read(sign(entry(IMAGE), jane), pinning).signed
    again = Authority("Other CA").issue()
    refused(sign(entry(IMAGE), again), pinning, "no CA that the site trusts")


def test_another_key_than_the_certificates(authority: Authority, jane: Endorser, trust: Trust) -> None:
    mallory = Authority("Mallory").issue(name="Mallory")
    forged = sign(entry(IMAGE), mallory)
    ours = base64.b64encode(jane.certificate.public_bytes(Encoding.DER)).decode()
    root = etree.fromstring(forged)
    only(root, "X509Certificate").text = ours
    refused(etree.tostring(root), trust, "does not match")


# ---------------------------------------------------------------- SHA-1


def test_sha1_only_by_name(authority: Authority, jane: Endorser, trust: Trust) -> None:
    signed = sign(entry(IMAGE), jane, sha1=True)
    refused(signed, trust, "made with SHA-1")
    refused(signed, replace(trust, sha1_endorsers=("joe@example.org",)), "made with SHA-1")
    assert read(signed, replace(trust, sha1_endorsers=("Jane.Tester@example.org",))).signed
    assert read(signed, replace(trust, sha1_endorsers=(jane.subject,))).signed


def test_the_opt_in_is_by_the_certificate_and_not_by_the_claim(authority: Authority, trust: Trust) -> None:
    joe = authority.issue("joe@example.org", name="Joe Tester")
    signed = sign(entry(IMAGE), joe, sha1=True)
    refused(signed, replace(trust, sha1_endorsers=("jane.tester@example.org",)), "made with SHA-1")


# ---------------------------------------------------------------- tampering


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"qcow2", b"raw  "),
        (b"<slreq:bytes>8<", b"<slreq:bytes>9<"),
        (b"http://a.example/", b"http://b.example/"),
        (b"<slterms:location>", b"<slterms:location>http://b.example/</slterms:location><slterms:location>"),
        (b"</rdf:Description>", b"<slterms:os>x</slterms:os></rdf:Description>"),
        (b"<slterms:deprecated>old</slterms:deprecated>", b""),
        (b"jane.tester@example.org", b"joe@example.org"),
        (b'rdf:about="#', b'rdf:about="#x'),
    ],
)
def test_tampering(jane: Endorser, trust: Trust, old: bytes, new: bytes) -> None:
    signed = sign(entry(IMAGE, locations=["http://a.example/"], deprecated="old"), jane)
    assert read(signed, trust).signed
    assert old in signed
    refused(signed.replace(old, new), trust, "does not match")


def test_a_signature_taken_off_is_none(jane: Endorser, trust: Trust) -> None:
    root = etree.fromstring(sign(entry(IMAGE), jane))
    root.remove(root.find(f"{DS}Signature"))
    assert not read(etree.tostring(root), trust).signed


# ---------------------------------------------------------------- wrapping


def only(root: etree._Element, name: str) -> etree._Element:
    (found,) = root.iter(f"{DS}{name}")
    return found


def evil() -> etree._Element:
    """What an attacker wants read: another image, in the name of the endorser."""
    found = etree.fromstring(entry(b"evil")).find(f"{RDF}Description")
    assert found is not None
    return found


def moved_into_the_entry(root: etree._Element) -> etree._Element:
    root[0].append(only(root, "Signature"))
    return root


def moved_into_a_wrapper(root: etree._Element) -> etree._Element:
    wrapper = etree.SubElement(root, "wrapper")
    wrapper.append(only(root, "Signature"))
    wrapper.append(root[0])
    root.insert(0, evil())
    return root


def original_inside_the_signature(root: etree._Element) -> etree._Element:
    signature = only(root, "Signature")
    original = etree.fromstring(etree.tostring(root))
    etree.SubElement(signature, f"{DS}Object").append(original)
    root.replace(root[0], evil())
    return root


def original_inside_an_entry(root: etree._Element) -> etree._Element:
    outer = etree.fromstring(entry(b"evil"))
    outer[0].append(root)
    return outer


def original_beside_the_entry(root: etree._Element) -> etree._Element:
    outer = etree.fromstring(entry(b"evil"))
    outer.append(root)
    return outer


def signature_carried_over(root: etree._Element) -> etree._Element:
    outer = etree.fromstring(entry(b"evil"))
    outer.append(only(root, "Signature"))
    return outer


def signature_on_top(root: etree._Element) -> etree._Element:
    signature = only(root, "Signature")
    etree.SubElement(signature, f"{DS}Object").append(etree.fromstring(entry(b"evil")))
    outer = etree.Element(f"{RDF}RDF")
    outer.append(evil())
    outer.append(signature)
    return outer


def two_signatures(root: etree._Element) -> etree._Element:
    root.append(etree.fromstring(etree.tostring(only(root, "Signature"))))
    return root


def a_second_reference(root: etree._Element) -> etree._Element:
    only(root, "SignedInfo").append(etree.fromstring(etree.tostring(only(root, "Reference"))))
    return root


def a_copied_id(root: etree._Element) -> etree._Element:
    """The reference says #x; the original has that id too, deep in the signature."""
    only(root, "Reference").set("URI", "#x")
    root[0].set("Id", "x")
    original = etree.fromstring(etree.tostring(root[0]))
    etree.SubElement(only(root, "Signature"), f"{DS}Object").append(original)
    root.replace(root[0], evil())
    root[0].set("Id", "x")
    return root


def no_uri(root: etree._Element) -> etree._Element:
    del only(root, "Reference").attrib["URI"]
    return root


def xpointer(root: etree._Element) -> etree._Element:
    only(root, "Reference").set("URI", "#xpointer(/)")
    return root


def transform(algorithm: str, inside: str = "") -> Callable[[etree._Element], etree._Element]:
    def change(root: etree._Element) -> etree._Element:
        added = etree.SubElement(only(root, "Transforms"), f"{DS}Transform", Algorithm=algorithm)
        if inside:
            etree.SubElement(added, f"{DS}{inside}").text = "not(ancestor-or-self::*)"
        return root

    return change


def hundreds_of_transforms(root: etree._Element) -> etree._Element:
    for _ in range(500):
        transform("http://www.w3.org/2001/10/xml-exc-c14n#")(root)
    return root


def no_enveloped_transform(root: etree._Element) -> etree._Element:
    transforms = only(root, "Transforms")
    transforms.remove(transforms[0])
    return root


def no_key_info(root: etree._Element) -> etree._Element:
    only(root, "Signature").remove(only(root, "KeyInfo"))
    return root


def a_key_value(root: etree._Element) -> etree._Element:
    etree.SubElement(only(root, "KeyInfo"), f"{DS}KeyValue")
    return root


def a_key_by_url(root: etree._Element) -> etree._Element:
    info = only(root, "KeyInfo")
    info.remove(info[0])
    etree.SubElement(info, f"{DS}RetrievalMethod", URI="http://127.0.0.1:1/key")
    return root


def a_certificate_by_name(root: etree._Element) -> etree._Element:
    etree.SubElement(only(root, "X509Data"), f"{DS}X509SubjectName").text = "CN=Jane Tester"
    return root


def no_certificate(root: etree._Element) -> etree._Element:
    data = only(root, "X509Data")
    data.remove(data[0])
    return root


def a_broken_certificate(root: etree._Element) -> etree._Element:
    only(root, "X509Certificate").text = "MIIB" * 20
    return root


def no_base64(root: etree._Element) -> etree._Element:
    only(root, "X509Certificate").text = "*"
    return root


def many_certificates(root: etree._Element) -> etree._Element:
    for _ in range(20):
        only(root, "X509Data").append(etree.fromstring(etree.tostring(root.find(f".//{DS}X509Certificate"))))
    return root


def hmac(root: etree._Element) -> etree._Element:
    only(root, "SignatureMethod").set("Algorithm", "http://www.w3.org/2001/04/xmldsig-more#hmac-sha256")
    return root


def unknown_method(root: etree._Element) -> etree._Element:
    only(root, "SignatureMethod").set("Algorithm", "http://example.org/none")
    return root


def unknown_canonicalisation(root: etree._Element) -> etree._Element:
    only(root, "CanonicalizationMethod").set("Algorithm", "http://example.org/none")
    return root


def inclusive_prefixes(root: etree._Element) -> etree._Element:
    etree.SubElement(only(root, "CanonicalizationMethod"), "InclusiveNamespaces", PrefixList="a " * 1000)
    return root


def empty_value(root: etree._Element) -> etree._Element:
    only(root, "SignatureValue").text = ""
    return root


def no_number(root: etree._Element) -> etree._Element:
    only(root, "SignatureValue").text = "é"
    return root


def empty_digest(root: etree._Element) -> etree._Element:
    only(root, "DigestValue").text = None
    return root


SHAPES = [
    moved_into_the_entry,
    moved_into_a_wrapper,
    original_inside_the_signature,
    original_inside_an_entry,
    original_beside_the_entry,
    signature_carried_over,
    signature_on_top,
    two_signatures,
    a_second_reference,
    a_copied_id,
    no_uri,
    xpointer,
    no_key_info,
    a_key_value,
    a_key_by_url,
    a_certificate_by_name,
    no_certificate,
    a_broken_certificate,
    no_base64,
    many_certificates,
    hmac,
    unknown_method,
    unknown_canonicalisation,
    inclusive_prefixes,
    empty_value,
    no_number,
    empty_digest,
]


TRANSFORMS = [
    transform("http://www.w3.org/TR/1999/REC-xpath-19991116", "XPath"),
    transform("http://www.w3.org/TR/1999/REC-xslt-19991116", "stylesheet"),
    transform("http://www.w3.org/2000/09/xmldsig#base64"),
    transform("http://www.w3.org/2000/09/xmldsig#enveloped-signature"),
    hundreds_of_transforms,
    no_enveloped_transform,
]


@pytest.mark.parametrize("change", TRANSFORMS)
def test_other_transforms_are_refused_before_they_run(
    change: Callable[[etree._Element], etree._Element], jane: Endorser, trust: Trust
) -> None:
    root = etree.fromstring(sign(entry(IMAGE), jane))
    refused(etree.tostring(change(root)), trust, "transforms are enveloped-signature and at most one")


@pytest.mark.parametrize("change", SHAPES, ids=lambda change: change.__qualname__.partition(".")[0])
def test_other_shapes(change: Callable[[etree._Element], etree._Element], jane: Endorser, trust: Trust) -> None:
    root = etree.fromstring(sign(entry(IMAGE), jane))
    with pytest.raises((BadSignature, BadMetadata)):
        parse(etree.tostring(change(root)), "http://example.org/entry", trust)


def parts(root: etree._Element) -> list[etree._Element]:
    return list(only(root, "Signature").iterdescendants())


def test_any_part_missing_or_empty(jane: Endorser, trust: Trust) -> None:
    signed = sign(entry(IMAGE), jane)
    for number in range(len(parts(etree.fromstring(signed)))):
        for what in ("element", "text", "attributes"):
            root = etree.fromstring(signed)
            part = parts(root)[number]
            if what == "element":
                part.getparent().remove(part)
            elif what == "text":
                part.text = None
            else:
                part.attrib.clear()
            changed = etree.tostring(root)
            if changed != etree.tostring(etree.fromstring(signed)):
                refused(changed, trust, "http:")


def test_a_signature_in_the_list_is_of_nothing(jane: Endorser, trust: Trust) -> None:
    signature = etree.tostring(only(etree.fromstring(sign(entry(IMAGE), jane)), "Signature"))
    listed = b"<metadata>" + entry(b"evil").partition(b"?>")[2] + signature + b"</metadata>"
    with pytest.raises(BadMetadata, match="no metadata"):
        parse(listed, "http://example.org/list", trust)


def test_a_signed_part_is_not_a_signed_document(jane: Endorser, trust: Trust) -> None:
    """A good signature, of an element by its id: what stands beside it would be anybody's."""
    root = etree.fromstring(entry(IMAGE))
    root[0].set("Id", "signed")
    signer = XMLSigner(signature_algorithm=SignatureMethod.RSA_SHA256)
    signed = signer.sign(root, key=jane.key, cert=[jane.certificate], reference_uri=[SignatureReference(URI="#signed")])
    refused(etree.tostring(signed), trust, "whole document")


def test_a_good_signature_beside_an_unsigned_entry(jane: Endorser, trust: Trust) -> None:
    """In a list each stands for itself; nothing of the one is believed of the other."""
    good, bad = sign(entry(IMAGE), jane).partition(b"?>")[2], entry(b"evil").partition(b"?>")[2]
    unsigned, signed = parse(b"<metadata>" + bad + good + b"</metadata>", "list", trust)
    assert (unsigned.signed, signed.signed) == (False, True)
    assert unsigned.identifier != signed.identifier


def test_the_lists_namespaces_change_nothing(jane: Endorser, trust: Trust) -> None:
    """A default namespace of the list would be in what is canonicalised: refused, not misread."""
    good = sign(entry(IMAGE), jane).partition(b"?>")[2]
    for wrapped in (b'<metadata xmlns:x="urn:x">%s</metadata>', b'<metadata xml:lang="en">%s</metadata>'):
        try:
            (found,) = parse(wrapped % good, "list", trust)
        except BadSignature:
            continue
        assert found.endorser == "jane.tester@example.org"


def test_as_much_as_may_be_signed(jane: Endorser, trust: Trust) -> None:
    """The bounds keep canonicalisation short: this is the worst of what is let in."""
    names = " ".join(f'xmlns:n{number}="urn:{number}"' for number in range(24))
    attributes = " ".join(f'n{number}:a="1"' for number in range(16))
    assert read(sign(entry(IMAGE, more=f"<x {names}>{f'<y {attributes}/>' * 4_900}</x>"), jane), trust).signed
