"""A small qcow2 with some bytes changed: refused, or flattened into what qemu-img reads in it; nothing else."""

from __future__ import annotations

import struct
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockdev.qemu_img import node
from imagecache.errors import ImageError, SandboxFailed
from imagecache.inspect import ImageLimits, flatten, inspect
from imagecache.sandbox import Sandbox
from tests.imagecache.support import content, make_qcow2, no_progress

CLUSTER = 512
SIZE = 64 << 10
LIMITS = ImageLimits(1 << 20, 1 << 20, least_bound=1 << 20)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Clusters of 512 bytes: all of its tables lie close together."""
    home = tmp_path_factory.mktemp("original")
    (home / "raw").write_bytes(content("original", SIZE // 2) + bytes(SIZE // 2))
    return make_qcow2(home / "qcow2", "-o", f"cluster_size={CLUSTER}", raw=home / "raw").read_bytes()


#: What fields of a header or a table are likely to hold when somebody means harm.
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 9, 21, 64, 511, 512, 513, 1024, 2048, SIZE, 1 << 31, 1 << 32, 1 << 62, 1 << 63]),
    st.integers(0, 64).map(lambda number: number * CLUSTER),
    st.integers(0, 64).map(lambda number: number * CLUSTER | 1 << 63),
    st.integers(0, (1 << 64) - 1),
)
FIELDS = st.one_of(
    st.tuples(st.integers(0, 26).map(lambda at: at * 4), NUMBERS.map(lambda n: struct.pack(">I", n & 0xFFFFFFFF))),
    st.tuples(st.integers(0, 12 * CLUSTER // 8).map(lambda at: at * 8), NUMBERS.map(lambda n: struct.pack(">Q", n))),
    st.tuples(st.integers(0, 12 * CLUSTER), st.binary(min_size=1, max_size=16)),
)


def try_one(original: bytes, changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(original)
    for offset, change in changes:
        data[offset : offset + len(change)] = change
    with tempfile.TemporaryDirectory(dir="/dev/shm") as home:
        image, made = Path(home, "image"), Path(home, "made")
        image.write_bytes(data)
        try:
            found = inspect(Sandbox(), image, "qcow2", LIMITS)
            flatten(Sandbox(), image, found, made, LIMITS, no_progress)
        except SandboxFailed:
            raise
        except ImageError:
            return
        same = ["qemu-img", "compare", node(image, "qcow2"), node(made, "qcow2")]
        subprocess.run(same, check=True, stdout=subprocess.DEVNULL)


some = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)


@settings(some, max_examples=25)
@given(st.lists(FIELDS, min_size=1, max_size=3))
def test_changed_bytes_are_refused_or_read_as_they_are(original: bytes, changes: list[tuple[int, bytes]]) -> None:
    try_one(original, changes)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(some, max_examples=250, derandomize=False)
@given(st.lists(FIELDS, min_size=1, max_size=6))
def test_many_more_of_them(original: bytes, changes: list[tuple[int, bytes]]) -> None:
    try_one(original, changes)
