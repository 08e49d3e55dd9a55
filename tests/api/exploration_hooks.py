"""What schemathesis needs to know beside the description, to get deep instead of sawing off its own branch."""

from __future__ import annotations

import os
import re
import secrets
from typing import Any
from uuid import uuid4

import schemathesis
from schemathesis import Case, HookContext

KEY = re.compile(r"[!-~]{8,255}")
MIB = 1 << 20
#: gunicorn answers a request line beyond this by itself, before there is any application.
LONGEST_QUERY = 500


@schemathesis.hook
def filter_case(context: HookContext, case: Case[Any]) -> bool:
    return len(repr(case.query or {})) < LONGEST_QUERY


@schemathesis.hook
def before_call(context: HookContext, case: Case[Any], kwargs: dict[str, Any]) -> None:
    _use_key_once(case)
    _keep_explorer(case)
    meta = case.meta
    if meta is not None and meta.phase.name.value == "stateful" and meta.generation.mode.is_positive:
        _bring_within_reach(case)


def _use_key_once(case: Case[Any]) -> None:
    """The generator likes to repeat itself; another request under a known key is 422, rightly (see its own tests)."""
    headers: Any = case.headers or {}
    key = headers.get("Idempotency-Key")
    if isinstance(key, str) and KEY.fullmatch(key):
        headers["Idempotency-Key"] = (secrets.token_hex(8) + key[16:])[: max(len(key), 8)]


def _keep_explorer(case: Case[Any]) -> None:
    """Never touch the account, quota and token the exploration itself uses: everything after would be 401 or 409."""
    given: Any = case.path_parameters or {}
    if case.method in ("DELETE", "PATCH", "PUT"):
        if given.get("id") == os.environ["EXPLORER_TOKEN_ID"]:
            given["id"] = str(uuid4())
        given.update({name: "nobody" for name, value in given.items() if value == os.environ["EXPLORER"]})


def _bring_within_reach(case: Case[Any]) -> None:
    """For chains: sizes a pool can hold, the pool there is, deeds instead of plans, and some that are not waited for.

    The check for use after a deletion takes any answer below 300 for a deletion, a plan's and 202 as well.
    """
    body: Any = case.body
    headers: Any = case.headers or {}
    if isinstance(body, dict):
        if body.get("size") is not None:
            body["size"] = MIB + int(body["size"]) % MIB // 512 * 512
        if body.get("pool") is not None:
            body["pool"] = "default"
    headers.pop("If-Match", None)
    if "Prefer" in headers:
        headers["Prefer"] = "wait=30" if case.method == "DELETE" else "wait=0"
    if isinstance(case.query, dict):
        case.query.pop("dry_run", None)
