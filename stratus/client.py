"""The service's API as a program sees it: records, pages, changes that are never made twice, long work."""

from __future__ import annotations

import base64
import itertools
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

from stratus.config import Config
from stratus.content import Content
from stratus.errors import (
    ENDED_BADLY,
    Document,
    Interrupted,
    OperationFailed,
    Problem,
    StillRunning,
    StratusError,
    TimedOut,
    Unreachable,
    Untrusted,
    look_at,
)

if TYPE_CHECKING:
    import requests

Params = Mapping[str, str | int | None]

#: Seconds before each repetition of a request that met no service: about as long as a restart of it takes.
DELAYS = (0.25, 0.75, 2.0)
_CONNECT = 10.0
_ANSWER = 60.0
_LONGEST_PAUSE = 30.0
_PAGE = 500
#: Seconds the service may hold an answer back: short, so that progress shows and Ctrl-C loses little.
_HOLD = 1
#: Times a change whose connection broke is asked for again, a second apart, while the service is still at it.
_PATIENCE = 30
_ENDED = ("succeeded", "failed", "cancelled")


class Clock(Protocol):
    """What of the module `time` is used."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


@dataclass(frozen=True)
class Answer:
    """A successful answer: its status and its decoded JSON, {} when it had no content."""

    status: int
    document: Document

    @property
    def operation(self) -> Document | None:
        """The operation to wait for, when the service accepted long work (RFC 9110 §15.3.3)."""
        return self.document if self.status == 202 else None


class Client:
    """One user's connection to the service.

    Every method raises Problem when the service refuses, Unreachable or Untrusted when there is none to talk to, and
    TimedOut when an answer takes too long or `config.timeout` seconds have passed since this object was made.
    `notify` is told, in a sentence, when a request is repeated.
    """

    def __init__(
        self,
        config: Config,
        *,
        notify: Callable[[str], None] = lambda _: None,
        delays: tuple[float, ...] = DELAYS,
        clock: Clock = time,
    ) -> None:
        self.config = config
        self._notify = notify
        self._delays = delays
        self._clock = clock
        self._deadline = None if config.timeout is None else clock.monotonic() + config.timeout
        self._connections: requests.Session | None = None

    def close(self) -> None:
        """Close the connections; the object may be used again."""
        if self._connections is not None:
            self._connections.close()
            self._connections = None

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Params | None = None,
        body: Document | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """The answer to one request, sent again, a bounded number of times, while the service cannot be reached or
        says 503. The same headers go with each, so with an Idempotency-Key a change is made once."""
        for delay in self._delays:
            try:
                return self._once(method, path, params, body, headers or {})
            except StratusError as error:
                if error.retry_after is None:
                    raise
                self._notify(f"{str(error).splitlines()[0]}; trying again")
                self._pause(max(delay, error.retry_after))
        return self._once(method, path, params, body, headers or {})

    def put(self, path: str, content: bytes, headers: Mapping[str, str]) -> Answer:
        """The answer to `content` sent as it is, once: whether it may be sent again is known by asking what arrived."""
        kind = {"Content-Type": "application/octet-stream"}
        return self._answer(self._send("PUT", path, data=content, headers={**kind, **headers}))

    def content(self, path: str, headers: Mapping[str, str]) -> Content:
        """What is at `path`, to be read; to be closed as well. Not asked for a second time."""
        given = {"Accept": "*/*", "Accept-Encoding": "identity", **headers}
        response = self._send("GET", path, headers=given, stream=True)
        if response.status_code not in (200, 206, 416):
            with response:
                self._answer(response)
                raise Unreachable(self.config.endpoint, f"it answered with status {response.status_code}")
        return Content(response, self._broken)

    def get(self, path: str, params: Params | None = None) -> Document:
        """One record."""
        return self.request("GET", path, params=params).document

    def pages(self, path: str, params: Params | None = None) -> Iterator[Document]:
        """Every record of a list, page after page."""
        query: dict[str, str | int | None] = {"limit": _PAGE, **(params or {})}
        while True:
            page = self.get(path, query)
            yield from page["items"]
            if not page.get("next") or page["next"] == query.get("next"):
                return
            query["next"] = page["next"]

    def mutate(
        self,
        method: str,
        path: str,
        body: Document | None = None,
        *,
        params: Params | None = None,
        dry_run: bool = False,
        hold: int = _HOLD,
    ) -> Answer:
        """Make one change, once, however often the request had to be sent. With `dry_run`, the answer is the plan.

        The service holds its answer back for up to `hold` seconds (RFC 7240 §4.3) and answers with an operation then.
        Raises Interrupted on Ctrl-C.
        """
        headers = {"Idempotency-Key": str(uuid.uuid4()), "Prefer": f"wait={hold}"}
        query = {**(params or {}), **({"dry_run": "true"} if dry_run else {})}
        send = partial(self.request, method, path, params=query, body=body, headers=headers)
        try:
            return self._until_answered(send)
        except KeyboardInterrupt:
            raise Interrupted from None

    def wait_for(self, operation: Document, progress: Callable[[Document], None] = lambda _: None) -> Document:
        """The operation once it has succeeded; `progress` sees it after every look.

        Raises OperationFailed, StillRunning when the time is over, Interrupted on Ctrl-C.
        """
        try:
            while operation["state"] not in _ENDED:
                progress(operation)
                operation = self._look(operation)
        except KeyboardInterrupt:
            raise Interrupted(operation) from None
        except TimedOut:
            raise StillRunning(operation) from None
        except Unreachable as error:
            error.hint = look_at(operation)
            raise
        progress(operation)
        if operation["state"] != "succeeded":
            raise OperationFailed(operation)
        return operation

    def resource(self, operation: Document) -> Document:
        """The record that `operation` worked on."""
        resource = operation["resource"]
        return self.get(f"/v1/{resource['kind']}s/{resource['id']}")

    def _until_answered(self, send: Callable[[], Answer]) -> Answer:
        """The answer to a change; a key that is "in flight" is our own, sent before the connection broke."""
        for _ in range(_PATIENCE):
            try:
                return send()
            except Problem as problem:
                if problem.code != "idempotency-in-flight":
                    raise
            self._pause(1)
        return send()

    def _look(self, operation: Document) -> Document:
        asked_at = self._clock.monotonic()
        seen = self.get(f"/v1/operations/{operation['id']}", {"wait": _HOLD})
        if seen["state"] not in _ENDED and self._clock.monotonic() - asked_at < _HOLD / 2:
            self._pause(_HOLD / 2)  # something between us does not let the service hold its answer
        return seen

    def _pause(self, seconds: float) -> None:
        self._clock.sleep(min(seconds, _LONGEST_PAUSE, self._remaining(_LONGEST_PAUSE)))

    def _remaining(self, most: float) -> float:
        if self._deadline is None:
            return most
        remaining = self._deadline - self._clock.monotonic()
        if remaining <= 0:
            raise TimedOut(self.config.endpoint)
        return min(most, remaining)

    def _once(
        self, method: str, path: str, params: Params | None, body: Document | None, headers: Mapping[str, str]
    ) -> Answer:
        return self._answer(self._send(method, path, params=params, json=body, headers=headers))

    def _send(self, method: str, path: str, *, headers: Mapping[str, str], **what: Any) -> requests.Response:
        import requests  # a third of a command's start, and --help or a wrong option need none of it

        if self._connections is None:
            self._connections = self._connect()
        try:
            return self._connections.request(
                method,
                self.config.endpoint + path,
                headers=dict(headers),
                auth=self._authorize,
                # Given with each request: the session's own would yield to REQUESTS_CA_BUNDLE.
                verify=str(self.config.cacert) if self.config.cacert else True,
                timeout=(self._remaining(_CONNECT), self._remaining(_ANSWER)),
                allow_redirects=False,
                **what,
            )
        except requests.exceptions.SSLError as error:
            raise Untrusted(self.config.endpoint, _reason(error)) from error
        except requests.exceptions.ReadTimeout as error:
            raise TimedOut(self.config.endpoint) from error
        except (OSError, requests.RequestException) as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> Unreachable:
        """What became of a connection; TimedOut instead when it took all the time we had."""
        self._remaining(0)
        return Unreachable(self.config.endpoint, _reason(error))

    def _connect(self) -> requests.Session:
        import requests

        session = requests.Session()
        session.headers.update({"Accept": "application/json, application/problem+json", "User-Agent": "stratus"})
        # A proxy has no business between us and our own machine.
        session.trust_env = not self.config.loopback
        return session

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        # As an auth of our own, so that ~/.netrc is not asked.
        if self.config.token is not None:
            request.headers["Authorization"] = f"Bearer {self.config.token}"
        elif self.config.username is not None:
            pair = f"{self.config.username}:{self.config.password}".encode()
            request.headers["Authorization"] = "Basic " + base64.b64encode(pair).decode()
        return request

    def _answer(self, response: requests.Response) -> Answer:
        if response.status_code >= 400:
            problem = _problem(response)
            raise Problem(response.status_code, problem, _retry_after(response, problem))
        if response.status_code >= 300:
            raise StratusError(
                f"{self.config.endpoint} sends us on to {response.headers.get('Location', 'nowhere')}",
                "if that is right, say so with --endpoint: sign-in data is not carried to another address unasked",
            )
        if response.status_code == 204:
            return Answer(204, {})
        document = _json(response)
        if not isinstance(document, dict):
            raise StratusError(
                f"what answers at {self.config.endpoint} is no Stratus service (it sent no JSON object)",
                "is --endpoint (STRATUS_ENDPOINT) right?",
            )
        return Answer(response.status_code, document)


def _json(response: requests.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _problem(response: requests.Response) -> Document:
    """The problem document, or {} when something else than the service answered."""
    document = _json(response)
    return cast(Document, document) if isinstance(document, dict) else {}


def _retry_after(response: requests.Response, problem: Document) -> float | None:
    """Seconds to wait before asking again; None when that is no use."""
    if response.status_code != 503 or problem.get("code") in ENDED_BADLY:
        return None
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() else 0.0


def _reason(error: BaseException) -> str:
    """The innermost cause in a chain of wrapped errors, which says it in the fewest words."""
    chain = list(itertools.islice(_causes(error), 10))
    return str(getattr(chain[-1], "strerror", None) or chain[-1])


def _causes(error: BaseException) -> Iterator[BaseException]:
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__ or following.__context__
