"""Who may know whom: the rooms of the house and the arrows between them, read from the imports."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("app", "iscsi", "imagecache", "pools", "blockdev", "stratus", "migrations")
STORAGE = ("iscsi", "imagecache", "pools")
#: What each room may import beside the standard library and itself; "app" has rules of its own below.
MAY = {
    "blockdev": set[str](),
    "iscsi": {"blockdev", "rtslib_fb"},
    "pools": {"blockdev"},
    "imagecache": {
        "blockdev",
        "lxml",
        "signxml",
        "cryptography",
        "isal",
        "zstandard",
        "oslo_utils",
    },
    "stratus": {"blockdev", "click", "requests", "platformdirs"},
}
#: The modules of app that act outside the database, or watch what is there.
HANDS = (
    "app.steps", "app.worker", "app.worker_process", "app.keeper", "app.housekeeping", "app.reconcile", "app.watch",
    "app.outside", "app.diagnosis", "app.library", "app.image_care",
    "app.image_drift",
)  # fmt: skip
#: Names of initiators: text and nothing else.
PURE = "iscsi.names"
#: The one module that loads these, of the extra `metadata`.
SIGNS = "stratus.signing"
SIGNING = ("lxml", "signxml", "cryptography")
#: What the service's one executable starts; it loads them in the command that needs them.
ENTRIES = ("app.cli", "app.commands")


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str, module: str, *, package: bool = False, lazy: bool = True) -> Iterator[str]:
    """The modules that `source` imports, relative ones resolved; `lazy`: also inside functions and TYPE_CHECKING."""
    tree = ast.parse(source)
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) + package - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_in(name: str, *places: str) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def refused(source: str, module: str, *, package: bool = False) -> list[str]:
    """What this module imports and must not."""
    room = module.split(".")[0]
    found = list(imports(source, module, package=package))
    if room in MAY:
        allowed = MAY[room] | {room} | sys.stdlib_module_names
        eager = set(imports(source, module, package=package, lazy=False))
        return [
            name for name in found if name.split(".")[0] not in allowed and (name in eager or not lazily(module, name))
        ]
    if is_in(module, *HANDS):
        return [name for name in found if is_in(name, "app.api", "flask", "stratus")]
    return [name for name in found if is_in(name, "stratus", *outside(module)) and not is_in(name, PURE)]


def lazily(module: str, name: str) -> bool:
    """Whether this is loaded by those who need it only: a bar on a terminal, and what signs metadata."""
    return (is_in(module, "stratus") and is_in(name, "rich")) or (module == SIGNS and is_in(name, *SIGNING))


def outside(module: str) -> tuple[str, ...]:
    """What services, views and the rest of app leave to the worker."""
    return STORAGE if is_in(module, *ENTRIES) else (*STORAGE, "app.steps", "app.outside")


@pytest.mark.parametrize("room", ROOMS)
def test_the_arrows_hold(room: str) -> None:
    paths = sources(room)
    assert paths
    found = {
        module_name(path): bad
        for path in paths
        if (bad := refused(path.read_text(), module_name(path), package=path.name == "__init__.py"))
    }
    assert found == {}


def test_only_app_knows_flask_and_only_its_edge() -> None:
    for path in sources("app"):
        module = module_name(path)
        if not is_in(module, "app.api", "app.factory"):
            assert not [name for name in imports(path.read_text(), module) if is_in(name, "flask", "werkzeug")], module


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("blockdev.files", "import click"),
        ("blockdev.files", "from pools import Pool"),
        ("iscsi.tgt", "import sqlalchemy"),
        ("iscsi.tgt", "def late():\n    from app.models import Volume"),
        ("pools.directory", "from iscsi.names import iqn_of"),
        ("stratus.cli", "import flask"),
        ("stratus.cli", "from app.config import Settings"),
        ("stratus.cli", "import rich.progress"),
        ("stratus.signing", "import signxml"),
        ("stratus.metadata", "def late():\n    from lxml import etree"),
        ("stratus.metadata", "from imagecache.identifiers import identifier_of"),
        ("app.volumes", "from pools import open_pool"),
        ("app.volumes", "from app import steps"),
        ("app.volumes", "from . import outside"),
        ("app.attachments", "from iscsi.tgt import TgtTarget"),
        ("app.api.volumes", "from ..steps.job import Job"),
        ("app.steps.volumes", "from flask import request"),
        ("app.keeper", "from app.api import install"),
    ],
)
def test_an_import_against_the_arrows_is_seen(module: str, source: str) -> None:
    assert refused(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("iscsi.tgt", "from blockdev.command import run"),
        ("stratus.progress", "def show():\n    from rich.progress import Progress"),
        ("stratus.signing", "def late():\n    from lxml import etree"),
        ("app.attachments", "from iscsi.names import validate_initiator"),
        ("app.steps.volumes", "from pools import BackingMissing"),
    ],
)
def test_an_import_along_the_arrows_is_none(module: str, source: str) -> None:
    assert not refused(source, module)
