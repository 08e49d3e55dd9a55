"""The decompressor as it runs in the sandbox, against what the usual tools make, and what attackers do with it."""

from __future__ import annotations

import gzip
import random
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from imagecache import decompress
from imagecache.errors import BadCompression, SandboxFailed, Truncated
from imagecache.sandbox import Sandbox
from imagecache.streams import judge, start

KINDS = ("gz", "bz2", "xz", "zst")
TOOLS = {"gz": ["gzip", "-c"], "bz2": ["bzip2", "-c"], "xz": ["xz", "-1c"], "zst": ["zstd", "-qc"]}
MIB = 1 << 20
#: Of text that compresses well, of noise that does not, and of nothing.
CONTENT = b"".join(
    (b"one line after another\n" * 9000, random.Random(4).randbytes(MIB // 2), bytes(MIB), b"the end of it\n")
)


@cache
def packed(kind: str, content: bytes = CONTENT) -> bytes:
    return subprocess.run(TOOLS[kind], input=content, stdout=subprocess.PIPE, check=True).stdout


@dataclass
class Ended:
    output: bytes
    code: int
    said: str


def unpacked(kind: str, data: bytes, most: int = 1 << 30) -> Ended:
    """What comes out in the sandbox, up to `most` bytes, and how it ended."""
    with start(Sandbox(), kind, 1 << 30) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        feeder = threading.Thread(target=quietly, args=(process.stdin, data))
        feeder.start()
        output = process.stdout.read(most)
        process.stdout.close()
        feeder.join()
        said = process.stderr.read().decode()
        return Ended(output, process.wait(), said)


def quietly(pipe: object, data: bytes) -> None:
    try:
        with pipe:  # type: ignore[attr-defined]
            pipe.write(data)  # type: ignore[attr-defined]
    except BrokenPipeError:
        pass


def good(kind: str, data: bytes) -> bytes:
    ended = unpacked(kind, data)
    judge(ended.code, ended.said)
    return ended.output


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_usual_tool_made_comes_out_again(kind: str) -> None:
    assert good(kind, packed(kind)) == CONTENT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", [b"", b"x"])
def test_little_is_whole_too(kind: str, content: bytes) -> None:
    assert good(kind, packed(kind, content)) == content


@pytest.mark.parametrize("kind", KINDS)
def test_members_are_one_stream(kind: str) -> None:
    members = [packed(kind, bytes([number]) * 30_000 * number) for number in range(1, 30)]
    assert good(kind, b"".join(members)) == b"".join(bytes([number]) * 30_000 * number for number in range(1, 30))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [-1, -9, 100_000, 7, 0])
def test_a_stream_that_ends_early_is_truncated(kind: str, cut: int) -> None:
    ended = unpacked(kind, packed(kind)[:cut])
    with pytest.raises(Truncated):
        judge(ended.code, ended.said)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_member_that_ends_early_is_truncated(kind: str) -> None:
    with pytest.raises(Truncated):
        good(kind, packed(kind) + packed(kind)[:-3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", [b"x", b"garbage that goes on for a while", bytes(512), b"\x1f\x8b", "another"])
def test_nothing_may_follow(kind: str, tail: bytes | str) -> None:
    other = packed("xz" if kind == "gz" else "gz")
    with pytest.raises(BadCompression):
        good(kind, packed(kind) + (other if isinstance(tail, str) else tail))


@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_that_changed_is_seen(kind: str) -> None:
    data = bytearray(packed(kind))
    data[len(data) // 2] ^= 4
    with pytest.raises((BadCompression, Truncated)):
        good(kind, bytes(data))


def test_what_it_says_is_told() -> None:
    with pytest.raises(BadCompression, match="IsalError"):
        good("gz", b"\x1f\x8b\x08" + bytes(100))


def test_skippable_frames_are_skipped() -> None:
    skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    assert good("zst", skipped + packed("zst") + skipped + packed("zst", b"more")) == CONTENT + b"more"


def bomb(kind: str) -> bytes:
    """A quarter of a megabyte or less."""
    if kind == "gz":
        return gzip.compress(bytes(100 * MIB), 9)
    if kind == "zst":  # all of it in one frame: blocks of a repeated byte, RFC 8878, 3.1.1.2.2
        return b"\x28\xb5\x2f\xfd\x00\x58" + (128 << 10 << 3 | 1 << 1).to_bytes(3, "little").ljust(4, b"\0") * 200_000
    member = packed(kind, bytes(20 * MIB))
    return member * (decompress.INPUT // len(member))


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_ends_when_nobody_reads(kind: str) -> None:
    ended = unpacked(kind, bomb(kind), 64 * MIB)
    assert (ended.output.count(0), ended.code, ended.said) == (64 * MIB, decompress.UNWANTED, "")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_is_not_unpacked_ahead(kind: str) -> None:
    here = Here(bomb(kind), [decompress.INPUT])
    most = decompress.ZSTD_INPUT // 4 * (128 << 10) if kind == "zst" else decompress.OUTPUT

    def write(data: bytes) -> None:
        assert len(data) <= most
        here.output.append(0)
        if len(here.output) == 3:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        decompress.pour(kind, decompress.DECODERS[kind](), here.read, write)


def test_a_window_beyond_reason_is_refused() -> None:
    """zstd --ultra --long=31 makes decoders take 2 GiB."""
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = packer.compress(bytes(4 * MIB)) + packer.flush()
    with pytest.raises(BadCompression, match="memory"):
        good("zst", data)


def test_death_in_the_sandbox_is_no_fault_of_the_stream() -> None:
    for code in (1, 137, -9):
        with pytest.raises(SandboxFailed):
            judge(code, "")


@pytest.mark.parametrize("kind", KINDS)
def test_magic_is_recognised(kind: str) -> None:
    assert decompress.recognised(packed(kind)) == kind


@pytest.mark.parametrize("head", [b"", b"\x1f", b"QFI\xfb", b"BZ", bytes(16), b"\x28\xb5\x2f", b"\x5f\x2a\x4d"])
def test_what_is_no_magic_is_not(head: bytes) -> None:
    assert decompress.recognised(head) is None


class Here:
    """The loop of the decompressor in this process, with reads as short as hypothesis likes."""

    def __init__(self, data: bytes, reads: list[int]) -> None:
        self.output = bytearray()
        self._data = data
        self._reads = reads
        self._turn = 0

    def read(self) -> bytes:
        size = self._reads[self._turn % len(self._reads)]
        self._turn += 1
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    def pour(self, kind: str) -> int:
        new: Callable[[], decompress.Decoder] = decompress.DECODERS[kind]()
        return decompress.pour(kind, new, self.read, self.output.extend)


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(KINDS),
    st.lists(st.binary(max_size=300), min_size=1, max_size=4),
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
)
def test_it_does_not_matter_how_bytes_come(kind: str, contents: list[bytes], reads: list[int]) -> None:
    here = Here(b"".join(packed(kind, content) for content in contents), reads)
    assert (here.pour(kind), bytes(here.output)) == (0, b"".join(contents))
