"""Shell completion: the script for every command, and ids from the service."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from typing import Any

from click.shell_completion import CompletionItem, get_completion_class

import stratus.commands
from stratus.client import Client, Params
from stratus.config import load
from stratus.errors import Document
from stratus.text import clean

SHELLS = ("bash", "zsh", "fish")
#: Someone has pressed TAB and waits.
_SECONDS = "0.8"
_MOST = 100


def command_names() -> list[str]:
    """The commands users type: each file of stratus.commands is one."""
    return ["stratus-" + each.name.replace("_", "-") for each in pkgutil.iter_modules(stratus.commands.__path__)]


def script(shell: str) -> str:
    """What to evaluate in `shell` (bash, zsh, fish) so that it completes every command."""
    kind = get_completion_class(shell)
    if kind is None:
        raise ValueError(f"no completion for {shell}")
    return "\n".join(kind.source_template % _names(command) for command in command_names())


def _names(command: str) -> dict[str, str]:
    word = command.replace("-", "_")
    return {"prog_name": command, "complete_func": f"_{word}_completion", "complete_var": f"_{word.upper()}_COMPLETE"}


def suggest(path: str, options: Mapping[str, Any], incomplete: str) -> list[CompletionItem]:
    """Ids of the records at `path` that start with `incomplete`; none when the service does not answer at once."""
    try:
        return [_item(each) for each in _first_page(path, options) if each["id"].startswith(incomplete)]
    except Exception:  # the edge of the process: a message would land in a half-typed line
        return []


def _first_page(path: str, options: Mapping[str, Any]) -> list[Document]:
    keys = ("endpoint", "token_file", "username", "password_file", "cacert")
    config = load({**{key: options.get(key) for key in keys}, "timeout": _SECONDS})
    if config.insecure:
        return []  # a key press is no reason to send a token in plain text
    query: Params = {"limit": _MOST}
    items = Client(config, delays=()).get(path, query).get("items", [])
    return items if isinstance(items, list) else []


def _item(record: Document) -> CompletionItem:
    return CompletionItem(record["id"], help=clean(record.get("name") or record.get("state") or "") or None)
