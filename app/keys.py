"""Secrets at rest: the service's key ring (one file, mode 0600), passwords and tokens.

Connection secrets are sealed with AES-256-GCM, the attachment's id as associated data, so that a ciphertext moved to
another row does not open. Every ciphertext names its key; a rotated ring keeps the old keys for reading.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerifyMismatchError
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

NONCE = 12
_hasher = PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)
#: Verified against when there is no such user, so that an unknown name takes as long as a wrong password.
_NOBODY = _hasher.hash(secrets.token_hex(16))


class KeyFileError(RuntimeError):
    """A key file is missing, too open, or does not hold the key a ciphertext names."""


def hash_password(password: str) -> str:
    return _hasher.hash(password)


def password_matches(stored: str | None, password: str) -> bool:
    """Constant work whether or not there is a stored hash."""
    try:
        return _hasher.verify(stored or _NOBODY, password) and stored is not None
    except (VerifyMismatchError, InvalidHashError):
        return False


def new_token() -> str:
    """256 random bits with a prefix that secret scanners can find."""
    return "stratus_" + secrets.token_urlsafe(32)


def token_digest(token: str) -> str:
    """A token has full entropy: a plain SHA-256 is enough, and can be looked up by index."""
    return hashlib.sha256(token.encode()).hexdigest()


def new_chap_secret() -> str:
    """128 random bits (RFC 7143 §12.1.4 asks for 96), in characters no initiator stumbles over."""
    return secrets.token_hex(16)


@dataclass(frozen=True)
class ChapSecrets:
    """What a connection's ciphertext holds."""

    password: str
    mutual_password: str | None = None

    def __repr__(self) -> str:
        return "ChapSecrets(…)"


class KeyRing:
    """AES keys by id; `current` seals, all of them open."""

    def __init__(self, path: Path, current: str, keys: dict[str, bytes]) -> None:
        self._path = path
        self.current = current
        self._keys = keys

    @classmethod
    def load(cls, path: Path) -> KeyRing:
        """Raises KeyFileError when the file is missing, readable by others, or no key ring."""
        try:
            document = json.loads(read_private(path))
            keys = {k: base64.b64decode(v, validate=True) for k, v in document["keys"].items()}
            AESGCM(keys[document["current"]])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise KeyFileError(f"{path} is no key ring: restore the file from your backup") from error
        return cls(path, document["current"], keys)

    @classmethod
    def create(cls, path: Path) -> KeyRing:
        ring = cls(path, "", {})
        ring.rotate()
        return ring

    def rotate(self) -> str:
        """Add a key and make it the current one; written whole, then renamed."""
        key_id = secrets.token_hex(4)
        self._keys[key_id] = AESGCM.generate_key(256)
        self.current = key_id
        keys = {k: base64.b64encode(v).decode() for k, v in self._keys.items()}
        write_private(self._path, json.dumps({"current": key_id, "keys": keys}, indent=1))
        return key_id

    def seal(self, attachment_id: UUID, plain: ChapSecrets) -> tuple[str, bytes]:
        nonce = secrets.token_bytes(NONCE)
        text = json.dumps([plain.password, plain.mutual_password]).encode()
        return self.current, nonce + AESGCM(self._keys[self.current]).encrypt(nonce, text, attachment_id.bytes)

    def open(self, attachment_id: UUID, key_id: str, sealed: bytes) -> ChapSecrets:
        if key_id not in self._keys:
            raise KeyFileError(f"the key {key_id} is not in {self._path}: restore the file from your backup")
        try:
            text = AESGCM(self._keys[key_id]).decrypt(sealed[:NONCE], sealed[NONCE:], attachment_id.bytes)
        except InvalidTag:
            raise KeyFileError(f"the secret of attachment {attachment_id} does not open with key {key_id}") from None
        return ChapSecrets(*json.loads(text))


class Signer:
    """Ed25519, for the heads of the event chain."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.public = base64.b64encode(public).decode()

    @classmethod
    def load_or_create(cls, path: Path) -> Signer:
        """The key in `path`, its public half beside it in `.pub`. Raises KeyFileError when others can read the key."""
        if not path.exists():
            key = Ed25519PrivateKey.generate()
            raw = key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
            write_private(path, base64.b64encode(raw).decode())
        signer = cls(Ed25519PrivateKey.from_private_bytes(base64.b64decode(read_private(path))))
        write_private(path.with_suffix(".pub"), signer.public + "\n")
        return signer

    def sign(self, message: bytes) -> str:
        return base64.b64encode(self._key.sign(message)).decode()


def read_private(path: Path) -> str:
    """The text of a file that nobody else may read; KeyFileError otherwise."""
    try:
        mode = path.stat().st_mode
        if mode & 0o077:
            raise KeyFileError(f"{path} can be read by others: chmod 600 {path}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from error


def write_private(path: Path, text: str) -> None:
    """Durable and mode 0600 from its first byte on; replaces what was there."""
    staged = path.with_name(path.name + ".new")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
