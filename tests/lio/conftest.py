"""Tests that need a kernel of their own are collected there only; `python -m tests.lio` starts one."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("STRATUS_TEST_KERNEL") == "1" else ["inside"]
