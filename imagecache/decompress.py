"""Decompresses stdin to stdout, inside the sandbox: these bytes are a stranger's, and nobody has verified them yet.

    python -I -S -c SOURCE gz /packages

Its start must be cheap: nothing is imported but what the format needs; what is not in the standard library lies in
the directory that the second argument names. The exit code is one of those below. Whole streams only: every member is
checked by its own checksum where the format has one, and what follows the last one must be nothing.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing is a slow import
    from collections.abc import Callable
    from typing import Protocol

    class Decoder(Protocol):
        @property
        def eof(self) -> bool: ...
        @property
        def needs_input(self) -> bool: ...
        @property
        def unused_data(self) -> bytes: ...
        def decompress(self, data: bytes, max_length: int = -1, /) -> bytes: ...


TRUNCATED = 10
BAD = 11
#: Who reads stdout has gone.
UNWANTED = 12

INPUT = 256 << 10
OUTPUT = 1 << 20
#: A block of zstd is 4 bytes or more and becomes up to 128 KiB: this much input, at most 256 MiB.
ZSTD_INPUT = 8 << 10
#: As much as xz(1) and zstd(1) may need for what they make without being asked for more.
MOST_MEMORY = 512 << 20
ZSTD_WINDOW = 128 << 20

#: The first bytes of a file: RFC 1952; bzip2(1); the .xz file format, 2.1.1.1; RFC 8878, 3.1.1.
MAGIC = {"gz": b"\x1f\x8b\x08", "bz2": b"BZh", "xz": b"\xfd7zXZ\0", "zst": b"\x28\xb5\x2f\xfd"}
#: The second to fourth byte of a frame to be skipped, the first is 0x50 to 0x5F: RFC 8878, 3.1.2.
LONGEST_MAGIC = 6
_SKIPPABLE = b"\x2a\x4d\x18"


def recognised(head: bytes) -> str | None:
    """The compression whose magic the first bytes are."""
    if head[1:4] == _SKIPPABLE and head[0] >> 4 == 5:
        return "zst"
    return next((name for name, magic in MAGIC.items() if head.startswith(magic)), None)


def _gz() -> Callable[[], Decoder]:
    from isal import igzip_lib

    return lambda: igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)


def _bz2() -> Callable[[], Decoder]:
    import bz2

    return bz2.BZ2Decompressor


def _xz() -> Callable[[], Decoder]:
    import lzma

    return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MOST_MEMORY)


def _zst() -> Callable[[], Decoder]:
    return _Zstd


class _Zstd:
    """zstandard's, with the manners of the standard library's. It knows no bound for its output: it gets little."""

    def __init__(self) -> None:
        import zstandard

        self._frame = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
        self._left = memoryview(b"")

    @property
    def eof(self) -> bool:
        return self._frame.eof

    @property
    def needs_input(self) -> bool:
        return not self._left

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data + bytes(self._left)

    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes:
        left = self._left or memoryview(data)
        self._left = left[ZSTD_INPUT:]
        return self._frame.decompress(left[:ZSTD_INPUT])


def pour(name: str, new: Callable[[], Decoder], read: Callable[[], bytes], write: Callable[[bytes], object]) -> int:
    """Decompress all that `read` gives (nothing: the end) to `write`; the exit code. Raises what the decoder does."""
    data, decoder = read(), new()
    while True:
        if decoder.eof:
            data = decoder.unused_data
            while len(data) < LONGEST_MAGIC and (more := read()):  # it may lie across reads
                data += more
            if not data:
                return 0
            if recognised(data) != name:
                return BAD
            decoder = new()
        elif not data and decoder.needs_input:
            return TRUNCATED
        write(decoder.decompress(data, OUTPUT))
        data = read() if decoder.needs_input and not decoder.eof else b""


DECODERS: dict[str, Callable[[], Callable[[], Decoder]]] = {"gz": _gz, "bz2": _bz2, "xz": _xz, "zst": _zst}


def _read() -> bytes:
    return os.read(0, INPUT)


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


def main() -> int:
    name, packages = sys.argv[1:]
    sys.path.append(packages)
    new = DECODERS[name]()
    try:
        return pour(name, new, _read, _write)
    except BrokenPipeError:
        return UNWANTED
    except MemoryError:
        raise
    except Exception as error:  # what is wrong with the bytes: each library has an error of its own
        os.write(2, f"{type(error).__name__}: {error}"[:500].encode())
        return BAD


if __name__ == "__main__":
    sys.exit(main())
