"""What is said about an image, as the database keeps it, and what the policy of today says to that."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from app.library import Library
from app.models import Image
from app.states import now
from imagecache.entries import Entry
from imagecache.errors import NoEntry, Refused
from imagecache.policy import Judgement, judge, judge_location
from imagecache.resolve import Resolution

_TIMES = ("created_at", "valid_until")


def document(entry: Entry) -> dict[str, Any]:
    """JSON for the database."""
    told = asdict(entry)
    told |= {name: told[name].isoformat() for name in _TIMES if told[name] is not None}
    return told | {"checksums": dict(entry.checksums), "locations": list(entry.locations)}


def entry_of(told: dict[str, Any]) -> Entry:
    """The entry that `document` told of."""
    times = {name: dt.datetime.fromisoformat(told[name]) for name in _TIMES if told.get(name)}
    lists = {name: tuple(told.get(name, ())) for name in ("locations", "other_digests")}
    known = {name: told[name] for name in Entry.__dataclass_fields__ if name in told}
    return Entry(**{**known, **times, **lists})


def judged(library: Library, entries: Iterable[Entry]) -> Judgement:
    return judge(library.policy, tuple(entries), now())


def passing(library: Library, entries: Iterable[Entry], reference: str) -> Entry:
    """The entry that passes. Raises Refused, which names each entry with the rule that refused it, or NoEntry."""
    judgement = judged(library, entries)
    if judgement.passed is not None:
        return judgement.passed
    if not judgement.refused:
        raise NoEntry(f"{reference}: nobody says anything about this image")
    raise Refused(f"the policy lets no entry pass: {judgement}")


def may_be_fetched(library: Library, resolution: Resolution) -> None:
    """Whether it makes sense to download what nobody is known to say anything about. Raises Refused, NoEntry."""
    if resolution.location is None:
        raise NoEntry("nobody says anything about this image, or where it is")
    refusal = judge_location(library.policy, resolution.location)
    if refusal is not None:
        raise Refused(f"the policy does not let it pass: {refusal.rule}: {refusal.detail}")


def still_passes(library: Library, image: Image) -> None:
    """A cached image is judged anew whenever it is used: a list may have changed, an entry may have expired. What was
    made here (of an upload, a volume, a snapshot) is its owner's own affair. Raises Refused."""
    if image.facts is not None and "source" in image.facts:
        told = entry_of(image.facts)
        known = replace(told, checksums={**(image.source_digests or {}), **told.checksums})
        for entry in (told, known):  # as it was said, and by every digest that it has
            passing(library, [entry], f"image {image.id}")


def report(reference: str, judgement: Judgement) -> dict[str, Any]:
    """A judgement, as a client is told of it."""
    refused = [
        {"entry": document(refusal.entry), "rule": refusal.rule, "detail": refusal.detail}
        for refusal in judgement.refused
    ]
    passed = None if judgement.passed is None else document(judgement.passed)
    return {"reference": reference, "passed": passed, "refused": refused}


def facts_of(resolution: Resolution, passed: Entry | None) -> dict[str, Any]:
    """What an image's row keeps of how it was found."""
    kept = {} if passed is None else document(passed)
    return kept | {"kind": resolution.kind, "location": resolution.location, "demanded": dict(resolution.checksums)}


def resolution_of(reference: str, facts: dict[str, Any]) -> Resolution:
    """The resolution that `facts_of` told of, with the one entry that passed."""
    return Resolution(reference, facts["kind"], (entry_of(facts),), facts["location"], facts.get("demanded", {}))
