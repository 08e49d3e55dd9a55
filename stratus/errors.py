"""What can go wrong for a user: a text, a hint of what to do, and the exit code of the command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

from stratus.hints import HINTS, SIGN_IN
from stratus.text import clean

Document = dict[str, Any]
"""A decoded JSON object of the API."""


class Exit(IntEnum):
    """Exit codes of every command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    CONFLICT = 4
    AUTH = 5
    TIMEOUT = 6
    UNAVAILABLE = 7
    INTERRUPTED = 130
    """128 + SIGINT, as shells count."""


class StratusError(Exception):
    """The base of them: `exit_code`, the message as str(), an optional `hint`, and `retry_after`.

    `retry_after` is None when asking again is no use, else the seconds the service wants us to wait before.
    """

    exit_code: Exit = Exit.FAILED
    retry_after: float | None = None

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def lines(self) -> list[str]:
        """The error as a user reads it, safe for a terminal."""
        message = [clean(line) for line in str(self).split("\n")]
        return ["Error: " + message[0], *message[1:], *([f"Hint: {clean(self.hint)}"] if self.hint else [])]


class ConfigError(StratusError):
    """A setting that cannot be used; the message names where it stands."""

    exit_code = Exit.USAGE


class NotFound(StratusError):
    """Nothing by that id, or nothing that this user may see."""

    exit_code = Exit.NOT_FOUND


class Conflict(StratusError):
    """The state of things does not allow it."""

    exit_code = Exit.CONFLICT


class Unreachable(StratusError):
    """No connection to the service, or none that lasted."""

    exit_code = Exit.UNAVAILABLE

    def __init__(self, endpoint: str, reason: str) -> None:
        super().__init__(
            f"no connection to {endpoint}: {reason}",
            "is the service running, and is --endpoint (STRATUS_ENDPOINT) right?",
        )
        self.retry_after = 0.0


class Untrusted(StratusError):
    """TLS could not prove who answers."""

    exit_code = Exit.UNAVAILABLE

    def __init__(self, endpoint: str, reason: str) -> None:
        super().__init__(
            f"the certificate of {endpoint} is not trusted: {reason}",
            "give the authority that signed it with --cacert FILE (STRATUS_CACERT)",
        )


class TimedOut(StratusError):
    """No answer in time."""

    exit_code = Exit.TIMEOUT

    def __init__(self, endpoint: str) -> None:
        super().__init__(
            f"no answer from {endpoint} in time",
            "a change may have been carried out all the same: look before you repeat it",
        )


class StillRunning(StratusError):
    """The command's time is over, the operation goes on."""

    exit_code = Exit.TIMEOUT

    def __init__(self, operation: Document) -> None:
        super().__init__(f"{describe(operation)} goes on, the time to wait for it is over", look_at(operation))
        self.operation = operation


class Interrupted(StratusError):
    """Ctrl-C. With an `operation`, that goes on."""

    exit_code = Exit.INTERRUPTED

    def __init__(self, operation: Document | None = None) -> None:
        if operation is None:
            super().__init__("interrupted; the change that was asked for may be carried out all the same")
        else:
            super().__init__(f"interrupted; {describe(operation)} goes on", look_at(operation))
        self.operation = operation


class Stopped(StratusError):
    """Ctrl-C during a transfer."""

    exit_code = Exit.INTERRUPTED

    def __init__(self, hint: str) -> None:
        super().__init__("interrupted", hint)


class Corrupt(StratusError):
    """What came is not what it should be."""


