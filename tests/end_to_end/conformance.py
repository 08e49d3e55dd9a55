"""Debian's iscsi-test-cu, suite by suite, and what became of each test.

Suites run in processes of their own: some tests change how the tool sends commands and, when the target does not know
the command, never change it back (CompareAndWrite.InvalidDataOutSize does so to a LUN with thin provisioning).
The tool's exit code says nothing; what it prints of each test does.
"""

from __future__ import annotations

import os
import queue
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.initiator import Initiator

PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"
Results = dict[str, str]
_TEST = re.compile(r"^  Test: (\S+) \.\.\.(.*?)(passed|FAILED)\b", re.MULTILINE | re.DOTALL)


def suites() -> list[str]:
    """All of them, those that last longest first."""
    listed = subprocess.run(["iscsi-test-cu", "-l"], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^ALL\.(\w+)$", listed, re.MULTILINE)
    slow = ["Reserve6", "WriteSame10", "iSCSIcmdsn", "WriteSame16"]
    return [*slow, *(suite for suite in found if suite not in slow)]


def run_suites(initiators: Sequence[Initiator]) -> Results:
    """Every suite on one of the volumes, each on the next that is free. The volumes lose their data."""
    free: queue.SimpleQueue[Initiator] = queue.SimpleQueue()
    for initiator in initiators:
        free.put(initiator)

    def run(suite: str) -> Results:
        initiator = free.get()
        try:
            return _run_suite(suite, initiator)
        finally:
            free.put(initiator)

    with ThreadPoolExecutor(len(initiators)) as pool:
        return {test: result for results in pool.map(run, suites()) for test, result in results.items()}


def _run_suite(suite: str, on: Initiator) -> Results:
    secrets = {"LIBISCSI_CHAP_USERNAME": on.username, "LIBISCSI_CHAP_PASSWORD": on.password} if on.username else {}
    argv = ["iscsi-test-cu", "-d", "-v", "-i", on.initiator, "-I", on.initiator, "-t", f"ALL.{suite}"]
    url = f"iscsi://{on.portal}/{on.iqn}/{on.lun}"
    done = subprocess.run([*argv, url], env={**os.environ, **secrets}, capture_output=True, text=True, timeout=120)
    results = {f"{suite}.{name}": _result(said, end) for name, said, end in _TEST.findall(done.stdout)}
    assert _counted(done.stdout) == len(results), f"{suite}: {done.stdout}{done.stderr}"
    return results


def _result(said: str, end: str) -> str:
    return FAILED if end == "FAILED" else SKIPPED if "[SKIPPED]" in said else PASSED


def _counted(output: str) -> int:
    """How many tests the tool's own summary says it ran."""
    found = re.search(r"^ +tests +\d+ +(\d+) ", output, re.MULTILINE)
    return int(found[1]) if found else -1


def read_baseline(path: Path) -> dict[str, list[str]]:
    """Test → what plain tgt gave on a LUN without parameters, and on one with thin provisioning."""
    lines = (line.split() for line in path.read_text().splitlines() if line and not line.startswith("#"))
    return {test: results for test, *results in lines}
