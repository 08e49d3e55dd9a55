"""Why there is no image. Every refusal has a class of its own, and a stable `code` that clients are told."""

from __future__ import annotations


class ImageError(Exception):
    """An image cannot be had; the message says why and names what it is about, without secrets."""

    code = "image-failed"


# ---------------------------------------------------------------- the reference and what is said about it


class BadReference(ImageError):
    """It is none of the kinds of reference that we know."""

    code = "bad-reference"


class NoEntry(ImageError):
    """Nobody says anything about this image, so nothing can be verified."""

    code = "no-image-entry"


class BadMetadata(ImageError):
    """A document is no metadata: not well-formed, too large, with a DOCTYPE, or without what it must have."""

    code = "bad-metadata"


class BadSignature(ImageError):
    """A signature does not match, covers something else, or is made by a certificate or with a method not accepted."""

    code = "bad-signature"


class BadChecksumFile(ImageError):
    """A SHA256SUMS is malformed, does not name the image, or is not signed as the site asks."""

    code = "bad-checksum-file"


class Refused(ImageError):
    """The site's policy lets no entry pass."""

    code = "policy-refused"


# ---------------------------------------------------------------- the network


class BadUrl(ImageError):
    """Not http or https, or with a part that is not allowed in it."""

    code = "bad-url"


class AddressRefused(ImageError):
    """The host has no address that may be connected to."""

    code = "address-refused"


class TooManyRedirects(ImageError):
    code = "too-many-redirects"


class Unreachable(ImageError):
    """No location gave the bytes; each one's cause is told. Trying again may do. `status` is HTTP's, where a server
    answered with one that is no success."""

    code = "unreachable"

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------- the bytes


class WrongDigest(ImageError):
    code = "wrong-digest"


class WrongSize(ImageError):
    code = "wrong-size"


class Truncated(ImageError):
    """A compressed stream, or a disk, ends before its end."""

    code = "truncated"


class BadCompression(ImageError):
    """The stream is not what a decompressor can read."""

    code = "bad-compression"


class TooLarge(ImageError):
    """More bytes than the site allows, or than was said: compressed, decompressed or virtual."""

    code = "image-too-large"


class BadFormat(ImageError):
    """Not the format that was named, one that is not accepted, or more than one at once."""

    code = "bad-format"


class HasBackingFile(ImageError):
    code = "has-backing-file"


class HasDataFile(ImageError):
    code = "has-data-file"


class HasSnapshots(ImageError):
    code = "has-internal-snapshots"


class Encrypted(ImageError):
    code = "encrypted-image"


class UnknownFeatures(ImageError):
    code = "unknown-features"


class Damaged(ImageError):
    """Its own metadata contradict one another (qemu-img check), or cannot be read."""

    code = "damaged-image"


class SandboxFailed(ImageError):
    """A tool in the sandbox went past its bounds of time or memory, or could not be started."""

    code = "sandbox-failed"


# ---------------------------------------------------------------- the cache


class CacheFull(ImageError):
    """There is no room, and nothing that could make some."""

    code = "image-cache-full"


class CacheUnusable(ImageError):
    """The directory is not the cache it was, or cannot be written."""

    code = "image-cache-unusable"


class NotCached(ImageError):
    """The cache has no such image."""

    code = "image-not-cached"


class TargetFull(ImageError):
    """Where the image was to be written, there is no room."""

    code = "target-full"
