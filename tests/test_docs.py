"""The documents say what is there: settings with their defaults, commands, codes; and no link leads nowhere."""

from __future__ import annotations

import ast
import configparser
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from app.cli import main
from app.config import Settings
from stratus.hints import HINTS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
_ROW = re.compile(r"^\| `([a-zA-Z0-9_.]+)` \| (none|required|`(.*?)`) \|", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#:]*)(?:#([^)]*))?\)")


def _settings(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        if name == "home":
            continue
        kind = field.annotation
        if name == "pools":
            yield from _settings(get_args(kind)[1], "pools.NAME.")
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _settings(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, "required" if field.default is PydanticUndefined else field.default


def _documented() -> dict[str, Any]:
    rows = _ROW.findall((ROOT / "docs/configuration.md").read_text())
    plain = {"none": None, "required": "required"}
    return {key: json.loads(value) if word not in plain else plain[word] for key, word, value in rows}


def test_every_setting_is_documented_with_its_default() -> None:
    assert _documented() == dict(_settings())


def test_the_example_of_a_configuration_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs/configuration.md").read_text().partition("## An example\n")[2]
    example = tomllib.loads(re.sub("^    ", "", text, flags=re.MULTILINE))
    assert Settings.model_validate({**example, "home": tmp_path}).default_pool in example["pools"]


def test_every_command_is_in_the_readme() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    commands = re.findall(r"^(stratus-\S+) =", setup["options.entry_points"]["console_scripts"], re.MULTILINE)
    readme = (ROOT / "README.md").read_text()
    assert commands
    assert [command for command in commands if f"`{command}`" not in readme] == []
    assert [name for name in main.commands if f"`{name}`" not in readme] == []


#: Who makes a problem, and which of its arguments is the code.
_MAKERS = {"Problem": 1, "conflict": 0, "forbidden": 0, "_unauthorized": 0, "hold_for_copy": 2, "Refusal": 0}


def _codes() -> set[str]:
    """What app/ answers with: the codes of its problems, of its tables called CODES, and of the refusals of images."""
    sources = [*sorted((ROOT / "app").rglob("*.py")), ROOT / "imagecache" / "errors.py"]
    trees = [ast.parse(path.read_text()) for path in sources]
    found: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Call):
            found |= _codes_of_call(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if ast.unparse(target) in ("CODES", "code"):
                found |= _texts(node.value)
    return {code for code in found if re.fullmatch(r"[a-z]+(-[a-z]+)*", code)}


def _codes_of_call(call: ast.Call) -> set[str]:
    name = ast.unparse(call.func).split(".")[-1]
    if name == "not_found":
        return {f"{kind}-not-found" for kind in _texts(call.args[0])}
    place = _MAKERS.get(name)
    return _texts(call.args[place]) if place is not None and len(call.args) > place else set()


def _texts(node: ast.AST) -> set[str]:
    return {each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)}


def test_every_code_is_documented_and_no_other() -> None:
    text = (ROOT / "docs/api.md").read_text().partition("## Problems\n")[2]
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) + re.findall(r"`[a-z-]+-not-found`", text)
    documented = {code for row in rows for code in re.findall(r"`([a-z-]+)`", row)}
    assert documented == _codes()


def test_hints_are_for_codes_that_are_sent() -> None:
    assert HINTS.keys() - _codes() == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for place, anchor in _LINK.findall(document.read_text()):
        found = document.parent / place if place else document
        assert found.exists(), place
        if anchor:
            assert anchor in _anchors(found), f"{place}#{anchor}"


def _anchors(document: Path) -> set[str]:
    """How a heading is linked to: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
