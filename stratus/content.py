"""What the service sends that is no record: the bytes of an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import requests

#: Of a chunk that is not complete when the connection breaks, nothing is had.
_CHUNK = 1 << 16


class Content:
    """An answer whose bytes are read piece by piece; to be closed, or used in a `with`.

    `status` is 200, 206 or 416; the names of `headers` are looked up in any case.
    """

    def __init__(self, response: requests.Response, broken: Callable[[Exception], Exception]) -> None:
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self._response = response
        self._broken = broken
        self._chunks = response.iter_content(_CHUNK)
        self._rest = memoryview(b"")

    def readinto(self, buffer: bytearray | memoryview) -> int:
        """Put the next bytes into `buffer`; how many they are, 0 at the end.

        Raises what `broken` makes of an error: of a connection that ended before all was there, too.
        """
        from requests import RequestException

        try:
            chunk = self._rest or memoryview(next(self._chunks, b""))
        except (OSError, RequestException) as error:
            raise self._broken(error) from error
        size = min(len(chunk), len(buffer))
        buffer[:size] = chunk[:size]
        self._rest = chunk[size:]
        return size

    def close(self) -> None:
        """Give the connection up; what is left of the answer is not read."""
        self._response.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