class Problem(StratusError):
    """The service refused: a problem document (RFC 9457), or another answer of 3xx, 4xx, 5xx."""

    def __init__(self, status: int, document: Mapping[str, Any], retry_after: float | None = None) -> None:
        self.status = status
        self.code = str(document.get("code", ""))
        errors = document.get("errors")
        self.errors = [each for each in errors if isinstance(each, dict)] if isinstance(errors, list) else []
        super().__init__(self._text(document), HINTS.get(self.code, SIGN_IN if status == 401 else None))
        self.exit_code = EXIT_OF_STATUS.get(status, Exit.FAILED)
        self.retry_after = retry_after

    def _text(self, document: Mapping[str, Any]) -> str:
        title = str(document.get("title") or f"the service answered with status {self.status}")
        detail = document.get("detail")
        first = f"{title}: {detail}" if detail and detail != title else title
        code = f" ({self.code})" if self.code else ""
        return "\n".join([clean(first) + clean(code), *(clean(_field(error)) for error in self.errors)])


class OperationFailed(StratusError):
    """Long work ended without success, after the request for it had been accepted."""

    def __init__(self, operation: Document) -> None:
        error = operation.get("error") or {}
        self.operation = operation
        self.code = str(error.get("code", ""))
        detail = clean(error.get("detail") or operation.get("message") or "no reason was given")
        code = f" ({clean(self.code)})" if self.code else ""
        super().__init__(f"{describe(operation)} {operation['state']}: {detail}{code}", HINTS.get(self.code))
        self.exit_code = _exit_of_failure(self.code)


@contextmanager
def file_errors(path: Path, verb: str) -> Iterator[None]:
    """An OSError inside becomes "cannot VERB PATH: …"."""
    try:
        yield
    except OSError as error:
        raise StratusError(f"cannot {verb} {path}: {error.strerror or error}") from error


def describe(operation: Document) -> str:
    """An operation in a few words."""
    return clean(f"operation {operation['id']} ({operation['kind']})")


def look_at(operation: Document) -> str:
    """How a user follows `operation`."""
    return clean(f"see how it goes with: stratus-describe-operations --wait {operation['id']}")


def _field(error: Document) -> str:
    where = str(error.get("pointer") or error.get("name") or "").lstrip("/")
    return f"  {where}: {error.get('detail', '')}" if where else f"  {error.get('detail', '')}"


EXIT_OF_STATUS: Mapping[int, Exit] = {
    404: Exit.NOT_FOUND,
    409: Exit.CONFLICT,
    412: Exit.CONFLICT,
    401: Exit.AUTH,
    403: Exit.AUTH,
    504: Exit.TIMEOUT,
    503: Exit.UNAVAILABLE,
}

#: Failures of long work that the state of things explains; other failures of a target or a pool are theirs.
_CONFLICTS = frozenset((
    "pool-full", "pool-low-space", "pool-overcommitted", "backing-missing", "size-mismatch", "size-too-large",
    "size-too-small", "quota-exceeded", "snapshot-needs-detach", "clone-needs-detach", "changed-meanwhile",
))  # fmt: skip
#: The image, or what is said about it, is refused: as when that is answered at once, with 409.
_REFUSED_IMAGES = frozenset((
    "image-failed", "bad-reference", "no-image-entry", "bad-metadata", "bad-signature", "bad-checksum-file",
    "policy-refused", "bad-url", "address-refused", "too-many-redirects", "wrong-digest", "wrong-size", "truncated",
    "bad-compression", "image-too-large", "bad-format", "has-backing-file", "has-data-file",
    "has-internal-snapshots", "encrypted-image", "unknown-features", "damaged-image", "image-not-available",
))  # fmt: skip
#: How work on an image ended, for reasons that lie at the service or at the image's origin. Asking again, with the same
#: key, is told the same.
ENDED_BADLY = frozenset(
    {"unreachable", "sandbox-failed", "image-cache-full", "image-cache-unusable", "image-not-cached"}
)


def _exit_of_failure(code: str) -> Exit:
    """An operation carries the code of a problem, and no HTTP status."""
    if code in _CONFLICTS | _REFUSED_IMAGES:
        return Exit.CONFLICT
    return Exit.UNAVAILABLE if code in ENDED_BADLY or code.startswith(("target-", "pool-")) else Exit.FAILED
