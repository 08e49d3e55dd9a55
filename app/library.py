"""What turns references into images, put together from the settings: the cache and what fills it, whom the site
believes, and its policy."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from app.config import Settings
from imagecache import policy_cfg
from imagecache.cache import Cache
from imagecache.inspect import ImageLimits
from imagecache.policy import Policy
from imagecache.resolve import Resolver, Sources
from imagecache.sandbox import Sandbox
from imagecache.signatures import Trust
from imagecache.store import Store
from imagecache.web import Web


@dataclass(frozen=True)
class Library:
    cache: Cache
    store: Store
    resolver: Resolver
    policy: Policy


def open_library(settings: Settings) -> Library:
    """Raises ImageError, OSError and ValueError for what the settings name and cannot be read. The cache is not
    activated."""
    configured = settings.images
    web = Web(configured.allow_networks, ca_file=configured.ca_file)
    cache = Cache(settings.image_dir, reserve=configured.reserve)
    limits = ImageLimits(max_size=configured.max_size, max_source_size=configured.max_source_size)
    return Library(
        cache=cache,
        store=Store(cache, web, Sandbox(), limits),
        resolver=Resolver(web, _sources(settings)),
        policy=policy_of(settings),
    )


def _sources(settings: Settings) -> Sources:
    configured = settings.images
    trust = Trust(tuple(configured.trusted_cas), tuple(configured.sha1_endorsers)) if configured.trusted_cas else None
    if trust is not None:
        _ = trust.certificates  # read now: a file that is missing shows at the start, and not as a refused image
    return Sources(
        marketplaces=tuple(configured.marketplaces),
        trust=trust,
        keyring=configured.keyring,
        fingerprints=tuple(configured.fingerprints),
        require_signed_checksums=configured.require_signed_checksums,
        checksum_files=configured.checksum_files,
    )


def policy_of(settings: Settings) -> Policy:
    """The original's file, where one is named, and what stands in our own settings: lists are joined, and a
    signature is required if either requires it."""
    ours = settings.images.policy.model_dump()
    values: dict[str, Any] = {
        name: frozenset(value) if isinstance(value, list) else value for name, value in ours.items()
    }
    policy = Policy(**values)
    if settings.images.policy_file is None:
        return policy
    theirs = policy_cfg.read(settings.images.policy_file)
    lists = (field.name for field in fields(Policy) if field.name.startswith(("allow_", "deny_")))
    joined = {name: getattr(policy, name) | getattr(theirs, name) for name in lists}
    return replace(policy, require_signature=policy.require_signature or theirs.require_signature, **joined)
