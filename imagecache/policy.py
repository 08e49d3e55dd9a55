"""Which images a site lets in. Pure: what is judged is what was said, and by whom.

Where lists contradict one another, deny beats allow; an empty allow list allows all.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from .addresses import address_of, parse
from .entries import DIGEST_LENGTH, Entry
from .errors import BadUrl
from .identifiers import identifier_of

RULES = (
    "bad-entry",
    "deprecated",
    "superseded",
    "expired",
    "not-signed",
    "endorser-denied",
    "endorser-not-allowed",
    "image-denied",
    "image-not-allowed",
    "checksum-denied",
    "checksum-not-allowed",
    "no-checksum",
    "weak-checksum",
    "too-large",
    "format-not-allowed",
    "no-location",
    "host-denied",
    "host-not-allowed",
)
"""Names of all rules, in the order in which they are tried; clients are told them, so they stay."""


def _none() -> frozenset[str]:
    return frozenset()


@dataclass(frozen=True)
class Policy:
    """Endorsers are e-mail addresses, or subjects of certificates; images are identifiers; checksums are hex of any
    algorithm; hosts are names, a leading dot stands for all below it (.example.org). `max_size` is in bytes."""

    allow_endorsers: frozenset[str] = field(default_factory=_none)
    deny_endorsers: frozenset[str] = field(default_factory=_none)
    allow_images: frozenset[str] = field(default_factory=_none)
    deny_images: frozenset[str] = field(default_factory=_none)
    allow_checksums: frozenset[str] = field(default_factory=_none)
    deny_checksums: frozenset[str] = field(default_factory=_none)
    allow_hosts: frozenset[str] = field(default_factory=_none)
    deny_hosts: frozenset[str] = field(default_factory=_none)
    require_signature: bool = False
    allow_sha1: bool = False
    allow_deprecated: bool = False
    max_size: int | None = None
    formats: frozenset[str] = frozenset({"raw", "qcow2"})


@dataclass(frozen=True)
class Refusal:
    """`rule` is of RULES; `detail` says for people what about the entry it is."""

    entry: Entry
    rule: str
    detail: str


@dataclass(frozen=True)
class Judgement:
    """`passed` has only the locations that are allowed. Whatever came before it is in `refused`; of what passed nobody,
    all entries are."""

    passed: Entry | None
    refused: tuple[Refusal, ...]

    def __str__(self) -> str:
        return "; ".join(f"{_name(refusal.entry)}: {refusal.rule}: {refusal.detail}" for refusal in self.refused)


def judge(policy: Policy, entries: Sequence[Entry], now: dt.datetime) -> Judgement:
    """The first entry that passes, signed ones first; every other one tried, with the first rule that refused it."""
    refused: list[Refusal] = []
    for entry in sorted(entries, key=lambda entry: not entry.signed):
        refusal = next(_refusals(policy, entry, entries, now), None)
        if refusal is None:
            return Judgement(replace(entry, locations=_allowed_locations(policy, entry)), tuple(refused))
        refused.append(Refusal(entry, *refusal))
    return Judgement(None, tuple(refused))


def judge_location(policy: Policy, location: str) -> Refusal | None:
    """Why nothing is fetched from there, of an image that nobody says anything about yet: its bytes will be judged, but
    some rules need none."""
    entry = Entry(source="nobody", locations=(location,))
    if policy.require_signature or policy.allow_endorsers:
        return Refusal(entry, "not-signed", "no entry is known, and a signed one is required")
    refusal = next(_hosts(policy, entry), None)
    return None if refusal is None else Refusal(entry, *refusal)


_Refusals = Iterator[tuple[str, str]]


def _refusals(policy: Policy, entry: Entry, entries: Sequence[Entry], now: dt.datetime) -> _Refusals:
    """Rule and detail of everything that is against an entry, in the order of RULES."""
    yield from _standing(policy, entry, entries, now)
    yield from _endorsers(policy, entry)
    others = set(entry.other_digests)
    identifiers = {identifier_of(digest) for digest in others if len(digest) == DIGEST_LENGTH["sha1"]}
    yield from _listed("image", {entry.identifier or ""}, identifiers, policy.allow_images, policy.deny_images)
    digests = {digest.lower() for digest in entry.checksums.values()}
    yield from _listed("checksum", digests, others, policy.allow_checksums, policy.deny_checksums, str.lower)
    yield from _checksums(policy, entry)
    yield from _contents(policy, entry)
    yield from _hosts(policy, entry)


def _standing(policy: Policy, entry: Entry, entries: Sequence[Entry], now: dt.datetime) -> _Refusals:
    if entry.fault is not None:
        yield "bad-entry", entry.fault
    if entry.deprecated is not None and not policy.allow_deprecated:
        yield "deprecated", entry.deprecated
    if any(_supersedes(other, entry) for other in entries):
        yield "superseded", "the same endorser has a newer entry"
    if entry.valid_until is not None and entry.valid_until <= now:
        yield "expired", f"was valid until {entry.valid_until:%Y-%m-%d %H:%M} UTC"


def _supersedes(other: Entry, entry: Entry) -> bool:
    """An endorser takes back what was said by saying something newer, so the old entry alone must not bring it back."""
    return (
        other.created_at is not None
        and entry.created_at is not None
        and other.created_at > entry.created_at
        and other.fault is None
        and other.signed >= entry.signed
        and other.identifier == entry.identifier
        and _is_same_endorser(other, entry)
    )


def _is_same_endorser(one: Entry, other: Entry) -> bool:
    if one.endorser and other.endorser:
        return one.endorser.lower() == other.endorser.lower()
    return one.subject is not None and one.subject == other.subject


def _endorsers(policy: Policy, entry: Entry) -> _Refusals:
    """A claim is enough to be denied by, but not to be allowed by."""
    names = {name.lower() for name in (entry.endorser, entry.subject) if name}
    if policy.require_signature and not entry.signed:
        yield "not-signed", "no signature, and one is required"
    if denied := names & _lower(policy.deny_endorsers):
        yield "endorser-denied", ", ".join(sorted(denied))
    if policy.allow_endorsers and not (entry.signed and names & _lower(policy.allow_endorsers)):
        yield "endorser-not-allowed", ", ".join(sorted(names)) or "nobody" if entry.signed else "not signed"


def _lower(names: Iterable[str]) -> set[str]:
    return {name.lower() for name in names}


def _listed(
    what: str,
    own: set[str],
    others: set[str],
    allowed: Collection[str],
    denied: Collection[str],
    same: Callable[[str], str] = str,
) -> _Refusals:
    """What is denied is so packed in another way too; what is allowed is what was said."""
    if hit := (own | others) & set(map(same, denied)):
        yield f"{what}-denied", ", ".join(sorted(hit))
    if allowed and not own & set(map(same, allowed)):
        yield f"{what}-not-allowed", ", ".join(sorted(filter(None, own))) or "none"


def _checksums(policy: Policy, entry: Entry) -> _Refusals:
    if entry.strongest is None:
        yield "no-checksum", "nothing to verify the image with"
    elif entry.strongest[0] == "sha1" and not policy.allow_sha1:
        yield "weak-checksum", "SHA-1 alone, for which two images can be made"


def _contents(policy: Policy, entry: Entry) -> _Refusals:
    if policy.max_size is not None and entry.size is not None and entry.size > policy.max_size:
        yield "too-large", f"{entry.size} bytes, {policy.max_size} are allowed"
    if entry.format is not None and entry.format not in policy.formats:
        yield "format-not-allowed", entry.format[:40]


def _hosts(policy: Policy, entry: Entry) -> _Refusals:
    if not entry.locations:
        yield "no-location", "no URL to fetch the image from"
    elif not _allowed_locations(policy, entry):
        hosts = [_host(url) for url in entry.locations]
        denied = [host for host in hosts if host and _is_among(host, policy.deny_hosts)]
        yield "host-denied" if denied else "host-not-allowed", ", ".join(sorted({host or "no URL" for host in hosts}))


def _allowed_locations(policy: Policy, entry: Entry) -> tuple[str, ...]:
    return tuple(url for url in entry.locations if (host := _host(url)) and _is_host_allowed(policy, host))


def _is_host_allowed(policy: Policy, host: str) -> bool:
    if _is_among(host, policy.deny_hosts):
        return False
    return not policy.allow_hosts or _is_among(host, policy.allow_hosts)


def _host(url: str) -> str | None:
    try:
        return parse(url).host.rstrip(".")
    except BadUrl:
        return None


def _is_among(host: str, hosts: Iterable[str]) -> bool:
    return any(
        host == name or (name.startswith(".") and f".{host}".endswith(name)) for name in map(_written_once, hosts)
    )


def _written_once(item: str) -> str:
    """A host of a list as `_host` writes it."""
    address = address_of(item.strip("[]"))
    return item.lower().rstrip(".") if address is None else str(address)


def _name(entry: Entry) -> str:
    """An entry for people: who says it, and where."""
    by = entry.endorser or entry.subject
    return f"{entry.source} by {by}{'' if entry.signed else ' (unsigned)'}" if by else entry.source
