"""`python -m bench [--quick] [cycles|scale|clone …]`: run, print, and keep in RESULTS.md."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import clone, cycles, images, inside_kernel, results, scale, starts
from bench.report import Table, machine

BENCHMARKS: dict[str, Callable[..., list[Table]]] = {
    "cycles": cycles.run,
    "scale": scale.run,
    "clone": clone.run,
    "images": images.run,
    "starts": starts.run,
    **{name: partial(inside_kernel.bring, name) for name in inside_kernel.NAMES},
}


def main() -> None:
    chosen = _arguments()
    # Ended from outside, it still takes down its services, mounts and loop devices.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stratus-bench-", dir=chosen.work) as work:
        about = machine(Path(work))
        print(about, end="\n\n", flush=True)
        for name in chosen.names or BENCHMARKS:
            directory = Path(work, name)
            directory.mkdir()
            text = "\n".join(table.text() for table in BENCHMARKS[name](directory, quick=chosen.quick))
            print(text, flush=True)
            if not chosen.quick:
                results.keep(name, about, text)
    print(f"{time.monotonic() - began:.0f} s")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the service; needs root, as it does.")
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], metavar="NAME", help="which ones (default: all)")
    parser.add_argument("--quick", action="store_true", help="everything in a minute; RESULTS.md stays as it is")
    parser.add_argument("--work", type=Path, help="a directory on the disk to measure (default: the temporary one)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
