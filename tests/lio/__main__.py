"""`python -m tests.lio [--engine uml|qemu] [pytest's arguments]`: tests in a kernel of their own.

Without arguments for pytest it runs all of tests/lio/inside. With `--command` the rest is a command instead.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from tests.lio.kernel import ROOT, Engine, EngineMissing, KernelFailed, run
from tests.lio.qemu import Qemu
from tests.lio.uml import Uml

ENGINES: dict[str, type[Engine]] = {"uml": Uml, "qemu": Qemu}
INSIDE = Path(__file__).with_name("inside").relative_to(ROOT)


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m tests.lio", allow_abbrev=False, add_help=False)
    parser.add_argument("--engine", choices=ENGINES, default="uml")
    parser.add_argument("--kernel-timeout", type=float, default=600, metavar="SECONDS")
    parser.add_argument("--kernel-memory", type=int, default=1536, metavar="MIB")
    parser.add_argument("--results", type=Path, metavar="DIRECTORY", help="where the kernel's files are put")
    parser.add_argument("--command", action="store_true", help="run the rest as a command")
    return parser.parse_known_args()


def _command(chosen: argparse.Namespace, rest: list[str]) -> list[str]:
    if chosen.command:
        return rest[rest[:1] == ["--"] :]
    named = any(not word.startswith("-") and Path(word.partition("::")[0]).exists() for word in rest)
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *rest, *([] if named else [str(INSIDE)])]


def _interrupted(number: int, _: object) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    chosen, rest = _arguments()
    with tempfile.TemporaryDirectory(prefix="stratus-results-") as scratch:
        try:
            return run(
                ENGINES[chosen.engine](),
                _command(chosen, rest),
                chosen.results or Path(scratch),
                timeout=chosen.kernel_timeout,
                memory=chosen.kernel_memory,
            )
        except (EngineMissing, KernelFailed) as error:
            print(f"test kernel: {error}", file=sys.stderr)
            return 125
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main())
