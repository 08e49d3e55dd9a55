"""What a stranger's disk image claims to be, believed by nobody; and a fresh qcow2 made of it, in the sandbox.

The order is that of the rules for hostile images: its size, then its header as our own probe reads it
(format_probe.py), then qemu-img, which never guesses (blockdev/qemu_img.py), and then the probe again on what qemu-img
made: what a program made that had read a stranger's bytes is a stranger's too.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from blockdev.command import CommandFailed
from blockdev.extents import Progress
from imagecache import errors, format_probe, sandboxed_qemu
from imagecache.entries import Format
from imagecache.errors import BadFormat, Damaged, ImageError, TooLarge, Truncated
from imagecache.sandbox import Sandbox

_IMAGE, _PROBE, _PACKAGES = "/image", "/probe.py", "/packages"
_FORMATS: dict[tuple[str, ...], Format] = {(): "raw", ("qcow",): "qcow2"}
_SECTOR = 512


@dataclass(frozen=True)
class ImageLimits:
    """What a site lets in. In bytes: `max_size` of the virtual disk, `max_source_size` of the (decompressed) file it
    comes in. The qcow2 made of it may be `expansion` times as large as that file, and `least_bound` in any case."""

    max_size: int
    max_source_size: int
    expansion: int = 100
    least_bound: int = 256 << 20


@dataclass(frozen=True)
class Inspection:
    """`size` of the virtual disk in bytes, in whole sectors."""

    format: Format
    size: int


def inspect(sandbox: Sandbox, path: Path, format: str | None, limits: ImageLimits) -> Inspection:
    """What the file `path`, which the sandbox's user must be able to read, is: `format`, or of the two that we take if
    None is told. Nothing but its header was read, so it may still be damaged.

    Raises BadFormat, TooLarge, Truncated, Damaged, HasBackingFile, HasDataFile, HasSnapshots, Encrypted,
    UnknownFeatures, SandboxFailed.
    """
    if format not in (None, "raw", "qcow2"):
        raise BadFormat(f"{format!r} is no format that is taken: raw and qcow2 are")
    file_size = path.stat().st_size
    if file_size > limits.max_source_size:
        raise TooLarge(f"a file of {file_size} bytes, {limits.max_source_size} are allowed")
    found = _probed(sandbox, path)
    inspection = Inspection(_agreed(format, found.formats), -(-found.size // _SECTOR) * _SECTOR)
    if found.size > limits.max_size:
        raise TooLarge(f"a disk of {found.size} bytes, {limits.max_size} are allowed")
    if found.refusal is not None:
        raise found.refusal
    if inspection.size == 0:
        raise Truncated("a disk of no bytes")
    return inspection


def flatten(
    sandbox: Sandbox, path: Path, source: Inspection, into: Path, limits: ImageLimits, progress: Progress
) -> None:
    """Check what was inspected (or is raw by law: a guest's disk, a file or a block device), and make the new file
    `into` a qcow2 of the same content that depends on nothing. The same content gives the same bytes. Not durable on
    return.

    `progress(done, total)` counts bytes of the virtual disk; it is called often, and cancels by raising. `into` is the
    caller's to remove. Raises Damaged, Truncated, TooLarge, CacheFull, SandboxFailed.
    """
    file_size = path.stat().st_size or source.size  # a device has none
    if source.format == "qcow2":
        _check(sandbox, path)
    most = min(_most(source.size), max(limits.least_bound, file_size * limits.expansion))
    into.touch(0o600, exist_ok=False)
    sandboxed_qemu.to_qcow2(sandbox, path, source.format, into, size=source.size, most=most, progress=progress)
    into.chmod(0o444)
    made = inspect(sandbox, into, "qcow2", ImageLimits(source.size, most))
    if made != Inspection("qcow2", source.size):
        raise Damaged(f"qemu-img made a disk of {made.size} bytes of one of {source.size}")


def _check(sandbox: Sandbox, path: Path) -> None:
    """Leaked clusters are a waste, and end here; whatever else is wrong is refused."""
    found = sandboxed_qemu.check(sandbox, path)
    if found.cut:
        raise Truncated("the file ends before the last of its clusters")
    if found.errors:
        raise Damaged(f"qemu-img check found {found.errors} errors in it")


def _most(size: int) -> int:
    """The largest qcow2 of a disk of that size: clusters of 64 KiB, each with 8 bytes in a table and 2 of refcounts."""
    return size + size // 4096 + (2 << 20)


# ------------------------------------------------------------ the header


@dataclass(frozen=True)
class _Found:
    formats: tuple[str, ...]
    size: int
    refusal: ImageError | None


def _probed(sandbox: Sandbox, path: Path) -> _Found:
    """What the probe says, which may have been written by the image: nothing but these types gets out of here."""
    packages = Path(sysconfig.get_path("purelib"))
    read = {_PROBE: Path(format_probe.__file__), _PACKAGES: packages, _IMAGE: path, **_interpreter()}
    argv = [os.path.realpath(sys.executable), "-I", "-S", _PROBE, _PACKAGES, _IMAGE]
    try:
        said = json.loads(sandbox.run(argv, read=read, timeout=60).stdout)
        refusal = said["refusal"] and _refusal(*said["refusal"])
        found = _Found(tuple(str(name)[:20] for name in said["formats"]), int(said["size"]), refusal)
    except CommandFailed as error:
        raise Damaged(f"its header cannot be read: {error.stderr.strip()[-200:]}") from error
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise Damaged("its header cannot be read") from error
    if found.size < 0:
        raise Damaged("its header cannot be read")
    return found


def _interpreter() -> dict[str, Path]:
    """Python itself, where it is not below /usr, which is in every sandbox."""
    place = Path(sys.base_prefix)
    return {} if place.is_relative_to("/usr") else {str(place): place}


def _refusal(name: str, reason: str) -> ImageError:
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, ImageError)):
        raise ValueError(name)
    return kind(str(reason)[:200])


def _agreed(told: str | None, found: tuple[str, ...]) -> Format:
    taken = _FORMATS.get(found)
    if taken is None:
        raise BadFormat(f"it is {' and '.join(found)}: a plain raw disk or a plain qcow2 is taken")
    if told not in (None, taken):
        raise BadFormat(f"it is {taken}, not {told}")
    return taken
