"""bench/RESULTS.md: a section for each benchmark and one for the long profiles, each replaced by its own next run only.

    ## cycles                      the benchmark's name
    2026-01-31: 2 cores, …         when, and on what machine
    ### …                          its tables

Nobody writes there by hand: `python -m bench` keeps its tables, and `make test-slow` pytest's closing line, by
`python -m bench.results slow "SUMMARY"`.
"""

from __future__ import annotations

import argparse
import datetime as dt
import re
import tempfile
from pathlib import Path

from bench.report import machine

RESULTS = Path(__file__).with_name("RESULTS.md")
LONG_PROFILES = "Long profiles"
_HEAD = """\
# Results

Written by `make bench` and `make test-slow`. Each section is of its own last run: compare within one, not across.
"""
_SECTION = re.compile(r"^## (.+)\n", re.MULTILINE)


def keep(name: str, about: str, text: str, path: Path = RESULTS) -> None:
    """Replace, or add, the section `name`; `about` is the machine it was measured on. All others stay as they are."""
    day = dt.datetime.now(dt.UTC).date().isoformat()
    sections = _sections(path.read_text(encoding="utf-8")) if path.exists() else {}
    sections[name] = f"{day}: {about}.\n\n{text.strip()}"
    # Benchmarks in the order they first came, the long profiles at the end.
    ordered = sorted(sections, key=lambda each: each == LONG_PROFILES)
    parts = [_HEAD, *(f"## {each}\n\n{sections[each]}\n" for each in ordered)]
    path.write_text("\n".join(parts), encoding="utf-8")


def _sections(document: str) -> dict[str, str]:
    _, *found = _SECTION.split(document)
    return {name: text.strip() for name, text in zip(found[::2], found[1::2], strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.results", description=f"Keep a run in {RESULTS.name}.")
    parser.add_argument("kind", choices=["slow"], help="slow: the long profiles")
    parser.add_argument("summary", help="pytest's closing line")
    summary = parser.parse_args().summary.strip("= ")
    keep(LONG_PROFILES, machine(Path(tempfile.gettempdir())), f"`make test-slow`: {summary}")


if __name__ == "__main__":
    main()
